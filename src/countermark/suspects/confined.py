"""Asking a file from a stranger in a child process under limits; the children are `onnx_child` and `pt2_child`.

The child limits its own memory, processor time and file size, checks the file before anything is run, and sends labels back as a NumPy
array without objects. It gets none of the environment, where tokens and passwords may be, but what finds libraries.
"""

import importlib.util
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from countermark.errors import CountermarkError

_FOLDER = Path(__file__).parent
_TIMEOUT = 600  # seconds for all images of one call
_THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # a process of many cannot leave its namespaces
_ENVIRONMENT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
_FAILED = 2  # the child's exit status when it says why on standard error


def ask_onnx(path: Path, x: torch.Tensor) -> torch.Tensor:
    """Ask an ONNX model for labels.

    Args:
        path: the file: one input of the type and layout of `x`, with `n` free; first output logits `(n, classes)` or integer labels `(n,)`
            or `(n, 1)`.
        x: images as the model takes them, float32 or uint8 (see `prepare`).

    Returns:
        int64 labels `(n,)`.

    Raises:
        CountermarkError: onnxruntime is not installed; the file is not ONNX, uses custom operators or external data, takes other
            shapes, answers with anything but finite logits or labels, or needs more memory or time than it is given.
    """
    if not all(importlib.util.find_spec(module) for module in ("onnx", "onnxruntime")):
        raise CountermarkError("asking an .onnx file needs onnx and onnxruntime; pip install 'countermark[onnx]'")
    return _ask(_FOLDER / "onnx_child.py", path, x)


def ask_pt2(path: Path, x: torch.Tensor) -> torch.Tensor:
    """Ask a program of `torch.export` (.pt2) for labels.

    Its loader unpickles and evaluates expressions, so the file is written anew before it is loaded, with nothing but stored tensors, ATen
    operators and arithmetic of sizes. The child that loads it can read Python's own folders and nothing else, write nowhere but in an
    empty folder that is deleted, reach no network and signal no process but its own; where the system cannot promise that (Linux with
    Landlock and user namespaces can), it refuses. Not closed to it are modes and times of files and, before Linux 6.2, cutting them short.

    Args:
        path: the file: one input of the type and layout of `x`, with `n` free; one output, logits or labels.
        x: images as the model takes them, float32 or uint8 (see `prepare`).

    Returns:
        int64 labels `(n,)`.

    Raises:
        CountermarkError: the file holds more than a plain program, takes other images, answers with anything but finite logits or labels,
            needs more memory or time than it is given, or this system cannot confine the child.
    """
    return _ask(_FOLDER / "pt2_child.py", path, x)


def _ask(child: Path, path: Path, x: torch.Tensor) -> torch.Tensor:
    request = io.BytesIO()
    np.save(request, x.numpy(), allow_pickle=False)
    command = [sys.executable, "-I", str(child), str(path.absolute())]
    environment = _THREADS | {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    try:
        with tempfile.TemporaryDirectory() as empty:  # where relative paths inside the file lead nowhere
            done = subprocess.run(  # noqa: S603
                command, input=request.getvalue(), capture_output=True, timeout=_TIMEOUT, check=False, cwd=empty, env=environment
            )
    except subprocess.TimeoutExpired as error:
        raise CountermarkError(
            f"{path} did not answer {len(x)} images within {_TIMEOUT} seconds; it is not a model of this size"
        ) from error
    if done.returncode == _FAILED:
        raise CountermarkError(f"{path}: {done.stderr.decode(errors='replace').strip()[-500:]}")
    if done.returncode != 0:
        raise CountermarkError(f"{path} crashed or needed more memory or processor time than a suspect is given; it cannot be asked")
    try:
        labels = torch.from_numpy(np.load(io.BytesIO(done.stdout), allow_pickle=False))
    except ValueError as error:
        raise CountermarkError(f"{path} gave no readable answer; it cannot be asked") from error
    if labels.dtype != torch.int64 or labels.shape != (len(x),):
        raise CountermarkError(f"{path} gave {tuple(labels.shape)} answers to {len(x)} images; it cannot be asked")
    return labels
