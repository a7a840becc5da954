"""Registrations: C1 in a public log, and coins from a round of randomness after that.

Whoever asks a timestamp authority for T1 a thousand times draws the coins a thousand times, and
nobody sees it. A registration has one draw. The owner signs C1 by a key under which they are
known and enters it in a public log that serves Rekor's API; the coins come from the first round of
a drand chain that is out a minute after the time at which the log took the entry. Each further draw
is a further entry under the same key, which a judge counts.

A registration takes the place of T1: it says when C1 existed, and it has a beacon. The key is one
for RSA, since the log checks a signature over a digest: with a bare curve anybody could make up
digests that fit somebody's key, and spoil the count.
"""

import base64
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeGuard

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
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
LOG_FORMAT = "countermark log 1"
MARGIN = 60
"""Seconds from the log's time to the round: a log whose clock is not slower than that took the
entry before the round was out."""

_ANSWER_LIMIT = 1 << 24
_PEM_LIMIT = 1 << 14
_AT_ONCE = 10  # entries that the public instance of Rekor gives in one answer
_TRIES = 20
_AHEAD = 600  # seconds by which a log's clock may be ahead of ours
_LAST_SECOND = 1 << 33  # in the year 2242
_RSA_BITS = (2048, 4096)
_FIELDS = ("body", "integratedTime", "logID", "logIndex")


@dataclass(frozen=True)
class PublicLog:
    """A log that somebody trusts, and the chain from which its registrations draw.

    Attributes:
        address: of the log, http or https.
        public_key: the key by which it signs its entries, on P-256, PEM.
        chain: the chain of rounds.
    """

    address: str
    public_key: str
    chain: Chain

    @property
    def key(self) -> ec.EllipticCurvePublicKey:
        """The log's key."""
        origin = f"the key of the log {self.address}"
        found = _public_key(self.public_key.encode(errors="replace"), origin)
        if not isinstance(found, ec.EllipticCurvePublicKey) or found.curve.name != "secp256r1":
            raise CountermarkError(f"{origin} is none on the curve P-256")
        return found

    @property
    def digest(self) -> str:
        """What the log calls itself: SHA-256 of its key, hexadecimal."""
        return _digest(self.key)


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
        time: when the log took it, by its clock, seconds since 1970.
        log: the log's digest.
        index: number of the entry in the log.
        registered: SHA-256 of what was signed, hexadecimal.
        identity: SHA-256 of the key that signed it, hexadecimal.
        raw: the entry as it stands in a registration.
    """

    time: int
    log: str
    index: int
    registered: str
    identity: str
    raw: Mapping[str, Any]


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
    path = Path(place).expanduser()
    try:
        data = read_bytes(path, _PEM_LIMIT)
    except CountermarkError as error:
        raise CountermarkError(
            f"there is no public log {brief(str(place))}: name {' or '.join(LOGS)}, "
            f"or a file that describes another ({error})"
        ) from error
    record = _json(data, str(path))
    try:
        beacon = record["beacon"]
        chain = Chain(
            address=check_address(str(beacon["address"]), "a beacon").rstrip("/"),
            digest=_hexadecimal(beacon["hash"], 32),
            public_key=_hexadecimal(beacon["public_key"], 96),
            genesis=_whole(beacon["genesis_time"], _LAST_SECOND),
            period=_whole(beacon["period"], 1 << 20),
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


def registering(place: str | Path, identity: str | Path) -> "Registrar":
    """Prepare registrations: read the key, and see that log and beacon are those that are meant.

    Nothing is entered yet.

    Raises:
        CountermarkError: the key cannot be read, the log or the beacon does not answer or has
            another key, or a library is missing.
    """
    from countermark.session import fetch

    log, path = public_log(place), Path(identity).expanduser()
    try:
        key = load_pem_private_key(read_bytes(path, _PEM_LIMIT), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise CountermarkError(f"{path} is no private key in PEM without a password") from error
    if not isinstance(key, rsa.RSAPrivateKey) or not _is_usual(key.public_key()):
        raise CountermarkError(
            f"{path} is no private key for RSA of {_RSA_BITS[0]} to {_RSA_BITS[1]} bits; make one "
            "with openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:3072"
        )
    url = f"{log.address}/api/v1/log/publicKey"
    found = _public_key(fetch(url, "the public log", limit=_PEM_LIMIT), url)
    if _digest(found) != log.digest:
        raise CountermarkError(f"{log.address} signs by another key than the one that you trust")
    log.chain.fetch(max(1, log.chain.round_after(int(time.time())) - 20))
    return Registrar(log, key)


@dataclass(frozen=True)
class Registrar:
    """Registers messages by one key in one log.

    Attributes:
        log: the log.
        key: the owner's private key.
    """

    log: PublicLog
    key: rsa.RSAPrivateKey

    def __call__(self, message: bytes) -> bytes:
        """Enter SHA-256(`message`), wait for the round after, and return the registration.

        What the log has already is not entered again: whoever was interrupted goes on with the same
        draw.

        Raises:
            CountermarkError: the log or the beacon does not answer as it should.
        """
        log = self.log
        entry = self._listed(message) or self._entered(message)
        if entry.time > time.time() + _AHEAD:
            raise CountermarkError(
                f"the clock of {log.address} is ahead of this machine's by "
                f"{entry.time - time.time():.0f} seconds; one of them is wrong"
            )
        number = log.chain.round_after(entry.time + MARGIN)
        note(
            f"registered as entry {entry.index} of {log.address}; "
            f"the coins come from round {number} of the beacon, {_shown(log.chain.time_of(number))}"
        )
        record = {
            "format": REGISTRATION_FORMAT,
            "entry": dict(entry.raw),
            "chain": log.chain.digest,
            "round": number,
            "signature": self._round(number).hex(),
        }
        return canonical_json(record)

    def _listed(self, message: bytes) -> Entry | None:
        return _draws(self.log, self.key.public_key()).first(sha256(message))

    def _entered(self, message: bytes) -> Entry:
        """Enter a message, and see that the log lists it, as a judge will."""
        proposed = {
            "apiVersion": "0.0.1",
            "kind": "hashedrekord",
            "spec": {
                "data": {"hash": {"algorithm": "sha256", "value": sha256(message)}},
                "signature": {
                    "content": _base64(self.key.sign(message, PKCS1v15(), hashes.SHA256())),
                    "publicKey": {"content": _base64(_pem(self.key.public_key()))},
                },
            },
        }
        _asked(f"{self.log.address}/api/v1/log/entries", proposed)
        for _ in range(_TRIES):
            if (entry := self._listed(message)) is not None:
                return entry
            time.sleep(1.0)  # the index follows the log
        raise CountermarkError(
            f"{self.log.address} took the entry, but does not list it under your key; "
            "run the same command again later, which goes on with that entry"
        )

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


def drawing(
    stamp: Callable[[bytes], bytes] | None,
    register: str | Path | None,
    identity: str | Path | None,
) -> Callable[[bytes], bytes] | None:
    """What coins are drawn from: a registration where one is wanted, else what is given.

    Raises:
        CountermarkError: see `registering`.
    """
    if register is None or identity is None:
        return stamp
    return registering(register, identity)


def is_registration(token: bytes | None) -> TypeGuard[bytes]:
    """Whether there is a token that is meant as a registration, and not as a timestamp."""
    return token is not None and token.startswith(b"{")


def read_registration(token: bytes, digest: str, origin: str) -> Token:
    """Read a registration and check what it is of, but not who vouches for it.

    Args:
        token: JSON.
        digest: SHA-256 of what it must be of, hexadecimal.
        origin: what messages call it.

    Raises:
        TokenError: it is of something else, or cannot be read.
    """
    entry, record = _read(token, origin, digest)
    return Token(token, _date(entry.time), bytes.fromhex(record["signature"]))


def check_registration(token: bytes, digest: str, log: PublicLog | None, origin: str) -> Token:
    """Check a registration in full: form, message, the log's signature, and the round.

    Args:
        token: JSON.
        digest: SHA-256 of what it must be of, hexadecimal.
        log: the public log that is trusted; none where none is.
        origin: what messages call it.

    Raises:
        TokenError: see `read_registration`, or the round is not the one that its time demands.
        UntrustedError: it is not in this log, or the round is not of its chain.
    """
    entry, record = _read(token, origin, digest)
    beacon = bytes.fromhex(record["signature"])
    if log is None:
        raise UntrustedError(f"{origin}: it is registered, and no public log was named as trusted")
    if entry.log != log.digest or record["chain"] != log.chain.digest:
        raise UntrustedError(f"{origin}: the registration is one of another log or beacon")
    if not is_promised(entry.raw, log.key):
        raise UntrustedError(f"{origin}: the log did not sign this entry")
    if record["round"] != log.chain.round_after(entry.time + MARGIN):
        raise TokenError(
            f"{origin}: the coins are not from the first round {MARGIN} seconds after the entry"
        )
    if not log.chain.is_round(record["round"], beacon):
        raise UntrustedError(f"{origin}: the round is not signed by the chain")
    return Token(token, _date(entry.time), beacon)


def is_promised(raw: Mapping[str, Any], key: ec.EllipticCurvePublicKey) -> bool:
    """Whether a log signed an entry: its body, time and number."""
    signed = {name: raw[name] for name in _FIELDS}
    try:
        promise = base64.b64decode(raw["signedEntryTimestamp"], validate=True)
        text = json.dumps(signed, sort_keys=True, separators=(",", ":"))
        key.verify(promise, text.encode(), ec.ECDSA(hashes.SHA256()))
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def entry_of(token: bytes, origin: str) -> Entry:
    """The entry of a registration.

    Raises:
        TokenError: it cannot be read.
    """
    return _read(token, origin)[0]


def _read(token: bytes, origin: str, digest: str | None = None) -> tuple[Entry, dict[str, Any]]:
    """A registration's entry, and all that it says.

    Args:
        token: JSON.
        origin: what messages call it.
        digest: SHA-256 of what it must be of, hexadecimal; anything if not given.

    Raises:
        TokenError: it has another form, is of something else, or the entry is not signed by the key
            that it names.
    """
    try:
        if len(token) > TOKEN_LIMIT:
            raise ValueError(f"it has more than {TOKEN_LIMIT} bytes")
        record = parse_json(token, "it")
        if record.keys() != {"format", "entry", "chain", "round", "signature"}:
            raise ValueError("it has other fields")
        if record["format"] != REGISTRATION_FORMAT:
            raise ValueError("it has another format")
        _hexadecimal(record["chain"], 32)
        _hexadecimal(record["signature"], 48)
        _whole(record["round"], 1 << 40)
        entry = _entry(record["entry"])
    except (CountermarkError, ValueError, TypeError, AttributeError) as error:
        raise TokenError(f"{origin} is not a registration that can be read ({error})") from error
    if digest is not None and entry.registered != digest:
        raise TokenError(f"{origin}: the registration is one of something else")
    return entry, record


def draws_of(log: PublicLog, identity: str | Path) -> Draws:
    """Ask a log for every entry by an identity.

    Args:
        log: the log, which is believed to leave none out.
        identity: public key for RSA, PEM.

    Raises:
        CountermarkError: the key cannot be read, or the log does not answer as Rekor does.
    """
    path = Path(identity).expanduser()
    key = _public_key(read_bytes(path, _PEM_LIMIT), str(path))
    if not isinstance(key, rsa.RSAPublicKey) or not _is_usual(key):
        raise CountermarkError(f"{path} is no public key for RSA, which identities have")
    return _draws(log, key)


def _draws(log: PublicLog, key: rsa.RSAPublicKey) -> Draws:
    query = {"publicKey": {"format": "x509", "content": _base64(_pem(key))}}
    url = f"{log.address}/api/v1/index/retrieve"
    names = sorted(set(_list(_asked(url, query), url, str)))
    url = f"{log.address}/api/v1/log/entries/retrieve"
    found: list[Entry] = []
    for begin in range(0, len(names), _AT_ONCE):
        part = names[begin : begin + _AT_ONCE]
        rows = _list(_asked(url, {"entryUUIDs": part}), url, dict)
        if len(rows) != len(part):
            raise CountermarkError(f"{url} gives other entries than its index has")
        found += [
            entry
            for row in rows
            for raw in row.values()
            if (entry := _registered(raw, log, url)) is not None
        ]
    by_key = tuple(entry for entry in found if entry.identity == _digest(key))
    return Draws(_digest(key), by_key)


def _registered(raw: object, log: PublicLog, origin: str) -> Entry | None:
    """An entry as the log gives it; none for one of another kind, which registers nothing.

    Raises:
        CountermarkError: it cannot be read, or the log did not sign it.
    """
    try:
        if not isinstance(raw, dict):
            raise TypeError("no object")
        body = json.loads(base64.b64decode(raw["body"], validate=True))
        if (body["kind"], body["apiVersion"]) != ("hashedrekord", "0.0.1"):
            return None
        whole = {name: raw[name] for name in _FIELDS}
        whole["signedEntryTimestamp"] = raw["verification"]["signedEntryTimestamp"]
        entry = _entry(whole)
    except (CountermarkError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CountermarkError(
            f"{origin} gives an entry that cannot be read ({type(error).__name__}: {error})"
        ) from error
    if entry.log != log.digest or not is_promised(entry.raw, log.key):
        raise CountermarkError(f"{origin} gives entry {entry.index}, which the log did not sign")
    return entry


def _entry(raw: object) -> Entry:
    """An entry of a digest that is signed by the RSA key that it names.

    Raises:
        ValueError: it has another form, or is not signed by that key.
    """
    try:
        if not isinstance(raw, dict) or raw.keys() != {*_FIELDS, "signedEntryTimestamp"}:
            raise ValueError("its entry has other fields")
        held = json.loads(base64.b64decode(raw["body"], validate=True))
        spec = held["spec"]
        if (held["kind"], held["apiVersion"]) != ("hashedrekord", "0.0.1"):
            raise ValueError("another kind of entry")
        if spec["data"]["hash"]["algorithm"] != "sha256":
            raise ValueError("another kind of digest")
        digest = _hexadecimal(spec["data"]["hash"]["value"], 32)
        signature = base64.b64decode(spec["signature"]["content"], validate=True)
        pem = base64.b64decode(spec["signature"]["publicKey"]["content"], validate=True)
        key = _public_key(pem, "its key")
        if not isinstance(key, rsa.RSAPublicKey) or not _is_usual(key):
            raise ValueError("its key is none for RSA")
        hashed = Prehashed(hashes.SHA256())
        key.verify(signature, bytes.fromhex(digest), PKCS1v15(), hashed)
    except InvalidSignature as error:
        raise ValueError("its entry is not signed by the key that it names") from error
    except (CountermarkError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"its entry is none of a digest ({type(error).__name__})") from error
    return Entry(
        time=_whole(raw["integratedTime"], _LAST_SECOND),
        log=_hexadecimal(raw["logID"], 32),
        index=_whole(raw["logIndex"], 1 << 60),
        registered=digest,
        identity=_digest(key),
        raw=raw,
    )


def _asked(url: str, query: Mapping[str, Any]) -> bytes:
    from countermark.session import fetch

    return fetch(url, "the public log", limit=_ANSWER_LIMIT, body=json.dumps(query).encode())


def _public_key(pem: bytes, origin: str) -> ec.EllipticCurvePublicKey | rsa.RSAPublicKey:
    try:
        found = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise CountermarkError(f"{origin} is no public key in PEM") from error
    if not isinstance(found, ec.EllipticCurvePublicKey | rsa.RSAPublicKey):
        raise CountermarkError(f"{origin} is no public key on P-256 or for RSA")
    return found


def _is_usual(key: rsa.RSAPublicKey) -> bool:
    """Whether a key is of a usual size and exponent, which checking takes no time for."""
    return _RSA_BITS[0] <= key.key_size <= _RSA_BITS[1] and key.public_numbers().e == 65537


def _digest(key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey) -> str:
    """SHA-256 of a key in its one spelling, hexadecimal."""
    return sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def _pem(key: rsa.RSAPublicKey) -> bytes:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _list(data: bytes, origin: str, kind: type) -> list[Any]:
    found: list[Any] = _json(data, origin, list)
    if not all(isinstance(each, kind) for each in found):
        raise CountermarkError(f"{origin} gives a list of something else than it should")
    return found


def _json(data: bytes, origin: str, kind: type = dict) -> Any:
    if len(data) > _ANSWER_LIMIT:
        raise CountermarkError(f"{origin} answers with more than {_ANSWER_LIMIT >> 20} MiB")
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CountermarkError(f"{origin} is no JSON; check the address or the file") from error
    if not isinstance(found, kind):
        raise CountermarkError(f"{origin} holds other JSON than it should: {brief(found)}")
    return found


def _hexadecimal(value: object, size: int) -> str:
    if not isinstance(value, str) or len(value) != 2 * size or value.strip("0123456789abcdef"):
        raise ValueError(f"what should be {size} bytes in hexadecimal is not")
    return value


def _whole(value: object, end: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < end:
        raise ValueError("what should be a whole number is not, or is too large")
    return value


def _date(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _shown(seconds: int) -> str:
    return _date(seconds).strftime("%Y-%m-%d %H:%M:%S UTC")
