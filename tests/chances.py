"""How large a count may be by chance, so that tests which count drawn things fail for a reason."""

import math

RISK = 1e-7
"""Probability with which a test of something that is right may fail; the suite has some dozen such tests."""


def most(count: int, chance: float, risk: float = RISK) -> int:
    """The largest of `count` coins' number of heads to put up with: more come up with a probability of at most `risk`."""
    above = 0.0
    for heads in range(count, -1, -1):
        ways = math.lgamma(count + 1) - math.lgamma(heads + 1) - math.lgamma(count - heads + 1)
        above += math.exp(ways + heads * math.log(chance) + (count - heads) * math.log1p(-chance))
        if above > risk:
            return heads
    return 0
