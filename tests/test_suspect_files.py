"""Suspects in files of many makes, and what hostile ones reach."""

import io
import json
import os
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import countermark.suspects
from countermark.claims import suspect_identity
from countermark.errors import CountermarkError
from countermark.networks.named import build
from countermark.suspects import ask_onnx, ask_pt2, open_suspect
from countermark.suspects.confined import _THREADS

SHAPE = (1, 8, 8)
WEIGHT = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)
IMAGES = torch.rand(70, *SHAPE, generator=torch.manual_seed(1))
BYTES = (IMAGES * 255).to(torch.uint8)


def labels_of(x: torch.Tensor) -> torch.Tensor:
    return (x.reshape(len(x), -1).float() @ torch.from_numpy(WEIGHT)).argmax(1)


# --- ONNX ---------------------------------------------------------------------------------------

Node = onnx.NodeProto
LINEAR = (("Flatten", ["x"], ["f"]), ("MatMul", ["f", "w"], ["y"]))


def nodes(*steps: tuple[str, list[str], list[str]], **attributes: object) -> list[Node]:
    """Nodes of standard operators; the attributes are the last one's."""
    made = [helper.make_node(name, inputs, outputs) for name, inputs, outputs in steps]
    name, inputs, outputs = steps[-1]
    return [*made[:-1], helper.make_node(name, inputs, outputs, **attributes)]


def model(
    steps: list[Node],
    *,
    weight: np.ndarray | None = WEIGHT,
    batch: object = "n",
    kind: int = TensorProto.FLOAT,
    outputs: tuple[tuple[str, int | None, list[object] | None], ...] = (
        ("y", TensorProto.FLOAT, None),
    ),
    sides: tuple[object, ...] = SHAPE,
    domains: tuple[str, ...] = (),
    functions: tuple[onnx.FunctionProto, ...] = (),
) -> onnx.ModelProto:
    declared = helper.make_tensor_value_info("x", kind, [batch, *sides])
    answers = [
        helper.make_empty_tensor_value_info(name)
        if type_ is None
        else helper.make_tensor_value_info(name, type_, shape)
        for name, type_, shape in outputs
    ]
    weights = [] if weight is None else [numpy_helper.from_array(weight, "w")]
    opsets = [helper.make_opsetid("", 17), *(helper.make_opsetid(name, 1) for name in domains)]
    graph = helper.make_graph(steps, "g", [declared], answers, weights)
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, functions=functions)


def in_half() -> onnx.ModelProto:
    half = TensorProto.FLOAT16
    return model(
        nodes(*LINEAR), weight=WEIGHT.astype(np.float16), kind=half, outputs=(("y", half, None),)
    )


def in_bfloat16() -> onnx.ModelProto:
    kind = TensorProto.BFLOAT16
    steps = [
        helper.make_node("Cast", ["x"], ["x32"], to=TensorProto.FLOAT),
        *nodes(("Flatten", ["x32"], ["f"]), ("MatMul", ["f", "w"], ["l"])),
        helper.make_node("Cast", ["l"], ["y"], to=kind),
    ]
    return model(steps, kind=kind, outputs=(("y", kind, None),))


def in_double() -> onnx.ModelProto:
    kind = TensorProto.DOUBLE
    return model(
        nodes(*LINEAR), weight=WEIGHT.astype(np.float64), kind=kind, outputs=(("y", kind, None),)
    )


def of_integers(kind: int) -> onnx.ModelProto:
    steps = [
        helper.make_node("Cast", ["x"], ["x32"], to=TensorProto.FLOAT),
        *nodes(("Flatten", ["x32"], ["f"]), ("MatMul", ["f", "w"], ["y"])),
    ]
    return model(steps, kind=kind)


def with_small_labels() -> onnx.ModelProto:
    steps = [
        *nodes(
            ("Flatten", ["x"], ["f"]),
            ("MatMul", ["f", "w"], ["l"]),
            ("ArgMax", ["l"], ["m"]),
            axis=1,
        ),
        helper.make_node("Cast", ["m"], ["y"], to=TensorProto.INT32),
    ]
    return model(steps, outputs=(("y", TensorProto.INT32, None),))


def with_axes() -> onnx.ModelProto:
    """Logits `(n, classes, 1, 1)`, as a network without a linear layer gives them."""
    steps = nodes(
        ("Flatten", ["x"], ["f"]), ("MatMul", ["f", "w"], ["l"]), ("Unsqueeze", ["l", "a"], ["y"])
    )
    made = model(steps)
    made.graph.initializer.append(numpy_helper.from_array(np.array([2, 3], dtype=np.int64), "a"))
    return made


def with_several_outputs() -> onnx.ModelProto:
    outputs = (("y", TensorProto.FLOAT, None), ("f", TensorProto.FLOAT, None))
    return model(nodes(*LINEAR), outputs=outputs)


def of_scikit_learn(labels: bool) -> onnx.ModelProto:
    """A list of scores by label; before it, if so, labels as text, which are none."""
    domain = "ai.onnx.ml"
    steps = nodes(("Flatten", ["x"], ["f"]), ("MatMul", ["f", "w"], ["l"]))
    steps += nodes(("ArgMax", ["l"], ["m"]), axis=1, keepdims=0)
    steps.append(
        helper.make_node(
            "LabelEncoder",
            ["m"],
            ["text"],
            domain=domain,
            keys_int64s=list(range(10)),
            values_strings=[f"digit {i}" for i in range(10)],
        )
    )
    names = list(range(10))
    steps.append(helper.make_node("ZipMap", ["l"], ["y"], domain=domain, classlabels_int64s=names))
    text = (("text", TensorProto.STRING, None),) if labels else ()
    made = model(steps, outputs=(*text, ("y", None, None)))
    made.opset_import.append(helper.make_opsetid(domain, 2))
    return made


def with_a_function() -> onnx.ModelProto:
    body = nodes(("Flatten", ["a"], ["b"]))
    function = helper.make_function(
        "mine", "Flat", ["a"], ["b"], body, [helper.make_opsetid("", 17)]
    )
    steps = [helper.make_node("Flat", ["x"], ["f"], domain="mine"), *nodes(LINEAR[1])]
    return model(steps, domains=("mine",), functions=(function,))


def fixed_inside() -> onnx.ModelProto:
    """A batch of one that only the graph's inside wants."""
    steps = nodes(("Reshape", ["x", "one"], ["f"]), ("MatMul", ["f", "w"], ["y"]))
    made = model(steps)
    made.graph.initializer.append(numpy_helper.from_array(np.array([1, 64], dtype=np.int64), "one"))
    return made


GOOD: dict[str, tuple[Callable[[], onnx.ModelProto], torch.Tensor]] = {
    "a batch of 1": (lambda: model(nodes(*LINEAR), batch=1), IMAGES),
    "a batch of 32": (lambda: model(nodes(*LINEAR), batch=32), IMAGES),
    "a batch of 100": (lambda: model(nodes(*LINEAR), batch=100), IMAGES),
    "a batch of 3 for the output": (
        lambda: model(nodes(*LINEAR), outputs=(("y", TensorProto.FLOAT, [3, 10]),)),
        IMAGES,
    ),
    "a batch of 1 inside": (fixed_inside, IMAGES),
    "no name for n": (lambda: model(nodes(*LINEAR), batch=None), IMAGES),
    "any height and width": (lambda: model(nodes(*LINEAR), sides=(1, "h", "w")), IMAGES),
    "a domain that no node uses": (
        lambda: model(nodes(*LINEAR), domains=("com.microsoft", "ai.onnx.training")),
        IMAGES,
    ),
    "half": (in_half, IMAGES),
    "bfloat16": (in_bfloat16, IMAGES),
    "double": (in_double, IMAGES),
    "uint8": (lambda: of_integers(TensorProto.UINT8), BYTES),
    "int64": (lambda: of_integers(TensorProto.INT64), BYTES),
    "int32 labels": (with_small_labels, IMAGES),
    "axes of length 1": (with_axes, IMAGES),
    "several outputs": (with_several_outputs, IMAGES),
    "scores by label": (lambda: of_scikit_learn(False), IMAGES),
    "labels as text first": (lambda: of_scikit_learn(True), IMAGES),
    "a function of its own": (with_a_function, IMAGES),
}


@pytest.mark.parametrize("name", GOOD)
def test_onnx_models_of_every_make_are_asked(tmp_path: Path, name: str) -> None:
    make, x = GOOD[name]
    path = tmp_path / "model.onnx"
    path.write_bytes(make().SerializeToString())
    given = ask_onnx(path, x)
    wanted = labels_of(x)
    # Rounding to few bits may turn a close call, so coarse types need not agree everywhere.
    assert (given == wanted).float().mean() >= (0.9 if name in ("half", "bfloat16") else 1)
    assert given.dtype == torch.int64


def test_a_fixed_batch_drops_the_answers_to_the_filling(tmp_path: Path) -> None:
    """Each answer depends on its whole batch here, so the filling must be copies."""
    steps = nodes(("Flatten", ["x"], ["f"]), ("MatMul", ["f", "w"], ["l"]))
    steps += nodes(("ReduceMax", ["l"], ["m"]), axes=[0], keepdims=1)
    steps += nodes(("Sub", ["l", "m"], ["y"]))
    path = tmp_path / "model.onnx"
    path.write_bytes(model(steps, batch=8).SerializeToString())
    parts = [IMAGES[i : i + 8].reshape(-1, 64) @ torch.from_numpy(WEIGHT) for i in range(0, 70, 8)]
    wanted = torch.cat([(part - part.amax(0)).argmax(1) for part in parts])
    assert torch.equal(ask_onnx(path, IMAGES), wanted)


def beside(path: Path, location: str = "weights.bin") -> Path:
    """A model whose weights lie in a file beside it."""
    onnx.save_model(
        model(nodes(*LINEAR)),
        str(path),
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    if location != "weights.bin":
        moved = onnx.load(str(path), load_external_data=False)
        for entry in moved.graph.initializer[0].external_data:
            if entry.key == "location":
                entry.value = location
        path.write_bytes(moved.SerializeToString())
    return path


def test_data_beside_an_onnx_file_is_read_and_named(tmp_path: Path) -> None:
    path = beside(tmp_path / "model.onnx")
    assert torch.equal(open_suspect(path, SHAPE)(IMAGES), labels_of(IMAGES))
    named = suspect_identity(path)
    data = tmp_path / "weights.bin"
    whole = data.read_bytes()
    data.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert suspect_identity(path) != named  # it is another suspect with other weights
    data.write_bytes(whole)
    assert suspect_identity(path) == named
    path.rename(tmp_path / "other.onnx")
    assert suspect_identity(tmp_path / "other.onnx") == named


def test_a_single_onnx_file_is_named_as_ever(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(model(nodes(*LINEAR)).SerializeToString())
    digest = subprocess.run(
        ["sha256sum", path], capture_output=True, text=True, check=True
    ).stdout.split()[0]
    assert suspect_identity(path) == {"kind": "file", "sha256": digest}


def test_data_elsewhere_is_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    outside = tmp_path / "secret.bin"
    outside.write_bytes(WEIGHT.tobytes())
    (folder / "link.bin").symlink_to(outside)
    (folder / "loop.bin").symlink_to("loop.bin")
    os.mkfifo(folder / "pipe.bin")
    (folder / "short.bin").write_bytes(bytes(100))
    (folder / "sub").mkdir()
    with (folder / "giant.bin").open("wb") as stream:
        stream.truncate(1 << 40)
    said = {
        "../secret.bin": "its own folder",
        "sub/../../secret.bin": "its own folder",
        str(outside): "its own folder",
        "link.bin": "its own folder",
        "": "its own folder",
        "loop.bin": "cannot be read",
        "absent.bin": "cannot be read",
        "pipe.bin": "no regular file",
        "sub": "regular file|cannot be read",
        "giant.bin": "larger than",
        "short.bin": "beyond the end",
    }
    for location, word in said.items():
        path = beside(folder / "model.onnx", location)
        for refused in (
            lambda path=path: open_suspect(path, SHAPE)(IMAGES),
            lambda path=path: suspect_identity(path),
        ):
            with pytest.raises(CountermarkError, match=word) as caught:
                refused()
            assert "\n" not in str(caught.value)


def evil_function() -> onnx.ModelProto:
    body = [helper.make_node("Run", ["a"], ["b"], domain="evil")]
    function = helper.make_function(
        "mine", "Flat", ["a"], ["b"], body, [helper.make_opsetid("", 17)]
    )
    return model(
        [helper.make_node("Flat", ["x"], ["y"], domain="mine")],
        domains=("mine",),
        functions=(function,),
    )


def built_in_function() -> onnx.ModelProto:
    """onnxruntime may run its own operator of this name and not the function."""
    body = nodes(("Flatten", ["a"], ["b"]))
    domain = "com.microsoft"
    function = helper.make_function(
        domain, "Gelu", ["a"], ["b"], body, [helper.make_opsetid("", 17)]
    )
    return model(
        [helper.make_node("Gelu", ["x"], ["y"], domain=domain)],
        domains=(domain,),
        functions=(function,),
    )


def function_in(domain: str, *spare: onnx.FunctionProto) -> onnx.ModelProto:
    """A linear classifier whose flattening is a function of its own.

    The functions in `spare` are called by nobody.
    """
    function = helper.make_function(
        domain,
        "Flat",
        ["a"],
        ["b"],
        nodes(("Flatten", ["a"], ["b"])),
        [helper.make_opsetid("", 17)],
    )
    steps = [helper.make_node("Flat", ["x"], ["f"], domain=domain), *nodes(LINEAR[1])]
    return model(steps, domains=(domain,), functions=(function, *spare))


@pytest.mark.parametrize("domain", ["com.mycompany", "pkg.torch", "commerce"])
def test_functions_of_any_domain_are_the_models_own(domain: str, tmp_path: Path) -> None:
    foreign = helper.make_node("Gelu", ["a"], ["b"], domain="com.microsoft")
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    for number, spare in enumerate(
        [(), (helper.make_function(domain, "Spare", ["a"], ["b"], [foreign], opsets),)]
    ):
        path = tmp_path / f"{number}.onnx"
        onnx.save(function_in(domain, *spare), path)
        assert open_suspect(path, SHAPE)(IMAGES).shape == (len(IMAGES),)


def calling_twice(depth: int, again: bool) -> onnx.ModelProto:
    """Functions that each call the next one twice, and the last one, if so, the first."""
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    functions = []
    for i in range(depth):
        name = f"F{(i + 1) % depth}"
        body = [helper.make_node(name, [a], [b], domain="mine") for a, b in ("ab", "bc")]
        if i == depth - 1 and not again:
            body = [helper.make_node("Relu", ["a"], ["c"])]
        functions.append(helper.make_function("mine", f"F{i}", ["a"], ["c"], body, opsets))
    steps = [helper.make_node("F0", ["x"], ["y"], domain="mine")]
    return model(steps, domains=("mine",), functions=tuple(functions))


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: calling_twice(40, False), "too many operators"),
        (lambda: calling_twice(1, True), "too many operators"),
        (lambda: calling_twice(3, True), "too many operators"),
        (evil_function, "evil.Run"),
        (built_in_function, "com.microsoft.Gelu"),
        (lambda: model(nodes(*LINEAR), kind=TensorProto.FLOAT, batch=0), "images of shape|failed"),
        (lambda: model(nodes(("Identity", ["x"], ["y"]))), "neither logits"),
        (
            lambda: model(nodes(("Identity", ["x"], ["y"])), kind=TensorProto.INT8),
            "one input of images",
        ),
    ],
)
def test_onnx_models_that_are_not_asked_say_why(
    tmp_path: Path, make: Callable[[], onnx.ModelProto], word: str
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(make().SerializeToString())
    with pytest.raises(CountermarkError, match=word):
        ask_onnx(path, IMAGES)


def test_an_onnx_file_is_never_taken_for_one_of_onnxruntimes_own(tmp_path: Path) -> None:
    """Its first fields can make the bytes look like that format, which nothing has checked."""
    made = model(nodes(*LINEAR))
    made.producer_name = "ORTM"
    path = tmp_path / "model.onnx"
    path.write_bytes(made.SerializeToString())
    assert path.read_bytes()[4:8] == b"ORTM"
    assert torch.equal(ask_onnx(path, IMAGES), labels_of(IMAGES))


# --- .pt2 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fixed", "half", "all-half", "named"])
def test_pt2_programs_of_every_make_are_asked(tmp_path: Path, name: str) -> None:
    network, batch, dtype = _programs()[name]
    path = tmp_path / "model.pt2"
    example = torch.zeros(4, *SHAPE, dtype=dtype)
    shapes = None if batch is None else ({0: batch},)
    torch.export.save(torch.export.export(network.eval(), (example,), dynamic_shapes=shapes), path)
    x = IMAGES[:9]
    if (
        name == "half"
    ):  # torch wants to know the processor for it, in the child where everything is closed
        try:
            given = ask_pt2(path, x)
        except CountermarkError as error:
            pytest.skip(str(error)) if "this system" in str(error) else pytest.fail(str(error))
    else:  # in this process, for it is quicker
        answer = child_module()._ask(path.read_bytes(), x.numpy())  # type: ignore[attr-defined]
        given = torch.from_numpy(np.frombuffer(answer, dtype=np.int64).copy())
    with torch.no_grad():
        parts = [network(x[i : i + 1].repeat(4, 1, 1, 1).to(dtype)) for i in range(9)]
    assert torch.equal(given, torch.cat([_first(part)[:1] for part in parts]).float().argmax(1))


def _first(output: object) -> torch.Tensor:
    if isinstance(output, dict):
        output = next(iter(output.values()))
    assert isinstance(output, torch.Tensor)
    return output


class Halved(torch.nn.Module):
    """Logits in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build("small", SHAPE, 10, seed=0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).half()


class Named(Halved):
    """Answers with a dictionary, and sizes that are calculated."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return {
            "logits": self.inner(x.reshape(2 * x.shape[0], -1).reshape(x.shape[0], *SHAPE)),
            "x": x,
        }


def _programs() -> dict[str, tuple[torch.nn.Module, object, torch.dtype]]:
    dim = torch.export.Dim
    return {
        "fixed": (build("small", SHAPE, 10, seed=0), None, torch.float32),
        "half": (Halved(), dim("n", min=2, max=4), torch.float32),
        "all-half": (
            build("small", SHAPE, 10, seed=0).half(),
            dim("n", min=2, max=64),
            torch.float16,
        ),
        "named": (Named(), 2 * dim("k", min=1, max=64), torch.float32),
    }


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("pt2") / "copy.pt2"
    batch = torch.export.Dim("n", min=1, max=4096)
    network = build("small", SHAPE, 10, seed=0).eval()
    torch.export.save(
        torch.export.export(network, (torch.zeros(2, *SHAPE),), dynamic_shapes=({0: batch},)), path
    )
    return path.read_bytes()


def child_module(name: str = "pt2_child") -> object:
    import importlib.util

    path = Path(countermark.suspects.__file__).with_name(f"{name}.py")
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def changed(program: bytes, change: Callable[[dict[str, object]], None]) -> bytes:
    """The archive with a changed models/model.json."""
    rewritten = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(program)) as archive, zipfile.ZipFile(rewritten, "w") as copy:
        for member in archive.infolist():
            data = archive.read(member)
            if member.filename.endswith("models/model.json"):
                value = json.loads(data)
                change(value)
                data = json.dumps(value).encode()
            copy.writestr(member.filename, data)
    return rewritten.getvalue()


def damaged(program: bytes, encrypted: bool) -> bytes:
    """The archive with one flipped bit in a weight, or with a member marked as encrypted."""
    with zipfile.ZipFile(io.BytesIO(program)) as archive:
        member = next(m for m in archive.infolist() if m.filename.endswith("weight_0"))
        spoiled = bytearray(program)
        if encrypted:
            central = program.index(b"PK\x01\x02")
            while not program[central + 46 :].startswith(member.filename.encode()):
                central = program.index(b"PK\x01\x02", central + 1)
            spoiled[central + 8] |= 1
            spoiled[member.header_offset + 6] |= 1
        else:
            spoiled[program.index(b"PK\x03\x04", member.header_offset + 1) - 200] ^= 1
    return bytes(spoiled)


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_damaged_member_of_a_pt2_is_named(
    tmp_path: Path, program: bytes, encrypted: bool
) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(damaged(program, encrypted))
    with pytest.raises(CountermarkError, match=r"weight_.*(CRC|encrypted)|this system"):
        ask_pt2(path, IMAGES[:2])


def test_a_shape_expression_is_read_in_linear_time() -> None:
    """The old pattern took time exponential in the digits: these would outlast every test run."""
    pattern = child_module()._EXPRESSION  # type: ignore[attr-defined]
    for text in (
        "1" * 26 + "!",
        "1" * 999 + "!",
        "s1" * 400 + "!",
        "Symbol('s1'" + ", positive=True" * 60 + "!",
    ):
        assert pattern.fullmatch(text) is None
    written = (
        "Add(FloorDiv(Add(Symbol('s0', positive=True, integer=True), Integer(-1)), Integer(2)), 1)"
    )
    assert pattern.fullmatch(written)
    assert not pattern.fullmatch("Pow(9,9)")
    assert not pattern.fullmatch("Integer.x")


MODULE = "countermark_was_imported_by_name"


def _spec_by_name(value: dict) -> None:  # type: ignore[type-arg]
    leaf = {"type": None, "context": None, "children_spec": []}
    context = {"default_factory_module": MODULE, "default_factory_name": "x", "dict_context": []}
    spec = {"type": "collections.defaultdict", "context": context, "children_spec": []}
    signature = value["graph_module"]["module_call_graph"][0]["signature"]
    signature["out_spec"] = json.dumps(
        [1, {"type": "builtins.tuple", "context": "null", "children_spec": [leaf, spec]}]
    )


def _source_in_a_name(value: dict) -> None:  # type: ignore[type-arg]
    text = json.dumps(value).replace('"input"', json.dumps(f"input=__import__('{MODULE}')"))
    value.update(json.loads(text))


def _attribute(value: dict) -> None:  # type: ignore[type-arg]
    value["graph_module"]["graph"]["nodes"][0]["target"] = "torch.ops.aten.__class__.__subclasses__"


def _file(value: dict) -> None:  # type: ignore[type-arg]
    value["graph_module"]["graph"]["nodes"][0]["target"] = "torch.ops.aten.from_file.default"


def test_a_pt2_names_no_module_of_ours(
    program: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The packing of the output is written anew: a class in it is never looked up."""
    (tmp_path / f"{MODULE}.py").write_text("x = list")
    monkeypatch.syspath_prepend(str(tmp_path))
    child = child_module()
    x = IMAGES[:2].numpy()
    answer = child._ask(changed(program, _spec_by_name), x)  # type: ignore[attr-defined]
    assert np.frombuffer(answer, dtype=np.int64).shape == (2,)
    assert MODULE not in sys.modules


@pytest.mark.parametrize(
    ("change", "word"),
    [(_source_in_a_name, "more than letters"), (_attribute, "only ATen"), (_file, "only ATen")],
)
def test_a_pt2_with_words_that_would_run_is_refused(
    program: bytes, change: Callable[[dict[str, object]], None], word: str
) -> None:
    child = child_module()
    with pytest.raises(child.RefusedError, match=word):  # type: ignore[attr-defined]
        child._plain(changed(program, change), IMAGES[:2].numpy())  # type: ignore[attr-defined]
    assert MODULE not in sys.modules


# Numbers of system calls on x86-64 and arm64,
# and arguments that would succeed or at least be looked at.
_HOSTILE = """
import ctypes, importlib.util, json, os, socket, sys, threading
sys.path.insert(0, sys.argv[2])
import pt2_child
from child_frame import RefusedError
place, path, inherited = json.loads(sys.argv[3])
open("scratch", "w").write("x")
try:
    pt2_child._confine()
except RefusedError as error:
    print("cannot confine:", error)
    sys.exit(0)
libc = ctypes.CDLL(None, use_errno=True)
column = {"x86_64": 0, "aarch64": 1}[os.uname().machine]
name, buffer = ctypes.c_char_p(path.encode()), ctypes.create_string_buffer(4096)
file = ctypes.c_char_p(b"scratch")
def call(numbers, *arguments):
    number = numbers[column]
    if number is None:
        raise OSError("no such call here")
    ctypes.set_errno(0)
    found = libc.syscall(*map(lambda a: a if not isinstance(a, int) else ctypes.c_long(a), \
(number, *arguments)))
    if found < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return found
def unix():
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(place)
attempts = {
    "unix socket": unix,
    "socket pair": socket.socketpair,
    "add_key": lambda: call((248, 217), ctypes.c_char_p(b"user"), ctypes.c_char_p(b"k"), \
ctypes.c_char_p(b"v"), 1, -4),
    "keyctl": lambda: call((250, 219), 0, -4, 1),
    "request_key": lambda: call((249, 218), ctypes.c_char_p(b"user"), ctypes.c_char_p(b"k"), \
None, -4),
    "setxattr": lambda: call((188, 5), name, ctypes.c_char_p(b"user.x"), ctypes.c_char_p(b"1"), \
1, 0),
    "removexattr": lambda: call((197, 14), name, ctypes.c_char_p(b"user.kept")),
    "getxattr": lambda: call((191, 8), name, ctypes.c_char_p(b"user.kept"), buffer, 100),
    "chmod": lambda: os.chmod(path, 0o777),
    "chmod scratch": lambda: os.chmod("scratch", 0o777),
    "chown": lambda: os.chown(path, os.getuid(), os.getgid()),
    "utime": lambda: os.utime(path, (1, 1)),
    "truncate": lambda: os.truncate(path, 0),
    "link": lambda: os.link(path, "linked"),
    "symlink": lambda: os.symlink(path, "linked"),
    "fifo": lambda: os.mkfifo("fifo"),
    "chdir": lambda: os.chdir("/"),
    "chroot": lambda: os.chroot("/"),
    "umask": lambda: call((95, 166), 0),
    "fork": os.fork,
    "vfork by clone": lambda: call((56, 220), 17, 0, 0, 0, 0),
    "clone3": lambda: call((435, 435), buffer, 88),
    "exec": lambda: os.execv("/bin/true", ["true"]),
    "memfd": lambda: call((319, 279), ctypes.c_char_p(b"m"), 0),
    "execveat": lambda: call((322, 281), -100, ctypes.c_char_p(b"/bin/true"), None, None, 0),
    "ptrace": lambda: call((101, 117), 0, 0, 0, 0),
    "process_vm_readv": lambda: call((310, 270), 1, buffer, 0, buffer, 0, 0),
    "pidfd_open": lambda: call((434, 434), os.getpid(), 0),
    "kill": lambda: os.kill(0, 0),
    "io_uring": lambda: call((425, 425), 4, buffer),
    "bpf": lambda: call((321, 280), 0, buffer, 100),
    "perf": lambda: call((298, 241), buffer, 0, -1, -1, 0),
    "userfaultfd": lambda: call((323, 282), 1),
    "mount": lambda: call((165, 40), None, file, ctypes.c_char_p(b"tmpfs"), 0, None),
    "unshare": lambda: call((272, 97), 0x10000000),
    "setns": lambda: call((308, 268), 0, 0),
    "shmget": lambda: call((29, 194), 0, 4096, 0o1600),
    "semget": lambda: call((64, 190), 0, 1, 0o1600),
    "msgget": lambda: call((68, 186), 0, 0o1600),
    "mq_open": lambda: call((240, 180), ctypes.c_char_p(b"q"), 0o102, 0o600, None),
    "sched": lambda: call((144, 119), 0, 0, buffer),
    "nice": lambda: os.setpriority(os.PRIO_PROCESS, 0, 19),
    "affinity": lambda: os.sched_setaffinity(0, [0]),
    "prctl": lambda: call((157, 167), 15, ctypes.c_char_p(b"other"), 0, 0, 0),
    "limit of another": lambda: call((302, 261), 1, 7, None, buffer),
    "tty": lambda: call((16, 29), 0, 0x5412, buffer),
    "inotify": lambda: call((294, 26), 0),
    "fanotify": lambda: call((300, 262), 0, 0),
    "name_to_handle_at": lambda: call((303, 264), -100, name, buffer, buffer, 0),
    "a pipe by its name": lambda: os.open(path + ".fifo", os.O_RDWR | os.O_NONBLOCK),
    "proc": lambda: open("/proc/self/environ").read(),
    "inherited": lambda: os.write(inherited, b"x"),
    "32 bits": lambda: call((0x40000000 + 39, None)),
}
for attempt, action in attempts.items():
    try:
        action()
        print("DONE", attempt)
    except (OSError, ValueError):
        pass
thread = threading.Thread(target=print, args=("a thread runs",))
thread.start()
thread.join()
print(len(attempts), "were tried", flush=True)
"""


def test_hostile_code_in_the_child_makes_no_other_calls(tmp_path: Path) -> None:
    """Every row is something that Landlock and namespaces leave open, or a neighbour of it."""
    target = tmp_path / "secret"
    target.write_text("secret")
    target.chmod(0o600)
    os.utime(target, (1_000_000, 1_000_000))
    os.mkfifo(f"{target}.fifo")
    (tmp_path / "empty").mkdir()
    reading, inherited = os.pipe()
    os.set_inheritable(inherited, True)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen()
        told = json.dumps([str(tmp_path / "s"), str(target), inherited])
        folder = str(Path(countermark.suspects.__file__).parent)
        done = subprocess.run(
            [sys.executable, "-I", "-c", _HOSTILE, "unused", folder, told],
            cwd=tmp_path / "empty",
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env=_THREADS,
        )
    os.close(reading)
    os.close(inherited)
    if "cannot confine" in done.stdout:
        pytest.skip(done.stdout)
    lines = done.stdout.splitlines()
    assert lines[:1] == ["a thread runs"], done.stdout + done.stderr
    assert lines[-1].endswith("were tried")
    found = target.stat()
    assert (found.st_mode & 0o777, found.st_mtime, found.st_size) == (0o600, 1_000_000, 6)


_EMPTYING = """
import ctypes, os, sys
sys.path.insert(0, sys.argv[1])
from child_calls import allow_few_calls
path = sys.argv[2]
if not allow_few_calls(ctypes.CDLL(None, use_errno=True)):
    print("no list here")
    sys.exit()
for mode in (os.O_RDONLY, 3):
    try:
        os.open(path, mode | os.O_TRUNC)
        print("emptied")
    except OSError:
        pass
os.close(os.open(path, os.O_RDONLY))
print(os.stat(path).st_size)
os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))
print(os.stat(path).st_size, flush=True)
"""


def test_what_may_be_read_cannot_be_emptied(tmp_path: Path) -> None:
    """Landlock knows truncation since Linux 6.2 only; writing is its business everywhere."""
    (tmp_path / "file").write_text("secret")
    folder = str(Path(countermark.suspects.__file__).parent)
    command = [sys.executable, "-I", "-c", _EMPTYING, folder, str(tmp_path / "file")]
    said = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=True
    ).stdout.split("\n")
    if said[0] == "no list here":
        pytest.skip(said[0])
    assert said[:2] == ["6", "0"]


def test_a_kernel_or_processor_without_the_list_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the child refuses the file; half a confinement is none."""

    class Old:
        def prctl(self, *_: object) -> int:
            return -1

    calls = child_module("child_calls")
    assert calls.allow_few_calls(Old()) is False  # type: ignore[attr-defined]
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert calls.allow_few_calls(None) is False  # type: ignore[attr-defined]


def test_a_child_that_says_too_much_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it writes goes to files, on which its limits hold, and not into our memory."""
    folder = Path(countermark.suspects.__file__).parent
    child = (
        f"import sys; sys.path.insert(0, {str(folder)!r}); "
        "import child_frame; child_frame.limit()\n"
        "for _ in range(64): sys.stdout.buffer.write(bytes(1 << 20))"
    )
    (tmp_path / "pt2_child.py").write_text(child)
    (tmp_path / "x.pt2").write_bytes(b"")
    monkeypatch.setattr("countermark.suspects.confined._FOLDER", tmp_path)
    with pytest.raises(CountermarkError, match="crashed"):
        ask_pt2(tmp_path / "x.pt2", IMAGES[:1])


def test_a_reason_is_one_line_without_control_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (
        r"sys.stderr.write('a library says\nsomething\nthe \x1b[31mreason' + '!' * 10**6); "
        "sys.exit(2)"
    )
    (tmp_path / "pt2_child.py").write_text(f"import sys; {words}")
    monkeypatch.setattr("countermark.suspects.confined._FOLDER", tmp_path)
    with pytest.raises(CountermarkError) as caught:
        ask_pt2(tmp_path / "x.pt2", IMAGES[:1])
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
