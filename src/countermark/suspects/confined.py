"""Ask a stranger's file in a child process under limits.

The children are `onnx_child` and `pt2_child`. A child limits its own memory, processor time and
file size, checks the file before anything is run, and sends labels back as 64-bit integers. Of the
environment, which may hold tokens and passwords, it gets only what is needed to find libraries.
"""

import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from countermark.errors import CountermarkError
from countermark.text import visible

_FOLDER = Path(__file__).parent
_TIMEOUT = 600  # seconds for all images of one call
_THREADS = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}  # a process of several threads cannot enter namespaces of its own
_ENVIRONMENT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
_REASON = 500  # characters
_FAILED = 2  # the child's exit status when it says why on standard error


def ask_onnx(path: Path, x: torch.Tensor, begin: int | None = None) -> torch.Tensor:
    """Ask an ONNX model for labels.

    A model of a fixed batch is asked in batches of that size, the last one filled up. Data that
    lies in other files is read if they are in the model's folder or below it. A float model is
    given what it takes: `x` is cast to half precision, bfloat16 or double for it.

    Args:
        path: the file: one input of the layout of `x`, floats for floats and integers for integers;
            its first output that is numbers is logits `(n, classes)` or integer labels `(n,)` or
            `(n, 1)`, or a list of scores by integer label, as scikit-learn's have it.
        x: images as the model takes them, float32 or uint8 (see `as_taken`).
        begin: number of the inner place that the images are given to instead (`onnx_places`).

    Returns:
        int64 labels `(n,)`.

    Raises:
        CountermarkError: onnxruntime is not installed; the file is not ONNX, uses custom operators,
            has data outside its folder, takes other shapes, answers with anything but finite logits
            or labels, or needs more memory or time than it is given.
    """
    options = () if begin is None else ("--begin", str(begin))
    return _labels(path, len(x), _onnx(path, x, *options))


def onnx_data(path: Path) -> dict[str, str]:
    """SHA-256 of every file beside an ONNX model that holds its tensors, by its place.

    Raises:
        CountermarkError: see `ask_onnx`.
    """
    found: dict[str, str] = json.loads(_onnx(path, torch.zeros(0), "--data"))
    return found


def onnx_places(path: Path, x: torch.Tensor) -> list[str]:
    """Names of the inner tensors of an ONNX model that have the shape of its images `x`.

    They are in the order of its operators; of more than 64 the first and the last 32.

    Raises:
        CountermarkError: see `ask_onnx`.
    """
    found: list[str] = json.loads(_onnx(path, x[:1], "--places"))
    return found


def _onnx(path: Path, x: torch.Tensor, *options: str) -> bytes:
    if not all(importlib.util.find_spec(module) for module in ("onnx", "onnxruntime")):
        raise CountermarkError(
            "asking an .onnx file needs onnx and onnxruntime; pip install 'countermark[onnx]'"
        )
    return _run(_FOLDER / "onnx_child.py", path, x, *options)


def ask_pt2(path: Path, x: torch.Tensor) -> torch.Tensor:
    """Ask a program of `torch.export` (.pt2) for labels.

    PyTorch's loader imports modules by name, unpickles and evaluates expressions, so the file is
    written anew before it is loaded, with nothing but stored tensors, ATen operators and arithmetic
    of sizes. The child that loads it can only read Python's own folders, only write in an empty
    folder that is deleted afterwards, and only make the system calls of a computation: it reaches
    no network, no socket, no keyring and no other process, and starts no process. It refuses to
    load the file where the system cannot guarantee that (Linux with Landlock, user namespaces and
    seccomp can, on x86-64 and arm64). docs/security.md says what remains possible.

    Args:
        path: the file: one input of the layout of `x`, floats for floats and integers for integers;
            its first output is logits or labels.
        x: images as the model takes them, float32 or uint8 (see `as_taken`).

    Returns:
        int64 labels `(n,)`.

    Raises:
        CountermarkError: the file holds more than a plain program, takes other images, answers with
            anything but finite logits or labels, or needs more memory or time than it is given; or
            this system cannot confine the child.
    """
    return _labels(path, len(x), _run(_FOLDER / "pt2_child.py", path, x))


def _run(child: Path, path: Path, x: torch.Tensor, *options: str) -> bytes:
    """What a child answers with."""
    request = io.BytesIO()
    np.save(request, x.numpy(), allow_pickle=False)
    command = [sys.executable, "-I", str(child), str(path.absolute()), *options]
    environment = _THREADS | {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    # Files and no pipes: the child's limit on files then holds for what it says as well.
    with (
        tempfile.TemporaryDirectory() as empty,  # where relative paths inside the file lead nowhere
        tempfile.TemporaryFile() as answer,
        tempfile.TemporaryFile() as reason,
    ):
        try:
            status = subprocess.run(  # noqa: S603
                command,
                input=request.getvalue(),
                stdout=answer,
                stderr=reason,
                timeout=_TIMEOUT,
                check=False,
                cwd=empty,
                env=environment,
            ).returncode
        except subprocess.TimeoutExpired as error:
            raise CountermarkError(
                f"{path} did not answer {len(x)} images within {_TIMEOUT} seconds; "
                "it is not a model of this size"
            ) from error
        if status == _FAILED:
            reason.seek(max(0, reason.seek(0, os.SEEK_END) - 8 * _REASON))
            raise CountermarkError(f"{path}: {_last_line(reason.read(8 * _REASON))}")
        if status != 0:
            raise CountermarkError(
                f"{path} crashed or needed more memory or processor time than a suspect is given; "
                "it cannot be asked"
            )
        answer.seek(0)
        return answer.read()


def _last_line(said: bytes) -> str:
    """The reason: what libraries wrote lies before it."""
    lines = said.decode(errors="replace").strip().splitlines() or ["it gave no reason"]
    return visible(lines[-1])[:_REASON]


def _labels(path: Path, count: int, answer: bytes) -> torch.Tensor:
    if len(answer) != 8 * count:
        raise CountermarkError(
            f"{path} gave {len(answer) // 8} answers to {count} images; it cannot be asked"
        )
    return torch.from_numpy(np.frombuffer(answer, dtype=np.int64).copy())
