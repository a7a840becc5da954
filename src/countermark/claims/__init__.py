"""Claims as files, which a third party can judge on their own.

One opens a batch of a key, for a model mark; the other shows what an account signed, for an answer
mark.
"""

from countermark.claims.account import (
    REQUESTS_LIMIT,
    AccountClaim,
    account_evidence,
    accusation_of,
    choices_of,
    first_queries,
    images_of_trials,
    is_account_claim,
    read_account_claim,
    write_account_claim,
)
from countermark.claims.account_judgement import (
    ACCOUNT_LIMITS,
    AccountFinding,
    account_about,
    account_story,
    judge_account,
    read_receipts,
)
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
    "ACCOUNT_LIMITS",
    "REQUESTS_LIMIT",
    "AccountClaim",
    "AccountFinding",
    "Check",
    "Claim",
    "Finding",
    "Judgement",
    "Opened",
    "Rival",
    "Trial",
    "account_about",
    "account_evidence",
    "account_story",
    "accusation_of",
    "choices_of",
    "commitment_faults",
    "evidence_of",
    "first_queries",
    "first_trials",
    "images_of_trials",
    "is_account_claim",
    "judge_account",
    "judge_claim",
    "open_batch",
    "page",
    "read_account_claim",
    "read_claim",
    "read_receipts",
    "sentence",
    "suspect_identity",
    "write_account_claim",
    "write_claim",
]
