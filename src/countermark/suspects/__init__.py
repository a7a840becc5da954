"""Suspects at arm's length: labels only, whatever the model is and whoever made it.

A suspect is a model folder of ours (numbers for a network that we build), an ONNX or .pt2 file (run in a child process under limits), an
endpoint behind HTTP, or any function of your own from images to labels.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from countermark.bundle import load_bundle
from countermark.data import pixels
from countermark.errors import CountermarkError
from countermark.suspects.confined import ask_onnx, ask_pt2
from countermark.suspects.remote import NO_ANSWER, Asking, Endpoint, prepare

_CHUNK = 250

Suspect = Callable[[torch.Tensor], torch.Tensor]
"""Images `(n, c, h, w)`, uint8 or pixels of [0, 1], to int64 labels `(n,)`; -1 where there is no answer.

One of your own goes where a place goes: `countermark.verify(VerifyConfig(suspect=function, key=...))`, and so in `trace`.
"""


def open_suspect(place: str | Path | Suspect, shape: tuple[int, ...], asking: Asking | None = None) -> Suspect:
    """Make a suspect that answers with labels.

    Args:
        place: a model folder, an `.onnx` or `.pt2` file, the URL of an endpoint (see `Endpoint`), or a function of your own, which is
            given the images as `asking` says.
        shape: one image as it will be asked, `(channels, height, width)`.
        asking: how the suspect wants its images, and how an endpoint is asked.

    Raises:
        CountermarkError: the place is none of these, or the model takes images of another shape.
    """
    asking = asking or Asking()
    if callable(place):
        function = place
        return lambda x: _checked(function(prepare(x, asking)), len(x))
    if str(place).startswith(("http://", "https://")):
        return Endpoint(str(place), asking)
    path = Path(place)
    if path.is_dir():
        network, description = load_bundle(path)
        if description.shape != tuple(shape):
            raise CountermarkError(
                f"{path} takes images of shape {description.shape}, the key asks with {tuple(shape)}; it is for other data"
            )
        if prepare(torch.zeros(1, *shape), asking).dtype != torch.float32 or asking.layout != "nchw" or asking.mean or asking.std:
            raise CountermarkError(
                f"{path} is one of our model folders, which take float pixels in nchw; leave the declared differences out"
            )
        return lambda x: _labels(network, x, path)
    suffix = path.suffix.lower()
    if suffix in (".pt", ".pth", ".pkl", ".bin"):
        raise CountermarkError(
            f"{path} is refused: loading {suffix} files from others can run their code; export the model to ONNX instead"
        )
    if not path.exists():
        raise CountermarkError(f"{path} does not exist; name a model folder or an .onnx file")
    if suffix not in (".onnx", ".pt2"):
        raise CountermarkError(f"{path} is neither a model folder nor an .onnx or .pt2 file; export the model to ONNX")
    ask = ask_onnx if suffix == ".onnx" else ask_pt2
    return lambda x: ask(path, prepare(x, asking))


def _checked(labels: object, count: int) -> torch.Tensor:
    if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64 or labels.shape != (count,):
        raise CountermarkError(f"a suspect that is a function answers {count} images with int64 labels of the shape ({count},)")
    return labels


def _labels(network: nn.Module, x: torch.Tensor, path: Path) -> torch.Tensor:
    with torch.no_grad():
        logits = torch.cat([network(pixels(part)) for part in torch.split(x, _CHUNK)])
    if not bool(torch.isfinite(logits).all()):
        raise CountermarkError(f"{path} answers with logits that are not finite numbers; such a model cannot be asked")
    return logits.argmax(1)


__all__ = ["NO_ANSWER", "Asking", "Endpoint", "Suspect", "ask_onnx", "ask_pt2", "open_suspect", "prepare"]
