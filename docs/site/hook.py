"""Parts of pages that MkDocs has made out of the code and the README.

A line that is only a link to a section of the README is replaced by that section, so that its words
are written once and the page can be read without the site. The line `<!-- verbs -->` is replaced by
every verb of the command line with its options.
"""

import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import countermark
from countermark import manual, options
from countermark.cli import VERBS

ROOT = Path(__file__).resolve().parents[2]
_SECTION = re.compile(r"^\[[^]]*\]\(\.\./README\.md#([a-z0-9-]+)\)$", re.MULTILINE)
_VERBS = "<!-- verbs -->"
_FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_INNER = re.compile(r"^  (?=- )", re.MULTILINE)  # a list in a list, by two spaces as on GitHub


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
        yield f"## {name}\n\n{inspect.cleandoc(config.__doc__ or '')}\n"
        yield f"```\n{manual.usage(name, config)}\n```\n"
        words = options.words_of(config)
        for each in fields(config):
            default = manual.default_of(each)
            known = f", default `{default}`" if default else ""
            known = ", required" if options.required(each) else known
            yield f"`{manual.call(config, each)}`{known}\n:   {words[each.name]}\n"
        yield f"In Python: [`countermark.{public}`][countermark.{public}].\n"


def _function(name: str) -> tuple[Any, str]:
    """The module of a verb, and the public name of its function."""
    file = f"verbs.{name.replace(' ', '_')}"
    public = next(
        public for public, there in countermark._PUBLIC.items() if there.rpartition(".")[0] == file
    )
    return importlib.import_module(f"countermark.{file}"), public
