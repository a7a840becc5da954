"""Evidence from coins: the exact sign-flip test, the e-process, the verdict, and the planner.

Nothing here knows models or files. The inputs are outcomes: +1 where a suspect gave the answer that
the coin chose, -1 where it gave the other answer, and 0 where it gave neither. Under the null
hypothesis ("this suspect does not depend on our coins") the sign of every cell is a fair coin,
whatever the suspect is; docs/how-it-works.md states the three conditions that this rests on.
"""

from countermark.evidence.betting import EProcess
from countermark.evidence.planner import trials_needed
from countermark.evidence.sign_flip import SignFlip, cell_differences, sign_flip_test
from countermark.evidence.verdict import (
    ALPHA,
    EXIT_STATUS,
    JUDGE_ALPHA,
    Verdict,
    decide,
    judge,
    untested,
)

__all__ = [
    "ALPHA",
    "EXIT_STATUS",
    "JUDGE_ALPHA",
    "EProcess",
    "SignFlip",
    "Verdict",
    "cell_differences",
    "decide",
    "judge",
    "sign_flip_test",
    "trials_needed",
    "untested",
]
