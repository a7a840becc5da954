"""Files from strangers that claim to be large, and words in them that are."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from countermark.errors import CountermarkError
from countermark.files import read_json, write_json
from countermark.networks import describe, load_model, open_declared, save_model
from countermark.networks.named import build
from countermark.suspects import open_suspect
from countermark.text import brief
from countermark.watermarks import load_key
from described import described
from peak import rising

SHAPE = (1, 8, 8)


def sparse(folder: Path, side: int, entries: dict[str, list[int]] | None = None) -> Path:
    """A model folder of a few kilobytes on disk whose weights would fill gigabytes."""
    with torch.device("meta"):
        state = build("wide", (1, side, side), 10).state_dict()
    shapes = entries or {name: list(value.shape) for name, value in state.items()}
    header, start = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + start)
    save_model(
        folder / "small", build("small", SHAPE, 10), described("small", SHAPE, 10, "digits", 0.1, 0)
    )
    record = read_json(folder / "small" / "model.json")
    write_json(
        folder / "model.json",
        {**record, "network": {**record["network"], "place": "wide"}, "shape": [1, side, side]},
    )
    return folder


@pytest.mark.parametrize(
    "read",
    [
        lambda folder: open_suspect(folder, SHAPE),
        lambda folder: open_declared(describe(folder)),
        lambda folder: load_model(sparse_of_another_network(folder)),
    ],
)
def test_sizes_are_compared_before_weights_are_read(
    tmp_path: Path, read: Callable[[Path], object]
) -> None:
    (tmp_path / "small").mkdir()
    folder = sparse(tmp_path, 400)
    assert (folder / "model.safetensors").stat().st_size > 1 << 30
    with rising() as risen:
        with pytest.raises(CountermarkError, match=r"shape|does not fit"):
            read(folder)
        assert risen() < 200 << 20


def sparse_of_another_network(folder: Path) -> Path:
    with torch.device("meta"):
        state = build("wide", (1, 400, 400), 10).state_dict()
    shapes = {name: list(value.shape)[::-1] for name, value in state.items()}
    return sparse(folder, 400, shapes)


def test_a_key_says_how_many_trials_before_they_are_read(owner: Path, tmp_path: Path) -> None:
    shutil.copytree(owner / "key", tmp_path / "key")
    path = tmp_path / "key" / "trials.safetensors"
    count, start, header = 1 << 20, 0, {}
    kinds = {
        "x": ("U8", [count, 1, 8, 8]),
        "answers": ("I64", [count, 2]),
        "batch": ("I64", [count]),
        "cell": ("I64", [count]),
    }
    for name, (kind, shape) in kinds.items():
        size = int(np.prod(shape)) * {"U8": 1, "I64": 8}[kind]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + start)
    with pytest.raises(CountermarkError, match="other trials than were committed"):
        load_key(tmp_path / "key")


def test_foreign_words_in_messages_are_short(tmp_path: Path) -> None:
    save_model(tmp_path, build("small", SHAPE, 10), described("small", SHAPE, 10, "digits", 0.1, 0))
    record = read_json(tmp_path / "model.json")
    long = "a" * 900_000
    huge = 10**4000
    reads = (load_model, lambda folder: open_suspect(folder, SHAPE))
    changes: tuple[dict[str, object], ...] = (
        {"network": {**record["network"], "place": long}},
        {"data": long},
        {"data": {**record["data"], "place": 5}},
        {"class_names": [long, 5]},
        {"shape": [huge, huge, huge]},
    )
    for change in changes:
        write_json(tmp_path / "model.json", {**record, **change})
        for read in reads:
            with pytest.raises(CountermarkError) as caught:
                read(tmp_path)
            assert len(str(caught.value)) < 1000
            assert str(caught.value).isprintable()
    text = json.dumps({"w": {"dtype": long, "shape": [1], "data_offsets": [0, 4]}}).encode()
    write_json(tmp_path / "model.json", record)
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(CountermarkError, match="not a whole safetensors file") as caught:
        load_model(tmp_path)
    assert len(str(caught.value)) < 1000


def test_brief_is_brief() -> None:
    nested = {"c" * 1000: {"d": [1] * 1000}}
    for value in ("a" * 10**6, ["b" * 1000] * 1000, nested, b"x" * 10**6, 10**4000):
        assert len(brief(value)) <= 200
    assert brief("paper") == "'paper'"
    assert brief("\x1b[31m\n\u202e").isprintable()
