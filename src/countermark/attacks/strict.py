"""The strict judge: for each example the worst of four attacks of different kinds.

They are the attacks of AutoAttack (Croce and Hein, 2020) with its settings: APGD-CE, APGD-T, Square
and FAB-T run one after another, each only on the examples that have withstood all attacks before
it. The first two ascend losses, FAB-T follows boundaries, and Square needs no gradients at all. Two
things are not in the paper: runs of APGD-T and FAB-T that have no prospect of success are
abandoned, and FAB-T follows only boundaries that APGD-T came near.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from countermark.attacks.apgd import apgd_ce, apgd_targeted
from countermark.attacks.asking import answers, ask
from countermark.attacks.fab import fab_targeted
from countermark.attacks.square import square
from countermark.data import pixels
from countermark.device import batch_size
from countermark.fast import prepare

_TARGETS = 9  # other classes that the targeted attacks try, the likeliest first
# FAB-T follows a boundary if APGD-T lacked at most this multiple of the progress that it made: the
# boundary is then at most about two budgets away.
_NEAR = 1.0
_CHUNK = 256  # examples at a time, and fewer where images are large


@dataclass(frozen=True)
class Case:
    """What is attacked, as every attack of the ensemble is given it.

    Attributes:
        model: the network, prepared.
        x: pixels of [0, 1], `(n, c, h, w)`.
        y: true labels `(n,)`.
        others: the other classes that targeted attacks try, the likeliest first, `(n, targets)`.
        lacks: what APGD-T lacked towards each of them (see `apgd_targeted`), filled in as it runs.
        epsilon: L-inf budget, in pixels.
        steps: of each run of APGD and FAB.
        queries: most queries of Square for an example.
    """

    model: nn.Module
    x: torch.Tensor
    y: torch.Tensor
    others: torch.Tensor
    lacks: torch.Tensor
    epsilon: float
    steps: int
    queries: int


@dataclass(frozen=True)
class StrictAttack:
    """An attack of the ensemble.

    Attributes:
        name: as results show it.
        cost: roughly how many forward and backward passes a run takes for an example; for the
            progress bar.
        search: the attack itself. It takes the case, the numbers `(m,)` of the examples that no
            attack has broken yet, and the rank of the target; it returns points of the ball `(m, c,
            h, w)`.
        targeted: whether it is run once for each target, or once with rank 0.
        uses_gradients: whether it asks for gradients. One that does not shows whether the model
            only hides them.
    """

    name: str
    cost: int
    search: Callable[[Case, torch.Tensor, int], torch.Tensor]
    targeted: bool = False
    uses_gradients: bool = True


def _apgd_ce(case: Case, rows: torch.Tensor, _rank: int) -> torch.Tensor:
    return apgd_ce(case.model, case.x[rows], case.y[rows], epsilon=case.epsilon, steps=case.steps)


def _apgd_t(case: Case, rows: torch.Tensor, rank: int) -> torch.Tensor:
    target = case.others[rows, rank]
    points, case.lacks[rows, rank] = apgd_targeted(
        case.model, case.x[rows], case.y[rows], target, epsilon=case.epsilon, steps=case.steps
    )
    return points


def _square(case: Case, rows: torch.Tensor, _rank: int) -> torch.Tensor:
    return square(
        case.model, case.x[rows], case.y[rows], epsilon=case.epsilon, queries=case.queries
    )


def _fab_t(case: Case, rows: torch.Tensor, rank: int) -> torch.Tensor:
    points, near = case.x[rows], case.lacks[rows, rank] <= _NEAR
    some = rows[near]
    target = case.others[some, rank]
    points[near] = fab_targeted(
        case.model, case.x[some], case.y[some], target, epsilon=case.epsilon, steps=case.steps
    )
    return points


ENSEMBLE: tuple[StrictAttack, ...] = (
    StrictAttack("APGD-CE", 100, _apgd_ce),
    StrictAttack("APGD-T", 40, _apgd_t, targeted=True),
    StrictAttack("Square", 800, _square, uses_gradients=False),
    StrictAttack("FAB-T", 20, _fab_t, targeted=True),
)
"""The attacks, in the order in which they run. To add an attack, add a row."""

CLEAN, OPENING = "clean", "PGD"
STAGES = (CLEAN, OPENING, *(attack.name for attack in ENSEMBLE))
"""What may break an example: the model alone, the attack that goes first, or the ensemble."""

_OPENING_COST = 25


@dataclass(frozen=True)
class Strict:
    """What `strict` found.

    Attributes:
        points: `(n, c, h, w)` within the ball: a misclassified point for each example that was
            broken, else the example itself.
        broken_by: `(n,)` int64: the number in `STAGES` of what broke the example, or -1 where
            nothing did; 0 means that the example is misclassified as it is.
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
        model: pixels `(n, c, h, w)` to logits `(n, classes)`, in evaluation mode. The attacks run
            on a prepared copy; only what the model itself misclassifies counts.
        x: float pixels of [0, 1], `(n, c, h, w)`.
        y: true labels `(n,)`.
        epsilon: L-inf budget, in pixels; 0 leaves only what is misclassified anyway.
        steps: of each run of APGD and FAB.
        queries: most queries of Square for an example.
        opening: an attack of the same budget that goes first, under the name "PGD"; it maps model,
            images and labels to points in the ball.
        after: called now and then with the share of the work that is done and the number of
            examples that no attack has broken yet.

    Raises:
        CountermarkError: pixels outside [0, 1], or logits that are not finite, on an example or at
            a point that an attack visited.
    """
    x = pixels(x)
    found = Strict(x.clone(), torch.full_like(y, -1))
    if len(x) == 0:
        return found
    quick, chunk = prepare(model), batch_size(x.device, x.shape[1:], _CHUNK)
    logits = torch.cat([_logits(model, part) for part in torch.split(x, chunk)])
    found.broken_by[answers(logits) != y] = 0
    if epsilon == 0:
        return found
    others = logits.scatter(1, y.unsqueeze(1), -torch.inf).argsort(1, descending=True)[
        :, : min(_TARGETS, logits.shape[1] - 1)
    ]
    case = Case(quick, x, y, others, x.new_zeros(others.shape), epsilon, steps, queries)
    attacks = ENSEMBLE
    if opening is not None:
        attacks = (
            StrictAttack(
                OPENING,
                _OPENING_COST,
                lambda case, rows, _: opening(case.model, case.x[rows], case.y[rows]),
            ),
            *ENSEMBLE,
        )
    runs = [
        (attack, rank)
        for attack in attacks
        for rank in range(others.shape[1] if attack.targeted else 1)
    ]
    whole, done = sum(attack.cost for attack, _ in runs), 0.0
    for attack, rank in runs:
        standing = torch.nonzero(found.broken_by == -1).flatten()
        if len(standing) == 0:
            return found
        for rows in torch.split(standing, chunk):
            points = attack.search(case, rows, rank)
            lost = answers(_logits(model, points)) != y[rows]
            found.points[rows[lost]] = points[lost]
            found.broken_by[rows[lost]] = STAGES.index(attack.name)
            done += attack.cost / whole * len(rows) / len(standing)
            if after is not None:
                after(done, int((found.broken_by == -1).sum()))
    return found


def _logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return ask(model, x)
