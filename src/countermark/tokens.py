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
    """A token that nobody who is trusted vouches for: no authority, and no public log."""


@dataclass(frozen=True)
class Token:
    """What an authority said, or a public log.

    Attributes:
        response: the authority's whole response, DER; or the whole registration, JSON.
        time: when the authority signed or the log took the entry, by its own clock (UTC).
        beacon: the bytes that nobody else could foresee and nobody can change afterwards: the
            signature, or only the r of an ECDSA signature (whose s has two valid values); of a
            registration the signature of the round.
    """

    response: bytes
    time: datetime
    beacon: bytes
