"""A thousand classes of colour images of 80x80 in a file, through the verbs themselves.

What a verb reads at once, and the largest tensor that it makes, are bounded whatever the number of
images; `benchmarks/memory.py` measures the same at 224x224 with residual networks.
"""

import asyncio
import json
import math
import random
import secrets
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from countermark.data import Dataset, Examples, Rows
from countermark.guard import QueryLog, Row, load_guarded, trace_accounts
from countermark.guard.core import client_key, coin
from countermark.service.engine import Engine
from countermark.threat import COLOUR
from countermark.verbs import evaluate, guard, protect
from countermark.verbs.trace import trace
from countermark.watermarks import WatermarkSet, load_secret, new_secrets, write_key

CLASSES, SIDE, TRAIN, TEST = 1000, 80, 2000, 300
FIELDS = 4  # a side, of the pattern that tells the class
AT_ONCE, LARGEST = 1 << 24, 5 << 22  # bytes that are read at once, and of a tensor, at most
PATTERNS = np.random.default_rng(0).integers(100, 157, (CLASSES, 3, FIELDS, FIELDS), np.uint8)


def make(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Build a network that answers with the nearest pattern, and has room for a mark."""
    values, wide = shape[0] * FIELDS**2, 1024
    means = torch.from_numpy(PATTERNS.reshape(CLASSES, -1) / 255).float()[:classes]
    first, last = nn.Linear(values, wide), nn.Linear(wide, classes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        first.weight[:values], first.bias[:values] = 10 * torch.eye(values), 0.0
        first.weight[values:] = 5 * torch.randn(wide - values, values, generator=generator)
        first.bias[values:] = -first.weight[values:].sum(1) / 2
        last.weight.zero_()
        last.weight[:, :values], last.bias[:] = 10 * means, -50 * (means**2).sum(1)
    return nn.Sequential(nn.AvgPool2d(shape[1] // FIELDS), nn.Flatten(), first, nn.ReLU(), last)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Noisy patterns in one file; the labels go round, in an order of their own."""
    path, generator = tmp_path_factory.mktemp("photos") / "images", np.random.default_rng(1)
    labels = generator.permutation(np.arange(TRAIN + TEST) % CLASSES)
    noise = generator.integers(-20, 21, (3, SIDE, 2 * SIDE), np.int16)
    with path.open("wb") as file:
        for label in labels:
            start = int(generator.integers(SIDE))
            clean = PATTERNS[label].repeat(SIDE // FIELDS, 1).repeat(SIDE // FIELDS, 2)
            image = clean + noise[:, :, start : start + SIDE] + generator.integers(-4, 5, (3, 1, 1))
            file.write(image.astype(np.uint8).tobytes())
    rows: Any = Rows(path, (len(labels), 3, SIDE, SIDE))
    every = Examples(rows, torch.from_numpy(labels))
    names = tuple(f"class {label}" for label in range(CLASSES))
    return Dataset("", every[:TRAIN], every[TRAIN:], names, COLOUR)


class Watched(TorchDispatchMode):
    """Remembers the largest tensor that was made, in bytes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, tuple | list) else (found,):
            if isinstance(each, torch.Tensor):
                self.largest = max(self.largest, each.numel() * each.element_size())
        return found


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    """No read of images may be larger than `AT_ONCE`; the largest tensor is known at the end."""
    read = Rows.__getitem__

    def bounded(self: Rows, index: torch.Tensor | slice) -> torch.Tensor:
        images = read(self, index)
        assert images.numel() <= AT_ONCE
        return images

    monkeypatch.setattr(Rows, "__getitem__", bounded)
    with Watched() as watch:
        yield watch


def test_a_thousand_classes_of_large_images_go_through_the_verbs(
    photos: Dataset,
    watched: Watched,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(secrets, "token_bytes", random.Random("real size").randbytes)
    out, weights = tmp_path / "mine", make(photos.shape, CLASSES).state_dict()
    given: dict[str, Any] = {"network": make, "weights": weights, "epochs": 7, "shift": 0}
    made = protect.protect(photos, out=out, **given)
    assert made.mark is not None
    assert made.mark.taken
    assert min(made.test_accuracy, made.unmarked_test_accuracy) > 90

    found = evaluate.evaluate(out, data=photos, network=make, images=100)
    assert found.test_accuracy > 90
    assert found.watermark_accuracy == made.watermark_accuracy

    calibrated = guard.guard(out, data=photos, network=make, cost=5.0)
    assert calibrated.tied > 5
    for show, result in ((protect, made), (evaluate, found), (guard, calibrated)):
        capsys.readouterr()
        show.show(result)
        assert len(capsys.readouterr().out.splitlines()) < 25

    rows, answers = asyncio.run(served(out, photos.test.x[:], tmp_path / "log.db"))
    assert sum(answers == photos.test.y) > 0.8 * TEST
    assert max(row.heads for row in rows) > 255
    told = torch.tensor([row.answer for row in rows])
    assert trace_accounts(rows, told, load_secret(out / "key")).named == ("anna",)
    by_others = torch.tensor([row.heads + row.tails - row.answer for row in rows])
    assert trace_accounts(rows, by_others, load_secret(out / "key")).named == ()

    assert watched.largest <= LARGEST < math.prod(photos.train.x.shape)
    ranges = 4 * math.prod(photos.shape)  # two hexadecimal digits for either end of each
    sizes = {path.name: path.stat().st_size for path in out.iterdir() if path.suffix == ".json"}
    assert sizes["guard.json"] - ranges < 5_000
    names = len(json.dumps(photos.class_names, indent=3))  # C1 has them, as the model does
    assert max(sizes["model.json"], sizes["commitment.json"]) - names < 5_000
    assert max(sizes["config.json"], sizes["metrics.json"]) < 5_000


async def served(folder: Path, images: torch.Tensor, log: Path) -> tuple[list[Row], torch.Tensor]:
    """What the log holds, and what anna got, after the service answered her once."""
    with QueryLog(str(log)) as kept:
        engine = Engine(load_guarded(folder, folder / "key", make), kept, 64, 8)
        labels = await engine.answer(images, "anna")
        engine.stop()
        return [row for row in kept.rows() if row is not None], torch.tensor(labels)


def test_a_trace_holds_a_part_of_the_log_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 1,500 images of 48 KiB a trace held all; a page of the log has 16 MiB."""
    shape, count, model = (3, 128, 128), 1500, "ab" * 32
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (80, *shape), dtype=torch.uint8, generator=generator)
    answers = torch.tensor([[0, 1]]).repeat(80, 1)
    new_secrets(tmp_path / "key")
    marks = WatermarkSet(x, answers, torch.zeros(80).long(), torch.arange(80))
    write_key(tmp_path / "key", "coin", marks, {"data": "mine"})
    with QueryLog(str(tmp_path / "log.db")) as log:
        identity = log.identity
    drawn = client_key(load_secret(tmp_path / "key"), model, "anna", identity)
    rest = bytes(math.prod(shape) - 2)

    def chosen(number: int) -> int:
        return int(coin(drawn, number.to_bytes(4, "big")) < 32768)

    with QueryLog(str(tmp_path / "log.db")) as log:
        for start in range(0, count, 50):
            rows = [
                Row(
                    model,
                    "anna",
                    number.to_bytes(4, "big"),
                    number.to_bytes(2, "big") + rest,
                    *(0, 1, 32768, chosen(number), 20_000),
                    log=identity,
                )
                for number in range(start, start + 50)
            ]
            assert all(log.append(rows))
    asked: list[int] = []

    def copy(images: torch.Tensor) -> torch.Tensor:
        first = (images[:, 0, 0, :2] * 255).round().long()
        numbers = (256 * first[:, 0] + first[:, 1]).tolist()
        asked.extend(numbers)
        return torch.tensor([chosen(number) for number in numbers])

    monkeypatch.setattr(sys.modules["countermark.verbs.trace"], "_PART", 32)
    tracemalloc.start()
    found = trace(copy, key=tmp_path / "key", log=str(tmp_path / "log.db"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.trace.named == ("anna",)
    assert found.trace.accounts[0].agreements == found.rows == count
    assert asked == [*range(count)]
    assert peak < 0.7 * count * math.prod(shape)
