"""Data sets as resident uint8 tensors, and the five disjoint pools that every number rests on.

What needs tensors is imported when it is first used; the catalogue and the fetcher do without
PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from countermark.data.catalog import CATALOG, Spec, spec
from countermark.data.fetch import cache_folder, fetch, is_cached

if TYPE_CHECKING:
    from countermark.data.examples import Examples, as_uint8, load_examples, pixels
    from countermark.data.pools import Pools, load_ood, load_pools

_HOMES = {
    "Examples": "examples",
    "as_uint8": "examples",
    "load_examples": "examples",
    "pixels": "examples",
    "Pools": "pools",
    "load_ood": "pools",
    "load_pools": "pools",
}

__all__ = [
    "CATALOG",
    "Examples",
    "Pools",
    "Spec",
    "as_uint8",
    "cache_folder",
    "fetch",
    "is_cached",
    "load_examples",
    "load_ood",
    "load_pools",
    "pixels",
    "spec",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
