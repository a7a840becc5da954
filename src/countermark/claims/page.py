"""The judgement as one page that asks nothing of the network, for a reader who is no programmer."""

from collections.abc import Mapping
from typing import Any

from countermark.claims.judgement import FAILS, HOLDS, Judgement
from countermark.html import document, escape
from countermark.terminal import p_value

_STYLE = """
body { max-width: 60rem; } h2 { margin-top: 2rem; }
table { width: 100%; font-size: .9rem; }
th, td { padding: .4rem .6rem; text-align: left; vertical-align: top; overflow-wrap: anywhere; }
td:nth-child(2) { white-space: nowrap; font-weight: 600; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; } }
"""

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
    "judge chose."
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


def page(judgement: Judgement, about: Mapping[str, Any]) -> str:
    """Write the page.

    Args:
        judgement: what was judged.
        about: what else is shown, in order: key, suspect, files, versions.
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
    story = (
        f"Asked for {test.trials} trials, each with two answers of which a secret coin had chosen "
        f"one, the suspect gave the coin's answer {test.agreements} times and the other one "
        f"{test.disagreements} times ({test.neither} times neither). A model that does not depend "
        f"on the coins agrees that often with probability {p_value(test.log10_p_value)}; "
        f"the judge asks for {test.alpha:g} or less. "
        f"The owner could have shown any of {judgement.batches} batches; that is included."
    )
    parts = [
        f"<h1>Judgement: <span class='{kind}'>{escape(judgement.verdict)}</span></h1>",
        f"<p><strong>{escape(words)}</strong></p><p>{escape(story)}</p>",
        "<h2>Every check</h2><div class='wide'><table>"
        "<thead><tr><th>What</th><th>Result</th><th>What it means</th></tr></thead>",
        f"<tbody>{rows}</tbody></table></div><h2>What it does not say</h2><p>{escape(LIMITS)}</p>",
        f"<h2>What was judged</h2><dl>{listed}</dl>",
        "<footer>Every number here can be computed again from the claim's files.</footer>",
    ]
    return document("Countermark: a judgement", _STYLE, parts)
