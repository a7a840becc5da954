"""The query log: order, durability, tampering, erasure; on SQLite and on a real PostgreSQL."""

import os
import random
import shutil
import sqlite3
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from countermark.errors import CountermarkError
from countermark.files import canonical_json
from countermark.guard import LOG_FORMAT, Head, QueryLog, Row, read_head

MODEL = "ab" * 32


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


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a PostgreSQL that the tests started."""
    found = [path.parent for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))]
    found += [Path(path).parent for path in [shutil.which("initdb")] if path]
    if not found:
        pytest.skip("PostgreSQL is not installed")
    folder = tmp_path_factory.mktemp("postgres")
    user: list[str] = []
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        shutil.chown(folder, "postgres", "postgres")
        for parent in folder.parents:
            if parent.stat().st_mode & 0o005 != 0o005:
                parent.chmod(parent.stat().st_mode | 0o011)
    data, run = folder / "data", {"check": True, "capture_output": True, "timeout": 120, "cwd": "/"}
    subprocess.run([*user, str(found[0] / "initdb"), "-D", str(data), "-U", "owner", "-A", "trust", "--no-sync"], **run)  # type: ignore[call-overload]
    options = f"-c listen_addresses='' -c unix_socket_directories={folder}"
    control = [*user, str(found[0] / "pg_ctl"), "-D", str(data), "-w"]
    subprocess.run([*control, "-l", str(folder / "server.log"), "-o", options, "start"], **run)  # type: ignore[call-overload]
    yield f"postgresql://owner@/postgres?host={folder}"
    subprocess.run([*control, "-m", "immediate", "stop"], **run)  # type: ignore[call-overload]


@pytest.fixture(params=["sqlite", "postgresql"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty log in each of the databases."""
    if request.param == "sqlite":
        yield str(tmp_path / "log.db")
        return
    import psycopg

    url = request.getfixturevalue("postgres")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("DROP TABLE IF EXISTS trials, log_format, erased")
    yield url


def test_rows_come_back_in_order_and_once(address: str) -> None:
    log = QueryLog(address)
    assert log.append([row_of(3), row_of(1), row_of(3, answer=1)]) == [True, True, False]
    assert log.append([row_of(1), row_of(1, "bob"), row_of(2)]) == [False, True, True]
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
            logs[number].append([row_of(cell), row_of(1000 + cell, f"client {number}")])

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
    log.append([row_of(1), row_of(2, "bob", image=b"bobs own picture"), row_of(3)])
    head = log.head()
    assert log.erase("bob") == 1
    assert list(log.rows(head)) == [row_of(1), None, row_of(3)]
    assert log.erase("bob") == 0
    log.append([row_of(4)])
    assert len(list(log.rows(head))) == 4
    log.close()


def test_what_was_erased_is_not_on_the_disk_while_others_use_the_log(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    service, owner = QueryLog(str(path)), QueryLog(str(path))
    service.append([row_of(1), row_of(2, "bob", image=b"bobs own picture")])
    assert len(list(service.rows())) == 2
    assert owner.erase("bob") == 1
    service.append([row_of(3)])
    assert not any(b"bobs own picture" in file.read_bytes() for file in tmp_path.glob("log.db*"))
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM trials").fetchone()
    impatient = QueryLog(str(path))
    with impatient._using() as connection:  # it would wait for half a minute
        connection.exec_driver_sql("PRAGMA busy_timeout = 50")
    with pytest.raises(CountermarkError, match="other programs read the log; run the same again"):
        impatient.erase("anna")
    reader.close()
    assert impatient.erase("anna") == 0


def test_an_erased_client_gets_no_trials_again(address: str) -> None:
    """He may know his coins by now, and what he chose by them would be no evidence."""
    log = QueryLog(address)
    log.append([row_of(1), row_of(2, "bob"), row_of(3, "bob"), row_of(4, "carol")])
    assert log.erased() == 0
    assert log.erase("bob") == 2
    assert log.erase("nobody") == 0
    assert log.append([row_of(2, "bob"), row_of(9, "bob"), row_of(9)]) == [False, False, True]
    assert list(log.rows()) == [row_of(1), None, None, row_of(4, "carol"), row_of(9)]
    assert log.erased() == 1
    log.erase("carol")
    assert log.erased() == 2
    log.close()


def test_rows_that_an_earlier_release_erased_count_as_an_account_each(tmp_path: Path) -> None:
    path = tmp_path / "log.db"
    log = QueryLog(str(path))
    log.append([row_of(1), row_of(2, "bob"), row_of(3, "bob"), row_of(4, "carol")])
    log.erase("carol")
    with sqlite3.connect(path) as connection:
        columns = ", ".join(f"{name} = NULL" for name in ("salt", *Row.__dataclass_fields__))
        connection.execute(f"UPDATE trials SET {columns} WHERE client = 'bob'")
    connection.close()
    assert log.erased() == 3
    assert sum(row is None for row in log.rows()) == 3


def tampered(path: Path, statement: str, *values: object) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(statement, values)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Head]:
    path = tmp_path_factory.mktemp("log") / "log.db"
    log = QueryLog(str(path))
    log.append([row_of(cell) for cell in range(12)])
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
        ("UPDATE trials SET digest = (SELECT digest FROM trials WHERE number = 6) WHERE number = 5", "row 5 does not follow"),
        ("UPDATE trials SET link = (SELECT link FROM trials WHERE number = 6) WHERE number = 5", "row 5 does not follow"),
        ("UPDATE trials SET number = 100 - number WHERE number IN (5, 95)", "row 5 is missing"),
        ("UPDATE trials SET number = CASE number WHEN 5 THEN -6 WHEN 6 THEN -5 END WHERE number IN (5, 6)", "row 5 is missing"),
    ],
)
def test_tampering_is_found_and_located(whole: tuple[Path, Head], tmp_path: Path, statement: str, said: str) -> None:
    path = tmp_path / "log.db"
    shutil.copy(whole[0], path)
    tampered(path, statement)
    tampered(path, "UPDATE trials SET number = -number WHERE number < 0")
    with pytest.raises(CountermarkError, match=said if "-6" not in statement else "row 5"):
        list(QueryLog(str(path)).rows(whole[1]))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_flipped_byte_of_a_row_is_found(whole: tuple[Path, Head], tmp_path: Path, data: st.DataObject) -> None:
    path = Path(tempfile.mkdtemp(dir=tmp_path)) / "log.db"
    shutil.copy(whole[0], path)
    column = data.draw(st.sampled_from(["cell", "image", "salt", "digest", "link"]))
    number = data.draw(st.integers(1, 12))
    with sqlite3.connect(path) as connection:
        (value,) = connection.execute(f"SELECT {column} FROM trials WHERE number = ?", (number,)).fetchone()
        place, bit = data.draw(st.integers(0, len(value) - 1)), data.draw(st.integers(0, 7))
        flipped = bytes(byte ^ (1 << bit if i == place else 0) for i, byte in enumerate(value))
        connection.execute(f"UPDATE trials SET {column} = ? WHERE number = ?", (flipped, number))
    with pytest.raises(CountermarkError, match=f"row {number} "):
        list(QueryLog(str(path)).rows(whole[1]))


@pytest.mark.parametrize("column", ["model", "client"])
def test_a_text_that_is_no_text_any_more_is_located(whole: tuple[Path, Head], tmp_path: Path, column: str) -> None:
    path = tmp_path / "log.db"
    shutil.copy(whole[0], path)
    tampered(path, f"UPDATE trials SET {column} = CAST(x'61ff62' AS TEXT) WHERE number = 7")
    with pytest.raises(CountermarkError, match="row 7 cannot be read"):
        list(QueryLog(str(path)).rows(whole[1]))


def test_any_flipped_bit_of_the_file_is_an_error_with_a_reason(whole: tuple[Path, Head], tmp_path: Path) -> None:
    """Or it is in a place that holds nothing."""
    intact = list(QueryLog(str(whole[0])).rows(whole[1]))
    content, generator = whole[0].read_bytes(), random.Random(3)
    for number in range(150):
        path = tmp_path / f"{number}.db"
        place = generator.randrange(len(content) * 8)
        path.write_bytes(content[: place // 8] + bytes([content[place // 8] ^ (1 << place % 8)]) + content[place // 8 + 1 :])
        try:
            with QueryLog(str(path), create=False) as log:
                found = list(log.rows(whole[1]))
        except CountermarkError:
            continue
        assert found == intact


def test_a_log_written_anew_does_not_lead_to_the_published_head(tmp_path: Path, whole: tuple[Path, Head]) -> None:
    log = QueryLog(str(tmp_path / "new.db"))
    log.append([row_of(cell) for cell in range(12)])  # the same rows, other salts
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


def test_a_file_that_is_no_log(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("not a database, whatever its name says, and long enough to look at" * 9)
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
    log.append([row_of(0)])
    with log._engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 12")
    with pytest.raises(CountermarkError, match="space"):
        log.append([row_of(cell, image=bytes(60000)) for cell in range(1, 4)])
    assert list(log.rows()) == [row_of(0)]


@pytest.mark.parametrize("text", ["", "[]", "{}", "{" * 9999, '{"format": "countermark log 1", "rows": -1, "hash": "' + "0" * 64 + '"}'])
def test_a_head_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "head.json").write_text(text)
    with pytest.raises(CountermarkError, match="not the head"):
        read_head(tmp_path / "head.json")
    (tmp_path / "good.json").write_bytes(canonical_json({"format": LOG_FORMAT, "rows": 2, "hash": "0" * 64}))
    assert read_head(tmp_path / "good.json") == Head(2, "0" * 64)
