"""The documentation names what there is, and its links lead somewhere."""

import importlib.util
import re
from dataclasses import fields
from pathlib import Path
from xml.etree import ElementTree

import pytest

import countermark
from countermark.cli import VERBS
from countermark.options import option
from test_imports import SOURCE, imports, rooms

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


def without_code(text):
    """The text of a page without its code, in which brackets and number signs mean other things."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them and as mkdocs.yml asks for."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        there = page.parent / path if path else page
        assert there.exists(), f"{page.name}: {link}"
        # The site has these pages and the README as its first one, and no other files.
        outside = not there.resolve().is_relative_to(DOCS.resolve()) and there.name != "README.md"
        assert page.parent != DOCS or not outside, f"{page.name}: {link}"
        assert not anchor or anchor in anchors(there), f"{page.name}: {link}"


def test_every_test_that_a_page_cites_is_there():
    """A promise whose test went away holds nothing."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    there = {name for path in files for name in re.findall(r"def (test_\w+)", path.read_text())}
    there |= {path.stem for path in files}
    cited = {name for page in PAGES for name in re.findall(r"\btest_[a-z0-9_]+", page.read_text())}
    assert cited - there == set()
    assert len(cited) > 30


@pytest.mark.parametrize("name", VERBS)
def test_use_names_every_verb(name):
    assert re.search(rf"`{name}\b", (DOCS / "use.md").read_text())


def test_the_api_page_has_every_public_name():
    listed = re.findall(r"^::: countermark\.(\w+)$", (DOCS / "api.md").read_text(), flags=re.M)
    assert sorted(listed) == sorted(countermark._PUBLIC)


def test_every_page_stands_in_the_navigation():
    listed = re.findall(r"([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.M)
    assert sorted(listed) == sorted(page.name for page in DOCS.glob("*.md"))


def test_the_picture_of_the_architecture_has_every_room_and_imports_go_down():
    svg = ElementTree.parse(DOCS / "site" / "architecture.svg").getroot()
    heights = {
        f"countermark.{name}": float(box.attrib["y"])
        for box in svg.iter(f"{{{svg.tag[1:].partition('}')[0]}}}text")
        if box.get("class", "").startswith("room")
        for name in " ".join(box.itertext()).split()
    }
    graph = rooms(imports(SOURCE))
    assert sorted(heights) == sorted(graph.keys() - {"countermark", "countermark.__main__"})
    lowest = max(heights.values())
    for room, y in heights.items():
        for other in graph[room] - {"countermark"}:
            assert y < heights[other] or y == heights[other] == lowest, f"{room} imports {other}"


def test_the_glossary_is_short():
    rows = re.findall(r"^\| (?!word \|)\w", (DOCS / "glossary.md").read_text(), flags=re.M)
    assert 30 <= len(rows) <= 40


def test_the_landing_page_is_short():
    assert len((DOCS / "index.md").read_text().split()) <= 200


@pytest.fixture(scope="module")
def hook():
    """What the site makes out of the code, which needs no MkDocs."""
    spec = importlib.util.spec_from_file_location("hook", DOCS / "site" / "hook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_site_lists_every_verb_with_every_option(hook):
    page = hook.on_page_markdown((DOCS / "verbs.md").read_text())
    parts = dict(re.findall(r"^## ([a-z ]+)\n(.*?)(?=^## |\Z)", page, flags=re.S | re.M))
    assert list(parts) == list(VERBS)
    for name, part in parts.items():
        config = hook._function(name)[0]
        known = getattr(config, hook._function(name)[1]).config
        said = re.findall(r"^`(--[a-z-]+)[^`]*`.*\n:   \S", part, flags=re.M)
        assert said == [option(each.name) for each in fields(known)]


def test_the_site_puts_sections_of_the_readme_into_a_page(hook):
    page = hook.on_page_markdown((DOCS / "first-mark.md").read_text())
    assert "README.md" not in page
    assert "countermark verify copy --key mine/key" in page
