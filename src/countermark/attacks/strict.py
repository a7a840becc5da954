"""The strict judge: for each example the worst of four attacks of different kinds, as AutoAttack (Croce and Hein, 2020) runs them.

APGD-CE, APGD-T, Square and FAB-T one after the other, each with AutoAttack's settings, and each only on the examples that all before it
left standing. The first two ascend losses, FAB-T follows boundaries, and Square needs no gradients at all. FAB-T only follows boundaries
that APGD-T came near: the runs of both are given up where they have no prospect.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from countermark.attacks.apgd import apgd_ce, apgd_targeted
from countermark.attacks.asking import answers, ask
from countermark.attacks.fab import fab_targeted
from countermark.attacks.folding import prepare
from countermark.attacks.square import square
from countermark.data import pixels

STAGES = ("clean", "PGD", "APGD-CE", "APGD-T", "Square", "FAB-T")

_TARGETS = 9  # other classes that the targeted attacks try, the likeliest first
_NEAR = 1.0  # FAB-T follows a boundary if APGD-T lacked no more than this, in its own progress: about two budgets away
_CHUNK = 256  # examples at a time
_COSTS = {"PGD": 25, "APGD-CE": 100, "APGD-T": 40, "Square": 800, "FAB-T": 20}  # a run's, about; for the progress bar


@dataclass(frozen=True)
class Strict:
    """What `strict` found.

    Attributes:
        points: `(n, c, h, w)` within the ball: a misclassified point for each example that was lost, else the example itself.
        broken_by: `(n,)` int64: the number in `STAGES` of what broke the example, -1 where nothing did; 0 is the example as it is.
    """

    points: torch.Tensor
    broken_by: torch.Tensor


def strict(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    epsilon: float,
    steps: int = 100,
    queries: int = 5000,
    opening: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    after: Callable[[float, int], None] | None = None,
) -> Strict:
    """Attack each example until something breaks it.

    Randomness comes from torch's generator.

    Args:
        model: pixels `(n, c, h, w)` to logits `(n, classes)`, in evaluation mode. The attacks run on a prepared copy; only what the model
            itself misclassifies counts.
        x: float pixels of [0, 1], `(n, c, h, w)`.
        y: true labels `(n,)`.
        epsilon: L-inf budget, in pixels; 0 leaves only what is misclassified anyway.
        steps: of each run of APGD and FAB.
        queries: of Square, an example.
        opening: an attack of the same budget that goes first, as "PGD": from model, images and labels to points of the ball.
        after: called now and then with the share of the work that is done and the number of examples that stand.

    Raises:
        CountermarkError: pixels outside [0, 1], or logits that are not finite, on an example or at a
            point that an attack met.
    """
    x = pixels(x)
    found = Strict(x.clone(), torch.full_like(y, -1))
    quick = prepare(model)
    logits = torch.cat([_logits(model, part) for part in torch.split(x, _CHUNK)]) if len(x) else x.new_zeros(0, 2)
    found.broken_by[answers(logits) != y] = 0
    if epsilon == 0 or len(x) == 0:
        return found
    others = logits.scatter(1, y.unsqueeze(1), -torch.inf).argsort(1, descending=True)[:, : min(_TARGETS, logits.shape[1] - 1)]
    lacks = x.new_zeros(others.shape)  # of APGD-T towards each target

    def targeted(rows: torch.Tensor, rank: int) -> torch.Tensor:
        points, lacks[rows, rank] = apgd_targeted(quick, x[rows], y[rows], others[rows, rank], epsilon=epsilon, steps=steps)
        return points

    def nearest(rows: torch.Tensor, rank: int) -> torch.Tensor:
        points, near = x[rows], lacks[rows, rank] <= _NEAR
        some = rows[near]
        points[near] = fab_targeted(quick, x[some], y[some], others[some, rank], epsilon=epsilon, steps=steps)
        return points

    searches: dict[str, tuple[int, Callable[[torch.Tensor, int], torch.Tensor]]] = {
        "APGD-CE": (1, lambda rows, _: apgd_ce(quick, x[rows], y[rows], epsilon=epsilon, steps=steps)),
        "APGD-T": (others.shape[1], targeted),
        "Square": (1, lambda rows, _: square(quick, x[rows], y[rows], epsilon=epsilon, queries=queries)),
        "FAB-T": (others.shape[1], nearest),
    }
    if opening is not None:
        searches = {"PGD": (1, lambda rows, _: opening(quick, x[rows], y[rows])), **searches}
    whole, done = sum(_COSTS[name] * targets for name, (targets, _) in searches.items()), 0.0
    for name, (targets, search) in searches.items():
        for rank in range(targets):
            standing = torch.nonzero(found.broken_by == -1).flatten()
            if len(standing) == 0:
                return found
            for rows in torch.split(standing, _CHUNK):
                points = search(rows, rank)
                lost = answers(_logits(model, points)) != y[rows]
                found.points[rows[lost]] = points[lost]
                found.broken_by[rows[lost]] = STAGES.index(name)
                done += _COSTS[name] / whole * len(rows) / len(standing)
                if after is not None:
                    after(done, int((found.broken_by == -1).sum()))
    return found


def _logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return ask(model, x)
