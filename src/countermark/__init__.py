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
    from countermark.config import (
        AdjudicateConfig,
        BundleCheckConfig,
        BundleSignConfig,
        ClaimConfig,
        ClientAddConfig,
        EvaluateConfig,
        FetchConfig,
        GuardConfig,
        LogCheckConfig,
        LogEraseConfig,
        LogHeadConfig,
        PlanConfig,
        ProtectConfig,
        QuickstartConfig,
        RemoveConfig,
        ReproduceConfig,
        ServeConfig,
        StealConfig,
        TraceConfig,
        VerifyConfig,
    )
    from countermark.errors import CountermarkError
    from countermark.networks import load
    from countermark.verbs.adjudicate import adjudicate
    from countermark.verbs.bundle_check import bundle_check
    from countermark.verbs.bundle_sign import bundle_sign
    from countermark.verbs.claim import claim
    from countermark.verbs.client_add import client_add
    from countermark.verbs.evaluate import evaluate
    from countermark.verbs.fetch import fetch
    from countermark.verbs.guard import guard as calibrate
    from countermark.verbs.log_check import log_check
    from countermark.verbs.log_erase import log_erase
    from countermark.verbs.log_head import log_head
    from countermark.verbs.plan import plan
    from countermark.verbs.protect import protect
    from countermark.verbs.quickstart import quickstart
    from countermark.verbs.remove import remove
    from countermark.verbs.reproduce import reproduce
    from countermark.verbs.serve import serve
    from countermark.verbs.steal import steal
    from countermark.verbs.trace import trace
    from countermark.verbs.verify import verify

__version__ = "0.1.0"

_VERBS: tuple[str, ...] = (
    "adjudicate",
    "bundle_check",
    "bundle_sign",
    "claim",
    "client_add",
    "evaluate",
    "fetch",
    "guard",
    "log_check",
    "log_erase",
    "log_head",
    "plan",
    "protect",
)
_VERBS += ("quickstart", "remove", "reproduce", "serve", "steal", "trace", "verify")
_HOMES = {
    "CountermarkError": ("errors", "CountermarkError"),
    "load": ("networks", "load"),
    **{name: ("config", name) for name in (f"{verb.title().replace('_', '')}Config" for verb in _VERBS)},
    **{verb: (f"verbs.{verb}", verb) for verb in _VERBS if verb != "guard"},
    "calibrate": ("verbs.guard", "guard"),  # `countermark.guard` is the room
}

__all__ = [
    "AdjudicateConfig",
    "BundleCheckConfig",
    "BundleSignConfig",
    "ClaimConfig",
    "ClientAddConfig",
    "CountermarkError",
    "EvaluateConfig",
    "FetchConfig",
    "GuardConfig",
    "LogCheckConfig",
    "LogEraseConfig",
    "LogHeadConfig",
    "PlanConfig",
    "ProtectConfig",
    "QuickstartConfig",
    "RemoveConfig",
    "ReproduceConfig",
    "ServeConfig",
    "StealConfig",
    "TraceConfig",
    "VerifyConfig",
    "adjudicate",
    "bundle_check",
    "bundle_sign",
    "calibrate",
    "claim",
    "client_add",
    "evaluate",
    "fetch",
    "load",
    "log_check",
    "log_erase",
    "log_head",
    "plan",
    "protect",
    "quickstart",
    "remove",
    "reproduce",
    "serve",
    "steal",
    "trace",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home, there = _HOMES[name]
    return getattr(importlib.import_module(f"{__name__}.{home}"), there)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
