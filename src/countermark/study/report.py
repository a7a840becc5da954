"""The files that a finished study writes.

They are `results.json`, `results.md`, tables as CSV, figures as SVG, and a page that holds all of
them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from countermark.data import known
from countermark.files import canonical_json, write_bytes
from countermark.study.figures import figures
from countermark.study.grid import Cell
from countermark.study.markdown import markdown
from countermark.study.page import page
from countermark.study.results import FIELDS, Row, measurements, write_csv
from countermark.study.statements import Statement, statements
from countermark.study.store import Store
from countermark.study.tables import Table, by_name, hyperparameters, tables
from countermark.training import known_traits, recipe
from countermark.watermarks import CRAFTING_STEPS

RESULTS_FORMAT = "countermark study 1"


def write_report(
    out: Path,
    cells: Mapping[str, Sequence[Cell]],
    store: Store,
    about: Mapping[str, str],
    command: str = "countermark reproduce",
) -> tuple[str, ...]:
    """Write everything into `out`; the same units give the same bytes.

    Returns:
        What was found, in sentences.
    """
    measured: dict[str, list[Row]] = {
        protocol: measurements(part, store, protocol) for protocol, part in cells.items()
    }
    judged = statements(measured)
    made: dict[str, list[Table]] = {protocol: tables(rows) for protocol, rows in measured.items()}
    for protocol, part in cells.items():
        made[protocol].append(hyperparameters(_settings(part)))
    drawn = {
        protocol: _figures(measured[protocol], part, store) for protocol, part in cells.items()
    }
    for folder in (out / "tables", out / "figures"):
        folder.mkdir(exist_ok=True)
    write_csv(
        out / "tables" / "measurements.csv",
        FIELDS,
        ([row[field] for field in FIELDS] for rows in measured.values() for row in rows),
    )
    for parts in by_name(made):
        first = next(iter(parts.values()))
        lines = (
            (protocol, *row, " ".join(units))
            for protocol, table in parts.items()
            for row, units in zip(table.rows, table.units, strict=True)
        )
        columns = ("protocol", *first.columns, "units")
        write_csv(out / "tables" / f"{first.name}.csv", columns, lines)
    for protocol, pictures in drawn.items():
        for name, svg in pictures.items():
            write_bytes(out / "figures" / f"{name}-{protocol}.svg", svg.encode())
    found = verdicts(judged)
    results = {
        "format": RESULTS_FORMAT,
        "about": dict(about),
        "claims": [
            {"claim": statement.text, "verdict": statement.verdict, **_findings(statement)}
            for statement in judged
        ],
        "measurements": measured,
        "tables": {protocol: [asdict(table) for table in part] for protocol, part in made.items()},
    }
    # It may have any size: nothing here reads it back.
    write_bytes(out / "results.json", canonical_json(results))
    write_bytes(out / "results.md", markdown(found[0], judged, made, about, command).encode())
    write_bytes(out / "report.html", page(found, judged, made, drawn, about).encode())
    return found


def verdicts(judged: Sequence[Statement]) -> tuple[str, ...]:
    """Make the sentences with which the report begins.

    They say how many statements hold, and give the verdicts on the leading ones with their numbers.
    """
    known = [statement for statement in judged if statement.verdict != "not measured"]
    lines = [f"{sum(statement.holds for statement in known)} of {len(known)} statements hold."]
    for statement in known:
        if statement.leading:
            told = "; ".join(
                f"protocol {protocol}: {finding.told}"
                for protocol, finding in statement.findings.items()
            )
            lines.append(
                f"{'Holds' if statement.holds else 'Does not hold'}: {statement.text} ({told})"
            )
    return tuple(lines)


def _findings(statement: Statement) -> dict[str, Any]:
    return {
        "findings": {protocol: asdict(finding) for protocol, finding in statement.findings.items()}
    }


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

    They are taken from the units of the robust model.
    """
    settings = {}
    for cell in cells:
        place = cell.place
        if (
            place["section"] == "model"
            and place["defence"] == "ADVTR"
            and place["setting"] == "white-box"
            and place["data"] not in settings
        ):
            catalogued, options = known(place["data"]), cell.unit.options
            config = recipe(
                known_traits(catalogued.name),
                options["objective"],
                catalogued.threat,
                epochs=options["epochs"],
            )
            assert config.attack is not None
            settings[catalogued.name] = {
                "advtr.epsilon": catalogued.threat.epsilon,
                "advtr.steps": (
                    f"{config.attack.steps} (training), {catalogued.threat.steps} (evaluation)"
                ),
                "advtr.step_size": (
                    f"{config.attack.step_size:g} (training), "
                    f"{catalogued.threat.step_size:g} (evaluation)"
                ),
                "advwm.epsilon": catalogued.threat.watermark_epsilon,
                "advwm.steps": CRAFTING_STEPS,
                "advwm.step_size": "0.01; coins at full strength",
                "watermarks": f"100; {catalogued.batches * catalogued.batch_size} coins",
                "ood_dataset": catalogued.ood,
                "epochs": config.epochs,
                "learning_rate": f"{config.learning_rate:g} ({config.schedule})",
                "weight_decay": f"{config.weight_decay:g}",
                "optimizer": f"SGD, momentum {config.momentum:g}; network {options['network']}",
            }
    return settings
