"""What happens to images on their way to a suspect, which trials can be made to survive.

A service may take JPEGs only, or bring images to another size first. Trials that are meant to
survive that are chosen so that the source model errs on them in either form, and the marked model
learns their answers in both. The choice asks the source model alone, so it depends on no coin
(condition 2).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from countermark.data import as_uint8, pixels
from countermark.data.images import decode, encode
from countermark.errors import CountermarkError
from countermark.networks.cleaners import CLEANERS, Amount, Shape
from countermark.text import brief

Change = Callable[[torch.Tensor], torch.Tensor]
"""From uint8 images `(n, c, h, w)` to changed ones of the same shape."""


@dataclass(frozen=True)
class Passage:
    """One kind of change.

    Attributes:
        amount: its one number.
        make: the change, for images of a shape `(channels, height, width)`, from that number.
    """

    amount: Amount
    make: Callable[[Shape, float], Change]


def changes(words: Sequence[str], shape: Shape) -> list[Change]:
    """The changes that words such as `jpeg:75` and `resize:0.5` name.

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
        made.append(PASSAGES[name].make(shape, number))
    return made


def versions(x: torch.Tensor, passages: Sequence[Change]) -> list[torch.Tensor]:
    """Images uint8 `(n, c, h, w)` as they are, and after each change."""
    return [x, *(change(x) for change in passages)]


def _jpeg(x: torch.Tensor, quality: int) -> torch.Tensor:
    if x.shape[1] not in (1, 3):
        raise CountermarkError(
            f"a JPEG has 1 or 3 channels, not {x.shape[1]}; leave jpeg out of --survive"
        )
    files = [encode(image.numpy(), "jpeg", quality=quality) for image in x]
    parts = [torch.from_numpy(decode(file).pixels.copy()) for file in files]
    return torch.stack(parts) if parts else x


def _resized(x: torch.Tensor, factor: float) -> torch.Tensor:
    """Images brought to another size and back, each with antialiasing."""
    sides = tuple(x.shape[2:])
    other = tuple(max(1, round(side * factor)) for side in sides)
    scaled = pixels(x)
    for target in (other, sides):
        scaled = functional.interpolate(scaled, target, mode="bilinear", antialias=True)
    return as_uint8(scaled.clamp(0, 1))


def _cleaned(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return as_uint8(layer(pixels(x)).clamp(0, 1))


def _cleaner(name: str) -> Passage:
    cleaner = CLEANERS[name]
    return Passage(
        cleaner.amount,
        lambda shape, amount: partial(_cleaned, layer=cleaner.make(shape, amount)),
    )


PASSAGES: Mapping[str, Passage] = {
    "jpeg": Passage(
        Amount(int, 75, "a quality from 1 to 100", lambda value: 1 <= value <= 100),
        lambda _, quality: partial(_jpeg, quality=int(quality)),
    ),
    "resize": Passage(
        Amount(float, 0.5, "a factor from 0.1 to 10", lambda value: 0.1 <= value <= 10),
        lambda _, factor: partial(_resized, factor=factor),
    ),
    # What has to be trained first belongs to the thief alone.
    **{name: _cleaner(name) for name, cleaner in CLEANERS.items() if not cleaner.options},
}
"""The changes by name. To add one, add a row."""
