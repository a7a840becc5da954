"""The one family of errors that Countermark raises on purpose.

A message says what was wrong, where, and what to do next, in one line. The command line prints that line and exits with
status 2; anything else that escapes is a bug.
"""

import reprlib


class CountermarkError(Exception):
    """Something the caller can put right: bad input, a damaged file, a full disk."""


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80  # characters


def brief(value: object) -> str:
    """Shorten a foreign value for a message: one line, no control characters, never long.

    Example:
        >>> brief("paper"), len(brief("a" * 900_000)), len(brief(["a" * 900] * 900))
        ("'paper'", 80, 200)
    """
    shown = _short.repr(value)
    return shown if len(shown) <= 200 else f"{shown[:197]}..."
