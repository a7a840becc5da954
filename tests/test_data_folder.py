"""Folders of images: what is taken, what is refused, and what the cache keeps of them."""

import fcntl
import itertools
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from countermark.data import reading, store
from countermark.data.dataset import Dataset
from countermark.data.folder import list_folder
from countermark.data.images import Decoded
from countermark.data.reading import Found, Item, Listing, decoded
from countermark.data.store import bring_in, by_digest, stored
from countermark.errors import CountermarkError
from noise import class_folders, drawn, save


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def opened(
    place: Path, cache: Path, size: int | None = None, skip_damaged: bool = False
) -> Dataset:
    return stored(list_folder(place), size=size, skip_damaged=skip_damaged, cache=cache)


def found(place: Path, cache: Path, size: int | None = None, skip_damaged: bool = False) -> Found:
    return bring_in(list_folder(place), size=size, skip_damaged=skip_damaged, cache=cache)[0]


def refusal(place: Path, cache: Path, **options: object) -> str:
    """The one line that a place is refused with; nothing is left in the cache."""
    with pytest.raises(CountermarkError) as told:
        opened(place, cache, **options)
    assert str(told.value).isprintable()
    assert not [path for path in cache.rglob("*") if path.is_file()]
    assert not list((cache / "sets").glob(".*"))
    return str(told.value)


@pytest.mark.parametrize("other", ["test", "val", "valid", "validation"])
def test_parts_are_read_in_sorted_order(tmp_path: Path, cache: Path, other: str) -> None:
    for number, (part, each) in enumerate((("train", 3), (other, 2))):
        class_folders(tmp_path / "photos" / part, 2, each, start=number * 100_000)
    data = opened(tmp_path / "photos", cache)
    assert data.class_names == ("class0", "class1")
    assert data.train.y.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test.y.tolist() == [0, 0, 1, 1]
    expected = [drawn(label * 10_000 + i) for label in (0, 1) for i in range(3)]
    assert np.array_equal(data.train.x.numpy(), np.stack(expected).transpose(0, 3, 1, 2))
    expected = [drawn(100_000 + label * 10_000 + i) for label in (0, 1) for i in range(2)]
    assert np.array_equal(data.test.x.numpy(), np.stack(expected).transpose(0, 3, 1, 2))
    assert not found(tmp_path / "photos", cache).cut


def test_a_validation_part_beside_a_test_part_ends_the_training_part(
    tmp_path: Path, cache: Path
) -> None:
    for number, part in enumerate(("train", "val", "test")):
        class_folders(tmp_path / "photos" / part, 2, 3, start=number * 100_000)
    data = opened(tmp_path / "photos", cache)
    assert data.parts == {"train": 6, "val": 6, "test": 6}
    assert data.train.y.tolist() == [0, 0, 0, 1, 1, 1] * 2
    assert torch.equal(data.train.x[6], torch.from_numpy(drawn(100_000).transpose(2, 0, 1)))


def test_a_sixth_of_each_class_is_cut_by_content(tmp_path: Path, cache: Path) -> None:
    """Whatever files are called, the same images are test images; equal images stay together."""
    place = class_folders(tmp_path / "photos", 2, 18)
    for i in range(5):
        save(place / "class0" / f"again{i}.png", drawn(7))
    data = opened(place, cache)
    assert (
        data.test.y.bincount().tolist() == [3, 3] or len(data.test) > 6
    )  # more only where the double is among them
    assert len(data.train) + len(data.test) == 41
    assert data.duplicates == 5
    assert found(place, cache).cut
    assert not set(data.train.contents().tolist()) & set(data.test.contents().tolist())
    other = tmp_path / "renamed"
    for path in sorted(place.rglob("*.png")):
        target = other / path.parent.name / f"{int.from_bytes(os.urandom(4), 'big')}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    again = opened(other, cache)
    assert sorted(again.test.contents().tolist()) == sorted(data.test.contents().tolist())


def test_grey_ones_among_colour_ones_are_converted_and_counted(tmp_path: Path, cache: Path) -> None:
    """Whether the first colours come early or late; a folder of grey images alone stays grey."""
    place = class_folders(tmp_path / "photos", 2, 6, channels=1)
    grey = opened(place, cache)
    assert grey.shape == (1, 8, 8)
    assert not grey.colour
    assert grey.converted == {}
    save(place / "class1" / "0003.png", drawn(1, channels=3))
    save(place / "class1" / "0004.png", drawn(2, channels=4))
    coloured = opened(place, cache)
    assert coloured.shape == (3, 8, 8)
    assert coloured.converted == {"alpha": 1, "grey": 10}
    everything = torch.cat([coloured.train.x, coloured.test.x])
    assert int((everything == everything[:, :1]).all(dim=(1, 2, 3)).sum()) == 10
    save(place / "class0" / "0000.png", drawn(3, channels=3))
    assert opened(place, cache).converted == {"alpha": 1, "grey": 9}


def test_hidden_and_other_files_are_passed_over_and_counted(tmp_path: Path, cache: Path) -> None:
    place = class_folders(tmp_path / "photos", 2, 6)
    clean = opened(place, cache).digest
    (place / ".git").mkdir()
    (place / ".git" / "x.png").write_bytes(b"no image")
    (place / "class0" / ".hidden.png").write_bytes(b"no image")
    (place / "class0" / "Thumbs.db").write_bytes(b"x")
    (place / "README.txt").write_text("x")
    save(place / "stray.png", drawn(1))
    os.mkfifo(place / "class0" / "pipe.png")
    assert found(place, cache).ignored == 4
    assert opened(place, cache).digest == clean


def test_a_file_is_read_by_its_content(tmp_path: Path, cache: Path) -> None:
    place = class_folders(tmp_path / "photos", 2, 6)
    (place / "class0" / "0000.png").rename(place / "class0" / "0000.JPG")
    assert len(opened(place, cache).train) == 10


def test_several_shapes_are_listed_and_a_size_brings_them_to_one(
    tmp_path: Path, cache: Path
) -> None:
    place = class_folders(tmp_path / "photos", 2, 6)
    save(place / "class0" / "a.png", drawn(1, 10, 20))
    save(place / "class1" / "b.png", drawn(2, 10, 20))
    save(place / "class1" / "c.png", drawn(3, 1, 1))
    told = refusal(place, cache)
    assert "3 shapes (height x width): 8x8 (12 images), 10x20 (2 images), 1x1 (1 image)" in told
    assert "--size" in told
    data = opened(place, cache, size=4)
    assert data.shape == (3, 4, 4)
    assert data.size == 4
    assert len(data.train) + len(data.test) == 15


def _damage(place: Path) -> Path:
    (place / "class0" / "text.png").write_text("no image")
    whole = (place / "class1" / "0001.png").read_bytes()
    (place / "class1" / "torn.png").write_bytes(whole[: len(whole) // 2])
    return place


def test_damaged_files_are_named_or_left_out(tmp_path: Path, cache: Path) -> None:
    place = class_folders(tmp_path / "photos", 2, 6)
    clean = opened(place, cache).digest
    shutil.rmtree(cache)
    told = refusal(_damage(place), cache)
    assert "2 images cannot be read" in told
    assert "class0/text.png" in told
    assert "class1/torn.png" in told
    assert "--skip-damaged" in told
    data = opened(place, cache, skip_damaged=True)
    assert data.digest == clean
    assert data.damaged == ("class0/text.png", "class1/torn.png")
    assert data.skip_damaged
    with pytest.raises(CountermarkError, match="cannot be read"):
        opened(place, cache)  # what is in the cache does not excuse it
    for i in range(9):
        (place / "class0" / f"x{i}.png").write_bytes(b"")
    assert "and 6 more" in refusal(place, tmp_path / "empty")


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda place: None, "no class folders"),
        (lambda place: save(place / "a.png", drawn(1)), "no class folders"),
        (lambda place: (place / "cat").mkdir(), "no images that can be read"),
        (lambda place: save(place / "cat" / "a.png", drawn(1)), "one class, 'cat'"),
        (lambda place: class_folders(place, 1), "one class"),
        (lambda place: save(class_folders(place) / "rare" / "a.png", drawn(1)), "'rare' has 1"),
        (lambda place: (class_folders(place) / "none").mkdir(), "'none' has 0"),
        (
            lambda place: save(class_folders(place) / "class0" / "more" / "a.png", drawn(1)),
            "class0/more is a folder within a class",
        ),
        (
            lambda place: class_folders(place / "test"),
            "no class folders in train, only 'test'; add images to train on",
        ),
        (
            lambda place: [class_folders(place / part) for part in ("test", "val")],
            "only 'test', 'val'",
        ),
        (
            lambda place: [(place / "train").mkdir(), class_folders(place / "test")],
            "no class folders in train",
        ),
        (
            lambda place: save(
                class_folders(place / "train") / ".." / "test" / "dog" / "a.png", drawn(1)
            ),
            "lacks: 'dog'",
        ),
        (
            lambda place: save(
                class_folders(place / "train") / "class0" / "deep" / "a.png", drawn(1)
            ),
            "within a class",
        ),
        (
            lambda place: [class_folders(place / part) for part in ("train", "val", "valid")],
            "several folders",
        ),
        (
            lambda place: save(class_folders(place / "train") / ".." / "cat" / "a.png", drawn(1)),
            "within a class",
        ),
    ],
)
def test_folders_that_are_no_data_set(
    make: Callable[[Path], object], word: str, tmp_path: Path, cache: Path
) -> None:
    (tmp_path / "photos").mkdir()
    make(tmp_path / "photos")
    assert word in refusal(tmp_path / "photos", cache)


def test_a_class_called_train_is_a_class(tmp_path: Path, cache: Path) -> None:
    place = class_folders(tmp_path / "photos", 2, 6)
    (place / "class0").rename(place / "train")
    assert opened(place, cache).class_names == ("class1", "train")


def test_links_out_of_the_folder_are_refused_and_others_followed(
    tmp_path: Path, cache: Path
) -> None:
    place = class_folders(tmp_path / "photos", 2, 6)
    outside = class_folders(tmp_path / "outside", 1, 2)
    link = place / "class0" / "link.png"
    for target, word in (
        (outside / "class0" / "0000.png", "leads out of the folder"),
        (place / "gone.png", "leads nowhere"),
        (link, "leads nowhere"),
    ):
        link.symlink_to(target)
        assert word in refusal(place, cache)
        link.unlink()
    (place / "class2").symlink_to(outside / "class0")
    assert "leads out of the folder" in refusal(place, cache)
    (place / "class2").unlink()
    link.symlink_to(place / "class1" / "0000.png")
    (tmp_path / "alias").symlink_to(place)  # the place itself may be a link
    data = opened(tmp_path / "alias", cache)
    assert (len(data.train) + len(data.test), data.duplicates) == (13, 1)
    assert found(place, cache).disputed == 1
    link.unlink()
    (place / "class2").symlink_to(place)
    assert "within a class" in refusal(place, tmp_path / "fresh")


def test_any_name_of_a_file_system_is_read_and_shown_safely(tmp_path: Path, cache: Path) -> None:
    place = class_folders(tmp_path / "photos", 2, 6)
    odd = [b"new\nline", b"\xff\xfe", b"a" * 255, "\u202eright".encode(), b"\x1b[2J"]
    for i, name in enumerate(odd):
        more = class_folders(tmp_path / "more", 1, 3, start=i * 1000)
        folder = (more / "class0").rename(place / os.fsdecode(name))
        (folder / "0000.png").rename(folder / os.fsdecode(name[:200] + b".png"))
    data = opened(place, cache)
    assert {os.fsencode(name) for name in data.class_names} >= set(odd)
    again = opened(place, cache)
    assert (again.digest, again.class_names) == (data.digest, data.class_names)
    (place / os.fsdecode(b"\xff\xfe") / os.fsdecode(b"\xff\n.png")).write_bytes(b"no image")
    assert r"\udcff" in refusal(place, tmp_path / "fresh")


def test_equal_images_are_counted_and_so_are_those_of_another_class(
    tmp_path: Path, cache: Path
) -> None:
    place = class_folders(tmp_path / "photos", 2, 6)
    save(place / "class0" / "same.bmp", drawn(0))  # another file of the same pixels
    save(place / "class1" / "other.png", drawn(0))
    seen = found(place, cache)
    assert (seen.duplicates, seen.disputed) == (2, 1)


# The cache.


def test_an_unchanged_folder_is_not_read_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = class_folders(tmp_path / "photos", 2, 6)
    first = opened(place, cache)
    with monkeypatch.context() as patch:
        patch.setattr(store, "decoded", lambda *_: pytest.fail("it was read again"))
        again = opened(place, cache)
        assert torch.equal(again.train.x, first.train.x)
        assert again.digest == first.digest
        assert (again.converted, again.parts, again.duplicates) == (
            first.converted,
            first.parts,
            first.duplicates,
        )
        monkeypatch.chdir(tmp_path)
        assert opened(Path("photos"), cache).digest == first.digest
    for change in (
        lambda: save(place / "class0" / "0001.png", drawn(99)),
        lambda: (place / "class0" / "0002.png").unlink(),
        lambda: (place / "class0").rename(place / "class3"),
        lambda: shutil.copytree(place / "class1", place / "class9"),
    ):
        change()
        changed = opened(place, cache)
        assert changed.digest != first.digest
        first = changed


def test_a_change_that_keeps_size_and_time_of_writing_is_seen(tmp_path: Path, cache: Path) -> None:
    place = class_folders(tmp_path / "photos", 2, 6)
    path = save(place / "class0" / "0000.bmp", drawn(1))
    before, status = opened(place, cache), path.stat()
    save(path, drawn(2))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert opened(place, cache).digest != before.digest


def test_a_folder_that_changes_while_it_is_read_is_refused(tmp_path: Path, cache: Path) -> None:
    place = class_folders(tmp_path / "photos", 2, 6)
    listing = list_folder(place)
    save(place / "class0" / "0001.png", drawn(99))
    with pytest.raises(CountermarkError, match="changed while it was read"):
        stored(listing, size=None, skip_damaged=False, cache=cache)
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_set_is_found_by_its_digest_when_the_folder_is_gone(tmp_path: Path, cache: Path) -> None:
    place = class_folders(tmp_path / "photos", 2, 6)
    data = opened(place, cache)
    shutil.rmtree(place)
    again = by_digest(data.digest, cache)
    assert again is not None
    assert torch.equal(again.train.x, data.train.x)
    assert (again.class_names, again.digest) == (data.class_names, data.digest)
    assert by_digest("0" * 64, cache) is None


def test_the_digest_is_that_of_the_images_and_not_of_their_place(
    tmp_path: Path, cache: Path
) -> None:
    one, two = (opened(class_folders(tmp_path / name, 2, 6), cache) for name in ("one", "two"))
    assert one.digest == two.digest
    assert len(list((cache / "sets").iterdir())) == 1
    assert (
        one.digest
        == replace(
            one, train=replace(one.train, sha256=None), test=replace(one.test, sha256=None)
        ).digest
    )


@pytest.mark.parametrize("file", ["images", "examples.safetensors", "record.json"])
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_damaged_set_is_made_anew(file: str, damage: str, tmp_path: Path, cache: Path) -> None:
    place = class_folders(tmp_path / "photos", 2, 6)
    data = opened(place, cache)
    path = cache / "sets" / data.digest / file
    if damage == "gone":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 1)
    assert opened(place, cache).digest == data.digest
    assert by_digest(data.digest, cache) is not None


def test_a_large_set_stays_in_its_file_and_a_cut_file_is_an_error(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_RESIDENT", 100)
    place = class_folders(tmp_path / "photos", 2, 60)
    data = opened(place, cache)
    assert data.train.rows is not None
    resident = replace(data, train=data.train.read(), test=data.test.read())
    assert resident.train.rows is None
    assert resident.digest == data.digest
    assert torch.equal(resident.train.contents(), data.train.contents())
    chosen = torch.tensor([5, 3, 90])
    assert torch.equal(data.train[chosen].read().x, resident.train.x[chosen])
    assert torch.equal(
        data.train[chosen].contents(), replace(resident.train[chosen], numbers=None).contents()
    )
    os.truncate(cache / "sets" / data.digest / "images", 1000)
    with pytest.raises(CountermarkError, match="shorter than it was"):
        data.train.x[len(data.train) - 1 :]


def _open_in_child(
    place: Path, cache: Path, start: Path, queue: "multiprocessing.Queue[str]"
) -> None:
    while not start.exists():
        time.sleep(0.001)
    queue.put(opened(place, cache).digest)


def test_two_processes_may_read_the_same_folder_at_once(tmp_path: Path, cache: Path) -> None:
    place = class_folders(tmp_path / "photos", 2, 30)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [
        context.Process(target=_open_in_child, args=(place, cache, tmp_path / "go", queue))
        for _ in range(3)
    ]
    for child in children:
        child.start()
    (tmp_path / "go").touch()
    digests = {queue.get(timeout=60) for _ in children}
    for child in children:
        child.join()
    assert digests == {opened(place, cache).digest}
    assert [path.name for path in (cache / "sets").iterdir()] == list(digests)


def test_what_a_killed_process_left_is_swept_away_and_what_one_builds_is_not(
    tmp_path: Path, cache: Path
) -> None:
    for name in ("dead", "alive", "young"):
        (cache / "sets" / f".torn-{name}").mkdir(parents=True)
    for name in ("dead", "alive"):
        os.utime(cache / "sets" / f".torn-{name}", (0, 0))
    held = os.open(cache / "sets" / ".torn-alive", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        opened(class_folders(tmp_path / "photos"), cache)
    finally:
        os.close(held)
    assert {path.name for path in (cache / "sets").glob(".*")} == {".torn-alive", ".torn-young"}


def test_a_record_of_a_place_that_somebody_changed_is_not_believed(
    tmp_path: Path, cache: Path
) -> None:
    place = class_folders(tmp_path / "photos", 2, 6)
    data = opened(place, cache)
    (record,) = (cache / "places").iterdir()
    for content in (
        b"",
        b"{}",
        b"[]",
        record.read_bytes()[:-3],
        json.dumps({"set": "../..", "found": {}}).encode(),
    ):
        record.write_bytes(content)
        assert opened(place, cache).digest == data.digest


def test_a_cache_that_cannot_be_written_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(CountermarkError, match=r"cannot keep data in /dev/null.*--cache"):
        opened(class_folders(tmp_path / "photos"), Path("/dev/null"))


def test_an_interruption_leaves_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = class_folders(tmp_path / "photos", 2, 60)
    calls = []

    def interrupted(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 50:
            raise KeyboardInterrupt

    monkeypatch.setattr(store.Tally, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        opened(place, cache)
    assert not [path for path in cache.rglob("*") if path.is_file()]
    monkeypatch.undo()
    assert len(opened(place, cache).train) == 100


def test_cmyk_16_bit_and_animated_files_in_one_folder(tmp_path: Path, cache: Path) -> None:
    place = class_folders(tmp_path / "photos", 2, 6)
    Image.new("CMYK", (8, 8)).save(place / "class0" / "a.jpg")
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(place / "class0" / "b.png")
    frames = [Image.fromarray(drawn(seed)) for seed in (7, 8)]
    frames[0].save(place / "class0" / "c.webp", save_all=True, append_images=frames[1:])
    assert opened(place, cache).converted == {"16-bit": 1, "animated": 1, "cmyk": 1, "grey": 1}


@pytest.mark.parametrize("taken", [1, 300])
def test_few_large_images_are_held_while_they_are_decoded_ahead(
    taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images that are decoded but not yet wanted are limited by their bytes.

    A caller who stops early does not have to wait for the rest.
    """
    side, most = 64, 0
    read: list[int] = []
    monkeypatch.setattr(reading.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(reading, "_HELD", 10 * side * side)

    def item(number: int) -> Item:
        def pixels(_size: int | None) -> Decoded:
            read.append(number)
            return Decoded(np.zeros((1, side, side), dtype=np.uint8), (), (side, side))

        return Item(str(number), "train", 0, pixels)

    found = decoded(Listing("photos", ("a", "b"), map(item, range(300)), 300), None)
    for number, (each, _) in enumerate(itertools.islice(found, taken)):
        if number % 20 == 0:
            time.sleep(0.005)  # threads decode what they may
        assert each.name == str(number)
        most = max(most, len(read) - number)
    found.close()  # type: ignore[attr-defined]
    # The images that may be held, one image in each of the other threads, the group that is wanted
    # and the group that is being taken.
    assert most <= 10 + 7 + 8 + 8
