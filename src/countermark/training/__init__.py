"""Training: one loop, its objectives and the recipes by name; and that of cleaners."""

from countermark.training.cleaning import teach_cleaner
from countermark.training.config import Hardware, TrainConfig
from countermark.training.loop import Epoch, open_hardware, resolve_hardware, train
from countermark.training.recipes import (
    Traits,
    built_in_network,
    fitted,
    gentle,
    kind_of,
    known_traits,
    marking,
    recipe,
    traits,
)

__all__ = [
    "Epoch",
    "Hardware",
    "TrainConfig",
    "Traits",
    "built_in_network",
    "fitted",
    "gentle",
    "kind_of",
    "known_traits",
    "marking",
    "open_hardware",
    "recipe",
    "resolve_hardware",
    "teach_cleaner",
    "train",
    "traits",
]
