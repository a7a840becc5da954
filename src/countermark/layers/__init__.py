"""Layers that give the numbers of PyTorch's own and take less of a processor's time: what attacks and training put in their place.

`SpectralConv2d` computes a convolution of wide filters by frequencies; `pooling` joins max-pooling with what stands around it; `sequence`
says which networks may be taken apart. `hastened` puts them into a network that is trained; `attacks.prepare` also folds what is constant.
"""

from countermark.layers.hastened import hastened
from countermark.layers.pooling import FEW, Pool, block_filters, pooled, pooled_blocks, suits_blocks
from countermark.layers.sequence import flat_layers, is_plain, join_pools
from countermark.layers.spectral import SpectralConv2d

__all__ = [
    "FEW",
    "Pool",
    "SpectralConv2d",
    "block_filters",
    "flat_layers",
    "hastened",
    "is_plain",
    "join_pools",
    "pooled",
    "pooled_blocks",
    "suits_blocks",
]
