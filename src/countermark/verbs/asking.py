"""What the verbs that ask a suspect share: how it is asked, and the doubts about its answers."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from countermark.data import KNOWN, is_cached
from countermark.device import resolve_device
from countermark.errors import CountermarkError
from countermark.options import SuspectOptions

if TYPE_CHECKING:
    import torch

    from countermark.data import Examples
    from countermark.suspects import Suspect

_CLEAN = 100
_DOUBTFUL = 50.0  # percent of clean examples right; below, the suspect is asked in the wrong way
_TRANSLATED = 70.0  # percent right after an exchange of classes that explains the answers
_GAIN = 10.0  # points that the exchange has to bring
_CONSTANT = 90.0  # percent of equal answers
_CONVINCED = ("match", "upheld")
_DECLARE = (
    "it may want other images than declared (--pixels, --layout, --mean and --std), "
    "or be a model for other data"
)


@dataclass(frozen=True)
class Answers:
    """How a suspect answered: which answers are missing, and what it makes of clean examples.

    Attributes:
        unanswered: trials that it refused, or did not answer in time or within the budget.
        changed: trials that it answered differently when it was asked again.
        trouble: what the suspect said the last time that it answered nothing; empty if it answered
            every time.
        clean_accuracy: accuracy on clean examples, in percent; none if they could not be asked.
        clean_doubt: what is strange about its answers to them; empty if nothing is.
        unchecked: why they could not be asked; empty if they were.
    """

    unanswered: int
    changed: int
    trouble: str
    clean_accuracy: float | None
    clean_doubt: str
    unchecked: str


def ask(
    config: SuspectOptions, x: "torch.Tensor", data: str, clean: "Examples | None" = None
) -> "tuple[torch.Tensor, Answers]":
    """Ask the suspect of a configuration for the labels of images `(n, c, h, w)`.

    Up to a hundred clean examples go along: they only show whether the suspect is asked in the
    right way, and decide nothing.
    Where that check is not made, the doubts about a verdict say why.

    Args:
        config: the suspect, and how it is asked.
        x: the images.
        data: the data set of the key.
        clean: clean examples that the key keeps; without them the data set's files are looked for.

    Returns:
        The labels, int64 `(n,)` and -1 where there is no answer, and how they came.

    Raises:
        CountermarkError: the suspect cannot be opened or asked.
    """
    from countermark.evaluation import agreement
    from countermark.suspects import NO_ANSWER, Asker, Asking, open_suspect

    headers = (header.partition(":") for header in config.headers)
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
        replay=Path(config.replay) if config.replay else None,
        headers=tuple((name.strip(), value.strip()) for name, _, value in headers),
    )
    suspect = open_suspect(
        config.suspect, tuple(x.shape[1:]), asking, resolve_device(config.device), config.network
    )
    labels = suspect(x)
    asker = suspect if isinstance(suspect, Asker) else None
    changed, trouble = (0, "") if asker is None else (asker.changed, asker.trouble)
    accuracy, doubt, unchecked = None, "", ""
    try:
        examples = clean or _catalogued(tuple(x.shape[1:]), data)
        given, y = _answers(suspect, examples)
        accuracy, doubt = agreement(given, y), clean_doubt(given, y)
    except CountermarkError as error:
        unchecked = (
            "It was not checked on clean examples whether the suspect is asked in the right way: "
            f"{error}."
        )
    unanswered = int((labels == NO_ANSWER).sum())
    return labels, Answers(unanswered, changed, trouble, accuracy, doubt, unchecked)


def _catalogued(shape: tuple[int, ...], data: str) -> "Examples":
    """Clean examples of a data set that is known by name.

    Raises:
        CountermarkError: why there are none.
    """
    from countermark.data import load_examples

    if data not in KNOWN or KNOWN[data].shape != shape:
        raise CountermarkError(
            "no clean examples are at hand, and the data set is not one that is known by name"
        )
    if not is_cached(data):
        raise CountermarkError(
            f"the files of {data} are not in the cache; countermark data fetch {data} puts them "
            "there"
        )
    return load_examples(data)[0][:_CLEAN]  # may want scikit-learn, or find a damaged file


def _answers(suspect: "Suspect", examples: "Examples") -> "tuple[torch.Tensor, torch.Tensor]":
    """What the suspect answered to clean examples, and what is right.

    Raises:
        CountermarkError: why they cannot be asked.
    """
    from countermark.suspects import NO_ANSWER

    given = suspect(examples.x)
    answered = given != NO_ANSWER
    if not bool(answered.any()):
        raise CountermarkError("none of them was answered, or the budget was spent before")
    return given[answered], examples.y[answered]


def clean_doubt(given: "torch.Tensor", y: "torch.Tensor") -> str:
    """What answers to clean examples say about the way in which a suspect is asked.

    An exchange of classes is looked for by leaving one out: each answer is read as the class that
    the other examples with the same answer mostly have, so that few examples of many classes
    cannot be explained by chance.

    Args:
        given: int64 `(n,)`, what the suspect answered.
        y: int64 `(n,)`, what is right.

    Returns:
        A sentence for a person; empty if nothing is strange.
    """
    import torch

    from countermark.evaluation import agreement

    accuracy, count = agreement(given, y), len(y)
    answers = torch.tensor(sorted({*given.tolist()}))
    row = torch.searchsorted(answers, given)
    table = torch.zeros(len(answers), int(y.max()) + 1, dtype=torch.int64)
    table.index_put_((row, y), torch.ones_like(y), accumulate=True)
    others = table[row]
    others[torch.arange(count), y] -= 1
    most, read = others.max(1)
    translated = 100 * float(((most > 0) & (read == y)).double().mean())
    if translated >= max(_TRANSLATED, accuracy + _GAIN):
        meant = table.argmax(1)
        moved = torch.where(answers == meant, 0, table.max(1).values).argmax()
        return (
            f"The answers look permuted: the suspect gets {accuracy:.0f} % of clean "
            f"examples right, and {translated:.0f} % after an exchange of classes (it "
            f"answers {int(answers[moved])} where {int(meant[moved])} is right). Put "
            "its classes into the order of the key's."
        )
    if accuracy >= _DOUBTFUL:
        return ""
    common = int(given.mode().values)
    same = 100 * float((given == common).double().mean())
    said = f"The input looks wrong: the suspect gets only {accuracy:.0f} % of clean examples right"
    if same >= _CONSTANT:
        said += f" and gives the answer {common} to {same:.0f} % of them"
    beyond = int((given > y.max()).sum())
    if beyond:
        said += f"; {beyond} of {count} answers are beyond the largest class, {int(y.max())}"
    return f"{said}. Check how it is asked: {_DECLARE}."


def asked_how(config: SuspectOptions) -> dict[str, Any]:
    """How a suspect was asked, JSON-ready: what a claim and a judgement say of it."""
    names = ("pixels", "layout", "mean", "std", "budget", "rate", "repeats", "retries", "timeout")
    record = config.record()
    return {name: record[name] for name in names}


def doubts(answers: Answers, verdict: str) -> tuple[str, ...]:
    """What a person should know before believing the verdict."""
    said = []
    if answers.unanswered:
        line = (
            f"{answers.unanswered} trials got no answer ({answers.changed} of them answers that "
            "changed); they count as neither."
        )
        last = f" The last request that brought nothing: {answers.trouble}."
        said.append(line + (last if answers.trouble else ""))
    if answers.unchecked and verdict not in _CONVINCED:
        said.append(answers.unchecked)
    if answers.clean_doubt:
        said.append(answers.clean_doubt)
        if verdict not in _CONVINCED:
            said.append(
                f"Until that is cleared up, {verdict!r} may only say that the suspect was asked "
                "in the wrong way."
            )
    return tuple(said)
