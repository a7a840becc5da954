"""What happens to a query inside the service: micro-batches through the model, then trials into the log, then the answer.

Two threads, one behind the other: one computes, one writes. Each takes everything that waits, so under load a pass of the model and a
commit of the log serve many requests.
"""

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import nn

from countermark.errors import CountermarkError
from countermark.evaluation import predict
from countermark.guard import GuardedModel, QueryLog, Row
from countermark.guard.requests import pack_request

_DAY = 86_400
_REMEMBERED = 1000  # clients whose cells are kept in memory


class BusyError(CountermarkError):
    """Too many requests wait already."""


@dataclass
class _Query:
    images: torch.Tensor
    client: str
    signature: bytes
    hashes: Sequence[bytes]
    done: asyncio.Future[list[int]]
    labels: list[int] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)


class Engine:
    """Answers requests; start it in the event loop that serves them."""

    def __init__(self, model: nn.Module | GuardedModel, log: QueryLog | None, max_batch: int, max_waiting: int) -> None:
        """Serve a guarded model with its log, or a bare network without one."""
        if isinstance(model, GuardedModel) != (log is not None):
            raise CountermarkError("a guarded model needs a query log, a bare network has no use for one")
        self._model, self._log = model, log
        self._max_batch, self._max_waiting = max_batch, max_waiting
        self._computing: asyncio.Queue[_Query] = asyncio.Queue()
        self._writing: asyncio.Queue[_Query] = asyncio.Queue()
        self._seen: OrderedDict[str, set[bytes]] = OrderedDict()
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix=name) for name in ("compute", "write")]
        self._tasks: list[asyncio.Task[None]] = []
        self.waiting = 0
        self.trials = 0
        self.failed: str | None = None

    async def start(self) -> None:
        """Begin to take queries."""
        self._tasks = [asyncio.create_task(self._compute()), asyncio.create_task(self._write())]

    async def stop(self) -> None:
        """Finish what waits, then stop."""
        while self.waiting:
            await asyncio.sleep(0.01)
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        for thread in self._threads:
            thread.shutdown()

    async def answer(self, images: torch.Tensor, client: str, signature: bytes = b"", hashes: Sequence[bytes] = ()) -> list[int]:
        """Labels of one client's images `(n, c, h, w)`, uint8, once every new trial among them is durable.

        Raises:
            BusyError: too many requests wait.
            CountermarkError: the model or the log failed.
        """
        if self.waiting >= self._max_waiting:
            raise BusyError("the service is busy; try again later")
        query = _Query(images, client, signature, hashes, asyncio.get_running_loop().create_future())
        self.waiting += 1
        try:
            self._computing.put_nowait(query)
            return await asyncio.shield(query.done)
        finally:
            self.waiting -= 1

    async def _compute(self) -> None:
        while True:
            queries = await _take(self._computing, self._max_batch)
            if await self._in_thread(0, queries, self._pass):
                for query in queries:
                    if query.rows:
                        self._writing.put_nowait(query)
                    else:
                        _settle(query)

    async def _write(self) -> None:
        while True:
            queries = await _take(self._writing, 1 << 30)
            if await self._in_thread(1, queries, self._store):
                for query in queries:
                    self._seen.setdefault(query.client, set()).update(row.cell for row in query.rows)
                    _settle(query)

    async def _in_thread(self, number: int, queries: list[_Query], work: Callable[[list[_Query]], None]) -> bool:
        try:
            await asyncio.get_running_loop().run_in_executor(self._threads[number], work, queries)
        except Exception as error:
            self.failed = str(error)
            for query in queries:
                if not query.done.done():
                    query.done.set_exception(CountermarkError(str(error)))
            return False
        self.failed = None
        return True

    def _pass(self, queries: list[_Query]) -> None:
        images = torch.cat([query.images for query in queries])
        if not isinstance(self._model, GuardedModel):
            labels = predict(self._model, images)
        else:
            found = self._model(images, [query.client for query in queries for _ in range(len(query.images))])
            labels = found.labels
            owners = [(query, row) for query in queries for row in range(len(query.images))]
            day = int(time.time() // _DAY)
            model = self._model.guard.settings.model_sha256
            for trial in found.trials:
                query, row = owners[trial.row]
                if trial.cell in self._known(query.client):
                    continue
                request = pack_request(query.signature, query.hashes, row) if query.signature else b""
                image = query.images[row].contiguous().numpy().tobytes()
                numbers = (trial.heads, trial.tails, trial.chance, trial.answer, day)
                query.rows.append(Row(model, query.client, trial.cell, image, *numbers, request))
        parts = torch.split(labels, [len(query.images) for query in queries])
        for query, part in zip(queries, parts, strict=True):
            query.labels = part.tolist()

    def _known(self, client: str) -> set[bytes]:
        """The cells of a client that the log has."""
        assert isinstance(self._model, GuardedModel)
        assert self._log is not None
        if client not in self._seen:
            self._seen[client] = self._log.cells(self._model.guard.settings.model_sha256, client)
            if len(self._seen) > _REMEMBERED:
                self._seen.popitem(last=False)
        return self._seen[client]

    def _store(self, queries: list[_Query]) -> None:
        assert self._log is not None
        self.trials += sum(self._log.append([row for query in queries for row in query.rows]))


def _settle(query: _Query) -> None:
    if not query.done.done():
        query.done.set_result(query.labels)


async def _take(queue: "asyncio.Queue[_Query]", most: int) -> list[_Query]:
    """Everything that waits, up to `most` images, and at least one query."""
    queries = [await queue.get()]
    size = len(queries[0].images)
    while not queue.empty() and size < most:
        queries.append(queue.get_nowait())
        size += len(queries[-1].images)
    return queries
