"""Figures: their numbers are those of the binomial distribution, and they are small and safe."""

import base64
import io
import math
from fractions import Fraction
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from claiming import Claimant, claimant, some_trials
from countermark.claims import first_trials, judge_claim, page
from countermark.evidence import judge, untested
from countermark.pictures import agreements, png, strangers_band
from countermark.terminal import as_html
from countermark.verbs.adjudicate import Adjudication
from countermark.verbs.asking import Answers
from countermark.verbs.verify import Verification

HOSTILE = "<script>alert(1)</script>' onload='x\x1b[2J\n"


def test_the_band_is_that_of_the_exact_binomial() -> None:
    """No more than 0.05 % of strangers lie on either side, and one number less would be too few."""
    tail = Fraction(1, 2000)
    for trials in (*range(120), 800, 2001):
        low, high = strangers_band(trials)
        below = [Fraction(math.comb(trials, k), 1 << trials) for k in range(low + 1)]
        assert sum(below[:-1]) <= tail < sum(below)
        assert high == trials - low


def parts(test: Any) -> tuple[ElementTree.Element, dict[str, float]]:
    """A figure's SVG, and where its marks stand on an axis from 0 to 1."""
    figure = ElementTree.fromstring(agreements(test).replace("&nbsp;", " "))
    (svg,) = figure.iter("svg")
    axis, _ = svg.iter("line")
    left, right = (float(axis.attrib[name]) for name in ("x1", "x2"))
    (circle,), (band,) = svg.iter("circle"), svg.iter("rect")
    start = float(band.attrib["x"])
    marks = {
        "suspect": float(circle.attrib["cx"]),
        "low": start,
        "high": start + float(band.attrib["width"]),
    }
    return figure, {name: (x - left) / (right - left) for name, x in marks.items()}


@pytest.mark.parametrize("agreed", [0, 40, 82, 157, 160])
def test_the_figure_has_everything_in_its_place(agreed: int) -> None:
    outcomes = [1] * agreed + [-1] * (160 - agreed) + [0] * 7
    figure, marks = parts(judge(list(range(167)), outcomes))
    assert marks["suspect"] == pytest.approx(agreed / 160, abs=5e-4)
    assert marks["low"] == pytest.approx(59 / 160, abs=5e-4)
    assert marks["high"] == pytest.approx(101 / 160, abs=5e-4)
    said = " ".join("".join(figure.itertext()).split())
    assert f"the suspect: {agreed} of 160" in said
    assert "99.9 % of strangers agree with 59 to 101" in said


def test_there_is_no_figure_without_a_test_or_without_an_answer() -> None:
    assert agreements(judge([0, 1], [0, 0])) == ""
    assert agreements(untested([1] * 100)) == ""


def test_a_figure_of_many_trials_is_small() -> None:
    count = 1 << 14
    test = judge(list(range(count)), [1, -1] * (count // 2))
    assert len(agreements(test)) < 8000


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((1, 8, 8), (8, 8)),
        ((3, 32, 32), (32, 32)),
        ((3, 400, 300), (48, 64)),
        ((2, 8, 9), (9, 8)),
        ((1, 1, 9000), (64, 1)),
    ],
)
def test_an_image_is_a_small_png(shape: tuple[int, ...], size: tuple[int, int]) -> None:
    x = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    kind, _, data = png(x).partition(",")
    assert kind == "data:image/png;base64"
    drawn = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (drawn.format, drawn.size) == ("PNG", size)
    if max(shape) <= 64:
        wanted = x.permute(1, 2, 0).flatten() if shape[0] == 3 else x[0].flatten()
        assert list(drawn.tobytes()) == wanted.tolist()


def judged(who: Claimant, labels: torch.Tensor, class_names: tuple[str, ...] = ()) -> str:
    claim, finding = who.claim(labels), who.finding(labels)
    trials = first_trials(claim, finding.labels, 10)
    return page(judge_claim(claim, finding), {"Suspect": HOSTILE}, trials, class_names)


class Balanced(HTMLParser):
    """Holds a page's elements to be closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.images += tag == "img"
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An element of SVG without content."""


@pytest.mark.parametrize("names", [(), (HOSTILE,) * 10, ("n" * 100_000,) * 3])
def test_the_page_of_a_judgement_shows_a_few_trials(names: tuple[str, ...]) -> None:
    who = claimant(some_trials(), None)
    text = judged(who, who.labels, names)
    assert "<script" not in text
    assert "\x1b" not in text
    assert len(text) < 30_000
    reader = Balanced()
    reader.feed(text)
    assert (reader.open, reader.images) == ([], 10)


def test_a_trial_on_the_page_is_as_it_was_opened_and_answered() -> None:
    who = claimant(some_trials(), None)
    labels = who.labels.clone()
    labels[0] = who.trials.answers[0].sum() - labels[0]  # the other answer
    labels[1] = -1
    trials = first_trials(who.claim(labels), who.finding(labels).labels, 10)
    for number, trial in enumerate(trials):
        assert torch.equal(trial.image, who.trials.x[number])
        assert [trial.heads, trial.tails] == who.trials.answers[number].tolist()
        assert (trial.coin, trial.given) == (int(who.coins[number]), int(labels[number]))
    text = judged(who, labels)
    assert text.count("does not agree") == 2
    assert text.count("no answer") == 1


def test_what_was_not_committed_is_not_shown() -> None:
    who = claimant(some_trials(), None)
    claim, finding = who.claim(who.labels), who.finding(who.labels)
    claim.opened.x[0] ^= 1
    assert len(first_trials(claim, finding.labels, 1000)) == 39


def test_a_notebook_shows_the_figure_and_no_trial() -> None:
    test, answers = judge(list(range(80)), [1] * 80), Answers(0, 0, "", None, "", "")
    found: Any = Verification("my copy", "coin", test, 100.0, None, answers, (), None)
    text = found._repr_html_()
    assert "<svg" in text
    assert ">my copy: match<" in text
    judgement: Any = Adjudication(
        "claim", "copy", "upheld", "It is.", "ab" * 32, (), test, 2, answers, ()
    )
    page = judgement._repr_html_()
    assert "with the choice of 2 batches included" in page
    assert "<img" not in text + page
    assert as_html(lambda: None) == ""
