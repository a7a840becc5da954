"""Finding out how a suspect wants to be asked, and which of its classes is which of the key's.

Only clean examples decide, and no trial is ever asked for it, so the choice cannot depend on a coin
(condition 2 of the protocol). The p-value is multiplied by the number of ways all the same.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from countermark.data import Examples, as_uint8, pixels
from countermark.errors import CountermarkError
from countermark.evaluation import agreement
from countermark.suspects.asker import MOST_LABELS, NO_ANSWER, Asker, Asking
from countermark.suspects.remote import Endpoint

Ask = Callable[[torch.Tensor], torch.Tensor]
Sweep = Callable[[Asking], list[Asking]]
Kind = tuple[tuple[str, ...], list[tuple[Any, ...]]]
"""Names of options, and the values that they take together."""

_SIZES = (28, 32, 64, 96, 128, 224, 299, 384)
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_ENOUGH = 80.0  # percent of clean examples right: other layouts and sizes are not tried
_BETTER = 1.0  # points that a change has to bring
_NOISE = 0.25  # at most, in each pixel of the examples that are asked with noise
_GAIN = 10.0  # points that an exchange of classes has to bring
_ROUNDS = 2
_OTHER = MOST_LABELS - 1
"""The label of an answer that means none of the key's classes."""


@dataclass(frozen=True)
class Matched:
    """How a suspect is asked, as its answers to clean examples say.

    Attributes:
        chosen: what was changed about the images, by the name of the option.
        classes: which class of the key each answer means; none where answers are taken as they are.
        accuracy: of clean examples, in percent, when it is asked so.
        accuracy_before: the same when it is asked as declared; none if it answered nothing then.
        ways: the ways out of which this one was chosen; p-values are multiplied by it.
    """

    chosen: Mapping[str, Any]
    classes: tuple[tuple[int, int], ...] | None
    accuracy: float
    accuracy_before: float | None
    ways: int

    def meant(self, labels: torch.Tensor) -> torch.Tensor:
        """The key's classes that int64 answers `(n,)` mean; -1 stays no answer."""
        if self.classes is None:
            return labels
        meant = torch.full_like(labels, _OTHER)
        for answer, label in self.classes:
            meant[labels == answer] = label
        return torch.where(labels == NO_ANSWER, NO_ANSWER, meant)


def translation(given: torch.Tensor, y: torch.Tensor) -> tuple[float, dict[int, int]]:
    """What an exchange of classes explains.

    Args:
        given: int64 `(n,)`, what a suspect answered to clean examples.
        y: int64 `(n,)`, what is right.

    Returns:
        The percentage that is right if each answer is read as the class that the *other* examples
        with the same answer mostly have, so that few examples of many classes cannot be explained
        by chance; and the class that each answer mostly means.

    Example:
        >>> translation(torch.tensor([1, 1, 0, 0, 5]), torch.tensor([0, 0, 1, 1, 2]))
        (80.0, {0: 1, 1: 0, 5: 2})
    """
    answers, row = torch.unique(given, return_inverse=True)
    table = torch.zeros(len(answers), int(y.max()) + 1, dtype=torch.int64)
    table.index_put_((row, y), torch.ones_like(y), accumulate=True)
    others = table[row]
    others[torch.arange(len(y)), y] -= 1
    most, read = others.max(1)
    share = 100 * float(((most > 0) & (read == y)).double().mean())
    return share, dict(zip(answers.tolist(), table.argmax(1).tolist(), strict=True))


def match(
    opened: Callable[[Asking], Ask], asking: Asking, clean: Examples, *, arrays: bool = True
) -> tuple[Matched, int]:
    """Find the way in which a suspect gets most clean examples right.

    From the declared way on, one thing after another is changed and the best is kept:
    normalisation, order of channels, and where few are right layout and size. The examples are
    asked with noise as well: a good network is right about most plain ones in several ways. Where a
    suspect takes image files, it brings them to its network itself and only its classes are
    matched.

    Args:
        opened: makes the suspect that is asked in a way.
        asking: the declared way; its budget holds for all together.
        clean: examples that are no trials.
        arrays: whether the suspect may be asked with other arrays.

    Returns:
        The way, and how many images were sent to find it.

    Raises:
        CountermarkError: it answers clean examples in none of the ways.
    """
    declared = opened(asking)
    files = isinstance(declared, Endpoint) and declared.files
    kinds = _kinds(asking, clean) if arrays and not files else {}
    tried: dict[tuple[Any, ...], tuple[float, torch.Tensor] | None] = {}
    x, y = _harder(clean)
    spent = 0
    failure: CountermarkError | None = None

    def named(way: Asking) -> tuple[Any, ...]:
        return tuple(getattr(way, option) for options, _ in kinds.values() for option in options)

    def score(way: Asking) -> float:
        """Percent of all examples that it gets right in a way, classes exchanged or not."""
        nonlocal spent, failure
        name = named(way)
        if name not in tried:
            if isinstance(declared, Asker):
                left = None if way.budget is None else max(way.budget - spent, 0)
                retries = min(way.retries, 1) if way == asking else 0
                way = replace(way, budget=left, retries=retries)
            suspect: Ask | None = None
            try:
                suspect = opened(way)
                suspect(x[:1])  # one image tells whether it is refused
                answers = suspect(x)
                tried[name] = _score(answers, y, len(clean)), answers[: len(clean)]
            except CountermarkError as error:
                failure, tried[name] = error, None
            spent += suspect.asked if isinstance(suspect, Asker) else 0
        found = tried[name]
        return -1.0 if found is None else found[0]

    def plain(way: Asking) -> float:
        """Percent of clean examples without noise."""
        found = tried[named(way)]
        return 0.0 if found is None else _right(found[1], clean.y)[0]

    best, most = asking, score(asking)
    first = tried[named(asking)]
    sweeps: list[Sweep] = [lambda way: _together(way, kinds)] if most < 0 and kinds else []
    for _ in range(_ROUNDS):
        sweeps += [partial(_changed, kind=kind) for kind in kinds.values()]
    for sweep in sweeps:
        for way in sweep(best):
            costly = (way.layout, way.size) != (best.layout, best.size)
            if costly and plain(best) >= _ENOUGH:
                continue
            if score(way) > most + (_BETTER if most >= 0 else 0):
                best, most = way, score(way)
    found = tried[named(best)]
    if found is None:
        raise failure or CountermarkError("the suspect answers no clean example")
    accuracy, classes = _right(found[1], clean.y)
    ways = 2 * math.prod(len(values) for _, values in kinds.values())
    chosen = {
        option: getattr(best, option)
        for options, _ in kinds.values()
        for option in options
        if getattr(best, option) != getattr(asking, option)
    }
    before_any = None if first is None else agreement(first[1], clean.y)
    return Matched(chosen, classes, accuracy, before_any, ways), spent


def _harder(clean: Examples) -> tuple[torch.Tensor, torch.Tensor]:
    """Clean examples, and behind them the same with noise."""
    x, y = clean.read().x, clean.y
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    noisy = (pixels(x) + _NOISE * noise).clamp(0, 1)
    return torch.cat((as_uint8(x), as_uint8(noisy))), torch.cat((y, y))


def _score(answers: torch.Tensor, y: torch.Tensor, plain: int) -> float:
    """Percent right of plain and noisy examples, by the classes that the plain ones tell."""
    share, classes = _right(answers[:plain], y[:plain])
    read = Matched({}, classes, share, None, 1).meant(answers[plain:])
    return (share + agreement(read, y[plain:])) / 2


def _right(
    answers: torch.Tensor, y: torch.Tensor
) -> tuple[float, tuple[tuple[int, int], ...] | None]:
    """The percentage that is right, and the exchange of classes by which it is, if there is one."""
    plain = agreement(answers, y)
    answered = answers != NO_ANSWER
    if not bool(answered.any()):
        return 0.0, None
    share, classes = translation(answers[answered], y[answered])
    share *= float(answered.double().mean())
    if share < plain + _GAIN:
        return plain, None
    return share, tuple(sorted(classes.items()))


def _kinds(asking: Asking, clean: Examples) -> dict[str, Kind]:
    """What can be changed: names of options, and the values that they take together."""
    _, channels, height, width = clean.x.shape
    x = pixels(clean.read().x)
    own = tuple(_rounded(values) for values in (x.mean((0, 2, 3)), x.std((0, 2, 3))))
    pixel: list[tuple[Any, ...]] = [
        (asking.pixels, asking.mean, asking.std),
        ("float", (), ()),
        ("float", (0.5,), (0.5,)),
        ("float", *own),
        *([("float", _IMAGENET["mean"], _IMAGENET["std"])] if channels == 3 else []),
        ("uint8", (), ()),
        ("float", (0.0,), (1 / 255,)),  # floats from 0 to 255
    ]
    kinds: dict[str, Kind] = {"normalisation": (("pixels", "mean", "std"), pixel)}
    if channels == 3:
        kinds["channels"] = (("channels",), [(asking.channels,), ("rgb",), ("bgr",)])
    kinds["layout"] = (("layout",), [(asking.layout,), ("nchw",), ("nhwc",)])
    sizes: list[tuple[Any, ...]] = [(asking.size,), (None,)]
    sizes += [(size,) for size in _SIZES if (size, size) != (height, width)]
    kinds["size"] = (("size",), sizes)
    return {
        name: (options, list(dict.fromkeys(values))) for name, (options, values) in kinds.items()
    }


def _rounded(values: torch.Tensor) -> tuple[float, ...]:
    return tuple(max(round(value, 3), 0.001) for value in values.tolist())


def _changed(best: Asking, kind: Kind) -> list[Asking]:
    """The ways in which one thing is different."""
    options, values = kind
    return [replace(best, **dict(zip(options, value, strict=True))) for value in values]


def _together(best: Asking, kinds: Mapping[str, Kind]) -> list[Asking]:
    """The ways in which layout, size and type are different, to find one that is not refused."""
    ways = [best]
    for name in ("layout", "size"):
        ways = [changed for way in ways for changed in _changed(way, kinds[name])]
    other = {"float": "uint8", "uint8": "float"}[best.pixels]
    return [*ways, *(replace(way, pixels=other, mean=(), std=()) for way in ways)]
