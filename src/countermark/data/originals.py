"""Reading the files of the known data sets as their authors publish them.

PyTorch is imported when something is read: the rows of known data sets, which name these functions,
do without it.
"""

import tarfile
import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from countermark.errors import CountermarkError

if TYPE_CHECKING:
    from countermark.data.examples import Examples
    from countermark.data.reading import Item
    from countermark.data.row import Known

TRAIN_IMAGES = "train-images-idx3-ubyte"
TRAIN_LABELS = "train-labels-idx1-ubyte"
TEST_IMAGES = "t10k-images-idx3-ubyte"
TEST_LABELS = "t10k-labels-idx1-ubyte"


CIFAR_ARCHIVE = "cifar-10-binary.tar.gz"

# Every sixth of the digits is a test example, so that all writers are in both sets.
_DIGITS_EACH = 6
_IDX_LIMIT = 1 << 26
_CIFAR_FILES: Mapping[str, str] = {
    **{f"data_batch_{i}.bin": "train" for i in range(1, 6)},
    "test_batch.bin": "test",
}
_CIFAR_IMAGES = 10_000  # in a file, each a label and a red, a green and a blue plane
_CIFAR_RECORD = 1 + 3 * 32 * 32


def read_idx(row: "Known", cache: Path | None) -> tuple["Examples", "Examples"]:
    """Training and test examples out of four IDX files.

    Raises:
        CountermarkError: they cannot be fetched, or do not fit.
    """
    import torch

    from countermark.data.examples import Examples
    from countermark.data.fetch import fetch_files
    from countermark.data.idx import parse_idx
    from countermark.files import read_bytes

    folder = fetch_files(row, cache=cache)

    def part(images: str, labels: str) -> Examples:
        x = torch.from_numpy(
            parse_idx(read_bytes(folder / images, _IDX_LIMIT), 3, images).copy()
        ).unsqueeze(1)
        y = torch.from_numpy(
            parse_idx(read_bytes(folder / labels, _IDX_LIMIT), 1, labels).copy()
        ).long()
        if len(x) != len(y) or x.shape[1:] != row.shape:
            raise CountermarkError(
                f"{folder} holds images and labels that do not fit {row.name}; delete the folder "
                "to fetch them again"
            )
        return Examples(x, y)

    return part(TRAIN_IMAGES, TRAIN_LABELS), part(TEST_IMAGES, TEST_LABELS)


def read_digits(row: "Known", cache: Path | None) -> tuple["Examples", "Examples"]:
    """Training and test examples out of scikit-learn.

    Raises:
        CountermarkError: it is not installed.
    """
    import torch

    from countermark.data.examples import Examples

    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise CountermarkError(
            f"the data set {row.name!r} comes with scikit-learn; pip install 'countermark[digits]'"
        ) from error
    source = load_digits()
    x = torch.from_numpy(source.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    y = torch.from_numpy(source.target).long()
    test = torch.arange(len(y)) % _DIGITS_EACH == 0
    return Examples(x[~test], y[~test]), Examples(x[test], y[test])


def read_cifar(row: "Known", cache: Path | None) -> tuple["Examples", "Examples"]:
    """Read the training and test examples from the archive of CIFAR-10's binary files.

    The archive is unpacked once.

    Raises:
        CountermarkError: the archive cannot be fetched, or its content does not fit.
    """
    from countermark.data.fetch import fetch_files
    from countermark.data.reading import Listing, file_state
    from countermark.data.store import stored

    archive = fetch_files(row, cache=cache) / CIFAR_ARCHIVE
    items, count = _cifar_items(archive, row.classes), _CIFAR_IMAGES * len(_CIFAR_FILES)
    data = stored(
        Listing(row.name, row.class_names, items, count, file_state([archive])),
        size=None,
        skip_damaged=False,
        cache=cache,
    )
    return data.train, data.test


def _cifar_items(archive: Path, classes: int) -> Iterator["Item"]:
    import numpy as np

    from countermark.data.images import from_pixels
    from countermark.data.reading import Item

    try:
        with tarfile.open(archive) as opened:
            files = {
                Path(member.name).name: opened.extractfile(member)
                for member in opened
                if member.isfile()
            }
            contents = {
                name: stream.read()
                for name in _CIFAR_FILES
                if (stream := files.get(name)) is not None
            }
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise CountermarkError(
            f"cannot read {archive}: {error}; delete it to fetch it again"
        ) from error
    for name, part in _CIFAR_FILES.items():
        records = np.frombuffer(contents.get(name, b""), dtype=np.uint8)
        if (
            len(records) != _CIFAR_IMAGES * _CIFAR_RECORD
            or int((records := records.reshape(-1, _CIFAR_RECORD))[:, 0].max()) >= classes
        ):
            raise CountermarkError(f"{archive} holds no whole {name}; delete it to fetch it again")
        for i, record in enumerate(records):
            yield Item(
                f"{name}[{i}]",
                part,
                int(record[0]),
                partial(from_pixels, record[1:].reshape(3, 32, 32)),
            )
