"""Every parser of a file or message that may come from somebody else: an example, and its spoiling.

A parser may refuse with a CountermarkError (the service and the children: with their own refusal).
Anything else that escapes is a fault, be it a panic in Rust, which is no `Exception`, an exit, more
memory than any honest input needs, or, of what is parsed in a process of its own, a crash or more
time. `crafting` makes inputs that are well-formed where somebody would look and odd further in.
"""

import contextlib
import faulthandler
import importlib.util
import io
import json
import os
import random
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from countermark.claims import read_claim
from countermark.data.idx import parse_idx
from countermark.errors import CountermarkError
from countermark.files import canonical_json, read_tensors, sha256
from countermark.guard import Guard, GuardedModel, QueryLog, read_guard, read_head
from countermark.guard.requests import (
    is_signed_alone,
    open_requests,
    read_opening,
    request_of,
)
from countermark.networks import load_model
from countermark.places import endpoint_address
from countermark.service.clients import Clients
from countermark.service.tensors import RefusedError, decoded, parse_request
from countermark.suspects import APIS, Asking
from countermark.suspects.answers import Names, labels_of
from countermark.suspects.asker import RefusalError, read_replay
from countermark.timestamps import check_token, decode_token, load_roots, read_token, root_name
from countermark.verbs.claim import _spent
from countermark.watermarks import load_key
from crafting import (
    craft_body,
    craft_log,
    craft_onnx,
    craft_replay,
    craft_roots,
    craft_tensors,
    onnx_example,
)
from peak import rising

GOLDEN = Path(__file__).parent / "golden" / "0.1.0"
Parser = Callable[[bytes], object]
Spoiler = Callable[[bytes, random.Random], bytes]
_MOST_BYTES = 1 << 18
_MOST_MEMORY = 1 << 28  # bytes that one input may take
_MOST_ADDRESSES = 1 << 32  # bytes of address space, where an input is stopped
_MOST_SECONDS = 20  # of the processor
_STOPPED = (signal.SIGPROF, signal.SIGALRM)


def _child(name: str) -> Any:
    """The module of a child process, which is run by its path, loaded into this process."""
    place = Path(importlib.util.find_spec("countermark.suspects").origin or "").with_name(
        f"{name}.py"
    )  # type: ignore[union-attr]
    found = importlib.util.spec_from_file_location(name, place)
    assert found is not None and found.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(found)
    before = list(sys.path)
    try:
        found.loader.exec_module(module)
    finally:
        sys.path[:] = before
    return module


_ONNX = _child("onnx_child")
REFUSALS = (CountermarkError, RefusedError, _ONNX.RefusedError)


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        example: an honest one.
        parse: its parser.
        spoil: makes another one out of one.
        alone: whether it is parsed in a process of its own: what is written in C cannot be stopped.
    """

    example: bytes
    parse: Parser
    spoil: Spoiler
    alone: bool = False


class Place:
    """A folder like an honest one, of which one file is replaced by the input."""

    def __init__(
        self, folder: Path, name: str, read: Callable[[Path], object], argument: str | None = None
    ) -> None:
        memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
        # It goes with this object, at the latest when the process ends.
        self.around = tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory)
        self.folder = Path(self.around.name) / "x"
        if folder.is_dir():
            for path in folder.rglob("*"):
                if path.is_file():
                    target = self.folder / path.relative_to(folder)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(path.read_bytes())
        self.file, self.read, self.argument = (
            self.folder / name,
            read,
            self.folder if argument is None else self.folder / argument,
        )
        self.example = self.file.read_bytes()

    def __call__(self, data: bytes) -> object:
        for suffix in (
            "-wal",
            "-shm",
            "-journal",
        ):  # of an earlier input's process that was stopped
            self.file.with_name(self.file.name + suffix).unlink(missing_ok=True)
        self.file.write_bytes(data)
        return self.read(self.argument)


def _request(data: bytes) -> object:
    """A body as the service reads it; a first line may say how long its JSON is."""
    length, line, body = data.partition(b"\n")
    if not line or data.startswith(b"{"):
        return read_body(data, None)
    return read_body(body, length.decode("latin-1"))


def read_body(
    body: bytes, json_length: str | None, shape: tuple[int, int, int] = (1, 8, 8), most: int = 64
) -> torch.Tensor:
    """The images of a request."""
    images = parse_request(body, json_length, shape, most).images
    return images if isinstance(images, torch.Tensor) else decoded(images, shape)


def _with_binary(binary: bytes, shape: list[int], datatype: str) -> bytes:
    """A request with a binary tensor, behind a line with the length of its JSON."""
    tensor = {"name": "x", "shape": shape, "datatype": datatype}
    value = {"inputs": [{**tensor, "parameters": {"binary_data_size": len(binary)}}]}
    text = canonical_json(value)
    return b"%d\n" % len(text) + text + binary


def _image_request(kind: str) -> bytes:
    """A request with an image file."""
    stream, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # turned
    Image.new("RGB", (12, 10), (200, 100, 0)).save(
        stream, kind, **({} if kind == "BMP" else {"exif": exif})
    )
    file = stream.getvalue()
    return _with_binary(len(file).to_bytes(4, "little") + file, [1], "BYTES")


def _answer(data: bytes) -> object:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return [_labels(name, found) for name in APIS]


class _Said:
    """An endpoint that says the same to everything."""

    address, asking = endpoint_address("http://host/v2/models/m"), Asking()

    def __init__(self, found: object) -> None:
        self.found = found

    def metadata(self) -> object:
        return self.found

    def exchange(self, *_arguments: object, **_sent: object) -> object:
        return self.found


def _labels(name: str, found: object) -> object:
    count = 2 if APIS[name].many else 1
    images = torch.zeros(count, 1, 8, 8, dtype=torch.uint8)
    try:
        return labels_of(APIS[name].ask(_Said(found), images), count, Names(["cat", "dog"]))
    except RefusalError:
        return None


def _token(data: bytes) -> object:
    return read_token(data, "00" * 32, "T")


def _row(data: bytes) -> object:
    return is_signed_alone("bb" * 32, "aa" * 32, data[:64], data)


def _opening(data: bytes) -> object:
    """What the service and a judge do with an opening, and with the headers of a request."""
    text = data.decode("latin-1")
    request_of({"Countermark-Opening": text, "Countermark-Number": text[:3]}, [])
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        return None
    opening = read_opening(record)
    return opening.digest, opening.log, opening.is_signed


def _log(path: Path) -> object:
    """Everything that a verb or the service does with a log that is there."""
    with QueryLog(str(path), create=False) as log:
        rows = list(log.rows())
        log.head()
        log.erased()
        log.erase("anna")
    return rows


def _roots(path: Path) -> object:
    """What a judge does with the roots: they are named, and a token is checked against them."""
    roots, head = load_roots(path), read_head(GOLDEN / "head.json")
    assert head.token is not None
    named = [root_name(root) for root in roots]
    return named, check_token(head.token, sha256(head.message()), roots, "T")


def _guard(folder: Path) -> object:
    """The settings of a guard, and the answers that it gives by them."""
    settings, (network, _) = read_guard(folder), load_model(folder)
    x = torch.linspace(0, 1, 128).reshape(2, 1, 8, 8)
    if settings.familiar is not None and settings.familiar.values != 64:
        raise CountermarkError("`load_guarded` refuses a guard for images of another shape")
    return GuardedModel(network, Guard(settings, bytes(32)))(x, "anna")


def _onnx(data: bytes) -> object:
    """The checks before a graph is run; data beside the file is looked for in an empty folder."""
    before, sys.argv = sys.argv, ["onnx_child", str(Path(_EMPTY.name) / "model.onnx")]
    try:
        return _ONNX._read(data)
    finally:
        sys.argv = before


_EMPTY = tempfile.TemporaryDirectory(prefix="fuzz-")


def kinds() -> dict[str, Kind]:
    """Every kind of input by name."""
    claim, mine, key = GOLDEN / "claim", GOLDEN / "mine", GOLDEN / "mine" / "key"
    places = {
        "claim.json": Place(claim, "claim.json", read_claim),
        "claim trials": Place(claim, "trials.safetensors", read_claim),
        "key.json": Place(key, "key.json", load_key),
        "key trials": Place(key, "trials.safetensors", load_key),
        "key secret": Place(key, "secret", load_key),
        "spent.json": Place(key, "spent.json", lambda folder: _spent(folder / "spent.json")),
        "model.json": Place(claim / "model", "model.json", load_model),
        "weights": Place(
            claim / "model",
            "model.safetensors",
            lambda path: read_tensors(path, 1 << 20),
            "model.safetensors",
        ),
        "guard.json": Place(mine, "guard.json", _guard),
        "clients.json": Place(mine, "clients.json", Clients, "clients.json"),
        "head.json": Place(GOLDEN, "head.json", read_head, "head.json"),
        "roots": Place(GOLDEN, "roots.pem", _roots, "roots.pem"),
    }
    found = {name: Kind(place.example, place, spoil) for name, place in places.items()}
    replay = (
        b'{"url": "http://a", "x": 1}\n'
        b'{"url": "http://a", "image": "00", "label": 3, "repeats": 1}\n'
    )
    replay_place = Place(
        GOLDEN, "roots.pem", lambda path: read_replay(path, "http://a"), "roots.pem"
    )
    token = decode_token(json.loads((GOLDEN / "head.json").read_text())["token"], "T") or b""
    request = {
        "inputs": [{"name": "x", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": [0.5] * 64}]
    }
    answer = {
        "outputs": [{"name": "y", "shape": [2], "datatype": "INT64", "data": [1, 2]}],
        "predictions": [1, 2],
    }
    idx = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (2, 3, 3)) + bytes(18)
    log = Place(GOLDEN, "log.db", _log, "log.db")
    digests = ("model", "network", "classes", "guard", "cells", "coins")
    terms = {f"{name}_sha256": "a" * 64 for name in digests}
    terms |= {"log": "b" * 32, "account": "anna", "owner": "c" * 64}
    opening = json.dumps(open_requests(bytes(32), terms).record()).encode()
    messages: dict[str, tuple[bytes, Parser]] = {
        "replay": (replay, replay_place),
        "timestamp": (token, _token),
        "base64": (b"YWJj", lambda data: decode_token(data.decode("latin-1"), "T")),
        "request": (json.dumps(request).encode(), _request),
        "answer": (json.dumps(answer).encode(), _answer),
        "signed request": (bytes(64) + bytes(4) + bytes(32), _row),
        "opening": (opening, _opening),
        "idx": (idx, lambda data: parse_idx(data, 3, "x")),
    }
    found |= {name: Kind(example, parse, spoil) for name, (example, parse) in messages.items()}
    binary = {"binary": _with_binary(2 * bytes([*range(56), *range(8)]), [1, 1, 8, 8], "FP16")}
    binary |= {kind: _image_request(kind) for kind in ("PNG", "JPEG", "WEBP", "BMP")}
    found |= {f"{n} request": Kind(body, _request, _spoil_binary) for n, body in binary.items()}
    crafted = {
        "crafted roots": Kind(found["roots"].example, found["roots"].parse, craft_roots),
        "crafted request": Kind(found["request"].example, _request, craft_body),
        "crafted opening": Kind(opening, _opening, craft_body),
        "crafted answer": Kind(found["answer"].example, _answer, craft_body),
        "crafted replay": Kind(replay, replay_place, craft_replay),
        "crafted weights": Kind(found["weights"].example, found["weights"].parse, craft_tensors),
        "crafted trials": Kind(
            found["key trials"].example, found["key trials"].parse, craft_tensors
        ),
        "onnx": Kind(onnx_example(), _onnx, spoil),
        "crafted onnx": Kind(onnx_example(), _onnx, craft_onnx),
        "log": Kind(log.example, log, spoil, alone=True),
        "crafted log": Kind(log.example, log, craft_log, alone=True),
    }
    return found | crafted


def log_place() -> Place:
    """The query log, to be read in this process."""

    def rows(path: Path) -> object:
        with QueryLog(str(path), create=False) as log:
            return list(log.rows())

    return Place(GOLDEN, "log.db", rows, "log.db")


def spoil(data: bytes, rng: random.Random) -> bytes:
    """Change the bytes of an input or, if it is a JSON object, values in it.

    A changed object is written as canonical JSON again, so that parsers read on beyond the syntax.
    """
    if data[:1] == b"{" and rng.random() < 0.7:
        try:
            value = json.loads(data)
        except ValueError:
            value = None
        if isinstance(value, dict):
            for _ in range(rng.randint(1, 3)):
                _spoil_value(value, rng)
            try:
                return canonical_json(value)
            except (ValueError, RecursionError):
                return data
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        place = (
            rng.randrange(len(changed) + 1)
            if rng.random() < 0.7
            else rng.randrange(min(len(changed), 64) + 1)
        )
        kind = rng.randrange(5)
        if kind == 0 and place < len(changed):
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[place : place + rng.choice([1, 2, 8, 1 << 12])]
        elif kind == 2:
            changed[place:place] = rng.choice(
                [b"\0", b"\xff" * 8, b"{" * 64, b"[", b'"', rng.randbytes(rng.randrange(1, 32))]
            )
        elif kind == 3:
            source = rng.randrange(len(changed) + 1)
            changed[place:place] = changed[source : source + rng.randrange(1, 64)]
        else:
            changed[place : place + 8] = rng.choice([0, 1, 2**31, 2**63 - 1, 2**64 - 1]).to_bytes(
                8, rng.choice(["little", "big"])
            )  # type: ignore[arg-type]
    return bytes(changed[:_MOST_BYTES])


def _spoil_binary(data: bytes, rng: random.Random) -> bytes:
    """Change the JSON of a request or the bytes behind it; mostly the lengths fit afterwards."""
    try:
        length, _, body = data.partition(b"\n")
        text, binary = body[: int(length)], body[int(length) :]
        kind = rng.randrange(4)
        if kind == 0:
            text = rng.choice([spoil, craft_body])(text, rng)
        elif kind == 1:
            binary = spoil(binary, rng)
        else:
            file = spoil(binary[4:], rng)
            binary = len(file).to_bytes(4, "little") + file
        if rng.random() < 0.8:
            value = json.loads(text)
            value["inputs"][0]["parameters"]["binary_data_size"] = len(binary)
            text = canonical_json(value)
        return b"%d\n" % len(text) + text + binary
    except (ValueError, LookupError, TypeError, RecursionError):  # spoiled too much before
        return spoil(data, rng)


def _spoil_value(value: Any, rng: random.Random) -> None:
    """Change one value somewhere in a tree of dictionaries and lists."""
    place = value
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return
        name = rng.choice(keys)
        if isinstance(place[name], dict | list) and rng.random() < 0.8:
            place = place[name]
            continue
        break
    kind = rng.randrange(8)
    if kind == 0:
        del place[name]
    elif kind == 1 and isinstance(place, dict):
        place[rng.choice(["x", "", "format", "n\0", "é"])] = place[name]
    elif kind == 2 and isinstance(place, list):
        place.insert(0, place[name])
    else:
        odd: list[Any] = [
            None,
            True,
            0,
            -1,
            1.5,
            1e308,
            2**31,
            2**63,
            2**64,
            -(2**70),
            "",
            "x" * 300,
            "00" * 32,
            "ff" * 64,
            [],
            {},
            [[]],
        ]
        odd += [{"a": {}}, [1, 2, 3], "é", "\0", "YWJj", [-1] * 40, list(range(64)), 10**400]
        place[name] = rng.choice(odd)


def attempt(kind: Kind, data: bytes, *, alone: bool | None = None) -> bool:
    """Parse; whether it was accepted.

    Args:
        kind: of input.
        data: the input.
        alone: whether in a process of its own; default as the kind says.

    Raises:
        AssertionError: something escaped that is no refusal, or it took too much.
    """
    accepted, fault = (
        _alone(kind, data) if (kind.alone if alone is None else alone) else _parsed(kind, data)
    )
    assert fault is None, f"{fault} for {len(data)} bytes {data[:300]!r}"
    return accepted


def _parsed(kind: Kind, data: bytes) -> tuple[bool, str | None]:
    """Whether it was accepted, and what is wrong with how it was parsed."""
    with _limited_memory() as taken:
        try:
            with torch.no_grad():
                kind.parse(data)
            accepted, fault = True, None
        except REFUSALS:
            accepted, fault = False, None
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic in Rust is none of Exception's
            accepted, fault = False, f"{type(error).__name__}: {str(error)[:300]}"
    if fault is None and taken() > _MOST_MEMORY:
        fault = f"{taken() >> 20} MiB of memory"
    return accepted, fault


def _alone(kind: Kind, data: bytes) -> tuple[bool, str | None]:
    """The same in a child process, which is stopped when its time is over."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        faulthandler.disable()  # a crash is told by the status
        for number in _STOPPED:
            signal.signal(number, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, _MOST_SECONDS)
        signal.alarm(10 * _MOST_SECONDS)  # one that waits, or a machine with much to do
        with contextlib.suppress(BaseException):
            os.write(writing, json.dumps(_parsed(kind, data)).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        said = stream.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if said:
        accepted, fault = json.loads(said)
        return accepted, fault
    return (
        False,
        f"more than {_MOST_SECONDS} seconds" if -status in _STOPPED else f"a crash ({status})",
    )


@contextlib.contextmanager
def _limited_memory() -> Iterator[Callable[[], int]]:
    """Limit the address space to `_MOST_ADDRESSES` bytes more than are in use.

    Yields a function that returns by how many bytes the peak of used memory has risen.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _MOST_ADDRESSES, hard))
    try:
        with rising() as risen:
            yield risen
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
