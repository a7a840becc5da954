"""`countermark adjudicate`: a third party's judgement of a claim, from files alone."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from countermark import __version__
from countermark.claims import Check, Claim, Finding, Judgement, Rival, judge_claim, page, read_claim, sentence, suspect_identity
from countermark.config import AdjudicateConfig
from countermark.errors import CountermarkError
from countermark.evaluation import predict
from countermark.files import read_bytes, write_bytes, write_json
from countermark.report import print_lines
from countermark.timestamps import TOKEN_LIMIT, load_roots
from countermark.verbs.asking import ask, doubts

JUDGEMENT_FORMAT = "countermark judgement 1"
_EXIT_STATUS = {"upheld": 0, "dismissed": 1, "undecidable": 3}


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
        agreements: of the judge's own asking: trials answered as the coins fell.
        disagreements: trials given the other answer; missing ones count here.
        neither: trials given any other answer, or none.
        log10_p_value: decimal logarithm of the exact p-value, times the number of batches.
        alpha: the judge's level.
        batches: batches that the claimant could have chosen from.
        unanswered: trials without an answer.
        changed: trials whose answer changed when they were asked again.
        clean_accuracy: of the suspect on clean examples, in percent; none where there are none at hand.
    """

    claim: str
    suspect: str
    verdict: str
    sentence: str
    public_key: str
    checks: tuple[Check, ...]
    agreements: int
    disagreements: int
    neither: int
    log10_p_value: float
    alpha: float
    batches: int
    unanswered: int
    changed: int
    clean_accuracy: float | None

    @property
    def exit_status(self) -> int:
        """0 upheld, 1 dismissed, 3 undecidable."""
        return _EXIT_STATUS[self.verdict]


def adjudicate(config: AdjudicateConfig) -> Adjudication:
    """Judge a claim and write the judgement as OUT.html and OUT.json.

    Raises:
        CountermarkError: the claim, the roots or the suspect cannot be read.
    """
    claim, roots = read_claim(config.claim), load_roots(config.roots)
    answered = ask(config, claim.opened.x, str(claim.c1.get("data")))
    finding = Finding(
        labels=answered.labels,
        suspect=suspect_identity(config.suspect),
        model_sha256=_digest(claim),
        model_labels=predict(claim.network(), claim.opened.x),
        roots=roots,
        alpha=config.alpha,
        suspect_token=None if config.suspect_token is None else read_bytes(config.suspect_token, TOKEN_LIMIT),
        shown=tuple(read_claim(folder) for folder in config.shown),
        rival=None if config.rival is None else _rival(claim, read_claim(config.rival)),
    )
    judgement = judge_claim(claim, finding)
    result = _result(config, claim, judgement, answered.unanswered, answered.changed, answered.clean_accuracy)
    _write(config.out, result, judgement, {"suspect": dict(finding.suspect), "roots": [root.subject.rfc4514_string() for root in roots]})
    return result


def _digest(claim: Claim) -> str:
    return suspect_identity(claim.model)["sha256"]


def _rival(claim: Claim, rival: Claim) -> Rival:
    """Ask each mark of the other's model."""
    if claim.opened.x.shape[1:] != rival.opened.x.shape[1:]:
        raise CountermarkError("the rival claim asks with images of another shape; it is about another kind of model")
    return Rival(rival, _digest(rival), predict(claim.network(), rival.opened.x), predict(rival.network(), claim.opened.x))


def _result(
    config: AdjudicateConfig, claim: Claim, judgement: Judgement, unanswered: int, changed: int, clean_accuracy: float | None
) -> Adjudication:
    test = judgement.test
    return Adjudication(
        claim=str(config.claim),
        suspect=str(config.suspect),
        verdict=judgement.verdict,
        sentence=sentence(judgement),
        public_key=str(claim.c1["public_key"]),
        checks=judgement.checks,
        agreements=test.agreements,
        disagreements=test.disagreements,
        neither=test.neither,
        log10_p_value=test.log10_p_value,
        alpha=test.alpha,
        batches=judgement.batches,
        unanswered=unanswered,
        changed=changed,
        clean_accuracy=clean_accuracy,
    )


def _write(out: Path, result: Adjudication, judgement: Judgement, asked: Mapping[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out.with_name(out.name + ".json"), {"format": JUDGEMENT_FORMAT, "version": __version__, **asdict(result), **asked})
    about = {
        "Claimant's key": result.public_key,
        "Claim": result.claim,
        "Suspect": result.suspect,
        "Suspect's identity": ", ".join(f"{name} {value}" for name, value in asked["suspect"].items()),
        "Trusted roots": "; ".join(asked["roots"]),
        "Judged by": f"Countermark {__version__}",
    }
    write_bytes(out.with_name(out.name + ".html"), page(judgement, about).encode())


def show(result: Adjudication) -> None:
    """Print every check and the verdict."""
    print_lines(*(f"{check.result:<12} {check.name}: {check.found}" for check in result.checks), "")
    print_lines(result.sentence, *doubts(result.unanswered, result.changed, result.clean_accuracy))


__all__ = ["Adjudication", "adjudicate", "show"]
