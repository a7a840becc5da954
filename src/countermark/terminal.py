"""What a person sees: a verb's result on standard output, and progress on standard error.

A result is a few lines and tables, or one JSON object. Standard output is kept for it, so that
`--json` can promise one JSON object and nothing else there. Sentences are wrapped at the width of
the terminal, and at 80 columns where there is none.

Progress is one bar on a terminal, and at most ten lines for a bar in a log; both say how long it
still takes. In a notebook a result is HTML made of the same lines and tables, and all progress of a
call is one output that is rewritten in place.

Nothing that is shown is markup, and what is not printable is escaped.
"""

import contextlib
import json
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
)
from rich.table import Table
from rich.text import Text

from countermark.html import escape
from countermark.text import visible

_TELL_SECONDS = 1.0
_REDRAW_SECONDS = 0.2
_LOG_SECONDS = 10.0  # between two lines of one bar in a log
_LOG_LINES = 10  # of one bar in a log
_NOTES = 200  # lines that a notebook keeps
_WIDTH = 80  # columns where there is no terminal
_UNBROKEN = "\0"  # stands for a space at which no line ends; no visible text holds it

_page: list[str] | None = None  # the parts of a page, while a result is made into one
_live: "_Output | None" = None  # a notebook's output, while a call is running
_listener: Callable[[Mapping[str, Any]], None] | None = None


# Results.


def print_json(value: Any) -> None:
    """Print one JSON object, and nothing else, on standard output."""
    print(json.dumps(value, sort_keys=True, allow_nan=False))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on standard output.

    All columns but the first are numbers or words of one line, right-aligned.
    """
    if _page is not None:
        _page.append(_table(title, columns, rows))
        return
    table = Table(box=box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(visible, row))
    console = Console(width=_width(), highlight=False, markup=False, emoji=False)
    if title:
        console.print(Text(_wrapped(title), style="bold"), soft_wrap=True)
    console.print(table)


def print_lines(*lines: str, hanging: int = 0) -> None:
    """Print sentences on standard output, a line end in one of them as its escape.

    Args:
        lines: each begins a new line, and goes on in the next one where it is too long.
        hanging: columns by which all lines of a sentence but the first are moved in.
    """
    for line in lines:
        if _page is not None:
            _page.append(f"<div>{_whole(line, escape) or '&nbsp;'}</div>")
        elif _live is not None:
            _live.note(_whole(line, str))
        else:
            print(_wrapped(line, hanging))


def print_figure(figure: str) -> None:
    """Put a figure, which is HTML, on a notebook's page; a terminal has no place for it."""
    if _page is not None:
        _page.append(figure)


def unbroken(text: object) -> str:
    """A path or a command as a part of a sentence: no line ends at a space within it."""
    return visible(text).replace(" ", _UNBROKEN)


def _width() -> int:
    return shutil.get_terminal_size((_WIDTH, 24)).columns


def _wrapped(line: str, hanging: int = 0) -> str:
    """A sentence on as many lines as it takes; words longer than a line stay whole."""
    parts = textwrap.wrap(
        _UNBROKEN.join(map(visible, line.split(_UNBROKEN))),
        max(_width(), hanging + 1),
        subsequent_indent=" " * hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return _whole("\n".join(parts), str)


def _whole(line: str, shown: Callable[[str], str]) -> str:
    """A sentence without the signs of `unbroken`, each part of it as `shown` gives it."""
    return " ".join(map(shown, line.split(_UNBROKEN)))


def as_html(show: Callable[[], None]) -> str:
    """What `show` prints, as HTML for a notebook."""
    global _page
    before, _page = _page, []
    try:
        show()
        return "\n".join(_page)
    finally:
        _page = before


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        sides = ["left", *["right"] * (len(row) - 1)]
        parts = (
            f"<{tag} style='text-align:{side}'>{escape(cell)}</{tag}>"
            for side, cell in zip(sides, row, strict=True)
        )
        return f"<tr>{''.join(parts)}</tr>"

    body = "".join(cells("td", row) for row in rows)
    shown = _whole(title, escape)
    caption = f"<caption style='text-align:left;font-weight:bold'>{shown}</caption>"
    return f"<table>{caption}<thead>{cells('th', columns)}</thead><tbody>{body}</tbody></table>"


def percent(value: float | None) -> str:
    """Format a percentage, or a dash where there is none."""
    return "-" if value is None else f"{value:.2f} %"


def duration(seconds: float) -> str:
    """Format a length of time for a person: seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def p_value(log10: float | None) -> str:
    """Format a p-value of any size from its decimal logarithm."""
    if log10 is None:
        return "-"
    if log10 > -4:
        return f"{10**log10:.4f}"
    exponent = int(log10 // 1)
    mantissa = 10 ** (log10 - exponent)
    return f"{mantissa:.1f}e{exponent}" if mantissa < 9.95 else f"1.0e{exponent + 1}"


# Progress.


class Bar:
    """A running bar; see `bar`."""

    def __init__(
        self,
        console: Console | None,
        progress: Progress | None,
        title: str,
        total: int,
        done: int = 0,
    ) -> None:
        """Use `bar`, which also ends it."""
        self._console = console
        self._status: dict[str, Any] = {"what": title, "done": done, "total": total, "text": ""}
        self._begun = self._logged = time.monotonic()
        self._before, self._tenth, self._told = done, _LOG_LINES * done // max(total, 1), 0.0
        self._progress = progress
        self._task = (
            progress.add_task(visible(title), total=total, completed=done, text="")
            if progress is not None
            else None
        )
        if _live is not None and _listener is None:
            _live.draw(self._status)

    @property
    def seconds(self) -> float:
        """Seconds since the bar began."""
        return time.monotonic() - self._begun

    def advance(self, by: int = 1) -> None:
        """Count `by` units as done."""
        self._status["done"] += by
        self._tell()
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, by)

    def text(self, text: str) -> None:
        """Show `text` beside the bar."""
        self._status["text"] = text
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, text=visible(text))

    def note(self, line: str) -> None:
        """Print a line that stays."""
        if self._console is not None:
            note(line, self._console)
        elif _live is not None and _listener is None:
            _live.note(line)

    def _tell(self) -> None:
        if _listener is not None and time.monotonic() - self._told > _TELL_SECONDS:
            self._told = time.monotonic()
            _listener(dict(self._status))
        elif _live is not None and _listener is None:
            _live.draw(self._status)
        elif self._console is not None and self._progress is None:
            self._log()

    def _log(self) -> None:
        """Write a line for each tenth that is done, if the last one is not too fresh."""
        now, total = time.monotonic(), max(self._status["total"], 1)
        done, text = self._status["done"], self._status["text"]
        tenth = _LOG_LINES * done // total
        if tenth <= self._tenth or done >= total or now - self._logged < _LOG_SECONDS:
            return
        self._tenth, self._logged = tenth, now
        left = duration(self.seconds / (done - self._before) * (total - done))
        line = f"{self._status['what']}: {100 * done // total} % after {duration(self.seconds)}"
        self.note(f"{line}, about {left} left{text and f' ({text})'}")


class _Left(ProgressColumn):
    """How long a bar still takes."""

    max_refresh = 1.0

    def render(self, task: Task) -> Text:
        """The time in words; nothing as long as it cannot be told."""
        left = task.time_remaining
        return Text("" if left is None or task.finished else f"{duration(left)} left")


def note(line: str, console: Console | None = None) -> None:
    """Print a line on standard error, above the bar of `console` if there is one."""
    if _page is not None:
        print_lines(line)
    elif _live is not None and console is None:
        _live.note(line)
    else:
        # A full log or a closed pipe must not end the work; rich turns the latter into an exit.
        with contextlib.suppress(OSError, SystemExit):
            console = console or Console(stderr=True)
            shown = _wrapped(line) if console.is_terminal else visible(line)
            console.print(shown, highlight=False, markup=False, emoji=False, soft_wrap=True)


@contextlib.contextmanager
def told_to(listener: Callable[[Mapping[str, Any]], None]) -> Iterator[None]:
    """Send what bars would show to `listener` instead, at most once a second.

    It is told `what`, `done`, `total` and `text`.
    """
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


@contextlib.contextmanager
def bar(title: str, total: int, done: int = 0) -> Iterator[Bar]:
    """Show a bar of `total` units, `done` of which are behind us, while the block runs."""
    if _listener is not None:
        yield Bar(None, None, title, total, done)
        return
    if _live is not None:
        yield Bar(None, None, title, total, done)
        _live.draw(None)
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Bar(console, None, title, total, done)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.percentage:3.0f} %"),
        TextColumn("{task.fields[text]}", markup=False),
        _Left(),
    )
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as progress:
        yield Bar(console, progress, title, total, done)


# Notebooks.


class _Output:
    """One output of a notebook's cell, drawn anew in place: the lines that stay, and a bar."""

    def __init__(self, display: Callable[..., Any], html: Callable[[str], object]) -> None:
        self._html = html
        self._handle = display(html(""), display_id=True)
        self._notes: list[str] = []
        self._drawn = 0.0

    def note(self, line: str) -> None:
        """Add a line."""
        self._notes = [*self._notes, line][-_NOTES:]
        self.draw(None)

    def draw(self, status: Mapping[str, Any] | None) -> None:
        """Draw everything; a bar at most a few times a second."""
        now = time.monotonic()
        if status is not None and now - self._drawn < _REDRAW_SECONDS:
            return
        self._drawn = now
        lines = "".join(f"<div>{escape(line)}</div>" for line in self._notes)
        page = f"<div style='max-height:16em;overflow-y:auto'>{lines}</div>"
        if status is not None:
            done, total = status["done"], max(status["total"], 1)
            page += (
                f"<div>{escape(status['what'])} <progress value='{done}' max='{total}'></progress> "
                f"{100 * done // total} % {escape(status['text'])}</div>"
            )
        self._handle.update(self._html(page))


@contextlib.contextmanager
def live() -> Iterator[None]:
    """Show all progress of the block in one output, where this is a notebook."""
    global _live
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if _live is not None or type(shell).__name__ in ("NoneType", "TerminalInteractiveShell"):
        yield
        return
    from IPython.display import HTML, display

    _live = _Output(display, HTML)
    try:
        yield
    finally:
        _live = None
