"""Claims against accounts, made and judged; what `claim --log` and `adjudicate` share."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from countermark.errors import CountermarkError
from countermark.evidence import JUDGE_ALPHA, Verdict
from countermark.files import new_folder
from countermark.options import SuspectOptions
from countermark.places import Network
from countermark.terminal import note, p_value
from countermark.text import brief
from countermark.verbs.asking import Answers, ask, asked_how
from countermark.verbs.looks import Looks, note_look

if TYPE_CHECKING:
    import torch

    from countermark.claims import Judgement, Trial
    from countermark.guard import QueryLog
    from countermark.guard.requests import Opening


@dataclass(frozen=True)
class AccountClaimed:
    """What a claim against an account says; see `Claimed`."""

    test: Verdict
    answers: Answers
    looks: Looks | None


def claim_account(
    config: SuspectOptions,
    *,
    suspect: str | Path,
    key: Path,
    model: Path,
    log: str,
    client: str,
    out: Path,
    network: Network | None,
    anyway: bool,
) -> AccountClaimed:
    """Ask the suspect for an account's trials, and write the claim.

    Where the account signed more than a claim holds, it is claimed up to the last request that
    fits, and standard error says how many were left out.

    Raises:
        CountermarkError: the log has nothing that the client signed, or another guard answered
            them; the suspect cannot be asked, or its answers prove nothing.
    """
    import torch

    from countermark.claims import (
        REQUESTS_LIMIT,
        AccountClaim,
        account_evidence,
        accusation_of,
        choices_of,
        first_queries,
        images_of_trials,
        suspect_identity,
        write_account_claim,
    )
    from countermark.guard import Guard, QueryLog, guard_sha256, read_guard, read_guard_record
    from countermark.guard.requests import classes_sha256, network_sha256, terms_of
    from countermark.networks import NETWORKS, describe
    from countermark.watermarks import (
        load_key,
        load_secret,
        load_signing_key,
        public_key,
        sign,
    )

    loaded, secret, settings = load_key(key), load_secret(key), read_guard(model)
    about = describe(model)
    signing_key = load_signing_key(key)
    with QueryLog(log, create=False) as opened:

        def fits(opening: "Opening") -> bool:
            under = Guard(settings, secret, opening.log)
            return opening.terms == terms_of(
                under,
                client,
                network_sha256=network_sha256(about.network, about.shape),
                classes_sha256=classes_sha256(about.class_names),
                guard_sha256=guard_sha256(read_guard_record(model)),
                owner=public_key(signing_key),
            )

        opening = _last_opening(opened, client, fits)
        signed, _ = opened.last_request(opening)
        counts, x, last = _requests(opened, opening, about.shape)
        place = _place(opened, client)
    left_out = signed - len(counts)
    if left_out > 0:  # a running service may have stored more meanwhile
        note(
            f"{brief(client)} has signed more than the {REQUESTS_LIMIT} bytes that a claim holds; "
            f"it ends with request {len(counts)}, and the {left_out} after it are left out"
        )
    guard = Guard(settings, secret, opening.log)
    made = AccountClaim(
        opening=opening,
        counts=torch.tensor(counts),
        x=x,
        last_signature=last,
        coins=guard.account_secret(client),
        cells=guard.cells.seeds,
        place=place,
        accusation={},
        accusation_signature="",
        model=model,
    )
    if about.network not in NETWORKS and not anyway:
        raise CountermarkError(
            f"{model} has a network that Countermark does not build, and no judge knows what the "
            "owner's code computed; --anyway writes the claim"
        )
    built, _ = made.network(network)
    identity = suspect_identity(suspect)
    trials = first_queries(made, built).trials
    if not trials:
        raise CountermarkError(f"{brief(client)} has asked nothing near a coin yet")
    with new_folder(out, {"suspect": identity, "client": client}) as work:
        parts, data = [images_of_trials(made, trials)], str(loaded.c1.get("data"))
        tested = partial(account_evidence, trials, alpha=JUDGE_ALPHA, choices=choices_of(made))
        labels, answers = ask(config, parts, about.shape, data, loaded.clean, loaded.names, tested)
        test = account_evidence(trials, labels, JUDGE_ALPHA, choices_of(made, answers.ways))
        how = asked_how(config, answers)
        p = test.log10_p_value
        looks = note_look(key, "claim", suspect, how, p, identity=identity, log=True)
        if test.verdict != "match" and not anyway:
            raise CountermarkError(
                f"the suspect's answers to {brief(client)}'s trials would not convince a judge "
                f"({test.agreements} as the coins fell, {test.disagreements} the other way; "
                f"p = {p_value(test.log10_p_value)}); nothing was written"
            )
        accusation = accusation_of(made, made.requests(), identity)
        signature = sign(signing_key, accusation)
        write_account_claim(
            work, replace(made, accusation=accusation, accusation_signature=signature)
        )
    return AccountClaimed(test, answers, looks)


def _last_opening(log: "QueryLog", client: str, fits: "Callable[[Opening], bool]") -> "Opening":
    """The opening of a client with the most requests among those that fit model, guard and key."""
    signed = [(log.last_request(each)[0], each) for each in log.openings(client)]
    number, opening = max(
        (pair for pair in signed if fits(pair[1])), key=lambda pair: pair[0], default=(0, None)
    )
    if opening is None or number == 0:
        others = any(count for count, _ in signed)
        raise CountermarkError(
            f"{log.shown} has no signed requests of {brief(client)} to this model with this guard "
            "and key; "
            + (
                "they signed for another one: name its folder with --model, and its key"
                if others
                else "a judge accepts no others (countermark client add NAME --public-key)"
            )
        )
    return opening


def _requests(
    log: "QueryLog", opening: "Opening", shape: tuple[int, ...]
) -> "tuple[list[int], torch.Tensor, bytes]":
    """The number of images of each request, all images, and the last signature.

    They end with the last request that a claim has room for. Nothing but sizes says which one that
    is: an e-process may end anywhere, as long as what comes after does not say where.
    """
    import torch

    from countermark.claims import REQUESTS_LIMIT
    from countermark.claims.account import REQUEST_BYTES

    counts: list[int] = []
    images, last = bytearray(), b""
    for request in log.requests(opening):
        taken = len(images) + len(request.images) + REQUEST_BYTES * (len(counts) + 1)
        if taken > REQUESTS_LIMIT:
            break
        counts.append(len(request.labels))
        images += request.images
        last = request.signed.signature
    x = torch.frombuffer(images, dtype=torch.uint8)
    if x.numel() != sum(counts) * math.prod(shape):
        raise CountermarkError(f"the requests are of other images than {shape}")
    return counts, x.reshape(-1, *shape), last


def _place(log: "QueryLog", client: str) -> int:
    """The account's place in the order of a trace, from 1."""
    names: dict[str, None] = {}
    for row in log.rows():
        if row is not None:
            names.setdefault(row.client)
    order = list(names)
    return 1 + log.erased() + (order.index(client) if client in names else len(order))


@dataclass(frozen=True)
class AccountJudged:
    """A judgement of a claim against an account, and what is shown of it."""

    judgement: "Judgement"
    answers: Answers
    owner: str
    about: Mapping[str, Any]
    story: str
    trials: "list[Trial]"
    suspect: Mapping[str, str]


def adjudicate_account(
    config: SuspectOptions,
    *,
    suspect: str | Path,
    claim: Path,
    network: Network | None,
    client_key: str | None,
    receipts: Path | None,
    alpha: float,
    pictures: int,
) -> AccountJudged:
    """Judge a claim against an account.

    Raises:
        CountermarkError: the claim, the receipts or the suspect cannot be read.
    """
    from countermark.claims import (
        AccountFinding,
        Trial,
        account_about,
        account_evidence,
        account_story,
        choices_of,
        first_queries,
        images_of_trials,
        judge_account,
        read_account_claim,
        read_receipts,
        suspect_identity,
    )

    read = read_account_claim(claim)
    owner = read.opening.terms["owner"]
    kept = None if receipts is None else read_receipts(receipts, owner, read.requests())
    built, digest = read.network(network)
    identity = suspect_identity(suspect)
    drawn = first_queries(read, built)
    trials = drawn.trials
    x = images_of_trials(read, trials)
    tested = partial(account_evidence, trials, alpha=alpha, choices=choices_of(read))
    labels, answers = ask(config, [x], read.shape, "", None, (), tested)
    finding = AccountFinding(drawn, labels, identity, digest, client_key, kept, alpha, answers.ways)
    judgement = judge_account(read, finding)
    shown = [
        Trial(read.x[trial.image], trial.heads, trial.tails, trial.coin, int(label))
        for trial, label in zip(trials[:pictures], labels, strict=False)
    ]
    return AccountJudged(
        judgement,
        answers,
        owner,
        account_about(read),
        account_story(read, judgement),
        shown,
        identity,
    )
