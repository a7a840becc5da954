"""Measure the answer mark's power: p-values of thieves and strangers against queries and cost.

    python benchmarks/guard_power.py --data mnist --seeds 0 1 2 --thieves natural robust
    python benchmarks/guard_power.py --data mnist --seeds 0 --thieves black grey

Each seed protects a model (kept in runs/guard), calibrates a guard and plays its thieves, each with
an account of their own. The results of a finished thief are kept in runs/guard/*.json, and that
thief is not played again. p is the anytime p-value of one account, over the first trials of its
cells. Strangers are models that never saw the coins, asked for the very same trials, and the
thief's own training on the model's bare answers. `python benchmarks/guard_power.py --table` prints
what there is.
"""

import argparse
import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from countermark import protect
from countermark.attacks import pgd
from countermark.data import Examples, Pools, as_uint8, known, load_pools, pixels
from countermark.evaluation import accuracy, predict
from countermark.files import write_json
from countermark.guard import (
    CELL_BITS,
    Calibration,
    Guard,
    GuardedModel,
    Row,
    calibrate_model,
    expected_cost,
    images_of,
    trace_accounts,
    weights_sha256,
)
from countermark.guard.core import ELSEWHERE
from countermark.memory import keep_freed_memory
from countermark.networks import load_model
from countermark.networks.named import build
from countermark.thieves import THEFTS, Means
from countermark.threat import Attack
from countermark.training import TrainConfig, known_traits, recipe, train
from countermark.watermarks import load_secret

COST = {"mnist": 0.1, "fashion_mnist": 0.2}
NATURAL = (500, 1000, 2000, 4000, 8500)
QUERIES = 51_200
NOISE = 0.05  # of the copies that an averaging thief asks, in pixels

Victim = Callable[[torch.Tensor], torch.Tensor]


class Account:
    """A client of the guarded model.

    It answers the client's queries and keeps their first trials, as the service's log does.
    """

    def __init__(self, model: GuardedModel, name: str) -> None:
        """Open an account."""
        self.model, self.name = model, name
        self.rows: dict[bytes, Row] = {}
        self.asked = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Answer images."""
        answers = self.model(x, self.name)
        self.asked += len(x)
        for trial in answers.trials:
            if trial.cell not in self.rows:
                image = answers.images[trial.row].contiguous().numpy().tobytes()
                numbers = (trial.heads, trial.tails, trial.chance, trial.answer, 0)
                self.rows[trial.cell] = Row(
                    self.model.guard.settings.model_sha256, self.name, trial.cell, image, *numbers
                )
        return answers.labels


def natural(victim: Victim, data: str, pools: Pools, seed: int, count: int) -> nn.Module:
    """A Knockoff thief: unlabelled natural images, standard training."""
    x = pools.thief.x[:count]
    return _standard(Examples(x, victim(x)), data, seed)


def robust(victim: Victim, data: str, pools: Pools, seed: int, count: int) -> nn.Module:
    """The same, adversarially trained at the owner's budget."""
    x = pools.thief.x[:count]
    network = build("small", known(data).shape, known(data).classes, seed=900 + seed)
    train(
        network,
        Examples(x, victim(x)),
        recipe(known_traits(data), "fast", known(data).threat, epochs=25, seed=seed),
    )
    return network


def averaging(victim: Victim, data: str, pools: Pools, seed: int, count: int) -> nn.Module:
    """A thief who asks nine noisy copies of each image and takes the majority answer.

    `count` is the number of images; there are nine times as many queries.
    """
    x = pools.thief.x[:count]
    generator = torch.Generator().manual_seed(seed)
    copies = [
        as_uint8(pixels(x) + NOISE * torch.randn(x.shape, generator=generator)) for _ in range(9)
    ]
    votes = torch.stack([victim(copy) for copy in copies])
    return _standard(Examples(x, votes.mode(0).values), data, seed)


def dropping(victim: Victim, data: str, pools: Pools, seed: int, count: int) -> nn.Module:
    """A thief who trains twice.

    They drop the tenth of their queries that the first copy is least sure of, and train anew on the
    rest.
    """
    x = pools.thief.x[:count]
    y = victim(x)
    first = _standard(Examples(x, y), data, seed)
    with torch.no_grad():
        best = torch.cat(
            [first(pixels(part)).topk(2, dim=1).values for part in torch.split(x, 500)]
        )
    kept = (best[:, 0] - best[:, 1]).argsort(descending=True)[: int(0.9 * count)]
    return _standard(Examples(x[kept], y[kept]), data, seed + 1)


def flipping(victim: Victim, data: str, pools: Pools, seed: int, count: int) -> nn.Module:
    """A thief who replaces 5 % of the answers by other classes before they train."""
    x = pools.thief.x[:count]
    y = victim(x)
    generator = torch.Generator().manual_seed(seed)
    flipped = torch.rand(count, generator=generator) < 0.05
    other = (y + torch.randint(1, known(data).classes, (count,), generator=generator)) % known(
        data
    ).classes
    return _standard(Examples(x, torch.where(flipped, other, y)), data, seed)


def relearned(victim: Victim, data: str, pools: Pools, seed: int, count: int) -> nn.Module:
    """A thief who replaces all answers by what copies predict that were not told them (3 folds)."""
    x, _, held = _held_out(victim, data, pools, seed, count)
    return _standard(Examples(x, held), data, seed + 1)


def doubting(victim: Victim, data: str, pools: Pools, seed: int, count: int) -> nn.Module:
    """A thief who drops the answers that copies do not predict that were not told them."""
    x, y, held = _held_out(victim, data, pools, seed, count)
    return _standard(Examples(x[held == y], y[held == y]), data, seed + 1)


def colluding(victim: Victim, data: str, pools: Pools, seed: int, count: int) -> nn.Module:
    """A thief with three accounts who asks all of them the same and takes the majority answer.

    The coins that are traced are those of the first account alone.
    """
    x = pools.thief.x[:count]
    assert isinstance(victim, Account)
    others = [Account(victim.model, f"{victim.name}, account {k}") for k in (2, 3)]
    votes = torch.stack([victim(x), *(other(x) for other in others)])
    return _standard(Examples(x, votes.mode(0).values), data, seed)


def uncertain(victim: Victim, data: str, pools: Pools, seed: int, count: int) -> nn.Module:
    """BEST: a robust copy from images where it is least sure (Li et al., 2023)."""
    network = build("small", known(data).shape, known(data).classes, seed=900 + seed)
    means = Means(pool=pools.thief, threat=known(data).threat, seed=seed)
    THEFTS["best"].run(victim, network, means.given(THEFTS["best"].options, {"queries": count}))
    return network


def _held_out(
    victim: Victim, data: str, pools: Pools, seed: int, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A thief's images, their answers, and what copies predict that were not told those."""
    x = pools.thief.x[:count]
    y = victim(x)
    return x, y, held_out(Examples(x, y), seed, lambda told, each: _standard(told, data, each))


def held_out(
    answered: Examples, seed: int, learn: Callable[[Examples, int], nn.Module]
) -> torch.Tensor:
    """What copies predict of answered images that were not told those answers (3 folds).

    Args:
        answered: images and the answers to them.
        seed: of the folds; the copies have others.
        learn: makes a copy of some answers with a seed.
    """
    x, y = answered.x, answered.y
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    held = torch.empty_like(y)
    for fold in range(3):
        out = order[fold::3]
        rest = torch.cat([order[other::3] for other in range(3) if other != fold])
        held[out] = predict(learn(Examples(x[rest], y[rest]), seed + 10 + fold), x[out])
    return held


def black(victim: Victim, data: str, pools: Pools, seed: int, count: int) -> nn.Module:
    """Algorithm 2 with the paper's settings."""
    network = build("surrogate", known(data).shape, known(data).classes, seed=900 + seed)
    means = Means(pool=pools.thief, threat=known(data).threat, seed=seed)
    THEFTS["black"].run(victim, network, means.given(THEFTS["black"].options, {"queries": count}))
    return network


def grey(victim: Victim, data: str, pools: Pools, seed: int, count: int) -> nn.Module:
    """Algorithm 2 with the owner's network, adversarially trained (single steps)."""
    network = build("small", known(data).shape, known(data).classes, seed=900 + seed)
    attack = Attack(known(data).threat.epsilon, 1, 1.25 * known(data).threat.epsilon)
    means = Means(pool=pools.thief, threat=known(data).threat, attack=attack, seed=seed)
    hurried = {"queries": count, "batch_size": 128, "learning_rate": 0.05, "epochs": 5}
    THEFTS["grey"].run(victim, network, means.given(THEFTS["grey"].options, hurried))
    return network


THIEVES = {
    f.__name__: f
    for f in (
        *(natural, robust, averaging, dropping, flipping, relearned, doubting, colluding),
        *(uncertain, black, grey),
    )
}
COUNTS = {
    "natural": NATURAL,
    "robust": (2000, 8500),
    "averaging": (2000,),
    "dropping": (2000,),
    "flipping": (2000,),
}


def _standard(examples: Examples, data: str, seed: int) -> nn.Module:
    network = build("small", known(data).shape, known(data).classes, seed=900 + seed)
    train(
        network,
        examples,
        TrainConfig(objective="standard", attack=None, epochs=30, learning_rate=0.05, seed=seed),
    )
    return network


def attacked(network: nn.Module, data: str, test: Examples) -> Examples:
    """Adversarial examples of every fifth test image, as a client under attack would send them."""
    part, catalogued = test[::5], known(data)
    parts = [
        pgd(
            network,
            pixels(x),
            y,
            epsilon=catalogued.threat.epsilon,
            steps=catalogued.threat.steps,
            step_size=catalogued.threat.step_size,
        )
        for x, y in zip(torch.split(part.x, 500), torch.split(part.y, 500), strict=True)
    ]
    return Examples(as_uint8(torch.cat(parts)), part.y)


def calibrated(
    folder: Path,
    network: nn.Module,
    data: str,
    pools: Pools,
    cost: float,
    bits: int = CELL_BITS,
    foreign: bool = True,
) -> Calibration:
    """Calibrate a guard as the verb does, and write nothing."""
    return calibrate_model(
        network,
        pools.validation,
        secret=load_secret(folder / "key"),
        model_sha256=weights_sha256(folder),
        cost=cost,
        bits=bits,
        training=pools.training if foreign else None,
        epsilon=known(data).threat.epsilon,
    )


def judged(
    suspect: nn.Module, rows: list[Row], shape: tuple[int, int, int], secret: bytes
) -> dict[str, object]:
    """What one account's trials say about a suspect."""
    if not rows:
        return {"log10_p": 0.0, "agree": 0, "other": 0, "expected": 0.0}
    account = trace_accounts(rows, predict(suspect, images_of(rows, shape)), secret).accounts[0]
    return {
        "log10_p": account.log10_p_alone,
        "agree": account.agreements,
        "other": account.disagreements,
        "expected": account.expected,
    }


def protected(runs: Path, data: str, seed: int) -> None:
    """Make the owner's model and a stranger, unless they are there."""
    for place, options in (
        (runs / f"{data}-{seed}", {}),
        (runs / f"{data}-{seed}-stranger", {"scheme": "none", "seed": seed + 500}),
    ):
        if not place.exists():
            protect(data, out=place, **{"seed": seed, **options})  # type: ignore[arg-type]


def play(
    runs: Path, data: str, seed: int, thief: str, count: int, cost: float, bits: int, foreign: bool
) -> None:
    """Play one thief, unless it was played before."""
    out = (
        runs / f"{data}-{seed}-{thief}-{count}-{cost:g}-{bits}{'-foreign' if foreign else ''}.json"
    )
    if out.exists():
        return
    folder = runs / f"{data}-{seed}"
    protected(runs, data, seed)
    network, _ = load_model(folder)
    pools = load_pools(data, seed)
    secret = load_secret(folder / "key")
    found = calibrated(folder, network, data, pools, cost, bits, foreign)
    model = GuardedModel(network, Guard(found.settings, secret))
    account = Account(model, f"{thief} {count}")
    copy = THIEVES[thief](account, data, pools, seed, count)
    rows = list(account.rows.values())
    shape = known(data).shape
    strangers = {
        "before the mark": load_model(folder / "key" / "source")[0],
        "as robust": load_model(runs / f"{data}-{seed}-stranger")[0],
        "theft of bare answers": THIEVES["natural"](
            lambda x: predict(network, x), data, pools, seed, min(count, 8500)
        ),
    }
    cost_on_test = expected_cost(model, pools.test)
    record = {
        "data": data,
        "seed": seed,
        "thief": thief,
        "queries": account.asked,
        "images": count,
        "cost": cost_on_test.points,
        "cost_error": cost_on_test.standard_error,
        "stated_cost": cost,
        "bits": bits,
        "foreign_coins": found.settings.familiar is not None,
        "foreign_trials": sum(row.cell.startswith(ELSEWHERE) for row in rows),
        "cost_under_attack": expected_cost(model, attacked(network, data, pools.test)).points,
        "entropy": found.entropy,
        "test_accuracy": accuracy(copy, pools.test),
        "owner_accuracy": accuracy(network, pools.test),
        "trials": len(rows),
        "suspect": judged(copy, rows, shape, secret),
        "strangers": {
            name: judged(stranger, rows, shape, secret) for name, stranger in strangers.items()
        },
    }
    write_json(out, record)
    print(
        json.dumps(
            {
                name: record[name]
                for name in ("data", "seed", "thief", "images", "trials", "suspect")
            }
        ),
        flush=True,
    )


TITLES = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST"}
COLUMNS = (
    *("data", "thief", "queries", "stated cost", "seed", "cost on the test pool"),
    *("its standard error", "cost in adversarial accuracy", "trials", "of them foreign", "agree"),
    *("other", "a stranger agrees", "log10 p", "lowest log10 p of strangers"),
    "copy's test accuracy",
)


def table(runs: Path) -> str:
    """What was played with the usual number of projections, as CSV."""
    read = (json.loads(path.read_text()) for path in runs.glob("*.json"))
    kept = [r for r in read if "thief" in r and r["bits"] == CELL_BITS]
    order = list(THIEVES)

    def place(r: dict[str, Any]) -> tuple[Any, ...]:
        first = r["data"] != "mnist", order.index(r["thief"]), r["images"]
        return *first, r["stated_cost"], r["seed"]

    def maybe(r: dict[str, Any], name: str, form: str) -> str:
        return format(r[name], form) if name in r else ""  # earlier records lack some

    written = io.StringIO()
    rows = csv.writer(written, lineterminator="\n")
    rows.writerow(COLUMNS)
    for r in sorted(kept, key=place):
        found, others = r["suspect"], [stranger["log10_p"] for stranger in r["strangers"].values()]
        rows.writerow(
            (
                TITLES.get(r["data"], r["data"]),
                *(r["thief"], r["queries"], f"{r['stated_cost']:g}", r["seed"]),
                *(f"{r['cost']:.3f}", maybe(r, "cost_error", ".3f")),
                maybe(r, "cost_under_attack", ".2f"),
                *(r["trials"], r.get("foreign_trials", 0), found["agree"], found["other"]),
                *(f"{found['expected']:.0f}", f"{found['log10_p']:.1f}", f"{min(others):.1f}"),
                f"{r['test_accuracy']:.1f}",
            )
        )
    return written.getvalue()


def main() -> None:
    """Play what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=["mnist", "fashion_mnist"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--thieves",
        nargs="+",
        default=["natural", "robust", "averaging", "dropping", "flipping", "black"],
        choices=list(THIEVES),
    )
    parser.add_argument(
        "--images",
        nargs="+",
        type=int,
        help="how many images a thief asks (or starts from); default the usual numbers",
    )
    parser.add_argument(
        "--cost", type=float, help="points of accuracy; default .1 for mnist, .2 for fashion_mnist"
    )
    parser.add_argument("--bits", type=int, default=16)
    parser.add_argument("--natural-only", action="store_true", help="no coins for made-up queries")
    parser.add_argument("--runs", type=Path, default=Path("runs/guard"))
    parser.add_argument("--table", action="store_true", help="only print what was played")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    options.runs.mkdir(parents=True, exist_ok=True)
    if not options.table:
        for seed in options.seeds:
            for data in options.data:
                for thief in options.thieves:
                    for count in options.images or COUNTS.get(thief, (QUERIES,)):
                        cost, foreign = options.cost or COST[data], not options.natural_only
                        play(options.runs, data, seed, thief, count, cost, options.bits, foreign)
    print(table(options.runs), end="")


if __name__ == "__main__":
    main()
