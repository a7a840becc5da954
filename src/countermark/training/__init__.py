"""Training: one loop, its objectives and the recipes by name."""

from countermark.training.config import EMBEDDINGS, Hardware, TrainConfig, choose
from countermark.training.loop import Epoch, open_hardware, settled, train
from countermark.training.recipes import RECIPES, marking, own_network, recipe

__all__ = [
    "EMBEDDINGS",
    "RECIPES",
    "Epoch",
    "Hardware",
    "TrainConfig",
    "choose",
    "marking",
    "open_hardware",
    "own_network",
    "recipe",
    "settled",
    "train",
]
