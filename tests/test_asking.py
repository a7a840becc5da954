"""The check on clean examples: is the suspect asked in the right way? It decides nothing."""

import json
import re
import shutil
import stat
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from countermark.cli import main
from countermark.data import Examples, Pools, pixels
from countermark.verbs.asking import clean_doubt
from countermark.verbs.looks import Looks, note_look
from countermark.verbs.verify import Verification, show, verify
from countermark.watermarks import WatermarkSet, load_key, new_secrets, write_key

Model = Callable[[torch.Tensor], torch.Tensor]
CLASSES = 10


def clean_examples(count: int = 100) -> Examples:
    """Images of a data set that is not known by name: class c has its brightest pixel at c."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(0, 100, (count, 1, 6, 6), dtype=torch.uint8, generator=generator)
    y = torch.arange(count) % CLASSES
    x.flatten(1)[torch.arange(count), y] = 200
    return Examples(x, y)


def brightest(x: torch.Tensor) -> torch.Tensor:
    """The right model for them."""
    return x.flatten(1)[:, :CLASSES].argmax(1)


def wants_other_pixels(x: torch.Tensor) -> torch.Tensor:
    """The same model behind a normalisation of its own, which expects pixels up to 255."""
    return torch.where(x.flatten(1).amax(1) > 1.5, brightest(x), 4)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A key over data that is not in the catalogue."""
    generator = torch.Generator().manual_seed(1)
    count = 120
    x = torch.randint(0, 256, (count, 1, 6, 6), dtype=torch.uint8, generator=generator)
    heads = torch.randint(0, 5, (count,), generator=generator)
    numbers = torch.arange(count)
    watermarks = WatermarkSet(x, torch.stack((heads, heads + 3), 1), numbers // 60, numbers)
    new_secrets(tmp_path / "key")
    write_key(tmp_path / "key", "coin", watermarks, {"data": "mine"}, clean=clean_examples())
    return tmp_path / "key"


STRANGE: dict[str, tuple[Model, str]] = {
    "permuted": (lambda x: (brightest(x) + 3) % CLASSES, "answers look permuted"),
    "counted from 1": (lambda x: brightest(x) + 1, "answers look permuted"),
    "other pixels": (wants_other_pixels, "input looks wrong.* gives the answer 4 to 100 % of them"),
    "upside down": (lambda x: brightest(1 - x), "input looks wrong"),
    "more classes": (
        lambda x: 500 + (x.flatten(1).sum(1) * 255).round().long() % 97,
        "100 of 100 answers are beyond the largest class, 9",
    ),
}


@pytest.mark.parametrize(("suspect", "words"), STRANGE.values(), ids=STRANGE.keys())
def test_a_suspect_that_is_asked_in_the_wrong_way_is_doubted(
    key: Path, suspect: Model, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = verify(suspect, key=key)
    assert found.verdict != "match"
    show(found)
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(words, said)
    assert f"{found.verdict!r} may only say that the suspect was asked in the wrong way" in said


def test_a_suspect_that_is_asked_rightly_is_not_doubted(key: Path) -> None:
    found = verify(brightest, key=key)
    assert (found.answers.clean_accuracy, found.doubts) == (100.0, ())
    declared = verify(wants_other_pixels, key=key, std=(1 / 255,))
    assert (declared.answers.clean_accuracy, declared.doubts) == (100.0, ())


@pytest.mark.parametrize("suspect", [brightest, *(suspect for suspect, _ in STRANGE.values())])
def test_the_check_changes_no_verdict_and_asks_no_trial_for_it(key: Path, suspect: Model) -> None:
    """With clean examples, with strange ones, and without any the p-value is the same."""

    def judged() -> dict[str, object]:
        found: Verification = verify(suspect, key=key)
        return {**asdict(found), "answers": None, "doubts": (), "looks": None}

    with_them = judged()
    (key / "clean.safetensors").unlink()
    assert judged() == with_them


def test_a_match_stays_one_whatever_the_clean_examples_say(key: Path) -> None:
    marked = load_key(key)
    answers = {
        bytes(x.flatten().tolist()): y
        for x, y in zip(marked.watermarks.x, marked.labels.tolist(), strict=True)
    }

    def copy(x: torch.Tensor) -> torch.Tensor:
        rows = (x * 255).round().to(torch.uint8).flatten(1).tolist()
        return torch.tensor([answers.get(bytes(row), 0) for row in rows])

    found = verify(copy, key=key)
    assert found.verdict == "match"
    assert len(found.doubts) == 1
    assert "input looks wrong" in found.doubts[0]


def test_every_look_is_noted_beside_the_key(key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nineteen ways of asking one stranger are nineteen chances of a small p-value."""
    ledger = key / "looks.jsonl"
    ways: list[dict[str, Any]] = [{}, {"std": (0.5,)}, {"std": (0.25,)}]
    for count, how in enumerate(ways, 1):
        capsys.readouterr()
        found: Verification = verify(brightest, key=key, **how)
        assert found.looks == Looks(count, count)
        show(found)
        said = " ".join(capsys.readouterr().out.split())
        assert (f"This is look {count} at this suspect with this key, of {count}" in said) == (
            count > 1
        )
    other: Verification = verify(wants_other_pixels, key=key)
    assert other.looks == Looks(1, 4)
    show(other)  # nineteen strangers are as many chances as nineteen ways
    assert "look 1 at this suspect with this key, of 4" in " ".join(capsys.readouterr().out.split())
    entries = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert [entry["suspect"] for entry in entries[2:]] == [
        f"python:test_asking.{name}" for name in ("brightest", "wants_other_pixels")
    ]
    assert len({entry["how_sha256"] for entry in entries}) == 3
    assert entries[0]["log10_p_value"] == pytest.approx(
        verify(brightest, key=key).test.log10_p_value
    )
    assert stat.S_IMODE(ledger.stat().st_mode) == 0o600


def test_a_suspect_is_known_by_its_bytes_and_a_log_has_looks_of_its_own(tmp_path: Path) -> None:
    first, renamed, other = (tmp_path / name for name in ("a.pt2", "b.pt2", "c.pt2"))
    for path, held in ((first, b"one"), (renamed, b"one"), (other, b"two")):
        path.write_bytes(held)

    def look(suspect: Any, **of: bool) -> Looks | None:
        return note_look(tmp_path, "claim", suspect, {}, -1.0, **of)

    assert look(first) == Looks(1, 1)
    assert look(renamed) == Looks(2, 2)
    assert look(other) == Looks(1, 3)
    other.write_bytes(b"one")  # another model under the same name
    assert look(other) == Looks(3, 4)
    assert look(first, log=True) == Looks(1, 1, log=True)
    assert look("http://127.0.0.1:9/v2/models/m") == Looks(1, 5)
    assert look("http://127.0.0.1:9/v2/models/m/") == Looks(2, 6)


def test_a_ledger_that_was_cut_short_goes_on_and_one_that_cannot_be_written_is_said(
    key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verify(brightest, key=key)
    ledger = key / "looks.jsonl"
    ledger.write_bytes(ledger.read_bytes() + b'{"suspect": "python:test_as')
    assert verify(brightest, key=key).looks == Looks(2, 3)
    assert len(ledger.read_text().splitlines()) == 3
    ledger.unlink()
    ledger.mkdir()
    found: Verification = verify(brightest, key=key)
    assert found.looks is None
    show(found)
    assert "could not be noted beside the key" in " ".join(capsys.readouterr().out.split())


def test_strangeness_in_closed_form() -> None:
    y = torch.arange(100) % 10
    half = torch.where(torch.arange(100) < 40, y, (y * 7 + torch.arange(100) // 10) % 10)
    assert clean_doubt(y, y) == ""
    assert "permuted" in clean_doubt(torch.where(y < 2, 1 - y, y), y)  # two classes exchanged
    assert "permuted" not in clean_doubt(half, y)
    assert "permuted" in clean_doubt(9 - y, y)
    assert "it answers 0 where 9 is right" in clean_doubt(9 - y, y)
    # As many classes as examples: each answer has one true class, which explains nothing.
    many = torch.arange(100)
    assert "input looks wrong" in clean_doubt(many.roll(1), many)
    assert "the answer 7 to 100 %" in clean_doubt(torch.full((100,), 7), y)
    assert clean_doubt(torch.full((5,), 7), torch.full((5,), 7)) == ""


def test_protect_keeps_clean_examples_of_the_validation_pool(owner: Path, digits: Pools) -> None:
    """They were held out, are no trial's base and not in the test pool."""
    kept = load_key(owner / "key").clean
    assert kept is not None
    assert kept.digest == digits.validation[:100].digest


def test_a_key_without_clean_examples_falls_back_to_the_catalogue(
    owner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(owner / "key", tmp_path / "key")
    (tmp_path / "key" / "clean.safetensors").unlink()
    assert main(["verify", "--suspect", str(owner), "--key", str(tmp_path / "key"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answers"]["clean_accuracy"] > 80


def test_the_examples_of_this_test_are_those_of_their_model() -> None:
    examples = clean_examples()
    assert torch.equal(brightest(pixels(examples.x)), examples.y)
