"""Five disjoint pools, so that no number is measured on what chose it.

Training, validation, watermark bases, the thief's data and the test examples never overlap (design
rule "no self-flattery"). The first four are cut out of the training examples by a seeded
permutation; the test pool is the test part. Equal images never fall into two pools.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from countermark.data.dataset import Dataset, Examples
from countermark.data.source import open_data
from countermark.errors import CountermarkError
from countermark.named_code import is_code
from countermark.places import DataPlace

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


def cut(data: Dataset, seed: int, known: torch.Tensor | None = None) -> Pools:
    """Cut a data set into its pools.

    Args:
        data: the data set.
        seed: seed of the permutation.
        known: bool `(n,)`, which training examples given weights were trained on; the pools that
            are held out are taken from the others first.

    Raises:
        CountermarkError: there is too little of it.
    """
    wanted = data.pool_sizes or sizes(len(data.train))
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
    content = _contents(data)
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
    return Pools(test=data.test, known=counts, **{name: data.train[chosen] for name, chosen in pools.items()})


def _contents(data: Dataset) -> torch.Tensor:
    """A number for each training image, the same for equal images and -1 for those that are test images as well."""
    if not data.by_content:
        return torch.arange(len(data.train))
    numbers = data.train.contents()
    found, position = torch.unique(numbers, return_inverse=True)
    return torch.where(torch.isin(found, data.test.contents())[position], -1, position)


def _first_of_each(numbers: torch.Tensor) -> torch.Tensor:
    """Where each number stands for the first time, in order."""
    _, inverse = torch.unique(numbers, return_inverse=True)
    first = torch.full((int(inverse.max()) + 1 if len(inverse) else 0,), len(numbers))
    first.scatter_reduce_(0, inverse, torch.arange(len(numbers)), "amin")
    return first.sort().values


def known_images(data: Dataset, trained_on: DataPlace | None, *, cache: str | Path | None = None) -> torch.Tensor:
    """Which training images given weights had been trained on, bool `(n,)`.

    Args:
        data: the data set.
        trained_on: place of the images that they were trained on, test part and all: a name, a
            folder or a file. None or an empty place: the training part of `data`, without the
            images that came as its validation part.
        cache: folder of fetched and converted data.

    Raises:
        CountermarkError: that place cannot be opened, has images of another shape, or is code,
            which a model folder would have later verbs run.
    """
    if not trained_on:
        return torch.arange(len(data.train)) < data.parts.get("train", len(data.train))
    if isinstance(trained_on, str) and is_code(trained_on) and not Path(trained_on).exists():
        raise CountermarkError(
            f"weights that were trained on {trained_on} need its images as a folder or a file: later verbs open "
            "them because the model folder says so, and no code is run for that reason; save them as a .npz file"
        )
    other = open_data(trained_on, size=data.size, skip_damaged=data.skip_damaged, cache=cache)
    if other.shape != data.shape:
        raise CountermarkError(f"{other.place} has images of shape {other.shape}, the data of {data.shape}: such images cannot be compared")
    seen = torch.cat((other.train.contents(), other.test.contents()))
    return torch.isin(data.train.contents(), seen)


def load_pools(name: str, seed: int, cache: str | Path | None = None) -> Pools:
    """Open the data set at a place and cut it into its pools by `seed`.

    Raises:
        CountermarkError: see `open_data` and `cut`.
    """
    return open_data(name, cache=cache).pools(seed)


def load_ood(data: Dataset, seed: int, cache: str | Path | None = None) -> Examples:
    """Return the examples that are out of distribution for a data set, with their own labels.

    They are the watermark bases of another data set where one is known, or the own bases turned by
    90 degrees.
    """
    if data.ood is not None and data.ood != data.place:
        return open_data(data.ood, cache=cache).pools(seed).bases
    bases = data.pools(seed).bases.read()
    turned = torch.rot90(bases.x, dims=(2, 3)).contiguous()
    return Examples(turned, bases.y)
