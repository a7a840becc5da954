"""The query log: the trials that each client was given, in order, append-only and chained by hashes.

It is the owner's evidence. Only a client's first trial in a cell is stored, durable before its answer leaves. Each row has a digest of its
own (with a salt), and the chain runs over the digests: a client's rows can be erased on request and the chain still checks. Whoever can
write the database can write a whole new chain; what he cannot change is a head that was published before (`countermark log head`).

SQLite (a file) or PostgreSQL (several replicas of the service write one log).
"""

import contextlib
import hashlib
import json
import secrets
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from countermark.errors import CountermarkError, brief
from countermark.files import JSON_LIMIT, canonical_json, read_bytes
from countermark.timestamps import decode_token

LOG_FORMAT = "countermark log 1"
_ROW, _LINK = b"\x03", b"\x04"
_ORIGIN = hashlib.sha256(_LINK + LOG_FORMAT.encode()).digest()
_COLUMNS = {
    **dict.fromkeys(("model", "client"), sa.Text),
    **dict.fromkeys(("cell", "image"), sa.LargeBinary),
    **dict.fromkeys(("heads", "tails", "chance", "answer", "day"), sa.Integer),
    "request": sa.LargeBinary,
}
_PAGE = 500  # rows at once
_LOCK = 0x636F756E7465726D  # of PostgreSQL's advisory locks


@dataclass(frozen=True)
class Row:
    """One trial of one client.

    Attributes:
        model: SHA-256 of the weights that answered, hexadecimal.
        client: name of the account.
        cell: the cell.
        image: the query, uint8 values in the order (c, h, w).
        heads: the smaller class of the two.
        tails: the larger one.
        chance: of tails, in 65536ths.
        answer: the class that was returned.
        day: days since 1970-01-01 (UTC) when it was asked.
        request: the client's signed request that holds the query (`guard.requests`); empty where clients do not sign.
    """

    model: str
    client: str
    cell: bytes
    image: bytes
    heads: int
    tails: int
    chance: int
    answer: int
    day: int
    request: bytes = b""

    @property
    def place(self) -> tuple[str, str, bytes]:
        """What has one trial at most: model, client, cell."""
        return self.model, self.client, self.cell

    def digest(self, salt: bytes) -> bytes:
        """SHA-256 over the salt and every field, each with its length; it tells nothing about an erased row without the salt."""
        parts = [salt, self.model.encode(), self.client.encode(), self.cell, self.image]
        parts += [number.to_bytes(8, "big") for number in (self.heads, self.tails, self.chance, self.answer, self.day)]
        parts.append(self.request)
        framed = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
        return hashlib.sha256(_ROW + LOG_FORMAT.encode() + framed).digest()


@dataclass(frozen=True)
class Head:
    """The state of a log: how many rows it has, the hash that all of them lead to, and an authority's token if it has one."""

    rows: int
    hash: str
    token: bytes | None = None

    def message(self) -> bytes:
        """What a timestamp of this head stamps."""
        return canonical_json({"format": LOG_FORMAT, "rows": self.rows, "hash": self.hash})


class QueryLog:
    """An open log."""

    def __init__(self, url: str, create: bool = True, wait: float = 5.0) -> None:
        """Open a log.

        Args:
            url: a path, `sqlite:///PATH`, or `postgresql://USER:PASSWORD@HOST/DATABASE`.
            create: make it if there is none; else that is an error.
            wait: seconds that a transaction waits for another program that holds the log.

        Raises:
            CountermarkError: the database cannot be opened, or is not a log of this format.
        """
        self._engine = _engine(url, wait)
        self.shown = self._engine.url.render_as_string(hide_password=True)
        database = self._engine.url.database
        missing = self._engine.dialect.name == "sqlite" and not Path(str(database)).exists()
        if missing and not create:
            raise CountermarkError(f"there is no query log {database}; check the path")
        with self._using() as connection:
            if not create and not sa.inspect(connection).has_table("log_format"):
                raise CountermarkError(f"{self.shown} holds no query log; check the address")
            _METADATA.create_all(connection)
            found = connection.scalar(sa.select(_FORMAT.c.format))
            if found is None:
                connection.execute(_FORMAT.insert().values(format=LOG_FORMAT))
            elif found != LOG_FORMAT:
                raise CountermarkError(
                    f"{self.shown} is a log of the format {brief(found)}, not {LOG_FORMAT!r}; use the release that wrote it"
                )

    def append(self, rows: Sequence[Row]) -> list[bool]:
        """Store rows in one durable transaction; a row of a model, client and cell that the log has is left out.

        So is every row of a client that was erased: he may know his coins, so what he asks is no trial any more.

        Returns:
            For each row, whether it is new and stored.

        Raises:
            CountermarkError: the database cannot be written; nothing of this call is stored.
        """
        fresh, values = [], []
        with self._using() as connection:
            head = _head(connection)
            number, link = head.rows, bytes.fromhex(head.hash)
            known, gone = _known(connection, rows), _gone(connection, {row.client for row in rows})
            for row in rows:
                fresh.append(row.place not in known and row.client not in gone)
                if not fresh[-1]:
                    continue
                known.add(row.place)
                salt = secrets.token_bytes(16)
                digest = row.digest(salt)
                number, link = number + 1, _next(link, number + 1, digest)
                values.append({"number": number, **asdict(row), "salt": salt, "digest": digest, "link": link})
            if values:
                connection.execute(_TRIALS.insert(), values)
        return fresh

    def head(self) -> Head:
        """The state now; publish it (or have it timestamped), and rows up to it cannot be changed unseen."""
        with self._using() as connection:
            return _head(connection)

    def rows(self, published: Head | None = None) -> Iterator[Row | None]:
        """All rows in order, the chain checked on the way; none for an erased row.

        Args:
            published: a head of this log from earlier, which it must still lead to.

        Raises:
            CountermarkError: a row was changed, removed, added or moved (it says which), or the log does not lead to the published head.
        """
        number, link = 0, _ORIGIN
        while True:
            self._compare(number, link, published)
            page = self._page(number)
            for found in page:
                row, link = self._checked(dict(found), number + 1, link)
                number += 1
                self._compare(number, link, published)
                yield row
            if not page:
                break
        if published is not None and number < published.rows:
            raise CountermarkError(f"{self.shown} has {number} rows, the published head has {published.rows}; the log's tail was cut off")

    def erase(self, client: str) -> int:
        """Erase what the log holds of a client: name, queries, answers. The rows' digests stay, so the chain still checks.

        So does a salted digest of the name: no row of this client is stored again (`append`), and his account keeps its place among
        those that a trace corrects for.

        Returns:
            How many rows were erased.

        Raises:
            CountermarkError: the database cannot be written, or still keeps what was erased in a file of its own.
        """
        emptied = dict.fromkeys((*(field.name for field in fields(Row)), "salt"))
        with self._using() as connection:
            count = int(connection.execute(_TRIALS.update().where(_TRIALS.c.client == client).values(emptied)).rowcount)
            if count:
                salt = secrets.token_bytes(16)
                connection.execute(_ERASED.insert().values(salt=salt, digest=_name_digest(salt, client), rows=count))
        if self._engine.dialect.name == "sqlite":
            self._empty_journal()
        return count

    def erased(self) -> int:
        """How many accounts were erased, at most: rows that a release erased which did not count accounts are each held for one."""
        with self._using() as connection:
            accounts, counted = connection.execute(sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(_ERASED.c.rows), 0))).one()
            rows = connection.scalar(sa.select(sa.func.count()).where(_TRIALS.c.salt.is_(None)))
        return int(accounts) + max(0, int(rows or 0) - int(counted))

    def __enter__(self) -> "QueryLog":
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @contextlib.contextmanager
    def _using(self) -> Iterator[sa.Connection]:
        """One transaction, alone among those of all processes."""
        try:
            with self._engine.begin() as connection:
                if self._engine.dialect.name == "postgresql":
                    connection.exec_driver_sql("SET LOCAL synchronous_commit = on")  # whatever the server's default is
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
                yield connection
        except (sa.exc.SQLAlchemyError, UnicodeDecodeError) as error:
            reason = " ".join(str(getattr(error, "orig", None) or error).split())[:300]
            raise CountermarkError(f"the query log {self.shown} cannot be used: {reason}; check the database and its space") from error

    def _page(self, number: int) -> Sequence[Mapping[Any, Any]]:
        """The rows after a number, some at once; where they cannot be read, one by one to find out which."""
        wanted = sa.select(_TRIALS).where(_TRIALS.c.number > number).order_by(_TRIALS.c.number)
        try:
            with self._using() as connection:
                return connection.execute(wanted.limit(_PAGE)).mappings().all()
        except CountermarkError:
            with self._using() as connection:  # the database itself may be away: then this says so
                connection.execute(wanted.with_only_columns(_TRIALS.c.number).limit(1)).all()
        try:
            with self._using() as connection:
                return connection.execute(wanted.limit(1)).mappings().all()
        except CountermarkError as error:
            raise CountermarkError(f"{self.shown}: row {number + 1} cannot be read; it was changed after it was written") from error

    def _empty_journal(self) -> None:
        """Bring all of SQLite's write-ahead log into the database and cut it to nothing: it still holds the pages as they were."""
        try:
            with contextlib.closing(self._engine.raw_connection()) as connection:
                (busy, *_) = connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        except sqlite3.Error as error:
            raise CountermarkError(
                f"the rows are erased, but {self.shown}-wal may still hold them ({error}); run the same again"
            ) from error
        if busy:
            raise CountermarkError(
                f"the rows are erased, but {self.shown}-wal still holds them while other programs read the log; run the same again"
            )

    def _compare(self, number: int, link: bytes, published: Head | None) -> None:
        if published is not None and number == published.rows and link.hex() != published.hash:
            raise CountermarkError(f"{self.shown}: the first {number} rows do not lead to the published head; the log was written anew")

    def _checked(self, found: Mapping[str, Any], expected: int, link: bytes) -> tuple[Row | None, bytes]:
        number = found["number"]
        if number != expected:
            raise CountermarkError(f"{self.shown}: row {expected} is missing; it was removed")
        following = _next(link, number, _binary(found["digest"]))
        if _binary(found["link"]) != following:
            raise CountermarkError(f"{self.shown}: row {number} does not follow from the rows before it; it was changed, moved or put in")
        values = {field.name: found[field.name] for field in fields(Row)}
        if found["salt"] is None:
            if any(value is not None for value in values.values()):
                raise CountermarkError(f"{self.shown}: row {number} is erased in part; it was changed after it was written")
            return None, following
        try:
            row = Row(**values)
            same = row.digest(found["salt"]) == found["digest"]
        except (TypeError, AttributeError, OverflowError, ValueError):  # a value of another kind
            same = False
        if not same:
            raise CountermarkError(f"{self.shown}: row {number} was changed after it was written")
        return row, following


_METADATA = sa.MetaData()
_FORMAT = sa.Table("log_format", _METADATA, sa.Column("format", sa.Text, nullable=False))
_TRIALS = sa.Table(
    "trials",
    _METADATA,
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    *(sa.Column(name, kind) for name, kind in _COLUMNS.items()),
    sa.Column("salt", sa.LargeBinary),
    sa.Column("digest", sa.LargeBinary, nullable=False),
    sa.Column("link", sa.LargeBinary, nullable=False),
    sa.UniqueConstraint("model", "client", "cell"),
)
_ERASED = sa.Table(
    "erased",
    _METADATA,
    sa.Column("digest", sa.LargeBinary, primary_key=True),
    sa.Column("salt", sa.LargeBinary, nullable=False),
    sa.Column("rows", sa.BigInteger, nullable=False),
)


def _engine(url: str, wait: float) -> sa.Engine:
    try:
        address = sa.make_url(url if "://" in url else f"sqlite:///{url}")
        if address.drivername in ("postgres", "postgresql"):
            address = address.set(drivername="postgresql+psycopg")
        if address.drivername not in ("sqlite", "postgresql+psycopg"):
            raise CountermarkError(f"a query log is a path, sqlite:///PATH or postgresql://HOST/DATABASE, not {address.drivername}")
        options: dict[str, Any] = {} if address.drivername == "sqlite" else {"pool_pre_ping": True, "isolation_level": "READ COMMITTED"}
        engine = sa.create_engine(address, **options)
    except (sa.exc.ArgumentError, ValueError) as error:
        raise CountermarkError(f"{url!r} is no address of a query log; give a path or postgresql://HOST/DATABASE") from error
    except ImportError as error:
        raise CountermarkError("a query log in PostgreSQL needs psycopg; pip install 'countermark[serve]'") from error
    if address.drivername == "sqlite":
        if address.database in (None, "", ":memory:"):
            raise CountermarkError("a query log in memory keeps nothing; give the path of a file")
        sa.event.listen(engine, "connect", lambda connection, _record: _set_up(connection, wait))
        sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
    return engine


def _set_up(connection: Any, wait: float) -> None:
    """SQLite: transactions are begun by us, survive a loss of power, and wait for each other."""
    connection.isolation_level = None
    for pragma in (f"busy_timeout = {round(1000 * wait)}", "journal_mode = WAL", "synchronous = FULL", "secure_delete = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _head(connection: sa.Connection) -> Head:
    found = connection.execute(sa.select(_TRIALS.c.number, _TRIALS.c.link).order_by(_TRIALS.c.number.desc()).limit(1)).first()
    return Head(0, _ORIGIN.hex()) if found is None else Head(int(found.number), _binary(found.link).hex())


def _binary(value: object) -> bytes:
    """A binary column; nothing for a value of another kind, which a damaged file may hold."""
    return bytes(value) if isinstance(value, bytes | bytearray | memoryview) else b""


def _known(connection: sa.Connection, rows: Sequence[Row]) -> set[tuple[str, str, bytes]]:
    """Those places of `rows` that the log has."""
    place = sa.tuple_(_TRIALS.c.model, _TRIALS.c.client, _TRIALS.c.cell)
    found: set[tuple[str, str, bytes]] = set()
    for start in range(0, len(rows), _PAGE):
        asked = sorted({row.place for row in rows[start : start + _PAGE]})
        wanted = sa.select(_TRIALS.c.model, _TRIALS.c.client, _TRIALS.c.cell).where(place.in_(asked))
        found |= {(model, client, _binary(cell)) for model, client, cell in connection.execute(wanted)}
    return found


def _gone(connection: sa.Connection, clients: set[str]) -> set[str]:
    """Those clients that were erased."""
    erased = [(_binary(salt), _binary(digest)) for salt, digest in connection.execute(sa.select(_ERASED.c.salt, _ERASED.c.digest))]
    return {client for client in clients if any(_name_digest(salt, client) == digest for salt, digest in erased)}


def _name_digest(salt: bytes, client: str) -> bytes:
    return hashlib.sha256(salt + client.encode()).digest()


def _next(link: bytes, number: int, digest: bytes) -> bytes:
    return hashlib.sha256(_LINK + link + number.to_bytes(8, "big") + digest).digest()


def read_head(path: Path) -> Head:
    """Read a published head, as `countermark log head` printed it.

    Raises:
        CountermarkError: the file is missing or holds none.
    """
    try:
        value = json.loads(read_bytes(path, JSON_LIMIT))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        value = {}
    rows, link = value.get("rows"), value.get("hash")
    if value.get("format") != LOG_FORMAT or type(rows) is not int or rows < 0 or not isinstance(link, str) or len(link) != 64:
        raise CountermarkError(f"{path} is not the head of a query log, as `countermark log head` writes it")
    return Head(rows, link, decode_token(value.get("token"), f"{path}: token"))
