"""The tables: the paper's beside ours, then those that it lacks."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from countermark import threat
from countermark.data import known
from countermark.files import read_bytes
from countermark.study.grid import MARKS, STUDIED, TRAINED_ON
from countermark.study.results import Estimate, Row, auc, estimate, where
from countermark.thieves import THEFTS
from countermark.watermarks import SCHEMES

METRICS = ("test", "adversarial", "watermark")
FIRST = ("table2", "table3", "strangers")
"""The tables that answer what a reader of the paper asks first."""
SPREAD = " ±"
"""Ends the heading of a column that holds half the 95 % intervals of the column before it."""
SETTINGS = tuple(theft.title for theft in THEFTS.values() if theft.paper)
RULE = 50.0
"""The paper calls ownership verified from this watermark accuracy, in percent."""


@dataclass(frozen=True)
class Table:
    """A table of strings and numbers.

    Attributes:
        name: short name, also of its CSV file.
        title: what a reader sees above it.
        note: what a reader must know to read it.
        columns: their headings; see `SPREAD`.
        keys: how many of the first columns say what a row is about.
        rows: a row is a value for each column; numbers are in the unit that the heading says.
        units: for each row the units that its numbers came from.
    """

    name: str
    title: str
    note: str
    columns: tuple[str, ...]
    keys: int
    rows: tuple[tuple[Any, ...], ...]
    units: tuple[tuple[str, ...], ...]


@cache
def published() -> dict[str, Any]:
    """The paper's numbers."""
    loaded: dict[str, Any] = json.loads(
        read_bytes(Path(__file__).with_name("published.json"), 1 << 20)
    )
    return loaded


_DEFENCES = {
    "no_defence": "none",
    "advtr": "ADVTR",
    "wm_ood": "WM ood",
    "wm_adversarial": "WM adversarial",
    "ood": "ADVTR+ood",
    "adversarial": "ADVTR+adversarial",
}
_PAPER_METRICS = {"test": "test", "adv": "adversarial", "watermark": "watermark"}
_SIDE_BY_SIDE = (
    ("table1_single_defence", "Table 1", "One defence at a time", "white-box"),
    (
        "table2_advtr_plus_watermark",
        "Table 2",
        "Adversarial training and a watermark together",
        "white-box",
    ),
    (
        "table3_black_box_theft",
        "Table 3",
        "Black-box theft (Algorithm 2, labels only, another network)",
        "black-box",
    ),
    (
        "table4_grey_box_theft",
        "Table 4",
        "Grey-box theft (the same, the owner's network, trained adversarially)",
        "grey-box",
    ),
)


_AGREEMENT = "Percent. Watermark accuracy is agreement with the watermark labels."
_STRICT = (
    "Adversarial accuracy is under the paper's PGD; strict accuracy is what that and four stronger "
    "attacks together leave of some of the test images (how many is said at the end)."
)
_REMARKS = {
    "Table 4": (
        (
            "The published thief of Fashion-MNIST trains at MNIST's budget of 0.25 in 15 steps of "
            "0.01, which move a pixel by 0.15 at most, so few pixels reach the bound. So does ours "
            "under the protocol as-published in the profile paper; in the others the thief takes "
            "one step, which may go to the bound."
        ),
    ),
}


def paper_value(table: str, column: str, data: str) -> float | None:
    """A published number, in percent; none for data sets that the paper does not have."""
    content = published()[table]
    values = content.get(data)
    return float(values[content["columns"].index(column)]) if values is not None else None


def tables(rows: Sequence[Row]) -> list[Table]:
    """All tables of one protocol's measurements, those of `FIRST` first."""
    data_sets = list(dict.fromkeys(row["data"] for row in rows))
    made = [_side_by_side(rows, data_sets, *entry) for entry in _SIDE_BY_SIDE]
    made += [
        _budgets(rows, data_sets),
        _marks(rows, data_sets),
        _removal(rows, data_sets, "pruned"),
        _removal(rows, data_sets, "fine-tuned"),
        _strangers(rows, data_sets),
        _separation(rows, data_sets),
        _beyond(rows, data_sets),
        _sweep(rows, data_sets),
    ]
    made.sort(key=lambda table: FIRST.index(table.name) if table.name in FIRST else len(FIRST))
    return [table for table in made if table.rows]


def by_name(made: Mapping[str, Sequence[Table]]) -> list[dict[str, Table]]:
    """Each table as the protocols have it: tables by protocol, for every name."""
    named: dict[str, dict[str, Table]] = {}
    for protocol, part in made.items():
        for table in part:
            named.setdefault(table.name, {})[protocol] = table
    return list(named.values())


def shown(value: Any) -> str:
    """A table's value as a reader sees it: two decimals, nothing where there is none."""
    if value is None:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def readable(table: Table) -> Table:
    """The table as a reader sees it: strings, and each interval behind its value."""
    spreads = [column.endswith(SPREAD) for column in table.columns]
    kept = [i for i, spread in enumerate(spreads) if not spread]
    rows = []
    for row in table.rows:
        told = [shown(value) for value in row]
        for i, spread in enumerate(spreads):
            if spread and row[i] is not None:
                told[i - 1] += f"{SPREAD} {told[i]}"
        rows.append(tuple(told[i] for i in kept))
    return replace(table, columns=tuple(table.columns[i] for i in kept), rows=tuple(rows))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def _spread(value: Estimate | None) -> tuple[float | None, float | None]:
    """A mean and half its interval."""
    return (None, None) if value is None else (_rounded(value.mean), _rounded(value.half))


def _spreads(values: Iterable[Estimate | None]) -> tuple[float | None, ...]:
    return tuple(number for value in values for number in _spread(value))


def _with_spreads(*columns: str) -> tuple[str, ...]:
    return tuple(name for column in columns for name in (column, f"{column}{SPREAD}"))


def _compared(paper: float | None, ours: Estimate) -> tuple[Any, ...]:
    difference = None if paper is None else ours.mean - paper
    return (_rounded(paper), *_spread(ours), ours.count, _rounded(difference))


def _proven(rows: Sequence[Row]) -> tuple[Any, ...]:
    """Coins and p-value of models that differ in their seed."""
    judged = [row for row in rows if row["log10_p"] is not None]
    coins = " ".join(f"{row['agree']}:{row['disagree']}" for row in judged)
    return coins, _rounded(max((row["log10_p"] for row in judged), default=None))


_COMPARED = ("paper", *_with_spreads("ours"), "seeds", "difference")
_PROVEN = ("coins", "log10 p")


_Line = tuple[tuple[Any, ...], Iterable[str]]
"""A row of a table, and the units that its numbers came from."""


def _table(
    name: str,
    title: str,
    note: str,
    keys: tuple[str, ...],
    values: tuple[str, ...],
    lines: Iterable[_Line],
) -> Table:
    kept = list(lines)
    return Table(
        name,
        title,
        note,
        (*keys, *values),
        len(keys),
        tuple(row for row, _ in kept),
        tuple(tuple(dict.fromkeys(units)) for _, units in kept),
    )


def _side_by_side(
    rows: Sequence[Row], data_sets: Sequence[str], key: str, number: str, title: str, setting: str
) -> Table:
    lines: list[_Line] = []

    def line(data: str, defence: str, metric: str, section: str, column: str | None) -> None:
        place = {"data": data, "defence": _DEFENCES[defence], "setting": setting}
        if section == "model":
            place["removal"] = "none"
        ours = estimate(where(rows, section=section, **place), metric)
        if ours is not None:
            paper = None if column is None else paper_value(key, column, data)
            what = (STUDIED[data].title, place["defence"], f"{metric} accuracy")
            lines.append(((*what, *_compared(paper, ours)), ours.units))

    for data in data_sets:
        for column in published()[key]["columns"]:
            defence, metric = column.split(".")
            line(data, defence, _PAPER_METRICS[metric], "model", column)
            if metric == "adv":
                line(data, defence, "strict", "strict", None)
    strict = any(what[2].startswith("strict") for what, _ in lines)
    return _table(
        number.lower().replace(" ", ""),
        f"{number}. {title}",
        " ".join([_AGREEMENT, *([_STRICT] if strict else []), *_REMARKS.get(number, ())]),
        ("data", "defence", "measure"),
        _COMPARED,
        lines,
    )


def _budgets(rows: Sequence[Row], data_sets: Sequence[str]) -> Table:
    lines: list[_Line] = []
    for data in data_sets:
        found = where(rows, section="budgets", data=data)
        if not found:
            continue
        model = where(
            rows, section="model", data=data, defence="ADVTR", setting=SETTINGS[0], removal="none"
        )
        wanted = [("none (test accuracy)", "test", model, "test")]
        wanted += [
            (
                f"budget {threat.shown(epsilon)}, {steps} steps of 0.01",
                f"({epsilon:g},{steps})",
                [row for row in found if row["amount"] == [epsilon, steps]],
                "adversarial",
            )
            for epsilon, steps in STUDIED[data].budgets
        ]
        for attack, column, part, metric in wanted:
            ours = estimate(part, metric)
            if ours is not None:
                paper = paper_value("table5_advtr_at_larger_budgets", column, data)
                lines.append(((STUDIED[data].title, attack, *_compared(paper, ours)), ours.units))
    title = "Table 5. Adversarially trained model under other budgets"
    note = "Accuracy that the attack leaves, in percent; on how many images is said at the end."
    return _table("table5", title, note, ("data", "attack"), _COMPARED, lines)


def _marks(rows: Sequence[Row], data_sets: Sequence[str]) -> Table:
    """Our scheme and the unmarked models, which the paper's tables do not have."""
    lines = []
    for data in data_sets:
        for defence in ("ADVTR", TRAINED_ON, "ADVTR+coin", "WM coin"):
            for setting in SETTINGS:
                alike = where(rows, data=data, defence=defence, setting=setting)
                found = where(alike, section="model", removal="none")
                strict = where(alike, section="strict")
                if found:
                    test, adversarial, mark = (estimate(found, metric) for metric in METRICS)
                    told = _spreads((test, adversarial, estimate(strict, "strict"), mark))
                    what = (STUDIED[data].title, defence, setting, *told, *_proven(found))
                    lines.append((what, [row["unit"] for row in (*found, *strict)]))
    keys = ("data", "defence", "stolen by")
    values = (*_with_spreads("test", "adversarial", "strict", "watermark"), *_PROVEN)
    note = (
        "Percent; coins are answers as the coins chose against the other way, seed by seed; p is "
        "exact, the largest over seeds. Under the protocol clean marks are trained in from the "
        "unmarked model (ADVTR, or none for WM); 'trained on' is ADVTR with the same further "
        "epochs without a mark. Strict accuracies are all of the same few images (how many is said "
        "at the end): of 500, 95 % intervals reach up to four points either way."
    )
    title = "The coins beside the published schemes"
    return _table("marks", title, note, keys, values, lines)


def _removal(rows: Sequence[Row], data_sets: Sequence[str], removal: str) -> Table:
    lines = []
    for data in data_sets:
        for setting in SETTINGS:
            for amount in sorted(
                {row["amount"] for row in where(rows, section="removal", removal=removal)}
            ):
                found = where(
                    rows,
                    section="removal",
                    data=data,
                    setting=setting,
                    removal=removal,
                    amount=amount,
                )
                by_defence = {
                    f"ADVTR+{scheme}": where(found, defence=f"ADVTR+{scheme}") for scheme in MARKS
                }
                means = [estimate(part, "watermark") for part in by_defence.values()]
                units = [unit for value in means if value is not None for unit in value.units]
                if units:
                    coins = by_defence["ADVTR+coin"]
                    worst = _rounded(max((row["log10_p"] for row in coins), default=None))
                    what = round(100 * amount) if removal == "pruned" else amount
                    cost = _spread(estimate(coins, "test"))
                    line = (STUDIED[data].title, setting, what, *_spreads(means), worst, *cost)
                    lines.append((line, units))
    part, amount = ("a", "pruned, %") if removal == "pruned" else ("b", "epochs")
    return _table(
        removal,
        f"Figures 2 to 4 ({part}). Stolen models, {removal}",
        "Watermark accuracy in percent of the ADVTR models; the largest p over seeds.",
        ("data", "stolen by", amount),
        (*_with_spreads(*MARKS), "coin: log10 p", *_with_spreads("coin: test accuracy")),
        lines,
    )


def _strangers(rows: Sequence[Row], data_sets: Sequence[str]) -> Table:
    lines = []
    for data in data_sets:
        for scheme in MARKS:
            found = where(rows, section="strangers", data=data, scheme=scheme)
            if not found:
                continue
            scores = sorted(row["watermark"] for row in found)
            accused = sum(score >= RULE for score in scores)
            smallest = min(
                (row["log10_p"] for row in found if row["log10_p"] is not None), default=None
            )
            told = map(_rounded, (scores[0], statistics.median(scores), scores[-1]))
            rate = f"{accused} of {len(scores)}"
            lines.append(
                (
                    (STUDIED[data].title, scheme, *told, rate, _rounded(smallest)),
                    [row["unit"] for row in found],
                )
            )
    values = ("lowest", "median", "highest", "accused by the 50 % rule", "smallest log10 p")
    note = (
        "Watermark accuracy, in percent, of models that never saw the mark: standard, robust, of "
        "another architecture, thefts of unmarked models, and the owner's own unmarked models. "
        "Some are copies of others, so the rate has no interval. An exact p-value needs no bank; "
        "strangers' p-values are anywhere in (0, 1)."
    )
    title = "The control: strangers asked for the same watermarks"
    return _table("strangers", title, note, ("data", "scheme"), values, lines)


def _separation(rows: Sequence[Row], data_sets: Sequence[str]) -> Table:
    lines = []
    for data in data_sets:
        for scheme in MARKS:
            strangers = where(rows, section="strangers", data=data, scheme=scheme)
            for setting in SETTINGS:
                thieves = where(
                    rows, section="model", data=data, scheme=scheme, setting=setting, removal="none"
                )
                area = auc(
                    [row["watermark"] for row in thieves], [row["watermark"] for row in strangers]
                )
                if area is None:  # no thief or no stranger was made
                    continue
                lowest = min(row["watermark"] for row in thieves)
                convicted = sum(
                    row["log10_p"] is not None and row["log10_p"] <= -6 for row in thieves
                )
                told = f"{convicted} of {len(thieves)}" if SCHEMES[scheme].coins else None
                units = [row["unit"] for row in (*thieves, *strangers)]
                what = (STUDIED[data].title, scheme, setting)
                lines.append(((*what, _rounded(lowest), _rounded(area), told), units))
    keys = ("data", "scheme", "stolen by")
    values = ("lowest thief", "ROC AUC", "convicted at 1e-6")
    note = (
        "How well watermark accuracy tells thieves from strangers: 1 always, 0.5 not at all. Both "
        "defences of a scheme are counted."
    )
    return _table("separation", "Thieves against strangers", note, keys, values, lines)


def _beyond(rows: Sequence[Row], data_sets: Sequence[str]) -> Table:
    lines = []
    for data in data_sets:
        alike: dict[tuple[str, str], list[Row]] = {}
        for row in where(rows, section="beyond", data=data):
            what = row["setting"] if row["removal"] == "none" else row["removal"]
            alike.setdefault((row["defence"], what), []).append(row)
        for (defence, what), found in alike.items():
            told = _spreads(estimate(found, metric) for metric in METRICS)
            line = (STUDIED[data].title, defence, what, *told, *_proven(found))
            lines.append((line, [row["unit"] for row in found]))
    keys = ("data", "defence", "theft or removal")
    note = (
        "Thefts and removals that the paper does not try, on the adversarially trained models, in "
        "percent; coins seed by seed, and the largest p over seeds."
    )
    values = (*_with_spreads(*METRICS), *_PROVEN)
    return _table("beyond", "Beyond the paper", note, keys, values, lines)


def swept(rows: Sequence[Row], data: str) -> list[tuple[float, list[Row], list[Row]]]:
    """Select the measurements of each watermark budget, including the default one.

    Returns:
        For each budget: the budget, the rows of the marked models, and the rows of strangers asked
        for the same watermarks.
    """
    default = where(
        rows,
        section="model",
        data=data,
        defence="ADVTR+adversarial",
        setting="white-box",
        removal="none",
    )
    found = {row["budget"] for row in where(rows, section="sweep", data=data)}
    parts = [
        (
            budget,
            where(rows, section="sweep", data=data, budget=budget),
            where(rows, section="sweep strangers", data=data, budget=budget),
        )
        for budget in found
    ]
    if found and default:
        parts.append(
            (
                known(data).threat.watermark_epsilon,
                default,
                where(rows, section="strangers", data=data, scheme="adversarial"),
            )
        )
    return sorted(parts, key=lambda part: part[0])


def _sweep(rows: Sequence[Row], data_sets: Sequence[str]) -> Table:
    lines = []
    for data in data_sets:
        for budget, marked, strangers in swept(rows, data):
            means = _spreads(estimate(marked, metric) for metric in METRICS)
            theirs, _ = _spread(estimate(strangers, "watermark"))
            units = [row["unit"] for row in (*marked, *strangers)]
            lines.append(((STUDIED[data].title, threat.shown(budget), *means, theirs), units))
    keys = ("data", "watermark budget")
    values = (*_with_spreads(*METRICS), "strangers' watermark")
    note = (
        "ADVTR+adversarial with watermarks crafted at several budgets, in percent. In the profile "
        "quick the adversarial accuracy at other budgets than the default is that on 1,000 test "
        "images, give or take two points."
    )
    return _table("sweep", "The watermark budget", note, keys, values, lines)


def hyperparameters(settings: Mapping[str, Any]) -> Table:
    """Table 6: the paper's settings beside ours, which `settings` gives by data set."""
    content = published()["table6_hyperparameters"]
    columns, training = content["columns"], content["training"]
    lines: list[_Line] = []
    for data, ours in settings.items():
        paper = {}
        if data in content:
            paper = {**dict(zip(columns, content[data], strict=True)), **training}
        for name in (*columns, *training):
            told = (STUDIED[data].title, name, str(paper.get(name, "")), str(ours[name]))
            lines.append((told, ()))
    return _table("table6", "Table 6. Settings", "", ("data", "setting"), ("paper", "ours"), lines)
