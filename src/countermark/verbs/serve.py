"""`countermark serve`: the model behind its guard, over HTTP."""

import importlib.util
from dataclasses import dataclass

import torch

from countermark.bundle import load_bundle
from countermark.config import ServeConfig
from countermark.errors import CountermarkError
from countermark.report import print_lines


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

    network, description = load_bundle(config.model)
    clients = Clients(config.clients or config.model / "clients.json")
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))  # one core is for the requests themselves
    model = network if config.unguarded else load_guarded(config.model, config.key or config.model / "key")
    most = connections_that_fit(4 * config.max_waiting)
    listening = listen(config.host, config.port)  # first: where the address is taken, no log is made
    log = None if config.unguarded else QueryLog(config.log)
    engine = Engine(model, log, config.max_batch, config.max_waiting)
    app = application(
        engine,
        clients,
        name=config.name,
        shape=description.shape,
        model_sha256=weights_sha256(config.model),
        limits=Limits(config.max_batch, config.max_body, config.timeout),
    )
    try:
        run(app, listening, timeout=config.timeout, drain=config.drain, most=most)
    finally:
        listening.close()
        if log is not None:
            log.close()
    return Served(None if log is None else log.shown, engine.trials)


def show(result: Served) -> None:
    """Print what was stored."""
    print_lines("stopped" if result.log is None else f"stopped; {result.trials} trials were stored in {result.log}")
