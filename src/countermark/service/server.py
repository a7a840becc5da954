"""Running the application on a socket: time-outs for slow clients, an orderly end."""

import asyncio
import contextlib
import socket
import sys
from collections.abc import Iterator
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from countermark.errors import CountermarkError


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        CountermarkError: the address is taken or is not this machine's.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(1024)
    except OSError as error:
        raise CountermarkError(f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port or --host") from error
    return listening


def run(application: Starlette, listening: socket.socket, *, timeout: float, drain: float, most: int) -> None:
    """Serve until SIGINT or SIGTERM; open requests are finished first.

    Args:
        application: what to serve.
        listening: a socket from `listen`.
        timeout: seconds that the service waits for a client between requests: for a head, the rest of a body, the reading of answers.
        drain: seconds that open requests have to finish at the end.
        most: connections at a time.
    """

    class Impatient(_Impatient):
        patience = timeout

    config = uvicorn.Config(
        application,
        http=Impatient,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=most,
        timeout_graceful_shutdown=int(max(1, drain)),
    )
    host, port = listening.getsockname()[:2]
    print(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}", file=sys.stderr, flush=True)
    _Server(config).run(sockets=[listening])


class _Impatient(H11Protocol):
    """Closes a connection whose client lets the service wait too long.

    That is one who takes too long to send the head of a request ("slow loris"), the rest of a body whose answer it has, or nothing at all,
    or to read its answers. How long a body and its answer may take is the application's business. No single byte gains time.
    """

    patience = 10.0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def handle_events(self) -> None:
        super().handle_events()
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, unless an answer has begun, or is complete before the body that turns out to be none."""
        if self.cycle is not None:
            self.cycle.disconnected = True
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop()

    def _watch(self) -> None:
        """Let the time run while the service waits for the client, and only then."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering and not self.flow.write_paused and not self.transport.is_closing():
            self._stop()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.patience, self.transport.abort)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Server(uvicorn.Server):
    """Ends quietly: a signal was its order to stop, not a failure."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            yield
            self._captured_signals.clear()
