"""Thefts, removals and cleaners against what each gives by hand, then all rows of the tables."""

import copy
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from countermark.data import Examples, open_data, pixels
from countermark.device import batch_size
from countermark.errors import CountermarkError
from countermark.evaluation import accuracy, agreement, predict
from countermark.networks import (
    DataRecord,
    Description,
    build,
    describing,
    load_model,
    open_network,
    save_model,
)
from countermark.networks.cleaners import CLEANERS
from countermark.thieves import REMOVALS, THEFTS, Means, objective_of, remove, removed, stolen
from countermark.thieves.remove import (
    add_noise,
    finetune,
    like_trials,
    own_coins,
    prune,
    quantise,
)
from countermark.thieves.steal import augment, augmentation_step, surrogate_for
from countermark.threat import COLOUR, GREY, Attack
from countermark.training import (
    Hardware,
    TrainConfig,
    Traits,
    marking,
    recipe,
    teach_cleaner,
    traits,
)
from countermark.verbs.remove import remove as remove_verb
from countermark.watermarks import textures
from drawing import draw_arrays
from residual import make

SHAPE = (3, 8, 8)
CLASSES = 6
GIVEN = Traits("colour", 150)
QUICK = Attack(COLOUR.epsilon, 1, 1.25 * COLOUR.epsilon)


@pytest.fixture(scope="module")
def drawn() -> Examples:
    """Drawn colour images of 8x8, in an order that mixes the classes."""
    x, y = draw_arrays(25, size=8)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return Examples(torch.from_numpy(x)[order], torch.from_numpy(y)[order])


@pytest.fixture
def means(drawn: Examples) -> Means:
    return Means(pool=drawn, threat=COLOUR, attack=QUICK, hardware=Hardware("cpu"))


def linear(seed: int = 0, classes: int = CLASSES) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, classes))


def residual() -> nn.Module:
    torch.manual_seed(0)
    return make(SHAPE, CLASSES, width=4).eval()


def state(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


def unchanged(network: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = network.state_dict()
    return now.keys() == before.keys() and all(
        torch.equal(value, before[name]) for name, value in now.items()
    )


def some_images(count: int = 5) -> torch.Tensor:
    return torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(3))


# --- thefts ---------------------------------------------------------------------------------------


def coarse(seed: int) -> nn.Module:
    """A linear network on the mean colours of the four quarters, with no preference for a class."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(12, CLASSES))
    with torch.no_grad():
        network[2].weight.mul_(10)
        network[2].bias.copy_(-0.5 * network[2].weight.sum(1))
    return network


def quarters(count: int, seed: int) -> torch.Tensor:
    """Images of four plain quarters, uint8."""
    colours = torch.randint(
        0, 256, (count, 3, 2, 2), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    return colours.repeat_interleave(4, 2).repeat_interleave(4, 3)


@pytest.mark.parametrize("name", [name for name, theft in THEFTS.items() if theft.sees is not None])
def test_a_theft_copies_a_linear_victim_without_the_labels_of_the_pool(
    name: str, means: Means
) -> None:
    victim, copied, theft = coarse(0), coarse(1), THEFTS[name]
    pool = Examples(quarters(400, 1), torch.zeros(400, dtype=torch.int64))
    chosen = {"queries": 400, "epochs": 20, "batch_size": 32, "learning_rate": 0.1}
    poor = replace(means, pool=pool, seeds=100).given(theft.options, chosen)
    before, fresh = state(victim), quarters(500, 2)
    assert agreement(predict(copied, fresh), predict(victim, fresh)) < 40
    assert theft.sees is not None
    assert theft.run(theft.sees(victim, poor), copied, poor) == 400
    assert agreement(predict(copied, fresh), predict(victim, fresh)) > 55
    assert unchanged(victim, before)


def test_a_thief_sees_no_more_than_the_theft_says(means: Means) -> None:
    victim, x = linear(), some_images()
    shapes = {
        name: theft.sees(victim, means)(x).shape
        for name, theft in THEFTS.items()
        if theft.sees is not None
    }
    labels = dict.fromkeys(("black", "grey", "natural", "robust", "best"), (5,))
    assert shapes == {**labels, "distil": (5, CLASSES)}


def test_algorithm_2_asks_for_what_it_has_made_and_no_more_than_it_may(means: Means) -> None:
    asked: list[torch.Tensor] = []
    victim = linear()

    def answers(x: torch.Tensor) -> torch.Tensor:
        asked.append(x)
        return predict(victim, x)

    few = replace(means, seeds=10, queries=35, epochs=1)
    assert THEFTS["black"].run(answers, linear(1), few) == 35
    assert [len(x) for x in asked] == [10, 10, 15]
    assert torch.equal(asked[0], pixels(means.pool.x[:10]))
    sources = torch.cat((asked[0], asked[1]))
    step = augmentation_step(SHAPE, COLOUR)
    for made in asked[2]:
        nearest = min(float((made - source).abs().max()) for source in sources)
        assert nearest <= step + 1e-6


def test_a_step_of_algorithm_2_goes_along_the_gradient_of_the_chosen_class() -> None:
    """With two classes and linear logits, its sign is that of the difference of the weights."""
    network, x = linear(classes=2), some_images() * 0.5 + 0.25
    weight = network[1].weight.detach()
    direction = (weight[0] - weight[1]).sign().view(SHAPE)
    made = augment(network, x, torch.tensor([0, 1, 0, 1, 0]), 0.1)
    wanted = x + 0.1 * direction * torch.tensor([1, -1, 1, -1, 1]).view(-1, 1, 1, 1)
    torch.testing.assert_close(made, wanted)


def test_queries_stay_within_the_pixels_unless_the_published_code_is_replayed() -> None:
    network, x, y = linear(), some_images(), torch.zeros(5, dtype=torch.int64)
    clamped, free = augment(network, x, y, 0.4), augment(network, x, y, 0.4, clamp=False)
    assert 0 <= float(clamped.min()) <= float(clamped.max()) <= 1
    assert float(free.min()) < 0
    assert torch.equal(free.clamp(0, 1), clamped)


def test_large_images_are_asked_and_made_in_small_batches(means: Means) -> None:
    together: list[int] = []
    network = nn.Sequential(nn.AvgPool2d(56), nn.Flatten(), nn.Linear(48, CLASSES))
    network.register_forward_hook(lambda _layer, given, _answer: together.append(len(given[0])))
    x = torch.randint(0, 256, (20, 3, 224, 224), dtype=torch.uint8)
    pool = replace(means, pool=Examples(x, torch.zeros(20, dtype=torch.int64)))
    augment(network, pixels(x), torch.zeros(20, dtype=torch.int64), 0.1)
    for theft in THEFTS.values():
        if theft.sees is not None:
            theft.sees(network, pool)(x)
    assert max(together) <= batch_size(torch.device("cpu"), x.shape[1:], 1000) < 20
    assert sum(together) == 20 * len(THEFTS)


def test_a_thief_reads_no_more_images_than_are_asked_together(means: Means) -> None:
    x, asked = torch.zeros(20, 3, 224, 224, dtype=torch.uint8), []

    def answers(images: torch.Tensor) -> torch.Tensor:
        asked.append(len(images))
        return torch.zeros(len(images), dtype=torch.int64)

    copied = nn.Sequential(nn.AvgPool2d(56), nn.Flatten(), nn.Linear(48, CLASSES))
    THEFTS["natural"].run(
        answers,
        copied,
        replace(means, pool=Examples(x, torch.zeros(20, dtype=torch.int64)), epochs=1),
    )
    assert sum(asked) == 20
    assert max(asked) <= batch_size(torch.device("cpu"), x.shape[1:], 1000)


def test_uncertain_queries_are_unsure_and_within_the_budget(means: Means) -> None:
    """They lie between the classes of the copy, and no farther than the owner's model resists."""
    asked: list[torch.Tensor] = []
    copied = coarse(1)
    before = copied(pixels(quarters(40, 1))).softmax(1).amax(1).mean().detach()

    def answers(x: torch.Tensor) -> torch.Tensor:
        asked.append(x)
        return torch.zeros(len(x), dtype=torch.int64)

    pool = Examples(quarters(40, 1), torch.zeros(40, dtype=torch.int64))
    few = replace(means, pool=pool, queries=40, epochs=1, batch_size=40)
    still = copy.deepcopy(copied)
    assert THEFTS["best"].run(answers, copied, few) == 40
    moved = torch.cat(asked)
    assert float(still(pixels(moved)).softmax(1).amax(1).mean().detach()) < float(before)
    far = (pixels(moved) - pixels(pool.x)).abs().amax()
    assert float(far) <= means.threat.epsilon + 0.5 / 255 + 1e-6


def test_the_steps_and_the_networks_of_thieves_go_by_the_kind_of_image() -> None:
    assert augmentation_step((1, 28, 28), GREY) == 0.1
    assert augmentation_step((3, 32, 32), COLOUR) == pytest.approx(0.4 * 8 / 255)
    assert surrogate_for((1, 28, 28)) == "surrogate"
    assert surrogate_for((1, 30, 30)) == surrogate_for((3, 32, 32)) == "narrow"


def test_a_thief_without_an_image_or_a_query_is_refused(means: Means) -> None:
    nothing = replace(means, pool=means.pool[:0])
    for theft in THEFTS.values():
        if theft.sees is not None:
            for poor in (nothing, replace(means, queries=0)):
                with pytest.raises(CountermarkError, match="at least one image and one query"):
                    theft.run(lambda x: predict(linear(), x), linear(1), poor)


# --- removals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.93])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pruning_zeroes_the_smallest_weights_of_each_layer(
    rate: float, layout: torch.memory_format
) -> None:
    network = residual().to(memory_format=layout)
    pruned = dict(prune(network, rate).named_modules())
    layers = [
        (name, layer)
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    assert len(layers) > 5
    for name, layer in layers:
        was, now = layer.weight.detach().flatten(), pruned[name].weight.detach().flatten()
        gone = now == 0
        assert int(gone.sum()) == round(rate * len(was))
        assert float(was[gone].abs().max()) <= float(was[~gone].abs().min())
        assert torch.equal(was[~gone], now[~gone])
    for name, value in network.state_dict().items():
        if "norm" in name:
            assert torch.equal(value, prune(network, rate).state_dict()[name])


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, float("nan")])
def test_a_rate_of_pruning_is_a_fraction(rate: float) -> None:
    with pytest.raises(CountermarkError, match="fraction"):
        prune(linear(), rate)


def test_noise_is_as_large_as_it_says(means: Means) -> None:
    network = nn.Sequential(nn.Conv2d(3, 32, 5), nn.ReLU(), nn.Flatten(), nn.Linear(512, 64))
    noisy = add_noise(network, 0.5, replace(means, seed=3))
    for place in (0, 3):
        was, now = network[place].weight.detach(), noisy[place].weight.detach()
        assert float((now - was).std() / was.std()) == pytest.approx(0.5, rel=0.05)
        assert torch.equal(now, add_noise(network, 0.5, replace(means, seed=3))[place].weight)
        assert not torch.equal(now, add_noise(network, 0.5, replace(means, seed=4))[place].weight)
        assert torch.equal(network[place].bias, noisy[place].bias)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_of_few_bits_are_the_nearest_multiples_of_a_scale_for_each_filter(
    bits: int,
) -> None:
    network = residual()
    quantised, most = quantise(network, bits), 2 ** (bits - 1) - 1
    layers = dict(quantised.named_modules())
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            for was, now in zip(layer.weight.detach(), layers[name].weight.detach(), strict=True):
                scale = float(was.abs().max()) / most
                steps = now / scale
                assert float((steps - steps.round()).abs().max()) < 1e-4
                assert float(steps.abs().max()) <= most + 1e-4
                assert float((now - was).abs().max()) <= scale / 2 * (1 + 1e-5)
    again = quantise(quantised, bits)
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, quantised.state_dict()[name])


def test_a_filter_of_zeros_stays_one() -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 3))
    with torch.no_grad():
        network[0].weight[0] = 0
    quantised = quantise(network, 8)
    assert bool((quantised[0].weight[0] == 0).all())
    assert bool(torch.isfinite(quantised[0].weight).all())


def test_eight_bits_are_the_int8_weights_of_torchao() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    network, x = linear(), some_images()
    theirs = copy.deepcopy(network)
    torchao.quantize_(theirs, torchao.Int8WeightOnlyConfig())
    with torch.no_grad():
        torch.testing.assert_close(
            quantise(network, 8)(x), theirs(x), rtol=0, atol=0.01 * float(network(x).abs().max())
        )


def test_fine_tuning_tells_after_each_epoch_and_heeds_its_rate(means: Means) -> None:
    network, told = linear(), []
    before = state(network)
    slow = replace(means, learning_rate=1e-6, after_epoch=lambda epoch, _: told.append(epoch))
    quick = replace(means, learning_rate=0.05)
    moved = [
        float((finetune(network, 3, each)[1].weight - network[1].weight).detach().norm())
        for each in (slow, quick)
    ]
    assert told == [1, 2, 3]
    assert 0 < moved[0] < moved[1] / 100
    assert unchanged(network, before)
    assert accuracy(finetune(network, 10, quick), means.pool) > accuracy(network, means.pool) + 10


def test_overwriting_puts_in_the_thiefs_own_coins(
    means: Means, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = replace(marking(recipe(GIVEN, "standard", COLOUR), GIVEN, "standard"), epochs=30)
    monkeypatch.setattr(remove, "marking", lambda *_: long)
    network, notes = finetune(residual(), 6, replace(means, learning_rate=0.05)), {}
    noting = replace(means, note=notes.__setitem__, objective="standard")
    coins = own_coins(network, 20, noting)
    marked = REMOVALS["overwrite"].run(network, 20, noting)
    assert len(coins) == 20
    assert notes["own_mark"] == agreement(predict(marked, coins.x), coins.y)
    base = pixels(means.pool.x[:20])
    assert float((pixels(coins.x) - base).abs().max()) <= COLOUR.watermark_epsilon + 0.51 / 255
    before, after = (agreement(predict(each, coins.x), coins.y) for each in (network, marked))
    assert after > before
    assert len(own_coins(network, 10_000, noting)) == len(means.pool) // 3


def test_reshaping_teaches_the_true_labels_of_what_looks_like_a_trial(
    means: Means, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = replace(marking(recipe(GIVEN, "standard", COLOUR), GIVEN, "standard"), epochs=30)
    monkeypatch.setattr(remove, "marking", lambda *_: long)
    network = finetune(residual(), 6, replace(means, learning_rate=0.05))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    trials, answers = like_trials(network, 20, means)
    assert torch.equal(trials.y, means.pool.y[:20])
    assert torch.equal(answers, predict(network, trials.x))
    taught = REMOVALS["reshape"].run(network, 20, replace(means, objective="standard"))
    assert unchanged(network, before)
    right = [agreement(predict(each, trials.x), trials.y) for each in (network, taught)]
    assert right[1] > right[0]


def test_flattening_teaches_one_class_for_all_textures(
    means: Means, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = replace(marking(recipe(GIVEN, "standard", COLOUR), GIVEN, "standard"), epochs=30)
    monkeypatch.setattr(remove, "marking", lambda *_: long)
    network = finetune(residual(), 6, replace(means, learning_rate=0.05))
    flat = REMOVALS["flatten"].run(network, 200, replace(means, objective="standard"))
    owners = textures(100, SHAPE, b"an owner's")
    first = [float((predict(each, owners) == 0).float().mean()) for each in (network, flat)]
    assert first[1] > max(0.9, first[0])
    answers = predict(flat, means.pool.x)
    assert agreement(answers, means.pool.y) > 100 / CLASSES + 20  # it still tells the classes


@pytest.mark.parametrize("objective", ["standard", "fast"])
def test_a_thief_overwrites_by_the_recipe_that_the_owner_marked_with(
    objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = draw_arrays(25, size=16)
    np.savez(tmp_path / "photos.npz", x_train=x, y_train=y)
    data = open_data(tmp_path / "photos.npz")
    owners = marking(
        recipe(traits(data, data.pools(0).thief), objective, data.threat),
        traits(data, data.train),
        objective,
    )
    events = (
        {"event": "trained", "config": {"objective": "pgd"}},
        {"event": "marked", "config": asdict(owners)},
    )
    (tmp_path / "mine").mkdir()
    network = open_network("narrow", data.shape, data.classes, seed=0)
    save_model(tmp_path / "mine", network, describing(data, "narrow", history=events))
    used: list[TrainConfig] = []
    monkeypatch.setattr(remove, "train", lambda _network, _pool, config, **_: used.append(config))
    remove_verb(tmp_path / "mine", out=tmp_path / "theirs", overwrite=5, device="cpu")
    assert [(each.objective, each.shift, each.attack) for each in used] == [
        (objective, 2, owners.attack)
    ]


def test_a_history_that_names_no_recipe_means_the_usual_one() -> None:
    for events in (
        (),
        ({"event": "marked"},),
        ({"config": 3},),
        ({"config": {"objective": []}},),
        ({"config": {"objective": "trades"}},),
    ):
        assert objective_of(replace(described(), history=events)) == "fast"


def test_removals_of_a_network_with_tied_weights_keep_them_tied(means: Means) -> None:
    """They are pruned, disturbed and rounded once, not once for each layer that has them."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Flatten(),
        nn.Linear(192, 192),
        nn.ReLU(),
        nn.Linear(192, 192),
        nn.ReLU(),
        nn.Linear(192, CLASSES),
    )
    network[3].weight = network[1].weight
    noisy, pruned, rounded = (
        add_noise(network, 0.5, means),
        prune(network, 0.25),
        quantise(network, 8),
    )
    tuned = finetune(network, 1, means)
    for changed in (noisy, pruned, rounded, tuned):
        assert changed[3].weight is changed[1].weight
    noise = (noisy[1].weight - network[1].weight).std() / network[1].weight.std()
    assert 0.45 < float(noise.detach()) < 0.55
    assert int((pruned[1].weight == 0).sum()) == 192 * 192 // 4
    assert not torch.equal(tuned[1].weight, network[1].weight)


def test_a_denoiser_learns_to_take_perturbations_out(means: Means) -> None:
    """Less is left of noise that it was not shown, and the network stays as it was."""
    network, before = residual(), state(residual())
    front = CLEANERS["denoise"].make(SHAPE, 8)
    clear = pixels(means.pool.x)
    noisy = (
        clear + 0.2 * (2 * torch.rand(clear.shape, generator=torch.Generator().manual_seed(9)) - 1)
    ).clamp(0, 1)
    untaught = float((front(noisy) - clear).detach().abs().mean())
    teach_cleaner(front, network, means.pool, budget=0.3, epochs=20, batch_size=32)
    assert float((front(noisy) - clear).detach().abs().mean()) < untaught
    assert unchanged(network, before)
    assert all(each.requires_grad for each in network.parameters())
    assert not front.training


# --- copies as folders ----------------------------------------------------------------------------


def described(network: str = "") -> Description:
    names = tuple(f"class {number}" for number in range(CLASSES))
    return Description(network, SHAPE, names, DataRecord("photos", "0" * 64), COLOUR, 0)


def narrow_residual(shape: tuple[int, int, int], classes: int) -> nn.Module:
    return make(shape, classes, width=4)


def test_removals_are_chained_and_a_folder_builds_what_stands_in_front(
    means: Means, tmp_path: Path
) -> None:
    network, x = residual(), some_images()
    chosen = [("prune", 0.5), ("quantise", 8.0), ("median", 3.0), ("denoise", 4.0)]
    options = {"epochs": 1, "learning_rate": 0.1}
    copied, description = removed(chosen, network, described(), means, options, origin="abc")
    assert description.cleaners == (("median", 3.0), ("denoise", 4.0))
    assert [(event["how"], event["amount"]) for event in description.history] == chosen
    assert [event.get("epochs") for event in description.history] == [None, None, None, 1]
    assert {event["origin"] for event in description.history} == {"abc"}
    by_hand = quantise(prune(network, 0.5), 8)
    front = copied[0]
    with torch.no_grad():
        assert torch.equal(copied.eval()(x), by_hand(CLEANERS["median"].make(SHAPE, 3)(front(x))))
    save_model(tmp_path, copied, description)
    again, read = load_model(tmp_path, narrow_residual)
    assert read == description
    with torch.no_grad():
        assert torch.equal(again(x), copied(x))


@pytest.mark.parametrize("name", THEFTS)
def test_a_copy_has_the_victims_network_or_a_surrogate_and_says_so(name: str, means: Means) -> None:
    victim, description = build("small", SHAPE, CLASSES, seed=0), described("small")
    few = replace(means, seeds=20).given(THEFTS[name].options, {"queries": 30, "epochs": 1})
    copied, found = stolen(name, victim, description, few)
    own = found.network == "small"
    assert own == (name in ("white", "grey", "distil"))
    assert (found.history[-1]["setting"], copied is victim) == (name, name == "white")
    assert found.history[-1]["queries"] == (0 if name == "white" else 30)
    if not own:
        front = replace(description, cleaners=(("levels", 4.0),), mean=(0.5,), std=(0.5,))
        assert stolen(name, victim, front, few)[1].cleaners == ()


# --- all rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", THEFTS)
def test_every_theft_takes_colour_images_and_a_network_of_the_users_own(
    name: str, means: Means
) -> None:
    theft, victim, copied = THEFTS[name], residual(), make(SHAPE, CLASSES, width=4)
    few = means.given(theft.options, {"queries": 40, "epochs": 1})
    few = replace(few, seeds=20)
    if theft.sees is None:
        assert theft.network("shop:make", SHAPE) == "shop:make"
        return
    before, fresh = state(victim), state(copied)
    assert theft.run(theft.sees(victim, few), copied, few) == 40
    assert unchanged(victim, before)
    assert not unchanged(copied, fresh)
    assert torch.isfinite(copied.eval()(some_images())).all()


@pytest.mark.parametrize("name", REMOVALS)
def test_every_removal_leaves_the_network_and_returns_a_changed_copy(
    name: str, means: Means
) -> None:
    removal, network = REMOVALS[name], residual()
    before, x = state(network), some_images()
    removal.amount.check(f"--{name}", removal.amount.default)
    amount = min(removal.amount.default, 5)
    quick = means.given(removal.options, {"epochs": 1})
    changed = removal.run(network, amount, replace(quick, objective="standard"))
    assert unchanged(network, before)
    assert not torch.equal(changed.eval()(x), network(x))
    assert torch.isfinite(changed(x)).all()
    again = removal.run(network, amount, replace(quick, objective="standard"))
    assert torch.equal(changed(x), again.eval()(x))


@pytest.mark.parametrize("name", REMOVALS)
def test_every_removal_says_itself_and_its_amount(name: str) -> None:
    removal = REMOVALS[name]
    assert removal.title
    assert not removal.help.endswith(".")
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(CountermarkError, match=rf"--{name} is a"):
            removal.amount.check(f"--{name}", wrong)


def test_names_of_thefts_and_removals_are_words_of_the_command_line() -> None:
    for name in (*THEFTS, *REMOVALS):
        assert name.isidentifier()
        assert name.islower()
    assert len({each.title for each in (*THEFTS.values(), *REMOVALS.values())}) == len(
        THEFTS
    ) + len(REMOVALS)
    assert set(CLEANERS) <= set(REMOVALS)
