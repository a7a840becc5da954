"""The command line: a thin skin over the verbs.

Results go to standard output, progress and errors to standard error. Exit status 0 is success, 2 an error of one line, 130 an interruption;
`verify` adds 1 (no evidence) and 3 (inconclusive).
"""

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

from countermark import config as configs
from countermark.errors import CountermarkError
from countermark.memory import keep_freed_memory

_VERBS: dict[type[configs.VerbConfig], str] = {
    configs.FetchConfig: "fetch",
    configs.ProtectConfig: "protect",
    configs.EvaluateConfig: "evaluate",
    configs.VerifyConfig: "verify",
    configs.StealConfig: "steal",
    configs.RemoveConfig: "remove",
    configs.PlanConfig: "plan",
    configs.QuickstartConfig: "quickstart",
    configs.ReproduceConfig: "reproduce",
}


_NO_MEMORY = "not enough memory; close other programs or take a smaller network"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status."""
    try:
        config = _parse(list(sys.argv[1:] if arguments is None else arguments))
        keep_freed_memory()
        verb = importlib.import_module(f"countermark.verbs.{_VERBS[type(config)]}")
        result = getattr(verb, _VERBS[type(config)])(config)
        if config.json:
            from countermark.report import print_json

            print_json(asdict(result))
        else:
            verb.show(result)
        sys.stdout.flush()
    except CountermarkError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        sys.stderr.write("countermark: interrupted; finished work is kept, run the same command again to continue\n")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except OSError as error:
        return _fail(f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}; free space or choose another folder")
    except MemoryError:
        return _fail(_NO_MEMORY)
    except RuntimeError as error:
        if "memory" not in str(error):  # torch says so in a RuntimeError, on processors and devices alike
            raise
        return _fail(_NO_MEMORY)
    return getattr(result, "exit_status", 0)


def _parse(arguments: list[str]) -> Any:
    """Parse the options into a configuration; tyro's boxes become one line."""
    import tyro
    from tyro.conf import FlagCreatePairsOff, OmitSubcommandPrefixes, PositionalRequiredArgs, subcommand

    verbs: Any = (
        Annotated[configs.ProtectConfig, subcommand("protect")]
        | Annotated[configs.EvaluateConfig, subcommand("evaluate")]
        | Annotated[configs.VerifyConfig, subcommand("verify")]
        | Annotated[configs.StealConfig, subcommand("steal")]
        | Annotated[configs.RemoveConfig, subcommand("remove")]
        | Annotated[configs.PlanConfig, subcommand("plan")]
        | Annotated[configs.QuickstartConfig, subcommand("quickstart")]
        | Annotated[configs.ReproduceConfig, subcommand("reproduce")]
    )
    target, prog = verbs, "countermark"
    description = "Train image classifiers that resist attack, mark them with keyed coins, and prove a stolen copy."
    description += "\n\nOne more verb: data fetch NAME."
    if arguments[:1] == ["data"]:
        if arguments[1:2] != ["fetch"]:
            raise CountermarkError("the verb data has one action; say: countermark data fetch NAME")
        target, prog, arguments = Annotated[configs.FetchConfig, PositionalRequiredArgs], "countermark data fetch", arguments[2:]
        description = "Fetch the files of a data set into the cache."
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(target, prog=prog, args=arguments, description=description, config=(FlagCreatePairsOff, OmitSubcommandPrefixes))
    except SystemExit as stop:
        if not stop.code:
            raise
        words = " ".join(said.getvalue().translate({ord(c): " " for c in "╭╮╰╯│─╔╗╚╝║═┌┐└┘"}).split())
        raise CountermarkError(words or f"the options are not complete; see {prog} --help") from None


def _fail(message: str) -> int:
    line = " ".join(message.split())
    sys.stderr.write(
        f"countermark: {''.join(c if c.isprintable() else '?' for c in line)}\n"
    )  # a suspect's words must not steer a terminal
    return 2
