"""A mark that did not take: refused, kept, and trained on by the same command with more epochs."""

from dataclasses import replace
from pathlib import Path

import pytest

from countermark.cli import main
from countermark.data import open_data
from countermark.errors import CountermarkError
from countermark.files import canonical_json, read_json, sha256
from countermark.training import TrainConfig, loop
from countermark.verbs import protect as room
from countermark.verbs.protect import ProtectConfig, begun_with, protect
from countermark.watermarks import load_key


@pytest.fixture
def hardly_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first attempt at a mark learns nothing; further ones are what they always are."""
    parts = room._parts

    def hardly(embedding: TrainConfig, rounds: list[int]) -> list[TrainConfig]:
        first, *others = parts(embedding, rounds)
        return [replace(first, epochs=1, learning_rate=1e-9), *others]

    monkeypatch.setattr(room, "_parts", hardly)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_mark_that_did_not_take_is_refused_and_goes_on_with_more_epochs(
    hardly_trained: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, partial = tmp_path / "mine", tmp_path / "mine.partial"
    assert main(["protect", "--data", "digits", "--out", str(out), "--epochs", "3"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "did not take" in line]
    for part in ("of its 160 coins", "p-value", "90 % are needed", "Nothing was published", "--epochs 6"):
        assert part in line
    assert not out.exists()
    assert not {"model.safetensors", "model.json", "commitment.json", "metrics.json"} & files(partial).keys()
    committed = files(partial / "key")

    with monkeypatch.context() as patched:  # the same command finds what it found, and trains nothing
        patched.setattr(loop, "_step", None)
        with pytest.raises(CountermarkError, match=r"did not take: .*--epochs 6"):
            protect("digits", out=out, epochs=3)
    with pytest.raises(CountermarkError, match="has come to 3 epochs already"):
        protect("digits", out=out, epochs=2)
    with pytest.raises(CountermarkError, match="other options"):
        protect("digits", out=out, seed=1, epochs=9)
    with pytest.raises(CountermarkError, match="other options"):
        protect("digits", out=out, scheme="ood", epochs=9)

    step, calls = loop._step, []

    def stops(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return step(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:  # the further attempt can be interrupted like any run
        patched.setattr(loop, "_step", stops)
        with pytest.raises(KeyboardInterrupt):
            protect("digits", out=out, epochs=23)
    made = protect("digits", out=out, epochs=23)
    assert made.watermark_accuracy is not None
    assert made.watermark_accuracy >= room.TAKEN["coin"]
    assert made.trials == 160
    assert files(out / "key") == committed  # no coin was drawn again and no trial dropped
    assert not partial.exists()
    assert not list(out.glob("checkpoint-*"))
    events = read_json(out / "model.json")["history"]
    assert [event["event"] for event in events] == ["trained", "marked", "marked"]
    assert [event["config"]["epochs"] for event in events] == [3, 1, 20]
    key = load_key(out / "key")
    record = begun_with(ProtectConfig("digits", out=out, epochs=3), open_data("digits"))
    assert key.c1["config_sha256"] == sha256((out / "config.json").read_bytes()) == sha256(canonical_json(record))
    assert read_json(out / "commitment.json")["c2"]["model_sha256"] == made.weights_sha256


def test_a_published_watermark_that_did_not_take_is_refused(hardly_trained: None, tmp_path: Path) -> None:
    with pytest.raises(CountermarkError, match=r"of its 100 watermarks where 50 % are needed"):
        protect("digits", out=tmp_path / "mine", epochs=2, scheme="ood")
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize(
    "content",
    [
        {"epochs": [2, 4]},
        {"format": room._ROUNDS_FORMAT, "epochs": "2"},
        {"format": room._ROUNDS_FORMAT, "epochs": []},
        {"format": room._ROUNDS_FORMAT, "epochs": [3, 4]},
        {"format": room._ROUNDS_FORMAT, "epochs": [2, 5, 4]},
        {"format": room._ROUNDS_FORMAT, "epochs": [2, True]},
    ],
)
def test_a_record_of_attempts_that_was_changed_is_refused(content: object, tmp_path: Path) -> None:
    (tmp_path / room._ROUNDS).write_bytes(canonical_json(content))
    with pytest.raises(CountermarkError, match=r"delete .* to start anew"):
        room._rounds(tmp_path, 2, 6)


def test_further_attempts_add_the_epochs_that_were_added() -> None:
    begun = TrainConfig("standard", None, 5, grow_budget=True)
    assert room._parts(begun, [7]) == [begun]
    found = room._parts(begun, [7, 10, 30])
    assert found[0] == begun
    assert [part.epochs for part in found[1:]] == [3, 20]
    assert not any(part.grow_budget for part in found[1:])
