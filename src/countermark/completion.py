"""Completion for shells: a script that knows every verb, its options and their choices.

The script is made once, out of the configurations, so that a shell need not ask Python. Where
neither a choice nor an option fits, the shell completes paths.
"""

from collections.abc import Mapping
from dataclasses import fields

from countermark.manual import metavar
from countermark.options import VerbConfig, hints_of, option

_SCRIPT = """_countermark() {
    local current="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}"
    local verb="${COMP_WORDS[1]}" options="" words=""
    case "$verb" in @groups@) verb="$verb ${COMP_WORDS[2]}" ;; esac
    case "$verb" in
@options@
    esac
    case "$verb $before" in
@choices@
        @values@) ;;
        *) words="$options" ;;
    esac
    case "$current" in -*) words="$options" ;; esac
    if [ "$COMP_CWORD" = 1 ]; then words="@verbs@"; fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}
complete -o bashdefault -o default -F _countermark countermark"""
SHELLS: Mapping[str, str] = {
    "bash": _SCRIPT,
    "zsh": f"autoload -Uz compinit bashcompinit && compinit && bashcompinit\n{_SCRIPT}",
}
"""The shells and their scripts, in which `script` fills in the words."""


def script(shell: str, verbs: Mapping[str, type[VerbConfig]]) -> str:
    """The completion of a shell, one of `SHELLS`, for verbs of one word and two."""
    groups: dict[str, list[str]] = {}
    options, choices, values = {}, {"--completion --completion": " ".join(SHELLS)}, []
    for name, kind in verbs.items():
        first, _, action = name.partition(" ")
        if action:
            groups.setdefault(first, []).append(action)
        options[name] = " ".join(option(each.name) for each in fields(kind))
        for each in fields(kind):
            before = f"{name} {option(each.name)}"
            takes = metavar(hints_of(kind)[each.name])
            if "|" in takes:
                choices[before] = takes.removesuffix(" ...").replace("|", " ")
            elif takes:
                values.append(before)
            if not each.kw_only:
                values.append(f"{name} {action or first}")
    # The action is there in part, or not at all yet.
    choices |= {f'{group} "*" {group}': " ".join(actions) for group, actions in groups.items()}
    firsts = dict.fromkeys(name.split()[0] for name in verbs)
    filled = SHELLS[shell]
    for mark, text in {
        "@groups@": "|".join(groups),
        "@options@": _rows("options", options),
        "@choices@": _rows("words", choices),
        "@values@": " | ".join(f'"{each}"' for each in values),
        "@verbs@": " ".join((*firsts, "--help", "--version", "--completion")),
    }.items():
        filled = filled.replace(mark, text)
    return filled


def _rows(name: str, words: Mapping[str, str]) -> str:
    return "\n".join(f'        "{each}") {name}="{text}" ;;' for each, text in words.items())
