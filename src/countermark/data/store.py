"""Keep images in the cache, so that a place is read only once.

A set of images is a folder `sets/DIGEST` of the cache: `images`, the uint8 pixels of all images one
after the other; `examples.safetensors`, their labels; and `record.json`. It is made beside its
place and renamed, so it is whole or not there, whoever makes it at the same time. `places/KEY.json`
says which set the images of an unchanged place are, and what was found when they were read. Images
are read by position and never mapped: memory does not grow with the set, and a file that was cut
short is an error and no crash. Either folder may be deleted; it costs reading the images again.
"""

import contextlib
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from countermark.data.cache import cache_folder, cannot_keep
from countermark.data.dataset import Dataset
from countermark.data.examples import Examples, Rows
from countermark.data.images import Array, Decoded
from countermark.data.reading import PARTS, Found, Listing, Tally, count_duplicates, decoded
from countermark.errors import CountermarkError
from countermark.files import (
    FolderBusyError,
    canonical_json,
    locked,
    read_json,
    read_tensors,
    sha256,
    write_json,
    write_tensors,
)
from countermark.threat import default_threat

_SET_FORMAT = "countermark images 1"
_PLACE_FORMAT = "countermark place 1"
_TORN = ".torn-"
_DIGEST = re.compile("[0-9a-f]{64}")  # one out of a model folder may be anything
_LIMIT = 1 << 28  # bytes of a record or of the labels
_RESIDENT = 1 << 29  # bytes of a set that is read into memory
_CHUNK = 1 << 24  # bytes that are written at a time
_OLD = 60  # seconds after which a folder under construction that nobody holds is swept away
_TEST_SHARE = 6  # every sixth image is a test image where there is no test part


def stored(
    listing: Listing, *, size: int | None, skip_damaged: bool, cache: Path | None
) -> Dataset:
    """Open what a reader listed: out of the cache where nothing changed, else by reading all of it.

    Raises:
        CountermarkError: no data set can be made of it, it changed while it was read, or the cache
            cannot be written.
    """
    found, data = bring_in(listing, size=size, skip_damaged=skip_damaged, cache=cache)
    if data is None:
        raise CountermarkError(
            found.complaint(size=size, skip_damaged=skip_damaged)
            or f"{listing.place} cannot be read"
        )
    return data


def bring_in(
    listing: Listing, *, size: int | None, skip_damaged: bool, cache: Path | None
) -> tuple[Found, Dataset | None]:
    """Find the images of a listing in the cache, or read them.

    Returns:
        What was found, and the data set if one can be made of it.

    Raises:
        CountermarkError: it changed while it was read, or the cache cannot be written.
    """
    home = cache or cache_folder()
    place = (
        None
        if listing.state is None
        else home
        / "places"
        / f"{sha256(canonical_json([_PLACE_FORMAT, listing.state, size]))}.json"
    )
    if place is not None and (known := _recall(home, place, size, skip_damaged)) is not None:
        return replace(known[0], place=listing.place), _told(
            known[1], listing.place, known[0], size, skip_damaged
        )
    try:
        (home / "sets").mkdir(parents=True, exist_ok=True)
        (home / "places").mkdir(exist_ok=True)
        found, digest = _read(listing, home / "sets", size, skip_damaged)
    except OSError as error:
        raise cannot_keep(home, error.strerror) from error
    if digest is None:
        return found, None
    if place is not None:
        write_json(
            place, {"format": _PLACE_FORMAT, "set": digest, "found": asdict(found)}, limit=_LIMIT
        )
    data = _open_set(home / "sets" / digest)
    if data is None:
        raise CountermarkError(
            f"{home / 'sets' / digest} is damaged; delete it and run the same command again"
        )
    return found, _told(data, listing.place, found, size, skip_damaged)


def by_digest(digest: str, cache: Path | None = None) -> Dataset | None:
    """Return the data set of a digest if its images are in the cache, else None.

    It does not matter where the images came from: the place of the data set is empty, and what was
    converted or left out when it was read is not known.
    """
    return (
        _open_set((cache or cache_folder()) / "sets" / digest)
        if _DIGEST.fullmatch(digest)
        else None
    )


def _told(data: Dataset, place: str, found: Found, size: int | None, skip_damaged: bool) -> Dataset:
    return replace(
        data,
        place=place,
        size=size,
        skip_damaged=skip_damaged,
        converted=found.converted,
        damaged=tuple(name for name, _ in found.damaged),
        duplicates=found.duplicates or 0,
        test_cut=found.cut,
    )


def _recall(
    home: Path, place: Path, size: int | None, skip_damaged: bool
) -> tuple[Found, Dataset] | None:
    """Return what was read at a place that has not changed since.

    The result is None if that is not known or no longer in the cache.
    """
    with contextlib.suppress(CountermarkError, KeyError, TypeError, ValueError, AttributeError):
        if place.exists():
            record = read_json(place, _LIMIT)
            found = Found.from_json(record["found"])
            data = _open_set(home / "sets" / record["set"])
            if data is not None and found.complaint(size=size, skip_damaged=skip_damaged) is None:
                return found, data
    return None


def _read(
    listing: Listing, sets: Path, size: int | None, skip_damaged: bool
) -> tuple[Found, str | None]:
    """Read all images into a new set.

    Returns:
        What was found, and the digest of the set, or None if no data set can be made of it.
    """
    tally = Tally(listing)
    with _building(sets) as folder:
        with _Writer(folder / "images") as writer:
            for item, outcome in decoded(listing, size):
                tally.add(item, outcome)
                if isinstance(outcome, Decoded) and (size is not None or tally.shapes == 1):
                    writer.add(outcome.pixels)
        if listing.again is not None and listing.again() != listing.state:
            raise CountermarkError(
                f"{listing.place} changed while it was read; run the same command again when "
                "nobody writes there"
            )
        parts, labels = (
            np.array(tally.parts, dtype=np.int64),
            np.array(tally.labels, dtype=np.int64),
        )
        if writer.count < len(labels) or not len(labels):  # of several shapes, or nothing
            return tally.found(parts, labels), None
        rows: Any = Rows(folder / "images", (writer.count, *writer.shape))
        images = Examples(rows, torch.from_numpy(labels))
        numbers = images.contents()
        parts, cut = _with_test(parts, labels, numbers.numpy())
        duplicates, disputed = count_duplicates(labels, numbers.numpy())
        found = tally.found(parts, labels, cut=cut, duplicates=duplicates, disputed=disputed)
        if found.complaint(size=size, skip_damaged=skip_damaged) is not None:
            return found, None
        return found, _keep(folder, sets, found, images, numbers, parts)


def _keep(
    folder: Path, sets: Path, found: Found, images: Examples, numbers: torch.Tensor, parts: Array
) -> str:
    """Write the labels and the record beside the images, and give the folder its name."""
    train = torch.from_numpy(
        np.concatenate([np.flatnonzero(parts == PARTS.index(part)) for part in ("train", "val")])
    )
    test = torch.from_numpy(np.flatnonzero(parts == PARTS.index("test")))

    def hashed(index: torch.Tensor) -> Examples:
        part = images[index]
        return replace(part, sha256=part.digest)

    data = _dataset(hashed(train), hashed(test), found.class_names)
    write_tensors(
        folder / "examples.safetensors",
        {"y": images.y, "numbers": numbers, "train": train, "test": test},
    )
    write_json(
        folder / "record.json",
        {
            "format": _SET_FORMAT,
            "shape": list(images.x.shape),
            "class_names": list(found.class_names),
            "parts": {part: int((parts == k).sum()) for k, part in enumerate(PARTS)},
            "train_sha256": data.train.digest,
            "test_sha256": data.test.digest,
        },
        limit=_LIMIT,
    )
    target = sets / data.digest
    if target.exists() and _open_set(target) is None:
        # A file of it was cut short or deleted.
        target.rename(sets / f"{_TORN}{secrets.token_hex(8)}")
    with contextlib.suppress(OSError):  # another process has made the same set
        folder.rename(target)
    return data.digest


def _open_set(folder: Path) -> Dataset | None:
    """Open the data set in a folder.

    The result is None if the folder does not exist, or if a file of it is gone or was cut short.
    """
    try:
        record = read_json(folder / "record.json", _LIMIT)
        tensors, _, _ = read_tensors(folder / "examples.safetensors", _LIMIT)
        shape, y, numbers = tuple(record["shape"]), tensors["y"], tensors["numbers"]
        if (folder / "images").stat().st_size != math.prod(shape):
            return None
        rows, resident = Rows(folder / "images", shape), math.prod(shape) <= _RESIDENT

        def part(name: str) -> Examples:
            index = tensors[name]
            chosen: Any = rows.take(index)
            images = Examples(chosen, y[index], numbers[index], record[f"{name}_sha256"])
            return images.read() if resident else images

        return replace(
            _dataset(part("train"), part("test"), tuple(record["class_names"])),
            parts=record["parts"],
        )
    except (CountermarkError, OSError, KeyError, TypeError, IndexError):
        return None


def _dataset(train: Examples, test: Examples, class_names: tuple[str, ...]) -> Dataset:
    channels, height, width = train.x.shape[1:]
    return Dataset("", train, test, class_names, default_threat((channels, height, width)))


def _with_test(parts: Array, labels: Array, numbers: Array) -> tuple[Array, bool]:
    """Give a data set without a test part one: its validation part, or else a sixth of each class.

    The sixth is every sixth image in the order of label and content, so it does not depend on names
    or on the order of files. Equal images stay together.
    """
    val, test = PARTS.index("val"), PARTS.index("test")
    if (parts == test).any():
        return parts, False
    if (parts == val).any():
        return np.where(parts == val, test, parts), False
    _, first, kind = np.unique(numbers, return_index=True, return_inverse=True)
    order = np.lexsort((numbers[first], labels[first]))
    chosen = np.zeros(len(first), dtype=bool)
    chosen[order[_TEST_SHARE - 1 :: _TEST_SHARE]] = True
    return np.where(chosen[kind], test, parts), True


class _Writer:
    """Writes images one after the other.

    As soon as one image has colours, all images are written in three channels, earlier ones too.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self.shape: tuple[int, ...] = ()

    def __enter__(self) -> "_Writer":
        self._file: BinaryIO = self.path.open("wb", buffering=_CHUNK)
        return self

    def __exit__(self, *_error: object) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def add(self, pixels: Array) -> None:
        """Write the next image, uint8 `(c, h, w)`."""
        if len(pixels) == 3 and self.shape[:1] == (1,):
            self._colour()
        if len(pixels) == 1 and self.shape[:1] == (3,):
            pixels = np.repeat(pixels, 3, axis=0)
        self.shape = pixels.shape
        self._file.write(pixels.data)
        self.count += 1

    def _colour(self) -> None:
        """Write again what was written, in three equal channels."""
        self._file.close()
        grey = self.path.rename(self.path.with_name("grey"))
        rows = Rows(grey, (self.count, *self.shape))
        self._file = self.path.open("wb", buffering=_CHUNK)
        step = max(1, _CHUNK // math.prod(self.shape))
        for i in range(0, self.count, step):
            self._file.write(rows[i : i + step].expand(-1, 3, -1, -1).contiguous().numpy().data)
        grey.unlink()
        self.shape = (3, *self.shape[1:])


@contextlib.contextmanager
def _building(sets: Path) -> Iterator[Path]:
    """Provide a folder of our own to build a set in.

    It is deleted at the end, unless it was renamed. Folders that killed processes left behind are
    deleted first.
    """
    for left in sets.glob(f"{_TORN}*"):
        with contextlib.suppress(FolderBusyError, OSError):
            if time.time() - left.stat().st_mtime > _OLD:
                with locked(left):
                    shutil.rmtree(left, ignore_errors=True)
    folder = sets / f"{_TORN}{secrets.token_hex(8)}"
    folder.mkdir()
    try:
        with locked(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
