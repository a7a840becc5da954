"""Composites of two classes: trials that no input cleaner takes back to a clean image.

A trial of the scheme `coin` is a clean image under a small perturbation, and a thief who puts a
cleaner in front of a stolen network may get the clean image back. A composite has nothing small to
take away: it is an image of one class where a mask is set, and of another class elsewhere. Both
classes are there to see, so a stranger may answer either; the coin chooses which.

A *family* is a pair of classes and a mask, and shares one coin. The marked model learns the answer
from many composites of the family, and the suspect is asked others, of images that no training has
seen. (Lineage: Lv et al., IEEE S&P 2024, whose watermarks are such composites, all of one label.)
"""

import itertools
import math
from collections.abc import Sequence

import torch

from countermark.data import Examples, as_uint8
from countermark.errors import CountermarkError
from countermark.watermarks.sets import WatermarkSet

FAMILIES = 180
"""Families of a key, at most: more of them teach the model each one worse."""
_ASKED = 18  # trials of a family, where they fit into the files of keys and claims
_TAUGHT = 120  # composites of a family that the model learns from, where they fit into memory
_MOST_ASKED, _MOST_TAUGHT = 1 << 27, 1 << 28  # bytes of all of them
_WAVES = 2  # of a mask in each direction, at most


def composite_set(bases: Examples, classes: Sequence[int], seed: int) -> WatermarkSet:
    """Make the trials of composite families, answered with either of their two classes.

    They are one batch: half of the families would seldom convince a judge.

    Args:
        bases: clean images and true labels that no pool of the training holds. No model has a part
            in the choice among them (condition 2).
        classes: labels that occur among the bases and in the training.
        seed: draws the families, their masks, and the images of their trials.

    Raises:
        CountermarkError: fewer than two classes, or images so large that a key could not hold them.
    """
    drawn, asked = _families(bases, classes, seed), asked_each(bases.x.shape[1:])
    x, family = _composites(bases, drawn, asked, seed + 1)
    answers = torch.tensor([pair for pair, _ in drawn])[family]
    return WatermarkSet(x, answers, torch.zeros_like(family), family * asked)


def composite_members(
    training: Examples, bases: Examples, classes: Sequence[int], seed: int
) -> Examples:
    """Make the composites that teach a model the coins of `composite_set`.

    Args:
        training: the images that the model is trained on.
        bases: as for `composite_set`.
        classes: as for `composite_set`.
        seed: as for `composite_set`.

    Returns:
        The composites, and for each the number of a trial whose answer it is to get.
    """
    drawn, size = _families(bases, classes, seed), math.prod(training.x.shape[1:])
    members = max(1, min(_TAUGHT, _MOST_TAUGHT // (size * len(drawn))))
    x, family = _composites(training, drawn, members, seed + 2)
    return Examples(x, family * asked_each(bases.x.shape[1:]))


def check_composites(bases: Examples, training: Examples) -> None:
    """Refuse, before anything is trained, images that no composites can be made of.

    Raises:
        CountermarkError: as for `composite_set`.
    """
    _pairs(shared_classes(bases, training))
    asked_each(bases.x.shape[1:])


def shared_classes(bases: Examples, training: Examples | None) -> list[int]:
    """Return the labels that occur among the bases and, where it is known, in the training."""
    labels = set(bases.y.tolist())
    return sorted(labels if training is None else labels & set(training.y.tolist()))


def asked_each(shape: Sequence[int]) -> int:
    """Return how many trials a family has, for images of a shape `(c, h, w)`.

    Raises:
        CountermarkError: not even one would fit into a key.
    """
    asked = min(_ASKED, _MOST_ASKED // (math.prod(shape) * FAMILIES))
    if asked < 1:
        raise CountermarkError(
            f"images of {math.prod(shape)} values are too large for composites; take --scheme coin"
        )
    return asked


Family = tuple[tuple[int, int], torch.Tensor]
"""Two classes, the smaller first, and a mask `(h, w)`."""


def _families(bases: Examples, classes: Sequence[int], seed: int) -> list[Family]:
    """Draw pairs of classes, each as often as the others or once more, with masks of their own."""
    generator = torch.Generator().manual_seed(seed)
    pairs = _pairs(classes)
    order = torch.randperm(len(pairs), generator=generator).tolist()
    repeated = itertools.chain.from_iterable(itertools.repeat(order, FAMILIES))
    chosen = [pairs[i] for i in itertools.islice(repeated, FAMILIES)]
    height, width = bases.x.shape[2:]
    return [(pair, _mask(height, width, generator)) for pair in chosen]


def _pairs(classes: Sequence[int]) -> list[tuple[int, int]]:
    pairs = list(itertools.combinations(sorted(classes), 2))
    if not pairs:
        raise CountermarkError(
            "composites take images of two classes, and the bases and the training share none but "
            "one; take another scheme"
        )
    return pairs


def _mask(height: int, width: int, generator: torch.Generator) -> torch.Tensor:
    """Draw a mask of a few large fields that sets half of the pixels.

    It is a sum of a few waves, with random weights, cut at its median.
    """
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    field = torch.zeros(height, width)
    for i, j in itertools.product(range(_WAVES + 1), repeat=2):
        one, other = torch.randn(2, generator=generator).tolist()
        if i + j:
            waves = one * torch.cos(math.pi * (i * y + j * x))
            waves += other * torch.cos(math.pi * (i * y - j * x))
            field += waves / math.hypot(i, j)
    return field > field.median()


def _composites(
    examples: Examples, drawn: list[Family], members: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compose images of each family, uint8 `(n, c, h, w)`, and tell the place of their family."""
    generator = torch.Generator().manual_seed(seed)
    places = {
        label: torch.nonzero(examples.y == label).flatten()
        for label in {label for pair, _ in drawn for label in pair}
    }
    parts = []
    for pair, mask in drawn:
        chosen = [
            places[label][torch.randint(len(places[label]), (members,), generator=generator)]
            for label in pair
        ]
        inside, outside = (as_uint8(examples[rows].read().x) for rows in chosen)
        parts.append(torch.where(mask, inside, outside))
    return torch.cat(parts), torch.arange(len(drawn)).repeat_interleave(members)
