"""Five disjoint pools, so that no number is measured on what chose it.

Training, validation, watermark bases, the thief's data and the test examples never overlap (design rule "no self-flattery"). The
first four are cut out of the training examples by a seeded permutation; the test pool is the official one.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import torch

from countermark.data.catalog import spec
from countermark.data.examples import Examples, load_examples


@dataclass(frozen=True)
class Pools:
    """The disjoint pools of one data set and one seed.

    Attributes:
        training: what the owner trains on.
        validation: what every selection uses.
        bases: clean images from which watermarks are crafted.
        thief: seeds, natural queries and fine-tuning data of the thief.
        test: the official test examples, only ever measured.
    """

    training: Examples
    validation: Examples
    bases: Examples
    thief: Examples
    test: Examples

    def digests(self) -> dict[str, str]:
        """SHA-256 of every pool by name."""
        return {pool.name: getattr(self, pool.name).digest for pool in fields(self)}


def load_pools(name: str, seed: int, cache: Path | None = None) -> Pools:
    """Load the data set `name` and cut it into its pools by `seed`.

    Raises:
        CountermarkError: see `load_examples`.
    """
    train, test = load_examples(name, cache)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    pools: dict[str, Examples] = {}
    for pool, size in spec(name).pools.items():
        pools[pool], order = train[order[:size]], order[size:]
    return Pools(training=train[order], test=test, **pools)


def load_ood(name: str, seed: int, cache: Path | None = None) -> Examples:
    """Return the examples that are out of distribution for the data set `name`, with their own labels.

    They are the watermark bases of the catalogue's other data set, or the own bases turned by 90 degrees.
    """
    other = spec(name).ood
    bases = load_pools(other, seed, cache).bases
    return Examples(torch.rot90(bases.x, dims=(2, 3)).contiguous(), bases.y) if other == name else bases
