"""The guard in a service of one's own: event loops, threads, forks, ends, and one log for all."""

import asyncio
import base64
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
import uvicorn
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from PIL import Image
from starlette.applications import Starlette
from starlette.routing import Mount

import countermark as cm
from countermark.data import Pools
from countermark.data.images import fitted
from countermark.guard import GuardedModel, QueryLog, Row, load_guarded
from countermark.networks import describe
from countermark.service.clients import add_client
from countermark.service.guarded import Guarded
from countermark.watermarks import load_key
from serving import of_scans
from test_endpoints import free_ports, wait_until_ready

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def folder(owner: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The owner's model behind a dear guard, so that a small data set has many coins."""
    folder = tmp_path_factory.mktemp("guarded") / "mine"
    shutil.copytree(owner, folder)
    cm.calibrate(folder, cost=8.0)
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> GuardedModel:
    return load_guarded(folder, folder / "key")


@pytest.fixture
def log(tmp_path: Path) -> str:
    return str(tmp_path / "log.db")


@pytest.fixture
def model(loaded: GuardedModel, log: str) -> GuardedModel:
    """The model with the coins of the log."""
    with QueryLog(log) as made:
        return loaded.under(made.identity)


@pytest.fixture
def guard(folder: Path, log: str) -> Iterator[Guarded]:
    with cm.Guarded(folder, log=log) as made:
        yield made


def png(image: torch.Tensor, size: int | None = None) -> bytes:
    """An image as a file, enlarged if a size is given."""
    stream = io.BytesIO()
    picture = Image.fromarray(image[0].numpy())
    (picture.resize((size, size), Image.Resampling.NEAREST) if size else picture).save(
        stream, "PNG"
    )
    return stream.getvalue()


def rows(log: str) -> list[Row]:
    with QueryLog(log, create=False) as found:
        return [row for row in found.rows() if row is not None]


def cells(model: GuardedModel, x: torch.Tensor, *clients: str) -> set[tuple[str, bytes]]:
    return {(client, trial.cell) for client in clients for trial in model(x, client).trials}


def tied(model: GuardedModel, digits: Pools, client: str = "anna") -> torch.Tensor:
    """An image whose answer a coin of this client's chooses."""
    return digits.thief.x[model(digits.thief.x, client).trials[0].row]


def untied(model: GuardedModel, digits: Pools) -> torch.Tensor:
    met = {trial.row for trial in model(digits.thief.x, "anna").trials}
    return digits.thief.x[next(row for row in range(len(digits.thief.x)) if row not in met)]


def test_answers_are_those_of_the_guard_and_each_trial_is_in_the_log_before_its_answer(
    guard: Guarded, folder: Path, log: str, model: GuardedModel, digits: Pools
) -> None:
    names = describe(folder).class_names

    async def ask() -> None:
        for client in ("anna", "bob"):
            x = digits.thief.x[:40]
            expected = model(x, client)
            for number, image in enumerate(x):
                found = await guard.classify(png(image), client)
                assert found.label == expected.labels[number]
                assert found.name == names[found.label]
                for trial in expected.trials:
                    if trial.row == number:
                        assert (client, trial.cell) in {(row.client, row.cell) for row in rows(log)}

    asyncio.run(ask())
    asked = [(row.client, row.cell) for row in rows(log)]
    assert len(asked) == len(set(asked)) > 5
    assert set(asked) == cells(model, digits.thief.x[:40], "anna", "bob")


def test_files_and_pixels_of_one_image_are_one_query(
    guard: Guarded, model: GuardedModel, digits: Pools, log: str
) -> None:
    """Many are answered in order, in passes of at most `max_batch`."""
    x = digits.thief.x[:150]
    expected = model(x, "anna").labels.tolist()
    kinds: list[Callable[[torch.Tensor], object]] = [
        png,
        lambda image: bytearray(png(image)),
        lambda image: image,
        lambda image: image.numpy(),
        lambda image: image / 255,
        lambda image: image.numpy() / 255.0,
    ]
    for kind in kinds:
        found = guard.classify_now([kind(image) for image in x], "anna")  # type: ignore[misc]
        assert [each.label for each in found] == expected
    assert len(rows(log)) == len(cells(model, x, "anna"))
    assert asyncio.run(guard.classify(list(x), "anna")) == found
    assert guard.classify_now([], "anna") == []


def test_files_are_brought_to_the_size_of_the_model(
    guard: Guarded, model: GuardedModel, digits: Pools
) -> None:
    sizes = []
    read = guard._engine.answer_now

    def noting(x: torch.Tensor, client: str, timeout: float) -> list[int]:
        sizes.append(x.shape)
        return read(x, client, timeout)

    guard._engine.answer_now = noting  # type: ignore[method-assign]
    colour = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 10, 10)).save(colour, "JPEG")
    guard.classify_now([png(digits.test.x[0], 64), colour.getvalue()], "anna")
    assert sizes == [(2, 1, 8, 8)]


BAD_IMAGES = {
    "no image": (b"no image", "is not a PNG, JPEG, WebP or BMP image"),
    "nothing": (b"", "is not a PNG"),
    "a path": ("cat.jpg", "neither the content of a file nor pixels .*'cat.jpg'"),
    "none": (None, "neither the content"),
    "too few sides": (np.zeros((8, 8), np.uint8), r"its shape is \(8, 8\)"),
    "colours": (np.zeros((3, 8, 8), np.uint8), r"pixels of the shape \(1, 8, 8\)"),
    "not normalised": (np.full((1, 8, 8), 255.0), "from 255 to 255"),
    "not a number": (np.full((1, 8, 8), np.nan), "nan"),
    "integers": (np.zeros((1, 8, 8), np.int64), "int64"),
    "words": (np.full((1, 8, 8), "a"), "<U1"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_an_image_that_cannot_be_read_is_refused_with_its_reason(
    guard: Guarded, digits: Pools, name: str
) -> None:
    image, reason = BAD_IMAGES[name]
    with pytest.raises(cm.DamagedError, match=f"^the image .*{reason}"):
        guard.classify_now(image, "anna")  # type: ignore[call-overload]
    with pytest.raises(cm.DamagedError, match=reason):
        asyncio.run(guard.classify([digits.test.x[0], image], "anna"))  # type: ignore[list-item]
    assert guard._engine.waiting == 0
    assert guard.classify_now(digits.test.x[0], "anna")


def test_a_truncated_file_and_a_bomb_are_refused(guard: Guarded, digits: Pools) -> None:
    with pytest.raises(cm.DamagedError, match=r"^the image "):
        guard.classify_now(png(digits.test.x[0], 500)[:-200], "anna")
    for mode, side in (("1", 8200), ("RGB", 1600)):  # the second is a file of eight kilobytes
        bomb = io.BytesIO()
        Image.new(mode, (side, side)).save(bomb, "PNG")
        with pytest.raises(cm.DamagedError, match=r"pixels.* that are decoded"):
            guard.classify_now(bomb.getvalue(), "anna")


def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded(guard: Guarded) -> None:
    """Each passes over the whole image, even if it is empty."""
    with pytest.raises(cm.DamagedError, match="the image has more than the 100 scans"):
        guard.classify_now(of_scans(30_000), "anna")
    assert guard.classify_now(of_scans(80), "anna")


@pytest.mark.parametrize("name", ["", "anna\n", "a\0", "\ud800", "a" * 201, None, 3, b"anna"])
def test_a_name_that_no_log_can_hold_is_refused_whatever_is_asked(
    guard: Guarded, digits: Pools, name: object
) -> None:
    """A name that only trials have to have would show clients which of their queries are trials."""
    with pytest.raises(cm.CountermarkError, match="name of a client is 1 to 200 printable"):
        guard.classify_now(digits.test.x[0], name)  # type: ignore[call-overload]
    with pytest.raises(cm.CountermarkError, match="name of a client"):
        asyncio.run(guard.classify(digits.test.x[0], name))  # type: ignore[call-overload]


def test_threads_and_event_loops_ask_at_once(
    guard: Guarded, model: GuardedModel, digits: Pools, log: str
) -> None:
    x = digits.thief.x[:60]
    clients = [f"client {number}" for number in range(6)]
    expected = {client: model(x, client).labels.tolist() for client in clients}

    def in_a_loop(client: str) -> list[int]:
        async def ask() -> list[int]:
            found = await asyncio.gather(*(guard.classify(image, client) for image in x))
            return [each.label for each in found]

        return asyncio.run(ask())

    def in_a_thread(client: str) -> list[int]:
        return [guard.classify_now(image, client).label for image in x]

    with ThreadPoolExecutor(6) as threads:
        asked = {
            client: threads.submit((in_a_loop, in_a_thread)[number % 2], client)
            for number, client in enumerate(clients)
        }
        assert {client: found.result() for client, found in asked.items()} == expected
    assert {(row.client, row.cell) for row in rows(log)} == cells(model, x, *clients)
    assert len(rows(log)) == len(cells(model, x, *clients))


class Held(QueryLog):
    """A log that does not answer until it is let go."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self.asked, self.let_go = threading.Event(), threading.Event()

    def store(self, rows: object, requests: object) -> object:
        self.asked.set()
        self.let_go.wait(60)
        return super().store(rows, requests)  # type: ignore[arg-type]


@pytest.fixture
def held(folder: Path, log: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guarded]:
    """A guard whose log hangs in its first write; its log is `_log`."""
    monkeypatch.setattr("countermark.service.guarded.QueryLog", Held)
    monkeypatch.setattr("countermark.service.engine._HANGS", 1000.0)
    made = cm.Guarded(folder, log=log, max_waiting=2, timeout=60)
    yield made
    made._log.let_go.set()  # type: ignore[attr-defined]
    made.close()


def until(condition: Callable[[], bool]) -> None:
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < 30
        time.sleep(0.01)


def test_an_event_loop_that_ends_takes_only_its_own_queries_with_it(
    held: Guarded, model: GuardedModel, digits: Pools, log: str
) -> None:
    """Anna's loop is closed under her query, which is with the log; another answers bob's."""
    loop = asyncio.new_event_loop()
    asking = loop.create_task(held.classify(tied(model, digits), "anna"))
    while not held._log.asked.is_set():  # type: ignore[attr-defined]
        loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    asking._log_destroy_pending = False  # type: ignore[attr-defined]
    image = tied(model, digits, "bob")
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(lambda: asyncio.run(held.classify(image, "bob")))
        until(lambda: len(held._engine._open) == 2)
        held._log.let_go.set()  # type: ignore[attr-defined]
        assert asked.result().label == int(model(image[None], "bob").labels)
    assert {row.client for row in rows(log)} == {"anna", "bob"}
    assert held._engine.waiting == 0
    del asking


def test_who_gives_up_makes_room_and_leaves_nothing_in_the_log(
    held: Guarded, model: GuardedModel, digits: Pools, log: str
) -> None:
    """Anna's query is with the log, bob's is cancelled before its turn, the third is one too many.

    A query that is cancelled while its file is read makes room as well.
    """
    images = {client: png(tied(model, digits, client)) for client in ("anna", "bob", "carol")}

    async def ask() -> None:
        anna = asyncio.create_task(held.classify(images["anna"], "anna"))
        while not held._log.asked.is_set():  # type: ignore[attr-defined]
            await asyncio.sleep(0.01)
        bob = asyncio.create_task(held.classify(images["bob"], "bob"))
        while not len(held._engine._writing):
            await asyncio.sleep(0.01)
        with pytest.raises(cm.BusyError, match="busy"):
            await held.classify(images["carol"], "carol")
        bob.cancel()
        with pytest.raises(asyncio.CancelledError):
            await bob
        assert held._engine.waiting == 1
        carol = asyncio.create_task(held.classify(images["carol"], "carol"))
        await asyncio.sleep(0)
        carol.cancel()
        with pytest.raises(asyncio.CancelledError):
            await carol
        assert held._engine.waiting == 1
        held._log.let_go.set()  # type: ignore[attr-defined]
        assert (await anna).label == int(model(tied(model, digits)[None], "anna").labels)

    asyncio.run(ask())
    assert [row.client for row in rows(log)] == ["anna"]


def test_files_that_wait_to_be_read_count_among_the_waiting(
    held: Guarded, digits: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise any number of large images could wait in memory."""
    begun, let_go = threading.Semaphore(0), threading.Event()

    def slow(file: bytes, shape: tuple[int, int, int], most: int) -> np.ndarray:
        begun.release()
        let_go.wait(30)
        return fitted(file, shape, most)

    monkeypatch.setattr("countermark.service.tensors.fitted", slow)
    image = png(digits.test.x[0])

    async def ask() -> None:
        asked = [asyncio.create_task(held.classify(image, "anna")) for _ in range(2)]
        for _ in asked:
            await asyncio.to_thread(begun.acquire)
        for _ in range(2):
            with pytest.raises(cm.BusyError, match="busy"):
                await held.classify(image, "bob")
        with pytest.raises(cm.BusyError, match="busy"):
            held.classify_now(image, "bob")
        let_go.set()
        held._log.let_go.set()  # type: ignore[attr-defined]
        assert len(await asyncio.gather(*asked)) == 2

    asyncio.run(ask())
    assert held._engine.waiting == 0


def test_an_answer_that_takes_too_long_is_given_up(
    held: Guarded, model: GuardedModel, digits: Pools
) -> None:
    held._timeout = 0.2
    image = tied(model, digits)
    with pytest.raises(cm.BusyError, match=r"no answer within 0\.2 seconds"):
        asyncio.run(held.classify(image, "anna"))
    with pytest.raises(cm.BusyError, match=r"no answer within 0\.2 seconds"):
        held.classify_now(tied(model, digits, "bob"), "bob")
    assert held._engine.waiting == 1  # anna's is in the hands of the log


def test_files_that_take_too_long_to_read_are_given_up(
    guard: Guarded, digits: Pools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for them any more, and the files after the first are not read at all."""
    begun: list[bytes] = []
    let_go = threading.Event()

    def slow(file: bytes, shape: tuple[int, int, int], most: int) -> np.ndarray:
        begun.append(file)
        let_go.wait(30)
        return fitted(file, shape, most)

    key = add_client(tmp_path / "clients.json", "anna", None)
    guard._timeout = 0.2
    application = guard.asgi(clients=tmp_path / "clients.json")
    monkeypatch.setattr("countermark.service.tensors.fitted", slow)
    monkeypatch.setattr("countermark.service.http._QUICK", 1)
    files = [png(digits.test.x[0])] * 3
    data = [base64.b64encode(file).decode() for file in files]
    body = {"inputs": [{"name": "x", "shape": [3], "datatype": "BYTES", "data": data}]}
    headers = {"Authorization": f"Bearer {key}"}
    with served(application) as url:
        address = f"{url}/v2/models/model/infer"
        assert requests.post(address, json=body, headers=headers, timeout=20).status_code == 408
        with pytest.raises(cm.BusyError, match="no answer within"):
            guard.classify_now(files, "anna")
        threading.Timer(0.5, let_go.set).start()  # the loop's end waits for the thread
        with pytest.raises(cm.BusyError, match="no answer within"):
            asyncio.run(guard.classify(files, "anna"))
        assert guard._engine.waiting == 0
    time.sleep(0.2)
    assert len(begun) == 3
    guard._timeout = 10.0
    assert len(guard.classify_now(files, "anna")) == 3


def test_a_signature_that_cannot_be_checked_is_told(
    guard: Guarded,
    digits: Pools,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The client hears nothing of the log; standard error hears it once."""

    def unread(*_arguments: object) -> None:
        raise cm.CountermarkError("the query log cannot be read")

    monkeypatch.setattr("countermark.service.signing.Signing.request", unread)
    public = Ed25519PrivateKey.generate().public_key().public_bytes_raw().hex()
    key = add_client(tmp_path / "clients.json", "anna", public)
    with served(guard.asgi(clients=tmp_path / "clients.json")) as url:
        for _ in range(3):
            answer = infer(url, key, digits.test.x[0])
            assert (answer.status_code, "log" in answer.text) == (500, False)
    assert capsys.readouterr().err == "countermark: the query log cannot be read\n"


def test_the_end_refuses_what_it_cannot_answer(
    held: Guarded, model: GuardedModel, digits: Pools
) -> None:
    """Nobody waits for a guard that was closed, and the application answers 503."""
    with ThreadPoolExecutor(2) as threads:
        now = threads.submit(held.classify_now, tied(model, digits), "anna")
        later = threads.submit(
            lambda: asyncio.run(held.classify(tied(model, digits, "bob"), "bob"))
        )
        until(lambda: len(held._engine._open) == 2)
        held.close()
        for asked in (now, later):
            with pytest.raises(cm.BusyError, match="closed before the query was answered"):
                asked.result(10)
    held.close()
    with pytest.raises(cm.BusyError, match="closed"):
        held.classify_now(digits.test.x[0], "anna")
    with pytest.raises(cm.BusyError, match="closed"):
        asyncio.run(held.classify(digits.test.x[0], "anna"))
    assert not held._engine.ready()


def test_a_log_that_is_away_fails_trials_alone(
    guard: Guarded, model: GuardedModel, digits: Pools, log: str
) -> None:
    first = guard.classify_now(tied(model, digits), "anna")
    Path(log).rename(f"{log}.away")
    for _ in range(2):
        with pytest.raises(cm.CountermarkError, match="is gone"):
            guard.classify_now(tied(model, digits, "bob"), "bob")
        assert guard.classify_now(untied(model, digits), "anna")
        assert guard.classify_now(tied(model, digits), "anna") == first  # its trial is stored
    Path(f"{log}.away").rename(log)
    until(lambda: guard._engine.failed is None)
    assert guard.classify_now(tied(model, digits, "bob"), "bob")
    assert len(rows(log)) == 2


def test_a_trace_of_own_images_sends_nobody_elses(
    folder: Path, guard: Guarded, model: GuardedModel, digits: Pools, log: str
) -> None:
    """Anna asks the owner's images, and the same with a pixel changed, which are hers alone."""
    theirs = digits.training.x[:300].clone()
    theirs[:, 0, 0, 0] = 200
    for x in (digits.training.x[:300], theirs):
        guard.classify_now(list(x), "anna")
    own = {image.numpy().tobytes() for image in digits.training.x[:]}
    kept = rows(log)
    count = sum(row.image in own for row in kept)
    assert 0 < count < len(kept)
    seen: list[bytes] = []

    def copy(images: torch.Tensor) -> torch.Tensor:
        sent = (images * 255).round().to(torch.uint8)
        seen.extend(image.numpy().tobytes() for image in sent)
        return model(sent, "anna").labels

    clean = load_key(folder / "key").clean
    checked = {image.numpy().tobytes() for image in clean.x[:]} if clean else set()
    common: dict[str, Any] = {"key": folder / "key", "log": log, "own_images_only": True}
    found = cm.trace(copy, **common)
    assert found.left_out == len(kept) - count
    assert set(seen) <= own | checked
    (account,) = found.trace.accounts
    assert (account.agreements, account.neither) == (count, 0)
    shutil.copytree(folder / "key", Path(log).parent / "key")
    shutil.rmtree(Path(log).parent / "key" / "source")
    with pytest.raises(cm.CountermarkError):
        cm.trace(copy, **{**common, "key": Path(log).parent / "key"})
    with pytest.raises(cm.CountermarkError, match="--data goes with --own-images-only only"):
        cm.trace(copy, key=folder / "key", log=log, data="digits")


def test_a_renewed_log_stores_no_coins_of_before(
    guard: Guarded, model: GuardedModel, digits: Pools, log: str
) -> None:
    """A service that goes on after the log was renewed says so; started again, it has new coins."""
    before = guard.classify_now(tied(model, digits), "anna")
    assert cm.log_renew(log).rows == 1
    with pytest.raises(cm.CountermarkError, match="it was renewed"):
        guard.classify_now(tied(model, digits, "bob"), "bob")
    assert guard.classify_now(tied(model, digits), "anna") == before  # its trial is stored
    assert not guard._engine.stores()
    guard.close()
    x = digits.thief.x[:200]
    with QueryLog(log) as renewed, cm.Guarded(guard._folder, log=log) as again:
        expected = model.under(renewed.identity)(x, "bob").labels.tolist()
        assert [each.label for each in again.classify_now(list(x), "bob")] == expected
        assert expected != model(x, "bob").labels.tolist()
    assert {row.log for row in rows(log)} == {model.guard.log, renewed.identity}


def test_a_log_from_a_backup_is_known_by_a_published_head(
    folder: Path, model: GuardedModel, digits: Pools, log: str, tmp_path: Path
) -> None:
    with cm.Guarded(folder, log=log) as guard:
        guard.classify_now(tied(model, digits), "anna")
    shutil.copy(log, tmp_path / "backup.db")
    with cm.Guarded(folder, log=log) as guard:
        guard.classify_now(tied(model, digits, "bob"), "bob")
    (tmp_path / "head.json").write_text(json.dumps(vars(cm.log_head(log))))
    cm.Guarded(folder, log=log, head=tmp_path / "head.json").close()
    for suffix in ("-wal", "-shm"):
        Path(f"{log}{suffix}").unlink(missing_ok=True)
    shutil.copy(tmp_path / "backup.db", log)
    with pytest.raises(cm.CountermarkError, match="log renew"):
        cm.Guarded(folder, log=log, head=tmp_path / "head.json")


def test_a_database_that_took_over_without_the_last_rows_is_noticed_by_itself(
    folder: Path,
    loaded: GuardedModel,
    digits: Pools,
    postgres: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody asks meanwhile: the service looks at a log that others can put back."""
    import psycopg

    database = psycopg.connect(postgres, autocommit=True)
    database.execute("DROP TABLE IF EXISTS trials, log_format, erased, identities")
    monkeypatch.setattr("countermark.service.engine._WATCH", 0.05)
    with cm.Guarded(folder, log=postgres) as guard:
        with QueryLog(postgres) as made:
            model = loaded.under(made.identity)
        guard.classify_now(tied(model, digits), "anna")
        assert guard._engine.ready()
        database.execute("DELETE FROM trials")
        until(lambda: not guard._engine.ready())
        with pytest.raises(cm.CountermarkError, match="has lost rows"):
            guard.classify_now(tied(model, digits, "bob"), "bob")
    with pytest.raises(cm.CountermarkError, match="has lost rows"):
        cm.Guarded(folder, log=postgres)
    cm.log_renew(postgres)
    with QueryLog(postgres) as made, cm.Guarded(folder, log=postgres) as guard:
        image = tied(loaded.under(made.identity), digits)
        assert guard.classify_now(image, "anna")
        assert [row.log for row in rows(postgres)] == [made.identity]


def in_a_fork(work: Callable[[], object]) -> str:
    """What a function returns, or the reason of its error, in a fork of this process."""
    here, there = os.pipe()
    process = os.fork()
    if process == 0:  # no test of this process goes on here, whatever happens
        try:
            said = str(work())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        with contextlib.suppress(BaseException):
            os.write(there, said.encode())
        os._exit(0)
    os.close(there)
    with os.fdopen(here, "rb") as stream:
        found = stream.read().decode()
    assert os.waitpid(process, 0)[1] == 0
    return found


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_processes_that_are_forked_before_the_first_query_share_a_log(
    guard: Guarded, model: GuardedModel, digits: Pools, log: str
) -> None:
    """Later a fork has no threads and half a database, and says so; its end harms nothing."""
    x = list(digits.thief.x[:50])

    def child() -> list[int]:
        found = [each.label for each in guard.classify_now(x, "anna")]
        guard.close()
        return found

    expected = model(digits.thief.x[:50], "anna").labels.tolist()
    assert [in_a_fork(child) for _ in range(2)] == 2 * [str(expected)]
    assert [each.label for each in guard.classify_now(x, "anna")] == expected
    assert len(rows(log)) == len(cells(model, digits.thief.x[:50], "anna"))

    assert "make the guard after the fork" in in_a_fork(child)
    assert "make the guard after the fork" in in_a_fork(lambda: asyncio.run(guard.classify(x, "b")))
    assert in_a_fork(guard.close) == "None"
    assert in_a_fork(guard._engine.ready) == "False"
    assert guard.classify_now(x, "bob")
    assert {row.client for row in rows(log)} == {"anna", "bob"}


def test_a_guard_that_cannot_be_opened_says_why(
    owner: Path, folder: Path, log: str, tmp_path: Path
) -> None:
    for options, reason in (
        ({"model": tmp_path / "none"}, "is not a model folder"),
        ({"model": owner}, "has no guard"),
        ({"key": tmp_path / "none"}, "none"),
        ({"log": tmp_path}, "is not a file"),
        ({"log": "mysql://x/y"}, "query log"),
        ({"device": "gpu"}, "gpu"),
        ({"max_batch": 0}, "max_batch is a whole number from 1 to 4096, not 0"),
        ({"max_waiting": "many"}, "max_waiting is a whole number"),
        ({"timeout": 0}, "timeout is a positive number of seconds"),
        ({"timeout": "soon"}, "timeout is a positive number of seconds"),
    ):
        given = {"model": folder, "log": log, **options}
        with pytest.raises(cm.CountermarkError, match=reason):
            cm.Guarded(given.pop("model"), **given)  # type: ignore[arg-type]
    with cm.Guarded(folder, log=log) as guard:
        for clients, name, reason in (
            (None, "model", "clients.json"),
            (tmp_path / "none.json", "model", "none.json"),
            (tmp_path, "a/b", "letters, digits and underscores"),
        ):
            with pytest.raises(cm.CountermarkError, match=reason):
                guard.asgi(clients=clients, name=name)
        for most in (0, -1, 1.5, "1"):
            with pytest.raises(cm.CountermarkError, match="max_body is a whole number from 1"):
                guard.asgi(max_body=most)  # type: ignore[arg-type]


# Inside an application.


@contextlib.contextmanager
def served(application: Starlette) -> Iterator[str]:
    """The address of an application that a real server runs on loopback."""
    server = uvicorn.Server(uvicorn.Config(application, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


def infer(url: str, key: str, image: torch.Tensor) -> requests.Response:
    tensor = {"name": "image", "shape": [1, *image.shape], "datatype": "UINT8"}
    body = {"inputs": [{**tensor, "data": image.flatten().tolist()}]}
    headers = {"Authorization": f"Bearer {key}"}
    return requests.post(f"{url}/v2/models/model/infer", json=body, headers=headers, timeout=30)


def test_the_application_of_a_guard_outlives_its_server(
    guard: Guarded, tmp_path: Path, digits: Pools
) -> None:
    """Whoever made the guard closes it: a server that ends, or starts again, does not."""
    key = add_client(tmp_path / "clients.json", "anna", None)
    application = guard.asgi(clients=tmp_path / "clients.json")
    for _ in range(2):
        with served(application) as url:
            assert infer(url, key, digits.test.x[0]).ok
    assert guard.classify_now(digits.test.x[0], "anna")
    with served(application) as url:
        guard.close()
        answer = infer(url, key, digits.test.x[0])
        assert (answer.status_code, "closed" in answer.json()["error"]) == (503, True)
        assert requests.get(f"{url}/v2/health/ready", timeout=5).status_code == 503


def inside(application: Starlette) -> Starlette:
    """Another application around it, which runs no lifespan of what is mounted."""
    return Starlette(routes=[Mount("/oip", application)])


def test_a_mounted_application_follows_the_file_of_clients(
    guard: Guarded, tmp_path: Path, digits: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the program has changed its folder since."""
    monkeypatch.setattr("countermark.service.clients._FOLLOWING", 0.0)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "clients.json"
    keys = {name: cm.client_add(name, clients=path).api_key for name in ("anna", "bob")}
    with served(inside(guard.asgi(clients="clients.json"))) as url:

        def statuses() -> dict[str, int]:
            return {
                name: infer(f"{url}/oip", key, digits.test.x[0]).status_code
                for name, key in keys.items()
            }

        assert statuses() == {"anna": 200, "bob": 200}
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        keys["anna again"] = cm.client_rotate("anna", clients=path).api_key
        cm.client_revoke("bob", clients=path)
        keys["carol"] = cm.client_add("carol", clients=path).api_key
        assert statuses() == {"anna": 401, "bob": 401, "anna again": 200, "carol": 200}


def test_a_mounted_application_tells_whether_it_is_ready(
    folder: Path, guard: Guarded, digits: Pools, log: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From before the first query until after the end, model and log apart."""
    monkeypatch.setattr("countermark.service.engine._AGAIN", 0.05)
    key = cm.client_add("anna", clients=Path(log).with_name("clients.json")).api_key
    application = guard.asgi(clients=Path(log).with_name("clients.json"))
    network, fails = guard._engine._model, threading.Event()
    computes = type(network).__call__

    def moody(*arguments: object) -> object:
        if fails.is_set():
            raise RuntimeError("a device is lost")
        return computes(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(type(network), "__call__", moody)
    with served(inside(application)) as url:

        def tells(model: bool, log: bool) -> bool:
            answer = requests.get(f"{url}/oip/v2/health/ready", timeout=5)
            told = {"ready": model and log, "model": model, "log": log}
            assert answer.status_code == (200 if answer.json()["ready"] else 503)
            by_name = requests.get(f"{url}/oip/v2/models/model/ready", timeout=5)
            return answer.json() == by_name.json() == told

        assert tells(model=True, log=True)
        assert infer(f"{url}/oip", key, digits.test.x[0]).ok
        assert tells(model=True, log=True)
        fails.set()
        assert infer(f"{url}/oip", key, digits.test.x[0]).status_code == 500
        until(lambda: tells(model=False, log=True))
        Path(log).rename(f"{log}.away")
        assert tells(model=False, log=False)
        fails.clear()  # no query is needed for it to recover
        until(lambda: tells(model=True, log=False))
        Path(f"{log}.away").rename(log)
        assert tells(model=True, log=True)
        guard.close()
        assert tells(model=True, log=False)


def test_the_newcomers_service_runs_as_the_page_shows_it(
    folder: Path,
    model: GuardedModel,
    digits: Pools,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """FastAPI with a path of its own and the protocol's, mounted: one guard, one log."""
    pytest.importorskip("fastapi")
    page = (DOCS / "guard.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, flags=re.M | re.S)
    (source,) = [block for block in blocks if "FastAPI" in block]
    assert len(source.splitlines()) <= 30
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "mine")
    key = cm.client_add("anna", clients="mine/clients.json").api_key
    names: dict[str, object] = {}
    exec(compile(source, "service.py", "exec"), names)
    image = tied(model, digits)
    expected = int(model(image[None], "anna").labels)
    with served(names["app"]) as url:  # type: ignore[arg-type]

        def ask(body: bytes, **headers: str) -> requests.Response:
            return requests.post(f"{url}/classify", data=body, headers=headers, timeout=30)

        found = ask(png(image), key="key-of-anna")
        assert found.ok, found.text
        assert found.json() == {"label": expected, "name": describe(folder).class_names[expected]}
        assert ask(png(image), key="key-of-nobody").status_code == 401
        assert ask(png(image)).status_code in (401, 403)
        refused = ask(b"no image", key="key-of-anna")
        assert refused.status_code == 400
        assert "is not a PNG" in refused.text
        mounted = infer(f"{url}/oip", key, image)
        assert mounted.json()["outputs"][0]["data"] == [expected]
        assert infer(f"{url}/oip", "nobody", image).status_code == 401
        assert requests.get(f"{url}/oip/v2/nothing", timeout=5).status_code == 404
        guard: Guarded = names["guard"]  # type: ignore[assignment]
        assert [(row.client, row.answer) for row in rows("log.db")] == [("anna", expected)]
        Path("log.db").rename("away.db")
        refused = ask(png(tied(model, digits, "bob")), key="key-of-bob")
        assert (refused.status_code, refused.json()) == (503, {"detail": "try again later"})
        assert ask(png(untied(model, digits)), key="key-of-anna").ok
    with pytest.raises(cm.BusyError):  # the application's own end closed it
        guard.classify_now(image, "anna")


# In a server that has an environment of its own.

MLSERVER = Path(__file__).parents[1] / ".venv-mlserver" / "bin" / "mlserver"


@pytest.fixture
def mlserver(folder: Path, tmp_path: Path) -> Iterator[str]:
    """The address of the guarded model behind a real MLServer."""
    if not MLSERVER.exists():
        pytest.skip("MLServer is not installed beside PyTorch; make slow does it")
    ports = dict(zip(("http_port", "grpc_port", "metrics_port"), free_ports(3), strict=True))
    (tmp_path / "settings.json").write_text(
        json.dumps({"host": "127.0.0.1", "parallel_workers": 0, **ports})
    )
    extra = {"log": str(tmp_path / "log.db"), "client_header": "X-Client", "max_batch": 8}
    runtime = {
        "name": "mine",
        "implementation": "countermark.integrations.mlserver.GuardedRuntime",
        "parameters": {"uri": str(folder), "extra": extra},
    }
    (tmp_path / "model-settings.json").write_text(json.dumps(runtime))
    url = f"http://127.0.0.1:{ports['http_port']}/v2/models/mine"
    with (tmp_path / "server.log").open("w") as said:
        process = subprocess.Popen(
            [str(MLSERVER), "start", "."],
            cwd=tmp_path,
            stdout=said,
            stderr=said,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        try:
            wait_until_ready(url, process, tmp_path / "server.log")
            yield url
        finally:
            process.terminate()
            process.wait(30)


BATCHES = """
import asyncio, sys
from mlserver import ModelSettings
from countermark.integrations.mlserver import GuardedRuntime
extra = {"log": "log.db", "client_header": "x-client"}
settings = ModelSettings(
    name="mine", implementation=GuardedRuntime, parameters={"uri": sys.argv[1], "extra": extra},
    max_batch_size=8, max_batch_time=0.1,
)
asyncio.run(GuardedRuntime(settings).load())
"""


@pytest.mark.slow
def test_mlserver_may_not_mix_clients(folder: Path, tmp_path: Path) -> None:
    """Its batches have the headers of one client, to whom all their trials would be laid."""
    if not MLSERVER.exists():
        pytest.skip("MLServer is not installed beside PyTorch; make slow does it")
    command = [str(MLSERVER.with_name("python")), "-c", BATCHES, str(folder)]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert "gives the images of several clients one client's headers" in done.stderr
    assert not (tmp_path / "log.db").exists()


@pytest.mark.slow
def test_mlserver_answers_as_the_guard_does(
    mlserver: str, model: GuardedModel, digits: Pools, tmp_path: Path
) -> None:
    x = digits.thief.x[:40]
    expected = model(x, "anna").labels.tolist()
    files = [base64.b64encode(png(image)).decode() for image in x]

    def ask(kind: str, shape: list[int], data: object, **headers: str) -> requests.Response:
        tensor = {"name": "image", "datatype": kind, "shape": shape, "data": data}
        return requests.post(
            f"{mlserver}/infer", json={"inputs": [tensor]}, headers=headers, timeout=60
        )

    asked = {"x-client": "anna"}
    for kind, shape, data in (
        ("UINT8", list(x.shape), x.flatten().tolist()),
        ("FP32", list(x.shape), (x / 255).flatten().tolist()),
        ("BYTES", [len(x), 1], files),
    ):
        label, name = ask(kind, shape, data, **asked).json()["outputs"]
        assert (label["name"], label["data"]) == ("label", expected)
        assert (name["name"], name["data"]) == ("class", [str(each) for each in expected])
    for kind, shape, data, headers, status, reason in (
        ("UINT8", [1, 1, 8, 8], [0] * 64, {}, 401, "x-client does not say who asks"),
        ("UINT8", [1, 8, 8], [0] * 64, asked, 400, "pixels of the shape"),
        ("UINT8", [1, 1, 8, 8], [0] * 63, asked, 400, "cannot be read"),
        ("FP32", [1, 1, 8, 8], [7.0] * 64, asked, 400, "from 7 to 7"),
        ("BYTES", [1, 1], ["eHg="], asked, 400, "is not a PNG"),
    ):
        refused = ask(kind, shape, data, **headers)
        assert (refused.status_code, reason in refused.text) == (status, True), refused.text
    assert {(row.client, row.cell) for row in rows(str(tmp_path / "log.db"))} == cells(
        model, x, "anna"
    )
