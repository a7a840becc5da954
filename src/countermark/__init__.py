"""Countermark: image classifiers that resist evasion, carry keyed coins, and can be proven yours.

A mark is a keyed coin flip between two answers that a stranger's model would give equally happily.
A stolen copy remembers the coins; a stranger agrees with each with probability one half, so a match
has an exact p-value.

    import countermark as cm
    cm.protect("digits", out="mine")
    model = cm.load("mine")  # an nn.Module: pixels of [0, 1] to logits
    cm.verify("theirs", key="mine/key").verdict

Every verb of the command line is also a function, whose keywords are the options. Everything here
is imported when it is first used, so importing the package is quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

from countermark.version import __version__ as __version__

if TYPE_CHECKING:
    from countermark.data import Examples as Examples
    from countermark.data import open_data as open_data
    from countermark.data.images import DamagedError as DamagedError
    from countermark.errors import CountermarkError as CountermarkError
    from countermark.marking import Marking as Marking
    from countermark.networks import load as load
    from countermark.networks import open_network as open_network
    from countermark.service.client import Client as Client
    from countermark.service.engine import BusyError as BusyError
    from countermark.service.guarded import Guarded as Guarded
    from countermark.threat import Threat as Threat
    from countermark.verbs.adjudicate import adjudicate as adjudicate
    from countermark.verbs.bom import bom as bom
    from countermark.verbs.bundle_check import bundle_check as bundle_check
    from countermark.verbs.bundle_sign import bundle_sign as bundle_sign
    from countermark.verbs.card import card as card
    from countermark.verbs.claim import claim as claim
    from countermark.verbs.client_add import client_add as client_add
    from countermark.verbs.client_list import client_list as client_list
    from countermark.verbs.client_revoke import client_revoke as client_revoke
    from countermark.verbs.client_rotate import client_rotate as client_rotate
    from countermark.verbs.data_check import data_check as data_check
    from countermark.verbs.data_fetch import data_fetch as data_fetch
    from countermark.verbs.evaluate import evaluate as evaluate
    from countermark.verbs.export import export as export
    from countermark.verbs.guard import calibrate as calibrate
    from countermark.verbs.log_check import log_check as log_check
    from countermark.verbs.log_erase import log_erase as log_erase
    from countermark.verbs.log_head import log_head as log_head
    from countermark.verbs.log_renew import log_renew as log_renew
    from countermark.verbs.plan import plan as plan
    from countermark.verbs.protect import protect as protect
    from countermark.verbs.quickstart import quickstart as quickstart
    from countermark.verbs.remove import remove as remove
    from countermark.verbs.reproduce import reproduce as reproduce
    from countermark.verbs.serve import serve as serve
    from countermark.verbs.steal import steal as steal
    from countermark.verbs.trace import trace as trace
    from countermark.verbs.verify import verify as verify

_PUBLIC = {
    "BusyError": "service.engine.BusyError",
    "Client": "service.client.Client",
    "CountermarkError": "errors.CountermarkError",
    "DamagedError": "data.images.DamagedError",
    "Examples": "data.Examples",
    "Guarded": "service.guarded.Guarded",
    "Marking": "marking.Marking",
    "Threat": "threat.Threat",
    "adjudicate": "verbs.adjudicate.adjudicate",
    "bom": "verbs.bom.bom",
    "bundle_check": "verbs.bundle_check.bundle_check",
    "bundle_sign": "verbs.bundle_sign.bundle_sign",
    "calibrate": "verbs.guard.calibrate",  # `countermark.guard` is a package
    "card": "verbs.card.card",
    "claim": "verbs.claim.claim",
    "client_add": "verbs.client_add.client_add",
    "client_list": "verbs.client_list.client_list",
    "client_revoke": "verbs.client_revoke.client_revoke",
    "client_rotate": "verbs.client_rotate.client_rotate",
    "data_check": "verbs.data_check.data_check",
    "data_fetch": "verbs.data_fetch.data_fetch",
    "evaluate": "verbs.evaluate.evaluate",
    "export": "verbs.export.export",
    "load": "networks.load",
    "log_check": "verbs.log_check.log_check",
    "log_erase": "verbs.log_erase.log_erase",
    "log_renew": "verbs.log_renew.log_renew",
    "log_head": "verbs.log_head.log_head",
    "open_data": "data.open_data",
    "open_network": "networks.open_network",
    "plan": "verbs.plan.plan",
    "protect": "verbs.protect.protect",
    "quickstart": "verbs.quickstart.quickstart",
    "remove": "verbs.remove.remove",
    "reproduce": "verbs.reproduce.reproduce",
    "serve": "verbs.serve.serve",
    "steal": "verbs.steal.steal",
    "trace": "verbs.trace.trace",
    "verify": "verbs.verify.verify",
}
"""Every public name, and where it is defined."""

__all__ = list(_PUBLIC)  # type checkers read the imports above, which a test holds equal to it


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, there = _PUBLIC[name].rpartition(".")
    return getattr(importlib.import_module(f"{__name__}.{module}"), there)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
