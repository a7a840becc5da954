"""Trials that survive what happens to images on their way to a suspect."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from countermark.cli import main
from countermark.data import Examples, Pools, as_uint8, pixels
from countermark.device import seeded
from countermark.errors import CountermarkError
from countermark.evaluation import predict
from countermark.files import read_json
from countermark.networks import load
from countermark.networks.cleaners import Straight
from countermark.training import teach_cleaner
from countermark.verbs.protect import protect
from countermark.watermarks import (
    PASSAGES,
    Change,
    changes,
    coin_set,
    craft_adversarial,
    full_strength,
    load_key,
    versions,
)
from countermark.watermarks.survival import Passed

SURVIVED = ("jpeg:60", "resize:0.5")


@pytest.fixture(scope="module")
def surviving(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose coins were trained in JPEGs and small images too."""
    folder = tmp_path_factory.mktemp("surviving") / "mine"
    protect("digits", out=folder, survive=SURVIVED)
    return folder


def kept(model: Path, words: tuple[str, ...], key: Path) -> list[int]:
    """Trials that a model answers as the coins say, plain and after each change."""
    marked, network = load_key(key), load(model)
    shape = tuple(marked.watermarks.x.shape[1:])
    return [
        int((predict(network, x) == marked.labels).sum())
        for x in versions(marked.watermarks.x, changes(words, shape))  # type: ignore[arg-type]
    ]


def test_coins_survive_what_they_were_made_for(surviving: Path, owner: Path) -> None:
    """Images of 8x8 are brought to 4x4: of 160 coins some 150 are left, and some 55 otherwise."""
    count = len(load_key(surviving / "key").watermarks)
    plain, jpeg, small = kept(surviving, SURVIVED, surviving / "key")
    assert min(plain, jpeg) >= 0.95 * count
    assert small >= 0.8 * count
    plain, _, small = kept(owner, SURVIVED, owner / "key")
    assert plain >= 0.95 * count
    assert small <= 0.7 * count


def test_the_source_errs_on_every_version_and_saw_no_coin(surviving: Path) -> None:
    """Condition 2: the choice follows from the source model and the images."""
    marked, source = load_key(surviving / "key"), load(surviving / "key" / "source")
    assert read_json(surviving / "config.json")["survive"] == list(SURVIVED)
    assert marked.c1["survive"] == list(SURVIVED)
    every = versions(marked.watermarks.x, changes(SURVIVED, (1, 8, 8)))
    heads_or_tails = marked.watermarks.answers
    plain = predict(source, every[0])
    true = torch.where(plain == heads_or_tails[:, 0], heads_or_tails[:, 1], heads_or_tails[:, 0])
    assert all(bool((predict(source, x) != true).all()) for x in every)
    # The source answers as often with the coin as against it.
    agreed = int((plain == marked.labels).sum())
    assert abs(2 * agreed - len(plain)) < 5.3 * len(plain) ** 0.5  # chance of failure below 1e-6


def test_the_same_bases_make_the_same_trials_whatever_the_secret(
    owner: Path, digits: Pools
) -> None:
    source = load(owner / "key" / "source")
    made = [
        coin_set(source, digits.bases, full_strength(0.2), 2, 40, 7, changes(SURVIVED, (1, 8, 8)))
        for _ in range(2)
    ]
    assert torch.equal(made[0].x, made[1].x)
    assert torch.equal(made[0].answers, made[1].answers)


@pytest.mark.parametrize("name", PASSAGES)
def test_every_change_keeps_form_and_does_something(name: str, digits: Pools) -> None:
    [change] = changes([name], (1, 8, 8))
    noisy = (digits.test.x[:20].int() + torch.arange(20).reshape(-1, 1, 1, 1) * 3).clamp(0, 255)
    x = noisy.to(torch.uint8)
    found = change(x)
    assert (found.dtype, found.shape) == (torch.uint8, x.shape)
    assert not torch.equal(found, x)
    assert torch.equal(change(x), found)
    assert change(x[:0]).shape == x[:0].shape


def test_a_jpeg_of_the_best_quality_and_a_size_of_one_change_next_to_nothing() -> None:
    x = as_uint8(torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16))
    best, same = changes(["jpeg:100", "resize:1"], (3, 16, 16))
    assert int((same(x).int() - x.int()).abs().max()) == 0
    assert float((best(x).float() - x.float()).abs().mean()) < 3


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("webp:3", "--survive takes words as jpeg:75, of jpeg, resize"),
        ("jpeg:200", "the amount of jpeg in --survive is a quality from 1 to 100"),
        ("jpeg:7.5", "the amount of jpeg in --survive is a quality"),
        ("resize:big", "the amount of resize in --survive is a factor"),
        ("median:4", "an odd number from 3 to 15"),
        ("denoise:0", "the amount of denoise in --survive is a number of filters from 1 to 256"),
    ],
)
def test_words_that_name_no_change_are_refused_before_the_work(
    word: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["protect", "digits", "--out", str(tmp_path / "x"), "--survive", word]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_only_coins_can_be_made_to_survive(tmp_path: Path) -> None:
    with pytest.raises(CountermarkError, match="--survive goes with --scheme coin or mixed only"):
        protect("digits", out=tmp_path / "x", scheme="ood", survive=("jpeg:75",))


def test_a_jpeg_of_four_channels_is_refused() -> None:
    [change] = changes(["jpeg"], (4, 8, 8))
    with pytest.raises(CountermarkError, match="1 or 3 channels, not 4; leave jpeg out"):
        change(torch.zeros(1, 4, 8, 8, dtype=torch.uint8))


def test_crafting_through_a_cleaner_leaves_it_little(owner: Path, digits: Pools) -> None:
    """A cleaner that was taught on the source gives back what it knows nothing of."""
    source, strong = load(owner / "key" / "source"), full_strength(0.3)

    def teach(_word: str, layer: nn.Module) -> None:
        teach_cleaner(layer, source, digits.training, budget=0.3, epochs=30, batch_size=32)

    with seeded(torch.device("cpu"), 5):
        cleaner = changes(["denoise:24"], (1, 8, 8), teach)
    lost = []
    for through in ([], cleaner):
        x, _ = craft_adversarial(source, digits.bases, strong, 7, through=through)
        forms = [predict(source, form) != digits.bases.y for form in versions(x, cleaner)]
        lost.append(float(torch.stack(forms).all(0).float().mean()))
    assert lost[1] > lost[0] + 0.2  # some 92 % instead of 20 %


def test_the_attack_on_a_network_behind_changes_is_on_each_form(digits: Pools) -> None:
    """The logits are means of logarithms of probabilities, and their gradient reaches the image."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    passages = changes(["resize:0.5", "threshold:0.4", "jpeg:60"], (1, 8, 8))
    x = pixels(digits.test.x[:6]).requires_grad_()
    logits = Passed(network, passages)(x)
    forms = versions(as_uint8(x.detach()), passages)
    wanted = torch.stack([network(pixels(form)).log_softmax(1) for form in forms]).mean(0)
    assert torch.allclose(logits, wanted, atol=0.05)  # an attack sees the pixels unrounded
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), x)
    assert float(gradient.abs().flatten(1).sum(1).min()) > 0


def test_an_interrupted_run_does_not_teach_its_cleaner_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"out": tmp_path / "mine", "survive": ("denoise:4",)}

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr("countermark.watermarks.write_key", interrupt)
        with pytest.raises(KeyboardInterrupt):
            protect("digits", **options)
    monkeypatch.setattr("countermark.training.teach_cleaner", interrupt)
    protect("digits", **options)
    assert load_key(tmp_path / "mine" / "key").c1["survive"] == ["denoise:4"]
    assert not list((tmp_path / "mine").glob("checkpoint-*"))


def test_too_few_bases_that_survive_are_said(owner: Path, digits: Pools) -> None:
    """A change after which the source model is never wrong leaves no trial."""
    bases = Examples(digits.bases.x[:60], digits.bases.y[:60])
    true = {x.numpy().tobytes(): x for x in bases.x}
    source = load(owner / "key" / "source")

    def undo(x: torch.Tensor, _: float) -> torch.Tensor:
        return pixels(torch.stack(list(true.values()))[: len(x)])

    undone = Change(Straight(undo, 0))
    with pytest.raises(CountermarkError, match="bases became watermarks"):
        coin_set(source, bases, full_strength(0.2), 2, 40, 7, [undone])
