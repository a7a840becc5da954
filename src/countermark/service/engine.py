"""The path of a query through the service: model, query log, answer.

Queries run through the model in micro-batches; their trials go into the log, and only then does the
answer leave. There are two threads, one after the other: one computes, one writes. Each takes
everything that is waiting, so under load one pass of the model and one commit of the log serve many
requests. Only the writer needs the database: while it is unavailable, queries without a coin are
answered and trials are refused at once; only the writer tries again.
"""

import asyncio
import contextlib
import queue
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from countermark.errors import CountermarkError
from countermark.evaluation import predict
from countermark.guard import GuardedModel, QueryLog, Row, RowError
from countermark.guard.requests import pack_request
from countermark.text import complain

_DAY = 86_400
_REMEMBERED = 1000  # clients whose cells are kept in memory
# Of these cells, at most, over all clients: some hundred bytes each. A model of a thousand classes
# has so many cells that hardly any is met twice.
_MOST_CELLS = 1 << 18
_AGAIN = 1.0  # seconds until a log that could not be written is tried again
_HANGS = 2.0  # seconds after which a write counts as hanging
_SILENT = "the query log does not answer"
_QUIET = 60.0  # seconds until failures of queries are reported again
_END = 1.0  # seconds that the threads have to finish when nobody waits for them any more


class BusyError(CountermarkError):
    """Too many requests wait already."""


@dataclass(eq=False)
class _Query:
    images: torch.Tensor
    client: str
    signature: bytes
    hashes: Sequence[bytes]
    done: asyncio.Future[list[int]]
    labels: list[int] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    flaw: CountermarkError | None = None
    """Why no log can store one of its rows."""


class _Queue:
    """Queries that wait for a thread and may leave before their turn."""

    def __init__(self) -> None:
        self._queries: deque[_Query] = deque()
        self._some = asyncio.Event()

    def put(self, query: _Query) -> None:
        self._queries.append(query)
        self._some.set()

    def leave(self, query: _Query) -> bool:
        """Take a query out and tell whether it was here."""
        if query not in self._queries:
            return False
        self._queries.remove(query)
        return True

    def take_all(self) -> list[_Query]:
        """Take everything that is waiting, without waiting for more."""
        queries = list(self._queries)
        self._queries.clear()
        return queries

    async def take(self, most: int) -> list[_Query]:
        """Take everything that is waiting, up to `most` images, but at least one query."""
        while not self._queries:
            self._some.clear()
            await self._some.wait()
        queries = [self._queries.popleft()]
        size = len(queries[0].images)
        while self._queries and (size := size + len(self._queries[0].images)) <= most:
            queries.append(self._queries.popleft())
        return queries


class _Worker:
    """A thread that runs one function after another.

    The process can end without waiting for it.
    """

    def __init__(self, name: str) -> None:
        self._work: queue.SimpleQueue[tuple[Future[None], Callable[[], None]] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def run(self, function: Callable[[], None]) -> asyncio.Future[None]:
        done: Future[None] = Future()
        self._work.put((done, function))
        return asyncio.wrap_future(done)

    def end(self) -> bool:
        """End the thread and tell whether it has ended.

        It has not if its function hangs.
        """
        self._work.put(None)
        self._thread.join(0.1)
        return not self._thread.is_alive()

    def _run(self) -> None:
        for done, function in iter(self._work.get, None):
            if done.set_running_or_notify_cancel():
                try:
                    done.set_result(function())
                except BaseException as error:
                    done.set_exception(error)


class Engine:
    """Answers requests; start it in the event loop that serves them.

    Attributes:
        waiting: number of queries that wait for an answer, including those that a thread still
            processes although nobody waits for them any more.
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
        self._model, self._log = model, log
        self._max_batch, self._max_waiting = max_batch, max_waiting
        self._computing, self._writing = _Queue(), _Queue()
        # Cells that the log has for certain; it may have more.
        self._seen: OrderedDict[str, set[bytes]] = OrderedDict()
        self._unwritten: list[Row] = []
        self._workers: list[_Worker] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._quiet_until = 0.0
        self.waiting = 0
        self.trials = 0
        self.failed: str | None = None
        self.hangs = False

    def ready(self) -> bool:
        """Tell whether trials can be stored, as far as is known without storing one."""
        try:
            if self._log is not None:
                self._log.check()
        except CountermarkError:
            return False
        return self.failed is None

    async def start(self) -> None:
        """Start to take queries."""
        self._workers = [_Worker("compute"), _Worker("write")]
        self._tasks = [asyncio.create_task(self._compute()), asyncio.create_task(self._write())]

    async def stop(self) -> None:
        """Finish the waiting queries, then stop.

        Whatever is not finished within a second is left behind.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END):
                while self.waiting:
                    await asyncio.sleep(0.01)
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self.hangs = bool([worker for worker in self._workers if not worker.end()])

    async def answer(
        self,
        images: torch.Tensor,
        client: str,
        signature: bytes = b"",
        hashes: Sequence[bytes] = (),
    ) -> list[int]:
        """Return the labels of one client's images `(n, c, h, w)`, uint8.

        They are returned once every new trial among the images is durable.

        Raises:
            BusyError: too many requests are waiting.
            CountermarkError: the model or the log failed.
        """
        if self.waiting >= self._max_waiting:
            raise BusyError("the service is busy; try again later")
        query = _Query(
            images, client, signature, hashes, asyncio.get_running_loop().create_future()
        )
        self.waiting += 1
        self._computing.put(query)
        try:
            return await query.done
        except asyncio.CancelledError:  # nobody waits for it any more
            if self._computing.leave(query) or self._writing.leave(query):
                self.waiting -= 1
            raise

    async def _compute(self) -> None:
        while True:
            queries = await self._computing.take(self._max_batch)
            try:
                await self._workers[0].run(partial(self._pass, queries))
            except Exception as error:
                self._tell(_reason(error))
                self._refuse(queries, _reason(error))
                continue
            for query in queries:
                if not query.rows or query.done.done():
                    self._settle(query)
                elif self.failed:
                    self._refuse([query], self.failed)
                else:
                    self._writing.put(query)

    async def _write(self) -> None:
        while True:
            queries: list[_Query] = []
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_AGAIN if self._unwritten else None):
                    queries = await self._writing.take(sys.maxsize)
            patience = asyncio.get_running_loop().call_later(_HANGS, self._log_fails, _SILENT)
            try:
                await self._workers[1].run(partial(self._store, queries))
            except Exception as error:
                self._log_fails(_reason(error))
                self._refuse(queries, _reason(error))
                continue
            finally:
                patience.cancel()
            if self.failed:
                complain("the query log takes trials again")
            self.failed = None
            for query in queries:
                if query.flaw is not None:
                    self._tell(str(query.flaw))
                    self._settle(query, query.flaw)
                    continue
                self._seen.setdefault(query.client, set()).update(row.cell for row in query.rows)
                while len(self._seen) > _REMEMBERED or self._remembered() > _MOST_CELLS:
                    self._seen.popitem(last=False)
                self._settle(query)

    def _remembered(self) -> int:
        return sum(map(len, self._seen.values()))

    def _log_fails(self, reason: str) -> None:
        """Refuse trials until a write succeeds, and report why.

        The reason is reported once, and once more if the log was so far only known to be silent.
        """
        if self.failed is None or (self.failed == _SILENT and reason != _SILENT):
            complain(reason)
            self.failed = reason
        self._refuse(self._writing.take_all(), reason)

    def _tell(self, reason: str) -> None:
        """Report why a query failed; not every time, since clients can cause many failures."""
        if time.monotonic() >= self._quiet_until:
            self._quiet_until = time.monotonic() + _QUIET
            complain(reason)

    def _refuse(self, queries: Sequence[_Query], reason: str) -> None:
        for query in queries:
            self._settle(query, CountermarkError(reason))

    def _settle(self, query: _Query, error: CountermarkError | None = None) -> None:
        self.waiting -= 1
        if query.done.done():  # nobody waits for it any more
            return
        if error is None:
            query.done.set_result(query.labels)
        else:
            query.done.set_exception(error)

    def _pass(self, queries: list[_Query]) -> None:
        images = torch.cat([query.images for query in queries])
        if not isinstance(self._model, GuardedModel):
            labels = predict(self._model, images)
        else:
            found = self._model(
                images, [query.client for query in queries for _ in range(len(query.images))]
            )
            labels = found.labels
            owners = [(query, row) for query in queries for row in range(len(query.images))]
            day = int(time.time() // _DAY)
            model = self._model.guard.settings.model_sha256
            for trial in found.trials:
                query, row = owners[trial.row]
                if trial.cell in self._seen.get(query.client, ()):
                    continue
                request = (
                    pack_request(query.signature, query.hashes, row) if query.signature else b""
                )
                image = query.images[row].contiguous().numpy().tobytes()
                numbers = (trial.heads, trial.tails, trial.chance, trial.answer, day)
                query.rows.append(Row(model, query.client, trial.cell, image, *numbers, request))
        parts = torch.split(labels, [len(query.images) for query in queries])
        for query, part in zip(queries, parts, strict=True):
            query.labels = part.tolist()

    def _store(self, queries: list[_Query]) -> None:
        """Append the trials; the log leaves out those that it already has.

        If there are none, a row that failed before is tried again. A row that no log can store is
        the fault of its query alone.
        """
        assert self._log is not None
        rows = [row for query in queries for row in query.rows] or self._unwritten
        self._unwritten = rows[:1]
        try:
            self.trials += sum(self._log.append(rows))
        except RowError as error:
            for query in queries if len(queries) > 1 else ():
                self._store([query])
            if len(queries) == 1:
                queries[0].flaw = error
        self._unwritten = []


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, CountermarkError) else repr(error)
