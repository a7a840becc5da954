"""The answer mark: coins, calibration, repeated answers, tracing, and its level.

Answers stay the same every time, and the level holds for clients who adapt.
"""

import itertools
import math
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import countermark as cm
from answered import first_rows
from chances import most
from countermark.attacks import pgd
from countermark.data import Examples, Pools, as_uint8, known, pixels
from countermark.errors import CountermarkError
from countermark.evaluation import predict
from countermark.evidence import EProcess
from countermark.files import canonical_json
from countermark.guard import (
    Calibration,
    Guard,
    GuardedModel,
    GuardSettings,
    HonestRanges,
    QueryLog,
    Row,
    calibrate,
    calibrate_model,
    consistent_scores,
    expected_cost,
    foreign_share,
    guard_record,
    honest_ranges,
    images_of,
    read_guard,
    read_guard_record,
    share_told,
    trace_accounts,
    tracing,
    write_guard,
)
from countermark.guard.core import (
    SEED,
    STEPS,
    WHOLE,
    boundary,
    cell_seeds,
    client_key,
    coin,
    projections,
    tails_chance,
)
from countermark.guard.model import FeatureReader
from countermark.networks import load
from countermark.networks.named import build
from countermark.thieves import Means
from countermark.thieves.steal import algorithm_2
from countermark.training import TrainConfig, train
from countermark.verbs.guard import Calibrated, show
from countermark.watermarks import WatermarkSet, load_secret, new_secrets, write_key

SECRET = bytes(range(32))
MODEL = "ab" * 32
TRACES = int(os.environ.get("COUNTERMARK_TRACES", "1000"))
"""Strangers in the simulations; docs/guard-results.md has those of 10,000."""


def guard_of(
    slope: float = 2.0,
    reach: float = 1.5,
    bits: int = 8,
    features: int = 12,
    secret: bytes = SECRET,
) -> Guard:
    return Guard(GuardSettings(MODEL, slope, reach, (0.0,) * bits, features), secret)


def queries(
    count: int, classes: int = 5, features: int = 12, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, classes, generator=generator) * 2, torch.randn(
        count, features, generator=generator
    )


# --- coins ----------------------------------------------------------------------------------------


def test_only_near_answers_change_and_only_to_the_second_class() -> None:
    logits, features = queries(2000)
    answers, trials = guard_of().answer(logits, features, "anna")
    top = logits.topk(2, dim=1)
    near = top.values[:, 0] - top.values[:, 1] <= 1.5
    assert {trial.row for trial in trials} == set(torch.nonzero(near).flatten().tolist())
    assert torch.equal(answers[~near], logits.argmax(1)[~near])
    assert bool(((answers == top.indices[:, 0]) | (answers == top.indices[:, 1])).all())
    assert 0 < int((answers != logits.argmax(1)).sum()) < int(near.sum()) / 2
    for trial in trials:
        assert trial.heads < trial.tails
        assert trial.answer == int(answers[trial.row])


def test_the_coin_is_tails_as_often_as_its_chance_says() -> None:
    """Over many clients, with the margin's own chance, brute force."""
    logits, features = torch.tensor([[0.4, 0.0, -9.0]]), torch.zeros(1, 12)
    tails = sum(
        guard.answer(logits, features, f"client {k}")[1][0].answer == 1
        for guard in [guard_of()]
        for k in range(4000)
    )
    chance = 1 / (1 + math.exp(2.0 * 0.4))
    assert abs(tails - 4000 * chance) < 5 * math.sqrt(4000 * chance * (1 - chance))


def test_one_cell_moves_the_boundary_to_one_side() -> None:
    """One coin moves the boundary in one direction.

    For one client, cell and pair of classes, the answers over all margins are a step, wherever the
    coin put it.
    """
    margins = torch.linspace(-1.5, 1.5, 61)
    logits = torch.stack((torch.zeros(61), margins, torch.full((61,), -9.0)), 1)
    steps = set()
    for k in range(30):
        answers, _ = guard_of().answer(logits, torch.ones(61, 12), f"client {k}")
        assert answers.tolist() == sorted(answers.tolist())
        steps.add(int(answers.sum()))
    assert len(steps) > 10


def test_coins_are_a_clients_and_a_keys_own() -> None:
    logits, features = queries(3000)
    answers, _ = guard_of().answer(logits, features, "anna")
    again, _ = guard_of().answer(logits, features, "anna")
    other, _ = guard_of().answer(logits, features, "bob")
    foreign, _ = guard_of(secret=bytes(32)).answer(logits, features, "anna")
    assert torch.equal(answers, again)
    assert not torch.equal(answers, other)
    assert not torch.equal(answers, foreign)
    assert client_key(SECRET, MODEL, "ab") != client_key(SECRET, MODEL, "a")


def test_any_number_of_names_may_ask_and_a_key_that_was_forgotten_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("countermark.guard.core._REMEMBERED", 3)
    guard, asked = guard_of(), queries(40)
    for _ in range(2):
        for client in [f"client {number}" for number in range(10)]:
            answers, trials = guard.answer(*asked, client)
            expected, same = guard_of().answer(*asked, client)
            assert torch.equal(answers, expected)
            assert trials == same != []
            assert guard._key.cache_info().currsize <= 3


def test_foreign_queries_meet_fair_coins_in_cells_of_their_own() -> None:
    """However far from the boundary, and whatever the same logits would meet as an honest query."""
    usual = HonestRanges("00" * 4, "80" * 4)
    guard = Guard(GuardSettings(MODEL, 2.0, 1.5, (0.0,) * 8, 12, usual, (0.0,) * 14), SECRET)
    logits = torch.tensor([[9.5, 0.0, -9.0], [0.2, 0.0, -9.0], [4.5, 0.0, -9.0]])
    features, images = torch.zeros(3, 12), torch.full((3, 1, 2, 2), 0x80, dtype=torch.uint8)
    images[:2, 0, 0, 0] = 0x81
    tails = 0
    for k in range(2000):
        answers, trials = guard.answer(logits, features, f"client {k}", images)
        assert [(trial.row, trial.chance) for trial in trials] == [(0, WHOLE // 2), (1, WHOLE // 2)]
        assert trials[0].cell == trials[1].cell
        assert answers[0] == answers[1]
        assert answers[2] == 0
        tails += int(answers[0])
    assert abs(tails - 1000) < 5 * math.sqrt(500)
    honest = guard.answer(logits, features, "anna", images[[2, 2, 2]])[1]
    assert [trial.row for trial in honest] == [1]
    assert honest[0].cell != trials[1].cell
    assert honest[0].chance == tails_chance(-2.0 * 0.2)
    for wrong in (None, images[:2], images.float()):
        with pytest.raises(CountermarkError, match="give the 3 that were asked"):
            guard.answer(logits, features, "anna", wrong)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1 << 30), st.floats(0.001, 0.5))
def test_no_perturbation_within_the_budget_makes_an_image_foreign(
    seed: int, epsilon: float
) -> None:
    """Of any image in range, by the worst of all perturbations; and a little more is enough."""
    generator = torch.Generator().manual_seed(seed)
    training = torch.randint(0, 256, (3, 2, 4, 4), generator=generator, dtype=torch.uint8)
    usual = honest_ranges(training, epsilon)
    low, high = training.amin(0).double(), training.amax(0).double()
    x = (
        low + (high - low) * torch.rand(20, 2, 4, 4, generator=generator, dtype=torch.float64)
    ) / 255
    for side in (-1, 1):
        assert not usual.foreign(as_uint8((x + side * epsilon).clamp(0, 1))).any()
    beyond = (high / 255 + epsilon + 1.01 / 255).unsqueeze(0)
    assert bool(usual.foreign(as_uint8(beyond.clamp(0, 1))).item()) == bool((beyond <= 1).any())


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1 << 30), st.integers(2, 9), st.sampled_from([0.0, 1 / 255, 0.01, 0.1]))
def test_strangeness_is_what_leaving_each_image_out_finds(
    seed: int, count: int, epsilon: float
) -> None:
    training = torch.randint(
        100, 130, (count, 1, 3, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    others = [torch.cat((training[:k], training[k + 1 :])) for k in range(count)]
    found = [
        bool(honest_ranges(others[k], epsilon).foreign(training[k : k + 1])) for k in range(count)
    ]
    assert foreign_share(training, epsilon) == sum(found) / count


@given(st.floats(-50, 50), st.sampled_from([2, 64, WHOLE]))
def test_chances_are_those_of_the_logistic_function(logit: float, steps: int) -> None:
    chance, step = tails_chance(logit, steps), WHOLE // steps
    assert step <= chance <= WHOLE - step
    assert chance % step == 0
    assert chance + tails_chance(-logit, steps) == WHOLE
    assert abs(chance / WHOLE - 1 / (1 + math.exp(-logit))) <= 1 / steps
    assert (
        steps != STEPS
        or abs(logit) > 4
        or abs(chance / WHOLE - 1 / (1 + math.exp(-logit))) <= 1 / 128
    )


def test_the_keyed_projections_are_signs_of_the_keys_own() -> None:
    seeds = cell_seeds(SECRET, MODEL)
    signs = projections(seeds[:SEED], 300, 40)
    assert signs.shape == (300, 40)
    assert set(signs.flatten().tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 5 / math.sqrt(signs.numel())
    for other in (seeds[SEED:], cell_seeds(bytes(32), MODEL)[:SEED]):
        assert not torch.equal(signs, projections(other, 300, 40))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1 << 30))
def test_scores_agree_with_the_answers(seed: int) -> None:
    logits, features = queries(50, seed=seed)
    answers, _ = guard_of(reach=5.0, slope=0.3).answer(logits, features, "anna")
    scores = consistent_scores(logits, answers)
    assert torch.equal(scores.argmax(1), answers)
    assert torch.allclose(scores.sort(1).values, logits.softmax(1).sort(1).values)


def test_scores_agree_with_the_answers_where_classes_are_tied() -> None:
    logits = torch.tensor(
        [[0.0, 0.0, 0.0], [9.0, 9.0000008, 0.0], [9.0, 9.0000008, 0.0], [0.0, 100.0, 100.0]]
    )
    answers = torch.tensor([1, 0, 1, 2])
    assert torch.equal(consistent_scores(logits, answers).argmax(1), answers)


@pytest.mark.parametrize(
    ("logits", "features"),
    [
        (torch.zeros(3, 5), torch.zeros(3, 11)),
        (torch.zeros(3, 5), torch.zeros(2, 12)),
        (torch.zeros(3, 1), torch.zeros(3, 12)),
        (torch.zeros(3, 0), torch.zeros(3, 12)),
        (torch.zeros(5), torch.zeros(5, 12)),
        (torch.full((3, 5), math.nan), torch.zeros(3, 12)),
        (torch.zeros(3, 5), torch.full((3, 12), math.inf)),
    ],
)
def test_answers_that_do_not_fit_the_guard_are_refused(
    logits: torch.Tensor, features: torch.Tensor
) -> None:
    with pytest.raises(CountermarkError):
        guard_of().answer(logits, features, "anna")


# --- calibration ----------------------------------------------------------------------------------


def ambiguous(
    count: int, sharpness: float, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of a model whose confidence is exact.

    Its first class is right with probability 1 / (1 + exp(-sharpness x margin)).
    """
    generator = torch.Generator().manual_seed(seed)
    margins = torch.rand(count, generator=generator, dtype=torch.float64) * 10
    first = torch.randint(0, 4, (count,), generator=generator)
    second = (first + 1 + torch.randint(0, 3, (count,), generator=generator)) % 4
    logits = torch.full((count, 4), -99.0, dtype=torch.float64)
    logits[torch.arange(count), first], logits[torch.arange(count), second] = (
        margins,
        torch.zeros(count, dtype=torch.float64),
    )
    right = torch.rand(count, generator=generator, dtype=torch.float64) < torch.sigmoid(
        sharpness * margins
    )
    return (
        logits.float(),
        torch.randn(count, 12, generator=generator),
        torch.where(right, first, second),
    )


def test_calibration_finds_the_reliability_and_keeps_the_cost() -> None:
    logits, features, y = ambiguous(20000, sharpness=0.8)
    found = calibrate(logits, features, y, secret=SECRET, model_sha256=MODEL, cost=0.5)
    assert found.sharpness == pytest.approx(0.8, rel=0.1)
    assert found.cost == pytest.approx(0.5, rel=1e-3)
    guard, fresh = Guard(found.settings, SECRET), ambiguous(20000, sharpness=0.8, seed=1)
    costs = []
    for k in range(20):
        answers, _ = guard.answer(fresh[0], fresh[1], f"client {k}")
        costs.append(
            100
            * float(
                (fresh[0].argmax(1) == fresh[2]).double().mean()
                - (answers == fresh[2]).double().mean()
            )
        )
    assert sum(costs) / len(costs) == pytest.approx(0.5, abs=0.15)


def test_a_dearer_guard_has_more_coins() -> None:
    logits, features, y = ambiguous(5000, sharpness=0.8)
    found = [
        calibrate(logits, features, y, secret=SECRET, model_sha256=MODEL, cost=cost)
        for cost in (0.05, 0.2, 1.0)
    ]
    assert found[0].entropy < found[1].entropy < found[2].entropy
    assert found[0].settings.reach < found[1].settings.reach < found[2].settings.reach
    # Four times the cost buys twice the coins, as the design says.
    assert found[1].entropy / found[0].entropy == pytest.approx(2, rel=0.25)


def test_the_entropy_is_what_a_perfect_copy_can_reach() -> None:
    logits, features, y = ambiguous(20000, sharpness=0.8)
    found = calibrate(logits, features, y, secret=SECRET, model_sha256=MODEL, cost=0.5)
    _, trials = Guard(found.settings, SECRET).answer(logits, features, "anna")
    surprise = sum(
        -math.log2((t.chance if t.answer == t.tails else WHOLE - t.chance) / WHOLE) for t in trials
    )
    assert surprise / len(y) == pytest.approx(found.entropy, rel=0.05)


def test_a_model_that_makes_no_mistake_can_be_guarded_and_one_that_always_does_cannot() -> None:
    logits, features, y = ambiguous(1000, sharpness=0.8)
    perfect = calibrate(
        logits, features, logits.argmax(1), secret=SECRET, model_sha256=MODEL, cost=0.1
    )
    assert 0.08 < perfect.cost <= 0.1
    with pytest.raises(CountermarkError, match="as often as the first"):
        calibrate(
            logits,
            features,
            logits.topk(2, dim=1).indices[:, 1],
            secret=SECRET,
            model_sha256=MODEL,
            cost=0.1,
        )
    with pytest.raises(CountermarkError, match="too few"):
        calibrate(logits[:10], features[:10], y[:10], secret=SECRET, model_sha256=MODEL, cost=0.1)


# --- around a network -----------------------------------------------------------------------------


@pytest.fixture
def guarded(owner_network: nn.Module, digits: Pools) -> GuardedModel:
    found = calibrate_model(
        owner_network, digits.validation, secret=SECRET, model_sha256=MODEL, cost=2.0
    )
    return GuardedModel(owner_network, Guard(found.settings, SECRET))


@pytest.fixture
def owner_network(stranger: object) -> nn.Module:
    """A model without a mark: no secret went into it, so it is the same in every run."""
    return load(str(stranger))


def test_the_same_query_has_the_same_answer_in_any_batch(
    guarded: GuardedModel, digits: Pools
) -> None:
    x = digits.training.x
    whole = guarded(x, "anna")
    assert len(whole.trials) > 20
    assert (whole.labels != guarded.network(pixels(x)).argmax(1)).any()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    again = GuardedModel(guarded.network, Guard(guarded.guard.settings, SECRET))
    for size in (1, 7, 64):
        parts = [again(part, "anna") for part in torch.split(x[order][:300], size)]
        assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels[order][:300])
    assert torch.equal(again(pixels(x), "anna").labels, whole.labels)
    mixed = again(x[:100], ["anna", "bob"] * 50)
    assert torch.equal(mixed.labels[::2], whole.labels[:100:2])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 1 << 30),
    st.sampled_from([2, 3, 5]),
    st.sampled_from([(2.0, 1e-4), (2.0, 1e-3), (1e-3, 1e-2), (1e-3, 0.05)]),
)
def test_a_sure_question_stays_whatever_happens_within_the_tolerance(
    seed: int, classes: int, case: tuple[float, float]
) -> None:
    """Every logit moves as far as the tolerance allows, and the features to their cell's edge.

    The features move towards the nearest side of their cell. Margins are put around the reach, and
    third classes near the second. With a slope of 1e-3 all chances are one half, so that only pair,
    cell and reach matter.
    """
    slope, tolerance = case
    usual = HonestRanges("00" * 4, "80" * 4)
    guard = Guard(GuardSettings(MODEL, slope, 1.5, (0.0,) * 8, 12, usual, (0.0,) * 14), SECRET)
    generator = torch.Generator().manual_seed(seed)
    logits, features = queries(80, classes, seed=seed)
    order = logits.argsort(dim=1, descending=True)
    room = (
        2 * tolerance * (1 + logits.abs().amax(1)) * (4 * torch.rand(80, generator=generator) - 2)
    )
    rows = torch.arange(80)
    logits[rows[:30], order[:30, 1]] = logits[rows[:30], order[:30, 0]] - 1.5 + room[:30]
    if classes > 2:
        logits[rows[20:50], order[20:50, 2]] = (
            logits[rows[20:50], order[20:50, 1]] - room[20:50].abs()
        )
    images = torch.full((80, 1, 2, 2), 0x80, dtype=torch.uint8)
    images[::5, 0, 0, 0] = 0x81
    signs = projections(cell_seeds(SECRET, MODEL)[:SEED], 12, 8).float()
    above = features @ signs
    nearest = above.abs().argmin(1)
    step = 0.999 * tolerance * (1 + features.abs().sum(1)) / 12 * -above[rows, nearest].sign()
    sides = torch.randint(0, 2, logits.shape, generator=generator) * 2.0 - 1
    moved = logits + 0.999 * tolerance * (1 + logits.abs().amax(1, keepdim=True)) * sides
    questions = {
        question.row: question for question in guard.questions(logits, features, images, tolerance)
    }
    answers, _ = guard.answer(logits, features, "anna", images)
    other_answers, trials = guard.answer(
        moved, features + step[:, None] * signs.T[nearest], "anna", images
    )
    others = {trial.row: trial for trial in trials}
    sure = {row for row, question in questions.items() if question.sure}
    assert sure & set(range(50, 80))
    for row in (set(range(80)) - set(questions)) | sure:
        assert other_answers[row] == answers[row]
        assert (row in others) == (row in sure)
        if row in sure:
            assert (others[row].cell, others[row].chance) == (
                questions[row].cell,
                questions[row].chance,
            )
    assert all(question.sure for question in guard.questions(logits, features, images))


@pytest.mark.parametrize(
    ("logits", "far", "sure"),
    [
        ([0.2, 0.0, -9.0], False, True),
        ([0.2, 0.0, 0.0], False, False),  # which pair?
        ([1.49999, 0.0, -9.0], False, False),  # a coin or none?
        ([1.50001, 0.0, -9.0], False, False),
        ([5.0, 0.0, -9.0], True, True),
        ([5.0, 0.0, 0.0], True, False),
        ([0.2, 0.0], False, True),
    ],
)
def test_what_is_sure(logits: list[float], far: bool, sure: bool) -> None:
    guard = Guard(
        GuardSettings(
            MODEL, 2.0, 1.5, (0.0,) * 8, 12, HonestRanges("00" * 4, "80" * 4), (0.0,) * 14
        ),
        SECRET,
    )
    image = torch.full((1, 1, 2, 2), 0x81 if far else 0x80, dtype=torch.uint8)
    features = queries(1, seed=3)[1]
    (question,) = guard.questions(torch.tensor([logits]), features, image, tolerance=1e-5)
    assert question.sure is sure
    assert guard.questions(torch.empty(0, 3), torch.empty(0, 12), image[:0]) == []


@pytest.mark.parametrize("kind", [torch.int8, torch.int32, torch.bfloat16, torch.float64])
def test_logits_of_any_type_are_those_of_floats(kind: torch.dtype) -> None:
    """Small whole numbers, which each type holds exactly; an even margin is a tie of chance 1/2."""
    logits, features = queries(200, seed=5)
    logits = (3 * logits).round() + torch.arange(5) / 64 * (kind == torch.float64)
    wanted = guard_of(reach=2.5).questions(logits, features)
    assert wanted
    assert guard_of(reach=2.5).questions(logits.to(kind), features) == wanted


class Swaying(nn.Module):
    """A network whose answers depend a little on how many it is asked at once."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.passes = network, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        answers: torch.Tensor = self.network(x * (1 + 1e-3 * (len(x) % 7 - 3) / 3))
        return answers


def test_what_a_batch_would_change_is_computed_alone(guarded: GuardedModel, digits: Pools) -> None:
    network, guard, x = Swaying(guarded.network), guarded.guard, digits.training.x[:500]
    model = GuardedModel(network, guard, tolerance=1e-2)
    alone = [model(x[row : row + 1], "anna") for row in range(len(x))]
    trials = {
        row: (found.trials[0].cell, found.trials[0].chance)
        for row, found in enumerate(alone)
        if found.trials
    }
    assert len(trials) > 20
    for size in (7, 64, 99):
        before, seen = network.passes, 0
        for start in range(0, len(x), size):
            found = model(x[start : start + size], "anna")
            assert found.labels.tolist() == [int(one.labels) for one in alone[start : start + size]]
            assert all(
                trials[start + trial.row] == (trial.cell, trial.chance) for trial in found.trials
            )
            seen += len(found.trials)
        assert seen == len(trials)
        assert len(x) // size < network.passes - before


def test_few_queries_are_computed_again(guarded: GuardedModel, digits: Pools) -> None:
    network = Swaying(guarded.network)
    found = GuardedModel(network, guarded.guard)(digits.training.x[:500], "anna")
    assert len(found.trials) > 20
    assert network.passes < 2 + len(found.trials) / 5


@pytest.fixture
def far_sighted(owner_network: nn.Module, digits: Pools) -> GuardedModel:
    """The owner's model behind a guard with coins for foreign queries as well, and few others."""
    options = {"training": digits.training, "epsilon": known("digits").threat.epsilon}
    found = calibrate_model(
        owner_network, digits.validation, secret=SECRET, model_sha256=MODEL, cost=0.5, **options
    )
    return GuardedModel(owner_network, Guard(found.settings, SECRET))


def test_what_foreign_queries_cost_is_taken_off_the_near_ties(
    owner_network: nn.Module, digits: Pools
) -> None:
    """One training image alone has a bright corner.

    About one honest query in as many as there are training images is like it, and half of those
    get the other class.
    """
    bright = digits.training.x.clone()
    bright[:, :, 0, 0] = 0
    bright[0, :, 0, 0] = 255
    spent = 50 * foreign_share(bright, 0.25)
    assert spent >= 50 / len(bright)

    def calibrated(cost: float, training: Examples | None) -> Calibration:
        options = {
            "secret": SECRET,
            "model_sha256": MODEL,
            "cost": cost,
            "training": training,
            "epsilon": 0.25,
        }
        return calibrate_model(owner_network, digits.validation, **options)  # type: ignore[arg-type]

    seen = Examples(bright, digits.training.y)
    both, near, without = (
        calibrated(4 * spent, seen),
        calibrated(3 * spent, None),
        calibrated(1.9 * spent, seen),
    )
    assert both.settings.familiar is not None
    assert (both.settings.slope, both.foreign_cost) == (near.settings.slope, spent)
    assert both.entropy == pytest.approx(near.entropy + spent / 50)
    assert both.cost == pytest.approx(near.cost + spent)
    assert near.cost <= 3 * spent
    assert (without.settings.familiar, without.settings.outlines, without.foreign_cost) == (
        None,
        (),
        spent,
    )
    assert without.cost <= 1.9 * spent
    with pytest.raises(CountermarkError, match="at least two"):
        calibrated(1.0, seen[:1])


def test_ranges_that_tell_no_made_up_query_are_not_kept(
    owner_network: nn.Module, digits: Pools
) -> None:
    """In photographs every pixel takes all values; noise stands for them here."""
    noise = torch.randint(
        0, 256, (2000, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    wide, narrow = (honest_ranges(images, 0.1) for images in (noise, 100 + noise // 64))
    assert (share_told(wide, digits.validation.x, 0.1), share_told(narrow, noise, 0.1)) == (0, 1)
    options: dict[str, Any] = {"secret": SECRET, "model_sha256": MODEL, "cost": 1.0, "epsilon": 0.1}
    found, near = (
        calibrate_model(owner_network, digits.validation, training=training, **options)
        for training in (Examples(noise, torch.zeros(2000, dtype=torch.int64)), None)
    )
    assert (found.settings, found.foreign_cost) == (near.settings, 0.0)
    assert len(canonical_json(guard_record(found, "cd" * 32))) < 2000


def walk(
    victim: Callable[[torch.Tensor], torch.Tensor], digits: Pools, queries: int, seed: int
) -> nn.Module:
    """A thief by Algorithm 2, starting from images of their own."""
    copy = build("surrogate", (1, 8, 8), 10, seed=seed)
    means = Means(
        pool=digits.thief,
        threat=known("digits").threat,
        seeds=100,
        queries=queries,
        epochs=2,
        batch_size=32,
        seed=seed,
    )
    algorithm_2(victim, copy, means)
    return copy


def test_a_thiefs_walk_is_foreign_and_honest_queries_are_not(
    far_sighted: GuardedModel, digits: Pools
) -> None:
    asked: list[torch.Tensor] = []

    def victim(x: torch.Tensor) -> torch.Tensor:
        asked.append(x)
        return predict(far_sighted.network, x)

    walk(victim, digits, 3200, seed=77)
    usual = far_sighted.guard.settings.familiar
    assert usual is not None
    foreign = usual.foreign
    x, y, epsilon = pixels(digits.test.x), digits.test.y, known("digits").threat.epsilon
    lost = pgd(far_sighted.network, x, y, epsilon=epsilon, steps=10, step_size=epsilon / 4)
    assert not foreign(digits.training.x).any()
    for honest in (x, lost):
        assert foreign(as_uint8(honest)).mean() < 0.02
    # The last round, four or five steps away.
    assert foreign(as_uint8(asked[-1])).mean() > 0.1


def test_foreign_queries_have_one_answer_in_any_batch(
    far_sighted: GuardedModel, digits: Pools
) -> None:
    x = (
        pixels(digits.test.x)
        + 0.6 * torch.randn(digits.test.x.shape, generator=torch.Generator().manual_seed(4))
    ).clamp(0, 1)
    whole = far_sighted(x, "anna")
    assert sum(trial.chance == WHOLE // 2 for trial in whole.trials) > 20
    for size in (1, 7):
        parts = [far_sighted(part, "anna").labels for part in torch.split(x[:100], size)]
        assert torch.equal(torch.cat(parts), whole.labels[:100])


def test_strangers_agree_with_the_coins_of_a_thiefs_walk_as_often_as_they_should(
    far_sighted: GuardedModel, digits: Pools, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stranger's wealth does not grow on the coins of a thief's walk.

    The client chooses each next query by the answers to the last, again and again, and gets coins
    for foreign queries.
    """
    runs = TRACES // 20 if TRACES > 1000 else 30
    stranger = build("small", (1, 8, 8), 10, seed=9)
    train(
        stranger,
        digits.thief,
        TrainConfig(objective="standard", attack=None, epochs=10, batch_size=32, seed=9),
    )
    agreed = expected = spread = 0.0
    lowest, made_up = [], 0
    for run in range(runs):
        client = f"client {run}"
        rows: dict[bytes, Row] = {}

        def victim(
            x: torch.Tensor, client: str = client, rows: dict[bytes, Row] = rows
        ) -> torch.Tensor:
            answers = far_sighted(x, client)
            for cell, row in first_rows(answers, MODEL, client).items():
                rows.setdefault(cell, row)
            return answers.labels

        walk(victim, digits, 800, seed=run)
        log = list(rows.values())
        labels = stranger(pixels(images_of(log, (1, 8, 8)))).argmax(1)
        account = trace_accounts(log, labels, SECRET).accounts[0]
        agreed, expected = agreed + account.agreements, expected + account.expected
        spread += sum(row.chance / WHOLE * (1 - row.chance / WHOLE) for row in log)
        lowest.append(account.log10_p_value)
        made_up += sum(row.cell.startswith(b"\xff\xff") for row in log)
    with capsys.disabled():
        if TRACES > 1000:
            print(
                f"{runs} walks: {agreed:.0f} agreements, "
                f"expected {expected:.0f} +- {math.sqrt(spread):.0f}; "
                f"lowest p 10^{min(lowest):.1f}"
            )
    assert made_up > 200
    assert abs(agreed - expected) < 5.5 * math.sqrt(spread)
    for alpha in (0.05, 0.01, 0.001):
        assert sum(p <= math.log10(alpha) for p in lowest) <= most(runs, alpha)


def test_the_cost_is_the_mean_over_clients(guarded: GuardedModel, digits: Pools) -> None:
    test = digits.test
    bare = float((guarded.network(pixels(test.x)).argmax(1) == test.y).double().mean())
    costs = [
        100 * (bare - float((guarded(test.x, f"client {k}").labels == test.y).double().mean()))
        for k in range(60)
    ]
    spread = np.std(costs) / math.sqrt(len(costs))
    expected = expected_cost(guarded, test)
    assert abs(np.mean(costs) - expected.points) < 5.5 * spread + 1e-9
    each = [expected_cost(guarded, test[k : k + 1]).points for k in range(len(test))]
    # Margins differ in the last bits where an image is alone;
    # chances are so coarse that next to none of them notices.
    assert expected.points == pytest.approx(np.mean(each), rel=1e-3)
    assert expected.standard_error == pytest.approx(np.std(each) / math.sqrt(len(test)), rel=1e-3)


def test_features_are_what_enters_the_last_linear_layer(digits: Pools) -> None:
    network = build("small", (1, 8, 8), 10, seed=0)
    logits, features = FeatureReader(network)(digits.test.x[:9])
    assert torch.equal(features, network[:-1](pixels(digits.test.x[:9])).detach())  # type: ignore[index]
    assert torch.equal(logits, network(pixels(digits.test.x[:9])).detach())
    with pytest.raises(CountermarkError, match="no linear layer"):
        FeatureReader(nn.Flatten())


def test_features_are_of_the_layer_that_ran_last_wherever_it_stands(digits: Pools) -> None:
    class Odd(nn.Module):
        def __init__(self, runs: bool) -> None:
            super().__init__()
            self.runs = runs
            self.head, self.body, self.unused = (
                nn.Linear(32, 10),
                nn.Linear(64, 32),
                nn.Linear(7, 7),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x.flatten(1)).relu()) if self.runs else x.flatten(1)

    network, x = Odd(True), digits.test.x[:9]
    assert torch.equal(
        FeatureReader(network)(x)[1], network.body(pixels(x).flatten(1)).relu().detach()
    )
    with pytest.raises(CountermarkError, match="no linear layer of the network ran"):
        FeatureReader(Odd(False))(x)


def test_queries_are_rounded_to_eight_bits(guarded: GuardedModel) -> None:
    x = torch.rand(5, 1, 8, 8)
    assert torch.equal(as_uint8(x), (x * 255).round().to(torch.uint8))
    assert torch.equal(
        as_uint8(torch.tensor([-1.0, 2.0])), torch.tensor([0, 255], dtype=torch.uint8)
    )
    assert torch.equal(guarded(x, "anna").images, as_uint8(x))


# --- tracing --------------------------------------------------------------------------------------


def row_of(
    client: str,
    cell: int,
    chance: int = WHOLE // 2,
    secret: bytes = SECRET,
    log: bytes | None = b"",
) -> Row:
    code = cell.to_bytes(6, "big")
    answer = 2 if coin(client_key(secret, MODEL, client, log or b""), code) < chance else 1
    return Row(MODEL, client, code, bytes([cell % 256] * 4), 1, 2, chance, answer, 20000, log=log)


def answers_of(
    rows: list[Row], copied: str | None, share: float = 1.0, seed: int = 0
) -> torch.Tensor:
    """Answers of a suspect that remembers one client's coins with probability `share`.

    Where it does not remember them, it answers without them.
    """
    generator = random.Random(seed)
    free = [1 if generator.random() < 0.5 else 2 for _ in rows]
    return torch.tensor(
        [
            row.answer if row.client == copied and generator.random() < share else answer
            for row, answer in zip(rows, free, strict=True)
        ]
    )


def interleaved(clients: int, each: int) -> list[Row]:
    return [row_of(f"client {k}", cell) for cell in range(each) for k in range(clients)]


def test_the_thief_is_named_and_nobody_else() -> None:
    rows = interleaved(20, 60)
    found = trace_accounts(rows, answers_of(rows, "client 7"), SECRET)
    assert found.named == ("client 7",)
    assert found.together == "match"
    assert found.accounts[0].agreements == 60
    assert found.accounts[0].expected == pytest.approx(30)


@pytest.mark.parametrize("erased", [0, 3])
def test_the_p_value_is_the_e_processs_times_the_accounts_share_of_the_level(erased: int) -> None:
    rows = interleaved(4, 30)
    answers = answers_of(rows, "client 2", share=0.8)
    process = EProcess()
    for row, answer in zip(rows, answers.tolist(), strict=True):
        if row.client == "client 2":
            process.update(1 if answer == row.answer else -1)
    found = trace_accounts(rows, answers, SECRET, erased=erased)
    account = next(account for account in found.accounts if account.client == "client 2")
    place = 3 + erased
    assert account.log10_p_alone == pytest.approx(process.log10_p_value)
    assert account.log10_p_value == pytest.approx(
        process.log10_p_value + math.log10((place + 1) * (place + 2))
    )


def test_erased_accounts_weaken_what_all_together_say() -> None:
    """Erasing accounts gains nothing, whatever the erased accounts would have said."""
    rows = interleaved(6, 25)
    answers = torch.tensor(
        [row.answer if row.client < "client 3" else 3 - row.answer for row in rows]
    )
    whole = trace_accounts(rows, answers, SECRET).together_log10_p_value
    kept = [
        (row, answer) for row, answer in zip(rows, answers, strict=True) if row.client < "client 3"
    ]
    without = trace_accounts(
        [row for row, _ in kept], torch.stack([answer for _, answer in kept]), SECRET, erased=3
    )
    assert without.together_log10_p_value >= whole - 1e-9


def test_refused_answers_are_neither_and_prove_nothing() -> None:
    rows = interleaved(2, 60)
    found = trace_accounts(rows, torch.full((len(rows),), -1), SECRET)
    assert found.named == ()
    assert found.together == "inconclusive"
    assert all(account.neither == 60 for account in found.accounts)


def test_many_weak_accounts_convict_together() -> None:
    """One thief has ten accounts of 14 trials: none can be named, but together they are proof."""
    rows = interleaved(20, 14)
    behind = {f"client {k}" for k in range(10)}
    answers = torch.tensor(
        [
            row.answer if row.client in behind else free
            for row, free in zip(rows, answers_of(rows, None).tolist(), strict=True)
        ]
    )
    found = trace_accounts(rows, answers, SECRET)
    assert found.named == ()
    assert found.together == "match"


def voted(rows: list[Row], follows: float = 0.95, seed: int = 0) -> torch.Tensor:
    """Answers of a copy that learned the majority of all accounts' answers to each image."""
    generator = random.Random(seed)
    coins: dict[bytes, list[int]] = {}
    for row in rows:
        coins.setdefault(row.image, []).append(row.answer)
    said = {}
    for image, answers in coins.items():
        outcome = max((1, 2), key=answers.count)
        said[image] = outcome if generator.random() < follows else 3 - outcome
    return torch.tensor([said[row.image] for row in rows])


@pytest.mark.parametrize("accounts", [3, 5])
def test_a_vote_of_several_accounts_is_seen_through(
    accounts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thieves ask the same with several accounts and learn the majority.

    Bets on each account by itself are far from the proof that bets on the vote are, and name
    nobody; those on the vote point at the account that was asked last, whose coins decided most.
    """
    rows = interleaved(accounts, 100)
    found = trace_accounts(rows, voted(rows), SECRET)
    assert found.together_log10_p_value < -15
    assert found.accounts[0].client == f"client {accounts - 1}"
    if accounts == 3:
        assert found.named[:1] == ("client 2",)
    strangers = trace_accounts(rows, answers_of(rows, None), SECRET)
    assert (strangers.named, strangers.together) == ((), "no evidence")
    monkeypatch.setattr(tracing, "_leaning", lambda *given: given[-1])
    without = trace_accounts(rows, voted(rows), SECRET)
    assert without.named == ()
    assert without.together_log10_p_value > -11
    one_by_one = sorted(rows, key=lambda row: row.client)
    monkeypatch.undo()
    found = trace_accounts(one_by_one, voted(one_by_one), SECRET)
    assert found.together_log10_p_value < -15
    # Who does not vote pays little for that: half of the stakes of all accounts together.
    alone = answers_of(rows, "client 1")
    plain = trace_accounts(rows, alone, SECRET)
    monkeypatch.setattr(tracing, "_WEIGHTS", (1.0, *[1e-9] * (len(tracing._WEIGHTS) - 1)))
    most = trace_accounts(rows, alone, SECRET)
    assert plain.named == most.named == ("client 1",)
    lost = plain.together_log10_p_value - most.together_log10_p_value
    assert 0 <= lost <= math.log10(2) + 1e-6


def test_a_vote_is_seen_through_in_a_crowd_that_asks_much_the_same() -> None:
    """Nine other accounts ask two fifths of the images; their coins are not part of the vote."""
    numbers = random.Random(2)
    thieves = interleaved(3, 120)
    told = dict(zip((row.image for row in thieves), voted(thieves).tolist(), strict=True))
    rows = []
    for cell in range(120):
        crowd = [k for k in range(3, 12) if numbers.random() < 0.4]
        rows += [row_of(f"client {k}", cell) for k in (*crowd, 0, 1, 2)]
    found = trace_accounts(rows, torch.tensor([told[row.image] for row in rows]), SECRET)
    assert found.together_log10_p_value < -15
    assert found.named == ("client 2",)


def test_the_verb_sees_through_a_vote_too(tmp_path: Path) -> None:
    """It keeps no image in memory, but tells which accounts asked the same.

    Five other accounts ask other images of the same cells.
    """
    x = torch.randint(0, 256, (80, 1, 2, 2), dtype=torch.uint8)
    marks = WatermarkSet(
        x, torch.tensor([[1, 2]]).repeat(80, 1), torch.zeros(80).long(), torch.arange(80)
    )
    new_secrets(tmp_path / "key")
    write_key(tmp_path / "key", "coin", marks, {"data": "mine"})
    secret = load_secret(tmp_path / "key")
    with QueryLog(str(tmp_path / "log.db")) as log:
        rows = [
            replace(
                row_of(f"client {k}", cell, secret=secret, log=log.identity),
                image=bytes([cell, *[9 if k < 3 else k] * 3]),
            )
            for cell in range(120)
            for k in range(8)
        ]
        assert all(log.append(rows))
    thieves = [row for row in rows if row.client < "client 3"]
    told = dict(zip((row.image for row in thieves), voted(thieves).tolist(), strict=True))

    def copy(images: torch.Tensor) -> torch.Tensor:
        asked = (images * 255).round().to(torch.uint8).flatten(1)
        return torch.tensor([told.get(bytes(row.tolist()), 1) for row in asked])

    found = cm.trace(copy, key=tmp_path / "key", log=str(tmp_path / "log.db")).trace
    assert found.together_log10_p_value < -15


def test_erased_accounts_end_the_bets_on_votes() -> None:
    """Which accounts are erased may depend on the coins, and with them what others' coins mean.

    Blocks of accounts ask the same, and of each block the three remain that agree most with a
    stranger who always says tails.
    """
    for run in range(5):
        secret, kept = run.to_bytes(32, "big"), list[Row]()
        for block in range(12):
            asked = [
                [row_of(f"{block} {k}", 20 * block + cell, secret=secret) for cell in range(14)]
                for k in range(30)
            ]
            asked.sort(key=lambda rows: -sum(row.answer == row.tails for row in rows))
            kept += [row for trials in zip(*asked[:3], strict=True) for row in trials]
        found = trace_accounts(kept, torch.full((len(kept),), 2), secret, erased=12 * 27)
        assert (found.named, found.together) == ((), "no evidence")
        assert found.together_log10_p_value == 0
        blind = trace_accounts(kept, torch.full((len(kept),), 2), secret)
        assert blind.together_log10_p_value < -6


def test_the_level_of_a_vote_is_a_quarter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The n-th account's p is that of the bets on a vote, times 4 n (n + 1)."""
    rows = interleaved(3, 100)
    made: list[Any] = []
    true = tracing._Votes

    def noted() -> Any:
        made.append(true())
        return made[-1]

    monkeypatch.setattr(tracing, "_Votes", noted)
    found = trace_accounts(rows, voted(rows), SECRET)
    (last,) = [account for account in found.accounts if account.client == "client 2"]
    alone = made[0].log10_p_value("client 2")
    assert last.log10_p_value == pytest.approx(alone + math.log10(4 * 3 * 4))
    # All that the level is spent on: accounts by themselves, all together, and accounts that vote.
    parts = [1 / ((n + 1) * (n + 2)) + 1 / (4 * n * (n + 1)) for n in range(1, 100_000)]
    assert 0.9999 < sum(parts) + 1 / 4 < 1


def test_other_images_of_the_same_cells_are_a_vote_too() -> None:
    """A pixel that differs from account to account hides nothing."""
    rows = [
        replace(row, image=row.image[:3] + row.client[-1].encode()) for row in interleaved(3, 100)
    ]
    same = {row.cell: row.image[:3] + b"0" for row in rows}
    answers = voted([replace(row, image=same[row.cell]) for row in rows])
    assert trace_accounts(rows, answers, SECRET).together_log10_p_value < -9


@pytest.mark.parametrize(
    ("size", "coins", "leaning"),
    [
        (3, (0, 0), 3 / 4),
        (3, (1, 0), 2 / 3),
        (3, (0, 1), 1.0),
        (3, (1, 1), 1.0),
        (3, (2, 0), 1 / 2),
        (3, (0, 2), 1 / 2),  # impossible: the vote had the other outcome
        (3, (2, 1), 1 / 2),  # over
        (5, (0, 0), 11 / 16),
        (5, (0, 2), 1.0),
    ],
)
def test_what_a_vote_says_of_its_next_coin(
    size: int, coins: tuple[int, int], leaning: float
) -> None:
    """By counting every vote of that size, of fair coins and of others."""
    assert tracing._leaning(size, *coins, 0.5) == pytest.approx(leaning)
    votes = [
        vote
        for vote in itertools.product((True, False), repeat=size)
        if sum(vote) * 2 > size and sum(vote[: sum(coins)]) == coins[0]
    ]
    for chance in (0.5, 0.2, 0.9):
        weights = [math.prod(chance if coin else 1 - chance for coin in vote) for vote in votes]
        wanted = chance
        if votes and sum(coins) < size:
            wanted = np.average([vote[sum(coins)] for vote in votes], weights=weights)
        assert tracing._leaning(size, *coins, chance) == pytest.approx(wanted)


def test_votes_that_are_cast_when_it_pays_convict_nobody_too_often(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Three accounts ask the same where the coins before did not agree with the suspect.

    The second asks only then, and the third only where the second did agree: the majority agrees
    with the suspect, a stranger who says tails everywhere, in five of eight cells.
    """
    levels, runs, cells = (0.05, 0.01, 0.001), TRACES // 5, 60
    named, together, counted = (dict.fromkeys(levels, 0) for _ in range(3))
    for run in range(runs):
        secret = run.to_bytes(32, "big")
        rows, won = [], 0
        for cell in range(cells):
            asked = [row_of(f"client {k}", cell, secret=secret) for k in range(3)]
            agrees = [row.answer == row.tails for row in asked]
            number = 1 if agrees[0] else 3 if agrees[1] else 2
            rows += asked[:number]
            won += sum(agrees[:number]) * 2 > number
        p_counted = sum(math.comb(cells, k) for k in range(won, cells + 1)) / 2**cells
        found = trace_accounts(rows, torch.full((len(rows),), 2), secret)
        for alpha in levels:
            named[alpha] += found.accounts[0].log10_p_value <= math.log10(alpha)
            together[alpha] += found.together_log10_p_value <= math.log10(alpha)
            counted[alpha] += p_counted <= alpha
    with capsys.disabled():
        if TRACES > 1000:
            print(f"{runs} logs of votes: counted {counted}, named {named}, together {together}")
    for alpha in levels:
        assert named[alpha] <= most(runs, alpha)
        assert together[alpha] <= most(runs, alpha)
    assert counted[0.05] > 5 * runs * 0.05


def test_a_log_of_another_key_is_refused() -> None:
    rows = interleaved(2, 30)
    with pytest.raises(CountermarkError, match="another key"):
        trace_accounts(rows, answers_of(rows, None), bytes(32))
    with pytest.raises(CountermarkError, match="one answer for each"):
        trace_accounts(rows, torch.zeros(3), SECRET)
    with pytest.raises(CountermarkError, match="another shape"):
        images_of(rows, (1, 8, 8))


def adaptive_client(
    generator: random.Random, key: bytes, most: int
) -> Iterator[tuple[bytes, int, bool, bool]]:
    """Trials of a client who knows every answer of the suspect, and asks where it suits them.

    The client walks on: where the coin agreed with the suspect they often ask the same cell again,
    and they stop altogether when clearly more trials agreed than not. Yields the cell, the chance,
    whether the coin agreed, and whether the trial is the first of its cell.
    """
    seen: set[int] = set()
    agreed = disagreed = 0
    cell = 0
    for _ in range(most):
        first = cell not in seen
        seen.add(cell)
        chance = (3 * WHOLE // 4, WHOLE // 2, WHOLE // 4)[cell % 3]
        code = cell.to_bytes(6, "big")
        agrees = coin(key, code) < chance  # the suspect says tails everywhere
        yield code, chance, agrees, first
        agreed, disagreed = agreed + agrees, disagreed + (not agrees)
        if (
            agreed > disagreed + 8 * math.sqrt(max(agreed + disagreed, 1)) / 4
            and agreed + disagreed > 10
        ):
            return
        if not agrees or generator.random() < 0.3:
            cell = generator.randrange(1 << 40)


def test_strangers_keep_the_level_whatever_a_client_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The level survives adaptive queries and optional stopping.

    A plain count of agreements convicts strangers; our test keeps its level.
    """
    generator = random.Random(5)
    levels = (0.05, 0.01, 0.001)
    naive, ours = dict.fromkeys(levels, 0), dict.fromkeys(levels, 0)
    for run in range(TRACES):
        key = client_key(run.to_bytes(32, "big"), MODEL, "anna")
        process, score, variance = EProcess(), 0.0, 0.0
        for _, chance, agrees, first in adaptive_client(generator, key, 60):
            probability = chance / WHOLE
            score, variance = (
                score + agrees - probability,
                variance + probability * (1 - probability),
            )
            if first:
                process.update(1 if agrees else -1, probability)
        counted = 0.5 * math.erfc(score / math.sqrt(2 * variance))
        for alpha in levels:
            ours[alpha] += process.p_value <= alpha
            naive[alpha] += counted <= alpha
    with capsys.disabled():
        if TRACES > 1000:
            print(f"{TRACES} strangers: at or below alpha, counted {naive}, by bets {ours}")
    for alpha in levels:
        assert ours[alpha] <= TRACES * alpha + 3 * math.sqrt(TRACES * alpha)
        assert naive[alpha] > 3 * TRACES * alpha


def test_strangers_get_nobody_named_more_often_than_alpha(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Logs of twenty clients, a stranger and fresh secrets: the rates stay at most alpha.

    This holds for the rate at which somebody is named and for all accounts together.
    """
    runs = TRACES // 5
    levels = (0.05, 0.01, 0.001)
    named, together = dict.fromkeys(levels, 0), dict.fromkeys(levels, 0)
    for run in range(runs):
        secret = run.to_bytes(32, "big")
        rows = [
            row_of(f"client {k}", cell, (cell % 3 + 1) * WHOLE // 4, secret)
            for cell in range(12)
            for k in range(20)
        ]
        found = trace_accounts(rows, answers_of(rows, None, seed=run), secret)
        for alpha in levels:
            named[alpha] += found.accounts[0].log10_p_value <= math.log10(alpha)
            together[alpha] += found.together_log10_p_value <= math.log10(alpha)
    with capsys.disabled():
        if TRACES > 1000:
            print(f"{runs} logs of 20 clients: somebody named {named}, together {together}")
    for alpha in levels:
        assert named[alpha] <= runs * alpha + 3 * math.sqrt(runs * alpha)
        assert together[alpha] <= runs * alpha + 3 * math.sqrt(runs * alpha)


@pytest.mark.parametrize("after", ["renewed", "void", "the same"])
def test_a_log_that_lost_rows_convicts_no_stranger_of_what_clients_know(
    after: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A client asks 20 trials, which the log loses, and asks again where the suspect agreed.

    Their suspect, a stranger, says tails everywhere. Under the same coins they would be named, as
    they were before logs had an identity. Under those of a renewed log, and in rows that are void,
    nobody is; they go on asking until it pays.
    """
    levels = (0.05, 0.01, 0.001)
    named = dict.fromkeys(levels, 0)
    for run in range(TRACES):
        secret, first, second = run.to_bytes(32, "big"), b"1" * 16, b"2" * 16
        lost = [row_of("anna", cell, secret=secret, log=first) for cell in range(20)]
        agreed = [int.from_bytes(row.cell, "big") for row in lost if row.answer == row.tails]
        identity = {"renewed": second, "void": None, "the same": first}[after]
        again = [row_of("anna", cell, secret=secret, log=identity) for cell in agreed]
        if after != "the same":
            again += [row_of("anna", 99 + k, secret=secret, log=second) for k in range(40)]
        # The p-value is that of the best moment to stop.
        found = trace_accounts(again, torch.full((len(again),), 2), secret)
        for alpha in levels:
            named[alpha] += found.accounts[0].log10_p_value <= math.log10(alpha)
    with capsys.disabled():
        if TRACES > 1000:
            print(f"{TRACES} logs that lost rows, {after}: somebody named {named}")
    for alpha in levels:
        if after == "the same":
            assert named[alpha] > 3 * TRACES * alpha
        else:
            assert named[alpha] <= TRACES * alpha + 3 * math.sqrt(TRACES * alpha)


def test_opening_accounts_until_one_is_lucky_convicts_nobody_too_often(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Clients who know the suspect's answers open accounts until one of them is lucky.

    They open one account after another, and stop with the first that would be named if p were
    multiplied by the number of accounts. A stranger agrees with fair coins half of the time. Only
    services with an account that could be named are traced.
    """
    runs, most, each = max(TRACES // 5, 600), 20, 100
    levels = (0.05, 0.01, 0.001)
    named, counted = dict.fromkeys(levels, 0), dict.fromkeys(levels, 0)
    numbers = np.random.default_rng(5)
    gamblers = np.arange(1, 21) / 20  # those of the e-process
    for _ in range(runs):
        agrees = numbers.random((most, each)) < 0.5
        wealth = np.cumprod(1 + np.where(agrees, 1, -1)[:, :, None] * gamblers, axis=1).mean(2)
        for alpha in levels:
            lucky = wealth >= np.arange(1, most + 1)[:, None] / alpha
            accounts = int(np.argmax(lucky.any(1))) + 1 if lucky.any() else most
            counted[alpha] += bool(lucky.any())
            if wealth[:accounts].max() < 6 / alpha:
                continue
            opened = [
                (k, cell)
                for k in range(accounts)
                for cell in range(int(np.argmax(lucky[k])) + 1 if lucky[k].any() else each)
            ]
            rows = [row_of(f"client {k}", cell) for k, cell in opened]
            answers = [
                row.answer if agrees[place] else 3 - row.answer
                for row, place in zip(rows, opened, strict=True)
            ]
            found = trace_accounts(rows, torch.tensor(answers), SECRET)
            named[alpha] += found.accounts[0].log10_p_value <= math.log10(alpha)
    with capsys.disabled():
        if TRACES > 1000:
            print(
                f"{runs} services where accounts are opened until one is lucky: "
                f"times the accounts {counted}, ours {named}"
            )
    for alpha in levels:
        assert named[alpha] <= runs * alpha + 3 * math.sqrt(runs * alpha)
    assert counted[0.05] > 1.5 * runs * 0.05
    assert counted[0.01] > 1.5 * runs * 0.01


def test_a_copy_made_through_the_guard_is_traced(guarded: GuardedModel, digits: Pools) -> None:
    """A small run of the whole way: a thief learns the answers, and their account is named.

    A suspect that learned the model's own answers is traced to nobody.
    """
    x = digits.training.x
    log: list[Row] = []
    for client in ("anna", "bob"):
        log += first_rows(guarded(x, client), MODEL, client).values()
    suspects = {}
    for name, labels in (
        ("copy", guarded(x, "bob").labels),
        ("stranger", guarded.network(pixels(x)).argmax(1)),
    ):
        suspects[name] = build("small", (1, 8, 8), 10, seed=3)
        train(
            suspects[name],
            Examples(x, labels),
            TrainConfig(objective="standard", attack=None, epochs=20, batch_size=32, seed=3),
        )
    images = pixels(images_of(log, (1, 8, 8)))
    found = {
        name: trace_accounts(log, network(images).argmax(1), SECRET)
        for name, network in suspects.items()
    }
    assert found["copy"].named == ("bob",)
    assert found["stranger"].named == ()
    assert boundary(np.zeros((1, 3)))[0].item() == 0


def test_a_guard_of_large_images_can_be_read_back(tmp_path: Path) -> None:
    """Three channels of 512 x 512: the ranges alone have 3 MiB."""
    training = torch.randint(0, 256, (2, 3, 512, 512), dtype=torch.uint8)
    chosen = GuardSettings("ab" * 32, 1.0, 1.0, (0.0,), 8, honest_ranges(training, 0.1), (0.5,))
    calibration = Calibration(chosen, 0.1, 0.1, 1.0, 1.0)
    write_guard(tmp_path, guard_record(calibration, "cd" * 32))
    assert read_guard(tmp_path) == chosen
    assert chosen.familiar is not None
    assert not chosen.familiar.foreign(training).any()
    black = Examples(torch.zeros(2, 3, 1200, 1200, dtype=torch.uint8), torch.tensor([0, 1]))
    options: dict[str, Any] = {"secret": SECRET, "model_sha256": MODEL, "cost": 1.0}
    with pytest.raises(CountermarkError, match="natural-only"):
        calibrate_model(nn.Linear(1, 2), black, training=black, epsilon=0.1, **options)
    mixed = Examples(torch.stack([black.x[0], 255 - black.x[1]]), black.y)
    pooling = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    with pytest.raises(CountermarkError, match="too few"):  # coins that cost too much ask no size
        calibrate_model(pooling, mixed, training=mixed, epsilon=0.1, **options)
    record = read_guard_record(tmp_path)
    for side in ("lowest", "highest"):
        record["settings"]["familiar"][side] = "00" * ((1 << 22) + 1)
    (tmp_path / "guard.json").write_bytes(canonical_json(record))
    with pytest.raises(CountermarkError, match="usable settings"):
        read_guard(tmp_path)


def test_what_given_weights_knew_of_the_measured_images_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    knew = {"training": 900, "validation": 60, "bases": 0, "thief": 0, "test": 0}
    found = Calibrated("mine", 0.1, False, None, 0.1, 0.01, 1.0, 0.01, 2000, knew, "cpu")
    for result, said in (
        (found, True),
        (replace(found, known={**knew, "validation": 0}), False),
        (replace(found, known={}), False),
    ):
        show(result)
        assert (
            "had been trained on 60 images for validation"
            in " ".join(capsys.readouterr().out.split())
        ) is said
