"""Networks as lists of layers: what may be taken apart, and max-pooling joined with its ReLU."""

from torch import nn

from countermark.layers.pooling import Pool, by_two


def flat_layers(network: nn.Module) -> list[nn.Module]:
    """The layers of nested `nn.Sequential` in order, one that stands in several places once for each; anything else is one layer."""
    if not isinstance(network, nn.Sequential) or not is_plain(network, nn.Sequential):
        return [network]
    return [layer for child in network for layer in flat_layers(child)]  # `children()` would leave out what comes again


def is_plain(layer: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a layer is of one of these very classes and nothing hangs on it: a subclass or a hook may compute anything."""
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    return type(layer) in kinds and not any(hooks)


def join_pools(layers: list[nn.Module]) -> list[nn.Module]:
    """Make max-pooling by two, with a ReLU before or after it, one layer."""
    done: list[nn.Module] = []
    for layer in layers:
        before = done[-1] if done else None
        if isinstance(layer, nn.MaxPool2d) and is_plain(layer, nn.MaxPool2d) and by_two(layer):
            relu = before is not None and is_plain(before, nn.ReLU)
            done[len(done) - relu :] = [Pool(relu)]
        elif isinstance(before, Pool) and is_plain(layer, nn.ReLU):
            before.relu = True
        else:
            done.append(layer)
    return done
