"""`countermark log renew`: new coins for every client, where a log has lost rows."""

from dataclasses import dataclass, field

from countermark.options import LogPath, VerbConfig, verb
from countermark.terminal import print_lines, unbroken


@dataclass(frozen=True, kw_only=True)
class LogRenewConfig(VerbConfig):
    """Give a query log new coins, after it has lost rows.

    Do so after it was restored from a backup, or when another database took over that lacks its
    last rows, before the service answers from it.
    """

    log: LogPath = field(kw_only=False)
    """Query log: a path or postgresql://..."""


@dataclass(frozen=True)
class Renewed:
    """A log with a new identity.

    Attributes:
        log: its address, without a password.
        rows: trials that it has, whose coins are the earlier ones; they stay evidence.
    """

    log: str
    rows: int


@verb(LogRenewConfig)
def log_renew(config: LogRenewConfig) -> Renewed:
    """Give a log another identity, which is part of every coin.

    Raises:
        CountermarkError: there is no such log, or it cannot be written.

    Example:
        >>> renewed = cm.log_renew("log.db")
        >>> renewed.rows == cm.log_check("log.db").rows
        True
    """
    from countermark.guard import QueryLog

    with QueryLog(config.log, create=False) as log:
        return Renewed(log.shown, log.renew())


def show(result: Renewed) -> None:
    """Print what to do next."""
    print_lines(
        f"{unbroken(result.log)} keeps {result.rows} trials, and every client has new coins from "
        "now on; start the service again, and publish a new head"
    )
