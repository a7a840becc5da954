"""Units of work: what is done, with which options, to which other units.

A unit is named by the SHA-256 of everything that its result depends on: its kind, its options, the units that it starts from, the code of
the numerical rooms and the release of PyTorch. Two studies that need the same unit share it, and a changed line of numerical code makes a
new one.
"""

import ast
import functools
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from countermark.files import canonical_json, sha256

UNIT_FORMAT = "countermark unit 1"

_ROOMS = ("data", "training", "watermarks", "evidence", "models.py", "attacks", "evaluation.py", "bundle.py", "theft.py", "removal.py")
_OWN = ("study/work.py",)


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
def code_version() -> str:
    """SHA-256 over the syntax trees of the numerical rooms: comments, docstrings and layout do not count."""
    root = Path(__file__).parents[1]
    files = [path for room in (*_ROOMS, *_OWN) for path in ([root / room] if room.endswith(".py") else sorted((root / room).glob("*.py")))]
    return sha256("\n".join(f"{path.relative_to(root)} {_meaning(path.read_text())}" for path in files).encode())


def _meaning(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                body[0] = ast.Expr(ast.Constant(""))
    return ast.dump(tree)
