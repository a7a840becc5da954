"""The IDX format of MNIST: a magic number, big-endian dimensions, raw bytes."""

import struct

import numpy as np

from countermark.errors import CountermarkError

_UNSIGNED_BYTE = 0x08


def parse_idx(data: bytes, dimensions: int, origin: str) -> np.ndarray:
    """Parse an uncompressed IDX file of unsigned bytes.

    Args:
        data: the whole file.
        dimensions: the number of dimensions that it must have (3 for images, 1 for labels).
        origin: where the bytes came from, for the error.

    Raises:
        CountermarkError: the magic number is wrong, no array can have these sides, or the size
            differs from what the header promises.
    """
    header = 4 + 4 * dimensions
    magic = (_UNSIGNED_BYTE << 8) | dimensions
    if len(data) < header or struct.unpack(">I", data[:4])[0] != magic:
        raise CountermarkError(
            f"{origin} does not begin with the IDX magic number {magic:#010x}; it is not the file "
            "that was asked for"
        )
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    size = 1
    for extent in shape:
        size *= extent
    if len(data) - header != size:
        raise CountermarkError(
            f"{origin} holds {len(data) - header} bytes of data where its header promises {size}; "
            "it is truncated"
        )
    try:
        return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)
    except ValueError as error:  # an empty array whose sides are too large to address
        raise CountermarkError(
            f"{origin} promises {'x'.join(map(str, shape))} values; it is damaged"
        ) from error
