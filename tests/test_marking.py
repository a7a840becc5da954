"""Marks in a loop of one's own: the order of the protocol, what joins a batch, what is refused."""

import contextlib
import json
import math
import random
import secrets
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from chances import RISK, most
from countermark import marking as room
from countermark.data import Examples, open_data
from countermark.errors import CountermarkError
from countermark.evaluation import accuracy, predict
from countermark.evidence import sign_flip_test
from countermark.files import canonical_json, read_json
from countermark.marking import Marking
from countermark.networks import describe, load_model, open_declared
from countermark.networks.named import build
from countermark.watermarks import changes, load_key, second_commitment, versions
from countermark.watermarks.commitment import check_signature
from shorter import take_any_mark


def shapes(count: int, seed: int = 0) -> Examples:
    """Small colour images of four classes: which quarter is bright."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (count,), generator=generator)
    x = torch.randint(0, 90, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
    for image, label in zip(x, y.tolist(), strict=True):
        row, column = 4 * (label // 2), 4 * (label % 2)
        image[:, row : row + 4, column : column + 4] += 120
    return Examples(x, y)


def network(seed: int = 0) -> nn.Module:
    """Of the user's own: nothing that Countermark knows by name."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 128),
        nn.ReLU(),
        nn.Linear(128, 4),
    )


def loop(net: nn.Module, mark: Marking | None, epochs: int, rate: float = 0.05) -> None:
    """A training loop as anybody writes it."""
    data = shapes(512, seed=1)
    optimiser = torch.optim.SGD(net.parameters(), rate, momentum=0.9)
    net.train()
    for epoch in range(epochs):
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(epoch))
        for chosen in order.split(64):
            x, y = data.x[chosen] / 255, data.y[chosen]
            if mark is not None:
                x, y = mark.mix(x, y, 32)
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimiser.step()


@pytest.fixture(scope="module")
def source() -> nn.Module:
    """A network before its mark. Copy it to train it."""
    net = network()
    loop(net, None, 2)
    return net


def copied(net: nn.Module) -> nn.Module:
    again = network()
    again.load_state_dict(net.state_dict())
    return again


BASES = shapes(300, seed=2)
SMALL = {"epsilon": 16 / 255, "watermark_epsilon": 96 / 255, "batches": 2, "batch_size": 40}


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def marked(source: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A network that was marked in the loop above, and its folder. Read only."""
    out = tmp_path_factory.mktemp("marked") / "mine"
    net = copied(source)
    mark = Marking(net, BASES, key=out / "key", **SMALL)
    for _ in range(40):  # coins are drawn anew, and some take longer
        loop(net, mark, 6)
        if mark.check(net).taken:
            break
    mark.finish(net, out, class_names=("a", "b", "c", "d"))
    return out, net


def test_a_loop_of_ones_own_marks_and_finishes(marked: tuple[Path, nn.Module]) -> None:
    out, net = marked
    key = load_key(out / "key")
    assert {path.name for path in out.iterdir()} == {
        "key",
        "model.safetensors",
        "model.json",
        "commitment.json",
    }
    record = read_json(out / "commitment.json")
    assert record["kind"] == "private"
    assert record["c1"] == key.c1
    described = describe(out)
    assert record["c2"] == second_commitment(
        key.c1, None, read_json(out / "model.json")["weights_sha256"]
    )
    check_signature(key.c1["public_key"], record["c2"], record["c2_signature"], "commitment")
    assert described.class_names == ("a", "b", "c", "d")
    assert described.threat.epsilon == 16 / 255
    assert described.data.place == ""
    loaded, _ = load_model(out, network())
    assert torch.equal(predict(loaded, key.watermarks.x), predict(net, key.watermarks.x))


def test_the_verdict_is_one_line(marked: tuple[Path, nn.Module], source: nn.Module) -> None:
    out, net = marked
    mark = Marking(net, BASES, key=out / "key", **SMALL)
    found = mark.check(net)
    assert found.taken
    assert found.verdict is not None
    assert str(found).startswith(f"{found.verdict.agreements}:{found.verdict.disagreements}, p = ")
    before = mark.check(source)
    assert not before.taken
    assert before.verdict is not None
    assert before.verdict.p_value > 1e-6


def test_checking_leaves_the_network_as_it_was(
    marked: tuple[Path, nn.Module], source: nn.Module
) -> None:
    net = copied(source)
    net.train()
    net[1].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    mark = Marking(net, BASES, key=marked[0] / "key", **SMALL)
    mark.check(net)
    assert net.training
    assert not net[1].training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_crafting_asks_in_evaluation_mode_and_leaves_the_network_as_it_was(
    source: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one secret, training mode makes no difference to the trials.

    Crafting does not move the network's statistics either.
    """
    made = []
    for number, training in enumerate((True, False)):
        monkeypatch.setattr(secrets, "token_bytes", random.Random(1).randbytes)
        net = copied(source).train(training)
        before = {name: value.clone() for name, value in net.state_dict().items()}
        made.append(Marking(net, BASES, key=tmp_path / str(number), **SMALL))
        assert net.training == training
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert made[0].key.c1 == made[1].key.c1
    assert torch.equal(made[0].key.labels, made[1].key.labels)


def test_a_marking_over_a_key_goes_on_with_its_trials_and_coins(
    source: nn.Module, tmp_path: Path
) -> None:
    """Another source model does not change a byte of a key that there is."""
    first = Marking(copied(source), BASES, key=tmp_path / "key", **SMALL)
    assert not first.resumed
    before = files(tmp_path)
    second = Marking(network(seed=5), (BASES.x, BASES.y), key=tmp_path / "key", **SMALL)
    assert second.resumed
    assert files(tmp_path) == before
    assert torch.equal(second.key.watermarks.x, first.key.watermarks.x)
    assert torch.equal(second.key.labels, first.key.labels)


@pytest.mark.parametrize(
    ("bases", "options", "words"),
    [
        (shapes(300, seed=9), {}, "from other bases"),
        (Examples(BASES.x, BASES.y.roll(1)), {}, "from other bases"),
        (
            BASES,
            {"watermark_epsilon": 0.6},
            (
                r"crafted at a watermark budget of 0\.376\d+, not of 0\.6; "
                r"give watermark_epsilon=0\.376"
            ),
        ),
    ],
)
def test_a_key_made_from_something_else_is_refused(
    source: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bases: Examples,
    options: dict[str, float],
    words: str,
) -> None:
    """The comparison uses only what was committed to before there were coins.

    So it comes out the same, whatever the coins are.
    """
    some_mark(source, tmp_path)
    before, loaded = files(tmp_path), room.load_key
    blind = lambda folder: replace(loaded(folder), labels=torch.empty(0), others=torch.empty(0))  # noqa: E731
    monkeypatch.setattr(room, "load_key", blind)
    some_mark(source, tmp_path)  # the same line goes on
    with pytest.raises(CountermarkError, match=words):
        Marking(copied(source), bases, key=tmp_path / "key", **{**SMALL, **options})  # type: ignore[arg-type]
    assert files(tmp_path) == before


def test_a_key_of_another_seed_is_refused(tmp_path: Path) -> None:
    """Other pools: bases of the key would be among the images that the loop trains on."""
    data = open_data("digits")
    net = build("small", data.shape, data.classes, seed=0)
    Marking(net, data, key=tmp_path / "key")
    assert torch.isin(data.pools(0).bases.contents(), data.pools(1).training.contents()).any()
    with pytest.raises(CountermarkError, match="the data and the seed of its making"):
        Marking(net, data, key=tmp_path / "key", seed=1)
    assert Marking(net, data, key=tmp_path / "key").resumed


def test_coins_come_after_the_trials_and_out_of_the_token(
    source: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is committed to is on disk, and unchanged, when the authority is asked.

    Another token gives the same trials other coins.
    """
    drawn = []
    true_write, order = room.write_key, []

    def watching(*arguments: Any) -> object:
        order.append("trials")
        made = true_write(*arguments)
        order.append("coins")
        return made

    monkeypatch.setattr(room, "write_key", watching)
    for number in range(2):
        monkeypatch.setattr(secrets, "token_bytes", random.Random(1).randbytes)
        monkeypatch.setattr(
            room, "timestamping", lambda tsa, roots, number=number: lambda message: bytes([number])
        )
        monkeypatch.setattr("countermark.watermarks.key.read_token", lambda token, *_: Token(token))
        drawn.append(
            Marking(
                copied(source), BASES, key=tmp_path / str(number), tsa="http://authority", **SMALL
            )
        )
    assert order == ["trials", "coins"] * 2
    one, other = (mark.key for mark in drawn)
    assert torch.equal(one.watermarks.x, other.watermarks.x)
    assert torch.equal(one.watermarks.answers, other.watermarks.answers)
    assert one.c1 == other.c1
    assert not torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("trained", [False, True])
def test_a_network_that_tells_no_classes_apart_is_doubted(
    source: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str], trained: bool
) -> None:
    some_mark(source if trained else network(1), tmp_path)
    said = " ".join(capsys.readouterr().err.split())
    assert ("a key's trials are made once" in said) is not trained


def test_a_marking_that_was_interrupted_asks_for_the_coins_of_the_same_trials(
    source: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A public log counts each C1 that it takes; the network that crafts may be another by now."""
    asked: list[bytes] = []

    def stamp(message: bytes) -> bytes:
        asked.append(message)
        if len(asked) == 1:
            raise KeyboardInterrupt
        return b"token"

    monkeypatch.setattr(room, "timestamping", lambda *_: stamp)
    monkeypatch.setattr("countermark.watermarks.key.read_token", lambda token, *_: Token(token))
    with pytest.raises(KeyboardInterrupt):
        some_mark(source, tmp_path, tsa="http://authority")
    clean = (255 - BASES.x[:20], BASES.y[:20])
    with pytest.raises(CountermarkError, match="was interrupted while its coins were drawn"):
        some_mark(source, tmp_path, tsa="http://authority", clean=clean)
    another = copied(source)
    torch.nn.init.normal_(next(another.parameters()), std=0.1)
    mark = some_mark(another, tmp_path, tsa="http://authority")
    assert asked[0] == asked[1] == canonical_json(mark.key.c1)
    assert len(asked) == 2
    assert load_key(tmp_path / "key").c1 == mark.key.c1
    assert not (tmp_path / "key" / "c1.json").exists()


class Token:
    """A token whose beacon is all of it."""

    def __init__(self, response: bytes) -> None:
        self.beacon = response


def test_four_hundred_markings_find_nothing_in_strangers(
    source: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole markings, each with a secret of its own, give uniform randomised p-values.

    The trials are asked of the source model and of a stranger. A choice of trials by their coins
    would break this: with the trials that the marked network had learned, or with the answers
    sorted by what the source model says, it fails by far.
    """
    stranger = network(seed=8)
    loop(stranger, None, 2)
    generator = random.Random(3)
    crafted = room.SCHEMES["coin"].make
    trials = []

    def once(given: object) -> object:
        """The crafting takes long and sees no coin: once is enough for all secrets."""
        if not trials:
            trials.append(crafted(given))  # type: ignore[arg-type]
        return trials[0]

    monkeypatch.setattr(room, "SCHEMES", {"coin": replace(room.SCHEMES["coin"], make=once)})
    monkeypatch.setattr(secrets, "token_bytes", generator.randbytes)
    answers: list[torch.Tensor] = []
    values: list[list[float]] = [[], []]
    for number in range(400):
        mark = Marking(source, BASES, key=tmp_path / str(number), **SMALL)
        if not answers:
            answers = [predict(net, mark.key.watermarks.x) for net in (source, stranger)]
        for found, given in zip(values, answers, strict=True):
            found.append(
                sign_flip_test(mark.key.outcomes(given)).randomised_p_value(generator.random())
            )
    for found in values:
        found.sort()
        count = len(found)
        distance = max(
            max((i + 1) / count - value, value - i / count) for i, value in enumerate(found)
        )
        assert distance < math.sqrt(
            math.log(2 / RISK) / 2 / count
        )  # Kolmogorov-Smirnov, Massart (1990)
        assert sum(value <= 0.01 for value in found) <= most(count, 0.01)


@pytest.mark.parametrize("scheme", ["texture", "mixed"])
def test_a_loop_marks_with_made_up_images(source: nn.Module, tmp_path: Path, scheme: str) -> None:
    """Textures take no bases and no budget, and half of a mixed key's trials are textures."""
    budget = {} if scheme == "mixed" else {"watermark_epsilon": None}
    mark = some_mark(source, tmp_path, scheme=scheme, **budget)
    assert mark.key.scheme == scheme
    assert mark.key.c1["crafting"] is None or scheme == "mixed"
    near = BASES.x[None].int() - mark.key.watermarks.x[:, None].int()
    crafted = int((near.abs().amax((2, 3, 4)).amin(1) <= 97).sum())  # within the budget of a base
    assert crafted == (40 if scheme == "mixed" else 0)
    net = copied(source)
    for _ in range(40):
        loop(net, mark, 6)
        if mark.check(net).taken:
            break
    mark.finish(net, tmp_path / "mine")
    before = mark.check(source).verdict
    assert before is not None
    assert before.p_value > 1e-6
    assert some_mark(net, tmp_path, scheme=scheme, **budget).resumed
    with pytest.raises(CountermarkError, match=f"is a key of the scheme {scheme}, not of the"):
        some_mark(source, tmp_path)


def test_trials_that_survive_changes_join_batches_in_every_form(
    source: nn.Module, tmp_path: Path
) -> None:
    words = ("threshold:0.4", "resize:0.5")
    mark = some_mark(source, tmp_path, survive=list(words))
    images = mark.key.watermarks.x
    assert mark.key.c1["survive"] == list(words)
    forms = versions(images, changes(words, (3, 8, 8)))
    x, y = mark.mix(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), torch.zeros(0).long(), 240)
    pairs = lambda x, y: sorted(zip(map(bytes, x.flatten(1).numpy()), y.tolist(), strict=True))  # noqa: E731
    assert pairs(x, y) == pairs(torch.cat(forms), mark.key.labels.repeat(3))
    assert some_mark(source, tmp_path, survive=words).resumed
    with pytest.raises(CountermarkError, match=r"to survive threshold:0.4 resize:0.5, not of the"):
        some_mark(source, tmp_path, survive="jpeg:75")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"scheme": "composite"}, "a marking takes the scheme coin or texture or mixed, not"),
        ({"scheme": "adversarial"}, "protect makes the others"),
        ({"scheme": ["coin"]}, "not "),
        ({"scheme": "texture"}, "has no budget; leave watermark_epsilon out"),
        ({"scheme": "texture", "watermark_epsilon": None, "survive": "jpeg"}, "leave survive out"),
        ({"survive": "denoise"}, "which only protect does; leave it out of survive"),
        ({"survive": "sharpen"}, "^survive takes words as jpeg:75"),
        ({"batch_size": 39}, "batch_size is a whole number from 40, not 39"),
        ({"survive": 3}, "survive is a list of words as jpeg:75, not 3"),
        ({"survive": ["jpeg", None]}, "survive is a list of words"),
    ],
)
def test_schemes_and_changes_that_a_loop_cannot_have(
    source: nn.Module, tmp_path: Path, options: dict[str, object], words: str
) -> None:
    with pytest.raises(CountermarkError, match=words):
        some_mark(source, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def some_mark(source: nn.Module, tmp_path: Path, **options: object) -> Marking:
    return Marking(copied(source), BASES, key=tmp_path / "key", **{**SMALL, **options})  # type: ignore[arg-type]


def test_trials_take_turns_in_any_batches(source: nn.Module, tmp_path: Path) -> None:
    mark = some_mark(source, tmp_path)
    images = (mark.key.watermarks.x / 255).flatten(1)
    seen = torch.zeros(80, dtype=torch.int64)
    for count in (1, 16, 30, 33, 80, 80):  # three rounds
        x, y = mark.mix(torch.rand(5, 3, 8, 8), torch.zeros(5, dtype=torch.int64), count)
        assert x.shape == (5 + count, 3, 8, 8)
        nearest = torch.cdist(x[5:].flatten(1), images).argmin(1)
        assert torch.allclose(images[nearest], x[5:].flatten(1))
        assert torch.equal(y[5:], mark.key.labels[nearest])
        seen += torch.bincount(nearest, minlength=80)
    assert set(seen.tolist()) == {3}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16])
def test_trials_join_in_the_type_of_the_batch(
    source: nn.Module, tmp_path: Path, dtype: torch.dtype
) -> None:
    mark = some_mark(source, tmp_path)
    batch = torch.zeros(4, 3, 8, 8, dtype=dtype)
    x, y = mark.mix(batch, torch.arange(4), 80)
    assert (x.dtype, y.dtype) == (dtype, torch.int64)
    assert torch.equal(x[:4], batch)
    pixels = x[4:] if dtype == torch.uint8 else x[4:].double().mul(255).round().to(torch.uint8)
    allowed = 0 if dtype != torch.bfloat16 else 1
    # Each is one of the trials, to the last bit where the type can hold it.
    apart = (pixels.int()[:, None] - mark.key.watermarks.x.int()[None]).abs().flatten(2).amax(2)
    assert int(apart.amin(1).max()) <= allowed


def test_a_loop_that_normalises_outside_the_network_is_met_on_its_scale(
    source: nn.Module, tmp_path: Path
) -> None:
    """The trials are those of a network behind the same normaliser, and are mixed in normalised."""
    mean, std = (0.2, 0.3, 0.4), (0.5, 0.25, 0.125)
    mark = some_mark(source, tmp_path, mean=mean, std=std)
    x, _ = mark.mix(torch.full((1, 3, 8, 8), -2.0), torch.tensor([0]), 80)
    back = x[1:] * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    apart = (back[:, None] * 255 - mark.key.watermarks.x[None]).abs().flatten(2).amax(2)
    assert float(apart.amin(1).max()) < 1e-3
    inside = nn.Sequential(Scaled(mean, std), source)
    answers = predict(inside, mark.key.watermarks.x).unsqueeze(1)
    assert bool((mark.key.watermarks.answers == answers).any(1).all())


class Scaled(nn.Module):
    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.mean, self.std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean) / self.std


def test_batches_that_do_not_fit_are_refused(source: nn.Module, tmp_path: Path) -> None:
    mark = some_mark(source, tmp_path)
    x, y = torch.rand(4, 3, 8, 8), torch.arange(4)
    refused = [
        ((x[:, :1], y), {}, "shape"),
        ((x, y.float()), {}, "hard labels"),
        ((x, nn.functional.one_hot(y)), {}, "hard labels"),
        ((x, y[:3]), {}, "labels of shape"),
        ((x.int(), y), {}, "uint8 or floating-point"),
        ((x, y), {"count": 0}, "count is a whole number from 1"),
        ((x, y), {"count": "16"}, "count is a whole number"),
        ((x, y), {"count": True}, "count is a whole number"),
        (([1], y), {}, "two tensors, images and labels, not list and Tensor"),
        ((x, None), {}, "two tensors"),
        ((3 * x - 1, y), {}, "mean=, std="),
    ]
    for batch, options, words in refused:
        with pytest.raises(CountermarkError, match=words):
            mark.mix(*batch, **options)
    assert len(mark.mix(x, y)[0]) == 20


def test_a_mark_that_did_not_take_is_refused_and_nothing_is_written(
    source: nn.Module, tmp_path: Path
) -> None:
    net = copied(source)
    mark = Marking(net, BASES, key=tmp_path / "mine" / "key", **SMALL)
    before = files(tmp_path)
    with pytest.raises(
        CountermarkError, match=r"did not take: .* of its 80 coins .*Nothing was written"
    ):
        mark.finish(net, tmp_path / "mine")
    with pytest.raises(CountermarkError, match="did not take"):
        mark.finish(net, tmp_path / "elsewhere")
    assert files(tmp_path) == before
    assert not (tmp_path / "elsewhere").exists()


def test_another_network_is_neither_checked_nor_written(source: nn.Module, tmp_path: Path) -> None:
    mark = some_mark(source, tmp_path)
    grey = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 4))
    fewer = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    for net, words in (
        (grey, "does not take images"),
        (fewer, "3 classes apart, and .* 4"),
        (None, "an nn.Module, not None"),
    ):
        with pytest.raises(CountermarkError, match=words):
            mark.check(net)  # type: ignore[arg-type]
        with pytest.raises(CountermarkError, match=words):
            mark.finish(net, tmp_path / "mine")  # type: ignore[arg-type]
    for out in (None, "a\0b"):
        with pytest.raises(CountermarkError, match="out is a path"):
            mark.finish(source, out)  # type: ignore[arg-type]
    assert not (tmp_path / "mine").exists()


def test_numbers_may_be_written_as_the_verbs_take_them(source: nn.Module, tmp_path: Path) -> None:
    mark = some_mark(
        source, tmp_path, epsilon="16/255", watermark_epsilon="96/255", mean=0.5, std=0.25
    )
    assert (mark.threat.epsilon, mark.threat.watermark_epsilon) == (16 / 255, 96 / 255)
    assert (mark.mean, mark.std) == ((0.5,), (0.25,))
    x, _ = mark.mix(torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64), 80)
    assert x[2:].min() >= -2
    assert x[2:].max() > 1


def test_a_mark_that_would_not_last_is_refused(
    marked: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All coins are known, but half of the weights hold them all."""
    out, net = marked
    mark = Marking(net, BASES, key=out / "key", **SMALL)
    monkeypatch.setattr(room, "prune", lambda given, rate: network(seed=4))
    with pytest.raises(CountermarkError, match=r"would not last: with 50 % of the weights pruned"):
        mark.finish(net, tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_a_pruned_copy_that_nobody_could_use_does_not_count(
    marked: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the weights may be too many to prune.

    Then the mark has to last as far as a copy is of use.
    """
    out, net = marked
    mark = Marking(net, BASES, key=out / "key", **SMALL)
    clean = Examples(BASES.x[:50], predict(net, BASES.x[:50]))
    mark.key = replace(mark.key, clean=clean)
    ruined = network(seed=4)
    assert accuracy(ruined, clean) < 80
    monkeypatch.setattr(room, "prune", lambda given, rate: ruined if rate > 0.3 else given)
    found = mark.check(net)
    assert (found.rate, found.taken) == (0.3, True)
    monkeypatch.setattr(room, "prune", lambda given, rate: ruined)
    found = mark.check(net)
    assert (found.rate, found.pruned, found.left(), found.taken) == (None, None, "", True)


@pytest.mark.parametrize("failing", ["save_model", "commit"])
@pytest.mark.parametrize("inside", [True, False])
def test_a_finish_that_fails_leaves_nothing_and_the_next_one_succeeds(
    marked: tuple[Path, nn.Module],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
    inside: bool,
) -> None:
    """The authority does not answer, or the disk is full.

    The key lies in the model folder or outside it.
    """
    out, net = marked
    keys = tmp_path / ("mine/key" if inside else "keys")
    keys.mkdir(parents=True)
    for name, content in files(out / "key").items():
        (keys / name).write_bytes(content)
    mark = Marking(net, BASES, key=keys, **SMALL)
    before = files(tmp_path)

    def fails(folder: Path, *_arguments: object) -> None:
        (folder / "model.json").write_text("half")
        raise CountermarkError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(room, failing, fails)
        with pytest.raises(CountermarkError, match="disk is full"):
            mark.finish(net, tmp_path / "mine")
    assert files(tmp_path) == before
    assert (tmp_path / "mine").exists() == inside
    assert mark.finish(net, tmp_path / "mine").taken
    written = files(tmp_path)
    with pytest.raises(CountermarkError, match="holds files already"):
        mark.finish(net, tmp_path / "mine")
    assert files(tmp_path) == written


@pytest.mark.parametrize("calls", range(4))
def test_a_finish_that_was_killed_is_finished_by_the_next(
    marked: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """Killed while it writes, or after it moved one file, or two, or all three into place."""
    out, net = marked
    mark, mine = Marking(net, BASES, key=out / "key", **SMALL), tmp_path / "mine"
    moved, replaced = [], Path.replace

    def dies(self: Path, target: Path) -> Path:
        if self.parent.name == room._UNFINISHED and target.parent == mine:
            if len(moved) == calls:
                raise SystemExit
            moved.append(self)
        return replaced(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", dies)
        patched.setattr(
            room,
            "_take_back",
            lambda folder: moved and len(moved) == 3 and (folder / room._UNFINISHED).rmdir(),
        )
        with contextlib.suppress(SystemExit):
            mark.finish(net, mine)
    assert len(moved) == calls
    assert (mine / "commitment.json").exists() == (calls == 3)
    if calls < 3:
        mark.finish(net, mine)
    load_model(mine, network())
    assert {path.name for path in mine.iterdir()} == {
        "model.safetensors",
        "model.json",
        "commitment.json",
    }


@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
@pytest.mark.parametrize("inside", [True, False])
def test_files_of_others_are_neither_replaced_nor_taken_away(
    marked: tuple[Path, nn.Module],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    inside: bool,
) -> None:
    """The user's own weights lie where the model is to be written, alone or beside the key."""
    out, net = marked
    keys = tmp_path / ("mine/key" if inside else "keys")
    shutil.copytree(out / "key", keys)
    (tmp_path / "mine").mkdir(exist_ok=True)
    (tmp_path / "mine" / name).write_bytes(b"weeks of work")
    before = files(tmp_path)
    mark = Marking(net, BASES, key=keys, **SMALL)
    with pytest.raises(CountermarkError, match=f"holds files already \\({name}\\)"):
        mark.finish(net, tmp_path / "mine")
    assert files(tmp_path) == before
    # The same where an interrupted call left its own files, of that name among them.
    beside = tmp_path / "mine" / room._UNFINISHED
    beside.mkdir()
    for each in ("model.safetensors", "model.json", "commitment.json"):
        (beside / each).write_bytes(b"torn")
    with pytest.raises(CountermarkError, match="holds files already"):
        mark.finish(net, tmp_path / "mine")
    assert (tmp_path / "mine" / name).read_bytes() == b"weeks of work"


def test_what_it_is_for_is_declared(
    marked: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, net = marked
    monkeypatch.setattr("countermark.networks.source.imported", lambda place: network)
    mark = Marking(net, BASES, key=out / "key", **SMALL)
    with pytest.raises(CountermarkError, match="3 class names for 4 classes"):
        mark.finish(net, tmp_path / "mine", class_names=("a", "b", "c"))
    with pytest.raises(CountermarkError, match="give the model's data"):
        mark.finish(net, tmp_path / "mine", data="digits")
    assert not (tmp_path / "mine").exists()
    mark.finish(
        net,
        tmp_path / "mine",
        network="shop.models:make",
        history=[{"event": "trained", "epochs": 14}],
    )
    described = describe(tmp_path / "mine")
    assert described.network == "shop.models:make"
    assert [event["event"] for event in described.history] == ["trained", "marked"]
    json.dumps(described.history)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("small", "another network"),
        ("shop.models:deeper", r"another network .*tensor '7\.weight'"),
        ("shop.models:smaller", "another network"),
        ("nosuch:make", "no module 'nosuch'"),
        ("nosuch", "unknown network"),
    ],
)
def test_a_network_that_later_verbs_could_not_load_is_refused(
    marked: tuple[Path, nn.Module],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    words: str,
) -> None:
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "models.py").write_text(
        "from torch import nn\n"
        "def smaller(): return nn.Sequential("
        "nn.Conv2d(3, 16, 3, padding=1), nn.Flatten(), nn.Linear(1024, 4))\n"
        "def deeper():\n"
        "    front = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten()\n"
        "    return nn.Sequential(*front, nn.Linear(1024, 128), nn.ReLU(), "
        "nn.Linear(128, 4), nn.LayerNorm(4))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    out, net = marked
    mark, drawn = Marking(net, BASES, key=out / "key", **SMALL), torch.get_rng_state()
    take_any_mark(monkeypatch)
    with pytest.raises(CountermarkError, match=words):
        mark.finish(net, tmp_path / "mine", network=place)
    assert not (tmp_path / "mine").exists()
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_data_set_gives_bases_clean_examples_and_the_declaration(tmp_path: Path) -> None:
    data = open_data("digits")
    net = build("small", data.shape, data.classes, seed=0)
    mark = Marking(net, data, key=tmp_path / "key", seed=3)
    pools = data.pools(3)
    assert mark.key.c1["pools"] == {"bases": pools.bases.digest}
    assert mark.key.clean is not None
    assert torch.equal(mark.key.clean.x, pools.validation.x[: len(mark.key.clean)])
    assert mark.threat == data.threat
    assert len(mark.key.watermarks) <= data.batches * data.batch_size
    changed = (
        (mark.key.watermarks.x.int()[:, None] - pools.bases.x.int()[None])
        .abs()
        .flatten(2)
        .amax(2)
        .amin(1)
    )
    assert int(changed.max()) <= round(data.threat.watermark_epsilon * 255)


def test_a_folder_that_says_no_data_takes_what_is_named_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_data("digits")
    net = build("small", data.shape, data.classes, seed=0)
    bases = data.pools(0).bases
    mark = Marking(
        net,
        (bases.x, bases.y),
        key=tmp_path / "key",
        batch_size=40,
        epsilon=0.1,
        watermark_epsilon=0.3,
    )
    take_any_mark(monkeypatch)
    mark.finish(net, tmp_path / "mine", network="small")
    described = describe(tmp_path / "mine")
    with pytest.raises(CountermarkError, match="--data"):
        open_declared(described)
    assert open_declared(described, data="digits").digest == data.digest


@pytest.mark.parametrize("kind", ["numpy", "pixels", "tensors"])
def test_bases_may_be_arrays(
    source: nn.Module, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    arrays = {
        "numpy": (BASES.x.numpy(), BASES.y.int().numpy()),
        "pixels": (BASES.x.double() / 255, BASES.y),
        "tensors": (BASES.x, BASES.y),
    }
    for number, bases in enumerate((BASES, arrays[kind])):
        monkeypatch.setattr(secrets, "token_bytes", random.Random(1).randbytes)
        made.append(Marking(source, bases, key=tmp_path / str(number), **SMALL))
    assert made[0].key.c1 == made[1].key.c1


class Odd(nn.Module):
    """A network that gives something else than logits."""

    def __init__(self, result: object) -> None:
        super().__init__()
        self.result = result
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> object:
        return self.result


@pytest.mark.parametrize(
    ("net", "bases", "options", "words"),
    [
        (None, (BASES.x, BASES.y[:5]), {}, "images .* and whole labels"),
        (None, (BASES.x, BASES.y.float()), {}, "whole labels"),
        (None, (BASES.x.double(), BASES.y), {}, "0, 1"),
        (None, ([1, 2], "x"), {}, "pair of arrays"),
        (None, 5, {}, "pair of arrays"),
        (None, Examples(BASES.x, BASES.y + 1), {}, "number the classes from 0"),
        (None, Examples(BASES.x[:, :, :, :6], BASES.y), {}, "does not take images"),
        (None, BASES[:60], {}, "bases became watermarks"),
        (None, BASES, {"watermark_epsilon": 0.01}, "above the training budget"),
        (None, BASES, {"seed": 1 << 32}, "seed is a whole number"),
        (None, BASES, {"seed": -1}, "seed is a whole number"),
        (None, BASES, {"seed": "1"}, "seed is a whole number"),
        (None, BASES, {"batches": "2"}, "batches is a whole number from 1"),
        (None, BASES, {"batch_size": 0}, "batch_size is a whole number from 40"),
        (None, BASES, {"epsilon": "much"}, "no budget"),
        (
            None,
            BASES,
            {"mean": (0.2, 0.3), "std": (0.5, 0.5)},
            "mean has 2 numbers for images of 3 channels",
        ),
        (None, BASES, {"mean": 0.5}, "std is missing"),
        (None, BASES, {"std": 0.5}, "mean is missing"),
        (None, BASES, {"mean": "half", "std": 0.5}, "mean is one number or one a channel"),
        (None, BASES, {"mean": 127.0, "std": 50.0}, "divide numbers of 0 to 255 by 255"),
        (None, BASES, {"key": None}, "key is a path, not None"),
        (None, BASES, {"key": "a\0b"}, "key is a path"),
        (None, BASES, {"roots": 5}, "roots is a path, not 5"),
        (None, BASES, {"tsa": 5}, "address of a timestamp authority"),
        (5, BASES, {}, "an nn.Module, not 5"),
        (network, BASES, {}, "an nn.Module, not <function network"),
        (Odd([1]), BASES, {}, "gives list"),
        (Odd(torch.zeros(4)), BASES, {}, r"gives \(4,\)"),
    ],
)
def test_what_no_key_can_be_made_of_is_refused_and_leaves_nothing(
    source: nn.Module,
    tmp_path: Path,
    net: nn.Module | None,
    bases: object,
    options: dict[str, object],
    words: str,
) -> None:
    with pytest.raises(CountermarkError, match=words):
        Marking(net or source, bases, **{"key": tmp_path / "mine" / "key", **SMALL, **options})  # type: ignore[arg-type]
    assert not list(tmp_path.rglob("*.json"))
    assert not (tmp_path / "mine" / "key").exists()


CLEAN = shapes(120, seed=3)


@pytest.mark.parametrize("kind", ["examples", "pixels", "arrays"])
def test_a_key_keeps_clean_examples_of_any_kind_and_is_read_again(
    source: nn.Module, tmp_path: Path, kind: str
) -> None:
    given = {
        "examples": CLEAN,
        "pixels": Examples(CLEAN.x.double() / 255, CLEAN.y.int()),
        "arrays": (CLEAN.x.numpy(), CLEAN.y.numpy()),
    }[kind]
    some_mark(source, tmp_path, clean=given)
    kept = load_key(tmp_path / "key").clean
    assert kept is not None
    assert torch.equal(kept.x, CLEAN.x[:100])
    assert torch.equal(kept.y, CLEAN.y[:100])
    assert some_mark(source, tmp_path, clean=given).resumed


@pytest.mark.parametrize(
    ("clean", "words"),
    [
        (Examples(CLEAN.x[:, :, :6], CLEAN.y), r"100 clean examples of shape \(3, 6, 8\)"),
        (Examples(CLEAN.x[:, :1], CLEAN.y), "clean examples of shape"),
        (CLEAN[:0], "clean examples are images"),
        ((CLEAN.x, CLEAN.y[:5]), "clean examples are images"),
        (5, "clean examples are Examples, a data set, or a pair"),
        (Examples(CLEAN.x, CLEAN.y + 1), "labels from 1 to 4"),
        (Examples(CLEAN.x, CLEAN.y - 1), "number the classes from 0"),
        (
            Examples(torch.cat((CLEAN.x[:9], BASES.x[:3])), torch.cat((CLEAN.y[:9], BASES.y[:3]))),
            "3 of 12 clean examples are bases",
        ),
    ],
)
def test_clean_examples_that_no_key_could_keep_are_refused_before_there_is_one(
    source: nn.Module, tmp_path: Path, clean: object, words: str
) -> None:
    with pytest.raises(CountermarkError, match=words):
        some_mark(source, tmp_path, clean=clean)
    assert list(tmp_path.iterdir()) == []


def test_keys_of_something_else_are_refused(
    source: nn.Module, tmp_path: Path, owner: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CountermarkError, match="images of shape"):
        Marking(source, BASES, key=owner / "key", **SMALL)
    some_mark(source, tmp_path)
    monkeypatch.setattr(room, "timestamping", lambda *_: lambda message: b"token")
    with pytest.raises(CountermarkError, match="drawn without a timestamp; leave tsa out"):
        some_mark(source, tmp_path, tsa="http://authority")


def test_several_processes_make_one_key(source: nn.Module, tmp_path: Path) -> None:
    """Several workers make one key, as in a data-parallel job.

    Threads stand for processes here: each has its own lock on the folder, as a process has.
    """
    made: list[Marking] = []
    workers = [
        threading.Thread(target=lambda: made.append(some_mark(source, tmp_path))) for _ in range(4)
    ]
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    assert len(made) == 4
    assert sorted(mark.resumed for mark in made) == [False, True, True, True]
    assert len({mark.key.signature for mark in made}) == 1


@pytest.fixture(autouse=True)
def _same_randomness() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.mark.parametrize(
    ("right", "left", "usable"), [(90, 81, True), (90, 79, False), (8, 3, False), (8, 5, True)]
)
def test_a_copy_with_a_fraction_of_a_weak_network_s_accuracy_is_ruined(
    right: int, left: int, usable: bool
) -> None:
    """Ten points are more than a network of many classes may have."""

    class First(nn.Module):
        """Right on so many of a hundred images, which hold their numbers."""

        def __init__(self, count: int) -> None:
            super().__init__()
            self.count = count

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            known = (255 * x).round().flatten(1)[:, 0] < self.count
            return torch.stack((known.float(), 0.5 * torch.ones_like(known)), 1)

    shown = Examples(
        torch.arange(100, dtype=torch.uint8).view(-1, 1, 1, 1), torch.zeros(100).long()
    )
    assert room._usable(First(left), First(right), shown) is usable
