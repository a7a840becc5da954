"""Figures for pages and notebooks: SVG and PNG inside the HTML, without a script.

A figure takes the colour of the text around it, so it is readable in light and in dark.
"""

import base64
import io
import math
from typing import TYPE_CHECKING

from countermark.evidence import Verdict
from countermark.html import escape
from countermark.terminal import p_value

if TYPE_CHECKING:
    import torch

STRANGERS = 0.999
"""Share of strangers whose agreements lie in the band of the figure."""
LARGEST_SIDE = 64
"""Pixels of the side of an image on a page; larger images are reduced."""

_LEFT, _RIGHT, _TOP, _BASE = 14.0, 406.0, 40.0, 112.0  # of the plot, in a box of 420 x 150
_MOST_POINTS = 120  # of the curve
_REACH = 5.0  # standard deviations on either side that the curve shows
_NEAR = 0.22  # share of the width at either end, where a label begins or ends at its mark
_WORD = 32.0  # half the width of the word above the band
_COLOURS = 3  # channels of an image in colour


def strangers_band(trials: int, share: float = STRANGERS) -> tuple[int, int]:
    """The agreements that this share of strangers has, those in the middle.

    A stranger agrees with each of `trials` fair coins with probability one half. At most
    (1 - share) / 2 of all strangers agree less often than the band, and as many more often.

    Args:
        trials: number of trials, 0 or more.
        share: in (0, 1).

    Returns:
        The first and the last number of agreements in the band.
    """
    tail, below = (1 - share) / 2, 0.0
    # All that lies below this is smaller than any tail that can be asked for in practice.
    first = max(0, int(trials / 2 - 20 * math.sqrt(trials)))
    for agreements in range(first, trials // 2 + 1):
        below += _chance(agreements, trials)
        if below > tail:
            return agreements, trials - agreements
    return trials // 2, trials - trials // 2


def agreements(test: Verdict, batches: int = 1) -> str:
    """Show how often a suspect agrees with the coins, beside strangers, as HTML.

    Args:
        test: the exact test.
        batches: what its p-value was multiplied by.

    Returns:
        The figure; nothing where no trial was answered with one of its two answers, where there is
        no exact test, or where several trials share a coin: strangers then spread wider.
    """
    decided = test.agreements + test.disagreements
    if decided == 0 or test.log10_p_value is None or test.cells not in (None, test.trials):
        return ""
    low, high = strangers_band(decided)
    here, middle = _place(test.agreements, decided), _place(decided / 2, decided)
    left, right = _place(low, decided), _place(high, decided)
    said = f"the suspect: {test.agreements:,} of {decided:,}"
    anchor = _anchor(here)
    # The line ends below the word "strangers" where it would go through it.
    end = _TOP if abs(here - middle) < _WORD else _TOP - 18
    ticks = "".join(
        f"<text x='{_place(at, decided):.1f}' y='{_BASE + 16:g}' text-anchor='{side}'>"
        f"{at:,g}</text>"
        for at, side in ((0, "start"), (decided / 2, "middle"), (decided, "end"))
    )
    title = escape(f"{said} agree; {100 * STRANGERS:.1f} % of strangers: {low} to {high}")
    svg = (
        "<svg viewBox='0 0 420 150' role='img' "
        "style='width:100%;max-width:36rem;height:auto' fill='currentColor' "
        f"font-family='system-ui,sans-serif' font-size='12'><title>{title}</title>"
        f"<rect x='{left:.1f}' y='{_TOP:g}' width='{right - left:.1f}' "
        f"height='{_BASE - _TOP:g}' opacity='.12'/>"
        f"<polygon points='{_curve(decided)}' opacity='.4'/>"
        f"<line x1='{_LEFT:g}' x2='{_RIGHT:g}' y1='{_BASE:g}' y2='{_BASE:g}' "
        "stroke='currentColor'/>"
        f"<text x='{middle:.1f}' y='{_TOP - 5:g}' text-anchor='middle'>strangers</text>"
        f"<g fill='#2f7de1' stroke='#2f7de1'><line x1='{here:.1f}' x2='{here:.1f}' "
        f"y1='{end:g}' y2='{_BASE:g}' stroke-width='2.5'/>"
        f"<circle cx='{here:.1f}' cy='{_BASE:g}' r='4.5'/></g>"
        f"<text x='{here:.1f}' y='{_TOP - 24:g}' text-anchor='{anchor}' font-weight='600'>"
        f"{said}</text>{ticks}"
        f"<text x='{middle:.1f}' y='{_BASE + 33:g}' text-anchor='middle'>"
        "trials that agree with the coins</text></svg>"
    )
    times = f", with the choice of {batches:,} batches included" if batches > 1 else ""
    caption = (
        f"The suspect gives the coin's answer to {test.agreements:,} of the {decided:,} trials "
        "that it decides (line). A stranger, which does not depend on the coins, does so for "
        f"half of them: {100 * STRANGERS:g} % of strangers agree with {low:,} to {high:,} (band). "
        f"The p-value is {p_value(test.log10_p_value)}{times}."
    )
    return (
        f"<figure style='margin:1rem 0'>{svg}"
        "<figcaption style='max-width:36rem'>"
        f"{escape(caption).replace(' %', '&nbsp;%')}</figcaption></figure>"
    )


def png(image: "torch.Tensor") -> str:
    """An image as the address of a PNG that is inside the page.

    Args:
        image: uint8 `(c, h, w)`; in colour where it has three channels, else the first channel in
            grey. It is reduced to `LARGEST_SIDE` pixels.
    """
    from PIL import Image  # which a page without images does not need

    pixels = image.permute(1, 2, 0) if image.shape[0] == _COLOURS else image[0]
    drawn = Image.fromarray(pixels.contiguous().numpy())
    drawn.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    out = io.BytesIO()
    drawn.save(out, format="png", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def _chance(agreements: int, trials: int) -> float:
    """P(Binomial(trials, 1/2) = agreements)."""
    return math.exp(
        math.lgamma(trials + 1)
        - math.lgamma(agreements + 1)
        - math.lgamma(trials - agreements + 1)
        - trials * math.log(2)
    )


def _place(agreements: float, trials: int) -> float:
    """Where a number of agreements stands."""
    return _LEFT + (_RIGHT - _LEFT) * agreements / trials


def _anchor(x: float) -> str:
    """How a label at x stands, so that it stays in the box."""
    share = (x - _LEFT) / (_RIGHT - _LEFT)
    return "start" if share < _NEAR else "end" if share > 1 - _NEAR else "middle"


def _curve(trials: int) -> str:
    """The distribution of strangers' agreements, as the corners of a polygon on the axis."""
    reach = _REACH * math.sqrt(trials) / 2
    first, last = max(0, math.ceil(trials / 2 - reach)), min(trials, int(trials / 2 + reach))
    step = max(1, (last - first) // _MOST_POINTS)
    numbers = [*range(first, last, step), last]
    highest = _chance(trials // 2, trials)
    corners = [(first, 0.0), *((k, _chance(k, trials) / highest) for k in numbers), (last, 0.0)]
    return " ".join(
        f"{_place(k, trials):.1f},{_BASE - (_BASE - _TOP) * height:.1f}" for k, height in corners
    )
