"""Clients who sign: openings, requests in order, receipts, and claims that rest on them."""

import json
import math
import re
import secrets
import shutil
import sqlite3
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

import countermark as cm
from countermark.claims import (
    AccountClaim,
    AccountFinding,
    account_evidence,
    account_judgement,
    accusation_of,
    choices_of,
    first_queries,
    images_of_trials,
    judge_account,
    read_account_claim,
    read_receipts,
    write_account_claim,
)
from countermark.claims.account import UNSURE, AskedTrial, Drawn
from countermark.claims.account_judgement import Receipt
from countermark.cli import main
from countermark.data import Pools
from countermark.errors import CountermarkError
from countermark.files import read_json, write_json
from countermark.guard import (
    Cells,
    FeatureReader,
    Guard,
    GuardedModel,
    QueryLog,
    Row,
    guard_sha256,
    load_guarded,
    read_guard,
    read_guard_record,
    trace_accounts,
)
from countermark.guard.core import WHOLE, coin, signed_key
from countermark.guard.requests import (
    MOST_LOST,
    NOTHING_BEFORE,
    ConflictError,
    Opening,
    Request,
    SignedRequest,
    classes_sha256,
    image_hashes,
    is_receipt,
    network_sha256,
    open_requests,
    read_opening,
    request_of,
    sign_receipt,
    sign_request,
    terms_of,
)
from countermark.networks import describe, load
from countermark.service.clients import Client
from countermark.service.engine import BusyError
from countermark.service.signing import Signing
from countermark.service.tensors import RefusedError
from countermark.verbs.guard import guard
from countermark.watermarks import load_secret, load_signing_key, public_key, sign
from serving import Service, serving

PRIVATE = bytes(range(32))
OWNER = bytes(range(32, 64))


@pytest.fixture(scope="module")
def guarded(owner: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The owner's model behind a dear guard, so that a small data set has many coins."""
    folder = tmp_path_factory.mktemp("guarded") / "model"
    shutil.copytree(owner, folder)
    guard(folder, cost=8.0)
    return folder


def the_guard(folder: Path, log: bytes = b"i" * 16) -> Guard:
    return Guard(read_guard(folder), load_secret(folder / "key"), log)


def terms(folder: Path, account: str = "anna", log: bytes = b"i" * 16) -> dict[str, str]:
    about = describe(folder)
    return terms_of(
        the_guard(folder, log),
        account,
        network_sha256=network_sha256(about.network, about.shape),
        classes_sha256=classes_sha256(about.class_names),
        guard_sha256=guard_sha256(read_guard_record(folder)),
        owner=public_key(load_signing_key(folder / "key")),
    )


def chain(
    opening: Opening, parts: Sequence[torch.Tensor], private: bytes = PRIVATE
) -> list[SignedRequest]:
    """The requests of a client for some batches of images."""
    found: list[SignedRequest] = []
    for x in parts:
        before = found[-1].digest if found else NOTHING_BEFORE
        found.append(sign_request(private, opening.digest, len(found) + 1, before, x))
    return found


def stored(opening: Opening, signed: SignedRequest, x: torch.Tensor, label: int = 0) -> Request:
    return Request(opening.terms["account"], signed, x.numpy().tobytes(), (label,) * len(x), 20_000)


# What is signed.


def test_an_opening_is_its_clients_and_of_its_terms_alone(guarded: Path) -> None:
    made = open_requests(PRIVATE, terms(guarded), earlier=3)
    assert made.is_signed
    read = read_opening(json.loads(json.dumps(made.record())))
    assert (read, read.digest) == (made, made.digest)
    assert open_requests(PRIVATE, terms(guarded)).digest != made.digest  # fresh random bytes
    record = made.record()
    other = {"client": public_key(OWNER), "earlier": 4, "nonce": "00" * 32, "log": "00" * 16}
    for name, value in {**other, "account": "bob", "coins_sha256": "11" * 32}.items():
        assert not read_opening({**record, name: value}).is_signed
    broken = [
        {**record, "nonce": "zz" * 32},
        {**record, "nonce": record["nonce"][1:]},
        {**record, "earlier": True},
        {**record, "earlier": -1},
        {**record, "more": 1},
        {**record, "account": "a\nb"},
        {name: value for name, value in record.items() if name != "log"},
        {**record, "format": "countermark opening 2"},
        None,
        [],
    ]
    for bad in broken:
        with pytest.raises(CountermarkError):
            read_opening(bad)


def test_the_last_signature_covers_every_request_before_it(guarded: Path, digits: Pools) -> None:
    opening = open_requests(PRIVATE, terms(guarded))
    x = digits.thief.x[:12]
    parts = list(torch.split(x, 3))
    last = chain(opening, parts)[-1]
    public = opening.client
    assert last.is_signed(public)
    assert not last.is_signed(public_key(OWNER))
    others = {
        "one less": parts[1:],
        "moved": [parts[1], parts[0], *parts[2:]],
        "changed": [parts[0] ^ 1, *parts[1:]],
        "split elsewhere": list(torch.split(x, 2)),
        "put in": [parts[0], parts[0], *parts[1:]],
    }
    for what, wrong in others.items():
        found = chain(opening, wrong)[-1]
        assert not replace(found, signature=last.signature).is_signed(public), what
    headers = last.headers()
    again = request_of(headers, image_hashes(parts[-1]))
    assert again == last
    for name in headers:
        for bad in ("", "x" * len(headers[name]), headers[name] + "0" * 70):
            assert request_of({**headers, name: bad}, image_hashes(parts[-1])) is None


def test_receipts_are_the_owners_word_on_every_label() -> None:
    signature = sign_receipt(OWNER, b"r" * 32, [3, 1])
    owner = public_key(OWNER)
    assert is_receipt(owner, b"r" * 32, [3, 1], signature)
    for request, labels in ((b"r" * 32, [1, 3]), (b"s" * 32, [3, 1]), (b"r" * 32, [3, 1, 0])):
        assert not is_receipt(owner, request, labels, signature)
    assert not is_receipt(public_key(PRIVATE), b"r" * 32, [3, 1], signature)
    assert not is_receipt(owner, b"r" * 32, [3, -1], signature)


def receipted(signed: SignedRequest, labels: Sequence[int], key: bytes = OWNER) -> str:
    """The line of a receipt, as `cm.Client` writes it."""
    receipt = sign_receipt(key, signed.digest, labels).hex()
    digest = signed.digest.hex()
    record = {"number": signed.number, "request_sha256": digest, "labels": list(labels)}
    return json.dumps({**record, "receipt": receipt})


def test_receipts_that_are_torn_or_hostile_are_passed_over(
    guarded: Path, digits: Pools, tmp_path: Path
) -> None:
    """So are those of another owner's, of other requests, and of other numbers of images."""
    one, two, other = chain(open_requests(PRIVATE, terms(guarded)), digits.thief.x[:6].split(2))
    good = json.loads(receipted(two, [1, 3]))
    lines = [
        receipted(one, [4, 4]),
        receipted(one, [1, 2]),
        json.dumps(good)[:-9],
        receipted(two, [1, 3, 0]),
        receipted(two, [3, 1], PRIVATE),
        receipted(other, [1, 2]),
        json.dumps({**good, "labels": [3, 1]}),
        "",
        '{"number": Infinity, "labels": [1e999], "request_sha256": "", "receipt": ""}',
        '{"number": 1, "labels": null, "request_sha256": "00", "receipt": "00"}',
        "[" * 100_000,
        "null",
        json.dumps(good),
    ]
    (tmp_path / "receipts.jsonl").write_text("\n".join(lines))
    read = read_receipts(tmp_path / "receipts.jsonl", public_key(OWNER), [one, two])
    assert [(each.number, each.labels) for each in read] == [(1, (1, 2)), (2, (1, 3))]


def test_long_lines_of_receipts_are_never_in_memory(
    guarded: Path, digits: Pools, tmp_path: Path
) -> None:
    """The accused makes the file: no line of theirs, and no number of lines, fills the memory."""
    signed = chain(open_requests(PRIVATE, terms(guarded)), [digits.thief.x[:2]])[0]
    path, good = tmp_path / "receipts.jsonl", receipted(signed, [1, 2])
    elsewhere = json.dumps({**json.loads(good), "request_sha256": "ab" * 32})
    with path.open("w") as stream:
        stream.write(f"{good}\n")
        stream.write(good[:-1] + ', "more": [' + "1," * 5_000_000 + "1]}\n")
        stream.writelines(f"{line}\n" for line in [elsewhere, good] * 5_000)
        stream.write("7" * 5_000_000)
    tracemalloc.start()
    read = read_receipts(path, public_key(OWNER), [signed])
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [each.labels for each in read] == [(1, 2)]
    assert most < 1_000_000


def test_coins_come_from_both_sides(guarded: Path) -> None:
    """The owner's part alone, or the client's, says nothing about them."""
    made = the_guard(guarded)
    first, second = (open_requests(PRIVATE, terms(guarded)).digest for _ in range(2))
    account = made.account_secret("anna")
    keys = {signed_key(account, first), signed_key(account, second)}
    keys |= {signed_key(made.account_secret("bob"), first)}
    keys |= {signed_key(the_guard(guarded, b"j" * 16).account_secret("anna"), first)}
    assert len(keys) == 4
    cells = [str(number).encode() for number in range(4000)]
    fell = np.array([[coin(key, cell) < WHOLE // 2 for cell in cells] for key in keys])
    assert (abs(fell.mean(1) - 0.5) < 0.04).all()
    assert (abs(np.corrcoef(fell)[np.triu_indices(4, 1)]) < 0.08).all()


# What the log keeps.


def test_the_log_takes_requests_in_order_and_each_once(
    guarded: Path, digits: Pools, address: str
) -> None:
    parts = torch.split(digits.thief.x[:12], 3)
    with QueryLog(address) as log:
        opening = open_requests(PRIVATE, terms(guarded, log=log.identity))
        signed = chain(opening, parts)
        whole = [stored(opening, each, x) for each, x in zip(signed, parts, strict=True)]
        assert log.store([], whole[:1])[1][0] is not None  # there is no opening
        log.begin_requests(opening)
        log.begin_requests(opening)
        assert log.store([], [whole[1]])[1] == [
            "request 2 does not go on from the last one that the query log has, which is number 0"
        ]
        assert log.store([], whole[:2])[1] == [None, None]
        assert log.store([], [whole[0], whole[1], whole[2], whole[3], whole[3]])[1] == [None] * 5
        fork = sign_request(PRIVATE, opening.digest, 4, signed[2].digest, parts[0])
        assert log.store([], [stored(opening, fork, parts[0])])[1][0] is not None
        bob = replace(whole[0], client="bob")
        assert log.store([], [bob])[1][0] is not None
        assert [each.signed for each in log.requests(opening)] == signed
        assert log.last_request(opening) == (4, signed[3].digest)
        with pytest.raises(ConflictError, match="another state"):
            log.begin_requests(open_requests(PRIVATE, terms(guarded, log=log.identity)))
        with pytest.raises(ConflictError, match="another identity"):
            log.begin_requests(open_requests(PRIVATE, terms(guarded, log=b"x" * 16)))
        assert [each.digest for each in log.openings()] == [opening.digest]
        log.renew()
        assert log.store([], [whole[3]])[1][0] is not None  # its opening is of the time before
        assert len(list(log.requests(opening))) == 4
        log.erase("anna")
        assert log.openings() == []
        assert list(log.requests(opening)) == []
        log.erase("bob")


def test_a_row_is_stored_with_its_request_or_not_at_all(
    guarded: Path, digits: Pools, tmp_path: Path
) -> None:
    x = digits.thief.x[:2]
    with QueryLog(str(tmp_path / "log.db")) as log:
        opening = open_requests(PRIVATE, terms(guarded, log=log.identity))
        log.begin_requests(opening)
        one, two, three = chain(opening, [x, x, x])
        image = x[0].numpy().tobytes()
        row = Row("ab" * 32, "anna", b"c1", image, 1, 2, 9, 1, 20_000, b"", log.identity)
        rows = [
            replace(row, cell=b"1", request=one.packed(0)),
            replace(row, cell=b"2", image=x[1].numpy().tobytes(), request=one.packed(1)),
            replace(row, cell=b"3", request=three.packed(0)),
            replace(row, cell=b"4", client="bob"),
        ]
        asked = [stored(opening, one, x), stored(opening, three, x)]
        fresh, refused = log.store(rows, asked)
        assert fresh == [True, True, False, True]
        assert [reason is None for reason in refused] == [True, False]
        assert two.number == 2


def test_two_requests_of_one_number_do_not_hide_each_others_trials(
    guarded: Path, digits: Pools, address: str
) -> None:
    """One is answered and one is refused, in one transaction; only rows of the first are stored."""
    x = digits.thief.x[:4]
    with QueryLog(address) as log:
        opening = open_requests(PRIVATE, terms(guarded, log=log.identity))
        log.begin_requests(opening)
        one, fork = (chain(opening, [part])[0] for part in (x[:2], x[2:]))
        images = [image.numpy().tobytes() for image in x]
        row = Row("ab" * 32, "anna", b"1", images[0], 1, 2, 9, 1, 20_000, b"", log.identity)
        rows = [
            replace(row, cell=b"1", request=one.packed(0)),
            replace(row, cell=b"2", image=images[2], request=fork.packed(0)),
        ]
        fresh, refused = log.store(
            rows, [stored(opening, one, x[:2]), stored(opening, fork, x[2:])]
        )
        assert fresh == [True, False]
        assert [reason is None for reason in refused] == [True, False]


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE requests SET images = zeroblob(length(images)) WHERE number = 2",
        "UPDATE requests SET signature = zeroblob(64) WHERE number = 2",
        "UPDATE requests SET labels = 'x' WHERE number = 2",
        "UPDATE requests SET day = 'x' WHERE number = 2",
        "DELETE FROM requests WHERE number = 2",
        "UPDATE requests SET number = 9 WHERE number = 2",
        "UPDATE requests SET digest = zeroblob(32) WHERE number = 2",
        "UPDATE openings SET record = '{}'",
        "UPDATE openings SET client = 'bob'",
    ],
)
def test_a_change_of_what_was_signed_is_found(
    guarded: Path, digits: Pools, tmp_path: Path, change: str
) -> None:
    parts = torch.split(digits.thief.x[:9], 3)
    path = tmp_path / "log.db"
    with QueryLog(str(path)) as log:
        opening = open_requests(PRIVATE, terms(guarded, log=log.identity))
        log.begin_requests(opening)
        signed = chain(opening, parts)
        log.store([], [stored(opening, *pair) for pair in zip(signed, parts, strict=True)])
    with sqlite3.connect(path) as connection:
        connection.execute(change)
    with QueryLog(str(path), create=False) as log, pytest.raises(CountermarkError, match="changed"):
        [list(log.requests(each)) for each in log.openings()]


# What a judge makes of it.


@pytest.fixture(scope="module")
def claim(guarded: Path, digits: Pools, tmp_path_factory: pytest.TempPathFactory) -> AccountClaim:
    """A claim against anna, who asked all of the thief's images, 40 at a time."""
    parts = torch.split(digits.thief.x, 40)
    opening = open_requests(PRIVATE, terms(guarded))
    signed = chain(opening, parts)
    made = the_guard(guarded)
    unsigned = AccountClaim(
        opening=opening,
        counts=torch.tensor([len(part) for part in parts]),
        x=digits.thief.x,
        last_signature=signed[-1].signature,
        coins=made.account_secret("anna"),
        cells=made.cells.seeds,
        place=1,
        accusation={},
        accusation_signature="",
        model=guarded,
    )
    suspect = {"kind": "file", "sha256": "5" * 64}
    accusation = accusation_of(unsigned, signed, suspect)
    signature = sign((guarded / "key" / "signing-key").read_bytes(), accusation)
    complete = replace(unsigned, accusation=accusation, accusation_signature=signature)
    folder = tmp_path_factory.mktemp("claim")
    write_account_claim(folder, complete)
    read = read_account_claim(folder)
    assert read.requests() == complete.requests()
    return read


@pytest.fixture(scope="module")
def drawn(claim: AccountClaim) -> Drawn:
    return first_queries(claim, load(claim.model))


@pytest.fixture(scope="module")
def trials(drawn: Drawn) -> list[AskedTrial]:
    return drawn.trials


def found(claim: AccountClaim, drawn: Drawn, labels: Sequence[int]) -> AccountFinding:
    _, digest = claim.network()
    suspect = claim.accusation["suspect"]
    told = torch.tensor(labels)
    return AccountFinding(drawn, told, suspect, digest, claim.opening.client, (), 1e-6)


def failing(claim: AccountClaim, finding: AccountFinding) -> dict[str, str]:
    checks = judge_account(claim, finding).checks
    return {check.name: check.result for check in checks if check.result != "holds"}


def test_a_judge_draws_the_same_trials_as_the_service(
    claim: AccountClaim, trials: list[AskedTrial], guarded: Path, digits: Pools, tmp_path: Path
) -> None:
    """Trials are those that a log has of the account, and its p-value that of a trace, doubled."""
    served = load_guarded(guarded, guarded / "key").under(b"i" * 16)
    opening = claim.opening.digest
    answers = served(digits.thief.x, "anna", [opening] * len(digits.thief.x))
    met, rows = set(), []
    request = chain(claim.opening, [digits.thief.x])[0]
    for trial in answers.trials:
        if trial.cell not in met:
            met.add(trial.cell)
            image = digits.thief.x[trial.row].numpy().tobytes()
            numbers = (trial.heads, trial.tails, trial.chance, trial.answer, 20_000)
            rows.append(
                (
                    trial.row,
                    Row(
                        served.guard.settings.model_sha256,
                        "anna",
                        trial.cell,
                        image,
                        *numbers,
                        request.packed(trial.row),
                        b"i" * 16,
                    ),
                )
            )
    counted = {trial.image for trial in trials}
    assert len(trials) > max(20, 0.95 * len(rows))  # the rest another processor sees otherwise
    rows = [(place, row) for place, row in rows if place in counted]
    assert [(each.image, each.answer) for each in trials] == [
        (place, row.answer) for place, row in rows
    ]
    told = torch.tensor([row.answer for _, row in rows])
    traced = trace_accounts([row for _, row in rows], told, load_secret(guarded / "key"))
    judged = account_evidence(trials, told, 1e-6, choices_of(claim))
    assert judged.log10_p_value is not None
    assert math.isclose(
        judged.log10_p_value, traced.accounts[0].log10_p_value + math.log10(2), abs_tol=1e-9
    )


def test_a_copy_is_claimed_and_a_stranger_is_not(
    claim: AccountClaim, drawn: Drawn, trials: list[AskedTrial], stranger: Path
) -> None:
    judged = judge_account(claim, found(claim, drawn, [trial.answer for trial in trials]))
    assert judged.verdict == "upheld", judged.checks
    images = images_of_trials(claim, trials)
    labels = load(stranger)(images / 255).argmax(1).tolist()
    assert judge_account(claim, found(claim, drawn, labels)).verdict == "dismissed"


def test_every_change_of_a_claim_is_named(
    claim: AccountClaim, drawn: Drawn, trials: list[AskedTrial], digits: Pools
) -> None:
    good = found(claim, drawn, [trial.answer for trial in trials])
    fewer = claim.counts[1:]
    changes: dict[str, tuple[AccountClaim, AccountFinding]] = {
        "The requests": (replace(claim, counts=fewer, x=claim.x[int(claim.counts[0]) :]), good),
        "The opening": (replace(claim, coins=bytes(32)), good),
        "The accusation": (replace(claim, place=7), good),
        "The client's key": (claim, replace(good, client_key=public_key(OWNER))),
        "The suspect": (claim, replace(good, suspect={"kind": "file", "sha256": "6" * 64})),
        "The test": (claim, replace(good, labels=torch.full_like(good.labels, -1))),
    }
    for name, (changed, finding) in changes.items():
        assert name in failing(changed, finding), name
        assert judge_account(changed, finding).verdict != "upheld"
    assert failing(claim, replace(good, client_key=None)) == {"The client's key": "cannot tell"}
    swapped = claim.x.clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    assert failing(replace(claim, x=swapped), good)["The requests"] == "fails"
    for part in ("cells", "coins"):
        bad = replace(claim, **{part: bytes(len(getattr(claim, part)))})
        assert failing(bad, good)["The opening"] == "fails"
    terms_now = {**claim.opening.terms, "coins_sha256": "0" * 64}
    forged = replace(claim, opening=replace(claim.opening, terms=terms_now))
    assert failing(forged, good)["The opening"] == "fails"
    assert failing(claim, replace(good, model_sha256="0" * 64))["The opening"] == "fails"


def test_code_that_the_opening_cannot_fix_leaves_a_claim_undecidable(
    claim: AccountClaim, drawn: Drawn, tmp_path: Path
) -> None:
    """A network that is the owner's code could compute for the judge what it never answered."""
    model = shutil.copytree(claim.model, tmp_path / "model")
    record = read_json(model / "model.json")
    network = {**record["network"], "place": "shop.models:make"}
    write_json(model / "model.json", {**record, "network": network})
    good = found(claim, drawn, [trial.answer for trial in drawn.trials])
    assert failing(replace(claim, model=model), good)["The opening"] == "fails"  # it was another
    about = describe(model)
    digest = network_sha256(about.network, about.shape)
    named = {**claim.opening.terms, "network_sha256": digest}
    opened = replace(claim, model=model, opening=open_requests(PRIVATE, named))
    assert failing(opened, good)["The opening"] == "cannot tell"


def test_whoever_could_not_be_judged_is_told_before_they_sign(
    guarded: Path, tmp_path: Path
) -> None:
    model, anna = load_guarded(guarded, guarded / "key"), Client("anna", public_key(PRIVATE))
    with QueryLog(str(tmp_path / "log.db")) as log:
        elsewhere = GuardedModel(model.network, model.guard.under(log.identity), 1e-2)
        for served, who, reason in (
            (model, anna, "log renew"),  # a log of an earlier release has no identity
            (elsewhere, anna, "--device cpu"),
            (model.under(log.identity), Client("bob", None), "no public key"),
        ):
            signing = Signing(served, log, guarded, guarded / "key")
            with pytest.raises(RefusedError, match=reason):
                signing.state(who)
        signing = Signing(model.under(log.identity), log, guarded, guarded / "key")
        opening = open_requests(PRIVATE, signing.state(anna)["terms"])
        assert signing.begin(anna, opening.record())["opening"] == opening.record()
        # The owner gives the account another key: what it signs has another opening.
        other = Client("anna", public_key(OWNER))
        assert signing.state(other)["opening"] is None
        again = open_requests(OWNER, opening.terms)
        assert signing.begin(other, again.record())["opening"] == again.record()
        with signing.turn(anna), pytest.raises(BusyError), signing.turn(anna):
            pass
        log.erase("anna")
        with pytest.raises(ConflictError, match="erased"):
            signing.begin(anna, open_requests(PRIVATE, opening.terms).record())


def test_an_opening_counts_no_more_than_the_log_may_have_lost(
    guarded: Path, tmp_path: Path
) -> None:
    """Each that it counts multiplies p: a client who could choose would choose the most."""
    anna = Client("anna", public_key(PRIVATE))
    model = load_guarded(guarded, guarded / "key")
    with QueryLog(str(tmp_path / "log.db")) as log:
        for known in range(2):
            signing = Signing(model.under(log.identity), log, guarded, guarded / "key")
            named = signing.state(anna)["terms"]
            for earlier in ((1 << 31) - 1, known + MOST_LOST + 1):
                with pytest.raises(RefusedError, match=f"has {known}, and at most {MOST_LOST}"):
                    signing.begin(anna, open_requests(PRIVATE, named, earlier).record())
            opening = open_requests(PRIVATE, named, known + MOST_LOST)
            for _ in range(2):
                assert signing.begin(anna, opening.record())["opening"] == opening.record()
            log.renew()
        # One that is in a log already goes on.
        signing = Signing(model.under(log.identity), log, guarded, guarded / "key")
        many = open_requests(PRIVATE, signing.state(anna)["terms"], 1 << 30)
        log.begin_requests(many)
        assert signing.begin(anna, many.record())["opening"] == many.record()


def test_an_image_that_was_asked_again_leaves_no_claim_undecidable(
    claim: AccountClaim, drawn: Drawn, trials: list[AskedTrial], guarded: Path
) -> None:
    """A client repeats one whose answer depends on the machine; it is computed and counted once.

    Different answers to it would be free to the owner, and each counts where a receipt shows it.
    """
    chosen = {trial.image for trial in trials}
    doubtful = next(place for place in range(40) if place not in chosen)
    repeats = claim.x[doubtful : doubtful + 1].expand(400, -1, -1, -1)
    parts = [*claim.x.split(claim.counts.tolist()), *repeats.split(40)]
    signed, owner = chain(claim.opening, parts), (guarded / "key" / "signing-key").read_bytes()
    again = replace(
        claim,
        x=torch.cat(parts),
        counts=torch.tensor([len(part) for part in parts]),
        last_signature=signed[-1].signature,
    )
    accusation = accusation_of(again, signed, claim.accusation["suspect"])
    again = replace(again, accusation=accusation, accusation_signature=sign(owner, accusation))
    network, sizes = load(again.model), []
    network.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    asked = first_queries(again, network)
    assert sum(sizes[1:]) == len(set(image_hashes(claim.x)))  # after one that tells its features
    assert (asked.trials, asked.answers[: len(claim.x)]) == (trials, drawn.answers)
    assert set(asked.answers[len(claim.x) :]) == {drawn.answers[doubtful]}

    answers = [
        UNSURE if torch.equal(image, claim.x[doubtful]) else answer
        for image, answer in zip(again.x, asked.answers, strict=True)
    ]
    good = found(again, replace(asked, answers=answers), [trial.answer for trial in trials])
    assert judge_account(again, good).verdict == "upheld"

    def shown(labels: Sequence[int]) -> AccountFinding:
        """The receipts of the last requests, which ask for nothing but that image."""
        receipts = []
        for request, part in zip(signed[-10:], torch.tensor(labels).split(40), strict=True):
            told = tuple(part.tolist())
            receipt = sign_receipt(owner, request.digest, told)
            receipts.append(Receipt(request.digest, request.number, told, receipt))
        return replace(good, receipts=receipts)

    assert judge_account(again, shown([3] * 400)).verdict == "upheld"
    assert judge_account(again, shown([3] * 399 + [4])).verdict == "upheld"
    assert failing(again, shown([3, 4] * 200)) == {"The answers": "cannot tell"}


def test_receipts_of_other_answers_count_against_the_claim(
    claim: AccountClaim, drawn: Drawn, trials: list[AskedTrial], guarded: Path
) -> None:
    """The owner signed what they told the client; where that is not a coin's answer, it counts."""
    key = (guarded / "key" / "signing-key").read_bytes()
    told = {image: max(0, label) for image, label in enumerate(drawn.answers)}
    good = found(claim, drawn, [trial.answer for trial in trials])

    def receipts(said: dict[int, int], signing_key: bytes) -> list[Receipt]:
        made, start = [], 0
        for request in claim.requests():
            labels = tuple(said[start + row] for row in range(len(request.hashes)))
            start += len(labels)
            signature = sign_receipt(signing_key, request.digest, labels)
            made.append(Receipt(request.digest, request.number, labels, signature))
        return made

    judged = judge_account(claim, replace(good, receipts=receipts(told, key)))
    assert (judged.verdict, judged.test.trials) == ("upheld", len(trials))
    # A trial was answered otherwise; what came after that request is no evidence.
    last = [trial for trial in trials if trial.image >= int(claim.counts[:-1].sum())]
    other = told | {trial.image: trial.other for trial in last}
    judged = judge_account(claim, replace(good, receipts=receipts(other, key)))
    assert (judged.test.trials, judged.test.disagreements) == (len(trials), len(last))
    # No coin fell there, and still the client may have gone by it.
    sure = next(
        image
        for image, label in enumerate(drawn.answers)
        if label != UNSURE and image not in {trial.image for trial in trials}
    )
    other = told | {sure: (told[sure] + 1) % 10}
    judged = judge_account(claim, replace(good, receipts=receipts(other, key)))
    assert sure < int(claim.counts[0])
    assert judged.test.trials == sum(trial.image < int(claim.counts[0]) for trial in trials)
    assert judged.verdict != "upheld"
    forged = replace(good, receipts=receipts(other, PRIVATE))  # not the owner's
    assert judge_account(claim, forged).verdict == "upheld"


def test_queries_that_other_processors_see_otherwise_are_no_trials(
    claim: AccountClaim, trials: list[AskedTrial]
) -> None:
    """Neither are later ones of a cell that such a query may have been in."""
    network = load(claim.model)
    cells = Cells(read_guard(claim.model), claim.cells)
    logits, features = FeatureReader(network)(claim.x)
    whole = cells.questions(logits, features, claim.x)
    for tolerance in (1e-5, 1e-2):
        loose = cells.questions(logits, features, claim.x, tolerance)
        for exact in whole:
            question = next(each for each in loose if each.row == exact.row)
            one = slice(exact.row, exact.row + 1)
            within = cells.possible(question, logits[one], features[one], tolerance)
            assert any(exact.cell.startswith(beginning) for beginning in within)
            if question.sure:
                assert exact.cell == question.cell
    assert len({(trial.image) for trial in trials}) == len(trials)


# An owner who frames a client.


LEVELS = (0.05, 0.01, 0.001)


def asked(numbers: np.random.Generator, queries: int) -> list[tuple[int, int]]:
    """An innocent client's queries near a tie: a cell each, and what their product answers.

    Nothing that the product answers depends on a coin.
    """
    drawn = numbers.integers(0, [64, 2], (queries, 2)).tolist()
    return [(cell, label) for cell, label in drawn]


def evidence(queries: Sequence[tuple[int, int]], key: bytes) -> float:
    """The p-value of the first queries of cells, at the moment that the owner likes best."""
    met: dict[int, int] = {}
    for cell, label in queries:
        met.setdefault(cell, label)
    made = [
        AskedTrial(row, 0, 1, WHOLE // 2, int(coin(key, b"%d" % cell) < WHOLE // 2))
        for row, cell in enumerate(met)
    ]
    found = account_evidence(made, torch.tensor(list(met.values())), 1e-9, 1)
    assert found.p_value is not None
    return found.p_value


def frames(attack: str, numbers: np.random.Generator, run: int) -> float:
    """What an owner gets who may choose what the attack says, after the client asked."""
    queries = asked(numbers, 400)
    key = signed_key(bytes(32), run.to_bytes(32, "big"))
    tail = {cell: int(coin(key, b"%d" % cell) < WHOLE // 2) for cell in range(64)}
    if attack == "leaves out":
        return evidence([(cell, label) for cell, label in queries if label == tail[cell]], key)
    if attack == "orders":
        return evidence(sorted(queries, key=lambda query: query[1] != tail[query[0]]), key)
    if attack in ("names", "secrets"):
        tried = (signed_key(bytes(32), f"{run} {k}".encode()) for k in range(30))
        return min(evidence(queries, each) for each in tried)
    return evidence(queries, key)


@pytest.mark.parametrize("attack", ["leaves out", "orders", "names", "secrets", "nothing"])
def test_an_owner_who_chooses_frames_a_client(attack: str) -> None:
    """Without what is signed here, each choice convicts; without a choice, nobody is too often.

    An owner always chooses when to stop. What the four attacks choose, the opening and the chain of
    signatures fix (the next test).
    """
    runs = 100 if attack in ("names", "secrets") else 1000  # 30 tries each
    numbers = np.random.default_rng(7)
    values = np.array([frames(attack, numbers, run) for run in range(runs)])
    for alpha in LEVELS:
        count, allowed = int((values <= alpha).sum()), runs * alpha
        if attack == "nothing":
            assert count <= allowed + 3 * math.sqrt(allowed)
        elif attack in ("leaves out", "orders"):
            assert count == runs
    if attack in ("names", "secrets"):
        assert (values <= 0.05).mean() > 3 * 0.05


def test_what_frames_a_client_breaks_the_signatures(
    claim: AccountClaim,
    drawn: Drawn,
    trials: list[AskedTrial],
    digits: Pools,
    stranger: Path,
    guarded: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The four attacks on real requests, as a judge sees them; none is upheld.

    A judge who believes opening and requests upholds each of them.
    """
    network = load(claim.model)
    product = load(stranger)

    def labels(made: AccountClaim, those: list[AskedTrial]) -> list[int]:
        return product(images_of_trials(made, those) / 255).argmax(1).tolist()

    said = labels(claim, trials)
    against = {
        trial.image for trial, label in zip(trials, said, strict=True) if label != trial.answer
    }
    kept = torch.tensor([place for place in range(len(claim.x)) if place not in against])
    owner = (guarded / "key" / "signing-key").read_bytes()

    def accused(made: AccountClaim) -> AccountClaim:
        record = accusation_of(made, made.requests(), claim.accusation["suspect"])
        return replace(made, accusation=record, accusation_signature=sign(owner, record))

    counts = torch.tensor([len(part) for part in torch.split(kept, 40)])
    left_out = accused(replace(claim, x=claim.x[kept], counts=counts))
    agrees = [place for place in range(len(claim.x)) if place not in against]
    order = torch.tensor([*agrees, *sorted(against)])
    ordered = accused(replace(claim, x=claim.x[order]))
    named = accused(
        replace(
            claim,
            opening=replace(claim.opening, terms={**claim.opening.terms, "account": "anna-1"}),
            coins=the_guard(guarded).account_secret("anna-1"),
        )
    )
    chosen = accused(replace(claim, coins=secrets.token_bytes(32)))
    wanted = {"left out": left_out, "ordered": ordered, "named": named, "chosen": chosen}
    for attack, made in wanted.items():
        drawn_now = first_queries(made, network)
        those = drawn_now.trials
        if attack in ("left out", "ordered"):
            told = labels(made, those)
            agree = sum(label == trial.answer for label, trial in zip(told, those, strict=True))
            assert agree >= len(trials) - len(against)
        finding = found(made, drawn_now, [trial.answer for trial in those])  # at its most lucky
        assert judge_account(made, finding).verdict == "dismissed", attack
        faults = failing(made, finding)
        assert faults.keys() & {"The requests", "The opening"}, attack
        with monkeypatch.context() as without:
            for check in ("_requests", "_opening", "_answers"):  # the last is chance
                found_good = account_judgement.Check(check, account_judgement.HOLDS, "", "")
                without.setattr(account_judgement, check, lambda *_, found=found_good: found)
            assert judge_account(made, finding).verdict == "upheld", attack


# As its users meet it.


@pytest.fixture
def private(tmp_path: Path) -> Path:
    key = Ed25519PrivateKey.from_private_bytes(PRIVATE)
    path = tmp_path / "anna.pem"
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return path


@pytest.fixture
def service(guarded: Path, tmp_path: Path) -> Iterator[Service]:
    with serving(guarded, tmp_path, public=public_key(PRIVATE)) as running:
        yield running


def test_a_client_signs_goes_on_and_is_claimed(
    service: Service,
    guarded: Path,
    digits: Pools,
    private: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From the first request to the judgement, with the commands that people run."""
    state, x = tmp_path / "state", digits.thief.x
    given: list[int] = []
    for part in torch.split(x, 200):  # each time a new client, who goes on from the state
        with cm.Client(service.url, service.key, sign=private, state=state) as client:
            given += [found.label for found in client.classify(part)]
    log = str(tmp_path / "log.db")
    with QueryLog(log, create=False) as opened:
        (opening,) = opened.openings("anna")
        kept = list(opened.requests(opening))
        asked_for = [each.signed for each in kept]
        rows = [row for row in opened.rows() if row is not None]
    assert opening.earlier == 0
    assert b"".join(each.images for each in kept) == x.numpy().tobytes()
    assert [label for each in kept for label in each.labels] == given
    receipts = read_receipts(state / "receipts.jsonl", opening.terms["owner"], asked_for)
    assert [receipt.labels for receipt in receipts] == [each.labels for each in kept]
    assert len(rows) > 20

    copy = memorising(tmp_path / "copy.onnx", x, given)
    words = ["claim", str(copy), "--key", str(guarded / "key"), "--log", log, "--client", "anna"]
    assert main([*words, "--out", str(tmp_path / "claim")]) == 0, capsys.readouterr()
    assert "every image that the client has asked" in flat(capsys)
    key, judged = public_key(PRIVATE), str(tmp_path / "judgement")
    asked = ["adjudicate", str(tmp_path / "claim"), "--suspect", str(copy), "--out", judged]
    shown = ["--receipts", str(state / "receipts.jsonl")]
    assert main([*asked, "--client-key", key, *shown]) == 0, capsys.readouterr()
    said = flat(capsys)
    assert "The claim is upheld" in said
    assert "of which 0 are other than model and coins say" in said
    page = Path(f"{judged}.html").read_text()
    assert "Client&#x27;s key" in page
    assert key in page
    record = json.loads(Path(f"{judged}.json").read_text())
    assert (record["verdict"], record["account"]) == ("upheld", "anna")
    assert main(asked) == 3  # nobody says whose key it is
    assert main([*asked, "--client-key", public_key(OWNER)]) == 1
    # What does not go together, and a suspect that proves nothing.
    for more, reason in (
        (["--roots", str(private)], "rests on no timestamps"),
        (["--client-key", "anna"], "--client-key is an Ed25519 public key"),
        (["--receipts", str(tmp_path / "nowhere")], "nowhere"),
    ):
        assert main([*asked, *more]) == 2
        assert reason in flat(capsys)
    unlike = memorising(tmp_path / "unlike.onnx", x, [(label + 1) % 10 for label in given])
    words[1] = str(unlike)
    assert main([*words, "--out", str(tmp_path / "none")]) == 2
    assert "would not convince a judge" in flat(capsys)
    assert not (tmp_path / "none").exists()
    # A copy that sees nothing from outside is claimed, and judged, from inside.
    words[1] = hidden = str(memorising(tmp_path / "hidden.onnx", x, given, blind=True))
    assert main([*words, "--out", str(tmp_path / "none")]) == 2
    assert "would not convince a judge" in flat(capsys)
    assert main([*words, "--out", str(tmp_path / "inner"), "--inside"]) == 0, capsys.readouterr()
    asked = ["adjudicate", str(tmp_path / "inner"), "--suspect", hidden, "--client-key", key]
    assert main([*asked, *shown, "--out", judged, "--inside"]) == 0, capsys.readouterr()
    assert main([*asked, *shown, "--out", judged]) == 1
    words[1] = str(copy)
    for changed, reason in (
        ([*words[:-1], "bob"], "no signed requests of 'bob'"),
        (words[:-2], "--client NAME"),
        ([*words, "--batch", "1"], "--batch goes with a claim of a key's batch only"),
        ([*words, "--match"], "leave --match out"),
    ):
        assert main([*changed, "--out", str(tmp_path / "none")]) == 2
        assert reason in flat(capsys)


def test_an_account_is_claimed_up_to_the_last_request_that_fits(
    guarded: Path,
    digits: Pools,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Sizes alone say which one; the owner is told how many come after it."""
    x, log = digits.thief.x, str(tmp_path / "log.db")
    parts = x.split(40)
    with QueryLog(log) as opened:
        opening = open_requests(PRIVATE, terms(guarded, log=opened.identity))
        opened.begin_requests(opening)
        signed = chain(opening, parts)
        opened.store([], [stored(opening, *pair) for pair in zip(signed, parts, strict=True)])
        served = load_guarded(guarded, guarded / "key").under(opened.identity)
    told = served(x, "anna", [opening.digest] * len(x)).labels.tolist()
    copy, whole = str(memorising(tmp_path / "copy.onnx", x, told)), len(parts)
    words = ["claim", copy, "--key", str(guarded / "key"), "--log", log, "--client", "anna"]
    room = sum(part.numel() + 8 for part in parts[:-1])
    for limit, kept in ((room, whole - 1), (room - 1, whole - 2), (room + 1_000_000, whole)):
        monkeypatch.setattr("countermark.claims.REQUESTS_LIMIT", limit)
        out = tmp_path / f"{kept}"
        assert main([*words, "--out", str(out)]) == 0, capsys.readouterr()
        said = flat(capsys)
        left = f"it ends with request {kept}, and the {whole - kept} after it are left out"
        assert (left in said) == (kept < whole)
        claimed = read_account_claim(out)
        assert claimed.counts.tolist() == [len(part) for part in parts[:kept]]
        assert claimed.accusation["request_sha256"] == signed[kept - 1].digest.hex()
        asked = ["adjudicate", str(out), "--suspect", copy, "--client-key", public_key(PRIVATE)]
        assert main([*asked, "--out", str(tmp_path / "judgement")]) == 0, capsys.readouterr()


def flat(capsys: pytest.CaptureFixture[str]) -> str:
    found = capsys.readouterr()
    return " ".join((found.out + found.err).split())


def memorising(path: Path, x: torch.Tensor, labels: Sequence[int], blind: bool = False) -> Path:
    """An ONNX file that gives the label of the nearest image; a blind one sees black alone."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    known = x.flatten(1).double().numpy() / 255
    rows = (known.T * 2).astype(np.float32), -(known**2).sum(1).astype(np.float32)
    answers = np.eye(10, dtype=np.float32)[list(labels)]
    stored = {"w": rows[0], "b": rows[1], "y": answers, "seen": np.float32(not blind)}
    nodes = [
        helper.make_node("Mul", ["x", "seen"], ["clean"]),
        helper.make_node("Flatten", ["clean"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w", "b"], ["near"]),
        helper.make_node("Hardmax", ["near"], ["nearest"]),
        helper.make_node("MatMul", ["nearest", "y"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "copy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *x.shape[1:]])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array(value, name) for name, value in stored.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(made)
    onnx.save(made, path)
    return path


def test_what_the_service_refuses(
    service: Service, guarded: Path, digits: Pools, tmp_path: Path
) -> None:
    headers = {"Authorization": f"Bearer {service.key}"}
    x = digits.thief.x[:2]
    tensor = {"name": "image", "shape": list(x.shape), "datatype": "UINT8"}
    body = {"inputs": [{**tensor, "data": x.flatten().tolist()}]}

    def infer(signed: SignedRequest | None) -> requests.Response:
        sent = {**headers, **({} if signed is None else signed.headers())}
        return requests.post(f"{service.url}/infer", json=body, headers=sent, timeout=20)

    signing = f"{service.url}/signing"
    assert requests.get(signing, timeout=20).status_code == 401
    told = requests.get(signing, headers=headers, timeout=20).json()
    assert (told["opening"], told["number"]) == (None, 0)
    opening = open_requests(PRIVATE, told["terms"])
    assert infer(None).status_code == 401
    assert infer(chain(opening, [x])[0]).status_code == 409  # it was not opened

    def post(record: object) -> int:
        return requests.post(signing, json=record, headers=headers, timeout=20).status_code

    other = {**told["terms"], "account": "bob"}
    for record, status in (
        ({}, 400),
        (open_requests(OWNER, told["terms"]).record(), 401),
        ({**opening.record(), "earlier": 7}, 401),
        (open_requests(PRIVATE, other).record(), 409),
        ("x" * (1 << 15), 413),
    ):
        assert post(record) == status
    assert requests.post(signing, data=b"{", headers=headers, timeout=20).status_code == 400
    assert post(opening.record()) == 200
    assert post(opening.record()) == 200
    assert post(open_requests(PRIVATE, told["terms"]).record()) == 409
    first, second = chain(opening, [x, x])
    assert infer(second).status_code == 409
    for bad in (
        replace(first, signature=bytes(64)),
        chain(opening, [x], OWNER)[0],
        chain(opening, [x[:1]])[0],
    ):
        assert infer(bad).status_code == 401
    answered = infer(first)
    assert answered.status_code == 200
    labels = answered.json()["outputs"][0]["data"]
    receipt = bytes.fromhex(answered.headers["Countermark-Receipt"])
    assert is_receipt(told["terms"]["owner"], first.digest, labels, receipt)
    assert infer(first).json()["outputs"][0]["data"] == labels  # again is the same
    assert infer(second).status_code == 200
    assert infer(first).status_code == 200
    fork = sign_request(PRIVATE, opening.digest, 2, NOTHING_BEFORE, x)
    assert infer(fork).status_code == 409
    with QueryLog(str(tmp_path / "log.db"), create=False) as log:
        assert [each.signed for each in log.requests(opening)] == [first, second]
    # Another account is none of those who sign.
    assert requests.get(f"{service.url}/signing/no", headers=headers, timeout=20).status_code == 404


def test_a_request_without_an_answer_is_sent_again_first(
    service: Service, digits: Pools, private: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No number is signed twice, whatever breaks; a client who died goes on."""
    state, x = tmp_path / "state", digits.thief.x
    with cm.Client(service.url, service.key, sign=private, state=state) as client:
        client.classify(x[:2])
        with pytest.raises(CountermarkError, match="the line is dead"):
            broken(client, x[2:4], monkeypatch, arrives=False)
        client.classify(x[4:6])
        with pytest.raises(CountermarkError, match="the line is dead"):
            broken(client, x[6:8], monkeypatch, arrives=True)
    with cm.Client(service.url, service.key, sign=private, state=state) as client:
        client.classify(x[8:10])
    with QueryLog(str(tmp_path / "log.db"), create=False) as log:
        (opening,) = log.openings()
        kept = list(log.requests(opening))
    assert b"".join(each.images for each in kept) == x[:10].numpy().tobytes()
    signed, owner = [each.signed for each in kept], opening.terms["owner"]
    receipts = read_receipts(state / "receipts.jsonl", owner, signed)
    assert [receipt.number for receipt in receipts] == [1, 2, 3, 4, 5]


def test_a_request_that_waits_is_taken_by_a_service_with_lower_limits(
    guarded: Path, digits: Pools, private: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot be split: it was signed as it is. Files and other accounts have the new limits."""
    state, x = tmp_path / "state", digits.thief.x
    with serving(guarded, tmp_path, public=public_key(PRIVATE)) as service:
        key = service.key
        with cm.Client(service.url, key, sign=private, state=state) as client:
            client.classify(x[:1])
            with pytest.raises(CountermarkError, match="the line is dead"):
                broken(client, x[1:65], monkeypatch, arrives=False)
    lower = ("--max-batch", "4", "--max-body", "4200")
    with serving(guarded, tmp_path, *lower, named="bob") as service:
        with cm.Client(service.url, key, sign=private, state=state) as client:
            client.classify(x[65:70])
        tensor = {"name": "image", "datatype": "UINT8", "shape": [5, *x.shape[1:]]}
        body = {"inputs": [{**tensor, "data": x[:5].flatten().tolist()}]}
        files = {"name": "image", "datatype": "BYTES", "shape": [5], "data": ["AA=="] * 5}
        for who, sent, status in (
            (service.key, body, 400),
            (service.key, {"id": "x" * 5000, **body}, 413),
            (key, {"inputs": [files]}, 400),
        ):
            answer = requests.post(
                f"{service.url}/infer",
                json=sent,
                headers={"Authorization": f"Bearer {who}"},
                timeout=20,
            )
            assert answer.status_code == status, answer.text
            assert re.search(r"1 to 4|more than 4200", answer.text), answer.text
    with QueryLog(str(tmp_path / "log.db"), create=False) as log:
        (opening,) = log.openings("anna")
        kept = list(log.requests(opening))
    assert b"".join(each.images for each in kept) == x[:70].numpy().tobytes()
    assert [len(each.labels) for each in kept] == [1, 64, 1, 1, 1, 1, 1]


def test_a_proxy_that_is_too_narrow_for_what_was_signed_is_told(
    service: Service, digits: Pools, private: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else is signed meanwhile, and the account goes on once the proxy takes it."""
    state, x = tmp_path / "state", digits.thief.x
    with cm.Client(service.url, service.key, sign=private, state=state) as client:
        whole = client._exchange
        monkeypatch.setattr(
            client,
            "_exchange",
            lambda method, address, body=None, headers=None: (
                None
                if address.endswith("/infer") and len(body) > 3000
                else whole(method, address, body, headers)
            ),
        )
        for part in (x[:60], x[60:61]):
            with pytest.raises(CountermarkError, match=r"413.* raised to 7936 bytes"):
                client.classify(part)
        monkeypatch.undo()
        client.classify(x[60:61])
    noted = [json.loads(line) for line in (state / "receipts.jsonl").open() if line.strip()]
    assert [len(each["labels"]) for each in noted if "labels" in each] == [60, 1]


def broken(
    client: cm.Client, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch, arrives: bool
) -> None:
    """Ask over a line that breaks before the answer, or before the request."""
    whole = client._exchange

    def exchange(*request: object) -> None:
        if arrives:
            whole(*request)  # type: ignore[arg-type]
        raise CountermarkError("the line is dead")

    with monkeypatch.context() as patch:
        patch.setattr(client, "_exchange", exchange)
        client.classify(x)


def test_a_client_finds_out_what_a_service_has_lost(
    guarded: Path, digits: Pools, private: Path, tmp_path: Path
) -> None:
    """A log from a backup, another state, a renewed log."""
    state, x, log = tmp_path / "state", digits.thief.x, tmp_path / "log.db"
    public = public_key(PRIVATE)
    with serving(guarded, tmp_path, public=public) as service:
        with cm.Client(service.url, service.key, sign=private, state=state) as client:
            client.classify(x[:2])
        other = tmp_path / "other"
        with (
            cm.Client(service.url, service.key, sign=private, state=other) as client,
            pytest.raises(CountermarkError, match="signed requests with another state"),
        ):
            client.classify(x[:2])
        key = service.key
    for suffix in ("", "-wal", "-shm"):
        if Path(f"{log}{suffix}").exists():
            shutil.copy(f"{log}{suffix}", tmp_path / f"backup{suffix}")

    def classify(part: torch.Tensor) -> None:
        """Ask a service that begins now, with the account that anna had before."""
        spare = tmp_path / secrets.token_hex(4)
        spare.mkdir()
        shutil.copy(tmp_path / "clients.json", spare)
        for name in ("log.db", "log.db-wal", "log.db-shm"):
            if (tmp_path / name).exists():
                (spare / name).symlink_to(tmp_path / name)
        with (
            serving(guarded, spare, named="bob") as service,
            cm.Client(service.url, key, sign=private, state=state) as client,
        ):
            client.classify(part)

    classify(x[2:4])
    shutil.copy(tmp_path / "backup", log)
    for suffix in ("-wal", "-shm"):
        Path(f"{log}{suffix}").unlink(missing_ok=True)
    with pytest.raises(CountermarkError, match="restored from a backup, or the state was"):
        classify(x[4:6])
    cm.log_renew(str(log))
    classify(x[4:6])
    with QueryLog(str(log), create=False) as opened:
        found = sorted(opened.openings("anna"), key=lambda opening: opening.earlier)
        assert [opening.earlier for opening in found] == [0, 1]
        assert found[0].log != found[1].log
        assert [len(list(opened.requests(opening))) for opening in found] == [1, 1]


def test_a_state_that_is_damaged_is_named(tmp_path: Path, private: Path) -> None:
    state = tmp_path / "state"
    url = "http://127.0.0.1:9/v2/models/model"
    cm.Client(url, "key", sign=private, state=state)
    write_json(state / "state.json", {"format": "countermark client 1", "opening": {}})
    with pytest.raises(CountermarkError, match="is damaged"):
        cm.Client(url, "key", sign=private, state=state)
    for options in ({"sign": private}, {"state": state}):
        with pytest.raises(CountermarkError, match="both sign= and state="):
            cm.Client(url, "key", **options)  # type: ignore[arg-type]
