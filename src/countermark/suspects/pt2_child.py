"""The child process of `ask_pt2` (see `child_frame`).

It confines itself, writes the archive anew with nothing in it that could run, and lets PyTorch load
the result.
"""

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))  # -I leaves it out
from child_calls import allow_few_calls  # type: ignore[import-not-found]
from child_frame import (  # type: ignore[import-not-found]
    BATCH,
    RefusedError,
    first_line,
    in_batches,
    serve,
)

_KNOWN = re.compile(
    r"(data/(weights/(weight_\d+|model_weights_config\.json)"
    r"|constants/(tensor_\d+|model_constants_config\.json)|sample_inputs/model\.pt)"
    r"|models/model\.json|archive_format|archive_version|byteorder"
    r"|\.data/(version|serialization_id)|\.format_version|\.storage_alignment)"
)
_SIZE_LIMIT = 1 << 29
_JSON_LIMIT = 1 << 24
_MOST_OUTPUTS = 1000
_LONGEST_EXPRESSION = 1000  # characters
# An expression has one reading, so that matching takes linear time: a word ends where no letter or
# digit follows.
_EXPRESSION = re.compile(
    r"(?:Symbol\('[su]\d{1,9}'(?:, (?:positive|integer)=True)*\)"
    r"|(?:[su]?\d{1,9}|Integer|Mul|Add|Max|Min|FloorDiv|Mod)(?![0-9A-Za-z_])|[ ,()+\-])*",
    re.ASCII,
)
_SYMBOL = re.compile(r"[su]\d{1,9}", re.ASCII)
_ARITHMETIC = re.compile(r"_operator\.(add|sub|mul|floordiv|mod|getitem|eq|ge|gt|le|lt|ne)")
_WORDS = re.compile(r"[\w .+-]{0,300}", re.ASCII)  # names; torch makes Python source of some
_TEXTS = ("as_string", "as_strings")  # arguments of operators, which stay strings


def _confine() -> None:
    """Go on as a process that only computes.

    It has no network, can name no other process, has only Python's own folders to read and an empty
    one to write, and makes no other system calls than those of a computation (see `child_calls`).
    """
    import torch  # before the folders close; what is imported later is among those that stay open
    import torch.export

    torch.set_num_threads(1)
    torch.ones(4).half()  # torch reads what processor this is where it first needs it
    # An empty folder that is deleted after the answer; torch's loader needs a temporary folder.
    scratch = tempfile.tempdir = str(Path.cwd())
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    # User, PID, network and IPC namespaces.
    if libc.unshare(0x10000000 | 0x20000000 | 0x40000000 | 0x08000000) != 0:
        raise RefusedError(
            "this system cannot put a child into namespaces of its own, "
            "so .pt2 files are not loaded; export the model to ONNX"
        )
    _move_into_pid_namespace(libc)
    # Landlock (linux/landlock.h): restrict every kind of file access that this kernel's version
    # knows, and allow reading below Python's folders.
    create, add, restrict = 444, 445, 446
    version = libc.syscall(create, None, ctypes.c_size_t(0), 1)
    everything = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    reading, writing = (1 << 2) | (1 << 3), everything & ~1  # all but executing
    ruleset = libc.syscall(create, ctypes.byref(ctypes.c_uint64(everything)), ctypes.c_size_t(8), 0)
    if ruleset < 0:
        raise RefusedError(
            "this system has no Landlock to close the files of a child, "
            "so .pt2 files are not loaded; export the model to ONNX"
        )
    places = {
        *sys.path,
        *sysconfig.get_paths().values(),
        sys.prefix,
        sys.base_prefix,
        "/usr/lib",
        "/lib",
        "/lib64",
    }
    for place in sorted({*places, scratch}):
        if place and Path(place).is_dir():
            descriptor = os.open(place, os.O_PATH)
            rule = struct.pack("=Qi", writing if place == scratch else reading, descriptor)
            libc.syscall(add, ruleset, 1, rule, 0)
            os.close(descriptor)
    if libc.syscall(restrict, ruleset, 0) != 0:
        raise RefusedError(
            "this system cannot close the files of a child, so .pt2 files are not loaded; "
            "export the model to ONNX"
        )
    os.close(ruleset)
    if not allow_few_calls(libc):
        raise RefusedError(
            "this system cannot filter the system calls of a child (seccomp, on x86-64 and arm64), "
            "so .pt2 files are not loaded; export the model to ONNX"
        )


def _move_into_pid_namespace(libc: ctypes.CDLL) -> None:
    """Continue in a child, the first process of the new PID namespace.

    The parent waits for it and passes its status on. No process outside has a number in the
    namespace, so none can be signalled, limited or watched. The child starts a session of its own
    because a signal can also go to a process group.
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
        raise RefusedError(
            "it is not a .pt2 archive (or a truncated one); export the model again"
        ) from error
    if sum(member.file_size for member in members) > _SIZE_LIMIT or any(
        member.compress_type != zipfile.ZIP_STORED for member in members
    ):
        raise RefusedError(
            "its archive is compressed or too large; "
            "torch.export.save stores its members as they are"
        )
    roots = {member.filename.split("/")[0] for member in members}
    names = [member.filename.partition("/")[2] for member in members]
    if len(roots) != 1 or len(set(names)) != len(names):
        raise RefusedError(
            "its archive has several roots, or a member twice; export the model again"
        )
    for name in names:
        if not _KNOWN.fullmatch(name):
            raise RefusedError(
                f"its archive holds {name[:80]!r}, which a plain program does not need; "
                "export the model to ONNX"
            )
    contents = {
        name: _content(archive, member) for name, member in zip(names, members, strict=True)
    }
    sample = io.BytesIO()
    torch.save(((torch.from_numpy(np.zeros((2, *x.shape[1:]), dtype=x.dtype)),), {}), sample)
    contents["data/sample_inputs/model.pt"] = sample.getvalue()
    for part in ("weights", "constants"):
        name = f"data/{part}/model_{part}_config.json"
        config = _json(contents, name)
        _check_tensors(config, name)
    program = _plain_program(_json(contents, "models/model.json"))
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
        raise RefusedError(
            f"its member {name} is missing or not JSON; "
            "it is not a program that torch.export.save wrote"
        ) from error
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
            raise RefusedError(
                f"its member {name} has a value that is pickled or no tensor; "
                "pickles are never loaded"
            )


def _plain_program(program: dict[str, Any]) -> dict[str, Any]:
    """The program as one from a tensor to a tuple, without what names modules and classes.

    Those are how its input and output were packed and where its operators came from; its guards,
    which are source, go too.
    """
    from torch.utils._pytree import tree_structure, treespec_dumps

    try:
        module = program["graph_module"]
        signature = module["signature"]
        inputs = sum("user_input" in spec for spec in signature["input_specs"])
        outputs = sum("user_output" in spec for spec in signature["output_specs"])
        for node in module["graph"]["nodes"]:
            node["metadata"] = {}
        ranges = program["range_constraints"].items()
        program["range_constraints"] = {k: v for k, v in ranges if _SYMBOL.fullmatch(k)}
    except (KeyError, TypeError, AttributeError) as error:
        raise RefusedError(
            "its models/model.json holds no program; export the model again"
        ) from error
    if inputs != 1 or not 1 <= outputs <= _MOST_OUTPUTS:
        raise RefusedError(
            f"it takes {inputs} inputs to {outputs} outputs; a suspect takes one, of images"
        )
    packed = {
        "inputs": [],
        "outputs": [],
        "in_spec": treespec_dumps(tree_structure(((0,), {}))),
        "out_spec": treespec_dumps(tree_structure((0,) * outputs)),
        "forward_arg_names": ["x"],
    }
    module["module_call_graph"] = [{"fqn": "", "signature": packed}]
    module["metadata"] = module["treespec_namedtuple_fields"] = {}
    program["guards_code"] = []
    for name, value in program.items():
        if name != "graph_module":
            _check_program(value)
    for name, value in module.items():
        if name != "module_call_graph":
            _check_program(value)
    return program


def _check_program(value: Any, place: str = "") -> None:
    """Check what torch would evaluate, look up by name or make source of."""
    if isinstance(value, list):
        for item in value:
            _check_program(item, place)
    elif isinstance(value, dict):
        for name, item in value.items():
            _check_program(name)
            _check_program(item, name)
    elif isinstance(value, str) and place == "expr_str":
        if len(value) >= _LONGEST_EXPRESSION or not _EXPRESSION.fullmatch(value):
            raise RefusedError(
                f"it has an expression that is more than arithmetic of sizes: {value[:60]!r}; "
                "it is not evaluated"
            )
    elif isinstance(value, str) and place == "target":
        if not _ARITHMETIC.fullmatch(value) and not _is_operator(value):
            raise RefusedError(f"it calls {value[:80]!r}; only ATen operators are run")
    elif isinstance(value, str) and place not in _TEXTS and not _WORDS.fullmatch(value):
        raise RefusedError(
            f"it has the name {value[:60]!r}, which is more than letters and digits; "
            "export the model again"
        )


def _is_operator(name: str) -> bool:
    """Whether a name is that of an ATen operator and of nothing else in the same place."""
    import torch

    found: Any = torch.ops.aten
    *_, packet, overload = ["", "", *name.split(".")]
    if name != f"torch.ops.aten.{packet}.{overload}" or packet == "from_file":
        return False
    for part in (packet, overload):
        found = getattr(found, part, None)
    return isinstance(found, torch._ops.OpOverload)


def _content(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    try:
        return archive.read(member)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError, struct.error) as error:
        raise RefusedError(
            f"its member {member.filename[:80]!r} is damaged or encrypted ({first_line(error)}); "
            "get the file again"
        ) from error


def _ask(data: bytes, x: np.ndarray) -> bytes:
    import torch

    plain = _plain(data, x)
    try:
        program = torch.export.load(plain)
        module = program.module()
        images = next(
            node for node in program.graph.nodes if node.name in program.graph_signature.user_inputs
        ).meta["val"]
        declared = [side if isinstance(side, int) else None for side in images.shape]
        limits = [
            program.range_constraints.get(side.node.expr)
            for side in images.shape[:1]
            if not isinstance(side, int)
        ]
    except Exception as error:
        raise RefusedError(f"torch cannot load it: {first_line(error)}") from error
    given = torch.from_numpy(x)
    if images.dtype.is_floating_point != given.dtype.is_floating_point:
        raise RefusedError(f"it takes images of {images.dtype}; the key asks with {given.dtype}")
    if len(declared) != x.ndim or any(
        d not in (None, s) for d, s in zip(declared[1:], x.shape[1:], strict=True)
    ):
        raise RefusedError(
            f"it takes images of shape {declared}; "
            f"the key asks with (n, {', '.join(map(str, x.shape[1:]))})"
        )

    def run(part: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            output = module(torch.from_numpy(part).to(images.dtype))
        first = next((value for value in output if isinstance(value, torch.Tensor)), None)
        if first is None:
            raise RefusedError(
                "it answers with no tensor; export a model that answers with logits or labels"
            )
        return (first.double() if first.is_floating_point() else first).numpy()

    answer: bytes = in_batches(x, _sizes(declared[0], limits, len(x)), run)
    return answer


def _sizes(declared: int | None, limits: Sequence[Any], count: int) -> list[int]:
    """Sizes of a batch to try: the program's own, or one within the limits that it says."""
    if declared is not None:
        return [declared]
    likely = min(BATCH, max(count, 1))
    for limit in limits:
        if limit is not None:
            likely = int(max(min(likely, limit.upper), limit.lower))
    return [likely, BATCH, 1]


if __name__ == "__main__":
    sys.exit(serve(_confine, _ask))
