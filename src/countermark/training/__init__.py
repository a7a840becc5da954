"""Training: one loop, its objectives and the recipes by name."""

from countermark.training.config import EMBEDDINGS, OBJECTIVES, Hardware, TrainConfig, choose
from countermark.training.loop import Epoch, open_hardware, train
from countermark.training.recipes import marking, recipe

__all__ = ["EMBEDDINGS", "OBJECTIVES", "Epoch", "Hardware", "TrainConfig", "choose", "marking", "open_hardware", "recipe", "train"]
