"""`countermark log check`: every row of a query log and the chain that binds them."""

from dataclasses import dataclass

from countermark.config import LogCheckConfig
from countermark.guard import QueryLog, read_head
from countermark.report import print_lines


@dataclass(frozen=True)
class Checked:
    """A log whose chain holds.

    Attributes:
        rows: trials.
        erased: those of which only the digest is left.
        clients: accounts.
        covered: rows that the published head covers; none without one.
    """

    rows: int
    erased: int
    clients: int
    covered: int | None


def log_check(config: LogCheckConfig) -> Checked:
    """Check a log.

    Raises:
        CountermarkError: a row was changed, removed, added or moved (it says which), or the log does not lead to the published head.
    """
    published = None if config.head is None else read_head(config.head)
    count = erased = 0
    clients = set()
    with QueryLog(config.log, create=False) as log:
        for row in log.rows(published):
            count += 1
            erased += row is None
            if row is not None:
                clients.add(row.client)
    return Checked(count, erased, len(clients), None if published is None else published.rows)


def show(result: Checked) -> None:
    """Print that all is well."""
    covered = "" if result.covered is None else f"; it leads to the published head of {result.covered} rows"
    print_lines(f"{result.rows} trials of {result.clients} clients ({result.erased} erased), the chain holds{covered}")
