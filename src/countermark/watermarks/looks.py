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

from countermark.files import canonical_json, sha256

NAME = "looks.jsonl"


@dataclass(frozen=True)
class Looks:
    """How often suspects were asked with a key for the same mark, this time included.

    Attributes:
        suspect: looks at this suspect.
        key: looks at any.
    """

    suspect: int
    key: int

    @property
    def said(self) -> str:
        """One sentence for a person; empty for the first look at a suspect."""
        if self.suspect < 2:
            return ""
        return (
            f"This is look {self.suspect} at this suspect with this key, of {self.key} at any; do "
            "not believe the smallest of several p-values alone."
        )


def note_look(
    folder: Path, verb: str, suspect: str, how: Mapping[str, Any], log10_p_value: float | None
) -> Looks | None:
    """Add a look to the ledger of a key folder.

    Args:
        folder: the key folder.
        verb: what looked.
        suspect: what the suspect is called.
        how: how it was asked, JSON-ready.
        log10_p_value: decimal logarithm of what was found, if that was a p-value.

    Returns:
        The looks until now; none where the folder cannot be written.
    """
    entry = {
        "day": int(time.time() // 86_400),
        "verb": verb,
        "suspect": suspect,
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
    found = [_look(each) for each in before.splitlines() if each.strip()]
    same = [name for log, name in found if log == (verb == "trace")]
    return Looks(1 + same.count(suspect), 1 + len(same))


def _look(line: bytes) -> tuple[bool, str]:
    """Whether a line is of a trace, which is about a log and not about the key's own trials; whom.

    A line that cannot be read is one of the others.
    """
    try:
        entry = json.loads(line)
        return entry["verb"] == "trace", str(entry["suspect"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return False, ""
