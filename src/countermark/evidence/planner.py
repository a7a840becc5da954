"""How many trials a wished p-value takes."""

import math
from fractions import Fraction

from countermark.errors import CountermarkError

_MOST_DISAGREEMENTS = 3_000


def trials_needed(p: float, agreement: float, power: float = 0.9) -> int:
    """The fewest trials, each its own cell, that reach a p-value with a given probability.

    For each number d of disagreements that may be forgiven there is a smallest number of trials
    n(d) whose exact p-value is still at most `p`. The answer is the first n(d) at which a suspect
    disagrees at most d times with probability `power`.

    Args:
        p: the wished p-value, in (0, 1).
        agreement: how often the suspect agrees with a coin, in (0.5, 1].
        power: probability of getting there, in [0.5, 1).

    Raises:
        CountermarkError: numbers out of range, or an agreement so close to one half that some six
            thousand trials would not be enough.
    """
    if not (0 < p < 1 and 0.5 < agreement <= 1 and 0.5 <= power < 1):
        raise CountermarkError(
            "the planner takes 0 < p < 1, 0.5 < agreement <= 1 and 0.5 <= power < 1"
        )
    wished = Fraction(p)
    trials, forgiven = 0, 0
    # Sum of C(trials, k) for k <= forgiven, and its last term C(trials, forgiven).
    within, term = 1, 1
    while forgiven <= _MOST_DISAGREEMENTS:
        while within * wished.denominator > wished.numerator << trials:
            within = 2 * within - term
            trials += 1
            term = term * trials // (trials - forgiven) if trials > forgiven else 1
        if _at_most(forgiven, trials, 1 - agreement) >= power:
            return trials
        forgiven += 1
        term = math.comb(trials, forgiven)
        within += term
    raise CountermarkError(
        f"at an agreement of {agreement} more than {trials} trials are needed; "
        "raise the agreement or the wished p-value"
    )


def _at_most(bound: int, trials: int, rate: float) -> float:
    """P(Binomial(trials, rate) <= bound)."""
    if rate == 0:
        return 1.0
    if bound + 1 < rate * trials:  # below the median: less than one half
        return 0.0
    logs = [
        math.lgamma(trials + 1)
        - math.lgamma(k + 1)
        - math.lgamma(trials - k + 1)
        + k * math.log(rate)
        + (trials - k) * math.log1p(-rate)
        for k in range(min(bound, trials) + 1)
    ]
    top = max(logs)
    return math.exp(top) * math.fsum(math.exp(log - top) for log in logs)
