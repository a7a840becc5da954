"""Convolution by the convolution theorem.

For wide filters over many channels it takes a fifth of the multiplications. The discrete Fourier
transform of an image a few pixels across is a product with a small matrix, and between the
transforms each frequency needs one product of channels with filters (Mathieu, Henaff and LeCun,
2014). Inside, pixels are the outermost dimensions and channels the innermost: every step is then a
matrix product over memory in its own order, and nothing is ever rearranged. All of it is linear, so
the gradient takes the same way with every matrix transposed. The transforms are orthogonal up to
scale, so the result differs from the direct sum by rounding only.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from countermark.fast.pooling import every_pixel

_WIDE = 5  # pixels of a filter from which the transforms pay for themselves
_MANY = 16  # channels, likewise
_LARGEST = 32  # pixels of an image beyond which a product with a matrix is no fast transform

Complex = tuple[torch.Tensor, torch.Tensor]  # real and imaginary parts


class SpectralConv2d(nn.Module):
    """A convolution with stride 1 that keeps the size of its images."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Convolve images that are padded with k // 2 zeros.

        Args:
            weight: filters `(filters, channels, k, k)`, k odd.
            bias: one number per filter, `(filters,)`, or `None`.
        """
        super().__init__()
        self.weight, self.bias = weight, bias
        self._spectra: dict[tuple[int, int], Complex] = {}  # of weights that are constant

    @staticmethod
    def suits(layer: nn.Conv2d) -> bool:
        """Whether `layer` can be computed this way, and is then faster."""
        kernel = layer.kernel_size[0]
        same = (
            layer.kernel_size == (kernel, kernel)
            and layer.padding == (kernel // 2, kernel // 2)
            and kernel % 2 == 1
        )
        pays = (
            kernel >= _WIDE
            and min(layer.in_channels, layer.out_channels) >= _MANY
            and layer.weight.device.type == "cpu"
        )
        return every_pixel(layer) and same and pays

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve `(n, c, h, w)` to `(n, filters, h, w)`.

        The result has its pixels outermost in memory, large images and empty batches aside.
        """
        size, kernel = (x.shape[2], x.shape[3]), self.weight.shape[2]
        if max(size) > _LARGEST or x.shape[0] == 0:
            return functional.conv2d(x, self.weight, self.bias, padding=kernel // 2)
        matrices = _matrices(*size, kernel, self.weight.dtype)
        spectrum = self._spectra.get(size)
        if spectrum is None:
            spectrum = _spectrum(self.weight.detach(), matrices)
            if not self.weight.requires_grad:
                self._spectra[size] = spectrum
        result: torch.Tensor = _Convolve.apply(x, self.weight, spectrum, matrices)  # type: ignore[no-untyped-call]
        return result if self.bias is None else result.add_(self.bias.view(1, -1, 1, 1))


@dataclass(frozen=True)
class _Matrices:
    """The transforms: of real numbers along the height, then of complex ones along the width.

    Complex numbers are stacked with their real parts above their imaginary parts.

    Attributes:
        rows: `(2 kept, h)`, real and imaginary part of each frequency in turn.
        columns: `(2 N, 2 w)`.
        taps: of the filters, `(2 kept N, k k)`.
        columns_back: `(2 w, 2 N)`.
        rows_back: `(h, 2 kept)`.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    taps: torch.Tensor
    columns_back: torch.Tensor
    rows_back: torch.Tensor


@functools.lru_cache(maxsize=64)
def _matrices(height: int, width: int, kernel: int, dtype: torch.dtype) -> _Matrices:
    reach = kernel // 2
    # A circle of this many pixels wraps only into the padding, which nobody looks at.
    tall, broad = (size + reach + (size + reach) % 2 for size in (height, width))
    kept = tall // 2 + 1
    angles = _angles(kept, torch.arange(height), tall)
    parts = torch.stack((angles.cos(), angles.sin()), 1)
    # Each kept frequency stands for its conjugate too, except for two of them.
    twice = torch.full((kept, 1, 1), 2.0, dtype=torch.float64)
    twice[0] = twice[-1] = 1
    angles = _angles(broad, torch.arange(width), broad)
    cos, sin = angles.cos(), angles.sin()
    columns = torch.cat((torch.cat((cos, -sin), 1), torch.cat((sin, cos), 1)))
    # Places of the filters' pixels on the circle. They run backwards because what PyTorch calls a
    # convolution is a correlation.
    places = reach - torch.arange(kernel)
    angles = (
        _angles(kept, places, tall)[:, None, :, None]
        + _angles(broad, places, broad)[None, :, None, :]
    )
    taps = torch.stack((angles.cos(), angles.sin()))
    rows, rows_back = (part.reshape(2 * kept, height) for part in (parts, parts * twice / tall))
    made = rows, columns, taps.reshape(-1, kernel * kernel), columns.t() / broad, rows_back.t()
    return _Matrices(*(matrix.to(dtype).contiguous() for matrix in made))


def _angles(frequencies: int, places: torch.Tensor, circle: int) -> torch.Tensor:
    return torch.outer(torch.arange(frequencies).double(), places.double()) * (
        -2 * math.pi / circle
    )


def _spectrum(weight: torch.Tensor, matrices: _Matrices) -> Complex:
    """Transform filters to `(frequencies, channels, filters)`."""
    filters, channels, kernel, _ = weight.shape
    spectrum = torch.mm(
        matrices.taps, weight.permute(2, 3, 1, 0).reshape(kernel * kernel, -1)
    ).view(2, -1, channels, filters)
    return spectrum[0], spectrum[1]


def _forth(x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> Complex:
    """Transform images `(n, c, h, w)` to `(frequencies, n, c)`."""
    images, channels, height, _ = x.shape
    kept = len(rows) // 2
    z = torch.mm(rows, x.permute(2, 3, 0, 1).reshape(height, -1)).view(kept, -1, images * channels)
    real, imaginary = (
        torch.bmm(part.expand(kept, -1, -1), z).view(-1, images, channels)
        for part in columns.chunk(2)
    )
    return real, imaginary


def _back(z: Complex, columns: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Transform `(frequencies, n, c)` to images `(n, c, h, w)`."""
    _, images, channels = z[0].shape
    height, width, kept = len(rows), len(columns) // 2, rows.shape[1] // 2
    first, second = (part.expand(kept, -1, -1) for part in columns.chunk(2, dim=1))
    real, imaginary = (part.view(kept, first.shape[2], -1) for part in z)
    y = torch.bmm(first, real).baddbmm_(second, imaginary)
    strides = (channels, 1, width * images * channels, images * channels)
    # This is no view of anything: the next layer may overwrite it.
    result = y.new_empty_strided((images, channels, height, width), strides)
    torch.mm(rows, y.view(2 * kept, -1), out=result.permute(2, 3, 0, 1).view(height, -1))
    return result


def _product(a: Complex, b: Complex, sign: int) -> Complex:
    """Batched matrix product of a with b (`sign` 1) or with b's conjugate (-1)."""
    real = torch.bmm(a[0], b[0]).baddbmm_(a[1], b[1], alpha=-sign)
    imaginary = torch.bmm(a[1], b[0]).baddbmm_(a[0], b[1], alpha=sign)
    return real, imaginary


class _Convolve(torch.autograd.Function):
    """Transform, multiply each frequency, transform back."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, spectrum: Complex, matrices: _Matrices
    ) -> torch.Tensor:
        z = _forth(x, matrices.rows, matrices.columns)
        ctx.matrices, ctx.spectrum, ctx.shape, ctx.strides = (
            matrices,
            spectrum,
            weight.shape,
            x.stride(),
        )
        ctx.z = z if ctx.needs_input_grad[1] else None
        return _back(_product(z, spectrum, 1), matrices.columns_back, matrices.rows_back)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        matrices: _Matrices = ctx.matrices
        y = _forth(gradient, matrices.rows_back.t(), matrices.columns_back.t())
        for_x = for_weight = None
        if ctx.needs_input_grad[0]:
            turned = ctx.spectrum[0].transpose(1, 2), ctx.spectrum[1].transpose(1, 2)
            found = _back(_product(y, turned, -1), matrices.columns.t(), matrices.rows.t())
            # Other layers are slow where a gradient does not lie in memory as the input does.
            for_x = (
                found
                if found.stride() == ctx.strides
                else found.new_empty_strided(found.shape, ctx.strides).copy_(found)
            )
        if ctx.needs_input_grad[1]:
            filters, channels, kernel, _ = ctx.shape
            real, imaginary = (part.transpose(1, 2) for part in ctx.z)
            turned = _product((real, imaginary), y, -1)
            flat = matrices.taps.t() @ torch.stack((turned[0], -turned[1])).view(
                len(matrices.taps), -1
            )
            for_weight = flat.view(kernel, kernel, channels, filters).permute(3, 2, 0, 1)
        return for_x, for_weight, None, None
