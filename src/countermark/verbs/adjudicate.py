"""`countermark adjudicate`: a third party's judgement of a claim, from files alone."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from countermark.errors import CountermarkError
from countermark.evidence import Verdict
from countermark.files import read_bytes, write_bytes, write_json
from countermark.options import ReadPath, SuspectOptions, WrittenPath, verb
from countermark.pictures import agreements
from countermark.places import Network
from countermark.service.clients import public_key_of
from countermark.terminal import print_figure, print_lines
from countermark.verbs.accounts import adjudicate_account
from countermark.verbs.asking import Answers, ask, asked_how, doubts
from countermark.version import __version__

if TYPE_CHECKING:
    from torch import nn

    from countermark.claims import Check, Claim, Judgement, Rival
    from countermark.registry import Draws

JUDGEMENT_FORMAT = "countermark judgement 2"
PICTURES = 10
"""Trials of the claim that the page shows as pictures."""
_LISTED = 1000  # entries of a public log in the JSON file; the count is of all of them
_EXIT_STATUS = {"upheld": 0, "dismissed": 1, "undecidable": 3}


@dataclass(frozen=True, kw_only=True)
class AdjudicateConfig(SuspectOptions):
    """Judge a claim as a third party; write the judgement.

    The claim is checked, the suspect is asked, and a page and a JSON file say what came of it.
    """

    suspect: ReadPath
    """Model folder, .onnx or .pt2 file, or http(s)://HOST/... of a service (see --api)."""
    claim: ReadPath = field(kw_only=False)
    """The claim's folder."""
    roots: ReadPath | None = None
    """PEM file with the root certificates of the timestamp authorities that you trust; needed for a
    claim of a key's batch that has timestamps."""
    out: WrittenPath = "judgement"
    """Where the judgement goes: OUT.html and OUT.json. The page shows ten of the opened trials."""
    owner_network: Network | None = None
    """module:function that builds the network of the claim's model, unless it is a built-in one; in
    Python also a function or a module."""
    rival: ReadPath | None = None
    """Claim of somebody else on the same suspect: each mark is asked of the other's model."""
    rival_network: Network | None = None
    """The same as --owner-network for the rival claim's model."""
    shown: tuple[ReadPath, ...] = ()
    """Claims of the same key that were shown before: a batch counts once."""
    suspect_token: ReadPath | None = None
    """Timestamp (RFC 3161 response, DER) over the suspect's file, if the accused has one."""
    client_key: str | None = None
    """Public key (Ed25519) that others tie to the accused, for a claim against an account: 64
    hexadecimal digits, or a PEM file."""
    receipts: ReadPath | None = None
    """receipts.jsonl that the accused kept, for a claim against an account."""
    registry: str | None = None
    """Public log that you trust, for a claim whose C1 was registered: rekor, or a JSON file that
    describes another. It is asked how often the owner drew coins."""
    identity: ReadPath | None = None
    """Public key (RSA, PEM) that you know as the owner's, for a claim whose C1 was registered."""
    alpha: float = 1e-9
    """Level of the judgement."""

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        super().__post_init__()
        self._open_interval("alpha")
        self._only_for(self.rival is not None, "--rival", "rival_network")
        self._only_for(self.registry is not None, "--registry", "identity")


@dataclass(frozen=True)
class Adjudication:
    """A judgement and what it rests on.

    Attributes:
        claim: the claim's folder.
        suspect: the suspect's place.
        verdict: `upheld`, `dismissed` or `undecidable`.
        sentence: the verdict in words.
        public_key: the claimant's key, hexadecimal.
        checks: every check, its result and what it means.
        test: the exact test on the judge's own asking, at the judge's level; its p-value is times
            the number of batches, and missing trials count as disagreements.
        batches: batches that the claimant could have chosen from; against an account, all choices
            that p was multiplied by.
        answers: how the suspect answered.
        doubts: what a person should know before believing the verdict, in sentences.
        account: name of the account, in a claim against one.
    """

    claim: str
    suspect: str
    verdict: str
    sentence: str
    public_key: str
    checks: "tuple[Check, ...]"
    test: Verdict
    batches: int
    answers: Answers
    doubts: tuple[str, ...]
    account: str | None = None

    @property
    def exit_status(self) -> int:
        """0 upheld, 1 dismissed, 3 undecidable."""
        return _EXIT_STATUS[self.verdict]


@verb(AdjudicateConfig)
def adjudicate(config: AdjudicateConfig) -> Adjudication:
    """Judge a claim and write the judgement as OUT.html and OUT.json.

    Raises:
        CountermarkError: the claim, the roots or the suspect cannot be read.

    Example:
        >>> judged = cm.adjudicate("claim", suspect="theirs", roots="roots.pem", out="judgement")
        >>> judged.verdict
        'upheld'
        >>> print(judged.sentence)
        The claim is upheld: the suspect depends on this owner's coins.
        >>> {check.result for check in judged.checks}
        {'holds'}
    """
    from countermark.claims import (
        Finding,
        evidence_of,
        first_trials,
        is_account_claim,
        judge_claim,
        page,
        read_claim,
        suspect_identity,
    )
    from countermark.evaluation import predict
    from countermark.networks import describe
    from countermark.registry import draws_of, public_log
    from countermark.timestamps import load_roots, root_name
    from countermark.tokens import TOKEN_LIMIT

    if is_account_claim(Path(config.claim)):
        return _of_account(config)
    if config.client_key is not None or config.receipts is not None:
        raise CountermarkError(
            f"{config.claim} is a claim of a key's batch; leave --client-key and --receipts out"
        )
    claim = read_claim(Path(config.claim))
    stamped = (claim.t1, claim.t2, claim.answers_token) != (None, None, None)
    if config.roots is None and stamped:
        raise CountermarkError(
            "--roots FILE: name the root certificates of the timestamp authorities that you trust"
        )
    roots = () if config.roots is None else load_roots(Path(config.roots))
    outputs = [_output(Path(config.out), suffix) for suffix in (".html", ".json")]
    network, digest = claim.network(config.owner_network)
    token = (
        None
        if config.suspect_token is None
        else read_bytes(Path(config.suspect_token), TOKEN_LIMIT)
    )
    shown = tuple(read_claim(Path(folder)) for folder in config.shown)
    log = None if config.registry is None else public_log(config.registry)
    draws = None
    if log is not None and config.identity is not None:
        draws = draws_of(log, config.identity)
    rival = _rival(claim, network, config)
    suspect = suspect_identity(config.suspect)
    # Only now, after everything else could be read.
    x, data = claim.opened.x, str(claim.c1.get("data"))
    test = partial(evidence_of, claim, alpha=config.alpha)
    given, answers = ask(config, [x], tuple(x.shape[1:]), data, claim.clean, claim.names, test)
    finding = Finding(
        labels=given,
        suspect=suspect,
        model_sha256=digest,
        model_labels=predict(network, claim.opened.x),
        roots=roots,
        alpha=config.alpha,
        suspect_token=token,
        shown=shown,
        rival=rival,
        ways=answers.ways,
        log=log,
        draws=draws,
    )
    judgement = judge_claim(claim, finding)
    result = _result(config, str(claim.c1["public_key"]), judgement, answers)
    asked: dict[str, Any] = {
        "suspect": suspect,
        "asked": asked_how(config, answers),
        "roots": [root_name(root) for root in roots],
        "log": None if log is None else {"address": log.address, "sha256": log.digest},
        "draws": None if draws is None else _listed(draws),
    }
    names = describe(claim.model).class_names
    trials = first_trials(claim, given, PICTURES)
    _write(outputs, result, asked, page(judgement, _about(result, asked), trials, names))
    return result


def _of_account(config: AdjudicateConfig) -> Adjudication:
    """Judge a claim against an account."""
    from countermark.claims import ACCOUNT_LIMITS, page
    from countermark.networks import describe

    for name in ("roots", "rival", "suspect_token", "registry"):
        if getattr(config, name) is not None:
            raise CountermarkError(
                f"{config.claim} is a claim against an account, which rests on no timestamps and "
                f"no rivals; leave --{name.replace('_', '-')} out"
            )
    if config.shown:
        raise CountermarkError(f"{config.claim} opens no batch; leave --shown out")
    outputs = [_output(Path(config.out), suffix) for suffix in (".html", ".json")]
    key = config.client_key
    judged = adjudicate_account(
        config,
        suspect=config.suspect,
        claim=Path(config.claim),
        network=config.owner_network,
        client_key=None if key is None else public_key_of(key, "--client-key"),
        receipts=None if config.receipts is None else Path(config.receipts),
        alpha=config.alpha,
        pictures=PICTURES,
    )
    result = replace(
        _result(config, judged.owner, judged.judgement, judged.answers),
        account=judged.about["Account"],
    )
    asked: dict[str, Any] = {
        "suspect": judged.suspect,
        "asked": asked_how(config, judged.answers),
        "roots": [],
        "log": None,
        "draws": None,
    }
    about = {**judged.about, **_about(result, asked)}
    names = describe(Path(config.claim) / "model").class_names
    story, limits = judged.story, ACCOUNT_LIMITS
    made = page(judged.judgement, about, judged.trials, names, story=story, limits=limits)
    _write(outputs, result, asked, made)
    return result


def _output(out: Path, suffix: str) -> Path:
    """Where a part of the judgement goes; what an earlier one left there is removed first.

    So parts of two judgements are never mixed.

    Raises:
        CountermarkError: `out` has no file name.
    """
    if not out.name:
        raise CountermarkError(f"--out is the beginning of two files' names, not {out}")
    path = out.with_name(out.name + suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    return path


def _rival(claim: "Claim", network: "nn.Module", config: AdjudicateConfig) -> "Rival | None":
    """Ask each mark of the other's model, where there is a rival claim."""
    from countermark.claims import Rival, read_claim
    from countermark.evaluation import predict

    if config.rival is None:
        return None
    rival = read_claim(Path(config.rival))
    if claim.opened.x.shape[1:] != rival.opened.x.shape[1:]:
        raise CountermarkError(
            "the rival claim asks with images of another shape; it is about another kind of model"
        )
    theirs, digest = rival.network(config.rival_network, "--rival-network")
    return Rival(rival, digest, predict(network, rival.opened.x), predict(theirs, claim.opened.x))


def _result(
    config: AdjudicateConfig, public_key: str, judgement: "Judgement", answers: Answers
) -> Adjudication:
    from countermark.claims import sentence

    return Adjudication(
        claim=str(config.claim),
        suspect=str(config.suspect),
        verdict=judgement.verdict,
        sentence=sentence(judgement),
        public_key=public_key,
        checks=judgement.checks,
        test=judgement.test,
        batches=judgement.batches,
        answers=answers,
        doubts=doubts(answers, judgement.verdict),
    )


def _about(result: Adjudication, asked: Mapping[str, Any]) -> dict[str, str]:
    identity = ", ".join(f"{name} {value}" for name, value in asked["suspect"].items())
    return {
        "Claimant's key": result.public_key,
        "Claim": result.claim,
        "Suspect": result.suspect,
        "Suspect's identity": identity,
        "Trusted roots": "; ".join(asked["roots"]) or "none",
        "Trusted public log": "none" if asked["log"] is None else asked["log"]["address"],
        "Judged by": f"Countermark {__version__}",
    }


def _listed(draws: "Draws") -> dict[str, Any]:
    """The draws, JSON-ready; so many that their record could not be written are cut off."""
    most = sorted(draws.entries, key=lambda entry: entry.index)[:_LISTED]
    entries = [
        {"index": each.index, "time": each.time, "registered": each.registered} for each in most
    ]
    return {"identity": draws.identity, "count": draws.count, "entries": entries}


def _write(
    outputs: Sequence[Path], result: Adjudication, asked: Mapping[str, Any], made: str
) -> None:
    write_bytes(outputs[0], made.encode())
    write_json(
        outputs[1], {"format": JUDGEMENT_FORMAT, "version": __version__, **asdict(result), **asked}
    )


def show(result: Adjudication) -> None:
    """Print every check and the verdict."""
    checks = (f"{check.result:<12} {check.name}: {check.found}" for check in result.checks)
    print_lines(*checks, hanging=13)
    if result.account is None:
        print_figure(agreements(result.test, result.batches))
    print_lines("")
    print_lines(result.sentence, *result.doubts)


__all__ = ["Adjudication", "adjudicate", "show"]
