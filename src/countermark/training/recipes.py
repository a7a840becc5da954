"""The recipes, named by result: what each data set's training needs to reach its figures.

`fast` starts every attack at the perturbation that the example had an epoch ago, so that one step an epoch does the work of several; it
reaches the paper's figures in about a minute. `strong` is the same on a wider network, for longer, and returns the averaged weights; it
trains against a slightly larger budget than is promised, but on MNIST, where it has a clip in front instead. docs/log.md holds what was
tried and did not help. `pgd` is the objective of Thakkar, Zizzo and Maffeis (2023), Table 6.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from countermark.errors import choose
from countermark.threat import Attack, Threat
from countermark.training.config import Hardware, TrainConfig

Recipe = Literal["fast", "strong", "pgd", "standard"]
"""The recipes by name."""


@dataclass(frozen=True, kw_only=True)
class _Dials:
    """What differs from data set to data set."""

    epochs: int = 7
    marking_epochs: int = 5
    marking_steps: int = 1  # of the attack of `fast`
    watermark_batch: int = 16
    batch_size: int = 128
    strong_epochs: int = 12
    strong_marking_epochs: int = 16
    strong_network: str = "wide"
    stretch: float = 1.0  # of the budget that `strong` trains against
    flip: bool = False  # left and right mean nothing, and `strong` says so
    shift: int = 0  # pixels of border that mean nothing


_DIALS: Mapping[str, _Dials] = {
    "mnist": _Dials(strong_network="clipped", strong_epochs=20, strong_marking_epochs=10, shift=1),
    "fashion_mnist": _Dials(marking_steps=2, strong_epochs=10, strong_marking_epochs=12, stretch=1.05, flip=True),
    "digits": _Dials(
        epochs=40, marking_epochs=40, watermark_batch=32, batch_size=64, strong_epochs=80, strong_marking_epochs=80, stretch=1.07
    ),
}


def _dials(data: str) -> _Dials:
    return _DIALS.get(data, _Dials())


def own_network(data: str, objective: str) -> str:
    """The network that a recipe was made for.

    Raises:
        CountermarkError: unknown data set or objective.
    """
    choose("objective", objective, get_args(Recipe))
    return _dials(data).strong_network if objective == "strong" else "small"


def recipe(
    data: str, objective: str, threat: Threat, *, seed: int = 0, hardware: Hardware | None = None, epochs: int | None = None
) -> TrainConfig:
    """The recipe that trains an unmarked model.

    Args:
        data: name of the data set.
        objective: `fast`, `strong`, `pgd` or `standard`.
        threat: budget and steps.
        seed: seed of the run.
        hardware: devices and precision.
        epochs: instead of the recipe's own.

    Raises:
        CountermarkError: unknown data set or objective.
    """
    choose("objective", objective, get_args(Recipe))
    dials, epsilon = _dials(data), threat.epsilon
    fast = TrainConfig(
        objective="fast",
        attack=Attack(epsilon, 1, 0.5 * epsilon),
        epochs=epochs or dials.epochs,
        carry=True,
        dropout=False,
        batch_size=dials.batch_size,
        nesterov=True,
        seed=seed,
        hardware=hardware or Hardware(),
    )
    if objective == "fast":
        return fast
    if objective == "strong":
        stretched = dials.stretch * epsilon
        return replace(
            fast,
            attack=Attack(stretched, 2, 0.5 * stretched),
            epochs=epochs or dials.strong_epochs,
            flip=dials.flip,
            shift=dials.shift,
            warmup=0.35,
            average=0.999,
        )
    if objective == "standard":
        return replace(fast, objective="standard", attack=None, carry=False, dropout=True, epochs=epochs or dials.epochs)
    return replace(
        fast,
        objective="pgd",
        attack=threat.attack,
        epochs=epochs or 100,
        carry=False,
        dropout=True,
        learning_rate=0.005,
        schedule="constant",
        warmup=0.0,
        nesterov=False,
    )


def marking(source: TrainConfig, data: str, objective: str) -> TrainConfig:
    """The recipe that trains the source model on, with watermarks in every batch.

    The learning rate rises to its peak again, which lets the mark settle in many weights: it then survives pruning and fine-tuning.

    Args:
        source: what `recipe` gave for the source model.
        data: name of the data set.
        objective: the recipe's name.
    """
    dials = _dials(data)
    if source.schedule == "constant":
        return replace(source, epochs=max(1, source.epochs // 2))
    epochs = dials.strong_marking_epochs if objective == "strong" else dials.marking_epochs
    if objective == "fast" and source.attack is not None:
        source = replace(source, attack=replace(source.attack, steps=max(source.attack.steps, dials.marking_steps)))
    return replace(source, epochs=epochs, warmup=0.15, grow_budget=False, watermark_batch=dials.watermark_batch)
