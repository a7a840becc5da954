"""Registrations: C1 in a public log, and coins from a round of randomness after that.

Whoever asks a timestamp authority for T1 a thousand times draws the coins a thousand times, and
nobody sees it. A registration has one draw. The owner signs C1 by a key under which they are
known and enters it in a public log that serves Rekor's API; the coins come from the first round of
a drand chain that is out a minute after the time at which the log took the entry. Each further draw
is a further entry under the same key, which a judge counts.

A registration takes the place of T1: it says when C1 existed, and it has a beacon.
"""

import base64
import binascii
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from countermark.beacons import QUICKNET, SCHEME, Chain
from countermark.errors import CountermarkError
from countermark.files import canonical_json, parse_json, read_bytes, sha256
from countermark.places import check_address
from countermark.terminal import note
from countermark.text import brief
from countermark.tokens import TOKEN_LIMIT, Token, TokenError, UntrustedError

REGISTRATION_FORMAT = "countermark registration 1"
LOG_FORMAT = "countermark public log 1"
MARGIN = 60
"""Seconds from the log's time to the round: a log whose clock is not slower than that took the
entry before the round was out."""

_ANSWER_LIMIT = 1 << 22
_PEM_LIMIT = 1 << 14
_AT_ONCE = 10  # entries that the public instance of Rekor gives in one answer
_TRIES = 20
_FIELDS = ("body", "integratedTime", "logID", "logIndex")


@dataclass(frozen=True)
class PublicLog:
    """A log that somebody trusts, and the chain from which its registrations draw.

    Attributes:
        address: of the log, http or https.
        public_key: the key by which it signs its entries, PEM.
        chain: the chain of rounds.
    """

    address: str
    public_key: str
    chain: Chain

    @property
    def key(self) -> ec.EllipticCurvePublicKey:
        """The log's key."""
        return _public_key(self.public_key.encode(), f"the key of the log {self.address}")

    @property
    def digest(self) -> str:
        """What the log calls itself: SHA-256 of its key, hexadecimal."""
        return sha256(_spelled(self.key))


REKOR = PublicLog(
    address="https://rekor.sigstore.dev",
    public_key="-----BEGIN PUBLIC KEY-----\n"
    "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE2G2Y+2tabdTV5BcGiBIx0a9fAFwr\n"
    "kBbmLSGtks4L3qX6yYY0zufBnhC8Ur/iy55GhWP/9A/bY2LhC30M9+RYtw==\n"
    "-----END PUBLIC KEY-----\n",
    chain=QUICKNET,
)
"""The public instance of Rekor, with drand's chain quicknet."""
LOGS = {"rekor": REKOR}


@dataclass(frozen=True)
class Entry:
    """An entry of a log.

    Attributes:
        body: what was entered, JSON.
        time: when the log took it, by its clock, seconds since 1970.
        log: the log's digest.
        index: number of the entry in the log.
        registered: SHA-256 of what was signed, hexadecimal.
        identity: SHA-256 of the key that signed it, hexadecimal.
    """

    body: bytes
    time: int
    log: str
    index: int
    registered: str
    identity: str


@dataclass(frozen=True)
class Draws:
    """What a log has of one identity.

    Attributes:
        identity: SHA-256 of the key, hexadecimal.
        entries: every entry that it signed.
    """

    identity: str
    entries: tuple[Entry, ...]

    @property
    def count(self) -> int:
        """Number of different commitments, each of which has one draw."""
        return len({entry.registered for entry in self.entries})

    def first(self, digest: str) -> Entry | None:
        """The entry by which something was registered, whose time counts; none if there is none."""
        found = [entry for entry in self.entries if entry.registered == digest]
        return min(found, key=lambda entry: (entry.time, entry.index), default=None)


def public_log(place: str | Path) -> PublicLog:
    """A known log by its name, or one that a file describes (docs/format.md).

    Raises:
        CountermarkError: there is no such log, or the file is none of the kind.
    """
    if str(place) in LOGS:
        return LOGS[str(place)]
    path = Path(place)
    if not path.is_file():
        raise CountermarkError(
            f"{path} is no public log; the known one is {', '.join(LOGS)}, "
            "others need a file that describes them"
        )
    record = _json(read_bytes(path, _PEM_LIMIT), str(path))
    try:
        beacon = record["beacon"]
        chain = Chain(
            address=check_address(str(beacon["address"]), "a beacon").rstrip("/"),
            digest=_hexadecimal(beacon["hash"], 32),
            public_key=_hexadecimal(beacon["public_key"], 96),
            genesis=_whole(beacon["genesis_time"]),
            period=_whole(beacon["period"]),
        )
        address = check_address(str(record["address"]), "a public log").rstrip("/")
        log = PublicLog(address, str(record["public_key"]), chain)
        if (record["format"], beacon["schemeID"]) != (LOG_FORMAT, SCHEME) or chain.period < 1:
            raise ValueError("another format or scheme")
    except (KeyError, TypeError, ValueError) as error:
        raise CountermarkError(
            f"{path} does not describe a public log ({type(error).__name__}: {error}); "
            "docs/format.md has the fields"
        ) from error
    _ = log.digest  # which is an error where the key is none
    return log


def read_identity(path: str | Path) -> str:
    """SHA-256 of an identity's public key, hexadecimal.

    Raises:
        CountermarkError: the file holds no public key on P-256 in PEM.
    """
    return sha256(_spelled(_public_key(read_bytes(Path(path), _PEM_LIMIT), str(path))))


def registering(place: str | Path, identity: str | Path) -> "Registrar":
    """Prepare registrations: read the key, and see that the log is the one that is meant.

    Nothing is entered yet.

    Raises:
        CountermarkError: the key cannot be read, or the log does not answer or has another key.
    """
    from countermark.session import fetch

    log, path = public_log(place), Path(identity)
    try:
        key = load_pem_private_key(read_bytes(path, _PEM_LIMIT), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise CountermarkError(f"{path} is no private key in PEM without a password") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not _is_p256(key.curve):
        raise CountermarkError(
            f"{path} is no private key on the curve P-256; make one with "
            "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256"
        )
    url = f"{log.address}/api/v1/log/publicKey"
    found = _public_key(fetch(url, "the public log", limit=_PEM_LIMIT), url)
    if sha256(_spelled(found)) != log.digest:
        raise CountermarkError(f"{log.address} signs by another key than the one that you trust")
    return Registrar(log, key)


@dataclass(frozen=True)
class Registrar:
    """Registers messages by one key in one log.

    Attributes:
        log: the log.
        key: the owner's private key.
    """

    log: PublicLog
    key: ec.EllipticCurvePrivateKey

    def __call__(self, message: bytes) -> bytes:
        """Enter SHA-256(`message`), wait for the round after, and return the registration.

        Raises:
            CountermarkError: the log or the beacon does not answer as it should.
        """
        log = self.log
        signature = self.key.sign(message, ec.ECDSA(hashes.SHA256()))
        pem = self.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        proposed = {
            "apiVersion": "0.0.1",
            "kind": "hashedrekord",
            "spec": {
                "data": {"hash": {"algorithm": "sha256", "value": sha256(message)}},
                "signature": {
                    "content": base64.b64encode(signature).decode(),
                    "publicKey": {"content": base64.b64encode(pem).decode()},
                },
            },
        }
        url = f"{log.address}/api/v1/log/entries"
        found = _json(_asked(url, proposed), url)
        if len(found) != 1:
            raise CountermarkError(f"{url} answers with something else than an entry")
        (raw,) = found.values()
        entry = _entry(raw, url)
        number = log.chain.round_after(entry.time + MARGIN)
        note(
            f"registered as entry {entry.index} of {log.address}; "
            f"the coins come from round {number} of the beacon, {_shown(log.chain.time_of(number))}"
        )
        signed = _promise(raw, url)
        response = canonical_json(
            {
                "format": REGISTRATION_FORMAT,
                "entry": {**{name: raw[name] for name in _FIELDS}, "signedEntryTimestamp": signed},
                "chain": log.chain.digest,
                "round": number,
                "signature": self._round(number).hex(),
            }
        )
        check_registration(response, sha256(message), log, "the registration")
        return response

    def _round(self, number: int) -> bytes:
        """Wait for a round; its signature."""
        chain = self.log.chain
        while (left := chain.time_of(number) - time.time()) > 0:
            time.sleep(min(left, 1.0))
        for _ in range(_TRIES - 1):
            try:
                return chain.fetch(number)
            except CountermarkError:  # a round is out a moment after its time
                time.sleep(min(chain.period, 3))
        return chain.fetch(number)


def is_registration(response: bytes) -> bool:
    """Whether some bytes are meant as a registration, and not as a timestamp."""
    return response.startswith(b"{")


def read_registration(response: bytes, digest: str, origin: str) -> Token:
    """Read a registration and check what it is of, but not who vouches for it.

    Args:
        response: JSON.
        digest: SHA-256 of what it must be of, hexadecimal.
        origin: what messages call it.

    Raises:
        TokenError: it is of something else, or cannot be read.
    """
    entry, record = _read(response, origin)
    if entry.registered != digest:
        raise TokenError(f"{origin}: the registration is one of something else")
    return Token(response, _date(entry.time), bytes.fromhex(record["signature"]))


def check_registration(response: bytes, digest: str, log: PublicLog | None, origin: str) -> Token:
    """Check a registration in full: form, message, the log's signature, and the round.

    Args:
        response: JSON.
        digest: SHA-256 of what it must be of, hexadecimal.
        log: the public log that is trusted; none where none is.
        origin: what messages call it.

    Raises:
        TokenError: see `read_registration`, or the round is not the one that its time demands.
        UntrustedError: it is not in this log, or the round is not of its chain.
    """
    token = read_registration(response, digest, origin)
    entry, record = _read(response, origin)
    if log is None:
        raise UntrustedError(f"{origin}: no public log was named that is trusted")
    if entry.log != log.digest or record["chain"] != log.chain.digest:
        raise UntrustedError(f"{origin}: the registration is one of another log or beacon")
    signed = json.dumps(
        {name: record["entry"][name] for name in _FIELDS}, sort_keys=True, separators=(",", ":")
    )
    try:
        promise = base64.b64decode(record["entry"]["signedEntryTimestamp"], validate=True)
        log.key.verify(promise, signed.encode(), ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, binascii.Error, TypeError) as error:
        raise UntrustedError(f"{origin}: the log did not sign this entry") from error
    if record["round"] != log.chain.round_after(entry.time + MARGIN):
        raise TokenError(
            f"{origin}: the coins are not from the first round {MARGIN} seconds after the entry"
        )
    if not log.chain.is_round(record["round"], token.beacon):
        raise UntrustedError(f"{origin}: the round is not signed by the chain")
    return token


def entry_of(response: bytes, origin: str) -> Entry:
    """The entry of a registration.

    Raises:
        TokenError: it cannot be read.
    """
    return _read(response, origin)[0]


def _read(response: bytes, origin: str) -> tuple[Entry, dict[str, Any]]:
    """A registration's entry, and all that it says.

    Raises:
        TokenError: it has another form, or the entry is not signed by the key that it names.
    """
    if len(response) > TOKEN_LIMIT:
        raise TokenError(f"{origin}: a registration is at most {TOKEN_LIMIT} bytes")
    try:
        record = parse_json(response, origin)
        if record.keys() != {"format", "entry", "chain", "round", "signature"}:
            raise ValueError("other fields")
        if record["format"] != REGISTRATION_FORMAT:
            raise ValueError("another format")
        if record["entry"].keys() != {*_FIELDS, "signedEntryTimestamp"}:
            raise ValueError("another entry")
        _hexadecimal(record["chain"], 32)
        _hexadecimal(record["signature"], 48)
        _whole(record["round"])
        return _entry(record["entry"], origin), record
    except (CountermarkError, ValueError, TypeError, AttributeError) as error:
        raise TokenError(f"{origin} is not a registration that can be read ({error})") from error


def draws_of(log: PublicLog, identity: str | Path) -> Draws:
    """Ask a log for every entry by an identity.

    Args:
        log: the log, which is believed to leave none out.
        identity: public key, PEM.

    Raises:
        CountermarkError: the key cannot be read, or the log does not answer as Rekor does.
    """
    path = Path(identity)
    key = _public_key(read_bytes(path, _PEM_LIMIT), str(path))
    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    query = {"publicKey": {"format": "x509", "content": base64.b64encode(pem).decode()}}
    url = f"{log.address}/api/v1/index/retrieve"
    names = _json(_asked(url, query), url, list)
    url = f"{log.address}/api/v1/log/entries/retrieve"
    digest, found = sha256(_spelled(key)), []
    for begin in range(0, len(names), _AT_ONCE):
        part = names[begin : begin + _AT_ONCE]
        rows = _json(_asked(url, {"entryUUIDs": part}), url, list)
        if len(rows) != len(part):
            raise CountermarkError(f"{url} leaves out entries that its index has")
        for row in rows:
            if not isinstance(row, dict) or len(row) != 1:
                raise CountermarkError(f"{url} answers with something else than entries")
            (raw,) = row.values()
            try:
                entry = _entry(raw, url)
            except CountermarkError:
                continue  # of another kind: no registration can be one
            if entry.identity == digest:
                found.append(entry)
    return Draws(digest, tuple(found))


def _asked(url: str, query: Mapping[str, Any]) -> bytes:
    from countermark.session import fetch

    return fetch(url, "the public log", limit=_ANSWER_LIMIT, body=json.dumps(query).encode())


def _entry(raw: object, origin: str) -> Entry:
    """An entry as the log gives it.

    Raises:
        CountermarkError: it has another form, or is not signed by the key that it names.
    """
    try:
        if not isinstance(raw, dict):
            raise TypeError("no object")
        body = base64.b64decode(raw["body"], validate=True)
        held = json.loads(body)
        spec = held["spec"]
        if (held["kind"], held["apiVersion"]) != ("hashedrekord", "0.0.1"):
            raise ValueError("another kind of entry")
        if spec["data"]["hash"]["algorithm"] != "sha256":
            raise ValueError("another digest")
        digest = _hexadecimal(spec["data"]["hash"]["value"], 32)
        signature = base64.b64decode(spec["signature"]["content"], validate=True)
        pem = base64.b64decode(spec["signature"]["publicKey"]["content"], validate=True)
        key = _public_key(pem, origin)
        key.verify(signature, bytes.fromhex(digest), ec.ECDSA(Prehashed(hashes.SHA256())))
        return Entry(
            body=body,
            time=_whole(raw["integratedTime"]),
            log=_hexadecimal(raw["logID"], 32),
            index=_whole(raw["logIndex"]),
            registered=digest,
            identity=sha256(_spelled(key)),
        )
    except (KeyError, TypeError, ValueError, RecursionError, InvalidSignature) as error:
        raise CountermarkError(
            f"{origin}: this is no entry of a digest and its signature ({type(error).__name__})"
        ) from error


def _promise(raw: Mapping[str, Any], origin: str) -> str:
    """The log's signature of an entry, base64."""
    verification = raw.get("verification")
    signed = verification.get("signedEntryTimestamp") if isinstance(verification, dict) else None
    if not isinstance(signed, str):
        raise CountermarkError(f"{origin} gives an entry that it did not sign")
    return signed


def _public_key(pem: bytes, origin: str) -> ec.EllipticCurvePublicKey:
    try:
        found = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise CountermarkError(f"{origin} is no public key in PEM") from error
    if not isinstance(found, ec.EllipticCurvePublicKey) or not _is_p256(found.curve):
        raise CountermarkError(f"{origin} is no public key on the curve P-256")
    return found


def _is_p256(curve: ec.EllipticCurve) -> bool:
    return isinstance(curve, ec.SECP256R1)


def _spelled(key: ec.EllipticCurvePublicKey) -> bytes:
    """The one spelling of a key that digests are of."""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _json(data: bytes, origin: str, kind: type = dict) -> Any:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CountermarkError(f"{origin} is no JSON; check the address or the file") from error
    if not isinstance(found, kind):
        raise CountermarkError(f"{origin} holds other JSON than it should: {brief(found)}")
    return found


def _hexadecimal(value: object, size: int) -> str:
    if not isinstance(value, str) or len(value) != 2 * size or value.strip("0123456789abcdef"):
        raise ValueError(f"no {size} bytes in hexadecimal")
    return value


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 40:
        raise ValueError("no whole number")
    return value


def _date(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _shown(seconds: int) -> str:
    return _date(seconds).strftime("%Y-%m-%d %H:%M:%S UTC")
