"""Drawn images and folders of them, clean and dirty, for the tests of data."""

from pathlib import Path

import numpy as np
from PIL import Image

Pixels = np.ndarray


def drawn(seed: int, height: int = 8, width: int = 8, channels: int = 3) -> Pixels:
    """A random image, uint8 `(h, w, c)`, or `(h, w)` of one channel."""
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, pixels: Pixels, **options: object) -> Path:
    """Save an image; the ending of its name says how."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def class_folders(
    place: Path, classes: int = 2, each: int = 6, channels: int = 3, start: int = 0, side: int = 8
) -> Path:
    """A folder `CLASS/NUMBER.png` of different drawn images."""
    for label in range(classes):
        for i in range(each):
            save(
                place / f"class{label}" / f"{i:04}.png",
                drawn(start + label * 10_000 + i, side, side, channels),
            )
    return place
