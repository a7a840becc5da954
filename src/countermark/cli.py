"""The command line: a thin skin over the verbs.

Results go to standard output, progress and errors to standard error. Exit status 0 is success, 2 an error of one line, 130 an interruption;
`verify` adds 1 (no evidence) and 3 (inconclusive), `adjudicate` 1 (dismissed) and 3 (undecidable). Only a verdict ends with a verdict's
status: whatever is raised, by us or by a library, ends with 2.
"""

import contextlib
import errno
import importlib
import inspect
import io
import os
import re
import shutil
import signal
import sys
import textwrap
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, fields
from itertools import takewhile
from pathlib import Path
from typing import Any

from countermark import __version__
from countermark import config as configs
from countermark.errors import CountermarkError
from countermark.memory import keep_freed_memory
from countermark.names import nearest
from countermark.text import brief, complain, visible


@dataclass(frozen=True)
class _Verb:
    """A verb: its options, its module, and the option that a first word without one stands for."""

    config: type[configs.VerbConfig]
    module: str
    first: str | None = None

    @property
    def summary(self) -> str:
        """Its first line of help."""
        return inspect.getdoc(self.config) or ""


_VERBS = {
    "data fetch": _Verb(configs.FetchConfig, "fetch", "--name"),
    "protect": _Verb(configs.ProtectConfig, "protect"),
    "evaluate": _Verb(configs.EvaluateConfig, "evaluate"),
    "verify": _Verb(configs.VerifyConfig, "verify"),
    "claim": _Verb(configs.ClaimConfig, "claim"),
    "adjudicate": _Verb(configs.AdjudicateConfig, "adjudicate", "--claim"),
    "steal": _Verb(configs.StealConfig, "steal"),
    "remove": _Verb(configs.RemoveConfig, "remove"),
    "plan": _Verb(configs.PlanConfig, "plan"),
    "guard": _Verb(configs.GuardConfig, "guard", "--model"),
    "client add": _Verb(configs.ClientAddConfig, "client_add", "--name"),
    "serve": _Verb(configs.ServeConfig, "serve", "--model"),
    "trace": _Verb(configs.TraceConfig, "trace"),
    "log head": _Verb(configs.LogHeadConfig, "log_head", "--log"),
    "log check": _Verb(configs.LogCheckConfig, "log_check", "--log"),
    "log erase": _Verb(configs.LogEraseConfig, "log_erase", "--log"),
    "bundle sign": _Verb(configs.BundleSignConfig, "bundle_sign", "--model"),
    "bundle check": _Verb(configs.BundleCheckConfig, "bundle_check", "--model"),
    "quickstart": _Verb(configs.QuickstartConfig, "quickstart"),
    "reproduce": _Verb(configs.ReproduceConfig, "reproduce"),
}
"""Every verb, of one word or two, in the order of the help."""

_ABOUT = """Train image classifiers that resist attack, mark them with keyed coins, and prove a
stolen copy."""
_HELP = ("--help", "-h")
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
_KINDS = {int: "a whole number", float: "a number"}
_NO_MEMORY = "not enough memory; close other programs or take a smaller network"
_NARROWEST = 20  # columns; below, help and tables would be wrapped letter by letter


class _TerminatedError(BaseException):
    """The process was told to stop (SIGTERM)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status."""
    try:
        _prepare()
        return _run(list(sys.argv[1:] if arguments is None else arguments))
    except CountermarkError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted; finished work is kept, run the same command again to continue")
        return 130
    except _TerminatedError:
        _fail("stopped; finished work is kept, run the same command again to continue")
        return 143
    except BrokenPipeError:
        return _nobody_reads()
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        where = f" ({error.filename})" if error.filename else ""
        return _fail(f"{error.strerror or error}{where}; {'free some space' if full else 'check the path and its permissions'}")
    except MemoryError:
        return _fail(_NO_MEMORY)
    except BaseException as error:  # a library's own exit, and the panic of one in Rust, are no `Exception`
        if os.environ.get("COUNTERMARK_TRACEBACK"):
            sys.stderr.writelines(f"{visible(line)}\n" for line in traceback.format_exc().splitlines())
        text = str(error)
        if any(
            word in text for word in ("memory", "bad_alloc", "create a primitive", "failed to map segment")
        ):  # torch, oneDNN, the loader
            return _fail(_NO_MEMORY)
        return _fail(
            f"an error that should not happen, {type(error).__name__}: {text}; set COUNTERMARK_TRACEBACK=1 to see where and report it"
        )


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["--version"]:
        print(f"countermark {__version__}", flush=True)
        return 0
    if arguments[:1] and arguments[0] in _HELP:
        print(_overview(), flush=True)
        return 0
    if arguments[1:] and arguments[0] in _groups() and arguments[1] in _HELP:
        print(_overview(f"{arguments[0]} "), flush=True)
        return 0
    name, rest = _named(arguments)
    try:
        config: Any = _parse(name, rest).placed()
    except SystemExit:  # the help was shown; every other end of the parsing is an error of ours
        return 0
    keep_freed_memory()
    module = _VERBS[name].module
    verb = importlib.import_module(f"countermark.verbs.{module}")
    result = getattr(verb, module)(config)
    try:
        if config.json:
            from countermark.report import print_json

            print_json(asdict(result))
        else:
            verb.show(result)
        sys.stdout.flush()
    except (OSError, SystemExit) as error:  # rich turns a closed pipe into an exit
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            return _fail(f"cannot write to standard output: {error.strerror}; the work itself is done")
        return _nobody_reads()
    return int(getattr(result, "exit_status", 0))


def _prepare() -> None:
    """Make the streams safe to write to, and a termination as orderly as an interruption."""
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115 (for the life of the process)
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if shutil.get_terminal_size().columns < _NARROWEST:
        os.environ["COLUMNS"] = str(_NARROWEST)
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, _terminate)


def _terminate(_number: int, _frame: object) -> None:
    raise _TerminatedError


def _nobody_reads() -> int:
    """Nobody reads standard output any more: say so, and keep the interpreter from saying it again at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return _fail("nobody reads standard output any more; finished work is kept")


def _groups() -> list[str]:
    """The first words of verbs of two words."""
    return list(dict.fromkeys(name.split()[0] for name in _VERBS if " " in name))


def _overview(prefix: str = "") -> str:
    """The help on all verbs, or on those of a group."""
    verbs = {name: verb.summary for name, verb in _VERBS.items() if name.startswith(prefix)}
    column = max(map(len, verbs)) + 4
    width = max(shutil.get_terminal_size().columns, column + _NARROWEST)
    lines = [f"usage: countermark {prefix or 'VERB '}{'ACTION ' if prefix else ''}[OPTIONS]", ""]
    lines += [] if prefix else [*textwrap.wrap(_ABOUT, width), ""]
    for name, summary in verbs.items():
        first, rest = f"  {name}".ljust(column), " " * column
        lines += textwrap.wrap(summary, width, initial_indent=first, subsequent_indent=rest)
    more = f"countermark {prefix or 'VERB '}{'ACTION ' if prefix else ''}--help shows the options"
    more += "." if prefix else " of one, countermark --version the release."
    return "\n".join([*lines, "", *textwrap.wrap(more, width)])


def _named(arguments: list[str]) -> tuple[str, list[str]]:
    """The verb that the first words name, and the words after it."""
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in _VERBS:
            return name, arguments[words:]
    if not arguments:
        raise CountermarkError(f"say what to do: {', '.join(_VERBS)}; countermark --help says more")
    word, actions = arguments[0], [name for name in _VERBS if name.startswith(f"{arguments[0]} ")]
    if actions and (not arguments[1:] or arguments[1].startswith("-")):
        known = ", ".join(f"countermark {name}" for name in actions)
        raise CountermarkError(f"say what to do: {known}")
    if actions:
        guess = nearest(arguments[1], {name.split()[-1]: name for name in actions})
        guess = guess or f"; there is {', '.join(actions)}"
        unknown = f"unknown action {brief(arguments[1])} of {word}{guess}"
        raise CountermarkError(f"{unknown}; see countermark {word} --help")
    if word.startswith("-"):
        order = f"{brief(word)} comes before the verb; give the verb first, then its options"
        raise CountermarkError(f"{order}; see countermark --help")
    meant = {name.split()[-1]: name for name in _VERBS}
    meant |= {name: name for name in (*_VERBS, *_groups())}
    unknown = f"unknown verb {brief(word)}{nearest(word, meant)}"
    raise CountermarkError(f"{unknown}; countermark --help lists all verbs")


def _parse(name: str, arguments: list[str]) -> configs.VerbConfig:
    """Parse the options of a verb; whatever is wrong with them becomes one line."""
    import tyro
    from tyro.conf import FlagCreatePairsOff

    verb, see = _VERBS[name], f"see countermark {name} --help"
    options = {f"--{field.name.replace('_', '-')}": field for field in fields(verb.config)}
    if verb.first is not None and arguments and not arguments[0].startswith("-"):
        arguments = [verb.first, *arguments]
    asked = any(argument in _HELP for argument in arguments)
    given = [_option(argument) for argument in arguments if argument.startswith("--")]
    unknown = next((option for option in given if option not in (*options, "--help")), None)
    twice = next((option for option in given if given.count(option) > 1), None)
    needed = [option for option, field in options.items() if _required(field)]
    missing = [option for option in needed if option not in given]
    if "" in arguments:
        raise CountermarkError("an argument is empty; leave it out or fill it in")
    if unknown is not None:
        guess = nearest(unknown, {option: option for option in options})
        raise CountermarkError(f"unknown option {brief(unknown)}{guess}; {see}")
    if twice is not None:
        several = "tuple" in str(options[twice].type)
        how = "with all its values behind it" if several else "once"
        raise CountermarkError(f"{twice} is given twice; give it {how}")
    if missing and not asked:
        are = "is" if len(missing) == 1 else "are"
        raise CountermarkError(f"{', '.join(missing)} {are} missing; {see}")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            config, rest = tyro.cli(
                verb.config,
                prog=f"countermark {name}",
                args=arguments,
                return_unknown_args=True,
                config=(FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        wrong = _wrong_value(options, arguments, said.getvalue())
        raise CountermarkError(f"{wrong}; {see}") from None
    if rest:
        raise CountermarkError(f"{brief(rest[0])} belongs to no option; {see}")
    return config


def _option(argument: str) -> str:
    """The option that an argument names: without its value, and spelt as in the help."""
    return argument.partition("=")[0].replace("_", "-")


def _required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _wrong_value(options: Mapping[str, Field[Any]], arguments: list[str], said: str) -> str:
    """What is wrong with the value of the option that tyro's words are about."""
    found = re.search(r"--[a-z][a-z-]*", _ESCAPES.sub("", said))
    option = found.group() if found else ""
    if option not in options:
        return "the options cannot be understood"
    place = next(i for i, argument in enumerate(arguments) if _option(argument) == option)
    after = takewhile(lambda word: not word.startswith("--"), arguments[place + 1 :])
    value = arguments[place].partition("=")[2] or " ".join(after)
    kind = next((kind for kind in _KINDS if kind.__name__ in str(options[option].type)), None)
    wanted = _KINDS[kind] if kind else "a value"
    return f"{option} takes {wanted}, {f'not {brief(value)}' if value else 'and none is given'}"


def _fail(message: str) -> int:
    complain(message)
    return 2
