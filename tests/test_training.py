"""The training loop and the embedding of watermarks.

The tests are of determinism, resuming, processes, precision and the guard.
"""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from countermark import device
from countermark.data import Dataset, Examples, Pools, known, load_ood, open_data
from countermark.errors import CountermarkError
from countermark.evaluation import accuracy, adversarial_accuracy, agreement, predict
from countermark.files import read_tensors
from countermark.networks import load_model, save_model
from countermark.networks.named import build
from countermark.threat import COLOUR, GREY, Attack
from countermark.training import (
    Hardware,
    TrainConfig,
    Traits,
    built_in_network,
    fitted,
    gentle,
    kind_of,
    known_traits,
    loop,
    marking,
    recipe,
    resolve_hardware,
    train,
    traits,
)
from countermark.training.turns import in_turn
from countermark.training.views import View, random_view
from described import described

ATTACK = Attack(0.1, 10, 0.025)

THREAT = known("digits").threat
DIGITS = known_traits("digits")


def small(seed: int = 0) -> torch.nn.Module:
    return build("small", (1, 8, 8), 10, seed=seed)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([value.flatten() for value in model.state_dict().values()])


@pytest.fixture(scope="module")
def quick() -> TrainConfig:
    return recipe(DIGITS, "fast", THREAT, epochs=4)


@pytest.fixture(scope="module")
def watermarks() -> Examples:
    return load_ood(open_data("digits"), open_data("digits").pools(0), 0)[:40]


@pytest.mark.parametrize("objective", ["fast", "strong", "pgd", "standard"])
def test_same_seed_same_weights(digits: Pools, objective: str) -> None:
    config, data = recipe(DIGITS, objective, THREAT, epochs=2), digits.training[:320]
    first, second, third = small(), small(), small()
    state = torch.random.get_rng_state()
    train(first, data, config)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(5)
    train(second, data, config)
    train(third, data, replace(config, seed=1))
    assert torch.equal(weights(first), weights(second))
    assert not torch.equal(weights(first), weights(third))


@pytest.fixture(scope="module")
def standard(digits: Pools) -> nn.Module:
    """A network without adversarial training and without watermarks. Read only."""
    network = small()
    train(network, digits.training, recipe(DIGITS, "standard", THREAT, epochs=10))
    return network


def test_robust_training_resists_and_standard_training_does_not(
    digits: Pools, standard: nn.Module
) -> None:
    robust = small()
    records = train(
        robust,
        digits.training,
        recipe(DIGITS, "fast", THREAT, epochs=15),
        validation=digits.validation,
    )
    assert accuracy(standard, digits.test) > 85
    assert accuracy(robust, digits.test) > 85
    assert (
        adversarial_accuracy(robust, digits.test, ATTACK)
        > adversarial_accuracy(standard, digits.test, ATTACK) + 25
    )
    assert [record.epoch for record in records if not record.redone] == list(range(1, 16))
    assert records[-1].accuracy is not None
    assert records[-1].adversarial_accuracy is not None
    assert records[-1].watermark_accuracy is None


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set what the guard measures after each epoch, so that no run redoes one by chance.

    The last number stays.
    """

    def write(*measured: float) -> None:
        monkeypatch.setattr(
            loop,
            "_measured",
            lambda run, *_networks: measured[min(len(run.records), len(measured) - 1)],
        )

    return write


@pytest.mark.parametrize("average", [0.0, 0.9])
@pytest.mark.parametrize("embedding", ["interleaved", "epoch"])
@pytest.mark.parametrize("network", ["small", "paper"])
def test_interrupted_training_resumes_to_the_very_same_weights(
    digits: Pools,
    watermarks: Examples,
    quick: TrainConfig,
    embedding: str,
    network: str,
    average: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    script: Callable[..., None],
) -> None:
    """Training is interrupted in the middle of epochs, again and again.

    The paper's network adds dropout and batch norm. The second epoch is said to have collapsed: an
    epoch that was undone is not done again, and the one that is run again has more attack steps.
    """
    script(50.0, 10.0, 60.0)
    config = replace(
        quick, embedding=embedding, average=average, flip=True, shift=1, epochs=3, batch_size=32
    )
    data = digits.training[:160]
    undisturbed = build(network, (1, 8, 8), 10, seed=0)
    expected = train(undisturbed, data, config, validation=digits.validation, watermarks=watermarks)
    assert [record.redone for record in expected] == [False, True, False, False]
    monkeypatch.setattr(loop, "_CHECKPOINT_SECONDS", 0.0)  # after every step
    step, left = loop._step, [3]

    def tiring(*arguments: object) -> float:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return step(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "_step", tiring)
    interruptions = 0
    while True:
        left[0] = 3
        resumed = build(network, (1, 8, 8), 10, seed=0)
        try:
            records = train(
                resumed,
                data,
                config,
                validation=digits.validation,
                watermarks=watermarks,
                checkpoint=tmp_path / "point",
            )
            break
        except KeyboardInterrupt:
            interruptions += 1
    assert interruptions == 6  # 4 epochs of 5 steps, 3 a turn
    assert torch.equal(weights(resumed), weights(undisturbed))
    assert records == expected


@pytest.mark.parametrize(
    ("cost", "apart", "worth"),
    [(0.09, 0.0, True), (0.11, 2.1, False), (0.11, 2.3, True), (30.0, 599.0, False)],
)
def test_checkpoints_take_a_twentieth_of_the_time_at_most(
    cost: float, apart: float, worth: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "_QUICK", 0.1)
    monkeypatch.setattr(loop.time, "monotonic", lambda: 1000.0 + apart)
    run = SimpleNamespace(cost=cost, saved=1000.0)
    assert loop._Run.worth_saving.fget(run) is worth  # type: ignore[attr-defined]


def test_the_average_is_that_of_the_closed_form(
    digits: Pools, quick: TrainConfig, monkeypatch: pytest.MonkeyPatch, script: Callable[..., None]
) -> None:
    """The average is of the weights after each step, with shares that sum to 1.

    The steps themselves are those of a run without an average.
    """
    script(50.0)
    decay, seen = 0.8, []
    descend = loop._Run.descend

    def watching(run: loop._Run, *arguments: Any) -> torch.Tensor:
        value = descend(run, *arguments)
        seen.append(weights(run.network).clone())
        return value

    plain, averaged = small(), small()
    begun = weights(averaged).clone()
    records = train(plain, digits.training, quick, validation=digits.validation)
    monkeypatch.setattr(loop._Run, "descend", watching)
    found = train(
        averaged, digits.training, replace(quick, average=decay), validation=digits.validation
    )
    assert torch.equal(seen[-1], weights(plain))
    kept = [min(decay, (step + 1) / (step + 10)) for step in range(len(seen))]
    after = [
        float(torch.tensor(kept[step + 1 :], dtype=torch.float64).prod())
        for step in range(len(seen))
    ]
    shares = [(1 - keep) * rest for keep, rest in zip(kept, after, strict=True)]
    start = kept[0] * after[0]
    assert start + sum(shares) == pytest.approx(1)
    expected = start * begun.double() + sum(
        share * value.double() for share, value in zip(shares, seen, strict=True)
    )
    assert torch.allclose(weights(averaged).double(), expected, atol=1e-5)
    assert not torch.equal(weights(averaged), weights(plain))
    assert [record.loss for record in found] == [record.loss for record in records]
    assert found[-1].accuracy == agreement(
        predict(averaged, digits.validation.x), digits.validation.y
    )


def test_a_step_is_one_down_its_formula(
    digits: Pools, watermarks: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step of plain SGD is compared with a gradient written down anew.

    Watermarks are among the crafted images.
    """
    data, rate = digits.training[:32], 0.05
    config = TrainConfig(
        "pgd", Attack(0.1, 2, 0.05), 1, batch_size=32, learning_rate=rate, schedule="constant",
        momentum=0.0, weight_decay=0.0, grow_budget=False, watermark_batch=8,
        hardware=Hardware("cpu", precision="32-true"),
    )  # fmt: skip
    crafted, turns = [], []
    perturb, turn_of = loop._Run.perturb, loop.in_turn

    def perturbing(
        run: loop._Run,
        chosen: torch.Tensor,
        x: torch.Tensor,
        y: torch.Tensor,
        grown: float,
        view: View,
    ) -> torch.Tensor:
        crafted.append((y, perturb(run, chosen, x, y, grown, view)))
        return crafted[-1][1]

    def taking(*place: int) -> torch.Tensor:
        turns.append(turn_of(*place))
        return turns[-1]

    monkeypatch.setattr(loop._Run, "perturb", perturbing)
    monkeypatch.setattr(loop, "in_turn", taking)
    trained, reference = small(), small()
    train(trained, data, config, watermarks=watermarks)
    (y, moved), marks = crafted[0], watermarks[turns[0]]
    labelled = torch.cat(
        (
            reference(moved).log_softmax(1)[range(32), y],
            reference(marks.x / 255).log_softmax(1)[range(8), marks.y],
        )
    )
    (-labelled.sum() / 40).backward()
    expected = torch.cat(
        [(value - rate * value.grad).flatten() for value in reference.parameters()]
    )  # type: ignore[operator]
    assert torch.allclose(weights(trained), expected, atol=1e-6)
    assert not torch.allclose(weights(trained), weights(small()), atol=1e-4)


def test_a_finished_run_is_not_run_again(
    digits: Pools, quick: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, again = small(), small()
    records = train(model, digits.training, quick, checkpoint=tmp_path / "point")
    monkeypatch.setattr(loop, "_step", None)
    assert train(again, digits.training, quick, checkpoint=tmp_path / "point") == records
    assert torch.equal(weights(model), weights(again))


@pytest.mark.parametrize("change", ["seed", "data", "weights", "torn"])
def test_a_checkpoint_of_another_run_is_refused(
    digits: Pools, quick: TrainConfig, tmp_path: Path, change: str
) -> None:
    point = tmp_path / "point"
    train(small(), digits.training, replace(quick, epochs=1), checkpoint=point)
    config, data, model = replace(quick, epochs=1), digits.training, small()
    if change == "seed":
        config = replace(config, seed=9)
    elif change == "data":
        data = data[:-1]
    elif change == "weights":
        model = small(5)
    else:
        point.write_bytes(point.read_bytes()[:-100])
    with pytest.raises(CountermarkError, match=str(point)):
        train(model, data, config, checkpoint=point)


@pytest.mark.parametrize("embedding", ["interleaved", "epoch"])
def test_watermarks_are_learned_either_way(
    digits: Pools, watermarks: Examples, standard: nn.Module, embedding: str
) -> None:
    assert agreement(predict(standard, watermarks.x), watermarks.y) < 40
    config = replace(
        recipe(DIGITS, "standard", THREAT, epochs=15), embedding=embedding, learning_rate=0.05
    )
    marked = small()
    records = train(marked, digits.training, config, watermarks=watermarks)
    assert agreement(predict(marked, watermarks.x), watermarks.y) > 75
    assert records[-1].watermark_accuracy == agreement(predict(marked, watermarks.x), watermarks.y)
    assert accuracy(marked, digits.test) > 80


def test_every_watermark_has_its_turn() -> None:
    seen = torch.cat([in_turn(6 * step, 6, 40, seed=0) for step in range(20)])
    assert torch.bincount(seen, minlength=40).tolist() == [3] * 40
    few = in_turn(0, 12, 4, seed=0)  # fewer watermarks than places in a batch
    assert torch.bincount(few, minlength=4).tolist() == [3] * 4


@settings(deadline=None)
@given(st.integers(0, 500), st.integers(1, 60), st.integers(1, 60), st.integers(0, 1 << 20))
def test_turns_do_not_depend_on_how_they_are_cut(
    first: int, size: int, count: int, seed: int
) -> None:
    """The rounds form one sequence: any piece of it equals its places taken one by one.

    No watermark falls behind.
    """
    row = in_turn(0, first + size, count, seed)
    assert torch.equal(row[first:], in_turn(first, size, count, seed))
    often = torch.bincount(row, minlength=count)
    assert int(often.max() - often.min()) <= 1


def test_carried_perturbations_end_at_the_worst_point_of_the_ball(
    digits: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a linear network the worst point is known.

    Half a budget an epoch gets there if each epoch goes on from where the last one ended, and not
    otherwise.
    """
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    with torch.no_grad():
        network[1].weight[0] = torch.linspace(-1, 1, 64)
        network[1].weight[1] = 0.0
    data = Examples(digits.training.x[:96], torch.arange(96) % 2)
    fast = recipe(DIGITS, "fast", THREAT, epochs=4, hardware=Hardware("cpu", precision="32-true"))
    config = replace(fast, learning_rate=0.0, weight_decay=0.0, grow_budget=False, batch_size=32)
    perturb, crafted = loop._Run.perturb, torch.empty(96, 1, 8, 8)

    def watching(run: loop._Run, chosen: torch.Tensor, *arguments: object) -> torch.Tensor:
        crafted[chosen] = perturb(run, chosen, *arguments)  # type: ignore[arg-type]
        return crafted[chosen]

    monkeypatch.setattr(loop._Run, "perturb", watching)
    x = data.x / 255
    towards = torch.linspace(-1, 1, 64).sign().view(1, 1, 8, 8) * (
        2.0 * data.y.view(-1, 1, 1, 1) - 1
    )
    worst = (x + 0.1 * towards).clamp(0, 1)
    train(network, data, config)
    torch.testing.assert_close(crafted, worst, atol=0.1 / 127, rtol=0)
    train(network, data, replace(config, carry=False))
    assert float((crafted - worst).abs().mean()) > 0.01
    assert float((crafted - x).abs().max()) < 0.1 + 1e-6


@settings(deadline=None)
@given(st.integers(0, 1 << 30), st.booleans(), st.integers(0, 3))
def test_a_view_and_its_way_back(seed: int, mirror: bool, most: int) -> None:
    torch.manual_seed(seed)
    images = torch.randint(0, 256, (5, 2, 6, 7))
    view = random_view(5, mirror, most)
    shown = view.of(images)
    assert torch.equal(view.undo(shown), images)
    assert max(abs(offset) for offset in view.moved) <= most
    down, right = view.moved
    for image, mirrored, seen in zip(
        images, view.mirrored if mirror else [False] * 5, shown, strict=True
    ):  # type: ignore[arg-type]
        row, column = 2, 3
        assert torch.equal(
            seen[:, (row + down) % 6, ((6 - column if mirrored else column) + right) % 7],
            image[:, row, column],
        )


def test_carried_perturbations_are_turned_with_their_images(
    digits: Pools, quick: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attack that stays where it starts leaves every perturbation as it was.

    This holds whichever way its image was mirrored and moved.
    """
    data, seen, carried = digits.training[:320], [], []
    perturb = loop._Run.perturb

    def watching(
        run: loop._Run,
        chosen: torch.Tensor,
        x: torch.Tensor,
        y: torch.Tensor,
        grown: float,
        view: View,
    ) -> torch.Tensor:
        before = run.carried[chosen].clone()  # type: ignore[index]
        crafted = perturb(run, chosen, x, y, grown, view)
        carried.append(torch.equal(run.carried[chosen], before))  # type: ignore[index]
        seen.append((chosen, x, view, crafted - x, before))
        return crafted

    monkeypatch.setattr(loop, "pgd", lambda _model, _x, _y, *, start, **_options: start)
    monkeypatch.setattr(loop._Run, "perturb", watching)
    train(small(), data, replace(quick, flip=True, shift=1, epochs=2, batch_size=32))
    assert all(carried)
    share = torch.cat([view.mirrored for _, _, view, _, _ in seen]).double().mean()
    assert 0.4 < share < 0.6
    assert len({view.moved for _, _, view, _, _ in seen}) > 4
    for chosen, x, view, moved, before in seen:
        assert torch.allclose(x, view.of(data.x[chosen] / 255))
        assert torch.allclose(moved, view.of(before * 0.1 / 127), atol=1e-6)


def test_two_processes_take_the_steps_of_one(
    digits: Pools, watermarks: Examples, tmp_path: Path
) -> None:
    """Data-parallel training on the CPU takes the same steps as one process.

    It has watermarks, carried perturbations and an average, and runs in a process of its own, since
    it forks. Both sum the same gradients in different orders: over a few steps of a smooth network
    the rounding errors stay small.
    """
    code = """
import sys, torch
from dataclasses import replace
from pathlib import Path
from torch import nn
from countermark.data import known, load_ood, load_pools, open_data
from countermark.training import Hardware, known_traits, loop, recipe, train
pools = load_pools("digits", 0)
marks = load_ood(open_data("digits"), open_data("digits").pools(0), 0)[:40]
loop._measured = lambda *_networks: 50.0
DIGITS, THREAT = known_traits("digits"), known("digits").threat
config = recipe(DIGITS, "strong", THREAT, epochs=1, \
hardware=Hardware("cpu", int(sys.argv[1]), "32-true"))
config = replace(config, grow_budget=False, schedule="constant", batch_size=96, push=0.1)
torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
point, state = Path(sys.argv[2]), \
{name: value.clone() for name, value in model.state_dict().items()}
records = train(model, pools.training, config, validation=pools.validation, watermarks=marks, \
checkpoint=point)
after = nn.utils.parameters_to_vector(model.parameters()).detach()
model.load_state_dict(state)
assert train(model, pools.training, config, validation=pools.validation, watermarks=marks, \
checkpoint=point) == records
assert torch.equal(nn.utils.parameters_to_vector(model.parameters()).detach(), after)
torch.save({"change": after - before, "loss": records[0].loss}, sys.argv[2] + ".pt")
"""
    found = []
    for devices in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code, devices, str(tmp_path / devices)],
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": devices,
            },  # a forked process must not wait for its parent's threads
            timeout=480,
        )
        assert done.returncode == 0, done.stderr
        found.append(torch.load(tmp_path / f"{devices}.pt", weights_only=True))
    one, two = found
    assert float((one["change"] - two["change"]).norm()) < 0.02 * float(one["change"].norm())
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_bf16_takes_the_steps_of_float32_within_rounding(digits: Pools) -> None:
    """Over two epochs the weights stay in float32 and move as they do without rounding.

    Their change points in the same direction and is of the same size.
    """
    moved = []
    for precision in ("32-true", "bf16-mixed"):
        network = small()
        begun = weights(network).clone()
        train(
            network,
            digits.training,
            recipe(DIGITS, "fast", THREAT, epochs=2, hardware=Hardware("cpu", precision=precision)),
        )
        assert network.state_dict()["0.weight"].dtype == torch.float32
        moved.append(weights(network) - begun)
    full, half = moved
    assert not torch.equal(full, half)
    assert float(nn.functional.cosine_similarity(full, half, dim=0)) > 0.9
    assert float(half.norm()) == pytest.approx(float(full.norm()), rel=0.2)


def test_the_guard_undoes_a_collapsed_epoch_and_attacks_harder(
    digits: Pools,
    quick: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The multi-step check is made to fall once.

    The epoch must be undone exactly and run again in two steps. That is one of the two lines which
    stay of the training.
    """
    measured = iter([10.0, 50.0, 60.0, 10.0, 62.0, 64.0])
    monkeypatch.setattr(
        loop, "adversarial_accuracy", lambda *_arguments, **_options: next(measured)
    )
    begun_at, carried, attack_steps = [], [], []
    step = loop._step

    def watching(run: loop._Run, *arguments: object) -> float:
        if run.step % (len(digits.training) // 64) == 0:
            begun_at.append(weights(run.network).clone())
            carried.append(run.carried.clone())
            attack_steps.append(run.attack.steps if run.attack else 0)
        return step(run, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "_step", watching)
    records = train(small(), digits.training, quick, validation=digits.validation, title="a model")
    collapsed, trained = capsys.readouterr().err.splitlines()
    assert "epoch 3 collapsed (catastrophic overfitting)" in collapsed
    assert trained.startswith("a model: trained for 4 epochs in ")
    assert trained.endswith(" of the validation images, 64.0 % under attack")
    assert [record.redone for record in records] == [False, False, True, False, False]
    assert attack_steps == [1, 1, 1, 2, 2]
    assert torch.equal(begun_at[2], begun_at[3])
    assert torch.equal(carried[2], carried[3])
    assert loop.with_steps(quick.attack, 2).step_size == pytest.approx(0.125)  # type: ignore[arg-type]


class Brightness(nn.Sequential):
    """Tells dark images from bright ones by a piecewise linear function of the mean pixel.

    The function's weights can be planted. In a robust network it rises. In a collapsed one it is on
    the right side wherever an image is and wherever one long step takes it, and on the wrong side
    half-way: this is what catastrophic overfitting does to a network (Kim, Lee and Lee, 2021).
    """

    BENDS = (0.0, 0.25, 0.3, 0.7, 0.75)
    ROBUST, COLLAPSED = ((-5.0, 10.0), (0.0,) * 4), ((-9.0, 40.0), (-80.0, 45.0, -45.0, 80.0))

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 2))
        with torch.no_grad():
            self[1].weight.fill_(1 / 64)
            self[1].bias.copy_(-torch.tensor(self.BENDS))
        self.plant(self.ROBUST)

    @torch.no_grad()
    def plant(self, function: tuple[tuple[float, float], tuple[float, ...]]) -> None:
        """Set the logit of the second class; that of the first is always 0.

        It gets a value and a slope at 0, and the slope changes at each further bend.
        """
        (value, slope), changes = function
        self[3].weight.zero_()
        self[3].bias.copy_(torch.tensor([0.0, value]))
        self[3].weight[1] = torch.tensor([slope, *changes])


@pytest.mark.parametrize("check_steps", [10, 1])
def test_the_guard_sees_a_collapse_that_single_steps_do_not(
    monkeypatch: pytest.MonkeyPatch, check_steps: int
) -> None:
    """The second epoch leaves a network on which single steps find nothing and many break all.

    Training in single steps may do so. Everything but the weights that an epoch leaves is real: the
    measurement, the undoing, the steps of the next attempt. If the guard measures in single steps,
    it is blind.
    """
    y = torch.arange(64) % 2
    bright = Examples((51 + 153 * y.view(-1, 1, 1, 1)).expand(64, 1, 8, 8).to(torch.uint8), y)
    single = Attack(0.1, 1, 0.125)
    for function, many in ((Brightness.ROBUST, 100), (Brightness.COLLAPSED, 0)):
        network = Brightness()
        network.plant(function)
        assert accuracy(network, bright) == adversarial_accuracy(network, bright, single) == 100
        assert adversarial_accuracy(network, bright, loop.with_steps(single, 10)) == many

    def step(run: loop._Run, *_arguments: object) -> torch.Tensor:
        assert run.attack is not None
        run.network.plant(
            Brightness.COLLAPSED if (run.step, run.attack.steps) == (1, 1) else Brightness.ROBUST
        )  # type: ignore[operator]
        return torch.zeros(())

    monkeypatch.setattr(loop, "_step", step)
    monkeypatch.setattr(loop, "_CHECK_STEPS", check_steps)
    records = train(
        Brightness(),
        bright,
        TrainConfig("fast", single, epochs=3, batch_size=64),
        validation=bright,
    )
    seen = [(record.adversarial_accuracy, record.redone, record.attack_steps) for record in records]
    if check_steps == 1:
        assert seen == [(100, False, 1)] * 3
    else:
        assert seen == [(100, False, 1), (0, True, 1), (100, False, 2), (100, False, 2)]


def test_the_guard_knows_what_the_first_epoch_started_from(
    digits: Pools, quick: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An intended dip passes; a fall to a tenth of the start does not.

    A checkpoint remembers the start.
    """
    measured = iter([90.0, 40.0, 9.0, 60.0, 61.0])
    monkeypatch.setattr(
        loop, "adversarial_accuracy", lambda *_arguments, **_options: next(measured)
    )
    records = train(
        small(),
        digits.training,
        replace(quick, epochs=3),
        validation=digits.validation,
        checkpoint=tmp_path / "c",
    )
    assert [record.redone for record in records] == [False, True, False, False]
    measured = iter([90.0, 9.0, 50.0, 60.0, 61.0])
    records = train(
        small(), digits.training, replace(quick, epochs=3), validation=digits.validation
    )
    assert [record.redone for record in records] == [True, False, False, False]
    assert read_tensors(tmp_path / "c", 1 << 30)[1]["initial"] == 90.0


def test_a_run_does_not_go_on_in_another_precision(
    digits: Pools, quick: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The precision `auto` is what the processor has.

    A checkpoint taken to another processor would go on to weights that are neither's.
    """
    kept, trained = tmp_path / "c", replace(quick, epochs=1)
    monkeypatch.setattr(device, "computes_bf16", lambda _kind: False)
    train(small(), digits.training, trained, checkpoint=kept)
    assert resolve_hardware(Hardware("cpu")) == Hardware("cpu", 1, "32-true")
    train(
        small(),
        digits.training,
        replace(trained, hardware=Hardware("cpu", 1, "32-true")),
        checkpoint=kept,
    )  # the same run
    monkeypatch.setattr(device, "computes_bf16", lambda _kind: True)
    assert resolve_hardware(Hardware("cpu")).precision == "bf16-mixed"
    with pytest.raises(CountermarkError, match="another kind of processor"):
        train(small(), digits.training, trained, checkpoint=kept)


def test_a_loss_that_is_not_finite_stops_the_run(digits: Pools) -> None:
    with pytest.raises(CountermarkError, match="loss"):
        train(
            small(),
            digits.training,
            replace(recipe(DIGITS, "standard", THREAT, epochs=3), learning_rate=1e6),
        )


def test_losses_that_are_read_together_are_the_same_and_stop_the_run_as_well(
    digits: Pools, quick: TrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a GPU, where reading each loss at once would wait for each step."""
    networks = small(), small()
    at_once = train(networks[0], digits.training, quick)
    monkeypatch.setattr(loop, "_unread", lambda _device: 7)
    together = train(networks[1], digits.training, quick)
    assert at_once == together
    assert all(
        torch.equal(*pair)
        for pair in zip(*(each.state_dict().values() for each in networks), strict=True)
    )
    diverging = replace(recipe(DIGITS, "standard", THREAT, epochs=3), learning_rate=1e6)
    with pytest.raises(CountermarkError, match=r"loss is \S+ at step \d+"):
        train(small(), digits.training, diverging, checkpoint=tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_devices_that_do_not_exist_are_an_error(digits: Pools, quick: TrainConfig) -> None:
    with pytest.raises(CountermarkError, match="cuda"):
        train(small(), digits.training, replace(quick, hardware=Hardware("cuda")))


@pytest.mark.parametrize(
    "change",
    [
        {"objective": "nothing"},
        {"attack": None},
        {"average": 1.0},
        {"embedding": "nothing"},
        {"epochs": 0},
        {"shift": -1},
        {"schedule": "none"},
        {"hardware": Hardware(precision="fp4")},
    ],
)
def test_impossible_configurations_are_refused(
    quick: TrainConfig, change: dict[str, object]
) -> None:
    with pytest.raises(CountermarkError):
        replace(quick, **change)  # type: ignore[arg-type]


# What 0.1.0 did for the data sets that it knew, each with settings of its own: network; epochs,
# batch, flip, shift, average; attack in budgets, its steps; then of the marking: epochs, its steps,
# trials.
RECIPES = {
    ("mnist", "fast"): ("small", 7, 128, False, 0, 0.0, 1.0, 1, 5, 1, 16),
    ("mnist", "strong"): ("clipped", 20, 128, False, 1, 0.999, 1.0, 2, 10, 2, 16),
    ("mnist", "standard"): ("small", 7, 128, False, 0, 0.0, None, 0, 5, 0, 16),
    ("mnist", "pgd"): ("small", 100, 128, False, 0, 0.0, 1.0, 25, 50, 25, 16),
    ("fashion_mnist", "fast"): ("small", 7, 128, False, 0, 0.0, 1.0, 1, 5, 2, 16),
    ("fashion_mnist", "strong"): ("wide", 10, 128, True, 0, 0.999, 1.05, 2, 12, 2, 16),
    ("fashion_mnist", "standard"): ("small", 7, 128, False, 0, 0.0, None, 0, 5, 0, 16),
    ("fashion_mnist", "pgd"): ("small", 100, 128, False, 0, 0.0, 1.0, 15, 50, 15, 16),
    ("digits", "fast"): ("small", 40, 64, False, 0, 0.0, 1.0, 1, 40, 1, 32),
    ("digits", "strong"): ("wide", 80, 64, False, 0, 0.999, 1.07, 2, 80, 2, 32),
    ("digits", "standard"): ("small", 40, 64, False, 0, 0.0, None, 0, 40, 0, 32),
    ("digits", "pgd"): ("small", 100, 64, False, 0, 0.0, 1.0, 10, 50, 10, 16),
}


@pytest.mark.parametrize(("name", "objective"), RECIPES)
def test_recipes_by_kind_of_image_are_those_of_the_data_sets_before(
    name: str, objective: str
) -> None:
    given, threat = known_traits(name), known(name).threat
    config = recipe(given, objective, threat, seed=3)
    marked = marking(config, given, objective)
    attack = config.attack
    found = (
        built_in_network(given, objective),
        config.epochs,
        config.batch_size,
        config.flip,
        config.shift,
        config.average,
        None if attack is None else pytest.approx(attack.epsilon / threat.epsilon),
        0 if attack is None else attack.steps,
        marked.epochs,
        0 if marked.attack is None else marked.attack.steps,
        marked.watermark_batch,
    )
    assert found == RECIPES[name, objective]
    slow = objective == "pgd"
    assert (config.learning_rate, config.schedule) == (
        (0.005, "constant") if slow else (0.1, "triangular")
    )
    assert (config.warmup, marked.warmup) == (
        (0, 0) if slow else (0.35 if objective == "strong" else 0.3, 0.15)
    )
    assert (config.carry, config.nesterov, config.dropout) == (
        objective in ("fast", "strong"),
        not slow,
        attack is None or slow,
    )
    if attack is not None and not slow:
        assert attack.step_size == 0.5 * attack.epsilon
        assert marked.attack is not None
        assert marked.attack.step_size == attack.step_size
    assert marked.grow_budget == slow
    assert config.seed == marked.seed == 3


def test_the_traits_of_digits_are_what_its_images_show(digits: Pools) -> None:
    """For the sets that are fetched, `benchmarks/first_light.py` would show a difference."""
    assert traits(open_data("digits"), digits.training) == DIGITS


def test_the_kind_of_an_image_is_measured() -> None:
    generator = torch.Generator().manual_seed(0)
    strokes = 255 * (torch.rand(50, 1, 12, 12, generator=generator) < 0.2).to(torch.uint8)
    grey = torch.randint(0, 256, (50, 1, 12, 12), dtype=torch.uint8, generator=generator)
    blurred = torch.where(torch.rand(strokes.shape, generator=generator) < 0.05, grey, strokes)
    assert [kind_of(images) for images in (strokes, blurred, grey)] == ["ink", "ink", "grey"]
    assert kind_of(strokes.double() / 255) == "ink"
    assert kind_of(strokes.expand(50, 3, 12, 12)) == "colour"


def photographs(count: int, **facts: object) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (count, 3, 16, 24), dtype=torch.uint8, generator=generator)
    examples = Examples(x, torch.arange(count) % 2)
    return Dataset("", examples, examples, ("cat", "dog"), COLOUR, **facts)  # type: ignore[arg-type]


def test_colour_images_are_moved_and_mirrored_only_if_somebody_says_so() -> None:
    """A traffic sign that points left looks like any photograph.

    So mirroring must be allowed explicitly and is never guessed.
    """
    unknown, told = photographs(20), photographs(20, mirror=True, shift=1)
    assert traits(unknown, unknown.train) == Traits("colour", 20, False, 2)
    assert traits(told, told.train) == Traits("colour", 20, True, 1)
    assert traits(told, told.train, mirror=False, shift=0) == Traits("colour", 20, False, 0)
    for objective in ("fast", "standard", "strong"):
        config = recipe(Traits("colour", 37_500, True, 4), objective, COLOUR)
        assert (config.flip, config.shift, config.batch_size) == (True, 4, 128)
        assert config.average >= 0.998
        assert not config.carry
    fast = recipe(Traits("colour", 37_500), "fast", COLOUR)
    assert fast.attack == Attack(8 / 255, 2, 4 / 255)
    assert (fast.epochs, fast.learning_rate) == (15, 0.1)
    assert built_in_network(Traits("colour", 10), "fast") == "narrow"


@settings(deadline=None)
@given(
    st.integers(1, 1_000_000),
    st.sampled_from(["ink", "grey", "colour"]),
    st.sampled_from(["fast", "strong", "standard"]),
)
def test_any_number_of_images_gets_a_recipe(images: int, kind: str, objective: str) -> None:
    given = Traits(kind, images)
    config = recipe(given, objective, GREY)
    marked = marking(config, given, objective)
    many = 8 if kind == "colour" else 16
    assert marked.watermark_batch == (32 if images < 5000 else many)
    for each in (
        config,
        marked,
        gentle(config, given, nn.Flatten()) if objective == "standard" else marked,
    ):
        assert (1 if objective == "standard" else 4) <= each.epochs <= 80
        steps = each.epochs * (images // min(each.batch_size, images))
        # No more than was asked for, but for the least.
        most = 20_600 if (kind, objective) == ("colour", "strong") else 9600
        assert steps <= most or each.epochs <= 10


def test_given_weights_are_marked_gently() -> None:
    """Each of 400 trials is shown some forty times.

    The learning rate is that of training for a network with batch norm, and lower for others.
    """
    given, few = Traits("colour", 37_500), Traits("colour", 3000)
    million = gentle(
        recipe(Traits("colour", 1_000_000), "standard", COLOUR),
        Traits("colour", 1_000_000),
        nn.Flatten(),
    )
    assert million.epochs == 1
    config = recipe(given, "standard", COLOUR)
    plain, steady = nn.Linear(2, 2), nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))
    marked = gentle(config, given, steady)
    assert (marked.objective, marked.attack, marked.epochs) == ("standard", None, 5)
    assert 35 <= marked.epochs * (37_500 // 128) * marked.watermark_batch / 400 <= 50
    assert marked.learning_rate == config.learning_rate > gentle(config, given, plain).learning_rate
    assert gentle(config, few, steady).learning_rate < gentle(config, given, plain).learning_rate
    assert gentle(config, given, steady, epochs=9).epochs == 9


def test_dropout_is_left_out_where_the_recipe_says_so(digits: Pools) -> None:
    seen: list[bool] = []
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))
    network[1].register_forward_hook(lambda layer, given, result: seen.append(layer.training))
    for dropout in (True, False):
        seen.clear()
        train(network, digits.training, TrainConfig("standard", None, epochs=1, dropout=dropout))
        assert set(seen) == {dropout}
    assert not recipe(DIGITS, "fast", THREAT).dropout
    assert recipe(DIGITS, "pgd", THREAT).dropout


def test_the_pgd_recipe_is_the_papers() -> None:
    given = known_traits("mnist")
    config = recipe(given, "pgd", known("mnist").threat)
    assert config.attack == Attack(0.25, 25, 0.01)
    assert (
        config.epochs,
        config.learning_rate,
        config.momentum,
        config.weight_decay,
        config.batch_size,
    ) == (100, 0.005, 0.9, 5e-4, 128)
    assert config.schedule == "constant"
    assert asdict(marking(config, given, "pgd"))["objective"] == "pgd"


def tied_network() -> nn.Sequential:
    """Two hidden layers of one weight, as embeddings and outputs share theirs."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    network[3].weight = network[1].weight
    return network


@pytest.mark.parametrize("average", [0.0, 0.9])
@pytest.mark.parametrize("objective", ["standard", "fast"])
def test_tied_weights_are_trained_kept_and_stay_tied(
    digits: Pools, objective: str, average: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through checkpoints and resuming, with momentum and with an average of the weights."""
    config = replace(
        recipe(DIGITS, objective, THREAT, epochs=2),
        average=average,
        hardware=Hardware("cpu", precision="32-true"),
    )
    data = digits.training[:256]
    network, resumed = tied_network(), tied_network()
    before = network[1].weight.detach().clone()
    train(network, data, config, validation=digits.validation)
    end_epoch, calls = loop._end_epoch, []

    def stops(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return end_epoch(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "_end_epoch", stops)
    with pytest.raises(KeyboardInterrupt):
        train(resumed, data, config, validation=digits.validation, checkpoint=tmp_path / "point")
    resumed = tied_network()
    train(resumed, data, config, validation=digits.validation, checkpoint=tmp_path / "point")
    for trained in (network, resumed):
        assert trained[3].weight is trained[1].weight
        assert not torch.equal(trained[1].weight, before)
    assert torch.equal(weights(network), weights(resumed))


def test_a_step_takes_its_gradient_at_weights_that_were_pushed_up_the_loss() -> None:
    """One step of a network of two layers against the definition; a bias is not pushed."""
    torch.manual_seed(0)
    shown = Examples(torch.rand(8, 1, 2, 3), torch.arange(8) % 3)
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    nn.init.zeros_(network[3].weight)  # nothing to push, and no gradient below it
    config = TrainConfig(
        "standard", None, 1, push=0.3, batch_size=8, momentum=0.0, weight_decay=0.0,
        learning_rate=0.5, schedule="constant", hardware=Hardware("cpu", precision="32-true"),
    )  # fmt: skip
    pushed = copy.deepcopy(network)
    for first in (True, False):
        loss = functional.cross_entropy(pushed(shown.x), shown.y)
        slopes = torch.autograd.grad(loss, list(pushed.parameters()))
        if first:
            with torch.no_grad():
                for weight, slope in zip(pushed.parameters(), slopes, strict=True):
                    if weight.dim() > 1 and slope.norm() > 0:
                        weight += 0.3 * weight.norm() * slope / slope.norm()
    expected = [
        weight - 0.5 * slope for weight, slope in zip(network.parameters(), slopes, strict=True)
    ]
    (record,) = train(network, shown, config)
    assert record.loss == pytest.approx(loss.item())
    for weight, wanted in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(weight, wanted, rtol=1e-5, atol=1e-7)


def test_no_push_where_nothing_can_be_pushed_or_the_pass_is_algorithm_1s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = Examples(torch.rand(8, 1, 2, 3), torch.arange(8) % 3)
    config = TrainConfig(
        "standard", None, 1, push=0.3, batch_size=4, hardware=Hardware("cpu", precision="32-true")
    )
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 3))
    network[1].weight.requires_grad_(False)
    before = network[1].weight.clone()
    train(network, shown, config)  # there is only a bias to train
    assert torch.equal(network[1].weight, before)
    network[1].weight.requires_grad_(True)
    pushed, true_push = [], loop._Run._pushed

    def counting(*arguments: Any) -> Any:
        pushed.append(arguments)
        return true_push(*arguments)

    monkeypatch.setattr(loop._Run, "_pushed", counting)
    train(network, shown, replace(config, embedding="epoch"), watermarks=shown[:4])
    assert len(pushed) == 2  # the steps of the epoch, and not the pass over the watermarks


def test_a_buffer_that_a_network_replaces_is_averaged_too() -> None:
    class Remembering(nn.Module):
        """It puts a new tensor in the place of its buffer in every pass."""

        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(6, 3)
            self.register_buffer("passes", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                self.passes = self.passes + 1
            return self.last(x.flatten(1))

    shown = Examples(torch.rand(8, 1, 2, 3), torch.arange(8) % 3)
    network = Remembering()
    hardware = Hardware("cpu", precision="32-true")
    train(
        network,
        shown,
        TrainConfig("standard", None, 1, average=0.5, batch_size=4, hardware=hardware),
    )
    # After the first step a share of 1 - 1/10 of 1, after the second 1 - 2/11 of the way to 2.
    assert float(network.passes) == pytest.approx(0.9 + (1 - 2 / 11) * (2 - 0.9))


def test_strong_alone_is_fitted_to_a_network_that_could_learn_photographs_by_heart() -> None:
    few, many = Traits("colour", 100), Traits("colour", 10_000)
    network = nn.Linear(300, 30)  # 90 weights for each of a hundred images
    for objective in ("fast", "strong", "pgd", "standard"):
        for each in (few, many, Traits("grey", 100)):
            config = recipe(each, objective, COLOUR)
            pushed = fitted(config, each, objective, network).push > 0
            assert pushed == (objective == "strong" and each == few)
    network.requires_grad_(False)
    assert fitted(recipe(few, "strong", COLOUR), few, "strong", network).push == 0


def test_the_average_of_tied_weights_moves_once_a_step(digits: Pools) -> None:
    """The average is that of one parameter that is used twice.

    The average of a tied parameter that moved twice a step would differ.
    """
    config = TrainConfig(
        "standard", None, 1, average=0.9, batch_size=32, momentum=0.0, weight_decay=0.0,
        learning_rate=0.05, schedule="constant",
        hardware=Hardware("cpu", precision="32-true"),
    )  # fmt: skip

    class Unrolled(nn.Module):
        """One parameter, used twice."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = tied_network()
            del self.layers[3]._parameters["weight"]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            _, first, relu, second, _, last = self.layers
            hidden = relu(first(x.flatten(1)))
            return last(relu(nn.functional.linear(hidden, first.weight, second.bias)))

    network, unrolled = tied_network(), Unrolled()
    for each in (network, unrolled):
        train(each, digits.training[:320], config)
    torch.testing.assert_close(network[1].weight, unrolled.layers[1].weight, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="two processes need fork")
def test_tied_weights_come_back_from_two_processes(digits: Pools) -> None:
    config = replace(
        recipe(DIGITS, "standard", THREAT, epochs=1), hardware=Hardware("cpu", 2, "32-true")
    )
    network = tied_network()
    before = weights(network)
    train(network, digits.training[:128], config)
    assert network[3].weight is network[1].weight
    assert not torch.equal(weights(network), before)


def test_a_saved_model_may_have_had_tied_weights(tmp_path: Path) -> None:
    """A model folder has one tensor for each name."""
    network = small()
    network[5].bias = nn.Parameter(network[5].bias.detach().clone())
    network[2].bias = nn.Parameter(network[5].bias.detach()[:32])  # one storage
    told = described("small", (1, 8, 8), 10, "digits", 0.1, 0)
    save_model(tmp_path, network, told)
    assert torch.equal(weights(load_model(tmp_path)[0]), weights(network))


class Flat(nn.Module):
    """Code that takes the usual order of memory for granted."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 64, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(functional.relu(self.first(x)).view(len(x), -1))


@pytest.mark.parametrize("last", [True, False])
def test_colour_is_trained_channels_last_where_the_code_allows_it(
    last: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network comes back in the usual order of memory.

    A run that was interrupted ends in the same weights.
    """
    generator = torch.Generator().manual_seed(0)
    shown = Examples(
        torch.randint(0, 256, (64, 3, 8, 8), dtype=torch.uint8, generator=generator),
        torch.arange(64) % 2,
    )
    make = (
        (lambda: build("narrow", (3, 8, 8), 2, seed=1))
        if last
        else (lambda: torch.manual_seed(1) and Flat())
    )
    config = TrainConfig(
        "standard", None, 2, batch_size=16, hardware=Hardware("cpu", precision="32-true")
    )
    layouts = []
    true_step = loop._step

    def step(run: Any, *arguments: Any) -> float:
        layouts.append(run.layout)
        return true_step(run, *arguments)

    monkeypatch.setattr(loop, "_step", step)
    whole = make()
    train(whole, shown, config)
    assert set(layouts) == {torch.channels_last if last else torch.contiguous_format}
    assert all(value.is_contiguous() for value in whole.state_dict().values())

    def stops(run: Any, *arguments: Any) -> float:
        if run.step == 6:
            raise KeyboardInterrupt
        return true_step(run, *arguments)

    monkeypatch.setattr(loop, "_step", stops)
    again = make()
    with pytest.raises(KeyboardInterrupt):
        train(again, shown, config, checkpoint=tmp_path / "run.safetensors")
    monkeypatch.setattr(loop, "_step", true_step)
    resumed = make()
    train(resumed, shown, config, checkpoint=tmp_path / "run.safetensors")
    assert torch.equal(weights(resumed), weights(whole))
