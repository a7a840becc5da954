"""Public randomness by drand: rounds that nobody could foresee, and nobody can choose.

Many parties sign the number of each round together. The signature of a round exists once
(BLS on the curve BLS12-381), is out at a known time, and can be checked by everybody who knows the
public key of the chain.
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from countermark.errors import CountermarkError
from countermark.files import JSON_LIMIT
from countermark.text import brief

SCHEME = "bls-unchained-g1-rfc9380"
"""The only kind of chain that is read: signatures are of the round's number alone."""

_DOMAIN = b"BLS_SIG_BLS12381G1_XMD:SHA-256_SSWU_RO_NUL_"


@dataclass(frozen=True)
class Chain:
    """A chain of rounds.

    Attributes:
        address: where its rounds are asked for, http or https.
        digest: what drand calls the chain, 64 hexadecimal digits.
        public_key: 96 bytes, hexadecimal.
        genesis: time of the first round, seconds since 1970.
        period: seconds from one round to the next.
    """

    address: str
    digest: str
    public_key: str
    genesis: int
    period: int

    def round_after(self, time: int) -> int:
        """Number of the first round at `time` (seconds since 1970) or later."""
        return max(1, -((self.genesis - time) // self.period) + 1)

    def time_of(self, number: int) -> int:
        """When a round is out, seconds since 1970."""
        return self.genesis + (number - 1) * self.period

    def is_round(self, number: int, signature: bytes) -> bool:
        """Whether a signature is the chain's of a round.

        Raises:
            CountermarkError: the library that computes on the curve is missing.
        """
        try:
            with limit_kept():
                from py_ecc.bls.g2_primitives import pubkey_to_G1, signature_to_G2, subgroup_check
                from py_ecc.bls.hash_to_curve import hash_to_G1
                from py_ecc.optimized_bls12_381 import FQ12, G2, final_exponentiate, neg, pairing
        except ImportError as error:
            raise CountermarkError(
                "registrations need: pip install 'countermark[judge]'"
            ) from error
        message = hashlib.sha256(number.to_bytes(8, "big")).digest()
        try:
            # The library calls points of G1 public keys; here they are the signatures.
            point = pubkey_to_G1(signature)
            key = signature_to_G2(bytes.fromhex(self.public_key))
            if not (subgroup_check(point) and subgroup_check(key)):
                return False
            hashed = hash_to_G1(message, _DOMAIN, hashlib.sha256)
            given = pairing(G2, point, final_exponentiate=False)
            wanted = pairing(key, neg(hashed), final_exponentiate=False)
            return bool(final_exponentiate(given * wanted) == FQ12.one())
        except (ValueError, AssertionError):  # the library's words for bytes that are no point
            return False

    def fetch(self, number: int) -> bytes:
        """The signature of a round that is out, checked.

        Raises:
            CountermarkError: it is not given, or is another one.
        """
        from countermark.session import fetch

        url = f"{self.address}/{self.digest}/public/{number}"
        found = fetch(url, "the beacon", limit=JSON_LIMIT)
        try:
            signature = bytes.fromhex(json.loads(found)["signature"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise CountermarkError(
                f"the beacon {url} answers with something else than a round; check its address"
            ) from error
        if not self.is_round(number, signature):
            raise CountermarkError(
                f"what the beacon {url} gives as round {brief(number)} is not signed by its chain; "
                "check the address and the public key"
            )
        return signature


QUICKNET = Chain(
    address="https://api.drand.sh",
    digest="52db9ba70e0cc0f6eaf7803dd07447a1f5477735fd3f661792ba94600c84e971",
    public_key="83cf0f2896adee7eb8b5f01fcad3912212c437e0073e911fb90022d3e760183c"
    "8c4b450b6a0a6c3ac6a5776a2d1064510d1fec758c921cc22b0e17e63aaf4bcb"
    "5ed66304de9cf809bd274ca73bab4af5a6e9c76a4bc09e76eae8991ef5ece45a",
    genesis=1692803367,
    period=3,
)
"""The chain "quicknet" of the League of Entropy."""


@contextlib.contextmanager
def limit_kept() -> Iterator[None]:
    """Put Python's limit of recursion back, which importing `py_ecc` lifts.

    Hostile JSON that is nested deeply could end a process that has no such limit.
    """
    limit = sys.getrecursionlimit()
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)
