"""A network as it is trained on a CPU: the same parameters, faster layers."""

import torch
from torch import nn

from countermark.fast.pooling import Pool, block_filters, pooled, pooled_blocks, suits_blocks
from countermark.fast.sequence import flat_layers, is_plain, join_pools
from countermark.fast.spectral import SpectralConv2d


def quick_to_train(network: nn.Module) -> nn.Module:
    """Put faster layers where PyTorch's are slow on a CPU.

    Args:
        network: plain layers in nested `nn.Sequential`; anything else is returned as it is.

    Returns:
        A network of the same parameters, buffers and submodules that computes the same within
        rounding, in training too; `network` itself if nothing is gained.
    """
    layers = join_pools(flat_layers(network))
    done: list[nn.Module] = []
    rest = layers[::-1]
    while rest:
        layer = rest.pop()
        if isinstance(layer, nn.Conv2d) and is_plain(layer, nn.Conv2d):
            pool = rest[-1] if rest else None
            if isinstance(pool, Pool) and suits_blocks(layer):
                done.append(_Blocks(layer, pool.relu))
                rest.pop()
                continue
            if SpectralConv2d.suits(layer):
                layer = SpectralConv2d(layer.weight, layer.bias)
        done.append(layer)
    return (
        network
        if not any(isinstance(layer, Pool | SpectralConv2d | _Blocks) for layer in done)
        else nn.Sequential(*done)
    )


class _Blocks(nn.Module):
    """A convolution of few channels, max-pooling by two and a ReLU, on blocks of pixels."""

    def __init__(self, layer: nn.Conv2d, relu: bool) -> None:
        super().__init__()
        self.layer, self.relu = layer, relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer, padding = self.layer, int(self.layer.padding[0])
        kernel = layer.kernel_size[0]
        if any((side + 2 * padding - kernel + 1) % 2 for side in x.shape[2:]):
            return pooled(layer(x), self.relu)
        bias = layer.weight.new_zeros(layer.out_channels) if layer.bias is None else layer.bias
        return pooled_blocks(
            x, kernel, padding, 0.0, block_filters(layer.weight), bias.repeat(4), self.relu
        )
