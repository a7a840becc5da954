"""The help on a verb, out of its configuration (see `countermark.options`)."""

import inspect
import shutil
import textwrap
import typing
from dataclasses import Field, fields
from types import NoneType
from typing import Annotated, Any, Literal

from countermark.options import (
    VerbConfig,
    hints_of,
    option,
    owner_of,
    required,
    words_of,
)

_WIDEST = 80  # columns of a help
_COLUMN = 24  # where the words on an option begin, if there is room


def page(name: str, kind: type[VerbConfig]) -> str:
    """The help on a verb: how it is called, what it does, and its options, shared ones last."""
    width = min(shutil.get_terminal_size().columns, _WIDEST)
    column = min(_COLUMN, width // 3)
    lines = textwrap.wrap(f"usage: {usage(name, kind)}", width, subsequent_indent="    ")
    for paragraph in (inspect.getdoc(kind) or "").split("\n\n"):
        lines += ["", *textwrap.wrap(paragraph, width)]
    words, heading = words_of(kind), ""
    for each in fields(kind):
        shared = each.kw_only and not required(each) and owner_of(kind, each.name) is not kind
        found = inspect.getdoc(owner_of(kind, each.name)) if shared else "Options."
        if found != heading:
            heading = found or ""
            lines += ["", f"{heading.partition('.')[0]}:"]
        default = default_of(each)
        first = f"  {call(kind, each)}"
        if len(first) > column - 2:
            lines.append(first)
            first = ""
        lines += textwrap.wrap(
            words[each.name] + (f" [{default}]" if default else ""),
            width,
            initial_indent=first.ljust(column),
            subsequent_indent=" " * column,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def usage(name: str, kind: type[VerbConfig]) -> str:
    """How a verb is called, with all that must be given."""
    words = ["countermark", name]
    for each in fields(kind):
        if not each.kw_only:
            words.append(each.name.upper() if required(each) else f"[{each.name.upper()}]")
        elif required(each):
            words.append(call(kind, each))
    return " ".join([*words, "[OPTIONS]"])


def call(kind: type[VerbConfig], field: "Field[Any]") -> str:
    """How an option is given, as `--epochs NUMBER`."""
    return f"{option(field.name)} {metavar(hints_of(kind)[field.name])}".strip()


def metavar(hint: Any) -> str:
    """What an option of a type takes; nothing for a switch.

    Example:
        >>> metavar(float | None), metavar(tuple[str, ...]), metavar(Literal["nchw", "nhwc"])
        ('NUMBER', 'TEXT ...', 'nchw|nhwc')
    """
    parts = [part for part in typing.get_args(hint) if part not in (NoneType, ...)]
    if typing.get_origin(hint) is Literal:
        return "|".join(parts)
    if typing.get_origin(hint) is tuple:
        return f"{metavar(parts[0])} ..."
    if parts == [bool]:
        return "True|False"
    if len(parts) == 1 or typing.get_origin(hint) is Annotated:
        return metavar(parts[0])
    return {bool: "", int: "NUMBER", float: "NUMBER", str: "TEXT"}.get(hint, "PATH")


def default_of(field: "Field[Any]") -> str:
    """The default of an option as it is written; empty where there is none worth a word."""
    value = None if required(field) else field.default
    several = value if isinstance(value, tuple) else (value,)
    words = (f"{each:g}" if isinstance(each, float) else str(each) for each in several)
    return "" if value is None or value is False else " ".join(words)
