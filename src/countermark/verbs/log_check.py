"""`countermark log check`: every row of a query log and the chain that binds them."""

from dataclasses import dataclass, field
from pathlib import Path

from countermark.errors import CountermarkError
from countermark.files import sha256
from countermark.options import LogPath, ReadPath, VerbConfig, verb
from countermark.terminal import print_lines


@dataclass(frozen=True, kw_only=True)
class LogCheckConfig(VerbConfig):
    """Check every row of a query log, and their hash chain."""

    log: LogPath = field(kw_only=False)
    """Query log: a path or postgresql://..."""
    head: ReadPath | None = None
    """A head that was published before; the log must still lead to it."""
    roots: ReadPath | None = None
    """PEM file with the roots of the timestamp authorities that you trust: the head must carry a
    token of one."""

    def __post_init__(self) -> None:
        """Refuse roots without a head."""
        super().__post_init__()
        self._only_for(self.head is not None, "--head", "roots")


@dataclass(frozen=True)
class Checked:
    """A log whose chain holds.

    Attributes:
        rows: trials.
        erased: those of which only the digest is left.
        clients: accounts.
        void: trials that are no evidence, since they were stored after the log had lost rows.
        covered: rows that the published head covers; none without one.
        stamped: when an authority that is trusted stamped that head; none if no roots were given.
    """

    rows: int
    erased: int
    clients: int
    covered: int | None
    stamped: str | None
    void: int = 0


@verb(LogCheckConfig)
def log_check(config: LogCheckConfig) -> Checked:
    """Check a log.

    Raises:
        CountermarkError: a row was changed, removed, added or moved (the message says which), or
            the log does not lead to the published head.

    Example:
        >>> checked = cm.log_check("log.db", head="head.json")
        >>> checked.rows == checked.covered  # nothing was added since the head was published
        True
    """
    from countermark.guard import QueryLog, read_head
    from countermark.timestamps import check_token, load_roots

    published = None if config.head is None else read_head(Path(config.head))
    stamped = None
    if config.roots is not None and published is not None:
        if published.token is None:
            raise CountermarkError(
                f"{config.head} carries no timestamp; make one with: "
                "countermark log head LOG --tsa URL"
            )
        stamped = check_token(
            published.token,
            sha256(published.message()),
            load_roots(Path(config.roots)),
            str(config.head),
        ).time
    count = erased = void = 0
    clients = set()
    with QueryLog(config.log, create=False) as log:
        for row in log.rows(published):
            count += 1
            erased += row is None
            if row is not None:
                clients.add(row.client)
                void += row.log is None
    return Checked(
        count,
        erased,
        len(clients),
        None if published is None else published.rows,
        None if stamped is None else stamped.isoformat(),
        void,
    )


def show(result: Checked) -> None:
    """Print that all is well."""
    covered = (
        ""
        if result.covered is None
        else f"; it leads to the published head of {result.covered} rows"
    )
    covered += "" if result.stamped is None else f", which was timestamped {result.stamped}"
    print_lines(
        f"{result.rows} trials of {result.clients} clients ({result.erased} erased); "
        f"the chain holds{covered}"
    )
    if result.void:
        print_lines(f"{result.void} of them came after a loss of rows, and are no evidence")
