"""Put an input cleaner in front of a stolen network, and train it if it has parameters."""

import torch
from torch import nn

from countermark.device import seeded
from countermark.networks.cleaners import CLEANERS
from countermark.thieves.means import Means
from countermark.training import teach_cleaner


def clean(network: nn.Module, name: str, amount: float, means: Means) -> nn.Module:
    """Return a copy of the network behind a cleaner.

    Args:
        network: pixels `(n, c, h, w)` of [0, 1] to logits.
        name: of the cleaner, from `CLEANERS`.
        amount: its amount.
        means: the thief's images, and the epochs of the training where the cleaner has parameters.

    Raises:
        CountermarkError: the thief has no image, or logits are not finite.
    """
    channels, height, width = means.pool.x.shape[1:]
    with seeded(torch.device("cpu"), means.seed):
        front = CLEANERS[name].make((channels, height, width), amount)
    if next(front.parameters(), None) is not None:
        teach_cleaner(
            front,
            network,
            means.pool,
            budget=means.threat.watermark_epsilon,
            epochs=means.epochs,
            batch_size=means.batch_size,
            seed=means.seed,
            title=means.title,
        )
    front.train(network.training)
    return nn.Sequential(front, network)
