"""Files that are written whole or not at all, and readers that are safe with hostile files.

Every writer goes through a temporary file, `fsync` and `rename`. Every reader knows its size limit
before it reads. Nothing here ever unpickles: tensors are stored as safetensors, the rest as JSON.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from countermark.errors import CountermarkError
from countermark.places import check_free
from countermark.text import brief

if TYPE_CHECKING:
    import torch


class FolderBusyError(CountermarkError):
    """Another process builds the same folder right now."""


JSON_LIMIT = 1 << 20
"""Largest JSON file that is read or written where nobody says otherwise, in bytes."""

_HEADER_LIMIT = 1 << 24  # bytes of a safetensors header
_DTYPES = {  # of safetensors, and what torch calls them
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}
_CONTENTS = {
    "data_sha256": "images",
    "known_sha256": "images that the weights were trained on",
    "weights_sha256": "weights",
}
_FOLLOWING = ("data", "pools", "threat")  # of a configuration: they may follow from its images
_NAMED = 5  # options that a message names
_TEMPORARY_PREFIX = ".torn-"
_METADATA_KEY = "countermark"  # one key only: with several, safetensors orders them at random


def sha256(data: bytes) -> str:
    """Return the SHA-256 of `data` as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file of any size as 64 hexadecimal digits.

    Raises:
        CountermarkError: it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CountermarkError(
            f"cannot read {path}: {error.strerror}; check the path and its permissions"
        ) from error


def canonical_json(value: Any) -> bytes:
    """Serialise a value to its one byte string: sorted keys, ASCII, no NaN, a final newline."""
    return (
        json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False) + "\n"
    ).encode()


def write_bytes(path: Path, data: bytes, mode: int | None = None) -> None:
    """Write `data` to `path` whole or not at all.

    Args:
        path: of the file.
        data: what it will hold.
        mode: its permissions. None: those of the file that it replaces, or what the umask leaves
            of 0666 for a new one.

    Raises:
        CountermarkError: the folder cannot be written or the disk is full; nothing is left behind.
    """
    temporary = path.parent / f"{_TEMPORARY_PREFIX}{secrets.token_hex(8)}"
    made = False
    try:
        if mode is None and path.is_file():
            mode = stat.S_IMODE(path.stat().st_mode) & 0o777
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        descriptor = os.open(temporary, flags, 0o666 if mode is None else mode & 0o600)
        made = True
        with os.fdopen(descriptor, "wb") as stream:
            if mode is not None:
                os.fchmod(stream.fileno(), mode)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        if made:
            with contextlib.suppress(OSError):
                temporary.unlink()
        if isinstance(error, OSError):
            raise CountermarkError(
                f"cannot write {path}: {error.strerror}; free some space or choose another folder"
            ) from error
        raise


def read_bytes(path: Path, limit: int, first: int | None = None) -> bytes:
    """Read a regular file of at most `limit` bytes, or only its `first` bytes.

    Raises:
        CountermarkError: the file is missing, unreadable, not a regular file, or larger than
            `limit` bytes.
    """
    try:
        if not path.is_file():
            raise CountermarkError(
                f"{path} is not a file; check the path"
                if path.exists()
                else f"{path} does not exist; check the path"
            )
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            most = min(size, limit) + 1  # not limit + 1: that much memory would be taken at once
            data = b"" if size > limit else stream.read(most if first is None else min(most, first))
    except OSError as error:
        raise CountermarkError(
            f"cannot read {path}: {error.strerror}; check the path and its permissions"
        ) from error
    if max(size, len(data)) > limit:
        raise CountermarkError(
            f"{path} is larger than {limit} bytes, the most that such a file can need; "
            "it is not a file of Countermark"
        )
    return data


def write_json(path: Path, value: Any, mode: int | None = None, limit: int = JSON_LIMIT) -> None:
    """Write `value` as canonical JSON, whole or not at all.

    Raises:
        CountermarkError: the file would have more than `limit` bytes, so that `read_json` with the
            same limit could not read it, or it cannot be written.
    """
    data = canonical_json(value)
    if len(data) > limit:
        raise CountermarkError(
            f"{path} would have {len(data)} bytes, and no more than {limit} could be read back; "
            "nothing was written"
        )
    write_bytes(path, data, mode)


def parse_json(data: bytes, origin: str) -> dict[str, Any]:
    """Parse a JSON object that `canonical_json` wrote, and refuse any other spelling of it.

    Args:
        data: the bytes of the object.
        origin: what messages call their source.

    Raises:
        CountermarkError: the bytes are not JSON, not an object, or not exactly what
            `canonical_json` writes.
    """
    try:
        value = json.loads(data)
        canonical = canonical_json(value)
    except (ValueError, RecursionError) as error:
        raise CountermarkError(
            f"{origin} is not valid JSON; it is damaged or not a file of Countermark, "
            "restore it from a backup"
        ) from error
    if not isinstance(value, dict):
        raise CountermarkError(
            f"{origin} does not hold a JSON object; it is not a file of Countermark"
        )
    if canonical != data:
        raise CountermarkError(
            f"{origin} was changed after it was written; restore it from a backup"
        )
    return value


def read_json(path: Path, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """Read a JSON object of at most `limit` bytes that `write_json` wrote.

    Raises:
        CountermarkError: see `read_bytes` and `parse_json`.
    """
    return parse_json(read_bytes(path, limit), str(path))


def write_tensors(
    path: Path,
    tensors: "Mapping[str, torch.Tensor]",
    meta: Mapping[str, Any] | None = None,
    mode: int | None = None,
) -> str:
    """Write named tensors as safetensors, whole or not at all, and return the file's SHA-256."""
    from safetensors.torch import save

    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = save(contiguous, {_METADATA_KEY: json.dumps(meta or {}, sort_keys=True)})
    write_bytes(path, data, mode)
    return sha256(data)


def read_tensors(
    path: Path,
    limit: int,
    check: "Callable[[Mapping[str, torch.Tensor]], None] | None" = None,
) -> "tuple[dict[str, torch.Tensor], dict[str, Any], str]":
    """Read a safetensors file of at most `limit` bytes.

    Args:
        path: the file.
        limit: the most bytes that such a file can need.
        check: raises `CountermarkError` if the names, types or shapes of the tensors are not those
            that are wanted. It is first called with tensors that hold no data (on the device
            `meta`), before any data is read, so that a small file which claims to be a large one
            costs nothing.

    Returns:
        The tensors by name, the metadata object that `write_tensors` stored (empty for files that
        it did not write), and the file's SHA-256.

    Raises:
        CountermarkError: the file is missing, too large, refused by `check`, or not safetensors (a
            pickle, a truncated file). Nothing is ever unpickled.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        announced = _announced(path, limit)
        if check is not None:
            check(announced)
        data = read_bytes(path, limit)
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        meta = json.loads(header.get("__metadata__", {}).get(_METADATA_KEY, "{}"))
    except (
        SafetensorError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        RuntimeError,
        OverflowError,
    ) as error:
        raise CountermarkError(
            f"{path} is not a whole safetensors file ({brief(str(error))}); "
            "it is truncated, damaged or of another format"
        ) from error
    if check is not None:
        check(tensors)  # what was read, not what was announced
    return tensors, meta if isinstance(meta, dict) else {}, sha256(data)


def _announced(path: Path, limit: int) -> "dict[str, torch.Tensor]":
    """The tensors of a safetensors file on the device `meta`, out of its header."""
    import torch

    length = int.from_bytes(read_bytes(path, limit, 8), "little")
    if length > _HEADER_LIMIT:
        raise ValueError(f"its header would have {length} bytes")
    header = json.loads(read_bytes(path, limit, 8 + length)[8:])
    header.pop("__metadata__", None)
    announced = {
        name: torch.empty(
            entry["shape"], dtype=getattr(torch, _DTYPES[entry["dtype"]]), device="meta"
        )
        for name, entry in header.items()
    }
    size = sum(tensor.numel() * tensor.element_size() for tensor in announced.values())
    if 8 + length + size != path.stat().st_size:
        raise ValueError(f"its tensors would have {size} bytes")
    return announced


def make_private_folder(path: Path) -> None:
    """Create a folder that only its owner can enter (mode 0700), or give an existing one that mode.

    Raises:
        CountermarkError: the folder cannot be created or its mode cannot be changed.
    """
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        path.chmod(0o700)
    except OSError as error:
        raise CountermarkError(
            f"cannot create {path}: {error.strerror}; choose another folder"
        ) from error


@contextlib.contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Be alone with a folder among all processes that ask for the same.

    Args:
        path: the folder.
        wait: for the others, instead of an error.

    Raises:
        FolderBusyError: another one is.
    """
    lock = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    except BlockingIOError as error:
        raise FolderBusyError(f"another process is at work with {path}; wait for it") from error
    finally:
        os.close(lock)


@contextlib.contextmanager
def new_folder(path: Path, run: Mapping[str, Any]) -> Iterator[Path]:
    """Build the folder `path` in a sibling `NAME.partial` and rename it when the block succeeds.

    The sibling holds `config.json`, the configuration `run` of the work. If the block is
    interrupted after it wrote anything else (a checkpoint, a secret), the sibling stays, and the
    same call continues in it; otherwise it is removed.

    Args:
        path: the folder to make; it must not exist, or must be empty.
        run: the configuration of this run, as values that JSON can hold.

    Raises:
        CountermarkError: `path` is not empty or cannot be written, or the sibling holds unfinished
            work of another configuration.
        FolderBusyError: another process is building the same folder.
    """
    try:
        path = path.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise CountermarkError(f"{path} leads nowhere ({error}); choose another folder") from error
    partial = path.with_name(path.name + ".partial") if path.name else path
    record = canonical_json(run)
    try:
        check_free(path)
        partial.mkdir(parents=True, exist_ok=True)
        lock = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise CountermarkError(
            f"cannot create {path}: {error.strerror}; choose a folder that you can write to"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise FolderBusyError(
            f"another process is writing {partial}; wait for it or choose another folder"
        ) from error
    try:
        check_free(path)  # another process may have finished it since
        for torn in partial.rglob(f"{_TEMPORARY_PREFIX}*"):
            torn.unlink(missing_ok=True)
        config = partial / "config.json"
        if not config.exists():
            write_bytes(config, record)
        elif others := _others(read_bytes(config, JSON_LIMIT), record):
            raise CountermarkError(
                f"{partial} holds unfinished work with {others}; "
                "run it again with those (see its config.json) or delete it"
            )
        yield partial
        try:
            partial.replace(path)
            for entry in path.glob(f"{CHECKPOINT_PREFIX}*"):
                entry.unlink()
            _sync_folder(path.parent)
        except OSError as error:
            raise CountermarkError(
                f"cannot finish {path}: {error.strerror}; the work waits in {partial}"
            ) from error
    finally:
        if partial.is_dir() and [entry.name for entry in partial.iterdir()] in (
            [],
            ["config.json"],
        ):
            shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def _others(begun: bytes, wanted: bytes) -> str:
    """Say how two configurations differ: in options, or in contents known by their digest.

    An option that one of them lacks is one that was not given (null), so a later release may go on
    with what an earlier one began.
    """
    try:
        before, now = (parse_json(each, "config.json") for each in (begun, wanted))
    except CountermarkError:
        return "options that cannot be read"
    changed = [
        name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)
    ]
    contents = [f"other {_CONTENTS[name]}" for name in _CONTENTS if name in changed]
    if contents:
        changed = [name for name in changed if name not in (*_CONTENTS, *_FOLLOWING)]
    options = (
        [f"other options ({', '.join(changed[:_NAMED])}{', ...' if changed[_NAMED:] else ''})"]
        if changed
        else []
    )
    return " and ".join([*contents, *options])


CHECKPOINT_PREFIX = "checkpoint-"
"""Files of this prefix in a folder under construction are dropped when it is finished."""


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
