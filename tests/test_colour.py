"""The study of colour photographs, benchmarks/colour.py, in small: every part makes its rows."""

from pathlib import Path

import pytest

import colour
from drawing import draw_folder
from shorter import take_any_mark


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> colour.Study:
    """One of few small images, whose owner learns the classes."""
    take_any_mark(monkeypatch)
    few = {
        name: {**options, **{key: 1 for key in ("finetune", "adversarial") if key in options}}
        for name, options in colour.REMOVALS.items()
    }
    few["overwritten"] = {"overwrite": 80}
    monkeypatch.setattr(colour, "REMOVALS", few)
    monkeypatch.setattr(colour, "THEFT", {name: {"queries": 60} for name in colour.THEFT})
    monkeypatch.setattr(
        colour, "GUARDED", {name: (thief, 60) for name, (thief, _) in colour.GUARDED.items()}
    )
    monkeypatch.setattr(colour, "COSTS", (0.2,))
    draw_folder(tmp_path / "shapes", each=200, size=16)
    return colour.Study(
        data=str(tmp_path / "shapes"),
        out=tmp_path / "out",
        objective="standard",
        network="surrogate",
        images=10,
        seed=0,
        device="cpu",
        epochs=15,
    )


def test_every_part_makes_its_rows_once(
    study: colour.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page names what is missing; one of all parts misses nothing, and no part is made again."""
    colour.owner(study)
    text = colour.page(study)
    assert "| marked |" in text
    missing = text.split("Not made yet: ")[1]
    for name in (
        "strict trained on",
        "suspect overwritten",
        "suspect theft natural",
        "keys robust",
    ):
        assert name in missing
    for part in colour.PARTS:
        part(study)
    text = colour.page(study)
    assert "Not made yet" not in text
    for title in (*colour.REMOVALS, *colour.THEFT, "standard stranger"):
        assert f"| {title} |" in text
    assert text.count("| natural |") == 1 + len(colour.COSTS)
    monkeypatch.setattr(colour, "write_json", None)  # whatever made something would call it
    for part in colour.PARTS:
        part(study)
    assert colour.page(study) == text
