"""Clients who sign: their openings, their requests in order, and the owner's receipts."""

import contextlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from countermark.errors import CountermarkError
from countermark.guard import TOLERANCE, GuardedModel, QueryLog, guard_sha256, read_guard_record
from countermark.guard.requests import (
    MOST_LOST,
    ConflictError,
    Opening,
    SignedRequest,
    classes_sha256,
    image_hashes,
    network_sha256,
    read_opening,
    request_of,
    sign_receipt,
    terms_of,
)
from countermark.guard.sqlite import LARGEST
from countermark.networks import NETWORKS, describe
from countermark.service.clients import Client
from countermark.service.engine import BusyError
from countermark.service.tensors import BESIDES, RefusedError
from countermark.watermarks import load_signing_key, public_key


class Signing:
    """What a guarded service does for clients who sign.

    Attributes:
        most: bytes of pixels that a signed request may have, all of which the log keeps.
    """

    most = LARGEST - BESIDES

    def __init__(self, model: GuardedModel, log: QueryLog, folder: Path, key: Path) -> None:
        """Prepare; the owner's signing key is read once a client signs.

        Args:
            model: the guarded model, under the log's identity.
            log: the query log.
            folder: the model folder, for the configuration of its guard and its network.
            key: the owner's key folder, for the key that receipts are signed with.

        Raises:
            CountermarkError: the model folder cannot be read.
        """
        self._guard, self._log, self._folder = model.guard, log, key
        self._exact = model.tolerance <= TOLERANCE
        self._digest = guard_sha256(read_guard_record(folder))
        about = describe(folder)
        self._network = network_sha256(about.network, about.shape)
        self._classes = classes_sha256(about.class_names)
        self._built_in = about.network in NETWORKS
        self._key = b""
        self._openings: dict[str, Opening] = {}  # of accounts that have asked
        self._lock = threading.Lock()
        self._asking: set[str] = set()

    def state(self, client: Client) -> dict[str, Any]:
        """Tell a client what an opening is about, and which requests of theirs the log has.

        Raises:
            RefusedError: the account has no public key, or the log no identity.
            CountermarkError: the log cannot be read.
        """
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
            RefusedError: it is none, not of these terms, not signed with the account's key, or
                counts more openings before it than the log can have lost.
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
        known = self._log.openings(client.name)
        if opening not in known and opening.earlier > len(known) + MOST_LOST:
            raise RefusedError(
                409,
                f"the opening counts {opening.earlier} before it, of which the query log has "
                f"{len(known)}, and at most {MOST_LOST} may be missing; ask the owner for another "
                "account, and begin a new state for it",
            )
        self._log.begin_requests(opening)
        return self.state(client)

    @contextlib.contextmanager
    def turn(self, client: Client) -> Iterator[None]:
        """Let a client who signs ask one request after the other.

        Raises:
            BusyError: their last request is not answered yet.
        """
        with self._lock:
            if client.name in self._asking:
                raise BusyError("the last request of this account is not answered yet")
            self._asking.add(client.name)
        try:
            yield
        finally:
            with self._lock:
                self._asking.discard(client.name)

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
        if opening is None or (opening.digest, opening.client) != (
            signed.opening,
            client.public_key,
        ):
            opening = self._opening(client)
        if opening is None or opening.digest != signed.opening:
            raise ConflictError("the requests of this account have another opening now; open again")
        self._openings[client.name] = opening
        return signed

    def receipt(self, signed: SignedRequest, labels: list[int]) -> str:
        """Sign what a request was answered with; hexadecimal."""
        return sign_receipt(self._owners_key(), signed.digest, labels).hex()

    def _owners_key(self) -> bytes:
        self._key = self._key or load_signing_key(self._folder)
        return self._key

    def _terms(self, client: Client) -> dict[str, str]:
        if client.public_key is None:
            raise RefusedError(400, "this account has no public key, so its requests are unsigned")
        if not self._guard.log:
            raise RefusedError(
                409,
                "the query log is of an earlier release and has no identity, which coins of signed "
                "requests need; its owner runs countermark log renew",
            )
        if not self._built_in:
            raise RefusedError(
                409,
                "clients can sign only where Countermark builds the model's network: no judge "
                "knows what code of the owner's computed",
            )
        if not self._exact:
            raise RefusedError(
                409,
                "clients can sign only where the model computes on a processor (--device cpu): no "
                "judge could compute the same answers again",
            )
        return terms_of(
            self._guard,
            client.name,
            network_sha256=self._network,
            classes_sha256=self._classes,
            guard_sha256=self._digest,
            owner=public_key(self._owners_key()),
        )

    def _opening(self, client: Client) -> Opening | None:
        """The client's opening of the present terms, if it is signed with their present key."""
        terms = self._terms(client)
        return next(
            (
                each
                for each in self._log.openings(client.name)
                if each.terms == terms and each.client == client.public_key
            ),
            None,
        )
