"""One setting of the C library that halves the time of training on processors."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
_KEEP = 1 << 30  # bytes that may lie free at the heap's end
_LARGEST = 1 << 25  # bytes of a block that still comes from the heap; glibc takes no more


def keep_freed_memory() -> None:
    """Let malloc keep the memory that tensors leave, for the next ones, instead of giving it back to the system after each layer.

    Each training step otherwise asks the system for the same megabytes again and pays for their page faults: a quarter of its time for
    one process, more than half for two side by side (docs/log.md). Only glibc knows the setting; elsewhere nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(_MMAP_THRESHOLD, _LARGEST)
    mallopt(_TRIM_THRESHOLD, _KEEP)
