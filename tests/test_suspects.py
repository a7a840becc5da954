"""Suspects at arm's length: our model folders, ONNX files, and hostile ones."""

import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import re
import socket
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import countermark
import countermark.suspects
from countermark.cli import main
from countermark.data import Pools, pixels
from countermark.errors import CountermarkError
from countermark.evaluation import predict
from countermark.evidence import judge
from countermark.files import canonical_json, read_json, write_json
from countermark.networks import load, load_model, save_model
from countermark.networks.named import build
from countermark.places import place_name
from countermark.suspects import Asking, ask_onnx, onnx_places, open_suspect
from countermark.suspects.confined import _THREADS
from countermark.verbs.adjudicate import AdjudicateConfig
from countermark.verbs.claim import ClaimConfig
from countermark.verbs.export import export
from countermark.verbs.remove import remove
from countermark.verbs.verify import VerifyConfig, verify
from described import described

SHAPE = (1, 8, 8)


def make_onnx(
    path: Path, nodes: list[onnx.NodeProto], initializers: list[onnx.TensorProto], **changes: object
) -> Path:
    declared = helper.make_tensor_value_info(
        "x", changes.get("type", TensorProto.FLOAT), changes.get("shape", ["n", 1, 8, 8])
    )
    output = helper.make_tensor_value_info("y", changes.get("output", TensorProto.FLOAT), None)
    opsets = [helper.make_opsetid("", 17), *changes.get("opsets", [])]  # type: ignore[misc]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [declared], [output], initializers),
        opset_imports=opsets,
        ir_version=8,
    )
    path.write_bytes(model.SerializeToString())
    return path


def linear_onnx(path: Path, scale: float = 1.0, **changes: object) -> Path:
    weight = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32) * np.float32(scale)
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["y"]),
    ]
    return make_onnx(path, nodes, [numpy_helper.from_array(weight, "w")], **changes)


@pytest.mark.filterwarnings("ignore")
def test_onnx_export_answers_like_the_model(owner: Path, digits: Pools, tmp_path: Path) -> None:
    model, path = load(owner), tmp_path / "copy.onnx"
    torch.onnx.export(
        model,
        (torch.zeros(2, *SHAPE),),
        str(path),
        dynamo=False,
        dynamic_axes={"x": {0: "n"}},
        input_names=["x"],
    )
    expected = predict(model, digits.test.x)
    assert torch.equal(open_suspect(path, SHAPE)(digits.test.x), expected)
    assert torch.equal(open_suspect(owner, SHAPE)(pixels(digits.test.x)), expected)


@pytest.mark.parametrize("column", [False, True])
def test_onnx_that_answers_with_labels(tmp_path: Path, column: bool) -> None:
    weight = numpy_helper.from_array(
        np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32), "w"
    )
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["l"]),
        helper.make_node("ArgMax", ["l"], ["y"], axis=1, keepdims=int(column)),
    ]
    x = torch.rand(130, *SHAPE)
    labels = open_suspect(
        make_onnx(tmp_path / "labels.onnx", nodes, [weight], output=TensorProto.INT64), SHAPE
    )(x)
    assert torch.equal(labels, open_suspect(linear_onnx(tmp_path / "logits.onnx"), SHAPE)(x))
    assert labels.dtype == torch.int64


def sparse_external(path: Path) -> Path:
    """A constant whose values lie in a file that is not in the model's folder."""
    values = TensorProto(
        name="v", data_type=TensorProto.FLOAT, dims=[10], data_location=TensorProto.EXTERNAL
    )
    values.external_data.add(key="location", value="../ext.bin")
    indices = numpy_helper.from_array(np.arange(10, dtype=np.int64), "i")
    sparse = onnx.SparseTensorProto(values=values, indices=indices, dims=[10])
    nodes = [
        helper.make_node("Constant", [], ["c"], sparse_value=sparse),
        helper.make_node("Add", ["x", "c"], ["y"]),
    ]
    return make_onnx(path, nodes, [])


def custom(path: Path) -> Path:
    return make_onnx(
        path,
        [helper.make_node("Run", ["x"], ["y"], domain="evil")],
        [],
        opsets=[helper.make_opsetid("evil", 1)],
    )


def hidden_custom(path: Path) -> Path:
    """A custom operator inside a branch, whose domain the model does not declare."""
    branch = helper.make_graph(
        [helper.make_node("Run", ["x"], ["b"], domain="evil")],
        "branch",
        [],
        [helper.make_tensor_value_info("b", 1, None)],
    )
    condition = numpy_helper.from_array(np.array(True), "c")
    return make_onnx(
        path,
        [helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)],
        [condition],
    )


def declared_giant(path: Path) -> Path:
    giant = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1 << 20, 1 << 20])
    return make_onnx(path, [helper.make_node("MatMul", ["x", "w"], ["y"])], [giant])


def computed_giant(path: Path) -> Path:
    """A small file that asks for 64 GiB when it runs."""
    nodes = [
        helper.make_node("ConstantOfShape", ["s"], ["big"]),
        helper.make_node("ReduceSum", ["big"], ["sum"], keepdims=0),
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("Add", ["f", "sum"], ["y"]),
    ]
    return make_onnx(
        path, nodes, [numpy_helper.from_array(np.array([1 << 17, 1 << 17], dtype=np.int64), "s")]
    )


def not_a_number(path: Path) -> Path:
    return linear_onnx(path, scale=float("nan"))


def truncated(path: Path) -> Path:
    linear_onnx(path)
    path.write_bytes(path.read_bytes()[:-50])
    return path


def pickled(path: Path) -> Path:
    path.write_bytes(pickle.dumps({"state": list(range(100))}))
    return path


def empty(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def other_shape(path: Path) -> Path:
    return make_onnx(path, [helper.make_node("Flatten", ["x"], ["y"])], [], shape=["n", 1, 28, 28])


def wrong_output(path: Path) -> Path:
    return make_onnx(path, [helper.make_node("Relu", ["x"], ["y"])], [])


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (sparse_external, "external"),
        (custom, "evil"),
        (hidden_custom, "evil"),
        (declared_giant, "tensor of the shape"),
        (computed_giant, "memory|failed|allocat|crashed"),
        (not_a_number, "finite"),
        (truncated, "ONNX"),
        (pickled, "ONNX"),
        (empty, "ONNX"),
        (other_shape, "shape"),
        (wrong_output, "logits"),
    ],
)
def test_hostile_onnx_files_get_a_reason(tmp_path: Path, make: object, word: str) -> None:
    path = make(tmp_path / "hostile.onnx")  # type: ignore[operator]
    with pytest.raises(CountermarkError, match=word) as caught:
        open_suspect(path, SHAPE)(torch.rand(3, *SHAPE))
    assert "\n" not in str(caught.value)


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("__import__('pathlib').Path('/tmp/countermark-was-unpickled').touch()",)


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.pkl", "model.txt", "absent.onnx"])
def test_files_that_are_not_asked(tmp_path: Path, name: str) -> None:
    if not name.startswith("absent"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CountermarkError):
        open_suspect(tmp_path / name, SHAPE)
    assert not Path("/tmp/countermark-was-unpickled").exists()


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    save_model(
        tmp_path, build("small", SHAPE, 10, seed=0), described("small", SHAPE, 10, "digits", 0.1, 0)
    )
    return tmp_path


def test_bundle_round_trip(bundle: Path) -> None:
    model, description = load_model(bundle)
    assert not model.training
    assert description == described("small", SHAPE, 10, "digits", 0.1, 0)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            model.parameters(), build("small", SHAPE, 10, seed=0).parameters(), strict=True
        )
    )


def test_same_weights_same_bytes(bundle: Path) -> None:
    whole = (bundle / "model.safetensors").read_bytes()
    save_model(bundle, *load_model(bundle))
    assert (bundle / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize(
    "damage",
    ["pickle", "cut", "flip", "giant header", "foreign", "nan", "missing", "half", "extra"],
)
def test_damaged_weights_are_refused_and_never_unpickled(bundle: Path, damage: str) -> None:
    path = bundle / "model.safetensors"
    whole = path.read_bytes()
    description = load_model(bundle)[1]
    if damage == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    elif damage == "cut":
        path.write_bytes(whole[:-9])
    elif damage == "flip":
        path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    elif damage == "giant header":
        path.write_bytes(struct.pack("<Q", 1 << 62) + whole[8:])
    elif damage == "foreign":
        save_model(bundle, build("paper", SHAPE, 10), description)
    elif damage == "missing":
        path.unlink()
    else:
        broken = build("small", SHAPE, 10, seed=0)
        if damage == "nan":
            broken[0].weight.data[0] = float("nan")
        elif damage == "half":
            broken.half()
        else:
            broken.register_buffer("more", torch.zeros(3))
        save_model(bundle, broken, description)
    with pytest.raises(CountermarkError, match=r"model\.safetensors"):
        load_model(bundle)
    assert not Path("/tmp/countermark-was-unpickled").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other 9"},
        {"network": "evil"},
        {"shape": [1, 1 << 16, 1 << 16]},
        {"shape": [1, 8]},
        {"shape": "abc"},
        {"class_names": ["one"]},
        {"class_names": ["a", 1]},
        {"class_names": ["a"] * 20_000},
        {"data": "digits"},
        {"data": {"place": "digits"}},
        {"threat": {"epsilon": 0.1}},
        {"history": "none"},
        *(
            {"threat": {"epsilon": e, "steps": 9, "step_size": 0.1, "watermark_epsilon": 0.9}}
            for e in ("0.1", 1e300, -0.1, True)
        ),
        {"seed": 10**30},
        {"network": {"place": "paper", "mean": [], "std": []}, "shape": [1, 1024, 1024]},
        {"network": {"place": "os:getcwd", "mean": [], "std": []}},
    ],
)
def test_hostile_descriptions_are_refused(bundle: Path, change: dict[str, object]) -> None:
    write_json(bundle / "model.json", {**read_json(bundle / "model.json"), **change})
    with pytest.raises(CountermarkError):
        load_model(bundle)


def test_json_bombs_and_foreign_files_are_refused(bundle: Path) -> None:
    for data in (
        b"[" * 100_000,
        b"\xff\xfe",
        b"{}",
        b"[1]",
        b" " * (2 << 20),
        b'{"format": 1e999}',
        b"null",
    ):
        (bundle / "model.json").write_bytes(data)
        with pytest.raises(CountermarkError):
            load_model(bundle)


def test_a_suspect_for_other_images_is_refused(bundle: Path) -> None:
    with pytest.raises(CountermarkError, match="shape"):
        open_suspect(bundle, (1, 28, 28))


def test_a_function_of_your_own_is_asked(owner: Path, digits: Pools) -> None:
    model, key = load(owner), owner / "key"
    x = digits.test.x
    assert torch.equal(open_suspect(lambda x: predict(model, x), SHAPE)(x), predict(model, x))
    found = countermark.verify(lambda x: predict(model, x), key=key)
    assert (found.verdict, found.answers.unanswered) == ("match", 0)
    dumb = countermark.verify(lambda x: torch.full((len(x),), -1), key=key)
    assert (dumb.verdict, dumb.answers.unanswered) == ("inconclusive", dumb.test.trials)


@pytest.mark.parametrize(
    "answer",
    [
        lambda x: x,
        lambda x: {"label": [1] * len(x)},
        lambda x: np.full(len(x), 2**64 - 1, np.uint64),
        lambda x: np.ones(len(x)),
        lambda x: torch.zeros(len(x)),
        lambda x: torch.zeros(1).long(),
    ],
)
def test_a_function_that_gives_no_labels_is_refused(
    answer: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    with pytest.raises(
        CountermarkError, match="a tensor of int64 labels, or an array of whole numbers"
    ):
        open_suspect(answer, SHAPE)(torch.rand(3, *SHAPE))


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_a_function_may_answer_with_an_array(kind: type) -> None:
    x = torch.rand(8, *SHAPE)
    answers = open_suspect(lambda x: bright(0, x).numpy().astype(kind), SHAPE)(x)  # type: ignore[arg-type,return-value]
    assert torch.equal(answers, bright(0, x))


class Flaky:
    """A function that remembers how it was asked: `plan` says what each call does."""

    def __init__(self, plan: Callable[[int, torch.Tensor], torch.Tensor]) -> None:
        self.plan, self.calls, self.times = plan, [], []  # type: ignore[var-annotated]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(x))
        self.times.append(time.monotonic())
        return self.plan(len(self.calls), x)


def bright(_number: int, x: torch.Tensor) -> torch.Tensor:
    return (x.flatten(1).mean(1) > 0.5).long()


def failing_at(*numbers: int) -> Callable[[int, torch.Tensor], torch.Tensor]:
    def plan(number: int, x: torch.Tensor) -> torch.Tensor:
        if number in numbers:
            raise ConnectionResetError("gone for a moment")
        return bright(number, x)

    return plan


@pytest.fixture
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("countermark.suspects.asker._FIRST_WAIT", 0.0)


def test_a_function_is_asked_within_its_budget_and_rate() -> None:
    function = Flaky(bright)
    labels = open_suspect(function, SHAPE, Asking(budget=10, batch_size=4, rate=50))(
        torch.rand(30, *SHAPE)
    )
    assert function.calls == [4, 4, 2]
    assert int((labels >= 0).sum()) == 10
    assert function.times[2] - function.times[0] > 2 / 50 * 0.9


@pytest.mark.usefixtures("_no_waiting")
def test_a_function_that_fails_is_asked_again() -> None:
    x = torch.rand(8, *SHAPE)
    function = Flaky(failing_at(2, 3))
    assert torch.equal(
        open_suspect(function, SHAPE, Asking(batch_size=4, retries=2))(x), bright(0, x)
    )
    assert function.calls == [4, 4, 4, 4]
    once = Flaky(failing_at(2, 4))
    labels = open_suspect(once, SHAPE, Asking(batch_size=4, retries=0))(x)
    assert once.calls == [4, 4, 1, 1, 1, 1]
    assert (labels == -1).tolist() == [False] * 5 + [True] + [False] * 2


@pytest.mark.usefixtures("_no_waiting")
def test_a_function_that_always_fails_is_said_with_its_words() -> None:
    function = Flaky(failing_at(*range(1, 1000)))
    with pytest.raises(
        CountermarkError,
        match=r"test_suspects\.Flaky answers nothing: ConnectionResetError: gone for a moment",
    ):
        open_suspect(function, SHAPE)(torch.rand(200, *SHAPE))
    assert len(function.calls) <= 5 * 5


def test_a_function_with_a_mistake_in_it_is_called_once() -> None:
    function = Flaky(lambda _number, x: x.no_such_thing)
    with pytest.raises(
        CountermarkError, match=r"answers nothing: AttributeError: .*; mend the function"
    ):
        open_suspect(function, SHAPE)(torch.rand(200, *SHAPE))
    assert len(function.calls) == 1


def test_a_function_whose_answers_change_gives_none() -> None:
    function = Flaky(lambda number, x: torch.tensor([number % 2, *[7] * (len(x) - 1)]))
    suspect = open_suspect(function, SHAPE, Asking(repeats=2))
    assert suspect(torch.rand(4, *SHAPE)).tolist() == [-1, 7, 7, 7]
    key_asks = VerifyConfig(function, key=Path("key"), repeats=2)
    assert key_asks.record()["suspect"] == "python:test_suspects.Flaky"


def test_what_a_function_does_to_its_images_reaches_no_repeat() -> None:
    def spoils(x: torch.Tensor) -> torch.Tensor:
        labels = bright(0, x)
        x.zero_()
        return labels

    x = torch.ones(3, *SHAPE)
    assert open_suspect(spoils, SHAPE, Asking(repeats=3))(x).tolist() == [1, 1, 1]
    assert float(x.min()) == 1


def test_a_functions_answers_are_replayed(tmp_path: Path) -> None:
    x, function = torch.rand(8, *SHAPE), Flaky(bright)
    asking = Asking(replay=tmp_path / "replay.jsonl")
    first = open_suspect(function, SHAPE, asking)(x)
    assert torch.equal(open_suspect(function, SHAPE, asking)(x), first)
    assert sum(function.calls) == 8
    assert '"url": "python:test_suspects.Flaky"' in (tmp_path / "replay.jsonl").read_text()
    assert torch.equal(
        open_suspect(lambda x: bright(0, x), SHAPE, asking)(x), first
    )  # another name
    assert len((tmp_path / "replay.jsonl").read_text().splitlines()) == 16


def test_verify_heeds_how_a_function_is_to_be_asked(owner: Path) -> None:
    function = Flaky(bright)
    found = countermark.verify(function, key=owner / "key", budget=50, repeats=2)
    assert (found.suspect, found.answers.unanswered) == (
        "python:test_suspects.Flaky",
        found.test.trials - 25,
    )
    assert sum(function.calls) == 50


def test_names_of_functions() -> None:
    assert place_name(bright) == "python:test_suspects.bright"
    assert place_name(partial(bright, 0)) == "python:test_suspects.bright"
    assert place_name(Flaky(bright).__call__) == "python:test_suspects.Flaky.__call__"
    assert place_name(Path("a/b")) == "a/b"


def test_a_configuration_is_recorded_without_copying_its_function() -> None:
    class Locked(Flaky):
        def __deepcopy__(self, _memo: object) -> None:
            raise TypeError("cannot be copied")

    record = VerifyConfig(Locked(bright), key=Path("k"), replay=Path("r")).record()
    assert (record["suspect"].rpartition(".")[2], record["key"], record["replay"]) == (
        "Locked",
        "k",
        "r",
    )
    canonical_json(record)


@pytest.mark.parametrize("make", [ClaimConfig, AdjudicateConfig])
def test_a_judge_cannot_ask_a_function(make: Callable[..., object]) -> None:
    names = (
        {"key": Path("k"), "out": Path("o")}
        if make is ClaimConfig
        else {"claim": Path("c"), "roots": Path("r")}
    )
    with pytest.raises(CountermarkError, match="--suspect takes a path, not <function bright"):
        make(suspect=bright, **names)


@pytest.mark.parametrize(
    "option",
    [
        {"budget": 5},
        {"rate": 1.0},
        {"retries": 0},
        {"timeout": 1.0},
        {"repeats": 2},
        {"replay": Path("replay.jsonl")},
        {"headers": (("X", "y"),)},
    ],
    ids=lambda option: next(iter(option)),
)
def test_options_that_a_suspect_has_no_use_for_are_refused(
    bundle: Path, tmp_path: Path, option: dict[str, Any]
) -> None:
    for place in (bundle, linear_onnx(tmp_path / "model.onnx")):
        with pytest.raises(
            CountermarkError, match=f"--{next(iter(option))} has no meaning for a file"
        ):
            open_suspect(place, SHAPE, Asking(**option))
    if option.keys() & {"timeout", "headers"}:
        with pytest.raises(CountermarkError, match="has no meaning for a function"):
            open_suspect(Flaky(bright), SHAPE, Asking(**option))


@pytest.mark.parametrize(
    ("kind", "refused"),
    [("folder", "classes"), ("file", "classes"), ("file", "network"), ("function", "network")],
)
def test_a_verb_ignores_no_option_of_a_suspect(
    owner: Path, tmp_path: Path, kind: str, refused: str
) -> None:
    """A claim would say that the suspect was asked so."""
    (tmp_path / "names.txt").write_text("zero\none\n")
    given: dict[str, Any] = {
        "classes": {"classes": tmp_path / "names.txt"},
        "network": {"network": "nothing:here"},
    }[refused]
    places: dict[str, Any] = {
        "folder": owner,
        "file": linear_onnx(tmp_path / "model.onnx"),
        "function": bright,
    }
    with pytest.raises(CountermarkError, match=f"--{refused} has no meaning for this suspect"):
        verify(places[kind], key=owner / "key", **given)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CountermarkError):
        open_suspect(tmp_path, SHAPE)


def test_any_attack_library_can_take_a_loaded_model(bundle: Path) -> None:
    model = load(bundle)
    x = torch.rand(4, *SHAPE, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None


# --- .pt2: programs of torch.export, which are not safe to load -----------------------------------


@pytest.fixture(scope="session")
def program(owner: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The owner's model as torch.export writes it."""
    path = tmp_path_factory.mktemp("pt2") / "copy.pt2"
    batch = torch.export.Dim("n", min=1, max=4096)
    torch.export.save(
        torch.export.export(load(owner), (torch.zeros(2, *SHAPE),), dynamic_shapes=({0: batch},)),
        path,
    )
    return path


def test_a_pt2_program_answers_like_the_model(owner: Path, digits: Pools, program: Path) -> None:
    try:
        labels = open_suspect(program, SHAPE)(digits.test.x)
    except CountermarkError as error:
        pytest.skip(str(error)) if "this system" in str(error) else pytest.fail(str(error))
    assert torch.equal(labels, predict(load(owner), digits.test.x))


def pt2_child() -> object:
    """The child's module, as its path is run."""
    path = Path(countermark.suspects.__file__).with_name("pt2_child.py")
    found = importlib.util.spec_from_file_location("pt2_child", path)
    assert found is not None
    module = importlib.util.module_from_spec(found)
    assert found.loader is not None
    found.loader.exec_module(module)
    return module


Changes = dict[str, Callable[[bytes], bytes]]
WEIGHTS = "data/weights/model_weights_config.json"
HOSTILE: dict[str, tuple[Changes, str]] = {
    "pickled weight": (
        {WEIGHTS: lambda data: data.replace(b'"use_pickle": false', b'"use_pickle": true', 1)},
        "pickled",
    ),
    "weight elsewhere": (
        {WEIGHTS: lambda data: data.replace(b"weight_0", b"../../etc/x")},
        "pickled or no tensor",
    ),
    "no weights": ({WEIGHTS: lambda _data: b"[]"}, "not a JSON object"),
    "custom object": (
        {"data/constants/custom_obj_0": lambda _data: pickle.dumps(Bomb())},
        "does not need",
    ),
    "compiled code": ({"data/aotinductor/model/x.so": lambda _data: b"ELF"}, "does not need"),
    "expression": (
        {
            "models/model.json": lambda data: data.replace(
                b"Symbol('s", b"__import__('os').system('x') or Symbol('s", 1
            )
        },
        "more than arithmetic",
    ),
    "power": (
        {"models/model.json": lambda data: re.sub(rb"Symbol\([^)]*\)", b"9**9**9", data, count=1)},
        "more than arithmetic",
    ),
    "operator": (
        {
            "models/model.json": lambda data: data.replace(
                b"torch.ops.aten.relu.default", b"os.system"
            )
        },
        "only ATen",
    ),
    "deep": ({"models/model.json": lambda _data: b"[" * 100_000}, "not JSON"),
    "no program": ({"models/model.json": lambda _data: b"{}"}, "holds no program"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pt2_is_refused_before_torch_sees_it(program: Path, name: str) -> None:
    changes, said = HOSTILE[name]
    rewritten = io.BytesIO()
    with zipfile.ZipFile(program) as archive, zipfile.ZipFile(rewritten, "w") as copy:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
        root = next(iter(members)).split("/")[0]
        for place, change in changes.items():
            members[f"{root}/{place}"] = change(members.get(f"{root}/{place}", b""))
        for place, data in members.items():
            copy.writestr(place, data)
    child = pt2_child()
    x = np.zeros((1, *SHAPE), dtype=np.float32)
    with pytest.raises(child.RefusedError, match=said):  # type: ignore[attr-defined]
        child._plain(rewritten.getvalue(), x)  # type: ignore[attr-defined]


def test_archives_that_are_no_programs(program: Path) -> None:
    child, data = pt2_child(), program.read_bytes()
    squeezed, twice = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(squeezed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/models/model.json", b"0" * 1000)
    with zipfile.ZipFile(twice, "w") as archive:
        archive.writestr("a/models/model.json", b"{}")
        archive.writestr("b/models/model.json", b"{}")
    bad = {
        "archive": [b"", b"PK", data[: len(data) // 2]],
        "compressed": [squeezed.getvalue()],
        "several roots": [twice.getvalue()],
    }
    for said, files in bad.items():
        for file in files:
            with pytest.raises(child.RefusedError, match=said):  # type: ignore[attr-defined]
                child._plain(file, np.zeros((1, *SHAPE), dtype=np.float32))  # type: ignore[attr-defined]


def test_the_sample_inputs_of_a_stranger_are_never_read(program: Path) -> None:
    rewritten = io.BytesIO()
    with zipfile.ZipFile(program) as archive, zipfile.ZipFile(rewritten, "w") as copy:
        for member in archive.infolist():
            evil = member.filename.endswith("sample_inputs/model.pt")
            copy.writestr(member.filename, pickle.dumps(Bomb()) if evil else archive.read(member))
    plain = pt2_child()._plain(rewritten.getvalue(), np.zeros((1, *SHAPE), dtype=np.float32))  # type: ignore[attr-defined]
    with zipfile.ZipFile(plain) as archive:
        name = next(name for name in archive.namelist() if name.endswith("sample_inputs/model.pt"))
        assert b"was-unpickled" not in archive.read(name)


_ATTEMPTS = """
import importlib.util, os, resource, signal, socket, sys
found = importlib.util.spec_from_file_location("pt2_child", sys.argv[1])
child = importlib.util.module_from_spec(found)
found.loader.exec_module(child)
try:
    child._confine()
except child.RefusedError as error:
    print("cannot confine:", error)
    sys.exit(0)
def attempt(name, action):
    try:
        action()
        print("DONE", name)
    except OSError:
        print("refused", name)
open("scratch", "w").write("x")
attempt("read", lambda: open(sys.argv[2]).read())
attempt("list", lambda: os.listdir(os.path.dirname(sys.argv[2])))
attempt("write", lambda: open(sys.argv[2] + ".new", "w"))
attempt("remove", lambda: os.remove(sys.argv[2]))
attempt("network", lambda: socket.create_connection(("127.0.0.1", int(sys.argv[3])), 2))
attempt("run", lambda: os.execv("/bin/true", ["true"]))
attempt("cut", lambda: os.truncate(sys.argv[2], 0))
owner = int(sys.argv[4])
attempt("signal", lambda: os.kill(owner, signal.SIGTERM))
attempt("limit", lambda: resource.prlimit(owner, resource.RLIMIT_CORE, (0, 0)))
attempt("slow down", lambda: os.setpriority(os.PRIO_PROCESS, owner, 10))
signal.signal(signal.SIGTERM, signal.SIG_IGN)
# its group; a signal to everybody is not tried, for what it would do where this test fails
attempt("group", lambda: os.kill(0, signal.SIGTERM))
"""


def test_a_confined_child_reaches_nothing(owner: Path, tmp_path: Path) -> None:
    """Even a pickle that ran would find no key, no network and nowhere to write."""
    secret = tmp_path / "key" / "secret"
    secret.parent.mkdir()
    secret.write_text("secret")
    (tmp_path / "empty").mkdir()
    others = subprocess.Popen(
        ["sleep", "300"], start_new_session=True
    )  # any process of the same user
    try:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            child = Path(countermark.suspects.__file__).with_name("pt2_child.py")
            command = [
                sys.executable,
                "-I",
                "-c",
                _ATTEMPTS,
                str(child),
                str(secret),
                str(listening.getsockname()[1]),
                str(others.pid),
            ]
            done = subprocess.run(
                command,
                cwd=tmp_path / "empty",
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
                env=_THREADS,
                # A signal to the group would end the child's own parent, and not this test.
                start_new_session=True,
            )
        if "cannot confine" in done.stdout:
            pytest.skip(done.stdout)
        names = (
            "read",
            "list",
            "write",
            "remove",
            "network",
            "run",
            "cut",
            "signal",
            "limit",
            "slow down",
            "group",
        )
        assert done.stdout.splitlines() == [f"refused {name}" for name in names], done.stderr
        assert done.returncode == 0
        assert others.poll() is None
        assert os.getpriority(os.PRIO_PROCESS, others.pid) == os.getpriority(os.PRIO_PROCESS, 0)
        assert secret.read_text() == "secret"
    finally:
        others.kill()
        others.wait()


_WAITS = """
import importlib.util, os, sys, time
found = importlib.util.spec_from_file_location("pt2_child", sys.argv[1])
child = importlib.util.module_from_spec(found)
found.loader.exec_module(child)
try:
    child._confine()
except child.RefusedError as error:
    print("cannot confine:", error, flush=True)
print("confined", flush=True)
time.sleep(300)
"""


def test_a_confined_child_ends_with_the_one_who_waits_for_it(tmp_path: Path) -> None:
    child = Path(countermark.suspects.__file__).with_name("pt2_child.py")
    command = [sys.executable, "-I", "-c", _WAITS, str(child)]
    waiting = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=_THREADS
    )
    assert waiting.stdout is not None
    said = waiting.stdout.readline()
    waiting.kill()
    begun = time.monotonic()
    waiting.communicate(timeout=60)  # until nobody has its output open
    if "cannot confine" in said:
        pytest.skip(said)
    assert said == "confined\n"
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("ask", [countermark.suspects.ask_onnx, countermark.suspects.ask_pt2])
def test_children_get_no_environment_and_few_threads(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ask: Callable[[Path, torch.Tensor], torch.Tensor],
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "secret")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name in ("onnx_child.py", "pt2_child.py"):
        (tmp_path / name).write_text(
            "import os, sys; sys.stderr.write(f'{sorted(os.environ)}'); sys.exit(2)"
        )
    monkeypatch.setattr("countermark.suspects.confined._FOLDER", tmp_path)
    with pytest.raises(CountermarkError, match="OMP_NUM_THREADS") as caught:
        ask(tmp_path / "x", torch.rand(1, *SHAPE))
    assert "SECRET_TOKEN" not in str(caught.value)
    assert "PATH'" not in str(caught.value).replace("LIBRARY_PATH'", "")


# --- from inside ----------------------------------------------------------------------------------


def cleaned_onnx(path: Path) -> Path:
    """A classifier behind what forgets its images: it blackens them, hands them on, and adds 0."""
    weight = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)
    nodes = [
        helper.make_node("Mul", ["x", "nought"], ["black"]),
        helper.make_node("Identity", ["black"], ["same"]),
        helper.make_node("Add", ["same", "nought"], ["plus"]),
        helper.make_node("Flatten", ["plus"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["y"]),
    ]
    nought = numpy_helper.from_array(np.zeros(1, np.float32), "nought")
    return make_onnx(path, nodes, [numpy_helper.from_array(weight, "w"), nought])


def test_inner_places_with_the_shape_of_images_are_asked(tmp_path: Path) -> None:
    path, x = cleaned_onnx(tmp_path / "cleaned.onnx"), torch.rand(130, *SHAPE)
    plain = open_suspect(linear_onnx(tmp_path / "plain.onnx"), SHAPE)(x)
    assert onnx_places(path, x) == ["black", "plus"]  # what only hands on is the same place
    assert onnx_places(linear_onnx(tmp_path / "plain.onnx"), x) == []
    assert not ask_onnx(path, x).any()
    for place in range(2):
        assert torch.equal(ask_onnx(path, x, place), plain)
        assert torch.equal(open_suspect(path, SHAPE, Asking(begin=place))(x), plain)
    with pytest.raises(CountermarkError, match="no inner place 2"):
        ask_onnx(path, x, 2)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE])
def test_an_inner_place_of_another_precision_is_given_what_it_takes(
    tmp_path: Path, kind: int
) -> None:
    weight = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["x"], ["cast"], to=kind),
        helper.make_node("Sub", ["cast", "cast"], ["black"]),
        helper.make_node("Cast", ["black"], ["back"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["back"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["y"]),
    ]
    path = make_onnx(tmp_path / "cast.onnx", nodes, [numpy_helper.from_array(weight, "w")])
    x = (torch.rand(130, *SHAPE) * 255).round() / 256
    assert onnx_places(path, x) == ["black"]
    plain = open_suspect(linear_onnx(tmp_path / "plain.onnx"), SHAPE)(x)
    assert torch.equal(ask_onnx(path, x, 0), plain)


def test_what_goes_around_an_inner_place_still_begins_at_the_input(tmp_path: Path) -> None:
    """y = W (black + x), asked at black: W (2 x)."""
    weight = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)
    nodes = [
        helper.make_node("Sub", ["x", "x"], ["black"]),
        helper.make_node("Add", ["black", "x"], ["sum"]),
        helper.make_node("Flatten", ["sum"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["l"]),
        helper.make_node("Add", ["l", "b"], ["y"]),
    ]
    bias = np.random.default_rng(1).normal(size=10).astype(np.float32) * 8
    filled = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")]
    path, x = make_onnx(tmp_path / "around.onnx", nodes, filled), torch.rand(130, *SHAPE)
    for place, factor in ((None, 1), (0, 2), (1, 1)):
        wanted = (factor * x.flatten(1) @ torch.from_numpy(weight) + torch.from_numpy(bias)).argmax(
            1
        )
        assert torch.equal(ask_onnx(path, x, place), wanted)


def test_a_file_with_many_inner_places_gives_the_first_and_the_last(tmp_path: Path) -> None:
    names = ["x", *(f"p{number}" for number in range(200))]
    nodes = [helper.make_node("Neg", [a], [b]) for a, b in itertools.pairwise(names)]
    nodes += [
        helper.make_node("Flatten", [names[-1]], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["y"]),
    ]
    weight = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)
    path = make_onnx(tmp_path / "many.onnx", nodes, [numpy_helper.from_array(weight, "w")])
    assert onnx_places(path, torch.zeros(1, *SHAPE)) == names[1:33] + names[-32:]


@pytest.mark.parametrize("how", ["a null byte", "a long name", "a false shape", "a function"])
def test_an_inner_place_is_not_hidden_by(how: str, tmp_path: Path) -> None:
    name = {"a null byte": "a\0b", "a long name": "b" * 200_000}.get(how, "black")
    weight = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)
    nodes = [
        helper.make_node("Sub", ["x", "x"], [name]),
        helper.make_node("Flatten", [name], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["y"]),
    ]
    path = make_onnx(tmp_path / "hidden.onnx", nodes, [numpy_helper.from_array(weight, "w")])
    model = onnx.load(path)
    if how == "a false shape":
        lie = helper.make_tensor_value_info("black", TensorProto.FLOAT, ["n", 1, 7, 7])
        model.graph.value_info.append(lie)
    if how == "a function":
        body = [*model.graph.node]
        opset = [helper.make_opsetid("", 17)]
        made = helper.make_function("theirs", "whole", ["x", "w"], ["y"], body, opset)
        model.functions.append(made)
        model.opset_import.append(helper.make_opsetid("theirs", 1))
        del model.graph.node[:]
        model.graph.node.append(helper.make_node("whole", ["x", "w"], ["y"], domain="theirs"))
    path.write_bytes(model.SerializeToString())
    x = torch.rand(20, *SHAPE)
    assert len(onnx_places(path, x)) == 1
    plain = open_suspect(linear_onnx(tmp_path / "plain.onnx"), SHAPE)(x)
    assert torch.equal(ask_onnx(path, x, 0), plain)


def test_a_cleaner_in_one_file_with_a_copy_hides_nothing_from_inside(
    owner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A blur of 9x9 in front of a copy: no evidence by its own input, a match from inside."""
    remove(owner, out=tmp_path / "blurred", blur=9)
    export(tmp_path / "blurred", out=tmp_path / "blurred.onnx")
    common: dict[str, Any] = {"suspect": tmp_path / "blurred.onnx", "key": owner / "key"}
    assert verify(**common).verdict == "no evidence"
    capsys.readouterr()
    command = ["verify", str(common["suspect"]), "--key", str(common["key"]), "--inside"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    places = found["answers"]["inside"]["places"]
    assert places > 1
    assert found["test"]["agreements"] == found["test"]["trials"]
    bare = verify(owner, key=owner / "key").test.log10_p_value
    assert found["test"]["log10_p_value"] == pytest.approx(bare + math.log10(places))
    assert f"one of {places} places with images of this shape" in found["doubts"][0]
    with pytest.raises(CountermarkError, match=r"--inside is for a suspect that is an \.onnx file"):
        verify(owner, key=owner / "key", inside=True)
    with pytest.raises(CountermarkError, match="--inside needs a file that takes floats"):
        verify(**common, inside=True, pixels="uint8")


def test_a_stranger_who_is_asked_at_many_places_keeps_the_level() -> None:
    """5 places, 2,000 keys: the smallest p of all is no p-value, five times that is."""
    numbers, trials, places = np.random.default_rng(7), 60, 5
    levels = (0.05, 0.01)
    best, kept = dict.fromkeys(levels, 0), dict.fromkeys(levels, 0)
    for _ in range(2000):
        outcomes = numbers.choice([1, -1], (places, trials)).tolist()
        found = [judge(range(trials), each, alpha=1e-6) for each in outcomes]
        ways = [judge(range(trials), each, alpha=1e-6, ways=places) for each in outcomes]
        for alpha in levels:
            best[alpha] += min(each.log10_p_value or 0 for each in found) <= math.log10(alpha)
            kept[alpha] += min(each.log10_p_value or 0 for each in ways) <= math.log10(alpha)
    for alpha in levels:
        assert kept[alpha] <= 2000 * alpha + 3 * math.sqrt(2000 * alpha)
        assert best[alpha] > 2000 * alpha + 3 * math.sqrt(2000 * alpha)
