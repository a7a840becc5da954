"""Features of a network: what enters the linear layer that runs last."""

import torch
from torch import nn

from countermark.errors import CountermarkError

_OWN = "use countermark.guard.Guard with features of your own"


class WithFeatures(nn.Module):
    """A network that gives its features beside its logits."""

    def __init__(self, network: nn.Module) -> None:
        """Find the linear layers.

        Raises:
            CountermarkError: there is none; the owner must name the features of such a network.
        """
        super().__init__()
        self.network = network
        self._linear = [each for each in network.modules() if isinstance(each, nn.Linear)]
        if not self._linear:
            raise CountermarkError(f"the network has no linear layer to take features from; {_OWN}")

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute logits `(n, classes)` and features `(n, d)` of pixels `(n, c, h, w)`.

        Raises:
            CountermarkError: no linear layer ran.
        """
        kept: list[torch.Tensor] = []
        hooks = [
            layer.register_forward_pre_hook(lambda _module, inputs: kept.append(inputs[0]))
            for layer in self._linear
        ]
        try:
            logits = self.network(x)
        finally:
            for hook in hooks:
                hook.remove()
        if not kept:
            raise CountermarkError(f"no linear layer of the network ran; {_OWN}")
        return logits, kept[-1].flatten(1)
