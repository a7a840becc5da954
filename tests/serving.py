"""A service of its own process on loopback, for tests that need a model but no training."""

import contextlib
import io
import os
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import requests
import torch
from PIL import Image

from countermark.networks import build, describe, save_model
from countermark.service.clients import add_client
from warm import warm

GOLDEN = Path(__file__).parent / "golden" / "0.1.0"


class Service(NamedTuple):
    """Where a service listens, what its standard error is written to, and anna's API key."""

    url: str
    said: Path
    key: str


def drawn(count: int, shape: tuple[int, int, int], seed: int = 2) -> torch.Tensor:
    """Random images of a few large patches, uint8."""
    channels, *sides = shape
    generator = torch.Generator().manual_seed(seed)
    patches = torch.rand(count, channels, 4, 4, generator=generator)
    return (torch.nn.functional.interpolate(patches, sides) * 255).to(torch.uint8)


def of_scans(empty: int, side: int = 1200) -> bytes:
    """A progressive JPEG with so many empty scans at its end."""
    stream = io.BytesIO()
    Image.new("RGB", (side, side), (10, 200, 30)).save(stream, "JPEG", progressive=True)
    file = stream.getvalue()
    last = file.rindex(b"\xff\xda")
    length = int.from_bytes(file[last + 2 : last + 4], "big")
    return file[:-2] + file[last : last + 2 + length] * empty + file[-2:]


def untrained(folder: Path, shape: tuple[int, int, int], names: Sequence[str]) -> Path:
    """A model of some shape that tells random images apart, though it has learned nothing."""
    folder.mkdir()
    network = build("narrow", shape, len(names), seed=0).eval()
    last = [layer for layer in network.modules() if isinstance(layer, torch.nn.Linear)][-1]
    with torch.no_grad():
        logits = network(drawn(100, shape, seed=1) / 255)
        last.weight /= logits.std(0)[:, None]
        last.bias.copy_((last.bias - logits.mean(0)) / logits.std(0))
    about = replace(
        describe(GOLDEN / "mine"), network="narrow", shape=shape, class_names=tuple(names)
    )
    save_model(folder, network, about)
    return folder


@contextlib.contextmanager
def serving(
    model: Path,
    folder: Path,
    *options: str,
    command: Sequence[str] = (),
    public: str | None = None,
    named: str = "anna",
) -> Iterator[Service]:
    """Serve a model without a guard until the end, unless the options say otherwise.

    Args:
        model: folder of the model.
        folder: where the file of clients and the log of a guard are written.
        options: of `countermark serve`.
        command: words that begin the command line instead of the usual.
        public: key with which the client signs their requests.
        named: name of the client.
    """
    key = add_client(folder / "clients.json", named, public)
    said = folder / "standard error"
    words = [*(command or warm()), "serve", str(model), "--clients", str(folder / "clients.json")]
    log = [] if "--unguarded" in options else ["--log", str(folder / "log.db")]
    words += [*log, "--port", "0", *options]
    with said.open("w") as errors:
        process = subprocess.Popen(
            words, stdout=errors, stderr=errors, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    try:
        while not (found := re.search(r"listening on (http://\S+)", said.read_text())):
            assert process.poll() is None, said.read_text()
            time.sleep(0.02)
        while not requests.get(f"{found[1]}/v2/health/ready", timeout=10).ok:
            time.sleep(0.02)
        yield Service(f"{found[1]}/v2/models/model", said, key)
    finally:
        process.terminate()
        process.wait(20)
