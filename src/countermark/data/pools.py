"""Five disjoint pools, so that no number is measured on what chose it.

Training, validation, watermark bases, the thief's data and the test examples never overlap (design
rule "no self-flattery"). The first four are cut out of the training examples by a seeded
permutation; the test pool is the test part. Equal images never fall into two pools.
"""

import base64
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from countermark.data.examples import Examples
from countermark.errors import CountermarkError

POOLS = ("training", "validation", "bases", "thief", "test")
HELD_OUT = ("validation", "bases", "thief")


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
    return {
        "validation": min(2000, max(60, count // 25), count // 10),
        "bases": bases,
        "thief": count * 11 // 60,
    }


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
        known: bool `(n,)`, which of the training and then the test examples given weights were
            trained on; the pools that are held out are taken from the others first.
        wanted: number of examples in each pool that is held out; by default `sizes` decides.
        by_content: keep equal images in one pool.

    Raises:
        CountermarkError: there are too few examples.
    """
    wanted = wanted or sizes(len(train))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    every = (
        torch.cat((train.contents(), test.contents()))
        if by_content or known is not None
        else torch.arange(len(train))
    )
    content = _contents(every, len(train)) if by_content else torch.arange(len(train))
    order = order[content[order] >= 0]
    first = _first_of_each(content[order])
    candidates = order[first]
    if known is not None:
        if known.shape != every.shape:
            raise CountermarkError(
                f"known is a mask of the {len(train)} training and the {len(test)} test images, "
                f"not {tuple(known.shape)}"
            )
        # Weights know every copy of an image that they were trained on.
        known = torch.isin(every, every[known])
        candidates = candidates[known[candidates].int().argsort(stable=True)]
    if min(wanted.values()) == 0 or len(candidates) <= sum(wanted.values()):
        raise CountermarkError(
            f"{len(candidates)} different training images are too few for pools of "
            f"{', '.join(f'{size} ({name})' for name, size in wanted.items())} and training; give "
            "more images"
        )
    pools: dict[str, torch.Tensor] = {}
    for name in HELD_OUT:
        pools[name], candidates = candidates[: wanted[name]], candidates[wanted[name] :]
    held_out = torch.cat([content[chosen] for chosen in pools.values()])
    pools["training"] = order[~torch.isin(content[order], held_out)]
    counts: dict[str, int] = {}
    if known is not None:
        counts = {name: int(known[chosen].sum()) for name, chosen in pools.items()} | {
            "test": int(known[len(train) :].sum())
        }
    return Pools(test=test, known=counts, **{name: train[chosen] for name, chosen in pools.items()})


def packed(known: torch.Tensor) -> str:
    """Write a mask, bool `(n,)`, as text for a model folder; `unpacked` reads it."""
    return base64.b64encode(zlib.compress(np.packbits(known.numpy()).tobytes())).decode()


def unpacked(text: str, count: int) -> torch.Tensor:
    """Read the mask of `count` examples from a text of `packed`.

    Raises:
        CountermarkError: it is not such a text, or a mask of another number of examples.

    Example:
        >>> unpacked(packed(torch.tensor([True, False, True])), 3)
        tensor([ True, False,  True])
    """
    size = (count + 7) // 8
    try:
        bits = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), size + 1)
    except (ValueError, zlib.error):
        bits = b""
    if len(bits) != size:
        raise CountermarkError(
            "what the model folder says of the images that its first weights knew does not fit "
            "the data; it is damaged"
        )
    return torch.from_numpy(
        np.unpackbits(np.frombuffer(bits, dtype=np.uint8), count=count).astype(bool)
    )


def _contents(every: torch.Tensor, count: int) -> torch.Tensor:
    """Number the first `count` images by their content.

    Equal images have the same number. An image that is also among the remaining ones has -1.
    """
    found, position = torch.unique(every[:count], return_inverse=True)
    return torch.where(torch.isin(found, every[count:])[position], -1, position)


def _first_of_each(numbers: torch.Tensor) -> torch.Tensor:
    """The position at which each number occurs first, in order."""
    _, inverse = torch.unique(numbers, return_inverse=True)
    first = torch.full((int(inverse.max()) + 1 if len(inverse) else 0,), len(numbers))
    first.scatter_reduce_(0, inverse, torch.arange(len(numbers)), "amin")
    return first.sort().values
