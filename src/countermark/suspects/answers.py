"""Labels out of what a suspect says about images, in the forms that servers and functions use.

One answer is about one image. It is a class number, a class name, a score for each class, or an
object that holds names and scores. Of scores the largest counts, and a tie is no answer.
"""

import json
import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from countermark.files import sha256
from countermark.suspects.asker import MOST_LABELS, NO_ANSWER, RefusalError
from countermark.text import brief, sentence

_LONGEST_NUMBER = 32  # characters of a number that is written as a string
_SHOWN = 1 << 12  # characters of an answer that are looked at for a message
# What servers call a class, a score, and lists of both.
_LABELS = ("label", "class", "class_name", "category", "name", "prediction", "predicted_class")
_SCORES = ("score", "confidence", "probability", "prob")
_LISTS = ("displayNames", "labels", "classes", "class_names", "names")
_SCORE_LISTS = ("confidences", "scores", "probabilities", "probs")
_NAMES_WANTED = (
    "name the classes in the order of the key's labels with --classes FILE, one a line, or let "
    "--match find out"
)


class _UnknownError(Exception):
    """A class name that is not one of the names that are known."""


class Names:
    """Numbers of class names; upper case, underscores and hyphens make no difference."""

    def __init__(self, names: Sequence[str] = (), *, foreign: bool = False) -> None:
        """Number the names in their order.

        Args:
            names: the classes, in the order of the key's labels.
            foreign: give other names numbers of their own, beyond all labels, so that it can be
                found out what they mean.
        """
        self._foreign, self._known = foreign, bool(names)
        self._numbers = {name: number for number, name in enumerate(names)}
        self._alike: dict[str, list[int]] = {}
        for name, number in self._numbers.items():
            self._alike.setdefault(_plain(name), []).append(number)

    def __bool__(self) -> bool:
        """Whether any name is known."""
        return self._known

    def number(self, name: str) -> int:
        """The label of a class name, or of a number that is written as a name."""
        alike = self._alike.get(_plain(name), [])
        if name in self._numbers or len(alike) == 1:
            return self._numbers.get(name, alike[0])
        try:
            return _label(float(name if len(name) <= _LONGEST_NUMBER else ""))
        except ValueError:
            if self._foreign:
                return MOST_LABELS // 2 + int(sha256(name.encode(errors="replace"))[:7], 16)
            raise _UnknownError(name) from None


def _plain(name: str) -> str:
    name = unicodedata.normalize("NFC", name)  # macOS takes letters and their accents apart
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def labels_of(answers: object, count: int, names: Names) -> list[int]:
    """The labels in the answers to some images, -1 where an answer holds none.

    Args:
        answers: a list with the answer to each image.
        count: how many images there are.
        names: the class names that are known.

    Raises:
        RefusalError: the answers have another form, or none of them holds a label.

    Example:
        >>> labels_of([2, "cat", [0.1, 0.9], {"dog": 0.7, "cat": 0.3}], 4, Names(["dog", "cat"]))
        [2, 1, 1, 0]
        >>> labels_of([[0.5, 0.5], 1], 2, Names())
        [-1, 1]
    """
    if not isinstance(answers, list) or len(answers) != count:
        raise _strange(answers, count)
    unknown: list[str] = []
    labels = []
    for answer in answers:
        try:
            labels.append(_one(answer, names))
        except _UnknownError as error:
            unknown.append(str(error))
            labels.append(NO_ANSWER)
        except (ValueError, RecursionError):
            raise _strange(answers, count) from None
    if unknown and len(unknown) == count:
        what = "a class name that is not the key's" if names else "a class name"
        raise RefusalError(
            f"200 with {what}, {sentence(unknown[0])!r}, for a label",
            _NAMES_WANTED,
            final=not names,
        )
    if all(label == NO_ANSWER for label in labels):
        raise RefusalError(f"200 with no label in it ({shown(answers)})")
    return labels


def _strange(answers: object, count: int) -> RefusalError:
    shape = _shape(answers)
    if shape is None:
        return RefusalError(f"200 with neither labels nor scores ({shown(answers)})")
    return RefusalError(
        f"200 with answers of the shape {shape} to {count} images, where labels ({count},) or "
        f"scores ({count}, classes) are expected"
    )


def _shape(answers: object) -> tuple[int, ...] | None:
    """The shape of nested lists of numbers, as its first elements have it; else none."""
    shape: list[int] = []
    while isinstance(answers, list):
        shape.append(len(answers))
        answers = answers[0] if answers else 0.0
    number = isinstance(answers, int | float) and not isinstance(answers, bool)
    return tuple(shape) if shape and number else None


def _one(answer: Any, names: Names) -> int:
    """The label in the answer to one image.

    Raises:
        ValueError: the answer has no form that is known.
        _UnknownError: it is a class name that is not known.
    """
    answer = _bare(answer)
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return _label(_number(answer))
    if isinstance(answer, str):
        return names.number(answer)
    if isinstance(answer, Mapping):
        return _of_object(answer, names)
    if not isinstance(answer, list) or not answer:
        raise ValueError("no answer")
    if isinstance(answer[0], Mapping):
        pairs = [(_held(each, _LABELS), _held(each, _SCORES)) for each in answer]
        return _largest(pairs, names)
    return _largest(enumerate(map(_bare, answer)), names)


def _bare(answer: Any) -> Any:
    """What lists of one thing hold."""
    while isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    return answer


def _of_object(answer: Mapping[str, Any], names: Names) -> int:
    lists = [_found(answer, keys) for keys in (_LISTS, _SCORE_LISTS)]
    if all(isinstance(each, list) for each in lists) and len(lists[0]) == len(lists[1]):
        return _largest(zip(*lists, strict=True), names)
    label = _found(answer, _LABELS)
    if label is not None:
        return _one(label, names)
    alone = _found(answer, _SCORE_LISTS)  # scores of all classes, or objects with names and scores
    if alone is not None:
        return _one(alone, names)
    if not answer:
        raise ValueError("nothing in it")
    return _largest(answer.items(), names)


def _found(answer: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((answer[key] for key in keys if key in answer), None)


def _held(answer: object, keys: Sequence[str]) -> Any:
    found = _found(answer, keys) if isinstance(answer, Mapping) else None
    if found is None:
        raise ValueError("an object without label or score")
    return found


def _largest(pairs: Iterable[tuple[Any, Any]], names: Names) -> int:
    """The label whose score is largest; none where there is a tie or a score is no number."""
    labels, scores = [], []
    for label, score in pairs:
        labels.append(label)
        scores.append(_number(score))
    if not all(map(math.isfinite, scores)):
        return NO_ANSWER
    most = max(scores)
    best = [label for score, label in zip(scores, labels, strict=True) if score == most]
    if len(best) > 1:
        return NO_ANSWER
    if isinstance(best[0], int | float | str):
        return _one(best[0], names)
    raise ValueError("a label that is neither a number nor a name")


def _number(value: object) -> float:
    """A number, which may be written as a string; `null` is none and not finite."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("no number")
    if isinstance(value, str) and len(value) > _LONGEST_NUMBER:
        raise ValueError("no number")
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf


def _label(value: float) -> int:
    whole = math.isfinite(value) and 0 <= value < MOST_LABELS and value == int(value)
    return int(value) if whole else NO_ANSWER


def shown(answer: object) -> str:
    """The beginning of an answer, for a message."""
    try:  # piece by piece: an expression may have made something huge of a small answer
        return sentence("".join(islice(json.JSONEncoder().iterencode(answer), _SHOWN))[:_SHOWN])
    except TypeError:
        return brief(answer)  # a function's answer that is no JSON
    except (ValueError, RecursionError):
        return "nested too deeply to be shown"
