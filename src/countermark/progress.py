"""Progress on standard error: a bar with the time left on a terminal, plain lines in a log.

Standard output is kept for results, so that `--json` can promise one JSON object and nothing else there.
"""

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar:
    """A running bar; see `bar`."""

    def __init__(self, console: Console, progress: Progress | None, title: str, total: int) -> None:
        """Use `bar`, which also ends it."""
        self._console = console
        self._progress = progress
        self._task = progress.add_task(title, total=total, text="") if progress is not None else None

    def advance(self, by: int = 1) -> None:
        """Count `by` units as done."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, by)

    def text(self, text: str) -> None:
        """Show `text` beside the bar."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, text=text)

    def note(self, line: str) -> None:
        """Print a line that stays."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def bar(title: str, total: int, done: int = 0) -> Iterator[Bar]:
    """Show a bar of `total` units, `done` of which are behind us, while the block runs."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Bar(console, None, title, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        running = Bar(console, progress, title, total)
        running.advance(done)
        yield running
