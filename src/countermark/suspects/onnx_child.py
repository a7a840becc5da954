"""The child process of `onnx` (see `child_frame`): checks the graph before anything is run, then asks onnxruntime."""

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))  # -I leaves it out
from child_frame import BATCH, RefusedError, first_line, labels_of, serve  # type: ignore[import-not-found]

_TENSOR_LIMIT = 1 << 28  # values in one tensor of the file
_DOMAINS = ("", "ai.onnx", "ai.onnx.ml")


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
    _check(data)
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise RefusedError(f"onnxruntime cannot load it: {first_line(error)}") from error
    inputs = session.get_inputs()
    kind = "tensor(uint8)" if x.dtype == np.uint8 else "tensor(float)"
    if len(inputs) != 1 or inputs[0].type != kind:
        raise RefusedError(f"it takes {[(i.name, i.type) for i in inputs][:4]}; a suspect takes one input of images, here {x.dtype}")
    declared = inputs[0].shape
    fits = len(declared) == 4 and all(not isinstance(d, int) or d == s for d, s in zip(declared[1:], x.shape[1:], strict=True))
    if not fits or isinstance(declared[0], int):
        raise RefusedError(f"it takes images of shape {declared}; the key asks with (n, {', '.join(map(str, x.shape[1:]))}), n free")
    labels = []
    for start in range(0, len(x), BATCH):
        batch = x[start : start + BATCH]
        try:
            output = session.run([session.get_outputs()[0].name], {inputs[0].name: batch})[0]
        except Exception as error:
            raise RefusedError(f"it failed on valid images: {first_line(error)}") from error
        labels.append(labels_of(output, len(batch)))
    return np.concatenate(labels) if labels else np.empty(0, dtype=np.int64)


if __name__ == "__main__":
    sys.exit(serve(lambda: None, _ask))
