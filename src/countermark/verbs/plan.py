"""`countermark plan`: how many trials a wished p-value takes."""

from dataclasses import dataclass

from countermark.config import PlanConfig
from countermark.evidence import trials_needed
from countermark.report import print_lines


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


def plan(config: PlanConfig) -> Plan:
    """Say how many trials a wished p-value takes (see `evidence.trials_needed`)."""
    return Plan(trials_needed(config.p, config.agreement, config.power), config.p, config.agreement, config.power)


def show(result: Plan) -> None:
    """Print the number of trials."""
    print_lines(
        f"{result.trials} trials: a suspect that agrees with {100 * result.agreement:g} % of the coins then reaches p <= {result.p:g} "
        f"with probability {result.power:g}"
    )
