"""Finished units, each in a folder of its own name.

A unit's folder appears whole or not at all: it is built as `DIGEST.partial` and renamed. It holds
the digest of every file in it, so a unit that is damaged later is noticed before it is used, and is
made again. `kill -9` at any moment leaves the finished folders, and of the other units at most
checkpoints.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from countermark.errors import CountermarkError
from countermark.files import (
    CHECKPOINT_PREFIX,
    JSON_LIMIT,
    new_folder,
    read_bytes,
    read_json,
    sha256,
    write_bytes,
    write_json,
)
from countermark.study.graph import Unit

STORE_FORMAT = "countermark store 1"
RESULT = "result.json"
_MANIFEST = "manifest.json"
_PROGRESS = "progress"
_FILE_LIMIT = 1 << 34


class Store:
    """A folder of finished units.

    Args:
        folder: where.
        create: make it if it is not there; else it is empty until then.

    Raises:
        CountermarkError: the folder belongs to something else, or to another release's store.
    """

    def __init__(self, folder: Path, *, create: bool = True) -> None:
        """Open or create the store."""
        self.folder = folder
        mark = folder / "store.json"
        # Looked at before the mark: another process may be making the store, and its units after.
        others = folder.is_dir() and any(
            not entry.name.startswith(".") for entry in folder.iterdir()
        )
        if mark.exists():
            if read_json(mark).get("format") != STORE_FORMAT:
                raise CountermarkError(
                    f"{folder} is a store of another release ({STORE_FORMAT!r} is read); choose a "
                    "new folder for this study"
                )
        elif others:
            raise CountermarkError(f"{folder} holds other files and no store; choose a new folder")
        elif create:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CountermarkError(
                    f"cannot create {folder}: {error.strerror}; choose a folder that you can "
                    "write to"
                ) from error
            write_json(mark, {"format": STORE_FORMAT})

    def path(self, unit: Unit) -> Path:
        """The folder of a unit."""
        return self.folder / unit.digest

    def has(self, unit: Unit) -> bool:
        """Whether a unit is finished and not damaged."""
        folder = self.path(unit)
        if not folder.exists():
            return False
        try:
            manifest = read_json(folder / _MANIFEST)
            return bool(manifest) and all(
                sha256(read_bytes(folder / name, _FILE_LIMIT)) == digest
                for name, digest in manifest.items()
            )
        except CountermarkError:
            return False

    def others(self, units: Iterable[Unit]) -> int:
        """How many folders of finished units are of none of these, such as those of other code."""
        known = {unit.digest for unit in units}
        there = {path.parent.name for path in self.folder.glob(f"*/{_MANIFEST}")}
        return sum("." not in name for name in there - known)

    def result(self, unit: Unit) -> dict[str, Any]:
        """The result of a finished unit."""
        return read_json(self.path(unit) / RESULT)

    def make(self, unit: Unit, work: Callable[[Path], Mapping[str, Any]]) -> None:
        """Do the `work` of a unit.

        It writes its files into the folder that it is given, and returns the unit's result. What is
        there of a damaged unit is removed.
        """
        if self.path(unit).exists() and not self.has(unit):
            shutil.rmtree(self.path(unit), ignore_errors=True)
        with new_folder(self.path(unit), unit.record) as folder:
            write_json(folder / RESULT, dict(work(folder)))
            kept = sorted(
                path
                for path in folder.rglob("*")
                if path.is_file() and not path.name.startswith(CHECKPOINT_PREFIX)
            )
            write_json(
                folder / _MANIFEST,
                {str(path.relative_to(folder)): sha256(path.read_bytes()) for path in kept},
            )

    def drop(self, unit: Unit) -> None:
        """Remove what is unfinished of a unit."""
        shutil.rmtree(self.path(unit).with_name(f"{unit.digest}.partial"), ignore_errors=True)

    def tell(self, unit: Unit, status: Mapping[str, Any] | None) -> None:
        """Record how far a running unit is, for whoever watches.

        Args:
            unit: the unit.
            status: how far it is; None when it has stopped.
        """
        path = self.folder / _PROGRESS / f"{unit.digest}.json"
        if status is None:
            path.unlink(missing_ok=True)
            return
        path.parent.mkdir(exist_ok=True)
        write_bytes(path, json.dumps(status).encode())

    def told(self) -> dict[str, dict[str, Any]]:
        """Return the recorded status of each running unit, by digest."""
        found = {}
        for path in sorted((self.folder / _PROGRESS).glob("*.json")):
            try:
                found[path.stem] = json.loads(read_bytes(path, JSON_LIMIT))
            except (CountermarkError, ValueError):  # it stopped meanwhile
                continue
        return found
