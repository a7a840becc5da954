"""Attacks against closed forms: on a linear model the worst point of the ball is known."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from countermark import evaluation
from countermark.attacks import fgsm, pgd
from countermark.attacks.pgd import step_
from countermark.data import Examples, Pools, pixels
from countermark.evaluation import accuracy, adversarial_accuracy, predict
from countermark.fast import prepare
from countermark.networks.named import build
from countermark.threat import Attack


def linear(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 2))


def optimum(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return the images of highest loss within `epsilon` for a linear model of two classes.

    The loss falls as the margin grows, and the gradient of the margin is the difference of the two
    rows of weights.
    """
    weight = model[1].weight.detach()
    direction = (weight[1 - y] - weight[y]).sign().view_as(x)
    return (x + epsilon * direction).clamp(0, 1)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    epsilon=st.floats(0.01, 0.6),
    steps=st.integers(8, 20),
    random_start=st.booleans(),
)
def test_pgd_reaches_the_optimum_of_a_linear_model(
    seed: int, epsilon: float, steps: int, random_start: bool
) -> None:
    model = linear(seed)
    x, y = torch.rand(16, 1, 3, 4), torch.randint(0, 2, (16,))
    found = pgd(
        model,
        x,
        y,
        epsilon=epsilon,
        steps=steps,
        step_size=0.3 * epsilon,
        random_start=random_start,
    )
    best = functional.cross_entropy(model(optimum(model, x, y, epsilon)), y, reduction="none")
    reached = functional.cross_entropy(model(found), y, reduction="none")
    torch.testing.assert_close(reached, best, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("stop_when_lost", [False, True])
@pytest.mark.parametrize("restarts", [1, 3])
def test_pgd_stays_in_the_ball_and_in_the_pixel_range(restarts: int, stop_when_lost: bool) -> None:
    model = build("small", (1, 8, 8), 10, seed=0)
    x, y = torch.rand(32, 1, 8, 8), torch.randint(0, 10, (32,))
    found = pgd(
        model,
        x,
        y,
        epsilon=0.2,
        steps=5,
        step_size=0.1,
        restarts=restarts,
        stop_when_lost=stop_when_lost,
    )
    assert float((found - x).abs().max()) <= 0.2 + 1e-6
    assert 0 <= float(found.min()) <= float(found.max()) <= 1


def test_pgd_leaves_inputs_and_gradients_alone() -> None:
    model = build("small", (1, 8, 8), 10, seed=0)
    x, y = torch.rand(8, 1, 8, 8), torch.randint(0, 10, (8,))
    before = x.clone()
    pgd(model, x, y, epsilon=0.2, steps=3, step_size=0.1)
    assert torch.equal(x, before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_restarts_never_lower_the_loss() -> None:
    model = build("small", (1, 8, 8), 10, seed=3)
    x = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = model(x).argmax(1)

    def loss(restarts: int) -> torch.Tensor:
        torch.manual_seed(7)
        found = pgd(model, x, y, epsilon=0.02, steps=2, step_size=0.01, restarts=restarts)
        logits = model(found)
        value = functional.cross_entropy(logits, y, reduction="none")
        return torch.where(logits.argmax(1) == y, value, torch.inf)

    one, many = loss(1), loss(6)
    assert bool((many >= one - 1e-6).all())
    assert bool((many > one + 1e-6).any())


def test_start_is_brought_into_the_ball() -> None:
    model = linear(0)
    x, y = torch.full((4, 1, 3, 4), 0.5), torch.zeros(4, dtype=torch.int64)
    found = pgd(model, x, y, epsilon=0.1, steps=1, step_size=1e-9, start=x + 5)
    torch.testing.assert_close(found, x + 0.1)


def test_fgsm_takes_one_step_of_a_budget_and_a_quarter() -> None:
    model = linear(1)
    x, y = torch.full((8, 1, 3, 4), 0.5), torch.zeros(8, dtype=torch.int64)
    found = fgsm(model, x, y, epsilon=0.2)
    assert bool(((found - x) * (optimum(model, x, y, 0.2) - x) > 0).all())


def test_budget_zero_is_clean_accuracy(digits: Pools) -> None:
    model = build("small", (1, 8, 8), 10, seed=0)
    assert adversarial_accuracy(model, digits.test, Attack(0.0, 10, 0.1)) == accuracy(
        model, digits.test
    )


def test_adversarial_accuracy_of_a_linear_model_is_the_closed_form() -> None:
    model = linear(5)
    images = torch.randint(0, 256, (500, 1, 3, 4), dtype=torch.uint8)
    examples = Examples(images, predict(model, images))
    x = pixels(images)
    survive = predict(model, optimum(model, x, examples.y, 0.05)) == examples.y
    expected = 100 * float(survive.double().mean())
    assert adversarial_accuracy(model, examples, Attack(0.05, 10, 0.02)) == pytest.approx(expected)
    assert 0 < expected < 100


def test_lost_examples_cost_no_more_steps() -> None:
    seen = []

    class Counting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(len(x))
            return torch.stack((x.flatten(1).sum(1), torch.zeros(len(x))), 1)

    x = torch.full((10, 1, 2, 2), 0.5)
    y = torch.tensor([1] * 6 + [0] * 4)  # six are misclassified from the start, four can never be
    pgd(
        Counting(),
        x,
        y,
        epsilon=0.01,
        steps=5,
        step_size=0.01,
        random_start=False,
        stop_when_lost=True,
    )
    assert seen == [10, 4, 4, 4, 4]


def test_evaluation_restores_each_layers_mode() -> None:
    model = build("paper", (1, 8, 8), 10, seed=0).train()
    model[5].eval()
    modes = [module.training for module in model.modules()]
    predict(model, torch.rand(2, 1, 8, 8))
    assert [module.training for module in model.modules()] == modes


def test_same_seed_same_adversarial_accuracy(digits: Pools) -> None:
    model = build("small", (1, 8, 8), 10, seed=0)
    attack = Attack(0.05, 3, 0.02)
    state = torch.random.get_rng_state()
    first = adversarial_accuracy(model, digits.test, attack, seed=4)
    assert torch.equal(
        torch.random.get_rng_state(), state
    )  # the caller's randomness is not touched
    assert adversarial_accuracy(model, digits.test, attack, seed=4) == first


def test_a_step_of_the_attack_is_the_same_on_all_examples_and_on_those_still_right() -> None:
    """Compare the step that a GPU records with what the processor does.

    The GPU steps on a whole batch, in which lost examples stay where they are; the processor drops
    them.
    """
    model = prepare(
        build("small", (1, 8, 8), 10, seed=0).double()
    )  # the sign of a gradient near zero is not left to rounding
    x = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = model(x).argmax(1)
    epsilon, step_size = 0.1, 0.02
    points, lower, upper = x.clone(), (x - epsilon).clamp(0, 1), (x + epsilon).clamp(0, 1)
    lost = [int(step_(model, points, y, lower, upper, step_size, True).sum()) for _ in range(6)]
    assert 0 == lost[0] < lost[-1] < 64
    dropped = pgd(
        model,
        x,
        y,
        epsilon=epsilon,
        steps=6,
        step_size=step_size,
        random_start=False,
        stop_when_lost=True,
    )
    torch.testing.assert_close(points, dropped)


def test_adversarial_accuracy_asks_the_model_itself_when_its_copy_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A copy that takes every example for lost ends the attack at once.

    The model itself disagrees with the copy, so the attack is run on the model.
    """
    model = linear(5)
    images = torch.randint(0, 256, (400, 1, 3, 4), dtype=torch.uint8)
    examples = Examples(images, predict(model, images))
    examples = examples[examples.y == 0]
    attack = Attack(0.05, 10, 0.02)
    honest = adversarial_accuracy(model, examples, attack)
    rounded = linear(5)
    rounded[1].bias.data += torch.tensor([0.0, 1e6])
    monkeypatch.setattr(evaluation, "prepare", lambda network, dtype: rounded)
    assert adversarial_accuracy(model, examples, attack) == honest
    assert 0 < honest < 100
