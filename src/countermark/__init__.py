"""Countermark: image classifiers that resist evasion, carry keyed coins, and can be proven to be yours.

A mark is a keyed coin flip between two answers that a stranger's model would give equally happily. A stolen copy remembers the coins; a
stranger agrees with each with probability one half, so a match has an exact p-value.

    import countermark
    countermark.protect(countermark.ProtectConfig(data="digits", out=Path("mine")))
    model = countermark.load("mine")  # an nn.Module: pixels of [0, 1] to logits
    countermark.verify(countermark.VerifyConfig(suspect=Path("theirs"), key=Path("mine/key"))).verdict

Everything here is imported when it is first used, so importing the package is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from countermark.bundle import load
    from countermark.config import (
        EvaluateConfig,
        FetchConfig,
        PlanConfig,
        ProtectConfig,
        QuickstartConfig,
        RemoveConfig,
        ReproduceConfig,
        StealConfig,
        VerifyConfig,
    )
    from countermark.errors import CountermarkError
    from countermark.verbs.evaluate import evaluate
    from countermark.verbs.fetch import fetch
    from countermark.verbs.plan import plan
    from countermark.verbs.protect import protect
    from countermark.verbs.quickstart import quickstart
    from countermark.verbs.remove import remove
    from countermark.verbs.reproduce import reproduce
    from countermark.verbs.steal import steal
    from countermark.verbs.verify import verify

__version__ = "0.1.0"

_VERBS = ("evaluate", "fetch", "plan", "protect", "quickstart", "remove", "reproduce", "steal", "verify")
_HOMES = {
    "CountermarkError": "errors",
    "load": "bundle",
    **{f"{verb.capitalize()}Config": "config" for verb in _VERBS},
    **{verb: f"verbs.{verb}" for verb in _VERBS},
}

__all__ = [
    "CountermarkError",
    "EvaluateConfig",
    "FetchConfig",
    "PlanConfig",
    "ProtectConfig",
    "QuickstartConfig",
    "RemoveConfig",
    "ReproduceConfig",
    "StealConfig",
    "VerifyConfig",
    "evaluate",
    "fetch",
    "load",
    "plan",
    "protect",
    "quickstart",
    "remove",
    "reproduce",
    "steal",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
