"""Models as ONNX files.

A file gives the network's answers for any number of images and contains nothing else.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import countermark
from countermark import onnx_file as exporting
from countermark.cli import main
from countermark.data import Pools, open_data
from countermark.errors import CountermarkError
from countermark.networks import describing, save_model
from countermark.networks.named import NETWORKS, Normalise, build
from countermark.onnx_file import export_model
from countermark.suspects.confined import ask_onnx
from described import described
from test_folding import Residual, lived_in

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def answers(path: Path, x: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [(each.name, each.shape[0]) for each in session.get_inputs()] == [("pixels", "n")]
    return torch.from_numpy(session.run(["logits"], {"pixels": x.numpy()})[0])


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 9, 14)])
def test_every_network_of_ours_is_exported(
    tmp_path: Path, name: str, shape: tuple[int, int, int]
) -> None:
    network, path = lived_in(build(name, shape, 7, seed=1)).train(), tmp_path / "mine.onnx"
    found = export_model(
        network, shape, path, class_names=[f"class {number}" for number in range(7)]
    )
    assert network.training
    assert (found.compared_on, found.images, found.labels_differ, found.opset) == (
        "images of noise",
        256,
        0,
        17,
    )
    assert found.bytes == path.stat().st_size
    assert list(tmp_path.iterdir()) == [path]  # one file
    for count in (1, 2, 5, 33):
        x = torch.rand(count, *shape)
        torch.testing.assert_close(answers(path, x), network.eval()(x), rtol=1e-3, atol=1e-4)
    said = {each.key: each.value for each in onnx.load(path).metadata_props}
    assert said["made_by"] == f"countermark {countermark.__version__}"
    assert json.loads(said["image_shape"]) == list(shape)
    assert json.loads(said["class_names"])[6] == "class 6"


@pytest.mark.parametrize("kind", ["after", "before", "gate", "pool", "groups", "keeps"])
def test_networks_of_the_users_own_are_exported(tmp_path: Path, kind: str) -> None:
    network = nn.Sequential(
        Normalise((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)), lived_in(Residual([kind], 3, "view"))
    ).eval()
    images = torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8)
    found = export_model(network, (3, 8, 8), tmp_path / "mine.onnx", images=images)
    assert (found.compared_on, found.images, found.labels_differ) == ("test images", 40, 0)
    x = images.float() / 255
    torch.testing.assert_close(answers(tmp_path / "mine.onnx", x), network(x), rtol=1e-3, atol=1e-4)


class Branches(nn.Module):
    """Code that depends on the numbers: a trace follows one way only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(48, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.linear(x.flatten(1))
        return -z if bool(x.mean() > 0.25) else z


class Counts(Branches):
    """Code that depends on how many images there are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.reshape(int(x.shape[0]), -1)) + 0.1 * float(len(x) == 2)


def test_a_file_that_answers_otherwise_is_not_left(tmp_path: Path) -> None:
    for network in (Branches(), Counts()):
        with pytest.raises(CountermarkError, match=r"nothing was written|cannot write") as caught:
            export_model(network.eval(), (3, 4, 4), tmp_path / "mine.onnx")
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []


def test_the_newer_exporter_takes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")

    def fails(*_: object) -> Any:
        raise RuntimeError("an operator that it has not")

    monkeypatch.setattr(exporting, "_by_tracing", fails)
    network = lived_in(Residual(["after"], 3, "mean")).eval()
    found = export_model(network, (3, 8, 8), tmp_path / "mine.onnx")
    assert found.opset >= 18
    x = torch.rand(5, 3, 8, 8)
    torch.testing.assert_close(answers(tmp_path / "mine.onnx", x), network(x), rtol=1e-3, atol=1e-4)
    assert list(tmp_path.iterdir()) == [tmp_path / "mine.onnx"]


@pytest.mark.parametrize("exporter", ["_by_tracing", "_by_export"])
def test_nothing_of_the_machine_is_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exporter: str
) -> None:
    if exporter == "_by_export":
        pytest.importorskip("onnxscript")
    monkeypatch.setattr(exporting, "_by_tracing", getattr(exporting, exporter))
    export_model(build("narrow", (3, 8, 8), 5, seed=0), (3, 8, 8), tmp_path / "mine.onnx")
    data = (tmp_path / "mine.onnx").read_bytes()
    for word in (
        b"/src/",
        b"site-packages",
        b".py",
        str(tmp_path).encode(),
        b"forward",
        b"stack_trace",
    ):
        assert word not in data


def test_what_cannot_be_exported_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, path = build("small", (1, 8, 8), 4), tmp_path / "mine.onnx"
    for wrong in (tmp_path / "mine", tmp_path / "mine.pt"):
        with pytest.raises(CountermarkError, match=r"ends with \.onnx"):
            export_model(network, (1, 8, 8), wrong)
    path.write_bytes(b"precious")
    with pytest.raises(CountermarkError, match="is there already"):
        export_model(network, (1, 8, 8), path)
    assert path.read_bytes() == b"precious"
    with torch.device("meta"):
        large = nn.Sequential(nn.Flatten(), nn.Linear(1 << 10, 1 << 20))
    with pytest.raises(CountermarkError, match=r"4\.3 GB of weights"):
        export_model(large, (1, 32, 32), tmp_path / "large.onnx")
    monkeypatch.setattr(exporting, "_by_export", exporting._by_tracing)
    monkeypatch.setattr(functional, "relu", lambda x: torch.linalg.matrix_exp(x))
    with pytest.raises(CountermarkError, match="torch cannot write this network as ONNX") as caught:
        export_model(Residual(["after"], 3, "mean"), (3, 8, 8), tmp_path / "odd.onnx")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CountermarkError, match="pip install 'countermark\\[onnx\\]'"):
        export_model(network, (1, 8, 8), tmp_path / "new.onnx")
    assert [each.name for each in tmp_path.iterdir()] == ["mine.onnx"]


def test_a_difference_beyond_rounding_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file whose weights were changed on the way."""
    made = exporting._by_tracing

    def changed(network: nn.Module, x: torch.Tensor) -> Any:
        model = made(network, x)
        weight = model.graph.initializer[0]
        values = np.frombuffer(weight.raw_data, dtype=np.float32).copy()
        values[0] += 1
        weight.raw_data = values.tobytes()
        return model

    monkeypatch.setattr(exporting, "_by_tracing", changed)
    with pytest.raises(CountermarkError, match="is not the network"):
        export_model(build("small", (1, 8, 8), 4, seed=0), (1, 8, 8), tmp_path / "mine.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_exported_model_can_be_asked_as_a_suspect(tmp_path: Path) -> None:
    network = lived_in(build("narrow", (3, 8, 8), 5, seed=1))
    export_model(network, (3, 8, 8), tmp_path / "mine.onnx")
    x = torch.rand(20, 3, 8, 8)
    assert torch.equal(ask_onnx(tmp_path / "mine.onnx", x), network(x).argmax(1))


def test_a_model_folder_is_exported(
    tmp_path: Path, digits: Pools, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exported file is compared with the model on the test images of the declared data.

    Where the data are not what the folder declares, noise takes their place.
    """
    network = build("small", (1, 8, 8), 10, seed=0)
    folder = tmp_path / "mine"
    folder.mkdir()
    description = describing(open_data("digits"), "small")
    save_model(folder, network, description)
    found = countermark.export(folder, out=tmp_path / "mine.onnx", images=100)
    assert (found.compared_on, found.images, found.labels_differ) == ("test images", 100, 0)
    x = digits.test.x[:9].float() / 255
    torch.testing.assert_close(
        answers(tmp_path / "mine.onnx", x), network.eval()(x), rtol=1e-3, atol=1e-5
    )
    save_model(
        folder, network, replace(description, data=replace(description.data, sha256="0" * 64))
    )
    assert main(["export", str(folder), "--out", str(tmp_path / "again.onnx")]) == 0
    assert "256 images of noise: 0 labels differ" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(CountermarkError, match="there is no data"):
        countermark.export(folder, out=tmp_path / "new.onnx", data="nowhere")
    save_model(
        folder,
        build("small", (1, 8, 8), 10, seed=0),
        described("small", (1, 8, 8), 10, "digits", 0.1, 0),
    )
    assert main(["export", str(folder), "--out", str(tmp_path / "again.onnx")]) == 2
    assert "again.onnx" in capsys.readouterr().err


def test_a_model_of_the_users_own_is_exported(tmp_path: Path) -> None:
    folder, network = tmp_path / "mine", lived_in(Residual(["after"], 1, "mean"))
    folder.mkdir()
    save_model(folder, network, described("shop.models:make", (1, 8, 8), 5, "digits", 0.1, 0))
    with pytest.raises(CountermarkError, match="imported only if you name it"):
        countermark.export(folder, out=tmp_path / "mine.onnx")
    found = countermark.export(
        folder, out=tmp_path / "mine.onnx", network=lambda: Residual(["after"], 1, "mean")
    )
    assert found.compared_on == "images of noise"  # the digits have ten classes, the model has five
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(answers(tmp_path / "mine.onnx", x), network(x), rtol=1e-3, atol=1e-5)


def test_verify_takes_an_exported_model(owner: Path, tmp_path: Path) -> None:
    countermark.export(owner, out=tmp_path / "mine.onnx")
    itself = countermark.verify(owner, key=owner / "key")
    exported = countermark.verify(tmp_path / "mine.onnx", key=owner / "key")
    assert exported.test == itself.test
    assert exported.verdict == itself.verdict == "match"
