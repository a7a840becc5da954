"""How training sees its images: mirrored and moved at random, perturbations along with them."""

from dataclasses import dataclass

import torch
from torch.nn import functional

from countermark.training.config import TrainConfig


@dataclass(frozen=True)
class Pose:
    """How the images of a batch are seen: mirrored left to right or not, then moved; pixels that come in are 0.

    Attributes:
        flipped: which of them are mirrored, `(n,)`; none if nothing is ever mirrored.
        moved: pixels that each moves down and right, `(n, 2)`; none if nothing is ever moved.
    """

    flipped: torch.Tensor | None
    moved: torch.Tensor | None

    @classmethod
    def drawn(cls, config: TrainConfig, count: int, device: torch.device) -> "Pose":
        """A random pose for `count` images, from torch's generator."""
        flipped = (torch.rand(count) < 0.5).to(device) if config.flip else None
        moved = torch.randint(-config.shift, config.shift + 1, (count, 2)).to(device) if config.shift else None
        return cls(flipped, moved)

    def of(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(n, c, h, w)` in this pose."""
        return _move(_flip(images, self.flipped), self.moved)

    def undone(self, images: torch.Tensor) -> torch.Tensor:
        """Images in this pose as they were; what left the frame is lost."""
        return _flip(_move(images, None if self.moved is None else -self.moved), self.flipped)


def _flip(images: torch.Tensor, flipped: torch.Tensor | None) -> torch.Tensor:
    return images if flipped is None else torch.where(flipped[:, None, None, None], images.flip(3), images)


def _move(images: torch.Tensor, moved: torch.Tensor | None) -> torch.Tensor:
    if moved is None:
        return images
    count, _, height, width = images.shape
    reach = int(moved.abs().max())
    wider = functional.pad(images, (reach,) * 4)
    rows = torch.arange(height, device=moved.device) + reach - moved[:, :1]
    columns = torch.arange(width, device=moved.device) + reach - moved[:, 1:]
    each = torch.arange(count, device=moved.device)[:, None, None]
    return wider[each, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).contiguous()
