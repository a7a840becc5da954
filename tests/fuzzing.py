"""Every parser of a file or message that may come from somebody else, with an honest example of its input; and ways to spoil examples.

A parser may refuse with a CountermarkError (the service: with its own refusal). Anything else that escapes is a fault.
"""

import json
import random
import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from countermark.bundle import load_bundle
from countermark.claims import read_claim
from countermark.data.idx import parse_idx
from countermark.errors import CountermarkError
from countermark.files import canonical_json, read_tensors
from countermark.guard import QueryLog, read_guard, read_head
from countermark.guard.log import Row
from countermark.guard.requests import is_signed
from countermark.service.clients import Clients
from countermark.service.http import RefusedError, parse_images
from countermark.suspects.asker import read_replay
from countermark.suspects.remote import _labels
from countermark.timestamps import decode_token, load_roots, read_token
from countermark.verbs.claim import _spent
from countermark.watermarks import load_key

GOLDEN = Path(__file__).parent / "golden" / "0.1.0"
Parser = Callable[[bytes], object]
REFUSALS = (CountermarkError, RefusedError)
_MOST_BYTES = 1 << 18


class Place:
    """A folder like an honest one, of which one file is replaced by the input."""

    def __init__(self, folder: Path, name: str, read: Callable[[Path], object], argument: str | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)) / "x"
        if folder.is_dir():
            for path in folder.rglob("*"):
                if path.is_file():
                    target = self.folder / path.relative_to(folder)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(path.read_bytes())
        self.file, self.read, self.argument = self.folder / name, read, self.folder if argument is None else self.folder / argument
        self.example = self.file.read_bytes()

    def __call__(self, data: bytes) -> object:
        self.file.write_bytes(data)
        return self.read(self.argument)


def _request(data: bytes) -> object:
    return parse_images(data, (1, 8, 8), 64)


def _answer(data: bytes) -> object:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return [_labels(found, 2, mlflow) for mlflow in (False, True)] if isinstance(found, dict) else None


def _token(data: bytes) -> object:
    return read_token(data, "00" * 32, "T")


def _row(data: bytes) -> object:
    return is_signed(Row("aa" * 32, "anna", b"c", data[:64], 1, 2, 3, 1, 4, data), "bb" * 32)


def _log(path: Path) -> object:
    with QueryLog(str(path), create=False) as log:
        return list(log.rows())


def parsers() -> dict[str, tuple[bytes, Parser]]:
    """Name, an honest input, and the parser."""
    claim, mine, key = GOLDEN / "claim", GOLDEN / "mine", GOLDEN / "mine" / "key"
    places = {
        "claim.json": Place(claim, "claim.json", read_claim),
        "claim trials": Place(claim, "trials.safetensors", read_claim),
        "key.json": Place(key, "key.json", load_key),
        "key trials": Place(key, "trials.safetensors", load_key),
        "key secret": Place(key, "secret", load_key),
        "spent.json": Place(key, "spent.json", _spent),
        "model.json": Place(claim / "model", "model.json", load_bundle),
        "weights": Place(claim / "model", "model.safetensors", lambda path: read_tensors(path, 1 << 20), "model.safetensors"),
        "guard.json": Place(mine, "guard.json", read_guard),
        "clients.json": Place(mine, "clients.json", Clients, "clients.json"),
        "head.json": Place(GOLDEN, "head.json", read_head, "head.json"),
        "roots": Place(GOLDEN, "roots.pem", load_roots, "roots.pem"),
    }
    found: dict[str, tuple[bytes, Parser]] = {name: (place.example, place) for name, place in places.items()}
    replay = b'{"url": "http://a", "x": 1}\n{"url": "http://a", "image": "00", "label": 3, "repeats": 1}\n'
    replay_place = Place(GOLDEN, "roots.pem", lambda path: read_replay(path, "http://a"), "roots.pem")
    token = decode_token(json.loads((GOLDEN / "head.json").read_text())["token"], "T") or b""
    request = {"inputs": [{"name": "x", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": [0.5] * 64}]}
    answer = {"outputs": [{"name": "y", "shape": [2], "datatype": "INT64", "data": [1, 2]}], "predictions": [1, 2]}
    idx = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (2, 3, 3)) + bytes(18)
    found |= {
        "replay": (replay, replay_place),
        "timestamp": (token, _token),
        "base64": (b"YWJj", lambda data: decode_token(data.decode("latin-1"), "T")),
        "request": (json.dumps(request).encode(), _request),
        "answer": (json.dumps(answer).encode(), _answer),
        "signed request": (bytes(64) + bytes(4) + bytes(32), _row),
        "idx": (idx, lambda data: parse_idx(data, 3, "x")),
    }
    return found


def log_place() -> Place:
    """The query log; slower than the others."""
    return Place(GOLDEN, "log.db", _log, "log.db")


def spoil_log(place: Place, rng: random.Random) -> None:
    """Change cells of the log's tables to values of any kind, as somebody could who can write the file."""
    place.file.write_bytes(place.example)
    with sqlite3.connect(place.file) as connection:
        connection.execute("pragma journal_mode=delete")
        columns = [row[1] for row in connection.execute("pragma table_info(trials)")]
        for _ in range(rng.randint(1, 3)):
            value = rng.choice([None, -1, 0, 2**62, 1.5, "x", "", b"", b"\0" * 32, b"x" * 300])
            try:
                connection.execute(
                    f"update trials set {rng.choice(columns)} = ? where number = ?",
                    (value, rng.randint(1, 5)),
                )
            except sqlite3.IntegrityError:
                continue
    connection.close()


def spoil(data: bytes, rng: random.Random) -> bytes:
    """Change an input: its bytes, or, where it is JSON, a value in it (written canonically again, so that it is read further)."""
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
        place = rng.randrange(len(changed) + 1) if rng.random() < 0.7 else rng.randrange(min(len(changed), 64) + 1)
        kind = rng.randrange(5)
        if kind == 0 and place < len(changed):
            changed[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[place : place + rng.choice([1, 2, 8, 1 << 12])]
        elif kind == 2:
            changed[place:place] = rng.choice([b"\0", b"\xff" * 8, b"{" * 64, b"[", b'"', rng.randbytes(rng.randrange(1, 32))])
        elif kind == 3:
            source = rng.randrange(len(changed) + 1)
            changed[place:place] = changed[source : source + rng.randrange(1, 64)]
        else:
            changed[place : place + 8] = rng.choice([0, 1, 2**31, 2**63 - 1, 2**64 - 1]).to_bytes(8, rng.choice(["little", "big"]))  # type: ignore[arg-type]
    return bytes(changed[:_MOST_BYTES])


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
        odd: list[Any] = [None, True, 0, -1, 1.5, 1e308, 2**31, 2**63, 2**64, -(2**70), "", "x" * 300, "00" * 32, "ff" * 64, [], {}, [[]]]
        odd += [{"a": {}}, [1, 2, 3], "é", "\0", "YWJj", [-1] * 40, list(range(64)), 10**400]
        place[name] = rng.choice(odd)


def attempt(parser: Parser, data: bytes) -> bool:
    """Parse; whether it was accepted."""
    try:
        with torch.no_grad():
            parser(data)
    except REFUSALS:
        return False
    return True
