"""What the verbs that ask a suspect share: how it is asked, and the doubts about its answers."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from countermark.data import KNOWN, is_cached
from countermark.device import resolve_device
from countermark.errors import CountermarkError
from countermark.files import read_bytes, sha256
from countermark.named_code import is_code
from countermark.options import SuspectOptions, option
from countermark.places import is_address
from countermark.text import brief

if TYPE_CHECKING:
    import torch

    from countermark.data import Examples
    from countermark.evidence import Verdict
    from countermark.suspects import Asking, Matched, Suspect

_CLEAN = 100
_LONGEST = 500  # characters of the name of a place inside a file that are kept
_NAMES_LIMIT = 1 << 20  # bytes of a file of class names
_DOUBTFUL = 50.0  # percent of clean examples right; below, the suspect is asked in the wrong way
_TRANSLATED = 70.0  # percent right after an exchange of classes that explains the answers
_GAIN = 10.0  # points that the exchange has to bring
_CONSTANT = 90.0  # percent of equal answers
_CONVINCED = ("match", "upheld")
_DECLARE = (
    "it may want other images than declared (--pixels, --layout, --mean and --std, which --match "
    "tries; --form for files), or be a model for other data"
)


@dataclass(frozen=True)
class Inside:
    """Where the images were given to a suspect's file.

    Attributes:
        begin: the inner place with the smallest p-value; empty for the file's own input.
        places: how many there are, its own input included; p-values are multiplied by it.
    """

    begin: str
    places: int


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
        matched: how the suspect is asked, as `--match` found out; none without it.
        inside: where in its file it is asked, as `--inside` chose; none without it.
    """

    unanswered: int
    changed: int
    trouble: str
    clean_accuracy: float | None
    clean_doubt: str
    unchecked: str
    matched: "Matched | None" = None
    inside: "Inside | None" = None

    @property
    def ways(self) -> int:
        """The ways out of which one was chosen; a p-value is multiplied by it."""
        matched = 1 if self.matched is None else self.matched.ways
        return matched * (1 if self.inside is None else self.inside.places)


def ask(
    config: SuspectOptions,
    images: "Iterable[torch.Tensor]",
    shape: tuple[int, ...],
    data: str,
    clean: "Examples | None" = None,
    names: Sequence[str] = (),
    tested: "Callable[[torch.Tensor], Verdict] | None" = None,
) -> "tuple[torch.Tensor, Answers]":
    """Ask the suspect of a configuration for the labels of images.

    Up to a hundred clean examples go along: they only show whether the suspect is asked in the
    right way, and decide nothing.
    Where that check is not made, the doubts about a verdict say why.

    Args:
        config: the suspect, and how it is asked.
        images: them, in parts `(n, c, h, w)`.
        shape: of one image.
        data: the data set of the key.
        clean: clean examples that the key keeps; without them the data set's files are looked for.
        names: the class names of the key, for answers by name.
        tested: what labels prove, by which `inside` chooses.

    Returns:
        The labels, int64 `(n,)` and -1 where there is no answer, and how they came.

    Raises:
        CountermarkError: the suspect cannot be opened or asked.
    """
    import torch

    from countermark.evaluation import agreement
    from countermark.suspects import NO_ANSWER, Asker

    _check_heeded(config)
    asking = _asking(config, names)
    opened = partial(_opened, config, shape)
    matched = None
    if config.match:
        asking, matched = _matched(config, opened, asking, clean or _catalogued(shape, data))
    inside = None
    if tested is not None and config.inside:
        images = list(images)
        asking, inside = _inside(config, opened, asking, matched, torch.cat(images), tested)
    suspect = opened(asking)
    labels = torch.cat([suspect(part) for part in images])
    asker = suspect if isinstance(suspect, Asker) else None
    changed, trouble = (0, "") if asker is None else (asker.changed, asker.trouble)
    accuracy, doubt, unchecked = None, "", ""
    try:
        examples = clean or _catalogued(shape, data)
        given, y = _answers(suspect, examples)
        given = given if matched is None else matched.meant(given)
        accuracy, doubt = agreement(given, y), clean_doubt(given, y)
    except CountermarkError as error:
        unchecked = (
            "It was not checked on clean examples whether the suspect is asked in the right way: "
            f"{error}."
        )
    labels = labels if matched is None else matched.meant(labels)
    unanswered = int((labels == NO_ANSWER).sum())
    told = (unanswered, changed, trouble, accuracy, doubt, unchecked, matched, inside)
    return labels, Answers(*told)


def _check_heeded(config: SuspectOptions) -> None:
    """Refuse options that would be ignored, and yet stand in a claim as how the suspect was asked.

    Raises:
        CountermarkError: class names for a file, which answers with numbers, or a network for what
            is no model folder.
    """
    from countermark.suspects import is_folder

    place = config.suspect
    asked = callable(place) or is_address(place) or (isinstance(place, str) and is_code(place))
    refused = [] if asked else ["classes"]
    refused += [] if is_folder(place) else ["network"]
    for name in refused:
        if getattr(config, name) is not None:
            raise CountermarkError(f"{option(name)} has no meaning for this suspect; leave it out")


def _asking(config: SuspectOptions, names: Sequence[str]) -> "Asking":
    """How the options say that a suspect is asked.

    Raises:
        CountermarkError: there is no such environment variable, or the file of class names holds
            none.
    """
    from countermark.suspects import Asking

    headers = [header.partition(":") for header in config.headers]
    given = [(name.strip(), value.strip()) for name, _, value in headers]
    if config.bearer is not None:
        token = os.environ.get(config.bearer, "").strip()
        if not token:
            raise CountermarkError(
                f"the environment has no variable {brief(config.bearer)}; --bearer is the name of "
                "the one that holds the token"
            )
        if not (token.isascii() and token.isprintable()):
            raise CountermarkError(
                f"the variable {brief(config.bearer)} of the environment holds several lines or "
                "letters that no token has; put the token alone into it"
            )
        given.append(("Authorization", f"Bearer {token}"))
    return Asking(
        size=config.size,
        channels=config.channels,
        pixels=config.pixels,
        layout=config.layout,
        mean=config.mean,
        std=config.std,
        names=_of_all(_names(config), names) or tuple(names),
        foreign=config.match,
        api=config.api,
        send=config.send,
        read=config.read,
        form=config.form,
        quality=config.quality,
        budget=config.budget,
        rate=config.rate,
        retries=config.retries,
        timeout=config.timeout,
        repeats=config.repeats,
        replay=Path(config.replay) if config.replay else None,
        headers=tuple(given),
    )


def _of_all(given: tuple[str, ...], names: Sequence[str]) -> tuple[str, ...]:
    """The class names of `--classes`, if there is one for each class that the key names."""
    if given and names and len(given) != len(names):
        raise CountermarkError(
            f"--classes has {len(given)} names, and the key has {len(names)} classes; name each in "
            "the order of the key's labels"
        )
    return given


def _names(config: SuspectOptions) -> tuple[str, ...]:
    """The class names of `--classes`, one a line; none without it.

    Raises:
        CountermarkError: the file holds none, holds one twice, or is no text in UTF-8.
    """
    if config.classes is None:
        return ()
    path = Path(config.classes)
    try:
        text = read_bytes(path, _NAMES_LIMIT).decode("utf-8-sig")  # editors may begin it with a BOM
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise CountermarkError(f"{path} is no text in UTF-8; save the class names as such")
    names = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not names:
        raise CountermarkError(f"{path} holds no class names; write one a line")
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise CountermarkError(f"{path} names {brief(name)} {count} times; name each class once")
    return names


def _opened(config: SuspectOptions, shape: tuple[int, ...], asking: "Asking") -> "Suspect":
    from countermark.suspects import open_suspect

    return open_suspect(
        config.suspect, shape, asking, resolve_device(config.device), config.network
    )


def _matched(
    config: SuspectOptions,
    opened: "Callable[[Asking], Suspect]",
    asking: "Asking",
    clean: "Examples",
) -> "tuple[Asking, Matched]":
    """How a suspect wants to be asked, and the budget that is left for asking it."""
    from countermark.suspects import is_folder, match

    found, spent = match(opened, asking, clean, arrays=not is_folder(config.suspect))
    left = None if asking.budget is None else max(asking.budget - spent, 0)
    if left is not None and spent and left < asking.repeats:
        raise CountermarkError(
            f"the budget of {asking.budget} images was spent on finding out how the suspect wants "
            "to be asked, and none are left for the trials; give a larger --budget, and --replay "
            "so that no image is sent twice"
        )
    return replace(asking, **found.chosen, budget=left), found


def _inside(
    config: SuspectOptions,
    opened: "Callable[[Asking], Suspect]",
    asking: "Asking",
    matched: "Matched | None",
    x: "torch.Tensor",
    tested: "Callable[[torch.Tensor], Verdict]",
) -> "tuple[Asking, Inside]":
    """Where in its file a suspect gives the smallest p-value.

    The file alone says which places there are, and p is multiplied by their number.

    Raises:
        CountermarkError: the suspect is no ONNX file, or cannot be asked.
    """
    from countermark.suspects import as_taken, onnx_places

    place = str(config.suspect)
    if callable(config.suspect) or not place.lower().endswith(".onnx") or is_address(place):
        raise CountermarkError("--inside is for a suspect that is an .onnx file; leave it out")
    if asking.pixels != "float":
        raise CountermarkError(
            "--inside needs a file that takes floats: inside one of uint8, nobody knows in which "
            "range its numbers are; leave it out"
        )
    inner = onnx_places(Path(place), as_taken(x[:1], asking))
    found: dict[int | None, float] = {}
    for begin in (None, *range(len(inner))):
        try:
            labels = opened(replace(asking, begin=begin))(x)
        except CountermarkError:
            if begin is None:
                raise
            continue  # what comes after this place takes no images
        p = tested(labels if matched is None else matched.meant(labels)).log10_p_value
        found[begin] = 0.0 if p is None else p
    best = min(found, key=lambda begin: found[begin])
    name = "" if best is None else inner[best]
    if len(name) > _LONGEST:  # the suspect's own, which must not fill a claim
        name = f"{name[:_LONGEST]}... (SHA-256 {sha256(name.encode())})"
    return replace(asking, begin=best), Inside(name, 1 + len(inner))


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
    from countermark.evaluation import agreement
    from countermark.suspects import translation

    accuracy, count = agreement(given, y), len(y)
    translated, meant = translation(given, y)
    if translated >= max(_TRANSLATED, accuracy + _GAIN):
        pairs = Counter(zip(given.tolist(), y.tolist(), strict=True))
        moved = {each: pairs[each] for each in meant.items() if each[0] != each[1]}
        answer, right = max(moved, key=lambda each: moved[each])
        return (
            f"The answers look permuted: the suspect gets {accuracy:.0f} % of clean "
            f"examples right, and {translated:.0f} % after an exchange of classes (it "
            f"answers {answer} where {right} is right). Put "
            "its classes into the order of the key's, or let --match do it."
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


def _told(matched: "Matched") -> str:
    """What `--match` found, in a sentence or two."""
    changed = [_said(name, value) for name, value in matched.chosen.items()]
    if matched.classes is not None:
        moved = sum(answer != label for answer, label in matched.classes)
        changed.append(f"{moved} of {len(matched.classes)} classes read as others")
    before = matched.accuracy_before
    return (
        f"Asked with {', '.join(changed) or 'nothing changed'}, the suspect gets "
        f"{matched.accuracy:.0f} % of clean examples right "
        f"({'no answer' if before is None else f'{before:.0f} %'} as declared). This is one of "
        f"{matched.ways} ways, and p is multiplied by that number."
    )


def _said(name: str, value: Any) -> str:
    """An option as it is given on the command line."""
    if value in (None, ()):
        return f"no {option(name)}"
    return f"{option(name)} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"


def asked_how(config: SuspectOptions, answers: Answers) -> dict[str, Any]:
    """How a suspect was asked, JSON-ready: what a claim and a judgement say of it."""
    names = (
        *("api", "send", "read", "form", "quality", "match", "size", "channels"),
        *("pixels", "layout", "mean", "std", "budget", "rate", "repeats", "retries", "timeout"),
    )
    record = config.record()
    matched, inside = (
        None if found is None else asdict(found) for found in (answers.matched, answers.inside)
    )
    told = {"classes": list(_names(config)), "matched": matched, "inside": inside}
    return {**{name: record[name] for name in names}, **told}


def doubts(answers: Answers, verdict: str) -> tuple[str, ...]:
    """What a person should know before believing the verdict."""
    said = [] if answers.matched is None else [_told(answers.matched)]
    if answers.inside is not None:
        begin, places = answers.inside.begin, answers.inside.places
        where = f"at its inner place {brief(begin)}" if begin else "at its own input"
        said.append(
            f"It is asked {where}, one of {places} places with images of this shape, "
            "and p is multiplied by that number."
        )
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
