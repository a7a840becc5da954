"""The judgement of a claim by a third party, from its files and the roots that they trust.

Nothing that the claim says is believed. Signatures tie it to one key, tokens tie it to times, and
Merkle paths tie the opened trials to what was committed before the coins were drawn. The coins are
computed anew, and the judge asks the suspect directly. A claim is upheld if every check holds,
dismissed if one fails, and otherwise undecidable.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import torch
from cryptography import x509

from countermark.claims.record import Claim
from countermark.errors import CountermarkError
from countermark.evidence import JUDGE_ALPHA, Verdict, judge
from countermark.files import canonical_json, sha256
from countermark.places import endpoint_address
from countermark.registry import Draws, PublicLog, entry_of, is_registration
from countermark.terminal import p_value
from countermark.text import brief, visible
from countermark.timestamps import check_token, read_token
from countermark.tokens import TokenError, UntrustedError
from countermark.watermarks import SCHEMES, check_signature, draw_coins

HOLDS, FAILS, OPEN = "holds", "fails", "cannot tell"
_NOT_SHOWN = -1  # the cell of all trials that are not shown: many cells would dilute the others


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: what was checked.
        result: `holds`, `fails` or `cannot tell`.
        found: what was found.
        meaning: what that means, in plain words.
    """

    name: str
    result: str
    found: str
    meaning: str


@dataclass(frozen=True)
class Rival:
    """A claim of somebody else on the same suspect.

    Attributes:
        claim: the rival claim.
        model_sha256: digest of the weights that the rival claim shows.
        its_mark_in_ours: labels that the claimant's model gives the rival's trials, `(n,)`.
        our_mark_in_its: labels that the rival's model gives the claimant's trials, `(n,)`.
    """

    claim: Claim
    model_sha256: str
    its_mark_in_ours: torch.Tensor
    our_mark_in_its: torch.Tensor


@dataclass(frozen=True)
class Finding:
    """What the judge has besides the claim.

    Attributes:
        labels: the suspect's labels of the opened trials `(n,)`, as it answered the judge; -1 where
            it gave none.
        suspect: what the judge asked (see `suspect_identity`).
        model_sha256: SHA-256 of the weights that the claim shows as the owner's.
        model_labels: the labels that a model with these weights gives the opened trials `(n,)`.
        roots: certificates of the timestamp authorities that the judge trusts.
        alpha: the judge's significance level.
        suspect_token: an authority's response over the suspect's file, if the accused has one.
        shown: claims of the same key that were shown before.
        rival: a claim of somebody else.
        ways: the ways of asking out of which the judge's was chosen; p is multiplied by it.
        log: the public log that the judge trusts, for a registered T1.
        draws: what that log has of the identity that the judge knows as the owner's; none where
            the log was not asked. p is multiplied by their number.
    """

    labels: torch.Tensor
    suspect: Mapping[str, str]
    model_sha256: str
    model_labels: torch.Tensor
    roots: Sequence[x509.Certificate]
    alpha: float = JUDGE_ALPHA
    suspect_token: bytes | None = None
    shown: Sequence[Claim] = field(default=())
    rival: Rival | None = None
    ways: int = 1
    log: PublicLog | None = None
    draws: Draws | None = None


@dataclass(frozen=True)
class Judgement:
    """The outcome.

    Attributes:
        verdict: `upheld`, `dismissed` or `undecidable`.
        checks: every check that was made.
        test: the exact test on the judge's own answers.
        batches: number of batches that the claimant could have chosen from; p was multiplied by it.
        draws: number of registered commitments out of which the claimant could have chosen, by
            which p was multiplied as well.
    """

    verdict: str
    checks: tuple[Check, ...]
    test: Verdict
    batches: int
    draws: int = 1


@dataclass(frozen=True)
class Trial:
    """An opened trial that leads to the commitment, as the judge saw it.

    Attributes:
        image: uint8 `(c, h, w)`.
        heads: the answer that heads chooses, a label.
        tails: the answer that tails chooses.
        coin: 0 for heads, 1 for tails.
        given: the suspect's label; -1 where it gave none.
    """

    image: torch.Tensor
    heads: int
    tails: int
    coin: int
    given: int


def first_trials(claim: Claim, labels: torch.Tensor, count: int) -> list[Trial]:
    """The first valid trials of an opened batch, one of each cell, in the order of their leaves.

    Args:
        claim: the claim that opens them.
        labels: the suspect's labels of the opened trials `(n,)`.
        count: the most trials.

    Returns:
        The trials; none where the coins cannot be computed.
    """
    bound, coins = _bound(claim), _coins(claim)
    found: list[Trial] = []
    cells: set[int] = set()
    for _, row in sorted(bound.items()):
        cell = int(claim.opened.cell[row])
        if len(found) == count or coins is None:
            break
        if row not in coins or cell in cells:
            continue
        cells.add(cell)
        heads, tails = claim.opened.answers[row].tolist()
        found.append(Trial(claim.opened.x[row], heads, tails, coins[row], int(labels[row])))
    return found


def judge_claim(claim: Claim, finding: Finding) -> Judgement:
    """Judge a claim."""
    draws = _draws(claim, finding)
    test = evidence_of(claim, finding.labels, finding.alpha, finding.ways * draws)
    asked = list(_suspect(claim, finding))
    checks = [
        *formal_checks(claim, finding.roots, finding.model_sha256, finding.log),
        *_registration(claim, finding),
        _owners_model(claim, finding),
        *asked,
    ]
    checks += [
        _evidence(claim, finding, test, draws, any(check.result == OPEN for check in asked)),
        *_rival(claim, finding),
    ]
    return Judgement(verdict_of(checks), tuple(checks), test, int(claim.c1["batches"]), draws)


def verdict_of(checks: Sequence[Check]) -> str:
    """The verdict that some checks lead to."""
    results = {check.result for check in checks}
    return "dismissed" if FAILS in results else "undecidable" if OPEN in results else "upheld"


def formal_checks(
    claim: Claim,
    roots: Sequence[x509.Certificate],
    model_sha256: str,
    log: PublicLog | None = None,
) -> list[Check]:
    """Check what can be checked of a claim without asking a model.

    That is its signatures, commitments, times, opened batch, and the digest of its model.
    """
    return [
        _signatures(claim),
        _commitment(claim),
        *_times(claim, roots, log),
        _batch(claim),
        _model(claim, model_sha256),
    ]


def commitment_faults(
    claim: Claim, model_sha256: str, roots: Sequence[x509.Certificate] | None
) -> list[str]:
    """List the faults of a claim's commitments and their tokens, before any model is asked.

    Without roots, a token is only required to be there; so is a registration, whose log is asked by
    the judge.
    """
    faults = [
        f"the signature of {part.upper()} is not by the key"
        for part in _unsigned(claim, "c1", "c2")
    ]
    if claim.c2.get("model_sha256") != model_sha256:
        faults.append("the model's weights are not those of C2")
    for name in ("t1", "t2"):
        try:
            if getattr(claim, name) is None:
                faults.append(f"the mark is private: it has no {name.upper()}")
            elif roots is not None and not (name == "t1" and is_registration(claim.t1)):
                _time(claim, name, roots)
        except TokenError as error:
            faults.append(str(error))
    return faults


def _signatures(claim: Claim) -> Check:
    name, key = "Signatures", str(claim.c1["public_key"])
    unsigned = _unsigned(claim, "c1", "c2", "answers")
    if unsigned:
        what = {"c1": "C1", "c2": "C2", "answers": "the answers"}[unsigned[0]]
        meaning = (
            "Somebody changed it, or it belongs to another key: this claim is not the key owner's."
        )
        return Check(name, FAILS, f"that of {what} is not by the key {key[:16]}", meaning)
    return Check(
        name,
        HOLDS,
        f"all by the key {key[:16]}",
        "Commitments and accusation come from the owner of one key.",
    )


def _unsigned(claim: Claim, *parts: str) -> list[str]:
    """Those parts of a claim whose signature is not by its key."""
    found = []
    for part in parts:
        try:
            check_signature(
                str(claim.c1["public_key"]),
                getattr(claim, part),
                getattr(claim, f"{part}_signature"),
                part,
            )
        except CountermarkError:
            found.append(part)
    return found


def _commitment(claim: Claim) -> Check:
    name, c1 = "What was committed", claim.c1
    faults = []
    exact = [name for name, scheme in SCHEMES.items() if scheme.coins]
    if c1.get("scheme") not in exact or (c1.get("statistic"), c1.get("cell_weight")) != (
        "sign-flip",
        1,
    ):
        faults.append("its scheme has no exact test")
    if c1["leaves"] % c1["batches"]:
        faults.append("its batches are not of one size")
    if claim.c2["c1_sha256"] != sha256(canonical_json(c1)):
        faults.append("C2 is for another C1")
    if claim.c2.get("t1_sha256") != (None if claim.t1 is None else sha256(claim.t1)):
        faults.append("C2 is for another T1")
    if claim.answers["c2_sha256"] != sha256(canonical_json(claim.c2)):
        faults.append("the answers are for another C2")
    if faults:
        return Check(
            name,
            FAILS,
            "; ".join(faults),
            "The parts of the claim do not belong together, or allow no exact test.",
        )
    found = (
        f"{c1['leaves']} trials in {c1['batches']} batches, each trial of weight 1, "
        "judged by the sign-flip test"
    )
    return Check(
        name, HOLDS, found, "What is tested, and how, was fixed before the coins were drawn."
    )


_STAMPED = {
    "t1": (
        "T1, over the trials",
        "The inputs and their two answers were fixed by then, and the coins did not exist before.",
    ),
    "t2": ("T2, over the model", "The marked model existed by then."),
    "answers_token": (
        "T of the answers",
        (
            "The accusation and the suspect's answers were fixed by then, "
            "before the trials were shown."
        ),
    ),
}


def _times(
    claim: Claim, roots: Sequence[x509.Certificate], log: PublicLog | None
) -> Iterator[Check]:
    times = []
    for name, (title, meaning) in _STAMPED.items():
        try:
            time = _time(claim, name, roots, log)
        except UntrustedError as error:
            yield Check(
                title, OPEN, str(error), "Nobody whom the judge trusts vouches for the time."
            )
        except TokenError as error:
            yield Check(title, FAILS, str(error), "The timestamp belongs to something else.")
        else:
            if time is None:
                meaning = (
                    "Nothing shows when this was fixed; "
                    "the owner could have tried until they liked the result."
                )
                yield Check(title, OPEN, "there is none", meaning)
            else:
                times.append(time)
                yield Check(title, HOLDS, _shown(time), meaning)
    if len(times) == len(_STAMPED):
        yield _order(times)


def _time(
    claim: Claim,
    name: str,
    roots: Sequence[x509.Certificate],
    log: PublicLog | None = None,
) -> datetime | None:
    """When one of the claim's three parts was stamped, or nothing if it was not."""
    response: bytes | None = getattr(claim, name)
    if response is None:
        return None
    value = {"t1": claim.c1, "t2": claim.c2, "answers_token": claim.answers}[name]
    trusted = log if name == "t1" else None  # what is registered draws coins, and only C1 does
    digest = sha256(canonical_json(value))
    return check_token(response, digest, roots, _STAMPED[name][0], trusted).time


def _known_time(claim: Claim, name: str, roots: Sequence[x509.Certificate]) -> datetime | None:
    """When a part of the claim was stamped, or nothing if its token cannot be trusted."""
    try:
        return _time(claim, name, roots)
    except TokenError:
        return None


def _draws(claim: Claim, finding: Finding) -> int:
    """How many registered draws the claimant could have chosen from.

    It is 1 where that cannot be told, which is another check's finding.
    """
    if finding.draws is None or not is_registration(claim.t1):
        return 1
    try:
        entry = entry_of(claim.t1, _STAMPED["t1"][0])
    except TokenError:
        return 1
    return max(1, finding.draws.count) if entry.identity == finding.draws.identity else 1


def _registration(claim: Claim, finding: Finding) -> Iterator[Check]:
    """Check that the coins are those of the first draw of this C1, and count the others."""
    name, draws = "The draws", finding.draws
    if not is_registration(claim.t1):
        if finding.log is not None:
            found = "C1 is not registered; no public log counts its draws"
            meaning = "A judge who is content with a timestamp names no public log."
            yield Check(name, OPEN, found, meaning)
        return
    try:
        entry = entry_of(claim.t1, _STAMPED["t1"][0])
    except TokenError as error:
        yield Check(name, FAILS, str(error), "It is not what the coins were drawn from.")
        return
    if draws is None:
        missing = "public log" if finding.log is None else "identity of the owner"
        found = f"registered by the key {entry.identity[:16]}; no {missing} was named"
        meaning = "How often the owner drew coins cannot be told without the log and their key."
        yield Check(name, OPEN, found, meaning)
        return
    if entry.identity != draws.identity:
        found = f"registered by the key {entry.identity[:16]}, not by {draws.identity[:16]}"
        meaning = "Whoever registers under several keys draws as often as they like."
        yield Check(name, OPEN, found, meaning)
        return
    first = draws.first(entry.registered)
    if first is None:
        found = f"the log does not have entry {entry.index} under the key {entry.identity[:16]}"
        yield Check(name, OPEN, found, "A log that hides this entry may hide others.")
    elif (first.time, first.index) != (entry.time, entry.index):
        found = f"entry {entry.index}; but the same C1 was registered before, as {first.index}"
        yield Check(name, FAILS, found, "Only the first registration of a C1 draws its coins.")
    else:
        others = f"one of {draws.count} commitments by this key; p times that"
        found = f"entry {entry.index}, {others if draws.count > 1 else 'the only one by this key'}"
        yield Check(name, HOLDS, found, "Whoever drew again did so for everybody to see.")


def _order(times: Sequence[datetime]) -> Check:
    ordered = list(times) == sorted(times)
    found = " <= ".join(map(_shown, times)) if ordered else ", ".join(map(_shown, times))
    meaning = (
        "Trials, then model, then accusation."
        if ordered
        else "What should have been first came later."
    )
    return Check("Order of times", HOLDS if ordered else FAILS, found, meaning)


def _batch(claim: Claim) -> Check:
    name, whole = "The opened batch", set(_expected(claim))
    bound = _bound(claim)
    missing, extra = len(whole - bound.keys()), len(claim.opened) - len(bound)
    if extra:
        meaning = (
            "They are not what was committed to: changed, swapped, twice, or of another batch."
        )
        return Check(
            name,
            FAILS,
            f"{extra} shown trials do not lead to the committed root in their place",
            meaning,
        )
    if missing:
        meaning = (
            "A claim shows a whole batch: chosen trials would prove anything. "
            "Missing ones count against it."
        )
        return Check(name, FAILS, f"{missing} of {len(whole)} trials are missing", meaning)
    return Check(
        name,
        HOLDS,
        f"all {len(whole)} trials of batch {brief(claim.answers['batch'])}",
        "Nothing was left out or changed.",
    )


def _model(claim: Claim, digest: str) -> Check:
    name = "The owner's model"
    if digest != claim.c2["model_sha256"]:
        return Check(
            name,
            FAILS,
            f"its weights are {digest[:16]}, C2 is for {str(claim.c2['model_sha256'])[:16]}",
            "It is another model.",
        )
    return Check(
        name,
        HOLDS,
        f"weights {digest[:16]}",
        "The model that is shown is the one that was timestamped.",
    )


def _owners_model(claim: Claim, finding: Finding) -> Check:
    own = evidence_of(claim, finding.model_labels, finding.alpha)
    carries = own.verdict == "match"
    found = f"{own.agreements} of {own.trials} as the coins fell, p = {p_value(own.log10_p_value)}"
    meaning = (
        "The owner's model remembers the coins."
        if carries
        else "The owner's own model does not remember the coins."
    )
    return Check("The mark in it", HOLDS if carries else FAILS, found, meaning)


def _suspect(claim: Claim, finding: Finding) -> Iterator[Check]:
    """Check that the judge asked the accused model, and that it is not older than the marked one.

    A file that is not the accused one decides nothing, however old it is: whoever could choose the
    file would choose the verdict.
    """
    name, age = "The suspect", "Age of the suspect"
    named, made = claim.answers["suspect"], None  # made: when it existed at the latest
    if finding.suspect_token is not None:
        try:
            made = check_token(
                finding.suspect_token,
                finding.suspect.get("sha256", ""),
                finding.roots,
                "the suspect's timestamp",
            ).time
        except TokenError as error:
            yield Check(
                age, HOLDS, f"not shown: {error}", "The accused's timestamp proves nothing."
            )
    marked, accused = (
        _known_time(claim, "t2", finding.roots),
        _known_time(claim, "answers_token", finding.roots),
    )
    older = made is not None and marked is not None and made < marked
    if is_accused(named, finding.suspect):
        yield Check(
            name,
            HOLDS,
            suspect_name(finding.suspect),
            "It is the model that the claim was fixed against.",
        )
    elif older and _stands_for_endpoint(claim, finding):
        found = (
            f"{suspect_name(finding.suspect)} repeats every answer "
            f"that the claim recorded of {suspect_name(named)}"
        )
        meaning = (
            "The claimant's own record shows what the endpoint ran, "
            "and that its answers agree with the coins."
        )
        yield Check(name, HOLDS, found, meaning)
    else:
        found = (
            f"the claim was fixed against {suspect_name(named)}, "
            f"the judge asked {suspect_name(finding.suspect)}"
        )
        meaning = (
            "Another model than the accused one, however old, decides nothing; "
            "ask the one that the claim names."
        )
        yield Check(name, OPEN, found, meaning)
        return
    if made is not None and marked is not None:
        meaning = (
            "A model that is older than the marked one was not made from it."
            if older
            else "It may be a copy."
        )
        found = f"{_shown(made)}, {'before' if older else 'not before'} T2"
        yield Check(age, FAILS if older else HOLDS, found, meaning)
    dates = [
        date
        for date in (made, accused if finding.suspect.get("kind") == "file" else None)
        if date is not None
    ]
    yield from _spent(claim, finding, min(dates, default=None))


def is_accused(named: Mapping[str, object], asked: Mapping[str, str]) -> bool:
    """Tell whether the judge asked what a claim names: the very file, or the very address.

    Release 0.1.0 recorded addresses as they were typed, and 0.2.0 without their query strings: its
    claims name what is asked without one.
    """
    if (named.get("kind"), asked.get("kind")) != ("endpoint", "endpoint"):
        return dict(named) == dict(asked)
    try:
        one, other = (
            (address.name, identity.get("query_sha256", address.query_sha256))
            for identity in (named, asked)
            for address in [endpoint_address(str(identity.get("url")))]
        )
    except CountermarkError:  # what the claim names is no address
        return dict(named) == dict(asked)
    return one == other


def _stands_for_endpoint(claim: Claim, finding: Finding) -> bool:
    """Whether a file repeats every answer that the claim recorded of an accused endpoint.

    False if the recorded answers are too few for a verdict: a few could be repeated by chance.

    Such a file acquits if it is older than the marked model: a file that does not depend on the
    coins repeats a record that matches them with a probability of at most alpha, and a record that
    does not match them proves nothing. It does not convict, whatever its age: the record is the
    claimant's word, which binds the claimant and not the accused.
    """
    recorded = _recorded(claim)
    if recorded is None or (claim.answers["suspect"].get("kind"), finding.suspect.get("kind")) != (
        "endpoint",
        "file",
    ):
        return False
    repeats = bool(((recorded == -1) | (recorded == finding.labels)).all())
    return repeats and evidence_of(claim, recorded, finding.alpha).verdict != "inconclusive"


def _recorded(claim: Claim) -> torch.Tensor | None:
    """The suspect's labels of the shown trials `(n,)` according to the claim.

    None if the claim does not record an answer to every trial of the batch.
    """
    whole, labels = _expected(claim), claim.answers["labels"]
    if len(labels) != len(whole):
        return None
    by_leaf = dict(zip(whole, labels, strict=True))
    return torch.tensor([by_leaf.get(index, -1) for index in claim.opened.index.tolist()])


def _spent(claim: Claim, finding: Finding, made: datetime | None) -> Iterator[Check]:
    """Check that the suspect is older than any other dispute in which the batch was shown.

    A batch that was shown before counts only against suspects that are known to be older than that.
    """
    for earlier in finding.shown:
        same = (earlier.c1, earlier.answers["batch"]) == (claim.c1, claim.answers["batch"])
        if not same or earlier.answers == claim.answers:
            continue
        if any(check.result != HOLDS for check in (_signatures(earlier), _batch(earlier))):
            yield Check(
                "A spent batch",
                HOLDS,
                "what is shown as an earlier claim is none of this key",
                "Nothing was shown by it.",
            )
            continue
        opened = _known_time(earlier, "answers_token", finding.roots)
        fixed = made is not None and opened is not None and made < opened
        found = f"shown in another claim{'' if opened is None else ' of ' + _shown(opened)}"
        meaning = (
            "The suspect is older than that."
            if fixed
            else "The suspect may have learned the trials from there; open another batch."
        )
        yield Check("A spent batch", HOLDS if fixed else OPEN, found, meaning)


def _evidence(claim: Claim, finding: Finding, test: Verdict, draws: int, elsewhere: bool) -> Check:
    name = "The test"
    found = (
        f"{test.agreements} as the coins fell, {test.disagreements} the other way, "
        f"{test.neither} neither; "
    )
    choices = f"{claim.c1['batches']} batches"
    if draws > 1:
        choices += f" of {draws} commitments"
    found += f"p = {p_value(test.log10_p_value)}, {choices} to choose from included"
    if test.verdict == "match":
        return Check(
            name,
            HOLDS,
            found,
            (
                "A model that does not depend on these coins gets there "
                f"less than once in {1 / test.alpha:,.0f} claims."
            ),
        )
    if test.verdict == "inconclusive":
        return Check(
            name, OPEN, found, "Too few trials were answered with one of their two answers."
        )
    recorded = _recorded(claim)
    if (
        finding.suspect.get("kind") == "endpoint"
        and recorded is not None
        and evidence_of(claim, recorded, finding.alpha).verdict == "match"
    ):
        meaning = (
            "The endpoint answers otherwise than the claim recorded: it was changed, "
            "or the record is wrong; which cannot be told."
        )
        return Check(name, OPEN, found, meaning)
    if elsewhere:
        return Check(
            name,
            OPEN,
            found,
            (
                "Models that never saw the coins agree as often; "
                "but what was asked decides nothing, see above."
            ),
        )
    return Check(name, FAILS, found, "Models that never saw the coins agree as often.")


def _rival(claim: Claim, finding: Finding) -> Iterator[Check]:
    """Say which of two owners was first.

    It never decides: who was first is another question than what the suspect was made from. Whoever
    sold a model, or gave it away, was before everybody who goes on with it, and no thief of theirs.
    """
    rival, name = finding.rival, "The rival claim"
    if rival is None:
        return
    if rival.claim.c1["public_key"] == claim.c1["public_key"]:
        yield Check(name, HOLDS, "it is by the same key", "It is the claimant's own, no rival's.")
        return
    faults = [
        check
        for check in formal_checks(rival.claim, finding.roots, rival.model_sha256, finding.log)
        if check.result != HOLDS
    ]
    if faults:
        found = "; ".join(f"{check.name}: {check.found}" for check in faults)
        yield Check(
            name, HOLDS, f"does not stand by itself ({found})", "It takes nothing from this claim."
        )
        return
    theirs = evidence_of(rival.claim, rival.its_mark_in_ours, finding.alpha)
    ours = evidence_of(claim, rival.our_mark_in_its, finding.alpha)
    found = (
        f"its mark in this owner's model: p = {p_value(theirs.log10_p_value)}; "
        f"this mark in its model: p = {p_value(ours.log10_p_value)}"
    )
    meaning = {
        (False, True): "The rival's model was made from this owner's: this owner was first.",
        (True, False): (
            "This owner's model was made from the rival's, who was first; whether with leave, no "
            "file tells. The suspect depends on this owner's coins all the same."
        ),
        (True, True): (
            "Each model carries the other's mark; who was first does not follow from the files. "
            "The suspect depends on this owner's coins all the same."
        ),
        (False, False): (
            "Neither model was made from the other. The suspect may depend on both; "
            "this claim stands by itself."
        ),
    }[theirs.verdict == "match", ours.verdict == "match"]
    yield Check(name, HOLDS, found, meaning)


def evidence_of(claim: Claim, labels: torch.Tensor, alpha: float, ways: int = 1) -> Verdict:
    """The exact test: a trial that is missing, or not bound to the commitment, disagrees.

    Args:
        claim: the claim.
        labels: the suspect's labels of the opened trials `(n,)`.
        alpha: the judge's level.
        ways: the ways of asking out of which one was chosen; p is multiplied by it.
    """
    bound, coins = _bound(claim), _coins(claim)
    cells, outcomes = [], []
    for index in _expected(claim):
        row = bound.get(index)
        coin = None if row is None or coins is None else coins.get(row)
        if row is None or coin is None:
            cells.append(_NOT_SHOWN)
            outcomes.append(-1)
            continue
        answers, label = claim.opened.answers[row].tolist(), int(labels[row])
        cells.append(int(claim.opened.cell[row]))
        outcomes.append(0 if label not in answers else 1 if answers.index(label) == coin else -1)
    return judge(cells, outcomes, alpha=alpha, batches=int(claim.c1["batches"]), ways=ways)


def _bound(claim: Claim) -> dict[int, int]:
    """Map the leaf of each valid shown trial to its row.

    A trial is valid if its path leads to the committed root and it lies in the claim's batch, and
    if its cell begins there. Each leaf counts once.
    """
    c1, opened = claim.c1, claim.opened
    wanted, rows = set(_expected(claim)), dict[int, int]()
    for row, root in enumerate(opened.roots(int(c1["leaves"]))):
        index, cell = int(opened.index[row]), int(opened.cell[row])
        heads, tails = opened.answers[row].tolist()
        in_place = (
            root == c1["root"]
            and index in wanted
            and int(opened.batch[row]) == claim.answers["batch"]
        )
        if in_place and heads < tails and index not in rows and cell in wanted and cell <= index:
            rows[index] = row
    return rows


def _expected(claim: Claim) -> list[int]:
    """The leaves of the claim's batch."""
    size, batch = int(claim.c1["leaves"]) // int(claim.c1["batches"]), int(claim.answers["batch"])
    return (
        list(range(batch * size, (batch + 1) * size))
        if 0 <= batch < int(claim.c1["batches"])
        else []
    )


def _coins(claim: Claim) -> dict[int, int] | None:
    """Compute the coin of each valid trial, by its row, from C1, T1 and the secret of a leaf.

    The leaf is the one that has the number of the trial's cell; where it is not shown, the trial
    has no coin. None if T1 is no token of C1.
    """
    c1, beacon, bound = canonical_json(claim.c1), b"", _bound(claim)
    if claim.t1 is not None:
        try:
            beacon = read_token(claim.t1, sha256(c1), "T1").beacon
        except TokenError:
            return None
    secrets = [bytes(claim.opened.secrets[row].tolist()) for row in bound.values()]
    drawn = dict(zip(bound, draw_coins(c1, beacon, secrets, list(bound)).tolist(), strict=True))
    cells = claim.opened.cell.tolist()
    return {row: drawn[cells[row]] for row in bound.values() if cells[row] in drawn}


def suspect_name(suspect: Mapping[str, object]) -> str:
    """Name a suspect in a few words.

    The claimant wrote them, so they are made safe even for somebody who prints them without us.
    """
    return visible(str(suspect.get("url") or f"the file {str(suspect.get('sha256'))[:16]}")[:200])


def _shown(time: datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC")
