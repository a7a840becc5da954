"""What the child processes that ask strangers' files share.

A child reads a request from standard input, sets its limits, and writes an answer to standard
output. It is run as `python -I CHILD.py FILE`, by its path and not as a module: it imports nothing
of Countermark, which keeps it small and quick to start. Exit status 2 means that the last line of
standard error holds the reason.
"""

import ctypes
import io
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

FILE_LIMIT = 1 << 29  # bytes of the model file
_MEMORY_LIMIT = 4 << 30  # bytes of address space beyond what the interpreter has at start
_SECONDS_LIMIT = 600  # of processor time
_REASON = 500  # characters
BATCH = 64


class RefusedError(Exception):
    """The file is not asked; the message says why."""


class OtherBatchError(RefusedError):
    """The model does not answer a batch of this size; it may answer one of another size."""


def serve(confine: Callable[[], None], ask: Callable[[bytes, np.ndarray], bytes]) -> int:
    """Answer one request.

    Args:
        confine: confines the process; called after the file and the images were read and the
            limits set, and before anything looks into the file.
        ask: gives the answer for the bytes of the file and images `(n, ...)`; see `in_batches` for
            labels.

    Returns:
        The exit status.
    """
    _die_with_parent()
    path = Path(sys.argv[1])
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints must not reach the parent as an answer
    try:
        x = np.load(io.BytesIO(sys.stdin.buffer.read()), allow_pickle=False)
        if not path.is_file():
            raise RefusedError("it is not a regular file; check the path")
        if path.stat().st_size > FILE_LIMIT:
            raise RefusedError(
                f"the file is larger than {FILE_LIMIT >> 20} MiB; larger models are not asked"
            )
        data = path.read_bytes()
        limit()
        confine()
        answer = ask(data, x)
    except RefusedError as refusal:
        return _refuse(str(refusal))
    except OSError as error:
        return _refuse(f"it cannot be read ({error.strerror}); check the path and its permissions")
    except MemoryError:
        return _refuse("it needs more memory than a suspect is given; it cannot be asked")
    except Exception as error:  # from a library, at something that no check foresaw
        return _refuse(f"it cannot be asked: {type(error).__name__}: {first_line(error)}")
    with os.fdopen(answers, "wb") as stream:
        stream.write(answer)
    return 0


def _refuse(reason: str) -> int:
    """Say why on a line of its own, the last one: libraries write to standard error as well."""
    sys.stderr.write("\n" + " ".join(reason.split())[:_REASON])
    return 2


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


def in_batches(x: np.ndarray, sizes: Iterable[int], run: Callable[[np.ndarray], Any]) -> bytes:
    """Labels of all images, 8 bytes each, in batches of the first size that the model answers.

    The last batch is filled up with copies of its last image, whose answers are dropped.

    Args:
        x: images `(n, ...)`.
        sizes: sizes of a batch to try, the likeliest first.
        run: what the model gives for a batch; see `labels_of`.

    Raises:
        RefusedError: no size is answered (the reason is that of the first), or an answer is none.
    """
    trouble: OtherBatchError | None = None
    for size in dict.fromkeys(sizes):
        try:
            labels = [
                _filled(x[start : start + size], size, run) for start in range(0, len(x), size)
            ]
            return b"".join(part.tobytes() for part in labels)
        except OtherBatchError as error:
            trouble = trouble or error
    raise trouble or RefusedError("it takes no batch of images; it cannot be asked")


def _filled(part: np.ndarray, size: int, run: Callable[[np.ndarray], Any]) -> Any:
    filled = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
    try:
        output = run(filled)
    except (RefusedError, MemoryError):
        raise
    except Exception as error:
        raise OtherBatchError(f"it failed on valid images: {first_line(error)}") from error
    return labels_of(output, size)[: len(part)]


def labels_of(output: Any, count: int) -> Any:
    """Labels int64 `(n,)` out of what a model gave.

    Args:
        output: labels `(n,)` or `(n, 1)`, finite logits `(n, classes)`, with any number of further
            axes of length 1, or a list of scores by label, as the converters of scikit-learn write
            it.
        count: n.

    Raises:
        OtherBatchError: it is none of these for n images.
        RefusedError: its scores are not finite numbers, or there is one class only.
    """
    names: list[int] | None = None
    if isinstance(output, list) and output and all(isinstance(row, dict) for row in output):
        names = [name for name in output[0] if type(name) is int]
        if all(list(row) == names for row in output):
            output = np.array([list(row.values()) for row in output])
    if isinstance(output, np.ndarray) and output.dtype.kind in "iuf":
        while output.ndim > 2 and output.shape[-1] == 1:
            output = output[..., 0]
        if output.dtype.kind in "iu" and output.shape in ((count,), (count, 1)):
            return output.reshape(count).astype(np.int64)
        if output.ndim == 2 and len(output) == count:
            if output.shape[1] < 2 or not np.isfinite(output).all():
                raise RefusedError(
                    "its logits are not finite numbers for two classes or more; "
                    "such a model cannot be asked"
                )
            chosen = output.argmax(axis=1)
            return (chosen if names is None else np.array(names)[chosen]).astype(np.int64)
    shape = getattr(output, "shape", type(output).__name__)
    raise OtherBatchError(
        f"its first output is neither logits (n, classes) nor labels (n,): {shape}"
    )


def first_line(error: Exception) -> str:
    """The first line of an error, for a message of one line."""
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
