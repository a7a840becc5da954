"""Input cleaners by brute force, and what a folder may say of those in front of its network."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from countermark.attacks import pgd
from countermark.errors import CountermarkError
from countermark.networks import DataRecord, Description, build, load_model, save_model
from countermark.networks.cleaners import CLEANERS, Straight, behind
from countermark.threat import COLOUR

SHAPE = (3, 8, 8)


def some_images(count: int = 5) -> torch.Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(3))


def cleaned(name: str, amount: float, x: torch.Tensor) -> torch.Tensor:
    return CLEANERS[name].make((x.shape[1], x.shape[2], x.shape[3]), amount)(x)


def windows(
    x: torch.Tensor, side: int
) -> list[tuple[tuple[int, int, int, int], list[float], list[float]]]:
    """For each value its place, its window with the border continued, and what lies within."""
    n, c, h, w = x.shape
    near = range(-(side // 2), side // 2 + 1)
    found = []
    for i, j, row, column in itertools.product(range(n), range(c), range(h), range(w)):
        places = [(row + a, column + b) for a in near for b in near]
        continued = [
            float(x[i, j, min(max(a, 0), h - 1), min(max(b, 0), w - 1)]) for a, b in places
        ]
        within = [float(x[i, j, a, b]) for a, b in places if 0 <= a < h and 0 <= b < w]
        found.append(((i, j, row, column), continued, within))
    return found


@pytest.mark.parametrize("side", [3, 5])
def test_median_and_blur_are_those_of_each_window(side: int) -> None:
    x = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    medians, means = cleaned("median", side, x), cleaned("blur", side, x)
    for place, continued, within in windows(x, side):
        assert float(medians[place]) == sorted(continued)[side * side // 2]
        assert float(means[place]) == pytest.approx(sum(within) / len(within), abs=1e-6)


def test_thresholds_clips_and_levels_are_those_of_each_pixel() -> None:
    x = some_images()
    for was, white, stretched, level in zip(
        x.flatten().tolist(),
        cleaned("threshold", 0.4, x).flatten().tolist(),
        cleaned("clip", 0.35, x).flatten().tolist(),
        cleaned("levels", 4, x).flatten().tolist(),
        strict=True,
    ):
        assert white == float(was > 0.4)
        assert stretched == pytest.approx(min(max((was - 0.35) / 0.3, 0), 1), abs=1e-5)
        assert level == pytest.approx(
            min((0, 1 / 3, 2 / 3, 1), key=lambda value: abs(value - was)), abs=1e-6
        )


@pytest.mark.parametrize(("name", "amount"), [("threshold", 0.5), ("levels", 2), ("levels", 7)])
def test_rounding_again_changes_nothing(name: str, amount: float) -> None:
    once = cleaned(name, amount, some_images())
    torch.testing.assert_close(cleaned(name, amount, once), once)


@pytest.mark.parametrize("name", CLEANERS)
def test_cleaned_pixels_are_pixels_of_any_size_and_let_attacks_through(name: str) -> None:
    """Black, white and random images, down to a single pixel; no gradient is lost."""
    for shape in ((3, 8, 8), (1, 7, 9), (4, 1, 1)):
        torch.manual_seed(0)
        x = torch.cat(
            (torch.zeros(1, *shape), torch.ones(1, *shape), torch.rand(2, *shape))
        ).requires_grad_()
        out = CLEANERS[name].make(shape, CLEANERS[name].amount.default)(x)
        assert out.shape == x.shape
        assert 0 <= float(out.detach().min()) <= float(out.detach().max()) <= 1
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert float(gradient.abs().max()) > 0
        if isinstance(CLEANERS[name].make(shape, CLEANERS[name].amount.default), Straight):
            assert torch.equal(gradient, torch.ones_like(x))


def test_an_attack_behind_a_threshold_finds_what_the_flat_gradient_hides() -> None:
    """Brightness decides: without the straight gradient PGD would stand still."""
    network = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(3, 2, bias=False))
    with torch.no_grad():
        network[2].weight.copy_(torch.tensor([[1.0, 1, 1], [-1, -1, -1]]))
    dark = torch.full((1, *SHAPE), 0.45)
    front = behind([("threshold", 0.5)], network, SHAPE)
    found = pgd(
        front, dark, torch.tensor([1]), epsilon=0.1, steps=5, step_size=0.05, random_start=False
    )
    assert float((found - dark).abs().max()) == pytest.approx(0.1)
    assert bool((found > 0.5).all())


def test_the_last_cleaner_sees_the_image_first() -> None:
    x = some_images()
    network = nn.Sequential(nn.Flatten())
    stacked = behind([("levels", 4), ("blur", 3)], network, SHAPE)
    assert torch.equal(stacked(x), cleaned("levels", 4, cleaned("blur", 3, x)).flatten(1))
    assert behind([], network, SHAPE) is network


@pytest.mark.parametrize(
    ("cleaners", "what"),
    [
        ([("sponge", 1)], "unknown cleaner"),
        ([("median", 4)], "an odd number from 3 to 15"),
        ([("median", 101)], "an odd number from 3 to 15"),
        ([("median", 3.5)], "an odd number from 3 to 15"),
        ([("threshold", 1.5)], "a level between 0 and 1"),
        ([("levels", 1)], "a number of levels"),
        ([("clip", 0.5)], "a margin between"),
        ([("denoise", 1e9)], "a number of filters"),
        ([("levels", float("nan"))], "a number of levels"),
        ([("levels", float("inf"))], "a number of levels"),
    ],
)
def test_cleaners_that_there_are_not_are_refused(
    cleaners: list[tuple[str, float]], what: str
) -> None:
    with pytest.raises(CountermarkError, match=what):
        behind(cleaners, nn.Flatten(), SHAPE)


@pytest.mark.parametrize(
    "cleaners",
    [
        "median",
        [["median"]],
        [["median", "3"]],
        [["median", True]],
        [[3, "median"]],
        [["median", 4]],
        [["sponge", 3]],
        [["median", 3]] * 9,
        [["denoise", 1e300]],
        [{"median": 3}],
    ],
)
def test_a_folder_that_names_other_cleaners_is_refused(cleaners: object, tmp_path: Path) -> None:
    names = ("a", "b")
    description = Description("small", SHAPE, names, DataRecord("photos", "0" * 64), COLOUR, 0)
    save_model(tmp_path, build("small", SHAPE, 2), description)
    record = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**record, "cleaners": cleaners}))
    with pytest.raises(CountermarkError) as refused:
        load_model(tmp_path)
    assert "\n" not in str(refused.value)
