"""The path of a query through the service: model, query log, answer.

Queries run through the model in micro-batches; their trials go into the log, and only then does the
answer leave. There are two threads, one after the other: one computes, one writes. Each takes
everything that is waiting, so under load one pass of the model and one commit of the log serve many
requests. Only the writer needs the database: while it is unavailable, queries without a coin are
answered and trials are refused at once; only the writer tries again.

The threads belong to no event loop: queries may come from several loops, from threads without one,
and from loops that begin when others have ended.
"""

import asyncio
import contextlib
import os
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from countermark.errors import CountermarkError
from countermark.evaluation import predict
from countermark.guard import GuardedModel, QueryLog, Row, RowError
from countermark.guard.requests import ConflictError, Request, SignedRequest
from countermark.service.messages import tell

_DAY = 86_400
_REMEMBERED = 1000  # clients whose cells are kept in memory
# Of these cells, at most, over all clients: some hundred bytes each. A model of a thousand classes
# has so many cells that hardly any is met twice.
_MOST_CELLS = 1 << 18
_AGAIN = 1.0  # seconds until a log or a model that failed is tried again
_HANGS = 2.0  # seconds after which a write counts as hanging
_STUCK = 10.0  # seconds after which a pass of the model counts as hanging
_SILENT = "the query log does not answer"
_CLOSED = "the service was closed before the query was answered"
_QUIET = 60.0  # seconds until failures of queries are reported again
_WATCH = 10.0  # seconds between looks at a log that others may have put back
_END = 1.0  # seconds that the threads have to finish when nobody waits for them any more


class BusyError(CountermarkError):
    """Too many queries wait already, the answer took too long, or the service is closed.

    Example:
        >>> guard = cm.Guarded("mine", log="log.db")
        >>> guard.close()
        >>> try:
        ...     guard.classify_now(b"an image", "anna")
        ... except cm.BusyError as error:
        ...     print(error)
        the service is closed and answers no more
    """


@dataclass(eq=False)
class _Query:
    images: torch.Tensor
    client: str
    signed: SignedRequest | None
    loop: asyncio.AbstractEventLoop | None
    """The event loop in which somebody waits; `None` for a thread."""
    done: asyncio.Future[list[int]] | Future[list[int]]
    labels: list[int] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    request: Request | None = None
    """What the log gets of a request that was signed."""
    error: CountermarkError | None = None
    """Why it is not answered."""
    left: bool = False
    """Whether nobody waits for it any more."""


class _Queue:
    """Queries that wait for a thread and may leave before their turn."""

    def __init__(self, lock: threading.RLock) -> None:
        self._queries: deque[_Query] = deque()
        self._some = threading.Condition(lock)
        self._ended = False

    def __len__(self) -> int:
        return len(self._queries)

    def put(self, queries: Sequence[_Query]) -> None:
        with self._some:
            self._queries += queries
            self._some.notify()

    def leave(self, query: _Query) -> bool:
        """Take a query out and tell whether it was here."""
        with self._some:
            if query not in self._queries:
                return False
            self._queries.remove(query)
            return True

    def take_all(self) -> list[_Query]:
        """Take everything that is waiting, without waiting for more."""
        with self._some:
            queries = list(self._queries)
            self._queries.clear()
            return queries

    def take(self, most: int, patience: float | None) -> list[_Query] | None:
        """Take everything that is waiting, up to `most` images, but at least one query.

        Returns:
            Nothing if none comes within `patience` seconds, and `None` after the end.
        """
        with self._some:
            self._some.wait_for(lambda: self._queries or self._ended, patience)
            if not self._queries:
                return None if self._ended else []
            queries = [self._queries.popleft()]
            size = len(queries[0].images)
            while self._queries and (size := size + len(self._queries[0].images)) <= most:
                queries.append(self._queries.popleft())
            return queries

    def end(self) -> None:
        with self._some:
            self._ended = True
            self._some.notify_all()


class Engine:
    """Answers requests; its threads start with the first one.

    Attributes:
        trials: number of trials that were stored.
        failed: why the log takes no trials now; `None` if it takes them.
        hangs: whether a thread was left behind at the end because the database or the model did not
            return.
    """

    def __init__(
        self,
        model: nn.Module | GuardedModel,
        log: QueryLog | None,
        max_batch: int,
        max_waiting: int,
    ) -> None:
        """Serve a guarded model with its log, or a bare network without one."""
        if isinstance(model, GuardedModel) != (log is not None):
            raise CountermarkError(
                "a guarded model needs a query log, a bare network has no use for one"
            )
        self._identity = b"" if log is None else log.identity
        self._model = model.under(self._identity) if isinstance(model, GuardedModel) else model
        self._log = log
        self._max_batch, self._max_waiting = max_batch, max_waiting
        self._lock = threading.RLock()  # for whatever more than one thread changes
        self._computing, self._writing = _Queue(self._lock), _Queue(self._lock)
        self._open: set[_Query] = set()
        self._reading = 0
        self._none_open = threading.Condition(self._lock)
        # Cells that the log has for certain; it may have more.
        self._seen: OrderedDict[str, set[bytes]] = OrderedDict()
        self._unwritten: list[_Query] = []
        self._write_began: float | None = None
        self._threads: list[threading.Thread] = []
        self._process = 0  # whose threads they are
        self._ended = False
        self._quiet_until = 0.0
        self.trials = 0
        self._blank: torch.Tensor | None = None  # what a model that failed is tried with
        self.failed: str | None = None
        self._broken = False
        self._pass_began: float | None = None
        self.hangs = False

    @property
    def guarded(self) -> GuardedModel | None:
        """The guarded model, under the log's identity; `None` for a bare network."""
        return self._model if isinstance(self._model, GuardedModel) else None

    @property
    def waiting(self) -> int:
        """Number of queries that wait for an answer.

        Those whose images are read are counted, and those that a thread still processes although
        nobody waits for them any more.
        """
        return len(self._open) + self._reading

    @property
    def works(self) -> bool:
        """Whether the model answers: its last pass did not fail, and none takes very long."""
        began = self._pass_began
        return not self._broken and (began is None or time.monotonic() < began + _STUCK)

    @property
    def forked(self) -> bool:
        """Whether this process is a fork of the one that has the threads."""
        return self._process not in (0, os.getpid())

    def ready(self) -> bool:
        """Tell whether queries can be answered, as far as is known without asking one."""
        return self.works and self.stores()

    def stores(self) -> bool:
        """Tell whether trials can be stored, as far as is known without storing one."""
        try:
            if self._log is not None:
                self._log.check()
        except CountermarkError:
            return False
        return self.failed is None and not self._ended and not self.forked

    def stop(self) -> None:
        """Take no more queries, finish those that wait, then stop.

        Whatever is not finished within a second is refused and left behind.
        """
        if self.forked:
            return
        with self._lock:
            self._ended = True
            self._none_open.wait_for(lambda: not self._open, _END)
            for query in self._open:
                query.left = True
            self._refuse(list(self._open), _CLOSED, BusyError)
        for waiting in (self._computing, self._writing):
            waiting.take_all()
            waiting.end()
        for thread in self._threads:
            thread.join(0.1)
        self.hangs = any(thread.is_alive() for thread in self._threads)

    def complain(self, reason: str) -> None:
        """Report why a query failed; not every time, since clients can cause many failures."""
        if time.monotonic() >= self._quiet_until:
            self._quiet_until = time.monotonic() + _QUIET
            tell("complaint", reason)

    async def answer(
        self,
        images: torch.Tensor,
        client: str,
        signed: SignedRequest | None = None,
    ) -> list[int]:
        """Return the labels of one client's images `(n, c, h, w)`, uint8.

        They are returned once every new trial among the images is durable, and the request, if it
        was signed.

        Raises:
            ConflictError: a signed request does not go on from those that the log has.
            BusyError: too many requests are waiting, or the engine was stopped.
            CountermarkError: the model or the log failed.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[list[int]] = loop.create_future()
        query = self._put(_Query(images, client, signed, loop, done))
        try:
            return await done
        except asyncio.CancelledError:
            self._leave(query)
            raise

    def answer_now(self, images: torch.Tensor, client: str, timeout: float) -> list[int]:
        """Do the same in a thread without an event loop.

        Raises:
            TimeoutError: there was no answer within `timeout` seconds.
            BusyError: as for `answer`.
            CountermarkError: as for `answer`.
        """
        done: Future[list[int]] = Future()
        query = self._put(_Query(images, client, None, None, done))
        try:
            return done.result(timeout)
        except BaseException:
            self._leave(query)
            raise

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Count a query among those that wait while its images are read, before it is answered.

        Raises:
            BusyError: as for `answer`.
        """
        with self._admission():
            self._reading += 1
        try:
            yield
        finally:
            with self._lock:
                self._reading -= 1

    @contextlib.contextmanager
    def _admission(self) -> Iterator[None]:
        """Let a query in, or refuse it."""
        if self.forked:  # before the lock, which another thread may have held at the fork
            reason = (
                "this process was forked from one that has answered queries; make the guard after "
                "the fork"
            )
            self.complain(reason)
            raise CountermarkError(reason)
        with self._lock:
            if self._ended:
                raise BusyError("the service is closed and answers no more")
            if self.waiting >= self._max_waiting:
                raise BusyError("the service is busy; try again later")
            yield

    def _put(self, query: _Query) -> _Query:
        with self._admission():
            if not self._threads:
                work = (self._compute, self._write) if self._log is not None else (self._compute,)
                self._threads = [
                    threading.Thread(target=each, name=each.__name__, daemon=True) for each in work
                ]
                self._process = os.getpid()
                for thread in self._threads:
                    thread.start()
            self._open.add(query)
            self._computing.put([query])
        return query

    def _leave(self, query: _Query) -> None:
        """Remember that nobody waits for a query any more."""
        with self._lock:
            query.left = True
            if self._computing.leave(query) or self._writing.leave(query):
                self._settle([query])

    def _compute(self) -> None:
        while True:
            queries = self._computing.take(self._max_batch, self._patience())
            if queries is None:
                return
            if self._until_it_hangs() == 0:
                self._log_fails(_SILENT)
            if not queries and not self._broken:
                continue
            reason = self._run(partial(self._pass, queries)) if queries else None
            if reason is not None:
                self.complain(reason)
                self._refuse(queries, reason)
            if reason is not None or not queries:  # is it the queries, or the model?
                self._model_is(self._run(self._try))
            else:
                self._model_is(None)
            if reason is not None:
                continue
            with self._lock:
                written = [
                    query
                    for query in queries
                    if (query.rows or query.request is not None) and not query.left
                ]
                if self.failed:
                    self._refuse(written, self.failed)
                elif written:
                    self._write_began = self._write_began or time.monotonic()
                    self._writing.put(written)
            self._settle([query for query in queries if query not in written])

    def _patience(self) -> float | None:
        """Return how many seconds may pass without queries until there is something to do."""
        hangs = self._until_it_hangs()
        if not self._broken:
            return hangs
        return _AGAIN if hangs is None else min(_AGAIN, hangs)

    def _until_it_hangs(self) -> float | None:
        """Return in how many seconds a write under way counts as hanging; `None` without one."""
        with self._lock:
            if self._write_began is None or self.failed:
                return None
            return max(0.0, self._write_began + _HANGS - time.monotonic())

    def _write(self) -> None:
        while True:
            shared = self._log is not None and self._log.shared
            idle = _WATCH if shared else None
            queries = self._writing.take(
                sys.maxsize, _AGAIN if self._unwritten or self.failed else idle
            )
            if queries is None:
                return
            try:
                self._store(queries)
            except Exception as error:
                self._write_ends(_reason(error))
                self._refuse(queries, _reason(error))
                continue
            self._write_ends(None)
            for query in queries:
                if query.error is not None:
                    if not isinstance(query.error, ConflictError):
                        self.complain(str(query.error))
                    continue
                self._seen.setdefault(query.client, set()).update(row.cell for row in query.rows)
                while len(self._seen) > _REMEMBERED or self._remembered() > _MOST_CELLS:
                    self._seen.popitem(last=False)
            self._settle(queries)

    def _remembered(self) -> int:
        return sum(map(len, self._seen.values()))

    def _write_ends(self, reason: str | None) -> None:
        """Note that the log failed for a reason, or that it takes trials."""
        with self._lock:
            self._write_began = time.monotonic() if self._writing else None
            if reason is not None:
                self._log_fails(reason)
            elif self.failed:
                tell("complaint", "the query log takes trials again")
                self.failed = None

    def _log_fails(self, reason: str) -> None:
        """Refuse trials until a write succeeds, and report why.

        The reason is reported once, and once more if the log was so far only known to be silent.
        """
        with self._lock:
            if self.failed is None or (self.failed == _SILENT and reason != _SILENT):
                tell("complaint", reason)
                self.failed = reason
            self._refuse(self._writing.take_all(), reason)

    def _run(self, function: Callable[[], None]) -> str | None:
        """Run the model; why it failed, if it did."""
        self._pass_began = time.monotonic()
        try:
            function()
        except Exception as error:
            return _reason(error)
        finally:
            self._pass_began = None
        return None

    def _model_is(self, broken: str | None) -> None:
        """Note why the model fails, or that it works."""
        if broken is not None:
            self.complain(broken)
        elif self._broken:
            tell("complaint", "the model answers again")
        self._broken = broken is not None

    def _refuse(
        self,
        queries: Sequence[_Query],
        reason: str,
        kind: type[CountermarkError] = CountermarkError,
    ) -> None:
        for query in queries:
            query.error = kind(reason)
        self._settle(queries)

    def _settle(self, queries: Sequence[_Query]) -> None:
        """Tell those who wait what came of their queries; each event loop is woken once."""
        asked: dict[asyncio.AbstractEventLoop | None, list[_Query]] = {}
        with self._lock:
            for query in queries:
                if query in self._open:
                    asked.setdefault(query.loop, []).append(query)
            self._open.difference_update(queries)
            self._none_open.notify_all()
        for loop, those in asked.items():
            if loop is None:
                _give(those)
                continue
            with contextlib.suppress(RuntimeError):  # it was closed, so nobody waits there
                loop.call_soon_threadsafe(_give, those)

    def _try(self) -> None:
        """Run a model that failed on a blank image, whose answer nobody gets."""
        assert self._blank is not None
        if isinstance(self._model, GuardedModel):
            self._model(self._blank, "nobody")
        else:
            predict(self._model, self._blank)

    def _pass(self, queries: list[_Query]) -> None:
        self._blank = torch.zeros_like(queries[0].images[:1])
        day = int(time.time() // _DAY)
        images = torch.cat([query.images for query in queries])
        if not isinstance(self._model, GuardedModel):
            labels = predict(self._model, images)
        else:
            owners = [(query, row) for query in queries for row in range(len(query.images))]
            found = self._model(
                images,
                [query.client for query, _ in owners],
                [b"" if query.signed is None else query.signed.opening for query, _ in owners],
            )
            labels = found.labels
            model = self._model.guard.settings.model_sha256
            for trial in found.trials:
                query, row = owners[trial.row]
                if trial.cell in self._seen.get(query.client, ()):
                    continue
                request = b"" if query.signed is None else query.signed.packed(row)
                image = query.images[row].contiguous().numpy().tobytes()
                numbers = (trial.heads, trial.tails, trial.chance, trial.answer, day)
                query.rows.append(
                    Row(model, query.client, trial.cell, image, *numbers, request, self._identity)
                )
        parts = torch.split(labels, [len(query.images) for query in queries])
        for query, part in zip(queries, parts, strict=True):
            query.labels = part.tolist()
            if query.signed is not None:
                asked = query.images.contiguous().numpy().tobytes()
                answered = tuple(query.labels)
                query.request = Request(query.client, query.signed, asked, answered, day)

    def _store(self, queries: list[_Query]) -> None:
        """Store trials and signed requests; the log leaves out those that it already has.

        If there are none, a query that failed before is tried again, or the log is looked at. A row
        that no log can store is the fault of its query alone.
        """
        assert self._log is not None
        queries = queries or self._unwritten
        if not queries:
            self._log.watch(self._identity)
            return
        self._unwritten = queries[:1]
        rows = [row for query in queries for row in query.rows]
        signing = [query for query in queries if query.request is not None]
        try:
            fresh, refused = self._log.store(
                rows, [query.request for query in signing if query.request is not None]
            )
        except RowError as error:
            for query in queries if len(queries) > 1 else ():
                self._store([query])
            if len(queries) == 1:
                queries[0].error = error
        else:
            self.trials += sum(fresh)
            for query, reason in zip(signing, refused, strict=True):
                if reason is not None:
                    query.error = ConflictError(reason)
        self._unwritten = []


def _give(queries: Sequence[_Query]) -> None:
    for query in queries:
        if query.done.done():  # nobody waits for it any more
            continue
        if query.error is None:
            query.done.set_result(query.labels)
        else:
            query.done.set_exception(query.error)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, CountermarkError) else repr(error)
