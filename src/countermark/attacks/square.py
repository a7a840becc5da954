"""The Square attack: random search that moves small squares of the image to the budget's edge.

It is the attack of Andriushchenko et al. (2020) and asks for logits only. Where it succeeds and
gradients do not, the model hides its gradients instead of resisting.
"""

import math

import torch
from torch import nn

from countermark.attacks.asking import finite
from countermark.attacks.local import Local
from countermark.data import pixels

_FIRST_SHARE = 0.8  # of the image in the first squares
# After so many of 10,000 queries the share of the image halves.
_SHRINK = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def square(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, *, epsilon: float, queries: int = 5000
) -> torch.Tensor:
    """Random search for a misclassified point; an example is done once there is one.

    Randomness comes from torch's generator. In each query all examples try the same square, each
    with its own signs, so that only what the square reaches has to be computed again
    (`local.Local`).

    Args:
        model: pixels `(n, c, h, w)` to logits `(n, classes)`; in evaluation mode.
        x: float pixels of [0, 1], `(n, c, h, w)`.
        y: true labels `(n,)`.
        epsilon: L-inf budget, in pixels.
        queries: most forward passes for an example.

    Returns:
        Points in the ball `(n, c, h, w)`: a misclassified one where the search visited any, else
        the one with the smallest margin.

    Raises:
        CountermarkError: pixels outside [0, 1], or logits that are not finite at a visited point.
    """
    x = pixels(x)
    if epsilon == 0 or len(x) == 0:
        return x.clone()
    lower, upper = (x - epsilon).clamp_(0, 1), (x + epsilon).clamp_(0, 1)
    count, channels, height, width = x.shape
    stripes = torch.rand(count, channels, 1, width, device=x.device) < 0.5
    best = torch.where(stripes, lower, upper)
    result = best.clone()
    index = torch.arange(count, device=x.device)
    with torch.no_grad():
        local = Local(model, best)
        margin = _margin(local.logits, y)
        for query in range(1, queries):
            right = margin >= 0
            if not bool(right.all()):
                result[index[~right]] = local.x[~right]
                index, lower, upper, y, margin = (
                    part[right] for part in (index, lower, upper, y, margin)
                )
                local.keep(right)
            if len(index) == 0:
                return result
            side = _side(query, height, width)
            top, left = (int(torch.randint(room - side + 1, ())) for room in (height, width))
            rows, columns = slice(top, top + side), slice(left, left + side)
            signs = torch.rand(len(index), channels, 1, 1, device=x.device) < 0.5
            patch = torch.where(signs, lower[..., rows, columns], upper[..., rows, columns])
            tried = _margin(local.ask(patch, top, left), y)
            better = tried < margin
            local.accept(better)
            margin = torch.where(better, tried, margin)
    result[index] = local.x
    return result


def _side(query: int, height: int, width: int) -> int:
    share = _FIRST_SHARE / 2 ** sum(query > shrink for shrink in _SHRINK)
    side = round(math.sqrt(share * height * width))
    return max(1, min(side, height - 1, width - 1))


def _margin(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """How far the true class is above the best other class; below zero once misclassified."""
    own = finite(logits).gather(1, y.unsqueeze(1)).squeeze(1)
    other = logits.scatter(1, y.unsqueeze(1), -torch.inf).amax(1)
    return own - other
