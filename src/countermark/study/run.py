"""Running the units of a study, in the order of the tables as far as their inputs allow.

They run in this process, or with Dask in local processes or on a cluster that already exists. A
finished unit is never run again, whichever engine made it. A unit computes on one thread, so its
numbers do not depend on the engine.
"""

import contextlib
import functools
import logging
import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text

from countermark.device import resolve_device
from countermark.errors import CountermarkError
from countermark.files import FolderBusyError
from countermark.memory import keep_freed_memory
from countermark.study.graph import Unit, code_version
from countermark.study.store import Store
from countermark.study.work import KINDS, use_cache, use_device
from countermark.terminal import duration, told_to

_POLL = 1.0  # seconds between looks at what runs
_CONNECT = 20  # seconds for a scheduler to answer
_QUIET_CLUSTER = {
    "distributed.scheduler.unknown-task-duration": "60s",
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "1s",
}


@dataclass(frozen=True)
class Place:
    """Where units are done and kept, as every worker sees it.

    Attributes:
        store: folder of the finished units.
        cache: the data cache.
        device: where a worker computes; units that name a kind of device must get that kind.
        until: seconds since 1970 by which a unit has to be finished, or else it is not begun.
    """

    store: Path
    cache: Path | None
    device: str
    until: float | None = None


def do(unit: Unit, place: Place, estimate: float = 0.0, *needed: str | None) -> str | None:
    """Do one unit, wherever this is called.

    Args:
        unit: the unit.
        place: where it is done and kept.
        estimate: seconds that it is expected to take.
        needed: what this function gave for the units that it starts from.

    Returns:
        The unit's digest; none if the time does not suffice for it or for what it starts from.

    Raises:
        CountermarkError: the unit was planned with other code or for another device than this
            process has, or its work failed.
    """
    if unit.record["code"] != code_version():
        raise CountermarkError(
            "a worker runs another version of Countermark than this command; install the same one "
            "everywhere"
        )
    kind = resolve_device(place.device).type
    if (wanted := unit.options.get("device", kind)) != kind:
        raise CountermarkError(
            f"a worker computes on {kind}, but this is a study on {wanted}; give --device {kind}, "
            f"or start workers where there is {wanted}"
        )
    store = Store(place.store)
    if None in needed and not store.has(unit):
        return None
    keep_freed_memory()
    use_cache(place.cache)
    use_device(place.device)
    inputs = {role: store.path(other) for role, other in unit.inputs.items()}
    work = functools.partial(KINDS[unit.kind], unit.options, inputs)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        while not store.has(unit):
            if place.until is not None and time.time() + estimate > place.until:
                return None
            try:
                with told_to(lambda status: store.tell(unit, {"title": unit.title, **status})):
                    store.make(unit, work)
            except FolderBusyError:  # another worker does it, or a dying one still holds it
                time.sleep(_POLL)
            except CountermarkError:
                if not store.has(unit):  # else another machine's copy of it came in meanwhile
                    raise
                store.drop(unit)
    finally:
        store.tell(unit, None)
        torch.set_num_threads(threads)
    return unit.digest


def run(
    todo: list[Unit],
    store: Store,
    *,
    finished: int,
    workers: int,
    scheduler: str | None,
    cache: Path | None,
    device: str = "auto",
    until: float | None = None,
    log: Path,
    estimates: Mapping[str, float],
) -> int:
    """Run units of which none is finished.

    Args:
        todo: the units; inputs come before the units that start from them.
        store: where finished units are kept; workers on other machines must see it under the same
            path.
        finished: number of units of the study that were finished before.
        workers: number of local processes; 0 runs everything in this process.
        scheduler: address of a Dask scheduler to use instead.
        cache: the data cache, as workers see it.
        device: where each worker computes its units.
        until: seconds since 1970; a unit that would not be finished by then, by its estimate, is
            not begun.
        log: file that gets a line for each unit.
        estimates: seconds of each unit, by digest.

    Returns:
        How many units were left for want of time.

    Raises:
        CountermarkError: a unit failed, or the scheduler cannot be reached; what is finished is
            kept.
    """
    watch = Watch(store, finished, todo, estimates, max(workers, 1), log, until)
    if not todo:
        return 0
    place = Place(store.folder.absolute(), cache, device, until)
    with watch:
        try:
            if scheduler is None and workers == 0:
                _here(todo, place, watch)
            else:
                _elsewhere(todo, place, watch, workers, scheduler)
        except KeyboardInterrupt:
            watch.note(
                f"interrupted: {watch.done} of {watch.total} units are finished and kept; the "
                "same command goes on from there"
            )
            raise
        if watch.left:
            watch.note(
                f"the time is over: {watch.done} of {watch.total} units are finished and kept; the "
                "same command goes on from there"
            )
    return len(watch.left)


def _key(unit: Unit) -> str:
    """The task's name; Dask learns how long tasks take by what stands before the dash."""
    return f"{unit.kind.replace('-', ' ')}-{unit.digest}"


def _here(todo: list[Unit], place: Place, watch: "Watch") -> None:
    done: dict[str, str | None] = {}
    with watch.polling():
        for unit in todo:
            needed = [done[other.digest] for other in unit.inputs.values() if other.digest in done]
            try:
                done[unit.digest] = do(unit, place, watch.estimates.get(unit.digest, 0.0), *needed)
            except Exception as error:
                raise _failure(unit, error) from error
            if done[unit.digest] is not None:
                watch.finished(unit)


def _elsewhere(
    todo: list[Unit], place: Place, watch: "Watch", workers: int, scheduler: str | None
) -> None:
    import dask
    from distributed import Client, LocalCluster

    for name in (
        "distributed",
        "distributed.nanny",
        "distributed.worker",
        "distributed.scheduler",
        "tornado",
        "bokeh",
    ):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with contextlib.ExitStack() as stack:
        if scheduler is None:
            # Without this, Dask assumes that unknown tasks are short and queues them where their
            # inputs are, while other workers are idle.
            stack.enter_context(dask.config.set(_QUIET_CLUSTER))
            with _undisturbed():  # workers inherit this: a Ctrl-C is for the one who waits
                cluster = stack.enter_context(
                    LocalCluster(
                        n_workers=workers,
                        threads_per_worker=1,
                        processes=True,
                        dashboard_address="127.0.0.1:0",
                        silence_logs=logging.CRITICAL,
                    )
                )
                client = stack.enter_context(Client(cluster))
        else:
            try:
                client = stack.enter_context(Client(scheduler, timeout=_CONNECT))
            except (OSError, TimeoutError, ValueError) as error:
                raise CountermarkError(
                    f"no Dask scheduler answers at {scheduler} ({error}); start one or leave "
                    "--scheduler out"
                ) from error
        futures: dict[str, Any] = {}
        for number, unit in enumerate(todo):
            needed = (other.digest for other in unit.inputs.values())
            futures[unit.digest] = client.submit(
                do,
                unit,
                place,
                watch.estimates.get(unit.digest, 0.0),
                *(futures[digest] for digest in needed if digest in futures),
                key=_key(unit),
                priority=-number,
                pure=False,
            )
        waiting = {unit.digest: unit for unit in todo}
        try:
            while waiting:
                time.sleep(_POLL)
                watch.show()
                for digest in [digest for digest in waiting if futures[digest].done()]:
                    unit = waiting.pop(digest)
                    try:
                        made = futures[digest].result(timeout=_CONNECT)
                    except Exception as error:
                        raise _failure(unit, error) from error
                    if made is not None:
                        watch.finished(unit)
        finally:
            client.cancel(list(futures.values()), force=True)


def _failure(unit: Unit, error: Exception) -> CountermarkError:
    if isinstance(error, CountermarkError):
        return CountermarkError(f"{unit.title}: {error}")
    if type(error).__name__ == "OutOfMemoryError":
        return CountermarkError(
            f"{unit.title}: the device's memory does not suffice; let fewer processes share it "
            "(--workers). What is finished is kept"
        )
    if type(error).__name__ == "KilledWorker":
        return CountermarkError(
            f"{unit.title}: the processes that were to do it were killed again and again, as "
            "happens where the memory does not suffice; let fewer run at once (--workers, or fewer "
            "workers of the scheduler). What is finished is kept"
        )
    return CountermarkError(
        f"{unit.title} failed with {type(error).__name__}: {error}; what is finished is kept"
    )


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not the main thread: no signal comes here anyway
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Watch:
    """Progress over the whole graph.

    It is a live display on a terminal, and elsewhere a line for each unit. There is always a log
    file.
    """

    def __init__(
        self,
        store: Store,
        kept: int,
        todo: Iterable[Unit],
        estimates: Mapping[str, float],
        workers: int,
        log: Path,
        until: float | None = None,
    ) -> None:
        """Watch the units `todo`; `kept` more were finished before."""
        self.store, self.estimates, self.workers, self.log = store, estimates, workers, log
        self.until = until
        self.left = {unit.digest: unit for unit in todo}
        self.done, self.total = kept, kept + len(self.left)
        self.begun = time.monotonic()
        self.spent = 0.0  # estimated seconds of the units finished by now
        self.console = Console(stderr=True)
        self.live = (
            Live(console=self.console, refresh_per_second=4, transient=True)
            if self.console.is_terminal
            else None
        )

    def __enter__(self) -> "Watch":
        for word in self.store.told().keys() & self.left.keys():
            self.store.tell(self.left[word], None)  # of a run that was killed
        self._write(
            f"{self.done} of {self.total} units are finished; {duration(self.seconds_left())} to "
            "go, by estimate"
        )
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self.live is not None:
            self.live.stop()

    def seconds_left(self) -> float:
        """Estimate the remaining wall-clock seconds.

        The estimate is corrected by how the finished units compared with theirs.
        """
        rest = sum(self.estimates.get(digest, 1.0) for digest in self.left) / self.workers
        elapsed = time.monotonic() - self.begun
        rest *= elapsed * self.workers / self.spent if self.spent > 20 else 1.0
        return rest if self.until is None else max(0.0, min(rest, self.until - time.time()))

    def finished(self, unit: Unit) -> None:
        """Count a unit."""
        self.left.pop(unit.digest, None)
        self.done += 1
        self.spent += self.estimates.get(unit.digest, 1.0)
        self._write(
            f"[{self.done}/{self.total}] {unit.title} ({unit.digest[:12]}); "
            f"{duration(self.seconds_left())} left"
        )

    def note(self, line: str) -> None:
        """Say something that stays."""
        self._write(line)
        if self.live is not None:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def show(self) -> None:
        """Draw what runs now."""
        if self.live is None:
            return
        lines = [f"{self.done} of {self.total} units, about {duration(self.seconds_left())} left"]
        for status in self.store.told().values():
            share = (
                f"{100 * status['done'] / status['total']:3.0f} %" if status.get("total") else ""
            )
            lines.append(
                f"  {status['title']}  {status.get('what', '')} {share} {status.get('text', '')}"
            )
        self.live.update(Text("\n".join(lines), no_wrap=True, overflow="ellipsis"))

    @contextlib.contextmanager
    def polling(self) -> Iterator[None]:
        """Draw every now and then while this process is busy with units itself."""
        import threading

        stop = threading.Event()

        def draw() -> None:
            while not stop.wait(_POLL):
                self.show()

        thread = threading.Thread(target=draw, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _write(self, line: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with self.log.open("a") as stream:
            stream.write(f"{stamp} {line}\n")
        if self.live is None:
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)


_SHARING = 4  # processes on one accelerator, whose memory they share


def default_workers(device: str = "cpu") -> int:
    """One process for each core that this process may use, or none where there is only one.

    Args:
        device: kind of device; on another than a processor there are at most four.
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    workers = cores if device == "cpu" else min(cores, _SHARING)
    return workers if workers > 1 else 0
