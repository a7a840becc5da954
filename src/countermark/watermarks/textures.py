"""Textures: smooth random images, on which a network's answer means nothing.

A trial of the scheme `coin` is an image of the task under a perturbation, so whoever goes on
training on images of the task trains on its neighbours too, and a cleaner may take the perturbation
away. A texture is far from every image of the task, and cleaners leave most of it. So its coins
outlast cleaners and a thief's own mark, though not fine-tuning for as long (docs/log.md). On the
other hand it looks like nothing of the task: whoever knows of textures can recognise them, and
answer them otherwise. That is what the other half of a `mixed` key is for.

The two answers are the classes that the source model finds likeliest, and the coin chooses.
"""

import hashlib

import torch
from torch import nn
from torch.nn import functional

from countermark.attacks import finite
from countermark.data import as_uint8
from countermark.data.dataset import SMALLEST_BATCH
from countermark.errors import CountermarkError
from countermark.evaluation import asked
from countermark.watermarks.sets import WatermarkSet

_GRID = 7  # random values along a side of a texture, at most; what lies between is interpolated
_FEWEST = 4  # values along a side where there are few pixels; fewer make too few textures
_APART = 4  # pixels from one value to the next, at least, as long as that leaves so many
_TEXTURE = b"countermark texture 1"


def texture_set(
    source: nn.Module,
    shape: tuple[int, int, int],
    batches: int,
    batch_size: int,
    key: bytes,
    least: int = SMALLEST_BATCH,
) -> WatermarkSet:
    """Make trials of a key alone, answered with either of the source's two likeliest classes.

    Neither the images nor the answers depend on a coin (condition 2).

    Args:
        source: the unmarked model, pixels `(n, c, h, w)` of [0, 1] to logits.
        shape: one image, `(channels, height, width)`.
        batches: batches of the key.
        batch_size: trials in each.
        key: the images come out of it; the owner's secret gives it.
        least: trials of the smallest batch.

    Raises:
        CountermarkError: no batches or smaller ones, images so small that two of them are the same,
            or a model of a single class.
    """
    if batches < 1 or batch_size < least:
        raise CountermarkError(
            f"a key has one batch or more, of {least} trials or more, not {batches} of {batch_size}"
        )
    _, height, width = shape
    images = textures(batches * batch_size, shape, key)
    if len({image.numpy().tobytes() for image in images}) < len(images):
        raise CountermarkError(
            f"images of {height}x{width} are too small for {len(images)} different textures; take "
            "--scheme coin"
        )
    answers = _likeliest(source, images).sort(dim=1).values
    cells = torch.arange(len(images))
    return WatermarkSet(images, answers, cells // batch_size, cells)


def textures(count: int, shape: tuple[int, int, int], key: bytes) -> torch.Tensor:
    """Make textures, uint8 `(count, c, h, w)`: a grid of random values, smoothly between them.

    Texture i is SHAKE-256 of the key and i. So whoever is shown some, as in a claim, learns nothing
    of the others, which a seeded generator would give away.

    Args:
        count: textures.
        shape: one image, `(channels, height, width)`.
        key: 32 bytes.
    """
    channels, height, width = shape
    rows, columns = (min(_GRID, max(_FEWEST, side // _APART)) for side in (height, width))
    made = torch.empty(count, *shape, dtype=torch.uint8)
    for number in range(count):
        hashed = hashlib.shake_256(_TEXTURE + key + number.to_bytes(8, "big"))
        values = bytearray(hashed.digest(channels * rows * columns))
        grid = torch.frombuffer(values, dtype=torch.uint8).view(1, channels, rows, columns) / 255
        made[number] = as_uint8(
            functional.interpolate(grid, size=(height, width), mode="bilinear")
        )[0]
    return made


def _likeliest(source: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The two classes `(n, 2)` that a model finds likeliest, the first one first."""
    logits = asked(source, images, finite)
    if logits.shape[1] < 2:
        raise CountermarkError("textures take a model of two classes or more")
    return logits.topk(2).indices
