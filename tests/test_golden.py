"""Files of every release so far: this one must read them, and find in them what was found then."""

import shutil
from pathlib import Path

import pytest
import torch

from countermark.claims import Finding, judge_claim, read_claim
from countermark.data import load_pools
from countermark.evaluation import predict
from countermark.files import canonical_json, read_json, sha256
from countermark.guard import QueryLog, guard_sha256, load_guarded, read_head
from countermark.networks import load_model
from countermark.service.clients import Clients
from countermark.timestamps import check_token, decode_token, load_roots
from countermark.verbs.verify import verify
from countermark.watermarks import check_signature, load_key

RELEASES = sorted(
    path
    for path in (Path(__file__).parent / "golden").iterdir()
    if path.is_dir() and path.name[0].isdigit()
)


@pytest.fixture(params=RELEASES, ids=lambda path: path.name)
def release(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy: SQLite writes beside what it reads."""
    shutil.copytree(request.param, tmp_path / "release")
    return tmp_path / "release"


def test_model_and_key_are_read_and_belong_together(release: Path) -> None:
    key = load_key(release / "mine" / "key")
    network, description = load_model(release / "mine")
    assert description.data.place == "digits"
    assert sum(outcome == 1 for outcome in key.outcomes(predict(network, key.watermarks.x))) >= 155
    found = verify(release / "mine", key=release / "mine" / "key")
    assert (found.verdict, found.test.trials) == ("match", 160)


def test_the_commitment_holds(release: Path) -> None:
    record, roots = (
        read_json(release / "mine" / "commitment.json"),
        load_roots(release / "roots.pem"),
    )
    public = record["c1"]["public_key"]
    for part, token in (("c1", "t1"), ("c2", "t2"), ("c3", "t3")):
        check_signature(public, record[part], record[f"{part}_signature"], part)
        response = decode_token(record[token], token)
        if response is not None:
            check_token(response, sha256(canonical_json(record[part])), roots, token)
    assert record["t1"] is not None
    assert record["c3"]["guard_sha256"] == guard_sha256(read_json(release / "mine" / "guard.json"))


def test_the_guard_answers_as_it_did(release: Path) -> None:
    """The same key, client and query give the same trial, whatever the release."""
    model = load_guarded(release / "mine", release / "mine" / "key")
    with QueryLog(str(release / "log.db"), create=False) as log:
        rows = {
            row.cell: row for row in log.rows(read_head(release / "head.json")) if row is not None
        }
    assert rows
    answered = model(load_pools("digits", 0).thief.x, "anna")
    again = {trial.cell: trial for trial in reversed(answered.trials)}
    common = again.keys() & rows.keys()
    assert len(common) >= 0.9 * len(rows)  # another processor may round a feature to the other side
    for cell in common:
        trial, row = again[cell], rows[cell]
        assert (trial.heads, trial.tails, trial.answer) == (row.heads, row.tails, row.answer)
        assert abs(trial.chance - row.chance) <= 8


def test_the_claim_is_judged_as_it_was(release: Path) -> None:
    claim, then = read_claim(release / "claim"), read_json(release / "judgement.json")
    network, digest = claim.network()
    labels = torch.tensor(claim.answers["labels"])
    finding = Finding(
        labels=labels,
        suspect=claim.answers["suspect"],
        model_sha256=digest,
        model_labels=predict(network, claim.opened.x),
        roots=load_roots(release / "roots.pem"),
    )
    found = judge_claim(claim, finding)
    assert found.verdict == then["verdict"] == "upheld"
    assert found.test.log10_p_value == then.get("test", then)["log10_p_value"]  # in 0.1.0 beside it
    assert [check.name for check in found.checks if check.result != "holds"] == []


def test_accounts_are_read(release: Path) -> None:
    assert Clients(release / "mine" / "clients.json").find("no such key") is None
