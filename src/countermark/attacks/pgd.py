"""Projected gradient descent, the attack of Madry et al. (2018).

With one step it is FGSM with random start (Wong, Rice and Kolter, 2020). The model is used as it
stands: put it into evaluation mode first, or `prepare` it, unless you mean otherwise.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from countermark.attacks.asking import NOT_FINITE, answers, ask
from countermark.data import pixels
from countermark.device import batch_size
from countermark.errors import CountermarkError
from countermark.fast import Prepared, Recorded, capturable, captured

_CACHED = 64  # images whose activations stay in a CPU's cache


def pgd(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    epsilon: float,
    steps: int,
    step_size: float,
    random_start: bool = True,
    start: torch.Tensor | None = None,
    restarts: int = 1,
    stop_when_lost: bool = False,
    bounded: bool = True,
) -> torch.Tensor:
    """Search the L-inf ball around each example for a point of high loss by projected ascent.

    Randomness comes from torch's generator. The cost is `steps` forward and backward passes per
    example and restart.

    Args:
        model: pixels `(n, c, h, w)` to logits `(n, classes)`.
        x: float pixels of [0, 1], `(n, c, h, w)`.
        y: true labels `(n,)`.
        epsilon: budget in pixels; 0 returns `x` itself.
        steps: gradient steps.
        step_size: length of a step, in pixels.
        random_start: start at a uniform point of the ball instead of at `x`.
        start: start at these points `(n, c, h, w)` instead, clamped to the ball; first run only.
        restarts: independent runs; each example keeps its worst point.
        stop_when_lost: spend no more steps on an example once it is misclassified.
        bounded: refuse pixels outside [0, 1] (see `data.pixels`); training checks their range once
            and not in every step.

    Returns:
        Adversarial examples `(n, c, h, w)`: misclassified ones where any were found, else those
        with the highest loss.

    Raises:
        CountermarkError: pixels outside [0, 1], or logits that are not finite at a point from which
            a step was taken.
    """
    x = pixels(x, bounded=bounded)
    if epsilon == 0 or steps == 0 or len(x) == 0:
        return x.clone()
    lower = (x - epsilon).clamp_(0, 1)
    upper = (x + epsilon).clamp_(0, 1)
    first = (
        _start(x, epsilon, lower, upper, random_start)
        if start is None
        else torch.clamp(start, lower, upper)
    )
    worst = _sound(_climb(model, first, y, lower, upper, steps, step_size, stop_when_lost))
    if restarts > 1:
        score = _score(model, worst, y)
        for _ in range(restarts - 1):
            open_ = (
                torch.nonzero(score.isfinite()).flatten()
                if stop_when_lost
                else torch.arange(len(x), device=x.device)
            )
            if len(open_) == 0:
                break
            low, high, labels = lower[open_], upper[open_], y[open_]
            begun = _start(x[open_], epsilon, low, high, random_start)
            found = _sound(
                _climb(model, begun, labels, low, high, steps, step_size, stop_when_lost)
            )
            gained = _score(model, found, labels)
            better = gained > score[open_]
            worst[open_[better]] = found[better]
            score[open_[better]] = gained[better]
    return worst


def fgsm(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    epsilon: float,
    step_size: float | None = None,
) -> torch.Tensor:
    """One signed gradient step from a random start, as in single-step training.

    The step size is 1.25 epsilon by default.
    """
    return pgd(
        model,
        x,
        y,
        epsilon=epsilon,
        steps=1,
        step_size=1.25 * epsilon if step_size is None else step_size,
    )


def _start(
    x: torch.Tensor, epsilon: float, lower: torch.Tensor, upper: torch.Tensor, random_start: bool
) -> torch.Tensor:
    if not random_start:
        return x.clone()
    return torch.empty_like(x).uniform_(-epsilon, epsilon).add_(x).clamp_(lower, upper)


def _climb(
    model: nn.Module,
    points: torch.Tensor,
    y: torch.Tensor,
    lower: torch.Tensor,
    upper: torch.Tensor,
    steps: int,
    step_size: float,
    stop_when_lost: bool,
) -> torch.Tensor:
    """Ascend the loss within the boxes from `points`, which are overwritten.

    With `stop_when_lost`, points that are misclassified stay where they are.
    """
    if isinstance(model, Prepared):  # each image is on its own, and nobody else sees the passes
        if points.is_cuda and capturable(model):
            before = points.clone()
            step = captured(
                lambda: step_(model, points, y, lower, upper, step_size, stop_when_lost),
                points.device,
            )
            points.copy_(before)
            for _ in range(steps):
                step()
            return points
        together = batch_size(points.device, points.shape[1:], _CACHED)
        if points.device.type == "cpu" and len(points) > together:
            for i in range(0, len(points), together):
                few = slice(i, i + together)
                _climb(
                    model,
                    points[few],
                    y[few],
                    lower[few],
                    upper[few],
                    steps,
                    step_size,
                    stop_when_lost,
                )
            return points
    result = points
    index = torch.arange(len(points), device=points.device)
    for _ in range(steps):
        lost = step_(model, points, y, lower, upper, step_size, stop_when_lost)
        if stop_when_lost and bool(lost.any()):
            if points is not result:
                result[index[lost]] = points[lost]
            points, y, lower, upper, index = (
                part[~lost] for part in (points, y, lower, upper, index)
            )
            if len(index) == 0:
                return result
    if points is not result:
        result[index] = points
    return result


def step_(
    model: nn.Module,
    points: torch.Tensor,
    y: torch.Tensor,
    lower: torch.Tensor,
    upper: torch.Tensor,
    step_size: float | torch.Tensor,
    stop_when_lost: bool,
) -> torch.Tensor:
    """One step of the ascent, in place.

    Nothing here depends on what is on the device, so a GPU replays it as one CUDA graph. An example
    whose logits are not finite becomes NaN and stays so: that can be looked for when the steps are
    done.

    Args:
        model: pixels `(n, c, h, w)` to logits `(n, classes)`.
        points: where the examples are, `(n, c, h, w)`; moved.
        y: true labels `(n,)`.
        lower: lowest pixels allowed, `(n, c, h, w)`.
        upper: highest pixels allowed.
        step_size: in pixels; a tensor `()` where a recording is to be replayed with others.
        stop_when_lost: leave points that are misclassified where they are.

    Returns:
        Which examples were misclassified before the step, `(n,)`.
    """
    with torch.enable_grad():
        leaf = points.detach().requires_grad_()
        logits = ask(model, leaf)
        (gradient,) = torch.autograd.grad(
            functional.cross_entropy(logits, y, reduction="sum"), leaf
        )
    lost: torch.Tensor = logits.detach().argmax(1) != y
    going = (logits.detach() * 0).sum(1).to(points.dtype)  # 0, or NaN where one is not finite
    going.add_(~lost if stop_when_lost else 1)
    move = gradient.sign()  # not in place: a gradient may be an expanded tensor
    move.mul_(going.view(-1, *(1,) * (move.dim() - 1)))
    moved = (
        points.add_(move.mul_(step_size))
        if isinstance(step_size, torch.Tensor)
        else points.add_(move, alpha=step_size)
    )
    torch.clamp(moved, lower, upper, out=points)
    return lost


class Recording:
    """PGD for training on a GPU, whose step is recorded (see `Recorded`).

    The model's weights may change in place between two calls.
    """

    def __init__(
        self, model: nn.Module, computing: Callable[[], contextlib.AbstractContextManager[Any]]
    ) -> None:
        """Attack a model.

        Each step runs within `computing()`, which sets the model's mode and the precision, and must
        not cache any casts.
        """
        self._model, self._computing = model, computing
        self._steps = Recorded(self._step)

    def __call__(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        epsilon: float,
        steps: int,
        step_size: float,
        random_start: bool,
        start: torch.Tensor | None,
    ) -> torch.Tensor:
        """Find what `pgd` finds, in one run that does not stop early and reads nothing back.

        So the range of the pixels is not checked, and an example is NaN where the model's logits
        were not finite.
        """
        lower, upper = (x - epsilon).clamp_(0, 1), (x + epsilon).clamp_(0, 1)
        first = (
            _start(x, epsilon, lower, upper, random_start)
            if start is None
            else torch.clamp(start, lower, upper)
        )
        length = torch.full((), step_size, dtype=x.dtype, device=x.device)
        self._steps.load(first, y, lower, upper, length)
        for _ in range(steps):
            self._steps.replay()
        return self._steps.held[0].clone()

    def _step(
        self,
        points: torch.Tensor,
        y: torch.Tensor,
        lower: torch.Tensor,
        upper: torch.Tensor,
        step_size: torch.Tensor,
    ) -> None:
        with self._computing():
            step_(self._model, points, y, lower, upper, step_size, stop_when_lost=False)


def _score(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Loss of each example, infinite where it is misclassified."""
    with torch.no_grad():
        logits = ask(model, x)
        loss = functional.cross_entropy(logits, y, reduction="none")
        return torch.where(answers(logits) == y, loss, torch.full_like(loss, torch.inf))


def _sound(points: torch.Tensor) -> torch.Tensor:
    """The points themselves, unless a step marked one of them as without an answer."""
    if bool(points.isnan().any()):
        raise CountermarkError(NOT_FINITE)
    return points
