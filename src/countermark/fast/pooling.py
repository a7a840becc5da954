"""Max-pooling by two with what stands around it: a ReLU, and a convolution of few channels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from countermark.networks.named import blocks_of_pixels

FEW = 4  # input channels up to which blocks of pixels make a convolution faster


class Pool(nn.Module):
    """Max-pooling by two, and a ReLU if wanted."""

    def __init__(self, relu: bool) -> None:
        """Apply the ReLU too if `relu`."""
        super().__init__()
        self.relu = relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pool `(n, c, h, w)`."""
        best = pooled(x, self.relu)
        return best if best.is_contiguous(memory_format=torch.channels_last) else best.contiguous()


def by_two(layer: nn.MaxPool2d) -> bool:
    """Whether a layer is max-pooling by two and nothing else."""
    size, stride, padding, dilation = (
        (n, n) if isinstance(n, int) else n
        for n in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    )
    return (size, stride, padding, dilation, layer.ceil_mode, layer.return_indices) == (
        (2, 2),
        (2, 2),
        (0, 0),
        (1, 1),
        False,
        False,
    )


def pooled(x: torch.Tensor, relu: bool) -> torch.Tensor:
    """Max-pool `(n, c, h, w)` by two, and apply a ReLU if wanted."""
    height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2  # an odd row or column is left out
    return _max_of_four(x[:, :, :height, :width], _places, relu)


def _places(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return x[:, :, ::2, ::2], x[:, :, ::2, 1::2], x[:, :, 1::2, ::2], x[:, :, 1::2, 1::2]


def _groups(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.chunk(x, 4, dim=1)


def every_pixel(layer: nn.Conv2d) -> bool:
    """Whether a convolution treats every pixel alike.

    It has no stride, no dilation and no groups, and it pads with zeros.
    """
    return (layer.stride, layer.dilation, layer.groups, layer.padding_mode) == (
        (1, 1),
        (1, 1),
        1,
        "zeros",
    )


def suits_blocks(layer: nn.Conv2d) -> bool:
    """Whether a convolution with max-pooling by two behind it is faster on blocks of pixels."""
    square = (
        layer.kernel_size[0] == layer.kernel_size[1]
        and isinstance(layer.padding, tuple)
        and layer.padding[0] == layer.padding[1]
    )
    return square and every_pixel(layer) and layer.in_channels <= FEW


def block_filters(weight: torch.Tensor) -> torch.Tensor:
    """Make filters for blocks of 2x2 pixels out of the filters of a convolution.

    Args:
        weight: filters `(f, c, k, k)`.

    Returns:
        Filters `(4 f, 4 c, b, b)` that on blocks do what `weight` does at a block's four places.
    """
    kernel = weight.shape[2]
    side = 2 * (kernel // 2 + 1)
    places = [
        functional.pad(weight, (column, side - kernel - column, row, side - kernel - row))
        for row in (0, 1)
        for column in (0, 1)
    ]
    return functional.pixel_unshuffle(torch.cat(places), 2)


def pooled_blocks(
    x: torch.Tensor,
    kernel: int,
    padding: int,
    value: float,
    filters: torch.Tensor,
    bias: torch.Tensor,
    relu: bool,
) -> torch.Tensor:
    """Convolution, max-pooling by two and a ReLU, computed on blocks of pixels.

    As in `networks.named.HalvingConv2d`, and for the same reason, each pixel of a block is a
    channel. So is each place of the block in the result: pooling is a maximum over four groups of
    channels.

    Args:
        x: images `(n, c, h, w)`.
        kernel: side of the convolution's filters.
        padding: pixels on each side, with the given `value`; the convolution's result must have an
            even height and width.
        value: the value to pad with.
        filters: `block_filters` of the convolution's weights.
        bias: four times its bias, `(4 f,)`.
        relu: whether to apply the ReLU.

    Returns:
        `(n, f, h/2, w/2)` of that result, channels last in memory.
    """
    # Blocks of the image that one block of the result depends on, in each direction.
    blocks = kernel // 2 + 1
    height, width = (side + 2 * padding - kernel + 1 for side in x.shape[2:])
    below, right = (side + 2 * (blocks - 1) - padding for side in (height, width))
    padded = functional.pad(
        x, (padding, right - x.shape[3], padding, below - x.shape[2]), value=value
    )
    each = blocks_of_pixels(padded).contiguous(memory_format=torch.channels_last)
    return _max_of_four(functional.conv2d(each, filters, bias), _groups, relu)


def _max_of_four(
    x: torch.Tensor, parts: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], relu: bool
) -> torch.Tensor:
    result: torch.Tensor = _MaxOfFour.apply(x, parts, relu)  # type: ignore[no-untyped-call]
    return result


def _ones(
    compare: Callable[..., torch.Tensor], one: torch.Tensor, other: torch.Tensor
) -> torch.Tensor:
    """Where a comparison holds, as numbers.

    Products with numbers are several times faster than products with booleans.
    """
    return compare(one, other, out=torch.empty_like(one))


class _MaxOfFour(torch.autograd.Function):
    """The largest of four parts of a tensor.

    Its gradient goes to the first of equal parts, as that of `nn.MaxPool2d` does.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        parts: Callable[[torch.Tensor], tuple[torch.Tensor, ...]],
        relu: bool,
    ) -> torch.Tensor:
        a, b, c, d = parts(x)
        first, second = torch.maximum(a, b), torch.maximum(c, d)
        best = torch.maximum(first, second)
        if ctx.needs_input_grad[0]:
            ctx.parts, ctx.shape, ctx.relu = parts, x.shape, relu
            ctx.strides, ctx.best_strides = x.stride(), best.stride()
            ctx.save_for_backward(
                _ones(torch.ge, a, b), _ones(torch.ge, c, d), _ones(torch.ge, first, second)
            )
            if relu:
                ctx.positive = _ones(torch.gt, best, best.new_zeros(()))
        return best.clamp_min_(0) if relu else best

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        a_wins, c_wins, first_wins = ctx.saved_tensors
        # Everything below runs through memory in one order.
        if gradient.stride() != ctx.best_strides:
            gradient = gradient.new_empty_strided(gradient.shape, ctx.best_strides).copy_(gradient)
        if ctx.relu:
            gradient = gradient * ctx.positive
        result = gradient.new_empty_strided(ctx.shape, ctx.strides)
        a, b, c, d = ctx.parts(result)
        first = gradient * first_wins
        second = gradient - first
        torch.mul(first, a_wins, out=a)
        torch.sub(first, a, out=b)
        torch.mul(second, c_wins, out=c)
        torch.sub(second, c, out=d)
        return result, None, None
