"""The query log: order, durability, tampering, erasure; on SQLite and on a real PostgreSQL."""

import contextlib
import os
import random
import shutil
import sqlite3
import stat
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from weakref import WeakKeyDictionary

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from countermark.cli import main
from countermark.errors import CountermarkError
from countermark.files import canonical_json
from countermark.guard import LOG_FORMAT, Head, QueryLog, Row, read_head

MODEL = "ab" * 32
STORED = [name for name in Row.__dataclass_fields__ if name != "log"]


def row_of(cell: int, client: str = "anna", **changes: object) -> Row:
    fields = {
        "model": MODEL,
        "client": client,
        "cell": sha256(cell.to_bytes(6, "big")).digest()[:6],
        "image": bytes([cell % 256] * 16),
        "heads": 1,
        "tails": 2,
    }
    return Row(**{**fields, "chance": 30000, "answer": 2, "day": 20000, **changes})  # type: ignore[arg-type]


identities: WeakKeyDictionary[QueryLog, bytes] = WeakKeyDictionary()


def put(log: QueryLog, rows: list[Row]) -> list[bool]:
    """Store rows as trials whose coins were drawn under the identity that the log first had."""
    if log not in identities:
        identities[log] = log.identity
    return log.append([replace(row, log=identities[log]) for row in rows])


def test_rows_come_back_in_order_and_once(address: str) -> None:
    log = QueryLog(address)
    assert put(log, [row_of(3), row_of(1), row_of(3, answer=1)]) == [True, True, False]
    assert put(log, [row_of(1), row_of(1, "bob"), row_of(2)]) == [False, True, True]
    assert list(log.rows()) == [row_of(3), row_of(1), row_of(1, "bob"), row_of(2)]
    assert log.head().rows == 4
    log.close()
    again = QueryLog(address, create=False)
    assert list(again.rows(log.head())) == [row_of(3), row_of(1), row_of(1, "bob"), row_of(2)]
    again.close()


def test_writers_side_by_side_make_one_chain(address: str) -> None:
    """Two replicas of the service, each with its own connection."""
    logs = [QueryLog(address), QueryLog(address)]

    def write(number: int) -> None:
        for cell in range(25):
            put(logs[number], [row_of(cell), row_of(1000 + cell, f"client {number}")])

    threads = [threading.Thread(target=write, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = list(logs[0].rows())
    assert len(rows) == 25 + 50
    assert len({row.place for row in rows if row}) == 75


def test_an_erased_client_is_gone_and_the_chain_holds(address: str) -> None:
    log = QueryLog(address)
    put(log, [row_of(1), row_of(2, "bob", image=b"bobs own picture"), row_of(3)])
    head = log.head()
    assert log.erase("bob") == 1
    assert list(log.rows(head)) == [row_of(1), None, row_of(3)]
    assert log.erase("bob") == 0
    put(log, [row_of(4)])
    assert len(list(log.rows(head))) == 4
    log.close()


def test_what_was_erased_is_not_on_the_disk_while_others_use_the_log(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    service, owner = QueryLog(str(path)), QueryLog(str(path))
    put(service, [row_of(1), row_of(2, "bob", image=b"bobs own picture")])
    assert len(list(service.rows())) == 2
    assert owner.erase("bob") == 1
    put(service, [row_of(3)])
    assert not any(b"bobs own picture" in file.read_bytes() for file in tmp_path.glob("log.db*"))
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM trials").fetchone()
    impatient = QueryLog(str(path), wait=0.05)
    with pytest.raises(CountermarkError, match="other programs read the log; run the same again"):
        impatient.erase("anna")
    reader.close()
    assert impatient.erase("anna") == 0


def test_an_erased_client_gets_no_trials_again(address: str) -> None:
    """They may know their coins by now, and what they chose by them would be no evidence."""
    log = QueryLog(address)
    put(log, [row_of(1), row_of(2, "bob"), row_of(3, "bob"), row_of(4, "carol")])
    assert log.erased() == 0
    assert log.erase("bob") == 2
    assert log.erase("nobody") == 0
    assert put(log, [row_of(2, "bob"), row_of(9, "bob"), row_of(9)]) == [False, False, True]
    assert list(log.rows()) == [row_of(1), None, None, row_of(4, "carol"), row_of(9)]
    assert log.erased() == 1
    log.erase("carol")
    assert log.erased() == 2
    log.close()


def test_rows_that_an_earlier_release_erased_count_as_an_account_each(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    log = QueryLog(str(path))
    put(log, [row_of(1), row_of(2, "bob"), row_of(3, "bob"), row_of(4, "carol")])
    log.erase("carol")
    with sqlite3.connect(path) as connection:
        columns = ", ".join(f"{name} = NULL" for name in ("salt", *STORED))
        connection.execute(f"UPDATE trials SET {columns} WHERE client = 'bob'")
    connection.close()
    assert log.erased() == 3
    assert sum(row is None for row in log.rows()) == 3


def cut(address: str, number: int) -> None:
    """Put a log back to its first rows, as a backup or a replica that took over would."""
    statement = f"DELETE FROM trials WHERE number > {number}"
    if address.startswith("postgresql"):
        import psycopg

        with psycopg.connect(address, autocommit=True) as connection:
            connection.execute(statement)
    else:
        tampered(Path(address), statement)


def forget(address: str) -> None:
    """Take away what was written about a loss."""
    statement = "DELETE FROM identities WHERE value IS NULL"
    if address.startswith("postgresql"):
        import psycopg

        with psycopg.connect(address, autocommit=True) as connection:
            connection.execute(statement)
    else:
        tampered(Path(address), statement)


def test_a_log_has_an_identity_of_its_own(address: str, tmp_path: Path) -> None:
    with QueryLog(address) as log, QueryLog(str(tmp_path / "other.db")) as other:
        assert len(log.identity) == 16
        assert log.identity != other.identity
        put(log, [row_of(1)])
        with QueryLog(address) as again:
            assert again.identity == log.identity
        assert [row and row.log for row in log.rows()] == [log.identity]


def test_coins_of_another_identity_are_not_stored(address: str) -> None:
    """The guard of a user's own service may have been made without the log's identity."""
    with QueryLog(address) as log:
        for other in (b"", b"i" * 16):
            with pytest.raises(CountermarkError, match="coins of these trials are not those of"):
                log.append([replace(row_of(1), log=other)])
        assert list(log.rows()) == []


def test_a_renewed_log_keeps_its_rows_and_takes_new_coins_only(address: str) -> None:
    with QueryLog(address) as log:
        put(log, [row_of(1), row_of(2)])
        before, head = log.identity, log.head()
        assert log.renew() == 2
        assert log.identity != before
        with pytest.raises(CountermarkError, match="it was renewed"):
            put(log, [row_of(3)])
        fresh = replace(row_of(3), log=log.identity)
        assert log.append([fresh, replace(row_of(1), log=log.identity)]) == [True, False]
        assert [row and row.log for row in log.rows(head)] == [before, before, log.identity]
    with QueryLog(address, head=head) as again:
        assert len(list(again.rows())) == 3


def test_a_log_of_an_earlier_release_has_no_identity_until_it_is_renewed(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    shutil.copy(Path(__file__).parent / "golden" / "0.1.0" / "log.db", path)
    with QueryLog(str(path)) as log:
        rows = len(list(log.rows()))
        assert log.identity == b""
        assert log.append([row_of(1)]) == [True]
        # The earlier release still reads it.
        with sqlite3.connect(path) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        connection.close()
        assert "identities" not in tables
        assert log.renew() == rows + 1
        log.append([replace(row_of(2), log=log.identity)])
        found = list(log.rows())
    assert [row and row.log for row in found] == [b""] * (rows + 1) + [log.identity]


def test_who_wrote_rows_that_are_gone_writes_no_more_and_tells_the_others(address: str) -> None:
    """Two replicas: the one that has seen nothing of the loss stores two trials meanwhile."""
    with QueryLog(address) as one, QueryLog(address) as other:
        put(one, [row_of(1)])
        put(one, [row_of(2)])
        put(other, [row_of(3)])
        put(one, [row_of(4)])
        cut(address, 3)
        put(other, [row_of(5, "bob"), row_of(6)])
        one.check()
        with pytest.raises(CountermarkError, match=r"has lost rows: .* log renew"):
            one.watch(identities[one])
        with pytest.raises(CountermarkError, match=r"has lost rows: .* log renew"):
            put(other, [row_of(7)])
        with pytest.raises(CountermarkError, match="has lost rows"):
            other.watch(identities[other])
        with pytest.raises(CountermarkError, match="has lost rows"):
            _ = one.identity
        assert one.renew() == 5
        put_new = replace(row_of(8), log=one.identity)
        assert one.append([put_new]) == [True]
        found = [row and row.log for row in other.rows()]
        assert found == [*[identities[one]] * 3, None, None, one.identity]


def test_a_loss_voids_nothing_of_before_the_process_began(address: str) -> None:
    with QueryLog(address) as log:
        put(log, [row_of(cell) for cell in range(50)])
    with QueryLog(address) as log:
        put(log, [row_of(50)])
        cut(address, 50)
        with pytest.raises(CountermarkError, match="has lost rows"):
            put(log, [row_of(51)])
        log.renew()
        assert [row and row.log for row in log.rows()] == [identities[log]] * 50


def test_a_process_remembers_its_beginning_however_much_it_stores(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("countermark.guard.log._KNOWN_ENDS", 4)
    with QueryLog(address) as log:
        put(log, [row_of(0), row_of(1)])
        for cell in range(2, 12):
            put(log, [row_of(cell)])
        assert len(log._ends) == 4
        cut(address, 5)
        with pytest.raises(CountermarkError, match="has lost rows"):
            put(log, [row_of(13)])
        log.renew()
        assert [row and row.log for row in log.rows()] == [*[identities[log]] * 2, *[None] * 3]


def test_one_loss_that_many_notice_leaves_the_log_readable(address: str) -> None:
    """Each writes it down once at most, and the first who does says it for all."""
    with contextlib.ExitStack() as ending:
        logs = [ending.enter_context(QueryLog(address)) for _ in range(30)]
        put(logs[0], [row_of(1), row_of(2)])
        for log in logs:
            log.watch(logs[0].identity)
        cut(address, 1)
        for log in logs:
            with pytest.raises(CountermarkError, match="has lost rows"):
                log.append([])
        assert logs[0]._database.reading(lambda c: len(logs[0]._identities(c))) == 2
        logs[0].renew()
        assert len(list(logs[0].rows())) == 1


def test_a_process_that_saw_a_loss_stores_nothing_even_where_nobody_else_knows(
    address: str,
) -> None:
    """A second database takes over, which has not what the first was told."""
    with QueryLog(address) as one, QueryLog(address) as other:
        put(one, [row_of(1), row_of(2)])
        other.watch(one.identity)
        cut(address, 1)
        for log in (one, other):
            with pytest.raises(CountermarkError, match="has lost rows"):
                put(log, [row_of(3)])
        forget(address)
        for log in (one, other):
            with pytest.raises(CountermarkError, match="has lost rows"):
                put(log, [row_of(3)])


def test_a_process_from_before_a_renewal_voids_nothing_after_it(address: str) -> None:
    with QueryLog(address) as old:
        put(old, [row_of(1), row_of(2)])
        cut(address, 1)
        with QueryLog(address) as new:
            new.renew()
            new.append([replace(row_of(cell), log=new.identity) for cell in (3, 4)])
            for again in range(2):
                with pytest.raises(CountermarkError, match="it was renewed"):
                    old.watch(identities[old])
                with pytest.raises(CountermarkError, match="it was renewed"):
                    put(old, [row_of(5 + again)])
            found = [row and row.log for row in new.rows()]
            assert found == [identities[old], new.identity, new.identity]


def test_a_head_covers_what_was_said_of_the_rows_before_it(address: str) -> None:
    """Who takes the mark of a loss away makes evidence of void rows."""
    with QueryLog(address) as log:
        put(log, [row_of(1), row_of(2)])
        first = log.head()
        cut(address, 1)
        with pytest.raises(CountermarkError, match="has lost rows"):
            put(log, [row_of(3)])
        head = log.head()
        assert len(list(log.rows(head))) == 1
        forget(address)
        with pytest.raises(CountermarkError, match="published head"):
            list(log.rows(head))
        with pytest.raises(CountermarkError, match="published head"):
            list(log.rows(first))


def test_looking_at_a_log_learns_what_others_stored(address: str) -> None:
    with QueryLog(address) as one, QueryLog(address) as other:
        put(one, [row_of(1)])
        put(other, [row_of(2), row_of(3)])
        one.watch(identities[one])
        cut(address, 2)
        with pytest.raises(CountermarkError, match="has lost rows"):
            put(one, [row_of(4)])


def test_a_log_that_does_not_lead_to_a_published_head_is_not_opened(address: str) -> None:
    with QueryLog(address) as log:
        put(log, [row_of(1), row_of(2)])
        head = log.head()
    QueryLog(address, head=head).close()
    cut(address, 1)
    with pytest.raises(CountermarkError, match=r"published head of 2 rows; run .* log renew"):
        QueryLog(address, head=head)
    with QueryLog(address) as log:
        log.renew()
        log.append([replace(row_of(3), log=log.identity)])
        QueryLog(address, head=log.head()).close()


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("UPDATE identities SET value = zeroblob(16)", "row 1 does not follow"),
        ("DELETE FROM identities", "row 1 does not follow"),
        ("DROP TABLE identities", "row 1 does not follow"),
        ("INSERT INTO identities VALUES (1, 12, 3, NULL)", None),
        ("INSERT INTO identities VALUES (1, 11, 3, NULL)", "row 12 does not follow"),
        ("UPDATE identities SET value = 'text'", "table of identities was changed"),
        ("UPDATE identities SET written = 'many'", "table of identities was changed"),
        ("UPDATE identities SET after = 5", "table of identities was changed"),
    ],
)
def test_a_changed_identity_is_found(
    whole: tuple[Path, Head], tmp_path: Path, statement: str, said: str | None
) -> None:
    path = tmp_path / "log.db"
    shutil.copy(whole[0], path)
    tampered(path, statement)
    with QueryLog(str(path), create=False) as log:
        if said is None:
            assert [row and row.log for row in log.rows()][2:4] == [log_identity(whole[0]), None]
            return
        with pytest.raises(CountermarkError, match=said):
            list(log.rows(whole[1]))


def log_identity(path: Path) -> bytes:
    with QueryLog(str(path), create=False) as log:
        return log.identity


def tampered(path: Path, statement: str, *values: object) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(statement, values)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Head]:
    path = tmp_path_factory.mktemp("log") / "log.db"
    log = QueryLog(str(path))
    put(log, [row_of(cell) for cell in range(12)])
    head = log.head()
    log.close()
    tampered(path, "PRAGMA wal_checkpoint(TRUNCATE)")
    return path, head


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("DELETE FROM trials WHERE number = 5", "row 5 is missing"),
        ("DELETE FROM trials WHERE number = 1", "row 1 is missing"),
        ("DELETE FROM trials WHERE number > 9", "tail was cut off"),
        ("DELETE FROM trials", "tail was cut off"),
        ("UPDATE trials SET answer = 1 WHERE number = 5", "row 5 was changed"),
        ("UPDATE trials SET client = 'bob' WHERE number = 5", "row 5 was changed"),
        ("UPDATE trials SET day = NULL WHERE number = 5", "row 5 was changed"),
        ("UPDATE trials SET chance = 'many' WHERE number = 5", "row 5 was changed"),
        ("UPDATE trials SET salt = NULL WHERE number = 5", "row 5 is erased in part"),
        (
            (
                "UPDATE trials SET digest = (SELECT digest FROM trials WHERE number = 6) "
                "WHERE number = 5"
            ),
            "row 5 does not follow",
        ),
        (
            "UPDATE trials SET link = (SELECT link FROM trials WHERE number = 6) WHERE number = 5",
            "row 5 does not follow",
        ),
        ("UPDATE trials SET number = 100 - number WHERE number IN (5, 95)", "row 5 is missing"),
        (
            (
                "UPDATE trials SET number = CASE number WHEN 5 THEN -6 WHEN 6 THEN -5 END "
                "WHERE number IN (5, 6)"
            ),
            "row 5 is missing",
        ),
    ],
)
def test_tampering_is_found_and_located(
    whole: tuple[Path, Head], tmp_path: Path, statement: str, said: str
) -> None:
    path = tmp_path / "log.db"
    shutil.copy(whole[0], path)
    tampered(path, statement)
    tampered(path, "UPDATE trials SET number = -number WHERE number < 0")
    with pytest.raises(CountermarkError, match=said if "-6" not in statement else "row 5"):
        list(QueryLog(str(path)).rows(whole[1]))


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_flipped_byte_of_a_row_is_found(
    whole: tuple[Path, Head], tmp_path: Path, data: st.DataObject
) -> None:
    path = Path(tempfile.mkdtemp(dir=tmp_path)) / "log.db"
    shutil.copy(whole[0], path)
    column = data.draw(st.sampled_from(["cell", "image", "salt", "digest", "link"]))
    number = data.draw(st.integers(1, 12))
    with sqlite3.connect(path) as connection:
        (value,) = connection.execute(
            f"SELECT {column} FROM trials WHERE number = ?", (number,)
        ).fetchone()
        place, bit = data.draw(st.integers(0, len(value) - 1)), data.draw(st.integers(0, 7))
        flipped = bytes(byte ^ (1 << bit if i == place else 0) for i, byte in enumerate(value))
        connection.execute(f"UPDATE trials SET {column} = ? WHERE number = ?", (flipped, number))
    with pytest.raises(CountermarkError, match=f"row {number} "):
        list(QueryLog(str(path)).rows(whole[1]))


@pytest.mark.parametrize("column", ["model", "client"])
def test_a_text_that_is_no_text_any_more_is_located(
    whole: tuple[Path, Head], tmp_path: Path, column: str
) -> None:
    path = tmp_path / "log.db"
    shutil.copy(whole[0], path)
    tampered(path, f"UPDATE trials SET {column} = CAST(x'61ff62' AS TEXT) WHERE number = 7")
    with pytest.raises(CountermarkError, match="row 7 cannot be read"):
        list(QueryLog(str(path)).rows(whole[1]))


def test_any_flipped_bit_of_the_file_is_an_error_with_a_reason(
    whole: tuple[Path, Head], tmp_path: Path
) -> None:
    """Or it is in a place that holds nothing."""
    intact = list(QueryLog(str(whole[0])).rows(whole[1]))
    content, generator = whole[0].read_bytes(), random.Random(3)
    for number in range(150):
        path = tmp_path / f"{number}.db"
        place = generator.randrange(len(content) * 8)
        path.write_bytes(
            content[: place // 8]
            + bytes([content[place // 8] ^ (1 << place % 8)])
            + content[place // 8 + 1 :]
        )
        try:
            with QueryLog(str(path), create=False) as log:
                found = list(log.rows(whole[1]))
        except CountermarkError:
            continue
        assert found == intact


def test_a_log_written_anew_does_not_lead_to_the_published_head(
    tmp_path: Path, whole: tuple[Path, Head]
) -> None:
    log = QueryLog(str(tmp_path / "new.db"))
    put(log, [row_of(cell) for cell in range(12)])  # the same rows, other salts
    with pytest.raises(CountermarkError, match="written anew"):
        list(log.rows(whole[1]))
    assert len(list(log.rows())) == 12


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysql://host/db", "path, sqlite"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("://", "no address"),
        ("postgresql://nobody@127.0.0.1:1/x?connect_timeout=1", "cannot be used"),
        ("/nowhere/at/all/log.db", "cannot be used"),
    ],
)
def test_addresses_that_are_none(url: str, said: str) -> None:
    with pytest.raises(CountermarkError, match=said):
        QueryLog(url)


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_that_cannot_hold_every_name_is_refused(postgres: str, encoding: str) -> None:
    """A trial of one client whose name it cannot hold would keep away those of all others."""
    import psycopg

    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(
            f"CREATE DATABASE {encoding} ENCODING '{encoding}' TEMPLATE template0 LOCALE 'C'"
        )
    with pytest.raises(CountermarkError, match=f"has the encoding {encoding}, which cannot hold"):
        QueryLog(postgres.replace("/postgres?", f"/{encoding.lower()}?"))
    with QueryLog(postgres) as log:
        assert put(log, [row_of(1, client=f"日本 {encoding}")]) == [True]


def test_a_file_that_is_no_log(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text(
        "not a database, whatever its name says, and long enough to look at" * 9
    )
    with pytest.raises(CountermarkError, match="not a database"):
        QueryLog(str(tmp_path / "text.db"))
    with pytest.raises(CountermarkError, match="no query log"):
        QueryLog(str(tmp_path / "none.db"), create=False)
    assert not (tmp_path / "none.db").exists()
    QueryLog(str(tmp_path / "old.db")).close()
    tampered(tmp_path / "old.db", "UPDATE log_format SET format = 'countermark log 9'")
    with pytest.raises(CountermarkError, match="log 9"):
        QueryLog(str(tmp_path / "old.db"))


def test_a_full_disk_stores_nothing_of_the_call(tmp_path: Path) -> None:
    log = QueryLog(str(tmp_path / "log.db"))
    put(log, [row_of(0)])
    with log._database.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 12")
    with pytest.raises(CountermarkError, match="space"):
        put(log, [row_of(cell, image=bytes(60000)) for cell in range(1, 4)])
    assert list(log.rows()) == [row_of(0)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "{" * 9999,
        '{"format": "countermark log 1", "rows": -1, "hash": "' + "0" * 64 + '"}',
        '{"format": "countermark log 1", "rows": 1, "hash": "' + "x" * 64 + '"}',
        '{"format": "countermark log 1", "rows": 1' + "0" * 30 + ', "hash": "' + "0" * 64 + '"}',
    ],
)
def test_a_head_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "head.json").write_text(text)
    with pytest.raises(CountermarkError, match="not the head"):
        read_head(tmp_path / "head.json")
    (tmp_path / "good.json").write_bytes(
        canonical_json({"format": LOG_FORMAT, "rows": 2, "hash": "0" * 64})
    )
    assert read_head(tmp_path / "good.json") == Head(2, "0" * 64)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


NAMES = [
    "what?/now.db",
    "per%20cent.db",
    "per cent.db",
    "per%cent.db",
    "a#b.db",
    "x.db?mode=memory",
    "file:x.db",
    "-x.db",
    "日 é.db",
]
NAMES += ["'quo\"ted;.db", "new\nline.db", "back\\slash.db", "a://b.db", os.fsdecode(b"\xff.db")]


@pytest.mark.parametrize(
    "form", ["{relative}", "./{relative}", "{whole}", "sqlite:///{relative}", "sqlite:///{whole}"]
)
def test_the_log_is_the_file_that_was_named(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(NAMES):
        if name.startswith("a://") and form == "{relative}":
            continue  # the address of a database called a
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        url = form.format(relative=name, whole=tmp_path / name)
        with QueryLog(url) as log:
            put(log, [row_of(number)])
        with QueryLog(url, create=False) as log:
            assert list(log.rows()) == [row_of(number)]
        assert contents(tmp_path).keys() == {str(Path(name))}
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    "url",
    [
        "",
        ":memory:",
        "sqlite:///",
        "sqlite://host/x.db",
        "file:///tmp/x.db",
        "nul\0.db",
        "x" * 5000,
        "/dev/null",
        ".",
    ],
)
def test_what_names_no_file_is_refused(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for create in (True, False):
        with pytest.raises(CountermarkError) as caught:
            QueryLog(url, create)
        assert "\n" not in str(caught.value)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("away", ["removed", "renamed", "replaced", "journal removed"])
def test_a_file_that_is_not_there_any_more_stores_nothing(away: str, tmp_path: Path) -> None:
    """What is written to a file without a name is lost with the process that has it open."""
    path, other = tmp_path / "log.db", tmp_path / "other.db"
    log = QueryLog(str(path))
    put(log, [row_of(0)])
    if away == "journal removed":
        Path(f"{path}-wal").unlink()
    elif away == "removed":
        path.unlink()
    else:
        path.rename(other)
    if away == "replaced":
        QueryLog(str(tmp_path / "new.db")).close()
        (tmp_path / "new.db").rename(path)
    with pytest.raises(CountermarkError, match=r"removed|replaced"):
        put(log, [row_of(1)])
    if away in ("renamed", "replaced"):
        with pytest.raises(CountermarkError, match=r"removed|replaced"):
            log.head()
        other.rename(path)  # over the new one
    if away == "removed":
        log.close()
        with pytest.raises(CountermarkError, match="wal still has the last of its rows"):
            QueryLog(str(path))
        assert not path.exists()
        return
    assert put(log, [row_of(2)]) == [True]
    log.close()
    assert list(QueryLog(str(path), create=False).rows()) in (
        [row_of(0), row_of(2)],
        [row_of(0), row_of(1), row_of(2)],
    )


def test_a_lock_of_another_program_is_waited_for_so_long_and_no_longer(address: str) -> None:
    log, impatient = QueryLog(address), QueryLog(address, wait=0.05)
    put(log, [row_of(0)])
    with log._using():
        for work in (lambda: put(impatient, [row_of(1)]), lambda: impatient.erase("anna")):
            with pytest.raises(CountermarkError, match=r"locked it for more than 0\.05 seconds"):
                work()
        assert list(impatient.rows()) == [row_of(0)]  # reading needs no lock
        assert impatient.head().rows == 1
    assert put(impatient, [row_of(1)]) == [True]


@pytest.mark.parametrize(
    "changes",
    [
        {"day": -365},
        {"day": 1 << 40},
        {"chance": 0},
        {"chance": 65536},
        {"answer": 3},
        {"heads": 2},
        {"heads": -1},
    ],
)
def test_a_row_that_is_no_trial_is_not_stored(changes: dict[str, int], address: str) -> None:
    """A machine whose clock says 1969 above all."""
    log = QueryLog(address)
    with pytest.raises(
        CountermarkError,
        match=r"1970-01-01; set the clock" if "day" in changes else "this is no trial",
    ):
        put(log, [row_of(1), row_of(2, **changes)])
    for other in (
        {"image": b"x" * (1 << 24)},
        {"client": "half \ud800"},
        {"image": b""},
        {"image": "text"},
        {"tails": True},
    ):
        with pytest.raises(CountermarkError, match="this is no trial"):
            put(log, [row_of(1), row_of(2, **other)])
    assert list(log.rows()) == []


def test_the_largest_row_that_is_stored_is_read(address: str) -> None:
    log = QueryLog(address)
    large = [row_of(number, image=bytes((1 << 24) - 8192)) for number in range(3)]
    put(log, large)
    assert list(log.rows()) == large


@contextlib.contextmanager
def no_rights_to(folder: Path) -> Iterator[None]:
    """Nobody may write in a folder, not even who runs the tests."""
    for path in folder.iterdir():
        path.chmod(0o444)
    folder.chmod(0o555)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        assert not os.access(folder, os.W_OK, effective_ids=True)
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o755)


@pytest.fixture
def plain_folder() -> Iterator[Path]:
    """A folder that every user can find."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def readings(path: Path) -> list[object]:
    with QueryLog(str(path), create=False) as log:
        return [list(log.rows(log.head())), log.erased(), log.head()]


@pytest.mark.parametrize("release", ["this", "0.1.0"])
def test_reading_writes_nothing_and_needs_no_right_to(
    release: str, plain_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = plain_folder / "log.db"
    if release == "this":
        with QueryLog(str(path)) as log:
            put(log, [row_of(cell) for cell in range(600)])
            log.erase("bob")
    else:
        shutil.copy(Path(__file__).parent / "golden" / "0.1.0" / "log.db", path)
    before = contents(plain_folder)
    found = readings(path)
    assert contents(plain_folder) == before
    with no_rights_to(plain_folder):
        assert readings(path) == found
        assert [main(["log", verb, str(path)]) for verb in ("check", "head")] == [0, 0]
    assert contents(plain_folder) == before
    assert not capsys.readouterr().err


def test_a_log_whose_journal_is_needed_and_cannot_be_used_says_so(
    plain_folder: Path, tmp_path: Path
) -> None:
    """The log is copied while the service runs, so that its last rows are in the journal.

    They are read where they can be, and never left out.
    """
    log = QueryLog(str(tmp_path / "log.db"))
    put(log, [row_of(1)])
    for suffix in ("", "-wal"):
        shutil.copy(tmp_path / f"log.db{suffix}", plain_folder / f"log.db{suffix}")
    with no_rights_to(plain_folder), pytest.raises(CountermarkError, match="-wal"):
        readings(plain_folder / "log.db")
    assert readings(plain_folder / "log.db")[0] == [row_of(1)]


def test_a_log_is_read_while_it_is_written(address: str) -> None:
    """Every reading is a state that the log once had.

    This holds whether the writer was there before the reader or came in the middle.
    """
    QueryLog(address).close()
    reader, ended = QueryLog(address, create=False), threading.Event()

    def write() -> None:
        for cell in range(60):
            with QueryLog(address) as log:  # the last connection ends SQLite's journal each time
                put(log, [row_of(2 * cell), row_of(2 * cell + 1)])
        ended.set()

    thread, seen = threading.Thread(target=write), 0
    thread.start()
    while not ended.is_set():
        head = reader.head()
        rows = list(reader.rows(head))
        assert len(rows) >= head.rows >= seen
        assert rows == [row_of(cell) for cell in range(len(rows))]
        seen = head.rows
    thread.join()
    assert list(reader.rows()) == [row_of(cell) for cell in range(120)]


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o027, 0o077])
def test_nobody_else_reads_the_log(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        log = QueryLog(str(tmp_path / "log.db"))
        put(log, [row_of(1)])
        assert {
            path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()
        } == dict.fromkeys(("log.db", "log.db-wal", "log.db-shm"), 0o600)
        log.close()
        (tmp_path / "log.db").chmod(0o644)  # as a release before this one left it
        log = QueryLog(str(tmp_path / "log.db"))
        put(log, [row_of(2)])
        assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}
    finally:
        os.umask(before)


TRIALS = """CREATE TABLE trials (number BIGINT NOT NULL, model TEXT, client TEXT, cell BLOB, \
image BLOB, heads INTEGER, tails INTEGER,
chance INTEGER, answer INTEGER, day INTEGER, request BLOB, salt BLOB, digest BLOB NOT NULL, \
link BLOB NOT NULL, PRIMARY KEY (number),
UNIQUE (model, client, cell))"""
COLUMNS = (
    "number, model, client, cell, image, heads, tails, chance, answer, day, request, salt, "
    "digest, link"
)
ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
LARGE = (
    f"CREATE VIEW trials({COLUMNS}) AS {ENDLESS} "
    f"SELECT i, {', '.join(['zeroblob(500000000)'] * 13)} FROM n LIMIT 10"
)


@pytest.mark.parametrize(
    "statements",
    [
        [LARGE],
        [LARGE.replace("500000000", "1").replace("LIMIT 10", "WHERE i < 0")],
        [LARGE.replace("500000000", "32").replace("LIMIT 10", "")],
        [TRIALS, "CREATE TRIGGER t AFTER INSERT ON log_format BEGIN DELETE FROM trials; END"],
        [TRIALS, "CREATE VIEW erased AS SELECT 1"],
        [TRIALS, "CREATE TABLE more (a)"],
        [TRIALS, "CREATE INDEX more ON trials (day)"],
        [TRIALS, "CREATE UNIQUE INDEX more ON trials (abs(day)) WHERE day > 0"],
        [TRIALS.replace("day INTEGER", "day INTEGER CHECK (randomblob(1000000000) IS NULL)")],
        [TRIALS.replace("day INTEGER", "day INTEGER AS (abs(heads))")],
        [TRIALS.replace("day INTEGER", "day INTEGER DEFAULT (randomblob(1000000000))")],
        [TRIALS.replace("client TEXT", "client TEXT COLLATE NOCASE")],
        [TRIALS.replace("day INTEGER, ", "")],
        [TRIALS.replace("number BIGINT", "number INTEGER")],
        [TRIALS + " WITHOUT ROWID"],
        ["CREATE VIRTUAL TABLE trials USING fts4(number)"],
        ["CREATE TABLE other (a)"],
        [],
        [TRIALS, "DELETE FROM log_format"],
        [TRIALS, "UPDATE log_format SET format = x'00ff'"],
        [TRIALS, "INSERT INTO log_format VALUES ('countermark log 1')"],
        [TRIALS, "DROP TABLE log_format"],
        [
            TRIALS,
            f"CREATE TABLE wide ({', '.join(f'c{i}' for i in range(1900))})",
            "UPDATE log_format SET format = zeroblob(100000000)",
        ],
        [f"CREATE TABLE t{i} (a)" for i in range(3000)],
    ],
)
def test_a_file_with_another_schema_is_no_log(
    statements: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log.db"
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        for statement in (
            "CREATE TABLE log_format (format TEXT NOT NULL)",
            "INSERT INTO log_format VALUES ('countermark log 1')",
            *statements,
        ):
            connection.execute(statement)
    before = contents(tmp_path)
    for arguments in (["check"], ["head"], ["erase", "--client", "anna"]):
        assert main(["log", arguments[0], str(path), *arguments[1:]]) == 2
        said = capsys.readouterr()
        assert said.err.count("\n") == 1
        assert "should not happen" not in said.err
        assert not said.out
        assert len(said.err) < 1000
    with pytest.raises(CountermarkError):
        QueryLog(str(path))
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "column",
    ["number", "heads", "day", "client", "cell", "image", "request", "salt", "digest", "link"],
)
@pytest.mark.parametrize(
    "value",
    [
        "'many'",
        "x'00'",
        "1e999",
        "-1e999",
        "2.5",
        "9223372036854775807",
        "zeroblob(30000000)",
        "-5",
    ],
)
def test_values_of_another_kind_are_found(
    whole: tuple[Path, Head], tmp_path: Path, column: str, value: str
) -> None:
    """Row 12 is the last one, whose number and link are the head's."""
    path = tmp_path / "log.db"
    shutil.copy(whole[0], path)
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        (before,) = connection.execute(f"SELECT {column} FROM trials WHERE number = 12").fetchone()
        connection.execute(f"UPDATE trials SET {column} = {value} WHERE number = 12")
        (after,) = connection.execute(f"SELECT {column} FROM trials ORDER BY rowid DESC").fetchone()
    assert before != after
    log = QueryLog(str(path), create=False)
    with pytest.raises(
        CountermarkError,
        match="row 3 is missing"
        if (column, after) == ("number", 2.5)
        else "row 12 |tail was cut off|too big",
    ):
        list(log.rows(whole[1]))
    with contextlib.suppress(CountermarkError):
        log.head()
    with contextlib.suppress(CountermarkError):
        put(log, [row_of(100)])


@pytest.mark.parametrize(
    "changes", [{"chance": 70000}, {"heads": 3}, {"answer": 7}, {"day": 1 << 40}]
)
def test_a_chain_of_rows_that_are_no_trials_does_not_hold(
    tmp_path: Path, changes: dict[str, int]
) -> None:
    """Whoever makes up a log can calculate its hashes as well."""
    path, row, salt = tmp_path / "log.db", replace(row_of(1), **changes), b"s" * 16
    QueryLog(str(path)).close()
    tampered(path, "DELETE FROM identities")
    digest = row.digest(salt)
    link = sha256(
        b"\x04" + sha256(b"\x04countermark log 1").digest() + (1).to_bytes(8, "big") + digest
    ).digest()
    values = (1, *(vars(row)[name] for name in COLUMNS.split(", ")[1:-3]), salt, digest, link)
    tampered(path, f"INSERT INTO trials ({COLUMNS}) VALUES ({', '.join('?' * 14)})", *values)
    with pytest.raises(CountermarkError, match="row 1 was changed"):
        list(QueryLog(str(path), create=False).rows())


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE erased SET rows = 'many'",
        "UPDATE erased SET rows = 1e999",
        "UPDATE erased SET rows = 3",
        "UPDATE erased SET rows = -1",
        "UPDATE erased SET salt = 'text'",
        "UPDATE erased SET digest = zeroblob(30000000)",
    ],
)
def test_a_changed_table_of_erased_clients_is_found(tmp_path: Path, statement: str) -> None:
    path = tmp_path / "log.db"
    log = QueryLog(str(path))
    put(log, [row_of(1), row_of(2, "bob"), row_of(3, "bob")])
    log.erase("bob")
    log.close()
    assert QueryLog(str(path), create=False).erased() == 1
    tampered(path, statement)
    with pytest.raises(CountermarkError):
        QueryLog(str(path), create=False).erased()


def circular(log: Path, folder: Path) -> Path:
    """Write a small log file whose table has 10 to the 37 rows.

    The table has sixteen levels, and each page has 200 ways to the next one.
    """
    path, levels, ways = folder / "log.db", 16, 200
    content = bytearray(log.read_bytes())
    size = int.from_bytes(content[16:18], "big")
    with contextlib.closing(sqlite3.connect(log)) as connection:
        (root,) = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'trials'"
        ).fetchone()
    leaf = bytes(content[(root - 1) * size : root * size])
    pages = len(content) // size

    def inner(child: int) -> bytes:
        cells = [child.to_bytes(4, "big") + bytes([1])] * ways
        places = [size - 5 * (number + 1) for number in range(ways)]
        header = (
            bytes([5, 0, 0])
            + ways.to_bytes(2, "big")
            + places[-1].to_bytes(2, "big")
            + bytes(1)
            + child.to_bytes(4, "big")
        )
        return (header + b"".join(place.to_bytes(2, "big") for place in places)).ljust(
            places[-1], b"\0"
        ) + b"".join(cells)

    content[(root - 1) * size : root * size] = inner(pages + 1)
    for level in range(1, levels):
        content += inner(pages + level + 1)
    content += leaf
    content[28:32] = (len(content) // size).to_bytes(4, "big")
    path.write_bytes(content)
    return path


def test_pages_that_lead_in_circles_end(whole: tuple[Path, Head], tmp_path: Path) -> None:
    path = circular(whole[0], tmp_path)
    log = QueryLog(str(path), create=False)
    assert len(list(log.rows(whole[1]))) == 12  # found by the index
    for work in (log.erased, lambda: log.erase("anna")):
        with pytest.raises(CountermarkError, match="more work than a log of its size"):
            work()


def test_a_client_of_whom_a_log_holds_nothing_is_not_erased(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever mistypes a name must not believe that something was erased."""
    path = str(tmp_path / "log.db")
    with QueryLog(path):
        pass
    assert main(["log", "erase", path, "--client", "nobody"]) == 2
    assert "holds nothing of a client called 'nobody'" in capsys.readouterr().err
