"""The figures, as SVG: crisp at any size, readable in light and in dark."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from countermark.files import read_tensors
from countermark.study.grid import MARKS, STUDIED
from countermark.study.results import Row, estimate, where
from countermark.study.tables import RULE, SETTINGS, swept

_PALETTE = ("#b45309", "#2563eb", "#15803d", "#7c3aed", "#be123c")
_COLOURS = dict(zip(MARKS, _PALETTE, strict=False))
_LINES = dict(zip(SETTINGS, zip(_PALETTE, "os^Dv", strict=True), strict=False))
_GREY = "#6b7280"
_AMOUNTS = {"pruned": ("weights pruned, %", 100), "fine-tuned": ("epochs of fine-tuning", 1)}
"""By removal: what its amount is, and what it is multiplied by."""
_METRICS = {"adversarial": "#2563eb", "watermark": "#b45309"}
_SHADES = {
    "training": "#9ca3af",
    "adversarial training": "#2563eb",
    "adversarial watermarks": "#dc2626",
}
_SHADES |= {"coin watermarks": "#15803d", "ood watermarks": "#b45309"}
_LIMIT = 1 << 28
_WIDTH = 6.9
"""Inches of a figure in a page's column of text, where 9 points are 12 pixels."""
_DARK = "@media (prefers-color-scheme: dark){#figure_1{filter:invert(1) hue-rotate(180deg)}}"
_FONTS = re.compile(r"'DejaVu Sans'[^;\"]*sans-serif")

CAPTIONS = {
    "pruned": (
        "Watermark accuracy of stolen models, by how much of them is pruned (the paper's Figures 2 "
        "to 4 (a)). The grey band holds all strangers; the dashed line is the paper's 50 % rule. "
        "The last row is the test accuracy of the copies with coins."
    ),
    "fine-tuned": (
        "Watermark accuracy of stolen models, by the epochs of fine-tuning (the paper's Figures 2 "
        "to 4 (b)). Lines, band and the last row are as for pruning."
    ),
    "p_values": (
        "Exact p-values of the coins in white-box copies. The dashed line is a judge's 1e-9; the "
        "grey band holds all strangers."
    ),
    "strangers": (
        "Every thief and every stranger asked for the same watermarks: a threshold is evidence "
        "where no grey dot lies above it."
    ),
    "sweep": "Adversarial watermarks crafted at other budgets.",
    "figure1_5": (
        "Figures 1 and 5. Training images, their adversarial examples and watermarks, in the plane "
        "of the images' two first principal components (the paper does not say how it projects)."
    ),
    "figure6": (
        "Figure 6. An image, its adversarial example and its watermarks, with the adversarially "
        "trained model's answers. It is of those that watermarks are made from."
    ),
}
"""What a reader must know to read a figure, by the beginning of its name."""


def figures(
    rows: Sequence[Row], folders: Mapping[str, Mapping[str, Path]], answers: Mapping[str, Any]
) -> dict[str, str]:
    """Draw all figures of which something was measured.

    Args:
        rows: measurements of one protocol.
        folders: by data set, the folders of the units `pictures` and `plane`.
        answers: by data set, the result of the unit `pictures`.

    Returns:
        SVG text by name of the figure.
    """
    data_sets = list(dict.fromkeys(row["data"] for row in rows))
    sections = {row["section"] for row in rows}
    drawn = {}
    for removal in _AMOUNTS:
        if where(rows, section="removal", removal=removal):
            drawn[removal] = _removals(rows, data_sets, removal)
    if where(rows, section="removal", defence="ADVTR+coin", setting="white-box"):
        drawn["p_values"] = _p_values(rows, data_sets)
    if "strangers" in sections:
        drawn["strangers"] = _strangers(rows, data_sets)
    if "sweep" in sections:
        drawn["sweep"] = _sweep(rows, data_sets)
    for data, made in folders.items():
        if "plane" in made:
            drawn[f"figure1_5_{data}"] = _plane(made["plane"], data)
        if "pictures" in made:
            drawn[f"figure6_{data}"] = _pictures(made["pictures"], answers[data])
    return drawn


@contextmanager
def _drawing(
    columns: int, height: float = 2.9, width: float = 3.6, *, rows: int = 1, dark: bool = True
) -> Iterator[tuple[list[Any], list[str]]]:
    """Axes, row by row; the SVG text is appended to the list when the block ends.

    Args:
        columns: axes beside each other.
        height: inches of a row.
        width: inches of a column.
        rows: of axes.
        dark: whether a dark page inverts the figure, or else it has white paper.
    """
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    style = {
        "svg.hashsalt": "countermark",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.titlesize": 9,
        "legend.fontsize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    text: list[str] = []
    with mpl.rc_context({**style, "legend.frameon": False, "figure.dpi": 100}):
        figure, axes = plt.subplots(
            rows,
            columns,
            figsize=(width * columns, height * rows),
            sharex="col",
            squeeze=False,
            layout="constrained",
        )
        try:
            yield list(axes.flat), text
            out = io.StringIO()
            figure.savefig(
                out, format="svg", transparent=dark, metadata={"Date": None, "Creator": None}
            )
            svg = _FONTS.sub("sans-serif", out.getvalue())
            if dark:
                svg = svg.replace("</style>", f"{_DARK}</style>", 1)
            text.append(svg[svg.index("<svg") :])
        finally:
            plt.close(figure)


def _removals(rows: Sequence[Row], data_sets: Sequence[str], removal: str) -> str:
    """Stolen models after a removal: a column a data set, a row a scheme, a line a theft.

    Below them is what the removal costs the thief.
    """
    columns = len(data_sets)
    with _drawing(columns, 1.5, _WIDTH / max(2, columns), rows=len(MARKS) + 1) as (axes, text):
        for i, data in enumerate(data_sets):
            *marks, cost = axes[i::columns]
            for axis, scheme in zip(marks, MARKS, strict=True):
                found = where(rows, section="strangers", data=data, scheme=scheme)
                scores = [row["watermark"] for row in found] or [0]
                axis.axhspan(
                    min(scores), max(scores), color=_GREY, alpha=0.25, lw=0, label="strangers"
                )
                axis.axhline(RULE, color=_GREY, lw=0.8, ls="--", label="50 % rule")
                for setting, (colour, marker) in _LINES.items():
                    line = _course(rows, data, f"ADVTR+{scheme}", setting, removal, "watermark")
                    axis.plot(*line, marker=marker, ms=3.5, lw=1.2, color=colour, label=setting)
                axis.set_title(f"{STUDIED[data].title}: {scheme} watermarks, %", loc="left")
            for setting, (colour, marker) in _LINES.items():
                line = _course(rows, data, "ADVTR+coin", setting, removal, "test")
                cost.plot(*line, marker=marker, ms=3.5, lw=1.2, color=colour)
            cost.set_title(f"{STUDIED[data].title}: test accuracy, %", loc="left")
            cost.set_xlabel(_AMOUNTS[removal][0])
        for axis in axes:
            axis.set(ylim=(-3, 103), yticks=range(0, 101, 25))
        handles, labels = axes[0].get_legend_handles_labels()
        axes[0].figure.legend(
            handles, labels, loc="outside upper left", ncols=5 if columns > 1 else 3
        )
    return text[0]


def _course(
    rows: Sequence[Row], data: str, defence: str, setting: str, removal: str, metric: str
) -> tuple[list[float], list[float]]:
    """The mean of a metric before a removal and after each amount of it."""
    place = {"data": data, "setting": setting, "defence": defence}
    found = where(rows, section="removal", removal=removal, **place)
    parts = {0.0: where(rows, section="model", removal="none", **place)}
    for amount in sorted({row["amount"] for row in found}):
        parts[amount] = [row for row in found if row["amount"] == amount]
    means = {amount: estimate(part, metric) for amount, part in parts.items()}
    known = [(amount, value.mean) for amount, value in means.items() if value is not None]
    scale = _AMOUNTS[removal][1]
    return [scale * amount for amount, _ in known], [mean for _, mean in known]


def _strangers(rows: Sequence[Row], data_sets: Sequence[str]) -> str:
    """Every thief and every stranger as a dot: what a threshold would have to tell apart."""
    with _drawing(len(data_sets), 3.2, 5.0) as (axes, text):
        for axis, data in zip(axes, data_sets, strict=True):
            ticks = []
            for i, scheme in enumerate(MARKS):
                groups = {"strangers": where(rows, section="strangers", data=data, scheme=scheme)}
                for setting in SETTINGS:
                    groups[setting] = where(
                        rows,
                        section="model",
                        data=data,
                        scheme=scheme,
                        setting=setting,
                        removal="none",
                    )
                for j, (group, found) in enumerate(groups.items()):
                    scores = sorted(row["watermark"] for row in found)
                    place = 5 * i + j
                    spread = [place + 0.5 * ((k * 0.618) % 1 - 0.5) for k in range(len(scores))]
                    colour = _GREY if group == "strangers" else _COLOURS[scheme]
                    axis.plot(spread, scores, "o", ms=3.5, alpha=0.75, color=colour)
                    ticks.append((place, f"{scheme}: {group}" if j == 0 else group))
            axis.axhline(RULE, color=_GREY, lw=0.8, ls="--")
            axis.set_xticks(
                [place for place, _ in ticks],
                [name for _, name in ticks],
                rotation=60,
                ha="right",
                fontsize=8.5,
            )
            axis.set(title=STUDIED[data].title, ylim=(-3, 103), ylabel="watermark accuracy, %")
    return text[0]


def _p_values(rows: Sequence[Row], data_sets: Sequence[str]) -> str:
    with _drawing(2, 2.4, _WIDTH / 2) as (axes, text):
        for axis, (removal, (unit, scale)) in zip(axes, _AMOUNTS.items(), strict=True):
            for data, style in zip(data_sets, ("-", "--", ":", "-."), strict=False):
                place = {"data": data, "setting": "white-box", "defence": "ADVTR+coin"}
                found = where(rows, section="removal", removal=removal, **place)
                amounts = sorted({row["amount"] for row in found})
                worst = [
                    max(row["log10_p"] for row in found if row["amount"] == amount)
                    for amount in amounts
                ]
                axis.plot(
                    [scale * amount for amount in amounts],
                    worst,
                    style,
                    marker="o",
                    ms=3,
                    color=_COLOURS["coin"],
                    label=STUDIED[data].title,
                )
            strangers = [row["log10_p"] for row in where(rows, section="strangers", scheme="coin")]
            axis.axhspan(
                min(strangers, default=0), 0, color=_GREY, alpha=0.25, lw=0, label="strangers"
            )
            axis.axhline(-9, color=_GREY, lw=0.8, ls="--", label="a judge's 1e-9")
            axis.set(xlabel=unit, ylabel="log10 of the exact p-value")
        axes[0].figure.legend(
            *axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=5
        )
    return text[0]


def _sweep(rows: Sequence[Row], data_sets: Sequence[str]) -> str:
    with _drawing(len(data_sets)) as (axes, text):
        for axis, data in zip(axes, data_sets, strict=True):
            parts = swept(rows, data)
            for metric, marker in (("adversarial", "o"), ("watermark", "s")):
                means = [estimate(marked, metric) for _, marked, _ in parts]
                values = [value.mean if value is not None else float("nan") for value in means]
                axis.plot(
                    [b for b, _, _ in parts],
                    values,
                    marker=marker,
                    ms=3,
                    color=_METRICS[metric],
                    label=f"{metric} accuracy",
                )
            scores = [
                (budget, row["watermark"]) for budget, _, strangers in parts for row in strangers
            ]
            axis.plot(
                [b for b, _ in scores],
                [s for _, s in scores],
                "x",
                ms=4,
                color=_GREY,
                label="strangers' watermark",
            )
            axis.set(
                title=STUDIED[data].title, ylim=(-3, 103), xlabel="watermark budget", ylabel="%"
            )
        axes[0].legend(fontsize=8.5)
    return text[0]


def _plane(folder: Path, data: str) -> str:
    places, _, _ = read_tensors(folder / "plane.safetensors", _LIMIT)
    with _drawing(2, 3.2, 4.2) as (axes, text):
        for axis, shown in zip(
            axes,
            (
                ("adversarial watermarks", "coin watermarks"),
                ("adversarial watermarks", "ood watermarks"),
            ),
            strict=True,
        ):
            for title in ("training", "adversarial training", *shown):
                points = places[title][:600]
                axis.plot(
                    points[:, 0].numpy(),
                    points[:, 1].numpy(),
                    ".",
                    ms=2.5,
                    alpha=0.6,
                    color=_SHADES[title],
                    label=title,
                )
            axis.set(xticks=[], yticks=[], xlabel="first component", ylabel="second component")
            axis.legend(fontsize=8.5, markerscale=3)
        axes[0].set_title(f"{STUDIED[data].title}: Figure 1")
        axes[1].set_title(f"{STUDIED[data].title}: Figure 5")
    return text[0]


def _pictures(folder: Path, result: Mapping[str, Any]) -> str:
    images, _, _ = read_tensors(folder / "images.safetensors", _LIMIT)
    order = sorted(
        images, key=lambda title: (title != "training image", "watermark" in title, title)
    )
    with _drawing(len(order), 2.1, 1.8, dark=False) as (axes, text):
        for axis, title in zip(axes, order, strict=True):
            axis.imshow(
                images[title].to(torch.uint8).movedim(0, 2).numpy(),
                cmap="gray",
                vmin=0,
                vmax=255,
                interpolation="nearest",
            )
            axis.set_title(title, fontsize=8.5)
            axis.set_xlabel(f"answer {result['answers'][title]}", fontsize=8.5)
            axis.set(xticks=[], yticks=[])
    return text[0]
