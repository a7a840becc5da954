"""The errors that Countermark raises on purpose, and the refusal of unknown names.

A message says in one line what was wrong, where, and what to do next.
The command line prints that line and exits with status 2; any other exception is a bug.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from countermark.text import brief

_COMPARED = 40  # characters of a word that is looked for among similar ones


class CountermarkError(Exception):
    """Something the caller can put right: bad input, a damaged file, a full disk.

    Example:
        >>> try:
        ...     cm.load("nowhere")
        ... except cm.CountermarkError as error:
        ...     print(error)
        nowhere is not a model folder; name the folder that holds model.json and model.safetensors
    """


def choose(what: str, name: object, names: Iterable[object]) -> None:
    """Refuse a name that is not one of `names`.

    Raises:
        CountermarkError: it is not; the message lists those that there are.
    """
    known = [str(each) for each in names]
    if name not in known:
        raise CountermarkError(f"unknown {what} {brief(name)}; choose one of {', '.join(known)}")


def nearest(word: str, meant: Mapping[str, str]) -> str:
    """Ask whether something similar was meant, as in " (did you mean mnist?)"; empty if nothing is.

    Args:
        word: as it was written.
        meant: what may have been meant, by the word for it.
    """
    found = get_close_matches(word[:_COMPARED], list(meant), 1)
    return f" (did you mean {meant[found[0]]}?)" if found else ""
