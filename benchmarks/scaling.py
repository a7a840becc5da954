"""Measure how time and memory grow when inputs grow by 10 and by 100.

The measured tasks are protect, evaluate, verify, the exact test, trace and the log.

    python benchmarks/scaling.py            # prints a table, writes docs/scaling.svg

Each point is a process of its own on one thread: seconds of the work without imports, and the peak
memory above that before it, when the inputs are made. The exponent is that of the last step,
log10(t(100 n) / t(10 n)): 1 is linear.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from countermark.data import Examples, load_pools, open_data
from countermark.evaluation import adversarial_accuracy
from countermark.evidence import sign_flip_test
from countermark.guard import QueryLog, Row, trace_accounts
from countermark.guard.core import client_key, coin
from countermark.memory import keep_freed_memory
from countermark.networks import describing, save_model
from countermark.networks.named import build
from countermark.threat import Attack
from countermark.training import TrainConfig, train
from countermark.verbs.verify import verify
from countermark.watermarks import WatermarkSet, new_secrets, write_key
from peak import rising

Work = Callable[[], object]


def _network() -> torch.nn.Module:
    return build("small", (1, 28, 28), 10, seed=0).eval()


def _test(count: int) -> Examples:
    """Return the first `count` test images, repeated where there are too few.

    The labels are the network's own answers, so that no example is lost before the attack.
    """
    pool = load_pools("mnist", 0).test
    times = -(-count // len(pool))
    x = pool.x.repeat(times, 1, 1, 1)[:count]
    with torch.no_grad():
        y = torch.cat([_network()(part.float() / 255).argmax(1) for part in torch.split(x, 500)])
    return Examples(x, y)


def _protect(images: int) -> Work:
    pool = load_pools("mnist", 0).training[slice(0, images)]
    attack = Attack(0.25, 1, 0.125)
    config = TrainConfig(
        objective="fast", attack=attack, epochs=1, carry=True, batch_size=min(128, images)
    )
    return lambda: train(_network(), pool, config)


def _evaluate_images(images: int) -> Work:
    test = _test(images)
    return lambda: adversarial_accuracy(_network(), test, Attack(0.001, 5, 0.001))


def _evaluate_steps(steps: int) -> Work:
    test = _test(250)
    return lambda: adversarial_accuracy(_network(), test, Attack(0.001, steps, 0.0001))


def _verify(trials: int) -> Work:
    folder = Path(tempfile.mkdtemp())
    save_model(folder, _network(), describing(open_data("mnist"), "small"))
    x = torch.randint(0, 256, (trials, 1, 28, 28), dtype=torch.uint8)
    heads = torch.randint(0, 9, (trials,))
    made = WatermarkSet(
        x,
        torch.stack((heads, heads + 1), 1),
        torch.zeros(trials, dtype=torch.int64),
        torch.arange(trials),
    )
    new_secrets(folder / "key")
    write_key(folder / "key", "coin", made, {"data": "none"})
    return lambda: verify(folder, key=folder / "key")


def _cells(cells: int) -> Work:
    """Cells of one trial each, four in seven of which agree: one binomial sum."""
    differences = [1 if i % 7 < 4 else -1 for i in range(cells)]
    return lambda: sign_flip_test(differences)


def _convolution(cells: int) -> Work:
    """Time the exact convolution on cells of 1 to 9 trials; it alone is allowed to grow faster."""
    differences = [(i % 9 + 1) * (1 if i % 7 < 4 else -1) for i in range(cells)]
    return lambda: sign_flip_test(differences)


def _row(client: int, number: int) -> Row:
    return Row(
        "aa" * 32,
        f"client {client}",
        number.to_bytes(8, "big"),
        bytes(784),
        1,
        2,
        30_000,
        1 + number % 2,
        1,
    )


def _answered(row: Row) -> Row:
    tails = coin(client_key(b"s" * 32, row.model, row.client), row.cell) < row.chance
    return replace(row, answer=row.tails if tails else row.heads)


def _clients(clients: int) -> Work:
    rows = [_answered(_row(client, number)) for number in range(30) for client in range(clients)]
    labels = torch.randint(1, 3, (len(rows),))
    return lambda: trace_accounts(rows, labels, b"s" * 32)


def _log(rows: int) -> Work:
    url = str(Path(tempfile.mkdtemp()) / "log.db")

    def work() -> None:
        with QueryLog(url) as log:
            for start in range(0, rows, 50):
                part = [_row(0, number) for number in range(start, min(rows, start + 50))]
                log.append([replace(row, log=log.identity) for row in part])
            assert len(list(log.rows())) == rows

    return work


WORK: dict[str, tuple[Callable[[int], Work], int]] = {
    "protect: training images, an epoch": (_protect, 460),
    "evaluate: images": (_evaluate_images, 250),
    "evaluate: steps of PGD": (_evaluate_steps, 5),
    "verify: watermarks": (_verify, 100),
    "test: cells of one trial": (_cells, 100),
    "test: cells of several trials (exact convolution)": (_convolution, 20),
    "trace: clients": (_clients, 10),
    "log: rows written, 50 a commit, and read": (_log, 100),
}


def one(name: str, size: int) -> None:
    """Measure one point in this process."""
    torch.set_num_threads(1)
    keep_freed_memory()
    make, _ = WORK[name]
    make(min(size, 20))()  # what is imported or built on first use
    work = make(size)
    with rising() as risen:
        begun = time.perf_counter()
        work()
        took = time.perf_counter() - begun
        print(json.dumps({"seconds": took, "MiB": risen() / 2**20}))


def measured() -> list[dict[str, Any]]:
    """Every point, each in a process of its own."""
    found = []
    for name, (_, size) in WORK.items():
        for factor in (1, 10, 100):
            done = subprocess.run(
                [sys.executable, __file__, "--one", name, str(size * factor)],
                capture_output=True,
                text=True,
                check=True,
            )
            found.append(
                {"what": name, "size": size * factor, **json.loads(done.stdout.splitlines()[-1])}
            )
            print(json.dumps(found[-1]), flush=True)
    return found


def exponents(points: list[dict[str, Any]]) -> dict[str, float]:
    """The growth of the last step of each."""
    last: dict[str, list[float]] = {}
    for point in points:
        last.setdefault(point["what"], []).append(point["seconds"])
    return {name: math.log10(times[2] / times[1]) for name, times in last.items()}


def draw(points: list[dict[str, Any]], path: Path) -> None:
    """The plot, time over the growth of the input, both logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name in WORK:
        own = [point for point in points if point["what"] == name]
        axes.loglog(
            [point["size"] / own[0]["size"] for point in own],
            [point["seconds"] for point in own],
            marker="o",
            label=name,
        )
    reference = [1, 100]
    axes.loglog(
        reference, [1e-3 * r for r in reference], color="grey", linestyle="--", label="linear"
    )
    axes.set_xlabel("times the input")
    axes.set_ylabel("seconds, one thread")
    axes.legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options.one[0], int(options.one[1]))
        return
    points = measured()
    draw(points, Path(__file__).parents[1] / "docs" / "scaling.svg")
    for name, exponent in exponents(points).items():
        print(f"{name}: n^{exponent:.2f}")


if __name__ == "__main__":
    main()
