"""`countermark verify`: does this suspect remember our coins?"""

from dataclasses import dataclass
from pathlib import Path

from countermark.evidence import EXIT_STATUS, judge
from countermark.options import ReadPath, SuspectOptions, verb
from countermark.places import place_name
from countermark.terminal import p_value, percent, print_lines, print_table
from countermark.verbs.asking import Answered, ask, doubts
from countermark.watermarks import Key, load_key


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(SuspectOptions):
    """Ask a suspect for the labels of a key's watermarks and say what they prove."""

    key: ReadPath
    """Key folder, as protect wrote it."""
    alpha: float = 1e-6
    """Level of a match; a judge's is 1e-9."""

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        super().__post_init__()
        self._open_interval("alpha")


@dataclass(frozen=True)
class Verification:
    """What a suspect's answers prove.

    Attributes:
        suspect: its path or address, or what names a function.
        scheme: the key's watermark scheme.
        verdict: `match`, `no evidence` or `inconclusive`; the published schemes `ood` and `adversarial` have no valid p-value and
            always stay `inconclusive`.
        p_value: exact, over all trials of the key; none for the published schemes.
        log10_p_value: its decimal logarithm, at any size.
        agreements: trials answered as the key says.
        disagreements: trials given the answer that the coin did not choose.
        neither: trials given any other answer.
        trials: trials asked.
        log10_smallest_p_value: the smallest p-value that this key could ever reach.
        alpha: the level of a match.
        watermark_accuracy: agreements in percent.
        published_rule: what the paper's rule (50 % or more is a copy) says; only for the published schemes.
        unanswered: trials that the suspect refused, or did not answer in time or within the budget.
        changed: trials that it answered differently when it was asked again.
        clean_accuracy: of the suspect on clean examples, in percent; none where they could not be
            asked.
        doubts: what a person should know before believing the verdict, in sentences.
    """

    suspect: str
    scheme: str
    verdict: str
    p_value: float | None
    log10_p_value: float | None
    agreements: int
    disagreements: int
    neither: int
    trials: int
    log10_smallest_p_value: float | None
    alpha: float
    watermark_accuracy: float
    published_rule: str | None
    unanswered: int
    changed: int
    clean_accuracy: float | None
    doubts: tuple[str, ...]

    @property
    def exit_status(self) -> int:
        """0 match, 1 no evidence, 3 inconclusive."""
        return EXIT_STATUS[self.verdict]


@verb(VerifyConfig)
def verify(config: VerifyConfig) -> Verification:
    """Ask the suspect for the label of every watermark and judge the answers.

    The mark of a key without timestamps is private: the verdict tells its owner, and does not bind a third party.

    Raises:
        CountermarkError: the key or the suspect cannot be read, or they do not fit each other.
    """
    key = load_key(Path(config.key))
    answers = ask(config, key.watermarks.x, str(key.c1.get("data")), key.clean)
    outcomes = key.outcomes(answers.labels)
    agreements = sum(outcome == 1 for outcome in outcomes)
    share = 100 * agreements / len(outcomes)
    if key.scheme != "coin":
        return _published(config, key, agreements, share, answers)
    verdict = judge(key.watermarks.cell.tolist(), outcomes, alpha=config.alpha)
    return Verification(
        suspect=place_name(config.suspect),
        scheme=key.scheme,
        verdict=verdict.verdict,
        p_value=verdict.p_value,
        log10_p_value=verdict.log10_p_value,
        agreements=verdict.agreements,
        disagreements=verdict.disagreements,
        neither=verdict.neither,
        trials=verdict.trials,
        log10_smallest_p_value=verdict.log10_smallest_p_value,
        alpha=config.alpha,
        watermark_accuracy=share,
        published_rule=None,
        unanswered=answers.unanswered,
        changed=answers.changed,
        clean_accuracy=answers.clean_accuracy,
        doubts=doubts(answers, verdict.verdict),
    )


def _published(config: VerifyConfig, key: Key, agreements: int, share: float, answers: Answered) -> Verification:
    return Verification(
        suspect=place_name(config.suspect),
        scheme=key.scheme,
        verdict="inconclusive",
        p_value=None,
        log10_p_value=None,
        agreements=agreements,
        disagreements=0,
        neither=len(key.watermarks) - agreements,
        trials=len(key.watermarks),
        log10_smallest_p_value=None,
        alpha=config.alpha,
        watermark_accuracy=share,
        published_rule="copy" if share >= 50 else "no copy",
        unanswered=answers.unanswered,
        changed=answers.changed,
        clean_accuracy=answers.clean_accuracy,
        doubts=doubts(answers, "inconclusive"),
    )


def show(result: Verification) -> None:
    """Print the verdict and what it rests on."""
    print_table(
        f"{result.suspect}: {result.verdict}",
        ("agree", "other answer", "neither", "trials", "p-value", "smallest possible"),
        [
            [
                str(result.agreements),
                str(result.disagreements),
                str(result.neither),
                str(result.trials),
                p_value(result.log10_p_value),
                p_value(result.log10_smallest_p_value),
            ]
        ],
    )
    print_lines(explain(result), *result.doubts)


def explain(result: Verification) -> str:
    """One sentence for a person."""
    if result.published_rule is not None:
        return (
            f"The scheme {result.scheme!r} has no valid p-value: models that never saw the mark often score as high. The paper's rule "
            f"(50 %) says {result.published_rule!r} at {percent(result.watermark_accuracy)}; ask strangers before you believe it."
        )
    if result.verdict == "match":
        return f"A model that does not depend on these coins agrees this often with probability {p_value(result.log10_p_value)}."
    if result.verdict == "inconclusive":
        return f"Too few trials were answered with one of their two answers to ever reach {result.alpha:g}."
    return f"A model that never saw the coins agrees this often with probability {p_value(result.log10_p_value)}; that is no evidence."
