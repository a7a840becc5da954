"""Who may ask: a file of accounts, each with the digest of its API key."""

import hashlib
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from countermark.errors import CountermarkError
from countermark.files import JSON_LIMIT, canonical_json, locked, read_json, write_json

CLIENTS_FORMAT = "countermark clients 1"
_PRIVATE = 0o600
_DIGITS = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Client:
    """An account.

    Attributes:
        name: name of the account in the log.
        public_key: Ed25519 key with which the client signs their requests, in hexadecimal; `None`
            if they do not sign.
    """

    name: str
    public_key: str | None


class Clients:
    """The accounts of a file, found by their API keys."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            CountermarkError: the file is missing, damaged, or not a file of clients.
        """
        self._by_digest = {
            digest: Client(name, public) for name, (digest, public) in _read(path).items()
        }

    def find(self, api_key: str) -> Client | None:
        """Find the account of an API key; `None` if there is none."""
        return self._by_digest.get(hashlib.sha256(api_key.encode(errors="replace")).hexdigest())


def add_client(path: Path, name: str, public_key: str | None) -> str:
    """Add an account to the file and return its API key.

    A file that does not exist is created. The file keeps only a digest of the API key.

    Raises:
        CountermarkError: the name is taken, the public key is not valid, or the file is full or
            cannot be written.
    """
    if public_key is not None and not _is_digits(public_key):
        raise CountermarkError(
            "--public-key is an Ed25519 public key of 64 lower-case hexadecimal digits"
        )
    api_key = secrets.token_urlsafe(32)
    if not path.parent.is_dir():
        raise CountermarkError(f"cannot write {path}: there is no such folder; check the path")
    with locked(path.parent, wait=True):  # the file itself is replaced and cannot be locked
        known = _read(path) if path.exists() else {}
        if name in known:
            raise CountermarkError(f"{path} has a client {name!r} already; choose another name")
        known[name] = (hashlib.sha256(api_key.encode()).hexdigest(), public_key)
        accounts = {
            name: {"key_sha256": digest, "public_key": public}
            for name, (digest, public) in known.items()
        }
        record = {"format": CLIENTS_FORMAT, "clients": accounts}
        if len(canonical_json(record)) > JSON_LIMIT:
            raise CountermarkError(
                f"{path} has no room for another client; remove some that are gone"
            )
        write_json(path, record, _PRIVATE)
    return api_key


def _read(path: Path) -> dict[str, tuple[str, str | None]]:
    record = read_json(path)
    accounts = record.get("clients")
    if record.get("format") != CLIENTS_FORMAT or not isinstance(accounts, dict):
        raise CountermarkError(
            f"{path} is not a file of clients; make one with: countermark client add NAME "
            f"--clients {path}"
        )
    for name, account in accounts.items():
        if not (
            isinstance(account, dict)
            and account.keys() == {"key_sha256", "public_key"}
            and name
            and name.isprintable()
        ):
            raise CountermarkError(
                f"{path}: the account {name!r} is not complete; restore the file from a backup"
            )
        digest, public = account["key_sha256"], account["public_key"]
        if not _is_digits(digest) or not (public is None or _is_digits(public)):
            raise CountermarkError(
                f"{path}: the account {name!r} is damaged; restore the file from a backup"
            )
    return {
        name: (account["key_sha256"], account["public_key"]) for name, account in accounts.items()
    }


def _is_digits(value: object) -> bool:
    """Tell whether a value is 32 bytes in lower-case hexadecimal."""
    return isinstance(value, str) and _DIGITS.fullmatch(value) is not None
