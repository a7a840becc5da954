"""Who may ask: a file of accounts, each with the digest of its API key.

The name of an account is never given again, because the log and every trace name clients by it:
what one of them asked would be laid to the other. So an account that is revoked stays in the file,
without a key.
"""

import hashlib
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from countermark.errors import CountermarkError, nearest
from countermark.files import JSON_LIMIT, canonical_json, locked, read_bytes, read_json, write_json
from countermark.places import own_path
from countermark.service.messages import tell
from countermark.text import brief

CLIENTS_FORMAT = "countermark clients 2"
_BEFORE = "countermark clients 1"  # of 0.1.0 and 0.2.0: no account is revoked, none has an old key
_PRIVATE = 0o600
_DIGITS = re.compile("[0-9a-f]{64}")
_FIELDS, _OLD = ("key_sha256", "public_key"), ("old_key_sha256", "old_until")
_LONGEST = 200  # characters of a name
_LARGEST_PEM = 1 << 16  # bytes
_LATEST = 1 << 37  # seconds since 1970, in the year 6325
_FOLLOWING = 1.0  # seconds between two looks at the file, which only requests cause


@dataclass(frozen=True)
class Client:
    """Who asks.

    Attributes:
        name: name of the account in the log.
        public_key: Ed25519 key with which the client signs their requests, in hexadecimal; `None`
            if they do not sign.
    """

    name: str
    public_key: str | None


@dataclass(frozen=True)
class Account:
    """What the file says of a client.

    Attributes:
        key_sha256: SHA-256 of the API key, in hexadecimal; `None` if the account is revoked.
        public_key: as in `Client`.
        old_key_sha256: of the API key before the last rotation, where it stays valid for a while.
        old_until: until when, in seconds since 1970-01-01 UTC.
    """

    key_sha256: str | None
    public_key: str | None
    old_key_sha256: str | None = None
    old_until: int = 0

    @property
    def old_is_valid(self) -> bool:
        """Whether the old API key may still be used."""
        return self.old_key_sha256 is not None and time.time() < self.old_until


class Clients:
    """The accounts of a file, found by their API keys; a change of the file is followed."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            CountermarkError: the file is missing, damaged, or not a file of clients.
        """
        self._path = path
        self._flaw: str | None = None
        self._next = 0.0
        self._read()
        self._path = path.absolute()  # followed wherever this process goes

    def find(self, api_key: str) -> Client | None:
        """Find the account of an API key; `None` if there is none."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _FOLLOWING
            self.refresh()
        digest = _digest(api_key)
        name, account = self._by_digest.get(digest, ("", None))
        if account is None or not (digest == account.key_sha256 or account.old_is_valid):
            return None
        return Client(name, account.public_key)

    def refresh(self) -> None:
        """Read the file if it has changed.

        If it cannot be read, the accounts that are known stay, and standard error says so once.
        """
        try:
            if self._stamp() == self._seen:
                return
            self._read()
        except CountermarkError as error:
            if self._flaw != str(error):
                tell("complaint", f"{error}; until then the accounts stay as they were")
            self._flaw = str(error)
        else:
            self._flaw = None
            tell("clients", f"{self._path} has changed; {self._count} accounts may ask now")

    def _read(self) -> None:
        seen = self._stamp()  # first: a change while it is read is seen the next time
        accounts = read_accounts(self._path)
        self._by_digest = {
            digest: (name, account)
            for name, account in accounts.items()
            for digest in (account.old_key_sha256, account.key_sha256)
            if digest is not None
        }
        self._count = sum(account.key_sha256 is not None for account in accounts.values())
        self._seen = seen

    def _stamp(self) -> tuple[int, ...]:
        """What differs after every change of the file; equality is all that it is good for."""
        try:
            found = self._path.stat()
        except OSError:  # `_read` says what is wrong
            return ()
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def check_name(name: object) -> None:
    """Refuse what no account may be called, because not every log could hold or show it.

    Raises:
        CountermarkError: the name is not 1 to 200 printable characters.
    """
    if not (isinstance(name, str) and 0 < len(name) <= _LONGEST and name.isprintable()):
        raise CountermarkError(
            f"the name of a client is 1 to {_LONGEST} printable characters, not {brief(name)}"
        )


def add_client(path: Path, name: str, public_key: str | None) -> str:
    """Add an account to the file and return its API key.

    A file that does not exist is created. The file keeps only a digest of the API key.

    Args:
        path: the file of clients.
        name: name of the account.
        public_key: Ed25519 key of a client who signs, in hexadecimal or as the path of a PEM file.

    Raises:
        CountermarkError: the name is taken, now or by an account that was revoked, the public key
            is not valid, or the file is full or cannot be written.
    """
    digits = None if public_key is None else public_key_of(public_key, "--public-key")
    api_key = secrets.token_urlsafe(32)

    def added(known: dict[str, Account]) -> Account:
        if name in known:
            revoked = known[name].key_sha256 is None
            why = (
                ", who was revoked; a trace names clients, so no name is ever given again"
                if revoked
                else " already"
            )
            raise CountermarkError(f"{path} has a client {name!r}{why}; choose another name")
        return Account(_digest(api_key), digits)

    _change(path, name, added)
    return api_key


def rotate_client(path: Path, name: str, grace: float = 0.0) -> str:
    """Give an account a new API key and return it.

    Args:
        path: the file of clients.
        name: name of the account.
        grace: hours for which the old API key stays valid as well, by the clock of the service. A
            key that an earlier rotation left valid ends at once.

    Raises:
        CountermarkError: there is no such account, it is revoked, or the file is full or cannot be
            written.
    """
    api_key = secrets.token_urlsafe(32)

    def rotated(known: dict[str, Account]) -> Account:
        account = _known(path, name, known)
        if account.key_sha256 is None:
            raise CountermarkError(
                f"the client {name!r} was revoked, for good; add them again under another name"
            )
        old, until = account.key_sha256, int(time.time() + 3600 * grace)
        kept = (old, until) if grace > 0 else (None, 0)
        return Account(_digest(api_key), account.public_key, *kept)

    _change(path, name, rotated)
    return api_key


def revoke_client(path: Path, name: str) -> None:
    """Take the API keys of an account away, for good; its name stays in the file.

    Raises:
        CountermarkError: there is no such account, or the file cannot be written.
    """
    _change(path, name, lambda known: Account(None, _known(path, name, known).public_key))


def _change(path: Path, name: str, change: Callable[[dict[str, Account]], Account]) -> None:
    """Write one account anew, alone among all processes that do."""
    if not path.parent.is_dir():
        raise CountermarkError(f"cannot write {path}: there is no such folder; check the path")
    with locked(path.parent, wait=True):  # the file itself is replaced and cannot be locked
        known = read_accounts(path) if path.exists() else {}
        known[name] = change(known)
        accounts = {name: _written(account) for name, account in known.items()}
        record = {"format": CLIENTS_FORMAT, "clients": accounts}
        if len(canonical_json(record)) > JSON_LIMIT:
            raise CountermarkError(
                f"{path} has no room for more; take out clients whom no log names"
            )
        write_json(path, record, _PRIVATE)


def _known(path: Path, name: str, known: Mapping[str, Account]) -> Account:
    if name not in known:
        guess = nearest(name, {each: each for each in known})
        raise CountermarkError(
            f"{path} has no client {brief(name)}{guess}; countermark client list shows all"
        )
    return known[name]


def _written(account: Account) -> dict[str, object]:
    """An account as the file has it."""
    record = vars(account)
    return {name: record[name] for name in (*_FIELDS, *(_OLD if account.old_is_valid else ()))}


def read_accounts(path: Path) -> dict[str, Account]:
    """Read the accounts of a file, by their names.

    Raises:
        CountermarkError: the file is missing, damaged, or not a file of clients.
    """
    record = read_json(path)
    accounts = record.get("clients")
    if record.get("format") not in (CLIENTS_FORMAT, _BEFORE) or not isinstance(accounts, dict):
        raise CountermarkError(
            f"{path} is not a file of clients that this release can read; make one with: "
            f"countermark client add NAME --clients {path}"
        )
    found = {}
    for name, account in accounts.items():
        if not (
            isinstance(account, dict)
            and account.keys() in ({*_FIELDS}, {*_FIELDS, *_OLD})
            and name
            and name.isprintable()
        ):
            raise CountermarkError(
                f"{path}: the account {name!r} is not complete; restore the file from a backup"
            )
        found[name] = Account(**account)
        if not _is_sound(found[name], record["format"] == _BEFORE):
            raise CountermarkError(
                f"{path}: the account {name!r} is damaged; restore the file from a backup"
            )
    return found


def _is_sound(account: Account, before: bool) -> bool:
    """Whether the values are such as this release writes, or a release before revocations."""
    digests = (account.key_sha256, account.public_key, account.old_key_sha256)
    return (
        all(digest is None or _is_digits(digest) for digest in digests)
        and type(account.old_until) is int
        and 0 <= account.old_until < _LATEST
        and (account.key_sha256 is not None or account.old_key_sha256 is None)
        and not (before and (account.key_sha256 is None or account.old_key_sha256 is not None))
    )


def public_key_of(given: str, option: str) -> str:
    """Return the hexadecimal digits of an Ed25519 public key, which are given or in a PEM file.

    Raises:
        CountermarkError: it is neither, or a key of small order.
    """
    from countermark.guard.points import is_of_small_order

    digits = given if _is_digits(given) else _in_pem(given, option)
    if is_of_small_order(digits):
        raise CountermarkError(
            f"{option} {digits} is a key of small order: anybody can sign for it, and what it "
            "signs binds nobody; ask the client for another"
        )
    return digits


def _in_pem(given: str, option: str) -> str:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        found = load_pem_public_key(read_bytes(own_path(given, option), _LARGEST_PEM))
    except (CountermarkError, ValueError, UnsupportedAlgorithm):
        found = None
    if not isinstance(found, Ed25519PublicKey):
        raise CountermarkError(
            f"{option} is an Ed25519 public key, and {brief(given)} is not: give 64 lower-case "
            "hexadecimal digits, or the PEM file that openssl pkey -in PRIVATE.pem -pubout writes"
        )
    return found.public_bytes_raw().hex()


def _digest(api_key: str) -> str:
    return hashlib.sha256(api_key.encode(errors="replace")).hexdigest()


def _is_digits(value: object) -> bool:
    """Tell whether a value is 32 bytes in lower-case hexadecimal."""
    return isinstance(value, str) and _DIGITS.fullmatch(value) is not None
