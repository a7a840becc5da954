"""The guard in a service of one's own: images in, class names out, one durable log.

A `Guarded` belongs to no event loop and needs no start. It answers in any number of loops and
threads, and inside another application over HTTP.
"""

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch

from countermark.data.images import DamagedError, as_array, eight_bits
from countermark.device import resolve_device
from countermark.errors import CountermarkError
from countermark.guard import Head, QueryLog, load_guarded, read_head, weights_sha256
from countermark.networks import describe
from countermark.places import Network, is_address, own_path
from countermark.service.clients import Clients, check_name
from countermark.service.engine import BusyError, Engine
from countermark.service.tensors import read_file
from countermark.text import brief

if TYPE_CHECKING:
    from starlette.applications import Starlette

Image = bytes | np.ndarray[Any, Any] | torch.Tensor
"""The content of an image file, or pixels `(c, h, w)`, uint8 or floating-point of [0, 1]."""

_READERS = 4  # threads that decode what is asked without an event loop, at most
_LOCKED = 5.0  # seconds that a trial waits for another program that writes the log


@dataclass(frozen=True)
class Classified:
    """What a client gets for an image.

    Attributes:
        label: number of the class.
        name: name of the class.
    """

    label: int
    name: str


class Guarded:
    """A model with its guard, for a service of your own.

    An answer is given once its trial is durable in the log, if it is one. Whoever asks is named by
    your service, after it made sure who that is: the log and every trace use that name, and each
    client has their own coins. The threads that compute and write start with the first query, so
    that processes may be forked before it. `close`, `with` and `async with` end them.

    Example:
        >>> from pathlib import Path
        >>> with cm.Guarded("mine", key="mine/key", log="queries.db") as guard:
        ...     found = guard.classify_now(Path("three.png").read_bytes(), "anna")
        >>> found
        Classified(label=3, name='3')
    """

    def __init__(
        self,
        model: str | Path,
        *,
        log: str | Path,
        key: str | Path | None = None,
        network: Network | None = None,
        device: str = "auto",
        max_batch: int = 64,
        max_waiting: int = 256,
        timeout: float = 10.0,
        head: str | Path | None = None,
    ) -> None:
        """Load a model folder with its guard, and open the log.

        Args:
            model: a model folder with a `guard.json`, which `calibrate` writes.
            log: the query log: a path (SQLite) or `postgresql://USER:PASSWORD@HOST/DATABASE`, which
                several processes and machines can share. It is created if there is none.
            key: the owner's key folder, for its secret; default MODEL/key.
            network: what builds the network, unless it is a built-in one.
            device: where to compute, as in `load`.
            max_batch: most images of one pass of the model.
            max_waiting: most queries that may wait; more are refused.
            timeout: seconds that an answer may take.
            head: a head of the log that was published before, as `log_head` gives it; a log that
                does not lead to it was restored from a backup, and is refused.

        Raises:
            CountermarkError: the model, its guard, the key or the log cannot be read, a number is
                out of range, or the log does not lead to the head.
        """
        _whole("max_batch", max_batch, 4096)
        _whole("max_waiting", max_waiting, 10**6)
        if not isinstance(timeout, int | float) or not 0 < timeout < 1e6:
            raise CountermarkError(f"timeout is a positive number of seconds, not {brief(timeout)}")
        self._folder = own_path(model, "the model folder")
        self._described = describe(self._folder)
        self._max_batch, self._timeout = max_batch, float(timeout)
        self._key = self._folder / "key" if key is None else own_path(key, "the key folder")
        guarded = load_guarded(self._folder, self._key, network, resolve_device(device))
        place = str(log) if is_address(log) else str(own_path(log, "the query log"))
        published = None if head is None else read_head(own_path(head, "the published head"))
        self._log = open_log(place, self._timeout, published)
        self._engine = Engine(guarded, self._log, max_batch, max_waiting)
        self._readers = ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1), "read")
        self._log.close()  # a fork could not share the connection; a write opens another one

    @overload
    async def classify(self, image: Image, client: str) -> Classified: ...

    @overload
    async def classify(self, image: Sequence[Image], client: str) -> list[Classified]: ...

    async def classify(
        self, image: Image | Sequence[Image], client: str
    ) -> Classified | list[Classified]:
        """Answer one image of a client, or a list of them.

        The files of images are decoded in a thread, beside the event loop.

        Args:
            image: the content of a PNG, JPEG, WebP or BMP file of at most 2 million pixels and 4
                for each of its bytes, which is scaled as the training images were, or pixels
                `(c, h, w)` of the model's size, uint8 or floating-point of [0, 1]. A list is
                answered by a list, and its images share passes of the model.
            client: name of the account that asks, 1 to 200 printable characters.

        Raises:
            DamagedError: an image cannot be read.
            BusyError: too many queries are waiting, the answer took too long, or the guard is
                closed.
            CountermarkError: the name is none, or the model or the log failed. Which queries a log
                can fail depends on the coins, so do not pass the reason on to clients.
        """
        found: list[Classified] = []
        for images in self._batches(image, client):
            given_up = threading.Event()
            try:
                async with asyncio.timeout(self._timeout):
                    with self._engine.reading():
                        x = await asyncio.to_thread(self._pixels, images, given_up.is_set)
                    found += self._named(await self._engine.answer(x, client))
            except TimeoutError:
                raise self._late() from None
            finally:
                given_up.set()  # a thread that is left behind ends with the file that it decodes
        return found if isinstance(image, list | tuple) else found[0]

    @overload
    def classify_now(self, image: Image, client: str) -> Classified: ...

    @overload
    def classify_now(self, image: Sequence[Image], client: str) -> list[Classified]: ...

    def classify_now(
        self, image: Image | Sequence[Image], client: str
    ) -> Classified | list[Classified]:
        """Do the same without an event loop, for threads and scripts; see `classify`."""
        found: list[Classified] = []
        for images in self._batches(image, client):
            given_up, end = threading.Event(), time.monotonic() + self._timeout
            try:
                with self._engine.reading():
                    read = self._readers.submit(self._pixels, images, given_up.is_set)
                    x = read.result(self._timeout)
                left = max(0.0, end - time.monotonic())
                found += self._named(self._engine.answer_now(x, client, left))
            except TimeoutError:
                raise self._late() from None
            finally:
                given_up.set()
        return found if isinstance(image, list | tuple) else found[0]

    def asgi(
        self,
        clients: str | Path | None = None,
        name: str = "model",
        max_body: int | None = None,
    ) -> "Starlette":
        """Make the application of the Open Inference Protocol, to mount in your own.

        It answers through this guard and into its log, at `/v2/models/NAME/infer`. Its clients are
        those of a file, with their API keys.

        Args:
            clients: the file, as `client_add` makes it; default MODEL/clients.json.
            name: name of the model in the addresses, letters, digits and underscores.
            max_body: most bytes of a request's body; default 4 MiB, or what one image takes as JSON
                or `max_batch` of them as UINT8 where that is more.

        Raises:
            CountermarkError: the file of clients cannot be read, the name is none, `max_body` is
                out of range, or the extra `serve` is not installed.
        """
        try:
            from countermark.service.http import Limits, application, body_limit
            from countermark.service.signing import Signing
        except ImportError as error:
            raise CountermarkError(
                f"the application needs {error.name}; pip install 'countermark[serve]'"
            ) from error

        if not isinstance(name, str) or not name.isidentifier():
            raise CountermarkError(f"name is letters, digits and underscores, not {brief(name)}")
        if max_body is not None:
            _whole("max_body", max_body, 1 << 30)
        path = (
            self._folder / "clients.json" if clients is None else own_path(clients, "the clients")
        )
        shape, guarded = self._described.shape, self._engine.guarded
        assert guarded is not None
        return application(
            self._engine,
            Clients(path),
            name=name,
            shape=shape,
            class_names=self._described.class_names,
            model_sha256=weights_sha256(self._folder),
            limits=Limits(
                self._max_batch, max_body or body_limit(shape, self._max_batch), self._timeout
            ),
            signing=Signing(guarded, self._log, self._folder, self._key),
        )

    def close(self) -> None:
        """Answer what waits, for a second at most, refuse the rest, and close the log."""
        self._engine.stop()
        if not self._engine.forked:
            close_log(self._log)

    def __enter__(self) -> "Guarded":
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    async def __aenter__(self) -> "Guarded":
        return self

    async def __aexit__(self, *_error: object) -> None:
        await asyncio.to_thread(self.close)

    def _batches(self, image: Image | Sequence[Image], client: str) -> Iterator[Sequence[Image]]:
        """What is asked at once. A name that is none is refused, whatever the images are."""
        check_name(client)
        images: Sequence[Any] = image if isinstance(image, list | tuple) else [image]
        return (
            images[start : start + self._max_batch]
            for start in range(0, len(images), self._max_batch)
        )

    def _pixels(self, images: Sequence[Image], given_up: Callable[[], bool]) -> torch.Tensor:
        """The images as the engine takes them, uint8 `(n, c, h, w)`, unless nobody waits."""
        read = list[np.ndarray[Any, Any]]()
        try:
            for image in images:
                if given_up():
                    raise self._late()
                read.append(self._fitted(image))
            return torch.from_numpy(np.stack(read))
        except DamagedError as error:
            raise DamagedError(f"the image {error}") from error

    def _fitted(self, image: Image) -> np.ndarray[Any, Any]:
        shape = self._described.shape
        if isinstance(image, bytes | bytearray | memoryview):
            return read_file(bytes(image), shape)
        array = as_array(image)
        if array.shape != shape:
            given = f"its shape is {array.shape}" if array.ndim else brief(image)
            raise DamagedError(
                f"is neither the content of a file nor pixels of the shape {shape}: {given}"
            )
        return eight_bits(array)[0]

    def _named(self, labels: Sequence[int]) -> list[Classified]:
        return [Classified(label, self._described.class_names[label]) for label in labels]

    def _late(self) -> BusyError:
        return BusyError(f"there was no answer within {self._timeout:g} seconds; try again later")


def _whole(name: str, value: object, most: int) -> None:
    if type(value) is not int or not 1 <= value <= most:
        raise CountermarkError(f"{name} is a whole number from 1 to {most}, not {brief(value)}")


def open_log(place: str, timeout: float, head: Head | None = None) -> QueryLog:
    """Open the log of a service whose answers may take `timeout` seconds."""
    return QueryLog(place, wait=min(_LOCKED, timeout / 2), head=head)


def close_log(log: QueryLog) -> None:
    """Close a log; a database that does not answer does not hold the end of the service."""
    closing = threading.Thread(target=log.close, daemon=True)
    closing.start()
    closing.join(1.0)
