"""What `protect`, `guard`, `claim` and `log head` share: timestamps from an authority that was tried before the work begins."""

import secrets
from collections.abc import Callable
from pathlib import Path

from countermark.timestamps import load_roots, request_token

Stamp = Callable[[bytes], bytes]
"""Has a message timestamped; the authority's response."""


def timestamping(tsa: str | None, roots: str | Path | None, *, trial: bool = True) -> Stamp | None:
    """A stamp of the authority at the address `tsa`, checked against `roots` where they are given; none without an address.

    For a `trial` the authority is asked for a first token over random bytes, so that long work does not begin if it cannot end.

    Raises:
        CountermarkError: the authority does not answer, or not under these roots.
    """
    if tsa is None:
        return None
    trusted = [] if roots is None else load_roots(Path(roots))
    if trial:
        request_token(tsa, secrets.token_bytes(32), trusted)
    return lambda message: request_token(tsa, message, trusted).response
