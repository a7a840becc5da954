"""What a running service says on standard error: sentences, or JSON with one object a line."""

import contextlib
import datetime
import json
import sys
from collections.abc import Iterator
from typing import Any, Literal

from countermark.text import visible

LogFormat = Literal["text", "json"]
_form: LogFormat = "text"  # of all threads


@contextlib.contextmanager
def written_as(form: LogFormat) -> Iterator[None]:
    """Write what is told in the block as text or as JSON."""
    global _form
    before, _form = _form, form
    try:
        yield
    finally:
        _form = before


def tell(event: str, message: str, **facts: Any) -> None:
    """Write one line on standard error; a log that is full or closed ends no work.

    Args:
        event: `start`, `clients`, `request`, `complaint` or `stop`.
        message: a sentence, or a part of one.
        facts: what a program may want to read out of the message, in JSON only.
    """
    line = visible(" ".join(message.split()))
    if _form == "json":
        line = json.dumps({"time": _utc(), "event": event, "message": line, **facts})
    else:
        line = {"complaint": f"countermark: {line}", "request": f"{_utc()} {line}"}.get(event, line)
    with contextlib.suppress(OSError, ValueError):  # nobody reads standard error
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def _utc() -> str:
    """Day and time of day, to the second, in UTC."""
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0, tzinfo=None)
    return f"{now.isoformat()}Z"
