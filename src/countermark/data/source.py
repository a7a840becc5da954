"""Opening data: one door for every place that images come from."""

from pathlib import Path

import torch

from countermark.data.dataset import Dataset, Examples
from countermark.data.fetch import fetch
from countermark.data.idx import parse_idx
from countermark.data.known import KNOWN, TEST_IMAGES, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS, Known, known
from countermark.errors import CountermarkError
from countermark.files import read_bytes

_DIGITS_EACH = 6  # every sixth of the digits is a test example, so that all writers are in both sets
_IDX_LIMIT = 1 << 26


def open_data(
    place: str | Path | Dataset,
    *,
    size: int | None = None,
    skip_damaged: bool = False,
    cache: str | Path | None = None,
) -> Dataset:
    """Open images with labels.

    Args:
        place: the name of a data set that is known.
        size: side that images are brought to.
        skip_damaged: leave out files that cannot be read.
        cache: folder of fetched and converted data; default `$COUNTERMARK_CACHE` or the system's.

    Raises:
        CountermarkError: nothing can be read there.
    """
    if isinstance(place, Dataset):
        return place
    row = known(str(place))
    train, test = _read_known(row, None if cache is None else Path(cache))
    return Dataset(
        place=row.name,
        train=train,
        test=test,
        class_names=row.class_names,
        threat=row.threat,
        pool_sizes=row.pools,
        batches=row.batches,
        batch_size=row.batch_size,
        mirror=row.mirror,
        shift=row.shift,
        ood=row.ood,
    )


def load_examples(name: str, cache: Path | None = None) -> tuple[Examples, Examples]:
    """Return the training and test examples at a place; see `open_data`."""
    data = open_data(name, cache=cache)
    return data.train, data.test


def _read_known(row: Known, cache: Path | None) -> tuple[Examples, Examples]:
    if row.name == "digits":
        return _digits()
    folder = fetch(row.name, cache=cache)

    def part(images: str, labels: str) -> Examples:
        x = torch.from_numpy(parse_idx(read_bytes(folder / images, _IDX_LIMIT), 3, images).copy()).unsqueeze(1)
        y = torch.from_numpy(parse_idx(read_bytes(folder / labels, _IDX_LIMIT), 1, labels).copy()).long()
        if len(x) != len(y) or x.shape[1:] != row.shape:
            raise CountermarkError(f"{folder} holds images and labels that do not fit {row.name}; delete the folder to fetch them again")
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


__all__ = ["KNOWN", "load_examples", "open_data"]
