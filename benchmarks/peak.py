"""The most memory that a process has held, out of Linux's /proc.

`getrusage` would not do: there a process begins with the peak of the one that started it.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def rising() -> Iterator[Callable[[], int]]:
    """Yield a function: by how many bytes the peak of this process lies above what it held first.

    The peak begins anew where the system lets it; a higher one from before would hide the rise.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    yield lambda: peak() - before


def peak() -> int:
    """Bytes of memory that this process held at most, since it began or since `rising`."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10
