"""From outcomes to a verdict: `match`, `no evidence` or `inconclusive`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from countermark.errors import CountermarkError
from countermark.evidence.sign_flip import cell_differences, log10, sign_flip_test

ALPHA = 1e-6
"""Default level of a verdict."""
EXIT_STATUS = {"match": 0, "no evidence": 1, "inconclusive": 3}
"""What a verb that ends in a verdict exits with."""
JUDGE_ALPHA = 1e-9
"""Level of a judge, who cannot see how often coins were drawn anew (docs/security.md)."""


@dataclass(frozen=True)
class Verdict:
    """What the outcomes prove.

    Attributes:
        verdict: `match` (p <= alpha), `no evidence`, or `inconclusive` (too few usable trials to
            ever reach alpha).
        p_value: exact, multiplied by the number of batches that a claim could have opened; 0.0
            below the smallest float; `None` if there is no exact test (`untested`).
        log10_p_value: its decimal logarithm, however small it is.
        agreements: trials answered as the key says.
        disagreements: trials given the answer that the coin did not choose.
        neither: trials with a third answer, or with none.
        trials: number of trials.
        log10_smallest_p_value: decimal logarithm of the smallest p-value that these trials could
            ever reach, if all were answered as the coins chose.
        alpha: the level.
        cells: number of cells, each with one coin; `None` where there is no exact test of cells.
    """

    verdict: str
    p_value: float | None
    log10_p_value: float | None
    agreements: int
    disagreements: int
    neither: int
    trials: int
    log10_smallest_p_value: float | None
    alpha: float
    cells: int | None = None


def decide(p: Fraction | float, smallest: Fraction | float, alpha: float) -> str:
    """The verdict on a p-value, given the smallest that the usable trials could have reached.

    All three arguments are numbers, or all three are logarithms.
    """
    return "match" if p <= alpha else "inconclusive" if smallest > alpha else "no evidence"


def judge(
    cells: Sequence[int],
    outcomes: Sequence[int],
    *,
    weights: Mapping[int, int] | None = None,
    alpha: float = ALPHA,
    batches: int = 1,
    ways: int = 1,
) -> Verdict:
    """Test whether a suspect depends on the coins of some trials, and give the verdict.

    Args:
        cells: the cell of each trial; trials of one cell share a coin.
        outcomes: for each trial +1 if the suspect gave the answer that the coin chose, -1 if it
            gave the other answer, 0 if it gave neither.
        weights: a positive integer for each cell, fixed before the coins were drawn; by default
            all are 1.
        alpha: largest p-value that counts as a match.
        batches: number of batches of the key, if the claimant chose one of them to open. The
            p-value is multiplied by it (Bonferroni).
        ways: number of ways in which the suspect could have been asked, if one was chosen. The
            p-value is multiplied by it as well.

    Raises:
        CountermarkError: an outcome is not +1, -1 or 0, a cell has no positive integer weight, or
            `alpha` or `batches` is out of range.
    """
    if not 0 < alpha < 1:
        raise CountermarkError(f"alpha is a probability in (0, 1), not {alpha}")
    if batches < 1 or ways < 1:
        raise CountermarkError(
            f"a key has one batch or more and is asked in one way or more, not {batches} and {ways}"
        )
    choices = batches * ways
    differences = cell_differences(cells, outcomes)
    if weights is not None and not differences.keys() <= weights.keys():
        raise CountermarkError(
            "a cell has no weight; fix an integer weight for every cell beforehand"
        )
    factors = [1 if weights is None else weights[cell] for cell in differences]
    test = sign_flip_test(differences.values(), factors)
    p = min(Fraction(1), choices * test.p)
    usable = min(Fraction(1), Fraction(choices, 1 << test.cells))
    smallest = min(Fraction(1), Fraction(choices, 1 << len(differences)))
    verdict = decide(p, usable, alpha)
    return Verdict(
        verdict=verdict,
        p_value=float(p),
        log10_p_value=log10(p),
        agreements=sum(outcome == 1 for outcome in outcomes),
        disagreements=sum(outcome == -1 for outcome in outcomes),
        neither=sum(outcome == 0 for outcome in outcomes),
        trials=len(outcomes),
        log10_smallest_p_value=log10(smallest),
        alpha=alpha,
        cells=len(differences),
    )


def untested(outcomes: Sequence[int], alpha: float = ALPHA) -> Verdict:
    """Count the outcomes of trials that no coin decided.

    There is no exact test for them, so the verdict is never more than inconclusive.
    """
    agreements = sum(outcome == 1 for outcome in outcomes)
    return Verdict(
        "inconclusive",
        None,
        None,
        agreements,
        0,
        len(outcomes) - agreements,
        len(outcomes),
        None,
        alpha,
    )
