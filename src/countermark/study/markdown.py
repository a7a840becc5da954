"""The study as Markdown: what docs/results.md is made of.

What this page leaves out is in the CSV files beside it: the numbers of a picture, the units of work
that a number came from, and the columns of `_ASIDE`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from countermark.study.figures import CAPTIONS
from countermark.study.statements import Finding, Statement
from countermark.study.tables import FIRST, Table, by_name, readable

MISSING = "not finished"
"""What of a study is missing is in `about` under this name."""
_ASIDE = ("seeds", "difference")
_PICTURES = {"pruned": ("pruned",), "fine-tuned": ("fine-tuned", "p_values")}
"""The figures that are shown in place of a table."""


def markdown(
    verdict: str,
    statements: Sequence[Statement],
    tables: Mapping[str, Sequence[Table]],
    about: Mapping[str, Any],
    command: str,
) -> str:
    """Write the study for a reader of the repository.

    The tables that answer what a reader of the paper asks come first, then what holds, then the
    rest.

    Args:
        verdict: how many statements hold.
        statements: the statements and what each protocol says of them.
        tables: by protocol.
        about: environment, options and seeds.
        command: the command that made it.
    """
    made = ", ".join(f"{name} {about[name]}" for name in ("code", "device") if name in about)
    lines = ["# Results", "", f"Made by `{command}`" + (f", {made}." if made else ".")]
    lines += [f"Not finished: {about[MISSING]}."] if MISSING in about else []
    lines += ["", "All numbers are measured on test images, which chose nothing."]
    if len(tables) > 1:
        order = ", then ".join(tables)
        lines += [f"Two values in a cell are those of {order}; a single one is that of both."]
    parts = {next(iter(part.values())).name: part for part in by_name(tables)}
    lines += [line for name in parts if name in FIRST for line in _section(parts[name], "##")]
    lines += ["", "## What holds", "", verdict, "", *_statements(statements)]
    lines += ["", "## Tables and figures"]
    lines += [line for name in parts if name not in FIRST for line in _section(parts[name], "###")]
    lines += ["", "## How it was made", ""]
    lines += [f"- {name}: {value}" for name, value in about.items()]
    return "\n".join(lines) + "\n"


def _section(parts: Mapping[str, Table], level: str) -> list[str]:
    """A table of all protocols or the pictures in its place, below a heading."""
    first = next(iter(parts.values()))
    lines = ["", f"{level} {first.title}", ""]
    if first.name in _PICTURES:
        lines += _pictures(_PICTURES[first.name], tuple(parts))
    else:
        lines += [first.note, ""] if first.note else []
        lines += [*_beside({name: readable(table) for name, table in parts.items()}), ""]
    return [*lines, f"[Numbers and units of work](tables/{first.name}.csv)"]


def _statements(statements: Sequence[Statement]) -> list[str]:
    """A table of the statements, and below it why some do not hold."""
    open_ones = [
        each
        for each in statements
        if any(finding.verdict == "does not hold" for finding in each.measured)
    ]
    remarks = list(dict.fromkeys(each.remark for each in open_ones if each.remark))
    rows = []
    for each in (each for each in statements if each.measured):
        text = f"**{each.text}**" if each.leading else each.text
        if each in open_ones and each.remark:
            text += f" ({remarks.index(each.remark) + 1})"
        rows.append([text, *map(_told, each.findings.values())])
    columns = ["statement", *(statements[0].findings if statements else ())]
    notes = [f"{number}. {remark}" for number, remark in enumerate(remarks, 1)]
    return [*_lines(columns, rows), *([""] if notes else []), *notes]


def _told(finding: Finding) -> str:
    verdict = finding.verdict if finding.holds or not finding.told else f"**{finding.verdict}**"
    return f"{verdict}. {finding.told}" if finding.told else verdict


def _pictures(names: Sequence[str], protocols: Sequence[str]) -> list[str]:
    lines = []
    for name in names:
        lines += [CAPTIONS[name], ""]
        for protocol in protocols:
            alt = f"{CAPTIONS[name].partition('.')[0]}, protocol {protocol}"
            lines += [f"Protocol {protocol}:", "", f"![{alt}](figures/{name}-{protocol}.svg)", ""]
    return lines


def _beside(parts: Mapping[str, Table]) -> list[str]:
    """One table of all protocols.

    A column that says the same under each is written once, and an empty one is left out. If one
    other column is left, each protocol has its own; if there are more, a cell has a line for each.
    """
    first = next(iter(parts.values()))
    rows: dict[tuple[str, ...], dict[str, tuple[str, ...]]] = {}
    for protocol, table in parts.items():
        for row in table.rows:
            rows.setdefault(row[: table.keys], {})[protocol] = row[table.keys :]
    once: dict[str, list[str]] = {}
    each: dict[str, list[list[str]]] = {}
    for i, title in enumerate(first.columns[first.keys :]):
        told = [{name: row[i] for name, row in found.items()} for found in rows.values()]
        if title in _ASIDE or not any(any(found.values()) for found in told):
            continue
        if all(len(set(found.values())) == 1 for found in told):
            once[title] = [next(iter(found.values())) for found in told]
        else:
            each[title] = [[found.get(protocol, "") for protocol in parts] for found in told]
    if len(each) == 1:
        (apart,) = each.values()
        columns = {**once, **dict(zip(parts, map(list, zip(*apart, strict=True)), strict=True))}
    else:
        joined = {title: [_joined(cell) for cell in cells] for title, cells in each.items()}
        titles = [title for title in first.columns if title in once or title in joined]
        columns = {title: {**once, **joined}[title] for title in titles}
    body = [[*key, *cells] for key, *cells in zip(rows, *columns.values(), strict=True)]
    return _lines([*first.columns[: first.keys], *columns], body)


def _joined(values: Sequence[str]) -> str:
    return "<br>".join(value or "-" for value in values) if any(values) else ""


def _lines(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
