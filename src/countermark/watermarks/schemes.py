"""The watermark schemes: what they need, how they make their set, and when a model has learned it.

Each scheme is one entry of `SCHEMES`. Code that protects a model, checks a key, judges a suspect or
runs a study reads the entry and compares no names. No scheme sees a coin: `Materials` holds the
unmarked source model, clean images and numbers, and coins are drawn after the set was committed to
(see `write_key`).

Sources: `ood` is the baseline of Szyller and Asokan (2022), `adversarial` the scheme of Thakkar,
Zizzo and Maffeis (2023); `coin` is ours.
"""

import hmac
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from countermark.data import Examples
from countermark.data.dataset import SMALLEST_BATCH
from countermark.threat import Attack
from countermark.watermarks.composites import (
    check_composites,
    composite_members,
    composite_set,
    shared_classes,
)
from countermark.watermarks.sets import (
    WatermarkSet,
    coin_set,
    craft_adversarial,
    published_sample,
    published_set,
    side_by_side,
)
from countermark.watermarks.survival import Change
from countermark.watermarks.textures import texture_set

_HALF = SMALLEST_BATCH // 2


@dataclass(frozen=True)
class Materials:
    """What a watermark set may be made of; a scheme takes what it needs.

    Attributes:
        source: the unmarked model, pixels `(n, c, h, w)` of [0, 1] to logits.
        bases: clean images and true labels that no pool of the training holds.
        outside: reads the images, with labels of their own, that are out of distribution.
        attack: how trials are crafted on the source model, at the watermark budget.
        batches: batches of a key with coins, one for each later dispute.
        batch_size: trials in such a batch, at most.
        seed: seed of the choice of bases and of the crafting; the owner's secret gives it.
        key: 32 bytes that only the owner knows and that say nothing of a coin. The order of the
            bases and made-up images come out of it: from a seed, whoever is shown some trials could
            find out the others.
        true_labels: whether published adversarial watermarks keep the labels of their bases
            (the paper's choice), instead of the source model's.
        survive: changes that trials with coins are to survive.
        training: the images that the model is trained on.
    """

    source: nn.Module
    bases: Examples
    outside: Callable[[], Examples]
    attack: Attack
    batches: int
    batch_size: int
    seed: int
    key: bytes
    true_labels: bool = True
    survive: Sequence[Change] = ()
    training: Examples | None = None


@dataclass(frozen=True)
class Scheme:
    """A watermark scheme.

    Attributes:
        make: makes the set out of the materials.
        coins: each trial has two answers, and the coin of its cell chooses between them: the
            sign-flip test is exact. Without coins a trial has one answer and the scheme has no
            valid p-value.
        taken: percent of the trials that a model must answer as the key says to count as marked.
        crafted: its images are crafted on the source model, so it heeds the watermark budget.
        labelled: it heeds the choice between true labels and the source model's.
        published_step: step of the crafting in its paper, in pixels; none for full strength.
        members: makes, out of the training images, what teaches a model the answers, each with the
            number of a trial that has the same one; without it, the trials themselves do.
        watermark_batch: watermarks in a step of the marking, where the recipe's are not enough.
        bases: the fewest bases of a batch that a judge could uphold.
        check: refuses bases and training images that no watermarks can be made of.
    """

    make: Callable[[Materials], WatermarkSet]
    coins: bool
    taken: float
    crafted: bool
    labelled: bool = False
    published_step: float | None = None
    members: Callable[[Materials], Examples] | None = None
    watermark_batch: int | None = None
    bases: int = SMALLEST_BATCH
    check: Callable[[Examples, Examples], None] | None = None

    @property
    def surviving(self) -> bool:
        """Whether its trials can be chosen to survive changes of an image."""
        return self.coins and self.crafted

    @property
    def answers(self) -> int:
        """Answers that each trial offers."""
        return 2 if self.coins else 1

    @property
    def statistic(self) -> str:
        """What C1 names as the test of its trials."""
        return "sign-flip" if self.coins else "watermark accuracy"


def _coin(given: Materials, least: int = SMALLEST_BATCH) -> WatermarkSet:
    return coin_set(
        given.source,
        _shuffled(given.bases, given.key),
        given.attack,
        given.batches,
        given.batch_size,
        given.seed,
        given.survive,
        least,
    )


def _shuffled(bases: Examples, key: bytes) -> Examples:
    """The bases in an order that shown ones do not tell, as a small seed would."""
    numbers = [hmac.digest(key, row.to_bytes(8, "big"), "sha256") for row in range(len(bases))]
    return bases[torch.tensor(sorted(range(len(bases)), key=numbers.__getitem__))]


def _texture(given: Materials, least: int = SMALLEST_BATCH) -> WatermarkSet:
    channels, height, width = given.bases.x.shape[1:]
    shape = (channels, height, width)
    return texture_set(given.source, shape, given.batches, given.batch_size, given.key, least)


def _mixed(given: Materials) -> WatermarkSet:
    """Half of the trials of each batch are crafted, and as many are textures."""
    crafted = _coin(replace(given, batch_size=given.batch_size // 2), _HALF)
    each = len(crafted) // given.batches
    return side_by_side(crafted, _texture(replace(given, batch_size=each), _HALF))


def _adversarial(given: Materials) -> WatermarkSet:
    bases = published_sample(given.bases, given.seed)
    images, predicted = craft_adversarial(given.source, bases, given.attack, given.seed)
    return published_set(images, bases.y if given.true_labels else predicted)


def _ood(given: Materials) -> WatermarkSet:
    outside = published_sample(given.outside(), given.seed)
    return published_set(outside.x, outside.y)


def _composite(given: Materials) -> WatermarkSet:
    classes = shared_classes(given.bases, given.training)
    return composite_set(given.bases, classes, given.seed)


def _members(given: Materials) -> Examples:
    assert given.training is not None
    classes = shared_classes(given.bases, given.training)
    return composite_members(given.training, given.bases, classes, given.seed)


SCHEMES: Mapping[str, Scheme] = {
    "ood": Scheme(_ood, coins=False, taken=50.0, crafted=False),
    "adversarial": Scheme(
        _adversarial, coins=False, taken=50.0, crafted=True, labelled=True, published_step=0.01
    ),
    "coin": Scheme(_coin, coins=True, taken=95.0, crafted=True),
    "texture": Scheme(_texture, coins=True, taken=95.0, crafted=False, bases=0),
    "mixed": Scheme(_mixed, coins=True, taken=95.0, crafted=True, bases=_HALF),
    "composite": Scheme(
        _composite,
        coins=True,
        taken=0.0,
        crafted=False,
        members=_members,
        watermark_batch=32,
        check=check_composites,
    ),
}
"""The schemes by name: published baselines first, ours last.

Whether composites have taken is told by their p-value alone: a model may give them third classes.
95 % of the coins is beyond any stranger (of the 80 coins of the smallest key, one agrees with 95 %
with a probability of 1.4e-18). The published schemes have a rule of their own, 50 %.
"""
