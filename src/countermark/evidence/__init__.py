"""Evidence from coins: the exact sign-flip test, the e-process, the verdict, and the planner.

Nothing here knows models or files. The inputs are outcomes: +1 where a suspect gave the answer that the coin chose, -1 where it gave the
other one, 0 where it gave neither. Under the null ("this suspect does not depend on our coins") the sign of every cell is a fair coin,
whatever the suspect is; the three conditions that carry this are in docs/how-it-works.md.
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
