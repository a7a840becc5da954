"""`countermark client rotate`: a new API key for an account."""

from dataclasses import dataclass, field
from pathlib import Path

from countermark.errors import CountermarkError
from countermark.options import ReadPath, VerbConfig, verb
from countermark.service.clients import rotate_client
from countermark.terminal import note, print_lines

_MOST = 8784.0  # hours, a year


@dataclass(frozen=True, kw_only=True)
class ClientRotateConfig(VerbConfig):
    """Give a client a new API key; the old one ends.

    The API key is printed once, and only its digest is kept.
    """

    name: str = field(kw_only=False)
    """Name of the account."""
    clients: ReadPath
    """File of the clients."""
    grace: float = 0.0
    """Hours for which the old API key stays valid as well, by the clock of the service."""

    def __post_init__(self) -> None:
        """Refuse a grace out of range."""
        super().__post_init__()
        if not 0 <= self.grace <= _MOST:
            raise CountermarkError(f"--grace is 0 to {_MOST:g} hours, not {self.grace:g}")


@dataclass(frozen=True)
class Rotated:
    """An account with a new API key.

    Attributes:
        name: of the account.
        api_key: goes into the header `Authorization: Bearer KEY`; it is shown this once.
        grace: hours for which the old one stays valid as well.
    """

    name: str
    api_key: str
    grace: float


@verb(ClientRotateConfig)
def client_rotate(config: ClientRotateConfig) -> Rotated:
    """Give an account a new API key.

    Raises:
        CountermarkError: there is no such account, it is revoked, or the file cannot be written.

    Example:
        >>> added = cm.client_add("anna", clients="clients.json")
        >>> rotated = cm.client_rotate("anna", clients="clients.json", grace=24)
        >>> rotated.api_key == added.api_key
        False
    """
    api_key = rotate_client(Path(config.clients), config.name, config.grace)
    return Rotated(config.name, api_key, config.grace)


def show(result: Rotated) -> None:
    """Print the API key, alone on standard output."""
    print_lines(result.api_key)
    old = f"after {result.grace:g} hours" if result.grace else "then"
    note(f"a running service takes it within seconds; the old key of {result.name} ends {old}")
