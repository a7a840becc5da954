"""Watermark sets: images with their possible answers, and how each scheme makes its own.

The schemes are `ood` (images of another data set with their own labels: Szyller and Asokan, 2022),
`adversarial` (PGD examples at a budget above the training budget: Thakkar, Zizzo and Maffeis, 2023)
and `coin` (such examples as well, but a coin that did not exist when they were made chooses between
the true label and the source model's). Nothing here knows a coin.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn

from countermark.attacks import pgd
from countermark.data import Examples, pixels
from countermark.data.dataset import SMALLEST_BATCH
from countermark.device import batch_size, seeded
from countermark.errors import CountermarkError
from countermark.evaluation import device_of, evaluating, predict
from countermark.threat import Attack
from countermark.watermarks.survival import Change, Passed

_PUBLISHED_WATERMARKS = 100
_CRAFTED = 1000  # bases at a time
_GREY = 1  # channel of a grey image; recipes call all others colour

CRAFTING_STEPS = 40
"""Steps of the crafting; Table 6 of the paper."""


@dataclass(frozen=True)
class WatermarkSet:
    """Watermark images and their possible answers, in the order of their leaves.

    Attributes:
        x: uint8 images `(n, c, h, w)`.
        answers: int64 `(n, k)`: for coins heads and tails, heads < tails; for the published schemes
            the one label.
        batch: int64 `(n,)`, the batch in which each is opened.
        cell: int64 `(n,)`, the cell whose coin decides it; in a model mark each watermark is its
            own cell.
    """

    x: torch.Tensor
    answers: torch.Tensor
    batch: torch.Tensor
    cell: torch.Tensor

    def __len__(self) -> int:
        return len(self.x)


def full_strength(epsilon: float, steps: int = CRAFTING_STEPS) -> Attack:
    """The crafting attack that reaches its bound: `steps` steps of 2.5 epsilon / steps.

    With the paper's step of 0.01 the crafting stops at the edge of the bound, and models that never
    saw such a watermark give its true label 50-79 % of the time, as a copy would. At full strength
    they do so 2-7 % of the time.
    """
    return Attack(epsilon, steps, 2.5 * epsilon / steps)


def craft_adversarial(
    source: nn.Module,
    bases: Examples,
    attack: Attack,
    seed: int,
    enough: int | None = None,
    *,
    corner: bool = False,
    through: Sequence[Change] = (),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Craft watermarks from clean bases on the source model.

    Args:
        source: an adversarially trained model, attacked in evaluation mode on the device where it
            is.
        bases: clean images and true labels `(n,)`.
        attack: budget above the training budget.
        seed: seed of the random starts.
        enough: how many that the source misclassifies are enough; the bases behind these are left
            out. With none, every base is crafted.
        corner: begin at a random corner of the ball, and stop as soon as the source errs.
        through: changes after each of which the source is to err as well.

    Returns:
        uint8 images `(n, c, h, w)` and the source's labels of the rounded images `(n,)`, both on
        the CPU, of the first n bases. The same seed gives the same images and labels on the same
        kind of device.

    Raises:
        CountermarkError: bases outside [0, 1], or logits that are not finite.
    """
    device = device_of(source)
    count = max(1, batch_size(device, bases.x.shape[1:], _CRAFTED) // (1 + len(through)))
    target = Passed(source, through) if through else source
    parts, labels, found = [], [], 0
    with evaluating(source), seeded(device, seed):
        for i in range(0, max(len(bases), 1), count):
            x, y = (part[i : i + count].to(device) for part in (bases.x, bases.y))
            clean = pixels(x)
            start = clean + attack.epsilon * torch.randn_like(clean).sign_() if corner else None
            crafted = pgd(target, clean, y, **asdict(attack), start=start, stop_when_lost=corner)
            parts.append(crafted.mul(255).round().to(torch.uint8).cpu())
            labels.append(predict(source, parts[-1]))
            found += int((labels[-1] != y.cpu()).sum())
            if enough is not None and found >= enough:
                break
    return torch.cat(parts), torch.cat(labels)


def craft_trials(
    source: nn.Module, bases: Examples, attack: Attack, seed: int, enough: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Craft the trials that coins will decide; arguments and result of `craft_adversarial`.

    In colour they begin at a random corner of the ball and are such that the source only just errs.
    A network tells each one from all other images by its noise, which means nothing to it, and has
    no strong answer to give up, whatever the coin says. So coins are learned several times as
    quickly, cost less robustness and last longer (docs/log.md). Grey images are crafted at full
    strength.
    """
    return craft_adversarial(source, bases, attack, seed, enough, corner=bases.x.shape[1] != _GREY)


def coin_set(
    source: nn.Module,
    bases: Examples,
    attack: Attack,
    batches: int,
    batch_size: int,
    seed: int,
    survive: Sequence[Change] = (),
    least: int = SMALLEST_BATCH,
) -> WatermarkSet:
    """Make the trials of a model mark, answered with the true label or the source model's.

    The bases are shuffled with the seed, and the first `batches * batch_size` are taken on which
    the two labels differ; where there are fewer, the batches are smaller. In colour, bases that the
    source gets right come first: of others it is often too sure to learn the true label. The source
    model never sees a coin, so the choice depends on none (condition 2).

    Trials that are to survive changes are crafted at full strength through all of them at once, and
    taken only if the source model errs on them after each change as well.

    Raises:
        CountermarkError: too few bases are misclassified for batches of `least` trials.
    """
    if batches < 1 or batch_size < 1:
        raise CountermarkError(
            f"a key has one batch of one trial or more, not {batches} of {batch_size}"
        )
    bases = bases[torch.randperm(len(bases), generator=torch.Generator().manual_seed(seed))]
    if bases.x.shape[1] != _GREY:
        wrong = predict(source, bases.x) != bases.y
        bases = bases[torch.argsort(wrong.int(), stable=True)]
    if survive:
        images, predicted = craft_adversarial(source, bases, attack, seed, through=survive)
    else:
        images, predicted = craft_trials(source, bases, attack, seed, batches * batch_size)
    true = bases.y[: len(predicted)]
    errs = [predicted, *(predict(source, change(images)) for change in survive)]
    usable = torch.nonzero(torch.stack([each != true for each in errs]).all(0)).flatten()
    batch_size = min(batch_size, len(usable) // batches)
    if batch_size < least:
        raise CountermarkError(
            f"only {len(usable)} of {len(bases)} bases became watermarks "
            f"where the key needs {batches * least}; "
            "raise the watermark budget or train longer"
        )
    count = batches * batch_size
    usable = usable[:count]
    answers = torch.stack((bases.y[usable], predicted[usable]), dim=1).sort(dim=1).values
    return WatermarkSet(
        images[usable], answers, torch.arange(count) // batch_size, torch.arange(count)
    )


def side_by_side(*sets: WatermarkSet) -> WatermarkSet:
    """One set of several kinds of trials with a coin each, of which every batch has its share."""
    batch = torch.cat([each.batch for each in sets])
    order = torch.argsort(batch, stable=True)
    x, answers = (torch.cat([getattr(each, name) for each in sets]) for name in ("x", "answers"))
    return WatermarkSet(x[order], answers[order], batch[order], torch.arange(len(order)))


def published_sample(examples: Examples, seed: int) -> Examples:
    """Choose the 100 examples, shuffled with the seed, for the watermarks of a published scheme."""
    return examples[
        torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed))[
            :_PUBLISHED_WATERMARKS
        ]
    ]


def published_set(images: torch.Tensor, labels: torch.Tensor) -> WatermarkSet:
    """Wrap the uint8 images and labels of a published scheme; they have one answer and one batch.

    Raises:
        CountermarkError: there are no images, or they are not uint8.
    """
    count = len(images)
    if count == 0 or images.dtype != torch.uint8:
        raise CountermarkError(
            "a watermark set is made of uint8 images, one or more, "
            f"not of {count} of {images.dtype}"
        )
    return WatermarkSet(
        images, labels.unsqueeze(1), torch.zeros(count, dtype=torch.int64), torch.arange(count)
    )
