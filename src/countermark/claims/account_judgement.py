"""The judgement of a claim against an account, from what its client signed.

The owner chooses whom they accuse and when to stop, and says which account of their log it is; no
judge can count the accounts of others. Nothing else here is the owner's to choose. The opening,
which the client signed with random bytes of their own, fixes the model, the cells and the coins;
the chain of signed requests fixes what was asked, and in which order. The judge computes the trials
anew and asks the suspect directly.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from countermark.claims.account import (
    UNSURE,
    AccountClaim,
    Drawn,
    account_evidence,
    accusation_of,
    choices_of,
    commitment_faults_of,
)
from countermark.claims.judgement import (
    FAILS,
    HOLDS,
    OPEN,
    Check,
    Judgement,
    is_accused,
    suspect_name,
    verdict_of,
)
from countermark.errors import CountermarkError
from countermark.evidence import JUDGE_ALPHA, Verdict
from countermark.files import read_bytes
from countermark.guard.requests import SignedRequest, is_receipt
from countermark.networks import NETWORKS, describe
from countermark.terminal import p_value
from countermark.text import brief
from countermark.watermarks import check_signature

_RECEIPTS_LIMIT = 1 << 36  # bytes, of which one line is read at a time
_LINE, _EACH_LABEL = 1 << 12, 16  # bytes of a receipt's line, and more for each label
_MOST_UNSURE = 0.02  # share of the images asked; a service on a processor has some 0.003
_OTHERWISE = (ValueError, TypeError, LookupError, OverflowError, RecursionError)

ACCOUNT_LIMITS = (
    "What is proven is that the suspect's answers depend on coins that only this account was told. "
    "That is not yet theft, and not who trained the suspect: the owner knows the same answers, and "
    "could have trained on them. That the suspect was in the client's hands before the owner "
    "could have made it must be known from elsewhere, and that the client's key is the accused's."
)
"""What a judgement of an answer mark does not say."""


@dataclass(frozen=True)
class Receipt:
    """What a service answered to a request, by its owner's signature.

    Attributes:
        request: digest of the request.
        number: its number.
        labels: the answers.
        signature: the owner's.
    """

    request: bytes
    number: int
    labels: tuple[int, ...]
    signature: bytes


@dataclass(frozen=True)
class AccountFinding:
    """What the judge has besides the claim.

    Attributes:
        drawn: the account's trials, and what it must have been told, as the judge computed them.
        labels: the suspect's labels of the trials' images `(n,)`, -1 where it gave none.
        suspect: what the judge asked (see `suspect_identity`).
        model_sha256: SHA-256 of the weights that the claim shows as the owner's.
        client_key: the public key that others tie to the accused, in hexadecimal; `None` if the
            judge knows of none.
        receipts: those that the accused shows; `None` if they show no file of them. A trial that
            was answered otherwise than its coin says counts as a disagreement, and requests after
            any answer that is not the model's are no evidence: with false answers an owner leads a
            client where they like.
        alpha: the judge's level.
        ways: the ways of asking out of which the judge's was chosen.
    """

    drawn: Drawn
    labels: torch.Tensor
    suspect: Mapping[str, str]
    model_sha256: str
    client_key: str | None = None
    receipts: Sequence[Receipt] | None = None
    alpha: float = JUDGE_ALPHA
    ways: int = 1


def judge_account(claim: AccountClaim, finding: AccountFinding) -> Judgement:
    """Judge a claim against an account."""
    requests = claim.requests()
    choices, told = choices_of(claim, finding.ways), _told(claim, finding, requests)
    believed = _before_a_lie(claim, finding.drawn, told)
    trials, labels = [], []
    for trial, label in zip(finding.drawn.trials, finding.labels.tolist(), strict=True):
        if trial.image < believed:
            heard = told.get(trial.image, trial.answer) == trial.answer
            trials.append(trial)
            labels.append(label if heard else trial.other)  # the client never saw this coin
    test = account_evidence(trials, torch.tensor(labels), finding.alpha, choices)
    checks = [
        _client(claim, finding),
        _opening(claim, finding),
        _requests(claim, requests),
        _answers(finding.drawn, told),
        _accusation(claim, requests),
        _suspect(claim, finding),
        _evidence(test, choices),
    ]
    if finding.receipts is not None:
        checks.insert(-1, _receipts(claim, finding.drawn, told, believed))
    return Judgement(verdict_of(checks), tuple(checks), test, choices)


def read_receipts(path: Path, owner: str, requests: Sequence[SignedRequest]) -> list[Receipt]:
    """Read what a client kept (`receipts.jsonl`) of the owner's receipts for some requests.

    All else is passed over, and so is a line that is longer than a receipt of them can be. Of each
    request the last receipt counts, so no more labels are kept than the requests have images.

    Args:
        path: the file, which may come from anybody.
        owner: the owner's public key, in hexadecimal.
        requests: those of the claim.

    Raises:
        CountermarkError: the file cannot be read.
    """
    counts = {request.digest: len(request.hashes) for request in requests}
    found: dict[bytes, Receipt] = {}
    for line in _lines(path, _LINE + _EACH_LABEL * max(counts.values(), default=0)):
        try:
            record = json.loads(line)
            digests = (bytes.fromhex(record[name]) for name in ("request_sha256", "receipt"))
            request, signature = digests
            labels = tuple(int(label) for label in record["labels"])
            receipt = Receipt(request, int(record["number"]), labels, signature)
        except _OTHERWISE:  # an opening, or a torn line
            continue
        if _is_of(receipt, owner, counts):
            found[request] = receipt
    return list(found.values())


def _lines(path: Path, most: int) -> Iterator[bytes]:
    """Yield the lines of a file; one of more than `most` bytes is left out, and never in memory."""
    read_bytes(path, _RECEIPTS_LIMIT, first=0)  # only to see that it is a file, and not too large
    begins = True  # whether a line begins where the file is read
    try:
        with path.open("rb") as stream:
            while part := stream.readline(most + 1):
                if begins and len(part) <= most:
                    yield part
                begins = part.endswith(b"\n")
    except OSError as error:
        raise CountermarkError(
            f"cannot read {path}: {error.strerror}; check the path and its permissions"
        ) from error


def _is_of(receipt: Receipt, owner: str, counts: Mapping[bytes, int]) -> bool:
    """Tell whether the owner signed a receipt for one of some requests, by their images' number."""
    return len(receipt.labels) == counts.get(receipt.request) and is_receipt(
        owner, receipt.request, receipt.labels, receipt.signature
    )


def _client(claim: AccountClaim, finding: AccountFinding) -> Check:
    name, key = "The client's key", claim.opening.client
    if finding.client_key is None:
        meaning = "Nothing shows that the account is the accused's; name their key (--client-key)."
        return Check(name, OPEN, f"the requests are signed with {key[:16]}", meaning)
    if finding.client_key != key:
        found = (
            f"the requests are signed with {key[:16]}, the accused has {finding.client_key[:16]}"
        )
        return Check(name, FAILS, found, "Somebody else asked.")
    return Check(name, HOLDS, f"{key[:16]}", "The requests are signed with the accused's key.")


def _opening(claim: AccountClaim, finding: AccountFinding) -> Check:
    name, about = "The opening", describe(claim.model)
    if not claim.opening.is_signed:
        meaning = "What coins and cells come from was not agreed to by the client."
        return Check(name, FAILS, "it is not signed with the client's key", meaning)
    faults = commitment_faults_of(claim, finding.model_sha256)
    if faults:
        meaning = "They were chosen later, when the owner knew what the client asks."
        return Check(name, FAILS, "; ".join(faults), meaning)
    if about.network not in NETWORKS:
        found = f"the network {brief(about.network) or 'of a program'} is code of the owner's"
        meaning = (
            "The opening fixes its weights and its name, and nothing what that code computes: only "
            "networks that Countermark builds can be judged."
        )
        return Check(name, OPEN, found, meaning)
    found = "signed by the client, and names the model, the guard, the cells and the coins"
    meaning = (
        "Neither owner nor client could choose the coins: the owner had fixed their secret before "
        "the client added random bytes."
    )
    return Check(name, HOLDS, found, meaning)


def _requests(claim: AccountClaim, requests: list[SignedRequest]) -> Check:
    name, last = "The requests", requests[-1]
    if not last.is_signed(claim.opening.client):
        meaning = (
            "One was left out, put in, changed or moved: the last signature covers all before it."
        )
        return Check(name, FAILS, "they do not lead to the client's last signature", meaning)
    found = f"1 to {last.number}, {len(claim.x)} images"
    meaning = "All that the client asked up to there is in the claim, in the client's order."
    return Check(name, HOLDS, found, meaning)


def _accusation(claim: AccountClaim, requests: list[SignedRequest]) -> Check:
    name, owner = "The accusation", claim.opening.terms["owner"]
    wanted = accusation_of(claim, requests, claim.accusation["suspect"])
    try:
        check_signature(owner, claim.accusation, claim.accusation_signature, "the accusation")
        fits = {each: claim.accusation.get(each) for each in wanted} == wanted
    except CountermarkError:
        fits = False
    if not fits:
        return Check(
            name,
            FAILS,
            f"it is not signed by the key {owner[:16]}, or is of another account",
            "It does not come from the owner whom the client dealt with.",
        )
    return Check(
        name,
        HOLDS,
        f"by the key {owner[:16]}",
        "It comes from the owner whom the client dealt with.",
    )


def _suspect(claim: AccountClaim, finding: AccountFinding) -> Check:
    name, named = "The suspect", claim.accusation["suspect"]
    if is_accused(named, finding.suspect):
        meaning = "It is the model that the claim is about."
        return Check(name, HOLDS, suspect_name(finding.suspect), meaning)
    found = f"the claim is about {suspect_name(named)}, you asked {suspect_name(finding.suspect)}"
    return Check(name, OPEN, found, "Ask the one that the claim names.")


def _told(
    claim: AccountClaim, finding: AccountFinding, requests: list[SignedRequest]
) -> dict[int, int]:
    """What the client was told of each image, as far as receipts that the owner signed show."""
    owner = claim.opening.terms["owner"]
    starts = (torch.cumsum(claim.counts, 0) - claim.counts).tolist()
    counts = {request.digest: len(request.hashes) for request in requests}
    begin = {request.digest: start for request, start in zip(requests, starts, strict=True)}
    told: dict[int, int] = {}
    for receipt in finding.receipts or ():
        if _is_of(receipt, owner, counts):
            told.update(enumerate(receipt.labels, begin[receipt.request]))
    return told


def _before_a_lie(claim: AccountClaim, drawn: Drawn, told: Mapping[int, int]) -> int:
    """How many images were asked before the client could go by an answer that is not the model's.

    That is up to the end of the request with the first such answer.
    """
    false = [
        image
        for image, label in told.items()
        if drawn.answers[image] != UNSURE and label != drawn.answers[image]
    ]
    if not false:
        return len(claim.x)
    ends = torch.cumsum(claim.counts, 0)
    return int(ends[int((ends > min(false)).nonzero()[0])])


def _receipts(claim: AccountClaim, drawn: Drawn, told: Mapping[int, int], believed: int) -> Check:
    wrong = sum(drawn.answers[image] not in (UNSURE, label) for image, label in told.items())
    found = (
        f"they show the answers to {len(told)} of {len(claim.x)} images, of which {wrong} are "
        f"other than model and coins say; the first {believed} images count"
    )
    meaning = (
        "The owner signed what the client was told. A trial answered otherwise disagrees, and what "
        "was asked after a false answer is no evidence."
    )
    return Check("The receipts", OPEN if wrong else HOLDS, found, meaning)


def _answers(drawn: Drawn, told: Mapping[int, int]) -> Check:
    """Check that an owner had few answers free.

    Those of an image that depend on the machine count as one, however often it was asked: on one
    machine they are the same. They count once more each time that a receipt shows another one than
    before, or false answers to an image that is asked all the time would cost an owner nothing.
    """
    name, count, different = "The answers", 0, len(set(drawn.first))
    last: dict[int, int | None] = {}
    for place, (image, answer) in enumerate(zip(drawn.first, drawn.answers, strict=True)):
        if answer == UNSURE:
            label = told.get(place, last.get(image))
            count += image not in last or last[image] not in (None, label)
            last[image] = label
    found = f"{count} answers to {different} different images depend on what computes them"
    if count > _MOST_UNSURE * different:
        meaning = "Of so many no receipt could show that they were false."
        return Check(name, OPEN, found, meaning)
    return Check(name, HOLDS, found, "What the client must have been told follows from the model.")


def _evidence(test: Verdict, choices: int) -> Check:
    name = "The test"
    found = (
        f"{test.agreements} as the coins fell, {test.disagreements} the other way, "
        f"{test.neither} neither; p = {p_value(test.log10_p_value)}, "
        f"times {choices} for accounts, openings and ways of asking included"
    )
    if test.verdict == "match":
        meaning = (
            "A model that does not depend on this account's coins gets there "
            f"less than once in {1 / test.alpha:,.0f} claims."
        )
        return Check(name, HOLDS, found, meaning)
    if test.verdict == "inconclusive":
        meaning = "Too few trials were answered with one of their two answers."
        return Check(name, OPEN, found, meaning)
    return Check(name, FAILS, found, "Models that never saw the coins agree as often.")


def account_story(claim: AccountClaim, judgement: Judgement) -> str:
    """Tell in a few sentences what was tested."""
    test = judgement.test
    return (
        f"Of the {len(claim.x)} images that the client asked, {test.trials} count: near a tie or "
        "foreign, the first of their cell, and a secret coin chose their answer. Asked "
        f"the same, the suspect gave the coin's answer {test.agreements} times and the other one "
        f"{test.disagreements} times ({test.neither} times neither). A model that does not depend "
        f"on the coins gets there with probability {p_value(test.log10_p_value)}, whenever the "
        f"client stopped; the judge asks for {test.alpha:g} or less."
    )


def account_about(claim: AccountClaim) -> dict[str, Any]:
    """Name who is who in a claim."""
    return {
        "Owner's key": claim.opening.terms["owner"],
        "Client's key": claim.opening.client,
        "Account": claim.opening.terms["account"],
    }
