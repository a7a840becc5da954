"""Make the figures of docs/first-light.md from real MNIST and Fashion-MNIST.

    python benchmarks/first_light.py

For each data set and seed: protect, then the mark after pruning and fine-tuning, the stranger bank,
and 2,000 random keys against strangers. Finished parts in the folder are kept, so an interrupted
run goes on. It takes about five minutes for each data set and seed on two cores.
"""

import argparse
import json
import platform
import random
import sys
from pathlib import Path
from typing import Any

import torch

from countermark import load, protect, remove, steal, verify
from countermark.evaluation import predict
from countermark.evidence import sign_flip_test
from countermark.files import canonical_json, read_json
from countermark.memory import keep_freed_memory
from countermark.watermarks import draw_coins, leaf_secrets, load_key

PRUNED = (0.5, 0.8, 0.9)
FINETUNED = 20
KEYS = 2000
ALPHAS = (0.05, 0.01, 0.001)


def once(folder: Path, make: Any) -> dict[str, Any]:
    """Make a folder unless it is there, and return its metrics."""
    if not folder.exists():
        make()
    return read_json(folder / "metrics.json")


def asked(suspect: Path, key: Path) -> dict[str, Any]:
    found = verify(suspect, key=key)
    names = ("verdict", "agreements", "disagreements", "neither", "log10_p_value")
    return {name: getattr(found.test, name) for name in names}


def random_keys(suspect: Path, key_folder: Path) -> dict[str, Any]:
    """Summarise the randomised p-values of fresh secrets against one fixed suspect.

    The summary holds their Kolmogorov-Smirnov distance and tail rates.
    """
    key = load_key(key_folder)
    answers = predict(load(suspect), key.watermarks.x)
    heads, tails = key.watermarks.answers.unbind(1)
    signed = (answers == heads).int() - (answers == tails).int()
    generator, values = random.Random(0), []
    for _ in range(KEYS):
        secret = generator.randbytes(32)
        flips = (
            1
            - 2
            * draw_coins(
                canonical_json({**key.c1, "public_key": secret.hex()}),
                b"",
                leaf_secrets(secret, len(key.watermarks)),
            ).int()
        )
        values.append(
            sign_flip_test((signed * flips).tolist()).randomised_p_value(generator.random())
        )
    values.sort()
    distance = max(max((i + 1) / KEYS - value, value - i / KEYS) for i, value in enumerate(values))
    rates = {str(alpha): sum(value <= alpha for value in values) / KEYS for alpha in ALPHAS}
    return {"ks_times_sqrt_n": distance * KEYS**0.5, "rates": rates}


def study(data: str, seed: int, out: Path) -> dict[str, Any]:
    base = out / f"{data}-{seed}"
    model, key = base / "model", base / "model" / "key"
    made = once(model, lambda: protect(data, out=model, seed=seed))
    suspects: dict[str, dict[str, Any]] = {"model": {**made, **asked(model, key)}}
    for rate in PRUNED:
        folder = base / f"pruned-{rate}"
        metrics = once(
            folder, lambda rate=rate, folder=folder: remove(model, out=folder, prune=rate)
        )
        suspects[f"pruned {rate:.0%}"] = {**metrics, **asked(folder, key)}
    tuned = base / "finetuned"
    metrics = once(tuned, lambda: remove(model, out=tuned, finetune=FINETUNED))
    suspects[f"fine-tuned {FINETUNED} epochs"] = {**metrics, **asked(tuned, key)}
    strangers = {
        "robust stranger": ("robust", {"seed": seed + 100}),
        "standard stranger": ("standard", {"seed": seed + 200, "objective": "standard"}),
    }
    for title, (name, options) in strangers.items():
        place = base / name
        metrics = once(
            place,
            lambda place=place, options=options: protect(data, out=place, scheme="none", **options),
        )
        suspects[title] = {**metrics, **asked(place, key)}
    stolen = base / "black"
    metrics = once(
        stolen, lambda: steal(base / "robust", setting="black", out=stolen, queries=12_800)
    )
    suspects["black-box theft of a stranger"] = {**metrics, **asked(stolen, key)}
    suspects["the source model, before the mark"] = {
        "test_accuracy": made["unmarked_test_accuracy"],
        "adversarial_accuracy": made["unmarked_adversarial_accuracy"],
        **asked(key / "source", key),
    }
    keys = {
        "robust stranger": random_keys(base / "robust", key),
        "source model": random_keys(key / "source", key),
    }
    return {
        "data": data,
        "seed": seed,
        "seconds_to_protect": made["seconds"],
        "suspects": suspects,
        "random_keys": keys,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", nargs="+", default=["mnist", "fashion_mnist"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/first_light"))
    parser.add_argument("--results", type=Path, default=Path("benchmarks/first_light.json"))
    arguments = parser.parse_args()
    keep_freed_memory()
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    studies = []
    for seed in arguments.seeds:
        for data in arguments.data:
            studies.append(study(data, seed, arguments.out))
            arguments.results.write_text(
                json.dumps({"machine": machine, "studies": studies}, indent=1) + "\n"
            )
            show(studies[-1])
    return 0


def show(result: dict[str, Any]) -> None:
    print(
        f"\n{result['data']}, seed {result['seed']} "
        f"(protect: {result['seconds_to_protect']:.0f} s)\n"
    )
    print("| suspect | test | adversarial | coins | log10 p | verdict |\n|---|---|---|---|---|---|")
    for title, row in result["suspects"].items():
        coins = f"{row['agreements']}:{row['disagreements']}"
        accuracies = f"{row['test_accuracy']:.2f} | {row['adversarial_accuracy']:.2f}"
        print(
            f"| {title} | {accuracies} | {coins} | {row['log10_p_value']:.1f} | {row['verdict']} |"
        )
    for title, found in result["random_keys"].items():
        print(
            f"\n{KEYS} random keys against the {title}: "
            f"KS x sqrt(n) {found['ks_times_sqrt_n']:.2f}, p <= alpha at {found['rates']}"
        )
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
