"""Networks by name. Each maps pixels of [0, 1] to logits; a normaliser, where there is one, is its first layer.

Everything else in Countermark takes any `nn.Module` of that kind. A name is only needed where weights are loaded from a file: the network
is built by us and the file may fill in numbers, nothing more.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn import functional

from countermark.errors import CountermarkError, choose
from countermark.text import brief

_LARGEST_IMAGE = 1 << 20  # values in one image; what a file may ask of us
_LARGEST_CLASSES = 10_000

SMALL_WIDTHS = (16, 32, 256)  # the wide linear layer costs little time and holds the mark
WIDE_WIDTHS = (32, 64, 512)


class Normalise(nn.Module):
    """The layer (x - mean) / std, so that budgets stay in pixels of [0, 1]."""

    def __init__(self, mean: float, std: float) -> None:
        """Normalise all channels by one `mean` and `std`, in pixels."""
        super().__init__()
        self.mean = mean
        self.std = std

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise pixels `(n, c, h, w)`."""
        return (x - self.mean) / self.std


class Clip(nn.Module):
    """The layer that takes [low, high] to [0, 1] and clips what is outside, for images whose pixels are nearly black or nearly white.

    Perturbations of a black pixel below `low` end here, and those of a white one below 1 - `high`. Its gradient is that of the map without
    the clipping: a layer that is flat outside its range would hide from attacks how to bring a pixel back into it (gradient masking), and a
    network trained behind it would only seem robust (docs/log.md). Steps by the gradient's sign so reach all that the budget allows. FAB,
    which goes by the gradient's size, is misled by it, and a copy in another framework has the flat gradient: there Square is the check.
    """

    def __init__(self, low: float, high: float) -> None:
        """Clip to `low` and `high`, in pixels."""
        super().__init__()
        self.low = low
        self.high = high

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map pixels `(n, c, h, w)`."""
        straight = (x - self.low) / (self.high - self.low)
        return straight + (straight.clamp(0, 1) - straight).detach()


class HalvingConv2d(nn.Conv2d):
    """A convolution with stride 2 that halves height and width, computed with stride 1 on 2x2 blocks of pixels.

    The numbers are those of `nn.Conv2d(..., kernel, stride=2, padding=kernel // 2 - 1)`; on processors its gradient with regard to the
    input, which every attack step needs, is several times faster for images of one channel.
    """

    def __init__(self, channels: int, filters: int, kernel: int = 4) -> None:
        """Convolve `channels` input channels with `filters` filters of `kernel` x `kernel`, an even number."""
        super().__init__(channels, filters, kernel, stride=2, padding=kernel // 2 - 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve `(n, c, h, w)` to `(n, filters, h/2, w/2)`."""
        blocks = blocks_of_pixels(functional.pad(x, (int(self.padding[0]),) * 4))
        return functional.conv2d(blocks, functional.pixel_unshuffle(self.weight, 2), self.bias)


def blocks_of_pixels(x: torch.Tensor) -> torch.Tensor:
    """Make channels of the pixels of each 2x2 block: `(n, c, h, w)` to `(n, 4 c, h/2, w/2)`."""
    if x.shape[0] == 0:  # which PyTorch leaves in its shape; `len` would fix the batch of an export
        return x.reshape(0, 4 * x.shape[1], x.shape[2] // 2, x.shape[3] // 2)
    return functional.pixel_unshuffle(x, 2)


def small(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Four layers, two of them convolutions with stride 2: fast enough to train robustly on a laptop."""
    return _strided(shape, classes, SMALL_WIDTHS)


def wide(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The layers of `small` in twice the width: a large budget wants more features than a small network has."""
    return _strided(shape, classes, WIDE_WIDTHS)


def clipped(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The network `wide` behind a clip to [.3, .7], for images of nearly black and nearly white pixels, such as MNIST's."""
    return nn.Sequential(Clip(0.3, 0.7), *wide(shape, classes).children())


def _strided(shape: tuple[int, int, int], classes: int, widths: tuple[int, int, int]) -> nn.Module:
    channels, height, width = shape
    first, second, hidden = widths
    flat = second * (height // 4) * (width // 4)
    return nn.Sequential(
        HalvingConv2d(channels, first),
        nn.ReLU(),
        nn.Conv2d(first, second, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(flat, hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )


def paper(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The owner's network of Thakkar, Zizzo and Maffeis (2023): two convolutional blocks and two linear layers."""
    channels, height, width = shape
    return nn.Sequential(
        Normalise(0.5, 0.5),
        nn.Conv2d(channels, 32, 5, padding=2),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.BatchNorm2d(32),
        nn.Dropout(0.5),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.BatchNorm2d(64),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(64 * (height // 4) * (width // 4), 512),
        nn.BatchNorm1d(512),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(512, classes),
    )


def surrogate(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The black-box thief's network of the same paper: two convolutions with stride 2 and two linear layers, tanh throughout."""
    channels, height, width = shape
    return nn.Sequential(
        HalvingConv2d(channels, 16, 8),
        nn.Tanh(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(32 * (height // 4) * (width // 4), 32),
        nn.Tanh(),
        nn.Linear(32, classes),
    )


NETWORKS: Mapping[str, Callable[[tuple[int, int, int], int], nn.Module]] = {
    "small": small,
    "wide": wide,
    "clipped": clipped,
    "paper": paper,
    "surrogate": surrogate,
}


def build(name: str, shape: tuple[int, int, int], classes: int, seed: int | None = None) -> nn.Module:
    """Build a network by name.

    Args:
        name: `small`, `wide`, `clipped`, `paper` or `surrogate`.
        shape: one image, `(channels, height, width)`; height and width are multiples of 4.
        classes: number of classes.
        seed: seed of the initial weights; without one they come from torch's generator.

    Raises:
        CountermarkError: unknown name, or a shape that no image classifier of ours has.
    """
    choose("network", name, NETWORKS)
    fits = len(shape) == 3 and min(shape) >= 1 and math.prod(shape) <= _LARGEST_IMAGE and not (shape[1] % 4 or shape[2] % 4)
    if not fits or not 2 <= classes <= _LARGEST_CLASSES:
        raise CountermarkError(
            f"no network takes images of shape {brief(tuple(shape))} to {brief(classes)} classes; "
            "give (channels, height, width), the last two in multiples of 4"
        )
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return NETWORKS[name](shape, classes)
