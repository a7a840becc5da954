"""What the children that ask strangers' files share: a request on standard input, limits, an answer on standard output.

A child is run as `python -I CHILD.py FILE`, by its path and not as a module: it imports nothing of Countermark, which keeps it small and
quick to start. Exit status 2 means that standard error holds one line with the reason.
"""

import ctypes
import io
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_FILE_LIMIT = 1 << 29  # bytes of the model file
_MEMORY_LIMIT = 4 << 30  # bytes of address space beyond what the interpreter has at start
_SECONDS_LIMIT = 600  # of processor time
BATCH = 64


class RefusedError(Exception):
    """The file is not asked; the message says why."""


def serve(prepare: Callable[[], None], ask: Callable[[bytes, np.ndarray], np.ndarray]) -> int:
    """Answer one request.

    Args:
        prepare: called when the file and the images are read, before anything looks at the file: limits, confinement.
        ask: the model's labels, int64 `(n,)`, for the bytes of the file and images `(n, ...)`.
    """
    _die_with_parent()
    path = Path(sys.argv[1])
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints must not reach the parent as an answer
    try:
        x = np.load(io.BytesIO(sys.stdin.buffer.read()), allow_pickle=False)
        if not path.is_file():
            raise RefusedError("it is not a regular file; check the path")
        if path.stat().st_size > _FILE_LIMIT:
            raise RefusedError(f"the file is larger than {_FILE_LIMIT >> 20} MiB; larger models are not asked")
        data = path.read_bytes()
        limit()
        prepare()
        labels = ask(data, x)
    except RefusedError as refusal:
        sys.stderr.write(" ".join(str(refusal).split()))
        return 2
    except OSError as error:
        sys.stderr.write(f"it cannot be read ({error.strerror}); check the path and its permissions")
        return 2
    except MemoryError:
        sys.stderr.write("it needs more memory than a suspect is given; it cannot be asked")
        return 2
    output = io.BytesIO()
    np.save(output, labels, allow_pickle=False)
    with os.fdopen(answers, "wb") as stream:
        stream.write(output.getvalue())
    return 0


def _die_with_parent() -> None:
    """On Linux: be killed when the one who asks is gone, however it went."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def limit() -> None:
    """Limit memory, processor time and the size of files, within what hard limits allow."""
    statm = Path("/proc/self/statm")  # Linux; elsewhere the interpreter's own share is not counted
    used = int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 0
    for limit, value in (
        (resource.RLIMIT_AS, used + _MEMORY_LIMIT),
        (resource.RLIMIT_CPU, _SECONDS_LIMIT),
        (resource.RLIMIT_FSIZE, 1 << 24),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]  # which only an administrator may raise
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))


def labels_of(output: Any, count: int) -> Any:
    """Labels int64 `(n,)` out of what a model gave: labels, or finite logits of two classes or more."""
    if isinstance(output, np.ndarray) and np.issubdtype(output.dtype, np.integer) and output.shape in ((count,), (count, 1)):
        return output.reshape(count).astype(np.int64)
    if isinstance(output, np.ndarray) and np.issubdtype(output.dtype, np.floating) and output.ndim == 2 and len(output) == count:
        if output.shape[1] < 2 or not np.isfinite(output).all():
            raise RefusedError("its logits are not finite numbers for two classes or more; such a model cannot be asked")
        return output.argmax(axis=1).astype(np.int64)
    raise RefusedError(
        f"its first output is neither logits (n, classes) nor labels (n,): {getattr(output, 'shape', type(output).__name__)}"
    )


def first_line(error: Exception) -> str:
    """The first line of an error, for a message of one line."""
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
