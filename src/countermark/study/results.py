"""The flat list of the measurements of finished units, and its statistics.

Tables, figures and sentences are made from these statistics.
"""

import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from countermark.files import write_bytes
from countermark.study.grid import Cell
from countermark.study.store import Store

FIELDS = (
    "protocol",
    "section",
    "data",
    "seed",
    "defence",
    "setting",
    "removal",
    "amount",
    "scheme",
    "budget",
    "stranger",
    "test",
    "adversarial",
    "strict",
    "watermark",
    "agree",
    "disagree",
    "neither",
    "log10_p",
    "own_mark",
    "unit",
)
"""Columns of a measurement.

Accuracies are in percent; `amount` is the rate, the epochs or the budget of a removal or an attack.
"""

Row = dict[str, Any]


def measurements(cells: Iterable[Cell], store: Store, protocol: str) -> list[Row]:
    """One row for each point that the units of `cells` measured, all with the same fields."""
    rows = []
    for cell in cells:
        for point in store.result(cell.unit)["points"]:
            row: Row = {
                **dict.fromkeys(FIELDS),
                "protocol": protocol,
                **cell.place,
                "unit": cell.unit.digest,
            }
            row |= {name: value for name, value in point.items() if name != "watermark"}
            if point.get("watermark") is not None:
                tally = dict(point["watermark"])
                row["watermark"] = tally.pop("accuracy")
                row |= tally
            rows.append(row)
    return rows


def where(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows that have all of these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        values: one for each seed.
        units: the units they came from.
    """

    values: tuple[float, ...]
    units: tuple[str, ...]

    @property
    def count(self) -> int:
        """Number of values."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Their mean."""
        return statistics.fmean(self.values)

    @property
    def half(self) -> float | None:
        """Half the width of the mean's 95 % t-interval; none for a single value."""
        if len(self.values) < 2:
            return None
        from scipy.stats import t

        quantile = float(t.ppf(0.975, len(self.values) - 1))
        return quantile * statistics.stdev(self.values) / math.sqrt(len(self.values))

    @property
    def told(self) -> str:
        """The mean and its interval, for a reader."""
        return f"{self.mean:.2f}" + ("" if self.half is None else f" ± {self.half:.2f}")


def estimate(rows: Sequence[Row], metric: str) -> Estimate | None:
    """The mean of a metric over rows that differ in their seed; none where nothing was measured."""
    found = [row for row in rows if row[metric] is not None]
    if not found:
        return None
    return Estimate(tuple(float(row[metric]) for row in found), tuple(row["unit"] for row in found))


def auc(thieves: Sequence[float], strangers: Sequence[float]) -> float | None:
    """Area under the ROC curve: how often a thief scores above a stranger, ties counted half."""
    if not thieves or not strangers:
        return None
    return statistics.fmean((a > b) + 0.5 * (a == b) for a in thieves for b in strangers)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write rows as CSV, whole or not at all."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())
