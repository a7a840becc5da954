"""`countermark plan`: how many trials a wished p-value takes."""

from dataclasses import dataclass

from countermark.evidence import trials_needed
from countermark.options import VerbConfig, verb
from countermark.terminal import print_lines


@dataclass(frozen=True, kw_only=True)
class PlanConfig(VerbConfig):
    """Say how many trials a p-value needs."""

    p: float = 1e-9
    """The wished p-value."""
    agreement: float = 0.9
    """How often the suspect is expected to agree with a coin, above one half."""
    power: float = 0.9
    """Probability of getting there."""


@dataclass(frozen=True)
class Plan:
    """The fewest trials for a wished p-value.

    Attributes:
        trials: number of trials, each its own cell.
        p: the wished p-value.
        agreement: the suspect's expected agreement.
        power: probability of reaching p.
    """

    trials: int
    p: float
    agreement: float
    power: float


@verb(PlanConfig)
def plan(config: PlanConfig) -> Plan:
    """Say how many trials a wished p-value takes (see `evidence.trials_needed`).

    Example:
        >>> cm.plan(p=1e-9, agreement=0.75)
        Plan(trials=201, p=1e-09, agreement=0.75, power=0.9)
    """
    return Plan(
        trials_needed(config.p, config.agreement, config.power),
        config.p,
        config.agreement,
        config.power,
    )


def show(result: Plan) -> None:
    """Print the number of trials."""
    print_lines(
        f"{result.trials} trials: a suspect that agrees with {100 * result.agreement:g} % of "
        f"the coins then reaches p <= {result.p:g} with probability {result.power:g}"
    )
