"""Timestamps by RFC 3161: ask an authority for one, and check one offline against chosen roots.

A token says that a digest existed at a time. Its signature also serves as randomness: nobody but
the authority could foresee it, so coins that are hashed from it did not exist before
(docs/how-it-works.md).
"""

import base64
import re
import secrets
import ssl
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)
from cryptography.hazmat.primitives.serialization import Encoding

from countermark.errors import CountermarkError
from countermark.files import read_bytes, sha256
from countermark.places import check_address
from countermark.registry import (
    PublicLog,
    check_registration,
    is_registration,
    read_registration,
)
from countermark.terminal import note
from countermark.text import sentence
from countermark.tokens import TOKEN_LIMIT, Token, TokenError, UntrustedError

Stamp = Callable[[bytes], bytes]
"""Has a message timestamped; the authority's response."""

_SHA256 = "2.16.840.1.101.3.4.2.1"
_ROOTS_LIMIT = 1 << 22


def timestamping(tsa: str | None, roots: str | Path | None, *, trial: bool = True) -> Stamp | None:
    """A stamp of the authority at the address `tsa`; none without an address.

    For a `trial` the authority is asked for a first token over random bytes, so that long work does
    not begin if it cannot end.

    Args:
        tsa: address of the authority.
        roots: PEM file of root certificates, under which every token is checked.
        trial: ask for that first token.

    Raises:
        CountermarkError: the authority does not answer, or not under these roots.
    """
    if tsa is None:
        return None
    trusted = [] if roots is None else load_roots(Path(roots))
    if trial:
        request_token(tsa, secrets.token_bytes(32), trusted)
    return lambda message: request_token(tsa, message, trusted).response


def request_token(url: str, message: bytes, roots: Sequence[x509.Certificate] = ()) -> Token:
    """Have SHA-256(`message`) timestamped.

    Args:
        url: address of the authority, http or https.
        message: what is stamped; only its digest leaves.
        roots: certificates that the token is checked against at once; without any, only its form
            and its message are checked.

    Raises:
        CountermarkError: the authority cannot be reached, refuses, or answers with something else.
    """
    from countermark.session import fetch

    check_address(url, "a timestamp authority")
    with _library() as rfc3161:
        request = (
            rfc3161.TimestampRequestBuilder()
            .data(message)
            .hash_algorithm(rfc3161.HashAlgorithm.SHA256)
            .nonce(nonce=True)
            .cert_request(cert_request=True)
        ).build()
    body = fetch(
        url,
        "the timestamp authority",
        limit=TOKEN_LIMIT,
        body=request.as_bytes(),
        kind="application/timestamp-query",
    )
    token = read_token(body, sha256(message), url)
    if _parse(body, url).tst_info.nonce != request.nonce:
        raise CountermarkError(
            f"the timestamp authority {url} answered another request; run the same command again"
        )
    return check_token(body, sha256(message), roots, url) if roots else token


def read_token(response: bytes, digest: str, origin: str) -> Token:
    """Read a token and check what it is of, but not who vouches for it.

    Args:
        response: an authority's, DER; or a registration, JSON.
        digest: SHA-256 of what it must stamp, hexadecimal.
        origin: what messages call it.

    Raises:
        TokenError: the response grants no token, stamps another message, or has a form or a
            signature that cannot be read.
    """
    if is_registration(response):
        return read_registration(response, digest, origin)
    if len(response) > TOKEN_LIMIT:
        raise TokenError(
            f"{origin}: a timestamp is at most {TOKEN_LIMIT} bytes; this is something else"
        )
    parsed = _parse(response, origin)
    with _understood(
        f"{origin} is not a timestamp of RFC 3161 that can be read",
        "it is damaged or something else",
    ):
        if parsed.status != 0:
            reason = sentence(", ".join(map(str, parsed.status_string))) or "no reason was given"
            raise TokenError(
                f"{origin}: the timestamp was refused with the status {parsed.status} ({reason})"
            )
        information = parsed.tst_info
        imprint = information.message_imprint
        stamped, time = (
            (imprint.hash_algorithm.dotted_string, imprint.message.hex()),
            information.gen_time,
        )
        beacon = _beacon(parsed.time_stamp_token())
        canonical = parsed.as_bytes() == _in_order(response)
    if not canonical:
        raise TokenError(f"{origin}: the timestamp holds more than a timestamp; it was changed")
    if stamped != (_SHA256, digest):
        raise TokenError(f"{origin}: the timestamp is one of something else")
    return Token(response, time, beacon)


def check_token(
    response: bytes,
    digest: str,
    roots: Sequence[x509.Certificate],
    origin: str,
    log: PublicLog | None = None,
) -> Token:
    """Check a token in full: form, message, signature, and certificates at the time of signing.

    Args:
        response: an authority's, DER; or a registration, JSON.
        digest: SHA-256 of what it must stamp, hexadecimal.
        roots: certificates of the authorities that are trusted.
        origin: what messages call it.
        log: the public log that is trusted, for registrations.

    Raises:
        TokenError: see `read_token`.
        UntrustedError: the signature does not lead to one of the roots through certificates that
            were valid at that time and are meant for timestamps; or it is a registration in another
            log (see `check_registration`).
    """
    if is_registration(response):
        return check_registration(response, digest, log, origin)
    token = read_token(response, digest, origin)
    parsed = _parse(response, origin)
    with (
        _library() as rfc3161,
        _understood(
            f"{origin}: no authority under the given roots signed this timestamp",
            kind=UntrustedError,
        ),
    ):
        rfc3161.VerifierBuilder(roots=list(roots)).build().verify(parsed, bytes.fromhex(digest))
    return token


def _parse(response: bytes, origin: str) -> Any:
    """A response as the client library reads it.

    Raises:
        TokenError: it cannot be read.
    """
    with (
        _library() as rfc3161,
        _understood(
            f"{origin} is not a timestamp of RFC 3161 that can be read",
            "it is damaged or something else",
        ),
    ):
        return rfc3161.decode_timestamp_response(_in_order(response))


def _in_order(response: bytes) -> bytes:
    """Correct a response for the client library, which is stricter than RFC 3161.

    Two things outside of the signed part are corrected; what is stored and committed to remains the
    response as it came. The certificates are a set, whose order means nothing, but authorities send
    them in the order of their chain: they are sorted as DER requires. The status "granted with
    modifications" (1) becomes "granted" (0), since it grants a token just as well.
    """
    from asn1crypto import cms, core, tsp

    whole = core.Sequence.load(response, strict=True)
    parts = [whole[number].dump() for number in range(len(whole))]
    if tsp.PKIStatusInfo.load(parts[0])["status"].native == "granted_with_mods":
        response = response.replace(b"\x02\x01\x01", b"\x02\x01\x00", 1)  # the first number of all
    if len(parts) == 1:  # refused
        return response
    certificates = [
        each.dump() for each in cms.ContentInfo.load(parts[1])["content"]["certificates"]
    ]
    as_sent, sorted_ = b"".join(certificates), b"".join(sorted(certificates))
    return (
        response.replace(as_sent, sorted_)
        if as_sent != sorted_ and response.count(as_sent) == 1
        else response
    )


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
        raise CountermarkError(
            f"{origin} is not a timestamp in base64; "
            "the file is damaged or not one of Countermark's"
        ) from error
    return response


def load_roots(path: Path) -> list[x509.Certificate]:
    """Read the certificates of trusted authorities from a PEM file.

    A certificate that cannot be used is left out, with a note on standard error: with fewer roots,
    fewer timestamps are trusted, never more.

    Raises:
        CountermarkError: the file cannot be read, or holds no certificate that can be used.
    """
    found = [
        b"-----BEGIN " + part for part in read_bytes(path, _ROOTS_LIMIT).split(b"-----BEGIN ")[1:]
    ]
    found = [
        part
        for part in found
        if part.startswith((b"-----BEGIN CERTIFICATE-----", b"-----BEGIN X509 CERTIFICATE-----"))
    ]
    roots, trouble = [], []
    for number, part in enumerate(found, 1):
        try:
            roots.append(_root(part, f"certificate {number} of {path} cannot be used"))
        except CountermarkError as error:
            trouble.append(str(error))
    if not roots:
        reason = f" ({trouble[0]})" if trouble else ""
        raise CountermarkError(
            f"{path} holds no certificates in PEM that can be used{reason}; "
            "give the roots of the timestamp authorities that you trust"
        )
    for line in trouble:
        note(line)
    return roots


def root_name(certificate: x509.Certificate) -> str:
    """What a root is called: its subject, or its SHA-256 where the subject cannot be read."""
    try:
        with _understood("its name cannot be read"):
            return certificate.subject.rfc4514_string()
    except CountermarkError:
        return f"the certificate with the SHA-256 {certificate.fingerprint(hashes.SHA256()).hex()}"


def _root(pem: bytes, trouble: str) -> x509.Certificate:
    """One certificate that the verification can read: it panics over one that OpenSSL cannot."""
    with _understood(trouble, "it is left out"):
        certificate = x509.load_pem_x509_certificate(pem)
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(
                cadata=certificate.public_bytes(Encoding.DER)
            )
        except ssl.SSLError as error:
            raise ValueError("OpenSSL cannot read it") from error
        return certificate


def _beacon(signed: bytes) -> bytes:
    """What of a CMS signature was unforeseeable and is unchangeable."""
    from asn1crypto import cms

    data = cms.ContentInfo.load(signed, strict=True)["content"]
    if len(data["signer_infos"]) != 1:
        raise ValueError("it has not one signature")
    signer = data["signer_infos"][0]
    if signer["sid"].name != "issuer_and_serial_number":
        raise ValueError("its signer is not named by issuer and number")
    # If two certificates had the same number, two readers that compare names differently could
    # choose different ones.
    number = signer["sid"].chosen["serial_number"].native
    if (
        len({each.dump() for each in data["certificates"] if each.chosen.serial_number == number})
        != 1
    ):
        raise ValueError("it holds no certificate of the signer's number, or several")
    signature = bytes(signer["signature"].native)
    # The token's statement of the algorithm is not signed. The signature itself tells whether it is
    # ECDSA, the only kind that is in DER.
    try:
        r, s = decode_dss_signature(signature)
    except ValueError:
        return signature
    if encode_dss_signature(r, s) != signature:
        raise ValueError("its signature is spelled otherwise than in DER")
    return r.to_bytes((r.bit_length() + 7) // 8, "big")


@contextmanager
def _understood(
    trouble: str, advice: str = "", kind: type[TokenError] = TokenError
) -> Iterator[None]:
    """Turn what a library raises over somebody's bytes into an error of one line.

    Args:
        trouble: the beginning of the line; the library's reason follows in brackets.
        advice: the end of the line, after a semicolon; none if empty.
        kind: type of the error.

    Raises:
        TokenError: of the type `kind`, for any error that the bytes caused.
    """
    try:
        yield
    except CountermarkError:
        raise
    except BaseException as error:
        # The panic of a library in Rust is no `Exception`. An interruption, too little memory, a
        # missing library and an error of the system say nothing about the bytes.
        whose = isinstance(error, Exception) or type(error).__module__ == "pyo3_runtime"
        if not whose or isinstance(error, MemoryError | ImportError | OSError):
            raise
        reason = re.search(r"Verify error: ([^\"]+)", str(error))
        words = sentence(reason[1] if reason else str(error) or type(error).__name__)
        raise kind(f"{trouble} ({words}){'; ' if advice else ''}{advice}") from error


@contextmanager
def _library() -> Iterator[Any]:
    """Import the client library, and the ASN.1 reader for what it does not show.

    Both are optional dependencies.
    """
    try:
        import asn1crypto.tsp  # noqa: F401
        import rfc3161_client
    except ImportError as error:
        raise CountermarkError("timestamps need: pip install 'countermark[judge]'") from error
    yield rfc3161_client
