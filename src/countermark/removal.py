"""Removal: what a thief does to a copy so that the mark goes away.

Pruning and fine-tuning as in Thakkar, Zizzo and Maffeis (2023), Algorithm 3; beyond them noise on the weights and int8.
"""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from countermark.data import Examples
from countermark.errors import CountermarkError
from countermark.threat import Attack
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
    network: nn.Module,
    examples: Examples,
    epochs: int,
    *,
    attack: Attack | None = None,
    seed: int = 0,
    hardware: Hardware | None = None,
    after_epoch: Callable[[int, nn.Module], None] | None = None,
    title: str | None = None,
) -> nn.Module:
    """Return a copy, all layers trained on with cross-entropy (SGD 0.005, momentum 0.9, weight decay 5e-4, batch 128).

    Weights that pruning set to zero may move again.

    Args:
        network: any module from pixels to logits.
        examples: data that the owner did not train on.
        epochs: passes over it.
        attack: train on examples that this attack crafted (adversarial fine-tuning); none trains on the examples themselves.
        seed: seed of the training.
        hardware: devices and precision.
        after_epoch: called with each epoch's number, from 1, and the network.
        title: names the progress bar; none is shown without it.
    """
    tuned = copy.deepcopy(network)
    config = TrainConfig(
        objective="standard" if attack is None else "pgd",
        attack=attack,
        epochs=epochs,
        learning_rate=0.005,
        schedule="constant",
        grow_budget=False,
        seed=seed,
        hardware=hardware or Hardware(),
    )
    train(tuned, examples, config, after_epoch=after_epoch, title=title)
    return tuned


def add_noise(network: nn.Module, scale: float, seed: int = 0) -> nn.Module:
    """Return a copy with Gaussian noise on the weights of every convolution and linear layer.

    Args:
        network: any module.
        scale: standard deviation of the noise, in standard deviations of the layer's weights.
        seed: seed of the noise.
    """
    noisy = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()  # tied weights are those of several layers and get their noise once
    with torch.no_grad():
        for layer in noisy.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear) and id(layer.weight) not in done:
                done.add(id(layer.weight))
                noise = torch.randn(layer.weight.shape, generator=generator).to(layer.weight)
                layer.weight.add_(noise * (scale * layer.weight.std()))
    return noisy


def quantise(network: nn.Module) -> nn.Module:
    """Return a copy whose linear layers hold int8 weights and compute on int8 activations (torchao, quantised as it runs).

    Raises:
        CountermarkError: torchao is not installed.
    """
    try:
        for name in ("torchao", "torch.utils._pytree"):
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # it reports GPU libraries that it cannot load
            warnings.simplefilter("ignore")
            from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError as error:
        raise CountermarkError("int8 quantisation needs torchao; pip install 'countermark[study]'") from error
    quantised = copy.deepcopy(network).eval()
    quantize_(quantised, Int8DynamicActivationInt8WeightConfig())
    return quantised
