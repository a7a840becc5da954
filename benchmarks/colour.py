"""Colour photographs: an owner, removals, thefts, strangers and a guard, beside each other.

    python benchmarks/colour.py cifar10.zip --out runs/colour --page docs/colour-results.md

The data are any place that `protect` takes. Each part of the study is a folder or a file in OUT, so
an interrupted run goes on and a part that is there is not made again. `--only` makes some parts and
leaves the page to a later run, and `--table` writes the page from what is there. Every suspect is
asked for all coins of the owner's key, and those of the part `textures` for as many. Robustness is
strict where a column says so; everything else is the accuracy under one PGD.
"""

import argparse
import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from countermark import evaluate, protect, remove, steal
from countermark.choices import Setting
from countermark.data import Examples, as_uint8, load_ood
from countermark.device import describe, resolve_device
from countermark.evaluation import accuracy, adversarial_accuracy, predict
from countermark.files import CHECKPOINT_PREFIX, new_folder, read_json, write_json
from countermark.guard import (
    CELL_BITS,
    Guard,
    GuardedModel,
    calibrate_model,
    expected_cost,
    weights_sha256,
)
from countermark.memory import keep_freed_memory
from countermark.networks import (
    Description,
    declared_pools,
    load_model,
    open_declared,
    save_model,
)
from countermark.networks import describe as describe_folder
from countermark.study.graph import code_version
from countermark.terminal import p_value
from countermark.thieves import THEFTS, Means
from countermark.thieves.steal import untrained
from countermark.threat import shown
from countermark.training import Hardware, fitted, marking, recipe, resolve_hardware, train, traits
from countermark.version import __version__
from countermark.watermarks import (
    SCHEMES,
    Materials,
    full_strength,
    load_key,
    load_secret,
    new_secrets,
    secret_key,
    secret_seed,
    write_key,
)
from first_light import ALPHAS, asked, once, random_keys
from guard_power import Account, held_out, judged

REMOVALS: Mapping[str, dict[str, Any]] = {
    "30 % pruned": {"prune": 0.3},
    "50 % pruned": {"prune": 0.5},
    "70 % pruned": {"prune": 0.7},
    "fine-tuned 20 epochs at 0.01": {"finetune": 20, "learning_rate": 0.01},
    "fine-tuned 20 epochs at 0.05": {"finetune": 20, "learning_rate": 0.05},
    "adversarially fine-tuned 10 epochs at 0.01": {"adversarial": 10, "learning_rate": 0.01},
    "int8": {"quantise": 8},
    "noise of 0.1": {"noise": 0.1},
    "median of 3x3": {"median": 3},
    "blur of 3x3": {"blur": 3},
    "denoiser": {"denoise": 24},
    "50 % pruned, then fine-tuned 20 epochs at 0.01": {
        "prune": 0.5,
        "finetune": 20,
        "learning_rate": 0.01,
    },
    "overwritten": {"overwrite": 800},
}
THEFT: Mapping[Setting, dict[str, Any]] = {
    "natural": {"queries": 10_000},
    "robust": {"queries": 10_000},
    "distil": {"queries": 10_000},
    "black": {"queries": 12_800},
}
GUARDED: Mapping[str, tuple[Setting, int]] = {
    "natural": ("natural", 5_000),
    "robust": ("robust", 8_500),
    "doubting": ("natural", 10_000),
    "relearned": ("natural", 10_000),
}
"""Thieves of a guarded service, and at most how many queries they send.

The last two hold every answer against copies that were not told it (3 folds): one drops those that
these contradict, one takes what these say instead.
"""
COSTS = (0.05, 0.1, 0.2)  # points that the guard may cost

MODEL: Mapping[str, tuple[str, str]] = {
    "test accuracy": ("test", "66 %"),
    "PGD-20": ("pgd", "40 %"),
    "strict accuracy": ("strict", "34 %"),
}
"""What is wanted of the marked model on CIFAR-10 at 8/255."""
COST: Mapping[str, tuple[str, str]] = {
    "test accuracy that the mark costs": ("test", "0.5"),
    "strict accuracy that it costs": ("strict", "1"),
}
"""What the mark may cost, in points, against the model that was trained on for as long."""
REMOVED = (
    "50 % pruned",
    "fine-tuned 20 epochs at 0.01",
    "adversarially fine-tuned 10 epochs at 0.01",
)
"""Removals after which a p-value of 1e-12 is wanted."""
PROVEN: Mapping[str, str] = {"natural": "-12", "robust": "-9", "doubting": "-6"}
"""The log10 p that is wanted of a guard that costs 0.2 points on test."""


@dataclass(frozen=True)
class Study:
    """One study of one data set, whose parts lie in one folder.

    Attributes:
        data: place of the images.
        out: folder of the parts.
        objective: name of the recipe.
        network: of the owner.
        images: test images of the strict accuracy.
        seed: of pools and training.
        device: where everything is computed.
        epochs: of the owner's source model and of strangers, instead of the recipes' own.
    """

    data: str
    out: Path
    objective: str
    network: str
    images: int
    seed: int
    device: str
    epochs: int | None

    @property
    def mine(self) -> Path:
        """The owner's model folder."""
        return self.out / "mine"

    def protected(self, name: str, **options: Any) -> Path:
        """A model folder of a recipe."""
        folder = self.out / name
        common: dict[str, Any] = {
            "network": self.network,
            "objective": self.objective,
            "seed": self.seed,
            "device": self.device,
            "epochs": self.epochs,
            "mirror": True,
        }
        once(folder, lambda: protect(self.data, out=folder, **{**common, **options}))
        return folder

    def told_in(self, name: str) -> Path:
        """The file of what a part found."""
        return self.out / "told" / f"{name.replace(' ', '-').replace('%', '')}.json"

    def told(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What a part found, from its file where it was made before."""
        path = self.told_in(name)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            how = {"device": describe(self.device, "auto"), "code": code_version()[:12]}
            write_json(path, {**make(), **how})
            print(name, json.dumps(read_json(path), sort_keys=True), flush=True)
        return read_json(path)

    def suspect(self, title: str, folder: Path, key: Path | None = None) -> dict[str, Any]:
        """The coins of a key (the owner's), and the accuracies that the folder was written with."""

        def look() -> dict[str, Any]:
            metrics = read_json(folder / "metrics.json")
            names = ("test_accuracy", "adversarial_accuracy", "seconds")
            kept = {name: metrics[name] for name in names if name in metrics}
            return {**kept, **asked(folder, key or self.mine / "key")}

        return self.told(f"suspect {title}", look)

    def judged_strictly(self, title: str, folder: Path) -> dict[str, Any]:
        """Test and PGD-20 accuracy on all test images, and the strict accuracy on some of them."""
        common: dict[str, Any] = {"steps": 20, "step_size": 2 / 255, "data": self.data}
        common["device"] = self.device

        def look() -> dict[str, Any]:
            whole = evaluate(folder, **common)
            part = evaluate(folder, **common, strict=True, images=self.images)
            return {
                "test": whole.test_accuracy,
                "pgd": whole.adversarial_accuracy,
                "strict": part.strict.strict_accuracy if part.strict else None,
                "strict_pgd": part.adversarial_accuracy,
                "seconds": part.seconds,
            }

        return self.told(f"strict {title}", look)


def owner(study: Study) -> None:
    """The marked model, and what it scores strictly."""
    study.protected("mine")
    study.suspect("marked", study.mine)
    study.judged_strictly("marked", study.mine)


def controls(study: Study) -> None:
    """The source model, and the same trained on for as long as the mark took, without coins."""
    source, folder = study.mine / "key" / "source", study.out / "trained-on"
    study.judged_strictly("source", source)
    trained_on(study, folder)
    study.judged_strictly("trained on", folder)
    study.told("suspect source", lambda: asked(source, study.mine / "key"))
    study.told("suspect trained on", lambda: asked(folder, study.mine / "key"))


def trained_on(study: Study, folder: Path, scheme: str | None = None) -> None:
    """The owner's source model trained on for as long as the mark took.

    Without a scheme it gets no watermarks; with one, as many as the owner's key has.
    """
    if folder.exists():
        return
    source = study.mine / "key" / "source"
    network, description = load_model(source, device=resolve_device(study.device))
    data = open_declared(description, data=study.data)
    pools = declared_pools(description, data)
    given = traits(data, pools.training, mirror=True)
    hardware = resolve_hardware(Hardware(study.device))
    made = recipe(
        given,
        study.objective,
        description.threat,
        seed=study.seed,
        hardware=hardware,
        epochs=study.epochs,
    )
    made = fitted(made, given, study.objective, network)
    metrics = read_json(study.mine / "metrics.json")
    epochs = metrics["marking_epochs"]  # over all its rounds
    config = replace(marking(made, given, study.objective), epochs=epochs)
    run = {"trained on": read_json(source / "model.json"), "scheme": scheme, "epochs": epochs}
    with new_folder(folder, run) as work:
        key = None
        if scheme is not None:
            secret, owners = new_secrets(work / "key"), load_key(study.mine / "key")
            materials = Materials(
                source=network,
                bases=pools.bases,
                outside=lambda: load_ood(data, pools, study.seed),
                attack=full_strength(description.threat.watermark_epsilon),
                batches=owners.c1["batches"],
                batch_size=len(owners.labels) // owners.c1["batches"],
                seed=secret_seed(secret, "trials"),
                key=secret_key(secret, "trials"),
            )
            key = (
                load_key(work / "key")
                if (work / "key" / "key.json").exists()
                else write_key(
                    work / "key", scheme, SCHEMES[scheme].make(materials), {"data": data.place}
                )
            )
        train(
            network,
            pools.training,
            config,
            validation=pools.validation,
            watermarks=None if key is None else Examples(key.watermarks.x, key.labels),
            checkpoint=work / f"{CHECKPOINT_PREFIX}trained-on.safetensors",
            title="trained on" if scheme is None else scheme,
        )
        save_model(work, network, description)
        write_json(
            work / "metrics.json",
            {
                "test_accuracy": accuracy(network, pools.test),
                "adversarial_accuracy": adversarial_accuracy(
                    network, pools.test, description.threat.attack
                ),
            },
        )


def textures(study: Study) -> None:
    """The same source model marked by textures, what it scores strictly, and their removals."""
    folder = study.out / "texture"
    trained_on(study, folder, "texture")
    key = folder / "key"
    study.suspect("texture marked", folder, key)
    study.told("suspect texture source", lambda: asked(study.mine / "key" / "source", key))
    removals(study, folder, "texture ", key)
    study.judged_strictly("texture", folder)


def strangers(study: Study) -> None:
    """Models that never saw the coins, and the level over fresh keys."""
    made: dict[str, dict[str, Any]] = {
        "robust stranger": {"seed": study.seed + 100, "objective": "fast"},
        "standard stranger": {"seed": study.seed + 200, "objective": "standard"},
    }
    for title, options in made.items():
        folder = study.protected(title.replace(" ", "-"), scheme="none", **options)
        study.suspect(title, folder)
        study.told(f"keys {title}", partial(random_keys, folder, study.mine / "key"))


def removals(
    study: Study, marked: Path | None = None, prefix: str = "", key: Path | None = None
) -> None:
    """Every removal of a marked model (the owner's)."""
    for title, options in REMOVALS.items():
        name = f"{prefix}{title}"
        folder = study.out / name.replace(" ", "-").replace("%", "").replace(",", "")
        common: dict[str, Any] = {"data": study.data, "device": study.device}
        once(folder, partial(remove, marked or study.mine, out=folder, **common, **options))
        study.suspect(name, folder, key)


def thefts(study: Study) -> None:
    """Every theft through the answers, which do not carry the mark in the weights."""
    for setting, options in THEFT.items():
        folder = study.out / f"stolen-{setting}"
        common: dict[str, Any] = {"data": study.data, "device": study.device, **options}
        once(folder, partial(steal, study.mine, setting=setting, out=folder, **common))
        study.suspect(f"theft {setting}", folder)


def guard(study: Study) -> None:
    """Thieves of a guarded service, each with an account of their own."""
    network, description = load_model(study.mine, device=resolve_device(study.device))
    data = open_declared(description, data=study.data)
    pools = declared_pools(description, data)
    secret = load_secret(study.mine / "key")
    stranger, _ = load_model(study.out / "robust-stranger", device=resolve_device(study.device))
    before, _ = load_model(study.mine / "key" / "source", device=resolve_device(study.device))

    def guarded(cost: float) -> GuardedModel:
        found = calibrate_model(
            network,
            pools.validation,
            secret=secret,
            model_sha256=weights_sha256(study.mine),
            cost=cost,
            bits=CELL_BITS,
        )
        return GuardedModel(network, Guard(found.settings, secret))

    def look(thief: str, stated: float) -> dict[str, Any]:
        setting, queries = GUARDED[thief]
        model = guarded(stated)
        account = Account(model, f"{thief} {queries}")
        options = {**THEFTS[setting].options, "queries": queries}
        means = Means(
            pool=pools.thief,
            threat=description.threat,
            traits=traits(data, pools.thief, mirror=True),
            seed=study.seed + 900,
            hardware=resolve_hardware(Hardware(study.device)),
            title=setting,
        ).given(THEFTS[setting].options, options)
        copied, _ = untrained(setting, description, seed=study.seed + 900)
        copied.to(resolve_device(study.device))
        bare, _ = untrained(setting, description, seed=study.seed + 901)
        if thief in THEFTS:
            THEFTS[setting].run(account, copied, means)
        else:
            hold_out(account, copied, means, description, drop=thief == "doubting")
        THEFTS[setting].run(lambda x: predict(network, x), bare, means)
        rows = list(account.rows.values())

        def about(suspect: nn.Module) -> dict[str, object]:
            return judged(suspect, rows, description.shape, secret)

        cost = expected_cost(model, pools.test)
        return {
            "queries": account.asked,
            "trials": len(rows),
            "cost": cost.points,
            "cost_error": cost.standard_error,
            "test_accuracy": accuracy(copied, pools.test),
            "suspect": about(copied),
            "strangers": {
                "as robust": about(stranger),
                "before the mark": about(before),
                "theft of bare answers": about(bare),
            },
        }

    for cost in COSTS:
        for thief in GUARDED:
            study.told(f"guard {thief} at {cost:g}", partial(look, thief, cost))


def hold_out(
    account: Account, copied: nn.Module, means: Means, description: Description, *, drop: bool
) -> None:
    """A natural thief who believes only what copies say that were not told an answer."""
    x = means.pool[: means.queries].read().x
    y = account(x)

    def learn(network: nn.Module, told: Examples) -> nn.Module:
        answers = {
            image.numpy().tobytes(): label for image, label in zip(told.x, told.y, strict=True)
        }
        THEFTS["natural"].run(
            lambda some: torch.stack(
                [answers[image.numpy().tobytes()] for image in as_uint8(some)]
            ),
            network,
            replace(means, pool=told, queries=len(told)),
        )
        return network

    held = held_out(
        Examples(x, y),
        means.seed,
        lambda told, seed: learn(untrained("natural", description, seed=seed)[0], told),
    )
    kept = torch.nonzero(held == y).flatten() if drop else torch.arange(len(y))
    learn(copied, Examples(x[kept], held[kept]))


def page(study: Study) -> str:
    """What is there, as Markdown; what is missing is named."""
    threat = describe_folder(study.mine).threat
    options = {
        "objective": study.objective,
        "network": study.network,
        "images": study.images,
        "seed": study.seed,
        "epochs": study.epochs,
    }
    said = " ".join(f"--{name} {value}" for name, value in options.items() if value is not None)
    lines = [
        "# Colour",
        "",
        "For engineers with photographs: what a mark costs there, what it outlasts, and what a",
        "[guarded service](guard.md) proves.",
        f"Countermark {__version__} made it on {_made_on(study)}, by",
        f"`python benchmarks/colour.py {Path(study.data).name} {said}`: one owner, the budget",
        f"{shown(threat.epsilon)}, and {threat.steps} steps of PGD where no other number is given.",
    ]
    missing: list[str] = []

    def there(name: str) -> dict[str, Any] | None:
        path = study.told_in(name)
        if not path.exists():
            missing.append(name)
        return read_json(path) if path.exists() else None

    def section(title: str, words: str, columns: str, rows: Iterable[str | None]) -> None:
        kept = [row for row in rows if row is not None]
        if kept:
            rule = "|---" * columns.count("|") + "|"
            lines.extend(["", f"## {title}", "", words, "", f"| {columns} |", rule + "---|", *kept])

    def strict(title: str) -> str | None:
        if (row := there(f"strict {title}")) is None:
            return None
        numbers = (row[name] for name in ("test", "pgd", "strict", "strict_pgd"))
        return f"| {title} | {' | '.join(f'{number:.2f} %' for number in numbers)} |"

    def asked_for(title: str, name: str | None = None) -> str | None:
        row = there(f"suspect {name or title}")
        return None if row is None else f"| {title} | {_coins(row)} | {row['verdict']} |"

    def beside(title: str) -> str | None:
        return _pair(title, there(f"suspect {title}"), there(f"suspect texture {title}"))

    def level(title: str) -> str | None:
        if (row := there(f"keys {title}")) is None:
            return None
        rates = " | ".join(f"{row['rates'][str(alpha)]:.4f}" for alpha in ALPHAS)
        return f"| {title} | {row['ks_times_sqrt_n']:.2f} | {rates} |"

    def proven(thief: str, cost: float) -> str | None:
        if (row := there(f"guard {thief} at {cost:g}")) is None:
            return None
        others = sorted(each["log10_p"] for each in row["strangers"].values())
        return (
            f"| {thief} | {row['queries']} | {cost:g} "
            f"| {row['cost']:.3f} +- {row['cost_error']:.3f} "
            f"| {row['trials']} | {row['suspect']['agree']}:{row['suspect']['other']} "
            f"| {_tenths(row['suspect']['log10_p'])} "
            f"| {_tenths(others[0])} to {_tenths(others[-1])} "
            f"| {row['test_accuracy']:.1f} % |"
        )

    def beside_wanted() -> Iterable[str | None]:
        models, marks = ("marked", "texture"), ("", "texture ")
        strictly = {title: there(f"strict {title}") for title in (*models, "trained on")}
        for what, (name, wanted) in MODEL.items():
            found = [f"{each[name]:.2f} %" if each else None for each in map(strictly.get, models)]
            yield _beside(what, wanted, found)
        control = strictly["trained on"]
        for what, (name, wanted) in COST.items():
            found = [
                f"{control[name] - each[name]:.2f}" if control and each else None
                for each in map(strictly.get, models)
            ]
            yield _beside(what, wanted, found)
        asked_of = [there(f"suspect {mark}marked") for mark in marks]
        yield _beside("answers that the coins chose", "98 %", map(_agreed, asked_of))
        for title in REMOVED:
            rows = [there(f"suspect {mark}{title}") for mark in marks]
            found = [f"{row['log10_p_value']:.1f}" if row else None for row in rows]
            yield _beside(f"log10 p, {title}", "-12", found)
        for thief, wanted in PROVEN.items():
            rows = [there(f"guard {thief} at {cost:g}") for cost in COSTS]
            told = [f"{row['suspect']['log10_p']:.1f} for {row['cost']:.2f}" for row in rows if row]
            yield _beside(
                f"log10 p of the guard, {thief} thief", f"{wanted} for 0.2", [", ".join(told)]
            )

    section(
        "Wanted and found",
        "What this study set out to show on CIFAR-10. What a guard costs is that on all test "
        "images. [What other recipes reach](log.md#colour-on-a-cpu).",
        "what | wanted | coins on perturbed images, or in answers | textures",
        beside_wanted(),
    )
    section(
        "The owner",
        "`trained on` is the source model trained on without a mark for as long as the mark took; "
        "`marked` has coins on perturbed images (`--scheme coin`), `texture` on textures "
        f"(`--scheme texture`). Strict accuracy is that of {study.images} test images, in float32.",
        "model | test | PGD-20 | strict | PGD-20 of the same images",
        map(strict, ("source", "trained on", "marked", "texture")),
    )
    section(
        "What removals leave",
        "Both marks are in the same source model, with as many coins. The thief has a labelled "
        "pool of their own; p is that of the whole key, of which a judge sees half.",
        "removal | coins: test, PGD | coins | p | textures: test, PGD | coins | p",
        (
            _pair("none", there("suspect marked"), there("suspect texture marked")),
            *map(beside, REMOVALS),
        ),
    )
    section(
        "Suspects without the mark",
        "Models that never saw the coins, asked for them.",
        "suspect | test, PGD | coins | p | verdict",
        (
            *map(asked_for, ("source", "trained on", "robust stranger", "standard stranger")),
            asked_for("source, asked for textures", "texture source"),
        ),
    )
    section(
        "The level",
        "2,000 fresh keys against each stranger: rates of randomised p-values at or below 0.05, "
        "0.01 and 0.001, and the distance of Kolmogorov and Smirnov times the root of 2,000, "
        "whose 95 % point is 1.36.",
        "stranger | distance | 0.05 | 0.01 | 0.001",
        map(level, ("robust stranger", "standard stranger")),
    )
    section(
        "Thefts without a guard",
        "Copies that were taught by the answers of the marked model, `distil` by probabilities and "
        "the others by labels. Of the coins in the weights little comes along.",
        "theft | test, PGD | coins | p | verdict",
        (asked_for(name, f"theft {name}") for name in THEFT),
    )
    section(
        "The guarded service",
        "Near ties meet coins for a stated cost in points; each thief has one account, and p is "
        "the anytime p-value of that account. Strangers are a robust one, the source model and a "
        "copy taught by bare answers. The robust thief mirrors images, as the owner does; "
        "`doubting` drops, and `relearned` replaces, what copies contradict that were not told it "
        "([thieves](guard-results.md#thieves-who-know-the-scheme)).",
        "thief | queries | stated cost | cost on test | trials | agree:other | log10 p "
        "| strangers' | copy: test",
        (proven(thief, cost) for cost in COSTS for thief in GUARDED),
    )
    if missing:
        lines += ["", f"Not made yet: {'; '.join(dict.fromkeys(missing))}."]
    return "\n".join(lines) + "\n"


def _made_on(study: Study) -> str:
    """The devices and the code that the parts name; earlier ones name none."""
    parts = [read_json(path) for path in sorted((study.out / "told").glob("*.json"))]
    naming = [part for part in parts if "code" in part]
    if not naming:
        return describe(study.device, "auto")
    devices, codes = (
        ", ".join(dict.fromkeys(part[name] for part in naming)) for name in ("device", "code")
    )
    some = "" if len(naming) == len(parts) else f" ({len(naming)} of {len(parts)} figures)"
    return f"{devices}, code {codes}{some}"


def _beside(what: str, wanted: str, found: Iterable[str | None]) -> str | None:
    """What was found beside what was wanted, of coins and of textures; nothing if nothing was."""
    told = [each or "" for each in found]
    told += [""] * (2 - len(told))
    return f"| {what} | {wanted} | {' | '.join(told)} |" if any(told) else None


def _tenths(value: float) -> str:
    return f"{round(value, 1) + 0.0:.1f}"  # no -0.0


def _agreed(row: Mapping[str, Any] | None) -> str | None:
    if row is None:
        return None
    trials = row["agreements"] + row["disagreements"] + row["neither"]
    return f"{100 * row['agreements'] / trials:.1f} %"


def _pair(title: str, *rows: dict[str, Any] | None) -> str | None:
    """What two marks say of one removal; nothing if neither was made."""
    told = [" | | " if row is None else _coins(row) for row in rows]
    return None if all(row is None for row in rows) else f"| {title} | {' | '.join(told)} |"


def _coins(row: dict[str, Any]) -> str:
    """Accuracies, coins and p of a suspect."""
    names = ("test_accuracy", "adversarial_accuracy")
    accuracies = ", ".join(f"{row[name]:.2f}" for name in names if row.get(name) is not None)
    coins = f"{row['agreements']}:{row['disagreements']}"
    return f"{accuracies} | {coins} | {p_value(row['log10_p_value'])}"


PARTS = (owner, controls, strangers, removals, textures, thefts, guard)


def main() -> None:
    """Make the parts that are wanted, and the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="place of the images, as protect takes it")
    parser.add_argument("--out", type=Path, default=Path("runs/colour"))
    parser.add_argument("--page", type=Path, default=Path("docs/colour-results.md"))
    parser.add_argument("--objective", default="strong")
    parser.add_argument("--network", default="narrow")
    parser.add_argument("--images", type=int, default=500, help="of the strict accuracy")
    parser.add_argument("--epochs", type=int, help="of the owner's source model and strangers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[part.__name__ for part in PARTS],
        help="make these parts and no page",
    )
    parser.add_argument("--table", action="store_true", help="write the page from what is there")
    given = parser.parse_args()
    keep_freed_memory()
    study = Study(
        given.data,
        given.out,
        given.objective,
        given.network,
        given.images,
        given.seed,
        given.device,
        given.epochs,
    )
    for part in PARTS if not given.table else ():
        if given.only is None or part.__name__ in given.only:
            part(study)
    if given.only is None or given.table:
        given.page.write_text(page(study))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
