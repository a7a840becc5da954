"""What a study will take: an estimate for each unit, from a short calibration on this machine.

The measure of work is a pass: one image once through the network and back. The estimate assumes one
core for each worker, and ignores that busy cores slow each other down; the progress display
corrects it as units finish.
"""

import itertools
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from countermark.data import Examples, Known, known
from countermark.data.pools import sizes
from countermark.device import resolve_device
from countermark.networks.named import build
from countermark.study.graph import Unit
from countermark.thieves import REMOVALS, THEFTS
from countermark.threat import Attack
from countermark.training import Hardware, TrainConfig, known_traits, marking, recipe, train
from countermark.watermarks import CRAFTING_STEPS, SCHEMES

_OVERHEAD = 1.0  # seconds of every unit: reading data, writing files
# Steps that a model without robustness survives, and its robust share, as passes.
_STANDARD_STEPS = 4
_FORWARD = 0.35  # of a pass
_STRICT = 1500  # passes of an image under the strict attacks


def _held_out(row: Known) -> Mapping[str, int]:
    """Examples of the pools that are held out."""
    return row.pools or sizes(row.train)


Pass = tuple[str, tuple[int, int, int], int]
"""A network, the channels, height and width of its images, and how many go through it at once."""


def seconds(unit: Unit, speed: Mapping[Pass, float]) -> float:
    """Estimate the seconds that a unit takes on one core.

    Args:
        unit: the unit.
        speed: seconds of one pass.
    """
    return _OVERHEAD + _passes(unit) * speed[pass_of(unit)]


def measure_speed(passes: Iterable[Pass], hardware: Hardware | None = None) -> dict[Pass, float]:
    """Measure the seconds of one pass of an image, forwards and backwards, in training.

    Args:
        passes: what to measure.
        hardware: device and precision; by default one thread of the processor, in float32.

    Returns:
        The seconds of each of them.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    given = hardware or Hardware("cpu", precision="32-true")
    try:
        return {each: _measure(*each, given) for each in sorted(set(passes))}
    finally:
        torch.set_num_threads(threads)


def pass_of(unit: Unit) -> Pass:
    """What a unit does again and again; a theft may take small batches, whose passes are slower."""
    batch = unit.options.get("means", {}).get("batch_size", TrainConfig.batch_size)
    return _network(unit), known(str(unit.options["data"])).shape, int(batch)


def _measure(name: str, shape: tuple[int, int, int], batch: int, hardware: Hardware) -> float:
    """Train adversarially for a moment, as most units do for most of their time."""
    device = resolve_device(hardware.accelerator)
    network = build(name, shape, 10, seed=0).to(device)
    images = 256 if device.type == "cpu" else 12_800
    x = torch.randint(0, 256, (images, *shape), dtype=torch.uint8)
    config = TrainConfig(
        objective="pgd",
        attack=Attack(0.1, 3, 0.05),
        epochs=4,
        batch_size=batch,
        schedule="constant",
        grow_budget=False,
        hardware=hardware,
    )
    moments = [time.perf_counter()]
    train(
        network,
        Examples(x, torch.arange(images) % 10),
        config,
        after_epoch=lambda _epoch, _network: moments.append(time.perf_counter()),
    )
    epochs = [later - before for before, later in itertools.pairwise(moments)]
    return min(epochs[1:]) / (4 * images)


def _network(unit: Unit) -> str:
    if "network" in unit.options:
        return str(unit.options["network"])
    role = next((role for role in ("model", "victim", "source") if role in unit.inputs), None)
    return _network(unit.inputs[role]) if role is not None else "small"


def _attack_passes(unit: Unit) -> float:
    """Passes for one image's adversarial accuracy on the model that a unit makes or takes."""
    while unit.kind != "model" and (unit.inputs.get("model") or unit.inputs.get("victim")):
        unit = unit.inputs.get("model") or unit.inputs["victim"]
    robust = unit.options.get("robust", False)
    return 0.95 * known(str(unit.options["data"])).threat.steps if robust else _STANDARD_STEPS


def _steps(options: Mapping[str, Any]) -> int:
    """Steps of a thief's own adversarial training."""
    return known(str(options["data"])).threat.steps if options["thief_objective"] == "pgd" else 1


def _marking_passes(options: Mapping[str, Any], images: int) -> int:
    """How often an image goes through a network that is marked by the owner's recipe."""
    row = known(str(options["data"]))
    given = replace(known_traits(row.name), images=images)
    source = recipe(given, options["objective"], row.threat)
    config = marking(source, given, options["objective"])
    return config.epochs * (1 + (config.attack.steps if config.attack else 0))


def _passes(unit: Unit) -> float:
    options: dict[str, Any] = dict(unit.options)
    catalogued = known(str(options["data"]))
    test, thief = catalogued.test, _held_out(catalogued)["thief"]
    tuned = int(options.get("examples") or thief)
    attack, attacked = (
        _attack_passes(unit),
        test if options.get("attacked", 0) is None else min(int(options.get("attacked", 0)), test),
    )
    if unit.kind == "model":
        given = known_traits(catalogued.name)
        config = recipe(given, options["objective"], catalogued.threat, epochs=options["epochs"])
        if "start" in unit.inputs:
            config = marking(config, given, options["objective"])
        steps = config.attack.steps if config.attack and options["robust"] else 0
        if options["protocol"] == "as-published":
            attacked += config.epochs * min(options["selection"] or test, test)
        return config.epochs * given.images * (1 + steps) + attacked * attack
    if unit.kind == "theft":
        means = options["means"]
        passes = THEFTS[options["theft"]].passes(means["queries"], thief, _steps(options))
        return int(means["epochs"]) * passes + attacked * _STANDARD_STEPS
    measured = min(int(options.get("tested") or test), test) * _FORWARD + attacked * attack
    if unit.kind == "pruning":
        return len(options["rates"]) * measured
    if unit.kind == "fine-tuning":
        return int(max(options["epochs"])) * tuned + len(options["epochs"]) * measured
    if unit.kind == "removal":
        chain = ((REMOVALS[name], amount) for name, amount in options["removals"])
        marks = _marking_passes(options, tuned)
        return measured + sum(
            removal.passes(amount, tuned, _steps(options), marks) for removal, amount in chain
        )
    if unit.kind == "strict":
        return min(int(options["examples"]), test) * _STRICT
    if unit.kind == "budgets":
        return tuned * sum(min(int(steps), 15) for _, steps in options["budgets"])
    if unit.kind == "watermarks":
        return CRAFTING_STEPS * (1000 if SCHEMES[str(options["scheme"])].coins else 100)
    return 1000.0
