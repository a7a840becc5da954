"""A guard around a network: images in, answers and trials out.

The answer to a query is the same whatever other queries share its batch.
"""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from countermark.data import Examples, as_uint8, joined, pixels
from countermark.device import batch_size
from countermark.errors import CountermarkError
from countermark.evaluation import device_of
from countermark.guard.calibration import CELL_BITS, Calibration, calibrate
from countermark.guard.core import SEED, WHOLE, AnswerTrial, Guard, cell_seeds, projections
from countermark.guard.foreign import (
    MOST_VALUES,
    foreign_share,
    honest_ranges,
    outlines,
    share_told,
)
from countermark.networks import OnnxNetwork, WithFeatures

_CHUNK = 250  # images at a time on a CPU
_FOREIGN_BITS = 14
# The largest share of the stated cost that coins for foreign queries may take. There are no such
# coins for data whose images differ so much that it does not suffice.
_FOREIGN_SHARE = 0.5
# The least share of images moved by two budgets that ranges must tell, or they serve for nothing.
_LEAST_TOLD = 0.01
TOLERANCE = 1e-5
"""Forty times the change that the shape of a batch was seen to cause in float32 on a CPU."""
_ROUGH = 1e-2  # on other devices, where convolutions may have half the digits


@dataclass(frozen=True)
class Answers:
    """What a guarded model returns.

    Attributes:
        labels: int64 `(n,)`.
        trials: the queries whose answers a coin chose.
        images: uint8 `(n, c, h, w)`, what was really asked: the queries rounded to 8 bits.
    """

    labels: torch.Tensor
    trials: list[AnswerTrial]
    images: torch.Tensor


class GuardedModel:
    """A network whose answers carry coins.

    Queries are rounded to 8 bits per value before anything else, so that the log can hold exactly
    what was asked. The shape of the batch changes the last bits of the logits, which can be enough
    to change a cell. Where so small a difference would change a query's cell or chance, the query
    is computed once more on its own. It then has one answer, in any batch and after any restart, as
    long as processor and software stay the same.

    Attributes:
        network: the network.
        guard: the guard.
        tolerance: more than computing differs from one shape of a batch to another.
    """

    def __init__(self, network: nn.Module, guard: Guard, tolerance: float | None = None) -> None:
        """Wrap any network.

        Args:
            network: takes pixel values in [0, 1] to logits; it is put into evaluation mode.
            guard: a guard that was calibrated for it.
            tolerance: more than the shape of a batch changes in logits and features, as for
                `Guard.questions`. `None`: 1e-5 for a network on the CPU, 1e-2 on other devices.
        """
        self.network, self.guard = network.eval(), guard
        self._split = FeatureReader(network)
        self.tolerance = (
            tolerance
            if tolerance is not None
            else TOLERANCE
            if device_of(network).type == "cpu"
            else _ROUGH
        )

    def under(self, log: bytes) -> "GuardedModel":
        """Make the same model with the coins of a query log, by its identity."""
        return GuardedModel(self.network, self.guard.under(log), self.tolerance)

    def __call__(
        self, x: torch.Tensor, clients: str | Sequence[str], openings: Sequence[bytes] = ()
    ) -> Answers:
        """Answer images `(n, c, h, w)`, uint8 or pixel values in [0, 1].

        Args:
            x: the images.
            clients: who asks, one client for all images or one for each.
            openings: for each image, the digest of its client's opening; empty for a client who
                does not sign. By default nobody signs.

        Raises:
            CountermarkError: the model's answers are not finite, or do not fit the guard.
        """
        images = as_uint8(x).cpu()
        asking = [clients] * len(images) if isinstance(clients, str) else clients
        opened = openings or [b""] * len(images)
        labels, trials = [], []
        count = self._split.count(images)
        for start in range(0, len(images), count):
            part = images[start : start + count]
            logits, features = self._split(part)
            questions = self.guard.questions(logits, features, part, self.tolerance)
            answers = logits.argmax(1)
            for question in questions:
                row = question.row
                who = asking[start + row], opened[start + row]
                if question.sure:
                    trial = self.guard.flip(question, *who)
                    label, found = trial.answer, [trial]
                else:
                    label, found = self._alone(part[row : row + 1], *who)
                answers[row] = label
                trials += [replace(trial, row=start + row) for trial in found]
            labels.append(answers)
        return Answers(
            torch.cat(labels) if labels else torch.empty(0, dtype=torch.int64), trials, images
        )

    def _alone(
        self, image: torch.Tensor, client: str, opening: bytes
    ) -> tuple[int, list[AnswerTrial]]:
        labels, trials = self.guard.answer(*self._split(image), client, image, opening)
        return int(labels[0]), trials


class FeatureReader:
    """Run a network on its device, and keep the input of the linear layer that runs last.

    The resulting `(logits, features)` are on the CPU.
    """

    def __init__(self, network: nn.Module) -> None:
        """Find the linear layers, where the network does not give its features itself.

        Raises:
            CountermarkError: see `countermark.networks.WithFeatures`.
        """
        self._network, self._lock = network, threading.Lock()
        self._both = (
            network.with_features if isinstance(network, OnnxNetwork) else WithFeatures(network)
        )

    def count(self, images: torch.Tensor) -> int:
        """Return how many of some images `(n, c, h, w)` to run at once."""
        return batch_size(device_of(self._network), images.shape[1:], _CHUNK)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute logits `(n, classes)` and features `(n, d)` of images.

        The images are uint8 or pixel values in [0, 1].
        """
        with self._lock, torch.no_grad():
            logits, features = self._both(pixels(x.to(device_of(self._network))))
        return logits.cpu(), features.cpu()


def calibrate_model(
    network: nn.Module,
    validation: Examples,
    *,
    secret: bytes,
    model_sha256: str,
    cost: float,
    bits: int = CELL_BITS,
    training: Examples | None = None,
    epsilon: float = 0.0,
) -> Calibration:
    """Calibrate a guard for a network on its validation pool (see `calibrate`).

    With `training` images, queries that are foreign to them at the budget `epsilon`, for pixel
    values in [0, 1], meet fair coins. The few honest queries among those lose half of their
    answers; this is subtracted from what the near ties may cost. If it would be more than half of
    the stated cost, the guard does without those coins. It also does where the ranges of the
    training images tell next to no foreign query, as those of photographs.

    Raises:
        CountermarkError: as for `calibrate` and `foreign_share`, or images with so many values
            that ranges which would be of use cannot be stored.
    """
    # The share of honest queries that meet a fair coin, which spoils half of their answers.
    share = 0.0 if training is None else foreign_share(training.x, epsilon)
    ranges, price = None, 50 * share
    if training is not None and price <= _FOREIGN_SHARE * cost:
        ranges = honest_ranges(training.x, epsilon)
        if share_told(ranges, validation.x, epsilon) < _LEAST_TOLD:
            ranges, price = None, 0.0
        elif ranges.values > MOST_VALUES:
            raise CountermarkError(
                f"images of {ranges.values} values are too large for coins on foreign queries, "
                f"{MOST_VALUES} are the most; guard near ties alone (--natural-only)"
            )
    taken = 0.0 if ranges is None else price
    read = FeatureReader(network.eval())
    count = read.count(validation.x)
    told = [read(validation.x[i : i + count]) for i in range(0, len(validation), count)]
    logits, features = (torch.cat(columns) for columns in zip(*told, strict=True))
    found = calibrate(
        logits,
        features,
        validation.y,
        secret=secret,
        model_sha256=model_sha256,
        cost=cost - taken,
        bits=bits,
    )
    if training is None:
        return found
    if ranges is None:
        return replace(found, foreign_cost=price)
    rows = range(0, len(validation), _CHUNK)
    parts = (outlines(validation.x[i : i + _CHUNK]) for i in rows)
    seen = joined(parts, len(validation)).double()
    signs = projections(cell_seeds(secret, model_sha256)[SEED:], seen.shape[1], _FOREIGN_BITS)
    offsets = tuple((seen @ signs).mean(0).tolist())
    settings = replace(found.settings, familiar=ranges, outlines=offsets)
    # A fair coin is one bit.
    met = {"entropy": found.entropy + share, "tied": found.tied + 100 * share}
    return replace(found, settings=settings, cost=found.cost + taken, foreign_cost=taken, **met)


@dataclass(frozen=True)
class ExpectedCost:
    """What the coins cost on some examples, on average over all possible clients.

    Attributes:
        points: loss of accuracy, in percentage points.
        standard_error: standard error of `points` as an estimate for all possible examples; it
            matters because few examples lie near a boundary. It is 0, and says nothing, if none of
            the examples met a coin.
    """

    points: float
    standard_error: float


def expected_cost(model: GuardedModel, examples: Examples) -> ExpectedCost:
    """Compute the cost of a guard on examples, images `(n, c, h, w)`, uint8 or pixels."""
    read, lost = FeatureReader(model.network), []
    count = read.count(examples.x)
    for start in range(0, len(examples), count):
        part = slice(start, start + count)
        images, y = as_uint8(examples.x[part]).cpu(), examples.y[part].tolist()
        logits, features = read(images)
        first = logits.argmax(1).tolist()
        for question in model.guard.questions(logits, features, images):
            truth, tail = y[question.row], question.chance / WHOLE
            right = {question.heads: 1 - tail, question.tails: tail}.get(truth, 0.0)
            lost.append(float(first[question.row] == truth) - right)
    total = max(len(examples), 1)
    mean = sum(lost) / total
    return ExpectedCost(
        100 * mean,
        100 * math.sqrt(max(0.0, sum(loss * loss for loss in lost) / total - mean * mean) / total),
    )
