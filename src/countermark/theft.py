"""Theft: how a copy comes about.

White-box is the model itself. Black-box is Algorithm 2 of Thakkar, Zizzo and Maffeis (2023), after Papernot et al. (2017): the thief sees
labels only, trains a surrogate on his seeds, and asks next where the surrogate's answers change fastest. Grey-box is the same with the
owner's network and adversarial training. Distillation (Hinton et al., 2015) needs the victim's probabilities.
"""

import contextlib
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from countermark.attacks import ask, finite
from countermark.data import Examples, pixels
from countermark.errors import CountermarkError
from countermark.evaluation import device_of, evaluating
from countermark.suspects import Suspect
from countermark.terminal import bar
from countermark.threat import Attack
from countermark.training import Hardware, TrainConfig, train

_CHUNK = 1000


@dataclass(frozen=True)
class JacobianTheft:
    """Algorithm 2.

    Attributes:
        seeds: natural images that the thief starts with; as many as `queries` make it a theft by natural queries alone (as "Knockoff
            Nets", Orekondy et al., 2019, without its choice of queries).
        queries: labels that the thief asks for in all; the data doubles each round until they are spent (the paper: 200 seeds, 51,200).
        step: length of an augmentation step, in pixels.
        epochs: passes over all data in each round.
        batch_size: of the surrogate's training.
        learning_rate: of SGD, constant.
        attack: the thief trains adversarially, with this attack (the paper's grey-box thief); none trains him plainly.
        clamp: keep the queries within [0, 1]; the published code did not.
        seed: seed of the training and of the choice among the last round's queries.
    """

    seeds: int = 200
    queries: int = 51_200
    step: float = 0.1
    epochs: int = 10
    batch_size: int = 32
    learning_rate: float = 0.005
    attack: Attack | None = None
    clamp: bool = True
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

    Raises:
        CountermarkError: the thief has no images, or the surrogate's logits are not finite.
    """
    x = pixels(natural.x[: min(options.seeds, options.queries)])
    if len(x) == 0:
        raise CountermarkError("there is no image to ask the victim about; give the thief at least one image and one query")
    y = victim(x)
    rounds = max(1, 1 + (max(options.queries // len(x), 1) - 1).bit_length())
    with bar(title, rounds) if title is not None else contextlib.nullcontext() as progress:
        for number in range(rounds):
            config = TrainConfig(
                objective="standard" if options.attack is None else "pgd",
                attack=options.attack,
                epochs=options.epochs,
                batch_size=options.batch_size,
                learning_rate=options.learning_rate,
                schedule="constant",
                grow_budget=False,
                seed=options.seed * 1000 + number,
                hardware=hardware or Hardware(),
            )
            train(surrogate, Examples(x, y), config, bounded=options.clamp)
            if progress is not None:
                progress.advance()
                progress.text(f"{len(x)} queries")
            room = options.queries - len(x)
            if room <= 0:
                break
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(options.seed))[:room]
            queries = _augment(surrogate, x[order], y[order], options)
            x, y = torch.cat((x, queries)), torch.cat((y, victim(queries)))
    return len(x)


def _augment(surrogate: nn.Module, x: torch.Tensor, y: torch.Tensor, options: JacobianTheft) -> torch.Tensor:
    """Jacobian augmentation, x + step sign(dF_y/dx)."""
    device = device_of(surrogate)
    parts = []
    with evaluating(surrogate):
        for i in range(0, len(x), _CHUNK):
            points = x[i : i + _CHUNK].to(device).requires_grad_()
            probabilities = functional.softmax(finite(ask(surrogate, points)), dim=1)
            chosen = probabilities.gather(1, y[i : i + _CHUNK].to(device).unsqueeze(1)).sum()
            (gradient,) = torch.autograd.grad(chosen, points)
            moved = points.detach() + options.step * gradient.sign()
            parts.append((moved.clamp_(0, 1) if options.clamp else moved).cpu())
    return torch.cat(parts)


def distil(teacher: nn.Module, student: nn.Module, natural: Examples, epochs: int, seed: int = 0, hardware: Hardware | None = None) -> None:
    """Train `student` in place on the probabilities that `teacher` gives to unlabelled images.

    Args:
        teacher: the victim, pixels to logits.
        student: the thief's network.
        natural: the thief's pool; its labels are never used.
        epochs: passes over it.
        seed: seed of the training.
        hardware: devices and precision.

    Raises:
        CountermarkError: the thief has no images, or the teacher's logits are not finite.
    """
    if len(natural) == 0:
        raise CountermarkError("there are no examples to distil from; give the thief at least one image")
    device = device_of(teacher)
    with evaluating(teacher), torch.no_grad():
        parts = (pixels(natural.x[i : i + _CHUNK].to(device)) for i in range(0, len(natural), _CHUNK))
        chunks = [finite(ask(teacher, part)).softmax(1).float().cpu() for part in parts]
    config = TrainConfig(objective="standard", attack=None, epochs=epochs, learning_rate=0.05, seed=seed, hardware=hardware or Hardware())
    train(student, Examples(natural.x, torch.cat(chunks)), config)
