"""The command line: a thin layer over the verbs.

Results go to standard output, progress and errors to standard error. Exit status 0 is success, 2 an
error of one line, 130 an interruption and 143 a termination (SIGTERM). `verify` and `trace` add 1
(no evidence) and 3 (inconclusive), `adjudicate` 1 (dismissed) and 3 (undecidable), `data check` 1
(cannot be used as it is). Only a finding ends with its status: any other exception, ours or a
library's, ends with 2.
"""

import ast
import contextlib
import errno
import importlib
import io
import os
import pkgutil
import re
import shutil
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, asdict, fields
from itertools import takewhile
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

from countermark import completion, manual
from countermark.device import torchrun_processes
from countermark.errors import CountermarkError, choose, nearest
from countermark.memory import check_room, keep_freed_memory
from countermark.options import VerbConfig, option, required, takes_several, wrong
from countermark.text import brief, complain, visible
from countermark.threat import budget
from countermark.version import __version__

if TYPE_CHECKING:
    from tyro.constructors import ConstructorRegistry


TASKS = {
    "make": (
        *("data fetch", "data check", "protect", "export"),
        *("card", "bom", "bundle sign", "bundle check"),
    ),
    "check": ("evaluate", "verify", "plan"),
    "serve": (
        *("guard", "client add", "client rotate", "client revoke", "client list", "serve"),
        *("trace", "log head", "log check", "log erase", "log renew"),
    ),
    "dispute": ("claim", "adjudicate"),
    "study": ("quickstart", "steal", "remove", "reproduce"),
}
"""What people do, and every verb for it, of one word or two, in the order of the help.

A verb is a file of `verbs/` and a function of the same name in it, with an underscore for a space.
"""
VERBS = tuple(verb for verbs in TASKS.values() for verb in verbs)
"""Every verb, in the order of `TASKS`."""

_ABOUT = """Train image classifiers that resist attack, mark them with keyed coins, and prove a
stolen copy."""
_HELP = ("--help", "-h")
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
_NO_MEMORY = "not enough memory; close other programs or take a smaller network"
# What torchrun sets for its processes.
_TORCHRUN = re.compile(
    "((LOCAL|GROUP|ROLE)_)?RANK|((LOCAL|GROUP|ROLE)_)?WORLD_SIZE|ROLE_NAME|MASTER_(ADDR|PORT)"
    "|TORCHELASTIC_.*"
)
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
        return _fail(
            f"{error.strerror or error}{where}; "
            f"{'free some space' if full else 'check the path and its permissions'}"
        )
    except MemoryError:
        return _fail(_NO_MEMORY)
    # A library's own exit, and the panic of one in Rust, are no `Exception`.
    except BaseException as error:
        if os.environ.get("COUNTERMARK_TRACEBACK"):
            sys.stderr.writelines(
                f"{visible(line)}\n" for line in traceback.format_exc().splitlines()
            )
        text = str(error)
        # These are the words of torch, oneDNN and the loader.
        if any(
            word in text
            for word in ("memory", "bad_alloc", "create a primitive", "failed to map segment")
        ):
            return _fail(_NO_MEMORY)
        return _fail(
            f"an error that should not happen, {type(error).__name__}: {text}; "
            "set COUNTERMARK_TRACEBACK=1 to see where and report it"
        )


def _run(arguments: list[str]) -> int:
    if torchrun_processes() and os.environ["RANK"] != "0":
        return 0  # the first process does the work and starts those of its trainings itself
    if arguments[:1] == ["--version"]:
        print(f"countermark {__version__}", flush=True)
        return 0
    if arguments[:1] and arguments[0] in _HELP:
        print(_overview(), flush=True)
        return 0
    if arguments[:1] == ["--completion"]:
        choose("shell", " ".join(arguments[1:]), completion.SHELLS)
        verbs = {name: _imported(name)[1].config for name in VERBS}
        print(completion.script(arguments[1], verbs), flush=True)
        return 0
    if arguments[1:] and arguments[0] in _groups() and arguments[1] in _HELP:
        print(_overview(f"{arguments[0]} "), flush=True)
        return 0
    name, rest = _named(arguments)
    check_room()
    keep_freed_memory()
    module, verb = _imported(name)
    if any(argument in _HELP for argument in rest):
        print(manual.page(name, verb.config), flush=True)
        return 0
    config = _parse(name, verb.config, rest)
    if torchrun_processes():
        _stand_for_all(getattr(config, "devices", None))
    # What code of the user's prints must not stand beside the one object.
    with contextlib.redirect_stdout(sys.stderr) if config.json else contextlib.nullcontext():
        result = verb(**vars(config))
    try:
        if config.json:
            from countermark.terminal import print_json

            print_json(asdict(result))
        else:
            module.show(result)
        sys.stdout.flush()
    except (OSError, SystemExit) as error:  # rich turns a closed pipe into an exit
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            return _fail(
                f"cannot write to standard output: {error.strerror}; the work itself is done"
            )
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


def _stand_for_all(devices: int | None) -> None:
    """Do alone what torchrun started several processes for; a verb starts as many for a training.

    Raises:
        CountermarkError: they are on several machines, or the verb would start another number.
    """
    started = torchrun_processes()
    if started != int(os.environ.get("LOCAL_WORLD_SIZE", started)):
        raise CountermarkError(
            "torchrun started processes on several machines, and a verb uses the devices of one; "
            "call countermark.training.train on several"
        )
    if devices not in (None, started):
        raise CountermarkError(
            f"torchrun started {started} process{'' if started == 1 else 'es'}, and --devices is "
            f"{devices}; give --devices {started}, or leave torchrun out: --devices N starts the "
            "processes itself"
        )
    for name in [name for name in os.environ if _TORCHRUN.fullmatch(name)]:
        del os.environ[name]


def _terminate(_number: int, _frame: object) -> None:
    raise _TerminatedError


def _nobody_reads() -> int:
    """Say that nobody reads standard output any more.

    The interpreter is kept from saying it again as it exits.
    """
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return _fail("nobody reads standard output any more; finished work is kept")


def _file(name: str) -> str:
    """The file of a verb, and its function in there."""
    return name.replace(" ", "_")


def _imported(name: str) -> tuple[Any, Any]:
    """The module of a verb, and its function."""
    module = importlib.import_module(f"countermark.verbs.{_file(name)}")
    return module, getattr(module, _file(name))


def _summary(name: str) -> str:
    """The first line of a verb's help.

    It is read from the source, because importing the verb may be slow.
    """
    source = pkgutil.get_data("countermark.verbs", f"{_file(name)}.py") or b""
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    words = (ast.get_docstring(each) or "" for each in classes if each.name.endswith("Config"))
    return next(words, "").partition("\n")[0]


def _groups() -> list[str]:
    """The first words of verbs of two words."""
    return list(dict.fromkeys(name.split()[0] for name in VERBS if " " in name))


def _overview(prefix: str = "") -> str:
    """The help on all verbs, with what people do in front, or on those of a group."""
    verbs = [name for name in VERBS if name.startswith(prefix)]
    heads = {} if prefix else {names[0]: task for task, names in TASKS.items()}
    indent = 2 if prefix else max(map(len, TASKS)) + 4
    column = indent + max(map(len, verbs)) + 2
    width = max(shutil.get_terminal_size().columns, column + _NARROWEST)
    lines = [f"usage: countermark {prefix or 'VERB '}{'ACTION ' if prefix else ''}[OPTIONS]", ""]
    lines += [] if prefix else [*textwrap.wrap(_ABOUT, width), ""]
    for name in verbs:
        first = f"  {heads.get(name, '')}".ljust(indent) + name
        rest = " " * column
        lines += textwrap.wrap(
            _summary(name), width, initial_indent=first.ljust(column), subsequent_indent=rest
        )
    more = f"countermark {prefix or 'VERB '}{'ACTION ' if prefix else ''}--help shows the options"
    more += "" if prefix else ", --version the release, --completion bash|zsh a completion"
    return "\n".join([*lines, "", *textwrap.wrap(f"{more}.", width)])


def _named(arguments: list[str]) -> tuple[str, list[str]]:
    """The verb that the first words name, and the words after it."""
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in VERBS:
            return name, arguments[words:]
    if not arguments:
        raise CountermarkError(f"say what to do: {', '.join(VERBS)}; countermark --help says more")
    word, actions = arguments[0], [name for name in VERBS if name.startswith(f"{arguments[0]} ")]
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
    meant = {name.split()[-1]: name for name in VERBS}
    meant |= {name: name for name in (*VERBS, *_groups())}
    unknown = f"unknown verb {brief(word)}{nearest(word, meant)}"
    raise CountermarkError(f"{unknown}; countermark --help lists all verbs")


def _parse(name: str, kind: type[VerbConfig], arguments: list[str]) -> VerbConfig:
    """Parse the options of a verb; whatever is wrong with them becomes one line."""
    see = f"see countermark {name} --help"
    known = {option(field.name): field for field in fields(kind)}
    main = next((each for each, field in known.items() if not field.kw_only), None)
    if main is not None and arguments and not arguments[0].startswith("-"):
        arguments = [main, *arguments]
    given = [_option(argument) for argument in arguments if argument.startswith("--")]
    unknown = next((each for each in given if each not in known), None)
    twice = next((each for each in given if given.count(each) > 1), None)
    needed = [each for each, field in known.items() if required(field)]
    missing = [each for each in needed if each not in given]
    if "" in arguments:
        raise CountermarkError("an argument is empty; leave it out or fill it in")
    if unknown is not None:
        guess = nearest(unknown, {each: each for each in known})
        raise CountermarkError(f"unknown option {brief(unknown)}{guess}; {see}")
    if twice is not None:
        how = "with all its values behind it" if takes_several(kind, known[twice].name) else "once"
        raise CountermarkError(f"{twice} is given twice; give it {how}")
    if missing:
        are = "is" if len(missing) == 1 else "are"
        raise CountermarkError(f"{', '.join(missing)} {are} missing; {see}")
    import tyro
    from tyro.conf import FlagCreatePairsOff

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), _types():
            config, rest = tyro.cli(
                kind,
                prog=f"countermark {name}",
                args=arguments,
                return_unknown_args=True,
                config=(FlagCreatePairsOff,),
            )
    except SystemExit:
        wrong = _wrong_value(kind, known, arguments, said.getvalue())
        raise CountermarkError(f"{wrong}; {see}") from None
    if rest:
        raise CountermarkError(f"{brief(rest[0])} belongs to no option; {see}")
    return config


def _types() -> "ConstructorRegistry":
    """How words become numbers, which may be fractions, and places."""
    from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec

    def spec(metavar: str, make: Callable[[str], Any], kinds: tuple[type, ...]) -> Any:
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar=metavar,
            instance_from_str=lambda words: make(words[0]),
            is_instance=lambda value: isinstance(value, kinds),
            str_from_instance=lambda value: [
                f"{value:g}" if isinstance(value, float) else str(value)
            ],
        )

    def number(word: str) -> float:
        try:
            return budget(word)
        except CountermarkError as error:
            raise ValueError(str(error)) from error

    registry = ConstructorRegistry()

    @registry.primitive_rule
    def rule(known: Any) -> Any:
        parts = [part for part in get_args(known.type) if part is not NoneType]
        if known.type is float:
            return spec("FLOAT", number, (int, float))
        if known.type is str:
            return spec("TEXT", str, (str,))
        union = get_origin(known.type) in (Union, UnionType)
        return spec("PATH", str, (str, Path)) if union and len(parts) > 1 and str in parts else None

    return registry


def _option(argument: str) -> str:
    """The option that an argument names: without its value, and spelt as in the help."""
    return argument.partition("=")[0].replace("_", "-")


def _wrong_value(
    kind: type[VerbConfig], known: Mapping[str, Field[Any]], arguments: list[str], said: str
) -> str:
    """What is wrong with the value of the option that tyro's words are about."""
    found = re.search(r"--[a-z][a-z-]*", _ESCAPES.sub("", said))
    name = found.group() if found else ""
    if name not in known:
        return "the options cannot be understood"
    place = next(i for i, argument in enumerate(arguments) if _option(argument) == name)
    after = takewhile(lambda word: not word.startswith("--"), arguments[place + 1 :])
    value = arguments[place].partition("=")[2]
    words = [value] if value else list(after)
    return wrong(kind, known[name].name, words)


def _fail(message: str) -> int:
    complain(message)
    return 2
