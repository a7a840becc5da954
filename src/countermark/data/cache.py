"""The folder that fetched files and read images are kept in, and writing there."""

import os
from pathlib import Path
from typing import Any

from countermark.errors import CountermarkError

_CHUNK = 1 << 20
_ELSEWHERE = "name another folder with --cache or COUNTERMARK_CACHE"


class FullError(CountermarkError):
    """A file could not be written."""

    def __init__(self, folder: Path, error: OSError) -> None:
        """Say which folder it was, and why."""
        super().__init__(f"cannot write in {folder}: {error.strerror}")
        self.folder, self.reason = folder, error.strerror


def cannot_keep(folder: Path, reason: str | None) -> CountermarkError:
    """The error of a cache that cannot be written."""
    return CountermarkError(
        f"cannot keep data in {folder}: {reason}; free some space or {_ELSEWHERE}"
    )


def cache_folder() -> Path:
    """The folder of fetched files: `$COUNTERMARK_CACHE`, or the system's; `~` is expanded.

    Raises:
        CountermarkError: it is below a home folder, and there is none.
    """
    import pooch

    named = os.environ.get("COUNTERMARK_CACHE")
    try:
        return Path(named or pooch.os_cache("countermark")).expanduser()
    except RuntimeError as error:
        raise CountermarkError(
            f"there is no home folder for the data files; {_ELSEWHERE}"
        ) from error


def copy_stream(stream: Any, output: Path, limit: int) -> None:
    """Copy a stream of at most `limit` bytes to a file; a decompression bomb ends here.

    Raises:
        CountermarkError: it is longer.
        FullError: the file cannot be written.
    """
    total = 0
    with output.open("wb") as target:
        while chunk := stream.read(_CHUNK):
            total += len(chunk)
            if total > limit:
                raise CountermarkError(f"unpacks to more than {limit} bytes")
            try:
                target.write(chunk)
                target.flush()
            except OSError as error:
                raise FullError(output.parent, error) from error
