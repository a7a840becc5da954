"""Networks, images and trainings for tests of devices, pretended or real."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from countermark.data import Examples
from countermark.networks.named import build
from countermark.threat import Attack
from countermark.training import Hardware, TrainConfig

ATTACK = Attack(0.1, 3, 0.05)
PLAIN = TrainConfig(
    "standard", None, 2, batch_size=16, hardware=Hardware("cpu", precision="32-true")
)
OBJECTIVES = {
    "standard": PLAIN,
    "pgd": replace(PLAIN, objective="pgd", attack=ATTACK),
    "fast": replace(
        PLAIN,
        objective="fast",
        attack=replace(ATTACK, steps=1),
        carry=True,
        flip=True,
        shift=1,
        average=0.9,
    ),
    "epoch": replace(
        PLAIN, embedding="epoch", craft_in_training_mode=True, objective="pgd", attack=ATTACK
    ),
}


def examples(count: int = 48, seed: int = 0, channels: int = 1) -> Examples:
    """Noise under the label of its brighter half, so that there is something to learn."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 200, (count, channels, 8, 8), generator=draw, dtype=torch.uint8)
    y = torch.randint(0, 2, (count,), generator=draw)
    x[y == 0, :, :4] += 50
    x[y == 1, :, 4:] += 50
    return Examples(x, y)


def normed() -> nn.Module:
    """A network with batch norm and dropout, none of it known to the quick layers by name."""
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.2),
    )
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 2))


class Branched(nn.Module):
    """A residual block, as users bring it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm, self.block, self.head = (
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.Linear(256, 2),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.block(torch.relu(self.norm(x)))
        return self.head(x.flatten(1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **{
        name: lambda name=name: build(name, (1, 8, 8), 2, seed=0)
        for name in ("small", "paper", "clipped", "surrogate")
    },  # type: ignore[misc]
    "normed": normed,
    "branched": Branched,
}
