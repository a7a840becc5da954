"""The strict attacks against closed forms, brute force and models that hide their gradients."""

import importlib
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from countermark import evaluation
from countermark.attacks.apgd import apgd_ce, apgd_targeted
from countermark.attacks.fab import fab_targeted, project
from countermark.attacks.local import Local
from countermark.attacks.pgd import pgd
from countermark.attacks.square import square
from countermark.attacks.strict import STAGES, Strict, strict
from countermark.data import Examples, pixels
from countermark.device import batch_size
from countermark.errors import CountermarkError
from countermark.evaluation import predict, strict_accuracy
from countermark.fast import prepare
from countermark.files import read_json, write_json
from countermark.networks.named import NETWORKS, build
from countermark.threat import Attack

strict_module = importlib.import_module(
    "countermark.attacks.strict"
)  # the package's name is the function


class Scaled(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1e6 * self.inner(x)


def linear(classes: int = 4, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, classes)).eval()


def examples(
    model: nn.Module, count: int = 200, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand(count, 1, 3, 4, generator=torch.Generator().manual_seed(seed))
    return x, model(x).argmax(1)


def best_margins(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """The highest z_t - z_y in the ball for every class t, exactly.

    Each pixel moves to the end of its box that the weights point to.
    """
    weight, bias = model[1].weight.detach(), model[1].bias.detach()
    lower, upper = (x - epsilon).clamp(0, 1).flatten(1), (x + epsilon).clamp(0, 1).flatten(1)
    difference = weight.unsqueeze(0) - weight[y].unsqueeze(1)
    corner = torch.where(difference > 0, upper.unsqueeze(1), lower.unsqueeze(1))
    return (difference * corner).sum(2) + bias - bias[y].unsqueeze(1)


def robust(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epsilon: float) -> torch.Tensor:
    return best_margins(model, x, y, epsilon).scatter(1, y.unsqueeze(1), -torch.inf).amax(1) < 0


class Straight(nn.Module):
    """A residual network with batch norm and dropout, but without any nonlinearity.

    So the worst point of a ball is known.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(channels, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.second, self.inner = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.dropout, self.last = nn.Dropout(0.5), nn.Linear(4 * 4, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x))
        x = x + self.inner(self.second(self.dropout(x)))
        return self.last(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


def straight(shape: tuple[int, int, int], classes: int) -> tuple[nn.Module, nn.Module]:
    """Such a network and the linear model that it is."""
    torch.manual_seed(classes)
    model = Straight(shape[0], classes)
    for norm in (model.norm, model.inner):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight)
    model.eval()
    line = nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))
    nothing = torch.zeros(1, *shape)
    with torch.no_grad():
        model.last.bias -= model(torch.full_like(nothing, 0.5))[
            0
        ]  # so that more than one class is met
        line[1].bias.copy_(model(nothing)[0])
        line[1].weight.copy_(torch.func.jacrev(model)(nothing).view(classes, -1))
    return model, line.eval()


@pytest.mark.parametrize("classes", [2, 3, 12])
@pytest.mark.parametrize("side", [8, 20])
def test_the_worst_case_of_a_residual_network_is_the_closed_form(side: int, classes: int) -> None:
    model, line = straight((3, side, side), classes)
    x = torch.rand(50, 3, side, side, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    assert len(y.unique()) > 1
    steepest = (line[1].weight[y].unsqueeze(1) - line[1].weight.unsqueeze(0)).abs().sum(2)
    margins = (model(x).gather(1, y.unsqueeze(1)) - model(x)) / steepest.clamp(min=1e-9)
    epsilon = float(margins.scatter(1, y.unsqueeze(1), torch.inf).amin(1).median().detach())
    torch.manual_seed(0)
    found = strict(model, x, y, epsilon=epsilon, queries=20)
    expected = robust(line, x, y, epsilon)
    assert 10 < int(expected.sum()) < 40
    near = (
        best_margins(line, x, y, epsilon).scatter(1, y.unsqueeze(1), -torch.inf).amax(1).abs()
        < 2e-5
    )
    assert bool(((found.broken_by == -1) == expected)[~near].all())
    assert int(near.sum()) < 10


def test_a_row_of_the_table_is_all_that_an_attack_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attack that knows the answer joins the ensemble by one row of the table.

    Its name appears in the results, and the model checks what it breaks.
    """
    model = Steps(linear(2)).eval()
    x, _ = examples(model)
    y = model(x).argmax(1)
    weight = model.inner[1].weight.detach()

    def oracle(case: strict_module.Case, rows: torch.Tensor, rank: int) -> torch.Tensor:
        direction = (weight[1 - case.y[rows]] - weight[case.y[rows]]).sign().view_as(case.x[rows])
        return (case.x[rows] + case.epsilon * direction).clamp(0, 1)

    added = strict_module.StrictAttack("oracle", 1, oracle, uses_gradients=False)
    monkeypatch.setattr(strict_module, "ENSEMBLE", (added,))
    monkeypatch.setattr(strict_module, "STAGES", (*STAGES, "oracle"))
    found = strict(model, x, y, epsilon=0.1)
    broken = found.broken_by == len(STAGES)
    assert 20 < int(broken.sum()) < len(x)
    assert bool((model(found.points[broken]).argmax(1) != y[broken]).all())


class Watched(nn.Module):
    """A bright image is class 1; every batch that it is asked about is written down."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.numel())
        bright = x.mean((1, 2, 3)) - 0.5
        return torch.stack((-bright, bright, torch.full_like(bright, -1.0)), 1)


@pytest.mark.parametrize(("side", "together"), [(16, 256), (32, 256), (64, 85), (224, 6)])
def test_no_more_pixels_are_asked_about_at_once_than_memory_is_sure_to_hold(
    side: int, together: int
) -> None:
    assert batch_size(torch.device("cpu"), (3, side, side), 256) == together


def test_large_images_in_colour_are_attacked_a_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Square breaks what is within reach of 224x224 pixels, and nothing else."""
    model = Watched()
    monkeypatch.setattr(strict_module, "prepare", lambda network: network)  # which copies the list
    shift = torch.tensor([0.004, 0.02, -0.004, -0.02]).repeat(2).view(-1, 1, 1, 1)
    x = torch.full((8, 3, 224, 224), 0.5) + shift
    y = (shift.flatten() > 0).long()
    found = strict(model, x, y, epsilon=0.01, steps=3, queries=50)
    assert torch.equal(found.broken_by != -1, shift.flatten().abs() < 0.01)
    lost = (
        square(model, x[:4], y[:4], epsilon=0.01, queries=100).mean((1, 2, 3)).sub(0.5).sign()
        != shift[:4].flatten().sign()
    )
    assert lost.tolist() == [True, False, True, False]
    assert max(model.seen) <= 1 << 20
    model.seen.clear()
    images = (x * 255).round().to(torch.uint8)
    predict(model, images)
    monkeypatch.setattr(
        evaluation, "strict", lambda model, x, y, **_: Strict(x, torch.full_like(y, -1))
    )
    assert strict_accuracy(model, Examples(images, y), Attack(0.01, 2, 0.01)).images == 8
    assert max(model.seen) <= 1 << 20


@pytest.mark.parametrize("classes", [2, 3, 4, 10])
def test_the_worst_case_of_a_linear_model_is_the_closed_form(classes: int) -> None:
    model = linear(classes)
    x, y = examples(model)
    epsilon = 0.08 if classes > 4 else 0.12
    torch.manual_seed(0)
    found = strict(model, x, y, epsilon=epsilon, queries=50)
    expected = robust(model, x, y, epsilon)
    assert 20 < int(expected.sum()) < 180
    assert torch.equal(found.broken_by == -1, expected)


def test_targeted_apgd_breaks_all_that_its_target_can_break() -> None:
    model = linear()
    x, y = examples(model)
    target, epsilon = (y + 1) % 4, 0.12
    margin = best_margins(model, x, y, epsilon).gather(1, target.unsqueeze(1)).squeeze(1)
    points, lacks = apgd_targeted(model, x, y, target, epsilon=epsilon)
    lost = model(points).argmax(1) != y
    assert 20 < int((margin > 0.01).sum()) < 180
    assert bool(lost[margin > 0.01].all())
    assert not bool(lost[robust(model, x, y, epsilon)].any())
    assert bool((lacks[lost] == 0).all())
    assert (
        float((lacks[~lost] > 0).float().mean()) > 0.9
    )  # the ratio can rise while z_t - z_y falls
    assert float(lacks.max()) > 1.5  # those were given up


def test_apgd_ce_of_two_classes_ends_at_the_corner() -> None:
    model = linear(2)
    x, y = examples(model)
    epsilon = 0.03
    keep = robust(model, x, y, epsilon)
    logits = model(apgd_ce(model, x[keep], y[keep], epsilon=epsilon))
    reached = logits.gather(1, 1 - y[keep].unsqueeze(1)) - logits.gather(1, y[keep].unsqueeze(1))
    best = best_margins(model, x[keep], y[keep], epsilon).gather(1, 1 - y[keep].unsqueeze(1))
    torch.testing.assert_close(reached, best, atol=1e-4, rtol=1e-4)


def test_fab_finds_the_least_distance_of_a_linear_model() -> None:
    model = linear(2)
    x, y = examples(model)
    low, high = torch.zeros(len(x)), torch.ones(len(x))
    for _ in range(30):
        middle = (low + high) / 2
        holds = torch.stack(
            [robust(model, x[i : i + 1], y[i : i + 1], float(middle[i]))[0] for i in range(len(x))]
        )
        low, high = torch.where(holds, middle, low), torch.where(holds, high, middle)
    near = high < 0.6
    assert int(near.sum()) > 100
    for factor, wanted in ((1.1, True), (0.99, False)):
        for i in torch.nonzero(near).flatten()[:20].tolist():
            one = x[i : i + 1], y[i : i + 1]
            point = fab_targeted(model, *one, 1 - one[1], epsilon=factor * float(high[i]), steps=10)
            assert bool(model(point).argmax(1) != one[1]) is wanted


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(1, 30))
def test_projections_are_the_nearest_points_of_the_plane_in_the_box(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(20, size, generator=generator, dtype=torch.float64)
    normal = torch.randn(20, size, generator=generator, dtype=torch.float64)
    value = torch.randn(20, generator=generator, dtype=torch.float64)
    moves = project(points, normal, value)
    there = points + moves
    assert 0 <= float(there.min()) <= float(there.max()) <= 1
    left = value + (normal * moves).sum(1)
    direction = normal.sign() * -value.sign().unsqueeze(1)
    furthest = value + (normal * direction * torch.where(direction > 0, 1 - points, points)).sum(1)
    reachable = furthest.sign() != value.sign()
    torch.testing.assert_close(
        left[reachable], torch.zeros_like(left[reachable]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(left[~reachable], furthest[~reachable], atol=1e-4, rtol=1e-4)
    length = moves.abs().amax(
        1
    )  # no shorter move reaches as far: with a little less of each pixel the plane is not met
    shorter = torch.minimum(moves.abs(), 0.98 * length.unsqueeze(1)) * moves.sign()
    assert bool(((value + (normal * shorter).sum(1)).sign() == value.sign())[reachable].all())


def test_brute_force_in_three_pixels() -> None:
    """The strict attack breaks whatever a fine grid of the ball breaks, and little else.

    The network is small and takes images of three pixels.
    """
    torch.manual_seed(4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
    nn.init.normal_(model[1].weight, std=4)
    nn.init.normal_(model[3].weight)
    x = torch.rand(150, 1, 1, 3)
    y = model(x).argmax(1)
    epsilon = 0.08
    grid = (
        torch.tensor(list(itertools.product(torch.linspace(-1, 1, 13).tolist(), repeat=3))).view(
            -1, 1, 1, 3
        )
        * epsilon
    )
    broken = torch.stack(
        [
            (model((one + grid).clamp(0, 1)).argmax(1) != label).any()
            for one, label in zip(x, y, strict=True)
        ]
    )
    torch.manual_seed(0)
    lost = strict(model, x, y, epsilon=epsilon, queries=200).broken_by != -1
    assert 20 < int(broken.sum()) < 130
    assert not bool((broken & ~lost).any())
    assert int((lost & ~broken).sum()) <= 3


class Steps(nn.Module):
    """Logits in steps: no gradient anywhere."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.inner(x) * 50).round() / 50 + 0 * x.sum((1, 2, 3)).unsqueeze(1)


def test_square_breaks_what_hides_its_gradients() -> None:
    plain = linear()
    x, y = examples(plain)
    model = Steps(plain).eval()
    y = model(x).argmax(1)
    epsilon = 0.12
    blind = pgd(model, x, y, epsilon=epsilon, steps=20, step_size=0.03, random_start=False)
    torch.manual_seed(0)
    found = strict(model, x, y, epsilon=epsilon, queries=1000)
    standing = int((found.broken_by == -1).sum())
    truth = int(robust(plain, x, y, epsilon).sum())
    assert int((model(blind).argmax(1) == y).sum()) == len(
        x
    )  # its gradient is zero: PGD does not move
    assert abs(standing - truth) <= 8
    assert int((found.broken_by == STAGES.index("Square")).sum()) > 20


def test_scaled_logits_hide_nothing() -> None:
    """Logits in the millions do not hide a gradient.

    Their cross-entropy has none in float32; the ratio of logits has one.
    """

    plain = linear()
    x, y = examples(plain)
    model, epsilon = Scaled(plain).eval(), 0.12
    weak = pgd(model, x, y, epsilon=epsilon, steps=20, step_size=0.03, random_start=False)
    survive = model(weak).argmax(1) == y
    torch.manual_seed(0)
    found = strict(model, x, y, epsilon=epsilon, queries=20)
    truth = robust(plain, x, y, epsilon)
    assert int(survive.sum()) > int(truth.sum()) + 40
    assert torch.equal(found.broken_by == -1, truth)


def digits_model() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    model = build("small", (1, 8, 8), 10, seed=3).eval()
    x = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    y = model(x).argmax(1)
    y[:5] = (y[:5] + 1) % 10
    return model, x, y


def test_all_points_are_in_the_ball_and_break_the_model() -> None:
    model, x, y = digits_model()
    torch.manual_seed(0)
    epsilon = 0.01
    found = strict(model, x, y, epsilon=epsilon, steps=20, queries=300)
    lost = found.broken_by != -1
    assert bool((found.broken_by[:5] == 0).all())
    assert 5 < int(lost.sum()) < 60
    assert float((found.points - x).abs().max()) <= epsilon + 1e-6
    assert 0 <= float(found.points.min()) <= float(found.points.max()) <= 1
    assert bool((model(found.points[lost]).argmax(1) != y[lost]).all())
    assert torch.equal(found.points[~lost], x[~lost])
    for attack in (
        lambda: apgd_ce(model, x, y, epsilon=epsilon, steps=10),
        lambda: apgd_targeted(model, x, y, (y + 1) % 10, epsilon=epsilon, steps=10)[0],
        lambda: square(model, x, y, epsilon=epsilon, queries=30),
        lambda: fab_targeted(model, x, y, (y + 1) % 10, epsilon=epsilon, steps=10),
    ):
        points = attack()
        assert float((points - x).abs().max()) <= epsilon + 1e-6
        assert 0 <= float(points.min()) <= float(points.max()) <= 1


def test_budget_zero_loses_only_what_is_wrong_anyway() -> None:
    model, x, y = digits_model()
    found = strict(model, x, y, epsilon=0)
    assert torch.equal(found.broken_by != -1, model(x).argmax(1) != y)
    assert len(strict(model, x[:0], y[:0], epsilon=0.1).broken_by) == 0


def test_one_seed_one_verdict() -> None:
    model, x, y = digits_model()
    verdicts = []
    for _ in range(2):
        torch.manual_seed(5)
        verdicts.append(strict(model, x, y, epsilon=0.01, steps=10, queries=100))
    assert torch.equal(verdicts[0].broken_by, verdicts[1].broken_by)
    assert torch.equal(verdicts[0].points, verdicts[1].points)


def test_what_drops_out_does_not_change_the_verdict_on_the_others() -> None:
    """Each example gets the same verdict alone as among all, though there others leave before it.

    FAB is not random.
    """
    model, x, y = digits_model()
    model, x, y = (
        model.double(),
        x[5:].double(),
        y[5:],
    )  # which side of a boundary a point is on is not left to rounding
    target = model(x).topk(2).indices[:, 1]
    together = fab_targeted(model, x, y, target, epsilon=0.01, steps=30)
    alone = torch.cat(
        [
            fab_targeted(
                model, x[i : i + 1], y[i : i + 1], target[i : i + 1], epsilon=0.01, steps=30
            )
            for i in range(len(x))
        ]
    )
    lost = model(together).argmax(1) != y
    assert 0 < int(lost.sum()) < len(x)
    assert torch.equal(lost, model(alone).argmax(1) != y)


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 12, 16), (3, 9, 15)])
@pytest.mark.parametrize("name", [*NETWORKS, "unknown layers", "nothing known", "strides"])
def test_small_changes_are_computed_where_they_reach(
    name: str, shape: tuple[int, int, int]
) -> None:
    torch.manual_seed(0)
    if name in NETWORKS:
        model = build(name, shape, 10, seed=1)
    elif name == "nothing known":
        model = nn.Sequential(nn.GroupNorm(1, shape[0]), nn.Flatten(), nn.LazyLinear(4))
    elif name == "strides":
        model = nn.Sequential(
            nn.Conv2d(shape[0], 3, 2, stride=3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)
        )
    else:
        model = nn.Sequential(
            nn.Conv2d(shape[0], 3, 3, padding=1),
            nn.Tanh(),
            nn.Softplus(),
            nn.Flatten(),
            nn.LazyLinear(4),
        )
    model(torch.rand(2, *shape))
    model.eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias)
    x = torch.rand(7, *shape)
    with torch.no_grad():
        local = Local(prepare(model), x)
        torch.testing.assert_close(local.logits, model(x), rtol=1e-4, atol=1e-5)
        for number in range(40):
            side = 1 + number % 5
            top, left = (
                int(torch.randint(shape[1] - side + 1, ())),
                int(torch.randint(shape[2] - side + 1, ())),
            )
            patch = torch.rand(len(x), shape[0], side, side)
            changed = x.clone()
            changed[..., top : top + side, left : left + side] = patch
            torch.testing.assert_close(
                local.ask(patch, top, left), model(changed), rtol=1e-4, atol=1e-4
            )
            rows = torch.rand(len(x)) < 0.5
            local.accept(rows)
            x = torch.where(rows.view(-1, 1, 1, 1), changed, x)
            torch.testing.assert_close(local.logits, model(x), rtol=1e-4, atol=1e-4)
            if number == 20:
                x = x[:4]
                local.keep(torch.arange(7) < 4)
        assert torch.equal(local.x, x)


def test_an_interrupted_strict_evaluation_goes_on_to_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, kept = linear(2), tmp_path / "kept.json"
    monkeypatch.setattr(evaluation, "_PART", 15)
    images = torch.randint(
        0, 256, (50, 1, 3, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    measured, attack = Examples(images, predict(plain, images)), Attack(0.1, 5, 0.02)
    whole = strict_accuracy(plain, measured, attack)
    assert 20 < whole.strict_accuracy < 80
    rest, parts = evaluation.strict, []

    def interrupted(model: nn.Module, x: torch.Tensor, y: torch.Tensor, **options: Any) -> Any:
        parts.append(len(x))
        if len(parts) == 3:
            raise KeyboardInterrupt
        return rest(model, x, y, **options)

    monkeypatch.setattr(evaluation, "strict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        strict_accuracy(plain, measured, attack, checkpoint=kept)
    assert len(read_json(kept)["broken_by"]) == 30
    assert strict_accuracy(plain, measured, attack, checkpoint=kept) == whole
    assert parts == [15, 15, 15, 15, 5]
    for wrong in ([9] * 10, [0] * 51, ["x"], None):
        write_json(kept, {"format": "countermark strict 1", "broken_by": wrong})
        with pytest.raises(CountermarkError, match="delete it to begin anew"):
            strict_accuracy(plain, measured, attack, checkpoint=kept)


def test_strict_accuracy_shows_the_gap_and_names_gradient_masking() -> None:
    plain = linear(2)
    images = torch.randint(
        0, 256, (200, 1, 3, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    measured = Examples(images, predict(plain, images))
    attack = Attack(0.12, 20, 0.02, random_start=False)
    truth = 100 * float(robust(plain, pixels(images), measured.y, 0.12).double().mean())
    state = torch.random.get_rng_state()
    honest, hidden = (strict_accuracy(model, measured, attack) for model in (plain, Scaled(plain)))
    assert torch.equal(
        torch.random.get_rng_state(), state
    )  # the caller's randomness is not touched
    assert honest.strict_accuracy == hidden.strict_accuracy == pytest.approx(truth)
    assert honest.test_accuracy == 100
    assert honest.strict_accuracy <= honest.adversarial_accuracy < hidden.adversarial_accuracy
    assert hidden.masked
    assert not honest.masked
    assert hidden.gap > 20 > honest.gap
    assert hidden.broken["APGD-CE"] + hidden.broken["APGD-T"] > 20
    assert strict_accuracy(plain, measured, Attack(0.0, 10, 0.1)).strict_accuracy == 100


@pytest.mark.parametrize("network", ["small", "paper"])
def test_a_part_of_which_nothing_survives_ends_there(network: str) -> None:
    """All examples fall before the first attack, or to it; the rest have nothing to do."""
    model = build(network, (1, 8, 8), 10, seed=0).eval()
    images = torch.randint(
        0, 256, (60, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    right = predict(model, images)
    none = strict_accuracy(model, Examples(images, (right + 1) % 10), Attack(0.1, 2, 0.05))
    assert (none.test_accuracy, none.strict_accuracy) == (0, 0)
    all_fall = strict_accuracy(model, Examples(images, right), Attack(0.9, 10, 0.2))
    assert (all_fall.test_accuracy, all_fall.strict_accuracy) == (100, 0)
    assert sum(all_fall.broken.values()) == 60
