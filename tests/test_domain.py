"""What counts as an image and what as an answer, in any precision.

The rule is the same at every numerical entry.
"""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from countermark.attacks import pgd, strict
from countermark.attacks.apgd import apgd_ce, apgd_targeted
from countermark.attacks.fab import fab_targeted
from countermark.attacks.square import square
from countermark.data import Examples, pixels
from countermark.errors import CountermarkError
from countermark.evaluation import accuracy, adversarial_accuracy, predict, strict_accuracy
from countermark.networks.named import build
from countermark.thieves import Means
from countermark.thieves.steal import (
    algorithm_2,
    algorithm_2_adversarially,
    learn_answers,
    probabilities,
)
from countermark.threat import GREY, Attack
from countermark.training import Hardware, TrainConfig, train
from countermark.watermarks import coin_set, craft_adversarial, published_set

PLAIN = TrainConfig(
    "standard", None, 1, batch_size=16, hardware=Hardware("cpu", precision="32-true")
)
PGD = Attack(0.1, 3, 0.05)
Entry = Callable[[nn.Module, torch.Tensor, torch.Tensor], object]

ATTACKS: dict[str, Entry] = {
    "pgd": lambda model, x, y: pgd(model, x, y, epsilon=0.1, steps=3, step_size=0.05, restarts=2),
    "pgd until lost": lambda model, x, y: pgd(
        model, x, y, epsilon=0.1, steps=3, step_size=0.05, restarts=2, stop_when_lost=True
    ),
    "apgd_ce": lambda model, x, y: apgd_ce(model, x, y, epsilon=0.1, steps=8),
    "apgd_targeted": lambda model, x, y: apgd_targeted(
        model, x, y, (y + 1) % 10, epsilon=0.1, steps=8
    )[0],
    "square": lambda model, x, y: square(model, x, y, epsilon=0.1, queries=20),
    "fab_targeted": lambda model, x, y: fab_targeted(
        model, x, y, (y + 1) % 10, epsilon=0.1, steps=8
    ),
    "strict": lambda model, x, y: strict(model, x, y, epsilon=0.1, steps=8, queries=20).points,
}
MEASURES: dict[str, Entry] = {
    "predict": lambda model, x, _: predict(model, x),
    "accuracy": lambda model, x, y: accuracy(model, Examples(x, y)),
    "adversarial_accuracy": lambda model, x, y: adversarial_accuracy(model, Examples(x, y), PGD),
    "strict_accuracy": lambda model, x, y: strict_accuracy(model, Examples(x, y), PGD),
}
MAKERS: dict[str, Entry] = {
    "train": lambda model, x, y: train(model, Examples(x, y), PLAIN),
    "train against pgd": lambda model, x, y: train(
        model, Examples(x, y), replace(PLAIN, objective="pgd", attack=PGD)
    ),
    "craft_adversarial": lambda model, x, y: craft_adversarial(model, Examples(x, y), PGD, 0),
    "coin_set": lambda model, x, y: coin_set(model, Examples(x, y), PGD, 1, 40, 0),
    "distil": lambda model, x, y: distil(model, Examples(x, y)),
}
ENTRIES = ATTACKS | MEASURES | MAKERS


def distil(model: nn.Module, natural: Examples) -> int:
    """What a thief learns from a model's probabilities in one epoch."""
    means = Means(pool=natural, threat=GREY, epochs=1)
    return learn_answers(probabilities(model, means), build("small", (1, 8, 8), 10), means)


class Poisoned(nn.Module):
    """A network some of whose logits are no numbers; those of images that `where` picks."""

    def __init__(
        self,
        value: float,
        where: Callable[[torch.Tensor], torch.Tensor],
        classes: slice = slice(0, 1),
    ) -> None:
        super().__init__()
        self.inner, self.value, self.where, self.classes = (
            build("small", (1, 8, 8), 10, seed=0),
            value,
            where,
            classes,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.inner(x)
        poison = torch.zeros_like(logits)
        poison[:, self.classes] = self.value
        return torch.where(self.where(x).unsqueeze(1), logits + poison, logits)


def everywhere(x: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(x), dtype=torch.bool)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(48, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> nn.Module:
    return build("small", (1, 8, 8), 10, seed=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("entry", ENTRIES)
def test_logits_that_are_not_finite_are_no_answer(
    entry: str, value: float, images: torch.Tensor
) -> None:
    """The largest of NaN is class 0, so such a model was right about every image of that class.

    A class that is masked by -inf is refused as well.
    """
    if (entry, value) == ("train", -torch.inf):
        return  # it reads no answer, and its loss is finite
    y = torch.zeros(len(images), dtype=torch.int64)
    classes = slice(3, 4) if value < 0 else slice(0, 10)
    with pytest.raises(CountermarkError, match=r"not finite|training loss is"):
        ENTRIES[entry](Poisoned(value, everywhere, classes), images, y)


@pytest.mark.parametrize("entry", [*ATTACKS, *MEASURES])
def test_one_image_without_an_answer_is_found_among_others(
    entry: str, images: torch.Tensor, model: nn.Module
) -> None:
    images[:, 0, 0, 0].clamp_(max=0.6)
    images[7, 0, 0, 0] = 0.95
    y = predict(model, images)
    odd = Poisoned(torch.nan, lambda x: x[:, 0, 0, 0] > 0.8)  # which no budget of 0.1 changes
    with pytest.raises(CountermarkError, match="not finite"):
        ENTRIES[entry](odd, images, y)


def test_a_model_that_only_fails_under_attack_gets_no_figure(
    images: torch.Tensor, model: nn.Module
) -> None:
    """The model answers clean images but gives no finite answer to attacked ones.

    That must not count as robustness.
    """
    clean = pixels(images.mul(255).round().to(torch.uint8))
    odd = Poisoned(
        torch.nan, lambda x: (255 * x - (255 * x).round()).abs().flatten(1).amax(1) > 0.01
    )
    examples = Examples(clean, predict(model, clean))
    assert accuracy(odd, examples) == 100
    for measure in (adversarial_accuracy, strict_accuracy):
        with pytest.raises(CountermarkError, match="not finite"):
            measure(odd, examples, PGD)


@pytest.mark.parametrize(
    "wrong", ["0..255", "normalised", "nan", "infinite", "a little below 0", "int64"]
)
@pytest.mark.parametrize("entry", ENTRIES)
def test_images_outside_of_0_to_1_are_refused(
    entry: str, wrong: str, images: torch.Tensor, model: nn.Module
) -> None:
    y = torch.zeros(len(images), dtype=torch.int64)
    x = images.clone()
    if wrong == "0..255":
        x = x * 255
    elif wrong == "normalised":
        x = x * 2 - 1
    elif wrong == "int64":
        x = (x * 255).long()
    else:
        x[-1, 0, 3, 3] = {"nan": torch.nan, "infinite": torch.inf, "a little below 0": -1e-5}[wrong]
    with pytest.raises(CountermarkError, match=r"\[0, 1\]"):
        ENTRIES[entry](model, x, y)


def test_watermarks_and_validation_examples_outside_of_0_to_1_are_refused(
    images: torch.Tensor, model: nn.Module
) -> None:
    good, bad = (
        Examples(x, torch.zeros(len(x), dtype=torch.int64)) for x in (images, images * 255)
    )
    with pytest.raises(CountermarkError, match=r"\[0, 1\]"):
        train(model, good, PLAIN, watermarks=bad)
    with pytest.raises(CountermarkError, match=r"\[0, 1\]"):
        train(model, good, PLAIN, validation=bad)
    with pytest.raises(CountermarkError, match="uint8"):
        published_set(images, good.y)


@pytest.mark.parametrize("entry", ATTACKS)
def test_uint8_images_are_attacked_as_pixels(
    entry: str, images: torch.Tensor, model: nn.Module
) -> None:
    bytes_ = images.mul(255).round().to(torch.uint8)
    y = predict(model, bytes_)
    torch.manual_seed(0)
    found = ATTACKS[entry](model.eval(), bytes_, y)
    torch.manual_seed(0)
    assert torch.equal(found, ATTACKS[entry](model.eval(), pixels(bytes_), y))  # type: ignore[arg-type]
    assert float((found - pixels(bytes_)).abs().max()) <= 0.1 + 1e-6  # type: ignore[operator]


def test_a_thief_whose_queries_are_not_clamped_may_still_leave_the_range(
    images: torch.Tensor, model: nn.Module
) -> None:
    """The published code did not clamp its queries: their range is the thief's own business."""
    seen = []

    def victim(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return predict(model, x, bounded=False)

    pool = Examples(images, torch.zeros(48).long())
    means = Means(pool=pool, threat=GREY, attack=PGD, seeds=24, queries=48, epochs=1, clamp=False)
    for run in (algorithm_2, algorithm_2_adversarially):
        assert run(victim, build("small", (1, 8, 8), 10, seed=1), means) == 48
        assert float(seen[-1].max()) > 1


@pytest.mark.parametrize("images_in", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("model_in", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("entry", ATTACKS | MEASURES)
def test_any_precision_of_model_and_images_is_attacked(
    entry: str,
    model_in: torch.dtype,
    images_in: torch.dtype,
    images: torch.Tensor,
    model: nn.Module,
) -> None:
    """Attacks compute in float32 or float64, and the points stay in the ball to that precision."""
    network, x = copy.deepcopy(model).to(model_in).eval(), images[:12].to(images_in)
    y = predict(network, x)
    assert y.tolist() == network(x.to(model_in)).argmax(1).tolist()
    found = ENTRIES[entry](network, x, y)
    if entry in ATTACKS:
        assert isinstance(found, torch.Tensor)
        assert found.dtype is (torch.float64 if images_in is torch.float64 else torch.float32)
        assert float((found - x.to(found.dtype)).abs().max()) <= 0.1 + 1e-6
        assert 0 <= float(found.min()) <= float(found.max()) <= 1


def test_float64_attacks_find_what_float32_ones_find(
    images: torch.Tensor, model: nn.Module
) -> None:
    model.eval()
    y = predict(model, images)
    lost = {}
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        found = apgd_ce(copy.deepcopy(model).to(dtype), images.to(dtype), y, epsilon=0.03, steps=40)
        lost[dtype] = int((predict(model, found.float()) != y).sum())
    assert abs(lost[torch.float32] - lost[torch.float64]) <= 4
    assert lost[torch.float64] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_training_takes_float32_and_says_so(
    dtype: torch.dtype, images: torch.Tensor, model: nn.Module
) -> None:
    with pytest.raises(CountermarkError, match=r"float32; call network.float\(\)"):
        train(model.to(dtype), Examples(images, torch.zeros(len(images)).long()), PLAIN)


def test_nothing_to_train_on_or_to_embed_is_refused(images: torch.Tensor, model: nn.Module) -> None:
    """An empty watermark set is not the same as none: whoever gives one wants a mark."""
    some, none = (Examples(x, torch.zeros(len(x), dtype=torch.int64)) for x in (images, images[:0]))
    for embedding in ("interleaved", "epoch"):
        with pytest.raises(CountermarkError, match="watermark set is empty"):
            train(model, some, replace(PLAIN, embedding=embedding), watermarks=none)
    with pytest.raises(CountermarkError, match="no examples to train on"):
        train(model, none, PLAIN)
    with pytest.raises(CountermarkError, match="one or more"):
        published_set(none.x.to(torch.uint8), none.y)
    for batches, size in ((0, 40), (2, 0)):
        with pytest.raises(CountermarkError, match="one batch of one trial or more"):
            coin_set(model, some, PGD, batches, size, 0)
    with pytest.raises(CountermarkError, match="only 0 of 0 bases"):
        coin_set(model, none, PGD, 2, 40, 0)
    with pytest.raises(CountermarkError, match="no image to ask"):
        algorithm_2(
            lambda x: predict(model, x),
            build("small", (1, 8, 8), 10),
            Means(pool=none, threat=GREY),
        )
    with pytest.raises(CountermarkError, match="no image to ask"):
        distil(model, none)


@pytest.mark.parametrize("entry", ATTACKS)
@pytest.mark.parametrize("network", ["small", "paper", "an empty batch breaks it"])
def test_every_attack_takes_no_images(network: str, entry: str) -> None:
    """A network that cannot take an empty batch is not asked about one."""

    def breaks(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError

    known = network in ("small", "paper")
    model = build(network, (1, 8, 8), 10, seed=0).eval() if known else Poisoned(0.0, breaks)
    x, y = torch.empty(0, 1, 8, 8), torch.empty(0, dtype=torch.int64)
    found = ATTACKS[entry](model, x, y)
    assert isinstance(found, torch.Tensor)
    assert found.shape == x.shape


def test_nothing_to_measure_is_measured_without_a_fault(model: nn.Module) -> None:
    nothing = Examples(
        torch.empty(0, 1, 8, 8, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
    )
    assert predict(model, nothing.x).shape == (0,)
    assert accuracy(model, nothing) == adversarial_accuracy(model, nothing, PGD) == 0
    assert strict_accuracy(model, nothing, PGD).images == 0
    made, labels = craft_adversarial(model, nothing, PGD, 0)
    assert len(made) == len(labels) == 0


def test_what_rounding_put_outside_is_clamped() -> None:
    x = torch.tensor([-1e-7, 0.0, 0.25, 1.0, 1 + 1.2e-7]).view(1, 1, 1, 5)
    assert torch.equal(pixels(x), x.clamp(0, 1))
    with pytest.raises(CountermarkError, match=r"from 0 to 1\.0000"):
        pixels(x.clamp(0, 1) + 1e-5 * (x >= 1))
