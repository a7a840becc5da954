"""Open data, wherever its images come from.

`READERS` has a row for each kind of place. The result is the same for all of them: uint8 images
`(n, c, h, w)` with whole-number labels, in a fixed order, under one digest.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol

import torch

from countermark.data.arrays import list_npz
from countermark.data.dataset import Dataset
from countermark.data.examples import Examples
from countermark.data.folder import list_folder
from countermark.data.known import KNOWN, known
from countermark.data.objects import list_object
from countermark.data.parquet import list_parquet, parquet_files
from countermark.data.pools import Pools
from countermark.data.reading import Found, Listing
from countermark.data.store import bring_in
from countermark.errors import CountermarkError, nearest
from countermark.named_code import called, imported, is_code
from countermark.places import own_path
from countermark.text import brief

_LARGEST = 4096  # side of the squares that images are brought to


class Items(Protocol):
    """Arrays, or a data set of pairs; see `open_data`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


DataPlace = str | Path | Dataset | Items
"""What `open_data` takes."""


@dataclass(frozen=True)
class Options:
    """How a place is to be read; see `open_data`."""

    size: int | None = None
    skip_damaged: bool = False
    cache: Path | None = None


@dataclass(frozen=True)
class Reader:
    """One kind of place.

    Attributes:
        what: what an error calls it.
        takes: whether a place is of this kind.
        bring: reads it: what was found, and the data set if one can be made of it.
    """

    what: str
    takes: Callable[[Any], bool]
    bring: Callable[[Any, Options], tuple[Found, Dataset | None]]


def open_data(
    place: Any,
    *,
    size: int | None = None,
    skip_damaged: bool = False,
    cache: str | Path | None = None,
) -> Dataset:
    """Open images with labels.

    What was read is kept in the cache, and is found there again while nothing changes at its place.

    Args:
        place: where the images are: the name of a data set that is known; a folder `CLASS/*.png`
            or `{train,test}/CLASS/*`; a `.npz` file; Parquet files in the layout of the Hugging
            Face Hub; `module:function`; or an object in Python: arrays, tensors, or any data set
            with a length whose items are an image and a label (see docs/data.md). A `Dataset` is
            returned as it is.
        size: side of the squares that images are brought to: the largest centred square, scaled.
            None: all images must have one shape.
        skip_damaged: leave out images that cannot be read, instead of an error that names them.
        cache: folder of fetched and read data; default `$COUNTERMARK_CACHE` or the system's.

    Raises:
        CountermarkError: there is no data at the place, or none that can be used.

    Example:
        >>> import numpy as np
        >>> x = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
        >>> data = cm.open_data((x, np.arange(24) % 2))
        >>> data.shape, data.classes, len(data.train), len(data.test)
        ((3, 8, 8), 2, 20, 4)
        >>> photos = cm.open_data("photos", size=16, skip_damaged=True)
        >>> photos.class_names
        ('cross', 'disc', 'ring', 'square', 'stripes', 'triangle')
    """
    options = Options(size, skip_damaged, None if cache is None else own_path(cache, "cache"))
    found, data = read_data(place, options)
    if data is None:
        raise CountermarkError(
            found.complaint(size=size, skip_damaged=skip_damaged) or f"{found.place} cannot be read"
        )
    return data


def read_data(place: Any, options: Options) -> tuple[Found, Dataset | None]:
    """Read a place: what was found, and the data set if one can be made of it.

    Raises:
        CountermarkError: there is no data at the place.
    """
    size: Any = options.size
    if size is not None:
        if (
            isinstance(size, bool)
            or not isinstance(size, Integral)
            or not 1 <= int(size) <= _LARGEST
        ):
            raise CountermarkError(
                f"images are brought to a side of 1 to {_LARGEST} pixels, not {brief(size)}; give "
                "another --size"
            )
        options = replace(options, size=int(size))
    for reader in READERS:
        if reader.takes(place):
            return reader.bring(place, options)
    usable = ", ".join(reader.what for reader in READERS[1:-1])
    if os.path.exists(place):  # noqa: PTH110 (it says no where it may not look)
        raise CountermarkError(
            f"{brief(str(place))} is none of the files that data is read from; give {usable}"
        )
    raise CountermarkError(
        f"there is no data at {brief(str(place))}"
        f"{nearest(str(place), {name: name for name in KNOWN})}; give {usable}"
    )


def load_examples(name: str, cache: str | Path | None = None) -> tuple[Examples, Examples]:
    """Return the training and test examples at a place; see `open_data`."""
    data = open_data(name, cache=cache)
    return data.train, data.test


def known_images(
    data: Dataset, trained_on: DataPlace | None, *, cache: str | Path | None = None
) -> torch.Tensor:
    """Find the images of a data set that given weights had been trained on.

    A model folder keeps this mask, so that its pools stay what they are whatever happens to the
    images that the weights were trained on.

    Args:
        data: the data set.
        trained_on: place of the images that the weights were trained on, including its test part;
            see `open_data`. None stands for the training part of `data`, without the images that
            came as its validation part, and for the test part if it was cut out of the training
            part.
        cache: folder of fetched and read data.

    Returns:
        A mask, bool `(n,)`, of the training part followed by the test part.

    Raises:
        CountermarkError: the place cannot be opened, or has images of another shape.
    """
    if trained_on is None:
        trained = torch.arange(len(data.train)) < data.parts.get("train", len(data.train))
        return torch.cat((trained, torch.full((len(data.test),), data.test_cut)))
    other = open_data(trained_on, size=data.size, skip_damaged=data.skip_damaged, cache=cache)
    if other.shape != data.shape:
        raise CountermarkError(
            f"{other.place} has images of shape {other.shape}, the data of {data.shape}: such "
            "images cannot be compared"
        )
    seen = torch.cat((other.train.contents(), other.test.contents()))
    return torch.isin(torch.cat((data.train.contents(), data.test.contents())), seen)


def load_pools(name: str, seed: int, cache: str | Path | None = None) -> Pools:
    """Open the data set at a place and cut it into its pools by `seed`.

    Raises:
        CountermarkError: see `open_data` and `pools.cut`.
    """
    return open_data(name, cache=cache).pools(seed)


def load_ood(data: Dataset, pools: Pools, seed: int, cache: str | Path | None = None) -> Examples:
    """Return the examples that are out of distribution for a data set, with their own labels.

    They are the watermark bases of another data set if `data.ood` names one, else its own bases
    turned by 90 degrees.

    Args:
        data: the data set.
        pools: cut out of it.
        seed: seed that cuts the pools of another data set.
        cache: folder of fetched and read data.
    """
    if data.ood is not None and data.ood != data.place:
        return open_data(data.ood, cache=cache).pools(seed).bases
    bases = pools.bases.read()
    turned = torch.rot90(bases.x, dims=(2, 3)).contiguous()
    return Examples(turned, bases.y)


def _known(place: str | Path, options: Options) -> tuple[Found, Dataset | None]:
    row = known(str(place))
    if options.size is not None and (options.size, options.size) != row.shape[1:]:
        raise CountermarkError(
            f"the images of {row.name} have {row.shape[1]} x {row.shape[2]} pixels; leave --size "
            "out"
        )
    try:
        train, test = row.read(row, options.cache)
    except CountermarkError as error:
        if _is_path(place, os.path.isdir):
            raise CountermarkError(
                f"{error} (or give ./{place} for the folder of that name)"
            ) from error
        raise
    data = Dataset(
        place=row.name,
        train=train,
        test=test,
        class_names=row.class_names,
        threat=row.threat,
        test_cut=row.test_cut,
        pool_sizes=row.pools,
        batches=row.batches,
        batch_size=row.batch_size,
        mirror=row.mirror,
        shift=row.shift,
        ood=row.ood,
    )
    return _told(data), data


def _opened(data: Dataset, options: Options) -> tuple[Found, Dataset | None]:
    if options.size is not None and (options.size, options.size) != data.shape[1:]:
        raise CountermarkError(
            f"the images of the data set are opened already, with {data.shape[1]} x "
            f"{data.shape[2]} pixels; leave size out"
        )
    return _told(data), data


def _told(data: Dataset) -> Found:
    """Describe a data set that is open already."""
    (_, height, width), parts = data.shape, {"train": data.train, "test": data.test}
    return Found(
        place=data.place or "the data",
        class_names=data.class_names,
        counts={
            name: tuple(part.y.bincount(minlength=data.classes).tolist())
            for name, part in parts.items()
        },
        shapes={f"{height}x{width}": sum(map(len, parts.values()))},
        colour=data.colour,
        converted=data.converted,
    )


def _listed(
    listing: Callable[[Path], Listing],
) -> Callable[[Any, Options], tuple[Found, Dataset | None]]:
    def bring(place: Any, options: Options) -> tuple[Found, Dataset | None]:
        return bring_in(
            listing(Path(place)),
            size=options.size,
            skip_damaged=options.skip_damaged,
            cache=options.cache,
        )

    return bring


def _object(place: Any, options: Options, name: str = "") -> tuple[Found, Dataset | None]:
    listing = list_object(name or "the data", place)
    found, data = bring_in(
        listing, size=options.size, skip_damaged=options.skip_damaged, cache=options.cache
    )
    return found, None if data is None else replace(data, place=name)


def _code(place: str, options: Options) -> tuple[Found, Dataset | None]:
    """What a function of the user's returns, or an object that they name."""
    found = imported(place)
    if not hasattr(found, "__len__"):
        found = called(found, place, {}) if callable(found) else found
    if isinstance(found, str | Path | Dataset):
        raise CountermarkError(
            f"{place} gives {brief(type(found).__name__)}; let it return arrays or a data set of "
            "images with labels"
        )
    return _object(found, options, place)


def _is_path(place: Any, there: Callable[[str | Path], bool]) -> bool:
    """Whether a place is a path for which `there` is true.

    The functions of `os.path` say no where they may not look, and for an empty text.
    """
    return isinstance(place, str | Path) and there(place)


READERS: tuple[Reader, ...] = (
    Reader("a Dataset", lambda place: isinstance(place, Dataset), _opened),
    Reader(", ".join(KNOWN), lambda place: isinstance(place, str) and place in KNOWN, _known),
    Reader(
        "a .npz file",
        lambda place: _is_path(place, os.path.isfile) and Path(place).suffix.lower() == ".npz",
        _listed(list_npz),
    ),
    Reader(
        "a Parquet file or a folder of them",
        lambda place: _is_path(place, os.path.exists) and bool(parquet_files(Path(place))),
        _listed(list_parquet),
    ),
    Reader(
        "a folder of class folders",
        lambda place: _is_path(place, os.path.isdir),
        _listed(list_folder),
    ),
    Reader(
        "module:function",
        lambda place: (
            isinstance(place, str) and not _is_path(place, os.path.exists) and is_code(place)
        ),
        _code,
    ),
    Reader("an object in Python", lambda place: not isinstance(place, str | Path), _object),
)
"""Every kind of place, in the order in which they are tried."""
