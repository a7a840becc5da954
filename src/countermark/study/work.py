"""What units do: train, mark, steal, remove, ask. There is one function for each kind of unit.

A function takes its options, the folders of the units that it starts from and the folder to write
into, and returns a result: a list of points, each with what was measured there. Nothing else goes
in: the same options and inputs give the same bytes.
"""

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from countermark.attacks import pgd
from countermark.data import Dataset, Examples, Pools, known, load_ood, open_data, pixels
from countermark.device import resolve_device, seeded
from countermark.evaluation import accuracy, adversarial_accuracy, predict, strict_accuracy
from countermark.evidence import judge
from countermark.files import (
    CHECKPOINT_PREFIX,
    make_private_folder,
    read_tensors,
    write_bytes,
    write_tensors,
)
from countermark.networks import build, describing, load, load_model, save_model
from countermark.thieves import REMOVALS, Means, removed, stolen
from countermark.threat import Attack
from countermark.training import Hardware, marking, recipe, train, traits
from countermark.watermarks import (
    SCHEMES,
    Key,
    Materials,
    craft_adversarial,
    load_key,
    load_secret,
    secret_key,
    write_key,
)

Options = Mapping[str, Any]
Inputs = Mapping[str, Path]
Result = dict[str, Any]

_LIMIT = 1 << 34


def train_model(options: Options, inputs: Inputs, folder: Path) -> Result:
    """Train a model.

    Training starts from the weights of `start` if there is one, and embeds `watermarks` if there
    are any.
    """
    data, pools = options["data"], pools_of(options)
    opened = _data(data)
    given = traits(opened, pools.training)
    config = recipe(
        given,
        options["objective"],
        opened.threat,
        seed=options["seed"],
        epochs=options["epochs"],
        hardware=_hardware(options),
    )
    if not options["robust"]:
        config = replace(config, objective="standard", attack=None, carry=False)
    key = _key(inputs)
    if "start" in inputs:
        network, config = _load(inputs["start"]), marking(config, given, options["objective"])
    else:
        network = build(options["network"], opened.shape, opened.classes, seed=options["seed"])
        config = replace(config, embedding="epoch")
    published = options["protocol"] == "as-published"
    best = _Best(folder, pools.test, options, key) if published else None
    train(
        network,
        pools.training,
        replace(config, craft_in_training_mode=published and config.attack is not None),
        validation=pools.validation,
        watermarks=Examples(key.watermarks.x, key.labels) if key is not None else None,
        checkpoint=folder / f"{CHECKPOINT_PREFIX}train.safetensors",
        after_epoch=best,
        title="train",
    )
    if best is not None:
        best.restore(network)
    trained = {
        "event": "trained",
        "objective": config.objective,
        "watermarks": key.scheme if key is not None else None,
    }
    described = describing(
        opened, options["network"], seed=options["pool_seed"], history=(trained,)
    )
    save_model(folder, network, described)
    return {"points": [_measured(network, pools.test, options, key)]}


class _Best:
    """The published protocol's choice of the epoch.

    It is the epoch with the highest sum of test, adversarial and watermark accuracy on the TEST
    set, of which the profile `quick` attacks some images only.
    """

    def __init__(self, folder: Path, test: Examples, options: Options, key: Key | None) -> None:
        self.path = folder / f"{CHECKPOINT_PREFIX}best.safetensors"
        self.test, self.options, self.key = test, options, key

    def __call__(self, epoch: int, network: nn.Module) -> None:
        attacked = every(self.test, self.options["selection"])
        score = accuracy(network, self.test) + _withstood(network, attacked, self.options)
        score += _tally(network, self.key)["accuracy"] if self.key is not None else 0.0
        if not self.path.exists() or score > read_tensors(self.path, _LIMIT)[1]["score"]:
            write_tensors(self.path, network.state_dict(), {"score": score, "epoch": epoch})

    def restore(self, network: nn.Module) -> None:
        network.load_state_dict(read_tensors(self.path, _LIMIT)[0])


def make_watermarks(options: Options, inputs: Inputs, folder: Path) -> Result:
    """Craft a watermark set on the model `source`, commit to it and draw its coins.

    This is what `protect` does, but the secrets are derived from the seed, so that a study can be
    repeated: such a key is an experiment and proves nothing to anybody.
    """
    data, pools = options["data"], pools_of(options)
    catalogued = known(data)
    seed, scheme = options["seed"], options["scheme"]
    make_private_folder(folder)
    for name in ("secret", "signing-key"):
        write_bytes(
            folder / name,
            hashlib.sha256(f"countermark study {name} {sorted(options.items())}".encode()).digest(),
            0o600,
        )
    attack, rules = (
        Attack(options["epsilon"], options["steps"], options["step_size"]),
        SCHEMES[scheme],
    )
    given = Materials(
        source=_load(inputs["source"]) if "source" in inputs else nn.Identity(),
        bases=pools.bases,
        outside=lambda: load_ood(_data(data), pools, options["pool_seed"], _cache()),
        attack=attack,
        batches=catalogued.batches,
        batch_size=catalogued.batch_size,
        seed=seed,
        key=secret_key(load_secret(folder), "trials"),
    )
    watermarks = rules.make(given)
    key = write_key(
        folder,
        scheme,
        watermarks,
        {"data": data, "crafting": asdict(attack) if rules.crafted else None},
    )
    source = _tally(_load(inputs["source"]), key) if "source" in inputs else None
    return {"points": [{"watermark": source}] if source is not None else []}


def steal_model(options: Options, inputs: Inputs, folder: Path) -> Result:
    """Steal the model `victim` without its weights.

    The copy is asked for the victim's `watermarks`, if it has any.
    """
    victim, described = load_model(inputs["victim"], device=_device())
    means = replace(_means(options, "steal"), **options["means"])
    copied, described = stolen(options["theft"], victim, described, means)
    save_model(folder, copied, described)
    test = pools_of(options).test
    return {"points": [_measured(copied, test, options, _key(inputs))]}


def prune_curve(options: Options, inputs: Inputs, folder: Path) -> Result:
    """Prune `model` at several rates.

    At each rate test and watermark accuracy are measured, and adversarial accuracy if the profile
    asks for it.
    """
    network, key, test = (
        _load(inputs["model"]),
        _key(inputs),
        every(pools_of(options).test, options["tested"]),
    )
    points, means = [], _means(options, None)
    for rate in options["rates"]:
        pruned = REMOVALS["prune"].run(network, rate, means)
        points.append({"amount": rate, **_measured(pruned, test, options, key)})
    return {"points": points}


def finetune_curve(options: Options, inputs: Inputs, folder: Path) -> Result:
    """Fine-tune `model` on the thief's pool.

    The measurements of `prune_curve` are made after each of several numbers of epochs.
    """
    key, test = _key(inputs), every(pools_of(options).test, options["tested"])
    points = []

    def measure(epoch: int, network: nn.Module) -> None:
        if epoch in options["epochs"]:
            points.append({"amount": epoch, **_measured(network, test, options, key)})

    removal = REMOVALS["finetune"]
    means = _means(options, "fine-tune").given(removal.options)
    removal.run(_load(inputs["model"]), max(options["epochs"]), replace(means, after_epoch=measure))
    return {"points": points}


def remove_mark(options: Options, inputs: Inputs, folder: Path) -> Result:
    """Apply removals to `model`, one after the other."""
    network, described = load_model(inputs["model"], device=_device())
    network, described = removed(options["removals"], network, described, _means(options, "remove"))
    done, key, test = described.history[-1], _key(inputs), pools_of(options).test
    point = _measured(network, test, options, key)
    return {"points": [{**point, **{name: done[name] for name in ("own_mark",) if name in done}}]}


def _means(options: Options, title: str | None) -> Means:
    """The thief of a unit."""
    data, objective = options["data"], options.get("thief_objective", "pgd")
    pool = pools_of(options).thief[: options.get("examples")]
    return Means(
        pool=pool,
        threat=known(data).threat,
        attack=_training_attack(
            objective, data, options.get("epsilon") or known(data).threat.epsilon
        ),
        objective=options.get("objective", "fast"),
        traits=traits(_data(data), pool),
        clamp=options["protocol"] == "clean",
        seed=options.get("seed", 0),
        hardware=_hardware(options),
        title=title,
    )


def judge_strictly(options: Options, inputs: Inputs, folder: Path) -> Result:
    """Measure what the strict attacks leave of `model`, and what the paper's PGD leaves of it."""
    test = every(pools_of(options).test, options["examples"])
    found = strict_accuracy(
        _load(inputs["model"]),
        test,
        _attack(options["data"]),
        seed=options["seed"],
        checkpoint=folder / f"{CHECKPOINT_PREFIX}strict.json",
        title="strict",
    )
    point = {"strict": found.strict_accuracy, "adversarial": found.adversarial_accuracy}
    return {"points": [point], "images": found.images, "broken": found.broken}


def ask_strangers(options: Options, inputs: Inputs, folder: Path) -> Result:
    """Ask models that never saw the `watermarks` for them: the control that the paper lacks."""
    key = load_key(inputs["watermarks"])
    strangers = sorted(role for role in inputs if role != "watermarks")
    return {
        "points": [
            {"stranger": role, "watermark": _tally(_load(inputs[role]), key)} for role in strangers
        ]
    }


def attack_budgets(options: Options, inputs: Inputs, folder: Path) -> Result:
    """Measure adversarial accuracy of `model` at several budgets, in steps of 0.01 (Table 5)."""
    network, test = _load(inputs["model"]), every(pools_of(options).test, options["examples"])
    return {
        "points": [
            {
                "amount": [epsilon, steps],
                "adversarial": _withstood(
                    network, test, options, Attack(epsilon, steps, 0.01), title="attack"
                ),
            }
            for epsilon, steps in options["budgets"]
        ]
    }


def draw_pictures(options: Options, inputs: Inputs, folder: Path) -> Result:
    """Make the images of Figure 6.

    They are one training image, its adversarial example and its watermarks at two budgets, crafted
    on `model` and kept as uint8.
    """
    data, pools, network = options["data"], pools_of(options), _load(inputs["model"])
    x, y = pixels(pools.bases.x[:1]), pools.bases.y[:1]
    images = {"training image": x}
    for title, epsilon, steps in options["crafted"]:
        with seeded(_device(), options["seed"]):
            images[title] = pgd(
                network,
                x.to(_device()),
                y.to(_device()),
                epsilon=epsilon,
                steps=steps,
                step_size=0.01,
            ).cpu()
    write_tensors(
        folder / "images.safetensors",
        {title: image[0].mul(255).round().to(torch.uint8) for title, image in images.items()},
    )
    answers = {title: int(predict(network, image)[0]) for title, image in images.items()}
    return {"points": [], "answers": answers, "label": int(y[0]), "data": data}


def project(options: Options, inputs: Inputs, folder: Path) -> Result:
    """Project images on a plane, for Figures 1 and 5.

    The images are training images, their adversarial examples and the watermark sets. The paper
    does not say how it projects; here everything is projected on the first two principal components
    of the training images.
    """
    pools, network, count = pools_of(options), _load(inputs["model"]), options["examples"]
    training = pools.training[:count]
    flat = pixels(training.x).flatten(1).double()
    mean = flat.mean(0)
    _, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean))
    plane = vectors[:, -2:].flip(1)
    plane = plane * plane.sum(0).sign()
    attack = _attack(options["data"])
    attacked, _ = craft_adversarial(network, training, attack, options["seed"])
    sets = {"training": pixels(training.x), "adversarial training": pixels(attacked)}
    sets |= {
        f"{role} watermarks": pixels(load_key(inputs[role]).watermarks.x[:count])
        for role in sorted(inputs)
        if role != "model"
    }
    places = {title: ((x.flatten(1).double() - mean) @ plane).float() for title, x in sets.items()}
    write_tensors(folder / "plane.safetensors", places)
    return {"points": [], "distances": _distances(places)}


def _distances(places: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Measure how far the centre of each set is from that of the adversarial training examples.

    The unit is the standard deviation of the latter.
    """
    centre = places["adversarial training"].mean(0)
    spread = float((places["adversarial training"] - centre).norm(dim=1).pow(2).mean().sqrt())
    return {
        title: round(float((place.mean(0) - centre).norm()) / spread, 4)
        for title, place in places.items()
    }


KINDS: Mapping[str, Callable[[Options, Inputs, Path], Result]] = {
    "model": train_model,
    "watermarks": make_watermarks,
    "theft": steal_model,
    "pruning": prune_curve,
    "fine-tuning": finetune_curve,
    "removal": remove_mark,
    "strict": judge_strictly,
    "strangers": ask_strangers,
    "budgets": attack_budgets,
    "pictures": draw_pictures,
    "plane": project,
}
"""The kinds of units."""


def pools_of(options: Options) -> Pools:
    """Cut the pools of a unit.

    They are disjoint, or those of the published runs, where the watermark bases and the thief's
    seeds are TEST images.
    """
    pools = _pools(options["data"], options["pool_seed"])
    if options["protocol"] == "clean":
        return pools
    order = torch.randperm(
        len(pools.test), generator=torch.Generator().manual_seed(options["pool_seed"])
    )
    bases, seeds = (
        order[: len(pools.bases)],
        order[len(pools.bases) : len(pools.bases) + Means.seeds],
    )
    thief = Examples(
        torch.cat((pools.test.x[seeds], pools.thief.x)),
        torch.cat((pools.test.y[seeds], pools.thief.y)),
    )
    return replace(pools, bases=pools.test[bases], thief=thief)


@functools.lru_cache(maxsize=8)
def _pools(data: str, seed: int) -> Pools:
    return _data(data).pools(seed)


@functools.lru_cache(maxsize=8)
def _data(place: str) -> Dataset:
    return open_data(place, cache=_cache())


_DEVICE: list[str] = ["auto"]


def use_device(name: str) -> None:
    """Where this process computes units: `auto`, or a device by name."""
    _DEVICE[0] = name


def _device() -> torch.device:
    return resolve_device(_DEVICE[0])


def _hardware(options: Options) -> Hardware:
    return Hardware(_DEVICE[0], precision=options["precision"])


def _load(folder: Path) -> nn.Module:
    return load(folder, device=_device())


_CACHE: list[Path | None] = [None]


def use_cache(folder: Path | None) -> None:
    """Where this process finds the files of the data sets."""
    _CACHE[0] = folder


def _cache() -> Path | None:
    return _CACHE[0]


def every(test: Examples, count: int | None) -> Examples:
    """Take about `count` of the test images, evenly spaced; all of them if `count` is None.

    The first half of MNIST's test images is easier than the second.
    """
    return test[:: max(1, len(test) // count)] if count else test


def _attack(data: str) -> Attack:
    return known(data).threat.attack


def _training_attack(objective: str, data: str, epsilon: float) -> Attack:
    """Return the attack of a thief's or remover's own adversarial training.

    It is the paper's PGD, or single steps from a random start.
    """
    threat = known(data).threat
    return (
        Attack(epsilon, threat.steps, threat.step_size)
        if objective == "pgd"
        else Attack(epsilon, 1, 1.25 * epsilon)
    )


def _key(inputs: Inputs) -> Key | None:
    return load_key(inputs["watermarks"]) if "watermarks" in inputs else None


def _withstood(
    network: nn.Module,
    examples: Examples,
    options: Options,
    attack: Attack | None = None,
    title: str | None = None,
) -> float:
    """Adversarial accuracy under an attack; by default the PGD of the unit's data set."""
    return adversarial_accuracy(
        network,
        examples,
        attack or _attack(options["data"]),
        title=title,
        precision=options["precision"],
    )


def _measured(network: nn.Module, test: Examples, options: Options, key: Key | None) -> Result:
    """Measure the test, adversarial and watermark accuracy of a model.

    Args:
        network: the model.
        test: test images.
        options: of the unit, among them the number `attacked` of test images for the adversarial
            accuracy; None for all of them, 0 for no attack.
        key: key of the watermarks; None measures no watermark accuracy.
    """
    point: Result = {"test": accuracy(network, test)}
    if (attacked := options["attacked"]) != 0:
        point["adversarial"] = _withstood(network, every(test, attacked), options, title="attack")
    if key is not None:
        point["watermark"] = _tally(network, key)
    return point


def _tally(network: nn.Module, key: Key) -> Result:
    """Agreements and, for coins, the exact p-value."""
    outcomes = key.outcomes(predict(network, key.watermarks.x))
    counts = {
        name: sum(outcome == value for outcome in outcomes)
        for name, value in (("agree", 1), ("disagree", -1), ("neither", 0))
    }
    tally: Result = {**counts, "accuracy": 100 * counts["agree"] / len(outcomes), "log10_p": None}
    if key.rules.coins:
        tally["log10_p"] = judge(key.watermarks.cell.tolist(), outcomes).log10_p_value
    return tally
