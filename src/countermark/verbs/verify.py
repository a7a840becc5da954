"""`countermark verify`: does this suspect remember our coins?"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from countermark.device import describe
from countermark.evidence import EXIT_STATUS, Verdict, judge, untested
from countermark.options import ReadPath, SuspectOptions, verb
from countermark.pictures import agreements
from countermark.places import place_name
from countermark.terminal import (
    p_value,
    percent,
    print_figure,
    print_lines,
    print_table,
    unbroken,
)
from countermark.verbs.asking import Answers, ask, asked_how, doubts
from countermark.verbs.looks import Looks, note_look, said_looks

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(SuspectOptions):
    """Ask a suspect for a key's coins; give the p-value.

    The suspect is asked for the labels of the key's watermarks.
    """

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
        test: the exact test over all trials of the key. The published schemes `ood` and
            `adversarial` have no valid p-value, and are always inconclusive.
        watermark_accuracy: agreements in percent.
        published_rule: what the paper's rule (50 % or more is a copy) says; only for the published
            schemes.
        answers: how the suspect answered.
        doubts: what a person should know before believing the verdict, in sentences.
        device: where a model folder computed, and in which precision; none for other suspects,
            which compute by themselves.
        looks: how often suspects were asked with this key; none where its folder cannot be written.
    """

    suspect: str
    scheme: str
    test: Verdict
    watermark_accuracy: float
    published_rule: str | None
    answers: Answers
    doubts: tuple[str, ...]
    device: str | None
    looks: Looks | None = None

    @property
    def verdict(self) -> str:
        """The test's: `match`, `no evidence` or `inconclusive`."""
        return self.test.verdict

    @property
    def exit_status(self) -> int:
        """0 match, 1 no evidence, 3 inconclusive."""
        return EXIT_STATUS[self.verdict]


@verb(VerifyConfig)
def verify(config: VerifyConfig) -> Verification:
    """Ask the suspect for the label of every watermark and judge the answers.

    A verdict by a key without timestamps is private: it informs the owner, but does not convince a
    third party.

    Raises:
        CountermarkError: the key or the suspect cannot be read, or they do not fit each other.

    Example:
        >>> found = cm.verify("theirs", key="mine/key")
        >>> found.verdict, found.test.agreements, found.test.trials
        ('match', 160, 160)

        A function can stand for a suspect:

        >>> model = cm.load("stranger")
        >>> cm.verify(lambda images: model(images).argmax(1), key="mine/key").verdict
        'no evidence'
    """
    from countermark.watermarks import load_key

    key = load_key(Path(config.key))
    x, data = key.watermarks.x, str(key.c1.get("data"))
    exact = key.rules.coins
    cells = key.watermarks.cell.tolist()

    def tested(labels: "torch.Tensor", ways: int = 1) -> Verdict:
        outcomes = key.outcomes(labels)
        if not exact:
            return untested(outcomes, config.alpha)
        return judge(cells, outcomes, alpha=config.alpha, ways=ways)

    labels, answers = ask(config, [x], tuple(x.shape[1:]), data, key.clean, key.names, tested)
    test = tested(labels, answers.ways)
    share = 100 * test.agreements / test.trials
    how = asked_how(config, answers)
    return Verification(
        suspect=place_name(config.suspect),
        scheme=key.scheme,
        test=test,
        watermark_accuracy=share,
        published_rule=None if exact else "copy" if share >= key.rules.taken else "no copy",
        answers=answers,
        doubts=doubts(answers, test.verdict),
        device=describe(config.device)
        if isinstance(config.suspect, Path) and config.suspect.is_dir()
        else None,
        looks=note_look(Path(config.key), "verify", config.suspect, how, test.log10_p_value),
    )


def show(result: Verification) -> None:
    """Print the verdict and what it rests on."""
    test = result.test
    print_table(
        f"{unbroken(result.suspect)}: {result.verdict}",
        ("agree", "other answer", "neither", "trials", "p-value", "smallest possible"),
        [
            [
                str(test.agreements),
                str(test.disagreements),
                str(test.neither),
                str(test.trials),
                p_value(test.log10_p_value),
                p_value(test.log10_smallest_p_value),
            ]
        ],
    )
    print_figure(agreements(test))
    print_lines(explain(result), *result.doubts, *said_looks(result.looks))


def explain(result: Verification) -> str:
    """One sentence for a person."""
    if result.published_rule is not None:
        return (
            f"The scheme {result.scheme!r} has no valid p-value: models that never saw the mark "
            f"often score as high. The paper's rule (50 %) says {result.published_rule!r} at "
            f"{percent(result.watermark_accuracy)}; ask strangers before you believe it."
        )
    if result.verdict == "match":
        return (
            "A model that does not depend on these coins agrees this often with probability "
            f"{p_value(result.test.log10_p_value)}."
        )
    if result.verdict == "inconclusive":
        return (
            "Too few trials were answered with one of their two answers to ever reach "
            f"{result.test.alpha:g}."
        )
    return (
        "A model that never saw the coins agrees this often with probability "
        f"{p_value(result.test.log10_p_value)}; the level is {result.test.alpha:g}, so that is no "
        "evidence."
    )
