"""The judgement as one page that asks nothing of the network, for a reader who is no programmer."""

from collections.abc import Mapping, Sequence
from typing import Any

from countermark.claims.judgement import FAILS, HOLDS, Judgement, Trial
from countermark.html import document, escape
from countermark.pictures import agreements, png
from countermark.terminal import p_value

_STYLE = """
body { max-width: 60rem; } h2 { margin-top: 2rem; }
table { width: 100%; font-size: .9rem; }
th, td { padding: .4rem .6rem; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
.checks th { overflow-wrap: normal; }
.checks td:nth-child(2) { white-space: nowrap; font-weight: 600; }
.trials { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); \
gap: .8rem; padding: 0; list-style: none; }
.trials li { display: flex; gap: .8rem; align-items: center; overflow-wrap: anywhere; }
.trials img { width: 64px; height: 64px; flex: none; image-rendering: pixelated; \
object-fit: contain; border: 1px solid var(--line); }
.trials p { margin: 0; font-size: .9rem; line-height: 1.35; min-width: 0; }
@media (max-width: 40rem) {
  dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; }
  .checks, .checks tbody, .checks tr, .checks td { display: block; } \
.checks thead { display: none; }
  .checks td { border: 0; padding: .1rem 0; } .checks td:first-child { font-weight: 600; }
  .checks tr { border-bottom: 1px solid var(--line); padding: .5rem 0; }
}
"""

_LONGEST_NAME = 40  # characters of a class's name

_WORDS = {
    "upheld": ("good", "The claim is upheld: the suspect depends on this owner's coins."),
    "dismissed": ("bad", "The claim is dismissed."),
    "undecidable": ("open", "The claim cannot be decided from what was shown."),
}
_CLASSES = {HOLDS: "good", FAILS: "bad"}

LIMITS = (
    "What is proven is that the suspect's answers depend on coins that were drawn after the trials "
    "were fixed. That is not yet theft: the suspect's maker may have had the model from somebody "
    "else, or a licence. That the marked model existed before the suspect is shown as far as the "
    "accused has their own timestamp. The times are as good as the authorities whose roots the "
    "judge chose, and where a commitment was registered, the count of its owner's draws is as good "
    "as the public log and as what the judge knows of the owner's key."
)
"""What a judgement does not say."""


def sentence(judgement: Judgement) -> str:
    """The verdict in one sentence, with the reason if it is not upheld."""
    words = _WORDS[judgement.verdict][1]
    wanted = {"dismissed": FAILS, "undecidable": "cannot tell"}.get(judgement.verdict)
    reasons = [
        f"{check.name}: {check.found}" for check in judgement.checks if check.result == wanted
    ]
    return words if not reasons else f"{words} {'; '.join(reasons)}."


def page(
    judgement: Judgement,
    about: Mapping[str, Any],
    trials: Sequence[Trial] = (),
    class_names: Sequence[str] = (),
    *,
    story: str | None = None,
    limits: str = LIMITS,
) -> str:
    """Write the page.

    Args:
        judgement: what was judged.
        about: what else is shown, in order: key, suspect, files, versions.
        trials: a few trials that the claim opened, to be shown as pictures.
        class_names: names of the classes, in the order of the labels.
        story: what was tested, where it is not a batch of a key; there is no figure then.
        limits: what the judgement does not say.
    """
    kind, words = _WORDS[judgement.verdict]
    test = judgement.test
    rows = "".join(
        f"<tr><td>{escape(check.name)}</td>"
        f"<td class='{_CLASSES.get(check.result, 'open')}'>{escape(check.result)}</td>"
        f"<td>{escape(check.meaning)}<br><span class='soft'>{escape(check.found)}</span></td></tr>"
        for check in judgement.checks
    )
    listed = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in about.items()
    )
    figure = agreements(test, judgement.batches) if story is None else ""
    story = story or (
        f"Asked for {test.trials} trials, each with two answers of which a secret coin had chosen "
        f"one, the suspect gave the coin's answer {test.agreements} times and the other one "
        f"{test.disagreements} times ({test.neither} times neither). A model that does not depend "
        f"on the coins agrees that often with probability {p_value(test.log10_p_value)}; "
        f"the judge asks for {test.alpha:g} or less. "
        f"The owner could have shown any of {judgement.batches} batches"
        + (f" of any of {judgement.draws} registered keys" if judgement.draws > 1 else "")
        + "; that is included."
    )
    parts = [
        f"<h1>Judgement: <span class='{kind}'>{escape(judgement.verdict)}</span></h1>",
        f"<p><strong>{escape(words)}</strong></p><p>{escape(story)}</p>",
        figure,
        *_pictures(trials, class_names),
        "<h2>Every check</h2><div class='wide'><table class='checks'>"
        "<thead><tr><th>What</th><th>Result</th><th>What it means</th></tr></thead>",
        f"<tbody>{rows}</tbody></table></div><h2>What it does not say</h2><p>{escape(limits)}</p>",
        f"<h2>What was judged</h2><dl>{listed}</dl>",
        "<footer>Every number here can be computed again from the claim's files, the suspect, and "
        "the public log where one was asked.</footer>",
    ]
    return document("Countermark: a judgement", _STYLE, parts)


def _pictures(trials: Sequence[Trial], class_names: Sequence[str]) -> list[str]:
    """A few trials: the image, its two answers, the coin's choice, and what the suspect said."""
    if not trials:
        return []
    shown = "".join(f"<li>{_picture(trial, class_names)}</li>" for trial in trials)
    return [
        f"<h2>The first {len(trials)} trials</h2>"
        "<p>The claim opened these and the rest of their batch. "
        "Whoever sees a trial can train a model to forget its coin.</p>",
        f"<ul class='trials'>{shown}</ul>",
    ]


def _picture(trial: Trial, class_names: Sequence[str]) -> str:
    def name(label: int) -> str:
        if not 0 <= label < len(class_names):
            return escape("no answer" if label < 0 else f"class {label}")
        named = str(class_names[label])
        return escape(named if len(named) <= _LONGEST_NAME else f"{named[: _LONGEST_NAME - 3]}...")

    answers = (trial.heads, trial.tails)
    agrees, other = trial.given == answers[trial.coin], trial.given == answers[1 - trial.coin]
    kind, outcome = ("good", "agrees") if agrees else ("bad" if other else "open", "does not agree")
    sides = ("heads", "tails")
    chosen = f"{sides[trial.coin]}, {name(answers[trial.coin])}"
    return (
        f"<img alt='a watermark' width='64' height='64' src='{png(trial.image)}'>"
        f"<p>heads: {name(trial.heads)}; tails: {name(trial.tails)}<br>"
        f"the coin chose <strong>{chosen}</strong><br>"
        f"the suspect answered <strong>{name(trial.given)}</strong>: "
        f"<span class='{kind}'>{outcome}</span></p>"
    )
