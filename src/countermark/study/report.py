"""The files that a finished study writes.

They are `results.json`, `results.md`, tables as CSV, figures as SVG, and a page that holds all of
them.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from countermark.data import known
from countermark.files import canonical_json, read_bytes, write_bytes
from countermark.study.figures import figures
from countermark.study.grid import Cell
from countermark.study.markdown import markdown
from countermark.study.page import page
from countermark.study.results import FIELDS, Row, measurements, write_csv
from countermark.study.statements import Statement, counted, statements
from countermark.study.store import Store
from countermark.study.tables import Table, by_name, hyperparameters, tables
from countermark.threat import shown
from countermark.training import TrainConfig, known_traits, recipe
from countermark.watermarks import CRAFTING_STEPS

RESULTS_FORMAT = "countermark study 2"
_PAGE = 1 << 24  # bytes of a page at most


def write_report(
    out: Path,
    cells: Mapping[str, Sequence[Cell]],
    store: Store,
    about: Mapping[str, str],
    command: str = "countermark reproduce",
) -> tuple[str, ...]:
    """Write everything into `out`; the same units give the same bytes.

    Args:
        out: folder of the study.
        cells: by protocol; what is not finished yet is left out.
        store: where finished units are kept.
        about: environment, options and seeds, as they shall be shown.
        command: the command that made it.

    Returns:
        What was found, in sentences.
    """
    cells = {
        protocol: [cell for cell in part if store.has(cell.unit)]
        for protocol, part in cells.items()
    }
    measured: dict[str, list[Row]] = {
        protocol: measurements(part, store, protocol) for protocol, part in cells.items()
    }
    judged = statements(measured)
    made: dict[str, list[Table]] = {protocol: tables(rows) for protocol, rows in measured.items()}
    for protocol, part in cells.items():
        if settings := _settings(part):
            made[protocol].append(hyperparameters(settings))
    drawn = {
        protocol: _figures(measured[protocol], part, store) for protocol, part in cells.items()
    }
    for folder in (out / "tables", out / "figures"):
        folder.mkdir(exist_ok=True)
    csv = out / "tables" / "measurements.csv"
    write_csv(
        csv,
        FIELDS,
        ([row[field] for field in FIELDS] for rows in measured.values() for row in rows),
    )
    written = {csv}
    for parts in by_name(made):
        first = next(iter(parts.values()))
        lines = (
            (protocol, *row, " ".join(units))
            for protocol, table in parts.items()
            for row, units in zip(table.rows, table.units, strict=True)
        )
        csv = out / "tables" / f"{first.name}.csv"
        write_csv(csv, ("protocol", *first.columns, "units"), lines)
        written.add(csv)
    for protocol, pictures in drawn.items():
        for name, svg in pictures.items():
            picture = out / "figures" / f"{name}-{protocol}.svg"
            write_bytes(picture, svg.encode())
            written.add(picture)
    for path in (*(out / "tables").glob("*.csv"), *(out / "figures").glob("*.svg")):
        if path not in written:  # an earlier report of more of the study had it
            path.unlink()
    found = verdicts(judged)
    results = {
        "format": RESULTS_FORMAT,
        "about": dict(about),
        "claims": [
            {
                "claim": statement.text,
                "verdict": statement.verdict,
                "findings": {name: asdict(each) for name, each in statement.findings.items()},
            }
            for statement in judged
        ],
        "measurements": measured,
        "tables": {protocol: [asdict(table) for table in part] for protocol, part in made.items()},
    }
    # It may have any size: nothing here reads it back.
    write_bytes(out / "results.json", canonical_json(results))
    page_of_it = markdown(
        found[0], judged, made, {p: set(d) for p, d in drawn.items()}, about, command
    )
    write_bytes(out / "results.md", page_of_it.encode())
    write_bytes(out / "report.html", page(found, judged, made, drawn, about).encode())
    return found


def write_page(path: Path, out: Path) -> None:
    """Write the report in `out` as a page, with the tables and figures that it leads to."""
    page = (out / "results.md").read_text()
    for name in dict.fromkeys(re.findall(r"\]\(((?:tables|figures)/[^)]+)\)", page)):
        (path.parent / name).parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path.parent / name, (out / name).read_bytes())
    write_bytes(path, page.encode())


def code_of(path: Path) -> str | None:
    """The code that made a page, 12 hexadecimal digits; none if it does not say."""
    found = re.search(r"\bcode ([0-9a-f]{12})\b", read_bytes(path, _PAGE).decode(errors="replace"))
    return found[1] if found else None


def verdicts(judged: Sequence[Statement]) -> tuple[str, ...]:
    """Make the sentences with which the report begins.

    They say how many statements hold, and give the verdicts on the leading ones with their numbers.
    """
    lines = [counted(judged)]
    for statement in judged:
        if statement.leading and statement.measured:
            told = "; ".join(
                f"protocol {protocol}: {finding.told}"
                for protocol, finding in statement.findings.items()
                if finding in statement.measured
            )
            verdict = statement.verdict[0].upper() + statement.verdict[1:]
            lines.append(f"{verdict}: {statement.text} ({told})")
    return tuple(lines)


def _figures(rows: Sequence[Row], cells: Sequence[Cell], store: Store) -> dict[str, str]:
    folders: dict[str, dict[str, Path]] = {}
    answers = {}
    for cell in cells:
        if cell.place["section"] in ("pictures", "plane"):
            folders.setdefault(cell.place["data"], {})[cell.place["section"]] = store.path(
                cell.unit
            )
            if cell.place["section"] == "pictures":
                answers[cell.place["data"]] = store.result(cell.unit)
    return figures(rows, folders, answers)


def _settings(cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """Give our settings under the names of Table 6, by data set.

    They are taken from the units of the unmarked models.
    """
    settings: dict[str, dict[str, Any]] = {}
    configs: dict[str, dict[str, TrainConfig]] = {}
    for cell in cells:
        place, options = cell.place, cell.unit.options
        if place["section"] != "model" or cell.unit.kind != "model" or cell.unit.inputs:
            continue
        if place["defence"] not in ("ADVTR", "none"):
            continue
        row = known(place["data"])
        config = recipe(
            known_traits(row.name), options["objective"], row.threat, epochs=options["epochs"]
        )
        configs.setdefault(row.name, {})[place["defence"]] = config
        if place["defence"] != "ADVTR" or config.attack is None:
            continue
        attack, threat = config.attack, row.threat
        settings[row.name] = {
            "advtr.epsilon": shown(threat.epsilon),
            "advtr.steps": f"{attack.steps} (training), {threat.steps} (evaluation)",
            "advtr.step_size": (
                f"{attack.step_size:g} (training), {threat.step_size:g} (evaluation)"
            ),
            "advwm.epsilon": shown(threat.watermark_epsilon),
            "advwm.steps": CRAFTING_STEPS,
            "advwm.step_size": "0.01; coins at full strength",
            "watermarks": f"100; {row.batches * row.batch_size} coins",
            "ood_dataset": row.ood or "bases turned by 90 degrees",
            "optimizer": f"SGD, momentum {config.momentum:g}; network {options['network']}",
        }
    for name, ours in settings.items():
        made = configs[name]
        ours["epochs"] = _both(made, lambda config: f"{config.epochs}")
        ours["learning_rate"] = _both(
            made, lambda config: f"{config.learning_rate:g} ({config.schedule})"
        )
        ours["weight_decay"] = _both(made, lambda config: f"{config.weight_decay:g}")
    return settings


def _both(made: Mapping[str, TrainConfig], told: Callable[[TrainConfig], str]) -> str:
    """A setting of the robust model and, where it is another, of the model without a defence."""
    values = {defence: told(config) for defence, config in made.items()}
    robust, plain = values["ADVTR"], values.get("none", values["ADVTR"])
    return robust if plain == robust else f"{robust}; without robustness {plain}"
