"""Networks as lists of layers: what may be taken apart, and max-pooling joined with its ReLU."""

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from countermark.fast.pooling import Pool, by_two


def flat_layers(network: nn.Module) -> list[nn.Module]:
    """The layers of nested `nn.Sequential` in order; anything else is one layer.

    A layer that stands in several places is listed once for each of them.
    """
    if not isinstance(network, nn.Sequential) or not is_plain(network, nn.Sequential):
        return [network]
    # `children()` would leave out repeated layers.
    return [layer for child in network for layer in flat_layers(child)]


def is_plain(layer: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a layer is of exactly one of these classes and computes what that class does.

    A subclass (parametrisations make one), a hook, a method that was replaced on the instance (as
    accelerate and kernel libraries do) and weights of a tensor subclass (quantised ones) may
    compute anything, so none of them is plain.
    """
    if type(layer) not in kinds:
        return False
    hooks = (
        layer._forward_hooks,
        layer._forward_pre_hooks,
        layer._backward_hooks,
        layer._backward_pre_hooks,
    )
    replaced = any(callable(getattr(type(layer), name, None)) for name in vars(layer))
    tensors = (*layer._parameters.values(), *layer._buffers.values())
    subclassed = any(
        type(tensor) not in (torch.Tensor, nn.Parameter) for tensor in tensors if tensor is not None
    )
    return not (any(hooks) or any(_of_all_modules()) or replaced or subclassed)


def _of_all_modules() -> tuple[object, ...]:
    """The hooks that PyTorch runs around every module."""
    return (
        torch_module._global_forward_hooks,
        torch_module._global_forward_pre_hooks,
        torch_module._global_backward_hooks,
        torch_module._global_backward_pre_hooks,
    )


def join_pools(layers: list[nn.Module]) -> list[nn.Module]:
    """Make max-pooling by two, with a ReLU before or after it, one layer."""
    done: list[nn.Module] = []
    for layer in layers:
        before = done[-1] if done else None
        if isinstance(layer, nn.MaxPool2d) and is_plain(layer, nn.MaxPool2d) and by_two(layer):
            relu = before is not None and is_plain(before, nn.ReLU)
            done[len(done) - relu :] = [Pool(relu)]
        elif before is not None and is_plain(before, Pool) and is_plain(layer, nn.ReLU):
            done[-1] = Pool(relu=True)
        else:
            done.append(layer)
    return done
