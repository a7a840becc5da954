"""Our networks in PyTorch's own layers, as somebody has them who uses none of ours."""

import copy

from torch import nn

from countermark.networks.named import HalvingConv2d


def stock(network: nn.Module) -> nn.Module:
    """Return a copy with the same weights and plain `nn.Conv2d` layers instead of our own."""
    network = copy.deepcopy(network)
    for name, layer in list(network.named_children()):
        if isinstance(layer, HalvingConv2d):
            kernel = layer.kernel_size[0]
            plain = nn.Conv2d(
                layer.in_channels, layer.out_channels, kernel, stride=2, padding=kernel // 2 - 1
            )
            plain.weight, plain.bias = layer.weight, layer.bias
            setattr(network, name, plain)
        elif isinstance(layer, nn.Sequential):
            setattr(network, name, stock(layer))
    return network
