"""`countermark client add`: an account for the guarded service."""

from dataclasses import dataclass

from countermark.config import ClientAddConfig
from countermark.progress import note
from countermark.report import print_lines
from countermark.service.clients import add_client


@dataclass(frozen=True)
class Added:
    """A new account.

    Attributes:
        name: of the account.
        api_key: goes into the header `Authorization: Bearer KEY`; it is shown this once.
    """

    name: str
    api_key: str


def client_add(config: ClientAddConfig) -> Added:
    """Add an account.

    Raises:
        CountermarkError: the name is taken, or the file cannot be written.
    """
    return Added(config.name, add_client(config.clients, config.name, config.public_key))


def show(result: Added) -> None:
    """Print the API key, alone on standard output."""
    print_lines(result.api_key)
    note(f"a service that runs already knows {result.name} only after it is started again")
