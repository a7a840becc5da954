"""Tests on a real GPU, where there is one.

They repeat what `test_device.py` tests on a simulated GPU, and add what only a GPU has (recordings,
bf16).
"""

import contextlib
import copy
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from countermark import evaluation
from countermark.attacks import Recording, pgd, strict
from countermark.data import load_pools, pixels
from countermark.device import describe, resolve_device
from countermark.evaluation import (
    accuracy,
    adversarial_accuracy,
    device_of,
    predict,
    strict_accuracy,
)
from countermark.fast import capturable, prepare, recording
from countermark.guard import Guard, GuardedModel, calibrate_model
from countermark.networks import load_model
from countermark.networks.named import Normalise, build
from countermark.study.graph import in_order
from countermark.study.grid import PROFILES, Computing, grid
from countermark.study.run import Place, do
from countermark.study.store import Store
from countermark.training import Hardware, TrainConfig, loop, train
from countermark.watermarks import craft_adversarial
from on_devices import ATTACK, NETWORKS, OBJECTIVES, examples

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
GPU = Hardware("cuda")
PRECISE = Hardware("cuda", precision="32-true")


def trained(name: str, hardware: Hardware = PRECISE) -> torch.nn.Module:
    network = NETWORKS[name]()
    train(
        network, examples(256), TrainConfig("standard", None, 15, batch_size=32, hardware=hardware)
    )
    return network.eval()


def test_the_gpu_is_what_auto_means() -> None:
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 0)
    assert torch.cuda.get_device_name(0) in describe(resolve_device())


@pytest.mark.parametrize("name", NETWORKS)
def test_a_model_measures_the_same_as_on_the_processor(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "strict", functools.partial(strict, steps=20, queries=200))
    there, shown = trained(name), examples(200, seed=3)
    here = copy.deepcopy(there).cpu()
    assert (predict(here, shown.x) == predict(there, shown.x)).double().mean() >= 0.98
    for precision in ("32-true", "bf16-mixed"):
        left = [
            adversarial_accuracy(model, shown, ATTACK, precision=precision)
            for model in (here, there)
        ]
        assert abs(left[0] - left[1]) <= 3
    found = [strict_accuracy(model, shown, ATTACK).strict_accuracy for model in (here, there)]
    assert abs(found[0] - found[1]) <= 4


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["small", "paper"])
def test_a_replayed_step_is_the_step_itself(
    name: str, precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = prepare(trained(name), precision)
    x, y = (part.cuda() for part in (pixels(examples(64).x), examples(64).y))
    found = []
    for known in (("torch", "countermark"), ()):
        monkeypatch.setattr(recording, "_KNOWN", known)
        torch.manual_seed(0)
        found.append(pgd(quick, x, y, epsilon=0.1, steps=5, step_size=0.03, stop_when_lost=True))
        assert float((found[-1] - x).abs().max()) <= 0.1 + 1e-6
    assert float((found[0] != found[1]).double().mean()) < 0.02


def test_a_step_behind_a_normaliser_by_channel_is_recorded() -> None:
    network = (
        torch.nn.Sequential(
            Normalise((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)), build("narrow", (3, 8, 8), 2)
        )
        .cuda()
        .eval()
    )
    assert capturable(network)
    shown = examples(32, channels=3)
    x, y, recorded = (
        pixels(shown.x).cuda(),
        shown.y.cuda(),
        Recording(network, contextlib.nullcontext),
    )
    options: dict[str, Any] = {
        "epsilon": 0.1,
        "steps": 3,
        "step_size": 0.05,
        "random_start": False,
        "start": None,
    }
    found = [attack(x, y, **options) for attack in (recorded, functools.partial(pgd, network))]
    assert float((found[0] != found[1]).double().mean()) < 0.02


@pytest.mark.parametrize("name", ["paper", "branched"])
def test_crafting_again_gives_the_same_trials(name: str) -> None:
    source = trained(name)
    first, second = (craft_adversarial(source, examples(300), ATTACK, seed=3) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("hardware", [GPU, PRECISE])
@pytest.mark.parametrize("name", ["paper", "branched"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_learns_there_and_stays_there(
    objective: str, name: str, hardware: Hardware, tmp_path: Path
) -> None:
    network, shown = NETWORKS[name](), examples(256)
    calm = (
        {"learning_rate": 0.02} if name == "branched" else {}
    )  # at the usual rate it diverges on any device
    config = replace(OBJECTIVES[objective], epochs=10, hardware=hardware, watermark_batch=4, **calm)
    options: dict[str, Any] = {
        "validation": examples(60, seed=5),
        "watermarks": examples(20, seed=9),
        "checkpoint": tmp_path / "c",
    }
    records = train(network, shown, config, **options)
    assert device_of(network) == torch.device("cuda", 0)
    assert accuracy(network, shown) >= 80
    again = NETWORKS[name]()
    assert train(again, shown, config, **options) == records
    assert all(
        torch.equal(*pair)
        for pair in zip(network.state_dict().values(), again.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("objective", ["pgd", "fast"])
def test_training_is_the_same_with_its_attack_replayed_or_not(
    objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks = []
    for records in (True, False):
        monkeypatch.setattr(loop, "_records", lambda *_, records=records: records)
        networks.append(NETWORKS["surrogate"]())
        train(
            networks[-1],
            examples(256),
            replace(OBJECTIVES[objective], epochs=2, push=0.01, hardware=PRECISE),
        )
    for one, other in zip(networks[0].parameters(), networks[1].parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-3)


def test_examples_that_do_not_fit_give_the_same_network(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for share in (0.5, 0.0):
        monkeypatch.setattr(loop, "_RESIDENT", share)
        found.append(trained("small").state_dict().values())
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_guarded_answer_does_not_depend_on_its_batch() -> None:
    model, shown = trained("small"), examples(400, seed=6)
    options: dict[str, Any] = {"secret": b"s" * 32, "model_sha256": "ab" * 32, "cost": 2.0}
    guarded = GuardedModel(
        model, Guard(calibrate_model(model, examples(300, seed=4), **options).settings, b"s" * 32)
    )
    whole = guarded(shown.x, "somebody")
    parts = [guarded(part, "somebody") for part in torch.split(shown.x, 7)]
    assert torch.equal(whole.labels, torch.cat([part.labels for part in parts]))
    assert len(whole.trials) == sum(len(part.trials) for part in parts)


def measured_again(kind: str, folder: Path) -> list[tuple[float, float]]:
    """Test accuracies of models that a small study makes on a kind of device, and on the processor.

    The second ones are those of the same weights.
    """
    profile = replace(PROFILES["quick"], epochs={"digits": 5}, queries=400)
    cells = grid(("digits",), profile, "clean", computing=Computing(kind, "32-true"))
    names = ("digits/0/ADVTR/white-box/none", "digits/0/ADVTR+coin/white-box/none")
    wanted = [cell for cell in cells if cell.name in names]
    store, test = Store(folder), load_pools("digits", 0).test
    for unit in in_order(cell.unit for cell in wanted):
        do(unit, Place(folder, None, kind))
    return [
        (
            store.result(cell.unit)["points"][0]["test"],
            accuracy(load_model(store.path(cell.unit))[0], test),
        )
        for cell in wanted
    ]


def test_units_of_a_study_say_of_their_models_what_the_processor_says(tmp_path: Path) -> None:
    found = measured_again("cuda", tmp_path / "units")
    assert len(found) == 2
    for there, here in found:
        assert abs(there - here) < 1  # point: rounding may move the answers to a few images
