"""Registrations: what is read of them, what a judge makes of them, and what drawing again wins."""

import base64
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, encode_dss_signature
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from authority import Authority, stamped
from chances import most
from claiming import MODEL, Claimant, claimant, some_trials
from countermark.beacons import QUICKNET
from countermark.claims import judge_claim
from countermark.errors import CountermarkError
from countermark.evidence import judge
from countermark.files import canonical_json, sha256
from countermark.marking import Marking
from countermark.registry import (
    MARGIN,
    REKOR,
    Registrar,
    draws_of,
    is_promised,
    public_log,
    registering,
)
from countermark.timestamps import check_token, read_token
from countermark.tokens import TokenError, UntrustedError
from countermark.verbs.adjudicate import adjudicate
from countermark.verbs.claim import claim
from countermark.verbs.protect import protect
from countermark.watermarks import second_commitment
from public_log import GENESIS, PERIOD, LocalLog, new_identity, pem_of

MESSAGE = b"a first commitment"


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalLog]:
    made = LocalLog(tmp_path_factory.mktemp("log"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Authority]:
    made = Authority(tmp_path_factory.mktemp("authority") / "tsa")
    yield made
    made.close()


@pytest.fixture
def identity(tmp_path: Path) -> tuple[Path, Path]:
    return new_identity(tmp_path)


def registered(by: Claimant, log: LocalLog, private: Path) -> Claimant:
    """The same claimant, with a C1 that is registered."""
    assert by.authority is not None
    t1 = registering(log.file, private)(canonical_json(by.c1))
    c2 = second_commitment(by.c1, t1, MODEL)
    return replace(by, t1=t1, c2=c2, t2=stamped(by.authority, canonical_json(c2)))


def test_a_real_round_of_a_real_chain_is_known() -> None:
    """Round 657413 of quicknet, and times that drand's own clients give."""
    signature = bytes.fromhex(
        "b713718a38ae728dfd477991af2822e08d2f305e47718cef9f7848ce4050e7be"
        "41076862b98fad56e91a6b85b89cd97b"
    )
    assert QUICKNET.is_round(657413, signature)
    assert not QUICKNET.is_round(657414, signature)
    infinity = b"\xc0" + bytes(47)
    for other in (b"", infinity, bytes(48), signature[:-1] + b"\0", b"\xff" * 48):
        assert not QUICKNET.is_round(657413, other)
    noon = int(datetime(2026, 4, 20, 12, 30, 45, tzinfo=UTC).timestamp())
    assert QUICKNET.round_after(noon) == 27961627
    assert QUICKNET.round_after(0) == 1
    for time in range(noon - 5, noon + 5):
        number = QUICKNET.round_after(time)
        assert QUICKNET.time_of(number - 1) < time <= QUICKNET.time_of(number)


def test_the_library_of_the_curve_lifts_no_limit() -> None:
    """Nested JSON would end the process where the limit of recursion is a hundred thousand."""
    assert not QUICKNET.is_round(1, bytes(48))  # which imports it
    assert sys.getrecursionlimit() < 5000


def test_the_public_instance_is_known_by_its_key() -> None:
    assert public_log("rekor") is REKOR
    assert REKOR.digest == "c0d23d6ad406973f9559f3ba2d1ca01f84147d8ffc5b8445c224f98b9591801d"


def test_a_registration_says_when_and_has_the_round_after(
    log: LocalLog, identity: tuple[Path, Path]
) -> None:
    before = len(log.entries)
    made = registering(log.file, identity[0])(MESSAGE)
    token = check_token(made, sha256(MESSAGE), (), "T1", log.log)
    assert token == read_token(made, sha256(MESSAGE), "T1")
    assert len(log.entries) == before + 1
    time = log.entries[-1]["integratedTime"]
    assert token.time == datetime.fromtimestamp(time, UTC)
    number = json.loads(made)["round"]
    assert GENESIS + (number - 2) * PERIOD < time + MARGIN <= GENESIS + (number - 1) * PERIOD
    assert token.beacon == log.round(number)
    with pytest.raises(TokenError, match="one of something else"):
        read_token(made, sha256(b"another"), "T1")
    with pytest.raises(UntrustedError, match="another log"):
        check_token(made, sha256(MESSAGE), (), "T1", REKOR)
    with pytest.raises(UntrustedError, match="no public log was named"):
        check_token(made, sha256(MESSAGE), (), "T1", None)


def test_the_round_is_waited_for(
    log: LocalLog, identity: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No coin can be known before the log has the entry."""
    waited: list[float] = []
    clock = 1_800_000_000.0
    monkeypatch.setattr("countermark.registry.time.time", lambda: clock + sum(waited))
    monkeypatch.setattr("countermark.registry.time.sleep", waited.append)
    monkeypatch.setattr(log, "behind", 0)
    registering(log.file, identity[0])(MESSAGE)
    assert MARGIN <= sum(waited) <= MARGIN + PERIOD + 2


def _other(record: dict[str, Any], name: str) -> dict[str, Any]:
    changed = json.loads(json.dumps(record))
    if name == "time":
        changed["entry"]["integratedTime"] -= 30 * PERIOD
    elif name == "round":
        changed["round"] += 1
    elif name == "signature":
        changed["signature"] = record["signature"][:-2] + "00"
    elif name == "log":
        changed["entry"]["logID"] = "00" * 32
    elif name == "body":
        body = json.loads(base64.b64decode(record["entry"]["body"]))
        body["spec"]["data"]["hash"]["value"] = sha256(b"another")
        changed["entry"]["body"] = base64.b64encode(json.dumps(body).encode()).decode()
    elif name == "promise":
        changed["entry"]["signedEntryTimestamp"] = "\u00e9"
    elif name == "far":
        changed["entry"]["integratedTime"] = (1 << 40) - 1
    elif name == "chain":
        changed["chain"] = "00" * 32
    return changed


@pytest.mark.parametrize(
    "name", ["time", "round", "signature", "log", "body", "promise", "chain", "far"]
)
def test_nothing_of_a_registration_can_be_changed(
    log: LocalLog, identity: tuple[Path, Path], name: str
) -> None:
    made = registering(log.file, identity[0])(MESSAGE)
    changed = canonical_json(_other(json.loads(made), name))
    with pytest.raises(TokenError):
        check_token(changed, sha256(MESSAGE), (), "T1", log.log)


def test_an_owner_who_takes_another_round_is_found(
    log: LocalLog, identity: tuple[Path, Path]
) -> None:
    """A later round that is truly signed would be a draw that nobody counts."""
    record = json.loads(registering(log.file, identity[0])(MESSAGE))
    record["round"] += 5
    record["signature"] = log.round(record["round"]).hex()
    with pytest.raises(TokenError, match="not from the first round 60 seconds after"):
        check_token(canonical_json(record), sha256(MESSAGE), (), "T1", log.log)


@pytest.mark.parametrize(
    "hostile",
    [
        b"{",
        b"{}\n",
        b'{"format": "countermark registration 1"}',
        b"{" * 20_000,
        canonical_json({"format": "countermark registration 1", "entry": [], "chain": 1}),
        b"{" + b" " * (1 << 17),
    ],
)
def test_hostile_bytes_are_no_registration(log: LocalLog, hostile: bytes) -> None:
    with pytest.raises(TokenError):
        check_token(hostile, sha256(MESSAGE), (), "T1", log.log)


def test_a_judge_counts_every_draw(
    log: LocalLog, authority: Authority, identity: tuple[Path, Path]
) -> None:
    private, public = identity
    owner = claimant(some_trials(), authority)
    for number in range(11):  # more than one answer of the log holds
        registering(log.file, private)(b"a draw that was not liked, %d" % number)
    owner = registered(owner, log, private)
    accused = owner.finding(owner.labels, log=log.log, draws=draws_of(log.log, public))
    judged = judge_claim(owner.claim(owner.labels), accused)
    assert judged.verdict == "upheld", judged.checks
    assert judged.draws == 12
    (found,) = [check for check in judged.checks if check.name == "The draws"]
    assert "one of 12 commitments by this key" in found.found
    once = claimant(some_trials(), authority)
    alone = judge_claim(once.claim(once.labels), once.finding(once.labels))
    assert judged.test.log10_p_value == pytest.approx(alone.test.log10_p_value + np.log10(12))


def test_whoever_was_interrupted_goes_on_with_the_same_draw(
    log: LocalLog, identity: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    registrar = registering(log.file, identity[0])
    with monkeypatch.context() as patch:
        patch.setattr(Registrar, "_round", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            registrar(MESSAGE)
    before = len(log.entries)
    assert registrar(MESSAGE) == registrar(MESSAGE)
    assert len(log.entries) == before


def proposed_of(entry: dict[str, Any]) -> dict[str, Any]:
    proposed: dict[str, Any] = json.loads(base64.b64decode(entry["body"]))
    return proposed


def test_only_the_first_registration_of_a_commitment_draws(
    log: LocalLog, authority: Authority, identity: tuple[Path, Path]
) -> None:
    """Else one commitment, which counts once, would have as many draws as its owner likes."""
    private, public = identity
    owner = registered(claimant(some_trials(), authority), log, private)
    proposed = proposed_of(log.entries[-1])
    held = proposed["spec"]["signature"]["publicKey"]
    spelled = base64.b64decode(held["content"]) + b"\n"  # the log takes it for another entry
    held["content"] = base64.b64encode(spelled).decode()
    later = log.enter(proposed, at=log.entries[-1]["integratedTime"] + 10)
    assert later is not None
    raw = {name: later[name] for name in ("body", "integratedTime", "logID", "logIndex")}
    raw["signedEntryTimestamp"] = later["verification"]["signedEntryTimestamp"]
    record = json.loads(owner.t1 or b"")
    number = log.log.chain.round_after(later["integratedTime"] + MARGIN)
    record |= {"entry": raw, "round": number, "signature": log.round(number).hex()}
    t1 = canonical_json(record)
    c2 = second_commitment(owner.c1, t1, MODEL)
    again = replace(owner, t1=t1, c2=c2, t2=stamped(authority, canonical_json(c2)))
    assert not torch.equal(owner.labels, again.labels)
    draws = draws_of(log.log, public)
    assert (draws.count, len(draws.entries)) == (1, 2)
    accused = again.finding(again.labels, log=log.log, draws=draws)
    judged = judge_claim(again.claim(again.labels), accused)
    assert judged.verdict == "dismissed"
    assert [check.name for check in judged.checks if check.result == "fails"] == ["The draws"]


def test_nobody_else_can_add_to_the_count(
    log: LocalLog, authority: Authority, identity: tuple[Path, Path]
) -> None:
    """On a bare curve digests can be made up that fit a public key; a log takes them.

    The accused would enter thousands, and p would be multiplied by all of them.
    """
    private, public = identity
    registered(claimant(some_trials(), authority), log, private)
    curve = ec.generate_private_key(ec.SECP256R1())
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    # R = u G + v Q, r = x of R, s = r / v and the digest u r / v; with v = 1 by way of a known key.
    numbers = curve.private_numbers()
    u = 123456789
    point = ec.derive_private_key((u + numbers.private_value) % order, ec.SECP256R1())
    r = point.public_key().public_numbers().x % order
    digest = (u * r) % order
    forged = encode_dss_signature(r, r)
    made_up = digest.to_bytes(32, "big")
    curve.public_key().verify(forged, made_up, ec.ECDSA(Prehashed(hashes.SHA256())))
    proposed = proposed_of(log.entries[-1])
    proposed["spec"]["data"]["hash"]["value"] = made_up.hex()
    proposed["spec"]["signature"]["content"] = base64.b64encode(forged).decode()
    log.enter(proposed)  # under the owner's key, which it does not fit
    with pytest.raises(CountermarkError, match="not signed by the key that it names"):
        draws_of(log.log, public)
    log.entries.pop()
    curve_file = public.with_name("curve.pem")
    curve_file.write_text(pem_of(curve.public_key()))
    with pytest.raises(CountermarkError, match="no public key for RSA"):
        draws_of(log.log, curve_file)


def test_what_a_judge_cannot_see_is_undecidable(
    log: LocalLog,
    authority: Authority,
    identity: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    private, public = identity
    owner = registered(claimant(some_trials(), authority), log, private)
    made, trusted = owner.claim(owner.labels), log.log

    def open_checks(**options: Any) -> list[str]:
        judged = judge_claim(made, owner.finding(owner.labels, **options))
        assert judged.verdict == "undecidable", judged.checks
        return [check.name for check in judged.checks if check.result != "holds"]

    draws = draws_of(trusted, public)
    assert open_checks() == ["T1, over the trials", "The draws"]
    assert open_checks(log=REKOR, draws=draws) == ["T1, over the trials"]
    assert open_checks(log=trusted) == ["The draws"]
    other, others = new_identity(tmp_path, "stranger")
    for number in range(3):
        registering(log.file, other)(b"%d" % number)
    stranger = draws_of(trusted, others)
    assert stranger.count == 3
    assert open_checks(log=trusted, draws=stranger) == ["The draws"]
    monkeypatch.setattr(log, "hidden", {entry.index for entry in draws.entries})
    assert open_checks(log=trusted, draws=draws_of(trusted, public)) == ["The draws"]


def test_a_timestamp_is_no_registration_and_the_other_way_round(
    log: LocalLog, authority: Authority, identity: tuple[Path, Path]
) -> None:
    """T2 and the answers are timestamped: a registration in their place is none."""
    owner = claimant(some_trials(), authority)
    registrar = registering(log.file, identity[0])
    forged = replace(owner, t2=registrar(canonical_json(owner.c2)))
    judged = judge_claim(forged.claim(owner.labels), owner.finding(owner.labels))
    assert judged.verdict == "undecidable"
    # A judge who wants draws counted is not content with a timestamp.
    judged = judge_claim(owner.claim(owner.labels), owner.finding(owner.labels, log=log.log))
    assert judged.verdict == "undecidable"
    assert [check.name for check in judged.checks if check.result != "holds"] == ["The draws"]


@pytest.mark.parametrize("counted", [True, False])
def test_drawing_again_wins_nothing_where_draws_are_counted(counted: bool) -> None:
    """An accuser draws 40 times and claims against a stranger with the best of all draws.

    Without the count, they convict as often as the best of 40 does.
    """
    numbers, runs, tries, alpha = np.random.default_rng(3), 300, 40, 0.01
    convicted = 0
    cells = list(range(60))
    for _ in range(runs):
        said = numbers.integers(0, 2, 60)
        coins = numbers.integers(0, 2, (tries, 60))
        best = coins[(coins == said).sum(1).argmax()]
        outcomes = np.where(best == said, 1, -1).tolist()
        p = judge(cells, outcomes, ways=tries if counted else 1).p_value
        convicted += p is not None and p <= alpha
    assert (convicted <= most(runs, alpha)) == counted
    if not counted:
        assert convicted > 0.2 * runs


def test_a_log_that_answers_badly_is_one_line(
    log: LocalLog, identity: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = identity
    for answer in ("<html>", "[]", "{}", '{"a": {"body": "e30="}}', '{"a": 1, "b": 2}', "{" * 9999):
        registrar = registering(log.file, private)
        with monkeypatch.context() as patch:
            patch.setattr(log, "spoil", lambda _, answer=answer: answer)
            with pytest.raises(CountermarkError):
                registrar(MESSAGE)
            with pytest.raises(CountermarkError):
                registering(log.file, private)
    for answer in ("<html>", "{}", "[[]]", '["a", {}]'):
        with monkeypatch.context() as patch:
            patch.setattr(log, "spoil", lambda _, answer=answer: answer)
            with pytest.raises(CountermarkError):
                draws_of(log.log, public)
    for path, content in {
        "none.json": None,
        "empty.json": "{}",
        "other.json": json.dumps({**json.loads(log.file.read_text()), "format": "another"}),
        "key.json": json.dumps({**json.loads(log.file.read_text()), "public_key": "none"}),
    }.items():
        if content is not None:
            (tmp_path / path).write_text(content)
        with pytest.raises(CountermarkError):
            public_log(tmp_path / path)
    with pytest.raises(CountermarkError, match="no private key"):
        registering(log.file, public)
    with pytest.raises(CountermarkError, match="no public key"):
        draws_of(log.log, private)
    with pytest.raises(CountermarkError, match="there is no public log"):
        public_log("a" * 300)


def test_from_protect_to_a_judgement(
    log: LocalLog, authority: Authority, identity: tuple[Path, Path], tmp_path: Path
) -> None:
    private, public = identity
    stamps = {"tsa": authority.url, "roots": authority.root}
    protect("digits", out=tmp_path / "mine", register=str(log.file), identity=private, **stamps)
    claim(tmp_path / "mine", key=tmp_path / "mine" / "key", out=tmp_path / "claim", **stamps)
    options = {"suspect": tmp_path / "mine", "roots": authority.root, "out": tmp_path / "judgement"}
    unseen = adjudicate(tmp_path / "claim", **options)
    assert unseen.verdict == "undecidable"
    judged = adjudicate(tmp_path / "claim", registry=str(log.file), identity=public, **options)
    assert judged.verdict == "upheld", judged.checks
    assert "the only one by this key" in str(judged.checks)
    written = json.loads((tmp_path / "judgement.json").read_text())
    assert written["log"] == {"address": log.url, "sha256": log.log.digest}
    assert len(written["draws"]["entries"]) == 1
    assert json.loads((tmp_path / "claim" / "claim.json").read_text())["format"][-1] == "2"
    for path in (tmp_path / "mine").rglob("*.json"):
        assert str(private) not in path.read_text()


def test_a_loop_of_ones_own_registers_too(
    log: LocalLog, authority: Authority, identity: tuple[Path, Path], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    x = torch.randint(0, 256, (400, 1, 8, 8), dtype=torch.uint8)
    given = {"key": tmp_path / "key", "tsa": authority.url, "roots": authority.root}
    registered = {"register": log.file, "identity": identity[0]}
    bases = (x, network(x / 255).argmax(1))
    first = Marking(network, bases, **given, **registered)
    again = Marking(network, bases, **given, **registered)
    assert again.resumed
    assert torch.equal(first.key.labels, again.key.labels)
    assert first.key.t1 is not None
    token = check_token(first.key.t1, sha256(canonical_json(first.key.c1)), (), "T1", log.log)
    assert token.beacon == log.round(json.loads(first.key.t1)["round"])
    with pytest.raises(CountermarkError, match="go together, and with tsa"):
        Marking(network, bases, **given, register="rekor")


def test_options_that_cannot_work_are_refused() -> None:
    for options in ({"register": "rekor"}, {"identity": "a.pem"}):
        with pytest.raises(CountermarkError, match="goes with"):
            protect("digits", out="nowhere", **options)
    with pytest.raises(CountermarkError, match="--identity goes with --registry only"):
        adjudicate("claim", suspect="them", identity="a.pem")


def test_an_entry_of_a_real_log_is_known() -> None:
    """Entry 7390977 of Rekor's staging instance, with the public key of that instance.

    It was signed with a certificate, so it registers nothing; but the log signed it.
    """
    raw = json.loads(Path(__file__).with_name("rekor_entry.json").read_text())
    key = load_pem_public_key(
        b"-----BEGIN PUBLIC KEY-----\n"
        b"MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEDODRU688UYGuy54mNUlaEBiQdTE9\n"
        b"nYLr0lg6RXowI/QV/RE1azBn4Eg5/2uTOMbhB1/gfcHzijzFi9Tk+g1Prg==\n"
        b"-----END PUBLIC KEY-----\n"
    )
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert is_promised(raw, key)
    assert not is_promised({**raw, "integratedTime": raw["integratedTime"] + 1}, key)
    assert not is_promised(raw, REKOR.key)
