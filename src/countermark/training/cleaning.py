"""Train an input cleaner to take perturbations out of what a network sees.

A thief does so to hide a mark, and an owner to find trials that such a cleaner leaves.
"""

import contextlib

import torch
from torch import nn
from torch.nn import functional

from countermark.attacks import ask, finite, pgd
from countermark.data import Examples, pixels
from countermark.device import seeded
from countermark.errors import CountermarkError
from countermark.evaluation import device_of, evaluating
from countermark.terminal import bar, duration

_STEPS = 2  # of the attack that a cleaner learns from: each reaches three quarters of its budget
_FAITH = 0.2  # weight of the network's answers beside the pixels
_RATE = 2e-3  # of Adam


def teach_cleaner(
    front: nn.Module,
    network: nn.Module,
    images: Examples,
    *,
    budget: float,
    epochs: int,
    batch_size: int = 128,
    seed: int = 0,
    title: str | None = None,
) -> None:
    """Train a cleaner in place to undo adversarial perturbations of the network it stands before.

    Half of each batch is attacked in two large steps at the budget, on the labels that the network
    gives, so that no label of the images is used; the other half gets uniform noise of all
    strengths up to that budget. The loss is the cross-entropy of the pixels, plus a fifth of the
    divergence of the network's answers from those to the clean images. There are no checkpoints: it
    takes minutes.

    Args:
        front: the cleaner, in float32; it is moved to the network's device.
        network: the network it stands in front of; it is not changed.
        images: what it learns from.
        budget: L-inf, in pixels.
        epochs: passes over the images.
        batch_size: images in a step.
        seed: seed of everything random.
        title: names the progress bar; none is shown without it.

    Raises:
        CountermarkError: there is no image, or logits are not finite.
    """
    device = device_of(network)
    if len(images) == 0:
        raise CountermarkError("there is no image to train a cleaner on; give at least one")
    front.to(device).train()
    optimiser = torch.optim.Adam(front.parameters(), _RATE)
    wanted = [each.requires_grad for each in network.parameters()]
    shown = bar(title, epochs) if title is not None else contextlib.nullcontext()
    with evaluating(network), seeded(device, seed), shown as progress:
        network.requires_grad_(False)
        try:
            for _ in range(epochs):
                for chosen in torch.split(torch.randperm(len(images)), batch_size):
                    clear = pixels(images.x[chosen].to(device))
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
                progress.note(f"{title}: trained for {epochs} epochs in {took}")
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
