"""A claim of an answer mark as a folder: all that one account signed, for a judge to compute anew.

It holds the account's opening, the requests under it from the first one on with their images, the
two secrets that the opening names by their digests, and the owner's model with its guard. No row of
the query log is needed: which queries were trials, and what their coins chose, follows from the
rest.

A claim ends with the last request that fits (`REQUESTS_LIMIT`). Sizes alone say which one that is,
and no coin does; and the evidence is an e-process, which may end there.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from countermark.claims.record import copy_model, is_hex, owners_network
from countermark.errors import CountermarkError
from countermark.evidence import Verdict, decide
from countermark.files import (
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from countermark.guard import (
    TOLERANCE,
    Book,
    Cells,
    FeatureReader,
    guard_sha256,
    read_guard,
    read_guard_record,
)
from countermark.guard.core import SEED, coin, signed_key
from countermark.guard.requests import (
    NOTHING_BEFORE,
    Opening,
    SignedRequest,
    classes_sha256,
    image_hashes,
    network_sha256,
    read_opening,
)
from countermark.networks import describe
from countermark.places import Network

ACCOUNT_FORMAT = "countermark account 1"
ACCUSATION_FORMAT = "countermark accusation 1"
MOST_ACCOUNTS = 1 << 40
REQUESTS_LIMIT = 1 << 33
"""Bytes of the requests of a claim: their images, and `REQUEST_BYTES` for each."""
REQUEST_BYTES = 8
"""Bytes of a request's number of images."""

_FIELDS = {
    "opening": dict,
    "last_signature": str,
    "accusation": dict,
    "accusation_signature": str,
    "coins": str,
    "cells": str,
    "place": int,
}


@dataclass(frozen=True)
class AccountClaim:
    """A claim against an account, as it was read.

    Attributes:
        opening: what the client signed first.
        counts: int64 `(r,)`, the number of images of each request, from the first one on.
        x: uint8 `(n, c, h, w)`, the images of these requests.
        last_signature: the client's, of the last one.
        coins: what the account's coins come from, 32 bytes.
        cells: what the cells come from, 64 bytes.
        place: the account's place in the order of a trace, from 1, by the owner's word.
        accusation: the suspect, and the last request, signed by the owner.
        accusation_signature: hexadecimal.
        model: folder of the owner's model and its guard.
    """

    opening: Opening
    counts: torch.Tensor
    x: torch.Tensor
    last_signature: bytes
    coins: bytes
    cells: bytes
    place: int
    accusation: Mapping[str, Any]
    accusation_signature: str
    model: Path

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an image, `(c, h, w)`."""
        return tuple(self.x.shape[1:])

    def network(
        self, network: Network | None = None, option: str = "--owner-network"
    ) -> tuple[nn.Module, str]:
        """Return the owner's model and the SHA-256 of its weights; see `Claim.network`."""
        return owners_network(self.model, self.shape, network, option)

    def requests(self) -> list[SignedRequest]:
        """Return all requests; the last one has its signature, which covers the others."""
        found: list[SignedRequest] = []
        for part in torch.split(self.x, self.counts.tolist()):
            before = found[-1].digest if found else NOTHING_BEFORE
            hashes, number = tuple(image_hashes(part)), len(found) + 1
            found.append(
                SignedRequest(self.opening.digest, number, before, hashes, self.last_signature)
            )
        return found


@dataclass(frozen=True)
class AskedTrial:
    """A first query of a cell, as it follows from the requests.

    Attributes:
        image: its place among all images of the requests.
        heads: the smaller of the two classes.
        tails: the larger of the two classes.
        chance: probability of tails, in 65536ths.
        coin: 0 for heads, 1 for tails.
    """

    image: int
    heads: int
    tails: int
    chance: int
    coin: int

    @property
    def answer(self) -> int:
        """The class that the coin chose."""
        return (self.heads, self.tails)[self.coin]

    @property
    def other(self) -> int:
        """The class that it did not choose."""
        return (self.tails, self.heads)[self.coin]


UNSURE = -1
"""Stands for an answer that another processor may give otherwise."""


@dataclass(frozen=True)
class Drawn:
    """What follows from the requests of a claim.

    Attributes:
        trials: the first query of each cell, in order.
        answers: what the client must have been told of each image, `UNSURE` where computing it
            elsewhere may lead to another answer.
        first: for each image, the place at which the same one was asked first.
    """

    trials: list[AskedTrial]
    answers: list[int]
    first: list[int]


def first_queries(claim: AccountClaim, network: nn.Module) -> Drawn:
    """Find the trials of a claim, with the coins that they met, and all answers.

    A query that another machine might put into another cell is no trial, and neither is a later one
    of any cell that it may have been in: its client may have known the coin. An image that was
    asked again is computed once: it is in the cell that it was in before, and has the same answer.

    Raises:
        CountermarkError: the guard in the claim is damaged, or does not fit the network.
    """
    settings, read = read_guard(claim.model), FeatureReader(network.eval())
    _, features = read(claim.x[:1])
    if features.shape[1] != settings.features:
        raise CountermarkError(f"{claim.model}: its guard is of another model; it is damaged")
    cells, key = Cells(settings, claim.cells), signed_key(claim.coins, claim.opening.digest)
    met: set[bytes] = set()
    doubtful: set[bytes] = set()
    lengths: set[int] = set()  # of the beginnings in `doubtful`
    firsts: dict[bytes, int] = {}
    first = [firsts.setdefault(image, at) for at, image in enumerate(image_hashes(claim.x))]
    found: list[AskedTrial] = []
    answers: dict[int, int] = {}
    for part in torch.split(torch.tensor(list(firsts.values())), read.count(claim.x)):
        images, places = claim.x[part], part.tolist()
        logits, features = read(images)
        given = _sure_answers(logits)
        for question in cells.questions(logits, features, images, TOLERANCE):
            row = question.row
            if not question.sure:
                one = slice(row, row + 1)
                within = cells.possible(question, logits[one], features[one], TOLERANCE)
                doubtful.update(within)
                lengths.update(map(len, within))
                given[row] = UNSURE
                continue
            cell = question.cell
            fell = int(coin(key, cell) < question.chance)
            place = places[row]
            trial = AskedTrial(place, question.heads, question.tails, question.chance, fell)
            given[row] = trial.answer
            if cell not in met and not any(cell[:length] in doubtful for length in lengths):
                met.add(cell)
                found.append(trial)
        answers.update(zip(places, given, strict=True))
    return Drawn(found, [answers[place] for place in first], first)


def _sure_answers(logits: torch.Tensor) -> list[int]:
    """The highest class of each row, where it is the highest on any machine."""
    best = logits.double().topk(2, 1)
    slack = 2 * TOLERANCE * (1 + logits.double().abs().amax(1))
    sure = best.values[:, 0] - best.values[:, 1] > slack
    return torch.where(sure, best.indices[:, 0], UNSURE).tolist()


def images_of_trials(claim: AccountClaim, trials: list[AskedTrial]) -> torch.Tensor:
    """Return the images of some trials, uint8 `(n, c, h, w)`."""
    return claim.x[torch.tensor([trial.image for trial in trials], dtype=torch.int64)]


def account_evidence(
    trials: list[AskedTrial], labels: torch.Tensor, alpha: float, choices: int
) -> Verdict:
    """Test whether a suspect depends on the coins of an account.

    Args:
        trials: the account's, in order.
        labels: the suspect's labels of their images `(n,)`, -1 where there is none.
        alpha: the level.
        choices: what p is multiplied by.
    """
    book = Book()
    for trial, label in zip(trials, labels.tolist(), strict=True):
        book.enter(trial, label, bool(trial.coin))
    counts, factor = book.counts, math.log10(choices)
    p, smallest = (min(0.0, each.log10_p_value + factor) for each in (book.process, book.best))
    verdict = decide(p, smallest, math.log10(alpha))
    return Verdict(
        verdict, 10**p, p, counts[1], counts[-1], counts[0], len(trials), smallest, alpha
    )


def choices_of(claim: AccountClaim, ways: int = 1) -> int:
    """Return what the p-value of a claim is multiplied by.

    The level is divided among the accounts of a log, as for a trace, and among the openings of one
    account, in an order that was fixed before their coins: 1/(1 x 2) to the first, 1/(2 x 3) to the
    second, and so on.
    """
    openings, accounts = claim.opening.earlier + 1, claim.place + 1
    return openings * (openings + 1) * accounts * (accounts + 1) * ways


def commitment_faults_of(claim: AccountClaim, model_sha256: str) -> list[str]:
    """List what of a claim is not what its client's opening names."""
    terms = claim.opening.terms
    about = describe(claim.model)
    digests = {
        "model_sha256": ("the weights", model_sha256),
        "network_sha256": ("the network", network_sha256(about.network, about.shape)),
        "classes_sha256": ("the class names", classes_sha256(about.class_names)),
        "guard_sha256": ("the guard", guard_sha256(read_guard_record(claim.model))),
        "cells_sha256": ("the seeds of the cells", hashlib.sha256(claim.cells).hexdigest()),
        "coins_sha256": ("the secret of the coins", hashlib.sha256(claim.coins).hexdigest()),
    }
    return [
        f"{what} are not those of the opening"
        if what.endswith("s")
        else f"{what} is not that of the opening"
        for name, (what, digest) in digests.items()
        if terms[name] != digest
    ]


def accusation_of(
    claim: AccountClaim, requests: list[SignedRequest], suspect: Mapping[str, Any]
) -> dict[str, Any]:
    """Build what the owner signs: the suspect, and up to which request the account is claimed."""
    return {
        "format": ACCUSATION_FORMAT,
        "opening_sha256": claim.opening.digest.hex(),
        "requests": len(requests),
        "request_sha256": requests[-1].digest.hex(),
        "place": claim.place,
        "suspect": dict(suspect),
    }


def write_account_claim(folder: Path, claim: AccountClaim) -> None:
    """Write a claim into the existing folder `folder`, with copies of the owner's model files."""
    copy_model(claim.model, folder / "model", "guard.json")
    write_tensors(folder / "requests.safetensors", {"x": claim.x, "counts": claim.counts})
    record = {
        "format": ACCOUNT_FORMAT,
        "opening": claim.opening.record(),
        "last_signature": claim.last_signature.hex(),
        "accusation": dict(claim.accusation),
        "accusation_signature": claim.accusation_signature,
        "coins": claim.coins.hex(),
        "cells": claim.cells.hex(),
        "place": claim.place,
    }
    write_json(folder / "claim.json", record)


def is_account_claim(folder: Path) -> bool:
    """Tell whether a folder holds a claim against an account, and not one of a key's batch."""
    path = folder / "claim.json"
    return path.exists() and read_json(path).get("format") == ACCOUNT_FORMAT


def read_account_claim(folder: Path) -> AccountClaim:
    """Read a claim that may come from anybody.

    Raises:
        CountermarkError: a file is missing, too large, or of another form.
    """
    path = folder / "claim.json"
    record = read_json(path)
    fits = record.keys() == {"format", *_FIELDS} and all(
        type(record[name]) is kind for name, kind in _FIELDS.items()
    )
    if not (
        fits
        and record["format"] == ACCOUNT_FORMAT
        and is_hex(record["coins"], 32)
        and is_hex(record["cells"], 2 * SEED)
        and is_hex(record["last_signature"], 64)
        and 1 <= record["place"] < MOST_ACCOUNTS
        and isinstance(record["accusation"].get("suspect"), dict)
    ):
        raise CountermarkError(
            f"{path} lacks what a claim says, or says it in another form; it is damaged or not a "
            "file of Countermark"
        )
    try:
        opening = read_opening(record["opening"])
    except CountermarkError as error:
        raise CountermarkError(f"{path}: {error}; it is damaged") from error
    shape = describe(folder / "model").shape
    place = folder / "requests.safetensors"

    def check(tensors: Mapping[str, torch.Tensor]) -> None:
        kinds = {name: (tensor.dtype, tensor.dim()) for name, tensor in tensors.items()}
        if kinds != {"x": (torch.uint8, 4), "counts": (torch.int64, 1)}:
            raise CountermarkError(f"{place} does not hold the requests of a claim; it is damaged")
        if tuple(tensors["x"].shape[1:]) != tuple(shape):
            raise CountermarkError(f"{place} holds images of another shape than the model takes")

    tensors, _, _ = read_tensors(place, REQUESTS_LIMIT + (1 << 26), check)
    counts = tensors["counts"].tolist()
    if min(counts, default=0) < 1 or sum(counts) != len(tensors["x"]):
        raise CountermarkError(f"{place} does not hold whole requests; it is damaged")
    return AccountClaim(
        opening=opening,
        counts=tensors["counts"],
        x=tensors["x"],
        last_signature=bytes.fromhex(record["last_signature"]),
        coins=bytes.fromhex(record["coins"]),
        cells=bytes.fromhex(record["cells"]),
        place=record["place"],
        accusation=record["accusation"],
        accusation_signature=record["accusation_signature"],
        model=folder / "model",
    )
