"""Watermark sets, the commitment and the key; and simulations that would catch an invalid mark."""

import hashlib
import hmac
import math
import random
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import countermark.watermarks.sets as sets_module
from chances import RISK, most
from countermark.attacks import pgd
from countermark.data import Examples, Pools
from countermark.errors import CountermarkError
from countermark.evaluation import predict
from countermark.evidence import sign_flip_test
from countermark.files import canonical_json, read_json, sha256
from countermark.networks import load_model
from countermark.verbs.protect import protect
from countermark.watermarks import (
    SCHEMES,
    WatermarkSet,
    coin_set,
    craft_adversarial,
    craft_trials,
    draw_coins,
    full_strength,
    load_key,
    new_secrets,
    write_key,
)
from countermark.watermarks.commitment import (
    check_signature,
    leaf_secret,
    leaf_secrets,
    leaves,
    merkle_root,
    secret_seed,
)
from shorter import mark_shortly, take_any_mark


def some_set(count: int = 12, answers: int = 2) -> WatermarkSet:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
    heads = torch.randint(0, 5, (count,), generator=generator)
    both = torch.stack((heads, heads + 3), 1)[:, :answers]
    return WatermarkSet(x, both, torch.arange(count) // 4, torch.arange(count))


def test_crafted_watermarks_are_within_the_budget_and_fool_the_source(
    owner: Path, digits: Pools
) -> None:
    source, _ = load_model(owner / "key" / "source")
    images, predicted = craft_adversarial(source, digits.bases, full_strength(0.25), seed=0)
    assert images.dtype == torch.uint8
    assert int((images.int() - digits.bases.x.int()).abs().max()) <= round(0.25 * 255)
    assert torch.equal(predict(source, images), predicted)
    assert float((predicted != digits.bases.y).double().mean()) > 0.7


def test_each_trial_offers_the_true_label_and_the_sources(owner: Path, digits: Pools) -> None:
    source, _ = load_model(owner / "key" / "source")
    watermarks = coin_set(source, digits.bases, full_strength(0.25), 4, 40, seed=0)
    answers = watermarks.answers
    assert bool((answers[:, 0] < answers[:, 1]).all())
    assert bool((answers == predict(source, watermarks.x).unsqueeze(1)).any(1).all())
    assert torch.bincount(watermarks.batch).tolist() == [40] * 4
    assert torch.equal(watermarks.cell, torch.arange(160))
    again = coin_set(source, digits.bases, full_strength(0.25), 4, 40, seed=0)
    assert torch.equal(again.x, watermarks.x)


def in_colour() -> tuple[torch.nn.Module, Examples]:
    """A source model for colour images, and 200 bases that it gets right."""
    generator = torch.Generator().manual_seed(3)
    source = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 5))
    source[1].weight.data = torch.randn(5, 3 * 8 * 8, generator=generator)
    bases = torch.randint(60, 196, (200, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return source, Examples(bases, predict(source, bases))


def test_trials_in_colour_lie_far_away_and_the_source_only_just_errs_on_them() -> None:
    source, examples = in_colour()
    bases, labels, attack = examples.x, examples.y, full_strength(16 / 255)

    def lead(images: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scores = source(images.float() / 255)
        numbers = torch.arange(len(scores))
        return scores[numbers, answers] - scores[numbers, labels]

    images, answers = craft_trials(source, examples, attack, seed=1)
    strong, theirs = craft_adversarial(source, examples, attack, seed=1)
    moved = (images.int() - bases.int()).abs()
    assert int(moved.max()) == 16
    assert torch.equal(answers, predict(source, images))
    wrong = answers != labels
    assert int(wrong.sum()) == int((theirs != labels).sum()) > 150
    # A step is a sixteenth of the budget, and no more are taken than the answer needs.
    assert float(lead(images, answers)[wrong].mean()) < 0.2 * float(
        lead(strong, theirs)[wrong].mean()
    )
    assert float((moved == 16).double().mean()) > 0.5
    again, _ = craft_trials(source, examples, attack, seed=1)
    other, _ = craft_trials(source, examples, attack, seed=2)
    assert torch.equal(again, images)
    assert not torch.equal(other, images)
    # Grey images are crafted at full strength.
    grey = Examples(bases[:, :1], labels)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8 * 8, 5))
    assert torch.equal(
        craft_trials(network, grey, attack, seed=1)[0],
        craft_adversarial(network, grey, attack, seed=1)[0],
    )


def test_bases_in_colour_that_the_source_gets_right_come_first() -> None:
    source, right = in_colour()
    wrong = Examples(right.x[:80].flip(3), (right.y[:80] + 1) % 5)
    wrong = wrong[predict(source, wrong.x) != wrong.y]
    both = Examples(torch.cat((wrong.x, right.x)), torch.cat((wrong.y, right.y)))
    attack = full_strength(16 / 255)

    def of(bases: Examples, trials: WatermarkSet) -> torch.Tensor:
        """Which trials lie in the budget around one of the bases."""
        far = torch.cdist(trials.x.flatten(1).float(), bases.x.flatten(1).float(), p=math.inf)
        return far.min(1).values <= 16

    few = coin_set(source, both, attack, 1, 100, seed=0)
    assert len(few) == 100
    assert bool(of(right, few).all())
    assert not bool(of(wrong, few).any())
    many = coin_set(source, both, attack, 1, 1000, seed=0)
    assert int(of(wrong, many).sum()) == len(wrong) > 40


def test_too_few_bases_are_an_error(owner: Path, digits: Pools) -> None:
    source, _ = load_model(owner / "key" / "source")
    with pytest.raises(CountermarkError, match="bases became watermarks"):
        coin_set(source, digits.bases, full_strength(0.001), 4, 40, seed=0)


def test_no_more_bases_are_crafted_than_the_key_needs(
    owner: Path, digits: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crafting 40 steps on large images takes hours; the trials are the same without the rest."""
    source, _ = load_model(owner / "key" / "source")
    crafted = 0

    def counted(model: torch.nn.Module, x: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        nonlocal crafted
        crafted += len(x)
        return pgd(model, x, *rest, **more)

    monkeypatch.setattr(sets_module, "pgd", counted)
    monkeypatch.setattr(sets_module, "_CRAFTED", 10)
    few = coin_set(source, digits.bases, full_strength(0.25), 2, 40, seed=0)
    assert len(few) == 80 <= crafted <= 120 < len(digits.bases)
    crafted = 0
    many = coin_set(source, digits.bases, full_strength(0.25), 2, 200, seed=0)
    assert crafted == len(digits.bases)
    assert torch.equal(few.x, many.x[:80])
    assert torch.equal(few.answers, many.answers[:80])


def test_leaves_follow_the_specification() -> None:
    watermarks, secret = some_set(), b"s" * 32
    i = 5
    number = (5).to_bytes(8, "big"), (1).to_bytes(8, "big"), (5).to_bytes(8, "big")
    labels = [int(answer).to_bytes(8, "big") for answer in watermarks.answers[i]]
    s_i = hmac.new(secret, (5).to_bytes(8, "big"), hashlib.sha256).digest()
    image = bytes(watermarks.x[i].flatten().tolist())
    data = (
        b"\0countermark leaf 1"
        + b"".join(number)
        + (64).to_bytes(8, "big")
        + image
        + (2).to_bytes(8, "big")
        + b"".join(labels)
        + s_i
    )
    assert leaves(watermarks, secret)[i] == hashlib.sha256(data).digest()
    assert leaf_secret(secret, 5) == s_i


def test_merkle_root_in_closed_form() -> None:
    a, b, c = (bytes([n]) * 32 for n in range(3))
    join = lambda left, right: hashlib.sha256(b"\1" + left + right).digest()  # noqa: E731
    assert merkle_root([a]) == a
    assert merkle_root([a, b, c]) == join(join(a, b), c)
    assert merkle_root([a, b, c, a, b]) == join(join(join(a, b), join(c, a)), b)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 11), st.sampled_from(["x", "answers", "batch", "cell", "secret"]))
def test_every_part_of_every_leaf_is_bound(index: int, part: str) -> None:
    watermarks, secret = some_set(), b"s" * 32
    root = merkle_root(leaves(watermarks, secret))
    tensors = {
        name: getattr(watermarks, name).clone() for name in ("x", "answers", "batch", "cell")
    }
    if part == "secret":
        secret = b"t" + secret[1:]
    else:
        tensors[part].view(len(watermarks), -1)[index, 0] ^= 1
    assert merkle_root(leaves(WatermarkSet(**tensors), secret)) != root


def test_coins_depend_on_commitment_token_and_secret_and_are_fair() -> None:
    coins = draw_coins(b"c1", b"", leaf_secrets(b"s" * 32, 4000))
    assert abs(int(coins.sum()) - 2000) < 160  # five standard deviations
    for other in (
        draw_coins(b"c2", b"", leaf_secrets(b"s" * 32, 4000)),
        draw_coins(b"c1", b"t", leaf_secrets(b"s" * 32, 4000)),
        draw_coins(b"c1", b"", leaf_secrets(b"t" * 32, 4000)),
    ):
        assert abs(int((coins == other).sum()) - 2000) < 160
    assert torch.equal(coins, draw_coins(b"c1", b"", leaf_secrets(b"s" * 32, 4000)))


def test_key_round_trip_and_modes(tmp_path: Path) -> None:
    folder = tmp_path / "key"
    new_secrets(folder)
    made = write_key(folder, "coin", some_set(), {"data": "digits"})
    read = load_key(folder)
    assert torch.equal(made.labels, read.labels)
    assert torch.equal(made.others, read.others)
    assert made.c1 == read.c1
    assert set(
        map(tuple, torch.stack((read.labels, read.others), 1).sort(1).values.tolist())
    ) <= set(map(tuple, some_set().answers.tolist()))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert read.outcomes(read.labels) == [1] * 12
    assert read.outcomes(read.others) == [-1] * 12
    assert read.outcomes(torch.full((12,), 9)) == [0] * 12
    assert read.outcomes(torch.full((12,), -1)) == [0] * 12


def test_a_published_key_has_no_other_answer(tmp_path: Path) -> None:
    new_secrets(tmp_path / "key")
    key = write_key(tmp_path / "key", "ood", some_set(answers=1), {})
    assert load_key(tmp_path / "key").outcomes(torch.full((12,), -1)) == [0] * 12
    assert key.outcomes(key.labels) == [1] * 12


def test_a_key_with_one_byte_changed_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "key"
    new_secrets(folder)
    write_key(folder, "coin", some_set(), {"data": "digits"})
    generator = random.Random(0)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        positions = (
            range(len(whole)) if len(whole) < 64 else generator.sample(range(len(whole)), 150)
        )
        for position in positions:
            for flip in (1, 0x20) if len(whole) > 64 else (1,):
                path.write_bytes(
                    whole[:position] + bytes([whole[position] ^ flip]) + whole[position + 1 :]
                )
                with pytest.raises(CountermarkError):
                    load_key(folder)
        for cut in (0, 1, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:cut])
            with pytest.raises(CountermarkError):
                load_key(folder)
        path.unlink()
        with pytest.raises(CountermarkError):
            load_key(folder)
        path.write_bytes(whole)
    load_key(folder)


def some_clean(count: int = 7) -> Examples:
    x = torch.randint(
        0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)
    )
    return Examples(x, torch.arange(count))


def test_clean_examples_and_class_names_are_fixed_before_the_coins(tmp_path: Path) -> None:
    """A judge who finds out by them how a suspect is asked must know that they came first."""
    new_secrets(tmp_path / "key")
    without = write_key(tmp_path / "key", "coin", some_set(), {"data": "digits"})
    assert load_key(tmp_path / "key").clean is None
    more: dict[str, Any] = {"clean": some_clean(), "names": ["dog", "cat"]}
    made = write_key(tmp_path / "key", "coin", some_set(), {"data": "digits"}, **more)
    read = load_key(tmp_path / "key")
    assert made.clean is not None
    assert read.clean is not None
    assert read.clean.digest == made.clean.digest == some_clean().digest
    assert read.names == made.names == ("dog", "cat")
    digest = sha256((tmp_path / "key" / "clean.safetensors").read_bytes())
    assert read.c1 == {**without.c1, "clean_sha256": digest, "class_names": ["dog", "cat"]}
    assert torch.equal(read.labels, made.labels)
    assert stat.S_IMODE((tmp_path / "key" / "clean.safetensors").stat().st_mode) == 0o600


def test_clean_examples_with_one_byte_changed_are_refused_and_lost_ones_missed(
    tmp_path: Path,
) -> None:
    new_secrets(tmp_path / "key")
    write_key(tmp_path / "key", "coin", some_set(), {"data": "digits"}, clean=some_clean())
    path = tmp_path / "key" / "clean.safetensors"
    whole = path.read_bytes()
    for position in random.Random(0).sample(range(len(whole)), 60):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(CountermarkError, match=r"clean\.safetensors"):
            load_key(tmp_path / "key")
    path.unlink()
    assert load_key(tmp_path / "key").clean is None  # nothing is judged by them


@pytest.mark.parametrize(
    "bad",
    [
        Examples(torch.zeros(3, 1, 9, 9, dtype=torch.uint8), torch.arange(3)),
        Examples(torch.zeros(3, 1, 8, 8), torch.arange(3)),
        Examples(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.arange(4)),
        Examples(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 1 << 40])),
        Examples(torch.zeros(0, 1, 8, 8, dtype=torch.uint8), torch.arange(0)),
    ],
    ids=["shape", "pixels", "count", "class", "none"],
)
def test_clean_examples_of_another_form_are_refused(tmp_path: Path, bad: Examples) -> None:
    new_secrets(tmp_path / "key")
    write_key(tmp_path / "key", "coin", some_set(), {"data": "digits"}, clean=bad)
    with pytest.raises(CountermarkError, match="does not hold clean examples"):
        load_key(tmp_path / "key")


def test_a_scheme_is_one_entry_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Key, commitment and outcomes follow the record of the scheme.

    A scheme that is added to the table is known to all of them.
    """
    monkeypatch.setitem(SCHEMES, "composites", replace(SCHEMES["coin"], taken=80.0))  # type: ignore[index]
    new_secrets(tmp_path / "key")
    made = write_key(tmp_path / "key", "composites", some_set(), {})
    read = load_key(tmp_path / "key")
    assert read.c1["statistic"] == "sign-flip"
    assert (read.rules.taken, read.scheme) == (80.0, "composites")
    assert torch.equal(read.others, made.others)
    assert read.outcomes(read.others) == [-1] * 12


def test_commitment_binds_key_and_model(owner: Path) -> None:
    record = read_json(owner / "commitment.json")
    key = load_key(owner / "key")
    assert record["kind"] == "private"
    assert record["t1"] is record["t2"] is None
    assert record["c1"] == key.c1
    assert record["c2"]["c1_sha256"] == hashlib.sha256(canonical_json(record["c1"])).hexdigest()
    assert (
        record["c2"]["model_sha256"]
        == hashlib.sha256((owner / "model.safetensors").read_bytes()).hexdigest()
    )
    for part in ("c1", "c2"):
        check_signature(
            record["c1"]["public_key"], record[part], record[f"{part}_signature"], "commitment"
        )
    with pytest.raises(CountermarkError, match="signature"):
        check_signature(
            record["c1"]["public_key"],
            {**record["c2"], "guard": 1},
            record["c2_signature"],
            "commitment",
        )


def test_the_commitment_tells_no_secret(owner: Path) -> None:
    public = (
        (owner / "commitment.json").read_bytes()
        + (owner / "model.json").read_bytes()
        + (owner / "metrics.json").read_bytes()
    )
    for name in ("secret", "signing-key"):
        assert (owner / "key" / name).read_bytes().hex().encode() not in public


def test_the_trials_cannot_be_made_again_without_the_secret(
    owner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another secret gives another source model, other bases and other trials.

    The seed and the public options are the same.
    """
    mark_shortly(monkeypatch, 2)
    take_any_mark(monkeypatch)
    protect("digits", out=tmp_path / "again", epochs=8)
    first, second = load_key(owner / "key"), load_key(tmp_path / "again" / "key")
    ours, theirs = (set(map(bytes, key.watermarks.x.flatten(1).numpy())) for key in (first, second))
    assert not ours & theirs
    public = read_json(tmp_path / "again" / "model.json")
    assert [event["config"]["seed"] for event in public["history"]] == [0, 0]
    assert secret_seed(b"a" * 32, "x") != secret_seed(b"b" * 32, "x") != secret_seed(b"b" * 32, "y")


def test_a_coin_needs_two_answers_and_a_cell_of_its_own(tmp_path: Path) -> None:
    """A key whose coins are answers that everybody gives is refused.

    Called coins, such answers would convict everybody.
    """
    whole = some_set()
    reversed_ = WatermarkSet(whole.x, whole.answers.flip(1), whole.batch, whole.cell)
    shared = WatermarkSet(whole.x, whole.answers, whole.batch, whole.cell // 2)
    for number, (scheme, bad) in enumerate(
        [
            ("coin", some_set(answers=1)),
            ("coin", reversed_),
            ("coin", shared),
            *((name, whole) for name, scheme in SCHEMES.items() if not scheme.coins),
            ("none", whole),
        ]
    ):
        new_secrets(tmp_path / str(number))
        if scheme in SCHEMES:
            write_key(tmp_path / str(number), scheme, bad, {})
        else:
            with pytest.raises(CountermarkError, match="unknown scheme"):
                write_key(tmp_path / str(number), scheme, bad, {})
        with pytest.raises(CountermarkError, match=r"commitment|key.json"):
            load_key(tmp_path / str(number))


@pytest.mark.parametrize("who", ["stranger", "source", "source in colour"])
def test_two_thousand_random_keys_find_nothing_in_a_stranger(
    who: str, owner: Path, stranger: Path
) -> None:
    """Coins of 2,000 secrets against fixed answers give uniform randomised p-values.

    The coins come from the real derivation. The unmarked source model is the hardest stranger: it
    shares most of its answers with the marked one and made the trials itself.
    """
    key = load_key(owner / "key")
    watermarks = key.watermarks
    if who == "source in colour":  # its trials are crafted in another way
        model, bases = in_colour()
        watermarks = coin_set(model, bases, full_strength(16 / 255), 1, 120, seed=0)
    else:
        model, _ = load_model(stranger if who == "stranger" else owner / "key" / "source")
    answers = predict(model, watermarks.x)
    heads, tails = watermarks.answers.unbind(1)
    signed = (answers == heads).int() - (answers == tails).int()
    generator, values = random.Random(5), []
    for _ in range(2000):
        secret = generator.randbytes(32)
        flips = (
            1
            - 2
            * draw_coins(
                canonical_json({**key.c1, "public_key": secret.hex()}),
                b"",
                leaf_secrets(secret, len(watermarks)),
            ).int()
        )
        values.append(
            sign_flip_test((signed * flips).tolist()).randomised_p_value(generator.random())
        )
    values.sort()
    distance = max(max((i + 1) / 2000 - value, value - i / 2000) for i, value in enumerate(values))
    assert distance < math.sqrt(
        math.log(2 / RISK) / 2 / 2000
    )  # Kolmogorov-Smirnov, by the bound of Massart (1990)
    for alpha in (0.05, 0.01, 0.001):
        assert sum(value <= alpha for value in values) <= most(2000, alpha)
