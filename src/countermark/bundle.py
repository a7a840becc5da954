"""A model as a folder: `model.safetensors` with the weights, `model.json` with the network's name and what it was made for.

Loading builds the named network and fills in numbers; a bundle from a stranger can be wrong, but it cannot run code.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from countermark.data import Spec, spec
from countermark.errors import CountermarkError
from countermark.files import read_json, read_tensors, write_json, write_tensors
from countermark.models import build
from countermark.text import brief

MODEL_FORMAT = "countermark model 1"
_HEADER_ALLOWANCE = 1 << 20


@dataclass(frozen=True)
class Description:
    """What `model.json` says.

    Attributes:
        network: name of the network.
        shape: one image, `(channels, height, width)`.
        classes: number of classes.
        data: name of the data set it was trained for.
        epsilon: L-inf budget that it is evaluated at, in pixels of [0, 1].
        seed: seed that cut the pools.
        history: what was done to it, in order: how it was trained, stolen, pruned, fine-tuned.
    """

    network: str
    shape: tuple[int, int, int]
    classes: int
    data: str
    epsilon: float
    seed: int
    history: tuple[Mapping[str, Any], ...] = field(default=())


def save_bundle(folder: Path, network: nn.Module, description: Description, mode: int | None = None) -> str:
    """Write a model into an existing folder, its files with `mode` (see `write_bytes`), and return the SHA-256 of its weights file."""
    # A file holds no tied weights: each name has a copy.
    tensors = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}
    digest = write_tensors(folder / "model.safetensors", tensors, mode=mode)
    write_json(
        folder / "model.json",
        {
            "format": MODEL_FORMAT,
            "network": description.network,
            "shape": list(description.shape),
            "classes": description.classes,
            "data": description.data,
            "epsilon": description.epsilon,
            "seed": description.seed,
            "history": [dict(event) for event in description.history],
            "weights_sha256": digest,
        },
        mode,
    )
    return digest


def describe(folder: Path) -> Description:
    """Read what a model folder says of itself, `model.json`, and none of its weights.

    Raises:
        CountermarkError: the file is missing, foreign or damaged.
    """
    return _described(folder)[0]


def load_bundle(folder: Path) -> tuple[nn.Module, Description]:
    """Read a model folder.

    The names, types and shapes of the weights are compared with the network's before any of them is
    read.

    Returns:
        The network in evaluation mode and its description.

    Raises:
        CountermarkError: a file is missing, foreign, changed or truncated, the weights do not fit the network or are not finite.
    """
    description, weights_sha256 = _described(folder)
    with torch.device("meta"):  # no memory yet: the sizes come from a file that may be hostile
        network = build(description.network, description.shape, description.classes)
    expected = network.state_dict()
    size = sum(value.numel() * value.element_size() for value in expected.values())
    path = folder / "model.safetensors"
    named = brief(description.network)

    def check(tensors: Mapping[str, torch.Tensor]) -> None:
        for name, value in expected.items():
            if name not in tensors or tensors[name].shape != value.shape or tensors[name].dtype != value.dtype:
                raise CountermarkError(f"{path} does not fit the network {named} (tensor {name}); it belongs to another model")
        if len(tensors) != len(expected):
            raise CountermarkError(f"{path} holds tensors that the network {named} does not have; it belongs to another model")

    tensors, _, digest = read_tensors(path, size + _HEADER_ALLOWANCE, check)
    if digest != weights_sha256:
        raise CountermarkError(f"{path} is not the file that model.json describes (SHA-256 differs); restore it from a backup")
    if not all(bool(torch.isfinite(value).all()) for value in tensors.values()):
        raise CountermarkError(f"{path} holds weights that are not finite (NaN or infinity); such a model cannot be asked, restore it")
    network.load_state_dict(tensors, assign=True)
    return network.eval(), description


def _described(folder: Path) -> tuple[Description, Any]:
    """The description of a model folder, and what it says is the SHA-256 of its weights."""
    if not folder.is_dir():
        raise CountermarkError(f"{folder} is not a model folder; name the folder that holds model.json and model.safetensors")
    record = read_json(folder / "model.json")
    if record.get("format") != MODEL_FORMAT:
        raise CountermarkError(f"{folder / 'model.json'} is not a model of the format {MODEL_FORMAT!r}; use the release that wrote it")
    return _description(record, folder / "model.json"), record.get("weights_sha256")


def load_with_data(folder: Path) -> tuple[nn.Module, Description, Spec]:
    """Read a model folder together with the data set that it was trained for.

    Raises:
        CountermarkError: see `load_bundle`; or the model does not take that data set's images or classes.
    """
    description = describe(folder)
    catalogued = spec(description.data)
    if (description.shape, description.classes) != (catalogued.shape, catalogued.classes):
        raise CountermarkError(
            f"{folder} takes images of shape {brief(description.shape)} to {brief(description.classes)} classes, "
            f"{description.data} has {catalogued.shape} and {catalogued.classes}; it is for other data"
        )
    return *load_bundle(folder), catalogued


def _description(record: Mapping[str, Any], path: Path) -> Description:
    try:
        shape = record["shape"]
        history = record["history"]
        if not (isinstance(shape, list) and len(shape) == 3 and all(type(side) is int for side in shape)):
            raise ValueError("shape")
        if not (isinstance(history, list) and all(isinstance(event, dict) for event in history)):
            raise ValueError("history")
        for name, kind in (("network", str), ("classes", int), ("data", str), ("epsilon", float), ("seed", int)):
            if type(record[name]) is not kind:
                raise ValueError(name)
        if not 0 < record["epsilon"] < 1:
            raise ValueError("epsilon")
        if not 0 <= record["seed"] < 1 << 32:
            raise ValueError("seed")
    except (KeyError, ValueError) as error:
        raise CountermarkError(f"{path} lacks a usable field {error.args[0]!r}; it is damaged or not one of ours") from error
    return Description(
        network=record["network"],
        shape=(shape[0], shape[1], shape[2]),
        classes=record["classes"],
        data=record["data"],
        epsilon=record["epsilon"],
        seed=record["seed"],
        history=tuple(history),
    )


def load(folder: str | Path) -> nn.Module:
    """Load a model folder as an `nn.Module` from pixels of [0, 1], `(n, c, h, w)`, to logits `(n, classes)`, in evaluation mode.

    Raises:
        CountermarkError: see `load_bundle`.
    """
    return load_bundle(Path(folder))[0]
