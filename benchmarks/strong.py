"""Make the figures of the recipe `strong`, one JSON line for each model.

    python benchmarks/strong.py --data mnist --epsilon 0.3 --seeds 0

Each model folder holds the marked model and, in its key, the unmarked one that it came from. Both
are measured on test images taken evenly from the pool: test accuracy, the data set's own PGD, and
strict accuracy, as `evaluate --strict` measures it. Finished folders are kept.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from countermark import protect, verify
from countermark.attacks import computes_bf16
from countermark.data import Examples, known, load_pools
from countermark.evaluation import accuracy, adversarial_accuracy, strict_accuracy
from countermark.files import read_json
from countermark.memory import keep_freed_memory
from countermark.networks import load_model
from countermark.threat import Attack


def measured(
    network: nn.Module, data: str, epsilon: float, test: Examples, images: int
) -> dict[str, Any]:
    begun, part = time.monotonic(), test[:: max(1, len(test) // images)]
    attack = Attack(epsilon, known(data).threat.steps, known(data).threat.step_size)
    strict = strict_accuracy(network, part, attack)
    return {
        "test_accuracy": accuracy(network, test),
        "pgd_accuracy": adversarial_accuracy(network, test, attack),
        "pgd_accuracy_of_part": strict.adversarial_accuracy,
        "strict_accuracy_of_part": strict.strict_accuracy,
        "images": len(part),
        "seconds_to_measure": time.monotonic() - begun,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--epsilon", type=float)
    parser.add_argument("--objective", default="strong")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--images", type=int, default=1000, help="test images of the strict figure")
    parser.add_argument("--out", type=Path, default=Path("runs/strong"))
    arguments = parser.parse_args()
    keep_freed_memory()
    epsilon = arguments.epsilon or known(arguments.data).threat.epsilon
    for seed in arguments.seeds:
        folder = arguments.out / f"{arguments.data}-{epsilon:g}-{arguments.objective}-{seed}"
        if not folder.exists():
            protect(
                arguments.data,
                epsilon=epsilon,
                objective=arguments.objective,
                seed=seed,
                out=folder,
            )
        coins = verify(folder, key=folder / "key")
        made = {
            "data": arguments.data,
            "epsilon": epsilon,
            "objective": arguments.objective,
            "seed": seed,
            "precision": "bf16-mixed" if computes_bf16("cpu") else "32-true",
            "threads": torch.get_num_threads(),
        }
        made |= {
            "seconds_to_protect": read_json(folder / "metrics.json")["seconds"],
            "coins": f"{coins.test.agreements}:{coins.test.disagreements}",
        }
        test = load_pools(arguments.data, seed).test
        for name, place in (("unmarked", folder / "key" / "source"), ("marked", folder)):
            network, description = load_model(place)
            found = measured(network, arguments.data, epsilon, test, arguments.images)
            print(
                json.dumps({**made, "model": name, "network": description.network, **found}),
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
