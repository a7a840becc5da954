"""Training: one loop, its objectives and the recipes by name."""

from countermark.training.config import Hardware, TrainConfig
from countermark.training.loop import Epoch, open_hardware, resolve_hardware, train
from countermark.training.recipes import (
    Traits,
    gentle,
    kind_of,
    known_traits,
    marking,
    own_network,
    recipe,
    traits,
)

__all__ = [
    "Epoch",
    "Hardware",
    "TrainConfig",
    "Traits",
    "gentle",
    "kind_of",
    "known_traits",
    "marking",
    "open_hardware",
    "own_network",
    "recipe",
    "resolve_hardware",
    "train",
    "traits",
]
