"""Calibration: how much boundary a stated cost in accuracy buys.

A model's margin says how likely its first class is right rather than its second: 1 / (1 + exp(-sharpness x margin)), fitted on the
validation pool. Returning the second class with probability w(margin) costs w x tanh(sharpness x margin / 2) of an example. For a cost in
sum, w = 1 / (1 + exp(slope x margin)) gives the coins the most entropy there is to have, so one number, the slope, is all that is chosen
(docs/guard.md).
"""

import math
from dataclasses import dataclass

import torch

from countermark.errors import CountermarkError
from countermark.guard.core import GuardSettings, boundary, projections

FLOOR = 0.05
"""Where the chance of the second class, before it is rounded to 64ths, would be below this, the answer is the model's own."""
CELL_BITS = 16
_NEAR = 0.1  # quantile of the margins that are small


@dataclass(frozen=True)
class Calibration:
    """What a guard costs and gives, estimated on the validation pool.

    Attributes:
        settings: the guard's.
        cost: expected loss of accuracy, in points: near ties and honest queries that are taken for made-up ones.
        entropy: bits of coins in an average natural query; a perfect copy made from n queries can reach p = 2^(-n x entropy).
        tied: share of natural queries that meet a coin, in percent.
        sharpness: fitted steepness of the model's own reliability, for each unit of margin.
        foreign_cost: the part of the cost that coins for made-up queries have, or would have where it is too much for the guard to have
            them; none where nobody asked for them.
    """

    settings: GuardSettings
    cost: float
    entropy: float
    tied: float
    sharpness: float
    foreign_cost: float | None = None


def calibrate(
    logits: torch.Tensor,
    features: torch.Tensor,
    y: torch.Tensor,
    *,
    secret: bytes,
    model_sha256: str,
    cost: float,
    bits: int = CELL_BITS,
) -> Calibration:
    """Choose the slope of the chances for a stated cost.

    Args:
        logits: of the validation pool, `(n, classes)`.
        features: of the same, `(n, features)`.
        y: true labels `(n,)`.
        secret: the owner's.
        model_sha256: digest of the model's weights.
        cost: points of accuracy that may be lost, in expectation.
        bits: keyed projections that cut the cells; there are up to 2^bits cells for each pair of classes.

    Raises:
        CountermarkError: too few examples, or answers from which no reliability can be fitted.
    """
    if len(y) < 20:
        raise CountermarkError(
            f"{len(y)} validation examples are too few to calibrate a guard; give at least 20"
        )
    signed, heads, tails = boundary(logits)
    margins = signed.abs()
    first = logits.argmax(1)
    second = torch.where(first == heads, tails, heads)
    right, wrong = first == y, second == y
    doubtful = float(margins.quantile(_NEAR))
    sharpness = _sharpness(margins[right | wrong], right[right | wrong], doubtful)
    near = margins <= doubtful
    price = float((right | wrong)[near].double().mean()) * torch.tanh(sharpness * margins / 2)

    def lost(slope: float) -> float:
        return 100 * float((_chances(margins, slope) * price).mean())

    low, high = (
        1e-6 * sharpness,
        1e6 * sharpness,
    )  # bisection on a logarithmic scale; `lost` falls as the slope grows
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if lost(middle) > cost else (low, middle)
    chances = _chances(margins, high)
    met = chances[chances > 0]
    entropy = float(
        (met * torch.log2(1 / met) + (1 - met) * torch.log2(1 / (1 - met))).sum() / len(y)
    )
    width = features.shape[1]
    offsets = (features.double() @ projections(secret, model_sha256, width, bits)).mean(0)
    settings = GuardSettings(
        model_sha256, high, math.log(1 / FLOOR - 1) / high, tuple(offsets.tolist()), width
    )
    return Calibration(
        settings, lost(high), entropy, 100 * float((chances > 0).double().mean()), sharpness
    )


def _chances(margins: torch.Tensor, slope: float) -> torch.Tensor:
    chances = torch.sigmoid(-slope * margins)
    return torch.where(chances >= FLOOR, chances, 0.0)


def _sharpness(margins: torch.Tensor, right: torch.Tensor, doubtful: float) -> float:
    """Maximum-likelihood slope of a logistic regression without an intercept, by bisection on its falling gradient.

    One example more, at the margin `doubtful` and half right, keeps it finite for a model that makes no mistake.
    """
    margins = torch.cat((margins, torch.tensor([doubtful], dtype=margins.dtype)))
    right = torch.cat((right.double(), torch.tensor([0.5], dtype=torch.float64)))
    low, high = 0.0, 1e4 / max(float(margins.mean()), 1e-9)
    for _ in range(200):
        middle = (low + high) / 2
        gradient = float(((right - torch.sigmoid(middle * margins)) * margins).sum())
        low, high = (middle, high) if gradient > 0 else (low, middle)
    if low == 0.0:
        raise CountermarkError(
            "on the validation pool the second class is right as often as the first; such a model is not worth guarding"
        )
    return high
