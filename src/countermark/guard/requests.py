"""Requests that clients sign, so that nobody, not even the owner, can choose what they asked.

The owner knows the coins. With a client's signed queries and a free hand they could frame the
account: leave out what speaks against it, put the queries in another order, ask them again under
the best of many names, or choose the secret afterwards. So a client who signs begins with an
*opening*. The owner states everything that coins and cells come from, the secret parts as digests;
the client adds 32 random bytes and signs. After that neither of them can choose the coins. Each
request has a number, and its signature covers the opening and the digest of the request before it:
the last signature covers all of them, in their order. For every request the owner gives a
*receipt*, a signature over the request and its answers.

A judge draws everything again from the opening and the requests (`countermark.claims`). What no
signature tells is who trained a model: the owner has the answers too, and could train on them. That
the copy was in the client's hands must be known from elsewhere.
"""

import hashlib
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from countermark.errors import CountermarkError
from countermark.files import canonical_json
from countermark.guard.points import is_of_small_order

if TYPE_CHECKING:
    from countermark.guard.core import Guard

OPENING_FORMAT = "countermark opening 1"
OPENING_HEADER, NUMBER_HEADER = "Countermark-Opening", "Countermark-Number"
PREVIOUS_HEADER, SIGNATURE_HEADER = "Countermark-Previous", "Countermark-Signature"
RECEIPT_HEADER = "Countermark-Receipt"
"""Headers of a signed request, and of its answer: digests and signatures in hexadecimal."""
NOTHING_BEFORE = bytes(32)
"""What stands for the request before the first one."""
MOST_REQUESTS = 1 << 40
MOST_LOST = 8
"""Openings that a client may count, and the query log of the service lacks.

A log that was restored from a backup lacks some, and a new one, of another model, has none. An
owner's p-value is multiplied for each opening that a client counts (`claims.choices_of`), so a
service takes no opening that counts more.
"""

_REQUEST, _RECEIPT = b"countermark request 2", b"countermark receipt 1"
_BEFORE = b"countermark request 1"  # 0.2.0 and earlier: without numbers
_SIGNATURE, _NUMBER, _HASH, _LABEL, _LONG = 64, 4, 32, 4, 8
_PACKED = _HASH + _LONG + _NUMBER
_DIGITS = re.compile("[0-9a-f]+")
_DIGESTS = tuple(
    f"{name}_sha256" for name in ("model", "network", "classes", "guard", "cells", "coins")
)
_TERMS = {**dict.fromkeys(_DIGESTS, 64), "log": 32, "owner": 64}
"""What the owner states besides the account's name, and how many hexadecimal digits it has."""
_ADDED = {"client": 64, "nonce": 64}
"""What the client adds besides the number of their earlier openings."""


@dataclass(frozen=True)
class Opening:
    """What a client signs before the first request.

    Attributes:
        terms: what the owner stated: digests of the weights, of the network that they are of, of
            the names of its classes, of the guard's configuration, of the seeds of its cells and of
            what this account's coins come from; the log's identity, the account's name, and the
            owner's public key.
        client: the client's public key, in hexadecimal.
        earlier: how many openings the client had signed for this service before, by the client's
            word; a service takes at most `MOST_LOST` more than its log has.
        nonce: 32 random bytes of the client's, in hexadecimal.
        signature: the client's.
    """

    terms: Mapping[str, str]
    client: str
    earlier: int
    nonce: str
    signature: bytes

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of what is signed."""
        return hashlib.sha256(self._message()).digest()

    @property
    def log(self) -> bytes:
        """Identity of the log."""
        return bytes.fromhex(self.terms["log"])

    @property
    def is_signed(self) -> bool:
        """Whether the client signed it."""
        return _verified(self.client, self._message(), self.signature)

    def record(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {**self._signed(), "signature": self.signature.hex()}

    def _signed(self) -> dict[str, Any]:
        added = {"client": self.client, "earlier": self.earlier, "nonce": self.nonce}
        return {"format": OPENING_FORMAT, **self.terms, **added}

    def _message(self) -> bytes:
        return canonical_json(self._signed())


def network_sha256(network: str, shape: Sequence[int]) -> str:
    """Compute the digest of what weights do not tell: their network and the shape of its images."""
    about = {"network": network, "shape": list(shape)}
    return hashlib.sha256(canonical_json(about)).hexdigest()


def classes_sha256(class_names: Sequence[str]) -> str:
    """Compute the digest of the names of classes, in the order of the labels."""
    return hashlib.sha256(canonical_json(list(class_names))).hexdigest()


def terms_of(
    guard: "Guard",
    account: str,
    *,
    network_sha256: str,
    classes_sha256: str,
    guard_sha256: str,
    owner: str,
) -> dict[str, str]:
    """State what a client's coins and cells come from, the secret parts as digests.

    Args:
        guard: the guard, under its log's identity.
        account: name of the account.
        network_sha256: digest of the model's network; see the function.
        classes_sha256: digest of the names of its classes; see the function.
        guard_sha256: digest of the guard's configuration.
        owner: the owner's public key, in hexadecimal.
    """
    return {
        "model_sha256": guard.settings.model_sha256,
        "network_sha256": network_sha256,
        "classes_sha256": classes_sha256,
        "guard_sha256": guard_sha256,
        "cells_sha256": hashlib.sha256(guard.cells.seeds).hexdigest(),
        "coins_sha256": hashlib.sha256(guard.account_secret(account)).hexdigest(),
        "log": guard.log.hex(),
        "account": account,
        "owner": owner,
    }


def checked_terms(found: object) -> dict[str, str]:
    """Return terms that may come from anybody, if they have the form.

    Raises:
        CountermarkError: they do not.
    """
    if (
        not isinstance(found, dict)
        or found.keys() != {*_TERMS, "account"}
        or not all(_is_hex(found[name], digits) for name, digits in _TERMS.items())
        or not (isinstance(found["account"], str) and found["account"].isprintable())
    ):
        raise CountermarkError("these are no terms of an opening")
    return found


def open_requests(private_key: bytes, terms: Mapping[str, str], earlier: int = 0) -> Opening:
    """Sign an opening, with fresh random bytes.

    Args:
        private_key: the client's Ed25519 key, 32 bytes.
        terms: what the owner stated.
        earlier: how many openings the client has signed for this service before.
    """
    key = Ed25519PrivateKey.from_private_bytes(private_key)
    public, nonce = key.public_key().public_bytes_raw().hex(), secrets.token_hex(_HASH)
    unsigned = Opening(terms, public, earlier, nonce, b"")
    return Opening(terms, public, earlier, nonce, key.sign(unsigned._message()))


def read_opening(record: object) -> Opening:
    """Read an opening that may come from anybody; its signature is not checked.

    Raises:
        CountermarkError: it has another form.
    """
    added = {"format", "signature", "earlier", *_ADDED}
    if (
        not isinstance(record, dict)
        or record.get("format") != OPENING_FORMAT
        or not record.keys() >= added
        or not all(_is_hex(record[name], digits) for name, digits in _ADDED.items())
        or not _is_hex(record["signature"], 2 * _SIGNATURE)
        or type(record["earlier"]) is not int
        or not 0 <= record["earlier"] < 1 << 31
    ):
        raise CountermarkError("this is no opening of signed requests")
    terms = checked_terms({name: record[name] for name in record.keys() - added})
    return Opening(
        terms,
        record["client"],
        record["earlier"],
        record["nonce"],
        bytes.fromhex(record["signature"]),
    )


@dataclass(frozen=True)
class SignedRequest:
    """A request of a client who signs.

    Attributes:
        opening: digest of the client's opening.
        number: how many requests there are under the opening, this one included.
        previous: digest of the request before, or `NOTHING_BEFORE`.
        hashes: SHA-256 of each image, uint8 values in the order (c, h, w).
        signature: the client's.
    """

    opening: bytes
    number: int
    previous: bytes
    hashes: tuple[bytes, ...]
    signature: bytes

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of opening, number, previous request and images."""
        count = len(self.hashes).to_bytes(_NUMBER, "big")
        numbered = self.opening + self.number.to_bytes(_LONG, "big") + self.previous
        return hashlib.sha256(_REQUEST + numbered + count + b"".join(self.hashes)).digest()

    def is_signed(self, public_key: str) -> bool:
        """Tell whether the holder of a key signed it, and with it all requests before it."""
        return _verified(public_key, _REQUEST + self.digest, self.signature)

    def headers(self) -> dict[str, str]:
        """Return the headers that carry it; the images are the body's."""
        return {
            OPENING_HEADER: self.opening.hex(),
            NUMBER_HEADER: str(self.number),
            PREVIOUS_HEADER: self.previous.hex(),
            SIGNATURE_HEADER: self.signature.hex(),
        }

    @property
    def place(self) -> bytes:
        """Opening and number, which tell it from all other requests."""
        return self.opening + self.number.to_bytes(_LONG, "big")

    def packed(self, index: int) -> bytes:
        """Pack what a row of the log says of the request that its query was part of."""
        return self.place + index.to_bytes(_NUMBER, "big")


@dataclass(frozen=True)
class Request:
    """A signed request with what it was about.

    Attributes:
        client: name of the account.
        signed: what the client signed.
        images: uint8 values of all images, one after the other.
        labels: what they were answered with.
        day: days since 1970-01-01 (UTC) when it was asked.
    """

    client: str
    signed: SignedRequest
    images: bytes
    labels: tuple[int, ...]
    day: int


class ConflictError(CountermarkError):
    """What a client signed does not go on from what the log has of them."""


def sign_request(
    private_key: bytes, opening: bytes, number: int, previous: bytes, images: torch.Tensor
) -> SignedRequest:
    """Sign a client's request.

    Args:
        private_key: the client's Ed25519 key, 32 bytes.
        opening: digest of the client's opening.
        number: 1 for the first request, then one more each time.
        previous: digest of the request before, or `NOTHING_BEFORE`.
        images: uint8 `(n, c, h, w)`; pixel values are rounded to 8 bits before they are signed
            (`as_uint8`).
    """
    hashes = tuple(image_hashes(images))
    unsigned = SignedRequest(opening, number, previous, hashes, b"")
    signature = Ed25519PrivateKey.from_private_bytes(private_key).sign(_REQUEST + unsigned.digest)
    return SignedRequest(opening, number, previous, hashes, signature)


def request_of(headers: Mapping[str, str], hashes: Sequence[bytes]) -> SignedRequest | None:
    """Read a request from its headers, whoever sent them; `None` if they have another form."""
    opening, previous, signature = (
        headers.get(name, "") for name in (OPENING_HEADER, PREVIOUS_HEADER, SIGNATURE_HEADER)
    )
    number = headers.get(NUMBER_HEADER, "")
    if not (
        _is_hex(opening, 2 * _HASH)
        and _is_hex(previous, 2 * _HASH)
        and _is_hex(signature, 2 * _SIGNATURE)
        and number.isascii()
        and number.isdigit()
        and len(number) < 14
        and 0 < int(number) < MOST_REQUESTS
    ):
        return None
    return SignedRequest(
        bytes.fromhex(opening),
        int(number),
        bytes.fromhex(previous),
        tuple(hashes),
        bytes.fromhex(signature),
    )


def request_place(request: bytes) -> bytes:
    """Return the place of the request that a row's query was part of (`SignedRequest.place`).

    It is empty if the client did not sign, or signed as releases up to 0.2.0 did.

    Args:
        request: the row's.
    """
    return request[:-_NUMBER] if len(request) == _PACKED else b""


def belongs(request: bytes, image: bytes, taken: Mapping[bytes, Sequence[bytes]]) -> bool:
    """Tell whether a row's image was part of one of some requests, or of none that was signed.

    Args:
        request: what the row has of its request.
        image: the row's image.
        taken: the hashes of the images of each request, by its place.
    """
    place = request_place(request)
    if not place:
        return True
    hashes, index = taken.get(place, ()), int.from_bytes(request[-_NUMBER:], "big")
    return index < len(hashes) and hashes[index] == hashlib.sha256(image).digest()


def opening_of(request: bytes) -> bytes:
    """Return the digest of the opening under which a row's coin was drawn, or nothing."""
    return request_place(request)[:_HASH]


def sign_receipt(signing_key: bytes, request: bytes, labels: Sequence[int]) -> bytes:
    """Sign what a request was answered with, as its owner.

    Args:
        signing_key: the owner's Ed25519 key, 32 bytes.
        request: the request's digest.
        labels: the answers, in the order of its images.
    """
    return Ed25519PrivateKey.from_private_bytes(signing_key).sign(_answered(request, labels))


def is_receipt(owner: str, request: bytes, labels: Sequence[int], signature: bytes) -> bool:
    """Tell whether an owner signed that a request was answered with these labels."""
    fits = len(request) == _HASH and all(0 <= label < 1 << 31 for label in labels)
    return fits and _verified(owner, _answered(request, labels), signature)


def image_hashes(images: torch.Tensor) -> list[bytes]:
    """Compute the SHA-256 of each image of `(n, c, h, w)`, uint8."""
    return [hashlib.sha256(image.contiguous().numpy().tobytes()).digest() for image in images]


def hashes_of(images: bytes, count: int) -> tuple[bytes, ...]:
    """Compute the SHA-256 of each of some images of one size that stand one after the other."""
    size = len(images) // count
    return tuple(
        hashlib.sha256(images[at : at + size]).digest() for at in range(0, size * count, size)
    )


def is_signed_alone(public_key: str, model_sha256: str, image: bytes, request: bytes) -> bool:
    """Tell whether the holder of a client's key signed a row's query, as up to 0.2.0.

    Such a signature covers the model and the images of one request, and neither its time nor its
    place among others. It proves nothing to a judge.

    Args:
        public_key: the client's, in hexadecimal.
        model_sha256: the row's model.
        image: the row's image.
        request: what the row has of the request.
    """
    signature, rest = request[:_SIGNATURE], request[_SIGNATURE:]
    index, joined = int.from_bytes(rest[:_NUMBER], "big"), rest[_NUMBER:]
    hashes = [joined[i : i + _HASH] for i in range(0, len(joined), _HASH)]
    if not (index < len(hashes) and hashes[index] == hashlib.sha256(image).digest()):
        return False
    count = len(hashes).to_bytes(_NUMBER, "big")
    message = _BEFORE + bytes.fromhex(model_sha256) + count + b"".join(hashes)
    return _verified(public_key, message, signature)


def _answered(request: bytes, labels: Sequence[int]) -> bytes:
    return _RECEIPT + request + b"".join(label.to_bytes(_LABEL, "big") for label in labels)


def _verified(public_key: str, message: bytes, signature: bytes) -> bool:
    try:
        if is_of_small_order(public_key):
            return False
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def _is_hex(value: object, digits: int) -> bool:
    return isinstance(value, str) and len(value) == digits and _DIGITS.fullmatch(value) is not None
