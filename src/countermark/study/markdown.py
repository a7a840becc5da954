"""The study as Markdown: what docs/results.md is made of."""

from collections.abc import Mapping, Sequence
from typing import Any

from countermark.study.statements import Statement
from countermark.study.tables import Table, shown


def markdown(
    verdicts: Sequence[str],
    statements: Sequence[Statement],
    tables: Mapping[str, Sequence[Table]],
    about: Mapping[str, Any],
    command: str,
) -> str:
    """Write the study for a reader of the repository.

    Args:
        verdicts: what was found, the most important sentence first.
        statements: the statements and what each protocol says of them.
        tables: by protocol.
        about: environment, options and seeds.
        command: the command that made it.
    """
    lines = [
        "# Results",
        "",
        f"Made by `{command}`. Every number is measured on test images, which chose nothing.",
        "",
    ]
    lines += [f"- {name}: {value}" for name, value in about.items()] + [""]
    lines += ["## What holds", ""] + [f"- **{verdict}**" for verdict in verdicts] + [""]
    for statement in statements:
        lines += [
            f"### {statement.text}",
            "",
            f"{statement.verdict[0].upper()}{statement.verdict[1:]}.",
            "",
        ]
        lines += [
            f"- {protocol}: {finding.told}" for protocol, finding in statement.findings.items()
        ]
        lines += (
            ["", statement.remark, ""]
            if statement.remark and not statement.holds and statement.verdict != "not measured"
            else [""]
        )
    for protocol, made in tables.items():
        for table in made:
            lines += [f"## {table.title} ({protocol})", "", table.note, "", *_table(table), ""]
    return "\n".join(lines).rstrip() + "\n"


def _table(table: Table) -> list[str]:
    columns = [*table.columns, "unit"]
    rows = [
        [shown(value) for value in row] + [units[0][:8] if units else ""]
        for row, units in zip(table.rows, table.units, strict=True)
    ]
    return [
        "| " + " | ".join(columns) + " |",
        "|" + "---|" * len(columns),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
