"""The recipes: what each data set's training needs to reach the paper's figures in minutes.

`fast` starts every attack at the perturbation that the example had an epoch ago, so that one step an epoch does the work of several.
docs/log.md holds what was tried and did not help. `pgd` is the objective of Thakkar, Zizzo and Maffeis (2023), Table 6.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from countermark.data import spec
from countermark.evaluation import Attack
from countermark.training.config import OBJECTIVES, Hardware, TrainConfig, choose


@dataclass(frozen=True)
class _Dials:
    """What differs from data set to data set."""

    epochs: int = 7
    marking_epochs: int = 5
    watermark_batch: int = 16
    batch_size: int = 128


_DIALS: Mapping[str, _Dials] = {"mnist": _Dials(), "fashion_mnist": _Dials(), "digits": _Dials(40, 40, 32, 64)}


def recipe(
    data: str, objective: str, epsilon: float, *, seed: int = 0, hardware: Hardware | None = None, epochs: int | None = None
) -> TrainConfig:
    """The recipe that trains an unmarked model.

    Args:
        data: name of the data set.
        objective: `fast`, `pgd` or `standard`.
        epsilon: training budget, in pixels of [0, 1].
        seed: seed of the run.
        hardware: devices and precision.
        epochs: instead of the recipe's own.

    Raises:
        CountermarkError: unknown data set or objective.
    """
    catalogued = spec(data)
    choose("objective", objective, OBJECTIVES)
    dials = _DIALS[data]
    fast = TrainConfig(
        objective="fast",
        attack=Attack(epsilon, 1, 0.5 * epsilon),
        epochs=epochs or dials.epochs,
        carry=True,
        batch_size=dials.batch_size,
        nesterov=True,
        seed=seed,
        hardware=hardware or Hardware(),
    )
    if objective == "fast":
        return fast
    if objective == "standard":
        return replace(fast, objective="standard", attack=None, carry=False, epochs=epochs or dials.epochs)
    return replace(
        fast,
        objective="pgd",
        attack=Attack(epsilon, catalogued.steps, catalogued.step_size),
        epochs=epochs or 100,
        carry=False,
        learning_rate=0.005,
        schedule="constant",
        warmup=0.0,
        nesterov=False,
    )


def marking(source: TrainConfig, data: str) -> TrainConfig:
    """The recipe that trains the source model on, with watermarks in every batch.

    The learning rate rises to its peak again, which lets the mark settle in many weights: it then survives pruning and fine-tuning.
    """
    dials = _DIALS[data]
    if source.schedule == "constant":
        return replace(source, epochs=max(1, source.epochs // 2))
    return replace(source, epochs=dials.marking_epochs, warmup=0.15, grow_budget=False, watermark_batch=dials.watermark_batch)
