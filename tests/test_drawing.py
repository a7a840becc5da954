"""The drawn folders that other tests and benchmarks/open_house.py use.

A seed must always give the same bytes, and the folders must have the dirt that they declare.
"""

from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image, UnidentifiedImageError

from countermark.data import Examples
from countermark.evaluation import accuracy
from countermark.training import Hardware, TrainConfig, train
from drawing import SHAPES, draw_arrays, draw_folder
from residual import make


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.png")
    }


def test_a_seed_draws_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        draw_folder(tmp_path / name, 8, seed=seed, size=16, dirty=True)
    one, two, other = (files(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert one.keys() == other.keys()
    assert one != other


@pytest.mark.parametrize("test", [0, 2])
def test_the_dirt_is_what_the_drawer_says(test: int, tmp_path: Path) -> None:
    drawn = draw_folder(tmp_path / "photos", 8, size=16, dirty=True, test=test)
    found = files(drawn.folder)
    damaged, odd, sizes, duplicates = [], [], [], []
    for path, data in sorted(found.items()):
        try:
            image = Image.open(drawn.folder / path)
            image.load()
        except (OSError, UnidentifiedImageError):
            damaged.append(path)
            continue
        odd += [path] if image.mode != "RGB" else []
        sizes += [path] if image.size != (16, 16) else []
        duplicates += [path] if list(found.values()).count(data) > 1 else []
    assert tuple(damaged) == drawn.dirt.damaged
    assert tuple(odd) == drawn.dirt.converted
    assert tuple(sizes) == drawn.dirt.resized
    assert set(drawn.dirt.duplicates) < set(duplicates)
    assert len(duplicates) == 2 * len(drawn.dirt.duplicates)
    assert (
        len(found) - len(damaged)
        == drawn.images
        == (8 + test) * len(SHAPES) + len(drawn.dirt.duplicates)
    )


def test_the_classes_can_be_told_apart() -> None:
    """A small residual network is far above chance on images it has not seen.

    It is trained for a few dozen steps.
    """
    pools = [draw_arrays(each, seed=seed, size=16) for seed, each in ((0, 60), (1, 20))]
    seen, fresh = (Examples(torch.from_numpy(x), torch.from_numpy(y)) for x, y in pools)
    assert numpy.array_equal(numpy.bincount(pools[0][1]), [60] * len(SHAPES))
    torch.manual_seed(0)
    network = make((3, 16, 16), len(SHAPES))
    train(network, seen, TrainConfig("standard", None, 6, batch_size=32, hardware=Hardware("cpu")))
    assert accuracy(network, fresh) > 50
