"""Measure what the guard costs a service of one's own: `Guarded.classify`, and the bare network.

    python benchmarks/guarded_load.py mine --seconds 5 --rounds 5

Sixteen connections ask in a closed loop in one event loop, and ask again as soon as they have an
answer. The queries are PNG files of natural test images, each of one of sixteen clients. Guarded
and bare rounds alternate. Each guarded round has a new log, so that it meets first trials that must
be made durable as well as known cells.
"""

import argparse
import asyncio
import io
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

import countermark as cm
from countermark.networks import load_model, open_declared
from countermark.service.engine import Engine
from service_load import compare

_CLIENTS = 16


def files(model: Path) -> list[bytes]:
    """Test images of the model's data as PNG files."""
    found = []
    for image in np.asarray(open_declared(load_model(model)[1]).test.x[:1000]):
        stream = io.BytesIO()
        Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(
            stream, "PNG"
        )
        found.append(stream.getvalue())
    return found


async def closed_loop(guard: cm.Guarded, images: list[bytes], seconds: float) -> list[float]:
    """Times of the answers, in seconds."""
    times: list[float] = []
    end = time.perf_counter() + seconds

    async def ask(number: int) -> None:
        for count in itertools.count(997 * number, 7919):
            begun = time.perf_counter()
            if begun >= end:
                return
            place = count % len(images)
            await guard.classify(images[place], f"client {place % _CLIENTS}")
            times.append(time.perf_counter() - begun)

    await asyncio.gather(*map(ask, range(_CLIENTS)))
    return times


def load(
    model: Path, images: list[bytes], seconds: float, guarded: bool
) -> tuple[float, float, float]:
    """One round: p50 and p99 in milliseconds, answers a second."""
    with (
        tempfile.TemporaryDirectory() as folder,
        cm.Guarded(model, log=f"{folder}/log.db") as guard,
    ):
        if not guarded:
            guard._engine = Engine(load_model(model)[0], None, 64, 256)
        asyncio.run(closed_loop(guard, images, 0.5))  # to warm up
        times = asyncio.run(closed_loop(guard, images, seconds))
        trials = guard._engine.trials
    p50, p99 = (1000 * statistics.quantiles(times, n=100)[place] for place in (49, 98))
    rate = len(times) / seconds
    what = "guarded" if guarded else "bare"
    print(f"{what:8} p50 {p50:.2f} ms, p99 {p99:.2f} ms, {rate:.0f}/s, {trials} trials", flush=True)
    return p50, p99, rate


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a model folder with a guard and its key")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    images = files(options.model)
    runs: dict[bool, list[tuple[float, float, float]]] = {True: [], False: []}
    for _ in range(options.rounds):
        for guarded in (False, True):
            runs[guarded].append(load(options.model, images, options.seconds, guarded))
    compare(runs, "answers a second")


if __name__ == "__main__":
    main()
