"""The thieves of the guard's benchmarks, and the removals of the mark's, in small: they all run.

Their figures in the docs take hours; here every row is made from few digits.
"""

import csv
import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import guard_accounts
import guard_power
import outlast
from countermark.training import TrainConfig

FEW = 150  # images of a thief


@pytest.fixture
def runs(tmp_path: Path, owner: Path, stranger: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the models, and thieves who train for five epochs."""
    shutil.copytree(owner, tmp_path / "digits-0")
    shutil.copytree(stranger, tmp_path / "digits-0-stranger")
    trained = guard_power.train

    def shortly(*given: object, **options: object) -> object:
        network, examples, config = given
        assert isinstance(config, TrainConfig)
        return trained(network, examples, replace(config, epochs=5), **options)  # type: ignore[arg-type]

    monkeypatch.setattr(guard_power, "train", shortly)
    return tmp_path


def test_every_thief_of_the_guard_is_played_once(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = {"averaging": 9 * FEW, "black": 100, "grey": 100}
    for thief in guard_power.THIEVES:
        count = 100 if thief in ("black", "grey") else FEW
        guard_power.play(runs, "digits", 0, thief, count, 2.0, 16, True)
    rows = list(csv.DictReader(io.StringIO(guard_power.table(runs))))
    assert [row["thief"] for row in rows] == list(guard_power.THIEVES)
    committed = (Path(__file__).parents[1] / "docs" / "tables" / "guard-power.csv").read_text()
    assert list(rows[0]) == committed.splitlines()[0].split(",")
    for thief in guard_power.THIEVES:
        (path,) = runs.glob(f"digits-0-{thief}-*.json")
        record = json.loads(path.read_text())
        assert record["queries"] == queries.get(thief, FEW)
        assert record["suspect"]["agree"] + record["suspect"]["other"] <= record["trials"]
        assert len(record["strangers"]) == 3
    monkeypatch.setattr(guard_power, "calibrated", None)  # whoever plays again would call it
    guard_power.play(runs, "digits", 0, "natural", FEW, 2.0, 16, True)


def test_copies_are_traced_among_twenty_accounts(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is a stranger stays one, whatever twenty accounts have asked."""
    monkeypatch.setitem(guard_power.COST, "digits", 2.0)
    monkeypatch.setattr(guard_accounts, "KEYS", 5)
    words = ["guard_accounts", "--data", "digits", "--queries", str(FEW), "--runs", str(runs)]
    monkeypatch.setattr(sys, "argv", words)
    guard_accounts.main()
    (path,) = runs.glob("accounts-digits-*.json")
    record = json.loads(path.read_text())
    assert record["trials"] > 0
    assert record["stranger"]["named"] == []
    for size in (3, 5):
        assert f"{size} accounts that ask the same and vote" in record
        assert record[f"stranger, where {size} accounts ask the same"]["named"] == []


def test_every_removal_of_the_mark_makes_a_row(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The owner's ledger of looks is not that of a benchmark."""
    short = [words.replace("20", "1").replace("800", "80") for words in outlast.REMOVALS]
    short = [words.replace("3000", "100").replace("--epochs 8", "--epochs 1") for words in short]
    words = ["outlast", str(runs / "digits-0"), "--out", str(runs / "copies"), "--only", *short]
    monkeypatch.setattr(sys, "argv", words)
    looks = runs / "digits-0" / "key" / "looks.jsonl"
    before = looks.read_bytes() if looks.exists() else b""  # of the model that others share
    outlast.main()
    told = capsys.readouterr().out
    for each in short:
        assert f"| `{each}` |" in told
    assert "| the source model |" in told
    assert (looks.read_bytes() if looks.exists() else b"") == before
