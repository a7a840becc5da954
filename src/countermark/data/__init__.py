"""Data sets as resident uint8 tensors, and the five disjoint pools that every number rests on."""

from countermark.data.catalog import CATALOG, Spec, spec
from countermark.data.examples import Examples, as_uint8, load_examples, pixels
from countermark.data.fetch import cache_folder, fetch, is_cached
from countermark.data.pools import Pools, load_ood, load_pools

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
