"""Faster networks with the same numbers within rounding: copies to attack, and layers to train.

`prepare` (prepared.py) copies a network for attacks, with everything that is constant computed
once; inside.py does the same for networks that compute with their own code. `quick_to_train`
(training.py) puts faster layers into a network that is trained on a CPU. The layers are in
pooling.py and spectral.py, and sequence.py says which networks may be taken apart. recording.py
lets a GPU replay steps.
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
from countermark.fast.recording import Recorded, capturable, captured
from countermark.fast.sequence import is_plain
from countermark.fast.spectral import SpectralConv2d
from countermark.fast.training import quick_to_train

__all__ = [
    "Affine",
    "Pool",
    "PooledConv2d",
    "Prepared",
    "Recorded",
    "ShiftedConv2d",
    "SpectralConv2d",
    "capturable",
    "captured",
    "dtype_of",
    "flattens",
    "is_plain",
    "prepare",
    "quick_to_train",
    "worth_preparing",
]
