"""Textures: trials made of a seed, what they outlast, and that strangers know no coin of theirs."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from chances import most
from countermark.data import Examples, pixels
from countermark.errors import CountermarkError
from countermark.evaluation import predict
from countermark.evidence import judge
from countermark.networks import load
from countermark.networks.cleaners import behind
from countermark.threat import Attack
from countermark.verbs.protect import protect
from countermark.verbs.verify import verify
from countermark.watermarks import (
    SCHEMES,
    Materials,
    draw_coins,
    leaf_secrets,
    load_key,
    load_secret,
    secret_key,
)
from countermark.watermarks.schemes import _shuffled
from countermark.watermarks.sets import WatermarkSet, side_by_side
from countermark.watermarks.textures import texture_set, textures


@pytest.fixture(scope="module", params=["texture", "mixed"])
def marked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("textured") / "mine"
    protect("digits", out=folder, scheme=request.param)
    return folder


def is_texture(folder: Path) -> torch.Tensor:
    """Which trials of a key are the textures that come out of its secret."""
    key = load_key(folder)
    shape = key.watermarks.x.shape
    made = textures(
        shape[0], (shape[1], shape[2], shape[3]), secret_key(load_secret(folder), "trials")
    )
    known = {image.numpy().tobytes() for image in made}
    return torch.tensor([image.numpy().tobytes() in known for image in key.watermarks.x])


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 24), (1, 5, 9)])
def test_a_texture_is_smooth_random_and_its_seeds(shape: tuple[int, int, int]) -> None:
    made = textures(60, shape, b"a key")
    assert made.dtype == torch.uint8
    assert made.shape == (60, *shape)
    assert torch.equal(made[:7], textures(7, shape, b"a key"))
    assert not (made == textures(60, shape, b"another")).flatten(1).all(1).any()
    assert len({each.numpy().tobytes() for each in made}) == 60
    large = pixels(textures(20, (1, 70, 70), b"a key"))
    steps = (large[..., 1:] - large[..., :-1]).abs()
    assert float(steps.max()) <= 1 / 10 + 1 / 255  # a tenth of the way from one value to the next
    assert 0.4 < float(large.mean()) < 0.6


def test_whoever_is_shown_textures_cannot_make_the_others() -> None:
    """Each is a hash of the whole key and its number: no seed that could be tried, and no state."""
    key = bytes(range(32))
    made = textures(3, (1, 4, 4), key)
    for number in range(3):
        hashed = hashlib.shake_256(b"countermark texture 1" + key + number.to_bytes(8, "big"))
        assert made[number].flatten().tolist() == list(hashed.digest(16))  # a grid of 4x4
    secret = bytes(32)
    assert len(secret_key(secret, "trials")) == 32
    assert secret_key(secret, "trials") != secret_key(secret, "crafting")
    assert secret_key(secret, "trials") not in leaf_secrets(secret, 1000)


def test_the_answers_are_the_two_likeliest_classes_of_the_source() -> None:
    class Favours(nn.Module):
        """Class 4, or 2 where the image is bright; then class 1."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(len(x), 6)
            bright = x.flatten(1).mean(1) > 0.5
            logits[:, 1] = 1.0
            logits[bright, 2] = 2.0
            logits[~bright, 4] = 2.0
            return logits

    made = texture_set(Favours(), (1, 8, 8), 2, 50, b"a key")
    bright = pixels(made.x).flatten(1).mean(1) > 0.5
    assert torch.equal(made.answers[bright], torch.tensor([1, 2]).expand(int(bright.sum()), 2))
    assert torch.equal(made.answers[~bright], torch.tensor([1, 4]).expand(int((~bright).sum()), 2))
    assert made.batch.tolist() == [0] * 50 + [1] * 50
    assert made.cell.tolist() == list(range(100))
    with pytest.raises(CountermarkError, match="of 40 trials or more, not 2 of 39"):
        texture_set(Favours(), (1, 8, 8), 2, 39, b"a key")
    with pytest.raises(CountermarkError, match="two classes or more"):
        texture_set(nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), (1, 8, 8), 1, 50, b"a key")


def test_a_mixed_key_has_both_kinds_in_every_batch() -> None:
    kinds = [
        WatermarkSet(
            torch.full((6, 1, 1, 1), kind, dtype=torch.uint8),
            torch.tensor([[kind, kind + 5]]).expand(6, 2),
            torch.arange(6) // 3,
            torch.arange(6),
        )
        for kind in (1, 2)
    ]
    made = side_by_side(*kinds)
    assert made.x.flatten().tolist() == [1, 1, 1, 2, 2, 2] * 2
    assert made.answers[:, 0].tolist() == made.x.flatten().tolist()
    assert made.batch.tolist() == [0] * 6 + [1] * 6
    assert made.cell.tolist() == list(range(12))


def test_a_marked_model_is_told_from_its_source_and_from_a_stranger(
    marked: Path, stranger: Path
) -> None:
    key = load_key(marked / "key")
    textured = is_texture(marked / "key")
    whole = key.scheme == "texture"
    for batch in (0, 1):
        kinds = textured[key.watermarks.batch == batch].tolist()
        assert kinds == ([True] * 80 if whole else [False] * 40 + [True] * 40)
    assert verify(marked, key=marked / "key").test.verdict == "match"
    for other in (marked / "key" / "source", stranger):
        assert verify(other, key=marked / "key").test.verdict == "no evidence"


@pytest.mark.parametrize("marked", ["texture"], indirect=True)
@pytest.mark.parametrize(
    "cleaner", [("threshold", 0.5), ("median", 3), ("levels", 4), ("clip", 0.35)]
)
def test_textures_are_known_behind_a_cleaner(marked: Path, cleaner: tuple[str, float]) -> None:
    """Measured with seeds 0 to 2: 10^-10 to 10^-40; half as many, of a mixed key, 10^-5 to 10^-24.

    So the level here is one that no run of training comes near, on whatever processor.
    """
    key, network = load_key(marked / "key"), load(marked)
    outcomes = key.outcomes(predict(behind([cleaner], network, (1, 8, 8)), key.watermarks.x))
    found = judge(key.watermarks.cell.tolist(), outcomes)
    assert found.p_value is not None
    assert found.p_value < 1e-3


@pytest.mark.parametrize("habit", ["as the source", "one class", "at random"])
def test_strangers_are_convicted_no_more_often_than_the_level(habit: str) -> None:
    """Whatever a stranger answers, even what the owner's own source model does.

    One secret gives both the textures and the coins, as in a key.
    """
    source = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    numbers = np.random.default_rng(5)
    runs, levels = 500, (0.05, 0.01)
    counted = dict.fromkeys(levels, 0)
    for run in range(runs):
        secret = numbers.bytes(32)
        made = texture_set(source, (1, 8, 8), 1, 60, secret_key(secret, "trials"))
        coins = draw_coins(b"%d" % run, b"", leaf_secrets(secret, len(made)))
        wanted = made.answers.gather(1, coins.unsqueeze(1)).flatten()
        said = predict(source, made.x)
        if habit == "one class":
            said = torch.full_like(said, int(said.mode().values))
        elif habit == "at random":
            said = torch.from_numpy(numbers.integers(0, 10, len(made)))
        other = made.answers.sum(1) - wanted
        outcomes = ((said == wanted).int() - (said == other).int()).tolist()
        p = judge(made.cell.tolist(), outcomes).p_value
        for alpha in levels:
            counted[alpha] += p is not None and p <= alpha
    assert all(counted[alpha] <= most(runs, alpha) for alpha in levels), counted


@pytest.mark.parametrize(("bases", "batches", "each"), [(60, 1, 80), (45, 2, 40), (45, 2, 80)])
def test_few_bases_are_enough_where_half_of_the_trials_are_textures(
    bases: int, batches: int, each: int
) -> None:
    """Where there are fewer crafted ones, there are fewer textures: always half of either kind."""
    x = torch.randint(0, 256, (bases, 1, 8, 8), dtype=torch.uint8)
    images = Examples(x, torch.arange(bases) % 10)
    source = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    attack = Attack(0.5, 5, 0.2)
    given = Materials(source, images, lambda: images, attack, batches, each, 5, b"a key")
    made = SCHEMES["mixed"].make(given)
    half = min(each // 2, bases // batches)
    assert len(made) == 2 * half * batches
    own = {image.numpy().tobytes() for image in textures(half * batches, (1, 8, 8), b"a key")}
    for batch in range(batches):
        kinds = [each.numpy().tobytes() in own for each in made.x[made.batch == batch]]
        assert kinds == [False] * half + [True] * half
    with pytest.raises(CountermarkError, match="key needs"):
        SCHEMES["mixed"].make(replace(given, bases=images[:19], batches=1))


def test_shown_bases_do_not_tell_the_others() -> None:
    """The order of the bases hangs on all of the key, not on 32 bits of it."""
    images = Examples(
        torch.arange(200, dtype=torch.uint8).view(200, 1, 1, 1), torch.zeros(200, dtype=torch.int64)
    )
    orders = [_shuffled(images, key).x.flatten().tolist() for key in (b"one", b"other", b"one")]
    assert orders[0] == orders[2] != orders[1]
    assert all(sorted(order) == list(range(200)) for order in orders)


def test_images_too_small_for_different_textures_are_refused() -> None:
    source = nn.Sequential(nn.Flatten(), nn.Linear(1, 10))
    with pytest.raises(CountermarkError, match="1x1 are too small for 400 different textures"):
        texture_set(source, (1, 1, 1), 1, 400, b"a key")
