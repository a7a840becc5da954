"""Parts of pages that MkDocs has made out of the code and the README.

A line that is only a link to a section of the README is replaced by that section, so that its words
are written once and the page can be read without the site. The line `<!-- verbs -->` is replaced by
every verb of the command line with its options.
"""

import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import countermark
from countermark import options
from countermark.cli import VERBS

ROOT = Path(__file__).resolve().parents[2]
_SECTION = re.compile(r"^\[[^]]*\]\(\.\./README\.md#([a-z0-9-]+)\)$", re.MULTILINE)
_VERBS = "<!-- verbs -->"
_FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_INNER = re.compile(r"^  (?=- )", re.MULTILINE)  # a list in a list, by two spaces as on GitHub
_METAVARS = {bool: "", int: "NUMBER", float: "NUMBER", str: "TEXT", Path: "PATH"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the parts that are made into a page, and indent lists as MkDocs wants them."""
    markdown = _SECTION.sub(lambda found: readme_section(found[1]), markdown)
    if _VERBS in markdown:
        markdown = markdown.replace(_VERBS, "\n".join(verbs()))
    parts = _FENCED.split(markdown)
    parts[::2] = [_INNER.sub("    ", part) for part in parts[::2]]
    return "".join(parts)


def readme_section(anchor: str) -> str:
    """The text of a section of the README, its links as they are written inside docs/."""
    parts = re.split(r"^## (.+)$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    sections = {
        title.lower().replace(" ", "-"): text
        for title, text in zip(parts[1::2], parts[2::2], strict=True)
    }
    return sections[anchor].strip().replace("](docs/", "](")


def verbs() -> Iterator[str]:
    """Markdown of all verbs: what each does, how it is called, and its options."""
    for name in VERBS:
        module, public = _function(name)
        config = getattr(module, public).config
        main = next((each for each in fields(config) if not each.kw_only), None)
        words = options._words(config)
        yield f"## {name}\n\n{inspect.cleandoc(config.__doc__ or '')}\n"
        place = "" if main is None else f" {main.name.upper()}"
        place = f" [{place.strip()}]" if main is not None and not options.required(main) else place
        needed = [each for each in fields(config) if options.required(each) and each is not main]
        given = "".join(f" {_call(config, each)}" for each in needed)
        yield f"```\ncountermark {name}{place}{given} [OPTIONS]\n```\n"
        for each in fields(config):
            yield f"`{_call(config, each)}`{_default(each)}\n:   {words[each.name]}\n"
        yield f"In Python: [`countermark.{public}`][countermark.{public}].\n"


def _function(name: str) -> tuple[Any, str]:
    """The module of a verb, and the public name of its function."""
    file = f"verbs.{name.replace(' ', '_')}"
    public = next(
        public for public, there in countermark._PUBLIC.items() if there.rpartition(".")[0] == file
    )
    return importlib.import_module(f"countermark.{file}"), public


def _call(config: type, each: "Field[Any]") -> str:
    return f"{options.option(each.name)} {_metavar(options._hints(config)[each.name])}".strip()


def _metavar(hint: Any) -> str:
    """What an option takes, as the help on the command line writes it."""
    parts = [part for part in get_args(hint) if part is not NoneType and part is not ...]
    if get_origin(hint) is Annotated:
        return _metavar(parts[0])
    if get_origin(hint) is Literal:
        return "|".join(parts)
    if get_origin(hint) is tuple:
        return f"{_metavar(parts[0])} ..."
    if len(parts) == 1:
        return _metavar(parts[0])
    return _METAVARS.get(hint, "PATH")


def _default(each: "Field[Any]") -> str:
    """What follows an option's name: that it must be given, or its default where it has one."""
    if options.required(each):
        return ", required"
    value = each.default_factory() if each.default_factory is not MISSING else each.default
    if value is None or value is False or value == ():
        return ""
    several = value if isinstance(value, tuple) else (value,)
    return f", default `{' '.join(f'{v:g}' if isinstance(v, float) else str(v) for v in several)}`"
