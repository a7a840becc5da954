"""`countermark log head`: the state of a query log, to be published or timestamped."""

from dataclasses import asdict, dataclass, field

from countermark.files import canonical_json
from countermark.options import LogPath, StampOptions, verb
from countermark.terminal import print_lines, unbroken


@dataclass(frozen=True, kw_only=True)
class LogHeadConfig(StampOptions):
    """Print the head of a query log, to be published.

    A head that was published or timestamped exposes changes to earlier rows.
    """

    log: LogPath = field(kw_only=False)
    """Query log: a path or postgresql://..."""


@dataclass(frozen=True)
class PublishedHead:
    """A head: with it, nobody can change, cut or replace what it covers without being seen.

    Attributes:
        format: of the log.
        rows: how many trials it covers.
        hash: what all of them lead to, 64 hexadecimal digits.
        token: an authority's response over the other three, base64; none if it was not asked.
    """

    format: str
    rows: int
    hash: str
    token: str | None


@verb(LogHeadConfig)
def log_head(config: LogHeadConfig) -> PublishedHead:
    """Read the head of a log, and have it timestamped if an authority is named.

    Raises:
        CountermarkError: there is no such log, or the authority does not answer.

    Example:
        >>> head = cm.log_head("log.db")
        >>> head.rows == cm.log_check("log.db").rows, len(head.hash)
        (True, 64)
    """
    from countermark.guard import LOG_FORMAT, QueryLog
    from countermark.timestamps import encode_token, timestamping

    stamp = timestamping(config.tsa, config.roots, trial=False)
    with QueryLog(config.log, create=False) as log:
        head = log.head()
    token = None if stamp is None else stamp(head.message())
    return PublishedHead(LOG_FORMAT, head.rows, head.hash, encode_token(token))


def show(result: PublishedHead) -> None:
    """Print the head as the file that `log check --head` and `trace --head` read."""
    print_lines(*map(unbroken, canonical_json(asdict(result)).decode().splitlines()))
