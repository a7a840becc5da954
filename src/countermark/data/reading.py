"""Reading the images of one place, in order, whatever the place is.

A reader (`folder`, `arrays`, `parquet`) describes what lies at a place as a `Listing`: the classes,
and one `Item` for each image, which is decoded when it is requested. `decoded` decodes the images
on all cores, in their order, and `Tally` counts everything that a user should be told.
"""

import contextlib
import hashlib
import itertools
import os
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from countermark.data.images import Array, DamagedError, Decoded
from countermark.errors import CountermarkError
from countermark.terminal import bar
from countermark.text import brief

PARTS = ("train", "val", "test")
"""The parts of a data set, in the order in which they are read."""

FEWEST = 2
"""Training images that a class has at least."""

_WORKERS = 8
_TOGETHER = 8  # images that a thread decodes at a time
_AHEAD = 2  # groups of that size that each thread decodes ahead of the wanted image
_HELD = 1 << 27  # bytes of decoded images; beyond, only the next group is decoded
# Nanoseconds; two changes within one tick of a file system's clock look like one.
_TICK = 50_000_000
_NAMED = 5  # damaged files and the like that a message names


@dataclass(frozen=True)
class Item:
    """One image that can be read.

    Attributes:
        name: what messages call it.
        part: one of `PARTS`.
        label: its class, from 0.
        read: decodes it to a square of a size, or leaves its shape where that is None; raises
            `DamagedError` where it cannot.
    """

    name: str
    part: str
    label: int
    read: Callable[[int | None], Decoded]


@dataclass(frozen=True)
class Listing:
    """What lies at a place, before any image is read.

    Attributes:
        place: the place, as messages call it.
        class_names: names of the classes, in the order of the labels.
        items: the images, part by part in the order of `PARTS`; gone through once.
        count: how many there are.
        state: a text that is the same only where nothing has changed since; none where that cannot
            be known without reading everything.
        ignored: files that are no images and were passed over.
        again: makes `state` anew, to see whether something changed while it was read.
    """

    place: str
    class_names: tuple[str, ...]
    items: Iterable[Item]
    count: int
    state: str | None = None
    ignored: int = 0
    again: Callable[[], str] | None = None


@dataclass(frozen=True)
class Found:
    """What was found at a place.

    Attributes:
        place: the place.
        class_names: names of the classes, in the order of the labels.
        counts: the images of each class that could be read, by part.
        shapes: how many images had which height and width, the most frequent first.
        colour: whether any image has colours.
        converted: how many images were converted, by what they were.
        damaged: name and reason of each image that could not be read.
        ignored: files that are no images and were passed over.
        duplicates: images that are equal to an earlier one; none where images have several shapes,
            so that they were not compared.
        disputed: those of them that carry another label than the first of their kind.
        cut: whether the test part was cut out of the training part, because there was none.
    """

    place: str
    class_names: tuple[str, ...]
    counts: Mapping[str, tuple[int, ...]]
    shapes: Mapping[str, int] = field(default_factory=dict)
    colour: bool = False
    converted: Mapping[str, int] = field(default_factory=dict)
    damaged: tuple[tuple[str, str], ...] = ()
    ignored: int = 0
    duplicates: int | None = None
    disputed: int | None = None
    cut: bool = False

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Found":
        """Restore findings from `dataclasses.asdict` and JSON.

        JSON has turned tuples into lists and sorted the names.

        Raises:
            TypeError: the value is something else.
        """
        shapes = sorted(value["shapes"].items(), key=lambda shape: -shape[1])
        return cls(
            **{
                **value,
                "class_names": tuple(value["class_names"]),
                "counts": {
                    part: tuple(value["counts"][part]) for part in PARTS if part in value["counts"]
                },
                "shapes": dict(shapes),
                "damaged": tuple((name, reason) for name, reason in value["damaged"]),
            }
        )

    @property
    def images(self) -> int:
        """Images that could be read."""
        return sum(map(sum, self.counts.values()))

    @property
    def _trainable(self) -> tuple[int, ...]:
        """Images of each class in the training part, before a test part was cut out of it."""
        counts = self.counts.values() if self.cut else [self.counts["train"]]
        return tuple(map(sum, zip(*counts, strict=True)))

    def complaint(self, *, size: int | None, skip_damaged: bool) -> str | None:
        """Say why no data set can be made of it, or return None."""
        if self.damaged and not skip_damaged:
            named = some([f"{brief(name)} {reason}" for name, reason in self.damaged])
            return (
                f"{self.place}: {count_of(len(self.damaged), 'image')} cannot be read: {named}; "
                "repair or delete them, or leave them out with --skip-damaged"
            )
        if self.images == 0:
            return (
                f"{self.place} has no images that can be read; give {FEWEST} or more for each "
                "class (in a folder: PNG, JPEG, WebP or BMP)"
            )
        if len(self.class_names) < 2:
            return (
                f"{self.place} has one class, {brief(self.class_names[0])}; a classifier needs two "
                "or more"
            )
        lacking = [
            f"{brief(name)} has {number}"
            for name, number in zip(self.class_names, self._trainable, strict=True)
            if number < FEWEST
        ]
        if lacking:
            return (
                f"{self.place}: every class needs {FEWEST} training images or more, and "
                f"{some(lacking)}; add images or remove the class"
            )
        if len(self.shapes) > 1 and size is None:
            listed = some(
                [f"{shape} ({count_of(number, 'image')})" for shape, number in self.shapes.items()]
            )
            return (
                f"{self.place} has images of {len(self.shapes)} shapes (height x width): {listed}; "
                "bring them to one with --size N"
            )
        return None


def decoded(listing: Listing, size: int | None) -> Iterator[tuple[Item, Decoded | DamagedError]]:
    """Decode the images of a listing on all cores, in their order.

    Only a few images are decoded ahead of the one that is wanted. If they are large, these are at
    most `_HELD` bytes of images and one more image for each thread.
    """
    workers = min(_WORKERS, os.cpu_count() or 1)
    waiting: deque[Future[list[tuple[Item, Decoded | DamagedError]]]] = deque()
    items, numbers, room = iter(listing.items), itertools.count(), _Room()
    with bar(f"reading {listing.place}", listing.count) as progress, _pool(workers) as pool, room:
        while (some_items := list(itertools.islice(items, _TOGETHER))) or waiting:
            if some_items:
                waiting.append(pool.submit(_attempt, some_items, size, next(numbers), room))
            if not some_items or len(waiting) > _AHEAD * workers:
                done = waiting.popleft().result()
                yield from done
                room.leave(done)
                progress.advance(len(done))


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Provide threads that decode images.

    At the end, work that has not begun is cancelled. Pillow's warnings about unusual files are not
    shown.
    """
    pool = ThreadPoolExecutor(workers)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield pool
    finally:
        pool.shutdown(cancel_futures=True)


class _Room:
    """A limit on the memory of decoded images.

    While it is reached, only images of the group that is wanted next are decoded.
    """

    def __init__(self) -> None:
        self._held, self._wanted, self._closed = 0, 0, False
        self._changed = threading.Condition()

    def __enter__(self) -> "_Room":
        return self

    def __exit__(self, *_error: object) -> None:
        with self._changed:  # nobody is left to make room
            self._closed = True
            self._changed.notify_all()

    def wait(self, group: int) -> None:
        """Wait until an image of a group may be decoded."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._held < _HELD or group == self._wanted or self._closed
            )

    def enter(self, outcome: Decoded | DamagedError) -> None:
        """Count an image that was decoded."""
        with self._changed:
            self._held += _bytes(outcome)

    def leave(self, outcomes: Sequence[tuple[Item, Decoded | DamagedError]]) -> None:
        """Forget the group that was wanted; the next one is wanted from now on."""
        with self._changed:
            self._held -= sum(_bytes(outcome) for _, outcome in outcomes)
            self._wanted += 1
            self._changed.notify_all()


def _bytes(outcome: Decoded | DamagedError) -> int:
    return outcome.pixels.nbytes if isinstance(outcome, Decoded) else 0


def _attempt(
    items: Sequence[Item], size: int | None, group: int, room: _Room
) -> list[tuple[Item, Decoded | DamagedError]]:
    outcomes: list[tuple[Item, Decoded | DamagedError]] = []
    for item in items:
        room.wait(group)
        try:
            outcome: Decoded | DamagedError = item.read(size)
        except DamagedError as error:
            outcome = error
        room.enter(outcome)
        outcomes.append((item, outcome))
    return outcomes


class Tally:
    """What is counted while images are read; `found` says it."""

    def __init__(self, listing: Listing) -> None:
        """Count nothing yet."""
        self._listing = listing
        self._kinds: Counter[str] = Counter()
        self._shapes: Counter[tuple[int, int]] = Counter()
        self._damaged: list[tuple[str, str]] = []
        self._channels: Counter[int] = Counter()
        self.parts: list[int] = []
        self.labels: list[int] = []

    def add(self, item: Item, outcome: Decoded | DamagedError) -> None:
        """Count one image."""
        if isinstance(outcome, DamagedError):
            self._damaged.append((item.name, str(outcome)))
            return
        self._kinds.update(outcome.kinds)
        self._shapes[outcome.shape] += 1
        self._channels[len(outcome.pixels)] += 1
        self.parts.append(PARTS.index(item.part))
        self.labels.append(item.label)

    @property
    def shapes(self) -> int:
        """Number of different image shapes so far."""
        return len(self._shapes)

    def found(self, parts: Array, labels: Array, **more: Any) -> Found:
        """Say what was counted, with the part and the label of each image that could be read."""
        listing, classes = self._listing, len(self._listing.class_names)
        kinds = dict(self._kinds)
        if self._channels[1] and self._channels[3]:
            kinds["grey"] = self._channels[1]
        return Found(
            place=listing.place,
            class_names=listing.class_names,
            counts={
                part: tuple(np.bincount(labels[parts == k], minlength=classes).tolist())
                for k, part in enumerate(PARTS)
                if part == "train" or (parts == k).any()
            },
            shapes={
                f"{height}x{width}": number
                for (height, width), number in self._shapes.most_common()
            },
            colour=self._channels[3] > 0,
            converted=dict(sorted(kinds.items())),
            damaged=tuple(self._damaged),
            ignored=listing.ignored,
            **more,
        )


def count_duplicates(labels: Array, numbers: Array) -> tuple[int, int]:
    """Count the images that are equal to an earlier one.

    Args:
        labels: labels of the images, int64 `(n,)`.
        numbers: numbers of their content, int64 `(n,)`; see `Examples.contents`.

    Returns:
        How many such images there are, and how many of them have another label than the first
        image that they are equal to.
    """
    _, first, kind = np.unique(numbers, return_index=True, return_inverse=True)
    return len(numbers) - len(first), int((labels != labels[first[kind]]).sum())


def file_state(paths: Sequence[Path]) -> str:
    """A text that stays the same only if none of some files has changed.

    Raises:
        CountermarkError: one cannot be looked at.
    """
    state, newest = hashlib.sha256(), 0
    for path in paths:
        try:
            status = path.stat()
        except OSError as error:
            raise CountermarkError(
                f"cannot read {path}: {error.strerror}; check the path and its permissions"
            ) from error
        state.update(stamp(path.resolve(), status))
        newest = max(newest, status.st_ctime_ns)
    outlast(newest)
    return state.hexdigest()


def stamp(path: Path, status: os.stat_result) -> bytes:
    """What differs after any change to a file: its path, size, times and number."""
    return repr(
        (os.fsencode(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    ).encode()


def outlast(change: int) -> None:
    """Wait until anything written from now on gets a different time than a change.

    Args:
        change: time of a change that was just seen, in nanoseconds.
    """
    if time.time_ns() - change < _TICK:
        time.sleep(_TICK / 1e9)


def count_of(number: int, what: str) -> str:
    """A number of things, in words.

    Example:
        >>> count_of(1, "image"), count_of(1200, "image")
        ('1 image', '1,200 images')
    """
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def some(things: Sequence[str]) -> str:
    """The first few of several things, for a message."""
    more = f" and {len(things) - _NAMED} more" if len(things) > _NAMED else ""
    return f"{', '.join(things[:_NAMED])}{more}"
