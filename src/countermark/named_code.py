"""Code that the user named as `module:function`: the one place where such code is imported.

It is imported because somebody typed its name or passed it, and never because a file says so.
"""

import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from countermark.errors import CountermarkError
from countermark.text import brief, sentence

_PLACE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")


def is_code(place: str) -> bool:
    """Whether a place is spelt `module:function`.

    Example:
        >>> is_code("shop.models:make"), is_code("small"), is_code("C:/photos")
        (True, False, False)
    """
    return _PLACE.fullmatch(place) is not None


def imported(place: str) -> Any:
    """Import what `module:function` names; the working folder comes first, as with `python -m`.

    Args:
        place: a module and something in it, both perhaps with dots: `shop.models:make`.

    Raises:
        CountermarkError: it is not spelt so, the module cannot be imported, or has no such thing.
    """
    if not is_code(place):
        raise CountermarkError(
            f"{brief(place)} names no code; write module:function, such as shop.models:make"
        )
    module_name, _, path = place.partition(":")
    here = str(Path.cwd())
    if not {here, ""} & set(sys.path[:1]):
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise CountermarkError(
                f"{place} cannot be imported: it needs the module {error.name!r}, "
                "which is not installed"
            ) from error
        raise CountermarkError(
            f"there is no module {module_name!r} for {place}; "
            f"it is looked for in {here} and among installed packages, "
            f"so run the command in the folder that holds {module_name.partition('.')[0]}"
        ) from error
    except (Exception, SystemExit) as error:
        raise CountermarkError(f"{place} cannot be imported: {said(error)}") from error
    for name in path.split("."):
        if not hasattr(found, name):
            there = [
                each
                for each in vars(found)
                if not each.startswith("_") and callable(getattr(found, each))
            ][:5]
            hint = f"; it has {', '.join(there)}" if there else ""
            raise CountermarkError(f"there is no {path!r} in the module {module_name!r}{hint}")
        found = getattr(found, name)
    return found


def called(function: Any, place: str, known: Mapping[str, Any], *positional: Any) -> Any:
    """Call somebody's function with what it asks for.

    Its signature says what it asks for. Parameters whose names are in `known` are given by keyword.
    A function that needs no arguments gets none, and any other one gets `positional`.

    Args:
        function: a function or a class.
        place: how it is called in messages.
        known: values by the names that parameters may have.
        *positional: values for parameters that have other names.

    Raises:
        CountermarkError: it wants something else, or raised an error.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of a class in C
        parameters = {}.values()
    variable = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    named = [
        each.name
        for each in parameters
        if each.kind not in (*variable, inspect.Parameter.POSITIONAL_ONLY)
    ]
    given = {name: known[name] for name in named if name in known}
    required = [
        each
        for each in parameters
        if each.default is inspect.Parameter.empty and each.kind not in variable
    ]
    places = [
        each for each in parameters if each.kind not in (inspect.Parameter.KEYWORD_ONLY, *variable)
    ]
    arguments: tuple[Any, ...] = ()
    if any(each.name not in given for each in required):
        fits = len(required) <= len(positional) <= len(places) and all(
            each in places for each in required
        )
        if given or not fits:
            wanted = ", ".join(each.name for each in required)
            may = f"for {', '.join(known)} by these names, or nothing" if known else "for nothing"
            raise CountermarkError(f"{place} wants ({brief(wanted)[1:-1]}); it may ask {may}")
        arguments = positional
    elif (
        not given
        and not inspect.isclass(function)
        and any(each.kind is inspect.Parameter.VAR_POSITIONAL for each in parameters)
    ):
        arguments = positional  # a decorator hides what the function asks for
    try:
        return function(*arguments, **given)
    except (Exception, SystemExit) as error:
        raise CountermarkError(f"{place} raised an error: {said(error)}") from error


def said(error: BaseException) -> str:
    """An error of somebody's code in one line: its kind, its words, and where it was raised.

    Example:
        >>> said(ValueError("no such thing"))
        'ValueError: no such thing'
    """
    words = sentence(str(error))
    frames = traceback.extract_tb(error.__traceback__)
    # The frames of importlib itself have no file.
    last = next((frame for frame in reversed(frames) if not frame.filename.startswith("<")), None)
    where = "" if last is None else f" ({Path(last.filename).name}, line {last.lineno})"
    return f"{type(error).__name__}{': ' if words else ''}{words}{where}"
