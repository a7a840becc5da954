"""Orders that come out of a seed, for the examples of an epoch and for watermarks.

Watermarks join batches round after round through all of them, each round in its own order, so that
after any number of steps each has been trained on as often as any other, or once more.
"""

import hashlib

import torch


def seed_of(*source: int | str) -> int:
    """A seed of 63 bits that is derived from `source`: numbers and words that name its purpose."""
    return int.from_bytes(hashlib.sha256(repr(source).encode()).digest()[:8], "big") >> 1


def shuffled(count: int, *source: int | str) -> torch.Tensor:
    """The numbers below `count` in an order that `source` determines, int64 `(count,)`."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(*source)))


def in_turn(first: int, size: int, count: int, seed: int) -> torch.Tensor:
    """The watermarks whose turn it is next.

    A round is all watermarks in an order of its own, and one round follows another without end.

    Args:
        first: how many watermarks had their turn before, over all rounds.
        size: how many are wanted; it may be more than one round.
        count: watermarks in a round.
        seed: seed of the orders.

    Returns:
        Their numbers below `count`, int64 `(size,)`.
    """
    places = torch.arange(first, first + size)
    rounds = places // count
    return torch.cat(
        [
            shuffled(count, seed, "watermarks", int(number))[places[rounds == number] % count]
            for number in torch.unique(rounds, sorted=True)
        ]
    )
