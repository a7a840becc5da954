"""The command line: a thin skin over the verbs.

Results go to standard output, progress and errors to standard error. Exit status 0 is success, 2 an error of one line, 130 an interruption;
`verify` adds 1 (no evidence) and 3 (inconclusive), `adjudicate` 1 (dismissed) and 3 (undecidable). Only a verdict ends with a verdict's
status: whatever is raised, by us or by a library, ends with 2.
"""

import contextlib
import errno
import importlib
import io
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from countermark import config as configs
from countermark.errors import CountermarkError
from countermark.memory import keep_freed_memory
from countermark.text import visible

_VERBS: dict[type[configs.VerbConfig], str] = {
    configs.FetchConfig: "fetch",
    configs.ProtectConfig: "protect",
    configs.EvaluateConfig: "evaluate",
    configs.VerifyConfig: "verify",
    configs.ClaimConfig: "claim",
    configs.AdjudicateConfig: "adjudicate",
    configs.StealConfig: "steal",
    configs.RemoveConfig: "remove",
    configs.PlanConfig: "plan",
    configs.QuickstartConfig: "quickstart",
    configs.ReproduceConfig: "reproduce",
    configs.GuardConfig: "guard",
    configs.ServeConfig: "serve",
    configs.TraceConfig: "trace",
    configs.ClientAddConfig: "client_add",
    configs.LogHeadConfig: "log_head",
    configs.LogCheckConfig: "log_check",
    configs.LogEraseConfig: "log_erase",
    configs.BundleSignConfig: "bundle_sign",
    configs.BundleCheckConfig: "bundle_check",
}
_GROUPS: dict[str, dict[str, tuple[type[configs.VerbConfig], str]]] = {
    "data": {"fetch": (configs.FetchConfig, "--name")},
    "client": {"add": (configs.ClientAddConfig, "--name")},
    "log": {
        "head": (configs.LogHeadConfig, "--log"),
        "check": (configs.LogCheckConfig, "--log"),
        "erase": (configs.LogEraseConfig, "--log"),
    },
    "bundle": {"sign": (configs.BundleSignConfig, "--model"), "check": (configs.BundleCheckConfig, "--model")},
}
"""Verbs of two words, and the option that their third word stands for."""
_POSITIONAL = {"guard": "--model", "serve": "--model", "adjudicate": "--claim"}
"""Verbs whose second word may be the value of an option."""


_NO_MEMORY = "not enough memory; close other programs or take a smaller network"
_NARROWEST = 20  # columns; below, help and tables would be wrapped letter by letter
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


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
    try:
        config = _parse(arguments)
    except SystemExit:  # the help was shown; every other end of the parsing is an error of ours
        return 0
    keep_freed_memory()
    verb = importlib.import_module(f"countermark.verbs.{_VERBS[type(config)]}")
    result = getattr(verb, _VERBS[type(config)])(config)
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


def _parse(arguments: list[str]) -> Any:
    """Parse the options into a configuration; tyro's boxes become one line."""
    import tyro
    from tyro.conf import FlagCreatePairsOff, OmitSubcommandPrefixes, subcommand

    description: str | None
    verbs: Any = (
        Annotated[configs.ProtectConfig, subcommand("protect")]
        | Annotated[configs.EvaluateConfig, subcommand("evaluate")]
        | Annotated[configs.VerifyConfig, subcommand("verify")]
        | Annotated[configs.ClaimConfig, subcommand("claim")]
        | Annotated[configs.AdjudicateConfig, subcommand("adjudicate")]
        | Annotated[configs.StealConfig, subcommand("steal")]
        | Annotated[configs.RemoveConfig, subcommand("remove")]
        | Annotated[configs.PlanConfig, subcommand("plan")]
        | Annotated[configs.QuickstartConfig, subcommand("quickstart")]
        | Annotated[configs.ReproduceConfig, subcommand("reproduce")]
        | Annotated[configs.GuardConfig, subcommand("guard")]
        | Annotated[configs.ServeConfig, subcommand("serve")]
        | Annotated[configs.TraceConfig, subcommand("trace")]
    )
    target, prog = verbs, "countermark"
    description = "Train image classifiers that resist attack, mark them with keyed coins, and prove a stolen copy."
    description += "\n\nMore verbs: data fetch, client add, log head, log check, log erase, bundle sign, bundle check."
    options = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    twice = next((option for option in options if options.count(option) > 1), None)
    if "" in arguments or twice:
        raise CountermarkError(f"{twice} is given twice; give it once" if twice else "an argument is empty; leave it out or fill it in")
    if len(arguments) > 1 and arguments[0] in _POSITIONAL and not arguments[1].startswith("-"):
        arguments = [arguments[0], _POSITIONAL[arguments[0]], *arguments[1:]]
    if arguments[:1] and arguments[0] in _GROUPS:
        group, actions = arguments[0], _GROUPS[arguments[0]]
        if arguments[1:2] in (["--help"], ["-h"]):
            arguments = [group, next(iter(actions)), "--help"]
        if arguments[1:2] == [] or arguments[1] not in actions:
            raise CountermarkError(f"say what to do: {', '.join(f'countermark {group} {action}' for action in actions)}")
        (target, option), prog, arguments = actions[arguments[1]], f"countermark {group} {arguments[1]}", arguments[2:]
        if arguments and not arguments[0].startswith("-"):
            arguments = [option, *arguments]
        description = None
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(target, prog=prog, args=arguments, description=description, config=(FlagCreatePairsOff, OmitSubcommandPrefixes))
    except SystemExit as stop:
        if not stop.code:
            raise
        words = " ".join(_ESCAPES.sub("", said.getvalue()).translate({ord(c): " " for c in "╭╮╰╯│─╔╗╚╝║═┌┐└┘"}).split())
        raise CountermarkError(words or f"the options are not complete; see {prog} --help") from None


def _fail(message: str) -> int:
    line = " ".join(message.split())
    with contextlib.suppress(OSError, ValueError):  # nobody reads standard error either
        sys.stderr.write(f"countermark: {visible(line)}\n")
        sys.stderr.flush()
    return 2
