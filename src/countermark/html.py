"""The frame of the HTML pages.

A page makes no network request and opens from disk. It has a light and a dark theme, and fits
desktop and phone screens.
"""

from html import escape as _escape

from countermark.text import visible

_STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1f2937; --paper: #ffffff; --soft: #6b7280; --line: #e5e7eb; \
--good: #15803d; --bad: #b91c1c; --open: #a16207;
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e7eb; --paper: #111827; --soft: #9ca3af; --line: #374151; \
--good: #4ade80; --bad: #f87171; --open: #facc15; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; \
color: var(--ink); background: var(--paper); }
h1 { font-size: 1.6rem; line-height: 1.2; }
h2 { font-size: 1.2rem; border-top: 1px solid var(--line); padding-top: 1rem; }
.soft, figcaption, footer { color: var(--soft); font-size: .9rem; } .wide { overflow-x: auto; }
.good { color: var(--good); } .bad { color: var(--bad); } .open { color: var(--open); }
table { border-collapse: collapse; } th, td { border-bottom: 1px solid var(--line); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; } \
dd { margin: 0; overflow-wrap: anywhere; }
"""


def escape(text: object) -> str:
    """Text for a page: nothing in it is HTML, and what is not printable is shown as its escape."""
    return _escape(visible(text))


def document(title: str, style: str, parts: list[str]) -> str:
    """One HTML page.

    Args:
        title: of the window.
        style: CSS of this page, besides that of all pages.
        parts: HTML of the body.
    """
    head = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<link rel='icon' href='data:,'>",
        f"<title>{escape(title)}</title><style>{_STYLE}{style}</style></head><body>",
    ]
    return "\n".join([*head, *parts, "</body></html>"]) + "\n"
