"""Clients who sign: their openings, their requests in order, and the owner's receipts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from countermark.errors import CountermarkError
from countermark.files import read_bytes
from countermark.guard import Guard, QueryLog, guard_sha256, read_guard_record
from countermark.guard.requests import (
    ConflictError,
    Opening,
    SignedRequest,
    image_hashes,
    read_opening,
    request_of,
    sign_receipt,
    terms_of,
)
from countermark.guard.sqlite import LARGEST
from countermark.service.clients import Client
from countermark.service.tensors import BESIDES, RefusedError
from countermark.watermarks import public_key


class Signing:
    """What a guarded service does for clients who sign.

    Attributes:
        most: bytes of pixels that a signed request may have, all of which the log keeps.
    """

    most = LARGEST - BESIDES

    def __init__(self, guard: Guard, log: QueryLog, folder: Path, key: Path) -> None:
        """Prepare; nothing is read of the log yet.

        Args:
            guard: the guard, under the log's identity.
            log: the query log.
            folder: the model folder, for its guard's configuration.
            key: the owner's key folder, for the key that receipts are signed with.

        Raises:
            CountermarkError: one of the two cannot be read.
        """
        self._guard, self._log = guard, log
        self._digest = guard_sha256(read_guard_record(folder))
        self._key = read_bytes(key / "signing-key", 32)
        self._owner = public_key(self._key)
        self._openings: dict[str, Opening] = {}  # of accounts that have asked

    def state(self, client: Client) -> dict[str, Any]:
        """Tell a client what an opening is about, and which requests of theirs the log has.

        Raises:
            RefusedError: the account has no public key.
            CountermarkError: the log cannot be read.
        """
        if client.public_key is None:
            raise RefusedError(
                400, "this account has no public key, so its requests are not signed"
            )
        terms, found = self._terms(client), self._opening(client)
        number, digest = (0, b"") if found is None else self._log.last_request(found)
        return {
            "terms": terms,
            "opening": None if found is None else found.record(),
            "number": number,
            "digest": digest.hex(),
        }

    def begin(self, client: Client, record: object) -> dict[str, Any]:
        """Store a client's opening, and tell what `state` tells.

        Raises:
            RefusedError: it is none, not of these terms, or not signed with the account's key.
            ConflictError: the account has another one of the same terms.
            CountermarkError: the log cannot be written.
        """
        try:
            opening = read_opening(record)
        except CountermarkError as error:
            raise RefusedError(400, str(error)) from error
        if opening.terms != self._terms(client):
            raise RefusedError(409, "the opening is of other terms than the service has now")
        if opening.client != client.public_key or not opening.is_signed:
            raise RefusedError(401, "the opening is not signed with the key of this account")
        self._log.begin_requests(opening)
        return self.state(client)

    def request(
        self, client: Client, headers: Mapping[str, str], images: torch.Tensor
    ) -> SignedRequest:
        """Read what a client signed of a request; the log checks its place among others.

        Args:
            client: who asks.
            headers: of the request.
            images: its images, uint8 `(n, c, h, w)`.

        Raises:
            RefusedError: the signature is missing or does not fit.
            ConflictError: it is not of the account's opening.
            CountermarkError: the log cannot be read.
        """
        signed = request_of(headers, image_hashes(images))
        if signed is None or not signed.is_signed(client.public_key or ""):
            raise RefusedError(
                401,
                "this account signs its requests (Countermark-Opening, -Number, -Previous and "
                "-Signature); the headers are missing or do not fit the images",
            )
        if images.numel() > self.most:
            raise RefusedError(413, f"a signed request has at most {self.most} values of pixels")
        opening = self._openings.get(client.name)
        if opening is None or opening.digest != signed.opening:
            opening = self._opening(client)
        if opening is None or opening.digest != signed.opening:
            raise ConflictError("the requests of this account have another opening now; open again")
        self._openings[client.name] = opening
        return signed

    def receipt(self, signed: SignedRequest, labels: list[int]) -> str:
        """Sign what a request was answered with; hexadecimal."""
        return sign_receipt(self._key, signed.digest, labels).hex()

    def _terms(self, client: Client) -> dict[str, str]:
        return terms_of(self._guard, client.name, self._digest, self._owner)

    def _opening(self, client: Client) -> Opening | None:
        terms = self._terms(client)
        fitting = (each for each in self._log.openings(client.name) if each.terms == terms)
        return next(fitting, None)
