"""`countermark log erase`: forget a client."""

from dataclasses import dataclass, field

from countermark.errors import CountermarkError
from countermark.options import LogPath, VerbConfig, verb
from countermark.terminal import print_lines
from countermark.text import brief


@dataclass(frozen=True, kw_only=True)
class LogEraseConfig(VerbConfig):
    """Erase a client from a query log.

    The hash chain of the log still checks.
    """

    log: LogPath = field(kw_only=False)
    """Query log: a path or postgresql://..."""
    client: str
    """Name of the account."""


@dataclass(frozen=True)
class Erased:
    """What was erased from a log.

    Attributes:
        client: name of the account.
        rows: number of its trials, of which only the digests are left.
    """

    client: str
    rows: int


@verb(LogEraseConfig)
def log_erase(config: LogEraseConfig) -> Erased:
    """Erase what a log holds of a client; the digests stay, so the chain still checks.

    Raises:
        CountermarkError: there is no such log, or it holds nothing of such a client.

    Example:
        >>> erased = cm.log_erase("log.db", client="anna")
        >>> cm.log_check("log.db").erased == erased.rows
        True
    """
    from countermark.guard import QueryLog

    with QueryLog(config.log, create=False) as log:
        signed, rows = log.openings(config.client), log.erase(config.client)
    if not rows and not signed:
        raise CountermarkError(
            f"the log holds nothing of a client called {brief(config.client)}; check the name, "
            "which countermark client list shows"
        )
    return Erased(config.client, rows)


def show(result: Erased) -> None:
    """Print what was erased."""
    print_lines(
        f"erased {result.rows} trials of {result.client}, and all that they signed; the trials' "
        "digests stay, so the chain still checks"
    )
    if result.rows:
        print_lines(
            f"this log takes no trials of {result.client} any more: revoke the account; whoever it "
            "was needs a new name"
        )
