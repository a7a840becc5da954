"""ResNet-18 on CIFAR-10 on a GPU: how fast it trains, and what a protected model is worth.

    benchmarks/gpu.sh KIT cuda colour speed                steps a second, beside plain PyTorch
    benchmarks/gpu.sh KIT cuda colour protect --epochs 60  protect, evaluate --strict, prune, verify
    benchmarks/gpu.sh KIT cuda colour search --epochs 20   recipes beside each other, on validation

Speeds are those of the product's own training loop, on made-up images; the second of two epochs
counts. A pass is one forward and one backward pass of one image; an attack step is one pass.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn
from torch.nn import functional

from countermark import evaluate, protect, remove, verify
from countermark.choices import Recipe
from countermark.data import Examples, open_data
from countermark.device import describe, resolve_device
from countermark.evaluation import accuracy, adversarial_accuracy, strict_accuracy
from countermark.fast import captured
from countermark.networks import build
from countermark.threat import COLOUR, Attack
from countermark.training import Hardware, TrainConfig, fitted, recipe, train, traits
from countermark.training.recipes import Traits
from gpu import photographs

BATCH = 128
SMALL = bool(os.environ.get("SMALL"))
NETWORK = "narrow" if SMALL else "resnet"
RECIPES: dict[str, Callable[[TrainConfig], TrainConfig]] = {
    "strong": lambda config: config,
    "no push": lambda config: replace(config, push=0.0),
    "push 0.01": lambda config: replace(config, push=0.01),
    "budget 1.0": lambda config: replace(config, attack=Attack(8 / 255, 3, 4 / 255)),
    "warm-up 0.15": lambda config: replace(config, warmup=0.15),
}
STEPS = 4 if SMALL else 200  # of an epoch


def made_up(shape: tuple[int, int, int]) -> Examples:
    """Random images and labels of ten classes."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (STEPS * BATCH, *shape), generator=draw, dtype=torch.uint8)
    return Examples(x, torch.randint(0, 10, (len(x),), generator=draw))


def an_epoch(network: nn.Module, examples: Examples, config: TrainConfig) -> float:
    """Seconds of the second epoch."""
    ends = []

    def tell(_epoch: int, _network: nn.Module) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter())

    train(network, examples, replace(config, epochs=2), after_epoch=tell)
    return ends[1] - ends[0]


def plain(network: nn.Module, device: torch.device, batch: int, replayed: bool) -> float:
    """Images a second through plain bf16 forward and backward passes of PyTorch."""
    network = network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.rand(batch, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    y = torch.zeros(batch, dtype=torch.long, device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=not replayed):
            logits = network(x)
        functional.cross_entropy(logits.float(), y).backward()  # type: ignore[no-untyped-call]
        network.zero_grad(set_to_none=True)

    run = captured(step, device) if replayed else step
    for _ in range(3):
        run()
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else int
    wait()
    count, begun = (2 if SMALL else 100), time.perf_counter()
    for _ in range(count):
        run()
    wait()
    return count * batch / (time.perf_counter() - begun)


def speed(device: torch.device, out: Path) -> dict[str, Any]:
    """Steps a second on the paper's network, and the share of plain passes on ResNet-18."""
    on = Hardware(str(device), precision="bf16-mixed")
    found: dict[str, Any] = {}
    attack = Attack(0.3, 25, 0.03)
    config = recipe(Traits("ink", 50_000), "pgd", COLOUR, hardware=on)
    config = replace(config, attack=attack)
    seconds = an_epoch(build("paper", (1, 28, 28), 10), made_up((1, 28, 28)), config)
    found["paper, image-steps a second"] = STEPS * BATCH * attack.steps / seconds
    note(found)
    passes = {}
    for batch in (BATCH, 4 * BATCH):
        for replayed in (False, True) if device.type == "cuda" else (False,):
            name = f"resnet, plain passes a second, batch {batch}{', replayed' * replayed}"
            passes[name] = plain(build(NETWORK, (3, 32, 32), 10), device, batch, replayed)
    found |= passes
    note(found)
    for objective in ("fast", "strong"):
        given, network = Traits("colour", 37_500, True, 4), build(NETWORK, (3, 32, 32), 10)
        config = recipe(given, objective, COLOUR, hardware=on)
        config = fitted(config, given, objective, network)
        assert config.attack is not None
        seconds = an_epoch(network, made_up((3, 32, 32)), config)
        each = config.attack.steps + 1 + bool(config.push)
        found[f"resnet, {objective}, milliseconds a step"] = 1000 * seconds / STEPS
        found[f"resnet, {objective}, passes a second"] = STEPS * BATCH * each / seconds
        found[f"resnet, {objective}, share of plain"] = (
            STEPS * BATCH * each / seconds / max(passes.values())
        )
        note(found)
    if device.type == "cuda":
        kernels(config, out / "kernels.txt")
    return found


def kernels(config: TrainConfig, path: Path) -> None:
    """Write down which kernels an epoch of training spends its time on."""
    from torch.profiler import ProfilerActivity, profile

    few = made_up((3, 32, 32))[: 20 * BATCH]
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        an_epoch(build(NETWORK, (3, 32, 32), 10), few, config)
    path.write_text(seen.key_averages().table(sort_by="cuda_time_total", row_limit=25))


def note(found: dict[str, Any]) -> None:
    """Print the last figure, for whoever waits."""
    name = list(found)[-1]
    sys.stdout.write(f"{name}: {found[name]:,.2f}\n")
    sys.stdout.flush()


def search(place: Path, epochs: int, device: torch.device) -> dict[str, Any]:
    """Train the unmarked network by each of `RECIPES`; everything is measured on validation images.

    PGD is on all of them, and the strict accuracy on every fourth.
    """
    data = open_data(place)
    pools = data.pools(0)
    given = traits(data, pools.training, mirror=True)
    found: dict[str, Any] = {}
    for name, change in RECIPES.items():
        network = build(NETWORK, data.shape, data.classes)
        made = recipe(given, "strong", data.threat, hardware=Hardware(str(device)), epochs=epochs)
        config = change(fitted(made, given, "strong", network))
        begun = time.perf_counter()
        train(network, pools.training, config, title=name)
        found[f"{name}, seconds"] = time.perf_counter() - begun
        note(found)
        found[f"{name}, validation"] = accuracy(network, pools.validation)
        note(found)
        attack = replace(data.threat.attack, steps=20, step_size=data.threat.epsilon / 4)
        found[f"{name}, PGD-20"] = adversarial_accuracy(network, pools.validation, attack)
        note(found)
        few = pools.validation[torch.arange(0, len(pools.validation), 4)]
        found[f"{name}, strict"] = strict_accuracy(network, few, attack).strict_accuracy
        note(found)
    return found


def story(place: Path, work: Path, epochs: int, objective: Recipe, device: str) -> dict[str, Any]:
    """Protect the network, and measure it and two copies."""
    model = work / f"resnet-{objective}-{epochs}"
    found: dict[str, Any] = {"epochs": epochs, "objective": objective}

    def timed(name: str, run: Callable[[], Any], *shown: str) -> Any:
        begun = time.perf_counter()
        result = run()
        found[f"{name}, seconds"] = time.perf_counter() - begun
        note(found)
        for each in shown:
            found[f"{name}, {each}"] = getattr(result, each)
            if found[f"{name}, {each}"] is not None:
                note(found)
        return result

    timed(
        "protect",
        lambda: protect(
            place,
            out=model,
            network=NETWORK,
            objective=objective,
            epochs=epochs,
            mirror=True,
            device=device,
        ),
        "test_accuracy",
        "adversarial_accuracy",
        "watermark_accuracy",
    )
    images = 50 if SMALL else 1000
    strict = timed(
        "evaluate", lambda: evaluate(model, strict=True, images=images, steps=20, device=device)
    )
    found["evaluate, test accuracy"] = strict.test_accuracy
    found["evaluate, PGD-20"] = strict.adversarial_accuracy
    found["evaluate, strict"] = strict.strict.strict_accuracy
    note(found)
    timed(
        "prune", lambda: remove(model, prune=0.5, out=work / f"{model.name}-pruned", device=device)
    )
    for name, suspect in (("", model), (" pruned", work / f"{model.name}-pruned")):
        judged = timed(f"verify{name}", partial(verify, suspect, key=model / "key", device=device))
        found[f"verify{name}"] = f"{judged.test.agreements}:{judged.test.disagreements}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kit", type=Path)
    parser.add_argument("device")
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("part", choices=("speed", "protect", "search"))
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--objective", choices=get_args(Recipe), default="strong")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    device = resolve_device(given.device)
    if given.part == "speed":
        found = speed(device, given.out)
    elif given.part == "search":
        found = search(photographs(given.kit, given.work, 20 if SMALL else 1), given.epochs, device)
    else:
        place = photographs(given.kit, given.work, 20 if SMALL else 1)
        found = story(place, given.work, given.epochs, given.objective, given.device)
    told = {"device": describe(device, "auto"), "torch": torch.__version__, **found}
    (given.out / f"colour-{given.part}.json").write_text(json.dumps(told, indent=1))
    sys.stdout.write(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
