"""Networks that compute with their own code, such as residual networks, made faster to attack.

That code is still what runs. What is constant in it is found by tracing it once (torch.fx): where
the result of a convolution goes into a batch norm and nowhere else, the batch norm is folded into
the convolution's weights and left out (Jacob et al., 2018, section 3.2). The copy is laid out with
channels last, which convolutions on CPUs prefer. That the copy computes what the network computes
is not taken for granted: both are run on the first images, and the results are compared.
"""

import copy
import inspect
from collections import Counter

import torch
import torch.fx
from torch import nn

from countermark.fast.pooling import Pool, by_two
from countermark.fast.sequence import is_plain
from countermark.networks.named import Clip, HalvingConv2d

_KNOWN = ("torch.nn.modules", "countermark.fast")
_COMPARED = 2  # images
_ROUNDING = {torch.float16: 0.02, torch.bfloat16: 0.1}  # of the largest number of the result
_ROUNDING_OTHERWISE = 1e-3


def quickened(module: nn.Module) -> nn.Module:
    """Copy a module that computes with its own code into a faster one.

    Layers of PyTorch and of this package are returned as they are.

    Args:
        module: in evaluation mode; it is not changed.
    """
    known = type(module).__module__.startswith(_KNOWN) and not isinstance(module, nn.Sequential)
    if known or is_plain(module, Clip, HalvingConv2d):
        return module
    quick, norms = copy.deepcopy(module), _norms_behind_convolutions(module)
    for convolution, norm in norms:
        _fold(quick, convolution, norm)
    for name, layer in list(quick.named_modules()):
        if (
            name
            and isinstance(layer, nn.MaxPool2d)
            and is_plain(layer, nn.MaxPool2d)
            and by_two(layer)
        ):
            quick.set_submodule(name, Pool(relu=False))
    return Quickened(quick, module, len(norms))


class Quickened(nn.Module):
    """A faster copy of a module, compared with the module when it is first called.

    Attributes:
        folded: number of batch norms that were folded away in the copy.
        layer: what computes: the copy, or the module itself where the copy computes something else.
        layout: memory layout of images for `layer`.
        exact: the module, until the two have been compared; then `None`.
    """

    def __init__(self, quick: nn.Module, exact: nn.Module, folded: int) -> None:
        """Hold both."""
        super().__init__()
        self.folded = folded
        self.layer = quick
        self.layout = torch.channels_last
        self.exact: nn.Module | None = exact

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the module makes of `x`, images or features of any shape."""
        if self.exact is not None and len(x):
            self._choose(self.exact, x[:_COMPARED].detach())
        return self._ask(x)

    @torch.no_grad()
    def _choose(self, exact: nn.Module, x: torch.Tensor) -> None:
        """Choose the fastest layer and layout that compute what `exact` does.

        Code that views memory may need channels first.
        """
        self.exact, quick = None, self.layer
        self._take(exact, torch.contiguous_format)
        wanted = self._ask(x)
        rounding = (
            _ROUNDING.get(wanted.dtype, _ROUNDING_OTHERWISE) * float(wanted.abs().max()) + 1e-6
        )
        for layout in (torch.channels_last, torch.contiguous_format):
            self._take(quick, layout)
            try:
                found = self._ask(x)
                if found.shape == wanted.shape and bool(((found - wanted).abs() <= rounding).all()):
                    return
            except Exception:  # noqa: S112 - of anybody's code: an attribute that is gone, a view that is none
                continue
        self._take(exact, torch.contiguous_format)

    def _take(self, layer: nn.Module, layout: torch.memory_format) -> None:
        self.layer, self.layout = layer, layout
        for weight in layer.parameters():
            weight.data = _laid_out(weight.data, layout)

    def _ask(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(_laid_out(x, self.layout))
        return result


def _laid_out(x: torch.Tensor, layout: torch.memory_format) -> torch.Tensor:
    """Tensors of four dimensions as they are wanted in memory, others as PyTorch makes them."""
    if x.dim() == 4 and layout is torch.channels_last:
        return x.contiguous(memory_format=layout)
    # One channel lies in memory both ways, but its strides say which.
    return x.contiguous().flatten().view(x.shape)


class _Tracer(torch.fx.Tracer):
    """Follows the data through a network's code; what has no modules in it is one step."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one step."""
        return super().is_leaf_module(m, module_qualified_name) or not any(m.children())


def _norms_behind_convolutions(module: nn.Module) -> list[tuple[str, str]]:
    """Find convolutions whose result goes into a batch norm and nowhere else.

    None are found in code that cannot be traced, such as code that looks at the numbers.

    Returns:
        The names of each such convolution and of its batch norm.
    """
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    # Code that keeps what it computes would keep the tracer's proxies, so a copy is traced.
    followed = copy.deepcopy(module, shared)
    try:
        given = list(inspect.signature(module.forward).parameters.values())[1:]
        defaults = {
            each.name: each.default for each in given if each.default is not inspect.Parameter.empty
        }
        graph = _Tracer().trace(followed, defaults or None)
    except Exception:  # of anybody's code
        return []
    layers = dict(followed.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    touched = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    found = []
    for node in graph.nodes:
        before = (
            node.args[0]
            if node.op == "call_module" and len(node.args) == 1 and not node.kwargs
            else None
        )
        if (
            not isinstance(before, torch.fx.Node)
            or before.op != "call_module"
            or len(before.users) > 1
        ):
            continue
        convolution, norm = str(before.target), str(node.target)
        plain = is_plain(layers[convolution], nn.Conv2d) and is_plain(layers[norm], nn.BatchNorm2d)
        once = calls[convolution] == calls[norm] == 1 and not touched & {convolution, norm}
        if plain and once and layers[norm].running_mean is not None:
            found.append((convolution, norm))
    return found


def _fold(network: nn.Module, convolution: str, norm: str) -> None:
    """Put a batch norm into the convolution before it."""
    before, after = network.get_submodule(convolution), network.get_submodule(norm)
    assert isinstance(before, nn.Conv2d)
    assert isinstance(after, nn.BatchNorm2d)
    scale, shift = constant_map(after)
    fold_into(before, scale, shift)
    network.set_submodule(norm, nn.Identity())


def constant_map(norm: nn.BatchNorm2d | nn.BatchNorm1d) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift `(channels,)` of a batch norm in evaluation mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
    return scale, (0 if norm.bias is None else norm.bias) - norm.running_mean * scale


def fold_into(layer: nn.Conv2d | nn.Linear, scale: torch.Tensor, shift: torch.Tensor) -> None:
    """Let a layer compute `scale` times its result plus `shift`, `(filters,)` or `(1,)` each."""
    bias = 0 if layer.bias is None else layer.bias * scale
    layer.weight = nn.Parameter(layer.weight * scale.view(-1, *(1,) * (layer.weight.dim() - 1)))
    layer.bias = nn.Parameter(bias + shift.expand(len(layer.weight)))
