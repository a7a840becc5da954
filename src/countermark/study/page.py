"""The report of the study as one HTML file."""

import base64
import re
from collections.abc import Mapping, Sequence
from typing import Any

from countermark.html import document, escape
from countermark.study.figures import CAPTIONS
from countermark.study.statements import Statement
from countermark.study.tables import FIRST, Table, readable

_STYLE = """
body { max-width: 68rem; } h2 { margin-top: 2.5rem; }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; }
table { font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; }
th { position: sticky; top: 0; background: var(--paper); font-weight: 600; }
td.word, th.word { text-align: left; } \
td.unit { font-family: ui-monospace, monospace; color: var(--soft); font-size: .75rem; }
li { margin: .5rem 0; } li .good, li .bad { font-weight: 600; }
"""

_NUMBER = re.compile(r"(-?[0-9.]+( ± [0-9.]+)?)?")
"""A cell that is a number or empty."""


def page(
    verdicts: Sequence[str],
    statements: Sequence[Statement],
    tables: Mapping[str, Sequence[Table]],
    figures: Mapping[str, Mapping[str, str]],
    about: Mapping[str, Any],
) -> str:
    """Write the report.

    Args:
        verdicts: what was found, the most important sentence first.
        statements: the statements and what each protocol says of them.
        tables: by protocol.
        figures: SVG texts by protocol and name.
        about: environment, options and seeds, as they shall be shown.
    """
    parts = [
        "<h1>Adversarial training and watermarks: the paper, ours, and strangers</h1>",
        (
            "<p class='soft'>A reproduction of Thakkar, Zizzo and Maffeis (2023), with independent "
            "models asked for every watermark.</p>"
        ),
        *(f"<p><strong>{escape(verdict)}</strong></p>" for verdict in verdicts),
    ]
    first = [_table(t, protocol) for protocol in tables for t in tables[protocol] if _leads(t)]
    parts += [*first, "<h2>What holds</h2><ul>"]
    parts += [*(_statement(each) for each in statements if each.measured), "</ul>"]
    for protocol, drawn in figures.items():
        parts += [f"<h2>Figures, protocol {escape(protocol)}</h2>"] if drawn else []
        parts += [_figure(name, svg) for name, svg in drawn.items()]
    for protocol, made in tables.items():
        parts += [_table(table, protocol) for table in made if not _leads(table)]
    parts.append("<h2>How it was made</h2><dl>")
    parts += [f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in about.items()]
    parts.append(
        "</dl><footer>Each number names the unit of work it came from by the first 12 digits of "
        "its SHA-256.</footer>"
    )
    return document("Countermark: the study", _STYLE, parts)


def _statement(statement: Statement) -> str:
    verdicts = {finding.verdict for finding in statement.measured}
    kind = {frozenset({"holds"}): "good", frozenset({"does not hold"}): "bad"}.get(
        frozenset(verdicts), "soft"
    )
    remark = (
        f"<br><span class='soft'>{escape(statement.remark)}</span>"
        if statement.remark and "does not hold" in verdicts
        else ""
    )
    told = "<br>".join(
        f"<span class='soft'>{escape(protocol)}: {escape(finding.told)}</span>"
        for protocol, finding in statement.findings.items()
        if finding in statement.measured
    )
    return (
        f"<li>{escape(statement.text)} <span class='{kind}'>{escape(statement.verdict)}.</span>"
        f"<br>{told}{remark}</li>"
    )


def _figure(name: str, svg: str) -> str:
    caption = next(
        (text for start, text in CAPTIONS.items() if name == start or name.startswith(f"{start}_")),
        name,
    )
    encoded = base64.b64encode(svg.encode()).decode()
    image = f"<img alt='{escape(caption)}' src='data:image/svg+xml;base64,{encoded}'>"
    return f"<figure id='{escape(name)}'>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def _leads(table: Table) -> bool:
    """Whether a table comes before everything else."""
    return table.name in FIRST


def _table(table: Table, protocol: str) -> str:
    """A table as a reader sees it, without the columns that say nothing."""
    told = readable(table)
    kept = [i for i in range(len(told.columns)) if any(row[i] for row in told.rows)]
    words = [
        i < table.keys or any(not _NUMBER.fullmatch(row[i]) for row in told.rows) for i in kept
    ]
    head = "".join(
        f"<th{_word(word)}>{escape(told.columns[i])}</th>"
        for i, word in zip(kept, words, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{_word(word)}>{escape(row[i])}</td>" for i, word in zip(kept, words, strict=True)
        )
        + f"<td class='unit' title='{' '.join(units)}'>{escape(_units(units))}</td></tr>"
        for row, units in zip(told.rows, told.units, strict=True)
    )
    return (
        f"<h2 id='{escape(protocol)}-{escape(table.name)}'>{escape(table.title)}, "
        f"protocol {escape(protocol)}</h2>"
        f"<p class='soft'>{escape(table.note)}</p><div class='wide'><table>"
        f"<thead><tr>{head}<th class='word'>unit</th></tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _word(is_word: bool) -> str:
    return " class='word'" if is_word else ""


def _units(units: Sequence[str]) -> str:
    return (
        (units[0][:12] + (f" and {len(units) - 1} more" if len(units) > 1 else "")) if units else ""
    )
