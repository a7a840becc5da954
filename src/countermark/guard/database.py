"""Storage for the rows of a query log: SQLite or PostgreSQL, through SQLAlchemy.

Only this module needs SQLAlchemy. One transaction writes at a time, among all processes. Reading
takes no lock and writes nothing.
"""

import contextlib
import functools
import math
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite

from countermark.errors import CountermarkError
from countermark.guard.sqlite import LARGEST, DatabaseFile, RowError
from countermark.text import sentence

_COLUMNS = {
    **dict.fromkeys(("model", "client"), sa.Text),
    **dict.fromkeys(("cell", "image"), sa.LargeBinary),
    **dict.fromkeys(("heads", "tails", "chance", "answer", "day"), sa.Integer),
    "request": sa.LargeBinary,
}
_PAGE = 500  # rows at once; fewer if they reach LARGEST bytes
_LOCK = 0x636F756E7465726D  # number of the advisory lock in PostgreSQL
_SEEN = "countermark tables"  # under which a connection remembers the tables that it has seen
_Found = TypeVar("_Found")
Place = tuple[str, str, bytes]

METADATA = sa.MetaData()
"""All tables; those of signed requests are defined in `countermark.guard.signed`."""
_FORMAT = sa.Table("log_format", METADATA, sa.Column("format", sa.Text, nullable=False))
_TRIALS = sa.Table(
    "trials",
    METADATA,
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    *(sa.Column(name, kind) for name, kind in _COLUMNS.items()),
    sa.Column("salt", sa.LargeBinary),
    sa.Column("digest", sa.LargeBinary, nullable=False),
    sa.Column("link", sa.LargeBinary, nullable=False),
    sa.UniqueConstraint("model", "client", "cell"),
)
_ERASED = sa.Table(
    "erased",
    METADATA,
    sa.Column("digest", sa.LargeBinary, primary_key=True),
    sa.Column("salt", sa.LargeBinary, nullable=False),
    sa.Column("rows", sa.BigInteger, nullable=False),
)
_IDENTITIES = sa.Table(
    "identities",
    METADATA,
    sa.Column("place", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("written", sa.BigInteger, nullable=False),
    sa.Column("after", sa.BigInteger, nullable=False),
    sa.Column("value", sa.LargeBinary),
)
# Made once they are needed: when a log of an earlier release is renewed, when a client first signs.
_LATE = ("identities", "openings", "requests")
_OPTIONAL = ("erased", *_LATE)  # which logs of earlier releases do not have
# Statements of every write; to build them takes longer than to run them.
_IN_ORDER = (
    sa.select(_IDENTITIES.c.written, _IDENTITIES.c.after, _IDENTITIES.c.value)
    .order_by(_IDENTITIES.c.place)
    .limit(sa.bindparam("most"))
)
_LAST = sa.select(_TRIALS.c.number, _TRIALS.c.link).order_by(_TRIALS.c.number.desc()).limit(1)
_NAMES = sa.select(_ERASED.c.salt, _ERASED.c.digest, _ERASED.c.rows)
_KNOWN = sa.select(_TRIALS.c.model, _TRIALS.c.client, _TRIALS.c.cell).where(
    sa.tuple_(_TRIALS.c.model, _TRIALS.c.client, _TRIALS.c.cell).in_(
        sa.bindparam("places", expanding=True)
    )
)


class Database:
    """The database of one log."""

    def __init__(self, url: str, wait: float) -> None:
        """Find out which database is meant; nothing is opened yet.

        Args:
            url: a path, `sqlite:///PATH`, or `postgresql://USER:PASSWORD@HOST/DATABASE`.
            wait: seconds that a transaction waits for those of other programs.

        Raises:
            CountermarkError: the address is not valid.
        """
        self._url, self._wait = url, wait
        name = _path_in(url)
        self.file: DatabaseFile | None = None
        if name is None:
            address = _postgresql(url)
            self.shown = address.render_as_string(hide_password=True)
            patience = (
                {"connect_timeout": max(2, math.ceil(wait))}
                if "connect_timeout" not in address.query
                else {}
            )
            options: dict[str, Any] = {
                "pool_pre_ping": True,
                "isolation_level": "READ COMMITTED",
                "connect_args": {"client_encoding": "utf8", **patience},
            }
            try:
                self.engine = sa.create_engine(address, **options)
            except ImportError as error:
                raise CountermarkError(
                    "a query log in PostgreSQL needs psycopg; pip install 'countermark[serve]'"
                ) from error
            return
        self.shown = f"sqlite:///{name}"
        statements = {
            table.name: str(sa.schema.CreateTable(table).compile(dialect=sqlite.dialect()))
            for table in METADATA.sorted_tables
        }
        self.file = file = DatabaseFile(name, statements, _OPTIONAL, wait)
        self.engine = _engine(file, file.writer, sa.pool.QueuePool, "BEGIN IMMEDIATE")
        self._readers = [
            _engine(file, functools.partial(file.reader, at_rest), sa.pool.NullPool, "BEGIN")
            for at_rest in (False, True)
        ]

    def create(self) -> None:
        """Create the file of a log, empty, if there is none.

        Raises:
            CountermarkError: a database of PostgreSQL cannot hold every name of a client, or
                release 0.1.0 kept the log of this address elsewhere. In a new log beside it, coins
                that clients already know would count as new.
        """
        if self.file is None:
            with self._named_errors(), self.engine.begin() as connection:
                encoding = connection.exec_driver_sql("SHOW server_encoding").scalar()
            if encoding != "UTF8":
                raise CountermarkError(
                    f"the database {self.shown} has the encoding {encoding}, which cannot hold "
                    "every client's name; make one with CREATE DATABASE ... ENCODING 'UTF8' "
                    "TEMPLATE template0, and move a log there with pg_dump"
                )
            return
        before = _path_of_0_1_0(self._url)
        if before is not None and not self.file.path.exists() and before.is_file():
            raise CountermarkError(
                f"there is no {self.file.path}, and release 0.1.0 kept the log of this address in "
                f"{before}; rename that file, or name it"
            )
        with self._named_errors():
            self.file.create()

    def check(self) -> None:
        """Check that a SQLite file is still where it was."""
        if self.file is not None:
            self.file.check()

    @contextlib.contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """Open a transaction that writes; among all processes, only one runs at a time.

        It is durable if the block ends without an error.
        """
        file = self.file
        if file is not None:
            file.check()
        with self._named_errors(), self.engine.begin() as connection:
            if file is None:
                # Commits are durable, whatever the server's default is.
                connection.exec_driver_sql("SET LOCAL synchronous_commit = on")
                self._limit_waiting(connection)
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
            yield connection
        if file is None:
            return
        file.check()  # what was written to a file without a name is lost with this process
        try:
            file.check_journal()
        except CountermarkError:
            # SQLite writes what it holds into the file; the next connection makes another journal.
            self.close()
            raise

    def reading(self, work: Callable[[sa.Connection], _Found], at_rest: bool = True) -> _Found:
        """Return what `work` finds in one transaction that only reads.

        A SQLite file that nobody uses is read as it is, without locks or files beside it. If
        another program has begun to use it meanwhile, `work` runs once more in an ordinary read
        transaction.
        """
        if self.file is None:
            with self._named_errors(), self.engine.begin() as connection:
                connection.exec_driver_sql("SET TRANSACTION READ ONLY")
                self._limit_waiting(connection)
                return work(connection)
        before = self.file.state()
        at_rest = at_rest and not any(before[1:])
        try:
            with self._named_errors(), self._readers[at_rest].begin() as connection:
                found = work(connection)
        except CountermarkError:
            if not at_rest or self.file.state() == before:
                raise
        else:
            if not at_rest or self.file.state() == before:
                return found
        return self.reading(work, at_rest=False)

    def empty_journal(self) -> None:
        """Move SQLite's write-ahead log into the database and truncate it.

        Until then, the write-ahead log still holds the pages as they were.

        Raises:
            CountermarkError: it cannot be done now.
        """
        if self.file is None:
            return
        try:
            with contextlib.closing(self.engine.raw_connection()) as connection:
                (busy, *_) = (
                    connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                )
        except sqlite3.Error as error:
            raise CountermarkError(
                f"the rows are erased, but {self.shown}-wal may still hold them ({error}); run the "
                "same again"
            ) from error
        if busy:
            raise CountermarkError(
                f"the rows are erased, but {self.shown}-wal still holds them while other programs "
                "read the log; run the same again"
            )

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()
        if self.file is not None:
            self.file.forget_journal()

    def _limit_waiting(self, connection: sa.Connection) -> None:
        connection.exec_driver_sql(  # in milliseconds
            f"SET LOCAL lock_timeout = {max(1, round(1000 * self._wait))}"
        )

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except sa.exc.DataError as error:
            raise RowError(
                f"the query log {self.shown} cannot store a row: {sentence(str(error.orig))}"
            ) from error
        except (sa.exc.SQLAlchemyError, UnicodeDecodeError, OSError) as error:
            cause = getattr(error, "orig", None) or error
            reason, advice = " ".join(str(cause).split())[:300], "check the database and its space"
            state = getattr(cause, "sqlstate", None) or getattr(cause, "sqlite_errorcode", 0) & 0xFF
            if state in _LOCKED:
                reason, advice = (
                    f"another program has locked it for more than {self._wait:g} seconds",
                    "end that program, or wait for it",
                )
            advice = _ADVICE.get(state, advice)
            raise CountermarkError(
                f"the query log {self.shown} cannot be used: {reason}; {advice}"
            ) from error


_LOCKED = {sqlite3.SQLITE_BUSY, "55P03"}
_ADVICE = {
    sqlite3.SQLITE_INTERRUPT: (
        "reading it takes more work than a log of its size can, so it is damaged or was made up"
    ),
    sqlite3.SQLITE_CANTOPEN: (
        "check that it can be read; a copy needs its -wal beside it, in a folder that can be "
        "written"
    ),
}


def create_tables(connection: sa.Connection) -> None:
    """Create the tables that are missing, but those that are made once they are needed."""
    METADATA.create_all(
        connection, [each for each in METADATA.sorted_tables if each.name not in _LATE]
    )


def read_format(connection: sa.Connection) -> list[Any] | None:
    """Read what the log says of its format, up to two values; `None` if it is not a log."""
    if not sa.inspect(connection).has_table("log_format"):
        return None
    return list(connection.scalars(sa.select(_FORMAT.c.format).limit(2)))


def write_format(connection: sa.Connection, name: str) -> None:
    """Store which format the log has."""
    connection.execute(_FORMAT.delete())
    connection.execute(_FORMAT.insert().values(format=name))


def add_identity(connection: sa.Connection, written: int, after: int, value: bytes | None) -> None:
    """Store what the identity of the log is from a row on, and with how many rows it was written.

    There is none in a part of the log that is void.
    """
    _IDENTITIES.create(connection, checkfirst=True)
    place = int(connection.scalar(sa.select(sa.func.count()).select_from(_IDENTITIES)) or 0)
    values = {"place": place, "written": written, "after": after, "value": value}
    connection.execute(_IDENTITIES.insert().values(values))


def identities(connection: sa.Connection, most: int) -> list[Sequence[Any]]:
    """Read what `add_identity` stored, in order: rows then, the last row before it, identity."""
    if not has(connection, _IDENTITIES):
        return []
    return list(connection.execute(_IN_ORDER, {"most": most}))


def link_of(connection: sa.Connection, number: int) -> Any:
    """Read the link of a row; `None` if there is no such row."""
    return connection.scalar(sa.select(_TRIALS.c.link).where(_TRIALS.c.number == number))


def insert(connection: sa.Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows."""
    connection.execute(_TRIALS.insert(), rows)


def last(connection: sa.Connection) -> tuple[Any, Any] | None:
    """Read the number and link of the last row; `None` if there are no rows."""
    found = connection.execute(_LAST).first()
    return None if found is None else (found.number, found.link)


def known(connection: sa.Connection, places: Sequence[Place]) -> set[Place]:
    """Find which of some places the log already has."""
    found: set[Place] = set()
    for start in range(0, len(places), _PAGE):
        wanted = {"places": places[start : start + _PAGE]}
        found |= {
            (model, client, cell) for model, client, cell in connection.execute(_KNOWN, wanted)
        }
    return found


def page(connection: sa.Connection, after: int, most: int = _PAGE) -> list[dict[str, Any]]:
    """Read some rows after a number."""
    wanted = (
        sa.select(_TRIALS).where(_TRIALS.c.number > after).order_by(_TRIALS.c.number).limit(most)
    )
    found: list[dict[str, Any]] = []
    size = 0
    with connection.execution_options(stream_results=True, max_row_buffer=20).execute(
        wanted
    ) as result:
        for row in result.mappings():
            found.append(dict(row))
            size += sum(len(value) for value in row.values() if isinstance(value, bytes | str))
            if size >= LARGEST:
                break
    return found


def has_more(connection: sa.Connection, after: int) -> bool:
    """Tell whether there is a row after a number, without reading the rest of it."""
    return (
        connection.execute(
            sa.select(_TRIALS.c.number).where(_TRIALS.c.number > after).limit(1)
        ).first()
        is not None
    )


def erase(connection: sa.Connection, client: str, columns: Sequence[str]) -> int:
    """Empty some columns of a client's rows and return how many rows there were."""
    emptied = dict.fromkeys(columns)
    return int(
        connection.execute(
            _TRIALS.update().where(_TRIALS.c.client == client).values(emptied)
        ).rowcount
    )


def add_erased(connection: sa.Connection, salt: bytes, digest: bytes, rows: int) -> None:
    """Remember a client who was erased."""
    connection.execute(_ERASED.insert().values(salt=salt, digest=digest, rows=rows))


def erased_names(connection: sa.Connection) -> Iterator[Sequence[Any]]:
    """Yield the salt, digest and number of rows of each client who was erased."""
    if has(connection, _ERASED):
        yield from connection.execute(_NAMES)


def erased_rows(connection: sa.Connection) -> int:
    """Count the rows of which only the digests are left."""
    return int(connection.scalar(sa.select(sa.func.count()).where(_TRIALS.c.salt.is_(None))) or 0)


def has(connection: sa.Connection, table: sa.Table) -> bool:
    """Tell whether the log has a table; a connection that has seen one does not look again."""
    seen: set[str] = connection.info.setdefault(_SEEN, set())
    if table.name not in seen and sa.inspect(connection).has_table(table.name):
        seen.add(table.name)
    return table.name in seen


def _path_in(url: str) -> str | None:
    """Return the path of a SQLite file, unchanged; `None` for an address of another kind."""
    scheme, marked, rest = url.partition("://")
    path = (
        url
        if not marked or "/" in scheme
        else rest[1:]
        if scheme == "sqlite" and rest[:1] in ("", "/")
        else None
    )
    if path in ("", ":memory:"):
        raise CountermarkError("a query log in memory keeps nothing; give the path of a file")
    return path


def _path_of_0_1_0(url: str) -> Path | None:
    """Find where release 0.1.0 kept the log of an address.

    That release interpreted a path as a URL.
    """
    with contextlib.suppress(sa.exc.ArgumentError, ValueError):
        database = sa.make_url(url if "://" in url else f"sqlite:///{url}").database
        return Path(database).absolute() if database else None
    return None


def _postgresql(url: str) -> sa.URL:
    try:
        address = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError) as error:
        raise CountermarkError(
            f"{url!r} is no address of a query log; give a path or postgresql://HOST/DATABASE"
        ) from error
    if address.drivername not in ("postgres", "postgresql", "postgresql+psycopg"):
        raise CountermarkError(
            "a query log is a path, sqlite:///PATH or postgresql://HOST/DATABASE, not "
            f"{address.drivername}"
        )
    return address.set(drivername="postgresql+psycopg")


def _engine(
    file: DatabaseFile, opened: Callable[[], sqlite3.Connection], pool: type[sa.Pool], begin: str
) -> sa.Engine:
    """Create an engine whose connections begin their own transactions."""
    engine = sa.create_engine("sqlite://", creator=opened, poolclass=pool)

    def begun(connection: sa.Connection) -> None:
        driver = connection.connection.driver_connection
        assert isinstance(driver, sqlite3.Connection)
        file.limit_work(driver)
        connection.exec_driver_sql(begin)

    sa.event.listen(engine, "begin", begun)
    return engine
