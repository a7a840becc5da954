"""Steps that a GPU records once as a CUDA graph, and replays without the host's share of the work.

In batches of a hundred images, the host would otherwise take several times as long to launch a step
as the device takes to compute it.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

_KNOWN = ("torch", "countermark")  # packages whose layers read no value from the device
_READING = ("item", "tolist", "numpy", "cpu", "nonzero")  # methods that do


class Recorded:
    """A step on tensors that keep their shapes: recorded when they first come, then replayed.

    Other tensors that the step uses, such as a network's weights, may change in place between two
    replays.

    Attributes:
        held: the tensors that the step works on.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        unchanged: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        """Record a step.

        Args:
            step: called with the tensors that are held; nothing in it may depend on their values.
            unchanged: a block at whose end everything but the tensors held is as it was before it,
                since recording takes the step a few times.
        """
        self.held: list[torch.Tensor] = []
        self.replay: Callable[[], Any] = lambda: None
        self._step, self._unchanged = step, unchanged

    def load(self, *given: torch.Tensor) -> None:
        """Copy tensors into those that are held; other shapes than before are recorded anew."""
        if [each.shape for each in given] != [each.shape for each in self.held]:
            self.held = [each.clone() for each in given]
            with self._unchanged():
                self.replay = captured(lambda: self._step(*self.held), self.held[0].device)
        for held, each in zip(self.held, given, strict=True):
            held.copy_(each)


def capturable(model: nn.Module) -> bool:
    """Whether the passes of a model can be recorded as a CUDA graph.

    A layer that reads a value from the device cannot be recorded, and a replay runs no hooks.
    PyTorch's layers and those of Countermark read none, but for a batch norm that averages over all
    batches; layers of other packages may.
    """
    return all(
        type(module).__module__.partition(".")[0] in _KNOWN
        and not (isinstance(module, fx.GraphModule) and _reads(module))
        and getattr(module, "momentum", 0) is not None
        and not module._forward_hooks
        and not module._forward_pre_hooks
        for module in model.modules()
    )


def _reads(module: fx.GraphModule) -> bool:
    """Whether code that `torch.fx` wrote down reads a value."""
    return any(node.op == "call_method" and node.target in _READING for node in module.graph.nodes)


def captured(step: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """Record a step on a GPU.

    Each call of the result replays the step on the same tensors, and returns what the step returned
    when it was recorded: the same tensors with new values. Recording takes the step a few times;
    the caller must restore what it changed, but for the GPU's random numbers.
    """
    with torch.cuda.device(device):
        drawn = torch.cuda.get_rng_state(device)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # libraries choose their kernels and allocate before the recording
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step()
        torch.cuda.set_rng_state(drawn, device)

    def replay() -> Any:
        graph.replay()
        return found

    return replay
