"""Networks by name.

Each maps pixels of [0, 1] to logits; a normaliser, where there is one, is its first layer.
Everything else in Countermark takes any `nn.Module` of that kind. A name is only needed where
weights are loaded from a file: we build the network, and the file may fill in numbers, nothing
more.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional

from countermark.errors import CountermarkError, choose
from countermark.text import brief

_LARGEST_IMAGE = 1 << 20  # values in one image; a file may not declare more
_LARGEST_CLASSES = 10_000
_SMALLEST_SIDE = 4  # pixels

SMALL_WIDTHS = (16, 32, 256)  # the wide linear layer costs little time and holds the mark
WIDE_WIDTHS = (32, 64, 512)


class Normalise(nn.Module):
    """The layer (x - mean) / std, so that budgets stay in pixels of [0, 1]."""

    def __init__(self, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
        """Normalise all channels by one `mean` and `std`, in pixels, or each channel by its own.

        Args:
            mean: one number, or one for each channel.
            std: likewise, all above zero.
        """
        super().__init__()
        self.mean = mean if isinstance(mean, int | float) else tuple(mean)
        self.std = std if isinstance(std, int | float) else tuple(std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise pixels `(n, c, h, w)`."""
        return (x - _by_channel(self.mean, x)) / _by_channel(self.std, x)


def _by_channel(number: float | tuple[float, ...], x: torch.Tensor) -> float | torch.Tensor:
    """One number as it is; several as a tensor that broadcasts over images `x`.

    They are filled in where `x` is: a copy from the host's memory fits into no CUDA graph.
    """
    if not isinstance(number, tuple):
        return number
    return torch.stack([x.new_full((), each) for each in number]).view(-1, 1, 1)


class Clip(nn.Module):
    """The layer that maps [low, high] to [0, 1] and clips what is outside.

    It is for images whose pixels are nearly black or nearly white. It removes perturbations of a
    black pixel of less than `low`, and those of a white one of less than 1 - `high`.

    Its gradient is that of the map without the clipping. A layer that is flat outside its range
    would hide from attacks how to bring a pixel back into it (gradient masking), and a network
    trained behind it would only seem robust (docs/log.md). Attack steps along the gradient's sign
    therefore reach everything that the budget allows. FAB, which uses the gradient's size, is
    misled by it, and a copy in another framework has the flat gradient; in these cases the check
    is Square, which uses no gradient.
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
    """A convolution with stride 2, computed with stride 1 on 2x2 blocks of pixels.

    It halves height and width; an odd one is rounded down, as in `nn.Conv2d`.

    Its results are those of `nn.Conv2d(..., kernel, stride=2, padding=kernel // 2 - 1)`. On CPUs
    its gradient with respect to the input, which every attack step needs, is several times faster
    for images of one channel.
    """

    def __init__(self, channels: int, filters: int, kernel: int = 4) -> None:
        """Convolve `channels` channels with `filters` filters; `kernel`, their side, is even."""
        super().__init__(channels, filters, kernel, stride=2, padding=kernel // 2 - 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve `(n, c, h, w)` to `(n, filters, h // 2, w // 2)`."""
        before = int(self.padding[0])
        blocks = blocks_of_pixels(
            functional.pad(x, (before, before - x.shape[3] % 2, before, before - x.shape[2] % 2))
        )
        return functional.conv2d(blocks, functional.pixel_unshuffle(self.weight, 2), self.bias)


def blocks_of_pixels(x: torch.Tensor) -> torch.Tensor:
    """Make channels of the pixels of each 2x2 block: `(n, c, h, w)` to `(n, 4 c, h/2, w/2)`."""
    if x.shape[0] == 0:  # which PyTorch leaves in its shape; `len` would fix the batch of an export
        return x.reshape(0, 4 * x.shape[1], x.shape[2] // 2, x.shape[3] // 2)
    return functional.pixel_unshuffle(x, 2)


def small(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Four layers, two of them stride-2 convolutions; fast enough to train robustly on a laptop."""
    return _strided(shape, classes, SMALL_WIDTHS)


def wide(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The layers of `small` at twice the width, for budgets that need more features than it has."""
    return _strided(shape, classes, WIDE_WIDTHS)


def clipped(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The network `wide` behind a clip to [0.3, 0.7].

    It is for images of nearly black and nearly white pixels, such as MNIST's.
    """
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
    """The owner's network of Thakkar, Zizzo and Maffeis (2023).

    It has two convolutional blocks and two linear layers.
    """
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
    """The black-box thief's network of Thakkar, Zizzo and Maffeis (2023).

    It has two convolutions with stride 2 and two linear layers, with tanh between all of them.
    """
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


class PreActivationBlock(nn.Module):
    """A residual block whose batch norms and ReLUs come before its convolutions.

    See He et al., 2016, "Identity mappings in deep residual networks".
    """

    def __init__(self, channels: int, filters: int, stride: int = 1) -> None:
        """Take `channels` channels to `filters`, every `stride`-th pixel in each direction."""
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, filters, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(filters)
        self.conv2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
        same = stride == 1 and channels == filters
        self.shortcut = None if same else nn.Conv2d(channels, filters, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `(n, channels, h, w)` to `(n, filters, h / stride, w / stride)`, rounded up."""
        active = functional.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(active)
        result: torch.Tensor = self.conv2(functional.relu(self.norm2(self.conv1(active))))
        return result + shortcut


def resnet(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The pre-activation ResNet-18 (11 M weights), for colour and a GPU."""
    return _residual(shape, classes, width=64, blocks=2)


def narrow(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A pre-activation ResNet with one block a stage, 16 filters wide (308,000 weights).

    A laptop can train it on colour images.
    """
    return _residual(shape, classes, width=16, blocks=1)


def _residual(shape: tuple[int, int, int], classes: int, width: int, blocks: int) -> nn.Module:
    """A ResNet of four stages of `blocks` blocks each.

    Each stage is twice as wide as the one before and has half its height and width.
    """
    channels, height, width_of_image = shape
    # Large images are reduced at once: the stages see sides of 32 to 63 pixels for images with
    # sides of up to 255.
    stride = (
        1 if min(height, width_of_image) < 64 else 2 if min(height, width_of_image) < 128 else 4
    )
    kernel = max(3, 2 * stride - 1)
    layers: list[nn.Module] = [
        nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False)
    ]
    before = width
    for stage in range(4):
        filters = width << stage
        for block in range(blocks):
            layers.append(PreActivationBlock(before, filters, 2 if stage and not block else 1))
            before = filters
    layers += [
        nn.BatchNorm2d(before),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(before, classes),
    ]
    return nn.Sequential(*layers)


NETWORKS: Mapping[str, Callable[[tuple[int, int, int], int], nn.Module]] = {
    "small": small,
    "wide": wide,
    "clipped": clipped,
    "paper": paper,
    "surrogate": surrogate,
    "resnet": resnet,
    "narrow": narrow,
}


def build(
    name: str, shape: tuple[int, int, int], classes: int, seed: int | None = None
) -> nn.Module:
    """Build a network by name.

    Args:
        name: a key of `NETWORKS`.
        shape: one image, `(channels, height, width)`; height and width are 4 or more.
        classes: number of classes.
        seed: seed of the initial weights; without one they come from torch's generator.

    Raises:
        CountermarkError: unknown name, or a shape that no built-in network takes.
    """
    choose("network", name, NETWORKS)
    fits = (
        len(shape) == 3
        and shape[0] >= 1
        and min(shape[1:]) >= _SMALLEST_SIDE
        and math.prod(shape) <= _LARGEST_IMAGE
    )
    if not fits or not 2 <= classes <= _LARGEST_CLASSES:
        raise CountermarkError(
            f"no network takes images of shape {brief(tuple(shape))} to {brief(classes)} classes; "
            f"give (channels, height, width), the last two {_SMALLEST_SIDE} or more"
        )
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        return NETWORKS[name](shape, classes)
