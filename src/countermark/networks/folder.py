"""Save a model as a folder, and load it again.

The folder holds `model.safetensors` with the weights and `model.json` with everything that was
declared about the model: how the network is built, which data it is for, and what it must
withstand, so that no later verb has to be told. Loading builds the network and fills in numbers: a
folder from a stranger can be wrong, but it cannot run code. A network that is not built in is built
only by code that the user names.
"""

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from countermark.data import KNOWN, DataPlace, Dataset, Pools, by_digest, known, open_data
from countermark.data.pools import HELD_OUT, unpacked
from countermark.device import resolve_device
from countermark.errors import CountermarkError
from countermark.files import read_json, read_tensors, write_json, write_tensors
from countermark.named_code import is_code
from countermark.networks.cleaners import behind
from countermark.networks.named import NETWORKS, build
from countermark.networks.source import open_network
from countermark.places import Network, own_path
from countermark.text import brief
from countermark.threat import Threat

MODEL_FORMAT = "countermark model 2"
_FIRST_FORMAT = "countermark model 1"
_HEADER_ALLOWANCE = 1 << 20
_MOST_CLASSES = 10_000
_MOST_CLEANERS = 8


@dataclass(frozen=True)
class DataRecord:
    """The data that a model was trained for.

    Attributes:
        place: where it was opened (see `open_data`); empty for data that was given in Python.
        sha256: its digest; empty where nobody said which data it was, none in folders that 0.1.0
            wrote and in copies of their models.
        size: side that images were brought to.
        skip_damaged: whether files that could not be read were left out.
    """

    place: str
    sha256: str | None
    size: int | None = None
    skip_damaged: bool = False


@dataclass(frozen=True)
class Description:
    """What `model.json` says.

    Attributes:
        network: how the network is built: the name of a built-in one, `timm:NAME` or
            `module:function`; empty for a network that was given in Python.
        shape: one image, `(channels, height, width)`.
        class_names: names of the classes, in the order of the logits.
        data: the data it was trained for.
        threat: budgets of attackers and watermarks, and the PGD that it is evaluated by.
        seed: seed that cut the pools.
        mean: what a layer in front of the network subtracts, one number or one a channel.
        std: what it then divides by.
        cleaners: what a thief put in front of it, by name and amount (see `networks.cleaners`); the
            last one sees an image first.
        pool_sizes: examples of the pools that are held out, by name; none for those that the data
            would have.
        known: which of the training and then the test images given weights had been trained on, as
            `data.pools.packed` writes it; none where the weights were not given.
        history: what was done to it, in order: how it was trained, stolen, pruned, fine-tuned.
    """

    network: str
    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    data: DataRecord
    threat: Threat
    seed: int
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    cleaners: tuple[tuple[str, float], ...] = ()
    pool_sizes: Mapping[str, int] | None = None
    known: str | None = None
    history: tuple[Mapping[str, Any], ...] = field(default=())

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def epsilon(self) -> float:
        """L-inf budget that it is evaluated at, in pixels of [0, 1]."""
        return self.threat.epsilon

    def build(self, network: Network | None = None, *, seed: int | None = None) -> nn.Module:
        """Build the network anew, with weights of its own.

        Args:
            network: what builds it, unless it is a built-in one.
            seed: seed of the weights.

        Raises:
            CountermarkError: see `open_network`; or code would be needed that nobody named.
        """
        built = open_network(
            _nameable(self, "this model", network),
            self.shape,
            self.classes,
            mean=self.mean,
            std=self.std,
            seed=seed,
        )
        return behind(self.cleaners, built, self.shape)


def describing(
    data: Dataset, network: str, *, threat: Threat | None = None, seed: int = 0, **more: Any
) -> Description:
    """The description of a model for a data set.

    Args:
        data: the data set.
        network: how the network is built.
        threat: instead of the data set's.
        seed: seed that cut the pools.
        more: other fields of `Description`.

    Raises:
        CountermarkError: a model folder could not hold such a model, as one of too many classes.
    """
    record = DataRecord(data.place, data.digest, data.size, data.skip_damaged)
    more = {"pool_sizes": dict(data.held_out), **more}
    found = Description(
        network, data.shape, data.class_names, record, threat or data.threat, seed, **more
    )
    _record(found)  # before a model is trained for it
    return found


def save_model(
    folder: Path, network: nn.Module, description: Description, mode: int | None = None
) -> str:
    """Write a model into an existing folder and return the SHA-256 of its weights file.

    Args:
        folder: the folder.
        network: the network whose weights are written.
        description: what `model.json` says of it.
        mode: permissions of the files; see `write_bytes`.

    Raises:
        CountermarkError: such a model could not be read again; nothing was written.
    """
    record = _record(description)
    # A file holds no tied weights: each name has a copy.
    tensors = {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}
    digest = write_tensors(folder / "model.safetensors", tensors, _front(description), mode)
    write_json(folder / "model.json", {**record, "weights_sha256": digest}, mode)
    return digest


def _front(description: Description) -> dict[str, Any]:
    """What stands in front of the network and has no weights, for the header of its weights file.

    With this in `model.safetensors` too, the digest of that file fixes what the model answers. It
    is empty where nothing stands in front of the network.
    """
    front = {
        "mean": list(description.mean),
        "std": list(description.std),
        "cleaners": [list(each) for each in description.cleaners],
    }
    return {"front": front} if any(front.values()) else {}


def _record(description: Description) -> dict[str, Any]:
    """What `model.json` says of a model, but for the digest of its weights.

    Raises:
        CountermarkError: it could not be read again.
    """
    data, threat = description.data, description.threat
    record = {
        "format": MODEL_FORMAT,
        "network": {
            "place": description.network,
            "mean": list(description.mean),
            "std": list(description.std),
        },
        "shape": list(description.shape),
        "class_names": list(description.class_names),
        "data": {
            "place": data.place,
            "sha256": data.sha256,
            "size": data.size,
            "skip_damaged": data.skip_damaged,
        },
        "threat": {
            "epsilon": threat.epsilon,
            "steps": threat.steps,
            "step_size": threat.step_size,
            "watermark_epsilon": threat.watermark_epsilon,
        },
        "seed": description.seed,
        "cleaners": [list(each) for each in description.cleaners],
        "pools": {
            "sizes": None if description.pool_sizes is None else dict(description.pool_sizes),
            "known": description.known,
        },
        "history": [dict(event) for event in description.history],
    }
    if not 2 <= description.classes <= _MOST_CLASSES:
        raise CountermarkError(
            f"a model folder holds a model of 2 to {_MOST_CLASSES} classes, "
            f"not {description.classes}"
        )
    if len(description.cleaners) > _MOST_CLEANERS:
        raise CountermarkError(
            f"a model folder holds a model behind {_MOST_CLEANERS} cleaners at most, "
            f"not {len(description.cleaners)}"
        )
    try:
        _description(record)
    except (KeyError, ValueError, TypeError) as error:
        raise CountermarkError(
            f"the model could not be read again: its {error.args[0]!r} is out of range or of "
            "another type"
        ) from error
    return record


def describe(folder: Path) -> Description:
    """Read what a model folder says of itself, `model.json`, and none of its weights.

    Raises:
        CountermarkError: the file is missing, damaged or not Countermark's.
    """
    return _described(folder)[0]


def weights_sha256(folder: Path) -> str:
    """Read the digest of a model folder's weights from its description.

    `load_model` checks that it is true.
    """
    return str(read_json(folder / "model.json").get("weights_sha256"))


def load_model(
    folder: Path, network: Network | None = None, device: torch.device | str = "cpu"
) -> tuple[nn.Module, Description]:
    """Read a model folder.

    The names, types and shapes of the weights are compared with the network's before any of them is
    read.

    Args:
        folder: the folder.
        network: what builds the network, unless it is a built-in one; nothing is imported because a
            folder says so.
        device: where the network goes.

    Returns:
        The network in evaluation mode and its description.

    Raises:
        CountermarkError: a file is missing, not Countermark's, changed or truncated, the weights do
            not fit the network or are not finite, or the network is built by code that was not
            named.
    """
    description, declared = _described(folder)
    if isinstance(network, str) and network.lower().endswith(".onnx"):
        raise CountermarkError(
            f"{network} answers, and can be neither trained nor attacked; of the verbs that take "
            "--network, guard and serve take an ONNX file"
        )
    if isinstance(network, nn.Module):
        network = copy.deepcopy(network)  # two folders may be read by one of them
    place = _nameable(description, str(folder), network)
    network, built_in = place, isinstance(place, str) and place in NETWORKS
    if built_in:
        with torch.device("meta"):  # no memory yet: the sizes come from a file that may be hostile
            network = build(str(place), description.shape, description.classes)
    built = open_network(
        network,
        description.shape,
        description.classes,
        mean=description.mean,
        std=description.std,
        checked=False,
    )
    built = behind(description.cleaners, built, description.shape)
    expected = built.state_dict()
    size = sum(value.numel() * value.element_size() for value in expected.values())
    path = folder / "model.safetensors"
    named = brief(str(place) if isinstance(place, str) else description.network or "that was given")

    def check(tensors: Mapping[str, torch.Tensor]) -> None:
        if (name := _misfit(tensors, expected)) is not None:
            raise CountermarkError(
                f"{path} does not fit the network {named} (tensor {brief(name)}); "
                "it belongs to another model"
            )

    tensors, meta, digest = read_tensors(path, size + _HEADER_ALLOWANCE, check)
    if digest != declared:
        raise CountermarkError(
            f"{path} is not the file that model.json describes (SHA-256 differs); "
            "restore it from a backup"
        )
    if meta.get("front") != _front(description).get("front"):
        raise CountermarkError(
            f"{path} was written with another normalisation or other cleaners than model.json "
            "says; restore both"
        )
    if not all(bool(torch.isfinite(value).all()) for value in tensors.values()):
        raise CountermarkError(
            f"{path} holds weights that are not finite (NaN or infinity); "
            "such a model cannot be asked, restore it"
        )
    built.load_state_dict(tensors, assign=built_in)
    return built.to(device).eval(), description


def check_builds(network: nn.Module, description: Description) -> None:
    """Refuse a description that names another network than the one whose weights go with it.

    Args:
        network: takes pixels of [0, 1], as for `save_model`.
        description: its network is a place, which is imported or built here.

    Raises:
        CountermarkError: there is no such network, or its weights have other names, types or
            shapes.
    """
    place = description.network
    built = open_network(
        place,
        description.shape,
        description.classes,
        mean=description.mean,
        std=description.std,
        seed=0,
        checked=False,
    )
    if (name := _misfit(network.state_dict(), built.state_dict())) is not None:
        raise CountermarkError(
            f"{brief(place)} builds another network than this one (tensor {brief(name)}); "
            "name what builds it"
        )


def _misfit(
    tensors: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> str | None:
    """The name of a tensor that is missing, left over, or of another type or shape; else none."""
    for name, value in expected.items():
        if (
            name not in tensors
            or tensors[name].shape != value.shape
            or tensors[name].dtype != value.dtype
        ):
            return name
    return min(tensors.keys() - expected.keys(), default=None)


def _nameable(description: Description, what: str, network: Network | None) -> Network:
    """What builds a network: what the user named, or the built-in network that the folder names.

    Raises:
        CountermarkError: it takes code that the user has not named.
    """
    place = description.network
    if network is not None:
        if (
            isinstance(network, str)
            and network != place
            and (network in NETWORKS or place in NETWORKS)
        ):
            raise CountermarkError(
                f"{what} holds the network {brief(place) or 'of a program'}, "
                f"not {brief(network)}; leave --network out"
            )
        return network
    if place in NETWORKS:
        return place
    if not place:
        raise CountermarkError(
            f"{what} holds a network that was given in Python; name what builds it, "
            "--network MODULE:FUNCTION"
        )
    raise CountermarkError(
        f"{what} holds the network {brief(place)}, whose code is imported only if you name it: "
        f"--network {brief(place)}"
    )


def open_declared(
    description: Description, *, data: DataPlace | None = None, cache: str | Path | None = None
) -> Dataset:
    """Open the data that a model was trained for.

    Args:
        description: of the model.
        data: where it is now, instead of where it was.
        cache: folder of fetched and converted data.

    Raises:
        CountermarkError: it cannot be opened, or it is not what it was when the model was made.
    """
    record = description.data
    # Images of these keep their size.
    fixed = isinstance(data, Dataset) or (isinstance(data, str) and data in KNOWN)
    size = None if fixed else record.size
    found = (
        _kept(record, cache)
        if data is None
        else open_data(data, size=size, skip_damaged=record.skip_damaged, cache=cache)
    )
    found = (
        found
        if description.pool_sizes is None
        else replace(found, pool_sizes=description.pool_sizes)
    )
    shown = found.place or "the data"
    if (description.shape, description.classes) != (found.shape, found.classes):
        raise CountermarkError(
            f"the model takes images of shape {brief(description.shape)} to "
            f"{brief(description.classes)} classes, {shown} has "
            f"{found.shape} and {found.classes}; it is for other data"
        )
    if record.sha256 is None:
        # The pools of 0.1.0 did not look at what images show.
        return replace(found, by_content=False)
    if record.sha256 and found.digest != record.sha256:
        raise CountermarkError(
            f"{shown} was changed since the model was made (SHA-256 {found.digest[:12]}, not "
            f"{record.sha256[:12]}): its pools would be others, and images that the model knows "
            "would be taken for new ones; restore the data, or name where it is with --data"
        )
    return found


def declared_pools(description: Description, data: Dataset) -> Pools:
    """Cut a model's data into the pools that it was made from.

    Where the model began with given weights, the folder says which images they had been trained on.

    Args:
        description: of the model.
        data: its data, as `open_declared` opens it.

    Raises:
        CountermarkError: what the folder says of the pools does not fit the data.
    """
    if description.known is None:
        return data.pools(description.seed)
    return data.pools(
        description.seed, unpacked(description.known, len(data.train) + len(data.test))
    )


def _kept(record: DataRecord, cache: str | Path | None) -> Dataset:
    """Open the data of a record at its place, or from the cache.

    The cache is used where the place is gone, or would run code that nobody named.

    Raises:
        CountermarkError: the data is at neither, or cannot be opened.
    """
    place = record.place
    # Unlike `Path.exists`, `os.path.exists` answers no where it may not look.
    nowhere = place not in KNOWN and not os.path.exists(place)  # noqa: PTH110
    if not nowhere:
        return open_data(place, size=record.size, skip_damaged=record.skip_damaged, cache=cache)
    found = (
        None
        if record.sha256 is None
        else by_digest(record.sha256, None if cache is None else Path(cache))
    )
    if found is not None:
        return replace(found, place=place, size=record.size, skip_damaged=record.skip_damaged)
    if not place:
        raise CountermarkError(
            "the model was made from data that was given in Python; say where it is, --data PLACE"
        )
    if is_code(place):
        raise CountermarkError(
            f"the model's data come from {place}, whose code is run only if you name it: "
            f"--data {place}"
        )
    raise CountermarkError(
        f"the model's data are gone from {brief(place)}, and not in the cache; "
        "say where they are, --data PLACE"
    )


def _described(folder: Path) -> tuple[Description, Any]:
    """The description of a model folder, and what it says is the SHA-256 of its weights."""
    if not folder.is_dir():
        raise CountermarkError(
            f"{folder} is not a model folder; name the folder that holds model.json and "
            "model.safetensors"
        )
    path = folder / "model.json"
    record = read_json(path)
    read = {MODEL_FORMAT: _description, _FIRST_FORMAT: _first_description}.get(
        str(record.get("format"))
    )
    if read is None:
        raise CountermarkError(
            f"{path} is not a model of the format {MODEL_FORMAT!r}; use the release that wrote it"
        )
    try:
        return read(record), record.get("weights_sha256")
    except (KeyError, ValueError, TypeError) as error:
        field_name = error.args[0] if error.args else ""
        raise CountermarkError(
            f"{path} lacks a usable field {field_name!r}; "
            "it is damaged or not a file of Countermark"
        ) from error
    except CountermarkError as error:
        raise CountermarkError(
            f"{path}: {error}; it is damaged or not a file of Countermark"
        ) from error


def _description(record: Mapping[str, Any]) -> Description:
    network, data, threat, pools = (
        _field(record, name, dict) for name in ("network", "data", "threat", "pools")
    )
    names = _field(record, "class_names", list)
    if not 2 <= len(names) <= _MOST_CLASSES or not all(type(name) is str for name in names):
        raise ValueError("class_names")
    sha256, size = data["sha256"], data["size"]
    if not (sha256 is None or type(sha256) is str) or not (size is None or type(size) is int):
        raise ValueError("data")
    return Description(
        network=_field(network, "place", str),
        shape=_shape(record),
        class_names=tuple(names),
        data=DataRecord(
            _field(data, "place", str), sha256, size, _field(data, "skip_damaged", bool)
        ),
        threat=Threat(
            _field(threat, "epsilon", float),
            _field(threat, "steps", int),
            _field(threat, "step_size", float),
            _field(threat, "watermark_epsilon", float),
        ),
        seed=_seed(record),
        mean=_numbers(network, "mean"),
        std=_numbers(network, "std"),
        cleaners=_cleaners(record),
        pool_sizes=_pool_sizes(pools),
        known=None if pools["known"] is None else _field(pools, "known", str),
        history=_history(record),
    )


def _first_description(record: Mapping[str, Any]) -> Description:
    """What 0.1.0 wrote: a data set that is known by name, and only the budget of the threat."""
    place, epsilon, classes = (
        _field(record, "data", str),
        _field(record, "epsilon", float),
        _field(record, "classes", int),
    )
    if not 2 <= classes <= _MOST_CLASSES:
        raise ValueError("classes")
    row = KNOWN.get(place)
    if row is None:
        known(place)  # says which there are
        raise ValueError("data")
    names = row.class_names if row.classes == classes else tuple(map(str, range(classes)))
    threat = row.threat
    return Description(
        network=_field(record, "network", str),
        shape=_shape(record),
        class_names=names,
        data=DataRecord(place, None),
        threat=threat.at(epsilon=epsilon, step_size=threat.step_size),
        seed=_seed(record),
        pool_sizes=row.pools,
        history=_history(record),
    )


def _pool_sizes(record: Mapping[str, Any]) -> Mapping[str, int] | None:
    """Examples of the pools that a folder declares."""
    found = record["sizes"]
    if found is None:
        return None
    if (
        not isinstance(found, dict)
        or set(found) != set(HELD_OUT)
        or not all(type(each) is int and each >= 1 for each in found.values())
    ):
        raise ValueError("pools")
    return {name: found[name] for name in HELD_OUT}


def _field(record: Mapping[str, Any], name: str, kind: type) -> Any:
    value = record[name]
    if type(value) is not kind:
        raise ValueError(name)
    return value


def _shape(record: Mapping[str, Any]) -> tuple[int, int, int]:
    shape = _field(record, "shape", list)
    if len(shape) != 3 or not all(type(side) is int and side >= 1 for side in shape):
        raise ValueError("shape")
    return shape[0], shape[1], shape[2]


def _seed(record: Mapping[str, Any]) -> int:
    seed: int = _field(record, "seed", int)
    if not 0 <= seed < 1 << 32:
        raise ValueError("seed")
    return seed


def _numbers(record: Mapping[str, Any], name: str) -> tuple[float, ...]:
    numbers = _field(record, name, list)
    if not all(type(number) is float for number in numbers):
        raise ValueError(name)
    return tuple(numbers)


def _cleaners(record: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    """The cleaners that a folder names; those written before there were any name none."""
    found = record.get("cleaners", [])
    if not isinstance(found, list) or len(found) > _MOST_CLEANERS:
        raise ValueError("cleaners")
    for each in found:
        if not (
            isinstance(each, list)
            and len(each) == 2
            and type(each[0]) is str
            and type(each[1]) in (int, float)
        ):
            raise ValueError("cleaners")
    return tuple((name, float(amount)) for name, amount in found)


def _history(record: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    history = _field(record, "history", list)
    if not all(isinstance(event, dict) for event in history):
        raise ValueError("history")
    return tuple(history)


def load(
    folder: str | Path, network: Network | None = None, device: torch.device | str = "cpu"
) -> nn.Module:
    """Load a model folder as an `nn.Module` in evaluation mode.

    Args:
        folder: the folder.
        network: what builds the network, unless it is a built-in one.
        device: where the network goes.

    Returns:
        The network from pixels of [0, 1], `(n, c, h, w)`, to logits `(n, classes)`.

    Raises:
        CountermarkError: see `load_model`; or there is no such device.

    Example:
        >>> import torch
        >>> model = cm.load("mine")
        >>> model(torch.rand(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """
    return load_model(own_path(folder, "the model folder"), network, resolve_device(device))[0]
