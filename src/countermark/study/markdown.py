"""The study as Markdown: what docs/results.md is made of.

What this page leaves out is in the CSV files beside it: the numbers of a picture, the units of work
that a number came from, and what `_aside` says.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from countermark.study.figures import CAPTIONS
from countermark.study.statements import Finding, Statement
from countermark.study.tables import FIRST, Table, by_name, readable

MISSING = "not finished"
"""What of a study is missing is in `about` under this name."""
BEYOND = "not in the paper"
"""The data sets of a study that the paper lacks are in `about` under this name."""
_PAPER = "paper"
_CHOOSES = (
    "Under clean these chose nothing; as-published chooses epochs on them and makes watermarks of "
    "some of them, as the published code did."
)
_PICTURES = {"pruned": ("pruned",), "fine-tuned": ("fine-tuned", "p_values")}
"""The figures that are shown in place of a table."""


def markdown(
    verdict: str,
    statements: Sequence[Statement],
    tables: Mapping[str, Sequence[Table]],
    figures: Mapping[str, Collection[str]],
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
        figures: the names of those that were drawn, by protocol.
        about: environment, options and seeds.
        command: the command that made it.
    """
    made = ", ".join(f"{name} {about[name]}" for name in ("code", "device") if name in about)
    lines = ["# Results", "", f"Made by `{command}`" + (f", {made}." if made else ".")]
    lines += [f"Not finished: {about[MISSING]}."] if MISSING in about else []
    lines += [f"The paper has no {about[BEYOND]}: settings are ours."] if BEYOND in about else []
    lines += ["", "All numbers are measured on test images."]
    lines += [_CHOOSES] if "as-published" in tables else ["These chose nothing."]
    if len(tables) > 1:
        order = ", then ".join(tables)
        lines += [f"Two values in a cell are those of {order}; a single one is that of both."]

    def section(name: str, level: str) -> list[str]:
        return _section(parts[name], level, tuple(tables), figures) if name in parts else []

    parts = {next(iter(part.values())).name: part for part in by_name(tables)}
    lines += [line for name in FIRST for line in section(name, "##")]
    lines += ["", "## What holds", "", verdict, "", *_statements(statements)]
    lines += ["", "## Tables and figures"]
    lines += [line for name in parts if name not in FIRST for line in section(name, "###")]
    lines += ["", "## How it was made", ""]
    lines += [f"- {name}: {value}" for name, value in about.items()]
    return "\n".join(lines) + "\n"


def _section(
    parts: Mapping[str, Table],
    level: str,
    protocols: Sequence[str],
    figures: Mapping[str, Collection[str]],
) -> list[str]:
    """A table of all protocols that have it, or the pictures in its place, below a heading."""
    first = next(iter(parts.values()))
    only = f", protocol {' and '.join(parts)}" if len(parts) < len(protocols) else ""
    lines = ["", f"{level} {first.title}{only}", ""]
    drawn = {
        name: [protocol for protocol in parts if name in figures[protocol]]
        for name in _PICTURES.get(first.name, ())
    }
    if drawn:
        lines += _pictures({name: protocols for name, protocols in drawn.items() if protocols})
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


def _pictures(drawn: Mapping[str, Sequence[str]]) -> list[str]:
    lines = []
    for name, protocols in drawn.items():
        lines += [CAPTIONS[name], ""]
        for protocol in protocols:
            alt = f"{CAPTIONS[name].partition('.')[0]}, protocol {protocol}"
            lines += [f"Protocol {protocol}:", "", f"![{alt}](figures/{name}-{protocol}.svg)", ""]
    return lines


def _beside(parts: Mapping[str, Table]) -> list[str]:
    """One table of all protocols.

    A column that says the same under each is written once, and an empty one is left out. If one
    other column is left, each protocol has its own; if there are more, a cell has a line for each.
    The paper's numbers are those of no protocol.
    """
    first = next(iter(parts.values()))
    rows: dict[tuple[str, ...], dict[str, tuple[str, ...]]] = {}
    for protocol, table in parts.items():
        for row in table.rows:
            rows.setdefault(row[: table.keys], {})[protocol] = row[table.keys :]
    once: dict[str, list[str]] = {}
    each: dict[str, list[list[str | None]]] = {}
    for i, title in enumerate(first.columns[first.keys :]):
        told = [{name: row[i] for name, row in found.items()} for found in rows.values()]
        if not any(any(found.values()) for found in told) or _aside(title, told):
            continue
        everywhere = title == _PAPER or all(len(found) == len(parts) for found in told)
        if everywhere and all(len(set(found.values())) == 1 for found in told):
            once[title] = [next(iter(found.values())) for found in told]
        else:
            each[title] = [[found.get(protocol) for protocol in parts] for found in told]
    if len(each) == 1:
        (apart,) = each.values()
        own = zip(*([value or "" for value in cell] for cell in apart), strict=True)
        columns = {**once, **dict(zip(parts, map(list, own), strict=True))}
    else:
        joined = {title: [_joined(cell) for cell in cells] for title, cells in each.items()}
        titles = [title for title in first.columns if title in once or title in joined]
        columns = {title: {**once, **joined}[title] for title in titles}
    body = [[*key, *cells] for key, *cells in zip(rows, *columns.values(), strict=True)]
    return _lines([*first.columns[: first.keys], *columns], body)


def _aside(title: str, told: Sequence[Mapping[str, str]]) -> bool:
    """Whether a column is left to the CSV file: the differences, and a number of seeds for all."""
    values = {value for found in told for value in found.values()}
    return title == "difference" or (title == "seeds" and len(values) == 1)


def _joined(values: Sequence[str | None]) -> str:
    """The values of all protocols in one cell; one value where all have the same."""
    if None not in values and len(set(values)) == 1:
        return values[0] or ""
    return "<br>".join(value or "-" for value in values) if any(values) else ""


def _lines(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
