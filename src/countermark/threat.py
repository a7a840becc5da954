"""What a model is to withstand: the budget of its attackers, and the PGD that stands for them.

Budgets are L-inf bounds in pixels of [0, 1]. A watermark is an adversarial example beyond them.
"""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

from countermark.errors import CountermarkError
from countermark.text import brief

_WATERMARKS = 2.0  # budgets of an attacker that a watermark may use, where nothing else is said
_ROUNDING = 1e-6  # in 255ths of a pixel
_MOST = 0.9  # pixels; beyond it nothing of an image is left


@dataclass(frozen=True)
class Attack:
    """The PGD of an evaluation or a training objective (see `attacks.pgd`).

    Attributes:
        epsilon: L-inf budget, in pixels of [0, 1].
        steps: number of steps.
        step_size: size of a step, in pixels.
        random_start: whether it starts at a random point within the budget.
    """

    epsilon: float
    steps: int
    step_size: float
    random_start: bool = True


@dataclass(frozen=True)
class Threat:
    """The attackers that a model is trained and measured against, and the budget of its watermarks.

    Attributes:
        epsilon: L-inf budget, in pixels of [0, 1].
        steps: steps of the PGD of an evaluation.
        step_size: size of such a step, in pixels.
        watermark_epsilon: budget of the watermarks, above `epsilon`.

    Example:
        >>> threat = cm.Threat(epsilon=0.2, steps=20, step_size=0.02, watermark_epsilon=0.4)
        >>> threat.at(epsilon=0.1).step_size  # it keeps its share of the budget
        0.01
    """

    epsilon: float
    steps: int
    step_size: float
    watermark_epsilon: float

    def __post_init__(self) -> None:
        """Refuse invalid budgets, and watermarks that an attacker could make.

        Raises:
            CountermarkError: a number is out of range, or the watermark budget is not above the
                training budget.
        """
        given: dict[str, Any] = {
            "epsilon": self.epsilon,
            "step size": self.step_size,
            "watermark budget": self.watermark_epsilon,
        }
        for name, value in given.items():
            if not isinstance(value, Real) or not 0 < float(value) < 1:
                raise CountermarkError(
                    f"the {name} is in pixels, a number in (0, 1), not {brief(value)}"
                )
        if self.steps < 1:
            raise CountermarkError(f"PGD takes one step or more, not {self.steps}")
        if self.watermark_epsilon <= self.epsilon:
            raise CountermarkError(
                f"the watermark budget {self.watermark_epsilon:g} "
                f"must be above the training budget {self.epsilon:g}; "
                "raise --watermark-epsilon or lower --epsilon"
            )

    @property
    def attack(self) -> Attack:
        """The PGD of an evaluation."""
        return Attack(self.epsilon, self.steps, self.step_size)

    def at(
        self,
        *,
        epsilon: float | None = None,
        steps: int | None = None,
        step_size: float | None = None,
        watermark_epsilon: float | None = None,
    ) -> "Threat":
        """The same threat with some of its numbers replaced.

        A step size that is not given keeps its share of the training budget. A watermark budget
        that is not given stays what it is if it is above the training budget; otherwise it becomes
        twice the training budget, but stays below 1.

        Raises:
            CountermarkError: see `Threat`.
        """
        budget = self.epsilon if epsilon is None else epsilon
        step = self.step_size * (1 if budget == self.epsilon else budget / self.epsilon)
        return Threat(
            budget,
            self.steps if steps is None else steps,
            step if step_size is None else step_size,
            _above(self.watermark_epsilon, budget)
            if watermark_epsilon is None
            else watermark_epsilon,
        )


def _above(watermark_epsilon: float, epsilon: float) -> float:
    """A watermark budget for a training budget."""
    return (
        watermark_epsilon
        if watermark_epsilon > epsilon
        else min(_WATERMARKS * epsilon, max(_MOST, (1 + epsilon) / 2))
    )


COLOUR = Threat(8 / 255, 10, 2 / 255, 16 / 255)
"""The budget of CIFAR-10's leaderboards, for colour images of which nothing else is known."""

GREY = Threat(0.15, 15, 0.01, 0.3)
"""The budget of Fashion-MNIST in Thakkar, Zizzo and Maffeis (2023).

It is for grey images of which nothing else is known.
"""


def default_threat(shape: tuple[int, int, int]) -> Threat:
    """The threat to images of which only the shape is known.

    Raises:
        CountermarkError: they are neither grey nor coloured.
    """
    if shape[0] not in (1, 3):
        raise CountermarkError(f"images have 1 channel (grey) or 3 (colour), not {shape[0]}")
    return GREY if shape[0] == 1 else COLOUR


def shown(epsilon: float) -> str:
    """A budget as people write it: a short number, or 255ths of a pixel.

    Example:
        >>> shown(0.25), shown(8 / 255)
        ('0.25', '8/255')
    """
    steps = 255 * epsilon
    short = f"{epsilon:g}"
    return (
        short
        if float(short) == epsilon or abs(steps - round(steps)) > _ROUNDING
        else f"{round(steps)}/255"
    )


def budget(text: str | float) -> float:
    """A budget in pixels, out of a number or a fraction.

    Raises:
        CountermarkError: it is neither.

    Example:
        >>> budget("8/255") == 8 / 255
        True
    """
    above, slash, below = str(text).partition("/")
    try:
        value = float(above) / float(below) if slash else float(above)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not math.isfinite(value):
        raise CountermarkError(
            f"{brief(str(text))} is no budget; give a number as 0.03 or a fraction as 8/255"
        )
    return value
