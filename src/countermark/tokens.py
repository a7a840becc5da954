"""What a token is, of whichever kind: somebody's word that some bytes existed at a time.

It also serves as randomness: it has a beacon that nobody could foresee before.
"""

from dataclasses import dataclass
from datetime import datetime

from countermark.errors import CountermarkError

TOKEN_LIMIT = 1 << 16
"""Largest token that is read, in bytes."""


class TokenError(CountermarkError):
    """Bytes that are no readable token, or a token of something else.

    The fault lies with whoever shows them.
    """


class UntrustedError(TokenError):
    """A token that no authority under the given roots signed while its certificate was valid."""


@dataclass(frozen=True)
class Token:
    """What an authority said.

    Attributes:
        response: the authority's whole response, DER.
        time: when the authority signed, by its own clock (UTC).
        beacon: the bytes that nobody else could foresee and nobody can change afterwards: the
            signature, or only the r of an ECDSA signature (whose s has two valid values).
    """

    response: bytes
    time: datetime
    beacon: bytes
