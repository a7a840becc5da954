"""Protecting more images than memory holds: `python benchmarks/memory.py`.

Makes sets of 224x224 colour images in one file each, and does with each what `protect` and `guard`
do: digest and pools, a few steps of adversarial training, accuracies, trials, a guard that has
seen all training images. Reports the peak of resident memory and the time of each part; 100,000
images are 15 GB on disk.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from countermark.data import Dataset, Examples, Rows
from countermark.evaluation import accuracy, adversarial_accuracy, predict
from countermark.guard import Guard, GuardedModel, calibrate_model
from countermark.memory import keep_freed_memory
from countermark.networks import build
from countermark.threat import COLOUR, Attack
from countermark.training import TrainConfig, train
from countermark.watermarks import craft_adversarial

SIZES = (25_000, 50_000, 100_000)
SHAPE = (3, 224, 224)
CLASSES = 10
TEST = 500
STEPS = 10
LIMIT = 2 << 30


class EnoughError(Exception):
    """The steps that were wanted were taken."""


def make(path: Path, count: int) -> None:
    """Write images of noise that all differ: slices of one block, each with its number in front."""
    image = SHAPE[0] * SHAPE[1] * SHAPE[2]
    block = (
        torch.randint(
            0, 256, (2 * image,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
        )
        .numpy()
        .tobytes()
    )
    with path.open("wb") as file:
        for number in range(count):
            start = number * 7919 % image
            file.write(number.to_bytes(8, "big") + block[start + 8 : start + image])


def images(path: Path, first: int, count: int, size: int) -> Examples:
    """Some of the images of a file of `size`; their labels go round."""
    rows: Any = Rows(path, (size, *SHAPE)).take(slice(first, first + count))
    return Examples(rows, torch.arange(first, first + count) % CLASSES)


def protect(path: Path, count: int) -> dict[str, float]:
    """What `protect` and `guard` do, with a few steps of training; the seconds of each part."""
    keep_freed_memory()
    took: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        begun = time.monotonic()
        made = work()
        took[name] = round(time.monotonic() - begun, 2)
        return made

    train_part, test = images(path, 0, count, count + TEST), images(path, count, TEST, count + TEST)
    data = Dataset("", train_part, test, tuple(map(str, range(CLASSES))), COLOUR)
    timed("digest", lambda: data.digest)
    pools = timed("pools", lambda: data.pools(0))
    network = build("small", SHAPE, CLASSES, seed=0)
    timed("training", lambda: few_steps(network, pools.training, pools.validation))
    timed(
        "accuracy",
        lambda: (
            accuracy(network, test[:100]),
            adversarial_accuracy(network, test[:20], Attack(8 / 255, 2, 4 / 255)),
        ),
    )
    timed(
        "trials",
        lambda: craft_adversarial(network, pools.bases[:20], Attack(16 / 255, 2, 8 / 255), seed=0),
    )
    options: dict[str, Any] = {
        "secret": bytes(32),
        "model_sha256": "0" * 64,
        "cost": 5.0,
        "epsilon": 8 / 255,
    }
    right = Examples(
        pools.validation.x[:200], predict(network, pools.validation[:200].x)
    )  # noise has no classes to be right about
    found = timed(
        "guard", lambda: calibrate_model(network, right, training=pools.training, **options)
    )
    timed(
        "answers",
        lambda: GuardedModel(network, Guard(found.settings, bytes(32)))(test.x[:100], "somebody"),
    )
    return took


def few_steps(network: nn.Module, training: Examples, validation: Examples) -> None:
    """Begin a training of the whole pool, and leave it after some steps."""
    config = TrainConfig("fast", Attack(8 / 255, 1, 8 / 255), 1, carry=True, batch_size=32)
    steps = 0

    def count(module: nn.Module, *_: Any) -> None:
        nonlocal steps
        steps += module.training
        if steps > STEPS:
            raise EnoughError

    hook = network.register_forward_pre_hook(count)
    try:
        train(network, training, config, validation=validation)
    except EnoughError:
        hook.remove()


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    options.add_argument(
        "--folder", type=Path, help="where the images are made; default a temporary folder"
    )
    options.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.child is not None:
        took = protect(given.child, given.sizes[0])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        sys.stdout.write(
            json.dumps({"images": given.sizes[0], "peak_mib": peak >> 20, **took}) + "\n"
        )
        return
    largest = 0
    for size in given.sizes:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            path = Path(folder) / "images"
            make(path, size + TEST)
            command = [sys.executable, __file__, "--child", str(path), "--sizes", str(size)]
            line = (
                subprocess.run(command, stdout=subprocess.PIPE, check=True)
                .stdout.decode()
                .strip()
                .splitlines()[-1]
            )
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
        largest = max(largest, json.loads(line)["peak_mib"] << 20)
    sys.exit(f"{largest >> 20} MiB are more than {LIMIT >> 20}" if largest > LIMIT else 0)


if __name__ == "__main__":
    main()
