"""Theft: how a copy comes about.

White-box is the model itself. Black-box is Algorithm 2 of Thakkar, Zizzo and Maffeis (2023), after Papernot et al. (2017): the thief sees
labels only, trains a surrogate on his seeds, and asks next where the surrogate's answers change fastest.
"""

import contextlib
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from countermark.data import Examples, pixels
from countermark.evaluation import device_of, evaluating
from countermark.progress import bar
from countermark.suspects import Suspect
from countermark.training import Hardware, TrainConfig, train

_CHUNK = 1000


@dataclass(frozen=True)
class JacobianTheft:
    """Algorithm 2.

    Attributes:
        seeds: natural images that the thief starts with.
        queries: labels that the thief asks for in all; the data doubles each round until they are spent (the paper: 200 seeds, 51,200).
        step: length of an augmentation step, in pixels.
        epochs: passes over all data in each round.
        batch_size: of the surrogate's training.
        learning_rate: of SGD, constant.
        seed: seed of the training and of the choice among the last round's queries.
    """

    seeds: int = 200
    queries: int = 51_200
    step: float = 0.1
    epochs: int = 10
    batch_size: int = 32
    learning_rate: float = 0.005
    seed: int = 0


def steal_black_box(
    victim: Suspect,
    surrogate: nn.Module,
    natural: Examples,
    options: JacobianTheft,
    hardware: Hardware | None = None,
    title: str | None = None,
) -> int:
    """Train `surrogate` in place on the victim's labels.

    Args:
        victim: answers images with labels.
        surrogate: the thief's network.
        natural: the thief's pool; its labels are never used.
        options: seeds, query budget, augmentation.
        hardware: devices and precision of the training.
        title: names the progress bar; none is shown without it.

    Returns:
        The number of labels asked for.
    """
    x = pixels(natural.x[: min(options.seeds, options.queries)])
    y = victim(x)
    rounds = max(1, 1 + (max(options.queries // max(len(x), 1), 1) - 1).bit_length())
    with bar(title, rounds) if title is not None else contextlib.nullcontext() as progress:
        for number in range(rounds):
            config = TrainConfig(
                objective="standard",
                attack=None,
                epochs=options.epochs,
                batch_size=options.batch_size,
                learning_rate=options.learning_rate,
                schedule="constant",
                seed=options.seed * 1000 + number,
                hardware=hardware or Hardware(),
            )
            train(surrogate, Examples(x, y), config)
            if progress is not None:
                progress.advance()
                progress.text(f"{len(x)} queries")
            room = options.queries - len(x)
            if room <= 0:
                break
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(options.seed))[:room]
            queries = _augment(surrogate, x[order], y[order], options.step)
            x, y = torch.cat((x, queries)), torch.cat((y, victim(queries)))
    return len(x)


def _augment(surrogate: nn.Module, x: torch.Tensor, y: torch.Tensor, step: float) -> torch.Tensor:
    """Jacobian augmentation, x + step sign(dF_y/dx), kept within [0, 1]."""
    device = device_of(surrogate)
    parts = []
    with evaluating(surrogate):
        for i in range(0, len(x), _CHUNK):
            points = x[i : i + _CHUNK].to(device).requires_grad_()
            probabilities = functional.softmax(surrogate(points), dim=1)
            chosen = probabilities.gather(1, y[i : i + _CHUNK].to(device).unsqueeze(1)).sum()
            (gradient,) = torch.autograd.grad(chosen, points)
            parts.append((points.detach() + step * gradient.sign()).clamp_(0, 1).cpu())
    return torch.cat(parts)
