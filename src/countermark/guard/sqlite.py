"""A SQLite file as untrusted data: only the named file is used, and its content is checked.

A database can hold programs (views, triggers, expressions in its schema), values of any size, and
pages that refer to each other in circles. So a file is used only if its schema is exactly the
expected one; every value has a size limit, and so has the work of a transaction. Whoever only reads
changes nothing, leaves nothing behind, and needs no permission to write.
"""

import contextlib
import os
import re
import sqlite3
import stat
from collections.abc import Collection, Mapping
from itertools import count
from pathlib import Path
from urllib.parse import quote

from countermark.errors import CountermarkError

LARGEST = 1 << 24
"""Bytes of the largest row that is read or written."""
_LARGEST_STATEMENT, _MOST_OBJECTS = 1 << 16, 32  # of a schema
_EVERY = 1_000  # steps of SQLite's virtual machine between two checks of their number
# Steps that a transaction may take: this many, and more for each byte of the file.
_AT_LEAST, _EACH_BYTE = 20_000_000, 4
_PRIVATE = 0o600
_WORD = re.compile(r"\w+|\S")
_RENAMED = re.compile(r'^CREATE TABLE "(\w+)"')  # as ALTER TABLE ... RENAME leaves it
_Identity = tuple[int, int] | None


class RowError(CountermarkError):
    """A row that no log can store; the log itself is intact."""


class DatabaseFile:
    """The file that a path led to when it was first used."""

    def __init__(
        self, name: str, tables: Mapping[str, str], optional: Collection[str], wait: float
    ) -> None:
        """Remember how to open a file.

        Args:
            name: path of the file, taken literally.
            tables: for each table that the file may have, the statement that creates it.
            optional: those tables that the file need not have.
            wait: seconds to wait for the locks of other programs.

        Raises:
            CountermarkError: the path is not valid, or leads to something that is not a file.
        """
        self.path = Path(name).absolute()
        try:
            if not stat.S_ISREG(self.path.stat().st_mode):
                raise CountermarkError(f"{name} is not a file; a query log is a file of its own")
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise CountermarkError(
                f"the query log {name!r} cannot be used: {reason}; give the path of a file"
            ) from error
        self._statements = {table: _words(statement) for table, statement in tables.items()}
        self._optional, self._wait = optional, wait
        self._identity: _Identity = None
        self._journal: _Identity = None

    def create(self) -> None:
        """Create an empty file that only its owner can read, if there is none.

        SQLite gives its journals the same mode.

        Raises:
            CountermarkError: a journal is left of a file that is gone; SQLite would take it for the
                journal of the new file.
            OSError: the file cannot be created.
        """
        if (
            _identity(self.path) is None
            and (status := _status(self._beside("-wal")))
            and status.st_size
        ):
            raise CountermarkError(
                f"{self.path} is gone, and {self.path.name}-wal still has the last of its rows; "
                "put the file back, or move both away"
            )
        with contextlib.suppress(FileExistsError):
            os.close(
                os.open(os.path.realpath(self.path), os.O_CREAT | os.O_EXCL | os.O_WRONLY, _PRIVATE)
            )

    def writer(self) -> sqlite3.Connection:
        """Open a connection that writes.

        Files that other users could read are closed to them.

        Raises:
            CountermarkError: the path leads to another file than before, or the file holds anything
                but a query log.
            sqlite3.Error: the file cannot be opened.
        """
        connection = self._open("mode=rw")
        for setting in ("journal_mode = WAL", "synchronous = FULL", "secure_delete = ON"):
            connection.execute(f"PRAGMA {setting}")
        for suffix in ("", "-wal", "-shm"):
            path = self._beside(suffix)
            with contextlib.suppress(OSError):
                mode = stat.S_IMODE(path.stat().st_mode)
                # Permissions for others are what a umask left, not the owner's choice of a group.
                if mode & stat.S_IRWXO:
                    path.chmod(mode & _PRIVATE)
        return connection

    def reader(self, at_rest: bool) -> sqlite3.Connection:
        """Open a connection that only reads.

        Args:
            at_rest: whether nobody else writes, so that neither locks nor other files are needed
                (see `state`).

        Raises:
            CountermarkError: as for `writer`.
            sqlite3.Error: as for `writer`.
        """
        return self._open("mode=ro&immutable=1" if at_rest else "mode=ro")

    def state(self) -> tuple[tuple[int, ...], ...]:
        """Return what changes when the file is written to.

        There is one entry each for the file, its write-ahead log and its rollback journal. The
        latter two are empty if nothing is pending in them, so that the file holds everything.
        """
        self.check()
        found = []
        for suffix in ("", "-wal", "-journal"):
            status = _status(self._beside(suffix))
            found.append(
                (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
                if status and status.st_size
                else ()
            )
        return tuple(found)

    def check(self) -> None:
        """Check that the path still leads to the file that was first used.

        Raises:
            CountermarkError: it leads nowhere, or to another file.
        """
        found = _identity(self.path)
        if found is None and self._identity is None:
            raise CountermarkError(f"there is no query log {self.path}; check the path")
        self._identity = self._identity or found
        if found is None:
            raise CountermarkError(
                f"the query log {self.path} is gone, it was removed or renamed; put it back"
            )
        if found != self._identity:
            raise CountermarkError(
                f"the query log {self.path} was replaced while it was in use; put the first file "
                "back, or start again"
            )

    def check_journal(self) -> None:
        """Check that the write-ahead log is still the one that open connections write to.

        Raises:
            CountermarkError: it was removed.
        """
        found = _identity(self._beside("-wal"))
        self._journal = self._journal or found
        if found != self._journal:
            raise CountermarkError(
                f"{self.path}-wal was removed while the query log was in use; leave it to the "
                "service"
            )

    def forget_journal(self) -> None:
        """Record that no connection writes any more.

        The next connection may create another write-ahead log.
        """
        self._journal = None

    def limit_work(self, connection: sqlite3.Connection) -> None:
        """Limit the steps of the transaction that begins.

        It may take as many steps as a file of this size can need, and no more.
        """
        status = _status(self.path)
        # A hole in a file holds nothing.
        size = min(status.st_size, 512 * status.st_blocks) if status else 0
        _limit_steps(connection, _AT_LEAST + _EACH_BYTE * size)

    def _beside(self, suffix: str) -> Path:
        return Path(f"{os.path.realpath(self.path)}{suffix}")  # SQLite follows links first

    def _open(self, how: str) -> sqlite3.Connection:
        self.check()
        address = f"file://{quote(os.fsencode(self.path))}?{how}"
        connection = sqlite3.connect(
            address, uri=True, timeout=self._wait, isolation_level=None, check_same_thread=False
        )
        try:
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LARGEST_STATEMENT)
            connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
            _limit_steps(connection, _EVERY * _MOST_OBJECTS)
            for setting in ("trusted_schema = OFF", "cell_size_check = ON"):
                connection.execute(f"PRAGMA {setting}")
            self._check_schema(connection)
            connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LARGEST)
            connection.set_progress_handler(None, 0)
            self.check()
        except BaseException:
            connection.close()
            raise
        return connection

    def _check_schema(self, connection: sqlite3.Connection) -> None:
        """Check that the file has the expected tables and automatic indexes, or nothing yet."""
        tables = set()
        for kind, name, table, statement in connection.execute(
            "SELECT type, name, tbl_name, sql FROM sqlite_master "  # noqa: S608 (a constant)
            f"LIMIT {_MOST_OBJECTS}"
        ):
            index = kind == "index" and statement is None and table in self._statements
            if not index and (kind != "table" or self._statements.get(name) != _words(statement)):
                raise CountermarkError(
                    f"{self.path} is not a query log of Countermark: "
                    f"the {kind} {str(name)[:80]!r} does not belong in one"
                )
            tables |= {name} if kind == "table" else set()
        missing = self._statements.keys() - tables - set(self._optional)
        if tables and missing:
            raise CountermarkError(
                f"{self.path} is no query log: the table {min(missing)!r} is missing; restore it "
                "from a backup"
            )


def _words(statement: object) -> list[str]:
    """Split a statement into words, without its spaces."""
    return (
        _WORD.findall(_RENAMED.sub(r"CREATE TABLE \1", statement))
        if isinstance(statement, str)
        else []
    )


def _limit_steps(connection: sqlite3.Connection, most: int) -> None:
    looks = count(1)
    connection.set_progress_handler(lambda: next(looks) * _EVERY > most, _EVERY)


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def _identity(path: Path) -> _Identity:
    status = _status(path)
    return (
        None
        if status is None or not stat.S_ISREG(status.st_mode)
        else (status.st_dev, status.st_ino)
    )
