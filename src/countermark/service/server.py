"""Run the application on a socket: strict HTTP, a bound on connections, an orderly end.

A stranger without a key can do little harm here: a connection that waits for its client is closed
in time, or sooner when others need its place, and standard error gets a bounded number of lines.
"""

import asyncio
import contextlib
import logging
import math
import os
import re
import resource
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from countermark.errors import CountermarkError
from countermark.service.messages import tell
from countermark.text import sentence

_QUEUE = 1024  # connections that the system keeps until they are accepted
_BURST = 8  # connections that are accepted at once, before any of them is looked at
_RESERVE = 128  # descriptors for the log, for files, and for connections on their way in and out
_QUIET = 60.0  # seconds until one place in the code may complain again
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\n"
    b"Content-Length: 0\r\nConnection: close\r\n\r\n"
)
_FRAMING = re.compile(rb"\n(?:content-length|transfer-encoding):([^\r]*)", re.IGNORECASE)
_UNSAFE = re.compile(rb"(?<!\r)\n|\r(?!\n)|\n[ \t]|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
"""In a head: half an end of line, a folded line, or a control character."""


def listen(host: str, port: int) -> socket.socket:
    """Open a socket that listens.

    Raises:
        CountermarkError: the address is taken or does not belong to this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off (TCP_NODELAY) only where the socket names its protocol.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(_QUEUE)
    except (OSError, UnicodeError) as error:
        listening.close()
        reason = getattr(error, "strerror", None) or error
        raise CountermarkError(
            f"cannot listen on {host}:{port}: {reason}; choose another --port or --host"
        ) from error
    return listening


def connections_that_fit(wanted: int) -> int:
    """Return how many connections this process can hold, at most as many as wanted.

    It depends on how many files the process may open. That limit is raised first, as far as the
    system allows.

    Raises:
        CountermarkError: not even one connection fits.
    """
    now, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + _RESERVE
    if now != resource.RLIM_INFINITY and now < needed:
        raised = needed if highest == resource.RLIM_INFINITY else min(needed, highest)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, highest))
            now = raised
    fit = wanted if now == resource.RLIM_INFINITY else min(wanted, now - _RESERVE)
    if fit < 1:
        needs = f"the service needs more than {_RESERVE}"
        raise CountermarkError(
            f"this process may open {now} files and {needs}; raise the limit (ulimit -n)"
        )
    if fit < wanted:
        said = (
            f"at most {fit} connections at a time, not {wanted}; for more, raise the limit of open "
            "files (ulimit -n)"
        )
        tell("complaint", said)
    return fit


def run(
    application: Starlette, listening: socket.socket, *, timeout: float, drain: float, most: int
) -> None:
    """Serve until SIGINT or SIGTERM; open requests are finished first.

    Args:
        application: the application to serve.
        listening: a socket from `listen`.
        timeout: seconds that the service waits for a client at a time: for a head, for the rest of
            a body, for the reading of answers.
        drain: seconds that open requests have to finish at the end.
        most: connections at a time, no more than `connections_that_fit` returns.
    """

    class Impatient(_Impatient):
        patience, limit = timeout, most
        waiting: dict[_Impatient, None] = {}  # noqa: RUF012 (shared by this service's connections)

    config = uvicorn.Config(
        application,
        http=Impatient,
        loop="asyncio",  # also where somebody has installed uvloop, with which nothing was tested
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_BURST,
        timeout_graceful_shutdown=math.ceil(drain),
    )
    with _complaints(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # about the images that clients send
        _Server(config).run(sockets=[listening])


class _Strict(h11.Connection):
    """HTTP/1.1 as h11 reads it, without what a proxy in front may read differently.

    If the two disagree about the end of a request, a client can hide a second request in it.
    """

    def next_event(self) -> Any:
        if self.their_state is not h11.IDLE:
            return super().next_event()
        before = self.trailing_data[0]
        event = super().next_event()
        if not isinstance(event, h11.Request):
            return event
        head = before[: len(before) - len(self.trailing_data[0])]
        framing = _FRAMING.findall(head)
        chunked = any(name == b"transfer-encoding" for name, _ in event.headers)
        if _UNSAFE.search(head) or len(framing) > 1 or b"," in b"".join(framing):
            raise h11.RemoteProtocolError("lines or lengths that can be read in two ways")
        if event.http_version not in (b"1.0", b"1.1") or (chunked and event.http_version == b"1.0"):
            raise h11.RemoteProtocolError("another version of HTTP")
        if not event.target.startswith(b"/"):
            raise h11.RemoteProtocolError("a target that is no path")
        if not chunked:
            return event
        # h11 is lenient about the end of chunks, so that nothing is read behind them.
        headers = [*event.headers, (b"connection", b"close")]
        return h11.Request(
            method=event.method, headers=headers, target=event.target, http_version=b"1.1"
        )


class _Impatient(H11Protocol):
    """Closes a connection whose client keeps the service waiting too long.

    Such a client takes too long to send the head of a request ("slow loris"), to send the rest of a
    body whose answer they already have, to send anything at all, or to read their answers. How long
    a body and its answer may take is up to the application. Sending single bytes gains no time. If
    there are too many connections, the one that has kept the service waiting longest makes room.
    """

    patience: float
    limit: int
    waiting: "dict[_Impatient, None]"
    """Connections that wait for their clients, the longest first."""
    _timer: asyncio.TimerHandle | None = None

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.conn = _Strict(h11.SERVER)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()
        if len(self.connections) > self.limit:
            longest = next(iter(self.waiting))
            if longest is self:  # all others have a request that is being answered
                transport.write(_FULL)
            longest._stop()
            longest.transport.abort()

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
        """Answer what is not HTTP, unless an answer has begun or is already complete.

        An answer can be complete before its request's body turns out not to be HTTP.
        """
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
        """Run the timer while the service waits for the client, and only then."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering and not self.flow.write_paused and not self.transport.is_closing():
            self._stop()
        elif self._timer is None and self in self.connections:
            self._timer = self.loop.call_later(self.patience, self.transport.abort)
            self.waiting[self] = None

    def _stop(self) -> None:
        self.waiting.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Server(uvicorn.Server):
    """Announces where it listens, and its end; ending it with a signal is not a failure."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listening in sockets or []:
            listening.listen(_QUEUE)  # uvicorn has set it to what is accepted at once
            host, port = listening.getsockname()[:2]
            place = f"[{host}]" if ":" in host else host
            tell("start", f"listening on http://{place}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        tell("stop", "stopping: open requests are finished first")
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            yield
            self._captured_signals.clear()


@contextlib.contextmanager
def _complaints() -> Iterator[None]:
    """Print exceptions that uvicorn and asyncio report on standard error.

    Each place in the code may print one line a minute. Everything else that they report concerns
    clients' mistakes, which anybody can make as often as they like.
    """
    handler = _Complaints(logging.ERROR)
    loggers = [logging.getLogger(name) for name in ("uvicorn.error", "asyncio")]
    before = [logger.propagate for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, propagate in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.propagate = propagate


class _Complaints(logging.Handler):
    """Prints an exception as one line; with COUNTERMARK_TRACEBACK set, its traceback as well."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self._next: dict[tuple[str, int], float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        place, now = (record.pathname, record.lineno), time.monotonic()
        if (
            error is None
            or isinstance(error, asyncio.CancelledError)
            or now < self._next.get(place, now)
        ):
            return
        self._next[place] = now + _QUIET
        reason = f"{type(error).__name__}: {error}; set COUNTERMARK_TRACEBACK=1 to see where"
        tell("complaint", f"{sentence(record.getMessage())}: {reason}"[:600])
        if os.environ.get("COUNTERMARK_TRACEBACK"):
            with contextlib.suppress(OSError, ValueError):  # nobody reads standard error
                traceback.print_exception(error, file=sys.stderr)
