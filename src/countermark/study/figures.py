"""The figures, as SVG: crisp at any size, readable in light and in dark (the page inverts them)."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from countermark.files import read_tensors
from countermark.study.results import Row, estimate, where
from countermark.study.tables import RULE, SETTINGS, TITLES, swept
from countermark.watermarks import SCHEMES

_COLOURS = dict(zip(SCHEMES, ("#b45309", "#2563eb", "#15803d", "#7c3aed", "#be123c"), strict=False))
_METRICS = {"adversarial": "#2563eb", "watermark": "#b45309"}
_SHADES = {
    "training": "#9ca3af",
    "adversarial training": "#2563eb",
    "adversarial watermarks": "#dc2626",
}
_SHADES |= {"coin watermarks": "#15803d", "ood watermarks": "#b45309"}
_LIMIT = 1 << 28


def figures(
    rows: Sequence[Row], folders: Mapping[str, Mapping[str, Path]], answers: Mapping[str, Any]
) -> dict[str, str]:
    """Draw all figures.

    Args:
        rows: measurements of one protocol.
        folders: by data set, the folders of the units `pictures` and `plane`.
        answers: by data set, the result of the unit `pictures`.

    Returns:
        SVG text by name of the figure.
    """
    data_sets = list(dict.fromkeys(row["data"] for row in rows))
    drawn = {}
    for number, setting in zip((2, 3, 4), ("black-box", "grey-box", "white-box"), strict=True):
        drawn[f"figure{number}"] = _removals(rows, data_sets, setting)
    drawn["strangers"] = _strangers(rows, data_sets)
    drawn["p_values"] = _p_values(rows, data_sets)
    drawn["sweep"] = _sweep(rows, data_sets)
    for data in data_sets:
        drawn[f"figure1_5_{data}"] = _plane(folders[data]["plane"], data)
        drawn[f"figure6_{data}"] = _pictures(folders[data]["pictures"], answers[data])
    return drawn


@contextmanager
def _drawing(
    count: int, height: float = 2.9, width: float = 3.6
) -> Iterator[tuple[list[Any], list[str]]]:
    """A row of axes; the SVG text is appended to the list when the block ends."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    style = {
        "svg.hashsalt": "countermark",
        "svg.fonttype": "path",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    text: list[str] = []
    with mpl.rc_context({**style, "legend.frameon": False, "figure.dpi": 100}):
        figure, axes = plt.subplots(
            1, count, figsize=(width * count, height), squeeze=False, layout="constrained"
        )
        try:
            yield list(axes[0]), text
            out = io.StringIO()
            figure.savefig(
                out, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
            )
            svg = out.getvalue()
            text.append(svg[svg.index("<svg") :])
        finally:
            plt.close(figure)


def _removals(rows: Sequence[Row], data_sets: Sequence[str], setting: str) -> str:
    with _drawing(2 * len(data_sets)) as (axes, text):
        for i, data in enumerate(data_sets):
            for axis, removal in zip(
                axes[2 * i : 2 * i + 2], ("pruned", "fine-tuned"), strict=True
            ):
                for scheme in SCHEMES:
                    place = {"data": data, "setting": setting, "defence": f"ADVTR+{scheme}"}
                    found = where(rows, section="removal", removal=removal, **place)
                    whole = estimate(
                        where(rows, section="model", removal="none", **place), "watermark"
                    )
                    points = [(0.0, whole)] + [
                        (
                            float(amount),
                            estimate(
                                [row for row in found if row["amount"] == amount], "watermark"
                            ),
                        )
                        for amount in sorted({row["amount"] for row in found})
                    ]
                    known = [(amount, value.mean) for amount, value in points if value is not None]
                    scale = 100 if removal == "pruned" else 1
                    axis.plot(
                        [scale * a for a, _ in known],
                        [v for _, v in known],
                        marker="o",
                        ms=3,
                        color=_COLOURS[scheme],
                        label=scheme,
                    )
                axis.axhline(RULE, color="#6b7280", lw=0.8, ls="--")
                axis.set(title=TITLES[data], ylim=(-3, 103), ylabel="watermark accuracy, %")
                axis.set_xlabel(
                    "weights pruned, %" if removal == "pruned" else "epochs of fine-tuning"
                )
        axes[0].legend()
    return text[0]


def _strangers(rows: Sequence[Row], data_sets: Sequence[str]) -> str:
    """Every thief and every stranger as a dot: what a threshold would have to tell apart."""
    with _drawing(len(data_sets), 3.2, 5.0) as (axes, text):
        for axis, data in zip(axes, data_sets, strict=True):
            ticks = []
            for i, scheme in enumerate(SCHEMES):
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
                    colour = "#6b7280" if group == "strangers" else _COLOURS[scheme]
                    axis.plot(spread, scores, "o", ms=3.5, alpha=0.75, color=colour)
                    ticks.append((place, f"{scheme}: {group}" if j == 0 else group))
            axis.axhline(RULE, color="#6b7280", lw=0.8, ls="--")
            axis.set_xticks(
                [place for place, _ in ticks],
                [name for _, name in ticks],
                rotation=60,
                ha="right",
                fontsize=7,
            )
            axis.set(title=TITLES[data], ylim=(-3, 103), ylabel="watermark accuracy, %")
    return text[0]


def _p_values(rows: Sequence[Row], data_sets: Sequence[str]) -> str:
    with _drawing(2, 2.9, 4.2) as (axes, text):
        for axis, removal in zip(axes, ("pruned", "fine-tuned"), strict=True):
            for data, style in zip(data_sets, ("-", "--", ":"), strict=False):
                place = {"data": data, "setting": "white-box", "defence": "ADVTR+coin"}
                found = where(rows, section="removal", removal=removal, **place)
                amounts = sorted({row["amount"] for row in found})
                worst = [
                    max(row["log10_p"] for row in found if row["amount"] == amount)
                    for amount in amounts
                ]
                scale = 100 if removal == "pruned" else 1
                axis.plot(
                    [scale * a for a in amounts],
                    worst,
                    style,
                    marker="o",
                    ms=3,
                    color=_COLOURS["coin"],
                    label=TITLES[data],
                )
            strangers = [row["log10_p"] for row in where(rows, section="strangers", scheme="coin")]
            axis.axhspan(
                min(strangers, default=0), 0, color="#9ca3af", alpha=0.4, label="strangers"
            )
            axis.axhline(-9, color="#6b7280", lw=0.8, ls="--")
            axis.set_xlabel("weights pruned, %" if removal == "pruned" else "epochs of fine-tuning")
            axis.set_ylabel("log10 of the exact p-value")
        axes[0].legend()
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
                color="#6b7280",
                label="strangers' watermark",
            )
            axis.set(title=TITLES[data], ylim=(-3, 103), xlabel="watermark budget", ylabel="%")
        axes[0].legend(fontsize=7)
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
            axis.legend(fontsize=7, markerscale=3)
        axes[0].set_title(f"{TITLES[data]}: Figure 1")
        axes[1].set_title(f"{TITLES[data]}: Figure 5")
    return text[0]


def _pictures(folder: Path, result: Mapping[str, Any]) -> str:
    images, _, _ = read_tensors(folder / "images.safetensors", _LIMIT)
    order = sorted(
        images, key=lambda title: (title != "training image", "watermark" in title, title)
    )
    with _drawing(len(order), 2.1, 1.8) as (axes, text):
        for axis, title in zip(axes, order, strict=True):
            axis.imshow(
                images[title][0].to(torch.uint8).numpy(),
                cmap="gray",
                vmin=0,
                vmax=255,
                interpolation="nearest",
            )
            axis.set_title(title, fontsize=7)
            axis.set_xlabel(f"answer {result['answers'][title]}", fontsize=7)
            axis.set(xticks=[], yticks=[])
    return text[0]
