"""Removal: what a thief does to a copy so that the mark goes away.

Pruning and fine-tuning as in Thakkar, Zizzo and Maffeis (2023), Algorithm 3.
"""

import copy

from torch import nn
from torch.nn.utils import prune as torch_prune

from countermark.data import Examples
from countermark.errors import CountermarkError
from countermark.training import Hardware, TrainConfig, train


def prune(network: nn.Module, rate: float) -> nn.Module:
    """Return a copy whose smallest weights are zero: L1 unstructured, in every convolution and linear layer by itself.

    Args:
        network: any module.
        rate: fraction removed, in (0, 1).

    Raises:
        CountermarkError: a rate out of range.
    """
    if not 0 < rate < 1:
        raise CountermarkError(f"the pruning rate is the fraction removed, in (0, 1), not {rate}")
    pruned = copy.deepcopy(network)
    for layer in pruned.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            torch_prune.l1_unstructured(layer, "weight", rate)  # type: ignore[no-untyped-call]
            torch_prune.remove(layer, "weight")  # type: ignore[no-untyped-call]
    return pruned


def finetune(
    network: nn.Module, examples: Examples, epochs: int, seed: int = 0, hardware: Hardware | None = None, title: str | None = None
) -> nn.Module:
    """Return a copy, all layers trained on with plain cross-entropy (SGD 0.005, momentum 0.9, weight decay 5e-4, batch 128).

    Weights that pruning set to zero may move again.

    Args:
        network: any module from pixels to logits.
        examples: data that the owner did not train on.
        epochs: passes over it.
        seed: seed of the training.
        hardware: devices and precision.
        title: names the progress bar; none is shown without it.
    """
    tuned = copy.deepcopy(network)
    config = TrainConfig(
        objective="standard",
        attack=None,
        epochs=epochs,
        learning_rate=0.005,
        schedule="constant",
        seed=seed,
        hardware=hardware or Hardware(),
    )
    train(tuned, examples, config, title=title)
    return tuned
