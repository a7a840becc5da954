"""Networks: ours by name, any other by what builds it, and the folder that a model is."""

from countermark.networks.folder import (
    MODEL_FORMAT,
    DataRecord,
    Description,
    Network,
    describe,
    describing,
    load,
    load_model,
    open_declared,
    save_model,
)
from countermark.networks.named import NETWORKS, build
from countermark.networks.source import open_network

__all__ = [
    "MODEL_FORMAT",
    "NETWORKS",
    "DataRecord",
    "Description",
    "Network",
    "build",
    "describe",
    "describing",
    "load",
    "load_model",
    "open_declared",
    "open_network",
    "save_model",
]
