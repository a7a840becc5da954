"""Networks, built-in ones and others; weights from files; and model folders."""

from countermark.networks.features import WithFeatures
from countermark.networks.folder import (
    MODEL_FORMAT,
    DataRecord,
    Description,
    check_builds,
    declared_pools,
    describe,
    describing,
    load,
    load_model,
    open_declared,
    save_model,
    weights_sha256,
)
from countermark.networks.named import NETWORKS, build
from countermark.networks.onnx_network import OnnxNetwork, load_answering
from countermark.networks.source import open_network, place_of
from countermark.networks.weights import load_weights

__all__ = [
    "MODEL_FORMAT",
    "NETWORKS",
    "DataRecord",
    "Description",
    "OnnxNetwork",
    "WithFeatures",
    "build",
    "check_builds",
    "declared_pools",
    "describe",
    "describing",
    "load",
    "load_answering",
    "load_model",
    "load_weights",
    "open_declared",
    "open_network",
    "place_of",
    "save_model",
    "weights_sha256",
]
