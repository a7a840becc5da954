"""Compare Countermark with its peers on one machine.

`make bench` runs this and writes benchmarks/results.json and docs/performance.md.

Every ratio comes from one run: the contenders use the same network (in PyTorch's own layers),
images, steps and threads, take turns, and are compared by their medians over the rounds. Finished
parts are kept in runs/bench, so that an interrupted run goes on there; `--parts NAME ...` makes
the named parts again.

    gemm      what a matrix product reaches here, float32 and bf16
    pgd       PGD on the paper's network and on the small one, against torchattacks, foolbox and ART
    strict    the strict evaluation of 1,000 images against pyautoattack's standard run
    recipe    time to the paper's adversarial accuracy, against the paper's recipe as a torchattacks
              loop
    scaling   time and memory of protect, evaluate, verify and trace as their inputs grow by 10 and
              100 (benchmarks/scaling.py)
    strong    nothing is run: the figures of benchmarks/strong.jsonl, which benchmarks/strong.py
              takes hours to make
"""

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from countermark.attacks import computes_bf16, pgd
from countermark.data import Examples, known, load_pools, open_data, pixels
from countermark.evaluation import accuracy, adversarial_accuracy
from countermark.fast import prepare
from countermark.files import read_json, write_bytes, write_json
from countermark.memory import keep_freed_memory
from countermark.networks import describing, load_model, save_model
from countermark.networks.named import build
from countermark.threat import Attack
from countermark.training import known_traits, recipe, train
from stock import stock

DONE = Path("runs/bench")
STRONG = Path(__file__).with_name("strong.jsonl")
RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
PAPER = {"mnist": 92.82, "fashion_mnist": 70.95}
"""Adversarial accuracy of the paper's models, in percent (Thakkar, Zizzo and Maffeis, 2023)."""
EPOCHS = {"mnist": 3, "fashion_mnist": 3}
"""Epochs of our recipe on the paper's network, chosen on validation examples (docs/log.md)."""

Crafting = Callable[[nn.Module, torch.Tensor, torch.Tensor, Attack], torch.Tensor]


def ours(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    attack: Attack,
    kind: torch.dtype = torch.float32,
    dropping: bool = False,
) -> torch.Tensor:
    """Run our loop on a prepared network.

    Steps on lost examples are saved only if `dropping`, since the peers save none.
    """
    steps = {"epsilon": attack.epsilon, "steps": attack.steps, "step_size": attack.step_size}
    return pgd(prepare(model, kind), x, y, stop_when_lost=dropping, **steps)  # type: ignore[arg-type]


def by_torchattacks(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, attack: Attack
) -> torch.Tensor:
    """Torchattacks' PGD."""
    import torchattacks

    points: torch.Tensor = torchattacks.PGD(
        model, eps=attack.epsilon, alpha=attack.step_size, steps=attack.steps, random_start=True
    )(x, y)
    return points


def by_foolbox(model: nn.Module, x: torch.Tensor, y: torch.Tensor, attack: Attack) -> torch.Tensor:
    """Foolbox's LinfPGD."""
    import foolbox

    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
    run = foolbox.attacks.LinfPGD(
        abs_stepsize=attack.step_size, steps=attack.steps, random_start=True
    )
    points: torch.Tensor = run(wrapped, x, y, epsilons=attack.epsilon)[1]
    return points


def by_art(model: nn.Module, x: torch.Tensor, y: torch.Tensor, attack: Attack) -> torch.Tensor:
    """ART's PGD for PyTorch."""
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        model,
        nn.CrossEntropyLoss(),
        tuple(x.shape[1:]),
        10,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    run = ProjectedGradientDescentPyTorch(
        classifier,
        eps=attack.epsilon,
        eps_step=attack.step_size,
        max_iter=attack.steps,
        num_random_init=1,
        batch_size=len(x),
        verbose=False,
    )
    return torch.from_numpy(run.generate(x.numpy(), y.numpy()))


CONTENDERS: dict[str, Crafting] = {
    "countermark": ours,
    "countermark, lost examples dropped": partial(ours, dropping=True),
    "torchattacks": by_torchattacks,
    "foolbox": by_foolbox,
    "art": by_art,
}


def gemm() -> dict[str, Any]:
    """The fastest matrix product that this machine does, in GFLOP/s, by precision."""
    found: dict[str, Any] = {"threads": torch.get_num_threads()}
    for name, kind in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        rates = []
        for n in (512, 1024, 2048):
            a, b = torch.randn(n, n).to(kind), torch.randn(n, n).to(kind)
            a @ b
            for _ in range(4):
                begun = time.perf_counter()
                a @ b
                rates.append(2 * n**3 / (time.perf_counter() - begun) / 1e9)
        found[name] = max(rates)
    found["bf16_in_hardware"] = computes_bf16("cpu")
    return found


def speed(
    network: str,
    data: str,
    model: nn.Module,
    contenders: dict[str, Crafting],
    images: int,
    rounds: int,
) -> dict[str, Any]:
    """Seconds of each contender's PGD, in turn, and the accuracy that it leaves."""
    catalogued = known(data)
    attack = Attack(catalogued.threat.epsilon, catalogued.threat.steps, catalogued.threat.step_size)
    test = load_pools(data, 0).test[slice(0, images)]
    x, y = pixels(test.x), test.y
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    left: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):  # the first is a warm-up
        for name, craft in contenders.items():
            torch.manual_seed(number)
            begun = time.process_time()
            points = torch.cat(
                [
                    craft(model, a, b, attack)
                    for a, b in zip(torch.split(x, 250), torch.split(y, 250), strict=True)
                ]
            )
            took = time.process_time() - begun
            if number:
                seconds[name].append(took)
            with torch.no_grad():
                left[name].append(
                    100
                    * float(
                        (
                            torch.cat([model(part) for part in torch.split(points, 250)]).argmax(1)
                            == y
                        )
                        .double()
                        .mean()
                    )
                )
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    peers = [name for name in contenders if "countermark" not in name]
    return {
        "network": network,
        "data": data,
        "images": images,
        "steps": attack.steps,
        "seconds": seconds,
        "image_steps_per_second": {
            name: images * attack.steps / took for name, took in middle.items()
        },
        "times_as_fast": {
            name: {peer: middle[peer] / middle[name] for peer in peers}
            for name in middle
            if name not in peers
        },
        "accuracy_left": {name: statistics.mean(rates) for name, rates in left.items()},
        "threads": torch.get_num_threads(),
    }


def flops(model: nn.Module, shape: tuple[int, int, int]) -> float:
    """Count the floating-point operations of one image in one attack step.

    These are the operations of convolutions and linear layers, forward and backward to the input.
    """
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.rand(1, *shape).requires_grad_()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return float(counter.get_total_flops())


def paper_recipe_epoch(data: str, network: str, training: Examples, steps: int) -> float:
    """Return the CPU seconds for an epoch of the paper's recipe as a torchattacks loop.

    They are extrapolated from `steps` batches of 128 images.
    """
    import torchattacks

    catalogued = known(data)
    model = build(network, catalogued.shape, catalogued.classes, seed=1).train()
    run = torchattacks.PGD(
        model,
        eps=catalogued.threat.epsilon,
        alpha=catalogued.threat.step_size,
        steps=catalogued.threat.steps,
    )
    optimiser = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9, weight_decay=5e-4)
    x, y = pixels(training.x[: 128 * (steps + 1)]), training.y[: 128 * (steps + 1)]
    begun = 0.0
    for number, (a, b) in enumerate(zip(torch.split(x, 128), torch.split(y, 128), strict=True)):
        if number == 1:
            begun = time.process_time()
        crafted = run(a, b)
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(crafted), b).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return (time.process_time() - begun) / steps * (len(training) / 128)


def trained(data: str, network: str, anew: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """Train with the recipe `fast`, unmarked, and return the model and its metrics.

    The metrics include the CPU seconds that the training took. The model is kept as a model folder
    in runs/bench, and is trained only if it is not there or if `anew`.
    """
    catalogued, folder = known(data), DONE / f"{network}-{data}"
    if (folder / "metrics.json").exists() and not anew:
        return load_model(folder)[0], read_json(folder / "metrics.json")
    model = build(network, catalogued.shape, catalogued.classes, seed=0)
    pools = load_pools(data, 0)
    config = recipe(known_traits(data), "fast", catalogued.threat, seed=0)
    if network == "paper":  # so few passes want a higher rate and a longer step
        attack = Attack(catalogued.threat.epsilon, 1, 0.75 * catalogued.threat.epsilon)
        config = replace(
            config, attack=attack, epochs=EPOCHS[data], learning_rate=0.2, average=0.99
        )
    begun = time.process_time()
    records = train(
        model, pools.training, config, validation=pools.validation, title=f"{network}, {data}"
    )
    took = time.process_time() - begun
    attack = Attack(catalogued.threat.epsilon, catalogued.threat.steps, catalogued.threat.step_size)
    made = {
        "seconds": took,
        "epochs": len(records),
        "test_accuracy": accuracy(model, pools.test),
        "adversarial_accuracy": adversarial_accuracy(
            model, pools.test, attack, title="the paper's PGD"
        ),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder, model, describing(open_data(data), network))
    write_json(folder / "metrics.json", made)
    return model.eval(), made


def recipes(steps: int) -> dict[str, Any]:
    """Time to the paper's adversarial accuracy, both sides on the paper's network."""
    found: dict[str, Any] = {}
    for data, wanted in PAPER.items():
        before = paper_recipe_epoch(data, "paper", load_pools(data, 0).training, steps)
        _, made = trained(data, "paper", anew=True)  # a ratio is of one run
        after = paper_recipe_epoch(data, "paper", load_pools(data, 0).training, steps)
        epoch = (before + after) / 2
        found[data] = {
            **made,
            "wanted": wanted,
            "reached": made["adversarial_accuracy"] >= wanted,
            "paper_epoch_seconds": [before, after],
            "speedup": 100 * epoch / made["seconds"],
        }
    return found


def strict_part(folders: list[Path], images: int) -> list[dict[str, Any]]:
    """Our strict evaluation against pyautoattack's, on one thread (benchmarks/strict.py)."""
    from strict import compare

    for data in () if folders else PAPER:
        trained(data, "small")
    return [
        compare(folder, images, ["countermark", "pyautoattack"])
        for folder in folders or [DONE / f"small-{data}" for data in PAPER]
    ]


def scaling_part() -> list[dict[str, Any]]:
    """Growth of time and memory (benchmarks/scaling.py), and its plot."""
    from scaling import draw, measured

    points = measured()
    draw(points, PAGE.with_name("scaling.svg"))
    return [{**point, "processor": about()["processor"]} for point in points]


def pgd_part(images: int, rounds: int) -> dict[str, Any]:
    """PGD on both networks."""
    found = {}
    for network in ("paper", "small"):
        model = stock(trained("mnist", network)[0]).eval()
        contenders = dict(CONTENDERS)
        if computes_bf16("cpu"):
            contenders["countermark, bf16"] = partial(ours, kind=torch.bfloat16)
        found[network] = speed(network, "mnist", model, contenders, images, rounds) | {
            "flops_of_a_step": flops(model, (1, 28, 28))
        }
    return found


def summary(parts: dict[str, Any]) -> dict[str, Any]:
    """Return the figures by the names under which they are quoted.

    A figure that this machine, or this run, does not have is null.
    """
    top: dict[str, Any] = {}
    if "pgd" in parts:
        paper, small = parts["pgd"]["paper"], parts["pgd"]["small"]
        bf16 = paper["times_as_fast"].get("countermark, bf16")
        top["pgd_paper_bf16_vs_torchattacks"] = None if bf16 is None else bf16["torchattacks"]
        top["pgd_paper_fp32_vs_torchattacks"] = paper["times_as_fast"]["countermark"][
            "torchattacks"
        ]
        quickest = (
            "countermark" if bf16 is None else "countermark, bf16"
        )  # what evaluation takes on this processor
        left = [
            (name, found["accuracy_left"])
            for found in (paper, small)
            for name in found["accuracy_left"]
            if "countermark" in name
        ]
        top["pgd_disagreement"] = max(
            abs(rates[name] - rates["torchattacks"]) for name, rates in left
        )
        top["pgd_small_vs_torchattacks"] = small["times_as_fast"][quickest]["torchattacks"]
        if "gemm" in parts:
            rate = paper["image_steps_per_second"][quickest] * paper["flops_of_a_step"] / 1e9
            top["gemm_ceiling_fraction"] = (
                rate / parts["gemm"]["float32" if bf16 is None else "bfloat16"]
            )
    if "strict" in parts:
        top["strict_evaluation_speedup"] = min(
            one["times_ours"]["pyautoattack"] for one in parts["strict"]
        )
        top["strict_disagreement"] = max(
            abs(one["strict"]["countermark"] - one["strict"]["pyautoattack"])
            for one in parts["strict"]
        )
    for data, made in parts.get("recipe", {}).items():
        top[f"recipe_speedup_{data}"] = made["speedup"] if made["reached"] else None
    protected = protected_runs(parts)
    for (objective, data, epsilon, model), runs in protected.items():
        if objective == "strong" and model == "marked":
            top[f"strict_accuracy_{data}_{epsilon:g}"] = statistics.mean(
                run["strict_accuracy_of_part"] for run in runs
            )
    pairs = [
        (runs, protected[objective, data, epsilon, "unmarked"])
        for (objective, data, epsilon, model), runs in protected.items()
        if model == "marked"
    ]
    gained = [
        one["strict_accuracy_of_part"] - other["strict_accuracy_of_part"]
        for pair in pairs
        for one, other in zip(*pair, strict=True)
    ]
    if gained:
        top["strict_lost_by_marking"] = -min(gained)
    return top


def protected_runs(
    parts: dict[str, Any],
) -> dict[tuple[str, str, float, str], list[dict[str, Any]]]:
    """Group the models of benchmarks/strong.jsonl by recipe, data set, budget, and marked or not.

    Each group holds all seeds.
    """
    found: dict[tuple[str, str, float, str], list[dict[str, Any]]] = {}
    for run in parts.get("strong", []):
        found.setdefault((run["objective"], run["data"], run["epsilon"], run["model"]), []).append(
            run
        )
    return found


TARGETS = {
    "pgd_paper_bf16_vs_torchattacks": (12.0, "PGD, paper's network, bf16, times torchattacks"),
    "pgd_paper_fp32_vs_torchattacks": (1.5, "PGD, paper's network, float32, times torchattacks"),
    "pgd_small_vs_torchattacks": (
        3.0,
        "PGD, small network, bf16 where the processor has it, times torchattacks",
    ),
    "gemm_ceiling_fraction": (
        0.4,
        "share of the measured matrix-product ceiling in that loop, "
        "counting the operations of direct convolutions",
    ),
    "strict_evaluation_speedup": (
        4.0,
        "strict evaluation, times pyautoattack (the slower of the models below)",
    ),
    "recipe_speedup_mnist": (
        300.0,
        "time to the paper's adversarial accuracy, MNIST, times less than its recipe",
    ),
    "recipe_speedup_fashion_mnist": (300.0, "the same, Fashion-MNIST"),
}
AT_MOST = {
    "pgd_disagreement": (0.3, "what PGD leaves, furthest from torchattacks, points"),
    "strict_disagreement": (0.3, "strict accuracy, furthest from pyautoattack, points"),
    "strict_lost_by_marking": (
        0.5,
        "strict accuracy that marking costs, points, the worst of the models below",
    ),
}
STRICT = {
    "strict_accuracy_mnist_0.3": 93.0,
    "strict_accuracy_mnist_0.25": 94.0,
    "strict_accuracy_fashion_mnist_0.15": 71.0,
}


def write_page(record: dict[str, Any]) -> None:
    """docs/performance.md: every figure of results.json in tables."""
    parts, machine = record["runs"], record["machine"]
    lines = [
        "# Performance",
        "",
        "Written by `make bench` out of benchmarks/results.json.",
        f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}.",
        "Ratios are of one run: the same network in PyTorch's own layers, the same images and",
        "steps, one thread, the contenders in turn, medians of the processor's time.",
        "[The log](log.md) says where the time goes, and what was tried.",
        "",
        "| | wanted | measured |",
        "|---|---|---|",
    ]
    for name, (wanted, what) in TARGETS.items():
        if name in record:
            value = record[name]
            shown = (
                "not on this machine"
                if name.endswith("bf16_vs_torchattacks") and value is None
                else "not reached"
                if value is None
                else f"{value:.2f}"
            )
            lines.append(f"| {what} | {wanted:g} | {shown} |")
    lines += [
        f"| {what} | at most {most:g} | {record[name]:.2f} |"
        for name, (most, what) in AT_MOST.items()
        if name in record
    ]
    for name, value in record.items():
        if name.startswith("strict_accuracy"):
            lines.append(
                f"| {name.replace('_', ' ')}, marked, mean over the seeds "
                f"| {STRICT.get(name, '')} | {value:.1f} |"
            )
    lines += (
        _pgd_lines(parts)
        + _recipe_lines(parts)
        + _strict_lines(parts)
        + _strong_lines(parts)
        + _scaling_lines(parts)
    )
    write_bytes(PAGE, ("\n".join(lines) + "\n").encode())


def _pgd_lines(parts: dict[str, Any]) -> list[str]:
    networks = parts.get("pgd", {})
    settings = dict.fromkeys(
        f"{found['images']} images of {found['data']}, {found['steps']} steps, "
        f"{found['threads']} thread(s)."
        for found in networks.values()
    )
    notes = [
        *settings,
        "Images x steps a second, and in brackets times as fast as torchattacks.",
    ]
    if "gemm" in parts:
        ceiling = parts["gemm"]
        notes += [
            f"The fastest matrix product here: {ceiling['float32']:,.0f} GFLOP/s in float32, "
            f"{ceiling['bfloat16']:,.0f} in bfloat16",
            f"({'with' if ceiling['bf16_in_hardware'] else 'without'} bf16 in hardware), "
            f"{ceiling['threads']} thread(s).",
        ]
    contenders = dict.fromkeys(name for found in networks.values() for name in found["seconds"])
    rows = [
        [name, *(cell for found in networks.values() for cell in _contender(found, name))]
        for name in contenders
    ]
    columns = " | ".join(f"network `{network}` | accuracy left" for network in networks)
    return _section("PGD", [*notes, ""], f"| {columns}", rows)


def _contender(found: dict[str, Any], name: str) -> tuple[str, str]:
    """Return the rate of a contender on a network, and the accuracy that it leaves."""
    rates = found["image_steps_per_second"]
    times = rates[name] / rates["torchattacks"]
    return f"{rates[name]:,.0f} ({times:.2f})", f"{found['accuracy_left'][name]:.1f}"


def _section(title: str, notes: list[str], columns: str, rows: list[list[str]]) -> list[str]:
    """Return a heading, the notes, and a table of the `columns`; nothing if there are no rows."""
    if not rows:
        return []
    head = [f"| {columns} |", "|" + "---|" * len(rows[0])]
    return ["", f"## {title}", "", *notes, *head, *("| " + " | ".join(row) + " |" for row in rows)]


def _recipe_lines(parts: dict[str, Any]) -> list[str]:
    rows = [
        [
            data,
            str(made["epochs"]),
            f"{made['seconds']:,.0f}",
            f"{made['adversarial_accuracy']:.2f}",
            str(made["wanted"]),
            f"{made['test_accuracy']:.2f}",
            " and ".join(f"{seconds:,.0f}" for seconds in made["paper_epoch_seconds"]),
            f"{made['speedup']:,.0f}",
        ]
        for data, made in parts.get("recipe", {}).items()
    ]
    columns = (
        "data | epochs | seconds | adversarial | wanted | test "
        "| the paper's epoch, seconds | times less"
    )
    return _section("The recipe, paper's network", [], columns, rows)


def _strict_lines(parts: dict[str, Any]) -> list[str]:
    rows = [
        [
            f"{Path(one['model']).name}, {one['epsilon']:g}",
            str(one["images"]),
            f"{one['pgd']:.1f}",
            f"{one['strict']['countermark']:.1f}",
            f"{one['strict']['pyautoattack']:.1f}",
            f"{one['all_together']:.1f}",
            f"{one['times_ours']['pyautoattack']:.1f}",
        ]
        for one in parts.get("strict", [])
    ]
    return _section(
        "Strict evaluation",
        [],
        "model | images | PGD | ours | pyautoattack | all together | times as fast",
        rows,
    )


def _strong_lines(parts: dict[str, Any]) -> list[str]:
    protected = protected_runs(parts)
    pairs = [
        (before, after)
        for (objective, data, epsilon, model), marked in protected.items()
        if model == "marked"
        for before, after in zip(
            protected[objective, data, epsilon, "unmarked"], marked, strict=True
        )
    ]
    measures = {
        "test_accuracy": ".2f",
        "pgd_accuracy": ".2f",
        "pgd_accuracy_of_part": ".1f",
        "strict_accuracy_of_part": ".1f",
    }
    rows = [
        [
            f"{run['objective']}, {run['data']} {run['epsilon']:g}, {run['network']}",
            f"{run['seed']}, {run['precision']}",
            *(f"{before[name]:{form}}, {run[name]:{form}}" for name, form in measures.items()),
            run["coins"],
            "resumed"
            if run["seconds_to_protect"] is None
            else format(run["seconds_to_protect"], ",.0f"),
        ]
        for before, run in pairs
    ]
    images = " or ".join(sorted({str(run["images"]) for _, run in pairs}))
    threads = " or ".join(sorted({str(run["threads"]) for _, run in pairs}))
    notes = [
        "Made by `benchmarks/strong.py`.",
        "Of two figures the first is of the unmarked model, the second of the marked one.",
        "Test accuracy and PGD are of all test images; "
        f"a part is {images} of them, taken evenly from the pool.",
        f"Seconds are of the wall clock on {threads} thread(s), beside up to three other programs.",
        "",
    ]
    columns = (
        "recipe, data and budget, network | seed, precision | test | PGD | PGD, part "
        "| strict, part | coins | seconds"
    )
    return _section("Protected models, strict", notes, columns, rows)


def _scaling_lines(parts: dict[str, Any]) -> list[str]:
    series: dict[str, list[dict[str, Any]]] = {}
    for one in parts.get("scaling", []):
        series.setdefault(one["what"], []).append(one)
    rows = [
        [
            what,
            "; ".join(f"{one['size']:,}" for one in found),
            "; ".join(f"{one['seconds']:.3g}" for one in found),
            "; ".join(
                f"n^{math.log10(after['seconds'] / before['seconds']):.2f}"
                for before, after in itertools.pairwise(found)
            ),
            "; ".join(f"{one['MiB']:.1f}" for one in found),
        ]
        for what, found in series.items()
    ]
    processors = {one["processor"] for one in parts.get("scaling", [])}
    notes = [
        "![time over the size of the input](scaling.svg)",
        "",
        f"{' and '.join(sorted(processors))}, one thread: seconds, their growth from each size to",
        "the next, and the memory that the work takes at most beside its input.",
        "The exact test on cells of one trial adds whole numbers of n binary digits,",
        "which is why it grows faster than n; 10,000 cells take it hundredths of a second.",
        "",
    ]
    return _section("How it grows", notes, "what | sizes | seconds | growth | MiB", rows)


def about() -> dict[str, Any]:
    """The machine, as far as a ratio needs it."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    found = {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    return {**found, "bf16": computes_bf16("cpu")}


def main() -> None:
    """Make what is not there, or what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--parts",
        nargs="+",
        default=[],
        choices=["gemm", "pgd", "strict", "recipe", "scaling", "strong"],
    )
    parser.add_argument("--images", type=int, default=1000, help="of the PGD and strict parts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--models",
        nargs="+",
        type=Path,
        default=[],
        help="model folders for the strict part, instead of models of its own",
    )
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    DONE.mkdir(parents=True, exist_ok=True)
    kept = DONE / "parts.json"
    parts: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    if parts.setdefault("machine", about()) != about():
        raise SystemExit(
            f"{kept} is of another machine ({parts['machine']}); delete {DONE} to begin anew"
        )
    work: dict[str, Callable[[], Any]] = {
        "gemm": gemm,
        "recipe": lambda: recipes(20),
        "pgd": lambda: pgd_part(options.images, options.rounds),
        "strict": lambda: strict_part(options.models, options.images),
        "scaling": scaling_part,
        "strong": lambda: parts["strong"],
    }
    parts["strong"] = [
        json.loads(line) for line in STRONG.read_text().splitlines()
    ]  # fresh whatever is made: every page shows it
    for name, make in work.items():
        if name in options.parts or (not options.parts and (name not in parts or name == "strong")):
            parts[name] = make()
            write_bytes(kept, json.dumps(parts).encode())
            record = {
                **summary(parts),
                "machine": parts["machine"],
                "runs": {part: parts[part] for part in work if part in parts},
            }
            write_bytes(RESULTS, (json.dumps(record, indent=1) + "\n").encode())
            write_page(record)
            print(name, json.dumps(summary(parts)), flush=True)


if __name__ == "__main__":
    main()
