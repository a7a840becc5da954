"""Requests that clients sign, so that nobody, not even the owner, can ask in a client's name.

The owner knows the coins: they could query their own service in anybody's name, train on the
answers and frame the account. If every query of the log is signed with a key that others tie to the
client, the owner cannot ask in their name; but the owner has the answers that the client was given,
and could train on those. A signature proves who asked, not who trained: that the copy was in the
client's hands must be known from elsewhere.
"""

import hashlib
from collections.abc import Sequence

import torch
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from countermark.guard.log import Row

SIGNATURE_HEADER = "Countermark-Signature"
"""Header of a request with its client's signature, in hexadecimal."""
_FORMAT = b"countermark request 1"
_SIGNATURE, _NUMBER, _HASH = 64, 4, 32


def sign_request(private_key: bytes, model_sha256: str, images: torch.Tensor) -> str:
    """Sign a client's request; the result is hexadecimal, for `SIGNATURE_HEADER`.

    Args:
        private_key: the client's Ed25519 key, 32 bytes.
        model_sha256: digest of the weights, from the service's metadata.
        images: uint8 `(n, c, h, w)`; pixel values are rounded to 8 bits before they are signed
            (`as_uint8`).
    """
    return (
        Ed25519PrivateKey.from_private_bytes(private_key)
        .sign(_message(model_sha256, image_hashes(images)))
        .hex()
    )


def check_request(
    public_key: str, model_sha256: str, hashes: Sequence[bytes], signature: bytes
) -> bool:
    """Tell whether a client signed these images for this model."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)).verify(
            signature, _message(model_sha256, hashes)
        )
    except (InvalidSignature, ValueError):
        return False
    return True


def image_hashes(images: torch.Tensor) -> list[bytes]:
    """Compute the SHA-256 of each image of `(n, c, h, w)`, uint8."""
    return [hashlib.sha256(image.contiguous().numpy().tobytes()).digest() for image in images]


def pack_request(signature: bytes, hashes: Sequence[bytes], index: int) -> bytes:
    """Pack what a row of the log keeps of a signed request.

    It is enough to check the signature without the other images.
    """
    return signature + index.to_bytes(_NUMBER, "big") + b"".join(hashes)


def is_signed(row: Row, public_key: str) -> bool:
    """Tell whether the holder of a client's key asked this row's query of this row's model."""
    signature, rest = row.request[:_SIGNATURE], row.request[_SIGNATURE:]
    index, joined = int.from_bytes(rest[:_NUMBER], "big"), rest[_NUMBER:]
    hashes = [joined[i : i + _HASH] for i in range(0, len(joined), _HASH)]
    own = hashlib.sha256(row.image).digest()
    return (
        index < len(hashes)
        and hashes[index] == own
        and check_request(public_key, row.model, hashes, signature)
    )


def _message(model_sha256: str, hashes: Sequence[bytes]) -> bytes:
    return (
        _FORMAT
        + bytes.fromhex(model_sha256)
        + len(hashes).to_bytes(_NUMBER, "big")
        + b"".join(hashes)
    )
