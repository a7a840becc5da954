"""Queries that no honest client sends: images that no perturbation within the budget makes out of anything like the training data.

Each pixel has a range over the training images. A query is foreign if one of its pixels is outside by more than the budget. An honest image
whose pixels are in range cannot be made foreign within the budget, by anybody: that is arithmetic, not learned. A thief who makes
queries up by steps (Algorithm 2 and its kin) leaves the ranges soon. What is foreign depends on the query alone, never on a coin.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn import functional

from countermark.data import pixels
from countermark.errors import CountermarkError

MOST_VALUES = 1 << 22
"""Values of the largest image whose ranges are written down, three channels of 1182 x 1182 for example."""
_FIELDS = 7


@dataclass(frozen=True)
class Familiar:
    """What images may look like; public.

    Attributes:
        lowest: the lowest familiar value, budget included, of each place of an image `(c, h, w)`, in order; two hexadecimal digits each.
        highest: the highest, in the same way.
    """

    lowest: str
    highest: str

    @property
    def values(self) -> int:
        """How many values an image has."""
        return len(self.lowest) // 2

    @cached_property
    def _ranges(self) -> tuple[torch.Tensor, ...]:
        return tuple(torch.frombuffer(bytearray.fromhex(side), dtype=torch.uint8) for side in (self.lowest, self.highest))

    def foreign(self, images: torch.Tensor) -> torch.Tensor:
        """Which of images `(n, c, h, w)`, uint8, no honest client sends: bool `(n,)`."""
        low, high = self._ranges
        flat = images.flatten(1)
        return ((flat < low) | (flat > high)).any(1)


def outlines(images: torch.Tensor) -> torch.Tensor:
    """What images `(n, c, h, w)`, uint8, look like from afar: means over 7 x 7 fields in pixels of [0, 1], float32 `(n, 49 c)`."""
    return functional.adaptive_avg_pool2d(pixels(images), _FIELDS).flatten(1)


def familiar(training: torch.Tensor, epsilon: float) -> Familiar:
    """Learn what images may look like.

    Args:
        training: uint8 `(n, c, h, w)`, whose values set the ranges.
        epsilon: the budget by which ranges are widened, in pixels of [0, 1].

    Raises:
        CountermarkError: an image has more than `MOST_VALUES` values.
    """
    if training[0].numel() > MOST_VALUES:
        raise CountermarkError(
            f"images of {training[0].numel()} values are too large for coins on made-up queries, {MOST_VALUES} are the most; "
            "guard near ties alone (--natural-only)"
        )
    margin = _margin(epsilon)
    lowest = (training.amin(0).int() - margin).clamp(0, 255).to(torch.uint8)
    highest = (training.amax(0).int() + margin).clamp(0, 255).to(torch.uint8)
    return Familiar(lowest.contiguous().numpy().tobytes().hex(), highest.contiguous().numpy().tobytes().hex())


def strangeness(training: torch.Tensor, epsilon: float) -> float:
    """The share of honest queries that will be foreign to `familiar(training, epsilon)`.

    Each training image in turn is left out and held against the ranges of all the others: a far better count than the few images of a
    validation pool give. Only an image that alone sets an end of a range can be foreign then.

    Args:
        training: uint8 `(n, c, h, w)`, at least two.
        epsilon: as for `familiar`.

    Raises:
        CountermarkError: fewer than two images.
    """
    if len(training) < 2:
        raise CountermarkError(f"{len(training)} training images do not show what honest queries look like; give at least two")
    values, margin = training.flatten(1), _margin(epsilon)
    alone = torch.zeros(len(values), dtype=torch.bool)
    for largest in (False, True):
        ends, owners = values.topk(2, dim=0, largest=largest)
        alone[owners[0][(ends[0].int() - ends[1].int()).abs() > margin]] = True
    return float(alone.double().mean())


def _margin(epsilon: float) -> int:
    return math.floor(255 * epsilon + 0.5)  # |255 delta| rounded to 8 bits is at most this
