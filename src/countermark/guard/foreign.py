"""Foreign queries: images too far from all training data for an honest client to send.

Each pixel has a range over the training images. A query is foreign if one of its pixels is outside
that range by more than the budget. An honest image whose pixels are all in range cannot be made
foreign by anybody with a perturbation within the budget: this is arithmetic, nothing is learned. A
thief who makes up queries step by step (Algorithm 2 and similar attacks) soon leaves the ranges,
unless the images are photographs, whose ranges leave nothing out (`share_told`).
Whether a query is foreign depends on the query alone, never on a coin.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from countermark.data import pixels
from countermark.errors import CountermarkError

MOST_VALUES = 1 << 22
"""Largest number of values of an image whose ranges are stored.

Three channels of 1182 x 1182 pixels, for example.
"""
_FIELDS = 7
_AT_A_TIME = 1 << 24  # values of the images that are processed at once


@dataclass(frozen=True)
class HonestRanges:
    """What honest images may look like; public.

    Attributes:
        lowest: the lowest familiar value, budget included, of each place of an image `(c, h, w)`,
            in order; two hexadecimal digits each.
        highest: the highest familiar value of each place, in the same format.
    """

    lowest: str
    highest: str

    @property
    def values(self) -> int:
        """Number of values of an image."""
        return len(self.lowest) // 2

    @cached_property
    def _ranges(self) -> tuple[npt.NDArray[np.uint8], ...]:
        return tuple(
            np.frombuffer(bytes.fromhex(side), dtype=np.uint8)
            for side in (self.lowest, self.highest)
        )

    def foreign(self, images: torch.Tensor) -> npt.NDArray[np.bool_]:
        """Tell which images `(n, c, h, w)`, uint8, no honest client sends: bool `(n,)`."""
        low, high = self._ranges
        flat = images.numpy().reshape(len(images), len(low))
        beyond = (flat < low) | (flat > high)
        return np.asarray(beyond.any(axis=1))


def outlines(images: torch.Tensor) -> torch.Tensor:
    """Compute the coarse outlines of images `(n, c, h, w)`, uint8: float32 `(n, 49 c)`.

    They are means over a grid of 7 x 7 fields, of pixel values in [0, 1].
    """
    return functional.adaptive_avg_pool2d(pixels(images), _FIELDS).flatten(1)


def honest_ranges(training: torch.Tensor, epsilon: float) -> HonestRanges:
    """Learn what honest images may look like.

    Args:
        training: uint8 `(n, c, h, w)`, whose values set the ranges.
        epsilon: the budget by which the ranges are widened, for pixel values in [0, 1].
    """
    margin = _margin(epsilon)
    lowest = torch.full(training.shape[1:], 255, dtype=torch.uint8)
    highest = torch.zeros(training.shape[1:], dtype=torch.uint8)
    for part in _parts(training):
        torch.minimum(lowest, part.amin(0), out=lowest)
        torch.maximum(highest, part.amax(0), out=highest)
    widened = (lowest.int() - margin).clamp(0, 255), (highest.int() + margin).clamp(0, 255)
    return HonestRanges(
        *(side.to(torch.uint8).contiguous().numpy().tobytes().hex() for side in widened)
    )


def share_told(ranges: HonestRanges, images: torch.Tensor, epsilon: float) -> float:
    """Measure how well ranges tell what a thief makes up: the share of moved images outside.

    Each value of an image is moved by two budgets, up or down at random, which is about what a
    thief has moved it after five steps of Algorithm 2. On photographs every value of an image takes
    all numbers from 0 to 255, and ranges tell nothing.

    Args:
        ranges: of the training images.
        images: honest ones, uint8 `(n, c, h, w)`; none of them set the ranges.
        epsilon: as for `honest_ranges`.
    """
    generator, told = torch.Generator().manual_seed(0), 0
    for part in _parts(images):
        sides = 2 * torch.randint(0, 2, part.shape, generator=generator) - 1
        moved = (part + sides * (2 * _margin(epsilon) + 1)).clamp_(0, 255).to(torch.uint8)
        told += int(ranges.foreign(moved).sum())
    return told / max(1, len(images))


def foreign_share(training: torch.Tensor, epsilon: float) -> float:
    """Estimate the share of honest queries that will be foreign to the training images' ranges.

    Each training image in turn is left out and compared with the ranges of all the others. This is
    a far better estimate than the few images of a validation pool give. An image can be foreign
    here only if it alone sets an end of a range.

    Args:
        training: uint8 `(n, c, h, w)`, at least two images.
        epsilon: as for `honest_ranges`.

    Raises:
        CountermarkError: there are fewer than two images.
    """
    if len(training) < 2:
        raise CountermarkError(
            f"{len(training)} training images do not show what honest queries look like; give at "
            "least two"
        )
    margin = _margin(epsilon)
    # The second largest and the second smallest value of each place: only the image that sets the
    # end of a range can be beyond one of them by more than the margin.
    high = _second_largest(_parts(training)).int() + margin
    low = 255 - _second_largest(255 - part for part in _parts(training)).int() - margin
    alone = sum(
        int(((part < low) | (part > high)).flatten(1).any(1).sum()) for part in _parts(training)
    )
    return alone / len(training)


def _parts(training: torch.Tensor) -> Iterator[torch.Tensor]:
    """Return the images in parts, so that they need not all fit into memory."""
    count = max(1, _AT_A_TIME // max(1, math.prod(training.shape[1:])))
    return (training[start : start + count] for start in range(0, len(training), count))


def _second_largest(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    """Compute the second largest value of each place, `(c, h, w)`, of at least two images.

    The images are uint8 and come in parts.
    """
    largest = second = torch.empty(0)
    for part in parts:
        if not len(largest):
            largest = second = torch.zeros_like(part[:1])
        # Reduce in pairs, then pairs of pairs: the larger of two largest values is the largest, and
        # either the smaller of them or one of their second largest values is the second largest.
        best, after = torch.cat((largest, part)), torch.cat((second, torch.zeros_like(part)))
        while len(best) > 1:
            half = len(best) // 2
            pairs = best[:half], best[half : 2 * half]
            lesser = torch.minimum(*pairs), torch.maximum(after[:half], after[half : 2 * half])
            best = torch.cat((torch.maximum(*pairs), best[2 * half :]))
            after = torch.cat((torch.maximum(*lesser), after[2 * half :]))
        largest, second = best, after
    return second[0]


def _margin(epsilon: float) -> int:
    return math.floor(255 * epsilon + 0.5)  # |255 delta| rounded to 8 bits is at most this
