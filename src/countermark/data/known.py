"""The data sets that are known by name, one row each: files, class names, threat, pools.

The budgets of MNIST and Fashion-MNIST are those of Thakkar, Zizzo and Maffeis (2023), Table 6;
those of `digits` are ours. What is not known by name gets `threat.default_threat`.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from countermark.data import originals, packages
from countermark.data.cache import cache_folder
from countermark.data.fetch import fetch_files
from countermark.data.originals import TEST_IMAGES, TEST_LABELS, TRAIN_IMAGES, TRAIN_LABELS
from countermark.data.row import Known
from countermark.errors import choose
from countermark.threat import COLOUR, GREY, Threat

_DIGITS = tuple("0123456789")
_CLOTHES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_IDX_POOLS = {"validation": 2000, "bases": 1000, "thief": 11000}

KNOWN: Mapping[str, Known] = {
    each.name: each
    for each in (
        Known(
            name="mnist",
            shape=(1, 28, 28),
            class_names=_DIGITS,
            threat=Threat(0.25, 25, 0.01, 0.4),
            read=originals.read_idx,
            batch_size=400,
            ood="fashion_mnist",
            pools=_IDX_POOLS,
            ink=True,
            shift=1,
            files={
                TRAIN_IMAGES: "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
                TRAIN_LABELS: "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
                TEST_IMAGES: "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
                TEST_LABELS: "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            },
            mirrors=(
                "https://ossci-datasets.s3.amazonaws.com/mnist/",
                "https://storage.googleapis.com/cvdf-datasets/mnist/",
            ),
            package=packages.MNIST,
        ),
        Known(
            name="fashion_mnist",
            shape=(1, 28, 28),
            class_names=_CLOTHES,
            threat=GREY,
            read=originals.read_idx,
            ood="mnist",
            pools=_IDX_POOLS,
            mirror=True,
            files={
                TRAIN_IMAGES: "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
                TRAIN_LABELS: "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
                TEST_IMAGES: "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
                TEST_LABELS: "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
            },
            mirrors=(
                "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
                "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
            ),
            system=Path("/usr/share/datasets/fashion-mnist"),
            package=packages.FASHION_MNIST,
        ),
        # 1,797 images of 8x8; every sixth is in the test pool. The other pools keep roughly the
        # proportions of MNIST, but for the watermark bases: a mark's strength counts trials,
        # whatever the size of the data.
        Known(
            name="digits",
            shape=(1, 8, 8),
            class_names=_DIGITS,
            threat=Threat(0.1, 10, 0.025, 0.25),
            read=originals.read_digits,
            pools={"validation": 60, "bases": 220, "thief": 280},
            train=1497,
            test=300,
            test_cut=True,
            batch_size=80,
        ),
        # The archive of binary files, which holds no pickles.
        Known(
            name="cifar10",
            shape=(3, 32, 32),
            class_names=(
                "airplane",
                "automobile",
                "bird",
                "cat",
                "deer",
                "dog",
                "frog",
                "horse",
                "ship",
                "truck",
            ),
            threat=COLOUR,
            read=originals.read_cifar,
            pools={"validation": 1000, "bases": 1500, "thief": 10_000},
            train=50_000,
            mirror=True,
            shift=4,
            files={
                originals.CIFAR_ARCHIVE: (
                    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
                )
            },
            largest=170_052_171,
            mirrors=("https://www.cs.toronto.edu/~kriz/",),
            packed=False,
        ),
    )
}


def known(name: str) -> Known:
    """Return the data set called `name`.

    Raises:
        CountermarkError: there is none; the message lists those that there are.
    """
    choose("data set", name, KNOWN)
    return KNOWN[name]


def fetch(name: str, source: str | Path | None = None, cache: str | Path | None = None) -> Path:
    """Make sure that the files of a data set are in the cache.

    Args:
        name: name of a known data set that has files; `digits` needs none.
        source: a folder with the files (plain or .gz), or the file itself if the data set has only
            one; no other source is tried.
        cache: where to keep them; default `cache_folder()`.

    Returns:
        The folder of the data set, with its files.

    Raises:
        CountermarkError: no source has the files, or a file has the wrong SHA-256; no partial file
            is left behind.
    """
    return fetch_files(
        known(name), Path(source) if source else None, Path(cache) if cache else None
    )


def is_cached(name: str, cache: str | Path | None = None) -> bool:
    """Whether all files of a data set are in the cache already."""
    found = ((Path(cache) if cache else cache_folder()) / name / file for file in known(name).files)
    return all(os.path.isfile(path) for path in found)  # noqa: PTH113 (it says no where it may not look)
