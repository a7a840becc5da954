"""Results and progress in a notebook: the words of a terminal, and one output for a call."""

import importlib
import inspect
import re
import sys
from dataclasses import dataclass
from html import unescape
from types import ModuleType
from typing import Any

import pytest

from countermark import cli
from countermark.options import VerbConfig, verb
from countermark.terminal import as_html, bar, live, note, print_lines, print_table
from countermark.verbs.plan import plan
from countermark.verbs.plan import show as show_plan

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
