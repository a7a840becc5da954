"""Real size: memory and time of the verbs at 224x224 and 1,000 classes.

    python benchmarks/memory.py [--images 2000 50000] [--network timm:resnet50] [--steps 0]

Makes colour images of a thousand classes and weights that know them, then runs `protect` (which
only marks these weights), `evaluate`, `guard` and `serve` on them, each in a process of its own, as
a user does. Prints one JSON object a line: the verb, its peak of resident memory, its seconds.
The marking ends after `--steps` steps, and the later verbs then take the weights as they were
given; with 0 it goes on until the mark holds, which with ResNet-50 takes a GPU or hours. 100,000
images are 15 GB on disk.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import requests
import torch
from torch import nn

from countermark import client_add
from countermark.data import by_digest, known_images
from countermark.data.pools import packed
from countermark.errors import CountermarkError
from countermark.files import read_json, write_tensors
from countermark.guard.model import FeatureReader
from countermark.networks import describing, load_weights, open_network, save_model
from countermark.terminal import print_lines

SIDE, CLASSES, FIELDS = 224, 1000, 7
SHAPE = (3, SIDE, SIDE)
DEPTHS: Mapping[str, tuple[int, Sequence[int]]] = {
    "resnet18": (1, (2, 2, 2, 2)),
    "resnet50": (4, (3, 4, 6, 3)),
}
"""Expansion and blocks of each stage (He et al., 2016, "Deep residual learning", Table 1)."""
NOISE = 8  # of a pixel, up or down
NETWORK, IMAGES, STEPS = (f"COUNTERMARK_BENCH_{name}" for name in ("NETWORK", "IMAGES", "STEPS"))
"""Variables by which the processes of the verbs are told what to build."""


class Block(nn.Module):
    """A residual block: two convolutions, or a bottleneck of three where it expands."""

    def __init__(self, before: int, width: int, expansion: int, stride: int) -> None:
        """Build the block for inputs of `before` channels."""
        super().__init__()
        after = expansion * width
        sides = (3, 3) if expansion == 1 else (1, 3, 1)
        widths = (before, *[width] * (len(sides) - 1), after)
        layers: list[nn.Module] = []
        for number, side in enumerate(sides):
            step = stride if number == len(sides) // 3 else 1
            given, made = widths[number], widths[number + 1]
            layers += [nn.Conv2d(given, made, side, step, side // 2, bias=False)]
            layers += [nn.BatchNorm2d(made)]
            layers += [nn.ReLU()] if number + 1 < len(sides) else []
        self.inner = nn.Sequential(*layers)
        self.shortcut = nn.Sequential()
        if stride > 1 or before != after:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add what the layers make of the input to the input."""
        return torch.relu(self.inner(x) + self.shortcut(x))


def residual(name: str, classes: int) -> nn.Module:
    """The residual network of a name, for large images."""
    expansion, stages = DEPTHS[name]
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)]
    layers += [nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    before = 64
    for stage, blocks in enumerate(stages):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            layers.append(Block(before, 64 << stage, expansion, stride))
            before = expansion * 64 << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


def network(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The network of all verbs; it refuses to take more steps of training than are wanted."""
    name, most, steps = os.environ[NETWORK], int(os.environ[STEPS]), 0
    built = residual(name, classes) if name in DEPTHS else open_network(name, shape, classes)

    def count(module: nn.Module, *_: Any) -> None:
        nonlocal steps
        steps += module.training
        if most and steps > most:
            raise CountermarkError(f"{most} steps were wanted")

    built.register_forward_pre_hook(count)
    return built


class Photos:
    """Images that are drawn when they are read: the pattern of their class, and noise."""

    classes = tuple(f"class {label}" for label in range(CLASSES))

    def __init__(self, count: int) -> None:
        """Draw the patterns of the classes, and the noise that images are slices of."""
        generator = np.random.default_rng(0)
        self._count = count
        self._patterns = generator.integers(0, 256, (CLASSES, FIELDS, FIELDS, 3), np.uint8)
        self._noise = generator.integers(-NOISE, NOISE + 1, 2 * SIDE * SIDE * 3, np.int16)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> tuple[np.ndarray, int]:
        """The image of a number and its label, which go round."""
        if number >= self._count:
            raise IndexError(number)
        label, start = number % CLASSES, number * 7919 % (SIDE * SIDE * 3)
        clean = self._patterns[label].repeat(SIDE // FIELDS, 0).repeat(SIDE // FIELDS, 1)
        noise = self._noise[start : start + clean.size].reshape(clean.shape)
        image = (clean + noise).clip(0, 255).astype(np.uint8)
        image[0, :4, 0] = list((number * 2654435761 % (1 << 32)).to_bytes(4))  # no two are equal
        return image, label


def photos() -> Photos:
    """The images of all verbs."""
    return Photos(int(os.environ[IMAGES]))


def make_weights(path: Path) -> None:
    """Write weights whose last layer knows the classes by the mean of what is in front of it."""
    torch.manual_seed(0)
    built, shown = network(SHAPE, CLASSES), Photos(CLASSES)

    def batch(first: int) -> torch.Tensor:
        images = np.stack([shown[first + k][0] for k in range(20)])
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()

    norms = [each for each in built.modules() if isinstance(each, nn.BatchNorm2d)]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for norm in norms:
            norm.momentum = None  # the mean over all batches
        for first in range(0, 60, 20):
            built.train()(batch(first) / 255)
        read = FeatureReader(built.eval())
        features = torch.cat([read(batch(i))[1].float() for i in range(0, CLASSES, 20)])
    last = [each for each in built.modules() if isinstance(each, nn.Linear)][-1]
    middle = features.mean(0)
    features -= middle
    apart = torch.cdist(features, features).fill_diagonal_(torch.inf).amin(1).square().median()
    with torch.no_grad():
        last.weight[:] = 20 / apart * features
        last.bias[:] = -10 / apart * features.square().sum(1) - last.weight @ middle
    write_tensors(path, {name: each.contiguous() for name, each in built.state_dict().items()}, {})


def run(words: Sequence[object], ask: Any = None) -> dict[str, Any]:
    """Run a verb in a process of its own: its exit status, result, seconds, peak of memory.

    Args:
        words: of the command line.
        ask: what to do while it runs, before it is told to stop; none to wait for its end.
    """
    command = [sys.executable, "-m", "countermark", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        begun = time.monotonic()
        child = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
        if ask is not None:
            with contextlib.ExitStack() as ending:
                ending.callback(child.send_signal, signal.SIGTERM)
                ask()
        _, status, used = os.wait4(child.pid, 0)
        took = time.monotonic() - begun
        child.returncode = os.waitstatus_to_exitcode(status)
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode())
    last = (texts[1].strip().splitlines() or [""])[-1]
    return {
        "status": child.returncode,
        "result": json.loads(texts[0] or "{}"),
        "said": last,
        "seconds": round(took, 1),
        "peak_mib": used.ru_maxrss >> 10,
    }


def as_given(out: Path, weights: Path, cache: Path) -> None:
    """Make the folder of a protect that was ended early: its key, and the weights as given."""
    unfinished = out.with_name(f"{out.name}.partial")
    data = by_digest(read_json(unfinished / "config.json")["data_sha256"], cache)
    if data is None:
        raise SystemExit("protect kept no images")
    out.mkdir()
    (unfinished / "key").rename(out / "key")
    built = network(SHAPE, CLASSES)
    load_weights(built, weights)
    known = packed(known_images(data, None))
    save_model(out, built, describing(data, "memory:network", known=known))


def measure(work: Path, count: int, test_images: int) -> None:
    """Run all verbs on so many images, and print what each took."""
    os.environ[IMAGES] = str(count)
    weights, cache, out = work / "weights.safetensors", work / "cache", work / f"mine-{count}"
    named = ["--network", "memory:network"]

    def tell(verb: str, found: dict[str, Any], wanted: str, expected: str = "") -> None:
        if found["status"] and not (expected and expected in found["said"]):
            raise SystemExit(f"{verb}: {found['said']}")
        line = {"verb": verb, "images": count, "network": os.environ[NETWORK]}
        line |= {name: found[name] for name in ("peak_mib", "seconds")}
        line |= {name: found["result"].get(name) for name in wanted.split()}
        line |= {"ended": found["said"]} if found["status"] else {}
        print(json.dumps(line), flush=True)

    data = ["memory:photos", "--cache", cache, "--out", out, "--weights", weights]
    protected = run(["protect", *data, *named, "--shift", 0, "--json"])
    tell("protect", protected, "test_accuracy watermark_accuracy", "steps were wanted")
    if not out.exists():
        as_given(out, weights, cache)
    kept = [out, *named, "--cache", cache, "--json"]
    found = run(["evaluate", *kept, "--images", test_images])
    tell("evaluate", found, "test_accuracy adversarial_accuracy")
    tell("guard", run(["guard", *kept]), "cost tied foreign")
    client = client_add("anna", clients=out / "clients.json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def ask() -> None:
        image, label = Photos(count)[0]
        pixels = image.transpose(2, 0, 1).flatten().tolist()
        tensor = {"name": "image", "datatype": "UINT8", "shape": [1, *SHAPE], "data": pixels}
        headers = {"Authorization": f"Bearer {client.api_key}"}
        address = f"http://127.0.0.1:{port}/v2/models/model/infer"
        for _ in range(300):
            with contextlib.suppress(requests.ConnectionError):
                answer = requests.post(
                    address, json={"inputs": [tensor]}, headers=headers, timeout=60
                ).json()
                assert answer["outputs"][0]["data"] == [label], answer
                return
            time.sleep(0.2)
        raise SystemExit("the service did not begin")

    log = ["--log", work / f"log-{count}.db", "--port", port, "--json"]
    tell("serve", run(["serve", out, *named, *log], ask), "trials")
    sizes = {path.name: path.stat().st_size for path in out.iterdir() if path.suffix == ".json"}
    print(json.dumps({"images": count, "bytes": sizes}), flush=True)
    shutil.rmtree(out)


def main() -> None:
    """Measure each number of images."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[2000])
    parser.add_argument("--network", default="resnet50", help=f"{', '.join(DEPTHS)}, timm:NAME")
    parser.add_argument("--steps", type=int, default=10, help="of the marking; 0 for all of them")
    parser.add_argument("--test-images", type=int, default=20, help="that evaluate attacks")
    parser.add_argument("--folder", type=Path, help="where to work; default a temporary folder")
    given = parser.parse_args()
    os.environ |= {NETWORK: given.network, STEPS: "0"}
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        begun = time.monotonic()
        # In a process of its own: those that this one starts begin with its peak of memory.
        making = multiprocessing.get_context("spawn").Process(
            target=make_weights, args=(Path(folder) / "weights.safetensors",)
        )
        making.start()
        making.join()
        if making.exitcode:
            raise SystemExit("the weights were not made")
        print_lines(f"weights made in {time.monotonic() - begun:.0f} s")
        os.environ[STEPS] = str(given.steps)
        for count in given.images:
            measure(Path(folder), count, given.test_images)


if __name__ == "__main__":
    main()
