"""Orders that come out of a seed, for the examples of an epoch and for watermarks.

Watermarks join batches round after round through all of them, each round in its own order, so that
after any number of steps each has been trained on as often as any other, or once more.
"""

import hashlib

import torch


def seed_of(*source: int | str) -> int:
    """A seed of 63 bits for what is named by `source`; each name has its own."""
    return int.from_bytes(hashlib.sha256(repr(source).encode()).digest()[:8], "big") >> 1


def shuffled(count: int, *source: int | str) -> torch.Tensor:
    """The numbers below `count` in an order of their own for `source`, int64 `(count,)`."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(*source)))


def in_turn(first: int, size: int, count: int, seed: int) -> torch.Tensor:
    """The watermarks at the places `first` to `first + size` of the endless row of rounds.

    Args:
        first: watermarks that had their turn before.
        size: how many are wanted, more than `count` if need be.
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
