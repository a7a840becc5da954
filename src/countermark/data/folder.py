"""A folder of images, with a folder for each class.

The layout is `CLASS/*.png`, or `train/CLASS/*` beside `test`, `val`, `valid` or `validation`. Files
are selected by their extensions, decoded by their content, and read in sorted order. Hidden entries
are skipped; other files are skipped and counted. A symbolic link is followed if it leads to
something inside the folder, and refused if it leads out of the folder or nowhere.
"""

import hashlib
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from countermark.data.images import SUFFIXES, decode
from countermark.data.reading import PARTS, Item, Listing, outlast, some, stamp
from countermark.errors import CountermarkError
from countermark.text import brief

SPLITS: Mapping[str, str] = {
    "train": "train",
    "test": "test",
    "val": "val",
    "valid": "val",
    "validation": "val",
}
"""Folders that are parts of a data set, and which part each is."""


def list_folder(place: Path) -> Listing:
    """List the images of a folder.

    Raises:
        CountermarkError: it cannot be read, has folders within class folders, links that lead out
            of it, no class, or a class of a part that the training part lacks.
    """
    found = _Scan(place)
    class_names = tuple(found.classes["train"])
    labels = {name: label for label, name in enumerate(class_names)}
    for part, classes in found.classes.items():
        if unknown := [brief(name) for name in classes if name not in labels]:
            raise CountermarkError(
                f"{place}: the {part} part has classes that the training part lacks: "
                f"{some(unknown)}; add training images of them or remove them"
            )
    items = (
        Item(os.fspath(path.relative_to(place)), part, labels[name], partial(decode, path))
        for part, classes in found.classes.items()
        for name, paths in classes.items()
        for path in paths
    )
    count = sum(len(paths) for classes in found.classes.values() for paths in classes.values())
    return Listing(
        str(place),
        class_names,
        items,
        count,
        found.state,
        found.ignored,
        lambda: _Scan(place).state,
    )


class _Scan:
    """One walk through a folder.

    It finds the images by part and class, and makes a text that differs after any change.
    """

    def __init__(self, place: Path) -> None:
        self.place, self.root = place, place.resolve()
        self.ignored = 0
        self._newest = 0  # change of a file or folder, in nanoseconds
        self._state = hashlib.sha256(os.fsencode(self.root))
        try:
            top, stray = self._entries(place)
            self.ignored += len(stray)  # they are of no class
            below = {folder.name: self._entries(folder) for folder in top}
            self.classes = self._parts(below)
        except OSError as error:
            raise CountermarkError(
                f"cannot read {error.filename}: {error.strerror}; check the folder and its "
                "permissions"
            ) from error
        self.state = self._state.hexdigest()
        outlast(self._newest)

    def _entries(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """The folders and the images in a folder, in order; what is neither is counted."""
        folders: list[Path] = []
        images: list[Path] = []
        with os.scandir(folder) as found:
            for entry in sorted(found, key=lambda entry: entry.name):
                if entry.name.startswith("."):
                    continue
                path = folder / entry.name
                if entry.is_symlink():
                    self._check_link(path)
                if entry.is_dir():
                    folders.append(path)
                elif entry.is_file() and path.suffix.lower() in SUFFIXES:
                    images.append(path)
                    status = entry.stat()
                    self._newest = max(self._newest, status.st_ctime_ns)
                    self._state.update(stamp(path.relative_to(self.place), status))
                else:
                    self.ignored += 1
        self._state.update(
            repr(
                [os.fsencode(path.relative_to(self.place)) for path in (folder, *folders)]
            ).encode()
        )
        return folders, images

    def _check_link(self, path: Path) -> None:
        try:
            leads = path.resolve(strict=True)
        except (OSError, RuntimeError) as error:  # nowhere, or round in a circle
            raise CountermarkError(f"{path} is a link that leads nowhere; remove it") from error
        if not leads.is_relative_to(self.root):
            raise CountermarkError(
                f"{path} is a link that leads out of the folder, to {leads}; copy what it leads "
                "to, or remove it"
            )

    def _parts(
        self, below: Mapping[str, tuple[list[Path], list[Path]]]
    ) -> dict[str, dict[str, list[Path]]]:
        """Return the class folders of each part.

        Where there are no parts, all class folders belong to the training part.
        """
        if "train" not in below or not below["train"][0] or not below.keys() <= SPLITS.keys():
            if not below:
                raise CountermarkError(
                    f"{self.place} has no class folders; give a folder with one folder of images "
                    "for each class"
                )
            if below.keys() <= SPLITS.keys() and any(folders for folders, _ in below.values()):
                there = ", ".join(map(brief, below))
                raise CountermarkError(
                    f"{self.place} has no class folders in train, only {there}; add images to "
                    "train on, train/CLASS/*"
                )
            self._refuse_nested(below)
            return {"train": {name: images for name, (_, images) in below.items()}}
        parts: dict[str, dict[str, list[Path]]] = {}
        for name, (folders, images) in below.items():
            part = SPLITS[name]
            if part in parts:
                raise CountermarkError(
                    f"{self.place} has several folders for its validation part; keep one of val, "
                    "valid and validation"
                )
            self.ignored += len(images)  # they are of no class
            classes = {folder.name: self._entries(folder) for folder in folders}
            self._refuse_nested(classes)
            parts[part] = {name: images for name, (_, images) in classes.items()}
        return {part: parts[part] for part in PARTS if part in parts}

    def _refuse_nested(self, classes: Mapping[str, tuple[list[Path], list[Path]]]) -> None:
        for folders, _ in classes.values():
            if folders:
                raise CountermarkError(
                    f"{folders[0]} is a folder within a class folder; class folders hold images "
                    "only (or parts: train beside test, val, valid or validation)"
                )
