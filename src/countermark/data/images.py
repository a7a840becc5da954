"""One image, out of a file or out of Python, as uint8 pixels `(c, h, w)` of one or three channels.

Pillow decodes PNG, JPEG, WebP and BMP. What its own conversions would lose is done here: EXIF
orientation is applied, transparency is laid over white, 16-bit grey is scaled and not clipped. Of
an animation the first frame is taken. An image of more pixels than `MOST_PIXELS` is refused by its
header, before anything is decoded.
"""

import io
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import (
    BmpImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from countermark.errors import CountermarkError
from countermark.text import sentence

Array = npt.NDArray[Any]

SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".webp"})
"""Endings of the files that are taken for images, in lower case."""

MOST_PIXELS = 1 << 26
"""Pixels of the largest image that is decoded: 8,192 x 8,192, or 200 MB of colours."""

_FORMATS = tuple(  # no plugin for another format is imported
    plugin.format
    for plugin in (
        PngImagePlugin.PngImageFile,
        JpegImagePlugin.JpegImageFile,
        WebPImagePlugin.WebPImageFile,
        BmpImagePlugin.BmpImageFile,
    )
    if plugin.format is not None
)
_ORIENTATION = 0x0112  # of EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXCHANGES = {_TURNS[orientation] for orientation in (5, 6, 7, 8)}  # of height and width
_ROUNDING = 1e-6  # how far rounding may have taken pixels outside [0, 1]


class DamagedError(CountermarkError):
    """An image that cannot be read; the message is the reason alone, without the image's name.

    Example:
        >>> with cm.Guarded("mine", log="log.db") as guard:
        ...     try:
        ...         guard.classify_now(b"no image", "anna")
        ...     except cm.DamagedError as error:
        ...         print(error)
        the image is not a PNG, JPEG, WebP or BMP image
    """


@dataclass(frozen=True)
class Decoded:
    """An image as the data sets hold it.

    Attributes:
        pixels: uint8 `(c, h, w)`, of one channel or three.
        kinds: what was converted: `alpha`, `palette`, `cmyk`, `16-bit`, `1-bit`, `float`, `turned`,
            `animated`, `other`.
        shape: height and width before anything was scaled or cut.
    """

    pixels: Array
    kinds: tuple[str, ...]
    shape: tuple[int, int]


def decode(file: Path | bytes, size: int | None = None, most: int = MOST_PIXELS) -> Decoded:
    """Read an image file.

    Args:
        file: its path, or its content.
        size: side of the square that it is brought to: its largest centred square, scaled with
            antialiasing. None leaves it as large as it is.
        most: pixels of the largest image that is decoded.

    Raises:
        DamagedError: it is none of the four formats, is truncated or damaged, or is too large.

    Example:
        >>> import io
        >>> from PIL import Image
        >>> stream = io.BytesIO()
        >>> Image.new("RGBA", (6, 4)).save(stream, "PNG")
        >>> found = decode(stream.getvalue(), size=2)
        >>> found.pixels.shape, int(found.pixels.min()), found.kinds, found.shape
        ((3, 2, 2), 255, ('alpha',), (4, 6))
    """
    try:
        with Image.open(
            file if isinstance(file, Path) else io.BytesIO(file), formats=_FORMATS
        ) as image:
            return to_pixels(image, size, most)
    except (CountermarkError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise DamagedError(f"has more than the {most} pixels that are decoded") from error
    except UnidentifiedImageError as error:
        raise DamagedError("is not a PNG, JPEG, WebP or BMP image") from error
    except Exception as error:  # a damaged file makes Pillow's plugins raise nearly anything
        reason = (
            error.strerror
            if isinstance(error, OSError) and error.strerror
            else sentence(str(error))
        )
        raise DamagedError(reason or type(error).__name__) from error


def fitted(file: Path | bytes, shape: tuple[int, int, int], most: int = MOST_PIXELS) -> Array:
    """Read an image file as a model takes it: of one shape, as its training images were read.

    Where the shape is square the image is brought to it, as `decode` does. A grey image gets equal
    channels for a model of colours, and colours become grey for a model of grey images.

    Args:
        file: its path, or its content.
        shape: `(channels, height, width)`, of one channel or three.
        most: pixels of the largest image that is decoded.

    Returns:
        uint8 `(channels, height, width)`.

    Raises:
        DamagedError: the file cannot be read, or the shape is not square and the image has another.
        CountermarkError: the shape has another number of channels.

    Example:
        >>> import io
        >>> from PIL import Image
        >>> stream = io.BytesIO()
        >>> Image.new("L", (6, 4), 255).save(stream, "PNG")
        >>> found = fitted(stream.getvalue(), (3, 2, 2))
        >>> found.shape, int(found.min())
        ((3, 2, 2), 255)
    """
    channels, height, width = shape
    if channels not in (1, 3):
        raise CountermarkError(
            f"image files have 1 or 3 channels, and the model takes {channels}; send arrays"
        )
    found = decode(file, height if height == width else None, most)
    if found.pixels.shape[1:] != (height, width):
        raise DamagedError(
            f"has {found.shape[0]} x {found.shape[1]} pixels (height x width), and the model takes "
            f"{height} x {width}"
        )
    pixels = found.pixels
    if len(pixels) == 3 and channels == 1:
        pixels = np.asarray(Image.fromarray(pixels.transpose(1, 2, 0)).convert("L"))[None]
    return np.ascontiguousarray(np.broadcast_to(pixels, shape))


def encode(pixels: Array, form: str, **options: Any) -> bytes:
    """Write an image as a file.

    Args:
        pixels: uint8 `(c, h, w)`, of one channel or three.
        form: `png` or `jpeg`.
        **options: what Pillow takes for that format, such as `quality`.

    Example:
        >>> data = encode(np.zeros((3, 4, 6), np.uint8), "png")
        >>> decode(data).pixels.shape
        (3, 4, 6)
    """
    stream = io.BytesIO()
    flat = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
    Image.fromarray(np.ascontiguousarray(flat)).save(stream, form, **options)
    return stream.getvalue()


def to_pixels(image: Image.Image, size: int | None = None, most: int = MOST_PIXELS) -> Decoded:
    """Turn an opened image of Pillow into pixels; see `decode`.

    Raises:
        DamagedError: it is too large. Pillow's own errors pass as they are.
    """
    width, height = image.size
    if width * height > most:
        raise DamagedError(f"has {width} x {height} pixels, more than the {most} that are decoded")
    kinds = []
    # Phones add previews to an image in the format MPO.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        kinds.append("animated")
    if size is not None:
        # A large JPEG is decoded at half its side or less.
        image.draft(image.mode, (2 * size, 2 * size))
    image.load()
    turn = _TURNS.get(_orientation(image))
    image, flattened = _flat(image)
    kinds += flattened
    if turn is not None:
        image = image.transpose(turn)
        kinds.append("turned")
        if turn in _EXCHANGES:
            height, width = width, height
    pixels = _pixels(image if size is None else _square(image, size))
    return Decoded(np.ascontiguousarray(pixels), tuple(kinds), (height, width))


def from_array(array: Any, size: int | None = None) -> Decoded:
    """Turn one image in memory into pixels.

    Args:
        array: an array or a tensor `(h, w)`, `(h, w, c)` or `(c, h, w)`.
        size: side of the square that it is brought to; see `decode`.

    Raises:
        DamagedError: it has another shape, or values that are neither uint8 nor in [0, 1].
    """
    pixels, kinds = eight_bits(as_array(array))
    if pixels.ndim == 2:
        pixels = pixels[None]
    elif channels_last(pixels.shape):
        pixels = pixels.transpose(2, 0, 1)
    return from_pixels(pixels, kinds, size)


def as_array(value: Any) -> Array:
    """An array or a tensor, wherever and however it is stored, as an array of NumPy.

    Raises:
        DamagedError: it holds no numbers, as a tensor on the device `meta`.
    """
    try:
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().to_dense()
            value = value.float() if value.dtype == torch.bfloat16 else value
        return np.asarray(value)
    except Exception as error:  # anybody's object
        raise DamagedError(
            f"cannot be read as an array: {sentence(str(error)) or type(error).__name__}"
        ) from error


def from_pixels(pixels: Array, kinds: tuple[str, ...] = (), size: int | None = None) -> Decoded:
    """Bring uint8 pixels `(c, h, w)` to a square of `size`, unless that is None.

    The pixels have one channel or three.
    """
    height, width = pixels.shape[1:]
    if size is not None:
        flat = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
        pixels = _pixels(_square(Image.fromarray(np.ascontiguousarray(flat)), size))
    return Decoded(np.ascontiguousarray(pixels), kinds, (height, width))


def channels_last(shape: tuple[int, ...]) -> bool:
    """Whether the channels of an image of three dimensions come last, as in `(h, w, c)`.

    Raises:
        DamagedError: neither its first nor its last side is 1 or 3, or both are.

    Example:
        >>> channels_last((32, 32, 3)), channels_last((1, 28, 28))
        (True, False)
    """
    if len(shape) != 3 or 0 in shape:
        raise DamagedError(
            f"an image has the shape (h, w), (h, w, c) or (c, h, w), not {tuple(shape)}"
        )
    first, last = shape[0] in (1, 3), shape[2] in (1, 3)
    if first and last:
        raise DamagedError(
            f"the shape {tuple(shape)} can be read as (h, w, c) and as (c, h, w); give (h, w) for "
            "grey images, and PIL images for colour"
        )
    if not first and not last:
        raise DamagedError(
            f"an image has 1 channel (grey) or 3 (colour), and the shape {tuple(shape)} has neither"
        )
    return last


def eight_bits(values: Array) -> tuple[Array, tuple[str, ...]]:
    """Turn values of [0, 1] into uint8; values of uint8 stay as they are.

    Raises:
        DamagedError: another type, or values outside [0, 1].
    """
    if values.dtype == np.uint8:
        return values, ()
    if not np.issubdtype(values.dtype, np.floating):
        raise DamagedError(
            f"holds values of type {values.dtype}; images are uint8, or floating-point numbers of "
            "[0, 1]"
        )
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # NaN is neither
        raise DamagedError(
            f"holds floating-point values from {low:.6g} to {high:.6g}; images are uint8, or "
            "floating-point numbers of [0, 1]: divide by 255 or undo the normalisation"
        )
    return (values.clip(0, 1) * 255).round().astype(np.uint8), ("float",)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except (
        OSError,
        SyntaxError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        struct.error,
    ):  # damaged EXIF in a sound image
        return 1


def _flat(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """The image in mode L or RGB, and what had to be converted for that."""
    mode = image.mode
    if mode.startswith("I"):
        return _from_16_bits(image)
    grey = mode in ("1", "L", "LA", "La")
    kinds = {"1": ["1-bit"], "P": ["palette"], "PA": ["palette"], "CMYK": ["cmyk"]}.get(mode, [])
    if not kinds and mode not in ("L", "LA", "La", "RGB", "RGBA", "RGBa"):
        kinds = ["other"]
    plain = "L" if grey else "RGB"
    if not image.has_transparency_data:
        return image.convert(plain), kinds
    image = image.convert("LA" if grey else "RGBA")
    flat = Image.new(plain, image.size, 255 if grey else (255, 255, 255))
    flat.paste(image.convert(plain), mask=image.getchannel("A"))
    return flat, [*kinds, "alpha"]


def _from_16_bits(image: Image.Image) -> tuple[Image.Image, list[str]]:
    values = np.asarray(image).astype(np.int32).clip(0, 65535)
    kinds = ["16-bit"]
    if isinstance(transparent := image.info.get("transparency"), int):
        values[values == transparent] = 65535
        kinds.append("alpha")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)), kinds


def _square(image: Image.Image, size: int) -> Image.Image:
    """Scale the largest centred square to `size`.

    The result is the same as scaling the short side to `size` and then cropping the centre, but the
    memory is bounded.
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize(
        (size, size), Image.Resampling.BICUBIC
    )


def _pixels(image: Image.Image) -> Array:
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
