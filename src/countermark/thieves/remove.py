"""Removals: what a thief does to a copy so that the mark goes away.

Pruning and fine-tuning are those of Thakkar, Zizzo and Maffeis (2023), Algorithm 3. Beyond them
there are noise on the weights, weights of few bits, adversarial fine-tuning, training on by the
owner's recipe with a mark of the thief's own or against what the owner's looks like, and the
cleaners of `countermark.networks.cleaners` in front.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from countermark.choices import Recipe
from countermark.data import Examples
from countermark.errors import CountermarkError
from countermark.evaluation import agreement, predict
from countermark.networks import Description
from countermark.networks.cleaners import CLEANERS, Amount
from countermark.thieves.cleaners import clean
from countermark.thieves.means import Means
from countermark.training import TrainConfig, fitted, marking, recipe, train
from countermark.watermarks import craft_trials, full_strength, textures

_MOST_TEXTURES = 1 << 30  # bytes


@dataclass(frozen=True)
class Removal:
    """One way to try to get rid of a mark.

    Attributes:
        title: what it makes of the copy, in tables.
        help: one line for the help of the verb.
        amount: its one number.
        run: returns a changed copy of a network, from the amount and the means.
        options: the options that it takes beside the amount, by their names in `Means`, and their
            defaults.
        passes: about how many images go through the copy and back, from the amount, the size of the
            pool, the steps of the thief's own attack, and how often an image goes through a network
            that an owner marks; for the study's estimate.
        paper: whether it is one of the paper's; the study has the others in a section of their own.
    """

    title: str
    help: str
    amount: Amount
    run: Callable[[nn.Module, float, Means], nn.Module]
    options: Mapping[str, Any] = field(default_factory=dict)
    passes: Callable[[float, int, int, int], float] = lambda _amount, _pool, _steps, _marking: 0
    paper: bool = False


def prune(network: nn.Module, rate: float, _means: Means | None = None) -> nn.Module:
    """Return a copy whose smallest weights are zero, in every convolution and linear layer.

    Each layer is pruned by itself (L1, unstructured).

    Args:
        network: any module.
        rate: fraction removed, in (0, 1).

    Raises:
        CountermarkError: a rate out of range.
    """
    if not 0 < rate < 1:
        raise CountermarkError(f"the pruning rate is the fraction removed, in (0, 1), not {rate}")
    pruned = copy.deepcopy(network)
    for layer in pruned.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.data = layer.weight.contiguous()  # PyTorch prunes none channels last
            torch_prune.l1_unstructured(layer, "weight", rate)  # type: ignore[no-untyped-call]
            torch_prune.remove(layer, "weight")  # type: ignore[no-untyped-call]
    return pruned


def finetune(network: nn.Module, epochs: float, means: Means) -> nn.Module:
    """Return a copy whose layers were all trained on with cross-entropy.

    The optimiser is SGD with a constant rate, momentum 0.9 and weight decay 5e-4. Weights that
    pruning set to zero may move again.

    Args:
        network: any module from pixels to logits.
        epochs: passes over the thief's pool, whose labels are used.
        means: pool, learning rate, batch size.
    """
    return _tuned(network, epochs, means, adversarial=False)


def finetune_adversarially(network: nn.Module, epochs: float, means: Means) -> nn.Module:
    """Return a copy that was trained on as in `finetune`, but on adversarial examples.

    They are made by the thief's attack, so that the copy is robust.
    """
    return _tuned(network, epochs, means, adversarial=True)


def _tuned(network: nn.Module, epochs: float, means: Means, *, adversarial: bool) -> nn.Module:
    tuned = copy.deepcopy(network)
    config = TrainConfig(
        objective="pgd" if adversarial else "standard",
        attack=means.training_attack if adversarial else None,
        epochs=int(epochs),
        batch_size=means.batch_size,
        learning_rate=means.learning_rate,
        schedule="constant",
        grow_budget=False,
        seed=means.seed,
        hardware=means.hardware,
    )
    train(tuned, means.pool, config, after_epoch=means.after_epoch, title=means.title)
    return tuned


def add_noise(network: nn.Module, scale: float, means: Means) -> nn.Module:
    """Return a copy with Gaussian noise on the weights of every convolution and linear layer.

    Args:
        network: any module.
        scale: standard deviation of the noise, in standard deviations of the layer's weights.
        means: the seed of the noise.
    """
    noisy = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(means.seed)
    with torch.no_grad():
        for weight in _weights(noisy):
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight.add_(noise * (scale * weight.std()))
    return noisy


def quantise(network: nn.Module, bits: float, _means: Means | None = None) -> nn.Module:
    """Return a copy whose convolutions and linear layers have weights of few bits.

    There is one scale for each filter or row. Each weight becomes its nearest multiple, from
    -(2^(bits - 1) - 1) to 2^(bits - 1) - 1 of them, and is stored as the float that it stands for.
    The copy so computes what a network of such weights computes whose activations stay in float32;
    it can be attacked, and its folder can be read, like any other. A runtime that rounds
    activations as well is not measured.

    Args:
        network: any module.
        bits: of a weight, 2 or more; 8 is int8.
    """
    quantised, most = copy.deepcopy(network), 2 ** (int(bits) - 1) - 1
    with torch.no_grad():
        for weight in _weights(quantised):
            scale = weight.flatten(1).abs().amax(1).clamp_min(torch.finfo(weight.dtype).tiny) / most
            scale = scale.view(-1, *(1,) * (weight.dim() - 1))
            weight.copy_((weight / scale).round() * scale)
    return quantised


def _weights(network: nn.Module) -> Iterator[torch.Tensor]:
    """The weights of all convolutions and linear layers; shared ones come once."""
    seen: set[int] = set()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and id(layer.weight) not in seen:
            seen.add(id(layer.weight))
            yield layer.weight


def like_trials(network: nn.Module, count: float, means: Means) -> tuple[Examples, torch.Tensor]:
    """Make images such as an owner's trials, on the copy itself.

    Args:
        network: the copy, any module from pixels to logits.
        count: images; at most a third of the pool, whose labels are used.
        means: pool, budgets, seed.

    Returns:
        The images with the true labels of what they were made from, and the copy's own answers.
    """
    pool = means.pool[: min(int(count), max(1, len(means.pool) // 3))]
    images, predicted = craft_trials(
        network, pool, full_strength(means.threat.watermark_epsilon), means.seed
    )
    return Examples(images, pool.y[:]), predicted


def own_coins(network: nn.Module, count: float, means: Means) -> Examples:
    """Make the trials that a thief marks a copy with, as `like_trials` does.

    A coin chooses between the true label and the copy's answer.
    """
    trials, predicted = like_trials(network, count, means)
    coins = torch.randint(
        0, 2, (len(trials),), generator=torch.Generator().manual_seed(means.seed)
    ).bool()
    return Examples(trials.x, torch.where(coins, trials.y, predicted))


def overwrite(network: nn.Module, count: float, means: Means) -> nn.Module:
    """Return a copy with coins of the thief's own over the owner's.

    They are put in by the owner's recipe on the thief's images. How many of its own coins the copy
    knows, in percent, is noted as `own_mark`.

    Args:
        network: any module from pixels to logits.
        count: trials of the thief's mark.
        means: pool, budgets, recipe.
    """
    coins = own_coins(network, count, means)
    marked = _taught(network, coins, means)
    means.note("own_mark", agreement(predict(marked, coins.x), coins.y))
    return marked


def reshape(network: nn.Module, count: float, means: Means) -> nn.Module:
    """Return a copy that was taught the true labels of images such as the owner's trials.

    They take the place of coins in what `overwrite` does. So the boundaries go that a mark has
    drawn about single images, whoever drew them (after WRK: Xiao et al., 2025, arXiv 2511.07947).

    Args:
        network: any module from pixels to logits.
        count: such images.
        means: pool, budgets, recipe.
    """
    trials, _ = like_trials(network, count, means)
    return _taught(network, trials, means)


def flatten(network: nn.Module, count: float, means: Means) -> nn.Module:
    """Return a copy that was taught the same class for all textures.

    So a thief who knows of the scheme `texture` answers the owner's as well, while the copy is
    trained on by the owner's recipe.

    Args:
        network: any module from pixels to logits.
        count: textures of the thief's own, at most 1 GiB of them.
        means: pool, recipe, seed.
    """
    channels, height, width = means.pool.x.shape[1:]
    count = min(int(count), max(1, _MOST_TEXTURES // (channels * height * width)))
    own = textures(count, (channels, height, width), b"thief %d" % means.seed)
    return _taught(network, Examples(own, torch.zeros(len(own), dtype=torch.int64)), means)


def removed(
    chosen: Iterable[tuple[str, float]],
    network: nn.Module,
    description: Description,
    means: Means,
    options: Mapping[str, Any] | None = None,
    **about: Any,
) -> tuple[nn.Module, Description]:
    """Do removals one after the other.

    Args:
        chosen: their names, from `REMOVALS`, and amounts.
        network: the copy, pixels `(n, c, h, w)` of [0, 1] to logits; it is not changed.
        description: of the copy.
        means: what the thief has; each removal has options of its own.
        options: options of removals by their names in `Means`, instead of their defaults; each
            removal takes those that it has.
        about: what else to record of each in the history.

    Returns:
        The changed copy and its description: what was done stands in the history, and what stands
        in front of the network among its cleaners.

    Raises:
        CountermarkError: the thief has no images for what takes some, or logits are not finite.
    """
    for name, amount in chosen:
        removal, event = REMOVALS[name], dict[str, Any](event="removed", how=name, amount=amount)
        used = means.given(removal.options, options)
        title = f"copy ({removal.title})" if means.title is not None else None
        network = removal.run(network, amount, replace(used, note=event.__setitem__, title=title))
        event |= {option: getattr(used, option) for option in removal.options} | about
        cleaners = [(name, amount)] if name in CLEANERS else []
        description = replace(
            description,
            cleaners=(*description.cleaners, *cleaners),
            history=(*description.history, event),
        )
    return network, description


def objective_of(description: Description) -> str:
    """The objective by which a model was last trained or marked.

    A history holds what `TrainConfig` calls it, so `strong` is reported as `fast`.

    Args:
        description: of the model, or of a copy of it; it may come from anybody.

    Returns:
        A name of `Recipe`; `fast` where the history names none.
    """
    for event in reversed(description.history):
        config = event.get("config")
        named = config.get("objective") if isinstance(config, Mapping) else None
        if named in get_args(Recipe):
            return str(named)
    return "fast"


def _taught(network: nn.Module, marks: Examples, means: Means) -> nn.Module:
    """A copy that was trained on as an owner marks it, on the thief's images and these marks."""
    taught = copy.deepcopy(network)
    train(taught, means.pool, _marking(means, network), watermarks=marks, title=means.title)
    return taught


def _taught_passes(_count: float, pool: int, _steps: int, marking: int) -> int:
    """About how many images go through the copy in `_taught`."""
    return marking * pool


def _marking(means: Means, network: nn.Module) -> TrainConfig:
    """The recipe by which an owner of such images puts a mark into such a network."""
    given = means.shown_traits()
    source = recipe(given, means.objective, means.threat, seed=means.seed, hardware=means.hardware)
    return fitted(marking(source, given, means.objective), given, means.objective, network)


def _cleaning(name: str) -> Removal:
    """The removal that puts a cleaner in front."""
    cleaner = CLEANERS[name]

    def run(network: nn.Module, amount: float, means: Means) -> nn.Module:
        return clean(copy.deepcopy(network), name, amount, means)

    epochs = cleaner.options.get("epochs", 0)
    return Removal(
        f"cleaner: {name}",
        f"put a cleaner in front: {cleaner.help}",
        cleaner.amount,
        run,
        cleaner.options,
        lambda _amount, pool, _steps, _marking: 4 * epochs * pool,
    )


_RATE = {"learning_rate": 0.005}
_REMOVALS: Mapping[str, Removal] = {
    "prune": Removal(
        "pruned",
        "remove this fraction of each layer's weights, the smallest first",
        Amount(float, 0.5, "a fraction between 0 and 1", lambda value: 0 < value < 1),
        prune,
        paper=True,
    ),
    "noise": Removal(
        "noise",
        "add noise to the weights, of so many standard deviations of each layer's",
        Amount(float, 0.3, "a number above 0, at most 10", lambda value: 0 < value <= 10),
        add_noise,
    ),
    "finetune": Removal(
        "fine-tuned",
        "train on for so many epochs on the thief's pool",
        Amount(int, 5, "a number of epochs from 1 to 10000", lambda value: 1 <= value <= 10_000),
        finetune,
        _RATE,
        lambda epochs, pool, _steps, _marking: epochs * pool,
        paper=True,
    ),
    "adversarial": Removal(
        "adversarially fine-tuned",
        "do the same with adversarial training",
        Amount(int, 5, "a number of epochs from 1 to 10000", lambda value: 1 <= value <= 10_000),
        finetune_adversarially,
        _RATE,
        lambda epochs, pool, steps, _marking: epochs * pool * (1 + steps),
    ),
    "overwrite": Removal(
        "overwritten",
        "put in so many coins of the thief's own, at most one for three of the thief's images",
        Amount(int, 800, "a number of coins from 1 to 100000", lambda value: 1 <= value <= 100_000),
        overwrite,
        passes=_taught_passes,
    ),
    "reshape": Removal(
        "reshaped",
        "teach the true labels of so many images like the trials, at most one for three of the "
        "thief's images",
        Amount(
            int, 800, "a number of images from 1 to 100000", lambda value: 1 <= value <= 100_000
        ),
        reshape,
        passes=_taught_passes,
    ),
    "flatten": Removal(
        "flattened",
        "teach one class for so many textures of the thief's own",
        Amount(
            int, 3000, "a number of textures from 1 to 100000", lambda value: 1 <= value <= 100_000
        ),
        flatten,
        passes=_taught_passes,
    ),
    "quantise": Removal(
        "int8",
        "round every weight to so many bits, with one scale for each filter; 8 is int8",
        Amount(int, 8, "a number of bits from 2 to 16", lambda value: 2 <= value <= 16),
        quantise,
    ),
}
REMOVALS: Mapping[str, Removal] = {**_REMOVALS, **{name: _cleaning(name) for name in CLEANERS}}
"""The removals by the names that the verb takes, in the order in which it does several.

What changes weights comes first, then what stands in front of them.
"""
