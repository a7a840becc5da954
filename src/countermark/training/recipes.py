"""The recipes, named by their result, and how they adapt to a data set.

No data set has settings of its own. A recipe depends on a few traits that are measured on the
training images (`traits`): their kind, their number, and which changes mean nothing in them. Epochs
follow from the number of steps that a training run takes, whatever the size of the data.

For grey images, `fast` starts every attack at the perturbation that the example had an epoch ago,
so that one step per epoch does the work of several; it reaches the figures of Thakkar, Zizzo and
Maffeis (2023) in about a minute. `strong` is the same on a wider network, for longer, and returns
the averaged weights. It trains against a slightly larger budget than is promised, except on images
of ink, where the network has a clip in front instead. For colour images both `fast` and `standard`
take what a small residual network needs: two steps from a random start, shifted images, averaged
weights. `pgd` is the objective of that paper's Table 6. docs/log.md records what was tried and did
not help.
"""

from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import nn

from countermark.choices import Recipe
from countermark.data import Dataset, Examples, known, pixels
from countermark.data.pools import sizes
from countermark.errors import choose
from countermark.threat import Attack, Threat
from countermark.training.config import Hardware, TrainConfig

KINDS = ("ink", "grey", "colour")
"""Kinds of image: nearly black and nearly white pixels, as MNIST's; grey; colour."""

_MEASURED = 1000  # images that tell the kind
_BETWEEN = (0.3, 0.7)  # pixels that are neither nearly black nor nearly white
# Share of such pixels below which images are ink; MNIST has 0.04, digits and Fashion-MNIST 0.17.
_INK = 0.1
_ROOMY = 50  # weights for each image with which a network can learn its images by heart
_PUSH = 0.005  # of their norm, by which the weights of such a network are perturbed
_FEW = 5000  # training images below which batches are smaller


@dataclass(frozen=True)
class Traits:
    """What a recipe depends on.

    Attributes:
        kind: kind of the images, one of `KINDS`.
        images: number of training images.
        mirror: left and right mean nothing in them.
        shift: pixels of border that mean nothing.
    """

    kind: str
    images: int
    mirror: bool = False
    shift: int = 0

    def __post_init__(self) -> None:
        """Refuse a kind that does not exist."""
        choose("kind of image", self.kind, KINDS)

    @property
    def few(self) -> bool:
        """Whether there are so few images that batches are smaller."""
        return self.images < _FEW

    @property
    def batch_size(self) -> int:
        """Images in a step."""
        return 64 if self.few else 128

    @property
    def watermark_batch(self) -> int:
        """Watermarks in a step; in colour a coin is learned sooner (see `craft_trials`)."""
        return 32 if self.few else 8 if self.kind == "colour" else 16

    def epochs(self, steps: int, least: int, most: int) -> int:
        """The epochs that are about so many steps, within bounds."""
        return min(max(round(steps / max(1, self.images // self.batch_size)), least), most)


def traits(
    data: Dataset, training: Examples, *, mirror: bool | None = None, shift: int | None = None
) -> Traits:
    """Measure what a recipe depends on.

    Whether left and right mean something is no question of pixels (a traffic sign that points left
    looks like a photograph), so images are mirrored only where the data set says that it means
    nothing. Moving a colour image by an eighth of its side is taken to mean nothing.

    Args:
        data: the data set.
        training: the images that will be trained on.
        mirror: whether left and right mean nothing, instead of what the data set says.
        shift: pixels of border that mean nothing, instead of that.
    """
    every = max(1, len(training) // _MEASURED)
    shown = training.x[
        torch.arange(0, len(training), every)[: _MEASURED if data.shape[0] == 1 else 1]
    ]
    kind = kind_of(shown)
    if shift is None:
        shift = data.shift if data.shift or kind != "colour" else min(data.shape[1:]) // 8
    return Traits(kind, len(training), data.mirror if mirror is None else mirror, shift)


def known_traits(name: str) -> Traits:
    """The traits of a data set that is known by name, which need not be there.

    Raises:
        CountermarkError: unknown name.
    """
    row = known(name)
    kind = "colour" if row.shape[0] == 3 else "ink" if row.ink else "grey"
    held_out = row.pools or sizes(row.train)
    return Traits(kind, row.train - sum(held_out.values()), row.mirror, row.shift)


def kind_of(images: torch.Tensor) -> str:
    """The kind of some images `(n, c, h, w)`, uint8 or pixels of [0, 1]."""
    if images.shape[1] != 1:
        return "colour"
    x, (low, high) = pixels(images), _BETWEEN
    return "ink" if float(((x > low) & (x < high)).float().mean()) < _INK else "grey"


def built_in_network(given: Traits, objective: str) -> str:
    """The name of the built-in network that a recipe was made for.

    Raises:
        CountermarkError: unknown objective.
    """
    choose("objective", objective, get_args(Recipe))
    if given.kind == "colour":
        return "narrow"
    return "small" if objective != "strong" else "clipped" if given.kind == "ink" else "wide"


def recipe(
    given: Traits,
    objective: str,
    threat: Threat,
    *,
    seed: int = 0,
    hardware: Hardware | None = None,
    epochs: int | None = None,
) -> TrainConfig:
    """The recipe that trains an unmarked model.

    Args:
        given: traits of the data.
        objective: `fast`, `strong`, `pgd` or `standard`.
        threat: the training budget, and the PGD of the objective `pgd`.
        seed: seed of the run.
        hardware: devices and precision.
        epochs: instead of the recipe's own.

    Raises:
        CountermarkError: unknown objective.
    """
    choose("objective", objective, get_args(Recipe))
    epsilon = threat.epsilon
    if objective == "pgd":
        return TrainConfig(
            objective="pgd",
            attack=threat.attack,
            epochs=epochs or 100,
            batch_size=given.batch_size,
            learning_rate=0.005,
            schedule="constant",
            warmup=0.0,
            seed=seed,
            hardware=hardware or Hardware(),
        )
    config = TrainConfig(
        objective="fast",
        attack=Attack(epsilon, 1, 0.5 * epsilon),
        epochs=epochs or given.epochs(2500, 7, 40),
        carry=True,
        dropout=False,
        batch_size=given.batch_size,
        nesterov=True,
        seed=seed,
        hardware=hardware or Hardware(),
    )
    if given.kind == "colour":
        config = replace(
            config,
            attack=Attack(epsilon, 2, 0.5 * epsilon),
            epochs=epochs or given.epochs(4400, 10, 60),
            carry=False,
            flip=given.mirror,
            shift=given.shift,
            average=0.998,
        )
    if objective == "strong":
        budget = _stretch(given) * epsilon
        longest = {"ink": 7200, "grey": 3600, "colour": 20_000}[given.kind]
        config = replace(
            config,
            attack=Attack(budget, 3 if given.kind == "colour" else 2, 0.5 * budget),
            epochs=epochs or given.epochs(longest, 10, 80),
            flip=given.mirror,
            shift=given.shift,
            warmup=0.35,
            average=0.999,
        )
    if objective == "standard":
        config = replace(config, objective="standard", attack=None, carry=False, dropout=True)
    return config


def _stretch(given: Traits) -> float:
    """The budget that `strong` trains against, as a multiple of the given one.

    Networks for ink have a clip in front instead. The fewer the images, the more is lost on new
    ones. On photographs there is accuracy to give for robustness (docs/log.md).
    """
    if given.kind == "colour":
        return 1.1
    return 1.0 if given.kind == "ink" else 1.07 if given.few else 1.05


def fitted(config: TrainConfig, given: Traits, objective: str, network: nn.Module) -> TrainConfig:
    """The same training, fitted to a network that could learn its images by heart.

    Such a network soon resists attacks on its training images alone ("robust overfitting"). With
    its weights perturbed in every step it is meant to gain on others for longer.

    Args:
        config: what `recipe` or `marking` gave.
        given: traits of the data.
        objective: the recipe's name; `strong` on photographs alone is fitted.
        network: what will be trained.
    """
    weights = sum(each.numel() for each in network.parameters() if each.requires_grad)
    roomy = given.kind == "colour" and weights > _ROOMY * given.images
    return replace(config, push=_PUSH) if roomy and objective == "strong" else config


def marking(source: TrainConfig, given: Traits, objective: str) -> TrainConfig:
    """The recipe that goes on training the source model, with watermarks in every batch.

    The learning rate rises to its peak again, which lets the mark settle in many weights, so that
    it survives pruning and fine-tuning. On colour images a shorter run or a lower peak costs
    accuracy (docs/log.md).

    Args:
        source: what `recipe` gave for the source model.
        given: traits of the data.
        objective: the recipe's name.
    """
    if source.schedule == "constant":
        return replace(source, epochs=max(1, source.epochs // 2))
    epochs = given.epochs(2700 if given.kind == "colour" else 1800, 5, 40)
    if objective == "strong":
        epochs = given.epochs(3600 if given.kind == "ink" else 4300, 10, 80)
    if objective == "fast" and source.attack is not None and given.kind == "grey" and not given.few:
        source = replace(source, attack=replace(source.attack, steps=2))
    return replace(
        source,
        epochs=epochs,
        warmup=0.15,
        grow_budget=False,
        watermark_batch=given.watermark_batch,
    )


def gentle(
    config: TrainConfig, given: Traits, network: nn.Module, epochs: int | None = None
) -> TrainConfig:
    """The recipe that marks given weights and leaves them as good: no adversary, few epochs.

    Each trial is shown some 40 times, which is what it takes; more of it costs accuracy. Networks
    with batch norm bear the full learning rate of training, and get it: after a lower one,
    fine-tuning would wash the mark out again (docs/log.md). Few images make many epochs, so the
    rate is lower there.

    Args:
        config: what `recipe` gave for the objective `standard`.
        given: traits of the data.
        network: what will be marked.
        epochs: instead of the recipe's own.
    """
    marked = marking(config, given, "standard")
    epochs = epochs or given.epochs(1500, 1, 40)
    if given.few:
        return replace(marked, epochs=epochs, learning_rate=0.02, watermark_batch=32, average=0.0)
    steady = any(isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) for layer in network.modules())
    return replace(marked, epochs=epochs, learning_rate=0.1 if steady else 0.05, watermark_batch=12)
