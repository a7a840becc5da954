"""The judge: true claims, and every false claim that we could think of.

For each false claim, a test switches off the protection against it once, to see that this
protection is what held.

`COUNTERMARK_CLAIMS=2000 pytest tests/test_claims.py -k false_claims` makes that many tries instead
of a few.
"""

import os
import random
import secrets
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import claiming
from authority import Authority, stamped
from chances import most
from claiming import MODEL, SUSPECT, Claimant, claimant, rows_of, some_trials
from countermark.attacks import pgd
from countermark.claims import (
    Claim,
    Finding,
    Judgement,
    Rival,
    judge_claim,
    judgement,
    page,
    read_claim,
    record,
    sentence,
    write_claim,
)
from countermark.data import Pools, pixels
from countermark.errors import CountermarkError
from countermark.evaluation import predict
from countermark.evidence import judge
from countermark.files import canonical_json, sha256
from countermark.networks.named import build
from countermark.timestamps import load_roots, read_token
from countermark.training import TrainConfig, train
from countermark.watermarks import (
    WatermarkSet,
    commitment,
    draw_coins,
    leaf_hash,
    leaf_secrets,
    leaves,
    merkle_paths,
    root_of_path,
    sign,
)
from countermark.watermarks.commitment import merkle_root, path_length

TRIES = int(os.environ.get("COUNTERMARK_CLAIMS", "24"))


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Authority]:
    made = Authority(tmp_path_factory.mktemp("tsa") / "ec")
    yield made
    made.close()


@pytest.fixture(scope="module")
def owner_(authority: Authority) -> Claimant:
    """An owner whose model and whose thief answer as the coins fell."""
    return claimant(some_trials(), authority)


def random_labels(trials: WatermarkSet, seed: int) -> torch.Tensor:
    """A stranger: one of the two answers, whatever the coin."""
    sides = torch.randint(0, 2, (len(trials), 1), generator=torch.Generator().manual_seed(seed))
    return trials.answers.gather(1, sides).squeeze(1)


def result_of(found: Judgement, name: str) -> str:
    return next(check.result for check in found.checks if check.name == name)


# What holds


def test_a_true_claim_is_upheld_and_a_stranger_goes_free(owner_: Claimant) -> None:
    found = judge_claim(owner_.claim(owner_.labels), owner_.finding(owner_.labels))
    assert found.verdict == "upheld"
    assert {check.result for check in found.checks} == {"holds"}
    assert found.test.p_value == judge(range(40), [1] * 40, batches=2).p_value
    stranger = random_labels(owner_.trials, 1)
    found = judge_claim(owner_.claim(stranger), owner_.finding(stranger))
    assert found.verdict == "dismissed"
    assert [check.name for check in found.checks if check.result == "fails"] == ["The test"]


def test_each_batch_convicts_without_the_others(owner_: Claimant) -> None:
    """A thief who unlearned the batch that was shown still remembers the other."""
    trials = owner_.trials
    unlearned = torch.where(trials.batch == 0, trials.answers.sum(1) - owner_.labels, owner_.labels)
    first = judge_claim(owner_.claim(unlearned, 0), owner_.finding(unlearned, 0))
    second = judge_claim(owner_.claim(unlearned, 1), owner_.finding(unlearned, 1))
    assert (first.verdict, second.verdict) == ("dismissed", "upheld")


def test_a_private_mark_is_undecidable() -> None:
    owner = claimant(some_trials(), None)
    found = judge_claim(owner.claim(owner.labels), owner.finding(owner.labels))
    assert found.verdict == "undecidable"
    assert result_of(found, "T1, over the trials") == "cannot tell"


def test_too_few_answers_are_undecidable_and_unanswered_trials_do_not_agree(
    owner_: Claimant,
) -> None:
    silent = torch.full_like(owner_.labels, -1)
    found = judge_claim(owner_.claim(silent), owner_.finding(silent))
    assert found.verdict == "undecidable"
    assert (found.test.agreements, found.test.neither) == (0, 40)


def test_an_endpoint_that_changed_its_answers_cannot_be_decided(owner_: Claimant) -> None:
    endpoint = {"kind": "endpoint", "url": "http://127.0.0.1/v2/models/m"}
    claim = owner_.claim(owner_.labels, suspect=endpoint)
    now = random_labels(owner_.trials, 2)
    found = judge_claim(claim, owner_.finding(now, suspect=endpoint))
    assert found.verdict == "undecidable"
    assert "answers otherwise" in next(
        check.meaning for check in found.checks if check.name == "The test"
    )
    file = judge_claim(owner_.claim(owner_.labels), owner_.finding(now))
    assert file.verdict == "dismissed"  # a file does not change: the record was wrong


@given(st.integers(1, 70))
def test_every_path_leads_to_the_root_and_no_other_does(count: int) -> None:
    nodes = [sha256(bytes([i])).encode()[:32] for i in range(count)]
    root, paths = merkle_root(nodes), merkle_paths(nodes)
    for index, path in enumerate(paths):
        assert len(path) == path_length(index, count)
        assert root_of_path(nodes[index], index, count, path) == root
        assert count == 1 or root_of_path(nodes[index], (index + 1) % count, count, path) != root
        assert root_of_path(nodes[index], index, count, [*path, b"0" * 32]) is None


# Attacks. Each test has a claim that must not be upheld and the protection that stops it; with the
# protection switched off, the claim is upheld.


def believed(claim: Claim) -> dict[int, int]:
    """The coins as an accuser would have them: here, always the second answer."""
    return dict.fromkeys(range(len(claim.opened)), 1)


def test_biased_inputs_do_not_convict(owner_: Claimant, monkeypatch: pytest.MonkeyPatch) -> None:
    """A suspect always gives the larger label.

    The accuser may know this beforehand, but it is worth nothing once coins decide.
    """
    biased = owner_.trials.answers[:, 1]
    claim, finding = owner_.claim(biased), owner_.finding(biased, model_labels=biased[:40])
    assert judge_claim(claim, owner_.finding(biased)).verdict == "dismissed"
    monkeypatch.setattr(judgement, "_coins", believed)
    assert judge_claim(claim, finding).verdict == "upheld"


def test_transferable_examples_do_not_convict(
    authority: Authority,
    surrogates: list[torch.nn.Module],
    innocents: list[torch.nn.Module],
    digits: Pools,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The accuser claims the target label of transferable examples (Liu et al., 2024).

    Targeted examples that are crafted on several surrogates fool unrelated models as well.
    """
    trials, fooled = transferable(surrogates, innocents, digits)
    assert min(fooled) > 0.8  # the attack itself works
    accuser = claimant(trials, authority)
    for innocent in innocents:
        labels = predict(innocent, trials.x)
        assert judge_claim(accuser.claim(labels), accuser.finding(labels)).verdict != "upheld"
    monkeypatch.setattr(
        judgement, "_coins", lambda claim: dict(enumerate(targets(claim.opened.answers)))
    )
    convicted = 0
    for innocent in innocents:
        labels = predict(innocent, trials.x)
        finding = accuser.finding(
            labels, model_labels=torch.tensor(aimed(trials.answers))[trials.batch == 0], alpha=1e-6
        )
        convicted += judge_claim(accuser.claim(labels), finding).verdict == "upheld"
    assert convicted == len(innocents)


def test_grinding_before_the_token_wins_nothing(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The accuser has tried secrets until all coins that they can compute suit a stranger.

    The authority's signature then draws the coins anew. The test works the other way round: it
    makes a stranger whose answers suit the computed coins. No amount of computation could
    tell the two apart.
    """
    trials, secret = some_trials(seed=3), secrets.token_bytes(32)
    computed = draw_coins(b"", b"", leaf_secrets(secret, len(trials)))
    innocent = trials.answers.gather(1, computed.unsqueeze(1)).squeeze(1)
    accuser = claimant(trials, authority, secret=secret)
    assert judge_claim(accuser.claim(innocent), accuser.finding(innocent)).verdict != "upheld"
    monkeypatch.setattr(
        judgement,
        "draw_coins",
        lambda _c1, _beacon, leaf_secrets, indices: draw_coins(b"", b"", leaf_secrets, indices),
    )
    assert (
        judge_claim(
            accuser.claim(innocent), accuser.finding(innocent, model_labels=innocent[:40])
        ).verdict
        == "upheld"
    )


def same_secrets(secret: bytes, count: int) -> list[bytes]:
    return [secret] * count


def test_equal_leaf_secrets_do_not_make_one_coin_of_all(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal leaf secrets must not let one coin decide the whole batch.

    Nobody can see how leaf secrets were made. An accuser could use one secret for all leaves and
    order the answers of each trial by a habit of the suspect. If a single coin then decided the
    whole batch, half of all strangers would be convicted.
    """
    monkeypatch.setattr(commitment, "leaf_secret", lambda secret, _index: secret)
    for room in (commitment, record, claiming):
        monkeypatch.setattr(room, "leaf_secrets", same_secrets)
    trials = some_trials()
    habit = trials.answers[:, 1]

    def verdicts(count: int) -> Iterator[str]:
        for _ in range(count):
            accuser = claimant(trials, authority)
            yield judge_claim(
                accuser.claim(habit), accuser.finding(habit, model_labels=habit[:40])
            ).verdict

    assert "upheld" not in list(verdicts(8))

    def without_number(
        c1: bytes, beacon: bytes, leaf_secrets: list[bytes], indices: list[int] | None = None
    ) -> torch.Tensor:
        return draw_coins(c1, beacon, leaf_secrets, [0] * len(leaf_secrets))

    monkeypatch.setattr(judgement, "draw_coins", without_number)
    seen: set[str] = set()
    for verdict in verdicts(40):  # one fair coin each: all forty fall alike once in 2^39 times
        seen.add(verdict)
        if len(seen) == 2:
            break
    assert seen == {"upheld", "dismissed"}


def chosen(claim: Claim, rows: torch.Tensor) -> Claim:
    return replace(claim, opened=rows_of(claim.opened, rows))


def test_leaves_opened_by_choice_do_not_convict(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuser = claimant(some_trials(400), authority)
    innocent = random_labels(accuser.trials, 7)
    agreeing = torch.nonzero(
        (innocent == accuser.labels)[:200]
    ).flatten()  # 31 are enough; so few of 200 agree once in 10^23 times
    claim = chosen(accuser.claim(innocent), agreeing)
    finding = accuser.finding(innocent)
    finding = replace(
        finding, labels=finding.labels[agreeing], model_labels=finding.model_labels[agreeing]
    )
    found = judge_claim(claim, finding)
    assert (found.verdict, result_of(found, "The opened batch")) == ("dismissed", "fails")
    assert found.test.disagreements == 200 - len(agreeing)  # missing leaves disagree
    monkeypatch.setattr(judgement, "_expected", lambda claim: claim.opened.index.tolist())
    assert judge_claim(claim, finding).verdict == "upheld"


@pytest.mark.parametrize("missing", [1, 7])
def test_missing_leaves_disagree(owner_: Claimant, missing: int) -> None:
    rows = torch.arange(40 - missing)
    finding = owner_.finding(owner_.labels)
    finding = replace(finding, labels=finding.labels[rows], model_labels=finding.model_labels[rows])
    found = judge_claim(chosen(owner_.claim(owner_.labels), rows), finding)
    assert (found.verdict, found.test.disagreements) == ("dismissed", missing)


def tampered(claim: Claim, attack: str) -> Claim:
    """A claim whose trials are other than those that were committed."""
    opened, order = claim.opened, torch.arange(len(claim.opened))
    if attack == "swapped":
        order[[0, 1]] = torch.tensor([1, 0])
        return replace(claim, opened=replace(rows_of(opened, order), index=opened.index))
    if attack == "twice":
        order[1] = 0
        return replace(claim, opened=rows_of(opened, order))
    changed = {
        "image": {"x": opened.x ^ 1},
        "answers": {"answers": opened.answers.flip(1)},
        "other answers": {
            "answers": torch.stack((opened.answers[:, 0], opened.answers[:, 1] + 1), 1)
        },
        "secrets": {"secrets": opened.secrets ^ 1},
        "paths": {"paths": opened.paths ^ 1},
        "cells": {"cell": torch.zeros_like(opened.cell)},
        "another batch": {"batch": 1 - opened.batch},
        "other leaves": {"index": opened.index + 40},
        "negative": {"index": -opened.index - 1},
    }[attack]
    return replace(claim, opened=replace(opened, **changed))


@pytest.mark.parametrize(
    "attack",
    [
        "swapped",
        "twice",
        "image",
        "answers",
        "other answers",
        "secrets",
        "paths",
        "cells",
        "another batch",
        "other leaves",
        "negative",
    ],
)
def test_trials_that_were_not_committed_are_found(owner_: Claimant, attack: str) -> None:
    found = judge_claim(
        tampered(owner_.claim(owner_.labels), attack), owner_.finding(owner_.labels)
    )
    assert (found.verdict, result_of(found, "The opened batch")) == ("dismissed", "fails")


def test_made_up_leaves_convict_only_without_the_paths(
    owner_: Claimant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaf secrets chosen after T1 give any wanted coins.

    Only the path to the committed root prevents this.
    """
    innocent = random_labels(owner_.trials, 9)
    claim, opened = owner_.claim(innocent), owner_.claim(innocent).opened
    wished = (innocent[:40] == opened.answers[:, 1]).long()
    c1 = canonical_json(owner_.c1)
    beacon = read_token(owner_.t1 or b"", sha256(c1), "T1").beacon

    def suiting(index: int, side: int) -> bytes:
        return next(
            s
            for s in (secrets.token_bytes(32) for _ in range(1000))
            if int(draw_coins(c1, beacon, [s], [index])) == side
        )

    made_up = torch.tensor(
        [list(suiting(index, int(side))) for index, side in enumerate(wished)], dtype=torch.uint8
    )
    claim = replace(claim, opened=replace(opened, secrets=made_up))
    finding = owner_.finding(innocent, model_labels=innocent[:40])
    assert judge_claim(claim, finding).verdict == "dismissed"
    monkeypatch.setattr(type(opened), "roots", lambda self, _count: [owner_.c1["root"]] * len(self))
    assert judge_claim(claim, finding).verdict == "upheld"


def test_a_suspect_older_than_the_model_goes_free(authority: Authority) -> None:
    """A suspect older than the model goes free whatever it answers.

    Here it answers as the coins fell, so that only its age speaks for it.
    """
    digest = stamped(authority, b"the suspect's file")
    owner = claimant(some_trials(), authority)
    suspect = {"kind": "file", "sha256": sha256(b"the suspect's file")}
    claim, finding = (
        owner.claim(owner.labels, suspect=suspect),
        owner.finding(owner.labels, suspect=suspect),
    )
    assert judge_claim(claim, finding).verdict == "upheld"  # without the token
    # Tokens tell whole seconds here. If less than one second lies between them, the order cannot be
    # told and does not help the accused.
    times = {
        "T2, over the model": read_token(
            owner.t2 or b"", sha256(canonical_json(owner.c2)), "T2"
        ).time
    }
    made = read_token(digest, suspect["sha256"], "T").time
    found = judge_claim(claim, replace(finding, suspect_token=digest))
    older = made < times["T2, over the model"]
    assert found.verdict == ("dismissed" if older else "upheld")
    later = judge_claim(
        claim, replace(finding, suspect_token=stamped(authority, b"the suspect's file"))
    )
    assert later.verdict == "upheld"
    foreign = judge_claim(claim, replace(finding, suspect_token=b"0"))
    assert foreign.verdict == "upheld"


def test_age_is_what_frees_an_older_suspect(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = stamped(authority, b"file")
    time.sleep(1.1)
    owner = claimant(some_trials(), authority)
    suspect = {"kind": "file", "sha256": sha256(b"file")}
    found = judge_claim(
        owner.claim(owner.labels, suspect=suspect),
        owner.finding(owner.labels, suspect=suspect, suspect_token=token),
    )
    assert (found.verdict, result_of(found, "Age of the suspect")) == ("dismissed", "fails")


def test_another_suspect_than_the_accused_is_undecidable(owner_: Claimant) -> None:
    claim = owner_.claim(owner_.labels, suspect={"kind": "file", "sha256": "00" * 32})
    found = judge_claim(claim, owner_.finding(owner_.labels))
    assert (found.verdict, result_of(found, "The suspect")) == ("undecidable", "cannot tell")
    innocent = random_labels(
        owner_.trials, 6
    )  # a model that somebody hands the judge instead of the accused one frees nobody
    found = judge_claim(claim, owner_.finding(innocent))
    assert (found.verdict, result_of(found, "The test")) == ("undecidable", "cannot tell")


ENDPOINT = {"kind": "endpoint", "url": "http://127.0.0.1/v2/models/m"}
SHOWN = {"kind": "file", "sha256": sha256(b"what somebody hands the judge")}


@pytest.fixture(scope="module")
def ages(authority: Authority) -> dict[str, tuple[Claimant, bytes | None]]:
    """An owner and a token over the shown file, by the age of the token.

    The token is older than the marked model, between the model and the accusation, or missing.
    """
    older = stamped(authority, b"what somebody hands the judge")
    time.sleep(1.1)
    owner = claimant(some_trials(), authority)
    time.sleep(1.1)
    between = stamped(authority, b"what somebody hands the judge")
    time.sleep(1.1)
    return {"older": (owner, older), "between": (owner, between), "none": (owner, None)}


@pytest.mark.parametrize("age", ["older", "between", "none"])
@pytest.mark.parametrize("accused", [SUSPECT, ENDPOINT], ids=["file", "endpoint"])
def test_another_model_however_old_acquits_nobody(
    ages: dict[str, tuple[Claimant, bytes | None]],
    age: str,
    accused: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The thief keeps the stolen model and hands the judge an innocent one.

    The stranger has an honest timestamp of any age, or none.
    """
    owner, token = ages[age]
    claim = owner.claim(owner.labels, suspect=accused)
    innocent = random_labels(owner.trials, 6)
    almost = torch.where(
        torch.arange(len(innocent)) == 3, owner.trials.answers.sum(1) - owner.labels, owner.labels
    )
    for labels in (innocent, almost, *([owner.labels] if accused is SUSPECT else [])):
        found = judge_claim(claim, owner.finding(labels, suspect=SHOWN, suspect_token=token))
        assert (found.verdict, result_of(found, "The suspect")) == ("undecidable", "cannot tell")
        assert "fails" not in {check.result for check in found.checks}
        assert "fixed against." not in page(found, {})
    monkeypatch.setattr(judgement, "is_accused", lambda *_arguments: True)
    found = judge_claim(claim, owner.finding(innocent, suspect=SHOWN, suspect_token=token))
    assert found.verdict == "dismissed"


@pytest.mark.parametrize("age", ["between", "none"])
@pytest.mark.parametrize("accused", [SUSPECT, ENDPOINT], ids=["file", "endpoint"])
def test_another_model_however_old_convicts_nobody(
    ages: dict[str, tuple[Claimant, bytes | None]],
    age: str,
    accused: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The accuser names an innocent suspect and makes up its answers.

    They then hand the judge a copy of the marked model.
    """
    accuser, token = ages[age]
    claim = accuser.claim(accuser.labels, suspect=accused)
    finding = accuser.finding(accuser.labels, suspect=SHOWN, suspect_token=token)
    found = judge_claim(claim, finding)
    assert (found.verdict, result_of(found, "The suspect")) == ("undecidable", "cannot tell")
    monkeypatch.setattr(judgement, "is_accused", lambda *_arguments: True)
    assert judge_claim(claim, finding).verdict == "upheld"


def test_the_operator_of_an_endpoint_shows_the_older_model_behind_it(
    ages: dict[str, tuple[Claimant, bytes | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model counts only if it repeats every answer that the claim recorded.

    The recorded answers must also be enough to tell models apart.
    """
    owner, token = ages["older"]

    def judged(recorded: torch.Tensor, now: torch.Tensor) -> str:
        claim = owner.claim(recorded, suspect=ENDPOINT)
        return judge_claim(claim, owner.finding(now, suspect=SHOWN, suspect_token=token)).verdict

    stranger = random_labels(owner.trials, 5)
    assert judged(owner.labels, owner.labels) == "dismissed"
    assert judged(stranger, stranger) == "dismissed"
    unanswered = torch.where(
        torch.arange(80) % 10 == 0, -1, owner.labels
    )  # a request was lost when the claim was made
    assert judged(unanswered, owner.labels) == "dismissed"
    assert judged(owner.labels, unanswered) == "undecidable"  # a file answers everything
    # A record of few answers is repeated by every model that gives those.
    few = torch.where(torch.arange(80) % 40 < 4, stranger, -1)
    assert judged(few, stranger) == "undecidable"
    assert judged(torch.full_like(stranger, -1), stranger) == "undecidable"
    claim = owner.claim(owner.labels, suspect=ENDPOINT)
    finding = owner.finding(owner.labels, suspect=SHOWN, suspect_token=token)
    rows = torch.arange(39, -1, -1)  # in whatever order the claimant shows the trials
    turned = replace(finding, labels=finding.labels[rows], model_labels=finding.model_labels[rows])
    assert judge_claim(chosen(claim, rows), turned).verdict == "dismissed"
    monkeypatch.setattr(
        judgement, "_stands_for_endpoint", lambda *_arguments: True
    )  # any old file would do
    assert judged(owner.labels, stranger) == "dismissed"


def test_the_accused_file_itself_goes_free_by_its_age(
    ages: dict[str, tuple[Claimant, bytes | None]],
) -> None:
    for age, verdict in (("older", "dismissed"), ("between", "upheld"), ("none", "upheld")):
        owner, token = ages[age]
        claim = owner.claim(owner.labels, suspect=SHOWN)
        found = judge_claim(claim, owner.finding(owner.labels, suspect=SHOWN, suspect_token=token))
        assert (found.verdict, result_of(found, "The suspect")) == (verdict, "holds")


def test_another_file_says_nothing_of_a_spent_batch(
    ages: dict[str, tuple[Claimant, bytes | None]],
) -> None:
    """The batch was shown before the accusation, so the accused may have learned it.

    Showing an older file in place of the accused one changes nothing.
    """
    owner, token = ages["older"]
    earlier = owner.claim(owner.labels, suspect={"kind": "file", "sha256": "00" * 32})
    time.sleep(1.1)
    claim = owner.claim(owner.labels)
    assert (
        judge_claim(claim, owner.finding(owner.labels, shown=(earlier,))).verdict == "undecidable"
    )
    found = judge_claim(
        claim, owner.finding(owner.labels, suspect=SHOWN, suspect_token=token, shown=(earlier,))
    )
    assert found.verdict == "undecidable"


def test_a_spent_batch_counts_only_against_older_suspects(
    owner_: Claimant, authority: Authority
) -> None:
    older = stamped(authority, b"old")
    time.sleep(1.1)
    earlier = owner_.claim(owner_.labels, suspect={"kind": "file", "sha256": "00" * 32})
    claim, finding = owner_.claim(owner_.labels), owner_.finding(owner_.labels, shown=(earlier,))
    assert judge_claim(claim, finding).verdict == "undecidable"
    assert (
        judge_claim(
            earlier, replace(finding, suspect={"kind": "file", "sha256": "00" * 32})
        ).verdict
        == "upheld"
    )  # itself
    other = owner_.claim(owner_.labels, 1)
    assert (
        judge_claim(other, owner_.finding(owner_.labels, 1, shown=(earlier,))).verdict == "upheld"
    )
    # What the accused forges out of the claim that they were given is no earlier claim.
    forged = replace(
        claim,
        answers={**claim.answers, "version": "x"},
        answers_signature="00" * 64,
        answers_token=None,
    )
    assert judge_claim(claim, replace(finding, shown=(forged,))).verdict == "upheld"
    time.sleep(1.1)
    later = owner_.claim(owner_.labels, suspect={"kind": "file", "sha256": "11" * 32})
    assert (
        judge_claim(claim, replace(finding, shown=(later,))).verdict == "upheld"
    )  # this suspect was fixed before that was shown
    suspect = {"kind": "file", "sha256": sha256(b"old")}
    claim = owner_.claim(owner_.labels, suspect=suspect)
    found = judge_claim(claim, replace(finding, suspect=suspect, suspect_token=older))
    assert result_of(found, "A spent batch") == "holds"


def test_a_later_claim_of_the_same_batch_leaves_one_against_an_endpoint_open(
    owner_: Claimant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows how old an endpoint is, so it may have learned what another claim showed.

    A file is fixed by its digest; what the batch is shown for afterwards changes nothing there.
    """
    against = {"endpoint": owner_.claim(owner_.labels, suspect=ENDPOINT)}
    against["file"] = owner_.claim(owner_.labels, suspect=SHOWN)
    time.sleep(1.1)
    later = owner_.claim(owner_.labels, suspect={"kind": "file", "sha256": "11" * 32})

    def judged(kind: str, suspect: dict[str, str]) -> str:
        finding = owner_.finding(owner_.labels, suspect=suspect, shown=(later,))
        return judge_claim(against[kind], finding).verdict

    assert judged("endpoint", ENDPOINT) == "undecidable"
    assert judged("file", SHOWN) == "upheld"
    monkeypatch.setattr(judgement, "_spent", lambda *_arguments: iter(()))
    assert judged("endpoint", ENDPOINT) == "upheld"


def test_who_was_first_does_not_undo_what_the_suspect_was_made_from(authority: Authority) -> None:
    """The owner builds on a licensor's marked model; the accused took theirs, and has both marks.

    The accused shows the licensor's claim, which is the earlier one. Nor does it help a licensor
    who took the owner's model back and has it stamped as a model of their own, with both marks.
    """
    licensor, owner = (claimant(some_trials(seed=seed), authority) for seed in (1, 2))
    theirs, ours = licensor.claim(licensor.labels), owner.claim(owner.labels)
    unrelated = random_labels(owner.trials, 3)[:40]
    first = Rival(theirs, MODEL, licensor.labels[:40], unrelated)
    back = replace(first, our_mark_in_its=owner.labels[:40])
    for rival, said in ((first, "who was first"), (back, "does not follow from the files")):
        found = judge_claim(ours, owner.finding(owner.labels, rival=rival))
        assert found.verdict == "upheld"
        (check,) = [check for check in found.checks if check.name == "The rival claim"]
        assert said in check.meaning
        stranger = owner.finding(random_labels(owner.trials, 4), rival=rival)
        assert judge_claim(ours, stranger).verdict == "dismissed"


def test_a_mark_put_over_a_stolen_model_takes_nothing_from_the_owner(authority: Authority) -> None:
    """The thief marks their copy and claims against everyone else who has one.

    That such a suspect was made from the thief's copy is true, and that the owner was first is said
    beside it. Copies of the owner's own model do not have the thief's mark.
    """
    owner, thief = (
        claimant(some_trials(seed=1), authority),
        claimant(some_trials(seed=2), authority),
    )
    stranger_to_thief = random_labels(thief.trials, 3)
    # The suspect is a copy of the thief's copy: it carries both marks.
    thiefs, owners = thief.claim(thief.labels), owner.claim(owner.labels)
    assert (
        judge_claim(thiefs, thief.finding(thief.labels)).verdict == "upheld"
    )  # nobody answers: it does depend on their coins
    with_owner = Rival(
        owners, MODEL, owner.labels[:40], stranger_to_thief[:40]
    )  # the owner's mark is in their model, not theirs in the owner's
    found = judge_claim(thiefs, thief.finding(thief.labels, rival=with_owner))
    (check,) = [check for check in found.checks if check.name == "The rival claim"]
    assert (found.verdict, check.meaning[:63]) == (
        "upheld",
        "This owner's model was made from the rival's, who was first; wh",
    )
    copy = thief.finding(stranger_to_thief, rival=with_owner)
    assert judge_claim(thiefs, copy).verdict == "dismissed"
    with_thief = Rival(thiefs, MODEL, stranger_to_thief[:40], owner.labels[:40])
    assert judge_claim(owners, owner.finding(owner.labels, rival=with_thief)).verdict == "upheld"
    both = Rival(thiefs, MODEL, thief.labels[:40], owner.labels[:40])
    assert judge_claim(owners, owner.finding(owner.labels, rival=both)).verdict == "upheld"
    neither = Rival(thiefs, MODEL, stranger_to_thief[:40], random_labels(owner.trials, 8)[:40])
    assert judge_claim(owners, owner.finding(owner.labels, rival=neither)).verdict == "upheld"
    own = Rival(
        owners, MODEL, owner.labels[:40], owner.labels[:40]
    )  # the accused hands the claimant's own claim back
    assert judge_claim(owners, owner.finding(owner.labels, rival=own)).verdict == "upheld"
    # A rival claim that does not stand by itself defeats nobody.
    forged = replace(
        with_thief,
        claim=replace(thiefs, c1_signature="00" * 64),
        its_mark_in_ours=thief.labels[:40],
    )
    assert judge_claim(owners, owner.finding(owner.labels, rival=forged)).verdict == "upheld"


def test_trials_copied_from_another_claim_draw_other_coins(
    owner_: Claimant, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    copier = claimant(
        owner_.trials, authority, secret=owner_.secret
    )  # even with the very leaf secrets
    found = judge_claim(copier.claim(owner_.labels), copier.finding(owner_.labels))
    assert (found.verdict, result_of(found, "The test")) == ("dismissed", "fails")
    monkeypatch.setattr(
        judgement, "_coins", lambda _claim: dict(enumerate(owner_.coins[:40].tolist()))
    )
    finding = copier.finding(owner_.labels, model_labels=owner_.labels[:40])
    assert judge_claim(copier.claim(owner_.labels), finding).verdict == "upheld"


def test_a_claim_taken_over_by_somebody_else_is_not_his(
    owner_: Claimant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commitments are the owner's, but another key signed the accusation.

    The accused is a suspect that the owner never accused.
    """
    innocent = {"kind": "file", "sha256": "ee" * 32}
    honest = owner_.claim(owner_.labels)
    assert owner_.authority is not None
    answers = {**honest.answers, "suspect": innocent}
    stamp = stamped(owner_.authority, canonical_json(answers))
    taken = replace(
        honest,
        answers=answers,
        answers_signature=sign(secrets.token_bytes(32), answers),
        answers_token=stamp,
    )
    finding = owner_.finding(owner_.labels, suspect=innocent)
    found = judge_claim(taken, finding)
    assert (found.verdict, result_of(found, "Signatures")) == ("dismissed", "fails")
    monkeypatch.setattr(judgement, "check_signature", lambda *_arguments: None)
    assert judge_claim(taken, finding).verdict == "upheld"


def test_a_replayed_token_is_found(
    owner_: Claimant, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token T1 of an older commitment is put under a new one.

    Its beacon is known, so secrets can be tried until the coins suit.
    """
    accuser = claimant(some_trials(seed=4), authority)
    accuser.t1 = owner_.t1
    accuser.c2 = {**accuser.c2, "t1_sha256": sha256(owner_.t1 or b"")}
    accuser.t2 = stamped(authority, canonical_json(accuser.c2))
    true_read, true_check, true_digest = (
        read_token,
        judgement.check_token,
        sha256(canonical_json(owner_.c1)),
    )
    beacon = true_read(owner_.t1 or b"", true_digest, "T1").beacon
    coins = draw_coins(
        canonical_json(accuser.c1), beacon, leaf_secrets(accuser.secret, len(accuser.trials))
    )
    labels = accuser.trials.answers.gather(1, coins.unsqueeze(1)).squeeze(1)
    claim = accuser.claim(labels)
    roots = load_roots(authority.root)
    finding = Finding(
        labels=labels[:40],
        suspect=SUSPECT,
        model_sha256=MODEL,
        model_labels=labels[:40],
        roots=roots,
    )
    found = judge_claim(claim, finding)
    assert (found.verdict, result_of(found, "T1, over the trials")) == ("dismissed", "fails")

    def original(response: bytes, digest: str) -> str:
        return true_digest if response == owner_.t1 else digest

    monkeypatch.setattr(
        judgement,
        "check_token",
        lambda r, digest, *rest: true_check(r, original(r, digest), *rest),
    )
    monkeypatch.setattr(
        judgement, "read_token", lambda r, digest, o: true_read(r, original(r, digest), o)
    )
    assert judge_claim(claim, finding).verdict == "upheld"


@pytest.mark.parametrize("kind", ["untrusted", "expired"])
def test_an_authority_that_the_judge_does_not_trust_is_none(
    tmp_path: Path, authority: Authority, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Authority(tmp_path / "own", days=-1 if kind == "expired" else 30)
    try:
        owner = claimant(some_trials(), own)
        claim, finding = owner.claim(owner.labels), owner.finding(owner.labels)
    finally:
        own.close()
    if kind == "untrusted":
        finding = replace(finding, roots=load_roots(authority.root))
    found = judge_claim(claim, finding)
    assert (found.verdict, result_of(found, "T1, over the trials")) == (
        "undecidable",
        "cannot tell",
    )
    monkeypatch.setattr(
        judgement,
        "check_token",
        lambda response, digest, _roots, origin, _log: read_token(response, digest, origin),
    )
    assert judge_claim(claim, finding).verdict == "upheld"


def test_times_in_the_wrong_order_are_found(owner_: Claimant) -> None:
    late = replace(owner_.claim(owner_.labels))
    time.sleep(1.1)
    assert owner_.authority is not None
    model_later = stamped(owner_.authority, canonical_json(owner_.c2))
    found = judge_claim(replace(late, t2=model_later), owner_.finding(owner_.labels))
    assert (found.verdict, result_of(found, "Order of times")) == ("dismissed", "fails")


def test_a_model_with_other_weights_is_found(
    owner_: Claimant, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim, finding = (
        owner_.claim(owner_.labels),
        owner_.finding(owner_.labels, model_sha256="99" * 32),
    )
    found = judge_claim(claim, finding)
    assert (found.verdict, result_of(found, "The owner's model")) == ("dismissed", "fails")
    monkeypatch.setattr(
        judgement,
        "_model",
        lambda *_arguments: judgement.Check("The owner's model", "holds", "", ""),
    )
    assert judge_claim(claim, finding).verdict == "upheld"


def test_an_owner_whose_model_has_no_mark_claims_nothing(owner_: Claimant) -> None:
    found = judge_claim(
        owner_.claim(owner_.labels),
        owner_.finding(owner_.labels, model_labels=random_labels(owner_.trials, 4)[:40]),
    )
    assert (found.verdict, result_of(found, "The mark in it")) == ("dismissed", "fails")


@pytest.mark.parametrize(
    "changes",
    [
        {"statistic": "watermark accuracy"},
        {"cell_weight": 2},
        {"scheme": "adversarial"},
        {"batches": 3},
        {"leaves": 79},
    ],
)
def test_a_commitment_without_an_exact_test_is_dismissed(
    authority: Authority, changes: dict[str, object]
) -> None:
    accuser = claimant(some_trials(), authority, **changes)
    found = judge_claim(accuser.claim(accuser.labels), accuser.finding(accuser.labels))
    assert found.verdict == "dismissed"


@pytest.mark.parametrize("part", ["c2", "t1", "answers"])
def test_parts_of_different_claims_do_not_make_one(
    owner_: Claimant, authority: Authority, part: str
) -> None:
    trials = some_trials()
    other = claimant(trials, authority)
    other.signing_key = owner_.signing_key
    other.c1 = {**other.c1, "public_key": owner_.c1["public_key"]}
    foreign = other.claim(owner_.labels)
    names = {
        "c2": ("c2", "c2_signature", "t2"),
        "t1": ("t1",),
        "answers": ("answers", "answers_signature", "answers_token"),
    }[part]
    if part == "answers":
        foreign = replace(other, c2={**other.c2, "c1_sha256": "00" * 32}).claim(owner_.labels)
    mixed = replace(owner_.claim(owner_.labels), **{name: getattr(foreign, name) for name in names})
    assert judge_claim(mixed, owner_.finding(owner_.labels)).verdict == "dismissed"


# The level


@pytest.fixture(scope="module")
def surrogates(digits: Pools) -> list[torch.nn.Module]:
    return [_standard(digits, seed) for seed in range(3)]


@pytest.fixture(scope="module")
def innocents(digits: Pools) -> list[torch.nn.Module]:
    return [_standard(digits, seed) for seed in range(10, 14)]


def _standard(digits: Pools, seed: int) -> torch.nn.Module:
    network = build("small", digits.training.x.shape[1:], 10, seed=seed)  # type: ignore[arg-type]
    train(
        network,
        digits.training,
        TrainConfig(
            objective="standard",
            attack=None,
            epochs=8,
            learning_rate=0.05,
            batch_size=64,
            seed=seed,
        ),
    )
    return network.eval()


class _Mean(torch.nn.Module):
    def __init__(self, models: list[torch.nn.Module]) -> None:
        super().__init__()
        self.models = torch.nn.ModuleList(models)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Towards the target: the attack climbs the loss, so the logits are turned round."""
        return -torch.stack([model(x).log_softmax(1) for model in self.models]).mean(0)


def transferable(
    surrogates: list[torch.nn.Module], innocents: list[torch.nn.Module], digits: Pools
) -> tuple[WatermarkSet, list[float]]:
    """Craft targeted examples on several surrogates and keep those they are all surest of.

    Returns:
        The examples as trials, and for each stranger the fraction of them to which it gives
        the target label.
    """
    x, y = pixels(digits.training.x), digits.training.y
    target = (y + 1) % 10
    ensemble = _Mean(surrogates)
    crafted = pgd(ensemble, x, target, epsilon=0.45, steps=20, step_size=0.06)
    images = crafted.mul(255).round().to(torch.uint8)
    with torch.no_grad():
        scores = torch.stack(
            [model(pixels(images)).log_softmax(1)[range(len(y)), target] for model in surrogates]
        ).amin(0)
    kept = scores.topk(160).indices
    answers = torch.stack((y[kept], target[kept]), 1).sort(1).values
    count = len(kept)
    trials = WatermarkSet(
        images[kept], answers, torch.arange(count) // (count // 2), torch.arange(count)
    )
    wanted = torch.tensor(aimed(answers))
    return trials, [
        float((predict(model, trials.x) == wanted).double().mean()) for model in innocents
    ]


def targets(answers: torch.Tensor) -> list[int]:
    """Which of the two answers is the accuser's target: the label after the true one."""
    return [1 if tails - heads == 1 else 0 for heads, tails in answers.tolist()]


def aimed(answers: torch.Tensor) -> list[int]:
    return [pair[side] for pair, side in zip(answers.tolist(), targets(answers), strict=True)]


def test_false_claims_are_upheld_at_most_at_the_level(
    authority: Authority,
    surrogates: list[torch.nn.Module],
    innocents: list[torch.nn.Module],
    digits: Pools,
) -> None:
    """Repeat every attack that a claimant can repeat, each time with a fresh key and fresh tokens.

    Strangers answer alike, so the claims of one key stand or fall together. The test
    therefore counts what is independent: the keys, for each stranger.
    """
    trials, _ = transferable(surrogates, innocents, digits)
    answered = [*(predict(innocent, trials.x) for innocent in innocents), trials.answers[:, 1]]
    rng = random.Random(1)
    levels = (0.05, 0.01, 1e-9)
    below = [dict.fromkeys(levels, 0) for _ in answered]
    tried = upheld = keys = 0
    while tried < TRIES:
        accuser = claimant(trials, authority)
        keys += 1
        half = len(trials) // 2
        for labels, counts in zip(answered, below, strict=True):
            claim, finding = accuser.claim(labels), accuser.finding(labels)
            found = judge_claim(claim, finding)
            for alpha in levels:
                counts[alpha] += found.test.p_value <= alpha
            rows = torch.nonzero(labels[:half] == accuser.labels[:half]).flatten()
            subset = replace(
                finding, labels=finding.labels[rows], model_labels=finding.model_labels[rows]
            )
            attacks = [(chosen(claim, rows), subset), (replace(claim, t1=None), finding)]
            attacks += [
                (
                    tampered(
                        claim, rng.choice(["swapped", "twice", "secrets", "cells", "other leaves"])
                    ),
                    finding,
                )
            ]
            verdicts = [
                found.verdict,
                *(judge_claim(attack, seen).verdict for attack, seen in attacks),
            ]
            upheld += verdicts.count("upheld")
            tried += len(verdicts)
    print(
        f"\n{tried} false claims, {upheld} upheld;"
        f" of {keys} keys, innocent by innocent, p <= alpha: {below}"
    )
    assert upheld == 0
    for counts in below:
        assert all(count <= most(keys, alpha) for alpha, count in counts.items()), (keys, counts)


# Files


def test_a_claim_survives_its_folder(owner_: Claimant, tmp_path: Path, owner: Path) -> None:
    claim = replace(owner_.claim(owner_.labels), model=owner)
    folder = tmp_path / "claim"
    folder.mkdir()
    write_claim(folder, claim)
    again = read_claim(folder)
    assert again.c1 == claim.c1
    assert (again.t1, again.t2, again.answers_token) == (claim.t1, claim.t2, claim.answers_token)
    assert all(
        torch.equal(getattr(again.opened, name), getattr(claim.opened, name))
        for name in ("index", "x", "secrets", "paths")
    )
    assert judge_claim(again, owner_.finding(owner_.labels)).verdict == "upheld"


def test_the_page_says_everything_and_runs_nothing(owner_: Claimant) -> None:
    nasty = {
        "kind": "endpoint",
        "url": "http://x/<script>alert(1)</script>\x1b[2J\nholds The test \ud800",
    }
    found = judge_claim(
        owner_.claim(owner_.labels, suspect=nasty), owner_.finding(owner_.labels, suspect=nasty)
    )
    text = page(found, {"Suspect": nasty["url"]})
    assert "<script" not in text
    assert not any("\x1b" in check.found or "\n" in check.found for check in found.checks)
    assert text.encode(errors="backslashreplace")
    assert all(check.name in text.replace("&#x27;", "'") for check in found.checks)
    assert "upheld" in text
    assert "http" not in text.replace(nasty["url"][:8], "").replace("http://x", "")
    assert sentence(found).startswith("The claim is upheld")


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 79), st.integers(0, 7), st.data())
def test_a_leaf_binds_every_bit_of_its_trial(index: int, bit: int, data: st.DataObject) -> None:
    trials, secret = some_trials(), b"s" * 32
    nodes = leaves(trials, secret)
    image = bytearray(trials.x[index].numpy().tobytes())
    place = data.draw(st.integers(0, len(image) - 1))
    image[place] ^= 1 << bit
    s = leaf_secrets(secret, 80)[index]
    numbers = (index, int(trials.batch[index]), int(trials.cell[index]))
    answers = trials.answers[index].tolist()
    assert leaf_hash(*numbers, trials.x[index].numpy().tobytes(), answers, s) == nodes[index]
    assert leaf_hash(*numbers, bytes(image), answers, s) != nodes[index]
    assert leaf_hash(*numbers, trials.x[index].numpy().tobytes(), answers[::-1], s) != nodes[index]


@pytest.mark.parametrize("name", ["claim.json", "trials.safetensors"])
def test_a_damaged_claim_is_an_error(
    owner_: Claimant, tmp_path: Path, owner: Path, name: str
) -> None:
    write_claim(tmp_path, replace(owner_.claim(owner_.labels), model=owner))
    whole = (tmp_path / name).read_bytes()
    for damage in (b"", whole[: len(whole) // 2], whole + b" ", b"\x80\x04K\x01."):
        (tmp_path / name).write_bytes(damage)
        with pytest.raises(CountermarkError):
            read_claim(tmp_path)
