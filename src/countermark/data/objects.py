"""Data sets that are objects in Python.

They are arrays, tensors, and any object that has a length and gives images with labels.
"""

import operator
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from PIL import Image

from countermark.data.arrays import CLASS_NAMES, list_arrays
from countermark.data.folder import SPLITS
from countermark.data.images import DamagedError, Decoded, from_array, to_pixels
from countermark.data.reading import PARTS, Item, Listing
from countermark.errors import CountermarkError
from countermark.text import brief, sentence

_USABLE = (
    "give (x, y), (x_train, y_train, x_test, y_test), a dict of arrays, or one or two data sets of "
    "images with labels that have `.classes`"
)
_IMAGE_KEYS, _LABEL_KEYS = ("image", "img"), ("label", "labels")


def list_object(place: str, found: Any) -> Listing:
    """List the images of an object.

    Args:
        place: what messages call it.
        found: arrays or tensors as `(x, y)`, `((x_train, y_train), (x_test, y_test))`,
            `(x_train, y_train, x_test, y_test)` or a dict by the names of a `.npz` file; a data set
            of PIL images, arrays or tensors with their labels, whose classes `.classes` names, or
            several as `(train, test)` or a dict by part.

    Raises:
        CountermarkError: it is none of these, or see `arrays.list_parts`.
    """
    named = _by_name(found)
    if named is None:
        raise CountermarkError(
            f"{place} is {brief(type(found).__name__)}, which is no data set; {_USABLE}"
        )
    sets = {part: named[name] for name, part in SPLITS.items() if name in named}
    if not sets:
        return list_arrays(place, named)
    pairs = {part: pair for part, pair in sets.items() if _is_pair(pair)}
    if pairs.keys() == sets.keys():
        arrays = {
            f"{axis}_{part}": value
            for part, pair in pairs.items()
            for axis, value in zip("xy", pair, strict=True)
        }
        return list_arrays(
            place, arrays | ({CLASS_NAMES: named[CLASS_NAMES]} if CLASS_NAMES in named else {})
        )
    if "train" not in sets or not all(map(_is_set, sets.values())):
        raise CountermarkError(f"{place} has no training part that can be read; {_USABLE}")
    classes = named.get(CLASS_NAMES) or _classes(sets["train"])
    if classes is None:
        raise CountermarkError(
            f"{place} does not name its classes; give it an attribute `classes`, their names in "
            "the order of the labels"
        )
    class_names = tuple(map(str, classes))
    items = (
        item
        for part in PARTS
        if part in sets
        for item in _items(place, part, sets[part], len(class_names))
    )
    return Listing(place, class_names, items, sum(map(len, sets.values())))


def _by_name(found: Any) -> Mapping[str, Any] | None:
    """The parts or arrays of an object by name."""
    if isinstance(found, Mapping):
        return found
    if isinstance(found, tuple | list):
        if len(found) == 4 and all(map(_is_array, found)):
            return dict(zip(("x_train", "y_train", "x_test", "y_test"), found, strict=True))
        if _is_pair(found):
            return {"x_train": found[0], "y_train": found[1]}
        if len(found) == 2 and all(_is_pair(part) or _is_set(part) for part in found):
            return dict(zip(("train", "test"), found, strict=True))
        return None
    return {"train": found} if _is_set(found) else None


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_array, value))


def _is_set(value: Any) -> bool:
    return (
        hasattr(value, "__len__")
        and hasattr(value, "__getitem__")
        and not isinstance(value, str | bytes | Mapping)
        and not _is_array(value)
    )


def _classes(found: Any) -> Any:
    """Find the class names of a data set; None if it has none.

    They come from the data set itself, from the data set that it is a subset of, or from the
    features of a Hugging Face data set.
    """
    for each in (found, getattr(found, "dataset", None)):
        if (classes := getattr(each, "classes", None)) is not None:
            return classes
        features = getattr(each, "features", None)
        if isinstance(features, Mapping):
            for key in _LABEL_KEYS:
                if (names := getattr(features.get(key), "names", None)) is not None:
                    return names
    return None


def _items(place: str, part: str, found: Any, classes: int) -> Iterator[Item]:
    for i in range(len(found)):
        name = f"{part}[{i}]"
        try:
            image, raw = _pair(found[i])
        except Exception as error:  # anybody's code
            yield Item(
                name,
                part,
                0,
                partial(_damaged, f"raised {type(error).__name__}: {sentence(str(error))}"),
            )
            continue
        yield Item(name, part, _label(raw, classes, f"{place}: {name}"), partial(_decode, image))


def _pair(value: Any) -> tuple[Any, Any]:
    if isinstance(value, Mapping):
        return next(value[key] for key in _IMAGE_KEYS if key in value), next(
            value[key] for key in _LABEL_KEYS if key in value
        )
    image, label = value
    return image, label


def _label(raw: Any, classes: int, origin: str) -> int:
    try:
        label = operator.index(raw.item() if hasattr(raw, "item") else raw)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CountermarkError(
            f"{origin} has the label {brief(raw)}; labels are whole numbers from 0"
        ) from error
    if not 0 <= label < classes:
        raise CountermarkError(
            f"{origin} has the label {label}, and there are {classes} classes, 0 to {classes - 1}"
        )
    return label


def _damaged(reason: str, _size: int | None) -> Decoded:
    raise DamagedError(reason)


def _decode(image: Any, size: int | None) -> Decoded:
    if not isinstance(image, Image.Image):
        return from_array(image, size)
    try:
        return to_pixels(image, size)
    except (CountermarkError, MemoryError):
        raise
    except Exception as error:  # a damaged file, opened by others
        raise DamagedError(sentence(str(error)) or type(error).__name__) from error
