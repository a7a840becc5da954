"""`countermark client list`: the accounts of the guarded service."""

import datetime
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from countermark.options import ReadPath, VerbConfig, verb
from countermark.service.clients import read_accounts
from countermark.terminal import print_lines, print_table


@dataclass(frozen=True, kw_only=True)
class ClientListConfig(VerbConfig):
    """List the accounts: name, whether it signs, state."""

    clients: ReadPath = field(kw_only=False)
    """File of the clients."""


@dataclass(frozen=True)
class Listed:
    """One account.

    Attributes:
        name: of the account.
        signs: whether its requests must be signed.
        state: `active`, or `revoked`: it may ask no more, and its name stays taken.
        old_key_until: until when the API key before the last rotation is valid as well, in UTC;
            none where there is no such key.
    """

    name: str
    signs: bool
    state: Literal["active", "revoked"]
    old_key_until: str | None


@dataclass(frozen=True)
class ClientList:
    """All accounts of a file.

    Attributes:
        accounts: in the order of their names.
    """

    accounts: tuple[Listed, ...]


@verb(ClientListConfig)
def client_list(config: ClientListConfig) -> ClientList:
    """List the accounts of a file; it holds no API keys, only their digests.

    Raises:
        CountermarkError: the file is damaged, or not a file of clients.

    Example:
        >>> added = cm.client_add("anna", clients="clients.json")
        >>> cm.client_list("clients.json").accounts
        (Listed(name='anna', signs=False, state='active', old_key_until=None),)
    """
    return ClientList(
        tuple(
            Listed(
                name,
                account.public_key is not None,
                "revoked" if account.key_sha256 is None else "active",
                _day_and_time(account.old_until) if account.old_is_valid else None,
            )
            for name, account in sorted(read_accounts(Path(config.clients)).items())
        )
    )


def _day_and_time(seconds: int) -> str:
    return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%dT%H:%M:%SZ}"


def show(result: ClientList) -> None:
    """Print a table."""
    rows = [
        (
            account.name,
            "yes" if account.signs else "no",
            account.state,
            account.old_key_until or "",
        )
        for account in result.accounts
    ]
    if not rows:
        print_lines("there are no accounts")
        return
    print_table("", ("client", "signs", "state", "old key until"), rows)
