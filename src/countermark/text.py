"""Make text from outside safe to show.

Everything that is printed or put on a page goes through here.
"""

import contextlib
import reprlib
import sys

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 80  # characters
_MOST = 200  # characters


def visible(text: object) -> str:
    r"""Write text on one line, with every character that is not printable as its escape.

    File names, answers of servers, names in certificates and fields of files are written by others.
    Their control characters could clear or colour a terminal, line ends could forge a line of
    output, and bidirectional marks could reorder one. They are shown as `\x1b`, `\n` or `\u202e`
    instead. Doing it twice changes nothing.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def brief(value: object) -> str:
    """Shorten a value from outside for a message: one line, no control characters, never long.

    Example:
        >>> brief("paper"), len(brief("a" * 900_000)), len(brief(["a" * 900] * 900))
        ("'paper'", 80, 200)
    """
    return _cut(_short.repr(value))


def sentence(text: str) -> str:
    r"""Make a sentence from outside fit for a message: one line, printable, not long.

    Example:
        >>> sentence("no\n  such model")
        'no such model'
    """
    return _cut(visible(" ".join(text[: 8 * _MOST].split())))


def complain(message: str) -> None:
    """Write a message on standard error as one line that begins with our name."""
    with contextlib.suppress(OSError, ValueError):  # nobody reads standard error
        sys.stderr.write(f"countermark: {visible(' '.join(message.split()))}\n")
        sys.stderr.flush()


def _cut(text: str) -> str:
    return text if len(text) <= _MOST else f"{text[: _MOST - 3]}..."
