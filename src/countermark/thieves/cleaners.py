"""Put an input cleaner in front of a stolen network, and train it if it has parameters."""

import contextlib

import torch
from torch import nn
from torch.nn import functional

from countermark.attacks import ask, finite, pgd
from countermark.data import pixels
from countermark.device import seeded
from countermark.errors import CountermarkError
from countermark.evaluation import device_of, evaluating
from countermark.networks.cleaners import CLEANERS
from countermark.terminal import bar, duration
from countermark.thieves.means import Means

_STEPS = 2  # of the attack that a cleaner learns from: each reaches three quarters of its budget
_FAITH = 0.2  # weight of the network's answers beside the pixels
_RATE = 2e-3  # of Adam


def clean(network: nn.Module, name: str, amount: float, means: Means) -> nn.Module:
    """Return a copy of the network behind a cleaner.

    Args:
        network: pixels `(n, c, h, w)` of [0, 1] to logits.
        name: of the cleaner, from `CLEANERS`.
        amount: its amount.
        means: the thief's images, and the epochs of the training where the cleaner has parameters.

    Raises:
        CountermarkError: the thief has no image, or logits are not finite.
    """
    channels, height, width = means.pool.x.shape[1:]
    with seeded(torch.device("cpu"), means.seed):
        front = CLEANERS[name].make((channels, height, width), amount)
    if next(front.parameters(), None) is not None:
        teach(front, network, means)
    front.train(network.training)
    return nn.Sequential(front, network)


def teach(front: nn.Module, network: nn.Module, means: Means) -> None:
    """Train a cleaner in place to undo adversarial perturbations of the network it stands before.

    Half of each batch is attacked in two large steps at the budget of watermarks, on the labels
    that the network gives, so that no label of the thief's is used; the other half gets uniform
    noise of all strengths up to that budget. The loss is the cross-entropy of the pixels, plus a
    fifth of the divergence of the network's answers from those to the clean images.

    Args:
        front: the cleaner, in float32; it is moved to the network's device.
        network: the copy it stands in front of; it is not changed.
        means: images, epochs, batch size, seed.

    Raises:
        CountermarkError: the thief has no image, or logits are not finite.
    """
    pool, device, budget = means.pool, device_of(network), means.threat.watermark_epsilon
    if len(pool) == 0:
        raise CountermarkError(
            "there is no image to train a cleaner on; give the thief at least one"
        )
    front.to(device).train()
    optimiser = torch.optim.Adam(front.parameters(), _RATE)
    wanted = [each.requires_grad for each in network.parameters()]
    shown = bar(means.title, means.epochs) if means.title is not None else contextlib.nullcontext()
    with evaluating(network), seeded(device, means.seed), shown as progress:
        network.requires_grad_(False)
        try:
            for _ in range(means.epochs):
                for chosen in torch.split(torch.randperm(len(pool)), means.batch_size):
                    clear = pixels(pool.x[chosen].to(device))
                    with torch.no_grad():
                        answers = finite(ask(network, clear)).float()
                    noisy = _disturbed(network, clear, answers.argmax(1), budget)
                    cleaned = front(noisy)
                    loss = functional.binary_cross_entropy(cleaned, clear)
                    told = functional.log_softmax(ask(network, cleaned).float(), 1)
                    loss = loss + _FAITH * functional.kl_div(
                        told, answers.softmax(1), reduction="batchmean"
                    )
                    optimiser.zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimiser.step()
                if progress is not None:
                    progress.advance()
            if progress is not None:
                took = duration(progress.seconds)
                progress.note(f"{means.title}: trained for {means.epochs} epochs in {took}")
        finally:
            for parameter, before in zip(network.parameters(), wanted, strict=True):
                parameter.requires_grad_(before)
    front.requires_grad_(True).eval()


def _disturbed(network: nn.Module, x: torch.Tensor, y: torch.Tensor, budget: float) -> torch.Tensor:
    """The first half of a batch under attack, the second under noise."""
    half = len(x) // 2
    attacked = pgd(
        network, x[:half], y[:half], epsilon=budget, steps=_STEPS, step_size=0.75 * budget
    )
    strength = budget * torch.rand(len(x) - half, 1, 1, 1, device=x.device)
    noise = strength * (2 * torch.rand(x[half:].shape, device=x.device) - 1)
    return torch.cat((attacked, (x[half:] + noise).clamp(0, 1)))
