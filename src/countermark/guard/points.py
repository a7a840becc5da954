"""Public keys of Ed25519 that are nobody's: points of small order.

No private key belongs to one, and none is needed: one signature fits every eighth message or more,
whoever made it. So what such a key "signs" binds nobody.
"""

_P = (1 << 255) - 19
_EIGHTH = 0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7
_HEIGHTS = frozenset({0, 1, _P - 1, _EIGHTH, _P - _EIGHTH})
"""y of the eight points whose order divides 8; -x has the same y as x."""


def is_of_small_order(public_key: str) -> bool:
    """Tell whether a public key is a point of small order, however it is spelt.

    A verifier that is lenient reads y modulo p, and takes either sign of x = 0. So y counts here,
    modulo p, and the sign of x does not.

    Args:
        public_key: 32 bytes in hexadecimal.

    Example:
        >>> is_of_small_order("01" + "00" * 31), is_of_small_order("02" + "00" * 31)
        (True, False)
    """
    number = int.from_bytes(bytes.fromhex(public_key), "little")
    return number % (1 << 255) % _P in _HEIGHTS
