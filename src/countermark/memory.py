"""Memory: one setting of the C library, and whether there is room for PyTorch at all."""

import contextlib
import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_KEEP = 1 << 30  # bytes that may lie free at the heap's end
# Bytes of address space; with less, PyTorch's libraries end the process while they load.
_LEAST = 512 << 20
_LARGEST = 1 << 25  # bytes of a block that still comes from the heap; glibc takes no more


def keep_freed_memory() -> None:
    """Let malloc keep freed memory for later tensors, instead of returning it after each layer.

    Otherwise each training step asks the system for the same megabytes again and pays for their
    page faults: a quarter of its time for one process, more than half for two side by side
    (docs/log.md). Only glibc has the setting; elsewhere nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(_MMAP_THRESHOLD, _LARGEST)
    mallopt(_TRIM_THRESHOLD, _KEEP)


def check_room() -> None:
    """Refuse a limit (`ulimit -v`) under which PyTorch would end the process instead of raising.

    Raises:
        MemoryError: there is too little room.
    """
    with contextlib.suppress(ImportError):  # no such limits on this system
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY and limit < _LEAST:
            raise MemoryError
