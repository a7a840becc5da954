"""The clustered sign-flip test, exact to the last pattern.

For cells with differences D_c (agreements minus disagreements) and weights w_c fixed beforehand,
S = sum of w_c D_c. Under the null hypothesis S is a sum of independent terms +-w_c|D_c|, where each
sign is a fair coin, so P(S* >= S) is a number of sign patterns over 2^cells. The patterns are
counted in integers: no normal approximation, no simulation, no underflow.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from fractions import Fraction

from countermark.errors import CountermarkError

# Its quotients and logarithms are correctly rounded.
_DIGITS = Context(prec=40, Emin=MIN_EMIN, Emax=MAX_EMAX)


@dataclass(frozen=True)
class SignFlip:
    """The result of a sign-flip test.

    Attributes:
        statistic: S, the weighted sum of the differences.
        cells: cells with a difference other than 0; only these can tell anything.
        at_least: sign patterns of those cells whose sum is at least S.
        above: sign patterns whose sum is above S.
    """

    statistic: int
    cells: int
    at_least: int
    above: int

    @property
    def p(self) -> Fraction:
        """P(S* >= S), exactly."""
        return Fraction(self.at_least, 1 << self.cells)

    @property
    def p_value(self) -> float:
        """P(S* >= S); 0.0 below the smallest float, where `log10_p_value` still tells."""
        return float(self.p)

    @property
    def log10_p_value(self) -> float:
        """Decimal logarithm of P(S* >= S)."""
        return log10(self.p)

    def randomised_p_value(self, uniform: float) -> float:
        """P(S* > S) + uniform P(S* = S), for checks of the level.

        Under the null hypothesis it is exactly uniform on (0, 1).
        """
        return float(
            Fraction(self.above, 1 << self.cells)
            + Fraction(uniform) * Fraction(self.at_least - self.above, 1 << self.cells)
        )


def log10(p: Fraction) -> float:
    """Decimal logarithm of a probability above 0, however small; 0 where `float(p)` is 1.

    It is the nearest float to the logarithm of p at 40 digits, so it never falls where p rises.
    (The difference of two logarithms would lose all digits of a p near 1.)
    """
    if float(p) == 1:
        return 0.0
    return float(_DIGITS.log10(_DIGITS.divide(Decimal(p.numerator), Decimal(p.denominator))))


def cell_differences(cells: Sequence[int], outcomes: Sequence[int]) -> dict[int, int]:
    """Sum the outcomes (+1, -1 or 0, one a trial) of each cell."""
    if len(cells) != len(outcomes):
        raise CountermarkError(
            f"{len(cells)} cells and {len(outcomes)} outcomes; give one outcome for each trial"
        )
    if any(outcome not in (-1, 0, 1) for outcome in outcomes):
        raise CountermarkError(
            "an outcome is +1 (agrees), -1 (gives the other answer) or 0 (gives neither)"
        )
    differences: Counter[int] = Counter()
    for cell, outcome in zip(cells, outcomes, strict=True):
        differences[cell] += outcome
    return dict(differences)


def sign_flip_test(differences: Iterable[int], weights: Iterable[int] | None = None) -> SignFlip:
    """Test whether the differences lean the way the coins fell.

    Counting takes about (cells x smaller tail of the statistic) additions of integers of `cells`
    bits; where all magnitudes are equal it takes one binomial sum.

    Args:
        differences: D_c, one integer per cell.
        weights: w_c, one positive integer per cell, fixed before anything was asked; all 1 by
            default.

    Raises:
        CountermarkError: a weight that is not a positive integer, or not one for each cell.
    """
    values = list(differences)
    factors = [1] * len(values) if weights is None else list(weights)
    if len(factors) != len(values) or any(
        not isinstance(weight, int) or weight < 1 for weight in factors
    ):
        raise CountermarkError("weights are positive integers, one for each cell")
    signed = [weight * value for weight, value in zip(factors, values, strict=True) if value]
    magnitudes = [abs(value) for value in signed]
    total, statistic = sum(magnitudes), sum(signed)
    # A pattern's sum is total - 2 x (the magnitudes it makes negative): count subsets by their sum.
    lost = (total - statistic) // 2
    return SignFlip(
        statistic,
        len(signed),
        _subsets_within(magnitudes, lost),
        _subsets_within(magnitudes, lost - 1),
    )


def _subsets_within(magnitudes: Sequence[int], bound: int) -> int:
    """Number of subsets whose sum is at most `bound`."""
    count, total = len(magnitudes), sum(magnitudes)
    if bound < 0:
        return 0
    if bound >= total:
        return 1 << count
    if 2 * bound > total:  # complements: the smaller tail is the cheaper one to count
        return (1 << count) - _subsets_within(magnitudes, total - bound - 1)
    divisor = math.gcd(*magnitudes)
    bound //= divisor
    sizes = Counter(magnitude // divisor for magnitude in magnitudes)
    if set(sizes) == {1}:
        return _binomial_sum(count, bound)
    # The generating polynomial, prod (1 + z^size), is cut at z^bound and packed into one integer,
    # with `slot` bits per coefficient.
    slot = 8 * (count // 8 + 1)
    mask = (1 << slot * (bound + 1)) - 1
    packed = 1
    for size, times in sizes.items():
        if size <= bound:
            for _ in range(times):
                packed = (packed + (packed << size * slot)) & mask
    coefficients = packed.to_bytes((bound + 1) * slot // 8, "little")
    return sum(
        int.from_bytes(coefficients[i : i + slot // 8], "little")
        for i in range(0, len(coefficients), slot // 8)
    )


def _binomial_sum(count: int, bound: int) -> int:
    """C(count, 0) + ... + C(count, bound)."""
    term = total = 1
    for k in range(1, bound + 1):
        term = term * (count - k + 1) // k
        total += term
    return total
