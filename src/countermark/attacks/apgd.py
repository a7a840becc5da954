"""Auto-PGD (APGD): projected gradient ascent that chooses its own step sizes.

This is algorithm 1 of Croce and Hein (2020, "Reliable evaluation"). The step size halves where it
has stopped paying off, and the search then continues from the best point so far. With cross-entropy
it is APGD-CE; with the targeted difference-of-logits ratio, one target after another, it is APGD-T.
One thing is not in the paper: a run towards a target is abandoned when the progress that it still
needs is too large a multiple of the progress that it has made so far.
"""

import torch
from torch import nn
from torch.nn import functional

from countermark.attacks.asking import answers, ask
from countermark.data import pixels

_MOMENTUM = 0.75  # share of the new step in each move
_PAYS = 0.75  # share of steps that must raise the loss for the step size to stay
# (step, ratio): from this step on, a run that needs more than `ratio` times the progress that it
# has made is abandoned (docs/log.md has the measurements).
_HOPES = ((20, 1.5), (40, 0.5))


def apgd_ce(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, *, epsilon: float, steps: int = 100
) -> torch.Tensor:
    """APGD on cross-entropy.

    Randomness comes from torch's generator. An example costs `steps` + 1 forward passes and `steps`
    backward passes, or fewer once it is misclassified.

    Args:
        model: pixels `(n, c, h, w)` to logits `(n, classes)`; in evaluation mode.
        x: float pixels of [0, 1], `(n, c, h, w)`.
        y: true labels `(n,)`.
        epsilon: L-inf budget, in pixels.
        steps: gradient steps.

    Returns:
        Points in the ball `(n, c, h, w)`: a misclassified one where the search visited any, else
        the one with the highest loss.

    Raises:
        CountermarkError: pixels outside [0, 1], or logits that are not finite at a visited point.
    """
    return _apgd(model, x, y, None, epsilon, steps)[0]


def apgd_targeted(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    target: torch.Tensor,
    *,
    epsilon: float,
    steps: int = 100,
) -> tuple[torch.Tensor, torch.Tensor]:
    """APGD on the targeted difference-of-logits ratio.

    The ratio is (z_t - z_y) divided by how far the largest logit is above the mean of the third and
    fourth largest.

    Args:
        model: pixels `(n, c, h, w)` to logits `(n, classes)`; in evaluation mode.
        x: float pixels of [0, 1], `(n, c, h, w)`.
        y: true labels `(n,)`.
        target: the class to reach, `(n,)`; reaching any other class than `y` counts as well.
        epsilon: L-inf budget, in pixels.
        steps: gradient steps; fewer for an example whose target is out of reach.

    Returns:
        Points in the ball, as from `apgd_ce`, and what each run lacked, `(n,)`: the progress in
        z_t - z_y that it still needed, as a multiple of the progress that it made. This is 0 where
        the example was misclassified or no progress was made, and then nothing follows from it.

    Raises:
        CountermarkError: as in `apgd_ce`.
    """
    return _apgd(model, x, y, target, epsilon, steps)


def _loss(logits: torch.Tensor, y: torch.Tensor, target: torch.Tensor | None) -> torch.Tensor:
    if target is None:
        return functional.cross_entropy(logits, y, reduction="none")
    gain = _gain(logits, y, target)
    if logits.shape[1] < 3:
        return gain  # the ratio would be constant
    best = logits.topk(min(4, logits.shape[1]), 1).values
    return gain / (best[:, 0] - best[:, 2:].mean(1) + 1e-12)


def _gain(logits: torch.Tensor, y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """How far the target's logit is above that of the true class."""
    return (logits.gather(1, target.unsqueeze(1)) - logits.gather(1, y.unsqueeze(1))).squeeze(1)


def _apgd(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    target: torch.Tensor | None,
    epsilon: float,
    steps: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    x = pixels(x)
    lacks = x.new_zeros(len(x))
    if epsilon == 0 or len(x) == 0:
        return x.clone(), lacks
    lower, upper = (x - epsilon).clamp_(0, 1), (x + epsilon).clamp_(0, 1)
    points = torch.empty_like(x).uniform_(-epsilon, epsilon).add_(x).clamp_(lower, upper)
    result = points.clone()
    never = x.new_full((len(x),), -torch.inf)
    run = {
        "index": torch.arange(len(x), device=x.device),
        "y": y,
        "lower": lower,
        "upper": upper,
        "points": points,
        "before": points,
        "best": points.clone(),
        "best_gradient": torch.zeros_like(points),
        "best_loss": never,
        "best_then": never,  # at the last checkpoint
        "loss": never,
        "raised": torch.zeros_like(never),  # steps since the last checkpoint that raised the loss
        "halved": torch.zeros_like(y, dtype=torch.bool),  # at the last checkpoint
        "step": x.new_full((len(x), *(1,) * (x.dim() - 1)), 2 * epsilon),
    }
    if target is not None:
        run |= {"target": target, "gained": never}
    checkpoints = _checkpoints(steps)
    for number in range(steps):
        logits, loss, gradient = _ascent(model, run["points"], run["y"], run.get("target"))
        leaving = answers(logits) != run["y"]
        result[run["index"][leaving]] = run["points"][leaving]
        if target is not None:
            gain = _gain(logits, run["y"], run["target"])
            run["gained"] = torch.maximum(run["gained"], gain)
            run.setdefault("begun", gain)
            if number in checkpoints:
                hope = next(
                    (most for first, most in reversed(_HOPES) if number >= first), torch.inf
                )
                lacking = _lacking(run["begun"], run["gained"])
                hopeless = ~leaving & (lacking > hope)
                result[run["index"][hopeless]] = run["best"][hopeless]
                lacks[run["index"][hopeless]] = lacking[hopeless]
                leaving |= hopeless
        if bool(leaving.any()):
            run = {name: value[~leaving] for name, value in run.items()}
            loss, gradient = loss[~leaving], gradient[~leaving]
            if len(loss) == 0:
                return result, lacks
        run["raised"] = run["raised"] + (loss > run["loss"])
        run["loss"] = loss
        better = torch.nonzero(loss > run["best_loss"]).flatten()
        for name, value in (
            ("best", run["points"]),
            ("best_gradient", gradient),
            ("best_loss", loss),
        ):
            run[name] = run[name].index_copy(0, better, value[better])
        if number in checkpoints:
            stalled = ~run["halved"] & (run["best_loss"] <= run["best_then"])
            halved = stalled | (run["raised"] < _PAYS * checkpoints[number])
            back = as_images(halved, x)
            run["step"] = torch.where(back, run["step"] / 2, run["step"])
            run["points"] = torch.where(back, run["best"], run["points"])
            gradient = torch.where(back, run["best_gradient"], gradient)
            run |= {
                "halved": halved,
                "best_then": run["best_loss"],
                "raised": torch.zeros_like(loss),
            }
        points = run["points"]
        moved = torch.addcmul(points, run["step"], gradient.sign()).clamp_(
            run["lower"], run["upper"]
        )
        if number > 0:
            moved.sub_(points).mul_(_MOMENTUM).add_(points)
            moved.add_(points - run["before"], alpha=1 - _MOMENTUM).clamp_(
                run["lower"], run["upper"]
            )
        run |= {"before": points, "points": moved}
    with torch.no_grad():
        lost = answers(ask(model, run["points"])) != run["y"]
    result[run["index"]] = torch.where(as_images(lost, x), run["points"], run["best"])
    if target is not None:
        lacks[run["index"]] = torch.where(lost, 0, _lacking(run["begun"], run["gained"]))
    return result, lacks


def _ascent(
    model: nn.Module, points: torch.Tensor, y: torch.Tensor, target: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, loss and the loss's gradient, all in the precision of the points."""
    with torch.enable_grad():
        leaf = points.detach().requires_grad_()
        logits = ask(model, leaf).to(leaf.dtype)
        loss = _loss(logits, y, target)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    return logits.detach(), loss.detach(), gradient


def _lacking(begun: torch.Tensor, gained: torch.Tensor) -> torch.Tensor:
    """The missing progress as a multiple of the progress made; 0 where none was made."""
    progress = gained - begun
    return torch.where(progress > 0, -gained / progress, 0).clamp_(min=0)


def as_images(each: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """One value per image, `(n,)`, as `(n, 1, ...)`, which broadcasts over images `like`."""
    return each.view(-1, *(1,) * (like.dim() - 1))


def _checkpoints(steps: int) -> dict[int, int]:
    """Map the number of each step at which step sizes are reviewed to the steps since the last."""
    found, period, at = {}, max(int(0.22 * steps), 1), 0
    while at + period < steps:
        at += period
        found[at] = period
        period = max(period - int(0.03 * steps), int(0.06 * steps), 1)
    return found
