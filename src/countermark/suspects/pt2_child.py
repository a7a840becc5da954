"""The child process of `pt2` (see `child_frame`): rewrites the archive plainly, confines itself, then lets torch load it."""

import ctypes
import io
import json
import os
import re
import signal
import struct
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))  # -I leaves it out
from child_frame import BATCH, RefusedError, first_line, labels_of, serve  # type: ignore[import-not-found]

_KNOWN = re.compile(
    r"(data/(weights/(weight_\d+|model_weights_config\.json)|constants/(tensor_\d+|model_constants_config\.json)|sample_inputs/model\.pt)"
    r"|models/model\.json|archive_format|archive_version|byteorder|\.data/(version|serialization_id)|\.format_version|\.storage_alignment)"
)
_SIZE_LIMIT = 1 << 29
_JSON_LIMIT = 1 << 24
_EXPRESSION = re.compile(
    r"(Symbol\('[su]\d{1,9}'(, (positive|integer)=True)*\)|[su]\d{1,9}|\d{1,9}|Mul|Add|Max|Min|FloorDiv|Mod|[ ,()+\-])*"
)
_TARGET = re.compile(r"torch\.ops\.aten\.\w+\.\w+|_operator\.(add|sub|mul|floordiv|mod|getitem|eq|ge|gt|le|lt|ne)")


def _confine() -> None:
    """Go on as a process without network, that can name no other process, with only Python's own folders to read and an empty one to write.

    What Linux keeps open: modes and times of the user's own files, whose names it would have to guess (Landlock knows neither); before
    Linux 6.2 also cutting them short.
    """
    import torch  # before the folders close; what is imported later is among those that stay open
    import torch.export

    torch.set_num_threads(1)
    scratch = tempfile.tempdir = str(Path.cwd())  # empty, and deleted when the answer is there; torch's loader wants such a place
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    if libc.unshare(0x10000000 | 0x20000000 | 0x40000000 | 0x08000000) != 0:  # user, PID, network and IPC namespaces
        raise RefusedError(
            "this system cannot put a child into namespaces of its own, so .pt2 files are not loaded; export the model to ONNX"
        )
    _move_into_pid_namespace(libc)
    # Landlock (linux/landlock.h): handle every use of files that this kernel's version knows; allow reading below Python's folders.
    create, add, restrict = 444, 445, 446
    version = libc.syscall(create, None, ctypes.c_size_t(0), 1)
    reading, everything = (1 << 2) | (1 << 3), (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    ruleset = libc.syscall(create, ctypes.byref(ctypes.c_uint64(everything)), ctypes.c_size_t(8), 0)
    if ruleset < 0:
        raise RefusedError(
            "this system has no Landlock to close the files of a child, so .pt2 files are not loaded; export the model to ONNX"
        )
    places = {*sys.path, *sysconfig.get_paths().values(), sys.prefix, sys.base_prefix, "/usr/lib", "/lib", "/lib64"}
    for place in sorted({*places, scratch}):
        if place and Path(place).is_dir():
            descriptor = os.open(place, os.O_PATH)
            rule = struct.pack("=Qi", everything if place == scratch else reading, descriptor)
            libc.syscall(add, ruleset, 1, rule, 0)
            os.close(descriptor)
    if libc.syscall(restrict, ruleset, 0) != 0:
        raise RefusedError("this system cannot close the files of a child, so .pt2 files are not loaded; export the model to ONNX")


def _move_into_pid_namespace(libc: ctypes.CDLL) -> None:
    """Go on in a child, the first process of the new PID namespace; this one waits and passes its status on.

    No process outside has a number there, so none can be signalled, limited or watched; the session of its own is for signals to a group.
    """
    child = os.fork()
    if child:
        os._exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), -1) & 0xFF)
    libc.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    os.setsid()


def _plain(data: bytes, x: np.ndarray) -> io.BytesIO:
    """The same archive, written anew with nothing in it that could run.

    Raises:
        RefusedError: it holds more than stored tensors and a program of ATen operators.
    """
    import torch

    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise RefusedError("it is not a .pt2 archive (or a truncated one); export the model again") from error
    if sum(member.file_size for member in members) > _SIZE_LIMIT or any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise RefusedError("its archive is compressed or too large; torch.export.save stores its members as they are")
    roots = {member.filename.split("/")[0] for member in members}
    names = [member.filename.partition("/")[2] for member in members]
    if len(roots) != 1 or len(set(names)) != len(names):
        raise RefusedError("its archive has several roots, or a member twice; export the model again")
    for name in names:
        if not _KNOWN.fullmatch(name):
            raise RefusedError(f"its archive holds {name[:80]!r}, which a plain program does not need; export the model to ONNX")
    contents = {name: archive.read(member) for name, member in zip(names, members, strict=True)}
    sample = io.BytesIO()
    torch.save(((torch.from_numpy(np.zeros((2, *x.shape[1:]), dtype=x.dtype)),), {}), sample)
    contents["data/sample_inputs/model.pt"] = sample.getvalue()
    for part in ("weights", "constants"):
        name = f"data/{part}/model_{part}_config.json"
        config = _json(contents, name)
        _check_tensors(config, name)
    program = _json(contents, "models/model.json")
    _check_program(program)
    program["guards_code"] = []
    contents["models/model.json"] = json.dumps(program).encode()
    plain = io.BytesIO()
    with zipfile.ZipFile(plain, "w") as written:
        for name, content in contents.items():
            written.writestr(f"model/{name}", content)
    plain.seek(0)
    return plain


def _json(contents: dict[str, bytes], name: str) -> dict[str, Any]:
    try:
        if len(contents[name]) > _JSON_LIMIT:
            raise ValueError
        value = json.loads(contents[name])
    except (KeyError, ValueError, RecursionError) as error:
        raise RefusedError(f"its member {name} is missing or not JSON; it is not a program that torch.export.save wrote") from error
    if not isinstance(value, dict):
        raise RefusedError(f"its member {name} is not a JSON object")
    return value


def _check_tensors(config: dict[str, Any], name: str) -> None:
    entries = config.get("config")
    if not isinstance(entries, dict):
        raise RefusedError(f"its member {name} has no tensors where they should be")
    for entry in entries.values():
        plain = isinstance(entry, dict) and entry.get("use_pickle") is False
        if not plain or not re.fullmatch(r"(weight|tensor)_\d+", str(entry.get("path_name"))):
            raise RefusedError(f"its member {name} has a value that is pickled or no tensor; pickles are never loaded")


def _check_program(value: Any) -> None:
    """Every expression that torch would evaluate, and every name that it would look up."""
    if isinstance(value, list):
        for item in value:
            _check_program(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            if name == "expr_str" and not (isinstance(item, str) and len(item) < 200 and _EXPRESSION.fullmatch(item)):
                raise RefusedError(f"it has an expression that is more than arithmetic of sizes: {str(item)[:60]!r}; it is not evaluated")
            if name == "target" and isinstance(item, str) and not _TARGET.fullmatch(item):
                raise RefusedError(f"it calls {item[:80]!r}; only ATen operators are run")
            _check_program(item)


def _ask(data: bytes, x: np.ndarray) -> np.ndarray:
    import torch

    plain = _plain(data, x)
    try:
        module = torch.export.load(plain).module()
        with torch.no_grad():
            labels = [labels_of(module(torch.from_numpy(x[i : i + BATCH])).numpy(), len(x[i : i + BATCH])) for i in range(0, len(x), BATCH)]
    except RefusedError:
        raise
    except Exception as error:
        raise RefusedError(f"torch cannot load or run it: {first_line(error)}") from error
    return np.concatenate(labels) if labels else np.empty(0, dtype=np.int64)


if __name__ == "__main__":
    sys.exit(serve(_confine, _ask))
