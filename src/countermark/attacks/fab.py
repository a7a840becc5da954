"""FAB: step to the nearest point beyond a linearised boundary, again and again.

The attack (Croce and Hein, 2020, "Minimally distorted adversarial examples") looks for the closest
adversarial example rather than for the worst point in a ball, so it follows boundaries that a loss
does not show. This is its targeted form under L-inf: each step linearises the boundary to one other
class only. One thing is not in the paper: a run is abandoned when its nearest adversarial point is
still far beyond the budget.
"""

import torch
from torch import nn

from countermark.attacks.apgd import as_images
from countermark.attacks.asking import answers, ask, finite
from countermark.data import pixels

_MOST_BIAS = 0.1  # largest weight of the original point in a step
_BEYOND = 1.05  # how far a step goes past the boundary
_BACK = 0.9  # share of an adversarial perturbation that is kept when the search steps back
_LOOKED_AT = 20  # linearisations between two checks for runs that are too far away
# After k linearisations a distance above (1 + 10/k) budgets is too far: fewer than one in a hundred
# of such runs came back (docs/log.md).
_FAR = 10
_ROUNDS = 3  # of the final search between the original and the best point
_MOST_PIECES = 40  # linear pieces that a projection follows; five are usual


def fab_targeted(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    target: torch.Tensor,
    *,
    epsilon: float,
    steps: int = 100,
) -> torch.Tensor:
    """Targeted FAB under L-inf; an example is done once it has a misclassified point in the budget.

    An example costs up to `steps` backward passes and twice as many forward passes. Nothing is
    random.

    Args:
        model: pixels `(n, c, h, w)` to logits `(n, classes)`; in evaluation mode.
        x: float pixels of [0, 1], `(n, c, h, w)`, correctly classified.
        y: true labels `(n,)`.
        target: the class whose boundary is followed, `(n,)`; reaching any other class than `y`
            counts as well.
        epsilon: L-inf budget, in pixels.
        steps: linearisations; fewer for an example whose target is far.

    Returns:
        Points in the ball `(n, c, h, w)`: a misclassified one where the search visited any, else
        the example itself.

    Raises:
        CountermarkError: pixels outside [0, 1], or logits that are not finite at a visited point.
    """
    x = pixels(x)
    result = x.clone()
    if epsilon == 0:
        return result
    index = torch.arange(len(x), device=x.device)
    start, points, nearest = x, x, x
    distance = x.new_full((len(x),), torch.inf)
    for number in range(1, steps + 1):
        if len(index) == 0:
            return result
        points = _step(model, start, points, y, target)
        with torch.no_grad():
            beyond = answers(ask(model, points)) != y
        away = (points - start).flatten(1).abs().amax(1)
        nearer = beyond & (away < distance)
        distance = torch.where(nearer, away, distance)
        nearest = torch.where(as_images(nearer, x), points, nearest)
        done = distance <= epsilon
        result[index[done]] = nearest[done]
        if number % _LOOKED_AT == 0:
            done |= distance > (1 + _FAR / number) * epsilon
        if bool(done.any()):
            parts = index, start, points, nearest, y, target, distance, beyond
            index, start, points, nearest, y, target, distance, beyond = (
                part[~done] for part in parts
            )
        points = torch.where(as_images(beyond, x), start + _BACK * (points - start), points)
    found = torch.isfinite(distance)
    index, right, wrong, y = index[found], start[found], nearest[found], y[found]
    for _ in range(_ROUNDS if len(index) else 0):
        middle = (right + wrong) / 2
        with torch.no_grad():
            beyond = as_images(answers(ask(model, middle)) != y, x)
        right, wrong = torch.where(beyond, right, middle), torch.where(beyond, middle, wrong)
    near = (wrong - x[index]).flatten(1).abs().amax(1) <= epsilon
    result[index[near]] = wrong[near]
    return result


def project(points: torch.Tensor, normal: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Find the nearest points, under L-inf and within [0, 1], where a linear function is zero.

    Where there is no such point, the furthest point towards zero is taken. When every coordinate
    moves by t, or as far as it can, the function changes by the sum of |w_i| min(t, room_i). This
    sum is concave and piecewise linear in t, so Newton's method from 0 rises to the solution
    without passing it and ends after finitely many pieces.

    Args:
        points: in [0, 1], `(n, d)`.
        normal: gradients of the functions, `(n, d)`.
        value: their values at the points, `(n,)`.

    Returns:
        The perturbations `(n, d)`.
    """
    direction = normal.sign() * -value.sign().unsqueeze(1)
    room = torch.where(direction > 0, 1 - points, points)
    weight = normal.abs()
    wanted = value.abs()
    most = room.amax(1)
    t = torch.zeros_like(value)
    for _ in range(_MOST_PIECES):
        free = room > t.unsqueeze(1)
        slope = (weight * free).sum(1)
        missing = wanted - (weight * torch.minimum(room, t.unsqueeze(1))).sum(1)
        further = torch.where(slope > 0, missing / slope, most).clamp_(min=0)
        t = torch.minimum(t + further, most)
        if bool((missing <= 1e-5 * wanted).all() | (t >= most).all()):
            break
    return direction * torch.minimum(room, t.unsqueeze(1))


def _step(
    model: nn.Module,
    start: torch.Tensor,
    points: torch.Tensor,
    y: torch.Tensor,
    target: torch.Tensor,
) -> torch.Tensor:
    """Step a little beyond the linearised boundary.

    The step starts at the current point and, with less weight, at the original.
    """
    with torch.enable_grad():
        leaf = points.detach().requires_grad_()
        logits = finite(ask(model, leaf)).to(leaf.dtype)
        margin = (logits.gather(1, target.unsqueeze(1)) - logits.gather(1, y.unsqueeze(1))).squeeze(
            1
        )
        (gradient,) = torch.autograd.grad(margin.sum(), leaf)
    margin = margin.detach()
    normal = gradient.flatten(1)
    at_start = margin + (normal * (start - points).flatten(1)).sum(1)
    moves = project(
        torch.cat((points, start)).flatten(1), normal.repeat(2, 1), torch.cat((margin, at_start))
    )
    near, far = moves.view(2, *points.shape)
    lengths = moves.abs().amax(1).view(2, -1)
    bias = as_images((lengths[0] / lengths.sum(0).clamp_(min=1e-12)).clamp_(max=_MOST_BIAS), points)
    moved: torch.Tensor = (1 - bias) * (points + _BEYOND * near) + bias * (start + _BEYOND * far)
    return moved.clamp_(0, 1)
