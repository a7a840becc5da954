"""How a batch is shown to the network: some images mirrored, all of them moved a little.

A view can also be undone, for what is carried along with the images.
"""

from dataclasses import dataclass, replace

import torch

from countermark.device import sent


@dataclass(frozen=True)
class View:
    """One way of showing a batch of images `(n, c, h, w)`.

    Attributes:
        mirrored: which of them are mirrored left to right, bool `(n,)`; `None` where no image is.
        moved: pixels by which all of them are moved, down and to the right; what leaves on one side
            enters on the other.
    """

    mirrored: torch.Tensor | None = None
    moved: tuple[int, int] = (0, 0)

    def to(self, device: torch.device) -> "View":
        """The same view of images on a device."""
        return (
            self if self.mirrored is None else replace(self, mirrored=sent(self.mirrored, device))
        )

    def of(self, images: torch.Tensor) -> torch.Tensor:
        """Show images, or their perturbations."""
        return (
            self._mirror(images)
            if self.moved == (0, 0)
            else torch.roll(self._mirror(images), self.moved, (2, 3))
        )

    def undo(self, images: torch.Tensor) -> torch.Tensor:
        """What `of` would show as `images`."""
        down, right = self.moved
        return self._mirror(
            images if self.moved == (0, 0) else torch.roll(images, (-down, -right), (2, 3))
        )

    def _mirror(self, images: torch.Tensor) -> torch.Tensor:
        return (
            images
            if self.mirrored is None
            else torch.where(self.mirrored[:, None, None, None], images.flip(3), images)
        )


def random_view(count: int, mirror: bool, most: int) -> View:
    """Draw a view from torch's generator.

    Args:
        count: number of images.
        mirror: whether to mirror a random half of them.
        most: pixels by which all of them are moved at most, either way.
    """
    mirrored = torch.rand(count) < 0.5 if mirror else None
    return View(mirrored, (_offset(most), _offset(most)) if most else (0, 0))


def _offset(most: int) -> int:
    return int(torch.randint(-most, most + 1, ()))
