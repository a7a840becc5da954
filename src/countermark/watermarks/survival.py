"""What happens to images on their way to a suspect, which trials can be made to survive.

A service may take JPEGs only, or bring images to another size first, and a thief may put a cleaner
in front of a copy. Trials that are to survive this are crafted on the source model behind all
changes at once (after Athalye et al., 2018, "Synthesizing robust adversarial examples"), and taken
only if it errs on them in every form; the marked model learns their answers in all of them. The
choice asks the source model and cleaners that never saw a coin (condition 2).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from countermark.attacks import ask
from countermark.data import as_uint8, pixels
from countermark.data.images import decode, encode
from countermark.errors import CountermarkError
from countermark.evaluation import asked
from countermark.networks.cleaners import CLEANERS, Amount, Shape, Straight
from countermark.text import brief

Teach = Callable[[str, nn.Module], None]
"""Trains a layer in place; the word that named it tells it from others."""


@dataclass(frozen=True)
class Change:
    """One change of images.

    Attributes:
        layer: takes pixels `(n, c, h, w)` of [0, 1] to pixels, with a gradient that leads an attack
            somewhere.
    """

    layer: nn.Module

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """From uint8 images `(n, c, h, w)` to changed ones of the same shape."""
        return asked(self.layer, x, as_uint8) if len(x) else x


@dataclass(frozen=True)
class Passage:
    """One kind of change.

    Attributes:
        amount: its one number.
        make: the layer, for images of a shape `(channels, height, width)`, from that number.
    """

    amount: Amount
    make: Callable[[Shape, float], nn.Module]


class Passed(nn.Module):
    """A network that sees images as they are and after each change.

    Its logits are the means of the logarithms of the probabilities, so an attack on them works on
    every form at once.
    """

    def __init__(self, network: nn.Module, passages: Sequence[Change]) -> None:
        """Put changes in front of a network, one beside the other."""
        super().__init__()
        self.network, self.layers = network, nn.ModuleList(each.layer for each in passages)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pixels `(n, c, h, w)` to logits `(n, classes)`."""
        forms = [x, *(layer(x) for layer in self.layers)]
        told = [functional.log_softmax(ask(self.network, form), 1) for form in forms]
        return torch.stack(told).mean(0)


def changes(words: Sequence[str], shape: Shape, teach: Teach | None = None) -> list[Change]:
    """The changes that words such as `jpeg:75` and `resize:0.5` name.

    Args:
        words: the names, each with an amount or without.
        shape: one image, `(channels, height, width)`.
        teach: trains the layers that have parameters; without it they stay as they were drawn,
            which is enough to check words.

    Raises:
        CountermarkError: a word names none, or an amount that makes no sense.
    """
    made = []
    for word in words:
        name, _, amount = word.partition(":")
        if name not in PASSAGES:
            raise CountermarkError(
                f"--survive takes words as jpeg:75, of {', '.join(PASSAGES)}, not {brief(word)}"
            )
        wanted = PASSAGES[name].amount
        try:
            number = wanted.default if not amount else float(amount)
        except ValueError:
            number = float("nan")
        wanted.check(f"the amount of {name} in --survive", number)
        layer = PASSAGES[name].make(shape, number).eval()
        if teach is not None and next(layer.parameters(), None) is not None:
            teach(f"{name}:{number:g}", layer)
        made.append(Change(layer))
    return made


def versions(x: torch.Tensor, passages: Sequence[Change]) -> list[torch.Tensor]:
    """Images uint8 `(n, c, h, w)` as they are, and after each change."""
    return [x, *(change(x) for change in passages)]


def jpeg(x: torch.Tensor, quality: float) -> torch.Tensor:
    """Bring pixels `(n, c, h, w)` into JPEG files and back."""
    if x.shape[1] not in (1, 3):
        raise CountermarkError(
            f"a JPEG has 1 or 3 channels, not {x.shape[1]}; leave jpeg out of --survive"
        )
    files = [encode(image.numpy(), "jpeg", quality=int(quality)) for image in as_uint8(x.cpu())]
    parts = [torch.from_numpy(decode(file).pixels.copy()) for file in files]
    return pixels(torch.stack(parts)).to(x)


class Resized(nn.Module):
    """Images brought to another size and back, each with antialiasing."""

    def __init__(self, factor: float) -> None:
        """Multiply the sides by a factor."""
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take pixels `(n, c, h, w)` there and back."""
        sides = tuple(x.shape[2:])
        other = tuple(max(1, round(side * self.factor)) for side in sides)
        for target in (other, sides):
            x = functional.interpolate(x, target, mode="bilinear", antialias=True)
        return x.clamp(0, 1)


PASSAGES: Mapping[str, Passage] = {
    "jpeg": Passage(
        Amount(int, 75, "a quality from 1 to 100", lambda value: 1 <= value <= 100),
        lambda _, quality: Straight(jpeg, quality),
    ),
    "resize": Passage(
        Amount(float, 0.5, "a factor from 0.1 to 10", lambda value: 0.1 <= value <= 10),
        lambda _, factor: Resized(factor),
    ),
    **{name: Passage(cleaner.amount, cleaner.make) for name, cleaner in CLEANERS.items()},
}
"""The changes by name. To add one, add a row."""
