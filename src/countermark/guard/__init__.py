"""Keyed coins in a served model's answers, the query log, and tracing of copies to accounts."""

from countermark.guard.calibration import CELL_BITS, Calibration, calibrate
from countermark.guard.core import AnswerTrial, Cells, Guard, GuardSettings, consistent_scores
from countermark.guard.foreign import HonestRanges, foreign_share, honest_ranges, share_told
from countermark.guard.log import LOG_FORMAT, Head, QueryLog, Row, read_head
from countermark.guard.model import (
    TOLERANCE,
    Answers,
    ExpectedCost,
    FeatureReader,
    GuardedModel,
    calibrate_model,
    expected_cost,
)
from countermark.guard.settings import (
    guard_record,
    guard_sha256,
    load_guarded,
    read_guard,
    read_guard_record,
    write_guard,
)
from countermark.guard.sqlite import RowError
from countermark.guard.tracing import Book, Trace, Traced, images_of, trace_accounts
from countermark.networks import weights_sha256

__all__ = [
    "CELL_BITS",
    "LOG_FORMAT",
    "TOLERANCE",
    "AnswerTrial",
    "Answers",
    "Book",
    "Calibration",
    "Cells",
    "ExpectedCost",
    "FeatureReader",
    "Guard",
    "GuardSettings",
    "GuardedModel",
    "Head",
    "HonestRanges",
    "QueryLog",
    "Row",
    "RowError",
    "Trace",
    "Traced",
    "calibrate",
    "calibrate_model",
    "consistent_scores",
    "expected_cost",
    "foreign_share",
    "guard_record",
    "guard_sha256",
    "honest_ranges",
    "images_of",
    "load_guarded",
    "read_guard",
    "read_guard_record",
    "read_head",
    "share_told",
    "trace_accounts",
    "weights_sha256",
    "write_guard",
]
