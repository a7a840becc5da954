"""Progress on standard error: a bar with the time left on a terminal, plain lines in a log.

Standard output is kept for results, so that `--json` can promise one JSON object and nothing else there.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from countermark.text import visible


class Bar:
    """A running bar; see `bar`."""

    def __init__(self, console: Console | None, progress: Progress | None, title: str, total: int) -> None:
        """Use `bar`, which also ends it."""
        self._console = console
        self._status: dict[str, Any] = {"what": title, "done": 0, "total": total, "text": ""}
        self._told = 0.0
        self._progress = progress
        self._task = progress.add_task(visible(title), total=total, text="") if progress is not None else None

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

    def _tell(self) -> None:
        if _listener is not None and time.monotonic() - self._told > _TELL_SECONDS:
            self._told = time.monotonic()
            _listener(dict(self._status))


def note(line: str, console: Console | None = None) -> None:
    """Print a line on standard error, above the bar of `console` if there is one; nothing in it is markup."""
    # A full log or a closed pipe must not end the work; rich turns the latter into an exit.
    with contextlib.suppress(OSError, SystemExit):
        console = console or Console(stderr=True)
        console.print(visible(line), highlight=False, markup=False, emoji=False, soft_wrap=True)


_TELL_SECONDS = 1.0
_listener: Callable[[Mapping[str, Any]], None] | None = None


@contextlib.contextmanager
def told_to(listener: Callable[[Mapping[str, Any]], None]) -> Iterator[None]:
    """Send what bars would show to `listener` instead of the terminal: `what`, `done`, `total`, `text`, at most once a second."""
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
        yield Bar(None, None, title, total)
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Bar(console, None, title, total)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        running = Bar(console, progress, title, total)
        running.advance(done)
        yield running
