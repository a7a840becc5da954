"""Images in Parquet files, in the layout of the Hugging Face Hub.

One column holds the images, as `{bytes, path}` or as bytes, another one their labels. Names of
classes come from the schema where it has them. A `path` is never opened: only the user decides
which files are read. pyarrow reads the files, a few rows at a time.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from countermark.data.arrays import resolve_labels, whole_labels
from countermark.data.folder import SPLITS
from countermark.data.images import Array, DamagedError, Decoded, decode
from countermark.data.reading import PARTS, Item, Listing, file_state
from countermark.errors import CountermarkError
from countermark.text import brief, sentence

_ROWS = 32  # that are read at a time
_IMAGE_NAMES = ("image", "img", "images")
_LABEL_NAMES = ("label", "labels")


def parquet_files(place: Path) -> dict[str, list[Path]]:
    """Find the Parquet files of a place, by part.

    A place is one file, a folder that holds the files, or a folder that holds them in a folder
    `data`. In a folder, a file belongs to the part that its name begins with, as
    `train-00000-of-00002.parquet` does, or to the part whose folder it lies in, as
    `train/0000.parquet` does. The result is empty if there is no file of a training part.
    """
    if place.is_file():
        return {"train": [place]} if place.suffix.lower() == ".parquet" else {}
    for folder in (place, place / "data"):
        parts: dict[str, list[Path]] = {}
        for path in sorted((*folder.glob("*.parquet"), *folder.glob("*/*.parquet"))):
            name = path.name if path.parent == folder else path.parent.name
            part = SPLITS.get(name.removesuffix(".parquet").split("-")[0])
            if part is not None:
                parts.setdefault(part, []).append(path)
        if "train" in parts:
            return {part: parts[part] for part in PARTS if part in parts}
    return {}


def list_parquet(place: Path) -> Listing:
    """List the images of Parquet files.

    Raises:
        CountermarkError: pyarrow is missing, a file is damaged, has no column of images or of
            labels or several, or its labels do not fit.
    """
    parts = parquet_files(place)
    files = [path for paths in parts.values() for path in paths]
    state = file_state(files)
    image, label, names = _columns(files[0])
    raw = {
        part: np.concatenate([_labels(path, label) for path in paths])
        for part, paths in parts.items()
    }
    labels, class_names = resolve_labels(
        {
            _origin(place, part): whole_labels(y, _origin(place, part), len(y))
            for part, y in raw.items()
        },
        names,
    )
    items = (
        item
        for part, paths in parts.items()
        for item in _items(part, paths, image, labels[_origin(place, part)])
    )
    return Listing(
        str(place),
        class_names,
        items,
        sum(map(len, raw.values())),
        state,
        again=lambda: file_state(files),
    )


def _origin(place: Path, part: str) -> str:
    return f"the {part} part of {place}"


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A Parquet file; whatever a damaged one makes pyarrow raise becomes one line."""
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise CountermarkError(
            "Parquet files are read with pyarrow; pip install 'countermark[parquet]'"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (CountermarkError, MemoryError):
        raise
    except Exception as error:
        raise CountermarkError(
            f"cannot read {path}: {sentence(str(error))}; it is no whole Parquet file"
        ) from error


def _columns(path: Path) -> tuple[str, str, tuple[str, ...] | None]:
    """Find the columns of images and of labels, and the class names if the schema has them."""
    with _opened(path) as file:
        from pyarrow import types

        columns = {field.name: field.type for field in file.schema_arrow}
        features = _features(file.schema_arrow.metadata or {})
        images = [name for name, kind in columns.items() if _holds_bytes(types, kind)]
        labels = [
            name
            for name, kind in columns.items()
            if types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)
        ]
    image = _only(images, _IMAGE_NAMES, "images, as {bytes, path} or as bytes", path)
    classes = [name for name in labels if features.get(name, {}).get("_type") == "ClassLabel"]
    label = _only(classes or labels, _LABEL_NAMES, "labels, as whole numbers or strings", path)
    names = features.get(label, {}).get("names")
    return image, label, tuple(map(str, names)) if isinstance(names, list) else None


def _holds_bytes(types: Any, kind: Any) -> bool:
    if types.is_struct(kind):
        return any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _only(found: Sequence[str], preferred: Sequence[str], what: str, path: Path) -> str:
    chosen = [name for name in found if name in preferred] or list(found)
    if len(chosen) != 1:
        there = (
            f"several: {', '.join(map(brief, chosen))}; keep one or call it {preferred[0]}"
            if chosen
            else "none"
        )
        raise CountermarkError(f"{path} needs one column of {what}, and has {there}")
    return chosen[0]


def _features(metadata: Mapping[bytes, bytes]) -> dict[str, Any]:
    """What the library `datasets` noted about the columns."""
    try:
        features = (
            json.loads(metadata.get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        )
    except (ValueError, AttributeError, RecursionError):
        return {}
    return (
        {name: told for name, told in features.items() if isinstance(told, dict)}
        if isinstance(features, dict)
        else {}
    )


def _labels(path: Path, column: str) -> Array:
    with _opened(path) as file:
        if column not in file.schema_arrow.names:
            raise CountermarkError(
                f"{path} has no column {brief(column)}, which the first file has"
            )
        values = file.read(columns=[column]).column(0)
        if values.null_count:
            raise CountermarkError(
                f"{path} has {values.null_count} rows without a label; remove them"
            )
        return np.array(values.to_pylist()) if len(values) else np.zeros(0, dtype=np.int64)


def _items(part: str, paths: Sequence[Path], column: str, labels: Array) -> Iterator[Item]:
    done = 0
    for path in paths:
        with _opened(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS, columns=[column]):
                for value in batch.column(0).to_pylist():
                    data = value.get("bytes") if isinstance(value, dict) else value
                    yield Item(
                        f"{path.name}[{done}]", part, int(labels[done]), partial(_decode, data)
                    )
                    done += 1


def _decode(data: bytes | None, size: int | None) -> Decoded:
    if data is None:
        raise DamagedError("has no bytes")
    return decode(data, size)
