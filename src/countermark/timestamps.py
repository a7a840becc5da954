"""Timestamps by RFC 3161: ask an authority for one, and check one offline against roots that the checker chooses.

A token says that a digest existed at a time. Its signature also serves as randomness: nobody but the authority could foresee it, so coins
hashed out of it did not exist before (docs/how-it-works.md).
"""

import base64
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from countermark.errors import CountermarkError
from countermark.files import read_bytes, sha256

TOKEN_LIMIT = 1 << 16
"""Largest response of an authority that is read, in bytes."""

_SHA256 = "2.16.840.1.101.3.4.2.1"
_TIMEOUT = 30.0
_ROOTS_LIMIT = 1 << 22


class UntrustedError(CountermarkError):
    """A token that is not signed by an authority under the given roots, or not at a time when its certificate was valid."""


@dataclass(frozen=True)
class Token:
    """What an authority said.

    Attributes:
        response: the authority's whole response, DER.
        time: when it signed, by its own clock (UTC).
        beacon: what nobody else could foresee and nobody can change afterwards: an RSA signature, or the r of an ECDSA signature
            (whose s has two valid values).
    """

    response: bytes
    time: datetime
    beacon: bytes


def request_token(url: str, message: bytes, roots: Sequence[x509.Certificate] = ()) -> Token:
    """Have SHA-256(`message`) timestamped.

    Args:
        url: address of the authority, http or https.
        message: what is stamped; only its digest leaves.
        roots: certificates that the token is checked against at once; without any, only its form is.

    Raises:
        CountermarkError: the authority cannot be reached, refuses, or answers with something else.
    """
    import requests

    with _library() as rfc3161:
        request = (
            rfc3161.TimestampRequestBuilder()
            .data(message)
            .hash_algorithm(rfc3161.HashAlgorithm.SHA256)
            .nonce(nonce=True)
            .cert_request(cert_request=True)
        ).build()
    try:
        with requests.post(
            check_address(url),
            data=request.as_bytes(),
            headers={"Content-Type": "application/timestamp-query"},
            timeout=_TIMEOUT,
            stream=True,
        ) as answer:
            answer.raise_for_status()
            body = answer.raw.read(TOKEN_LIMIT + 1, decode_content=True)
    except (requests.RequestException, OSError) as error:
        raise CountermarkError(f"the timestamp authority {url} does not answer ({error}); run the same command again") from error
    token = read_token(body, sha256(message), url)
    with _library() as rfc3161:
        nonce = rfc3161.decode_timestamp_response(body).tst_info.nonce
    if nonce != request.nonce:
        raise CountermarkError(f"the timestamp authority {url} answered another request; run the same command again")
    return check_token(body, sha256(message), roots, url) if roots else token


def check_address(url: str) -> str:
    """Refuse an address that is no authority's, or that would put a password into saved files."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc:
        raise CountermarkError(f"the address of a timestamp authority is http(s)://HOST/..., without a password, not {url}")
    return url


def read_token(response: bytes, digest: str, origin: str) -> Token:
    """Read an authority's response and check that it stamps a SHA-256 `digest` (hexadecimal); not who signed it.

    Raises:
        CountermarkError: not a response that grants a token, over another message, or signed in a way that is not ours to read.
    """
    if len(response) > TOKEN_LIMIT:
        raise CountermarkError(f"{origin}: a timestamp is at most {TOKEN_LIMIT} bytes; this is something else")
    with _library() as rfc3161:
        try:
            parsed = rfc3161.decode_timestamp_response(response)
            if parsed.status != 0:
                raise CountermarkError(f"{origin}: the timestamp was refused ({', '.join(map(str, parsed.status_string)) or 'no reason'})")
            information = parsed.tst_info
            imprint = information.message_imprint
            stamped, time = (imprint.hash_algorithm.dotted_string, imprint.message.hex()), information.gen_time
            canonical = parsed.as_bytes() == response
            beacon = _beacon(parsed.time_stamp_token())
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise CountermarkError(f"{origin} is not a timestamp of RFC 3161 that can be read; it is damaged or something else") from error
    if not canonical:
        raise CountermarkError(f"{origin}: the timestamp holds more than a timestamp; it was changed")
    if stamped != (_SHA256, digest):
        raise CountermarkError(f"{origin}: the timestamp is one of something else")
    return Token(response, time, beacon)


def check_token(response: bytes, digest: str, roots: Sequence[x509.Certificate], origin: str) -> Token:
    """Check an authority's response in full: form, message, signature, certificates at the time of signing.

    Args:
        response: DER.
        digest: SHA-256 of what it must stamp, hexadecimal.
        roots: certificates of the authorities that are trusted.
        origin: what messages call it.

    Raises:
        CountermarkError: see `read_token`.
        UntrustedError: the signature does not lead to one of the roots, through certificates that were valid then and are meant for it.
    """
    token = read_token(response, digest, origin)
    with _library() as rfc3161:
        builder = rfc3161.VerifierBuilder(roots=list(roots))
        try:
            builder.build().verify(rfc3161.decode_timestamp_response(response), bytes.fromhex(digest))
        except (rfc3161.VerificationError, ValueError, TypeError) as error:
            reason = re.search(r"Verify error: ([^\"]+)", str(error))
            raise UntrustedError(
                f"{origin}: no authority under the given roots signed this timestamp ({reason[1] if reason else str(error)[:200]})"
            ) from error
    return token


def encode_token(response: bytes | None) -> str | None:
    """A token as our JSON files hold it: base64, or null."""
    return None if response is None else base64.b64encode(response).decode()


def decode_token(text: object, origin: str) -> bytes | None:
    """The inverse of `encode_token`.

    Raises:
        CountermarkError: neither null nor the one base64 spelling of some bytes.
    """
    if text is None:
        return None
    try:
        if not isinstance(text, str) or len(text) > 2 * TOKEN_LIMIT:
            raise ValueError("no text of that size")
        response = base64.b64decode(text, validate=True)
        if encode_token(response) != text:
            raise ValueError("another spelling")
    except ValueError as error:
        raise CountermarkError(f"{origin} is not a timestamp in base64; the file is damaged or not one of ours") from error
    return response


def load_roots(path: Path) -> list[x509.Certificate]:
    """Read the certificates of trusted authorities from a PEM file.

    Raises:
        CountermarkError: not such a file.
    """
    try:
        return x509.load_pem_x509_certificates(read_bytes(path, _ROOTS_LIMIT))
    except (ValueError, x509.InvalidVersion, UnsupportedAlgorithm) as error:
        raise CountermarkError(
            f"{path} holds no certificates in PEM; give the roots of the timestamp authorities that you trust"
        ) from error


def _beacon(signed: bytes) -> bytes:
    """What of a CMS signature was unforeseeable and is unchangeable."""
    from asn1crypto import cms

    data = cms.ContentInfo.load(signed, strict=True)["content"]
    if len(data["signer_infos"]) != 1:
        raise ValueError("a timestamp has one signature")
    signer = data["signer_infos"][0]
    if signer["sid"].name != "issuer_and_serial_number":
        raise ValueError("the signer is named by issuer and number")
    # Were there two certificates of one number, two readers that compare names differently could each take another one.
    number = signer["sid"].chosen["serial_number"].native
    if sum(certificate.chosen.serial_number == number for certificate in data["certificates"]) != 1:
        raise ValueError("one certificate belongs to the signature")
    signature = bytes(signer["signature"].native)
    # What the token says of the algorithm is not signed: the signature itself tells whether it is an ECDSA one, the only kind in DER.
    try:
        r, s = decode_dss_signature(signature)
    except ValueError:
        return signature
    if encode_dss_signature(r, s) != signature:
        raise ValueError("a signature has one spelling")
    return r.to_bytes((r.bit_length() + 7) // 8, "big")


@contextmanager
def _library() -> Iterator[Any]:
    """The client library, which is an extra."""
    try:
        import rfc3161_client
    except ImportError as error:
        raise CountermarkError("timestamps need: pip install 'countermark[judge]'") from error
    yield rfc3161_client
