"""The query log: each client's trials, in order, append-only and linked in a hash chain.

It is the owner's evidence. Only a client's first trial in a cell is stored, and it is durable
before its answer leaves. Each row has its own digest (with a salt), and the chain runs over the
digests: a client's rows can be erased on request, and the chain can still be verified. Whoever can
write the database can write a whole new chain; what they cannot change is a head that was published
before (`countermark log head`).

This module defines what the rows mean; `countermark.guard.database` stores them, in SQLite (a file)
or PostgreSQL (where several replicas of the service write one log).
"""

import contextlib
import hashlib
import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from countermark.errors import CountermarkError
from countermark.files import JSON_LIMIT, canonical_json, read_bytes
from countermark.guard.sqlite import LARGEST, RowError
from countermark.text import brief
from countermark.timestamps import decode_token

if TYPE_CHECKING:
    import sqlalchemy as sa

LOG_FORMAT = "countermark log 1"
_ROW, _LINK = b"\x03", b"\x04"
_ORIGIN = hashlib.sha256(_LINK + LOG_FORMAT.encode()).digest()
_OVERHEAD = 1 << 12  # bytes of a row besides its image and its request
_SALT = 16  # bytes
_MOST = 1 << 62  # rows
_KINDS = {"model": str, "client": str, "cell": bytes, "image": bytes, "request": bytes}


@dataclass(frozen=True)
class Row:
    """One trial of one client.

    Attributes:
        model: SHA-256 of the weights that answered, in hexadecimal.
        client: name of the account.
        cell: the cell of the trial.
        image: the query, uint8 values in the order (c, h, w).
        heads: the smaller of the two classes.
        tails: the larger of the two classes.
        chance: probability of tails, in 65536ths.
        answer: the class that was returned.
        day: days since 1970-01-01 (UTC) when it was asked.
        request: the client's signed request that contains the query (`guard.requests`); empty if
            clients do not sign.
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
        """Model, client and cell, which together have at most one trial."""
        return self.model, self.client, self.cell

    def digest(self, salt: bytes) -> bytes:
        """Compute SHA-256 over the salt and every field, each preceded by its length.

        Without the salt, the digest reveals nothing about an erased row.
        """
        parts = [salt, self.model.encode(), self.client.encode(), self.cell, self.image]
        parts += [
            number.to_bytes(8, "big")
            for number in (self.heads, self.tails, self.chance, self.answer, self.day)
        ]
        parts.append(self.request)
        framed = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
        return hashlib.sha256(_ROW + LOG_FORMAT.encode() + framed).digest()


@dataclass(frozen=True)
class Head:
    """The state of a log.

    Attributes:
        rows: number of rows.
        hash: the hash at the end of the chain, in hexadecimal.
        token: a timestamp authority's token for this head, if there is one.
    """

    rows: int
    hash: str
    token: bytes | None = None

    def message(self) -> bytes:
        """Return the message that a timestamp of this head covers."""
        return canonical_json({"format": LOG_FORMAT, "rows": self.rows, "hash": self.hash})


class QueryLog:
    """An open log."""

    def __init__(self, url: str, create: bool = True, wait: float = 5.0) -> None:
        """Open a log.

        Args:
            url: a path (taken literally), `sqlite:///PATH`, or
                `postgresql://USER:PASSWORD@HOST/DATABASE`.
            create: whether to create the log if there is none. Otherwise a missing log is an error,
                and nothing is written before `append` or `erase`.
            wait: seconds that a transaction waits for a lock that another program holds.

        Raises:
            CountermarkError: the database cannot be opened, or is not a log of this format.
        """
        try:
            from countermark.guard import database
        except ImportError as error:
            raise CountermarkError(
                "a query log needs SQLAlchemy; pip install 'countermark[serve]'"
            ) from error
        self._sql, self._database = database, database.Database(url, wait)
        self.shown = self._database.shown
        self._created = False
        if create:
            self._database.create()
        found = self._database.reading(database.read_format)
        if found is not None or not create:
            self._check_format(found)
        if create:
            with self._using():
                pass

    def append(self, rows: Sequence[Row]) -> list[bool]:
        """Store rows in one durable transaction, except those that the log already has.

        A row is left out if the log has one of the same model, client and cell. Every row of an
        erased client is left out as well: they may know their coins, so their queries are no longer
        trials.

        Returns:
            For each row, whether it is new and was stored.

        Raises:
            RowError: a row is not valid for any log; nothing of this call is stored.
            CountermarkError: the database cannot be written; nothing of this call is stored.
        """
        for row in rows:
            flaw = _flaw(row)
            if flaw is not None:
                raise RowError(f"this is no trial for the query log {self.shown}: {flaw}")
        fresh, values = [], []
        with self._using() as connection:
            head = self._last(connection)
            number, link = head.rows, bytes.fromhex(head.hash)
            known = self._sql.known(connection, sorted({row.place for row in rows}))
            gone = self._gone(connection, {row.client for row in rows})
            for row in rows:
                fresh.append(row.place not in known and row.client not in gone)
                if not fresh[-1]:
                    continue
                known.add(row.place)
                salt = secrets.token_bytes(_SALT)
                digest = row.digest(salt)
                number, link = number + 1, _next(link, number + 1, digest)
                values.append(
                    {"number": number, **asdict(row), "salt": salt, "digest": digest, "link": link}
                )
            if values:
                self._sql.insert(connection, values)
        return fresh

    def check(self) -> None:
        """Check, without a transaction, that the file of the log is still where it was.

        Raises:
            CountermarkError: the file was removed, renamed or replaced.
        """
        self._database.check()

    def head(self) -> Head:
        """Return the current state of the log.

        Once it is published or timestamped, the rows up to it cannot be changed without detection.
        """
        return self._database.reading(self._last)

    def rows(self, published: Head | None = None) -> Iterator[Row | None]:
        """Yield all rows in order and verify the chain on the way; `None` for an erased row.

        Args:
            published: an earlier head of this log, which the chain must still lead to.

        Raises:
            CountermarkError: a row was changed, removed, added or moved (the message says which),
                or the log does not lead to the published head.
        """
        number, link = 0, _ORIGIN
        while True:
            self._compare(number, link, published)
            page = self._page(number)
            for found in page:
                row, link = self._checked(found, number + 1, link)
                number += 1
                self._compare(number, link, published)
                yield row
            if not page:
                break
        if published is not None and number < published.rows:
            raise CountermarkError(
                f"{self.shown} has {number} rows, the published head has {published.rows}; the "
                "log's tail was cut off"
            )

    def erase(self, client: str) -> int:
        """Erase what the log holds of a client: name, queries and answers.

        The digests of the rows stay, so the chain can still be verified. A salted digest of the
        name stays as well: no row of this client is stored again (`append`), and the account still
        counts among those that a trace corrects for.

        Returns:
            How many rows were erased.

        Raises:
            CountermarkError: the database cannot be written, or still keeps what was erased in a
                file of its own.
        """
        with self._using() as connection:
            count = self._sql.erase(
                connection, client, [*(field.name for field in fields(Row)), "salt"]
            )
            if count:
                salt = secrets.token_bytes(_SALT)
                self._sql.add_erased(connection, salt, _name_digest(salt, client), count)
        self._database.empty_journal()
        return count

    def erased(self) -> int:
        """Return how many accounts were erased, at most.

        Each row that was erased by a release that did not yet count accounts counts as one account.

        Raises:
            CountermarkError: the log cannot be read, or what it says of erased clients does not
                match its rows.
        """

        def count(connection: "sa.Connection") -> tuple[int, int, int]:
            sizes = [rows for _, _, rows in self._erased(connection)]
            return len(sizes), sum(sizes), self._sql.erased_rows(connection)

        accounts, counted, rows = self._database.reading(count)
        if counted > rows:
            raise CountermarkError(
                f"{self.shown}: the table of erased clients was changed; it counts {counted} rows, "
                f"{rows} are erased"
            )
        return accounts + rows - counted

    def __enter__(self) -> "QueryLog":
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._database.close()

    @contextlib.contextmanager
    def _using(self) -> Iterator["sa.Connection"]:
        """Open a transaction that writes; the first one creates what is missing."""
        with self._database.writing() as connection:
            if not self._created:
                found = self._sql.read_format(connection)
                self._sql.create_tables(connection)
                if found is None:
                    self._sql.write_format(connection, LOG_FORMAT)
            yield connection
        self._created = True

    def _check_format(self, found: Sequence[Any] | None) -> None:
        if not found:
            raise CountermarkError(f"{self.shown} holds no query log; check the address")
        if found != [LOG_FORMAT]:
            raise CountermarkError(
                f"{self.shown} is a log of the format {brief(found[0])}, not {LOG_FORMAT!r}; use "
                "the release that wrote it"
            )

    def _last(self, connection: "sa.Connection") -> Head:
        found = self._sql.last(connection)
        if found is None:
            return Head(0, _ORIGIN.hex())
        number, link = found
        if type(number) is not int or not 0 < number < _MOST or len(_binary(link)) != len(_ORIGIN):
            raise CountermarkError(
                f"{self.shown}: the last row was changed after it was written; see countermark log "
                "check"
            )
        return Head(number, _binary(link).hex())

    def _erased(self, connection: "sa.Connection") -> list[tuple[bytes, bytes, int]]:
        """Read the salt and digest of each erased name, and how many rows it had."""
        found = []
        for salt, digest, rows in self._sql.erased_names(connection):
            if (
                (len(_binary(salt)), len(_binary(digest))) != (_SALT, len(_ORIGIN))
                or type(rows) is not int
                or rows < 1
            ):
                raise CountermarkError(
                    f"{self.shown}: the table of erased clients was changed; restore the log from "
                    "a backup"
                )
            found.append((salt, digest, rows))
        return found

    def _gone(self, connection: "sa.Connection", clients: set[str]) -> set[str]:
        """Find which of some clients were erased."""
        erased = self._erased(connection)
        return {
            client
            for client in clients
            if any(_name_digest(salt, client) == digest for salt, digest, _ in erased)
        }

    def _page(self, number: int) -> list[dict[str, Any]]:
        """Read some rows after a number.

        If they cannot be read, read the next row alone to find out whether it is the cause.
        """
        try:
            return self._database.reading(lambda connection: self._sql.page(connection, number))
        except CountermarkError:
            # If the database is unavailable, this call raises an error that says so.
            if not self._database.reading(
                lambda connection: self._sql.has_more(connection, number)
            ):
                raise
        try:
            return self._database.reading(lambda connection: self._sql.page(connection, number, 1))
        except CountermarkError as error:
            raise CountermarkError(
                f"{self.shown}: row {number + 1} cannot be read; it was changed after it was "
                "written"
            ) from error

    def _compare(self, number: int, link: bytes, published: Head | None) -> None:
        if published is not None and number == published.rows and link.hex() != published.hash:
            raise CountermarkError(
                f"{self.shown}: the first {number} rows do not lead to the published head; the log "
                "was written anew"
            )

    def _checked(
        self, found: Mapping[str, Any], expected: int, link: bytes
    ) -> tuple[Row | None, bytes]:
        number = found["number"]
        if type(number) is not int or number != expected:
            raise CountermarkError(f"{self.shown}: row {expected} is missing; it was removed")
        following = _next(link, number, _binary(found["digest"]))
        if _binary(found["link"]) != following:
            raise CountermarkError(
                f"{self.shown}: row {number} does not follow from the rows before it; it was "
                "changed, moved or put in"
            )
        values = {field.name: found[field.name] for field in fields(Row)}
        if found["salt"] is None:
            if any(value is not None for value in values.values()):
                raise CountermarkError(
                    f"{self.shown}: row {number} is erased in part; it was changed after it was "
                    "written"
                )
            return None, following
        row = Row(**values)
        flaw = _flaw(row)
        if flaw is not None or row.digest(_binary(found["salt"])) != found["digest"]:
            raise CountermarkError(
                f"{self.shown}: row {number} was changed after it was "
                f"written{f' ({flaw})' if flaw else ''}"
            )
        return row, following


def _flaw(row: Row) -> str | None:
    """Say why a row is not a trial, whoever wrote it; `None` if it may be one."""
    values = vars(row)
    for name, value in values.items():
        if type(value) is not _KINDS.get(name, int):
            return f"its {name} is of another kind than a {name} can be"
    try:
        size = sum(len(value.encode()) for value in (row.model, row.client))
    except UnicodeEncodeError:
        return "a name is not Unicode text"
    if not (row.model and row.client and row.cell and row.image):
        return "a name, its cell or its image is empty"
    if not 0 <= row.heads < row.tails < 1 << 16 or row.answer not in (row.heads, row.tails):
        return f"{row.answer} is not one of two classes {row.heads} < {row.tails}"
    if not 0 < row.chance < 1 << 16:
        return f"its chance is {row.chance} of 65536, and not between them"
    if not 0 <= row.day < 1 << 31:
        return (
            f"its day is {row.day}, and none since 1970-01-01; set the clock of the machine that "
            "wrote it"
        )
    if size + len(row.cell) + len(row.image) + len(row.request) > LARGEST - _OVERHEAD:
        return f"it has more than {LARGEST} bytes"
    return None


def _binary(value: object) -> bytes:
    """Return a binary column's value, or nothing for a value of another kind.

    A damaged file may hold such a value.
    """
    return value if isinstance(value, bytes) else b""


def _name_digest(salt: bytes, client: str) -> bytes:
    return hashlib.sha256(salt + client.encode()).digest()


def _next(link: bytes, number: int, digest: bytes) -> bytes:
    return hashlib.sha256(_LINK + link + number.to_bytes(8, "big") + digest).digest()


def read_head(path: Path) -> Head:
    """Read a published head, as `countermark log head` printed it.

    Raises:
        CountermarkError: the file is missing or does not hold a head.
    """
    try:
        value = json.loads(read_bytes(path, JSON_LIMIT))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        value = {}
    rows, link = value.get("rows"), value.get("hash")
    if (
        value.get("format") != LOG_FORMAT
        or type(rows) is not int
        or rows < 0
        or not isinstance(link, str)
        or len(link) != 64
    ):
        raise CountermarkError(
            f"{path} is not the head of a query log, as `countermark log head` writes it"
        )
    return Head(rows, link, decode_token(value.get("token"), f"{path}: token"))
