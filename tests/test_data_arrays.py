"""Data in `.npz` files, Parquet files, functions and objects.

One function opens them all, and an error of one line says what is wrong with bad data.
"""

import contextlib
import io
import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from countermark.data import Dataset, open_data
from countermark.data.images import from_array
from countermark.errors import CountermarkError
from noise import drawn

N = 24


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def colour(count: int = N, start: int = 0) -> np.ndarray:
    return np.stack([drawn(start + i) for i in range(count)])


def labels(count: int = N, classes: int = 2) -> np.ndarray:
    return np.arange(count) % classes


def same(data: Dataset, other: Dataset) -> bool:
    return data.digest == other.digest


def refusal(place: Any, cache: Path, **options: Any) -> str:
    with pytest.raises(CountermarkError) as told:
        open_data(place, cache=cache, **options)
    assert str(told.value).isprintable()
    assert not [path for path in cache.rglob("*") if path.is_file()]
    return str(told.value)


# Arrays.


@pytest.mark.parametrize("order", ["(n, h, w, c)", "(n, c, h, w)"])
@pytest.mark.parametrize("kind", ["uint8", "float32", "float64", "tensor"])
def test_every_order_and_type_gives_the_same_images(order: str, kind: str, cache: Path) -> None:
    x: Any = colour()
    expected = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    if order == "(n, c, h, w)":
        x = x.transpose(0, 3, 1, 2)
    x = (
        x.copy()
        if kind == "uint8"
        else torch.from_numpy(x.copy())
        if kind == "tensor"
        else (x / 255).astype(kind)
    )
    data = open_data((x, labels(), x[:6], labels(6)), cache=cache)
    assert torch.equal(data.train.x, expected)
    assert torch.equal(data.test.x, expected[:6])
    assert data.train.y.tolist() == labels().tolist()
    assert data.class_names == ("0", "1")
    assert data.converted == ({"float": N + 6} if kind.startswith("float") else {})


def test_grey_images_may_have_no_channels(cache: Path) -> None:
    x = colour()[..., 0]
    data = open_data((x, labels()), cache=cache)
    assert data.shape == (1, 8, 8)
    assert same(data, open_data((x[..., None], labels()), cache=cache))
    assert same(data, open_data((x[:, None], labels()[:, None]), cache=cache))


def test_arrays_come_in_all_the_usual_wrappings(cache: Path) -> None:
    x, y = colour(), labels()
    a, b, c, d = x[:18], y[:18], x[18:], y[18:]
    expected = open_data((a, b, c, d), cache=cache)
    for place in (
        ((a, b), (c, d)),
        {"x_train": a, "y_train": b, "x_test": c, "y_test": d},
        {"train_images": a, "train_labels": b, "test_images": c, "test_labels": d},
        {"train": (a, b), "test": (c, d)},
        {"train": (a, b), "validation": (c, d)},
    ):
        assert same(open_data(place, cache=cache), expected)
    named = open_data({"train": (a, b), "test": (c, d), "class_names": ["cat", "dog"]}, cache=cache)
    assert named.class_names == ("cat", "dog")
    assert expected.place == ""
    assert open_data(expected) is expected
    assert open_data(expected, size=8) is expected
    with pytest.raises(CountermarkError, match="opened already, with 8 x 8 pixels"):
        open_data(expected, size=16)


@pytest.mark.parametrize(
    "change", [torch.Tensor.bfloat16, torch.Tensor.half, torch.Tensor.to_sparse]
)
def test_tensors_are_read_however_they_are_stored(
    change: Callable[[torch.Tensor], torch.Tensor], cache: Path
) -> None:
    x = (torch.from_numpy(colour()[..., 0]) > 128).float()
    assert same(
        open_data((change(x), labels()), cache=cache), open_data((x, labels()), cache=cache)
    )
    assert np.array_equal(from_array(change(x[0])).pixels, from_array(x[0]).pixels)


@pytest.mark.parametrize("size", ["16", 16.5, True, 0, 4097, np.bool_(True)])
def test_a_size_that_is_none(size: Any, cache: Path) -> None:
    assert "a side of 1 to 4096 pixels, not " in refusal((colour(), labels()), cache, size=size)


def test_a_size_and_a_cache_as_python_has_them(cache: Path) -> None:
    assert open_data((colour(), labels()), cache=str(cache), size=np.int32(4)).shape == (3, 4, 4)  # type: ignore[arg-type]
    with pytest.raises(CountermarkError, match="cache is a path, not 5"):
        open_data((colour(), labels()), cache=5)  # type: ignore[arg-type]


def test_labels_may_be_strings(cache: Path) -> None:
    words = np.array(["dog", "cat"])[labels()]
    data = open_data((colour(), words), cache=cache)
    assert data.class_names == ("cat", "dog")
    assert sorted(torch.cat([data.train.y, data.test.y]).tolist()) == [0] * 12 + [1] * 12
    assert "'bird'" in refusal((colour(), words, colour(2), np.array(["cat", "bird"])), cache / "x")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda x, y: (x.astype(float), y), r"from 0 to 255"),
        (lambda x, y: (x / 255 - 0.5, y), r"from -0\.5 to 0\.5"),
        (lambda x, y: (np.where(x > 9, np.nan, 0.5), y), "nan"),
        (lambda x, y: (x.astype(np.int64), y), "type int64"),
        (lambda x, y: (x.astype(np.uint16), y), "type uint16"),
        (lambda x, y: (x[..., :2], y), "neither"),
        (
            lambda x, y: (x[:, :3], y),
            r"can be read as .* for grey images, and PIL images for colour",
        ),
        (lambda x, y: (x[:, 0, 0, 0], y), r"x_train has the shape \(24,\)"),
        (lambda x, y: (y, x), r"x_train has the shape \(24,\)"),
        (lambda x, y: (np.array(1), np.array(1)), r"x_train has the shape \(\)"),
        (lambda x, y: ((x[:, 0, 0, 0], y), (x, y)), r"x_train has the shape \(24,\)"),
        (
            lambda x, y: (torch.empty(24, 8, 8, device="meta"), y),
            "x_train cannot be read as an array",
        ),
        (
            lambda x, y: {"x_train": [[1], [1, 2]], "y_train": y},
            "x_train cannot be read as an array",
        ),
        (
            lambda x, y: (x, np.full(N, 10**12)),
            "the label 1000000000000; labels number the classes, as 0, 1, 2",
        ),
        (lambda x, y: (x[:, :0], y), "shape"),
        (lambda x, y: (x[..., None], y), "shape"),
        (lambda x, y: (x, y[:-1]), "23 labels for 24 images"),
        (lambda x, y: (x, y - 1), "the label -1"),
        (lambda x, y: (x, y + 1), "'0' has 0"),
        (lambda x, y: (x, y + 0.5), "not whole"),
        (lambda x, y: (x, y * np.nan), "not whole"),
        (lambda x, y: (x, y * 10**6), "the label 1000000, but only 24 images"),
        (lambda x, y: (x, y.astype(np.int64) * 2**60), "the label"),
        (lambda x, y: (x, np.eye(2)[y]), r"shape \(24, 2\)"),
        (lambda x, y: (x, np.zeros_like(y)), "one class"),
        (lambda x, y: (x, np.where(np.arange(N) == 5, 2, y)), "'2' has 1"),
        (lambda x, y: (x, y, x[:2], np.array([0, 2])), "label 2, and there are 2 classes"),
        (lambda x, y: (x[:0], y[:0]), "no images that can be read; give 2 or more for each class"),
        (lambda x, y: {"x_train": x}, "it needs x_train and y_train"),
        (lambda x, y: {"x_train": x, "y_train": y, "x_test": x}, "without the other"),
        (lambda x, y: {"train": (x, y), "class_names": ["a"]}, "label 1, and there are 1 classes"),
        (lambda x, y: {"train": (x, y), "class_names": ["a", "a"]}, "different strings"),
        (lambda x, y: {"train": (x, y), "class_names": 5}, "different strings"),
        (lambda x, y: {}, "of no name"),
        (lambda x, y: 17, "'int', which is no data set"),
        (lambda x, y: (x, y, x), "no data set"),
        (lambda x, y: None, "no data set"),
    ],
)
def test_arrays_that_are_no_data_set(
    change: Callable[[np.ndarray, np.ndarray], Any], word: str, cache: Path
) -> None:
    with pytest.raises(CountermarkError, match=word):
        open_data(change(colour(), labels()), cache=cache)
    refusal(change(colour(), labels()), cache)


def test_a_size_goes_for_arrays_as_well(cache: Path) -> None:
    data = open_data(
        (np.stack([drawn(i, 10, 12) for i in range(N)]), labels()), size=4, cache=cache
    )
    assert data.shape == (3, 4, 4)
    for size in (0, -1, 10**6):
        assert "side of 1 to" in refusal((colour(), labels()), cache / "x", size=size)


# .npz files.


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_npz_file_is_read_in_pieces(
    save: Callable[..., None], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("countermark.data.arrays._BLOCK", 1000)
    x, y = colour(), labels()
    expected = open_data((x, y), cache=cache)
    save(tmp_path / "mine.npz", x_train=x, y_train=y)
    data = open_data(tmp_path / "mine.npz", cache=cache)
    assert same(data, expected)
    assert data.place == str(tmp_path / "mine.npz")
    monkeypatch.setattr(
        "countermark.data.store.decoded", lambda *_: pytest.fail("it was read again")
    )
    assert same(open_data(str(tmp_path / "mine.npz"), cache=cache), expected)


def test_a_npz_file_of_medmnist(tmp_path: Path, cache: Path) -> None:
    x, y = colour(60), labels(60, 3)[:, None].astype(np.uint8)
    parts = {"train": slice(0, 36), "val": slice(36, 48), "test": slice(48, 60)}
    arrays = {
        f"{part}_{what}": values[rows]
        for part, rows in parts.items()
        for what, values in (("images", x), ("labels", y))
    }
    np.savez(tmp_path / "bloodmnist.npz", **arrays)
    data = open_data(tmp_path / "bloodmnist.npz", cache=cache)
    assert data.parts == {"train": 36, "val": 12, "test": 12}
    assert torch.equal(data.train.x, torch.from_numpy(x[:48].transpose(0, 3, 1, 2).copy()))
    np.savez(tmp_path / "named.npz", class_names=np.array(["a", "b", "c"]), **arrays)
    assert open_data(tmp_path / "named.npz", cache=cache).class_names == ("a", "b", "c")


def npz(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def npy(array: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


class _Bomb:
    """Pickled as a call that leaves a file; nothing may ever make it."""

    def __reduce__(self) -> Any:
        return (open, ("/tmp/countermark-unpickled", "w"))


@pytest.mark.parametrize(
    ("members", "word"),
    [
        ({}, "of no name"),
        ({"x_train.npy": b"", "y_train.npy": npy(labels())}, "no .npz file of arrays"),
        (
            {"x_train.npy": b"\x80\x04pickle", "y_train.npy": npy(labels())},
            "no .npz file of arrays",
        ),
        (
            {"x_train.npy": npy(colour())[:-1], "y_train.npy": npy(labels())},
            "the file is truncated",
        ),
        (
            {"x_train.npy": npy(colour()), "y_train.npy": npy(labels())[:-1]},
            "the file is truncated",
        ),
        (
            {
                "x_train.npy": npy(np.array([_Bomb()] * N), allow_pickle=True),
                "y_train.npy": npy(labels()),
            },
            "never unpickled",
        ),
        (
            {
                "x_train.npy": npy(colour()),
                "y_train.npy": npy(np.array([_Bomb()] * N), allow_pickle=True),
            },
            "never unpickled",
        ),
        (
            {"x_train.npy": npy(np.asfortranarray(colour())), "y_train.npy": npy(labels())},
            "column by column",
        ),
        (
            {"x_train.npy": npy(colour()), "y_train.npy": npy(labels())[:10]},
            "no .npz file of arrays",
        ),
        (
            {
                "x_train.npy": b"\x93NUMPY\x01\x00\x10\x00{'descr': '|u1',",
                "y_train.npy": npy(labels()),
            },
            "no .npz file of arrays",
        ),
    ],
)
def test_damaged_npz_files_are_refused(
    members: dict[str, bytes], word: str, tmp_path: Path, cache: Path
) -> None:
    assert word in refusal(npz(tmp_path / "x.npz", members), cache)
    assert not Path("/tmp/countermark-unpickled").exists()


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped"])
def test_npz_files_that_are_none(damage: str, tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez_compressed(path, x_train=colour(), y_train=labels())
    whole = bytearray(path.read_bytes())
    whole[500:520] = bytes(20)
    path.write_bytes(
        {"empty": b"", "text": b"hello", "cut": path.read_bytes()[:-30], "flipped": bytes(whole)}[
            damage
        ]
    )
    refusal(path, cache)


def test_a_header_that_promises_too_much_takes_no_memory(tmp_path: Path, cache: Path) -> None:
    """The labels of a small file that claims to have 10^12 of them."""
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,), }"
    header += b" " * (118 - len(header)) + b"\n"
    bomb = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    assert "the file is truncated" in refusal(
        npz(tmp_path / "x.npz", {"x_train.npy": npy(colour()), "y_train.npy": bomb}), cache
    )


# Parquet.

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def png(pixels: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def table(
    images: list[bytes | None],
    y: list[Any],
    *,
    names: list[str] | None = None,
    image: str = "image",
    **more: Any,
) -> Any:
    column = [{"bytes": data, "path": "/etc/passwd"} for data in images]
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    made = pyarrow.table({image: pyarrow.array(column, kind), "label": y, **more})
    if names is None:
        return made
    told = {
        "info": {
            "features": {
                image: {"_type": "Image"},
                "label": {"names": names, "_type": "ClassLabel"},
            }
        }
    }
    return made.replace_schema_metadata({"huggingface": json.dumps(told)})


@pytest.mark.parametrize("layout", ["file", "top", "data", "folders"])
def test_parquet_in_the_layouts_of_the_hub(layout: str, tmp_path: Path, cache: Path) -> None:
    x, y = colour(), labels()
    expected = open_data(
        {"train": (x[:18], y[:18]), "test": (x[18:], y[18:]), "class_names": ["cat", "dog"]},
        cache=cache,
    )
    chunks = {
        "train-00000-of-00002": slice(0, 10),
        "train-00001-of-00002": slice(10, 18),
        "test-00000-of-00001": slice(18, 24),
    }
    place = tmp_path / "hub"
    for name, rows in chunks.items():
        path = {
            "top": place / name,
            "data": place / "data" / name,
            "folders": place / name.split("-")[0] / name[:11],
        }.get(layout, place / name)
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(
            table(
                [png(each) for each in x[rows]], y[rows].tolist(), names=["cat", "dog"], image="img"
            ),
            f"{path}.parquet",
        )
    if layout == "file":
        expected = open_data(
            {"train": (x[:10], y[:10]), "class_names": ["cat", "dog"]}, cache=cache
        )
        place = place / "train-00000-of-00002.parquet"
    data = open_data(place, cache=cache)
    assert same(data, expected)
    assert data.class_names == ("cat", "dog")


def test_parquet_with_strings_for_labels_and_plain_bytes(tmp_path: Path, cache: Path) -> None:
    words = np.array(["dog", "cat"])[labels()].tolist()
    parquet.write_table(
        pyarrow.table({"picture": [png(each) for each in colour()], "label": words, "id": words}),
        tmp_path / "x.parquet",
    )
    data = open_data(tmp_path / "x.parquet", cache=cache)
    assert data.class_names == ("cat", "dog")
    assert len(data.train) + len(data.test) == N


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda x, y: pyarrow.table({"label": y}), "one column of images"),
        (lambda x, y: table(x, y).drop(["label"]), "one column of labels"),
        (
            lambda x, y: table(x, y, label2=y).rename_columns(["image", "fine", "coarse"]),
            "several: 'fine', 'coarse'",
        ),
        (lambda x, y: table(x, [-1, *y[1:]]), "the label -1"),
        (lambda x, y: table(x, [None, *y[1:]]), "without a label"),
        (lambda x, y: table(x, [7, *y[1:]], names=["a", "b"]), "label 7, and there are 2 classes"),
        (lambda x, y: table([None, *x[1:]], y), r"\[0\]' has no bytes"),
        (lambda x, y: table([b"text", *x[1:]], y), "is not a PNG"),
    ],
)
def test_parquet_files_that_are_no_data_set(
    make: Callable[..., Any], word: str, tmp_path: Path, cache: Path
) -> None:
    parquet.write_table(
        make([png(each) for each in colour()], labels().tolist()), tmp_path / "x.parquet"
    )
    with pytest.raises(CountermarkError, match=word):
        open_data(tmp_path / "x.parquet", cache=cache)
    refusal(tmp_path / "x.parquet", cache)


def test_damaged_parquet_files_are_refused(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "x.parquet"
    parquet.write_table(table([png(each) for each in colour()], labels().tolist()), path)
    whole = path.read_bytes()
    for data in (
        b"",
        b"PAR1",
        whole[:-8],
        whole[:200] + bytes(200) + whole[400:],
        whole[: len(whole) // 2],
    ):
        path.write_bytes(data)
        refusal(path, cache)


def test_without_pyarrow_a_parquet_file_says_what_to_install(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'countermark[parquet]'" in refusal(tmp_path / "x.parquet", cache)


# Objects and functions.


class Pictures:
    """A map-style data set of PIL images, arrays or tensors."""

    def __init__(self, count: int, kind: str = "pil", start: int = 0) -> None:
        self.classes, self.count, self.kind, self.start = ["cat", "dog"], count, kind, start

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Any:
        if i >= self.count:
            raise IndexError(i)
        pixels = drawn(self.start + i)
        image = {
            "pil": lambda: Image.fromarray(pixels),
            "array": lambda: pixels,
            "tensor": lambda: torch.from_numpy(pixels.transpose(2, 0, 1).copy()) / 255,
            "dict": lambda: Image.fromarray(pixels),
        }[self.kind]()
        label = i % 2
        return (
            {"image": image, "label": label}
            if self.kind == "dict"
            else (image, torch.tensor(label) if self.kind == "tensor" else label)
        )


@pytest.mark.parametrize("kind", ["pil", "array", "tensor", "dict"])
def test_any_map_style_data_set(kind: str, cache: Path) -> None:
    expected = open_data(
        {
            "train": (colour(18), labels(18)),
            "test": (colour(6, 100), labels(6)),
            "class_names": ["cat", "dog"],
        },
        cache=cache,
    )
    train, test = Pictures(18, kind), Pictures(6, kind, 100)
    assert same(open_data((train, test), cache=cache), expected)
    assert same(open_data({"train": train, "test": test}, cache=cache), expected)
    subset = torch.utils.data.Subset(train, range(18))
    assert same(open_data((subset, test), cache=cache), expected)
    alone = open_data(train, cache=cache)
    assert len(alone.train) + len(alone.test) == 18


class Torn(Pictures):
    def __getitem__(self, i: int) -> Any:
        if i == 3:
            raise OSError("image file is truncated\n(12 bytes)")
        return super().__getitem__(i)


def test_items_that_raise_are_damaged(cache: Path) -> None:
    assert "train[3]" in refusal(Torn(N), cache)
    data = open_data(Torn(N), skip_damaged=True, cache=cache)
    assert data.damaged == ("train[3]",)
    assert len(data.train) + len(data.test) == N - 1


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"classes": None}, "does not name its classes"),
        ({"classes": ["only"]}, "label 1, and there are 1 classes"),
        ({"__getitem__": lambda self, i: (drawn(i), 0.5)}, "has the label 0.5"),
        ({"__getitem__": lambda self, i: (drawn(i), "cat")}, "has the label 'cat'"),
        ({"__getitem__": lambda self, i: (drawn(i), -1)}, "label -1"),
        ({"__getitem__": lambda self, i: drawn(i)}, "cannot be read"),
        ({"__getitem__": lambda self, i: (drawn(i) * 2.0, i % 2)}, "floating-point values"),
        ({"__len__": lambda self: 0}, "no images"),
    ],
)
def test_data_sets_that_are_none(change: dict[str, Any], word: str, cache: Path) -> None:
    made = type(
        "Changed",
        (Pictures,),
        {name: value for name, value in change.items() if name.startswith("__")},
    )(N)
    for name, value in change.items():
        if not name.startswith("__"):
            setattr(made, name, value)
    assert word in refusal(made, cache)


def test_a_function_that_the_user_names(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shopping_data.py").write_text(
        "import numpy as np\n"
        "def make():\n"
        "    return np.arange(24 * 64 * 3).reshape(24, 8, 8, 3).astype('uint8'),"
        " np.arange(24) % 2\n"
        "arrays = make()\n"
        "def broken():\n    raise ValueError('no\\ndata')\n"
        "def place():\n    return 'mnist'\n"
    )
    monkeypatch.chdir(tmp_path)
    data = open_data("shopping_data:make", cache=cache)
    assert data.place == "shopping_data:make"
    assert same(open_data("shopping_data:arrays", cache=cache), data)
    empty = tmp_path / "empty"
    assert "no data" in refusal("shopping_data:broken", empty)
    assert "arrays or a data set" in refusal("shopping_data:place", empty)
    refusal("shopping_data:gone", empty)
    refusal("no_such_module_at_all:make", empty)


def test_a_place_that_is_none_says_what_there_is(tmp_path: Path, cache: Path) -> None:
    assert "did you mean mnist?" in refusal("mnits", cache)
    for place in ("gone/photos", tmp_path / "gone", ""):
        told = refusal(place, cache)
        assert "mnist, fashion_mnist, digits, cifar10, a .npz file" in told
        assert "module:function" in told
    (tmp_path / "photos.zip").write_bytes(b"PK")
    assert "none of the files" in refusal(tmp_path / "photos.zip", cache)
    assert r"\n" in refusal("a\nb", cache)
    assert "leave --size out" in refusal("digits", cache, size=32)
    assert open_data("digits", size=8, cache=cache).shape == (1, 8, 8)


def spoiled(whole: bytes, noise: bytes, place: int) -> bytes:
    data = bytearray(whole)
    start = place % len(data)
    data[start : start + len(noise)] = noise
    return bytes(data)


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.binary(min_size=1, max_size=12),
    st.integers(0, 10**6),
    st.sampled_from(["npz", "compressed.npz", "parquet"]),
)
def test_no_bytes_make_a_file_fail_otherwise(
    tmp_path: Path, noise: bytes, place: int, kind: str
) -> None:
    """Spoiled files are read or refused in one line, and no half-read set stays in the cache."""
    path = tmp_path / f"x.{kind}"
    if kind == "parquet":
        parquet.write_table(
            table([png(each) for each in colour()], labels().tolist(), names=["cat", "dog"]), path
        )
    else:
        (np.savez if kind == "npz" else np.savez_compressed)(
            path, x_train=colour(), y_train=labels()
        )
    path.write_bytes(spoiled(path.read_bytes(), noise, place))
    with contextlib.suppress(CountermarkError):
        open_data(path, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("sets/.*"))
