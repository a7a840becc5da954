"""Networks made quicker, with the same numbers within rounding: copies for attacks, and layers for training.

`prepare` (prepared.py) copies a network for attacks, with all that is constant computed once;
inside.py does that to networks which compute by code of their own. `quick_to_train` (training.py)
puts quicker layers into a network that is trained on a processor. The layers are in pooling.py and
spectral.py, and sequence.py says which networks may be taken apart.
"""

from countermark.fast.pooling import Pool
from countermark.fast.prepared import (
    Affine,
    PooledConv2d,
    Prepared,
    ShiftedConv2d,
    dtype_of,
    flattens,
    prepare,
    worth_preparing,
)
from countermark.fast.sequence import is_plain
from countermark.fast.spectral import SpectralConv2d
from countermark.fast.training import quick_to_train

__all__ = [
    "Affine",
    "Pool",
    "PooledConv2d",
    "Prepared",
    "ShiftedConv2d",
    "SpectralConv2d",
    "dtype_of",
    "flattens",
    "is_plain",
    "prepare",
    "quick_to_train",
    "worth_preparing",
]
