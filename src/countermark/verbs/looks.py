"""The ledger of a key: every time that a suspect was asked its trials.

A p-value is that of one look. Who asks one stranger in nineteen ways, or nineteen strangers in one,
has nineteen chances of a small one. The ledger tells the owner how many there were; to a judge it
is no more than the owner's word.
"""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from countermark.errors import CountermarkError
from countermark.files import canonical_json, sha256
from countermark.places import SuspectPlace, place_name

NAME = "looks.jsonl"


@dataclass(frozen=True)
class Looks:
    """How often suspects were asked with a key for the same mark, this time included.

    Attributes:
        suspect: looks at this suspect.
        key: looks at any.
        log: whether they asked what a service's log holds, and not the key's own trials.
    """

    suspect: int
    key: int
    log: bool = False

    @property
    def said(self) -> str:
        """One sentence for a person; empty for the very first look."""
        if self.key < 2:
            return ""
        asked = "the log of this key" if self.log else "this key"
        return (
            f"This is look {self.suspect} at this suspect with {asked}, of {self.key} at any; do "
            "not believe the smallest of several p-values alone."
        )


def note_look(
    folder: Path,
    verb: str,
    suspect: SuspectPlace,
    how: Mapping[str, Any],
    log10_p_value: float | None,
    *,
    identity: Mapping[str, str] | None = None,
    log: bool = False,
) -> Looks | None:
    """Add a look to the ledger of a key folder.

    A file is known by its digest, whatever it is called, and everything else by its name.

    Args:
        folder: the key folder.
        verb: what looked.
        suspect: whom.
        how: how it was asked, JSON-ready.
        log10_p_value: decimal logarithm of what was found, if that was a p-value.
        identity: what a claim calls it, where that is known: a file need not be read for it again.
        log: whether it was asked what a service's log holds, and not the key's own trials.

    Returns:
        The looks until now; none where the folder cannot be written.
    """
    name, known = place_name(suspect), identity or _identity(suspect)
    digest = None if known is None else sha256(canonical_json(known))
    entry = {
        "day": int(time.time() // 86_400),
        "verb": verb,
        "of": "log" if log else "key",
        "suspect": name,
        "identity": digest,
        "how_sha256": sha256(canonical_json(how)),
        "log10_p_value": log10_p_value,
    }
    path = folder / NAME
    try:
        before = path.read_bytes() if path.exists() else b""
        line = json.dumps(entry, sort_keys=True).encode() + b"\n"
        number = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(number, "wb") as stream:  # a line that was cut short stays one
            stream.write(b"\n" * (bool(before) and not before.endswith(b"\n")) + line)
    except OSError:
        return None
    found = [_Look.read(each) for each in before.splitlines() if each.strip()]
    looks = [each for each in found if each.log == log]
    return Looks(1 + sum(each.at(name, digest) for each in looks), 1 + len(looks), log)


def said_looks(looks: Looks | None) -> tuple[str, ...]:
    """What a person should know about how often a key was used, in sentences."""
    if looks is None:
        return ("This look could not be noted beside the key, whose folder cannot be written.",)
    return (looks.said,) if looks.said else ()


@dataclass(frozen=True)
class _Look:
    """A line of the ledger: of a log or of the key's own trials, and at whom."""

    log: bool
    name: str
    identity: str | None

    @classmethod
    def read(cls, line: bytes) -> "_Look":
        """A line that cannot be read is a look of the key's own trials at somebody else."""
        try:
            entry = json.loads(line)
            identity = entry["identity"]
            named = None if identity is None else str(identity)
            return cls(entry["of"] == "log", str(entry["suspect"]), named)
        except (ValueError, KeyError, TypeError, RecursionError):
            return cls(False, "", None)

    def at(self, name: str, identity: str | None) -> bool:
        """Whether it was a look at this suspect."""
        return self.name == name if identity is None else self.identity == identity


def _identity(suspect: SuspectPlace) -> Mapping[str, str] | None:
    """What a claim would call the suspect; none for what no claim can name."""
    from countermark.claims import suspect_identity

    if not isinstance(suspect, str | Path):
        return None
    try:
        return suspect_identity(suspect)
    except (CountermarkError, OSError, ValueError):
        return None
