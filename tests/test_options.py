"""Options that verbs share: the user's own network and data, where a verb reads a model folder."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import countermark as cm
from countermark.data import Dataset
from countermark.networks import describing, load_model, save_model
from countermark.options import option
from countermark.places import place_name
from countermark.suspects import open_suspect
from countermark.verbs.protect import ProtectConfig


def make(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """A network of a user's own."""
    features = shape[0] * shape[1] * shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(features, 16), nn.ReLU(), nn.Linear(16, classes))


@pytest.fixture
def data() -> Dataset:
    return cm.open_data("digits")


@pytest.fixture
def mine(data: Dataset, tmp_path: Path) -> Path:
    """A model folder whose network is not a built-in one."""
    torch.manual_seed(0)
    folder = tmp_path / "mine"
    folder.mkdir()
    described = describing(data, "shop:make", threat=data.threat, seed=0)
    save_model(folder, make(data.shape, data.classes), described)
    return folder


def test_evaluate_builds_the_users_network_only_where_it_is_named(mine: Path) -> None:
    found = cm.evaluate(mine, network=make, images=40, steps=1)
    assert found.images == 40
    with pytest.raises(cm.CountermarkError, match="--network 'shop:make'"):
        cm.evaluate(mine, images=40)


def test_a_module_that_is_given_stays_what_it_is(mine: Path, data: Dataset) -> None:
    """It says how the network is built; the folder's weights go into a copy."""
    torch.manual_seed(1)
    network = make(data.shape, data.classes)
    before = [parameter.clone() for parameter in network.parameters()]
    found = cm.evaluate(mine, network=network, images=40, steps=1)
    assert replace(found, seconds=0) == replace(
        cm.evaluate(mine, network=make, images=40, steps=1), seconds=0
    )
    assert all(map(torch.equal, network.parameters(), before))


def test_a_suspect_of_the_users_network_is_asked(mine: Path, data: Dataset) -> None:
    x = torch.rand(5, *data.shape)
    with torch.no_grad():
        wanted = load_model(mine, make)[0](x).argmax(1)
    assert torch.equal(open_suspect(mine, data.shape, network=make)(x), wanted)
    with pytest.raises(cm.CountermarkError, match="--network"):
        open_suspect(mine, data.shape)


def test_data_that_moved_is_named_and_held_to_its_digest(mine: Path, data: Dataset) -> None:
    assert cm.evaluate(mine, network=make, data=data, images=40, steps=1).images == 40
    shorter = replace(data, train=data.train[slice(0, 1000)])
    with pytest.raises(cm.CountermarkError, match="was changed since the model was made"):
        cm.evaluate(mine, network=make, data=shorter, images=40, steps=1)


@pytest.mark.parametrize("verb", [cm.evaluate, cm.calibrate])
@pytest.mark.parametrize("name", ["network", "data"])
@pytest.mark.parametrize("value", [3, 0.5, True, np.int64(1)])
def test_a_number_is_no_place(
    verb: Callable[..., Any], name: str, value: object, mine: Path
) -> None:
    kind = {"network": "a name or module:function", "data": "a path"}[name]
    with pytest.raises(cm.CountermarkError, match=f"{option(name)} takes {kind}, not"):
        verb(mine, **{name: value})


@pytest.mark.parametrize("value", [0.5, 1, np.float32(0.5), [0.5], (0.5,), ("1/2",)])
def test_one_number_stands_for_all_channels(value: Any, tmp_path: Path) -> None:
    given = ProtectConfig("digits", out=tmp_path / "new", mean=value, std=value)
    assert (
        given.mean == given.std == (float(np.asarray(value).item() if value != ("1/2",) else 0.5),)
    )


@pytest.mark.parametrize("value", [True, "half"])
def test_what_is_no_number_normalises_nothing(value: Any, tmp_path: Path) -> None:
    with pytest.raises(cm.CountermarkError, match=r"--mean takes .*a number"):
        ProtectConfig("digits", out=tmp_path / "new", mean=value)


@pytest.mark.parametrize("name", ["out", "cache", "weights"])
def test_a_path_with_a_zero_byte_is_refused(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"out": tmp_path / "new", name: "a\0b"}
    with pytest.raises(cm.CountermarkError, match=f"--{name}: .* zero byte"):
        cm.protect("digits", **options)


def test_what_is_no_path_is_recorded_by_what_names_it(data: Dataset) -> None:
    assert place_name(make) == "python:test_options.make"
    assert place_name(data) == "python:countermark.data.dataset.Dataset"
    assert place_name("postgresql://h/x?secret=1") == "postgresql://h/x"
    assert ProtectConfig("digits", out="a", cache="b").record()["data"] == "digits"
    given = ProtectConfig((np.zeros(3), np.zeros(3)), out="a", network=make).record()
    names = ("python:builtins.tuple", "python:test_options.make")
    assert (given["data"], given["network"]) == names
    assert json.dumps(given)


def test_data_is_a_name_or_a_path_and_not_looked_for(tmp_path: Path) -> None:
    for place in ("photos", Path("photos")):
        with pytest.raises(cm.CountermarkError, match="photos"):
            cm.protect(place, out=tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
