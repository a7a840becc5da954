"""Data sets from anywhere as uint8 images, and the five disjoint pools that every number rests on.

What needs tensors is imported when it is first used; the rows of known data sets and the fetcher
do without PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from countermark.data.cache import cache_folder
from countermark.data.known import KNOWN, fetch, is_cached, known
from countermark.data.row import Known
from countermark.threat import default_threat

if TYPE_CHECKING:
    from countermark.data.dataset import Dataset
    from countermark.data.examples import Examples, Rows, as_uint8, joined, pixels
    from countermark.data.pools import Pools
    from countermark.data.source import (
        DataPlace,
        known_images,
        load_examples,
        load_ood,
        load_pools,
        open_data,
    )
    from countermark.data.store import by_digest

_HOMES = {
    "DataPlace": "source",
    "Dataset": "dataset",
    "Examples": "examples",
    "Pools": "pools",
    "Rows": "examples",
    "as_uint8": "examples",
    "by_digest": "store",
    "joined": "examples",
    "known_images": "source",
    "load_examples": "source",
    "load_ood": "source",
    "load_pools": "source",
    "open_data": "source",
    "pixels": "examples",
}

__all__ = [
    "KNOWN",
    "DataPlace",
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
    "joined",
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
