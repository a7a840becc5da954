"""Calibration of a guard: the most coin entropy for a stated cost in accuracy.

A model's margin tells how likely it is that its first class is right rather than its second:
1 / (1 + exp(-sharpness x margin)), where the sharpness is fitted on the validation pool. Returning
the second class with probability w(margin) costs, in expectation, w x tanh(sharpness x margin / 2)
of an example. For a given total cost, w = 1 / (1 + exp(slope x margin)) gives the coins the largest
possible entropy, so the slope is the only number to choose (docs/guard.md).
"""

import math
from dataclasses import dataclass

import torch

from countermark.errors import CountermarkError
from countermark.guard.core import SEED, GuardSettings, boundary, cell_seeds, projections

FLOOR = 0.05
"""Smallest chance of the second class, before it is rounded to 64ths.

Where the chance would be smaller, the answer is the model's own.
"""
CELL_BITS = 16
_NEAR = 0.1  # margins up to this quantile count as small


@dataclass(frozen=True)
class Calibration:
    """What a guard costs and how much evidence it gives, estimated on the validation pool.

    Attributes:
        settings: settings of the guard.
        cost: expected loss of accuracy, in percentage points, from near ties and from honest
            queries that are foreign.
        entropy: bits of coin entropy in an average natural query; a perfect copy made from n
            queries can reach p = 2^(-n x entropy).
        tied: share of natural queries that meet a coin, in percent.
        sharpness: fitted steepness of the model's own reliability, per unit of margin.
        foreign_cost: the part of the cost that is due to coins for foreign queries. If they cost
            too much for the guard to use them, what they would have cost; 0 without such coins
            where the training images' ranges would tell next to no foreign query. `None` if they
            were not asked for.
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
        logits: logits of the validation pool, `(n, classes)`.
        features: features of the validation pool, `(n, features)`.
        y: true labels `(n,)`.
        secret: the owner's secret.
        model_sha256: digest of the model's weights.
        cost: expected loss of accuracy that is allowed, in percentage points.
        bits: number of keyed projections that define the cells; there are up to 2^bits cells for
            each pair of classes.

    Raises:
        CountermarkError: there are too few examples, or no reliability can be fitted to the
            answers.
    """
    if len(y) < 20:
        raise CountermarkError(
            f"{len(y)} validation examples are too few to calibrate a guard; give at least 20"
        )
    signed, heads, tails = map(torch.from_numpy, boundary(logits.double().numpy()))
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

    # Bisection on a logarithmic scale; `lost` falls as the slope grows.
    low, high = 1e-6 * sharpness, 1e6 * sharpness
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if lost(middle) > cost else (low, middle)
    chances = _chances(margins, high)
    met = chances[chances > 0]
    entropy = float(
        (met * torch.log2(1 / met) + (1 - met) * torch.log2(1 / (1 - met))).sum() / len(y)
    )
    width = features.shape[1]
    signs = projections(cell_seeds(secret, model_sha256)[:SEED], width, bits)
    offsets = (features.double() @ signs).mean(0)
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
    """Fit the slope of a logistic regression without an intercept by maximum likelihood.

    The gradient falls as the slope grows, so its zero is found by bisection. One additional
    example, at the margin `doubtful` and half right, keeps the slope finite for a model that makes
    no mistakes.
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
            "on the validation pool the second class is right as often as the first; such a model "
            "is not worth guarding"
        )
    return high
