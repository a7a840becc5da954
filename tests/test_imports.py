"""Imports run one way: there is no circle.

There is none among the files, and none among the packages and files at the top. Imports within
functions and those for types alone count as well: they hide a circle and do not open it.
"""

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "countermark"

Graph = Mapping[str, set[str]]


def imports(package: Path) -> Graph:
    """Map each file of a package to the files of it that it imports, by dotted names.

    A package stands for its `__init__.py`.
    """
    paths = {_dotted(package, path): path for path in package.rglob("*.py")}
    return {
        name: {each for each in _named(path, paths) if each in paths}
        for name, path in paths.items()
    }


def _dotted(package: Path, path: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _named(path: Path, known: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                yield inside if inside in known else str(node.module)


def rooms(graph: Graph) -> Graph:
    """The same for the packages and files at the top."""
    found: dict[str, set[str]] = {}
    for name, others in graph.items():
        found.setdefault(_room(name), set()).update(_room(each) for each in others)
    return {room: others - {room} for room, others in found.items()}


def _room(name: str) -> str:
    return ".".join(name.split(".")[:2])


def circle(graph: Graph) -> list[str]:
    """One circle, from what is imported to what imports it; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_no_import_leads_back() -> None:
    files = imports(SOURCE)
    assert len(files) > 100
    assert files["countermark.networks.source"] >= {
        "countermark.networks.named",
        "countermark.errors",
    }
    assert circle(files) == []
    assert circle(rooms(files)) == []


@pytest.mark.parametrize(
    "how", ["from p.b import x", "import p.b", "from p import b", "def f():\n    from p.b import x"]
)
def test_circles_are_found(how: str, tmp_path: Path) -> None:
    package = tmp_path / "p"
    for name, text in {
        "__init__": "",
        "a": how,
        "b": "import os\nfrom p.c import y",
        "c/__init__": "",
        "c/d": "import p.a",
    }.items():
        path = package / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    files = imports(package)
    assert files == {"p": set(), "p.a": {"p.b"}, "p.b": {"p.c"}, "p.c": set(), "p.c.d": {"p.a"}}
    assert circle(files) == []
    assert set(circle(rooms(files))) == {"p.a", "p.b", "p.c"}
    (package / "c" / "__init__.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.c import d"
    )
    assert set(circle(imports(package))) == {"p.a", "p.b", "p.c", "p.c.d"}
