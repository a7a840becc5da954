"""Rows of a query log, out of what a guarded model answered."""

from countermark.guard import Answers, Row

DAY = 20_000
"""The day on which every one of these was answered, since 1970."""


def first_rows(
    answers: Answers, model_sha256: str, client: str, log: bytes = b""
) -> dict[bytes, Row]:
    """The first trial of each cell, by its cell: what a service would keep of one client's call."""
    rows: dict[bytes, Row] = {}
    for trial in answers.trials:
        image = answers.images[trial.row].contiguous().numpy().tobytes()
        numbers = (trial.heads, trial.tails, trial.chance, trial.answer, DAY)
        row = Row(model_sha256, client, trial.cell, image, *numbers, log=log)
        rows.setdefault(trial.cell, row)
    return rows
