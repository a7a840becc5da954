"""Evidence by betting: the e-process, valid whenever you stop.

Wealth starts at 1, and a stake is placed on each coin before it is seen. Under the null hypothesis
the conditional mean of the wealth never rises, so by Ville's inequality
P(it ever reaches 1/alpha) <= alpha, however the queries were chosen and whenever the counting
stopped (Ramdas et al., 2023). This is the test for trials that a client chose after seeing earlier
answers (condition 3).
"""

import math

from countermark.errors import CountermarkError

_STAKES = tuple(k / 20 for k in range(1, 21))
"""The probability that each of twenty equal gamblers gives to the suspect following the coin.

A mixture of them needs no tuning.
"""


class EProcess:
    """An e-process over a stream of outcomes.

    Wealth is shared equally by gamblers who believe that the suspect follows the coin with
    probability 5 %, 10 %, ..., 100 % and otherwise does not depend on it, and who stake
    accordingly. A mixture of e-processes is itself an e-process.
    """

    def __init__(self) -> None:
        """Start with wealth 1 and no evidence."""
        self._logs = [0.0] * len(_STAKES)
        self._highest = 0.0

    def update(self, outcome: int, chance: float = 0.5, confidence: float = 1.0) -> None:
        """Settle the next bet.

        Args:
            outcome: +1 if the suspect agreed with the coin, -1 if it gave the other answer, 0 if it
                gave neither (no bet).
            chance: the probability, before the coin fell, that it would choose the answer that the
                suspect gave.
            confidence: share of the usual stake that each gambler places, in [0, 1]; fixed before
                the coin is known.

        Raises:
            CountermarkError: the outcome is not +1, -1 or 0, or a probability is out of range.
        """
        if outcome not in (-1, 0, 1):
            raise CountermarkError(
                "an outcome is +1 (agrees), -1 (gives the other answer) or 0 (gives neither)"
            )
        if not 0 < chance < 1 or not 0 <= confidence <= 1:
            raise CountermarkError(
                f"a bet has a chance in (0, 1) and a confidence in [0, 1], not {chance} "
                f"and {confidence}"
            )
        if outcome == 0:
            return
        gain = (1 - chance) / chance if outcome == 1 else -1.0
        self._logs = [
            log + _log(1 + confidence * share * gain)
            for log, share in zip(self._logs, _STAKES, strict=True)
        ]
        self._highest = max(self._highest, self.log_e)

    @property
    def gamblers(self) -> tuple[float, ...]:
        """Natural logarithm of each gambler's present wealth, in the order of `_STAKES`."""
        return tuple(self._logs)

    @property
    def log_e(self) -> float:
        """Natural logarithm of the wealth now."""
        top = max(self._logs)
        if top == -math.inf:
            return -math.inf
        return top + math.log(sum(math.exp(log - top) for log in self._logs) / len(self._logs))

    @property
    def log10_p_value(self) -> float:
        """Decimal logarithm of the anytime p-value, 1 over the highest wealth so far."""
        return 0.0 - self._highest / math.log(10)  # not -0.0

    @property
    def p_value(self) -> float:
        """The anytime p-value: P(it is ever at most alpha) <= alpha under the null."""
        return math.exp(-self._highest)


def _log(factor: float) -> float:
    return math.log(factor) if factor > 0 else -math.inf
