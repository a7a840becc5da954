"""Open a network: by name, from timm, from the user's code, or as a module in Python.

Every network comes in through `open_network`, and no later code asks where it came from: it is an
`nn.Module` from pixels of [0, 1] to logits, in float32, whose answer about an image depends on
that image alone. Anything else is refused here, with a message of one line.
"""

import copy
import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from countermark.errors import CountermarkError
from countermark.named_code import called, imported, is_code, said
from countermark.networks.named import NETWORKS, Normalise, build
from countermark.places import Network
from countermark.text import brief

Shape = tuple[int, int, int]

_TIMM = "timm:"
_IMAGES = 5  # that a network is tried on
_SAME = 1e-3  # of the largest logit: what rounding may change


def open_network(
    place: Network,
    shape: Shape,
    classes: int,
    *,
    mean: float | Sequence[float] = (),
    std: float | Sequence[float] = (),
    seed: int | None = None,
    checked: bool = True,
) -> nn.Module:
    """Open a network, whatever place it comes from, and try it on random images.

    Args:
        place: the name of a built-in network (see `NETWORKS`); `timm:NAME`, a network of timm
            without weights and with its own normalisation in front; `module:function`, the user's
            own; or in Python a module, which is used as it is, or a function or class that makes
            one. A function is called with `shape` and `classes`, by keyword where its parameters
            are called so (or `num_classes`, `in_channels`...), or with nothing where it asks for
            nothing.
        shape: one image, `(channels, height, width)`.
        classes: number of classes.
        mean: what a normaliser in front of it takes off, in pixels of [0, 1]: one number, or one a
            channel.
        std: what it divides by then, likewise. Both or neither are given.
        seed: seed of the initial weights; without one they come from torch's generator.
        checked: try it on random images. What was tried when a model folder was made need not be
            tried again.

    Returns:
        The network from pixels of [0, 1] `(n, c, h, w)` to logits `(n, classes)`.

    Raises:
        CountermarkError: the shape, the number of classes or the seed is not valid, there is no
            such network, its code cannot be imported or raises, or it is no classifier of such
            images that Countermark can train and ask (see `check_network`).

    Example:
        >>> import torch
        >>> network = cm.open_network("narrow", (3, 32, 32), 10)
        >>> network(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    _check_sizes(shape, classes, seed)
    front = normaliser(shape, numbers("mean", mean), numbers("std", std))
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        if isinstance(place, str) and place in NETWORKS:
            network = build(place, shape, classes)
            return network if front is None else nn.Sequential(front, network)
        network, own = _made(place, shape, classes)
        before = own if front is None else front
        network = network if before is None else nn.Sequential(before, network)
        if checked:
            check_network(network, shape, classes, place_of(place))
        elif any(is_lazy(each) for each in network.parameters()):
            with _evaluating(network):  # lazy layers learn their sizes
                _output(network, torch.zeros(1, *shape), classes, place_of(place))
    return network


def _check_sizes(shape: object, classes: object, seed: object) -> None:
    """Refuse what is no shape of an image, no number of classes, no seed.

    Raises:
        CountermarkError: one of them is not.
    """
    sides = tuple(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else ()
    if len(sides) != 3 or not all(isinstance(side, Integral) and int(side) > 0 for side in sides):
        raise CountermarkError(
            f"shape is (channels, height, width) of one image, not {brief(shape)}"
        )
    if not isinstance(classes, Integral) or int(classes) < 2:
        raise CountermarkError(f"classes is a whole number from 2, not {brief(classes)}")
    if seed is not None and not isinstance(seed, Integral):
        raise CountermarkError(f"seed is a whole number or None, not {brief(seed)}")


def place_of(place: Network) -> str:
    """How a place is written down, and would be typed.

    Example:
        >>> place_of(nn.Flatten())
        'torch.nn.modules.flatten:Flatten'
    """
    if isinstance(place, str):
        return place
    named = type(place) if isinstance(place, nn.Module) else place
    name = getattr(named, "__qualname__", type(named).__qualname__)
    return f"{getattr(named, '__module__', type(named).__module__)}:{name}"


def inner(network: nn.Module) -> nn.Module:
    """The network behind a normaliser that `open_network` put in front, else the network itself."""
    if type(network) is nn.Sequential and len(network) == 2 and type(network[0]) is Normalise:
        return network[1]
    return network


def check_network(network: nn.Module, shape: Shape, classes: int, name: str) -> None:
    """Try a network on random images.

    Its layers are left in the modes that they were in, and its statistics as they were.

    Args:
        network: a network.
        shape: one image, `(channels, height, width)`.
        classes: number of classes.
        name: how it is called in messages.

    Raises:
        CountermarkError: it raises an error; it has no weights, or they are frozen or not float32;
            its output is not `(n, classes)`, or not finite, or probabilities instead of logits, or
            does not follow from the image; it answers otherwise each time, or about other images in
            the same batch.
    """
    generator = torch.Generator().manual_seed(0)
    device = next((each.device for each in network.parameters()), torch.device("cpu"))
    x = torch.rand(_IMAGES, *shape, generator=generator).to(device)
    with _evaluating(network):
        logits = _output(network, x, classes, name)
        _check_weights(network, name)
        if logits.dtype is not torch.float32:
            raise CountermarkError(
                f"{name} answers in {_plain(logits.dtype)}; let it compute and answer in float32"
            )
        if not bool(torch.isfinite(logits).all()):
            raise CountermarkError(
                f"{name} answers with logits that are not finite (NaN or infinity); "
                "look at its weights"
            )
        if bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-4).all()):
            raise CountermarkError(
                f"{name} answers with probabilities; let it return logits, "
                "without the softmax at the end"
            )
        if not bool(_same(_output(network, x, classes, name), logits)):
            raise CountermarkError(
                f"{name} answers otherwise each time, in evaluation mode as well; is a "
                "dropout left on (functional.dropout needs training=self.training)?"
            )
        alone = _output(network, x[:1], classes, name)
        if not bool(_same(alone, logits[:1])):
            raise CountermarkError(
                f"{name} answers otherwise about an image that is asked alone: in evaluation mode "
                "it mixes the examples of a batch (a batch norm needs track_running_stats=True)"
            )
        _check_copy(network, x, classes, name)
        _check_gradient(network, x, name)


def _made(place: Network, shape: Shape, classes: int) -> tuple[nn.Module, Normalise | None]:
    """The network of a place, and the normaliser that belongs to it."""
    if isinstance(place, str) and place.startswith(_TIMM):
        return _from_timm(place, shape, classes)
    if isinstance(place, str):
        if not is_code(place):
            known = ", ".join(NETWORKS)
            raise CountermarkError(
                f"unknown network {brief(place)}; choose one of {known}, "
                "or name yours as module:function or timm:NAME"
            )
        found, name = imported(place), place
    else:
        found, name = place, place_of(place)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise CountermarkError(
                f"{name} is no function that makes a network, but of the type "
                f"{type(found).__name__}"
            )
        found = called(found, name, _known(shape, classes), shape, classes)
        if not isinstance(found, nn.Module):
            raise CountermarkError(
                f"{name} returned no nn.Module, but an object of the type {type(found).__name__}"
            )
    return found, None


def _known(shape: Shape, classes: int) -> Mapping[str, Any]:
    """What a function that makes networks may ask for, by the names its parameters may have."""
    by_shape = dict.fromkeys(("shape", "image_shape", "input_shape"), shape)
    by_classes = dict.fromkeys(("classes", "num_classes", "n_classes"), classes)
    return {**by_shape, **by_classes, **dict.fromkeys(("in_channels", "in_chans"), shape[0])}


def _from_timm(place: str, shape: Shape, classes: int) -> tuple[nn.Module, Normalise | None]:
    """A network of timm, with its own normalisation; nothing is downloaded."""
    name = place.removeprefix(_TIMM)
    try:
        timm = importlib.import_module("timm")
    except Exception as error:
        raise CountermarkError(
            f"{brief(place)} needs timm, which cannot be imported: {said(error)}; pip install timm"
        ) from error
    options: dict[str, Any] = {"pretrained": False, "in_chans": shape[0], "num_classes": classes}
    try:
        network = timm.create_model(name, **options)
        config = _config(network)
        size = tuple(config.get("input_size") or ())[1:]
        if config.get("fixed_input_size") and size != shape[1:]:
            network = timm.create_model(name, **options, img_size=shape[1:])
    except Exception as error:
        raise CountermarkError(
            f"timm makes no network {brief(name)} for images of {_written(shape)}: {said(error)}"
        ) from error
    mean, std = (tuple(config.get(each) or ()) for each in ("mean", "std"))
    if not mean or not std:
        return network, None
    if len(mean) != shape[0]:  # those of colour images, for others
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    return network, normaliser(shape, mean, std)


def _config(network: nn.Module) -> Mapping[str, Any]:
    """What timm says of a network: the size and normalisation of the images it was made for."""
    config: Any = (
        getattr(network, "pretrained_cfg", None) or getattr(network, "default_cfg", None) or {}
    )
    return config if isinstance(config, Mapping) else vars(config)


def numbers(name: str, value: Any) -> tuple[float, ...]:
    """One number, or one a channel, as floats.

    Raises:
        CountermarkError: it is neither.
    """
    try:
        return (float(value),) if isinstance(value, Real) else tuple(map(float, value))
    except (TypeError, ValueError) as error:
        raise CountermarkError(
            f"{name} is one number or one a channel, not {brief(value)}"
        ) from error


def normaliser(shape: Shape, mean: Sequence[float], std: Sequence[float]) -> Normalise | None:
    """The layer that subtracts `mean` and then divides by `std`; none where neither is given.

    Args:
        shape: one image, `(channels, height, width)`.
        mean: one number, or one a channel, in pixels of [0, 1].
        std: likewise, each at least 1e-6.

    Raises:
        CountermarkError: one of them is missing, is out of range, or has another number of
            channels.
    """
    if not mean and not std:
        return None
    for name, numbers, lowest in (("mean", mean, 0.0), ("std", std, 1e-6)):
        if not numbers:
            raise CountermarkError(
                f"a normaliser needs mean and std, and {name} is missing; give both"
            )
        if len(numbers) not in (1, shape[0]):
            raise CountermarkError(
                f"{name} has {len(numbers)} numbers for images of {shape[0]} channels; give one, "
                "or one a channel"
            )
        if not all(lowest <= number <= 1 for number in numbers):  # NaN is refused as well
            raise CountermarkError(
                f"{name} {brief(tuple(numbers))} is not in pixels of [0, 1]; "
                "divide numbers of 0 to 255 by 255"
            )
    first, second = (numbers[0] if len(numbers) == 1 else tuple(numbers) for numbers in (mean, std))
    return Normalise(first, second)


def _output(network: nn.Module, x: torch.Tensor, classes: int, name: str) -> torch.Tensor:
    """What a network answers, without gradients.

    Raises:
        CountermarkError: it raises an error, or its answer is not a tensor with one row an image
            and one column a class.
    """
    try:
        with torch.no_grad():
            output = network(x)
    except Exception as error:
        raise CountermarkError(
            f"{name} raised an error on {len(x)} image(s) of {_written(x.shape[1:])}: {said(error)}"
        ) from error
    if not isinstance(output, torch.Tensor):
        raise CountermarkError(
            f"{name} answers with an object of the type {type(output).__name__}; "
            f"let it return the tensor of logits, (n, {classes})"
        )
    if output.shape != (len(x), classes):
        raise CountermarkError(
            f"{name} answers {len(x)} image(s) of {_written(x.shape[1:])} "
            f"with a tensor of shape {tuple(output.shape)}; the data has "
            f"{classes} classes, so it must be {(len(x), classes)}"
        )
    return output


def _check_weights(network: nn.Module, name: str) -> None:
    weights = list(network.parameters())
    if not weights:
        raise CountermarkError(
            f"{name} has no parameters; there is nothing in it that could be trained or hold a mark"
        )
    if not any(each.requires_grad for each in weights):
        raise CountermarkError(
            f"all weights of {name} are frozen; let those that may be trained require gradients"
        )
    others = {
        _plain(each.dtype)
        for each in (*weights, *network.buffers())
        if each.is_floating_point() and each.dtype is not torch.float32
    }
    if others:
        raise CountermarkError(
            f"{name} has weights in {' and '.join(sorted(others))}; give it in float32, "
            "as network.float() makes it"
        )


def _check_gradient(network: nn.Module, x: torch.Tensor, name: str) -> None:
    with torch.enable_grad():
        if not network(x.requires_grad_()).requires_grad:
            raise CountermarkError(
                f"no gradient leads from the logits of {name} back to its image; "
                "it computes under torch.no_grad or detaches"
            )


def _check_copy(network: nn.Module, x: torch.Tensor, classes: int, name: str) -> None:
    """Check that a network answers in training mode as well.

    That is tried on a copy, since it may change statistics.

    Raises:
        CountermarkError: the network cannot be copied, or does not answer.
    """
    try:
        copied = copy.deepcopy(network)
    except Exception as error:
        raise CountermarkError(
            f"{name} cannot be copied, which attacks and averages need: {said(error)}"
        ) from error
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        _output(copied.train(), x.detach(), classes, f"{name} in training mode")


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode for the block, then each layer's own mode again."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _same(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return ((one - other).abs() <= _SAME * other.abs().max() + 1e-6).all()


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _written(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
