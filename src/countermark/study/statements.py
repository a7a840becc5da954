"""The statements of the paper and ours, judged by the measurements of each protocol."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from countermark.data import known
from countermark.study.grid import STUDIED, TRAINED_ON
from countermark.study.results import Estimate, Row, auc, estimate, where
from countermark.study.tables import RULE, paper_value, swept
from countermark.threat import shown

_STEP = 0.01  # alpha in the paper's beta > epsilon + alpha: the step of its training attack
_SAMPLED = 2.0  # points by which adversarial accuracies on 1,000 and on all test images differ


Verdict = Literal["holds", "does not hold", "is undecided", "was not measured"]


@dataclass(frozen=True)
class Finding:
    """What one protocol's numbers say about one statement.

    Attributes:
        verdict: it holds if it holds on every data set that it is judged on, and does not if it
            fails on one. It is undecided where the 95 % interval over seeds has room for both.
        told: the numbers, in words.
    """

    verdict: Verdict
    told: str

    @property
    def holds(self) -> bool:
        """Whether the statement holds."""
        return self.verdict == "holds"


@dataclass(frozen=True)
class Statement:
    """A statement of the paper's or our own, and what each protocol says of it.

    Attributes:
        text: the statement.
        findings: by protocol.
        leading: whether the report begins with it.
        remark: why it does not hold, as far as we know, if it does not.
    """

    text: str
    findings: Mapping[str, Finding]
    leading: bool
    remark: str = ""

    @property
    def measured(self) -> list[Finding]:
        """What was found wherever it was measured."""
        return [each for each in self.findings.values() if each.verdict != "was not measured"]

    @property
    def verdict(self) -> str:
        """What was found under which protocols, such as `holds under clean and as-published`."""
        if not self.measured:
            return "was not measured"
        alike: dict[str, list[str]] = {}
        for protocol, finding in self.findings.items():
            alike.setdefault(finding.verdict, []).append(protocol)
        return "; ".join(f"{verdict} under {' and '.join(on)}" for verdict, on in alike.items())


Judge = Callable[[Sequence[Row], str], tuple[bool | None, str] | None]
"""From measurements and the name of a data set to whether a statement holds there, and the numbers.

Where the seeds disagree it is None, and where nothing was measured there is no answer.
"""


def statements(measured: Mapping[str, Sequence[Row]]) -> list[Statement]:
    """Every statement, judged by the measurements of each protocol."""
    return [
        Statement(
            text,
            {
                protocol: _over_data(judge, rows, theirs=(text, judge) in _PAPERS)
                for protocol, rows in measured.items()
            },
            text in _LEADING,
            next((remark for start, remark in _REMARKS.items() if text.startswith(start)), ""),
        )
        for text, judge in (*_PAPERS, *_OURS)
    ]


def counted(judged: Sequence[Statement]) -> str:
    """How many statements hold: one sentence, which counts each of them once."""
    everywhere = somewhere = undecided = nowhere = 0
    for statement in judged:
        verdicts = [finding.verdict for finding in statement.measured]
        if not verdicts:
            continue
        holding = verdicts.count("holds")
        everywhere += holding == len(verdicts)
        somewhere += 0 < holding < len(verdicts)
        undecided += not holding and "is undecided" in verdicts
        nowhere += not holding and "is undecided" not in verdicts
    total = everywhere + somewhere + undecided + nowhere
    if not total:
        return "No statement was measured."
    parts = [f"{everywhere} {'holds' if everywhere == 1 else 'hold'} wherever measured"]
    parts += [f"{somewhere} under one protocol only"] if somewhere else []
    parts += [f"{undecided} {'is' if undecided == 1 else 'are'} undecided"] if undecided else []
    return f"Of {total} statements {', '.join(parts)} and {nowhere} nowhere."


def _over_data(judge: Judge, rows: Sequence[Row], *, theirs: bool) -> Finding:
    """Judge a statement on all data sets; one of `theirs` on those of the paper, if there are any.

    What the paper says of its data sets cannot fail on others; there the numbers are told.
    """
    found = {data: judge(rows, data) for data in dict.fromkeys(row["data"] for row in rows)}
    known = {data: result for data, result in found.items() if result is not None}
    if not known:
        return Finding("was not measured", "")
    papers = [data for data in known if STUDIED[data].paper]
    judged = papers if theirs and papers else list(known)
    aside = {data: "" if data in judged else " (not judged)" for data in known}
    told = "; ".join(
        f"{STUDIED[data].title}{aside[data]}: {words}" for data, (_, words) in known.items()
    )
    verdicts = [known[data][0] for data in judged]
    if False in verdicts:
        return Finding("does not hold", told)
    return Finding("is undecided" if None in verdicts else "holds", told)


def _settled(values: Estimate, holds: Callable[[float], bool], sampled: float = 0.0) -> bool | None:
    """Whether a condition holds for the mean of some values, as far as the seeds can tell.

    `sampled` is how far off a value may be by the images that it was measured on.
    """
    half = max(values.half or 0.0, sampled)
    ends = {holds(values.mean - half), holds(values.mean + half)}
    return ends.pop() if len(ends) == 1 else None


def _lost(first: Sequence[Row], second: Sequence[Row], metric: str) -> Estimate | None:
    """What the second models have less than the first, seed by seed."""
    before = {row["seed"]: row[metric] for row in first if row[metric] is not None}
    after = {row["seed"]: row[metric] for row in second if row[metric] is not None}
    both = sorted(before.keys() & after.keys())
    return Estimate(tuple(before[seed] - after[seed] for seed in both), ()) if both else None


def _models(rows: Sequence[Row], data: str, defence: str, setting: str = "white-box") -> list[Row]:
    """The measurements of a defence's stolen models, one a seed."""
    place = {"data": data, "defence": defence, "setting": setting}
    return where(rows, section="model", removal="none", **place)


def _robust(rows: Sequence[Row], data: str) -> tuple[bool | None, str] | None:
    paper = paper_value("table1_single_defence", "advtr.adv", data)
    ours = estimate(_models(rows, data, "ADVTR"), "adversarial")
    if ours is None or paper is None:
        return None
    return _settled(ours, lambda accuracy: accuracy >= paper), f"{ours.told} (paper {paper:.2f})"


def _cheap(scheme: str, most: float, control: str) -> Judge:
    def judged(rows: Sequence[Row], data: str) -> tuple[bool | None, str] | None:
        before, after = _models(rows, data, control), _models(rows, data, f"ADVTR+{scheme}")
        lost = _lost(before, after, "adversarial")
        plain, marked = estimate(before, "adversarial"), estimate(after, "adversarial")
        if lost is None or plain is None or marked is None:
            return None
        told = f"{plain.told} without, {marked.told} with, {lost.told} lost"
        return _settled(lost, lambda points: points <= most), told

    return judged


def _cheaper_than_ood(rows: Sequence[Row], data: str) -> tuple[bool | None, str] | None:
    outside, crafted = (_models(rows, data, f"ADVTR+{name}") for name in ("ood", "adversarial"))
    lost = _lost(outside, crafted, "adversarial")
    ood, adversarial = estimate(outside, "adversarial"), estimate(crafted, "adversarial")
    if lost is None or ood is None or adversarial is None:
        return None
    told = f"OOD {ood.told}, adversarial {adversarial.told}"
    return _settled(lost, lambda points: points < 0), told


def _verified(found: Estimate) -> bool | None:
    return _settled(found, lambda accuracy: accuracy >= RULE)


def _verified_after(setting: str) -> Judge:
    def judged(rows: Sequence[Row], data: str) -> tuple[bool | None, str] | None:
        ours = estimate(_models(rows, data, "ADVTR+adversarial", setting), "watermark")
        if ours is None:
            return None
        return _verified(ours), f"{ours.told} % of the watermarks"

    return judged


def _above_strangers(setting: str) -> Judge:
    """Judge whether every thief gives more watermarks than every stranger.

    This is the control: a figure above 50 % is evidence only if models that never saw the mark stay
    below it.
    """

    def judged(rows: Sequence[Row], data: str) -> tuple[bool | None, str] | None:
        copies = _models(rows, data, "ADVTR+adversarial", setting)
        thieves = [row["watermark"] for row in copies]
        strangers = [
            row["watermark"]
            for row in where(rows, section="strangers", data=data, scheme="adversarial")
        ]
        area = auc(thieves, strangers)
        if area is None:
            return None
        spread = f"strangers {min(strangers):.0f} to {max(strangers):.0f} %"
        told = f"thief {min(thieves):.0f} %, {spread}, AUC {area:.2f}"
        return min(thieves) > max(strangers), told

    return judged


def _pruned(rows: Sequence[Row], data: str) -> tuple[bool | None, str] | None:
    place = {
        "section": "removal",
        "data": data,
        "defence": "ADVTR+adversarial",
        "setting": "white-box",
        "removal": "pruned",
    }
    found = estimate([row for row in where(rows, **place) if row["amount"] == 0.7], "watermark")
    if found is None:
        return None
    return _verified(found), f"{found.told} % at 70 % pruned"


def _budget(rows: Sequence[Row], data: str) -> tuple[bool | None, str] | None:
    """Judge the statement beta > epsilon + alpha, owner by owner.

    It says that watermarks with budgets up to epsilon + alpha conflict with adversarial training,
    and that those with larger budgets do not.
    """
    most = known(data).threat.epsilon + _STEP
    plain = estimate(_models(rows, data, "ADVTR"), "adversarial")
    parts = {budget: marked for budget, marked, _ in swept(rows, data)}
    means = {budget: estimate(marked, "adversarial") for budget, marked in parts.items()}
    sides: dict[bool, dict[int, list[float]]] = {True: {}, False: {}}
    for budget, marked in parts.items():
        for row in marked:
            sides[budget > most].setdefault(row["seed"], []).append(row["adversarial"])
    both = sorted(sides[True].keys() & sides[False].keys())
    if plain is None or not both:
        return None
    margins = tuple(min(sides[True][seed]) - max(sides[False][seed]) for seed in both)
    told = ", ".join(
        f"{found.mean:.1f} at {shown(budget)}"
        for budget, found in means.items()
        if found is not None
    )
    return (
        _settled(Estimate(margins, ()), lambda points: points > 0, _SAMPLED),
        f"adversarial accuracy {told} ({plain.mean:.1f} unmarked)",
    )


def _coins_convict(removal: str, most: float) -> Judge:
    def judged(rows: Sequence[Row], data: str) -> tuple[bool | None, str] | None:
        place = {"data": data, "defence": "ADVTR+coin", "setting": "white-box"}
        found = where(rows, section="removal", removal=removal, **place)
        found = [row for row in found if row["amount"] <= most]
        if not found:
            return None
        worst = max(row["log10_p"] for row in found)
        return worst <= -9, f"p <= 10^{math.ceil(10 * worst) / 10:.1f}"  # a bound is not rounded

    return judged


def _coins_spare(rows: Sequence[Row], data: str) -> tuple[bool | None, str] | None:
    found = [row["log10_p"] for row in where(rows, section="strangers", data=data, scheme="coin")]
    return (
        None
        if not found
        else (min(found) > -6, f"smallest p of {len(found)} strangers 10^{min(found):.1f}")
    )


def _coins_unstolen(rows: Sequence[Row], data: str) -> tuple[bool | None, str] | None:
    found = [
        row
        for setting in ("black-box", "grey-box")
        for row in _models(rows, data, "ADVTR+coin", setting)
    ]
    if not found:
        return None
    told = ", ".join(f"{row['setting']} {row['agree']}:{row['disagree']}" for row in found)
    return any(row["log10_p"] <= -6 for row in found), told


_CONTROL = "Adversarial watermarks tell a copy made through the API from strangers"
_CONVICTED = "Ours: coins convict every white-box copy with p <= 1e-9"
_PAPERS: tuple[tuple[str, Judge], ...] = (
    ("Adversarial training reaches the paper's adversarial accuracy.", _robust),
    (
        "Adversarial watermarks cost less adversarial accuracy than OOD watermarks.",
        _cheaper_than_ood,
    ),
    (
        "Adversarial watermarks cost at most about five points of adversarial accuracy.",
        _cheap("adversarial", 5.5, "ADVTR"),
    ),
    (
        "After black-box theft the copy gives half of the adversarial watermarks or more.",
        _verified_after("black-box"),
    ),
    (f"{_CONTROL} (black-box).", _above_strangers("black-box")),
    (
        "After grey-box theft the copy gives half of the adversarial watermarks or more.",
        _verified_after("grey-box"),
    ),
    (f"{_CONTROL} (grey-box).", _above_strangers("grey-box")),
    ("The model itself is told from strangers (white-box).", _above_strangers("white-box")),
    (
        "White-box copies keep the adversarial watermarks when 70 % of the weights are pruned.",
        _pruned,
    ),
    (
        (
            "Watermark budgets above epsilon + alpha do not conflict with adversarial training, "
            "lower ones do."
        ),
        _budget,
    ),
)
"""Statements of the paper, and the controls that they lack."""
_OURS: tuple[tuple[str, Judge], ...] = (
    (
        (
            "Ours: a model with coins has at most a point less adversarial accuracy than the "
            "unmarked one."
        ),
        _cheap("coin", 1.0, "ADVTR"),
    ),
    (
        "Ours: the same against the unmarked model trained on for as many epochs.",
        _cheap("coin", 1.0, TRAINED_ON),
    ),
    (f"{_CONVICTED} up to 80 % pruned.", _coins_convict("pruned", 0.8)),
    (f"{_CONVICTED} up to 40 epochs of fine-tuning.", _coins_convict("fine-tuned", 40)),
    ("Ours: coins accuse no stranger at 1e-6.", _coins_spare),
    ("Coins in the weights convict a thief through the API.", _coins_unstolen),
)
_LEADING = {
    f"{_CONTROL} (black-box).",
    f"{_CONTROL} (grey-box).",
    f"{_CONVICTED} up to 80 % pruned.",
    "Ours: coins accuse no stranger at 1e-6.",
}
_THRESHOLD = (
    "How many watermarks a copy gives depends on how they are crafted and on how well the copy "
    "learnt the task; what the figure is worth shows only beside strangers."
)
_REMARKS = {
    "After black-box theft": _THRESHOLD,
    "After grey-box theft": _THRESHOLD,
    _CONTROL: (
        "This is the control that the paper lacks. The true label of a watermark is part of the "
        "task; a copy made through the API learns the task, and so does every stranger, so a "
        "threshold low enough for the thief accuses strangers. What a theft through the API takes "
        "along has to be in the answers: that is the guarded service's mark."
    ),
    "The model itself": (
        "A stranger that reads the watermarks answers their true labels as well as the marked "
        "model does; coins cannot be read."
    ),
    "Watermark budgets above": (
        "The paper argues from how an unmarked model fares against larger budgets (Table 5), not "
        "from marked models. Here marked models are measured. Where watermarks join every batch "
        "their budget hardly matters; a pass over them after each epoch (Algorithm 1) does the "
        "more harm the larger it is."
    ),
    "Ours: the same": (
        "This control is stricter than the paper's tables: marks are trained in from the unmarked "
        "model, and as many further epochs without a mark make that better as well."
    ),
    "Coins in the weights": (
        "Expected, and the reason for the guarded service: nothing in the weights that was tried "
        "survives a theft by answers."
    ),
}
"""Why a statement does not hold, as far as we know, by the beginning of its text."""
