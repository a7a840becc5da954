"""What a client who signs keeps: their openings, where their requests stand, and the receipts.

It is the client's own evidence. No two requests may be signed with one number, since the owner
could choose between them later. So a request is stored here before it is sent, and one that got no
answer is sent again, the same, before anything else.
"""

import base64
import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from countermark.data.images import Array
from countermark.errors import CountermarkError
from countermark.files import locked, make_private_folder, read_json, write_json
from countermark.guard.requests import (
    NOTHING_BEFORE,
    Opening,
    SignedRequest,
    is_receipt,
    open_requests,
    read_opening,
    sign_request,
)

STATE_FORMAT = "countermark client 1"
RECEIPTS = "receipts.jsonl"
"""The file of openings and receipts, one JSON object a line, with empty lines between."""
_NAME = "state.json"
_LIMIT = 1 << 25
_PRIVATE = 0o600


@dataclass(frozen=True)
class _Stand:
    """Where the requests of an opening stand.

    Attributes:
        opening: the opening.
        number: of the last request that was answered.
        digest: of that request.
        waiting: images of the request after it, if it was signed, uint8 `(n, c, h, w)`.
    """

    opening: Opening
    number: int
    digest: bytes
    waiting: Array | None = None

    def signed(self, private_key: bytes) -> SignedRequest:
        """Sign the request that waits; the same again gives the same signature."""
        assert self.waiting is not None
        images = torch.from_numpy(self.waiting)
        return sign_request(private_key, self.opening.digest, self.number + 1, self.digest, images)


class State:
    """A folder of one account's, for one process at a time."""

    def __init__(self, folder: Path, private_key: bytes) -> None:
        """Open the folder, or make it.

        Raises:
            CountermarkError: it cannot be made, or what it holds is damaged.
        """
        make_private_folder(folder)
        self._folder, self._key = folder, private_key
        self._stand = self._read()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Be alone with the folder, and know what others did."""
        with locked(self._folder, wait=True):
            self._stand = self._read()
            yield

    def opening(self, told: dict[str, Any]) -> Opening | None:
        """Check what the service says of the account; an opening if there must be a new one.

        Args:
            told: the service's terms, and which requests its log has.

        Raises:
            CountermarkError: the service's log lacks requests that it answered, or has some that
                are not in this folder.
        """
        terms, stand = told["terms"], self._stand
        if stand is None or stand.opening.terms != terms:
            if told["opening"] is not None:
                raise CountermarkError(
                    "the account has signed requests with another state than "
                    f"{self._folder}; name that one, or ask the owner for another account"
                )
            return open_requests(
                self._key, terms, 0 if stand is None else stand.opening.earlier + 1
            )
        there = read_opening(told["opening"]).digest if told["opening"] is not None else None
        number, digest = told["number"], told["digest"]
        ends = {(stand.number, stand.digest.hex())}
        if stand.waiting is not None:
            ends.add((stand.number + 1, stand.signed(self._key).digest.hex()))
        if (there, stand.number) == (None, 0):
            return stand.opening  # it was stored here, and did not arrive
        if there != stand.opening.digest or (number, digest) not in ends:
            raise CountermarkError(
                f"the service has other requests of this account than {self._folder}, which has "
                f"{stand.number}; its log was restored from a backup, or the state was: tell the "
                "owner, who runs countermark log renew"
            )
        return None

    def begin(self, opening: Opening) -> None:
        """Remember an opening, before it is sent."""
        if self._stand is not None and self._stand.opening == opening:
            return
        self._note({"opening": opening.record()})
        self._write(_Stand(opening, 0, NOTHING_BEFORE))

    @property
    def waiting(self) -> Array | None:
        """Images of a request that got no answer, uint8 `(n, c, h, w)`."""
        return None if self._stand is None else self._stand.waiting

    def sign(self, images: Array) -> SignedRequest:
        """Sign the next request, or that which waits, and remember it.

        Args:
            images: uint8 `(n, c, h, w)`; those of the request that waits, if there is one.
        """
        assert self._stand is not None
        stand = self._stand
        if stand.waiting is None:
            self._write(_Stand(stand.opening, stand.number, stand.digest, images))
        assert self._stand is not None
        return self._stand.signed(self._key)

    def answered(self, signed: SignedRequest, labels: Sequence[int], receipt: str) -> None:
        """Keep the receipt of the request that was sent.

        Raises:
            CountermarkError: the owner did not sign these labels; the request still waits.
        """
        assert self._stand is not None
        opening = self._stand.opening
        try:
            signature = bytes.fromhex(receipt)
        except ValueError:
            signature = b""
        if not is_receipt(opening.terms["owner"], signed.digest, labels, signature):
            raise CountermarkError(
                "the service answered without a receipt that its owner signed; do not go on with it"
            )
        self._note(
            {
                "opening_sha256": opening.digest.hex(),
                "number": signed.number,
                "request_sha256": signed.digest.hex(),
                "labels": list(labels),
                "receipt": receipt,
            }
        )
        self._write(_Stand(opening, signed.number, signed.digest))

    def _note(self, record: dict[str, Any]) -> None:
        """Add a line that is there after any crash; it begins with an end of what was torn."""
        path = self._folder / RECEIPTS
        try:
            with path.open("ab") as stream:
                stream.write(f"\n{json.dumps(record)}\n".encode())
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise CountermarkError(
                f"cannot write {path}: {error.strerror}; make room, and ask again: the request is "
                "sent once more"
            ) from error

    def _read(self) -> _Stand | None:
        path = self._folder / _NAME
        if not path.exists():
            return None
        record = read_json(path, _LIMIT)
        try:
            if record["format"] != STATE_FORMAT:
                raise ValueError
            waiting = record["waiting"]
            images = (
                waiting
                and np.frombuffer(base64.b64decode(waiting["images"]), dtype=np.uint8)
                .reshape(waiting["shape"])
                .copy()
            )
            digest = bytes.fromhex(record["digest"])
            return _Stand(read_opening(record["opening"]), int(record["number"]), digest, images)
        except (CountermarkError, LookupError, TypeError, ValueError) as error:
            raise CountermarkError(
                f"{path} is damaged; restore it from a backup, or ask the owner for another account"
            ) from error

    def _write(self, stand: _Stand) -> None:
        images = stand.waiting
        waiting = (
            None
            if images is None
            else {"shape": images.shape, "images": base64.b64encode(images.tobytes()).decode()}
        )
        record = {
            "format": STATE_FORMAT,
            "opening": stand.opening.record(),
            "number": stand.number,
            "digest": stand.digest.hex(),
            "waiting": waiting,
        }
        write_json(self._folder / _NAME, record, _PRIVATE, _LIMIT)
        self._stand = stand
