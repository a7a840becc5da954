"""A claim as a folder (see docs/format.md).

It holds the commitments, the suspect's answers, one opened batch, and the owner's model. Reading a
claim checks only the form of its files; `judgement` decides whether it is true.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from countermark.data import Examples
from countermark.errors import CountermarkError
from countermark.files import (
    canonical_json,
    read_bytes,
    read_json,
    read_tensors,
    sha256,
    write_bytes,
    write_json,
    write_tensors,
)
from countermark.networks import NETWORKS, describe, load_model
from countermark.places import Network, endpoint_address, is_address
from countermark.registry import is_registration
from countermark.suspects import onnx_data
from countermark.text import brief
from countermark.timestamps import decode_token, encode_token
from countermark.watermarks import (
    CLEAN,
    WatermarkSet,
    leaf_hash,
    leaf_secrets,
    leaves,
    merkle_paths,
    path_length,
    read_clean,
    root_of_path,
)

CLAIM_FORMAT = "countermark claim 1"
REGISTERED_FORMAT = "countermark claim 2"
"""Of claims whose C1 is registered: earlier releases would take T1 for a false timestamp."""
ANSWERS_FORMAT = "countermark answers 1"
MOST_LEAVES = 1 << 20
"""Trials in a key that a judge follows."""

_TRIALS_LIMIT = 1 << 28
_MODEL_LIMIT = 1 << 34
_MOST_TOGETHER = 1 << 14  # trials in a batch
_CHUNK = 1 << 20
_DIGEST = 32


@dataclass(frozen=True)
class Opened:
    """Trials shown with what binds each of them to the commitment.

    Attributes:
        index: int64 `(n,)`, number of each leaf.
        batch: int64 `(n,)`.
        cell: int64 `(n,)`.
        x: uint8 images `(n, c, h, w)`.
        answers: int64 `(n, 2)`, heads and tails.
        secrets: uint8 `(n, 32)`, the leaf secrets.
        paths: uint8 `(n, d, 32)`, neighbours from the leaf up; 0 beyond a leaf's own depth.
    """

    index: torch.Tensor
    batch: torch.Tensor
    cell: torch.Tensor
    x: torch.Tensor
    answers: torch.Tensor
    secrets: torch.Tensor
    paths: torch.Tensor

    def __len__(self) -> int:
        return len(self.index)

    def roots(self, count: int) -> list[str]:
        """The Merkle root that each trial leads to in a tree of `count` leaves, in hexadecimal.

        It is empty where the trial cannot be such a leaf: a path of another length, a leaf number
        outside the tree, or a negative batch, cell or answer.
        """
        found = []
        # Rows of arrays become bytes faster than rows of tensors.
        images, secrets, paths = (part.numpy() for part in (self.x, self.secrets, self.paths))
        numbers = zip(
            self.index.tolist(),
            self.batch.tolist(),
            self.cell.tolist(),
            self.answers.tolist(),
            strict=True,
        )
        for row, (index, batch, cell, answers) in enumerate(numbers):
            if not 0 <= index < count or min(batch, cell, *answers) < 0:
                found.append("")
                continue
            leaf = leaf_hash(
                index, batch, cell, images[row].tobytes(), answers, secrets[row].tobytes()
            )
            depth = path_length(index, count)
            path = [neighbour.tobytes() for neighbour in paths[row][:depth]]
            root = root_of_path(leaf, index, count, path) if not paths[row][depth:].any() else None
            found.append("" if root is None else root.hex())
        return found


_TENSORS = {
    "index": (torch.int64, 1),
    "batch": (torch.int64, 1),
    "cell": (torch.int64, 1),
    "x": (torch.uint8, 4),
    "answers": (torch.int64, 2),
    "secrets": (torch.uint8, 2),
    "paths": (torch.uint8, 3),
}


_OBJECTS = ("c1", "c2", "answers", "found")
_SIGNATURES = ("c1_signature", "c2_signature", "answers_signature")
_TOKENS = ("t1", "t2", "answers_token")


@dataclass(frozen=True)
class Claim:
    """A claim as it was read.

    Attributes:
        c1: first commitment, with its signature and token.
        c1_signature: hexadecimal.
        t1: the authority's response over C1; none for a private mark.
        c2: second commitment.
        c2_signature: hexadecimal.
        t2: the response over C2.
        answers: what the suspect answered, how it was asked, and which batch this is.
        answers_signature: hexadecimal.
        answers_token: the response over `answers`.
        found: the owner's own figures, for the reader's convenience; a judge does not use them.
        opened: the batch.
        model: folder of the owner's model.
        clean: the key's clean examples, which C1 names, where the suspect was asked with `--match`.
    """

    c1: Mapping[str, Any]
    c1_signature: str
    t1: bytes | None
    c2: Mapping[str, Any]
    c2_signature: str
    t2: bytes | None
    answers: Mapping[str, Any]
    answers_signature: str
    answers_token: bytes | None
    found: Mapping[str, Any]
    opened: Opened
    model: Path
    clean: Examples | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Class names that were fixed before the coins, in the order of the labels."""
        return tuple(self.c1.get("class_names", ()))

    def network(
        self, network: Network | None = None, option: str = "--owner-network"
    ) -> tuple[nn.Module, str]:
        """The owner's model and the SHA-256 of its weights.

        Args:
            network: what builds its network, unless it is a built-in one.
            option: what messages call that.

        Raises:
            CountermarkError: it cannot be read, takes other images than the claim's, or is built by
                code that was not named.
        """
        return owners_network(self.model, tuple(self.opened.x.shape[1:]), network, option)


def owners_network(
    model: Path, shape: tuple[int, ...], network: Network | None, option: str
) -> tuple[nn.Module, str]:
    """Load a claim's model, and compute the SHA-256 of its weights; see `Claim.network`."""
    description = describe(model)
    if description.shape != shape:
        raise CountermarkError(
            f"{model} takes images of shape {brief(description.shape)}, "
            "the claim asks with others; it is another model"
        )
    held = f"{model} holds the network {brief(description.network) or 'of a program'}"
    if network is None and description.network not in NETWORKS:
        raise CountermarkError(
            f"{held}, whose code is imported only if you name it: {option} MODULE:FUNCTION"
        )
    if network is not None and description.network in NETWORKS:
        raise CountermarkError(f"{held}, which is a built-in one; leave {option} out")
    built, _ = load_model(model, network)
    return built, suspect_identity(model)["sha256"]


def suspect_identity(place: str | Path) -> dict[str, str]:
    """What a suspect is to a claim: the address of an endpoint, or a SHA-256.

    A query string may say which of several models is asked, and may hold a secret, so its SHA-256
    stands for it. For a model folder it is that of the weights, for any other model that of its
    file. For an ONNX model with data in files beside it, it is that of the canonical JSON
    `{"data": {place: SHA-256}, "model": SHA-256}`, so that it covers every file.

    Raises:
        CountermarkError: no file, or an address that cannot be asked or holds a password.
    """
    if is_address(place):
        address = endpoint_address(str(place))
        query = {"query_sha256": address.query_sha256} if address.query_sha256 else {}
        return {"kind": "endpoint", "url": address.name, **query}
    path = Path(place) / "model.safetensors" if Path(place).is_dir() else Path(place)
    digest = hashlib.sha256()
    try:
        if not path.is_file() or path.stat().st_size > _MODEL_LIMIT:
            raise CountermarkError(
                f"{path} is no file of a model; name a model folder, a model's file or an address"
            )
        with path.open("rb") as stream:
            while part := stream.read(_CHUNK):
                digest.update(part)
    except OSError as error:
        raise CountermarkError(
            f"cannot read {path}: {error.strerror}; "
            "name a model folder, a model's file or an address"
        ) from error
    named = digest.hexdigest()
    if path.suffix.lower() == ".onnx" and (data := onnx_data(path)):
        named = sha256(canonical_json({"data": data, "model": named}))
    return {"kind": "file", "sha256": named}


def open_batch(watermarks: WatermarkSet, secret: bytes, batch: int) -> Opened:
    """Open one batch of a key: its trials, their secrets, and their paths to the committed root."""
    chosen = torch.nonzero(watermarks.batch == batch).flatten()
    secrets = leaf_secrets(secret, len(watermarks))
    every = merkle_paths(leaves(watermarks, secret))
    paths = [every[i] for i in chosen.tolist()]
    deepest = max(map(len, paths))
    padded = [b"".join(path).ljust(deepest * _DIGEST, b"\0") for path in paths]
    return Opened(
        index=chosen,
        batch=watermarks.batch[chosen],
        cell=watermarks.cell[chosen],
        x=watermarks.x[chosen],
        answers=watermarks.answers[chosen],
        secrets=_tensor(b"".join(secrets[i] for i in chosen.tolist())).view(-1, _DIGEST),
        paths=_tensor(b"".join(padded)).view(len(chosen), deepest, _DIGEST),
    )


def copy_model(model: Path, target: Path, *more: str) -> None:
    """Copy what a judge needs of a model folder, and more of its files, into a folder."""
    target.mkdir(exist_ok=True)
    for name in ("model.safetensors", "model.json", *more):
        write_bytes(target / name, read_bytes(model / name, _MODEL_LIMIT))


def write_claim(folder: Path, claim: Claim) -> None:
    """Write a claim into the existing folder `folder`, with a copy of the owner's model."""
    copy_model(claim.model, folder / "model")
    write_tensors(
        folder / "trials.safetensors", {name: getattr(claim.opened, name) for name in _TENSORS}
    )
    if claim.clean is not None:
        write_tensors(folder / CLEAN, {"x": claim.clean.x, "y": claim.clean.y})
    record: dict[str, Any] = {name: dict(getattr(claim, name)) for name in _OBJECTS}
    record |= {name: getattr(claim, name) for name in _SIGNATURES}
    record |= {name: encode_token(getattr(claim, name)) for name in _TOKENS}
    write_json(folder / "claim.json", {"format": _format_of(claim.t1), **record})


def _format_of(t1: bytes | None) -> str:
    return REGISTERED_FORMAT if is_registration(t1) else CLAIM_FORMAT


def read_claim(folder: Path) -> Claim:
    """Read a claim that may come from anybody.

    Raises:
        CountermarkError: a file is missing, too large, or of another form.
    """
    if not folder.is_dir():
        raise CountermarkError(f"{folder} is not a claim; name the folder that holds claim.json")
    path = folder / "claim.json"
    record = read_json(path)
    if record.get("format") not in (CLAIM_FORMAT, REGISTERED_FORMAT):
        raise CountermarkError(
            f"{path} is not a claim of the format {CLAIM_FORMAT!r}; use the release that wrote it"
        )
    if record.keys() != {"format", *_OBJECTS, *_SIGNATURES, *_TOKENS}:
        raise CountermarkError(
            f"{path} has other fields than a claim; it is damaged or not a file of Countermark"
        )
    kinds = {**dict.fromkeys(_OBJECTS, dict), **dict.fromkeys(_SIGNATURES, str)}
    if not all(isinstance(record[name], kind) for name, kind in kinds.items()):
        raise CountermarkError(
            f"{path} has fields of other kinds than a claim; "
            "it is damaged or not a file of Countermark"
        )
    _check_commitments(record["c1"], record["c2"], record["answers"], path)
    tokens: dict[str, Any] = {
        name: decode_token(record[name], f"{path}: {name}") for name in _TOKENS
    }
    c1 = record["c1"]
    opened = _read_opened(folder / "trials.safetensors", c1["shape"])
    clean = None
    if (folder / CLEAN).exists():
        clean = read_clean(folder / CLEAN, str(c1.get("clean_sha256")), tuple(c1["shape"]))
    return Claim(
        **{name: record[name] for name in kinds},
        **tokens,
        opened=opened,
        model=folder / "model",
        clean=clean,
    )


def _check_commitments(
    c1: Mapping[str, Any], c2: Mapping[str, Any], answers: Mapping[str, Any], path: Path
) -> None:
    """Refuse records with fields that are missing or of another kind.

    Whether what they say is true is not judged here.
    """
    shape, labels = c1.get("shape"), answers.get("labels")
    count, batches = c1.get("leaves"), c1.get("batches")
    whole = (
        type(count) is int
        and type(batches) is int
        and 1 <= batches <= count <= MOST_LEAVES
        and count // batches <= _MOST_TOGETHER
    )
    fits = (
        (c1.get("format"), c2.get("format"), answers.get("format"))
        == ("countermark c1 1", "countermark c2 1", ANSWERS_FORMAT)
        and is_hex(c1.get("public_key"))
        and is_hex(c1.get("root"))
        and whole
        and isinstance(shape, list)
        and len(shape) == 3
        and all(type(side) is int and side > 0 for side in shape)
        and isinstance(c1.get("class_names", []), list)
        and all(isinstance(name, str) for name in c1.get("class_names", []))
        and is_hex(c2.get("c1_sha256"))
        and is_hex(c2.get("model_sha256"))
        and is_hex(answers.get("c2_sha256"))
        and type(answers.get("batch")) is int
        and isinstance(answers.get("suspect"), dict)
        and isinstance(labels, list)
        and all(type(label) is int and abs(label) < 1 << 31 for label in labels)
    )
    if not fits:
        raise CountermarkError(
            f"{path} lacks what a claim says, or says it in another form; "
            "it is damaged or not a file of Countermark"
        )


def is_hex(text: object, count: int = _DIGEST) -> bool:
    """Tell whether a text is some bytes in lower-case hexadecimal."""
    return (
        isinstance(text, str) and len(text) == 2 * count and not set(text) - set("0123456789abcdef")
    )


def _read_opened(path: Path, shape: list[int]) -> Opened:
    def check(tensors: Mapping[str, torch.Tensor]) -> None:
        fits = tensors.keys() == _TENSORS.keys() and all(
            (tensors[n].dtype, tensors[n].dim()) == kind for n, kind in _TENSORS.items()
        )
        if fits:
            fits = (
                len({len(tensor) for tensor in tensors.values()}) == 1
                and 0 < len(tensors["index"]) <= MOST_LEAVES
            )
            widths = (
                tensors["answers"].shape[1],
                tensors["secrets"].shape[1],
                tensors["paths"].shape[2],
            )
            fits = fits and widths == (2, _DIGEST, _DIGEST)
        if not fits:
            raise CountermarkError(
                f"{path} does not hold the opened trials of a claim; "
                "it is damaged or not a file of Countermark"
            )
        if list(tensors["x"].shape[1:]) != shape:
            raise CountermarkError(
                f"{path} holds images of another shape than was committed to; it is damaged"
            )

    return Opened(**read_tensors(path, _TRIALS_LIMIT, check)[0])


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
