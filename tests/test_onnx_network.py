"""A guard on onnxruntime: the exported file answers as the network does, coins and all."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from torch import nn

import countermark as cm
from countermark import onnx_file as exporting
from countermark.cli import main
from countermark.data import Pools
from countermark.guard import AnswerTrial, GuardedModel, QueryLog, load_guarded, read_guard
from countermark.guard.model import FeatureReader
from countermark.networks import WithFeatures
from countermark.networks.named import build
from countermark.onnx_file import export_model
from countermark.service.clients import add_client
from test_folding import Residual, lived_in
from warm import warm

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

GOLDEN = Path(__file__).parent / "golden" / "0.2.0" / "mine"
TOLERANCE = 1e-5
"""What a guard on the processor takes for rounding."""


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a dear guard, so that few queries meet many coins."""
    folder = tmp_path_factory.mktemp("guarded") / "mine"
    shutil.copytree(GOLDEN, folder)
    for name in ("commitment.json", "guard.json"):  # which were timestamped
        (folder / name).unlink()
    cm.calibrate(folder, cost=8.0)
    return folder


@pytest.fixture(scope="module")
def file(mine: Path) -> str:
    """What `export --features` makes of it."""
    path = mine.with_name("mine.onnx")
    made = cm.export(mine, out=path, features=True, images=100)
    assert (made.compared_on, made.labels_differ) == ("test images", 0)
    return str(path)


@pytest.fixture
def queries(digits: Pools) -> torch.Tensor:
    """Natural images, the same with noise, and images that nobody sends."""
    generator = torch.Generator().manual_seed(0)
    natural = digits.thief.x
    noise = torch.randint(-20, 21, natural.shape, generator=generator)
    noisy = (natural.int() + noise).clamp(0, 255).to(torch.uint8)
    foreign = torch.randint(0, 256, natural.shape, generator=generator).to(torch.uint8)
    return torch.cat((natural, noisy, foreign))


def plainly(trial: AnswerTrial) -> tuple[object, ...]:
    return trial.row, trial.cell, trial.heads, trial.tails, trial.chance, trial.answer


def sure_rows(model: GuardedModel, x: torch.Tensor) -> set[int]:
    """The queries whose cell and chance no rounding changes."""
    found = model.guard.questions(*FeatureReader(model.network)(x), x, TOLERANCE)
    unsure = {each.row for each in found if not each.sure}
    assert len(unsure) < 0.02 * len(x)
    return set(range(len(x))) - unsure


def test_cells_coins_and_answers_are_those_of_the_network(
    mine: Path, file: str, queries: torch.Tensor
) -> None:
    model, other = (load_guarded(mine, mine / "key", network) for network in (None, file))
    sure = sure_rows(model, queries)
    found, given = model(queries, "anna"), other(queries, "anna")
    wanted = [plainly(trial) for trial in found.trials if trial.row in sure]
    assert [plainly(trial) for trial in given.trials if trial.row in sure] == wanted
    assert len(wanted) > 300
    rows = sorted(sure)
    assert torch.equal(given.labels[rows], found.labels[rows])
    flipped = model.network(queries.float() / 255).argmax(1) != found.labels
    assert int(flipped.sum()) > 50  # coins did choose


def test_a_query_has_one_answer_in_any_batch(mine: Path, file: str, queries: torch.Tensor) -> None:
    model = load_guarded(mine, mine / "key", file)
    order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(1))
    labels = model(queries, "anna").labels
    assert torch.equal(model(queries[order], "anna").labels, labels[order])
    alone = [int(model(queries[i : i + 1], "anna").labels) for i in range(0, len(queries), 9)]
    assert alone == labels[::9].tolist()


def test_calibration_on_the_file_gives_the_same_guard(mine: Path, file: str) -> None:
    before, wanted = (mine / "guard.json").read_bytes(), read_guard(mine)
    try:
        made = cm.calibrate(mine, network=file, cost=8.0)
        found = read_guard(mine)
    finally:
        (mine / "guard.json").write_bytes(before)
    assert made.cost == pytest.approx(8.0)
    for name in ("slope", "reach", "offsets", "outlines"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=1e-3, abs=1e-4)
    assert replace(found, slope=1, reach=1, offsets=(), outlines=()) == replace(
        wanted, slope=1, reach=1, offsets=(), outlines=()
    )


def test_the_service_needs_the_file_and_no_weights(
    mine: Path, file: str, queries: torch.Tensor, tmp_path: Path
) -> None:
    """The answers over HTTP and the trials in the log are those of the guarded PyTorch model."""
    model = load_guarded(mine, mine / "key")
    x = queries[sorted(sure_rows(model, queries))[::15]][:60]
    folder = tmp_path / "mine"
    shutil.copytree(mine, folder, ignore=shutil.ignore_patterns("*.safetensors", "clients.json"))
    key = add_client(folder / "clients.json", "anna", None)
    log = tmp_path / "log.db"
    with QueryLog(str(log)) as made:
        wanted = model.under(made.identity)(x, "anna")
    process = subprocess.Popen(
        [*warm(), "serve", str(folder), "--network", file, "--log", str(log), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        address = next(said[1] for line in lines if (said := re.search(r"(http://\S+)", line)))
        tensor = {
            "name": "image",
            "datatype": "UINT8",
            "shape": list(x.shape),
            "data": x.flatten().tolist(),
        }
        answer = requests.post(
            f"{address}/v2/models/model/infer",
            json={"inputs": [tensor]},
            headers={"Authorization": f"Bearer {key}"},
            timeout=30,
        )
        assert answer.status_code == 200, answer.text
        assert answer.json()["outputs"][0]["data"] == wanted.labels.tolist()
    finally:
        process.terminate()
        process.communicate(timeout=30)
    first = {trial.cell: trial for trial in reversed(wanted.trials)}
    rows = {row.cell: (row.chance, row.answer) for row in QueryLog(str(log)).rows() if row}
    assert rows == {cell: (each.chance, each.answer) for cell, each in first.items()}
    assert len(rows) > 10


@pytest.mark.parametrize("exporter", ["_by_tracing", "_by_export"])
def test_the_second_output_is_what_the_guard_reads(
    exporter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if exporter == "_by_export":
        pytest.importorskip("onnxscript")
    monkeypatch.setattr(exporting, "_by_tracing", getattr(exporting, exporter))
    network, path = lived_in(Residual(["after"], 3, "mean")).eval(), tmp_path / "mine.onnx"
    export_model(network, (3, 8, 8), path, features=True, weights_sha256="ab" * 32)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["weights_sha256"] == "ab" * 32
    for count in (1, 7):
        x = torch.rand(count, 3, 8, 8)
        found = session.run(["logits", "features"], {"pixels": x.numpy()})
        for values, wanted in zip(found, FeatureReader(network)(x), strict=True):
            torch.testing.assert_close(torch.from_numpy(values), wanted, rtol=1e-3, atol=1e-4)


def test_features_that_differ_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose logits are right is no file for a guard if its features are others."""
    made = exporting._by_tracing

    def changed(network: nn.Module, x: torch.Tensor) -> Any:
        model = made(network, x)
        nodes = model.graph.node
        [place] = [i for i, node in enumerate(nodes) if "features" in node.output]
        nodes[place].output[:] = ["right"]
        for node in nodes:
            node.input[:] = ["right" if name == "features" else name for name in node.input]
        nodes.insert(place + 1, onnx.helper.make_node("Abs", ["right"], ["features"]))
        return model

    monkeypatch.setattr(exporting, "_by_tracing", changed)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 4))
    with pytest.raises(cm.CountermarkError, match="and features differ by up to"):
        export_model(network, (1, 8, 8), tmp_path / "mine.onnx", features=True)
    assert list(tmp_path.iterdir()) == []


def test_a_network_without_a_linear_layer_has_no_features(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten())
    with pytest.raises(cm.CountermarkError, match="no linear layer"):
        WithFeatures(network)
    with pytest.raises(cm.CountermarkError, match="no linear layer"):
        export_model(network, (1, 8, 8), tmp_path / "mine.onnx", features=True)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_the_models_is_refused(
    mine: Path, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(words: str, network: object, **options: Any) -> None:
        with pytest.raises(cm.CountermarkError, match=words) as caught:
            cm.calibrate(mine, network=network, cost=8.0, **options)
        assert "\n" not in str(caught.value)

    before = (mine / "guard.json").read_bytes()
    refused("cannot read|does not exist|No such file", str(tmp_path / "none.onnx"))
    (tmp_path / "text.onnx").write_text("no model")
    refused("onnxruntime cannot load", str(tmp_path / "text.onnx"))
    cm.export(mine, out=tmp_path / "bare.onnx", images=10)
    refused("does not give the features that a guard needs", str(tmp_path / "bare.onnx"))
    network = build("small", (1, 8, 8), 10, seed=0)
    export_model(network, (1, 8, 8), tmp_path / "o.onnx", features=True, weights_sha256="ab" * 32)
    refused("was exported from other weights", str(tmp_path / "o.onnx"))
    export_model(network, (1, 8, 8), tmp_path / "whose.onnx", features=True)
    refused("does not give the features that a guard needs", str(tmp_path / "whose.onnx"))
    network, digest = build("small", (1, 8, 9), 10, seed=0), read_guard(mine).model_sha256
    export_model(network, (1, 8, 9), tmp_path / "wide.onnx", features=True, weights_sha256=digest)
    refused("images of another shape", str(tmp_path / "wide.onnx"))
    refused("computes on the processor", file, device="cuda")
    assert (mine / "guard.json").read_bytes() == before
    with pytest.raises(cm.CountermarkError, match="can be neither trained nor attacked"):
        cm.evaluate(mine, network=file)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refused(r"needs onnxruntime; pip install 'countermark\[onnx\]'", file)


def test_the_command_line_guards_a_file(
    mine: Path, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(mine, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    assert main(["guard", str(folder), "--network", file, "--cost", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["device"].startswith("cpu")
    assert main(["guard", str(folder), "--cost", "8"]) == 2  # it has no weights for PyTorch
    assert "model.safetensors" in capsys.readouterr().err
