"""An extension of Griffe, which reads Python for the API page without running it.

The decorator `countermark.options.verb` gives a verb its signature and its docstring when it is
imported. Griffe cannot see that, so this extension asks the imported function for both.
"""

import importlib
import inspect
import re
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import griffe


class Verbs(griffe.Extension):
    """Gives the functions that `verb` makes the signature and the docstring that they have."""

    def on_function_instance(self, *, func: griffe.Function, **_: Any) -> None:
        """Take both from the imported function."""
        if not any(str(each.value).startswith("verb(") for each in func.decorators):
            return
        made = getattr(importlib.import_module(func.module.path), func.name)
        func.decorators = []
        func.parameters = griffe.Parameters(
            *(
                griffe.Parameter(
                    each.name,
                    annotation=_type(each.annotation),
                    kind=griffe.ParameterKind[each.kind.name.lower()],
                    default=None if each.default is each.empty else _written(each.default),
                )
                for each in inspect.signature(made).parameters.values()
            )
        )
        func.docstring = griffe.Docstring(_examples(made.__doc__), parent=func)

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Have a docstring's `Example:` read as code."""
        if obj.docstring is not None:
            obj.docstring.value = _examples(obj.docstring.value)

    def on_module_members(self, *, mod: griffe.Module, **_: Any) -> None:
        """Let a second name of a verb in its own module be that verb."""
        for name, member in list(mod.members.items()):
            if isinstance(member, griffe.Attribute):
                meant = mod.members.get(str(member.value))
                if isinstance(meant, griffe.Function):
                    mod.set_member(name, griffe.Alias(name, meant, parent=mod))


def _examples(text: str) -> str:
    """The same docstring with the name that Griffe knows for its examples."""
    return text.replace("\nExample:\n", "\nExamples:\n")


def _type(hint: Any) -> str:
    """A type in few words: without modules, its alternatives with a bar between them."""
    if get_origin(hint) in (Union, UnionType):
        return " | ".join(_type(part) for part in get_args(hint))
    if hint is NoneType:
        return "None"
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=\w)", "", inspect.formatannotation(hint))


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else repr(value)
