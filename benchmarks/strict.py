"""Run the strict evaluation beside AutoAttack packages, on one model and the same images.

    python benchmarks/strict.py MODEL...

Ours, pyautoattack and torchattacks each run their standard L-inf evaluation of the network (in
PyTorch's own layers) in one thread. They take turns on each chunk of images, so that other load on
the machine meets all of them alike. Times are CPU times, which other programs do not lengthen much.
Prints one JSON object a line: the parts as they are done, then for each model the sums, the ratios
to ours, the accuracies and how the verdicts differ image by image. `make bench` installs the peers.
"""

import argparse
import contextlib
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from countermark import load
from countermark.attacks import pgd, strict
from countermark.data import pixels
from countermark.memory import keep_freed_memory
from countermark.networks import describe, open_declared
from stock import stock

Judge = Callable[
    [nn.Module, torch.Tensor, torch.Tensor, float], torch.Tensor
]  # model, x, y, epsilon to points

_CHUNK = 250


def ours(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epsilon: float) -> torch.Tensor:
    torch.manual_seed(0)
    return strict(model, x, y, epsilon=epsilon).points


def pyautoattack(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, epsilon: float
) -> torch.Tensor:
    from pyautoattack import AutoAttack

    points, _ = AutoAttack(model, eps=epsilon, seed=0).run_standard_evaluation(
        x, y, batch_size=_CHUNK
    )
    return torch.as_tensor(points)


def torchattacks(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, epsilon: float
) -> torch.Tensor:
    from torchattacks import AutoAttack

    return torch.as_tensor(
        AutoAttack(model, norm="Linf", eps=epsilon, version="standard", n_classes=10, seed=0)(x, y)
    )


JUDGES: dict[str, Judge] = {
    "countermark": ours,
    "pyautoattack": pyautoattack,
    "torchattacks": torchattacks,
}


def compare(folder: Path, images: int, names: list[str], data: str | None = None) -> dict[str, Any]:
    """Run the judges `names` on a model folder, whose data may be at another place by now."""
    model = stock(load(folder)).eval()
    description = describe(folder)
    test = open_declared(description, data=data).test
    test = test[torch.arange(images) * len(test) // images]
    seconds = dict.fromkeys(names, 0.0)
    standing: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    weak = 0
    for start in range(0, images, _CHUNK):
        part = test[slice(start, start + _CHUNK)]
        x, y = pixels(part.x), part.y
        torch.manual_seed(0)
        points = pgd(
            model,
            x,
            y,
            epsilon=description.epsilon,
            steps=description.threat.steps,
            step_size=description.threat.step_size,
            stop_when_lost=True,
        )
        weak += int((model(points).argmax(1) == y).sum())
        for name in names:
            begun = time.process_time()
            with contextlib.redirect_stdout(io.StringIO()):
                points = JUDGES[name](model, x, y, description.epsilon)
            took = time.process_time() - begun
            assert float((points - x).abs().max()) <= description.epsilon + 1e-5, (
                f"{name} left the ball"
            )
            with torch.no_grad():
                standing[name].append(model(points).argmax(1) == y)
            seconds[name] += took
            print(
                json.dumps(
                    {"model": str(folder), "from": start, "judge": name, "cpu_seconds": took}
                ),
                flush=True,
            )
    verdicts = {name: torch.cat(parts) for name, parts in standing.items()}
    mine = verdicts["countermark"]
    result = {
        "model": str(folder),
        "images": images,
        "epsilon": description.epsilon,
        "pgd": 100 * weak / images,
        "strict": {name: 100 * float(kept.double().mean()) for name, kept in verdicts.items()},
        "all_together": 100 * float(torch.stack(list(verdicts.values())).all(0).double().mean()),
        "only_ours_broke": {name: int((kept & ~mine).sum()) for name, kept in verdicts.items()},
        "only_theirs_broke": {name: int((mine & ~kept).sum()) for name, kept in verdicts.items()},
        "cpu_seconds": seconds,
        "times_ours": {name: took / seconds["countermark"] for name, took in seconds.items()},
    }
    print(json.dumps(result), flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument(
        "--judges",
        nargs="+",
        choices=[name for name in JUDGES if name != "countermark"],
        default=["pyautoattack"],
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    for folder in arguments.models:
        compare(folder, arguments.images, ["countermark", *arguments.judges])


if __name__ == "__main__":
    main()
