"""Layers that give the numbers of PyTorch's own and take less of a processor's time: what attacks and training put in their place.

`SpectralConv2d` computes a convolution of wide filters by frequencies; `pooling` joins max-pooling with what stands around it.
"""

from countermark.layers.pooling import Pool, block_filters, by_two, pooled, pooled_blocks
from countermark.layers.spectral import SpectralConv2d

__all__ = ["Pool", "SpectralConv2d", "block_filters", "by_two", "pooled", "pooled_blocks"]
