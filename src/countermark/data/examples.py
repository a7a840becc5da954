"""Examples: images with their labels, and the pixels that networks see.

`examples[index]` selects and reads nothing; `examples.x[index]` reads. Small sets are tensors;
large ones stay in a file (`Rows`), of which a batch at a time is read.
"""

import hashlib
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from countermark.errors import CountermarkError

_ROUNDING = 1e-6  # how far rounding may have taken pixels outside [0, 1]
_CHUNK = 1 << 24  # bytes of images that are hashed at a time
_CONTENT_BYTES = 8


class Rows:
    """Images in one file, read by position when they are indexed; nothing is mapped or kept.

    `rows[i:j]` and `rows[tensor]` read a uint8 tensor `(n, c, h, w)`; `rows.take(index)` selects.
    """

    dtype = torch.uint8

    def __init__(
        self,
        path: Path,
        shape: tuple[int, ...],
        *,
        index: torch.Tensor | None = None,
        offset: int = 0,
    ) -> None:
        """Refer to images in a file, without reading them.

        Args:
            path: the file.
            shape: `(n, c, h, w)` of all images in the file.
            index: positions of the images to refer to; None for all of them.
            offset: byte of the file at which the first image begins.
        """
        self.path, self.offset, self._count, self._image = path, offset, shape[0], tuple(shape[1:])
        self._bytes = math.prod(self._image)
        self.index = index

    def __len__(self) -> int:
        return self._count if self.index is None else len(self.index)

    @property
    def shape(self) -> torch.Size:
        """`(n, c, h, w)`."""
        return torch.Size((len(self), *self._image))

    def take(self, index: torch.Tensor | slice) -> "Rows":
        """The images at `index`, a slice, positions or a mask; nothing is read."""
        chosen = self._places()[index]
        return Rows(self.path, (self._count, *self._image), index=chosen, offset=self.offset)

    def _places(self) -> torch.Tensor:
        return torch.arange(self._count) if self.index is None else self.index

    def __getitem__(self, index: torch.Tensor | slice) -> torch.Tensor:
        """Read the images at `index`.

        Raises:
            CountermarkError: the file is gone, or shorter than it was.
        """
        places = self._places()[index]
        images = torch.empty((len(places), *self._image), dtype=torch.uint8)
        view = memoryview(images.numpy().data).cast("B") if images.numel() else memoryview(b"")
        try:
            with self.path.open("rb", buffering=0) as file:
                for first, last, start in _runs(places):
                    part = view[first * self._bytes : last * self._bytes]
                    _read(file.fileno(), part, self.offset + start * self._bytes, self.path)
        except OSError as error:
            raise CountermarkError(
                f"{self.path}: cannot read images: {error.strerror}; open the data again"
            ) from error
        return images


def _runs(places: torch.Tensor) -> list[tuple[int, int, int]]:
    """Positions as runs of neighbours: each from, to, and the place of its first image."""
    if len(places) == 0:
        return []
    breaks = (torch.nonzero(places[1:] != places[:-1] + 1).flatten() + 1).tolist()
    starts = [0, *breaks]
    return [
        (first, last, int(places[first]))
        for first, last in zip(starts, [*breaks, len(places)], strict=True)
    ]


def _read(descriptor: int, part: memoryview, position: int, path: Path) -> None:
    """Fill `part` with the bytes from `position` on."""
    while len(part):
        got = os.preadv(descriptor, [part], position)
        if got == 0:
            raise CountermarkError(
                f"{path} is shorter than it was; delete it and open the data again"
            )
        part, position = part[got:], position + got


@dataclass(frozen=True)
class Examples:
    """Images and labels.

    Attributes:
        x: uint8 images `(n, c, h, w)`: a tensor, or `Rows` of a file, which are read when they are
            indexed.
        y: int64 labels `(n,)`.
        numbers: what `contents` returns, if it is already known.
        sha256: what `digest` returns, if it is already known.

    Example:
        >>> import torch
        >>> images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
        >>> examples = cm.Examples(images, torch.tensor([0, 1, 1, 2]))
        >>> len(examples[examples.y == 1])
        2
    """

    x: torch.Tensor
    y: torch.Tensor
    numbers: torch.Tensor | None = None
    sha256: str | None = None

    def __len__(self) -> int:
        return len(self.y)

    def __repr__(self) -> str:
        """Say how many images there are, and of which shape; a notebook shows no pixels."""
        return f"Examples({len(self):,} images, {' x '.join(map(str, self.x.shape[1:]))})"

    def __getitem__(self, index: torch.Tensor | slice) -> "Examples":
        """Select the examples at `index`: a tensor of positions, a mask or a slice.

        Images in a file are not read.
        """
        rows = self.rows
        chosen: Any = self.x[index] if rows is None else rows.take(index)
        return Examples(
            chosen, self.y[index], None if self.numbers is None else self.numbers[index]
        )

    @property
    def rows(self) -> Rows | None:
        """The images where they lie in a file; none where they are a tensor."""
        x: object = self.x
        return x if isinstance(x, Rows) else None

    def to(self, device: torch.device) -> "Examples":
        """Return the same examples on a device.

        Images in a file stay there, and are moved to the device when they are read.
        """
        return replace(
            self, x=self.x.to(device) if self.rows is None else self.x, y=self.y.to(device)
        )

    def batch(
        self, index: torch.Tensor | slice, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the images and labels at `index` onto a device."""
        return self.x[index].to(device), self.y[index].to(device)

    def read(self) -> "Examples":
        """The same examples with their images in memory."""
        return self if self.rows is None else Examples(self.x[:], self.y, self.numbers)

    @property
    def digest(self) -> str:
        """SHA-256 over shape, images and labels, in order."""
        if self.sha256 is not None:
            return self.sha256
        state = hashlib.sha256(repr(tuple(self.x.shape)).encode())
        for part in self._parts():
            state.update(part.numpy().data)
        state.update(self.y.contiguous().numpy().tobytes())
        return state.hexdigest()

    def contents(self) -> torch.Tensor:
        """Number each image by its content, int64 `(n,)`.

        Equal images have equal numbers, and different images have different numbers.
        """
        if self.numbers is not None:
            return self.numbers
        found = []
        for part in self._parts():
            for image in part.numpy():
                number = hashlib.blake2b(image.tobytes(), digest_size=_CONTENT_BYTES).digest()
                found.append(int.from_bytes(number, "big", signed=True))
        return torch.tensor(found, dtype=torch.int64)

    def _parts(self) -> Iterator[torch.Tensor]:
        """The images, a few megabytes at a time."""
        count = max(1, _CHUNK // max(1, math.prod(self.x.shape[1:])))
        for i in range(0, len(self.x), count):
            yield self.x[i : i + count].cpu().contiguous()


def joined(parts: Iterable[torch.Tensor], count: int) -> torch.Tensor:
    """Join what was made of many images, part by part, into one tensor of `count` rows.

    `torch.cat` over a list would keep each small result where it was made, between the large
    tensors of two parts, and the C library would find no room for the next large one there: the
    memory of a process grew with the number of images.

    Args:
        parts: tensors whose rows follow each other; the first says their type and further shape.
        count: rows of all parts together.

    Example:
        >>> joined((torch.full((2,), number) for number in (3, 4)), 4)
        tensor([3, 3, 4, 4])
    """
    whole, filled = torch.empty(0), 0
    for part in parts:
        if filled == 0:
            whole = torch.empty((count, *part.shape[1:]), dtype=part.dtype)
        whole[filled : filled + len(part)] = part
        filled += len(part)
        del part  # its memory is free before the next part is made
    return whole


def pixels(x: torch.Tensor, *, bounded: bool = True) -> torch.Tensor:
    """Turn images `(n, c, h, w)` into float32 pixels of [0, 1].

    Images of uint8 are divided by 255. Floating-point images must already lie in [0, 1]: they
    pass as they are, those of less than 32 bits as float32. What rounding put a millionth outside
    is clamped.

    Args:
        x: the images.
        bounded: refuse pixels outside [0, 1]; without it the caller answers for their range.

    Raises:
        CountermarkError: floating-point pixels outside [0, 1] or not finite, or another type.
    """
    if x.dtype == torch.uint8:
        return x.to(torch.float32) / 255
    if not x.is_floating_point():
        raise CountermarkError(
            f"images of type {x.dtype} are none that can be used; give uint8 from 0 to 255, or "
            "floating-point pixels of [0, 1]"
        )
    if bounded and x.numel():
        low, high = (float(value) for value in x.detach().aminmax())
        if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # NaN is neither
            raise CountermarkError(
                "floating-point images hold pixels of [0, 1], "
                f"but these go from {low:.9g} to {high:.9g}; divide by 255, undo a normalisation "
                "or clamp them first (uint8 images may stay as they are)"
            )
        if low < 0 or high > 1:
            x = x.clamp(0, 1)
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def as_uint8(x: torch.Tensor) -> torch.Tensor:
    """Turn pixels of [0, 1] into uint8 images; the opposite of `pixels`.

    Images of uint8 stay as they are. Pixels are rounded to 8 bits, and values outside [0, 1] are
    clamped to the nearest bound.
    """
    return x if x.dtype == torch.uint8 else x.clamp(0, 1).mul(255).round().to(torch.uint8)
