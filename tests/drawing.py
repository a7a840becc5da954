"""Folders of drawn colour images, clean or with the dirt that real folders have; the same seed
draws the same bytes.

Six classes of shapes in random colours, places and sizes on a random background, with noise: easy
enough for a small network to learn in seconds, and varied enough that it has something to learn.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy
from PIL import Image

Grid = numpy.ndarray
Shape = Callable[[Grid, Grid, float], Grid]
"""Whether a point is in a shape: offsets from its centre, right and down, and its radius."""

SHAPES: Mapping[str, Shape] = {
    "cross": lambda x, y, r: ((abs(x) < r / 3) | (abs(y) < r / 3)) & (abs(x) < r) & (abs(y) < r),
    "disc": lambda x, y, r: x**2 + y**2 < r**2,
    "ring": lambda x, y, r: (x**2 + y**2 < r**2) & (x**2 + y**2 > (0.55 * r) ** 2),
    "square": lambda x, y, r: (abs(x) < 0.8 * r) & (abs(y) < 0.8 * r),
    "stripes": lambda x, y, r: (abs(x) < r) & (abs(y) < r) & (numpy.floor(y / (r / 2.5)) % 2 == 0),
    "triangle": lambda x, y, r: (y < 0.8 * r) & (y > -r + 2 * abs(x)),
}
"""The classes, in the order of their labels, which is that of their names."""


@dataclass(frozen=True)
class Dirt:
    """What is wrong in a drawn folder, by relative path.

    Attributes:
        damaged: files that no reader can decode.
        converted: grey, palette and transparent images among the colour ones.
        resized: images of another size than the others.
        duplicates: images that are equal to another one.
    """

    damaged: tuple[str, ...] = ()
    converted: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    duplicates: tuple[str, ...] = ()


@dataclass(frozen=True)
class Drawn:
    """A drawn folder.

    Attributes:
        folder: where it is.
        images: how many image files it holds, damaged ones not counted.
        dirt: what is wrong in it.
    """

    folder: Path
    images: int
    dirt: Dirt = field(default_factory=Dirt)


def draw(name: str, generator: numpy.random.Generator, size: int = 32, noise: float = 12.0) -> Grid:
    """Draw one image of the class `name`.

    Returns:
        uint8 `(size, size, 3)`.
    """
    radius = size * generator.uniform(0.24, 0.36)
    centre = size / 2 + generator.uniform(-0.12, 0.12, 2) * size
    down, right = numpy.mgrid[0:size, 0:size] + 0.5
    inside = SHAPES[name](right - centre[0], down - centre[1], radius)
    ground = generator.uniform(30, 225, 3)
    ink = (ground + generator.uniform(85, 170, 3) * generator.choice((-1, 1))) % 256
    if abs(ink.mean() - ground.mean()) < 60:  # neither of them may hide the other
        ink = numpy.where(ground.mean() < 128, 255 - 0.2 * ink, 0.2 * ink)
    picture = numpy.where(inside[..., None], ink, ground) + generator.normal(
        0, noise, (size, size, 3)
    )
    return picture.clip(0, 255).round().astype(numpy.uint8)


def draw_arrays(each: int, seed: int = 0, size: int = 32) -> tuple[Grid, Grid]:
    """Draw `each` images of every class, one class after the other.

    Returns:
        uint8 images `(n, 3, size, size)` and int64 labels `(n,)`.
    """
    generator = numpy.random.default_rng(seed)
    images = [draw(name, generator, size) for name in SHAPES for _ in range(each)]
    return numpy.stack(images).transpose(0, 3, 1, 2).copy(), numpy.repeat(
        numpy.arange(len(SHAPES)), each
    )


def draw_folder(
    folder: Path, each: int, *, seed: int = 0, size: int = 32, dirty: bool = False, test: int = 0
) -> Drawn:
    """Draw a folder of PNG files, one folder a class.

    Args:
        folder: where to draw; it is made.
        each: images of every class, the test images not counted.
        seed: seed of everything that is drawn.
        size: height and width of the images, in pixels.
        dirty: make some of the files of `train` bad or odd (see `Dirt`); there are then eight or
            more images a class.
        test: test images of every class; with any, the classes lie in `train` and `test`.
    """
    generator = numpy.random.default_rng(seed)
    parts = {"train": each, "test": test} if test else {"": each}
    for part, count in parts.items():
        for name in SHAPES:
            (folder / part / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                Image.fromarray(draw(name, generator, size)).save(
                    folder / part / name / f"{number:05}.png"
                )
    count = sum(parts.values()) * len(SHAPES)
    if not dirty:
        return Drawn(folder, count)
    dirt = _soil(folder, next(iter(parts)), generator, size)
    return Drawn(folder, count + len(dirt.duplicates), dirt)


def _soil(folder: Path, part: str, generator: numpy.random.Generator, size: int) -> Dirt:
    """Add damaged files and duplicates, and bring some images into other modes and sizes."""
    place = folder / part

    def picture(path: str) -> Image.Image:
        return Image.open(place / path).convert("RGB")

    whole = (place / "disc/00000.png").read_bytes()
    (place / "disc/truncated.png").write_bytes(whole[: len(whole) // 2])
    (place / "ring/notes.png").write_text("this is a text file that somebody named .png\n")
    picture("cross/00001.png").convert("L").save(place / "cross/00001.png")
    clear = picture("square/00001.png")
    clear.putalpha(Image.fromarray(generator.integers(100, 256, (size, size), dtype=numpy.uint8)))
    clear.save(place / "square/00001.png")
    picture("disc/00002.png").quantize(64).save(place / "disc/00002.png")
    picture("stripes/00003.png").resize((size * 2, size * 2)).save(place / "stripes/00003.png")
    picture("triangle/00003.png").resize((size + 9, size)).save(place / "triangle/00003.png")
    (place / "ring/double.png").write_bytes((place / "ring/00005.png").read_bytes())
    (place / "disc/double.png").write_bytes((place / "square/00006.png").read_bytes())

    def named(*paths: str) -> tuple[str, ...]:
        return tuple(sorted(f"{part}/{path}" if part else path for path in paths))

    return Dirt(
        damaged=named("disc/truncated.png", "ring/notes.png"),
        converted=named("cross/00001.png", "disc/00002.png", "square/00001.png"),
        resized=named("stripes/00003.png", "triangle/00003.png"),
        duplicates=named("disc/double.png", "ring/double.png"),
    )
