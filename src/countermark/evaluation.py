"""What a model scores: predicted labels and test, adversarial and strict accuracy in percent.

Adversarial accuracy counts an example as lost if any iterate of PGD is misclassified, and spends no
more steps on it; the result is never above the accuracy at the last iterate. Strict accuracy is
what PGD and four stronger attacks (`attacks.strict`) together leave.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from countermark.attacks import answers, ask, pgd, strict
from countermark.attacks.strict import CLEAN, OPENING, STAGES
from countermark.data import Examples, joined, pixels
from countermark.device import batch_size, resolve_precision, seeded
from countermark.errors import CountermarkError
from countermark.fast import prepare
from countermark.files import read_json, write_json
from countermark.terminal import bar
from countermark.threat import Attack

_BATCH = 250  # images at a time on a CPU
_STRICT_FORMAT = "countermark strict 1"
LARGEST_HONEST_GAP = 5.0  # points between PGD and the strict attacks
_PROGRESS = 1000  # parts of the strict attack that its bar counts
_PART = 250  # images on a CPU after which the strict attacks keep what they found
_ATTACKED = 128  # images at a time on a CPU: their activations stay in its cache


@dataclass(frozen=True)
class StrictAccuracy:
    """Accuracy in percent on one set of images: under no attack, under PGD and under all attacks.

    Attributes:
        images: number of images.
        test_accuracy: accuracy under no attack.
        adversarial_accuracy: what PGD leaves.
        strict_accuracy: what all attacks leave.
        broken: number of examples that each attack broke first, by the attack's name, in the order
            in which the attacks ran.
    """

    images: int
    test_accuracy: float
    adversarial_accuracy: float
    strict_accuracy: float
    broken: dict[str, int]

    @property
    def gap(self) -> float:
        """Points by which PGD overstates the model."""
        return self.adversarial_accuracy - self.strict_accuracy

    @property
    def masked(self) -> bool:
        """Whether the gap exceeds what honest models show by more than two standard errors.

        If so, PGD is too short or the model hides its gradients; docs/how-it-works.md says how to
        tell which.
        """
        share = max(0.0, self.gap) / 100
        return (
            self.gap - 200 * math.sqrt(share * (1 - share) / max(self.images, 1))
            > LARGEST_HONEST_GAP
        )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put the model into evaluation mode for the block, then each of its layers back as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield model
    finally:
        for module in training:
            module.training = True


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter (the CPU for a model without any)."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def predict(model: nn.Module, x: torch.Tensor, *, bounded: bool = True) -> torch.Tensor:
    """Predicted labels `(n,)`, in evaluation mode, on the CPU.

    Args:
        model: pixels to logits, in any precision and on any device.
        x: images `(n, c, h, w)`, uint8 or pixels of [0, 1]; each batch is moved to the model's
            device.
        bounded: refuse pixels outside [0, 1] (see `data.pixels`).

    Raises:
        CountermarkError: pixels outside [0, 1], or logits that are not finite.
    """
    return asked(model, x, answers, bounded=bounded).long()


def asked(
    model: nn.Module,
    x: torch.Tensor,
    of: Callable[[torch.Tensor], torch.Tensor],
    *,
    bounded: bool = True,
) -> torch.Tensor:
    """What is made of a model's results, in evaluation mode, batch by batch, on the CPU.

    Args:
        model: as for `predict`; what it gives for n images may also be other than logits.
        x: as for `predict`.
        of: makes n rows of them.
        bounded: as for `predict`.

    Raises:
        CountermarkError: pixels outside [0, 1], or what `of` raises.
    """
    device = device_of(model)
    count = batch_size(device, x.shape[1:], _BATCH)
    with evaluating(model), torch.no_grad():
        parts = (
            pixels(x[i : i + count].to(device), bounded=bounded) for i in range(0, len(x), count)
        )
        return joined((of(ask(model, part)).cpu() for part in parts), len(x))


def accuracy(model: nn.Module, examples: Examples) -> float:
    """Test accuracy in percent; see `predict` for what is refused."""
    return agreement(predict(model, examples.x), examples.y)


def agreement(labels: torch.Tensor, wanted: torch.Tensor) -> float:
    """Share of equal labels, in percent; 0 where there are none."""
    return 100 * int((labels == wanted).sum()) / max(len(wanted), 1)


def adversarial_accuracy(
    model: nn.Module,
    examples: Examples,
    attack: Attack,
    *,
    restarts: int = 1,
    seed: int = 0,
    title: str | None = None,
    precision: str = "auto",
) -> float:
    """Accuracy in percent that is left under `attack`; with budget 0 it is the test accuracy.

    Args:
        model: pixels to logits; attacked in evaluation mode.
        examples: images and true labels.
        attack: budget, steps, step size.
        restarts: independent runs; an example must survive all of them.
        seed: seed of the random starts.
        title: names the progress bar; none is shown without it.
        precision: of the search: `auto` takes bf16 where the model's device computes in it;
            `32-true` or `bf16-mixed`. What is found counts by the answers of the model itself.

    Raises:
        CountermarkError: pixels outside [0, 1]; or logits that are not finite, on an example or at
            a point that the attack visited. A model that gives no answer there resists nothing, so
            it gets no figure.
    """
    device = device_of(model)
    count = batch_size(device, examples.x.shape[1:], _ATTACKED)
    computing = (
        torch.bfloat16 if resolve_precision(device, precision) == "bf16-mixed" else torch.float32
    )
    survivors = 0
    shown = bar(title, len(examples)) if title is not None else contextlib.nullcontext(None)
    with evaluating(model), seeded(device, seed), shown as progress:
        quick = prepare(model, computing)
        for i in range(0, len(examples), count):
            x, y = (part[i : i + count].to(device) for part in (examples.x, examples.y))
            survivors += int((~_lost(model, quick, pixels(x), y, attack, restarts)).sum())
            if progress is not None:
                progress.advance(len(y))
                progress.text(f"{100 * survivors / (i + len(y)):.1f} % survive")
    return 100 * survivors / max(len(examples), 1)


def _lost(
    model: nn.Module,
    quick: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    attack: Attack,
    restarts: int,
) -> torch.Tensor:
    """Find the examples that the attack breaks.

    The attack runs on the prepared copy `quick`, and the model itself has the last word.
    """
    options: dict[str, Any] = {**asdict(attack), "restarts": restarts, "stop_when_lost": True}
    worst = pgd(quick, x, y, **options)
    with torch.no_grad():
        lost: torch.Tensor = answers(ask(model, worst)) != y
        # Only the copy misclassifies these, by its rounding, so the attack stopped too early.
        unsure = ~lost & (answers(ask(quick, worst)) != y)
    if bool(unsure.any()):
        again = pgd(model, x[unsure], y[unsure], **options)
        with torch.no_grad():
            lost[unsure] = answers(ask(model, again)) != y[unsure]
    return lost


def strict_accuracy(
    model: nn.Module,
    examples: Examples,
    attack: Attack,
    *,
    restarts: int = 1,
    seed: int = 0,
    title: str | None = None,
    checkpoint: Path | None = None,
) -> StrictAccuracy:
    """Accuracy that is left under PGD and then under the strict attacks of the same budget.

    Images are attacked in parts, each with its own randomness, so that a run which was interrupted
    resumes to the same result.

    Args:
        model: pixels to logits; attacked in evaluation mode.
        examples: images and true labels.
        attack: the PGD; its budget is that of all attacks.
        restarts: independent runs of the PGD.
        seed: seed of everything random.
        title: names the progress bar; none is shown without it.
        checkpoint: file in which finished parts are kept and from which the run resumes; only valid
            for this model, these examples and these arguments.

    Raises:
        CountermarkError: as in `adversarial_accuracy`, or a damaged checkpoint.
    """
    device, kept = device_of(model), _kept(checkpoint, len(examples))
    count = batch_size(device, examples.x.shape[1:], _PART)
    options: dict[str, Any] = {**asdict(attack), "restarts": restarts, "stop_when_lost": True}
    shown = bar(title, _PROGRESS) if title is not None else contextlib.nullcontext(None)
    with evaluating(model), seeded(device, None), shown as progress:
        told = 0

        def tell(done: float, standing: int) -> None:
            nonlocal told
            reached = int((len(kept) + done * len(y)) / max(len(examples), 1) * _PROGRESS)
            if progress is not None:
                progress.advance(reached - told)
                progress.text(
                    f"{100 * (kept.count(-1) + standing) / (len(kept) + len(y)):.1f} % survive"
                )
            told = reached

        while len(kept) < len(examples):
            part = slice(len(kept), len(kept) + count)
            torch.manual_seed((seed << 20) + len(kept))
            x, y = pixels(examples.x[part].to(device)), examples.y[part].to(device)
            found = strict(
                model,
                x,
                y,
                epsilon=attack.epsilon,
                opening=lambda *batch: pgd(*batch, **options),
                after=tell,
            )
            kept += found.broken_by.tolist()
            if checkpoint is not None:
                # If the disk is full, the run goes on; it only cannot be resumed.
                with contextlib.suppress(CountermarkError):
                    write_json(checkpoint, {"format": _STRICT_FORMAT, "broken_by": kept})
    broken = {name: kept.count(number) for number, name in enumerate(STAGES)}
    share = 100 / max(len(kept), 1)
    clean = len(kept) - broken.pop(CLEAN)
    return StrictAccuracy(
        len(kept),
        share * clean,
        share * (clean - broken[OPENING]),
        share * (clean - sum(broken.values())),
        broken,
    )


def _kept(checkpoint: Path | None, images: int) -> list[int]:
    """What broke the images of the parts that were finished before."""
    if checkpoint is None or not checkpoint.exists():
        return []
    found = read_json(checkpoint)
    kept = found.get("broken_by") if found.get("format") == _STRICT_FORMAT else None
    known = isinstance(kept, list) and all(
        type(stage) is int and -1 <= stage < len(STAGES) for stage in kept
    )
    if not isinstance(kept, list) or not known or len(kept) > images:
        raise CountermarkError(
            f"{checkpoint} is not what an interrupted strict evaluation keeps; "
            "delete it to begin anew"
        )
    return list(kept)
