"""`countermark serve`: the model behind its guard, over HTTP."""

import atexit
import contextlib
import importlib.util
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from countermark.errors import CountermarkError
from countermark.options import NewLogPath, OneDeviceOptions, ReadPath, verb
from countermark.places import Network
from countermark.service.messages import LogFormat, tell, written_as
from countermark.terminal import print_lines, unbroken
from countermark.text import brief


@dataclass(frozen=True, kw_only=True)
class ServeConfig(OneDeviceOptions):
    """Serve a model over HTTP, with coins in its answers.

    It speaks Open Inference Protocol v2, and keeps a log of the coins.
    """

    model: ReadPath = field(kw_only=False)
    """Model folder with a guard.json."""
    log: NewLogPath | None = None
    """Query log, which a guard needs: a path (SQLite) or
    postgresql://USER:PASSWORD@HOST/DATABASE."""
    clients: ReadPath | None = None
    """File of the clients who may ask, as countermark client add makes it; default
    MODEL/clients.json."""
    head: ReadPath | None = None
    """A head of the log that was published before (countermark log head); a log that does not lead
    to it was restored from a backup, and is refused."""
    network: Network | None = None
    """module:function that builds the network, unless it is a built-in one; or the ONNX file that
    countermark export --features wrote, which onnxruntime then runs."""
    key: ReadPath | None = None
    """Key folder, for its secret; default MODEL/key."""
    name: str = "model"
    """Name of the model in the service's addresses."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8080
    """Port to listen on; 0 takes a free one."""
    unguarded: bool = False
    """Serve the model as it is: no coins, no log."""
    max_batch: int = 64
    """Most images of one request, and of one pass of the model."""
    max_body: int | None = None
    """Most bytes of a request's body; default 4 MiB, or what one image takes as JSON or --max-batch
    of them as UINT8 where that is more."""
    max_waiting: int = 256
    """Most requests that may wait; more are refused with 503."""
    timeout: float = 10.0
    """Seconds that a client may take to send a request, and that an answer may take."""
    drain: float = 10.0
    """Seconds that open requests have to finish when the service is told to stop."""
    access_log: bool = False
    """One line on standard error for each request of a client: name, status, images, duration."""
    log_format: LogFormat = "text"
    """What standard error gets: text, or json with one object a line."""

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        super().__post_init__()
        self._only_for(not self.unguarded, "a guard", "log", "head", "key")
        if self.log is None and not self.unguarded:
            raise CountermarkError(
                "--log is missing: say where the queries that meet coins are kept, or --unguarded"
            )
        self._at_least_one("max_batch", most=4096)
        self._at_least_one("max_body", most=1 << 30)
        self._at_least_one("max_waiting")
        self._whole("port", 0, 65535)
        self._positive("number of seconds", "timeout", "drain")
        if not self.name.isidentifier():
            raise CountermarkError(
                f"--name is letters, digits and underscores, not {brief(self.name)}"
            )


@dataclass(frozen=True)
class Served:
    """What a service did until it was told to stop.

    Attributes:
        log: place of the query log; none without a guard.
        trials: trials that it stored.
    """

    log: str | None
    trials: int


@verb(ServeConfig)
def serve(config: ServeConfig) -> Served:
    """Serve until SIGINT or SIGTERM.

    Raises:
        CountermarkError: the model, its guard, the key, the clients or the log cannot be read, the
            address is taken, or this process may not open enough files.

    Example:
        >>> added = cm.client_add("anna", clients="clients.json")
        >>> cm.serve("mine", log="log.db", clients="clients.json", port=8080)  # until Ctrl-C
        Served(log='sqlite:///log.db', trials=0)
    """
    import torch

    from countermark.networks import describe, load_answering

    missing = [
        name
        for name in ("starlette", "uvicorn", "prometheus_client", "sqlalchemy")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        raise CountermarkError(
            f"the service needs {', '.join(missing)}; pip install 'countermark[serve]'"
        )
    from countermark.guard import load_guarded, read_head, weights_sha256
    from countermark.service.clients import Clients
    from countermark.service.engine import Engine
    from countermark.service.guarded import close_log, open_log
    from countermark.service.http import Limits, application, body_limit
    from countermark.service.server import connections_that_fit, listen, run
    from countermark.service.signing import Signing

    folder = Path(config.model)
    key = Path(config.key) if config.key else folder / "key"
    described = describe(folder)
    clients = Clients(Path(config.clients) if config.clients else folder / "clients.json")
    torch.set_num_threads(
        max(1, torch.get_num_threads() - 1)
    )  # one core is for the requests themselves
    model = (
        load_answering(folder, config.network, config.device)[0]
        if config.unguarded
        else load_guarded(folder, key, config.network, config.device)
    )
    body = config.max_body or body_limit(described.shape, config.max_batch)
    with contextlib.ExitStack() as ending:
        ending.enter_context(written_as(config.log_format))
        most = connections_that_fit(4 * config.max_waiting)
        # First: where the address is taken, no log is made.
        listening = listen(config.host, config.port)
        ending.callback(listening.close)
        log = None
        if config.log is not None:
            published = None if config.head is None else read_head(Path(config.head))
            log = open_log(config.log, config.timeout, published)
            ending.callback(close_log, log)
        engine = Engine(model, log, config.max_batch, config.max_waiting)
        ending.callback(engine.stop)
        guarded = engine.guarded
        signing = None if guarded is None or log is None else Signing(guarded, log, folder, key)
        app = application(
            engine,
            clients,
            name=config.name,
            shape=described.shape,
            class_names=described.class_names,
            model_sha256=weights_sha256(folder),
            limits=Limits(config.max_batch, body, config.timeout),
            signing=signing,
            access_log=config.access_log,
        )
        tell(
            "start",
            f"the model is called {config.name}: its address ends in /v2/models/{config.name}",
        )
        run(app, listening, timeout=config.timeout, drain=config.drain, most=most)
    if engine.hangs:  # the interpreter's end would pull the model or the database from under it
        atexit.register(_leave)
    return Served(None if log is None else log.shown, engine.trials)


def show(result: Served) -> None:
    """Print what was stored."""
    print_lines(
        "stopped"
        if result.log is None
        else f"stopped; {result.trials} trials were stored in {unbroken(result.log)}"
    )


def _leave() -> None:
    """End the process at once, and leave its threads where they are."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it
            stream.flush()
    os._exit(0)
