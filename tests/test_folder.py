"""Model folders.

What is written can be read, and the digest of the weights file covers the normaliser and cleaners.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from countermark.data import open_data
from countermark.errors import CountermarkError
from countermark.files import file_sha256, read_json, write_json
from countermark.networks import (
    build,
    describe,
    describing,
    load,
    load_model,
    open_declared,
    save_model,
)
from described import described

GOLDEN = Path(__file__).parent / "golden" / "0.1.0" / "mine"
SHAPE = (1, 8, 8)


def test_a_copy_of_a_model_of_0_1_0_is_read_and_its_pools_are_cut_as_they_were(
    tmp_path: Path,
) -> None:
    network, description = load_model(GOLDEN)
    save_model(
        tmp_path, network, replace(description, history=(*description.history, {"event": "stolen"}))
    )
    copied = describe(tmp_path)
    assert copied.data == description.data
    assert copied.data.sha256 is None
    first, again = (open_declared(each).pools(each.seed) for each in (description, copied))
    assert again.digests() == first.digests()


def test_nothing_is_written_that_could_not_be_read(tmp_path: Path) -> None:
    network, description = build("small", SHAPE, 2), described("small", SHAPE, 2, "digits", 0.1, 0)
    assert save_model(tmp_path, network, replace(description, cleaners=(("median", 3.0),) * 8))
    for each in tmp_path.iterdir():
        each.unlink()
    for changes, words in (
        ({"class_names": tuple(map(str, range(10_001)))}, "2 to 10000 classes, not 10001"),
        ({"cleaners": (("median", 3.0),) * 9}, "8 cleaners at most, not 9"),
        ({"seed": 1 << 32}, "'seed' is out of range"),
        ({"mean": (0,), "std": (1,)}, "'mean' is out of range or of another type"),
    ):
        with pytest.raises(CountermarkError, match=words):
            save_model(tmp_path, network, replace(description, **changes))  # type: ignore[arg-type]
        assert list(tmp_path.iterdir()) == []


def test_too_many_classes_are_refused_before_a_model_is_trained_for_them() -> None:
    data = replace(open_data("digits"), class_names=tuple(map(str, range(10_001))))
    with pytest.raises(CountermarkError, match="2 to 10000 classes"):
        describing(data, "shop.models:make")


@pytest.mark.parametrize("network", ["small", "wide"])
def test_a_network_behind_a_normaliser_takes_no_memory_before_its_weights_are_looked_at(
    network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sizes come from a file that may be hostile: at 1024x1024 wide would have 8.6 GB."""
    description = described(network, (1, 8, 8), 10, "digits", 0.1, 0)
    description = replace(description, mean=(0.5,), std=(0.25,))
    own = description.build(seed=0).eval()
    save_model(tmp_path, own, description)
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(load_model(tmp_path)[0](x), own(x))
    record = read_json(tmp_path / "model.json")
    write_json(tmp_path / "model.json", {**record, "shape": [1, 64, 64]})
    made: list[torch.Tensor] = []
    initialise = torch.nn.Linear.reset_parameters

    def noted(layer: torch.nn.Linear) -> None:
        made.append(layer.weight)
        if layer.weight.is_meta:
            initialise(layer)

    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", noted)
    with pytest.raises(CountermarkError, match="does not fit the network"):
        load_model(tmp_path)
    assert made
    assert all(weight.is_meta for weight in made)


def test_the_digest_of_the_weights_file_fixes_what_stands_in_front(tmp_path: Path) -> None:
    """A model whose normaliser or cleaners were changed in model.json is refused."""
    plain = described("small", SHAPE, 10, "digits", 0.1, 0)
    normalised = replace(plain, mean=(0.5,), std=(0.25,))
    cleaned = replace(normalised, cleaners=(("median", 3.0),))
    digests = []
    for number, description in enumerate(
        (plain, normalised, replace(normalised, std=(0.5,)), cleaned)
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        digests.append(save_model(folder, description.build(seed=0), description))
        assert load_model(folder)[1] == description
    assert len(set(digests)) == 4
    for number, changes in (
        (0, {"network": {"place": "small", "mean": [0.5], "std": [0.25]}}),
        (1, {"network": {"place": "small", "mean": [0.5], "std": [0.5]}}),
        (1, {"network": {"place": "small", "mean": [], "std": []}}),
        (3, {"cleaners": [["median", 5.0]]}),
    ):
        path = tmp_path / str(number) / "model.json"
        record = read_json(path)
        write_json(path, {**record, **changes})
        with pytest.raises(
            CountermarkError, match=r"another normalisation|does not fit|does not have"
        ):
            load_model(path.parent)
        write_json(path, record)


def test_the_file_of_a_model_with_nothing_in_front_is_what_it_was(tmp_path: Path) -> None:
    network, description = load_model(GOLDEN)
    assert save_model(tmp_path, network, description) == file_sha256(GOLDEN / "model.safetensors")


@pytest.mark.parametrize("folder", [None, 5, "a\0b", b"mine"])
def test_what_is_no_path_is_no_model_folder(folder: object) -> None:
    with pytest.raises(CountermarkError, match="the model folder is a path, not"):
        load(folder)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["gpu", 5, "cuda:x"])
def test_what_is_no_device_is_refused(device: object) -> None:
    with pytest.raises(CountermarkError, match="unknown device"):
        load(GOLDEN, device=device)  # type: ignore[arg-type]
