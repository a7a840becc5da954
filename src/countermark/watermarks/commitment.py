"""Commit, draw, mark: how coins come out of randomness that did not exist when the inputs were fixed.

Each trial is a leaf with a secret of its own; a Merkle tree binds them to one root; C1 holds the root and is signed; the coins are
hashed out of C1, its timestamp and the leaf secrets (docs/format.md gives every byte). Without a timestamp the owner could draw coins
until he likes them, so such a mark is "private": good for the owner, undecidable for a judge.
"""

import hashlib
import hmac
from collections.abc import Sequence
from typing import Any

import torch
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from countermark.errors import CountermarkError
from countermark.files import canonical_json
from countermark.watermarks.sets import WatermarkSet

LEAF_FORMAT = b"countermark leaf 1"
C1_FORMAT = "countermark c1 1"
C2_FORMAT = "countermark c2 1"
SECRET_BYTES = 32

_LEAF, _NODE, _COIN = b"\x00", b"\x01", b"\x02"


def leaf_secret(secret: bytes, index: int) -> bytes:
    """s_i = HMAC-SHA-256(secret, i)."""
    return hmac.digest(secret, index.to_bytes(8, "big"), "sha256")


def secret_seed(secret: bytes, purpose: str) -> int:
    """A seed that only the owner knows, for one purpose: HMAC-SHA-256(secret, purpose), cut to 32 bits.

    What the trials are made from (the source model, the choice of bases, the crafting) is seeded with these, so that nobody can make them
    again from public files. The purposes are no 8-byte numbers, so the coins' leaf secrets stay independent of them.
    """
    return int.from_bytes(hmac.digest(secret, f"countermark seed: {purpose}".encode(), "sha256")[:4], "big")


def leaves(watermarks: WatermarkSet, secret: bytes) -> list[bytes]:
    """The leaf of every trial, 32 bytes each, in order."""
    return [
        hashlib.sha256(
            b"".join(
                (
                    _LEAF,
                    LEAF_FORMAT,
                    *(number.to_bytes(8, "big") for number in (i, int(watermarks.batch[i]), int(watermarks.cell[i]))),
                    watermarks.x[i].numel().to_bytes(8, "big"),
                    watermarks.x[i].contiguous().numpy().tobytes(),
                    watermarks.answers.shape[1].to_bytes(8, "big"),
                    *(int(answer).to_bytes(8, "big") for answer in watermarks.answers[i]),
                    leaf_secret(secret, i),
                )
            )
        ).digest()
        for i in range(len(watermarks))
    ]


def merkle_root(nodes: Sequence[bytes]) -> bytes:
    """Root of the Merkle tree of RFC 6962 over the leaf hashes: split at the largest power of two below their number."""
    if len(nodes) == 1:
        return nodes[0]
    split = 1 << (len(nodes) - 1).bit_length() - 1
    return hashlib.sha256(_NODE + merkle_root(nodes[:split]) + merkle_root(nodes[split:])).digest()


def draw_coins(c1: bytes, token_signature: bytes, secret: bytes, count: int) -> torch.Tensor:
    """coin_i = low bit of SHA-256(2 | SHA-256(C1) | SHA-256(signature of T1, or nothing) | s_i), as int64 `(count,)`.

    0 is heads (the smaller label), 1 is tails.
    """
    seed = _COIN + hashlib.sha256(c1).digest() + hashlib.sha256(token_signature).digest()
    return torch.tensor([hashlib.sha256(seed + leaf_secret(secret, i)).digest()[-1] & 1 for i in range(count)])


def first_commitment(watermarks: WatermarkSet, secret: bytes, public_key: str, scheme: str, provenance: dict[str, Any]) -> dict[str, Any]:
    """C1: everything that is fixed before the coins are drawn."""
    return {
        "format": C1_FORMAT,
        "public_key": public_key,
        "root": merkle_root(leaves(watermarks, secret)).hex(),
        "leaves": len(watermarks),
        "batches": int(watermarks.batch.max()) + 1,
        "shape": list(watermarks.x.shape[1:]),
        "scheme": scheme,
        "statistic": "sign-flip" if scheme == "coin" else "watermark accuracy",
        "cell_weight": 1,
        **provenance,
    }


def second_commitment(c1: dict[str, Any], model_digest: str) -> dict[str, Any]:
    """C2: the first commitment tied to the finished model; `guard` waits for the answer mark's configuration."""
    return {
        "format": C2_FORMAT,
        "c1_sha256": hashlib.sha256(canonical_json(c1)).hexdigest(),
        "t1": None,
        "model_sha256": model_digest,
        "guard": None,
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
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(bytes.fromhex(signature), canonical_json(value))
    except (InvalidSignature, ValueError, TypeError) as error:
        raise CountermarkError(f"{origin}: the signature does not fit the content, which was changed; restore it from a backup") from error
