"""Measure what the guard costs the service, and what a kill leaves of the log.

Latency and throughput are measured with the guard and without it.

    python benchmarks/service_load.py --model runs/guard/mnist-0 --seconds 10 --rounds 5
    python benchmarks/service_load.py --model runs/guard/mnist-0 --send png
    python benchmarks/service_load.py --model runs/guard/mnist-0 --kills 20

The load is a closed loop: each connection is kept alive, has one natural test image a request,
and asks again as soon as it has its answer. The requests come from many accounts, so that each run
meets first trials that must be made durable as well as cells that are known. Guarded and bare runs
alternate. To compare with earlier code, name its source tree: PYTHONPATH=OTHER/src.
"""

import argparse
import asyncio
import io
import itertools
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import requests
import torch
from PIL import Image

from countermark import calibrate
from countermark.guard import QueryLog, load_guarded
from countermark.networks import load_model, open_declared
from countermark.service.clients import add_client

_WARM = 2  # seconds of load before the measurement


class Service:
    """A service in a process of its own."""

    def __init__(self, model: Path, folder: Path, *options: str) -> None:
        """Start it and wait until it is ready."""
        command = [
            sys.executable,
            "-m",
            "countermark",
            "serve",
            "--model",
            str(model),
            "--clients",
            str(folder / "clients.json"),
        ]
        log = [] if "--unguarded" in options else ["--log", str(folder / "log.db")]
        command += [*log, "--port", "0", "--max-waiting", "1000", *options]
        self.process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self.process.stderr is not None
        found = None
        while found is None:
            line = self.process.stderr.readline()
            assert line, "the service did not start"
            found = re.search(r"listening on (http://\S+)", line)
        self.url = found[1]
        while not _ready(self.url):
            time.sleep(0.05)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it."""
        self.process.send_signal(number)
        self.process.wait()


def _ready(url: str) -> bool:
    try:
        return requests.get(f"{url}/v2/health/ready", timeout=5).ok
    except requests.ConnectionError:
        return False


class Body(NamedTuple):
    """A request's body, with the length of its JSON where bytes follow."""

    content: bytes
    json_length: int | None = None


def as_json(image: torch.Tensor) -> Body:
    """The pixels as numbers in JSON."""
    tensor = {"name": "image", "shape": [1, *image.shape], "datatype": "UINT8"}
    data = image.flatten().tolist()
    return Body(json.dumps({"inputs": [{**tensor, "data": data}]}).encode())


def as_uint8(image: torch.Tensor) -> Body:
    """The pixels as bytes."""
    return _binary("UINT8", [1, *image.shape], image.numpy().tobytes())


def as_png(image: torch.Tensor) -> Body:
    """An image file."""
    stream, pixels = io.BytesIO(), image.numpy()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(
        stream, "PNG"
    )
    file = stream.getvalue()
    return _binary("BYTES", [1], len(file).to_bytes(4, "little") + file)


def _binary(kind: str, shape: list[int], data: bytes) -> Body:
    tensor: dict[str, Any] = {"name": "image", "shape": shape, "datatype": kind}
    tensor["parameters"] = {"binary_data_size": len(data)}
    text = json.dumps({"inputs": [tensor]}).encode()
    return Body(text + data, len(text))


SENT = {"json": as_json, "uint8": as_uint8, "png": as_png}


def load(
    model: Path,
    bodies: list[Body],
    seconds: int,
    connections: int,
    clients: int,
    guarded: bool,
) -> tuple[float, float, float]:
    """One run: p50 and p99 in milliseconds, requests a second."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keys = [add_client(folder / "clients.json", f"client {k}", None) for k in range(clients)]
        service = Service(model, folder, *([] if guarded else ["--unguarded"]))
        host, port = service.url.removeprefix("http://").split(":")
        sent = [_request(body, keys[k % clients]) for k, body in enumerate(bodies)]
        asyncio.run(_closed_loop(host, int(port), sent, _WARM, connections))
        times, wrong = asyncio.run(_closed_loop(host, int(port), sent, seconds, connections))
        service.stop()
        trials = sum(1 for _ in QueryLog(str(folder / "log.db")).rows()) if guarded else 0
    p50, p99 = (1000 * statistics.quantiles(times, n=100)[place] for place in (49, 98))
    rate = len(times) / seconds
    print(
        f"{'guarded' if guarded else 'bare':8} p50 {p50:.1f} ms, p99 {p99:.1f} ms, {rate:.0f}/s, "
        f"{trials} trials, {wrong} errors",
        flush=True,
    )
    return p50, p99, rate


def _request(body: Body, key: str) -> bytes:
    head = f"POST /v2/models/model/infer HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n"
    if body.json_length is not None:
        head += f"Inference-Header-Content-Length: {body.json_length}\r\n"
    return f"{head}Content-Length: {len(body.content)}\r\n\r\n".encode() + body.content


async def _closed_loop(
    host: str, port: int, sent: list[bytes], seconds: float, connections: int
) -> tuple[list[float], int]:
    """Times of the answers in seconds, and how many were not 200."""
    times: list[float] = []
    wrong = 0
    end = time.perf_counter() + seconds

    async def ask(number: int) -> None:
        nonlocal wrong
        reader, writer = await asyncio.open_connection(host, port)
        for place in itertools.count(997 * number, 7919):
            begun = time.perf_counter()
            if begun >= end:
                break
            writer.write(sent[place % len(sent)])
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(re.findall(rb"(?i)content-length: (\d+)", head)[0]))
            times.append(time.perf_counter() - begun)
            wrong += not head.startswith(b"HTTP/1.1 200")
        writer.close()

    await asyncio.gather(*(ask(number) for number in range(connections)))
    return times, wrong


def kills(model: Path, x: torch.Tensor, times: int) -> None:
    """Kill the service under load, and look for every answered trial in the log."""
    guarded, generator, answered = load_guarded(model, model / "key"), random.Random(0), 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keys = {
            f"client {k}": add_client(folder / "clients.json", f"client {k}", None)
            for k in range(4)
        }
        given: dict[str, list[tuple[int, int]]] = {client: [] for client in keys}
        for number in range(times):
            service = Service(model, folder)

            def ask(client: str, url: str = service.url, seed: int = number) -> None:
                choice, session = random.Random(f"{client} {seed}"), requests.Session()
                while True:
                    index = choice.randrange(len(x))
                    try:
                        answer = session.post(
                            f"{url}/v2/models/model/infer",
                            data=as_json(x[index]).content,
                            headers={"Authorization": f"Bearer {keys[client]}"},
                            timeout=10,
                        )
                        given[client].append((index, answer.json()["outputs"][0]["data"][0]))
                    except requests.RequestException:
                        return

            threads = [threading.Thread(target=ask, args=(client,)) for client in keys]
            for thread in threads:
                thread.start()
            time.sleep(generator.uniform(0.3, 2.0))
            service.stop(signal.SIGKILL)
            for thread in threads:
                thread.join()
        log = QueryLog(str(folder / "log.db"))
        guarded = guarded.under(log.identity)
        places = {row.place for row in log.rows() if row is not None}
        lost = wrong = trials = 0
        for client, pairs in given.items():
            answers = guarded(x[[index for index, _ in pairs]], client)
            wrong += sum(
                label != int(found) for (_, label), found in zip(pairs, answers.labels, strict=True)
            )
            cells = {
                (guarded.guard.settings.model_sha256, client, trial.cell)
                for trial in answers.trials
            }
            trials, lost, answered = (
                trials + len(cells),
                lost + len(cells - places),
                answered + len(pairs),
            )
    print(
        f"{times} kills, {answered} answers, {trials} trials answered, "
        f"{lost} of them not in the log, {wrong} answers that changed"
    )
    assert lost == wrong == 0


def compare(runs: Mapping[bool, Sequence[Sequence[float]]], rate: str) -> None:
    """Print the medians of p50, p99 and a rate, of bare and of guarded runs."""
    for place, what in enumerate(("p50", "p99", rate)):
        bare, guard = (
            statistics.median(run[place] for run in runs[guarded]) for guarded in (False, True)
        )
        print(f"{what}: bare {bare:.2f}, guarded {guard:.2f}, ratio {guard / bare:.3f}")


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a model folder with its key")
    parser.add_argument("--seconds", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--send", choices=SENT, default="json", help="how images are sent")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--cost", type=float, default=0.1)
    parser.add_argument("--kills", type=int)
    options = parser.parse_args()
    calibrate(options.model, cost=options.cost)
    _, description = load_model(options.model)
    x = open_declared(description).test.x[:2000]
    if options.kills:
        kills(options.model, x, options.kills)
        return
    bodies = [SENT[options.send](image) for image in x]
    runs: dict[bool, list[tuple[float, float, float]]] = {True: [], False: []}
    for _ in range(options.rounds):
        for guarded in (False, True):
            runs[guarded].append(
                load(
                    options.model,
                    bodies,
                    options.seconds,
                    options.connections,
                    options.clients,
                    guarded,
                )
            )
    compare(runs, "requests a second")


if __name__ == "__main__":
    main()
