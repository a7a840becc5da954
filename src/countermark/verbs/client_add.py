"""`countermark client add`: an account for the guarded service."""

from dataclasses import dataclass, field
from pathlib import Path

from countermark.options import VerbConfig, WrittenPath, verb
from countermark.service.clients import add_client, check_name
from countermark.terminal import note, print_lines


@dataclass(frozen=True, kw_only=True)
class ClientAddConfig(VerbConfig):
    """Let a client use the service: print a new API key.

    The API key is printed once, and only its digest is kept.
    """

    name: str = field(kw_only=False)
    """Name of the account; the log and every trace use it."""
    clients: WrittenPath
    """File of the clients; it is made if it is new."""
    public_key: str | None = None
    """Ed25519 public key, 64 hexadecimal digits or a PEM file: this client signs its requests, so
    nobody can ask in its name."""

    def __post_init__(self) -> None:
        """Refuse names that a log could not show."""
        super().__post_init__()
        check_name(self.name)


@dataclass(frozen=True)
class Added:
    """A new account.

    Attributes:
        name: of the account.
        api_key: goes into the header `Authorization: Bearer KEY`; it is shown this once.
    """

    name: str
    api_key: str


@verb(ClientAddConfig)
def client_add(config: ClientAddConfig) -> Added:
    """Add an account.

    Raises:
        CountermarkError: the name is taken, the public key is none, or the file cannot be written.

    Example:
        >>> added = cm.client_add("anna", clients="clients.json")
        >>> added.name, len(added.api_key)
        ('anna', 43)
    """
    return Added(config.name, add_client(Path(config.clients), config.name, config.public_key))


def show(result: Added) -> None:
    """Print the API key, alone on standard output."""
    print_lines(result.api_key)
    note(f"a running service knows {result.name} within seconds")
