"""`countermark log head`: the state of a query log, to be published or timestamped."""

from dataclasses import dataclass

from countermark.config import LogHeadConfig
from countermark.files import canonical_json
from countermark.guard import LOG_FORMAT, QueryLog
from countermark.report import print_lines


@dataclass(frozen=True)
class PublishedHead:
    """A head: with it, nobody can change, cut or replace what it covers without being seen.

    Attributes:
        format: of the log.
        rows: how many trials it covers.
        hash: what all of them lead to, 64 hexadecimal digits.
    """

    format: str
    rows: int
    hash: str


def log_head(config: LogHeadConfig) -> PublishedHead:
    """Read the head of a log.

    Raises:
        CountermarkError: there is no such log.
    """
    with QueryLog(config.log, create=False) as log:
        head = log.head()
    return PublishedHead(LOG_FORMAT, head.rows, head.hash)


def show(result: PublishedHead) -> None:
    """Print the head as the file that `log check --head` and `trace --head` read."""
    print_lines(canonical_json({"format": result.format, "rows": result.rows, "hash": result.hash}).decode().rstrip("\n"))
