"""Five disjoint pools, so that no number is measured on what chose it.

Training, validation, watermark bases, the thief's data and the test examples never overlap (design
rule "no self-flattery"). The first four are cut out of the training examples by a seeded
permutation; the test pool is the test part. Equal images never fall into two pools.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from countermark.data.examples import Examples
from countermark.errors import CountermarkError

POOLS = ("training", "validation", "bases", "thief", "test")
_HELD_OUT = ("validation", "bases", "thief")


@dataclass(frozen=True)
class Pools:
    """The disjoint pools of one data set and one seed.

    Attributes:
        training: what the owner trains on.
        validation: what every selection uses.
        bases: clean images from which watermarks are crafted.
        thief: seeds, natural queries and fine-tuning data of the thief.
        test: the test examples, only ever measured.
        known: how many images of each pool the first weights were trained on, where the pools were
            cut for given weights.
    """

    training: Examples
    validation: Examples
    bases: Examples
    thief: Examples
    test: Examples
    known: Mapping[str, int] = field(default_factory=dict)

    def digests(self) -> dict[str, str]:
        """SHA-256 of every pool by name."""
        return {name: getattr(self, name).digest for name in POOLS}


def sizes(count: int) -> dict[str, int]:
    """Examples of the pools that are held out of `count` training examples.

    The thief has as large a share as in the paper's study of MNIST. A mark's strength counts
    trials, so small sets give a larger share to the watermark bases.
    """
    bases = min(1500, max(220, count // 7), count // 4)
    return {"validation": min(2000, max(60, count // 25), count // 10), "bases": bases, "thief": count * 11 // 60}


def cut(
    train: Examples,
    test: Examples,
    seed: int,
    known: torch.Tensor | None = None,
    *,
    wanted: Mapping[str, int] | None = None,
    by_content: bool = True,
) -> Pools:
    """Cut the examples of a data set into its pools.

    Args:
        train: what all pools but the test pool are cut out of.
        test: the test pool.
        seed: seed of the permutation.
        known: bool `(n,)`, which training examples given weights were trained on; the pools that
            are held out are taken from the others first.
        wanted: examples of the pools that are held out; default `sizes`.
        by_content: equal images never fall into two pools.

    Raises:
        CountermarkError: there is too little of it.
    """
    wanted = wanted or sizes(len(train))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    content = _contents(train, test) if by_content else torch.arange(len(train))
    order = order[content[order] >= 0]
    first = _first_of_each(content[order])
    candidates = order[first]
    if known is not None:
        known = torch.isin(content, content[known])  # weights know every copy of an image that they were trained on
        candidates = candidates[known[candidates].int().argsort(stable=True)]
    if min(wanted.values()) == 0 or len(candidates) <= sum(wanted.values()):
        raise CountermarkError(
            f"{len(candidates)} different training images are too few for pools of "
            f"{', '.join(f'{size} ({name})' for name, size in wanted.items())} and training; give more images"
        )
    pools: dict[str, torch.Tensor] = {}
    for name in _HELD_OUT:
        pools[name], candidates = candidates[: wanted[name]], candidates[wanted[name] :]
    held_out = torch.cat([content[chosen] for chosen in pools.values()])
    pools["training"] = order[~torch.isin(content[order], held_out)]
    counts = {} if known is None else {name: int(known[chosen].sum()) for name, chosen in pools.items()}
    return Pools(test=test, known=counts, **{name: train[chosen] for name, chosen in pools.items()})


def _contents(train: Examples, test: Examples) -> torch.Tensor:
    """A number for each training image, the same for equal images and -1 for those that are test images as well."""
    found, position = torch.unique(train.contents(), return_inverse=True)
    return torch.where(torch.isin(found, test.contents())[position], -1, position)


def _first_of_each(numbers: torch.Tensor) -> torch.Tensor:
    """Where each number stands for the first time, in order."""
    _, inverse = torch.unique(numbers, return_inverse=True)
    first = torch.full((int(inverse.max()) + 1 if len(inverse) else 0,), len(numbers))
    first.scatter_reduce_(0, inverse, torch.arange(len(numbers)), "amin")
    return first.sort().values
