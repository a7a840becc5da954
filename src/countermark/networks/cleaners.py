"""Input cleaners: layers in front of a network that take perturbations out of an image.

A thief who puts one in front of a stolen network does not touch the weights that hold the mark, and
may still lose it: where a trial is a clean image under a small perturbation, a cleaner may give
back the clean image. A copy's `model.json` names the cleaners in front of it and their amounts, and
loading the folder builds them again from the table here.

Steps and medians have gradients that lead an attack nowhere, so the accuracy measured behind them
would flatter the copy (gradient masking; Athalye, Carlini and Wagner, 2018). Every cleaner but the
smooth ones therefore passes the gradient of its output to its input as it is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional

from countermark.errors import CountermarkError
from countermark.text import brief

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Amount:
    """The one number that says how much a cleaner or a removal does.

    Attributes:
        kind: `int` or `float`.
        default: the number if none is given.
        range: the numbers that make sense, in words.
        fits: whether a number is one of them.
    """

    kind: type[int] | type[float]
    default: float
    range: str
    fits: Callable[[float], bool]

    def check(self, name: str, value: float) -> None:
        """Refuse a number that makes no sense.

        Args:
            name: what the number is called in the message.
            value: the number.

        Raises:
            CountermarkError: it is out of range, or not whole where it must be.
        """
        whole = self.kind is float or float(value).is_integer()
        if not (whole and self.fits(value)):
            raise CountermarkError(f"{name} is {self.range}, not {brief(value)}")


@dataclass(frozen=True)
class Cleaner:
    """One kind of cleaner.

    Attributes:
        help: one line for the help of the verb.
        amount: its one number.
        make: builds the layer, for images of a shape `(channels, height, width)`, from the amount.
            A layer that has parameters is trained before it cleans anything, by a thief or by an
            owner whose trials are to survive it.
        options: the options of a thief's training and their defaults (see `thieves.Means`).
    """

    help: str
    amount: Amount
    make: Callable[[Shape, float], nn.Module]
    options: Mapping[str, int] = field(default_factory=dict)


class Straight(nn.Module):
    """A fixed map of pixels that passes gradients through as they are, so that no attack stops."""

    def __init__(self, clean: Callable[[torch.Tensor, float], torch.Tensor], amount: float) -> None:
        """Clean images by `clean(x, amount)`."""
        super().__init__()
        self.clean, self.amount = clean, amount

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Clean pixels `(n, c, h, w)`."""
        return self.clean(x, self.amount).detach() + (x - x.detach())

    def extra_repr(self) -> str:
        """Name the map."""
        return f"{self.clean.__name__}, {self.amount:g}"


class Blur(nn.Module):
    """The mean over a square around each pixel; at the border, over its part within the image."""

    def __init__(self, side: int) -> None:
        """Take squares of `side` x `side` pixels, an odd number."""
        super().__init__()
        self.side = side

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Blur pixels `(n, c, h, w)`."""
        return functional.avg_pool2d(x, self.side, 1, self.side // 2, count_include_pad=False)


class Denoiser(nn.Module):
    """A small network that adds a correction to an image: convolutions at full and at half size."""

    def __init__(self, channels: int, width: int) -> None:
        """Correct images of `channels` channels with `width` filters, twice that at half size."""
        super().__init__()
        self.fine = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.coarse = nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        self.up = nn.Conv2d(2 * width, width, 3, padding=1)
        self.last = nn.Conv2d(2 * width, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Clean pixels `(n, c, h, w)`."""
        fine = functional.relu(self.fine(x))
        coarse = functional.relu(self.coarse(functional.relu(self.down(fine))))
        coarse = functional.relu(self.up(functional.interpolate(coarse, size=x.shape[2:])))
        # Pixels are nearly black or white in many an image, which a sigmoid reaches and holds.
        return torch.sigmoid(6 * (x - 0.5) + self.last(torch.cat((fine, coarse), 1)))


def threshold(x: torch.Tensor, level: float) -> torch.Tensor:
    """Make pixels above `level` white and all others black."""
    return (x > level).to(x.dtype)


def clip(x: torch.Tensor, margin: float) -> torch.Tensor:
    """Stretch the pixels from `margin` to 1 - `margin` over [0, 1] and clip those outside."""
    return ((x - margin) / (1 - 2 * margin)).clamp(0, 1)


def median(x: torch.Tensor, side: float) -> torch.Tensor:
    """Take the median of `side` x `side` pixels in each channel; border pixels are repeated."""
    k = int(side)
    n, c, h, w = x.shape
    wide = functional.pad(x.reshape(n * c, 1, h, w), (k // 2,) * 4, mode="replicate")
    squares = functional.unfold(wide, k)
    return squares.sort(1).values[:, k * k // 2].reshape(n, c, h, w)


def levels(x: torch.Tensor, count: float) -> torch.Tensor:
    """Round pixels to the nearest of `count` levels from 0 to 1."""
    return (x * (count - 1)).round() / (count - 1)


def _odd(value: float) -> bool:
    return 3 <= value <= 15 and value % 2 == 1


_SIDE = Amount(int, 3, "an odd number from 3 to 15", _odd)

CLEANERS: Mapping[str, Cleaner] = {
    "threshold": Cleaner(
        "pixels above this level become white and all others black",
        Amount(float, 0.5, "a level between 0 and 1", lambda value: 0 < value < 1),
        lambda _, level: Straight(threshold, level),
    ),
    "clip": Cleaner(
        "this much of the range of pixels is cut off at both ends",
        Amount(float, 0.35, "a margin between 0 and 0.5", lambda value: 0 < value < 0.5),
        lambda _, margin: Straight(clip, margin),
    ),
    "median": Cleaner(
        "the median of a square of this side around each pixel",
        _SIDE,
        lambda _, side: Straight(median, side),
    ),
    "blur": Cleaner(
        "the mean of a square of this side around each pixel",
        _SIDE,
        lambda _, side: Blur(int(side)),
    ),
    "levels": Cleaner(
        "pixels are rounded to this many levels of each channel",
        Amount(int, 4, "a number of levels from 2 to 255", lambda value: 2 <= value <= 255),
        lambda _, count: Straight(levels, count),
    ),
    "denoise": Cleaner(
        "a network of this many filters, trained on the thief's images",
        Amount(int, 24, "a number of filters from 1 to 256", lambda value: 1 <= value <= 256),
        lambda shape, width: Denoiser(shape[0], int(width)),
        {"epochs": 2},
    ),
}
"""The cleaners by name. To add a cleaner, add a row."""


def behind(cleaners: Sequence[tuple[str, float]], network: nn.Module, shape: Shape) -> nn.Module:
    """Put cleaners in front of a network.

    Args:
        cleaners: their names and amounts; the last one sees the image first, as it was put in front
            last.
        network: pixels `(n, c, h, w)` of [0, 1] to logits.
        shape: one image, `(channels, height, width)`.

    Returns:
        The network itself where there are no cleaners, else a sequence of the two: so the weights
        of a copy behind a cleaner are named as `0.*` and `1.*`.

    Raises:
        CountermarkError: an unknown cleaner, or an amount that makes no sense.

    Example:
        >>> from torch import nn
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
        >>> behind([("median", 3)], network, (3, 8, 8))(torch.rand(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """
    for name, amount in cleaners:
        if name not in CLEANERS:
            raise CountermarkError(
                f"unknown cleaner {brief(name)}; there are {', '.join(CLEANERS)}"
            )
        CLEANERS[name].amount.check(f"the amount of the cleaner {name}", amount)
        network = nn.Sequential(CLEANERS[name].make(shape, amount), network)
    return network
