"""The names that options take, apart from those of data sets (`countermark.data.known`).

Nothing heavy is imported here, so that a misspelt name is refused before PyTorch is loaded.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from countermark.errors import CountermarkError
from countermark.text import brief

NETWORKS = ("small", "wide", "clipped", "paper", "surrogate")
SCHEMES = ("coin", "adversarial", "ood", "none")
LABELS = ("true", "source")
RECIPES = ("fast", "strong", "pgd", "standard")
EMBEDDINGS = ("interleaved", "epoch")
ACCELERATORS = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "32-true", "bf16-mixed")
SETTINGS = ("white", "black", "grey")
PIXELS = ("float", "uint8")
LAYOUTS = ("nchw", "nhwc")
PROFILES = ("quick", "standard", "paper")
PROTOCOLS = ("clean", "as-published")

_COMPARED = 40  # characters of a word that is looked for among similar ones


def choose(what: str, name: str, names: Iterable[str]) -> None:
    """Refuse a name that is not one of `names`.

    Raises:
        CountermarkError: it is not; the message lists those that there are.
    """
    if name not in tuple(names):
        raise CountermarkError(f"unknown {what} {brief(name)}; choose one of {', '.join(names)}")


def nearest(word: str, meant: Mapping[str, str]) -> str:
    """The words that ask whether something similar was meant; empty where nothing is similar.

    Args:
        word: as it was written.
        meant: what may have been meant, by the word for it.
    """
    found = get_close_matches(word[:_COMPARED], list(meant), 1)
    return f" (did you mean {meant[found[0]]}?)" if found else ""
