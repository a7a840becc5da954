"""Commitments, and coins drawn from randomness that did not exist when the inputs were fixed.

Each trial is a leaf with a secret of its own. A Merkle tree binds the leaves to one root; C1 holds
the root and is signed. The coins are hashed from C1, the authority's signature on its timestamp T1,
and the leaf secrets (docs/format.md gives every byte). Without a timestamp, owners could draw coins
until they like them, so such a mark is "private": good for its owner, undecidable for a judge.
"""

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from countermark.errors import CountermarkError
from countermark.files import canonical_json, sha256
from countermark.watermarks.schemes import SCHEMES
from countermark.watermarks.sets import WatermarkSet

LEAF_FORMAT = b"countermark leaf 1"
C1_FORMAT = "countermark c1 1"
C2_FORMAT = "countermark c2 1"
C3_FORMAT = "countermark c3 1"
SECRET_BYTES = 32

_LEAF, _NODE, _COIN = b"\x00", b"\x01", b"\x02"


def leaf_secret(secret: bytes, index: int) -> bytes:
    """s_i = HMAC-SHA-256(secret, i)."""
    return hmac.digest(secret, index.to_bytes(8, "big"), "sha256")


def leaf_secrets(secret: bytes, count: int) -> list[bytes]:
    """s_0 to s_(count - 1)."""
    return [leaf_secret(secret, i) for i in range(count)]


def secret_key(secret: bytes, purpose: str) -> bytes:
    """32 bytes that only the owner knows, for one purpose.

    They are an HMAC-SHA-256 whose key is the secret, and whose message is `countermark seed:
    PURPOSE`. The messages are no 8-byte numbers, so the leaf secrets of the coins stay independent
    of them.
    """
    return hmac.digest(secret, f"countermark seed: {purpose}".encode(), "sha256")


def secret_seed(secret: bytes, purpose: str) -> int:
    """A seed that only the owner knows: the first 32 bits of `secret_key`.

    These seeds are used for what the trials are made from (the source model, the crafting). So few
    bits can be tried one by one: what whoever sees some trials could test a guess on takes the
    whole key.
    """
    return int.from_bytes(secret_key(secret, purpose)[:4], "big")


def leaf_hash(
    index: int, batch: int, cell: int, x: bytes, answers: Sequence[int], leaf_secret: bytes
) -> bytes:
    """leaf_i, 32 bytes: everything that is fixed about one trial, hidden behind its secret."""
    numbers = (index, batch, cell, len(x))
    framed = [number.to_bytes(8, "big") for number in numbers]
    framed += [
        x,
        len(answers).to_bytes(8, "big"),
        *(answer.to_bytes(8, "big") for answer in answers),
        leaf_secret,
    ]
    return hashlib.sha256(_LEAF + LEAF_FORMAT + b"".join(framed)).digest()


def leaves(watermarks: WatermarkSet, secret: bytes) -> list[bytes]:
    """The leaf of every trial, 32 bytes each, in order."""
    return [
        leaf_hash(
            i,
            int(watermarks.batch[i]),
            int(watermarks.cell[i]),
            watermarks.x[i].contiguous().numpy().tobytes(),
            watermarks.answers[i].tolist(),
            leaf_secret(secret, i),
        )
        for i in range(len(watermarks))
    ]


def merkle_root(nodes: Sequence[bytes]) -> bytes:
    """Root of the Merkle tree of RFC 6962 over the leaf hashes.

    It is split at the largest power of two below their number.
    """
    return _tree(nodes)[0]


def merkle_paths(nodes: Sequence[bytes]) -> list[list[bytes]]:
    """What leads from each leaf hash to the root: its neighbours, the nearest first."""
    return _tree(nodes)[1]


def root_of_path(leaf: bytes, index: int, count: int, path: Sequence[bytes]) -> bytes | None:
    """The root that a leaf leads to by its path, in a tree of `count` leaves.

    None if the path does not have the length that belongs to the leaf's place.
    """
    turns = _turns(index, count)
    if len(turns) != len(path):
        return None
    for left, neighbour in zip(reversed(turns), path, strict=True):
        leaf = _node(leaf, neighbour) if left else _node(neighbour, leaf)
    return leaf


def path_length(index: int, count: int) -> int:
    """How many neighbours lie on the path of a leaf in a tree of `count` leaves."""
    return len(_turns(index, count))


def _turns(index: int, count: int) -> list[bool]:
    """From the root down to a leaf: does it lie on the left?"""
    turns = []
    while count > 1:
        split = _split(count)
        turns.append(index < split)
        index, count = (index, split) if index < split else (index - split, count - split)
    return turns


def batch_of(index: int, leaves: int, batches: int) -> int:
    """The batch of a leaf.

    Batches are of one size and in order, so that a missing leaf cannot be hidden.
    """
    return index // (leaves // batches)


def draw_coins(
    c1: bytes, beacon: bytes, leaf_secrets: Sequence[bytes], indices: Sequence[int] | None = None
) -> torch.Tensor:
    """Draw the coin of each leaf from C1, the beacon of its timestamp T1, and the leaf secret.

    coin_i is the lowest bit of SHA-256(2 | SHA-256(C1) | SHA-256(beacon of T1, or nothing) | i |
    s_i). The number i of the leaf is included because nobody can tell how owners chose their leaf
    secrets: if the coins depended on the secrets alone, and those were all the same, all trials
    would share one coin.

    Args:
        c1: the first commitment, canonical JSON.
        beacon: the beacon of its token; empty for a private mark.
        leaf_secrets: s_i of each leaf.
        indices: number i of each leaf; from 0 by default.

    Returns:
        int64 `(n,)`; 0 is heads, 1 is tails.
    """
    seed = _COIN + hashlib.sha256(c1).digest() + hashlib.sha256(beacon).digest()
    numbered = zip(
        range(len(leaf_secrets)) if indices is None else indices, leaf_secrets, strict=True
    )
    return torch.tensor(
        [
            hashlib.sha256(seed + i.to_bytes(8, "big") + secret).digest()[-1] & 1
            for i, secret in numbered
        ]
    )


def _tree(nodes: Sequence[bytes]) -> tuple[bytes, list[list[bytes]]]:
    """The root over some nodes, and the path of each to it."""
    if len(nodes) == 1:
        return nodes[0], [[]]
    split = _split(len(nodes))
    (left, left_paths), (right, right_paths) = _tree(nodes[:split]), _tree(nodes[split:])
    return _node(left, right), [[*path, right] for path in left_paths] + [
        [*path, left] for path in right_paths
    ]


def _split(count: int) -> int:
    return 1 << (count - 1).bit_length() - 1


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(_NODE + left + right).digest()


def first_commitment(
    watermarks: WatermarkSet,
    secret: bytes,
    public_key: str,
    scheme: str,
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """C1: everything that is fixed before the coins are drawn."""
    return {
        "format": C1_FORMAT,
        "public_key": public_key,
        "root": merkle_root(leaves(watermarks, secret)).hex(),
        "leaves": len(watermarks),
        "batches": int(watermarks.batch.max()) + 1,
        "shape": list(watermarks.x.shape[1:]),
        "scheme": scheme,
        "statistic": SCHEMES[scheme].statistic,
        "cell_weight": 1,
        **provenance,
    }


def second_commitment(c1: Mapping[str, Any], t1: bytes | None, model_digest: str) -> dict[str, Any]:
    """C2: the first commitment and its token tied to the finished model."""
    return {
        "format": C2_FORMAT,
        "c1_sha256": sha256(canonical_json(c1)),
        "t1_sha256": None if t1 is None else sha256(t1),
        "model_sha256": model_digest,
    }


def third_commitment(c2: Mapping[str, Any], guard_digest: str) -> dict[str, Any]:
    """C3: the configuration of a guard tied to the model in front of which it stands."""
    return {
        "format": C3_FORMAT,
        "c2_sha256": sha256(canonical_json(c2)),
        "guard_sha256": guard_digest,
    }


def public_key(signing_key: bytes) -> str:
    """The Ed25519 public key of a 32-byte private key, in hexadecimal."""
    return Ed25519PrivateKey.from_private_bytes(signing_key).public_key().public_bytes_raw().hex()


def sign(signing_key: bytes, value: Any) -> str:
    """Ed25519 signature over the canonical JSON of `value`, in hexadecimal."""
    return Ed25519PrivateKey.from_private_bytes(signing_key).sign(canonical_json(value)).hex()


def check_signature(public: str, value: Any, signature: str, origin: str) -> None:
    """Check a signature that `sign` made.

    Raises:
        CountermarkError: it is not that of `value` under this public key.
    """
    try:
        if signature != signature.lower():
            raise ValueError("a second spelling of the same signature")
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(
            bytes.fromhex(signature), canonical_json(value)
        )
    except (InvalidSignature, ValueError, TypeError) as error:
        raise CountermarkError(
            f"{origin}: the signature does not fit the content, which was changed; "
            "restore it from a backup"
        ) from error
