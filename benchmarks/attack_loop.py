"""The PGD loop beside torchattacks': `python benchmarks/attack_loop.py [MODEL...]`.

Without models: image-steps a second on fresh networks `small` and `paper`, 25 steps from a random start, every example kept to the end,
in one thread: torchattacks, our PGD on the network itself ("plain") and on the prepared copy ("prepared"), in turn, medians. For each
model folder given: the whole evaluation of its test images, where ours drops what is lost, with the accuracy that both find. Times are
of the processor. Prints JSON lines. `pip install --no-deps torchattacks==3.5.1 requests tqdm`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchattacks

from countermark import load
from countermark.attacks import pgd, prepare
from countermark.bundle import load_with_data
from countermark.data import load_pools, pixels
from countermark.evaluation import Attack, adversarial_accuracy
from countermark.memory import keep_freed_memory
from countermark.models import build

STEPS = 25


def seconds(run: Callable[[], Any]) -> float:
    begun = time.process_time()
    run()
    return time.process_time() - begun


def loops(network: str, batch: int, rounds: int) -> dict[str, Any]:
    model = build(network, (1, 28, 28), 10, seed=0).eval()
    prepared = prepare(model)
    x = torch.rand(batch, 1, 28, 28)
    y = model(x).argmax(1).detach()
    theirs = torchattacks.PGD(model, eps=0.25, alpha=0.01, steps=STEPS)
    runs: dict[str, Callable[[], Any]] = {
        "torchattacks": lambda: theirs(x, y),
        "plain": lambda: pgd(model, x, y, epsilon=0.25, steps=STEPS, step_size=0.01),
        "prepared": lambda: pgd(prepared, x, y, epsilon=0.25, steps=STEPS, step_size=0.01),
    }
    taken = {name: [] for name in runs}  # type: dict[str, list[float]]
    for _ in range(rounds):
        for name, run in runs.items():
            taken[name].append(seconds(run))
    rates = {name: batch * STEPS / statistics.median(times) for name, times in taken.items()}
    ratio = statistics.median(b / a for a, b in zip(taken["prepared"], taken["torchattacks"], strict=True))
    return {"network": network, "batch": batch, "image_steps_per_second": rates, "prepared_vs_torchattacks": ratio}


def evaluation(folder: Path, images: int) -> dict[str, Any]:
    model = load(folder).eval()
    _, description, catalogued = load_with_data(folder)
    test = load_pools(description.data, description.seed).test
    test = test[torch.arange(images) * len(test) // images]
    attack = Attack(description.epsilon, catalogued.steps, catalogued.step_size)
    theirs = torchattacks.PGD(model, eps=attack.epsilon, alpha=attack.step_size, steps=attack.steps)
    spent, survive = {"torchattacks": 0.0, "ours": 0.0}, {"torchattacks": 0.0, "ours": 0.0}
    for start in range(0, images, 250):
        part = test[slice(start, start + 250)]
        x, y, share = pixels(part.x), part.y, len(part) / images
        begun = time.process_time()
        points = theirs(x, y)
        with torch.no_grad():
            survive["torchattacks"] += share * 100 * float((model(points).argmax(1) == y).double().mean())
        middle = time.process_time()
        survive["ours"] += share * adversarial_accuracy(model, part, attack)
        spent["torchattacks"] += middle - begun
        spent["ours"] += time.process_time() - middle
    ratio = spent["torchattacks"] / spent["ours"]
    return {"model": str(folder), "images": images, "survive": survive, "cpu_seconds": spent, "ours_vs_torchattacks": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    for folder in arguments.models:
        print(json.dumps(evaluation(folder, arguments.images)), flush=True)
    for network in () if arguments.models else ("small", "paper"):
        for batch in (250, 128, 64):
            print(json.dumps(loops(network, batch, arguments.rounds)), flush=True)


if __name__ == "__main__":
    main()
