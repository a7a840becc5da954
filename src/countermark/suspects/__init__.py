"""Suspects, which answer with labels only, whatever the model is and whoever made it.

A suspect is a model folder (weights for a network that Countermark builds), an ONNX or .pt2 file
(run in a child process under limits), an HTTP endpoint of any API, or a function of your own from
images to labels.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from countermark.data import joined, pixels
from countermark.device import batch_size
from countermark.errors import CountermarkError
from countermark.evaluation import device_of
from countermark.named_code import imported, is_code
from countermark.networks import NETWORKS, describe, load_model
from countermark.networks.source import check_network
from countermark.places import Network, is_address, place_name
from countermark.suspects.answers import Names, labels_of
from countermark.suspects.apis import APIS
from countermark.suspects.asker import (
    MOST_LABELS,
    NO_ANSWER,
    Asker,
    Asking,
    FailureError,
    RefusalError,
    as_taken,
)
from countermark.suspects.confined import ask_onnx, ask_pt2, onnx_data, onnx_places
from countermark.suspects.matching import Matched, match, translation
from countermark.suspects.remote import Endpoint
from countermark.text import brief, sentence

_CHUNK = 250
_REMOTE = ("headers", "api", "send", "read", "form", "quality")
_NOT_HEEDED: Mapping[str, tuple[str, ...]] = {
    "a file": ("budget", "rate", "retries", "timeout", "repeats", "replay", *_REMOTE),
    "a function": ("timeout", *_REMOTE),
}
"""Options of `Asking` that a kind of suspect has no use for."""

_BUGS = (TypeError, NameError, AttributeError, ImportError, NotImplementedError, AssertionError)
"""Exceptions of a function that show a bug, so that a retry cannot help."""

Suspect = Callable[[torch.Tensor], torch.Tensor]
"""From images `(n, c, h, w)`, uint8 or pixels of [0, 1], to int64 labels `(n,)`, -1 for no answer.

A function of your own can stand for a place: `countermark.verify(function, key=...)`, and likewise
in `trace`.
"""


def open_suspect(
    place: str | Path | Suspect,
    shape: tuple[int, ...],
    asking: Asking | None = None,
    device: torch.device | str = "cpu",
    network: Network | None = None,
) -> Suspect:
    """Make a suspect that answers with labels.

    Args:
        place: a model folder, an `.onnx` or `.pt2` file, the URL of an endpoint (see `Endpoint`),
            or a function of your own, perhaps as `module:function`, which is given the images in
            batches as `asking` says. It answers with labels, or with a list of what `labels_of`
            reads. An exception that it raises is a failure and is retried, unless it shows a bug
            (see `_BUGS`). A replay log knows the function by its module and qualified name.
        shape: the shape of each image that will be asked, `(channels, height, width)`.
        asking: how the suspect wants its images, and how an endpoint or a function is asked.
        device: where a model folder computes. A file runs in a child process on the CPU, and the
            others compute where they are.
        network: what builds the network of a model folder, unless it is a built-in one.

    Raises:
        CountermarkError: the place is none of these, the model takes images of another shape, or
            `asking` sets an option that such a suspect has no use for.
    """
    asking = asking or Asking()
    if isinstance(place, str) and is_code(place):
        place = imported(place)
        if not callable(place):
            raise CountermarkError(f"{place_name(place)} is no function; name one")
    if callable(place):
        _check_heeded(asking, "a function")
        names = Names(asking.names, foreign=asking.foreign)
        return Asker(place_name(place), _answers_of(place, names), asking)
    if is_address(place):
        return Endpoint(str(place), asking)
    _check_heeded(asking, "a file")
    path = Path(place)
    if is_folder(path):
        description = describe(path)
        if description.shape != tuple(shape):
            raise CountermarkError(
                f"{path} takes images of shape {brief(description.shape)}, "
                f"the key asks with {tuple(shape)}; it is for other data"
            )
        taken = as_taken(torch.zeros(1, *shape), asking)
        if (
            (taken.dtype, tuple(taken.shape[1:])) != (torch.float32, tuple(shape))
            or asking.layout not in (None, "nchw")
            or asking.channels != "rgb"
            or asking.mean
            or asking.std
        ):
            raise CountermarkError(
                f"{path} is one of our model folders, which take float pixels in nchw; "
                "leave the declared differences out"
            )
        built_in = description.network in NETWORKS
        built, _ = load_model(path, None if built_in else network, device)
        if not built_in:  # the code was named by the user, and may leave a dropout on
            check_network(built, description.shape, description.classes, "the network")
        return lambda x: _labels(built, x, path)
    suffix = path.suffix.lower()
    if suffix in (".pt", ".pth", ".pkl", ".bin"):
        raise CountermarkError(
            f"{path} is refused: loading {suffix} files from others can run their code; "
            "export the model to ONNX instead (torch.onnx.export)"
        )
    if not path.exists():
        raise CountermarkError(f"{path} does not exist; name a model folder or an .onnx file")
    if suffix not in (".onnx", ".pt2"):
        raise CountermarkError(
            f"{path} is neither a model folder nor an .onnx or .pt2 file; export the model to ONNX"
        )
    if suffix == ".pt2":
        return lambda x: ask_pt2(path, as_taken(x, asking))
    return lambda x: ask_onnx(path, as_taken(x, asking), asking.begin)


def is_folder(place: str | Path | Suspect) -> bool:
    """Whether a place is a model folder, which says itself how it wants its images."""
    return isinstance(place, str | Path) and Path(place).is_dir()


def _check_heeded(asking: Asking, kind: str) -> None:
    """Refuse options that would be ignored."""
    plain_asking = Asking()
    for name in _NOT_HEEDED[kind]:
        if getattr(asking, name) != getattr(plain_asking, name):
            raise CountermarkError(
                f"--{name} has no meaning for {kind} as suspect, which is asked on this machine; "
                "leave it out"
            )


def _answers_of(function: Suspect, names: Names) -> Callable[[torch.Tensor], list[int]]:
    """A function of the user's as an `Asker` wants it."""

    def answer(images: torch.Tensor) -> list[int]:
        try:
            labels = function(images.clone())  # it may change them; a repeat sees the same
        except CountermarkError:
            raise
        except _BUGS as error:
            words = sentence(f"{type(error).__name__}: {error}")
            raise RefusalError(words, "mend the function", final=True) from error
        except Exception as error:
            raise FailureError(sentence(f"{type(error).__name__}: {error}")) from error
        return _checked(labels, len(images), names)

    return answer


def _checked(labels: object, count: int, names: Names) -> list[int]:
    if isinstance(labels, list):
        # Many write a list of the scalars or rows of an array.
        kinds = (np.ndarray, np.generic, torch.Tensor)
        plain = [each.tolist() if isinstance(each, kinds) else each for each in labels]
        return labels_of(plain, count, names)
    if (
        isinstance(labels, np.ndarray)
        and labels.dtype.kind in "iu"
        and np.can_cast(labels.dtype, np.int64)
    ):
        labels = torch.as_tensor(labels.astype(np.int64))
    fits = (
        isinstance(labels, torch.Tensor)
        and labels.dtype == torch.int64
        and labels.shape == (count,)
        and bool(((labels >= NO_ANSWER) & (labels < MOST_LABELS)).all())
    )
    if not isinstance(labels, torch.Tensor) or not fits:
        raise CountermarkError(
            f"a suspect that is a function answers {count} images with a tensor of int64 labels, "
            f"or an array of whole numbers, of the shape ({count},), "
            "each a class number or -1 for no answer"
        )
    return labels.tolist()


def _labels(network: nn.Module, x: torch.Tensor, path: Path) -> torch.Tensor:
    device = device_of(network)
    count = batch_size(device, x.shape[1:], _CHUNK)
    with torch.no_grad():
        parts = (network(pixels(part.to(device))).cpu() for part in torch.split(x, count))
        logits = joined(parts, len(x))
    if not bool(torch.isfinite(logits).all()):
        raise CountermarkError(
            f"{path} answers with logits that are not finite numbers; such a model cannot be asked"
        )
    return logits.argmax(1)


__all__ = [
    "APIS",
    "NO_ANSWER",
    "Asker",
    "Asking",
    "Endpoint",
    "Matched",
    "Suspect",
    "as_taken",
    "ask_onnx",
    "ask_pt2",
    "is_folder",
    "match",
    "onnx_data",
    "onnx_places",
    "open_suspect",
    "translation",
]
