"""Claims: one opened batch of a key as files, which a third party can judge on their own."""

from countermark.claims.judgement import (
    Check,
    Finding,
    Judgement,
    Rival,
    Trial,
    commitment_faults,
    evidence_of,
    first_trials,
    judge_claim,
)
from countermark.claims.page import page, sentence
from countermark.claims.record import (
    Claim,
    Opened,
    open_batch,
    read_claim,
    suspect_identity,
    write_claim,
)

__all__ = [
    "Check",
    "Claim",
    "Finding",
    "Judgement",
    "Opened",
    "Rival",
    "Trial",
    "commitment_faults",
    "evidence_of",
    "first_trials",
    "judge_claim",
    "open_batch",
    "page",
    "read_claim",
    "sentence",
    "suspect_identity",
    "write_claim",
]
