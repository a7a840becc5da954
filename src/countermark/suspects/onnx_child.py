"""The child process of `onnx` (see `child_frame`): checks the graph, then asks onnxruntime.

With `--data` it answers with the names and digests of the files beside the model that hold its
tensors (external data), with `--places` with the inner places that images could be given to, and
with `--begin NUMBER` it gives them to one of these.
"""

import hashlib
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))  # -I leaves it out
from child_frame import (  # type: ignore[import-not-found]
    BATCH,
    FILE_LIMIT,
    RefusedError,
    first_line,
    in_batches,
    serve,
)

_TENSOR_LIMIT = 1 << 28  # values in one tensor of the file
_DOMAINS = ("", "ai.onnx", "ai.onnx.ml")
# onnxruntime may prefer operators of its own to functions of these domains and those below them.
_BUILT_IN = ("ai.onnx", "com.microsoft", "com.ms", "org.pytorch")
_MOST_NODES = 100_000
_MOST_PLACES = 64  # even
_FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE")
_INTEGERS = ("UINT8", "UINT16", "INT16", "UINT32", "INT32", "UINT64", "INT64")

Functions = dict[tuple[str, str], Any]  # a model's own, by domain and name


def _read(data: bytes) -> tuple[Any, dict[str, bytes]]:
    """The model with all its tensors in it, checked, and the files beside it that they came from.

    Raises:
        RefusedError: it is no ONNX, or holds what a plain classifier does not need: custom
            operators, tensors of absurd size, data that lies outside the model's folder.
    """
    import onnx

    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:
        raise RefusedError(
            "it is not an ONNX file (or a truncated one); export the model again"
        ) from error
    if not model.graph.output or not model.graph.node:
        raise RefusedError("it holds no graph; it is not an ONNX model or a truncated one")
    model.DiscardUnknownFields()  # so that what is run is what is checked
    _keep_called(model)
    files: dict[str, bytes] = {}
    functions = {(f.domain, f.name): f for f in model.functions}
    for message in _messages(model):
        if isinstance(message, onnx.NodeProto):
            _check_node(message, functions)
        elif isinstance(message, onnx.SparseTensorProto):
            _check_extent(message.dims)
        elif isinstance(message, onnx.TensorProto):
            _check_extent(message.dims)
            if message.data_location == message.EXTERNAL or message.external_data:
                _take_in(message, files)
    if _written_out(model.graph, functions, {}) > _MOST_NODES:
        raise RefusedError(
            "its functions are too many operators when they are written out; it cannot be asked"
        )
    return model, files


def _keep_called(model: Any) -> None:
    """Drop the model's functions that nothing calls: what no node uses is neither run nor checked.

    Raises:
        RefusedError: a function takes the place of an operator of a runtime.
    """
    functions = {(f.domain, f.name): f for f in model.functions}
    called: dict[tuple[str, str], Any] = {}
    waiting = [model.graph]
    while waiting:
        for node in _messages(waiting.pop()):
            key = (node.domain, node.op_type) if hasattr(node, "op_type") else None
            if key in functions and key not in called:
                called[key] = functions[key]
                waiting.append(functions[key])
    for domain, name in called:
        if domain == "" or any(
            domain == taken or domain.startswith(f"{taken}.") for taken in _BUILT_IN
        ):
            raise RefusedError(
                f"its function {domain[:80]}.{name[:80]} takes the place of an operator; "
                "give its domain another name"
            )
    kept = list(called.values())
    del model.functions[:]
    model.functions.extend(kept)


def _messages(message: Any) -> Iterator[Any]:
    """A message and all messages in it, however deep: branches, functions, attributes."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else list(value):
                yield from _messages(part)


def _written_out(part: Any, functions: Functions, known: dict[tuple[str, str], int]) -> int:
    """How many nodes a graph or function has when functions are replaced by their nodes.

    A function that calls itself counts as too many; `known` keeps the numbers of the others.
    """
    count = 0
    for node in _messages(part):
        if hasattr(node, "op_type"):
            key = (node.domain, node.op_type)
            if key in functions and key not in known:
                known[key] = _MOST_NODES + 1  # while it is counted
                known[key] = _written_out(functions[key], functions, known)
            count += known.get(key, 1)
    return count


def _check_node(node: Any, functions: Functions) -> None:
    """Refuse an operator that is neither standard nor a function of the model itself.

    The nodes of a function are checked like all others.
    """
    if node.domain not in _DOMAINS and (node.domain, node.op_type) not in functions:
        raise RefusedError(
            f"it uses the custom operator {node.domain[:80]}.{node.op_type[:80]}; "
            "only standard ONNX operators are run"
        )


def _check_extent(dims: Any) -> None:
    size = 1
    for extent in dims:
        size *= extent
        if extent < 0 or size > _TENSOR_LIMIT:
            raise RefusedError(
                f"it declares a tensor of the shape {list(dims)[:8]}, "
                "more than a suspect may have; it cannot be asked"
            )


def _take_in(tensor: Any, files: dict[str, bytes]) -> None:
    """Put values that lie in another file into the tensor; `files` keeps what was read."""
    said = {entry.key: entry.value for entry in tensor.external_data}
    location = said.get("location", "")
    if location not in files:
        files[location] = _beside(location, FILE_LIMIT - sum(map(len, files.values())))
    content = files[location]
    start, length = (
        int(said[name]) if said.get(name, "").isdecimal() and len(said[name]) < 20 else None
        for name in ("offset", "length")
    )
    start = start or 0
    end = len(content) if length is None else start + length
    if not start <= end <= len(content):
        raise RefusedError(
            f"its tensor {tensor.name[:80]!r} lies beyond the end of {location[:80]!r}; "
            "the file beside it is truncated or another one"
        )
    tensor.raw_data = content[start:end]
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")


def _beside(location: str, limit: int) -> bytes:
    """A file that the model names as its data: in the model's folder or below it."""
    folder = Path(sys.argv[1]).parent
    named = PurePosixPath(location)
    outside = RefusedError(
        f"it wants data from {location[:80]!r}, "
        "which does not lie in its own folder (external data); "
        "put the file there, or export the model as one file"
    )
    if (
        named.is_absolute()
        or ".." in named.parts
        or not named.parts
        or set("\\:\0") & set(location)
    ):
        raise outside
    try:
        place = (folder / named).resolve(strict=True)
        if not place.is_relative_to(folder.resolve(strict=True)):
            raise outside
        descriptor = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "rb") as stream:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_size > limit:
                raise RefusedError(
                    f"its data in {location[:80]!r} is no regular file or, "
                    f"with what else it has, larger than {FILE_LIMIT >> 20} MiB; it is not asked"
                )
            return stream.read(limit)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "it leads nowhere"
        raise RefusedError(
            f"it wants data from {location[:80]!r} in its folder (external data), "
            f"which cannot be read ({reason}); put the file there"
        ) from error


def _adapt(model: Any, x: np.ndarray) -> None:
    """Cast images to the type that the model takes, and bfloat16, which NumPy lacks, to float32."""
    import onnx
    from onnx import helper

    graph = model.graph
    filled = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in filled]
    types = _INTEGERS if x.dtype == np.uint8 else _FLOATS
    kinds = [onnx.TensorProto.DataType.Name(i.type.tensor_type.elem_type) for i in inputs]
    if len(inputs) != 1 or kinds[0] not in types:
        shown = [(value.name[:80], kind) for value, kind in zip(inputs[:4], kinds, strict=False)]
        raise RefusedError(
            f"it takes {shown}; a suspect takes one input of images, here {x.dtype} (--pixels says "
            "otherwise, and --match finds out)"
        )
    names = {name for node in graph.node for name in [*node.input, *node.output]}
    names |= {value.name for value in [*graph.input, *graph.output, *graph.initializer]}
    if kinds[0] != types[0]:
        wanted, images = inputs[0].name, _fresh("images", names)
        cast = helper.make_node("Cast", [images], [wanted], to=inputs[0].type.tensor_type.elem_type)
        graph.node.insert(0, cast)
        inputs[0].name = images
        inputs[0].type.tensor_type.elem_type = onnx.TensorProto.DataType.Value(types[0])
    for output in graph.output:
        if output.type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16:
            wider = _fresh(output.name, names)
            graph.node.append(
                helper.make_node("Cast", [output.name], [wider], to=onnx.TensorProto.FLOAT)
            )
            output.name = wider
            output.type.tensor_type.elem_type = onnx.TensorProto.FLOAT


def _free_input(model: Any) -> Any:
    """The input that takes the images."""
    filled = {tensor.name for tensor in model.graph.initializer}
    return next(value for value in model.graph.input if value.name not in filled)


def _inlined(model: Any) -> Any:
    """The model with the nodes of its functions in their places, and what it says of shapes unsaid.

    Otherwise both could hide an inner place.
    """
    import onnx
    from onnx import inliner

    try:
        model = inliner.inline_local_functions(model) if model.functions else model
    except Exception as error:
        raise RefusedError(f"its functions cannot be followed: {first_line(error)}") from error
    del model.graph.value_info[:]
    found: Any = onnx.ModelProto.FromString(model.SerializeToString())
    return found


def _inner(model: Any, x: np.ndarray) -> dict[str, int]:
    """Names of inner tensors that have the shape of images, and their types.

    What only hands on is left out. If there are too many, half are the first and half the last, so
    that harmless operations in front hide no place behind them.
    """
    import onnx

    model = onnx.ModelProto.FromString(model.SerializeToString())
    shape = _free_input(model).type.tensor_type.shape
    declared = shape.dim[0].dim_value if shape.dim else 0
    del shape.dim[:]
    for extent in (declared or 2, *x.shape[1:]):
        shape.dim.add().dim_value = extent
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except Exception as error:
        raise RefusedError(f"its shapes do not follow: {first_line(error)}") from error
    known = {value.name: value.type.tensor_type for value in inferred.graph.value_info}
    names = [
        name
        for node in model.graph.node
        if node.op_type not in ("Identity", "Cast", "Dropout")
        for name in node.output
        if name in known
    ]
    kinds = {onnx.TensorProto.DataType.Value(name) for name in _FLOATS}
    fitting = {
        name: known[name].elem_type
        for name in names
        if known[name].elem_type in kinds
        and tuple(d.dim_value for d in known[name].shape.dim)[1:] == x.shape[1:]
    }
    places, half = list(fitting.items()), _MOST_PLACES // 2
    return dict(places if len(places) <= _MOST_PLACES else places[:half] + places[-half:])


def _begin_at(model: Any, place: str, kind: int) -> None:
    """Let what comes after an inner place take the images, which are given to an input of its own.

    What goes around the place still begins at the model's own input.
    """
    import onnx
    from onnx import helper

    names = {
        name
        for node in _messages(model.graph)
        if hasattr(node, "op_type")
        for name in [*node.input, *node.output]
    }
    names |= {value.name for value in [*model.graph.input, *model.graph.initializer]}
    images, cast = _fresh("images", names), _fresh(place, names)
    for node in _messages(model.graph):
        if hasattr(node, "op_type"):
            node.input[:] = [cast if name == place else name for name in node.input]
    model.graph.node.insert(0, helper.make_node("Cast", [images], [cast], to=kind))
    model.graph.input.append(helper.make_tensor_value_info(images, onnx.TensorProto.FLOAT, None))


def _fresh(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _ask(data: bytes, x: np.ndarray, begin: int | None = None) -> bytes:
    model, _ = _read(data)
    if begin is not None:
        model = _inlined(model)
    _adapt(model, x)
    if begin is not None:
        places = _inner(model, x)
        if not 0 <= begin < len(places):
            raise RefusedError(f"it has no inner place {begin} that takes such images")
        _begin_at(model, *list(places.items())[begin])
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    # Otherwise bytes that look like a file of onnxruntime's own format are read as one.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:
        raise RefusedError(f"onnxruntime cannot load it: {first_line(error)}") from error
    declared = session.get_inputs()[0].shape
    if declared and (
        len(declared) != 4
        or any(
            isinstance(d, int) and d != s for d, s in zip(declared[1:], x.shape[1:], strict=True)
        )
        or declared[0] == 0
    ):
        images = ", ".join(map(str, x.shape[1:]))
        raise RefusedError(f"it takes images of shape {declared}; the key asks with (n, {images})")
    output = _first_answer(session.get_outputs())
    if declared and isinstance(declared[0], int):
        sizes = [declared[0]]
    else:  # some exporters fix the batch within the graph and say so of the output, or nowhere
        told = [size for size in output.shape[:1] if isinstance(size, int) and size > 0]
        sizes = [min(BATCH, max(len(x), 1)), *told, 1]
    inputs = [each.name for each in session.get_inputs()]
    answer: bytes = in_batches(
        x, sizes, lambda images: session.run([output.name], dict.fromkeys(inputs, images))[0]
    )
    return answer


def _first_answer(outputs: list[Any]) -> Any:
    """The first output that may be labels or scores."""
    for output in outputs:
        numbers = output.type.startswith(
            ("tensor(float", "tensor(double", "tensor(int", "tensor(uint")
        )
        if numbers or output.type.startswith("seq(map(int64,"):
            return output
    raise RefusedError(
        f"it answers with {[output.type for output in outputs][:4]}; "
        "a suspect answers with logits or labels"
    )


def _data(data: bytes, _: np.ndarray) -> bytes:
    """The digests of the files beside the model by their location, as JSON."""
    _, files = _read(data)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return json.dumps(digests).encode()


def _places(data: bytes, x: np.ndarray) -> bytes:
    """The inner places that images could be given to, as JSON."""
    model = _inlined(_read(data)[0])
    _adapt(model, x)
    return json.dumps(list(_inner(model, x))).encode()


def _wanted(words: list[str]) -> Callable[[bytes, np.ndarray], bytes]:
    """What the options ask for."""
    if words[:1] == ["--begin"]:
        return lambda data, x: _ask(data, x, int(words[1]))
    return {"--data": _data, "--places": _places}[words[0]] if words else _ask


if __name__ == "__main__":
    sys.exit(serve(lambda: None, _wanted(sys.argv[2:])))
