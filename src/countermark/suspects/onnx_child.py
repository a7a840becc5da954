"""The child process of `onnx`: reads images on standard input, asks the model, writes labels on standard output.

Run as `python -I onnx_child.py FILE`, by its path and not as a module: it imports nothing of Countermark, which keeps it small and quick to
start. Exit status 2 means that standard error holds one line with the reason.
"""

import ctypes
import io
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

_FILE_LIMIT = 1 << 29  # bytes of the model file
_MEMORY_LIMIT = 4 << 30  # bytes of address space beyond what the interpreter has at start
_SECONDS_LIMIT = 600  # of processor time
_TENSOR_LIMIT = 1 << 28  # values in one tensor of the file
_BATCH = 64
_DOMAINS = ("", "ai.onnx", "ai.onnx.ml")


class RefusedError(Exception):
    """The file is not asked; the message says why."""


def main() -> int:
    """Answer one request."""
    _die_with_parent()
    path = Path(sys.argv[1])
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints must not reach the parent as an answer
    try:
        x = np.load(io.BytesIO(sys.stdin.buffer.read()), allow_pickle=False)
        if not path.is_file():
            raise RefusedError("it is not a regular file; name an .onnx file")
        if path.stat().st_size > _FILE_LIMIT:
            raise RefusedError(f"the file is larger than {_FILE_LIMIT >> 20} MiB; larger models are not asked")
        data = path.read_bytes()
        _limit()
        _check(data)
        labels = _ask(data, x)
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


def _limit() -> None:
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


def _check(data: bytes) -> None:
    """Refuse what a plain classifier does not need: custom operators, functions, external data, tensors of absurd size."""
    import onnx

    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:
        raise RefusedError("it is not an ONNX file (or a truncated one); export the model again") from error
    if not model.graph.output or not model.graph.node:
        raise RefusedError("it holds no graph; it is not an ONNX model or a truncated one")
    for opset in model.opset_import:
        if opset.domain not in _DOMAINS:
            raise RefusedError(f"it uses operators of the domain {opset.domain[:80]!r}; only standard ONNX operators are run")
    _check_graph(model.graph)
    if model.functions:
        raise RefusedError("it defines functions of its own; export the model with standard ONNX operators only")


def _check_graph(graph: Any) -> None:
    for tensor in graph.initializer:
        _check_tensor(tensor)
    for sparse in graph.sparse_initializer:
        _check_sparse(sparse)
    _check_nodes(graph.node)


def _check_nodes(nodes: Any) -> None:
    for node in nodes:
        if node.domain not in _DOMAINS:
            raise RefusedError(f"it uses the custom operator {node.domain[:80]}.{node.op_type[:80]}; only standard ONNX operators are run")
        for attribute in node.attribute:
            for tensor in [attribute.t, *attribute.tensors]:
                _check_tensor(tensor)
            for sparse in [attribute.sparse_tensor, *attribute.sparse_tensors]:
                _check_sparse(sparse)
            for graph in [attribute.g, *attribute.graphs]:
                _check_graph(graph)


def _check_tensor(tensor: Any) -> None:
    if tensor.data_location == tensor.EXTERNAL or tensor.external_data:
        raise RefusedError(f"its tensor {tensor.name[:80]!r} lies in another file (external data); export the model as one file")
    _check_extent(tensor.dims)


def _check_sparse(sparse: Any) -> None:
    _check_tensor(sparse.values)
    _check_tensor(sparse.indices)
    _check_extent(sparse.dims)


def _check_extent(dims: Any) -> None:
    size = 1
    for extent in dims:
        size *= extent
        if extent < 0 or size > _TENSOR_LIMIT:
            raise RefusedError(f"it declares a tensor of the shape {list(dims)[:8]}, more than a suspect may have; it cannot be asked")


def _ask(data: bytes, x: np.ndarray) -> np.ndarray:
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise RefusedError(f"onnxruntime cannot load it: {_first_line(error)}") from error
    inputs = session.get_inputs()
    kind = "tensor(uint8)" if x.dtype == np.uint8 else "tensor(float)"
    if len(inputs) != 1 or inputs[0].type != kind:
        raise RefusedError(f"it takes {[(i.name, i.type) for i in inputs][:4]}; a suspect takes one input of images, here as {kind}")
    declared = inputs[0].shape
    fits = len(declared) == 4 and all(not isinstance(d, int) or d == s for d, s in zip(declared[1:], x.shape[1:], strict=True))
    if not fits or isinstance(declared[0], int):
        raise RefusedError(f"it takes images of shape {declared}; the key asks with (n, {', '.join(map(str, x.shape[1:]))}), n free")
    labels = []
    for start in range(0, len(x), _BATCH):
        batch = x[start : start + _BATCH]
        try:
            output = session.run([session.get_outputs()[0].name], {inputs[0].name: batch})[0]
        except Exception as error:
            raise RefusedError(f"it failed on valid images: {_first_line(error)}") from error
        labels.append(_labels(output, len(batch)))
    return np.concatenate(labels) if labels else np.empty(0, dtype=np.int64)


def _labels(output: Any, count: int) -> Any:
    if isinstance(output, np.ndarray) and np.issubdtype(output.dtype, np.integer) and output.shape in ((count,), (count, 1)):
        return output.reshape(count).astype(np.int64)
    if isinstance(output, np.ndarray) and np.issubdtype(output.dtype, np.floating) and output.ndim == 2 and len(output) == count:
        if output.shape[1] < 2 or not np.isfinite(output).all():
            raise RefusedError("its logits are not finite numbers for two classes or more; such a model cannot be asked")
        return output.argmax(axis=1).astype(np.int64)
    raise RefusedError(
        f"its first output is neither logits (n, classes) nor labels (n,): {getattr(output, 'shape', type(output).__name__)}"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
