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
import itertools
import json
import re
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from countermark.errors import CountermarkError
from countermark.files import JSON_LIMIT, canonical_json, read_bytes
from countermark.guard.requests import (
    NOTHING_BEFORE,
    ConflictError,
    Opening,
    Request,
    belongs,
)
from countermark.guard.sqlite import LARGEST, RowError
from countermark.text import brief
from countermark.timestamps import decode_token

if TYPE_CHECKING:
    import sqlalchemy as sa

LOG_FORMAT = "countermark log 1"
"""The format of rows and heads."""
_WITH_IDENTITY = "countermark log 2"
_ROW, _LINK, _IDENTITY = b"\x03", b"\x04", b"\x05"
_ORIGIN = hashlib.sha256(_LINK + LOG_FORMAT.encode()).digest()
_OVERHEAD = 1 << 12  # bytes of a row besides its image and its request
_SALT = 16  # bytes, as an identity has
_MOST_IDENTITIES = 100  # each row is compared with all of them
_KNOWN_ENDS = 1000  # which a writer remembers
_HASH = re.compile("[0-9a-f]{64}")
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
        log: identity of the log under which the coin was drawn; empty in a log that has none. It is
            `None` in a row that is void, since it was stored after the log had lost others, when
            clients may have known its coin. The log knows it, and a row does not store it.
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
    log: bytes | None = field(default=b"", compare=False)

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


_STORED = tuple(each.name for each in fields(Row) if each.name != "log")


@dataclass(frozen=True)
class _Identity:
    """From a row on, the log has this identity; `None` where rows are void.

    Attributes:
        written: how many rows the log had when this was written.
        after: the last row before it.
        value: the identity.
    """

    written: int
    after: int
    value: bytes | None


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
    """An open log.

    A log has an identity, 16 random bytes that every coin of its trials depends on. Where a part of
    the log was lost, clients may know coins whose first trials are gone: it gets another identity
    then (`renew`), and with it new coins. Whoever writes remembers what they stored, and does not
    write to a log that has lost some of it.

    Attributes:
        shown: its address, without a password.
        shared: whether other machines may write it too.
    """

    def __init__(
        self, url: str, create: bool = True, wait: float = 5.0, head: Head | None = None
    ) -> None:
        """Open a log.

        Args:
            url: a path (taken literally), `sqlite:///PATH`, or
                `postgresql://USER:PASSWORD@HOST/DATABASE`.
            create: whether to create the log if there is none. Otherwise a missing log is an error,
                and nothing is written before `append` or `erase`.
            wait: seconds that a transaction waits for a lock that another program holds.
            head: a head that was published before; a log that does not lead to it is not opened.

        Raises:
            CountermarkError: the database cannot be opened, is not a log of this format, or does
                not lead to the head.
        """
        try:
            from countermark.guard import database, signed
        except ImportError as error:
            raise CountermarkError(
                "a query log needs SQLAlchemy; pip install 'countermark[serve]'"
            ) from error
        self._sql, self._signed = database, signed
        self._database = database.Database(url, wait)
        self.shown, self.shared = self._database.shown, self._database.file is None
        self._created = self._fallen = False
        self._ends: list[tuple[int, bytes]] = []  # rows and links that the log had, in order
        if create:
            self._database.create()
        found = self._database.reading(database.read_format)
        if found is not None or not create:
            self._check_format(found)
        if create:
            with self._using():
                pass
        if head is not None and not self._database.reading(partial(self._leads_to, head)):
            raise CountermarkError(
                f"{self.shown} does not lead to the published head of {head.rows} rows; run "
                f"countermark log renew {self.shown}, and publish a new head"
            )
        if create:
            self._remember(*self._database.reading(self._end))

    @property
    def identity(self) -> bytes:
        """What every coin of the log depends on; empty in one that 0.2.0 or earlier made.

        Raises:
            CountermarkError: the log has lost rows, or cannot be read.
        """
        value = self._database.reading(lambda connection: _current(self._identities(connection)))
        if value is None:
            raise self._fell()
        return value

    def renew(self) -> int:
        """Give the log another identity, and with it new coins to every client.

        This is for a log that was restored from a backup, or for a database that took over from
        another and lacks its last rows. What was logged before stays evidence.

        Returns:
            How many rows the log has, none of which the new coins are in.

        Raises:
            CountermarkError: the database cannot be written.
        """
        with self._using() as connection:
            rows, _ = self._end(connection)
            if len(self._identities(connection)) >= _MOST_IDENTITIES:
                raise CountermarkError(
                    f"{self.shown} was renewed {_MOST_IDENTITIES} times; begin a new log"
                )
            self._sql.write_format(connection, _WITH_IDENTITY)
            self._sql.add_identity(connection, rows, rows, secrets.token_bytes(_SALT))
        self._ends.clear()
        self._fallen = False
        return rows

    def watch(self, identity: bytes) -> None:
        """Check that the log still has what this process knows of it, and learn what it has now.

        Args:
            identity: the one that the process draws coins under.

        Raises:
            CountermarkError: it has lost rows, and nobody can store any until it is renewed; or it
                was renewed.
        """

        def look(connection: "sa.Connection") -> tuple[int, bytes] | None:
            self._check_coins({identity}, _current(self._identities(connection)))
            end = self._end(connection)
            return end if self._lost(connection, end) is None else None

        end = self._database.reading(look)
        if end is not None:
            self._remember(*end)
            return
        with self._using() as connection:
            identities = self._identities(connection)
            self._check_coins({identity}, _current(identities))
            lost = self._say_lost(connection, identities, self._end(connection))
        if lost:
            raise self._fell()

    def append(self, rows: Sequence[Row]) -> list[bool]:
        """Store rows in one durable transaction, except those that the log already has.

        A row is left out if the log has one of the same model, client and cell. Every row of an
        erased client is left out as well: they may know their coins, so their queries are no longer
        trials.

        A row's coin must have been drawn under the log's identity.

        Returns:
            For each row, whether it is new and was stored.

        Raises:
            RowError: a row is not valid for any log; nothing of this call is stored.
            CountermarkError: the database cannot be written, it has lost rows, or has another
                identity than the coins; nothing of this call is stored.
        """
        return self.store(rows, ())[0]

    def store(
        self, rows: Sequence[Row], requests: Sequence[Request]
    ) -> tuple[list[bool], list[str | None]]:
        """Store rows and signed requests in one durable transaction.

        A request is stored if it goes on from the last one of its opening; one that the log has is
        left out. The rows of one that is refused are left out as well.

        Args:
            rows: as for `append`.
            requests: in their order; a row's `request` tells which one its query was part of.

        Returns:
            For each row, whether it is new and was stored; for each request, why it is refused, or
            `None`.

        Raises:
            RowError: as for `append`.
            CountermarkError: as for `append`.
        """
        for row in rows:
            flaw = _flaw(row)
            if flaw is not None:
                raise RowError(f"this is no trial for the query log {self.shown}: {flaw}")
        with self._using() as connection:
            identities, before = self._identities(connection), self._end(connection)
            self._check_coins({row.log for row in rows}, _current(identities))
            lost = self._say_lost(connection, identities, before)
            if not lost:
                refused = self._signed.store_requests(connection, _current(identities), requests)
                taken = {
                    each.signed.place: each.signed.hashes
                    for each, reason in zip(requests, refused, strict=True)
                    if reason is None
                }
                kept = [belongs(row.request, row.image, taken) for row in rows]
                fresh, after = self._stored(
                    connection, identities, before, list(itertools.compress(rows, kept))
                )
        if lost:
            raise self._fell()
        self._remember(*before)
        self._remember(*after)
        stored = iter(fresh)
        return [ok and next(stored) for ok in kept], refused

    def begin_requests(self, opening: Opening) -> None:
        """Store what a client signed before their first requests; again is as good as once.

        Raises:
            ConflictError: it is of another log identity, the account has another opening of the
                same terms, or it was erased.
            CountermarkError: the database cannot be written, or has lost rows.
        """
        account = opening.terms["account"]
        if any(known.digest == opening.digest for known in self.openings(account)):
            return
        with self._using() as connection:
            if self._gone(connection, {account}):
                raise ConflictError("the account was erased from the query log; take another one")
            self._signed.store_opening(connection, _current(self._identities(connection)), opening)

    def openings(self, client: str | None = None) -> list[Opening]:
        """Return what clients signed before their first requests, of all or of one of them.

        Raises:
            CountermarkError: the log cannot be read, or an opening was changed.
        """
        found = self._database.reading(partial(self._signed.read_openings, client=client))
        if None in found:
            raise CountermarkError(
                f"{self.shown}: an opening was changed; restore the log from a backup"
            )
        return [opening for opening in found if opening is not None]

    def last_request(self, opening: Opening) -> tuple[int, bytes]:
        """Return the number and the digest of the last request of an opening."""
        return self._database.reading(partial(self._signed.last_request, opening=opening.digest))

    def requests(self, opening: Opening) -> Iterator[Request]:
        """Yield all requests of an opening in order; each leads to the one before.

        Raises:
            CountermarkError: one was changed, removed or put in, or the log cannot be read.
        """
        number, previous, there = 0, NOTHING_BEFORE, True
        while there:
            there, request = self._database.reading(
                partial(self._signed.read_request, opening=opening, after=number, previous=previous)
            )
            number += 1
            if request is not None:
                previous = request.signed.digest
                yield request
            elif there:
                raise CountermarkError(
                    f"{self.shown}: request {number} of {brief(opening.terms['account'])} was "
                    "changed, or is missing; restore the log from a backup"
                )

    def _say_lost(
        self, connection: "sa.Connection", identities: Sequence[_Identity], end: tuple[int, bytes]
    ) -> bool:
        """Tell whether the log has lost rows; if so, write it down for all who write.

        Only a writer whose coins are the log's may: another one is of the time before a renewal.
        """
        kept = self._lost(connection, end)
        if kept is None:
            return False
        self._fallen = True
        if len(identities) < _MOST_IDENTITIES:
            rows, _ = end
            self._sql.write_format(connection, _WITH_IDENTITY)
            self._sql.add_identity(connection, rows, min(kept, rows), None)
        return True

    def _stored(
        self,
        connection: "sa.Connection",
        identities: Sequence[_Identity],
        end: tuple[int, bytes],
        rows: Sequence[Row],
    ) -> tuple[list[bool], tuple[int, bytes]]:
        """Store rows after the last one; which of them are new, and the end of the log then."""
        number, link = end
        link = _absorbed(link, number, identities)[-1]
        fresh, values = [], []
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
            stored = {name: getattr(row, name) for name in _STORED}
            values.append(
                {"number": number, **stored, "salt": salt, "digest": digest, "link": link}
            )
        if values:
            self._sql.insert(connection, values)
            end = number, link
        return fresh, end

    def _check_coins(self, drawn: Collection[bytes | None], identity: bytes | None) -> None:
        """Refuse coins that were drawn under other identities than the log's."""
        self._fallen = self._fallen or identity is None
        if self._fallen:
            raise self._fell()
        if any(each != identity for each in drawn):
            raise CountermarkError(
                f"the coins of these trials are not those of {self.shown}: it was renewed, or the "
                "guard was made without its identity; start the service again"
            )

    def _fell(self) -> CountermarkError:
        return CountermarkError(
            f"{self.shown} has lost rows: it was restored from a backup, or another database took "
            "over and lacks the last ones, so clients may know coins that it calls new; end all "
            f"that write it, run countermark log renew {self.shown}, and start them again"
        )

    def _remember(self, rows: int, link: bytes) -> None:
        if rows and (rows, link) not in self._ends[-1:]:
            self._ends.append((rows, link))
        if len(self._ends) > _KNOWN_ENDS:
            del self._ends[1]  # the first one stays, or a loss would leave nothing that is sure

    def _lost(self, connection: "sa.Connection", end: tuple[int, bytes]) -> int | None:
        """Return up to which row the log is as this process knows it; `None` if all is there."""
        if self._ends[-1:] == [end]:  # as nearly always: nobody else has written since
            return None
        for number, link in reversed(self._ends):
            if _binary(self._sql.link_of(connection, number)) == link:
                return None if (number, link) == self._ends[-1] else number
        return 0 if self._ends else None

    def _leads_to(self, published: Head, connection: "sa.Connection") -> bool:
        number = published.rows
        link = _binary(self._sql.link_of(connection, number)) if number else _ORIGIN
        ends = _absorbed(link, number, self._identities(connection))
        return bool(link) and bytes.fromhex(published.hash) in ends

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

        def last(connection: "sa.Connection") -> Head:
            number, link = self._end(connection)
            return Head(number, _absorbed(link, number, self._identities(connection))[-1].hex())

        return self._database.reading(last)

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
            page, identities = self._page(number)
            ends = _absorbed(link, number, identities)
            self._compare(number, ends, published)
            for found in page:
                row, link = self._checked(found, number + 1, ends[-1])
                number += 1
                ends = _absorbed(link, number, identities)
                self._compare(number, ends, published)
                yield row and replace(row, log=_of_row(identities, number))
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
            count = self._sql.erase(connection, client, [*_STORED, "salt"])
            signed = self._signed.erase_requests(connection, client)
            if count or signed:
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
                    self._sql.write_format(connection, _WITH_IDENTITY)
                    self._sql.add_identity(connection, 0, 0, secrets.token_bytes(_SALT))
            yield connection
        self._created = True

    def _check_format(self, found: Sequence[Any] | None) -> None:
        if not found:
            raise CountermarkError(f"{self.shown} holds no query log; check the address")
        if found not in ([LOG_FORMAT], [_WITH_IDENTITY]):
            raise CountermarkError(
                f"{self.shown} is a log of the format {brief(found[0])}, not {_WITH_IDENTITY!r}; "
                "use the release that wrote it"
            )

    def _end(self, connection: "sa.Connection") -> tuple[int, bytes]:
        """Read the number and the link of the last row."""
        found = self._sql.last(connection)
        if found is None:
            return 0, _ORIGIN
        number, link = found
        if type(number) is not int or not 0 < number < _MOST or len(_binary(link)) != len(_ORIGIN):
            raise CountermarkError(
                f"{self.shown}: the last row was changed after it was written; see countermark log "
                "check"
            )
        return number, _binary(link)

    def _erased(self, connection: "sa.Connection") -> list[tuple[bytes, bytes, int]]:
        """Read the salt and digest of each erased name, and how many rows it had."""
        found = []
        for salt, digest, rows in self._sql.erased_names(connection):
            if (
                (len(_binary(salt)), len(_binary(digest))) != (_SALT, len(_ORIGIN))
                or type(rows) is not int
                or rows < 0
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

    def _identities(self, connection: "sa.Connection") -> list[_Identity]:
        """Read from which rows on the log has which identity."""
        found: list[_Identity] = []
        for written, after, value in self._sql.identities(connection, _MOST_IDENTITIES + 1):
            whole = type(written) is int and type(after) is int and 0 <= after <= written < _MOST
            if (
                not whole
                or written < (found[-1].written if found else 0)
                or (value is not None and len(_binary(value)) != _SALT)
                or len(found) == _MOST_IDENTITIES
            ):
                raise CountermarkError(
                    f"{self.shown}: the table of identities was changed; restore the log from a "
                    "backup"
                )
            found.append(_Identity(written, after, value))
        return found

    def _page(self, number: int) -> tuple[list[dict[str, Any]], list[_Identity]]:
        """Read some rows after a number, and the log's identities.

        If they cannot be read, read the next row alone to find out whether it is the cause.
        """

        def read(
            connection: "sa.Connection", *most: int
        ) -> tuple[list[dict[str, Any]], list[_Identity]]:
            return self._sql.page(connection, number, *most), self._identities(connection)

        try:
            return self._database.reading(read)
        except CountermarkError:
            # If the database is unavailable, this call raises an error that says so.
            if not self._database.reading(
                lambda connection: self._sql.has_more(connection, number)
            ):
                raise
        self._database.reading(self._identities)
        try:
            return self._database.reading(lambda connection: read(connection, 1))
        except CountermarkError as error:
            raise CountermarkError(
                f"{self.shown}: row {number + 1} cannot be read; it was changed after it was "
                "written"
            ) from error

    def _compare(self, number: int, ends: Sequence[bytes], published: Head | None) -> None:
        if (
            published is not None
            and number == published.rows
            and bytes.fromhex(published.hash) not in ends
        ):
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
        values = {name: found[name] for name in _STORED}
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
    for name in _STORED:
        if type(getattr(row, name)) is not _KINDS.get(name, int):
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


def _current(identities: Sequence[_Identity]) -> bytes | None:
    """Return the identity that the next row has; `None` while the log is void."""
    return identities[-1].value if identities else b""


def _of_row(identities: Sequence[_Identity], number: int) -> bytes | None:
    """Return the identity that a row has; `None` for one that is void."""
    return _current([identity for identity in identities if identity.after < number])


def _absorbed(link: bytes, number: int, identities: Sequence[_Identity]) -> list[bytes]:
    """Bind the identities that were written after a row to its link, one after the other.

    The last one is what the link of the next row goes on from, and the head of the log as it is.
    """
    links = [link]
    for each in identities:
        if each.written == number:
            places = each.written.to_bytes(8, "big") + each.after.to_bytes(8, "big")
            whole = _IDENTITY + links[-1] + places + (each.value or b"")
            links.append(hashlib.sha256(whole).digest())
    return links


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
        or not 0 <= rows < _MOST
        or not isinstance(link, str)
        or not _HASH.fullmatch(link)
    ):
        raise CountermarkError(
            f"{path} is not the head of a query log, as `countermark log head` writes it"
        )
    return Head(rows, link, decode_token(value.get("token"), f"{path}: token"))
