"""`data check`, the pools of data from outside, and finding the data that a model declares."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import countermark
from countermark import cli
from countermark.data import (
    KNOWN,
    Dataset,
    Examples,
    by_digest,
    known_images,
    load_ood,
    open_data,
    store,
)
from countermark.data.check import check_data
from countermark.data.pools import POOLS, packed, unpacked
from countermark.data.source import READERS
from countermark.errors import CountermarkError
from countermark.networks import DataRecord, Description, declared_pools, describing, open_declared
from countermark.threat import COLOUR
from noise import class_folders, drawn, save


def soiled(place: Path) -> Path:
    """A folder with a damaged file, a grey and a transparent one, duplicates and other files."""
    class_folders(place, 3, 120)
    save(place / "class0" / "grey.png", drawn(1, channels=1))
    save(place / "class1" / "clear.png", drawn(2, channels=4))
    save(place / "class2" / "other.png", drawn(0))
    save(place / "class0" / "again.png", drawn(1, 8, 8))
    (place / "class2" / "bad\nname.png").write_text("text")
    (place / "class2" / "notes.txt").write_text("text")
    return place


def test_what_a_folder_holds(tmp_path: Path) -> None:
    place = soiled(tmp_path / "photos")
    findings = check_data(place, cache=tmp_path / "cache")
    found = findings.found
    assert found.counts.keys() == {"train", "test"}
    assert [sum(each) for each in zip(*found.counts.values(), strict=True)] == [122, 121, 121]
    assert found.converted == {"alpha": 1, "grey": 1}
    assert found.damaged == (("class2/bad\nname.png", "is not a PNG, JPEG, WebP or BMP image"),)
    assert (found.duplicates, found.disputed, found.ignored, found.cut, found.colour) == (
        2,
        1,
        1,
        True,
        True,
    )
    assert found.shapes == {"8x8": 364}
    assert findings.problem is not None
    assert "1 image cannot be read" in findings.problem
    assert (findings.pools, findings.exit_status) == (None, 1)
    findings = check_data(place, skip_damaged=True, cache=tmp_path / "cache")
    assert findings.found == found
    data = open_data(place, skip_damaged=True, cache=tmp_path / "cache")
    assert findings.pools == {name: len(getattr(data.pools(0), name)) for name in POOLS}
    assert (findings.digest, findings.shape) == (data.digest, data.shape)
    assert "bases are too few for 2 batches of 40 trials" in str(
        findings.problem
    )  # 303 images leave 75


@pytest.mark.parametrize(
    ("each", "word"),
    [(5, "are too few for pools"), (40, "watermark bases are too few"), (300, None)],
)
def test_too_little_for_a_mark_is_said(each: int, word: str | None, tmp_path: Path) -> None:
    findings = check_data(class_folders(tmp_path / "photos", 2, each), cache=tmp_path / "cache")
    assert findings.found.images == 2 * each
    if word is None:
        assert (findings.problem, findings.exit_status) == (None, 0)
    else:
        assert word in str(findings.problem)


def test_shapes_are_listed_where_a_size_is_missing(tmp_path: Path) -> None:
    place = class_folders(tmp_path / "photos", 2, 6)
    save(place / "class0" / "tall.png", drawn(1, 20, 10))
    findings = check_data(place, cache=tmp_path / "cache")
    assert findings.found.shapes == {"8x8": 12, "20x10": 1}
    assert findings.found.duplicates is None
    assert "--size" in str(findings.problem)
    assert check_data(place, size=8, cache=tmp_path / "cache").found.duplicates == 0


def test_a_known_data_set_and_an_open_one_can_be_checked() -> None:
    findings = check_data("digits")
    assert findings.found.counts["test"] == tuple(open_data("digits").test.y.bincount().tolist())
    assert (findings.problem, findings.pools) == (
        None,
        {"training": 937, "validation": 60, "bases": 220, "thief": 280, "test": 300},
    )
    assert check_data(open_data("digits")) == findings


def check(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    status = cli.main(["data", "check", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def test_the_verb_shows_a_table_and_gives_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, cache = soiled(tmp_path / "photos"), ("--cache", tmp_path / "cache")
    status, out, _ = check(capsys, place, *cache)
    assert status == 1
    for line in (
        "class0",
        "converted:  1 alpha, 1 grey",
        r"'class2/bad\nname.png' is not",
        "duplicates: 2, 1 of them under another label",
    ):
        assert " ".join(line.split()) in " ".join(out.split())
    assert all(line.isprintable() for line in out.splitlines())
    status, out, _ = check(capsys, place, *cache, "--skip-damaged", "--json")
    told = json.loads(out)
    assert (told["found"]["duplicates"], told["digest"]) == (
        2,
        open_data(place, skip_damaged=True, cache=tmp_path / "cache").digest,
    )
    status, out, _ = check(capsys, class_folders(tmp_path / "many", 2, 300), *cache)
    assert (status, "It can be used." in out) == (0, True)
    for wrong in (tmp_path / "gone", tmp_path / "cache", ""):
        status, out, err = check(capsys, wrong, *cache)
        assert (status, out, err.count("\n")) == (2, "", 1)
    assert countermark.data_check(place, cache=tmp_path / "cache").found.duplicates == 2
    arrays = np.stack([drawn(i) for i in range(24)]), np.arange(24) % 2
    assert countermark.data_check(arrays, cache=tmp_path / "cache").found.images == 24


# Pools.


def random_data(contents: list[int], test: list[int], seed: int) -> Dataset:
    """A data set of tiny images, of which equal numbers give equal images."""

    def examples(numbers: list[int]) -> Examples:
        x = (
            torch.tensor(numbers, dtype=torch.uint8)
            .reshape(-1, 1, 1, 1)
            .expand(-1, 1, 2, 2)
            .contiguous()
        )
        return Examples(x, torch.arange(len(numbers)) % 2)

    sizes = {"validation": 3, "bases": 4, "thief": 2}
    return Dataset("", examples(contents), examples(test), ("a", "b"), COLOUR, pool_sizes=sizes)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=120),
    st.lists(st.integers(0, 40), max_size=10),
    st.integers(0, 100),
    st.data(),
)
def test_equal_images_never_fall_into_two_pools(
    contents: list[int], test: list[int], seed: int, draw: st.DataObject
) -> None:
    """No image of one pool equals an image of another, whichever images are equal.

    Every image that is no test image is in one pool, and known images are held out last.
    """
    data = random_data(contents, test, seed)
    every = contents + test
    known = torch.tensor(
        draw.draw(st.lists(st.booleans(), min_size=len(every), max_size=len(every))),
        dtype=torch.bool,
    )
    assert torch.equal(unpacked(packed(known), len(every)), known)
    usable = set(contents) - set(test)
    for mask in (None, known):
        try:
            pools = data.pools(seed, mask)
        except CountermarkError:
            assert len(usable) <= 9
            continue
        seen = {name: set(getattr(pools, name).x[:, 0, 0, 0].tolist()) for name in POOLS}
        assert [len(getattr(pools, name)) for name in ("validation", "bases", "thief")] == [3, 4, 2]
        for first in POOLS:
            assert all(first == second or not seen[first] & seen[second] for second in POOLS)
        assert set().union(*seen.values()) == usable | set(test)
        held = seen["validation"] | seen["bases"] | seen["thief"]
        assert sorted(pools.training.x[:, 0, 0, 0].tolist()) == sorted(
            n for n in contents if n in usable - held
        )
        if mask is not None:
            knew = {n for n, each in zip(every, mask.tolist(), strict=True) if each}
            assert held <= usable - knew or usable - knew <= held
            assert pools.known["bases"] == len(seen["bases"] & knew)
            assert pools.known["test"] == sum(n in knew for n in test)


def test_the_pools_of_0_1_0_are_what_they_were() -> None:
    """By its own rule: the seeded permutation, in the order validation, bases, thief."""
    data = open_data("digits")
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(3))
    pools = data.pools(3)
    for name, size in KNOWN["digits"].pools.items():  # type: ignore[union-attr]
        assert torch.equal(getattr(pools, name).x, data.train.x[order[:size]])
        order = order[size:]
    assert torch.equal(pools.training.x, data.train.x[order])


def test_given_weights_know_the_training_part_and_not_the_validation_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, (part, each) in enumerate({"train": 40, "val": 40, "test": 5}.items()):
        class_folders(tmp_path / "photos" / part, 2, each, start=number * 100_000)
    data = open_data(tmp_path / "photos", cache=tmp_path / "cache")
    known = known_images(data, None)
    assert known.tolist() == [True] * 80 + [False] * 90
    pools = data.pools(0, known)
    assert [pools.known[name] for name in ("bases", "validation", "test")] == [0, 0, 0]
    flat = open_data(class_folders(tmp_path / "flat", 2, 12), cache=tmp_path / "cache")
    assert bool(known_images(flat, None).all())  # its test part was cut out here
    assert bool(known_images(open_data("digits"), None).all())  # and theirs
    assert (
        known_images(data, (data.test.x, data.test.y), cache=tmp_path / "cache").tolist()
        == [False] * 160 + [True] * 10
    )
    elsewhere = class_folders(
        tmp_path / "elsewhere", 2, 3
    )  # three of the first forty of each class
    assert known_images(data, elsewhere, cache=tmp_path / "cache").sum() == 6
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trained_data.py").write_text(
        "import numpy as np\n\ndef make():\n    return np.load('x.npy'), np.arange(8) % 2\n"
    )
    np.save("x.npy", data.train.x[:8].numpy())
    assert (
        known_images(data, "trained_data:make", cache=tmp_path / "cache").sum() == 8
    )  # its owner named the code
    with pytest.raises(CountermarkError, match="there is no module"):
        known_images(data, f"{'a' * 300}:b")


def test_a_mask_of_other_images_is_refused() -> None:
    data = open_data("digits")
    with pytest.raises(CountermarkError, match="mask of the 1497 training and the 300 test images"):
        data.pools(0, torch.ones(1497, dtype=torch.bool))
    for text in (
        "",
        "?",
        packed(torch.ones(100, dtype=torch.bool)),
        packed(torch.ones(1 << 20, dtype=torch.bool)),
    ):
        with pytest.raises(CountermarkError, match="does not fit the data"):
            unpacked(text, 1797)


def test_the_pools_are_declared_by_their_sizes_and_by_what_was_known(tmp_path: Path) -> None:
    """Declared pools stay the same when the same images are opened from another place.

    So do the counts of known images in them.
    """
    data, known = (
        open_data("digits"),
        torch.rand(1797, generator=torch.Generator().manual_seed(0)) < 0.6,
    )
    pools = data.pools(5, known)
    description = describing(data, "small", seed=5, known=packed(known))
    np.savez(
        tmp_path / "digits.npz",
        x_train=data.train.x[:, 0].numpy(),
        y_train=data.train.y.numpy(),
        x_test=data.test.x[:, 0].numpy(),
        y_test=data.test.y.numpy(),
        class_names=np.array(data.class_names),
    )
    assert open_data(tmp_path / "digits.npz", cache=tmp_path / "cache").held_out != data.held_out
    again = declared_pools(
        description,
        open_declared(description, data=tmp_path / "digits.npz", cache=tmp_path / "cache"),
    )
    assert again.digests() == pools.digests()
    assert again.known == pools.known


def test_bases_out_of_distribution_are_those_of_the_pools() -> None:
    data = open_data("digits")
    pools = data.pools(0, torch.arange(1797) < 900)
    turned = load_ood(data, pools, 0)
    assert torch.equal(torch.rot90(turned.x, dims=(3, 2)), pools.bases.x)


# The data that a model declares.


def declared(data: Dataset) -> Description:
    record = DataRecord(data.place, data.digest, data.size, data.skip_damaged)
    return Description("small", data.shape, data.class_names, record, data.threat, 0)


def test_declared_data_are_found_where_they_are_and_in_the_cache(tmp_path: Path) -> None:
    place, cache = class_folders(tmp_path / "photos", 2, 12), tmp_path / "cache"
    data = open_data(place, size=4, cache=cache)
    description = declared(data)
    assert open_declared(description, cache=cache).digest == data.digest
    shutil.move(place, tmp_path / "moved")
    again = open_declared(description, cache=cache)
    assert (again.digest, again.place, again.size) == (data.digest, str(place), 4)
    assert again.pools(0).digests() == data.pools(0).digests()
    assert (
        open_declared(description, data=tmp_path / "moved", cache=tmp_path / "other").digest
        == data.digest
    )
    with pytest.raises(CountermarkError, match=r"are gone from .*photos.*--data PLACE"):
        open_declared(description, cache=tmp_path / "empty")


def test_changed_data_are_refused_and_never_mixed_with_what_the_cache_has(tmp_path: Path) -> None:
    place, cache = class_folders(tmp_path / "photos", 2, 12), tmp_path / "cache"
    description = declared(open_data(place, cache=cache))
    save(place / "class0" / "0003.png", drawn(99))
    with pytest.raises(CountermarkError, match="was changed since the model was made"):
        open_declared(description, cache=cache)
    shutil.rmtree(place / "class0")
    with pytest.raises(CountermarkError, match="has one class"):
        open_declared(description, cache=cache)


def test_objects_are_found_in_the_cache_by_their_digest(tmp_path: Path) -> None:
    arrays = np.stack([drawn(i) for i in range(24)]), np.arange(24) % 2
    data = open_data(arrays, cache=tmp_path / "cache")
    assert open_declared(declared(data), cache=tmp_path / "cache").digest == data.digest
    with pytest.raises(CountermarkError, match="given in Python"):
        open_declared(declared(data), cache=tmp_path / "empty")
    assert open_declared(declared(data), data=data).digest == data.digest
    for digest in (
        "",
        "../sets/" + data.digest,
        data.digest + "/.",
        "/",
        data.digest.upper() + "G",
    ):
        assert by_digest(digest, tmp_path / "cache") is None


def test_no_code_is_imported_because_a_model_folder_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "declared_data.py").write_text("raise SystemExit('it was imported')\n")
    monkeypatch.chdir(tmp_path)
    arrays = np.stack([drawn(i) for i in range(24)]), np.arange(24) % 2
    data = open_data(arrays, cache=tmp_path / "cache")
    description = declared(replace(data, place="declared_data:make"))
    assert open_declared(description, cache=tmp_path / "cache").digest == data.digest
    with pytest.raises(CountermarkError, match="only if you name it: --data declared_data:make"):
        open_declared(description, cache=tmp_path / "empty")


def test_every_reader_takes_a_place_of_its_own(tmp_path: Path) -> None:
    """The table has no row that another one hides."""
    np.savez(tmp_path / "x.npz", x=np.zeros(1))
    (tmp_path / "x.parquet").write_bytes(b"")
    places = [
        open_data("digits"),
        "digits",
        tmp_path / "x.npz",
        tmp_path / "x.parquet",
        tmp_path,
        "shop.data:make",
        (1, 2),
    ]
    assert [
        next(i for i, reader in enumerate(READERS) if reader.takes(place)) for place in places
    ] == list(range(len(READERS)))


def test_a_set_of_many_images_is_never_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pools, digests and batches of a data set too large for memory read a few images at a time."""
    monkeypatch.setattr(store, "_RESIDENT", 0)
    monkeypatch.setattr("countermark.data.examples._CHUNK", 8 * 8 * 3 * 16)
    place = class_folders(tmp_path / "photos", 2, 150)
    data = open_data(place, cache=tmp_path / "cache")
    most = []
    read = type(data.train.rows).__getitem__

    def counted(rows: Any, index: Any) -> torch.Tensor:
        found = read(rows, index)
        most.append(len(found))
        return found

    monkeypatch.setattr("countermark.data.examples.Rows.__getitem__", counted)
    pools = data.pools(0)
    assert len(pools.digests()) == 5
    pools.training.batch(torch.arange(10), torch.device("cpu"))
    assert max(most) <= 16


@pytest.mark.parametrize("by_name", [True, False])
def test_data_that_keep_their_size_are_not_asked_for_another(by_name: bool, tmp_path: Path) -> None:
    """The size is the model's, and nobody typed it."""
    data, cache = "digits" if by_name else open_data("digits"), tmp_path / "cache"
    x = np.stack([drawn(i) for i in range(24)])
    made = open_data((x, np.arange(24) % 2), size=4, cache=cache)
    with pytest.raises(CountermarkError, match="it is for other data"):
        open_declared(declared(made), data=data, cache=cache)


def test_what_there_is_none_of_is_not_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(
        tmp_path / "none.npz",
        x_train=np.zeros((0, 8, 8), np.uint8),
        y_train=np.zeros(0, np.int64),
        class_names=["cat", "dog"],
    )
    assert (
        cli.main(["data", "check", str(tmp_path / "none.npz"), "--cache", str(tmp_path / "cache")])
        == 1
    )
    said = capsys.readouterr().out
    assert "has no images that can be read" in " ".join(said.split())
    assert "\nimages:" not in said
    place = class_folders(tmp_path / "photos", 2, 6)
    (place / "class0" / "notes.txt").write_text("text")
    cli.main(["data", "check", str(place), "--cache", str(tmp_path / "cache")])
    assert "ignored:    1 other file\n" in capsys.readouterr().out
