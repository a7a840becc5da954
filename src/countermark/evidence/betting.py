"""Evidence by betting: the e-process, valid whenever you stop.

Wealth starts at 1 and is staked on each next coin before it is seen; under the null its conditional mean never rises, so by Ville's
inequality P(it ever reaches 1/alpha) <= alpha, however the queries were chosen and whenever the counting stopped (Ramdas et al., 2023).
This is the test for trials that a client chose after seeing earlier answers (condition 3).
"""

import math

from countermark.errors import CountermarkError

_STAKES = tuple(k / 20 for k in range(1, 21))
"""Shares of its wealth that each of twenty equal gamblers stakes on agreement, every time: a mixture that needs no tuning."""


class EProcess:
    """An e-process over a stream of outcomes.

    Without a stake of your own, wealth is shared equally by gamblers that always stake 5 %, 10 %, ..., 100 % of theirs; the mixture of
    e-processes is one. A stake of your own must be fixed before the outcome's coin is known.
    """

    def __init__(self) -> None:
        """Start with wealth 1 and no evidence."""
        self._logs = [0.0] * len(_STAKES)
        self._highest = 0.0

    def update(self, outcome: int, stake: float | None = None) -> None:
        """Settle the next bet.

        Args:
            outcome: +1 the suspect agreed with the coin, -1 it gave the other answer, 0 neither (no bet).
            stake: share of the wealth staked on agreement, in [0, 1]; the mixture's own stakes by default.

        Raises:
            CountermarkError: an outcome or a stake that does not exist.
        """
        if outcome not in (-1, 0, 1):
            raise CountermarkError("an outcome is +1 (agrees), -1 (gives the other answer) or 0 (gives neither)")
        if stake is not None and not 0 <= stake <= 1:
            raise CountermarkError(f"a stake is a share in [0, 1], not {stake}")
        stakes = _STAKES if stake is None else (stake,) * len(_STAKES)
        self._logs = [log + _log(1 + share * outcome) for log, share in zip(self._logs, stakes, strict=True)]
        self._highest = max(self._highest, self.log_e)

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
        return -self._highest / math.log(10)

    @property
    def p_value(self) -> float:
        """The anytime p-value: P(it is ever at most alpha) <= alpha under the null."""
        return math.exp(-self._highest)


def _log(factor: float) -> float:
    return math.log(factor) if factor > 0 else -math.inf
