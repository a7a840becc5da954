"""Images in arrays: `.npz` files, and arrays or tensors in Python.

Images are `(n, h, w)`, `(n, h, w, c)` or `(n, c, h, w)`, of uint8 or of floating-point numbers of
[0, 1]; labels are `(n,)` or `(n, 1)`, whole numbers from 0 or strings. Nothing is ever unpickled,
and of a file a few megabytes at a time are read.
"""

import contextlib
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from countermark.data.images import (
    MOST_PIXELS,
    Array,
    DamagedError,
    as_array,
    channels_last,
    eight_bits,
    from_pixels,
)
from countermark.data.reading import PARTS, Item, Listing, file_state, some
from countermark.errors import CountermarkError
from countermark.text import brief, sentence

CLASS_NAMES = "class_names"

NAMES: Sequence[Mapping[str, tuple[str, str]]] = (
    {part: (f"x_{part}", f"y_{part}") for part in PARTS},
    {part: (f"{part}_images", f"{part}_labels") for part in PARTS},  # of MedMNIST
)
"""What the images and the labels of each part are called."""

_BLOCK = 1 << 22  # bytes of images that are converted at a time
_MOST_LABELS = 1 << 30  # bytes


@dataclass(frozen=True)
class Part:
    """The images of one part.

    Attributes:
        images: what messages call the images, such as `x_train`.
        labels: what they call the labels.
        shape: of all images, `(n, ...)`.
        y: the labels as they came.
        blocks: gives the images, some at a time.
    """

    images: str
    labels: str
    shape: tuple[int, ...]
    y: Array
    blocks: Callable[[], Iterable[Array]]


def list_npz(place: Path) -> Listing:
    """List the images of a `.npz` file.

    Raises:
        CountermarkError: it is damaged, its arrays have other names, or see `list_parts`.
    """
    state = file_state([place])
    with _reading(str(place)), zipfile.ZipFile(place) as archive:
        there = {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
    parts = {}
    for part, (images, labels) in _names(there, str(place)).items():
        with _member(place, images) as (_, shape, _, _):
            y = _whole(place, labels)
        parts[part] = Part(
            f"{place}: {images}",
            f"{place}: {labels}",
            shape,
            y,
            partial(_file_blocks, place, images),
        )
    class_names = _whole(place, CLASS_NAMES) if CLASS_NAMES in there else None
    return list_parts(str(place), parts, class_names, state, lambda: file_state([place]))


def list_arrays(place: str, arrays: Mapping[str, Any]) -> Listing:
    """List the images of arrays or tensors in Python by the names that a `.npz` file has.

    Raises:
        CountermarkError: they have other names, or see `list_parts`.
    """
    values = {name: _array(place, name, value) for name, value in arrays.items()}
    parts = {
        part: Part(
            images, labels, values[images].shape, values[labels], partial(_blocks, values[images])
        )
        for part, (images, labels) in _names(values.keys(), place).items()
    }
    return list_parts(place, parts, values.get(CLASS_NAMES))


def list_parts(
    place: str,
    parts: Mapping[str, Part],
    class_names: Any = None,
    state: str | None = None,
    again: Callable[[], str] | None = None,
) -> Listing:
    """List the images of arrays.

    Raises:
        CountermarkError: shapes that are none of images, or labels that do not fit.
    """
    for part in parts.values():
        _check_shape(part)
    labels, names = resolve_labels(
        {part.labels: whole_labels(part.y, part.labels, part.shape[0]) for part in parts.values()},
        class_names,
    )
    items = (
        item for name, part in parts.items() for item in _items(name, part, labels[part.labels])
    )
    return Listing(
        place, names, items, sum(part.shape[0] for part in parts.values()), state, again=again
    )


def whole_labels(values: Any, origin: str, count: int) -> Array:
    """Labels as int64 or strings `(n,)`.

    Raises:
        CountermarkError: there are not `count` of them, or they are not whole.
    """
    y = np.asarray(values)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        raise CountermarkError(
            f"{origin} has the shape {y.shape}; give one label for each image, as a whole number "
            "from 0"
        )
    if len(y) != count:
        raise CountermarkError(
            f"{origin} has {len(y)} labels for {count} images; they do not belong together"
        )
    if y.dtype.kind == "U":
        return y
    if y.dtype.kind not in "iubf" or (
        y.dtype.kind == "f" and not (np.isfinite(y) & (y == np.floor(y))).all()
    ):
        raise CountermarkError(
            f"{origin} holds labels that are not whole; give whole numbers from 0, or strings"
        )
    if y.size and (y.min() < 0 or y.max() >= 2**31):
        raise CountermarkError(
            f"{origin} holds the label {y.min() if y.min() < 0 else y.max()}; labels number the "
            "classes, as 0, 1, 2"
        )
    return y.astype(np.int64)


def resolve_labels(
    labels: Mapping[str, Array], class_names: Any = None
) -> tuple[dict[str, Array], tuple[str, ...]]:
    """Number the classes of several parts, of which the training part comes first.

    Args:
        labels: int64 or strings `(n,)`, by what messages call them.
        class_names: names of the classes; None for those that the training part has.

    Raises:
        CountermarkError: a label that is out of range or that the training part does not have.
    """
    first = next(iter(labels))
    train = labels[first]
    names = None if class_names is None else _class_names(class_names)
    if train.dtype.kind == "U":
        names = names or tuple(sorted(set(train.tolist())))
        numbers = {name: label for label, name in enumerate(names)}
        for origin, y in labels.items():
            if unknown := sorted(set(y.tolist()) - numbers.keys()):
                raise CountermarkError(
                    f"{origin} holds labels that are no classes of the training part: "
                    f"{some(list(map(brief, unknown)))}"
                )
        return {
            origin: np.array([numbers[each] for each in y.tolist()], dtype=np.int64)
            for origin, y in labels.items()
        }, names
    classes = len(names) if names is not None else int(train.max(initial=-1)) + 1
    if names is None and classes > len(train):
        raise CountermarkError(
            f"{first} holds the label {classes - 1}, but only {len(train)} images; labels number "
            "the classes, as 0, 1, 2"
        )
    for origin, y in labels.items():
        if y.dtype.kind == "U":
            raise CountermarkError(
                f"{origin} holds strings, and {first} holds numbers; give one kind of label"
            )
        if y.max(initial=-1) >= classes:
            raise CountermarkError(
                f"{origin} holds the label {y.max()}, and there are {classes} classes, 0 to "
                f"{classes - 1}"
            )
    return dict(labels), names or tuple(map(str, range(classes)))


def _class_names(values: Any) -> tuple[str, ...]:
    values = values.tolist() if isinstance(values, np.ndarray) else values
    names = tuple(values) if isinstance(values, Iterable) else (values,)
    if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise CountermarkError(
            f"class names are different strings, one for each class, not {brief(names)}"
        )
    return names


def _names(there: Iterable[str], place: str) -> dict[str, tuple[str, str]]:
    """The names of the images and labels of each part that is there."""
    there = set(there)
    for names in NAMES:
        if there.issuperset(names["train"]):
            for images, labels in names.values():
                if (images in there) != (labels in there):
                    raise CountermarkError(
                        f"{place} has one of {images} and {labels} without the other; give both"
                    )
            return {part: pair for part, pair in names.items() if pair[0] in there}
    raise CountermarkError(
        f"{place} has the arrays {some(sorted(map(brief, there))) or 'of no name'}; it needs "
        "x_train and y_train (and x_test, y_test), or train_images and train_labels"
    )


def _check_shape(part: Part) -> None:
    if len(part.shape) not in (3, 4) or 0 in part.shape[1:]:
        raise CountermarkError(
            f"{part.images} has the shape {part.shape}; images are (n, h, w), (n, h, w, c) "
            "or (n, c, h, w)"
        )
    if math.prod(part.shape[1:]) > 3 * MOST_PIXELS:
        raise CountermarkError(
            f"{part.images} has the shape {part.shape}; an image has at most {MOST_PIXELS} pixels"
        )
    if len(part.shape) == 4:
        try:
            channels_last(part.shape[1:])
        except DamagedError as error:
            raise CountermarkError(f"{part.images}: {error}") from error


def _items(name: str, part: Part, labels: Array) -> Iterator[Item]:
    done = 0
    for block in part.blocks():
        try:
            pixels, kinds = eight_bits(block)
        except DamagedError as error:
            raise CountermarkError(f"{part.images} {error}") from error
        if pixels.ndim == 3:
            pixels = pixels[:, None]
        elif channels_last(pixels.shape[1:]):
            pixels = pixels.transpose(0, 3, 1, 2)
        for image in pixels:
            yield Item(
                f"{part.images}[{done}]",
                name,
                int(labels[done]),
                partial(from_pixels, image, kinds),
            )
            done += 1


def _array(place: str, name: str, value: Any) -> Array:
    try:
        return as_array(value)
    except DamagedError as error:
        raise CountermarkError(f"{place}: {name} {error}") from error


def _blocks(images: Array) -> Iterator[Array]:
    step = _step(images.shape, images.dtype)
    for i in range(0, len(images), step):
        yield images[i : i + step]


def _step(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    return max(1, _BLOCK // max(1, dtype.itemsize * math.prod(shape[1:])))


@contextlib.contextmanager
def _reading(origin: str) -> Iterator[None]:
    """Whatever a damaged file makes zipfile, its decompressors or NumPy raise becomes one line."""
    try:
        yield
    except (CountermarkError, MemoryError):
        raise
    except Exception as error:
        reason = (
            (error.strerror if isinstance(error, OSError) else None)
            or sentence(str(error))
            or type(error).__name__
        )
        raise CountermarkError(
            f"cannot read {origin}: {reason}; it is damaged, or no .npz file of arrays as "
            "numpy.savez writes it"
        ) from error


@contextlib.contextmanager
def _member(
    place: Path, name: str
) -> Iterator[tuple[IO[bytes], tuple[int, ...], bool, np.dtype[Any]]]:
    """Open an array of a file: its data, its shape, whether columns come first, and its type."""
    origin = f"{place}: {name}"
    with _reading(origin), zipfile.ZipFile(place) as archive, archive.open(f"{name}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, columns, dtype = read(stream)
        if dtype.hasobject:
            raise CountermarkError(
                f"{origin} holds Python objects, which are never unpickled; save images as uint8 "
                "and labels as numbers or strings"
            )
        size, there = (
            dtype.itemsize * math.prod(shape),
            archive.getinfo(f"{name}.npy").file_size - stream.tell(),
        )
        if size != there or min(shape, default=0) < 0:
            raise CountermarkError(
                f"{origin} has {there} bytes, and an array of shape {brief(shape)} {size}; the "
                "file is truncated or damaged"
            )
        yield stream, shape, columns, dtype


def _whole(place: Path, name: str) -> Array:
    """A small array of a file."""
    with _member(place, name) as (stream, shape, columns, dtype):
        size = dtype.itemsize * math.prod(shape)
        if size > _MOST_LABELS:
            raise CountermarkError(f"{place}: {name} would have {size} bytes; it holds no labels")
        return np.frombuffer(_exactly(stream, size), dtype=dtype).reshape(
            shape, order="F" if columns else "C"
        )


def _file_blocks(place: Path, name: str) -> Iterator[Array]:
    """The rows of a large array of a file, some at a time."""
    with _member(place, name) as (stream, shape, columns, dtype):
        if columns:
            raise CountermarkError(
                f"{place}: {name} is stored column by column; save numpy.ascontiguousarray of it"
            )
        each, step = dtype.itemsize * math.prod(shape[1:]), _step(shape, dtype)
        for i in range(0, shape[0], step):
            count = min(step, shape[0] - i)
            yield np.frombuffer(_exactly(stream, count * each), dtype=dtype).reshape(
                count, *shape[1:]
            )
        _exactly(stream, 0)


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise EOFError("it ends too early")
    return data
