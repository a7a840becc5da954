"""Units of work: what is done, with which options, to which other units.

A unit is named by the SHA-256 of everything that its result depends on: its kind, its options, the
units that it starts from, the code of the work and of all that it imports, and the release of
PyTorch. Two studies that need the same unit share it, and a changed line of numerical code makes a
new one.
"""

import ast
import functools
import importlib.util
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from countermark.files import canonical_json, sha256

UNIT_FORMAT = "countermark unit 1"

_PACKAGE = Path(__file__).parents[1]
_WORK = "countermark.study.work"  # where the code of units begins
_PLUMBING = (
    "beacons.py",
    "errors.py",
    "files.py",
    "html.py",
    "places.py",
    "registry.py",
    "session.py",
    "suspects",
    "terminal.py",
    "text.py",
    "timestamps.py",
    "tokens.py",
    "version.py",
)
"""Modules that the work imports but no number depends on.

They are for messages, files, places, suspects, progress and time.
"""


@dataclass(frozen=True)
class Unit:
    """One unit of work.

    Attributes:
        kind: name of the function of `work` that does it.
        options: its options, JSON-ready.
        inputs: the units it starts from, by the name of the role that they play.
        title: what a person reads in the progress; not part of the unit's name.
    """

    kind: str
    options: Mapping[str, Any]
    inputs: Mapping[str, "Unit"]
    title: str

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        """Everything that the unit's result depends on, as JSON-ready values."""
        return {
            "format": UNIT_FORMAT,
            "kind": self.kind,
            "options": dict(self.options),
            "inputs": {role: unit.digest for role, unit in self.inputs.items()},
            "code": code_version(),
            "environment": environment(),
        }

    @functools.cached_property
    def digest(self) -> str:
        """The unit's name, 64 hexadecimal digits."""
        return sha256(canonical_json(self.record))

    def __hash__(self) -> int:
        """Units of one digest are the same unit."""
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        """Units of one digest are the same unit."""
        return isinstance(other, Unit) and other.digest == self.digest


def in_order(wanted: Iterable[Unit]) -> list[Unit]:
    """All units that `wanted` need, each once, inputs before what starts from them."""
    seen: dict[str, Unit] = {}

    def visit(unit: Unit) -> Iterator[Unit]:
        if unit.digest not in seen:
            for other in unit.inputs.values():
                yield from visit(other)
            seen[unit.digest] = unit
            yield unit

    return [unit for each in wanted for unit in visit(each)]


def environment() -> dict[str, str]:
    """What else the last bits of a result depend on."""
    return {"torch": torch.__version__, "machine": platform.machine()}


@functools.cache
def code_version(package: Path = _PACKAGE) -> str:
    """SHA-256 over the syntax trees of a unit's code.

    Comments, docstrings and layout do not count.
    """
    trees = [f"{path} {_meaning((package / path).read_text())}" for path in code_files(package)]
    return sha256("\n".join(trees).encode())


def code_files(package: Path = _PACKAGE) -> list[str]:
    """The files, relative to the package, that a unit's numbers come out of.

    They are the work and all that it imports, but for the plumbing.
    """
    found: dict[str, None] = {}
    waiting = [_WORK]
    while waiting:
        module = waiting.pop()
        path = _file_of(module, package)
        if path is None or path in found or path.split("/")[0] in _PLUMBING:
            continue
        found[path] = None
        inside = module if path.endswith("__init__.py") else module.rpartition(".")[0]
        waiting.append(inside)  # a package runs before what is in it
        waiting += _imported((package / path).read_text(), inside)
    return sorted(found)


def _file_of(module: str, package: Path) -> str | None:
    """The file of a module of Countermark below `package`.

    There is none for other modules, for names within a module, and for the package itself.
    """
    first, *parts = module.split(".")
    if first != "countermark" or not parts:
        return None
    places = ("/".join((*parts, "__init__.py")), "/".join(parts) + ".py")
    return next((place for place in places if (package / place).is_file()), None)


def _imported(source: str, package: str) -> Iterator[str]:
    """The modules that a source of `package` imports anywhere.

    The names that it takes from them are among the result, since they may be modules too.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _meaning(source: str) -> str:
    """The code of a file without its words: docstrings and the strings below names."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [line for line in node.body if not _is_words(line)]
    return ast.dump(tree)


def _is_words(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)
