"""Devices: which there are, and that every path computes where its model is.

`elsewhere.py` makes a pretend device that refuses what a GPU refuses. Its results must be the same
numbers as those of the processor.
"""

import contextlib
import copy
import functools
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import elsewhere
from countermark import device as devices
from countermark import evaluation
from countermark.attacks import Recording, pgd, strict
from countermark.data import Examples, pixels
from countermark.data.examples import Rows
from countermark.device import (
    batch_size,
    check_device,
    describe,
    resolve_device,
    resolve_precision,
    seeded,
)
from countermark.errors import CountermarkError
from countermark.evaluation import (
    accuracy,
    adversarial_accuracy,
    device_of,
    predict,
    strict_accuracy,
)
from countermark.fast import Recorded, capturable, recording
from countermark.guard import Guard, GuardedModel, calibrate_model, expected_cost
from countermark.networks import save_model
from countermark.suspects import open_suspect
from countermark.thieves import REMOVALS, THEFTS, Means
from countermark.thieves.remove import add_noise, prune
from countermark.threat import GREY, Attack
from countermark.training import Hardware, loop, resolve_hardware, train
from countermark.verbs.evaluate import EvaluateConfig
from countermark.watermarks import coin_set, craft_adversarial
from countermark.watermarks.textures import texture_set
from described import described
from on_devices import ATTACK, NETWORKS, OBJECTIVES, PLAIN, Branched, examples

if elsewhere.APART not in os.environ:
    pytest.skip(
        "test_device_apart.py runs these in a process of their own", allow_module_level=True
    )
elsewhere.pretend_device()  # before any test goes backwards: autograd counts its devices once


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device that is not the processor; training goes there too."""
    device = elsewhere.pretend_device()
    make = torch.tensor

    def tensor(
        *values: Any, device: Any = None, **options: Any
    ) -> torch.Tensor:  # which PyTorch's Python backends lack
        return make(*values, **options) if device is None else make(*values, **options).to(device)

    monkeypatch.setattr(torch, "tensor", tensor)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield device
    torch.__future__.set_swap_module_params_on_conversion(before)


@pytest.mark.parametrize(
    "name", ["gpu", "cuda:", "cuda:x", "cuda:12345", "cpu:0", "CUDA", "", "auto\n"]
)
def test_a_misspelt_device_is_refused(name: str) -> None:
    for refuse in (check_device, resolve_device):
        with pytest.raises(CountermarkError, match="unknown device"):
            refuse(name)


def test_a_device_that_is_not_there_is_an_error_that_says_what_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for found, said in ((1, "the only one is cuda:0"), (3, "there are cuda:0 to cuda:2")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda found=found: found)
        assert (
            resolve_device("auto")
            == resolve_device("cuda")
            == resolve_device("cuda:0")
            == torch.device("cuda", 0)
        )
        assert resolve_device(f"cuda:{found - 1}") == torch.device("cuda", found - 1)
        with pytest.raises(CountermarkError, match=f"no device cuda:{found} here; {said}"):
            resolve_device(f"cuda:{found}")
        with pytest.raises(
            CountermarkError, match=f"no {found + 1} cuda devices here; take {found}"
        ):
            resolve_hardware(Hardware("cuda", found + 1))
    assert resolve_hardware(Hardware("cuda:1", 1, "32-true")).accelerator == "cuda:1"
    assert (
        resolve_hardware(Hardware("cuda:0", 1, "32-true"))
        == resolve_hardware(Hardware("auto", 1, "32-true"))
        == Hardware("cuda", 1, "32-true")
    )
    with pytest.raises(CountermarkError, match="cuda:1 is one device"):
        resolve_hardware(Hardware("cuda:1", 2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(CountermarkError, match="no cuda device here"):
        resolve_device("cuda:0")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(CountermarkError, match="no Apple GPU"):
        resolve_device("mps")


def test_a_result_names_the_device_and_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"H{100 + device.index}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(devices, "_processor", lambda: "")
    monkeypatch.setattr(devices, "computes_bf16", lambda device: device.type == "cuda")
    assert describe(torch.device("cuda", 1), "auto") == "cuda:1 (H101), bf16"
    assert describe(torch.device("cuda", 1)) == "cuda:1 (H101), float32"
    assert describe(torch.device("cpu"), "auto") == "cpu, float32"
    with pytest.raises(CountermarkError, match="unknown precision 'fp8'"):
        resolve_precision(torch.device("cpu"), "fp8")


def test_batches_are_smaller_for_larger_images(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("mps")
    assert batch_size(cpu, (1, 28, 28), 250) == batch_size(cpu, (3, 32, 32), 250) == 250
    assert batch_size(gpu, (3, 32, 32), 250) == 2500
    for device in (cpu, gpu):
        sizes = [batch_size(device, (3, side, side), 1000) for side in (8, 64, 224, 1000, 100_000)]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[2] * 3 * 224 * 224 < 8e6
        assert sizes[-1] >= 1


def test_seeded_gives_the_same_numbers_and_leaves_the_generators_alone() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    drawn = []
    for _ in range(2):
        with seeded(torch.device("cpu"), 7):
            drawn.append(torch.rand(3).tolist())
    assert drawn[0] == drawn[1]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_pretend_device_refuses_what_a_gpu_refuses(away: torch.device) -> None:
    there, here = torch.ones(3).to(away), torch.ones(3)
    for wrong in (
        lambda: there + here,
        lambda: torch.cat((there, here)),
        lambda: here[there.long()],
        lambda: nn.Linear(3, 1)(there),
    ):
        with pytest.raises(RuntimeError, match="one device"):
            wrong()
    with pytest.raises(RuntimeError, match="generator"):
        there.uniform_(generator=torch.Generator())
    assert there[torch.tensor([0, 2])].cpu().tolist() == [1, 1]


@pytest.mark.parametrize("name", NETWORKS)
def test_evaluation_is_where_the_model_is(
    name: str, away: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "strict", functools.partial(strict, steps=15, queries=100))
    shown, here = examples(10), NETWORKS[name]().eval()
    there = copy.deepcopy(here).to(away)
    for precision in ("32-true", "bf16-mixed"):
        adversarial_accuracy(there, shown, ATTACK, precision=precision)
    measured = [
        (
            predict(model, shown.x).tolist(),
            accuracy(model, shown),
            adversarial_accuracy(model, shown, ATTACK, restarts=2, precision="32-true"),
            strict_accuracy(model, shown, ATTACK).broken,
        )
        for model in (here, there)
    ]
    assert measured[0] == measured[1]
    assert device_of(there) == away


@pytest.mark.parametrize("name", NETWORKS)
def test_crafting_is_where_the_model_is_and_trials_come_back(name: str, away: torch.device) -> None:
    bases, here = examples(60), NETWORKS[name]().eval()
    there = copy.deepcopy(here).to(away)
    images, answers = craft_adversarial(there, bases, ATTACK, seed=3)
    assert images.device == answers.device == torch.device("cpu")
    assert all(
        torch.equal(one, other)
        for one, other in zip(
            (images, answers), craft_adversarial(here, bases, ATTACK, seed=3), strict=True
        )
    )
    attack = replace(ATTACK, epsilon=0.5, step_size=0.2)
    crafted = coin_set(there, bases, attack, 1, 4, seed=3, least=1)
    made = texture_set(there, (1, 8, 8), 1, 4, b"a key", least=1)
    for each in (crafted, made):
        assert each.x.device == each.answers.device == torch.device("cpu")


@pytest.fixture
def trains_away(away: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    monkeypatch.setattr(loop, "open_hardware", lambda _hardware: elsewhere.Fabric(away))
    return away


@pytest.mark.parametrize("name", ["paper", "branched"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_is_on_its_device_and_the_network_stays_there(
    objective: str,
    name: str,
    trains_away: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown, marks, network = examples(64), examples(20, seed=9), NETWORKS[name]()
    options: dict[str, Any] = {
        "validation": examples(20, seed=5),
        "watermarks": marks,
        "checkpoint": tmp_path / "c",
    }
    records = train(network, shown, OBJECTIVES[objective], **options)
    assert len(records) == 2
    assert records[-1].watermark_accuracy is not None
    assert all(elsewhere.parameters_away(network))
    again = NETWORKS[name]()
    assert train(again, shown, OBJECTIVES[objective], **options) == records  # out of the checkpoint
    assert all(
        torch.equal(one.cpu(), other.cpu())
        for one, other in zip(
            network.state_dict().values(), again.state_dict().values(), strict=True
        )
    )
    assert predict(again, shown.x).device == torch.device("cpu")


def test_examples_that_do_not_fit_are_moved_batch_by_batch(
    trains_away: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for room in (1 << 30, 0):
        monkeypatch.setattr(loop, "_SMALL_ROOM", room)
        network = NETWORKS["small"]()
        results.append(train(network, examples(), OBJECTIVES["fast"]))
    assert results[0] == results[1]


def test_perturbations_that_do_not_fit_are_not_carried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_MOST_CARRIED", 1000)
    monkeypatch.setattr(
        loop, "_first_perturbations", lambda *_: pytest.fail("perturbations of the whole set")
    )
    records = train(
        NETWORKS["small"](), examples(), replace(OBJECTIVES["fast"], attack=Attack(0.1, 1, 0.05))
    )
    assert len(records) == 2
    changed = loop._carrying(
        replace(OBJECTIVES["fast"], attack=Attack(0.1, 1, 0.05, random_start=False)), examples()
    )
    assert changed.attack == Attack(0.1, 1, 0.125, random_start=True)
    assert not changed.carry


@pytest.mark.parametrize("name", THEFTS)
def test_theft_is_where_victim_and_surrogate_are(name: str, trains_away: torch.device) -> None:
    theft, victim, copied = (
        THEFTS[name],
        NETWORKS["small"]().eval().to(trains_away),
        NETWORKS["surrogate"]().to(trains_away),
    )
    means = Means(pool=examples(60), threat=GREY, attack=ATTACK, seeds=20, queries=50, epochs=1)
    if theft.sees is not None:
        assert theft.run(theft.sees(victim, means), copied, means) == 50
        assert all(elsewhere.parameters_away(copied))


def test_removals_are_where_the_model_is(trains_away: torch.device) -> None:
    network, thief = NETWORKS["paper"]().eval().to(trains_away), examples()
    means = Means(pool=thief, threat=GREY, attack=ATTACK, epochs=1)
    for name, removal in REMOVALS.items():
        quick = {"finetune": 1, "adversarial": 1, "overwrite": 8, "reshape": 8, "flatten": 8}
        changed = removal.run(network, quick.get(name, removal.amount.default), means)
        assert all(elsewhere.parameters_away(changed))
        accuracy(changed, thief)
    here = NETWORKS["paper"]().eval()
    assert torch.equal(predict(prune(network, 0.5), thief.x), predict(prune(here, 0.5), thief.x))
    assert torch.equal(
        predict(add_noise(network, 0.5, means), thief.x),
        predict(add_noise(here, 0.5, means), thief.x),
    )


@pytest.mark.parametrize("name", ["small", "branched"])
def test_a_guard_is_where_its_model_is(name: str, away: torch.device) -> None:
    shown, here = examples(80), NETWORKS[name]()
    train(here, shown, replace(PLAIN, epochs=20))
    there = copy.deepcopy(here).to(away)
    found = []
    for model in (here, there):
        options: dict[str, Any] = {
            "secret": b"s" * 32,
            "model_sha256": "ab" * 32,
            "cost": 2.0,
            "training": shown,
            "epsilon": 0.4,
        }
        calibration = calibrate_model(model, examples(60, seed=4), **options)
        guarded = GuardedModel(model, Guard(calibration.settings, b"s" * 32), tolerance=1e-5)
        answers = guarded(examples(40, seed=6).x, "somebody")
        found.append(
            (calibration, answers.labels.tolist(), answers.trials, expected_cost(guarded, shown))
        )
    assert found[0] == found[1]


def test_a_model_folder_is_asked_on_the_device(away: torch.device, tmp_path: Path) -> None:
    network, shown = NETWORKS["small"]().eval(), examples()
    save_model(tmp_path, network, described("small", (1, 8, 8), 2, "digits", 0.1, 0))
    answers = [
        open_suspect(tmp_path, (1, 8, 8), device=device)(shown.x) for device in ("cpu", away)
    ]
    assert torch.equal(*answers)
    assert answers[1].device == torch.device("cpu")


@pytest.mark.parametrize("precise", [True, False])
def test_a_recorded_attack_finds_what_pgd_finds(
    precise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recorded attack finds what `pgd` finds, even when the weights change.

    Without a GPU nothing is recorded, so the step itself stands for its replay. The tensors that it
    works on stay the same while the batch size does.
    """
    monkeypatch.setattr(recording, "captured", lambda step, device: step)
    network, shown = NETWORKS["paper"]().eval(), examples(32)

    def precision() -> contextlib.AbstractContextManager[Any]:
        return (
            contextlib.nullcontext()
            if precise
            else torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
        )

    recorded = Recording(network, precision)
    held: dict[int, torch.Tensor] = {}  # kept, so that no later one gets the place of an earlier
    for number, part in enumerate((slice(0, 12), slice(12, 24), slice(24, 32), slice(0, 12))):
        x, y = pixels(shown.x[part]), shown.y[part]
        start = None if number % 2 else x + 0.03
        for epsilon in (0.05, 0.2):
            options: dict[str, Any] = {
                "epsilon": epsilon,
                "steps": 3,
                "step_size": epsilon / 2,
                "random_start": True,
                "start": start,
            }
            found = []
            for attack in (recorded, functools.partial(pgd, network)):
                torch.manual_seed(number)
                with contextlib.nullcontext() if attack is recorded else precision():
                    found.append(attack(x, y, **options))  # type: ignore[operator]
            assert torch.equal(*found)
            held[recorded._steps.held[0].data_ptr()] = recorded._steps.held[0]
        with torch.no_grad():
            for weight in network.parameters():
                weight.mul_(1.1)
    assert len(held) == 3  # one recording while the batches have one size


def test_only_layers_that_ask_nothing_are_recorded() -> None:
    assert all(capturable(network()) for name, network in NETWORKS.items() if name != "branched")
    assert not capturable(Branched())
    layer = nn.Conv2d(1, 1, 3)
    assert capturable(layer)
    assert not capturable(nn.BatchNorm2d(1, momentum=None))  # divides by a count of the device
    assert capturable(fx.symbolic_trace(nn.Sequential(layer)))

    class Reading(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x.max().item()

    assert not capturable(fx.symbolic_trace(Reading()))
    layer.register_forward_hook(lambda *_: None)
    assert not capturable(layer)


def test_training_replays_its_attack_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor stands for a GPU."""
    monkeypatch.setattr(recording, "captured", lambda step, device: step)
    made = []

    def making(kind: Any) -> Any:
        def make(*arguments: Any) -> Any:
            made.append(kind(*arguments))
            return made[-1]

        return make

    for objective in ("pgd", "fast"):
        config = replace(
            OBJECTIVES[objective], attack=replace(ATTACK, steps=2), average=0.9, push=0.01
        )
        plain, recorded = NETWORKS["surrogate"](), NETWORKS["surrogate"]()
        monkeypatch.setattr(loop, "worth_preparing", lambda _network: False)
        records = train(plain, examples(), config, validation=examples(20, seed=5))
        with monkeypatch.context() as patch:
            patch.setattr(loop, "_records", lambda *_: True)
            patch.setattr(loop, "Recording", making(Recording))
            patch.setattr(loop, "Recorded", making(Recorded))
            assert train(recorded, examples(), config, validation=examples(20, seed=5)) == records
        assert all(
            torch.equal(*pair)
            for pair in zip(
                plain.state_dict().values(), recorded.state_dict().values(), strict=True
            )
        )
    assert len(made) == 4


def test_a_seeded_block_changes_no_setting_of_cudnn_but_one() -> None:
    def settings() -> tuple[bool, ...]:
        cudnn = torch.backends.cudnn
        return cudnn.enabled, cudnn.benchmark, cudnn.allow_tf32, cudnn.deterministic

    before = settings()
    with seeded(torch.device("cpu"), 0):
        assert settings() == (*before[:3], True)
    assert settings() == before


def test_what_is_saved_says_the_kind_of_device_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    records = [
        EvaluateConfig("model", device=device).record() for device in ("auto", "cuda", "cuda:1")
    ]
    assert records[0] == records[1] == records[2]
    assert records[0]["device"] == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert EvaluateConfig("model").record()["device"] in ("cpu", "mps")
    with pytest.raises(CountermarkError, match="unknown device"):
        EvaluateConfig("model", device="gpu")


def test_a_run_does_not_go_on_on_another_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "c"
    train(NETWORKS["small"](), examples(), PLAIN, checkpoint=kept)
    monkeypatch.setattr(loop, "resolve_device", lambda _name: torch.device("mps"))
    monkeypatch.setattr(
        loop, "open_hardware", lambda _hardware: elsewhere.Fabric(torch.device("cpu"))
    )
    with pytest.raises(CountermarkError, match="another kind of processor"):
        train(NETWORKS["small"](), examples(), PLAIN, checkpoint=kept)


def test_images_in_a_file_are_measured_crafted_trained_on_and_guarded_from_there(
    tmp_path: Path,
) -> None:
    """Nothing needs all of them in memory, and the numbers are those of tensors."""
    shown = examples(80)
    (tmp_path / "images").write_bytes(b"head" + shown.x.numpy().tobytes())
    rows: Any = Rows(tmp_path / "images", tuple(shown.x.shape), offset=4)
    found = []
    for source in (shown, Examples(rows, shown.y)):
        network = NETWORKS["small"]()
        records = train(
            network, source, replace(OBJECTIVES["fast"], epochs=8), validation=source[:20]
        )
        options: dict[str, Any] = {
            "secret": b"s" * 32,
            "model_sha256": "ab" * 32,
            "cost": 2.0,
            "training": source,
            "epsilon": 0.4,
        }
        found.append(
            (
                records,
                accuracy(network, source),
                adversarial_accuracy(network, source, ATTACK),
                craft_adversarial(network, source, ATTACK, seed=1)[0].tolist(),
                calibrate_model(network, source, **options),
            )
        )
    assert found[0] == found[1]
