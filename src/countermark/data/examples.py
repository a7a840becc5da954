"""Examples as resident tensors: whole sets in memory, no loader in the way."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from countermark.data.catalog import TEST_IMAGES, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS, spec
from countermark.data.fetch import fetch
from countermark.data.idx import parse_idx
from countermark.errors import CountermarkError
from countermark.files import read_bytes

_DIGITS_EACH = 6  # every sixth of the digits is a test example, so that all writers are in both sets
_IDX_LIMIT = 1 << 26
_ROUNDING = 1e-6  # of pixels, by arithmetic before they came here


@dataclass(frozen=True)
class Examples:
    """Images and labels.

    Attributes:
        x: uint8 images `(n, c, h, w)`.
        y: int64 labels `(n,)`.
    """

    x: torch.Tensor
    y: torch.Tensor

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: torch.Tensor | slice) -> "Examples":
        """Return the examples at `index`, a tensor of positions or a slice."""
        return Examples(self.x[index], self.y[index])

    def to(self, device: torch.device) -> "Examples":
        """The same examples on a device."""
        return Examples(self.x.to(device), self.y.to(device))

    @property
    def digest(self) -> str:
        """SHA-256 over shape, images and labels, in order."""
        state = hashlib.sha256(repr(tuple(self.x.shape)).encode())
        state.update(self.x.contiguous().numpy().tobytes())
        state.update(self.y.contiguous().numpy().tobytes())
        return state.hexdigest()


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
            f"images of type {x.dtype} are none that can be used; give uint8 from 0 to 255, or floating-point pixels of [0, 1]"
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
    """The opposite of `pixels`: uint8 images as they are, pixels of [0, 1] rounded to 8 bits (outside values to the nearest bound)."""
    return x if x.dtype == torch.uint8 else x.clamp(0, 1).mul(255).round().to(torch.uint8)


def load_examples(name: str, cache: Path | None = None) -> tuple[Examples, Examples]:
    """Return the training and test examples of the data set `name`, fetching its files if they are not cached.

    Raises:
        CountermarkError: unknown name, no source can be reached, or a damaged file.
    """
    if name == "digits":
        return _digits()
    catalogued = spec(name)
    folder = fetch(name, cache=cache)

    def part(images: str, labels: str) -> Examples:
        x = torch.from_numpy(parse_idx(read_bytes(folder / images, _IDX_LIMIT), 3, images).copy()).unsqueeze(1)
        y = torch.from_numpy(parse_idx(read_bytes(folder / labels, _IDX_LIMIT), 1, labels).copy()).long()
        if len(x) != len(y) or x.shape[1:] != catalogued.shape:
            raise CountermarkError(f"{folder} holds images and labels that do not fit {name}; delete the folder to fetch them again")
        return Examples(x, y)

    return part(TRAIN_IMAGES, TRAIN_LABELS), part(TEST_IMAGES, TEST_LABELS)


def _digits() -> tuple[Examples, Examples]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise CountermarkError("the data set 'digits' comes with scikit-learn; pip install 'countermark[digits]'") from error
    source = load_digits()
    x = torch.from_numpy(source.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    y = torch.from_numpy(source.target).long()
    test = torch.arange(len(y)) % _DIGITS_EACH == 0
    return Examples(x[~test], y[~test]), Examples(x[test], y[test])
