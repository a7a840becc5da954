"""What a verb shows at its end: one table on standard output, or one JSON object."""

import json
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from countermark.text import visible


def print_json(value: Any) -> None:
    """Print one JSON object, and nothing else, on standard output."""
    print(json.dumps(value, sort_keys=True, allow_nan=False))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on standard output; all columns but the first are numbers or words of one line, right-aligned.

    Nothing in a title or a cell is markup, and what is not printable is escaped.
    """
    table = Table(title=visible(title), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(visible, row))
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(table)


def print_lines(*lines: str) -> None:
    """Print plain lines on standard output; what is not printable in them, a line end too, is escaped."""
    for line in lines:
        print(visible(line))


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
