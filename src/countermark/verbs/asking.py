"""What `verify` and `trace` share: a suspect asked as its owner declares it, and doubts about the answers."""

from dataclasses import dataclass
from typing import Any

import torch

from countermark.config import SuspectConfig
from countermark.data import CATALOG, is_cached, load_examples
from countermark.errors import CountermarkError
from countermark.evaluation import agreement
from countermark.progress import bar
from countermark.suspects import NO_ANSWER, Asking, Endpoint, Suspect, open_suspect

_CLEAN = 100
_DOUBTFUL = 50.0  # percent


@dataclass(frozen=True)
class Answered:
    """Labels of a suspect, and what came in the way.

    Attributes:
        labels: int64 `(n,)`, -1 where there is no answer.
        unanswered: how many have none.
        changed: how many changed when they were asked again.
        clean_accuracy: on clean examples, in percent; none if they could not be asked.
    """

    labels: torch.Tensor
    unanswered: int
    changed: int
    clean_accuracy: float | None


def ask(config: SuspectConfig, x: torch.Tensor, data: str) -> Answered:
    """Ask the suspect of a configuration for the labels of images `(n, c, h, w)`.

    A hundred clean examples of the data set go along, if its files are at hand: a suspect that fails on them is asked in the wrong way.
    Where that check is not made, standard error says why.

    Raises:
        CountermarkError: the suspect cannot be opened or asked.
    """
    asking = Asking(
        pixels=config.pixels,
        layout=config.layout,
        mean=config.mean,
        std=config.std,
        budget=config.budget,
        rate=config.rate,
        retries=config.retries,
        timeout=config.timeout,
        repeats=config.repeats,
        replay=config.replay,
        headers=tuple((name.strip(), value.strip()) for name, _, value in (header.partition(":") for header in config.headers)),
    )
    suspect = open_suspect(config.suspect, tuple(x.shape[1:]), asking)
    labels = suspect(x)
    changed = suspect.changed if isinstance(suspect, Endpoint) else 0
    try:
        clean = _clean_accuracy(suspect, tuple(x.shape[1:]), data)
    except CountermarkError as error:
        clean = None
        with bar("asking clean examples", _CLEAN) as progress:
            progress.note(f"not checked on clean examples whether the suspect is asked in the right way: {error}")
    return Answered(labels, int((labels == NO_ANSWER).sum()), changed, clean)


def _clean_accuracy(suspect: Suspect, shape: tuple[int, ...], data: str) -> float:
    """Percent of clean examples that the suspect gets right.

    Raises:
        CountermarkError: why they cannot be asked.
    """
    if data not in CATALOG or CATALOG[data].shape != shape:
        raise CountermarkError("the key is for a data set that is none of ours")
    if not is_cached(data):
        raise CountermarkError(f"the files of {data} are not in the cache; countermark data fetch {data} puts them there")
    examples = load_examples(data)[0][:_CLEAN]  # may want scikit-learn, or find a damaged file
    given = suspect(examples.x)
    answered = given != NO_ANSWER
    if not bool(answered.any()):
        raise CountermarkError("none of them was answered, or the budget was spent before")
    return agreement(given[answered], examples.y[answered])


def asked_how(config: SuspectConfig) -> dict[str, Any]:
    """How a suspect was asked, JSON-ready: what a claim and a judgement say of it."""
    names = ("pixels", "layout", "mean", "std", "budget", "rate", "repeats", "retries", "timeout")
    return {name: config.record()[name] for name in names}


def doubts(unanswered: int, changed: int, clean_accuracy: float | None) -> list[str]:
    """What a person should know before believing the verdict."""
    said = []
    if unanswered:
        said.append(f"{unanswered} trials got no answer ({changed} of them answers that changed); they count as neither.")
    if clean_accuracy is not None and clean_accuracy < _DOUBTFUL:
        said.append(f"The suspect gets only {clean_accuracy:.0f} % of clean examples right: it may want other images than declared.")
    return said
