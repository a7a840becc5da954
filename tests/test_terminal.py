"""Results and progress: 80 columns on a terminal, few lines in a log, one output in a notebook."""

import importlib
import inspect
import io
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from html import unescape
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from countermark import cli, terminal
from countermark.claims import Check
from countermark.data.check import Findings
from countermark.data.reading import Found
from countermark.evaluation import StrictAccuracy
from countermark.evidence import judge, untested
from countermark.guard.tracing import Trace, Traced
from countermark.marking import Standing
from countermark.options import VerbConfig, verb
from countermark.terminal import (
    as_html,
    bar,
    live,
    note,
    print_lines,
    print_table,
    told_to,
    unbroken,
)
from countermark.verbs.adjudicate import Adjudication
from countermark.verbs.asking import Answers
from countermark.verbs.bundle_check import CheckedBundle
from countermark.verbs.bundle_sign import SignedBundle
from countermark.verbs.claim import Claimed
from countermark.verbs.client_add import Added
from countermark.verbs.client_list import ClientList, Listed
from countermark.verbs.client_revoke import Revoked
from countermark.verbs.client_rotate import Rotated
from countermark.verbs.copies import Copy
from countermark.verbs.data_fetch import Fetched
from countermark.verbs.evaluate import Evaluation
from countermark.verbs.export import Exported
from countermark.verbs.guard import Calibrated
from countermark.verbs.log_check import Checked
from countermark.verbs.log_erase import Erased
from countermark.verbs.log_head import PublishedHead
from countermark.verbs.log_renew import Renewed
from countermark.verbs.papers import Paper
from countermark.verbs.plan import plan
from countermark.verbs.plan import show as show_plan
from countermark.verbs.protect import Protection
from countermark.verbs.quickstart import Story, Suspicion
from countermark.verbs.reproduce import Planned, Reproduction
from countermark.verbs.serve import Served
from countermark.verbs.trace import Tracing
from countermark.verbs.verify import Verification

HOSTILE = "<script>alert(1)</script>\x1b[2J\n\u202e& [red]"


@dataclass(frozen=True, kw_only=True)
class WorkConfig(VerbConfig):
    """Work."""

    rounds: int = 1
    """How often."""


@dataclass(frozen=True)
class Worked:
    rounds: int


@verb(WorkConfig)
def work(config: WorkConfig) -> Worked:
    for number in range(config.rounds):
        with bar("training", 100) as running:
            for step in range(100):
                running.advance()
                running.text(f"step {step}")
            running.note(f"round {number} is done")
    note("a word from below")
    if config.rounds > 1:
        work(rounds=1)
    return Worked(config.rounds)


def show(result: Worked) -> None:
    print_table("work", ("", "rounds"), [["done", str(result.rounds)]])
    print_lines(HOSTILE, "")


class Handle:
    """What IPython gives for an output that is drawn anew."""

    def __init__(self) -> None:
        self.pages: list[str] = []

    def update(self, page: str) -> None:
        self.pages.append(page)


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> list[Handle]:
    """A notebook's shell that stands in for IPython; the outputs of its cell."""
    made: list[Handle] = []

    def display(_page: str, display_id: bool) -> Handle:
        assert display_id
        made.append(Handle())
        return made[-1]

    shell = ModuleType("IPython")
    shell.get_ipython = type("ZMQInteractiveShell", (), {})  # type: ignore[attr-defined]
    parts = ModuleType("IPython.display")
    parts.HTML, parts.display = str, display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setitem(sys.modules, "IPython.display", parts)
    return made


def words(page: str) -> list[str]:
    return unescape(re.sub(r"<[^>]*>", " ", page)).split()


def test_a_result_in_a_notebook_says_what_a_terminal_says(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found: Any = plan(p=1e-9)
    show_plan(found)
    assert words(found._repr_html_()) == capsys.readouterr().out.split()
    assert capsys.readouterr().out == ""


def test_nothing_in_a_result_is_html() -> None:
    page = as_html(lambda: show(Worked(3)))
    assert "<script>" not in page
    assert "\x1b" not in page
    assert r"\n\u202e&amp; [red]" in page
    assert "<th style='text-align:right'>rounds</th>" in page
    assert page.count("<tr>") == 2


def test_a_page_that_fails_leaves_the_terminal_as_it_was(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails() -> None:
        print_lines("lost")
        raise KeyError

    with pytest.raises(KeyError):
        as_html(fails)
    print_lines("kept")
    assert capsys.readouterr().out == "kept\n"


def test_a_call_in_a_notebook_has_one_output_however_long_it_is(
    outputs: list[Handle], capsys: pytest.CaptureFixture[str]
) -> None:
    """Verbs that call others too, as the quickstart does."""
    work(rounds=48)
    (output,) = outputs
    assert capsys.readouterr() == ("", "")
    assert len(output.pages) < 200  # it is not drawn at every step
    assert "<progress value=" in output.pages[0]
    last = words(output.pages[-1])
    assert " ".join(last).count("is done") == 49
    assert " ".join(last).endswith("a word from below")
    assert "<progress" not in output.pages[-1]
    work()
    assert len(outputs) == 2


def test_a_program_that_listens_is_told_instead_of_the_notebook(outputs: list[Handle]) -> None:
    told: list[Mapping[str, Any]] = []
    with told_to(told.append), live(), bar("work", 50) as running:
        for _ in range(50):
            running.advance()
    assert told[0] == {"what": "work", "done": 1, "total": 50, "text": ""}
    assert not any("<progress" in page for output in outputs for page in output.pages)


def test_what_is_shown_in_a_notebook_is_not_html(outputs: list[Handle]) -> None:
    with live(), bar(HOSTILE, 1) as running:
        running.text(HOSTILE)
        running.advance()
        print_lines(HOSTILE)
    assert not any("<script>" in page or "\x1b" in page for page in outputs[0].pages)


def test_a_terminals_shell_is_no_notebook(
    outputs: list[Handle], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = type("TerminalInteractiveShell", (), {})
    monkeypatch.setattr(sys.modules["IPython"], "get_ipython", shell)
    work()
    assert outputs == []
    assert "round 0 is done" in capsys.readouterr().err


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_result_shows_itself(name: str) -> None:
    module = importlib.import_module(f"countermark.verbs.{cli._file(name)}")
    result = inspect.signature(getattr(module, cli._file(name))).return_annotation
    assert callable(result._repr_html_)
    assert callable(module.show)


# Width.

TEST = judge(list(range(800)), [1] * 629 + [-1] * 143 + [0] * 28)
ANSWERS = Answers(28, 3, "the server said 503 Service Unavailable", 96.5, "", "")
DOUBTS = ("28 trials got no answer (3 of them answers that changed); they count as neither.",)
VERIFIED = Verification(
    "https://api.example.com/v2/models/cats", "coin", TEST, 78.6, None, ANSWERS, DOUBTS, None
)
PUBLISHED = Verification("copy", "ood", untested([1] * 98 + [0] * 2), 98.0, "copy", ANSWERS, (), "")
COPY = Copy("copies/pruned", 96.84, 85.92, 0.25, "cpu (AMD EPYC), bf16", 312.4)
STRICT = StrictAccuracy(
    1000, 98.1, 89.0, 71.2, {"PGD": 91, "APGD-CE": 60, "APGD-T": 60, "Square": 50, "FAB-T": 8}
)
MARK = Standing(800, 100.0, 95.0, TEST, TEST, 0.5)
PROTECTION = Protection(
    "mine",
    "coin",
    99.02,
    95.49,
    100.0,
    98.84,
    95.63,
    53.5,
    MARK,
    12,
    83.0,
    {"training": 900, "validation": 5, "test": 7},
    800,
    0.25,
    "ab" * 32,
    "cpu",
    312.0,
)
FINDINGS = Findings(
    Found(
        "photos of cats",
        ("a cat", "a dog"),
        {"train": (12_345, 67_890), "test": (1_234, 5_678)},
        {"640x480": 50_000, "1024x768": 30_000, "1920x1080": 7_000, "32x32": 147},
        True,
        {"alpha": 1, "grey": 12, "palette": 345},
        (("a cat/broken picture number one.png", "is cut off after 1024 of 4096 bytes"),),
        3,
        12,
        3,
        True,
    ),
    32,
    (3, 32, 32),
    "ab" * 32,
    {"training": 50_000, "validation": 500, "bases": 9_000, "thief": 9_000, "test": 6_912},
)
TRACED = [
    Traced(name, "no evidence", -0.1, -0.5, 120, 118, 3, 118.4, -0.1)
    for name in ("anna", "a-longer-name")
]


def story() -> Story:
    titles = ("the marked model", "before the mark", "pruned copy", "pruned, fine-tuned")
    return Story("quickstart", tuple(Suspicion(t, 99.0, 95.5, VERIFIED) for t in titles), 301.0)


def study(**changes: Any) -> Reproduction:
    work = tuple(
        Planned(f"mnist {n}: ADVTR", (), "fine-tuning", "ab" * 32, False, 1.0) for n in (0, 1)
    )
    given = {"report": None, "work": work, "verdicts": (), "left": 272, **changes}
    return Reproduction("study", 272, 0, seconds_estimated=4200.0, seconds=9.0, **given)


RESULTS: Mapping[str, list[Any]] = {
    "data fetch": [
        Fetched("mnist", "/home/anna/.cache/countermark/mnist", ("a", "b")),
        Fetched("digits", None, ()),
    ],
    "data check": [FINDINGS],
    "protect": [PROTECTION],
    "export": [
        Exported("mine.onnx", "ab" * 32, 123_456, 17, 256, "images of the test pool", 0, 1e-6)
    ],
    "card": [Paper("mine/README.md", "ab" * 32, 2), Paper("mine/README.md", "ab" * 32, 0)],
    "bom": [Paper("mine/bom.json", "ab" * 32, 3)],
    "bundle sign": [SignedBundle("mine", "mine.sig.json")],
    "bundle check": [CheckedBundle("mine")],
    "evaluate": [
        Evaluation(
            *("mine", "ab" * 32, 1000, 98.1, 89.0, STRICT, 17.8, True, 100.0, 0.25, 25, 0.01, 3),
            *("cpu", 93.0),
        )
    ],
    "verify": [VERIFIED, PUBLISHED],
    "plan": [plan(p=1e-9, agreement=0.75)],
    "guard": [
        Calibrated("mine", 0.1, True, 0.021, 0.103, 0.011, 4.31, 0.0123, 1626, {"test": 7}, "cpu")
    ],
    "client add": [Added("anna", "a" * 43)],
    "client rotate": [Rotated("anna", "a" * 43, 0.0), Rotated("anna", "a" * 43, 48.0)],
    "client revoke": [Revoked("anna")],
    "client list": [
        ClientList(()),
        ClientList(
            (
                Listed("anna", True, "active", "2026-11-27T12:00:00Z"),
                Listed("bob", False, "revoked", None),
            )
        ),
    ],
    "serve": [Served("/var/lib/countermark/log.db", 1234)],
    "trace": [
        Tracing(
            "their.onnx",
            "no evidence",
            Trace(tuple(TRACED), (), "no evidence", -0.2, 1e-6),
            482,
            2,
            ANSWERS,
            DOUBTS,
        )
    ],
    "log head": [PublishedHead("countermark log 1", 12, "ab" * 32, None)],
    "log check": [
        Checked(1234, 12, 3, 1200, "2026-11-26T12:00:00+00:00"),
        Checked(1234, 12, 3, None, None, void=7),
    ],
    "log erase": [Erased("anna", 12)],
    "log renew": [Renewed("sqlite:///log.db", 12)],
    "claim": [Claimed("claim", 0, 7, TEST, False, ANSWERS, DOUBTS)],
    "adjudicate": [
        Adjudication(
            "claim",
            "their.onnx",
            "upheld",
            "The claim is upheld: the suspect depends on this owner's coins.",
            "ab" * 32,
            (
                Check("Order of times", "cannot tell", " <= ".join(3 * ["2026-11-26 12:00"]), ""),
                Check("The test", "holds", "629 as the coins fell, 143 the other way, " * 2, ""),
            ),
            TEST,
            8,
            ANSWERS,
            DOUBTS,
        )
    ],
    "quickstart": [story()],
    "steal": [COPY],
    "remove": [COPY],
    "reproduce": [
        study(),
        study(report="study/report.html", verdicts=("Holds: " + 20 * "a claim ",)),
    ],
}


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_result_fits_80_columns(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    show = importlib.import_module(f"countermark.verbs.{cli._file(name)}").show
    for result in RESULTS[name]:
        show(result)
        lines = capsys.readouterr().out.splitlines()
        # The digests of files and heads are single words.
        assert [line for line in lines if len(line) > 80 and "ab" * 32 not in line] == []
        assert not any(terminal._UNBROKEN in line for line in lines)


def test_a_sentence_is_wrapped_and_a_path_is_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    path = "/home/anna/all my models/the one with coins"
    print_lines(f"wrote {unbroken(path)}: it is secret", hanging=2)
    assert capsys.readouterr().out == f"wrote\n  {path}:\n  it is secret\n"
    print_table(f"{unbroken(path)}: match", ("agree",), [["1"]])
    assert capsys.readouterr().out.startswith(f"{path}:\nmatch\n")
    assert as_html(lambda: print_lines(unbroken(path))) == f"<div>{path}</div>"


# Progress.


def ticking(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let every look at the clock take so long."""
    now = [0.0]

    def clock() -> float:
        now[0] += seconds
        return now[0]

    monkeypatch.setattr(terminal.time, "monotonic", clock)


@pytest.mark.parametrize(("seconds", "lines"), [(0.001, 0), (10.0, 9)])
def test_a_log_has_few_lines_with_the_time_left(
    seconds: float,
    lines: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ticking(monkeypatch, seconds)
    with bar("training", 1000) as running:
        running.text("epoch 3 of 7")
        for _ in range(1000):
            running.advance()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == lines
    if lines:
        assert re.fullmatch(
            r"training: 10 % after \d+ min, about .+ left \(epoch 3 of 7\)", said[0]
        )


def test_a_bar_leaves_one_line_even_when_it_is_interrupted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(
        terminal, "Console", lambda **_: Console(file=screen, force_terminal=True, width=80)
    )
    with bar("training", 10) as running:
        running.advance(10)
        running.note("trained for 7 epochs in 34 s")
    with pytest.raises(KeyboardInterrupt), bar("attacking", 10):
        raise KeyboardInterrupt
    assert left_on(screen.getvalue()) == ["trained for 7 epochs in 34 s"]


def left_on(output: str) -> list[str]:
    """The lines that are left on a screen, with what rich sends to it."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", output):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x1b[1A":
            row -= 1
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part[0] not in "\r\x1b":
            lines[row] += part
    return [line for line in lines if line.strip()]
