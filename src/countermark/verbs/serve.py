"""`countermark serve`: the model behind its guard, over HTTP."""

import atexit
import contextlib
import importlib.util
import os
import sys
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from countermark.config import ServeConfig
from countermark.errors import CountermarkError
from countermark.networks import load_model
from countermark.report import print_lines

if TYPE_CHECKING:
    from countermark.guard import QueryLog

_LOCKED = 5.0  # seconds that a trial waits for another program that writes the log


@dataclass(frozen=True)
class Served:
    """What a service did until it was told to stop.

    Attributes:
        log: place of the query log; none without a guard.
        trials: trials that it stored.
    """

    log: str | None
    trials: int


def serve(config: ServeConfig) -> Served:
    """Serve until SIGINT or SIGTERM.

    Raises:
        CountermarkError: the model, its guard, the key, the clients or the log cannot be read, the address is taken, or
            this process may not open files enough.
    """
    missing = [name for name in ("starlette", "uvicorn", "prometheus_client", "sqlalchemy") if importlib.util.find_spec(name) is None]
    if missing:
        raise CountermarkError(f"the service needs {', '.join(missing)}; pip install 'countermark[serve]'")
    from countermark.guard import QueryLog, load_guarded, weights_sha256
    from countermark.service.clients import Clients
    from countermark.service.engine import Engine
    from countermark.service.http import Limits, application
    from countermark.service.server import connections_that_fit, listen, run

    network, description = load_model(config.model)
    clients = Clients(config.clients or config.model / "clients.json")
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))  # one core is for the requests themselves
    model = network if config.unguarded else load_guarded(config.model, config.key or config.model / "key")
    most = connections_that_fit(4 * config.max_waiting)
    listening = listen(config.host, config.port)  # first: where the address is taken, no log is made
    with contextlib.ExitStack() as ending:
        ending.callback(listening.close)
        log = None
        if not config.unguarded:
            log = QueryLog(config.log, wait=min(_LOCKED, config.timeout / 2))
            ending.callback(_close, log)
        engine = Engine(model, log, config.max_batch, config.max_waiting)
        app = application(
            engine,
            clients,
            name=config.name,
            shape=description.shape,
            model_sha256=weights_sha256(config.model),
            limits=Limits(config.max_batch, config.max_body, config.timeout),
        )
        run(app, listening, timeout=config.timeout, drain=config.drain, most=most)
    if engine.hangs:  # the interpreter's end would pull the model or the database from under it
        atexit.register(_leave)
    return Served(None if log is None else log.shown, engine.trials)


def show(result: Served) -> None:
    """Print what was stored."""
    print_lines("stopped" if result.log is None else f"stopped; {result.trials} trials were stored in {result.log}")


def _close(log: "QueryLog") -> None:
    """Close a log; a database that does not answer does not hold the end of the service."""
    closing = threading.Thread(target=log.close, daemon=True)
    closing.start()
    closing.join(1.0)


def _leave() -> None:
    """End the process at once, and leave its threads where they are."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it
            stream.flush()
    os._exit(0)
