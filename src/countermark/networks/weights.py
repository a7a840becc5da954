"""Read the user's own weights into a network: `.safetensors`, or a state dict, saved or in Python.

A `.pt` of the user's own is read with `weights_only=True`, which builds tensors and containers and
runs no code. A suspect's file is never read here.
"""

import errno
import hashlib
import pickle
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from countermark.errors import CountermarkError
from countermark.files import file_sha256, read_tensors
from countermark.networks.source import inner
from countermark.places import Weights
from countermark.text import brief

Tensors = Mapping[str, torch.Tensor]

_LARGEST = 1 << 40  # bytes of a safetensors file
_PICKLED = (".pt", ".pth", ".bin", ".ckpt")
_NESTED = (
    "state_dict",
    "model_state_dict",
    "model",
    "network",
    "net",
    "module",
    "weights",
    "params",
)
_PREFIXES = ("module.", "_orig_mod.", "model.", "network.", "net.")
_LISTED = 5  # names in a message
# What torch's error about a pickle says where it holds objects.
_OBJECTS = ("Unsupported global", "Unsupported class", "unrecognized function")
_COUNTER = "num_batches_tracked"  # of batch norm, which old files lack and nothing here reads
_HOW = "save its numbers alone: torch.save(network.state_dict(), 'own.pt')"


def load_weights(network: nn.Module, weights: Weights) -> None:
    """Fill a network with the weights of a file or a state dict.

    Nothing is changed where they do not fit. A normaliser that `open_network` put in front is left
    out of the comparison. Prefixes that wrappers put before names (`module.`, `_orig_mod.`,
    `model.`, `network.`, `net.`) are removed where the names then fit, and state dicts are found
    in the entries in which training scripts keep them. Other precisions are converted to the
    network's.

    Args:
        network: what `open_network` returned.
        weights: a `.safetensors` file, or a `.pt`, `.pth`, `.bin` or `.ckpt` of the user's own; or
            a state dict.

    Raises:
        CountermarkError: the file is missing, damaged or holds more than numbers; its tensors are
            not those of the network (names that are missing, left over or of another shape are
            listed, at most five of each); or a weight is NaN or infinite.
    """
    path, found = _found(weights)
    target, tensors = _fitting(network, found)
    own = target.state_dict()
    complaints = [
        _listed("missing", _missing(own, tensors)),
        _listed("not in the network", [name for name in tensors if name not in own]),
        _listed("of another shape", list(_misshapen(own, tensors))),
    ]
    if any(complaints):
        raise CountermarkError(
            f"{path} does not fit the network: {'; '.join(filter(None, complaints))}"
        )
    for name, value in tensors.items():
        if value.is_floating_point() != own[name].is_floating_point():
            raise CountermarkError(
                f"{path} holds {name} as {value.dtype}, the network as {own[name].dtype}; "
                "it belongs to another network"
            )
    wrong = [
        name
        for name, value in tensors.items()
        if value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]
    if wrong:
        raise CountermarkError(
            f"{path} holds weights that are not finite (NaN or infinity): {_names(wrong)}; "
            "the training diverged"
        )
    target.load_state_dict(dict(tensors), strict=False)  # which copies, and so converts


def weights_sha256(weights: Weights) -> str:
    """SHA-256 of weights.

    That of a file is taken over its bytes, that of a state dict over its names, types, shapes and
    values.

    Raises:
        CountermarkError: the file cannot be read, or the weights are neither a file nor a state
            dict.
    """
    if isinstance(weights, str | Path):
        return file_sha256(Path(weights))
    digest = hashlib.sha256()
    for name, value in sorted(_found(weights)[1].items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _found(weights: Weights) -> tuple[Path | str, Tensors]:
    """What messages call weights, and their named tensors."""
    if isinstance(weights, str | Path):
        return Path(weights), _read(Path(weights))
    if not isinstance(weights, Mapping):
        raise CountermarkError(
            f"weights are a file or a state dict, not {type(weights).__name__}; for a module, "
            "give its .state_dict()"
        )
    return "the state dict", _tensors(weights, "the state dict")


def _read(path: Path) -> Tensors:
    """The named tensors of a file."""
    if path.suffix == ".safetensors":
        return read_tensors(path, _LARGEST)[0]
    if path.suffix not in _PICKLED:
        kinds = ", ".join((".safetensors", *_PICKLED))
        raise CountermarkError(
            f"{path} is not a file of weights that is known here; give one that ends with {kinds}"
        )
    if not path.is_file():
        raise CountermarkError(
            f"{path} is not a file; check the path"
            if path.exists()
            else f"{path} does not exist; check the path"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it says of TorchScript is said below
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if any(words in str(error) for words in _OBJECTS):
            raise CountermarkError(
                f"{path} holds Python objects, such as a whole module, "
                f"which are never unpickled here; {_HOW}"
            ) from error
        raise CountermarkError(
            f"{path} is truncated, damaged or of another format; save it anew"
        ) from error
    except OSError as error:
        if error.errno == errno.EINVAL:  # the archive's directory points beyond its end
            raise CountermarkError(
                f"{path} is truncated, damaged or of another format; save it anew"
            ) from error
        raise CountermarkError(
            f"cannot read {path}: {error.strerror or error}; check the path and its permissions"
        ) from error
    except Exception as error:
        if "TorchScript" in str(error):
            raise CountermarkError(
                f"{path} is a program of TorchScript, which is never run here; {_HOW}"
            ) from error
        raise CountermarkError(
            f"{path} is truncated, damaged or of another format; save it anew"
        ) from error
    return _tensors(found, path)


def _tensors(found: Any, path: Path | str) -> Tensors:
    """The state dict in what a file held: that itself, or an entry of it."""
    while isinstance(found, Mapping):
        inside = next(
            (found[name] for name in _NESTED if isinstance(found.get(name), Mapping)), None
        )
        if inside is None:
            break
        found = inside
    if not isinstance(found, Mapping) or not found:
        raise CountermarkError(
            f"{path} holds no state dict, but an object of the type {type(found).__name__}; {_HOW}"
        )
    others = [
        name
        for name, value in found.items()
        if not (isinstance(name, str) and isinstance(value, torch.Tensor))
    ]
    if others:
        raise CountermarkError(
            f"{path} holds entries that are no tensors: {_names(others)}; {_HOW}"
        )
    return found


def _fitting(network: nn.Module, found: Tensors) -> tuple[nn.Module, Tensors]:
    """The part of a network that a file's weights are for, and its tensors by the names that fit.

    The part is the network itself or the network behind its normaliser, whichever has more of the
    names.
    """
    best: tuple[int, nn.Module, Tensors] = (-1, network, found)
    for target in dict.fromkeys((inner(network), network)):
        own = target.state_dict()
        for tensors in _spellings(found):
            fit = sum(name in own for name in tensors)
            if fit > best[0]:
                best = fit, target, tensors
    return best[1], best[2]


def _spellings(found: Tensors) -> Iterator[Tensors]:
    """The tensors by their names, then by what is left of these as prefixes are removed."""
    seen = [found]
    for tensors in seen:
        yield tensors
        without = [{name.replace("_orig_mod.", ""): value for name, value in tensors.items()}]
        for prefix in _PREFIXES:
            if any(name.startswith(prefix) for name in tensors):
                without.append(
                    {name.removeprefix(prefix): value for name, value in tensors.items()}
                )
        seen += [
            each
            for each in without
            if len(each) == len(found) and not any(each.keys() == other.keys() for other in seen)
        ]


def _missing(own: Tensors, tensors: Tensors) -> list[str]:
    """Names that the file lacks; a tied weight counts as there if one of its names is."""
    there = {own[name].data_ptr() for name in tensors if name in own and own[name].numel()}
    return [
        name
        for name, value in own.items()
        if name not in tensors and value.data_ptr() not in there and not name.endswith(_COUNTER)
    ]


def _misshapen(own: Tensors, tensors: Tensors) -> Iterator[str]:
    for name, value in tensors.items():
        if name in own and own[name].shape != value.shape:
            yield f"{name} {tuple(value.shape)} instead of {tuple(own[name].shape)}"


def _listed(what: str, names: list[str]) -> str:
    return f"{what}: {_names(names)}" if names else ""


def _names(names: list[Any]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return (
        ", ".join(
            brief(name)[1:-1] if isinstance(name, str) else brief(name) for name in names[:_LISTED]
        )
        + more
    )
