"""How large a count may be by chance, so that tests which count drawn things fail for a reason."""

import math

RISK = 1e-7
"""Probability that such a test fails although the code is right; the suite has about a dozen."""


def most(count: int, chance: float, risk: float = RISK) -> int:
    """Return the largest number of heads among `count` coins that a test should accept.

    Each coin shows heads with probability `chance`; more heads than the returned number have a
    probability of at most `risk`.
    """
    above = 0.0
    for heads in range(count, -1, -1):
        ways = math.lgamma(count + 1) - math.lgamma(heads + 1) - math.lgamma(count - heads + 1)
        above += math.exp(ways + heads * math.log(chance) + (count - heads) * math.log1p(-chance))
        if above > risk:
            return heads
    return 0
