"""Data sets from anywhere as uint8 images, and the five disjoint pools that every number rests on.

What needs tensors is imported when it is first used; the rows of known data sets and the fetcher
do without PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from countermark.data.cache import cache_folder
from countermark.data.fetch import fetch, is_cached
from countermark.data.known import KNOWN, Known, default_threat, known

if TYPE_CHECKING:
    from countermark.data.dataset import Dataset, Examples, Rows, as_uint8, pixels
    from countermark.data.pools import Pools, known_images, load_ood, load_pools
    from countermark.data.source import load_examples, open_data
    from countermark.data.store import by_digest

_HOMES = {
    "Dataset": "dataset",
    "Examples": "dataset",
    "Rows": "dataset",
    "as_uint8": "dataset",
    "by_digest": "store",
    "load_examples": "source",
    "open_data": "source",
    "pixels": "dataset",
    "Pools": "pools",
    "known_images": "pools",
    "load_ood": "pools",
    "load_pools": "pools",
}

__all__ = [
    "KNOWN",
    "Dataset",
    "Examples",
    "Known",
    "Pools",
    "Rows",
    "as_uint8",
    "by_digest",
    "cache_folder",
    "default_threat",
    "fetch",
    "is_cached",
    "known",
    "known_images",
    "load_examples",
    "load_ood",
    "load_pools",
    "open_data",
    "pixels",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
