"""`countermark client revoke`: take an account away."""

from dataclasses import dataclass, field
from pathlib import Path

from countermark.options import ReadPath, VerbConfig, verb
from countermark.service.clients import revoke_client
from countermark.terminal import print_lines


@dataclass(frozen=True, kw_only=True)
class ClientRevokeConfig(VerbConfig):
    """Take an account away, for good.

    Its name is never given again, because a trace names clients by it.
    """

    name: str = field(kw_only=False)
    """Name of the account."""
    clients: ReadPath
    """File of the clients."""


@dataclass(frozen=True)
class Revoked:
    """An account that is gone.

    Attributes:
        name: of the account; no other client gets it.
    """

    name: str


@verb(ClientRevokeConfig)
def client_revoke(config: ClientRevokeConfig) -> Revoked:
    """Take the API keys of an account away; its name stays taken.

    Raises:
        CountermarkError: there is no such account, or the file cannot be written.

    Example:
        >>> added = cm.client_add("anna", clients="clients.json")
        >>> cm.client_revoke("anna", clients="clients.json")
        Revoked(name='anna')
    """
    revoke_client(Path(config.clients), config.name)
    return Revoked(config.name)


def show(result: Revoked) -> None:
    """Print what becomes of the name."""
    print_lines(
        f"{result.name} is revoked; a running service refuses the next request within seconds. "
        "The name stays taken, because a trace names clients by it"
    )
