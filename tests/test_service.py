"""The guarded service as its clients meet it: a real process on loopback.

The tests send honest and hostile requests, and kill and drain the service.
"""

import asyncio
import contextlib
import json
import os
import re
import select
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
import torch
from starlette.requests import Request

import countermark.service.engine as engine_module
from countermark.cli import main
from countermark.data import Pools
from countermark.errors import CountermarkError
from countermark.evaluation import predict
from countermark.files import read_json, write_json
from countermark.guard import GuardedModel, QueryLog, Row, RowError, guard_sha256, load_guarded
from countermark.networks import build, describe, load, save_model
from countermark.service.clients import (
    CLIENTS_FORMAT,
    Clients,
    add_client,
    revoke_client,
    rotate_client,
)
from countermark.service.engine import BusyError, Engine
from countermark.service.http import _body
from countermark.service.server import listen
from countermark.verbs.guard import guard
from warm import COLD, warm


@dataclass
class Running:
    """A service and its two clients."""

    process: subprocess.Popen[str]
    url: str
    folder: Path
    log: Path
    keys: dict[str, str]
    said: list[str] = field(default_factory=list)

    def infer(self, x: torch.Tensor, client: str = "anna", **changes: object) -> requests.Response:
        kind = "UINT8" if x.dtype == torch.uint8 else "FP32"
        tensor = {
            "name": "image",
            "shape": list(x.shape),
            "datatype": kind,
            "data": x.flatten().tolist(),
        }
        body = {"id": "7", "inputs": [{**tensor, **changes}]}
        headers = {"Authorization": f"Bearer {self.keys[client]}"}
        return requests.post(
            f"{self.url}/v2/models/model/infer", json=body, headers=headers, timeout=30
        )

    def labels(self, x: torch.Tensor, client: str = "anna", size: int = 32) -> list[int]:
        answers = [
            self.infer(part, client).json()["outputs"][0]["data"] for part in torch.split(x, size)
        ]
        return [label for part in answers for label in part]


Start = Callable[..., Running]


@pytest.fixture(scope="module")
def guarded_folder(owner: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The owner's model behind a dear guard, so that a small data set has many coins."""
    folder = tmp_path_factory.mktemp("guarded") / "model"
    shutil.copytree(owner, folder)
    guard(folder, cost=8.0)
    return folder


@pytest.fixture
def start(guarded_folder: Path, tmp_path: Path) -> Iterator[Start]:
    """Start services; each ends with the test."""
    running: list[Running] = []
    clients = tmp_path / "clients.json"
    keys = {name: add_client(clients, name, None) for name in ("anna", "bob")}

    def begin(
        *options: str,
        log: Path = tmp_path / "log.db",
        limit: str = "",
        command: list[str] | None = None,
        wait: bool = True,
        folder: Path = guarded_folder,
    ) -> Running:
        command = [
            *(command or (COLD if limit else warm())),
            "serve",
            "--model",
            str(folder),
        ]
        command += ["--port", "0", "--clients", str(clients), *options]
        command += [] if "--unguarded" in options else ["--log", str(log)]
        if limit:
            command = ["sh", "-c", f'ulimit {limit} && exec "$@"', "sh", *command]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert process.stderr is not None
        found, lines = None, list[str]()
        while found is None:
            lines.append(process.stderr.readline())
            assert lines[-1], lines
            found = re.search(r"listening on (http://[^\s\"]+)", lines[-1])
        service = Running(process, found[1], folder, log, keys)
        running.append(service)
        for _ in range(200 if wait else 0):
            try:
                if requests.get(f"{service.url}/v2/health/ready", timeout=5).ok:
                    break
            except requests.ConnectionError:
                time.sleep(0.05)
        return service

    yield begin
    for service in running:
        if service.process.poll() is None:
            service.process.kill()
        service.process.communicate()


def tied_and_untied(
    folder: Path, digits: Pools, count: int = 9
) -> tuple[torch.Tensor, torch.Tensor]:
    """An image whose answer a coin of anna's chooses, and others that meet no coin."""
    trials = load_guarded(folder, folder / "key")(digits.thief.x, "anna").trials
    rows = {trial.row for trial in trials}
    return digits.thief.x[trials[0].row][None], digits.thief.x[
        [row for row in range(len(digits.thief.x)) if row not in rows][:count]
    ]


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, object]]:
    status = main([*map(str, arguments), "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_the_service_answers_as_the_guard_does_and_logs_first_trials(
    start: Start, digits: Pools
) -> None:
    service = start()
    x = digits.thief.x
    log = QueryLog(str(service.log))
    model = load_guarded(service.folder, service.folder / "key").under(log.identity)
    expected = {client: model(x, client) for client in ("anna", "bob")}
    for client, answers in expected.items():
        assert service.labels(x, client, 32) == answers.labels.tolist()
    assert service.labels(x.float() / 255, "anna", 7) == expected["anna"].labels.tolist()
    assert expected["anna"].labels.tolist() != expected["bob"].labels.tolist()
    rows = [row for row in log.rows() if row is not None]
    for client, answers in expected.items():
        first = {trial.cell: trial for trial in reversed(answers.trials)}
        mine = [row for row in rows if row.client == client]
        assert {row.cell: (row.answer, row.chance, row.image) for row in mine} == {
            cell: (trial.answer, trial.chance, x[trial.row].numpy().tobytes())
            for cell, trial in first.items()
        }
    body = service.infer(x[:3]).json()
    assert (body["id"], body["model_name"], body["outputs"][0]["shape"]) == ("7", "model", [3])
    described = requests.get(f"{service.url}/v2/models/model", timeout=5).json()
    assert described["inputs"][0]["shape"] == [-1, 1, 8, 8]
    assert (
        described["parameters"]["model_sha256"]
        == read_json(service.folder / "model.json")["weights_sha256"]
    )
    metrics = requests.get(f"{service.url}/metrics", timeout=5).text
    assert 'countermark_requests_total{status="200"}' in metrics


def test_metrics_do_not_tell_which_queries_are_trials(start: Start, digits: Pools) -> None:
    service = start()
    tied, untied = tied_and_untied(service.folder, digits)

    def metrics() -> dict[str, float]:
        lines = requests.get(f"{service.url}/metrics", timeout=5).text.splitlines()
        return {
            line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
            for line in lines
            if not line.startswith("#")
        }

    changes = []
    for image in (untied[:1], tied, untied[1:2]):  # the first one makes the series of status 200
        before = metrics()
        assert service.infer(image).status_code == 200
        changes.append({name: value - before.get(name, 0.0) for name, value in metrics().items()})
    assert changes[1] == changes[2]
    assert changes[1]["countermark_images_total"] == 1
    assert sum(row is not None for row in QueryLog(str(service.log)).rows()) == 1


def test_answers_stay_the_same_after_a_restart(start: Start, digits: Pools) -> None:
    first = start()
    before = first.labels(digits.thief.x, "anna", 16)
    first.process.send_signal(signal.SIGTERM)
    assert first.process.wait(20) == 0
    again = start()
    assert again.labels(digits.thief.x, "anna", 3) == before
    assert len(list(QueryLog(str(again.log)).rows())) == len(
        {row.place for row in QueryLog(str(again.log)).rows() if row}
    )


def test_verify_and_trace_ask_the_service_itself(
    start: Start, digits: Pools, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The service is asked as a suspect.

    Its answers to bob carry bob's coins, and the bare service carries the model mark. Behind the
    guard the mark does not show: watermarks are no queries of honest clients.
    """
    bare = start("--unguarded")
    asked = [
        "--suspect",
        f"{bare.url}/v2/models/model",
        "--headers",
        f"Authorization: Bearer {bare.keys['bob']}",
    ]
    asked += [
        "--key",
        str(bare.folder / "key"),
        "--pixels",
        "uint8",
        "--replay",
        str(tmp_path / "r.jsonl"),
    ]
    status, verified = said(capsys, "verify", *asked)
    assert (status, verified["test"]["verdict"], verified["answers"]["unanswered"]) == (
        0,
        "match",
        0,
    )
    assert verified["answers"]["clean_accuracy"] > 80
    bare.process.terminate()
    assert bare.process.wait(20) == 0
    service = start()
    for client in ("anna", "bob"):
        service.labels(digits.training.x, client)
    as_bob = [
        "--suspect",
        f"{service.url}/v2/models/model",
        "--headers",
        f"Authorization: Bearer {service.keys['bob']}",
    ]
    status, traced = said(
        capsys, "trace", *as_bob, "--key", service.folder / "key", "--log", service.log
    )
    assert (status, traced["trace"]["named"]) == (0, ["bob"])
    status, traced = said(
        capsys,
        "trace",
        "--suspect",
        service.folder / "key/source",
        "--key",
        service.folder / "key",
        "--log",
        service.log,
    )
    assert (status, traced["trace"]["named"]) in ((1, []), (3, []))
    status, head = said(capsys, "log", "head", service.log)
    (tmp_path / "head.json").write_text(json.dumps(head))
    assert (
        said(capsys, "log", "check", service.log, "--head", tmp_path / "head.json")[1]["covered"]
        == head["rows"]
    )
    assert said(capsys, "log", "erase", service.log, "--client", "anna")[1]["rows"] > 0  # type: ignore[operator]
    status, traced = said(
        capsys,
        "trace",
        *as_bob,
        "--key",
        service.folder / "key",
        "--log",
        service.log,
        "--head",
        tmp_path / "head.json",
    )
    assert (status, traced["trace"]["named"]) == (0, ["bob"])
    assert [account["client"] for account in traced["trace"]["accounts"]] == ["bob"]  # type: ignore[attr-defined]


BAD = {
    "no JSON": (b"{", 400, "not valid JSON"),
    "deep JSON": (b"[" * 1500, 400, "not valid JSON"),
    "many lists": (b"[" * 20000, 400, "more values"),
    "many objects": (b'{"inputs": [' + b"{}," * 20000 + b"{}]}", 400, "more values"),
    "many values": ({"data": [0] * 20000}, 400, "more values"),
    "a list": (b"[]", 400, "list of one tensor"),
    "no input": (b'{"inputs": []}', 400, "list of one tensor"),
    "identity": (b'{"id": 3, "inputs": [{}]}', 400, "id is a string"),
    "half a character": (
        b'{"id": "\\ud800", "inputs": [{"shape": [1,1,8,8], "datatype": "UINT8", "data": ['
        + b"0," * 63
        + b"0]}]}",
        400,
        "id is a string",
    ),
    "datatype": ({"datatype": "INT64"}, 400, "datatype is one of"),
    "shape": ({"shape": [1, 8, 8]}, 400, r"shape is \[n, 1, 8, 8\]"),
    "fractional shape": ({"shape": [1.0, 1, 8, 8]}, 400, "shape is"),
    "three channels": ({"shape": [1, 3, 8, 8], "data": [0] * 192}, 400, r"shape is \[n, 1, 8, 8\]"),
    "four channels": ({"shape": [1, 4, 8, 8], "data": [0] * 256}, 400, r"shape is \[n, 1, 8, 8\]"),
    "no channel": ({"shape": [1, 0, 8, 8], "data": []}, 400, r"shape is \[n, 1, 8, 8\]"),
    "channels last": ({"shape": [1, 8, 8, 1]}, 400, r"shape is \[n, 1, 8, 8\]"),
    "no images": ({"shape": [0, 1, 8, 8], "data": []}, 400, "1 to 64 images"),
    "too many images": ({"shape": [65, 1, 8, 8]}, 400, "1 to 64 images"),
    "too little data": ({"data": [0] * 63}, 400, "numbers"),
    "words": ({"data": ["a"] * 64}, 400, "numbers"),
    "ragged": ({"data": [[0] * 63, [0]]}, 400, "numbers|tensor"),
    "truth": ({"data": [True] * 64}, 400, "numbers"),
    "some truth": ({"data": [0] * 63 + [True]}, 400, "numbers"),
    "one word": ({"data": [0] * 63 + ["0"]}, 400, "numbers"),
    "numbers among lists": ({"data": [[0] * 63, 0]}, 400, "numbers"),
    "lists of other lengths inside": ({"data": [[[0] * 8] * 7 + [[0] * 7, [0]]]}, 400, "numbers"),
    "a deep number": (
        b'{"inputs": [{"shape": [1,1,8,8], "datatype": "UINT8", "data": '
        + b"[" * 400
        + b"0"
        + b"]" * 403,
        400,
        "JSON|numbers",
    ),
    "a huge number": ({"data": [0] * 63 + [10**400]}, 400, "from 0 to 255"),
    "a huger number": (
        b'{"inputs": [{"shape": [1,1,8,8], "datatype": "FP32", "data": [' + b"9" * 9000 + b"]}]}",
        400,
        "not valid JSON",
    ),
    "nothing": ({"data": None}, 400, "numbers"),
    "too dark": ({"data": [-1] * 64}, 400, "from 0 to 255"),
    "too bright": ({"data": [256] * 64}, 400, "from 0 to 255"),
    "halves": ({"data": [0.5] * 64}, 400, "whole numbers"),
    "not a number": (
        b'{"inputs": [{"shape": [1,1,8,8], "datatype": "FP32", "data": [' + b"NaN," * 63 + b"0]}]}",
        400,
        "from 0 to 1",
    ),
    "pixels of FP32": ({"datatype": "FP32", "data": [1.01] * 64}, 400, "from 0 to 1"),
    "oversize": (b" " * 300_000, 413, "more than 200000 bytes"),
}


def test_bad_requests_get_a_reason_and_the_service_stays_up(start: Start, digits: Pools) -> None:
    service = start("--max-body", "200000")
    address, headers = (
        f"{service.url}/v2/models/model/infer",
        {"Authorization": f"Bearer {service.keys['anna']}"},
    )
    good = {"name": "image", "shape": [1, 1, 8, 8], "datatype": "UINT8", "data": [0] * 64}
    for name, (bad, status, reason) in BAD.items():
        body = bad if isinstance(bad, bytes) else json.dumps({"inputs": [{**good, **bad}]}).encode()  # type: ignore[dict-item]
        answer = requests.post(address, data=body, headers=headers, timeout=10)
        assert answer.status_code == status, (name, answer.text)
        assert re.search(reason, answer.json()["error"]), (name, answer.text)
    chunks = requests.post(address, data=iter([b" " * 100_000] * 3), headers=headers, timeout=10)
    assert chunks.status_code == 413
    for wrong in (
        {},
        {"Authorization": "Bearer nobody"},
        {"Authorization": f"Basic {service.keys['anna']}"},
    ):
        assert (
            requests.post(address, json={"inputs": [good]}, headers=wrong, timeout=10).status_code
            == 401
        )
    for path, status in (
        ("/v2/models/other", 404),
        ("/v2/models/model/versions/2/infer", 404),
        ("/x", 404),
        ("/v2/health/live", 200),
    ):
        verb = requests.post if path.endswith("infer") else requests.get
        assert verb(service.url + path, headers=headers, timeout=5).status_code == status, path
    assert requests.delete(f"{service.url}/v2/models/model", timeout=5).status_code == 405
    assert (
        requests.post(
            address, data=b"x", headers={**headers, "Content-Encoding": "gzip"}, timeout=5
        ).status_code
        == 415
    )
    assert service.labels(digits.test.x[:5]) is not None


def test_slow_clients_are_cut_off(start: Start, digits: Pools) -> None:
    """Each client sends a byte now and then forever, before or after it was answered.

    All of them are gone in a few seconds, and others are served.
    """
    service = start("--timeout", "1", "--max-waiting", "2")  # at most 8 connections
    signed = f"Host: x\r\nAuthorization: Bearer {service.keys['anna']}\r\n"
    address = "POST /v2/models/model/infer HTTP/1.1\r\n"
    cases = {
        "": b"",
        "half a line": b"",
        f"{address}Host: x\r\nX-A: b": b"",
        f"{address}{signed}Content-Length: 1000\r\n\r\n{{": b"408",
        f"{address}{signed}Content-Length: 99999999\r\n\r\n": b"413",
        f"{address}Host: x\r\nContent-Length: 1000\r\n\r\n": b"401",
        "POST /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3e8\r\n": b"404",
    }
    slow = [connected(service) for _ in cases]
    for connection, sent in zip(slow, cases, strict=True):
        connection.sendall(sent.encode())
    received = drip(slow)
    for answer, status in zip(received, cases.values(), strict=True):
        assert answer.startswith(b"HTTP/1.1 " + status if status else b""), answer
        assert bool(answer) == bool(status), answer
    assert service.infer(digits.test.x[:1]).status_code == 200
    silent, asked_too_much = connected(service), connected(service)  # the one GETs with a body
    asked_too_much.sendall(
        b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    )
    assert drip([asked_too_much])[0].startswith(b"HTTP/1.1 200")
    assert silent.recv(100) == b""
    assert "Traceback" not in ended(service)


def test_clients_who_do_not_read_are_cut_off(start: Start) -> None:
    service = start("--timeout", "1")
    deaf = connected(service)
    deaf.settimeout(1)
    begun, cut_off = time.monotonic(), False
    while not cut_off:
        assert time.monotonic() - begun < 60
        try:
            deaf.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 1000)
        except TimeoutError:
            continue
        except ConnectionError:
            cut_off = True
    assert "Traceback" not in ended(service)


def test_an_honest_client_may_send_its_body_after_the_answer(start: Start) -> None:
    service = start("--timeout", "2")
    late = connected(service)
    for _ in range(2):
        late.sendall(
            b"POST /v2/models/model/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"
        )
        answer = b""
        while not answer.endswith(b"}"):
            answer += late.recv(1000)
        assert answer.startswith(b"HTTP/1.1 401")
        late.sendall(b"123456789")


def test_broken_requests_make_no_traceback(start: Start, digits: Pools) -> None:
    service = start()
    signed = f"Host: x\r\nAuthorization: Bearer {service.keys['anna']}\r\n"
    for head in (signed, "Host: x\r\n"):
        for pause in (0, 0.2):
            for body in (
                "Content-Length: 1000\r\n\r\n{",
                "Transfer-Encoding: chunked\r\n\r\nzz\r\n",
            ):
                broken = connected(service)
                lines, _, rest = body.rpartition("\r\n\r\n")
                broken.sendall(
                    f"POST /v2/models/model/infer HTTP/1.1\r\n{head}{lines}\r\n\r\n".encode()
                )
                time.sleep(pause)
                with contextlib.suppress(ConnectionError):
                    broken.sendall(rest.encode())
                time.sleep(pause)
                broken.close()
    assert service.infer(digits.test.x[:1]).status_code == 200
    assert "Traceback" not in ended(service)


def connected(service: Running) -> socket.socket:
    host, port = service.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def drip(connections: list[socket.socket], seconds: float = 60) -> list[bytes]:
    """Send each connection a byte now and then until the service has closed them all.

    Return what the service answered on each connection.
    """
    received, is_open, begun = (
        [b""] * len(connections),
        set(range(len(connections))),
        time.monotonic(),
    )
    while is_open:
        assert time.monotonic() - begun < seconds, (is_open, received)
        for number in sorted(is_open):
            try:
                if select.select([connections[number]], [], [], 0)[0]:
                    more = connections[number].recv(10000)
                    received[number] += more
                    if not more:
                        is_open.remove(number)
                connections[number].sendall(b"x")
            except ConnectionError:
                is_open.discard(number)
        time.sleep(0.2)
    return received


STOPPING = "stopping: open requests are finished first\n"


def ended(service: Running) -> str:
    """Stop a service; what it said on standard error besides that it stops."""
    service.process.send_signal(signal.SIGTERM)
    _, errors = service.process.communicate(timeout=20)
    assert service.process.returncode == 0
    assert errors.count(STOPPING) == 1
    return errors.replace(STOPPING, "")


def test_a_kill_loses_no_answered_trial(start: Start, digits: Pools) -> None:
    service = start()
    answered: dict[str, list[int]] = {"anna": [], "bob": []}

    def load(client: str) -> None:
        for image in digits.training.x.unsqueeze(1):
            try:
                answered[client] += service.infer(image, client).json()["outputs"][0]["data"]
            except requests.RequestException:
                return

    threads = [threading.Thread(target=load, args=(client,)) for client in answered]
    for thread in threads:
        thread.start()
    while not all(len(labels) > 20 for labels in answered.values()):
        assert any(thread.is_alive() for thread in threads)
        time.sleep(0.02)
    service.process.kill()
    for thread in threads:
        thread.join()
    log = QueryLog(str(service.log))
    places = {row.place for row in log.rows() if row is not None}
    model = load_guarded(service.folder, service.folder / "key").under(log.identity)
    for client, labels in answered.items():
        assert len(labels) > 20
        expected = model(digits.training.x[: len(labels)], client)
        assert labels == expected.labels.tolist()
        digest = model.guard.settings.model_sha256
        assert {(digest, client, trial.cell) for trial in expected.trials} <= places


def test_open_requests_are_finished_before_the_end(start: Start, digits: Pools) -> None:
    service = start(command=COLD)
    answers: list[int] = []

    def ask() -> None:
        for image in torch.split(digits.training.x, 64):
            try:
                answers.append(service.infer(image).status_code)
            except requests.ConnectionError:
                return

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(20) == 0
    for thread in threads:
        thread.join()
    assert set(answers) <= {200, 503}
    assert "stopped" in (service.process.stdout.read() if service.process.stdout else "")


def test_the_unguarded_service_is_the_model_itself(start: Start, digits: Pools) -> None:
    service = start("--unguarded")
    assert service.labels(digits.test.x) == predict(load(service.folder), digits.test.x).tolist()
    assert not service.log.exists()


def test_while_the_log_is_away_only_queries_with_a_coin_fail(start: Start, digits: Pools) -> None:
    """The table of the log is gone, so that nobody is known.

    Clients learn nothing of the database, and the service recovers by itself.
    """
    service = start()
    tied, untied = tied_and_untied(service.folder, digits)
    rename(service.log, "trials", "away")

    def ready() -> int:
        return requests.get(f"{service.url}/v2/health/ready", timeout=5).status_code

    for _ in range(2):
        assert service.infer(untied).status_code == 200
        answer = service.infer(tied)
        assert (answer.status_code, answer.json()) == (
            500,
            {"error": "the query could not be answered; try again later"},
        )
        assert service.infer(untied).status_code == 200
        assert ready() == 503
    rename(service.log, "away", "trials")
    begun = time.monotonic()
    while ready() != 200:
        assert time.monotonic() - begun < 10
        time.sleep(0.1)
    assert service.infer(tied).status_code == 200
    assert len(list(QueryLog(str(service.log)).rows())) == 1
    errors = ended(service)
    assert (
        errors.count(
            f"countermark: the query log sqlite:///{service.log} cannot be used: no such table"
        )
        == 1
    )


@pytest.mark.parametrize("away", ["renamed", "removed"])
def test_a_log_whose_file_is_away_stores_nothing_and_says_so(
    start: Start, digits: Pools, away: str
) -> None:
    """Its file is removed while the service has it open: what is written there would be lost."""
    service = start()
    tied, untied = tied_and_untied(service.folder, digits)
    elsewhere = service.log.with_name("elsewhere.db")
    service.log.rename(elsewhere)
    if away == "removed":
        elsewhere.unlink()
    for _ in range(2):
        assert service.infer(tied).status_code == 500
        assert service.infer(untied).status_code == 200
        assert requests.get(f"{service.url}/v2/health/ready", timeout=5).status_code == 503
    if away == "renamed":
        elsewhere.rename(service.log)
        begun = time.monotonic()
        while service.infer(tied).status_code != 200:
            assert time.monotonic() - begun < 10
            time.sleep(0.1)
        assert requests.get(f"{service.url}/v2/health/ready", timeout=5).status_code == 200
        assert len(list(QueryLog(str(service.log), create=False).rows())) == 1
    errors = ended(service)
    assert errors.count(f"countermark: the query log {service.log} is gone") == 1


def rename(log: Path, table: str, to: str) -> None:
    with contextlib.closing(sqlite3.connect(log, timeout=30)) as database:
        database.execute(f"ALTER TABLE {table} RENAME TO {to}")
        database.commit()


class Broken:
    """A log on a disk that is full, until it is mended."""

    identity, shared = b"", False

    def __init__(self) -> None:
        self.full, self.rows = True, list[Row]()

    def check(self) -> None:
        pass

    def store(self, rows: list[Row], _requests: object) -> tuple[list[bool], list[str | None]]:
        if self.full:
            raise CountermarkError("no space left")
        fresh = [row.place not in {known.place for known in self.rows} for row in rows]
        self.rows += [row for row, new in zip(rows, fresh, strict=True) if new]
        return fresh, []


class Choosy(Broken):
    """A log that cannot store what one client asks."""

    def __init__(self) -> None:
        super().__init__()
        self.full = False

    def store(self, rows: list[Row], requests: object) -> tuple[list[bool], list[str | None]]:
        if any(row.client == "anna" for row in rows):
            raise RowError("no log can store this")
        return super().store(rows, requests)


def test_a_row_that_cannot_be_stored_fails_its_own_query_alone(
    guarded_folder: Path, digits: Pools
) -> None:
    model, log = load_guarded(guarded_folder, guarded_folder / "key"), Choosy()
    tied_of = {
        client: digits.thief.x[[model(digits.thief.x, client).trials[0].row]]
        for client in ("anna", "bob")
    }

    async def ask() -> None:
        engine = Engine(model, log, max_batch=64, max_waiting=8)  # type: ignore[arg-type]
        for _ in range(2):
            asked = [engine.answer(tied_of[client], client) for client in ("anna", "bob", "anna")]
            found = await asyncio.gather(*asked, return_exceptions=True)
            assert [type(one) for one in found] == [RowError, list, RowError]
            assert engine.failed is None
        engine.stop()

    asyncio.run(ask())
    assert [row.client for row in log.rows] == ["bob"]


def test_without_its_log_the_service_answers_nothing_that_a_coin_chose(
    guarded_folder: Path, digits: Pools
) -> None:
    model, log = load_guarded(guarded_folder, guarded_folder / "key"), Broken()
    tied, untied = tied_and_untied(guarded_folder, digits)

    async def ask() -> None:
        engine = Engine(model, log, max_batch=64, max_waiting=2)  # type: ignore[arg-type]
        with pytest.raises(CountermarkError, match="no space"):
            await engine.answer(tied, "anna")
        assert engine.failed == "no space left"
        together = await asyncio.gather(
            engine.answer(tied, "anna"), engine.answer(untied, "anna"), return_exceptions=True
        )
        assert isinstance(together[0], CountermarkError)
        assert together[1] == model(untied, "anna").labels.tolist()
        assert engine.waiting == 0
        busy = [asyncio.create_task(engine.answer(untied, "anna")) for _ in range(3)]
        results = await asyncio.gather(*busy, return_exceptions=True)
        assert sum(isinstance(result, BusyError) for result in results) == 1
        assert engine.failed == "no space left"  # a pass of the model does not mend the log
        log.full = False
        async with asyncio.timeout(60):
            while engine.failed:
                await asyncio.sleep(0.05)
        assert await engine.answer(tied, "anna") == model(tied, "anna").labels.tolist()
        assert len(log.rows) == engine.trials == 1
        engine.stop()

    asyncio.run(ask())
    with pytest.raises(CountermarkError, match="needs a query log"):
        Engine(model, None, 8, 2)


class Stuck(Broken):
    """A log whose database does not answer until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.full, self.asked, self.let_go = False, threading.Event(), threading.Event()

    def store(self, rows: list[Row], requests: object) -> tuple[list[bool], list[str | None]]:
        self.asked.set()
        self.let_go.wait(60)
        return super().store(rows, requests)


def test_queries_that_nobody_waits_for_wait_no_more(
    guarded_folder: Path, digits: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three clients give up while the log hangs.

    The log has begun to write the query of one; the others leave, and what they asked is never
    stored.
    """
    monkeypatch.setattr("countermark.service.engine._HANGS", 1000.0)
    model, log = load_guarded(guarded_folder, guarded_folder / "key"), Stuck()
    _, untied = tied_and_untied(guarded_folder, digits)
    tied_of = {
        client: digits.thief.x[[model(digits.thief.x, client).trials[0].row]]
        for client in ("anna", "bob", "carol")
    }

    async def ask() -> None:
        engine = Engine(model, log, max_batch=64, max_waiting=2)  # type: ignore[arg-type]
        for client in ("anna", "bob", "carol"):
            asked = asyncio.create_task(engine.answer(tied_of[client], client))
            while not (log.asked.is_set() if client == "anna" else engine._writing._queries):
                await asyncio.sleep(0.01)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
            assert engine.waiting == 1  # anna's
        assert len(await engine.answer(untied, "anna")) == len(untied)
        log.let_go.set()
        engine.stop()
        assert engine.waiting == 0
        assert {row.client for row in log.rows} == {"anna"}

    asyncio.run(ask())


class Slow(torch.nn.Module):
    """A network that notes how many images a pass has, and hangs until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes, self.let_go = list[int](), threading.Event()
        self.last = torch.nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(x))
        self.let_go.wait(20)
        return self.last(x.flatten(1))


def test_a_pass_has_no_more_images_than_it_may_and_none_that_nobody_waits_for(
    digits: Pools,
) -> None:
    network = Slow()
    x = digits.training.x

    async def ask() -> None:
        engine = Engine(network, None, max_batch=64, max_waiting=9)
        held = asyncio.create_task(engine.answer(x[:2], "anna"))
        while not network.sizes:
            await asyncio.sleep(0.01)
        left = [asyncio.create_task(engine.answer(x[:1], "anna")) for _ in range(8)]
        await asyncio.sleep(0)
        with pytest.raises(BusyError):
            await engine.answer(x[:1], "anna")
        for task in (held, *left):
            task.cancel()
        await asyncio.gather(held, *left, return_exceptions=True)
        assert network.sizes == [2]
        assert engine.waiting == 1  # it is in the network's hands
        sizes = [1, 63, 63, 1, 32, 32, 64, 10]
        asked = [asyncio.create_task(engine.answer(x[:size], "anna")) for size in sizes]
        await asyncio.sleep(0)
        asked[-1].cancel()
        await asyncio.sleep(0)
        assert engine.waiting == 8
        network.let_go.set()
        assert [len(labels) for labels in await asyncio.gather(*asked[:-1])] == sizes[:-1]
        engine.stop()
        assert network.sizes == [2, 64, 64, 64, 64]

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("options", "said_"),
    [
        (["--clients", "{none}"], "does not exist"),
        (["--clients", "{text}"], "not a file of clients|not valid JSON"),
        (["--model", "{owner}"], "has no guard"),
        (["--log", "mysql://x/y"], "query log"),
        (["--host", "192.0.2.1"], "cannot listen"),
        (["--port", "65536"], "0 to 65535"),
        (["--name", "a/b"], "letters, digits"),
        (["--max-batch", "0"], "max-batch"),
        (["--timeout", "0"], "positive"),
    ],
)
def test_bad_options_start_nothing(
    owner: Path,
    guarded_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    said_: str,
) -> None:
    (tmp_path / "text").write_text("{}\n")
    add_client(tmp_path / "clients.json", "anna", None)
    places = {"none": tmp_path / "none", "text": tmp_path / "text", "owner": owner}
    given = {
        "--model": str(guarded_folder),
        "--log": str(tmp_path / "log.db"),
        "--clients": str(tmp_path / "clients.json"),
        "--port": "0",
    }
    given |= {options[0]: options[1].format(**places)}
    assert main(["serve", *(word for pair in given.items() for word in pair)]) == 2
    assert re.search(said_, capsys.readouterr().err)


def test_the_file_of_clients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "clients.json"
    status, added = said(capsys, "client", "add", "anna", "--clients", path)
    assert status == 0
    assert str(added["api_key"]) not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    found = Clients(path).find(str(added["api_key"]))
    assert found is not None
    assert found.name == "anna"
    assert Clients(path).find("guess") is None
    for again in (["anna"], ["bob", "--public-key", "xyz"], [""], ["a\nb"]):
        assert main(["client", "add", *again, "--clients", str(path)]) == 2
    assert read_json(path)["clients"].keys() == {"anna"}


def test_clients_added_side_by_side_are_all_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, names = tmp_path / "clients.json", [f"client {k}" for k in range(8)]
    with ThreadPoolExecutor(8) as threads:
        keys = list(threads.map(lambda name: add_client(path, name, None), names))
    found = [Clients(path).find(key) for key in keys]
    assert [client and client.name for client in found] == names
    assert main(["client", "add", "anna", "--clients", str(path)]) == 0
    out, err = capsys.readouterr()
    assert Clients(path).find(out.strip())
    assert "knows anna within seconds" in err
    assert (
        main(["client", "add", "anna", "--clients", str(tmp_path / "none" / "clients.json")]) == 2
    )
    assert "cannot write" in capsys.readouterr().err


def test_the_guards_digest_is_in_the_commitment(
    guarded_folder: Path, owner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = (
        read_json(owner / "commitment.json"),
        read_json(guarded_folder / "commitment.json"),
    )
    assert "c3" not in before
    assert after["c3"]["guard_sha256"] == guard_sha256(read_json(guarded_folder / "guard.json"))
    assert (before["c1"], before["c2"], before["t2"]) == (
        after["c1"],
        after["c2"],
        after["t2"],
    )  # what was stamped stays as it is
    assert main(["guard", str(guarded_folder), "--cost", "8"]) == 0
    assert main(["serve", str(guarded_folder), "--log", str(tmp_path / "log.db")]) == 2
    assert "clients.json does not exist" in capsys.readouterr().err
    for wrong in (
        ["--cost", "0"],
        ["--bits", "65"],
        ["--key", str(tmp_path)],
        ["--key", str(tmp_path / "none")],
    ):
        assert main(["guard", "--model", str(guarded_folder), *wrong]) == 2
    capsys.readouterr()
    shutil.copytree(guarded_folder, tmp_path / "other")
    settings = read_json(tmp_path / "other" / "guard.json")
    wrong_settings = [
        ("slope", -1.0),
        ("offsets", []),
        ("features", 1.5),
        ("model_sha256", "x" * 64),
        ("reach", None),
    ]
    for name, value in [
        *wrong_settings,
        ("steps", 48),
        ("steps", 1),
        ("steps", 64.0),
        ("steps", True),
    ]:
        changed = {**settings, "settings": {**settings["settings"], name: value}}
        write_json(tmp_path / "other" / "guard.json", changed)
        with pytest.raises(CountermarkError, match=r"guard\.json lacks usable settings"):
            load_guarded(tmp_path / "other", tmp_path / "other" / "key")


# What a connection costs, and who gets one.


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_answers_do_not_wait_for_an_acknowledgement(host: str) -> None:
    """Nagle's algorithm holds the second part of an answer until the first is acknowledged."""

    async def accepted() -> int:
        found: asyncio.Queue[int] = asyncio.Queue()

        def note(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            found.put_nowait(
                writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            )
            writer.close()

        try:
            listening = listen(host, 0)
        except CountermarkError:
            pytest.skip(f"this machine has no {host}")
        async with await asyncio.start_server(note, sock=listening):
            _, writer = await asyncio.open_connection(host, listening.getsockname()[1])
            writer.close()
            return await asyncio.wait_for(found.get(), 10)

    assert asyncio.run(accepted())


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(),
    reason="the peak of a process's memory is read from /proc",
)
def test_a_request_takes_memory_of_the_order_of_its_body(start: Start, digits: Pools) -> None:
    """Hostile bodies must not take many times their own size in memory.

    An array of strings has room for the longest in every place; an object takes thirty times its
    text.
    """
    service = start(command=COLD)
    assert service.infer(digits.test.x[:64]).status_code == 200

    def peak() -> int:
        return (
            int(
                re.findall(
                    r"VmHWM:\s+(\d+)", Path(f"/proc/{service.process.pid}/status").read_text()
                )[0]
            )
            << 10
        )

    def tensor(data: str) -> str:
        return (
            '{"inputs": [{"name": "image", "shape": [64, 1, 8, 8], "datatype": "FP32", '
            f'"data": {data}}}]}}'
        )

    hostile = {
        "strings": tensor(f'["{"x" * 1747}"' + ', ""' * 200_000 + "]"),
        "a long string": tensor(f'["{"x" * 1_000_000}"' + ', ""' * 700_000 + "]"),
        "strings as many as pixels": tensor(f'["{"x" * 50_000}"' + ', ""' * 4095 + "]"),
        "wide characters": tensor(f'["{"x" * 4_000_000}\N{GRINNING FACE}"]'),
        "lists": tensor("[" + "[]," * 1_300_000 + "[]]"),
        "objects": tensor("[" + "{}," * 1_300_000 + "{}]"),
        "numbers": tensor("[" + "999," * 1_000_000 + "999]"),
        "long numbers": tensor("[" + ",".join(["9" * 1000] * 4000) + "]"),
    }
    before = peak()
    for name, body in hostile.items():
        headers = {"Authorization": f"Bearer {service.keys['anna']}"}
        answer = requests.post(
            f"{service.url}/v2/models/model/infer", data=body.encode(), headers=headers, timeout=30
        )
        assert answer.status_code == 400, (name, answer.text)
        assert peak() - before < 64 << 20, name
    assert "Traceback" not in ended(service)


@pytest.mark.parametrize(
    ("options", "limit"), [(("--max-waiting", "4"), ""), ((), "-n 256"), ((), "-Sn 256")]
)
def test_idle_connections_keep_nobody_out(
    start: Start, digits: Pools, options: tuple[str, ...], limit: str
) -> None:
    """They need no key. The one that waits longest makes room, and files never run out."""
    service = start("--timeout", "60", *options, limit=limit)
    with contextlib.ExitStack() as closing:
        for number in range(300):
            idle = closing.enter_context(connected(service))
            with contextlib.suppress(ConnectionError):
                idle.sendall(b"" if number % 2 else b"GET /v2 HTTP/1.1\r\nHo")
        with requests.Session() as session:
            for _ in range(20):
                address = f"{service.url}/v2/models/model"
                assert session.get(address, timeout=10).status_code == 200
                assert service.infer(digits.test.x[:1]).status_code == 200
    assert len(ended(service)) < 1000


def test_bodies_that_are_read_count_among_the_waiting(start: Start, digits: Pools) -> None:
    """Otherwise four times as many bodies could lie in memory."""
    service = start("--timeout", "60", "--max-waiting", "2")
    head = f"POST /v2/models/model/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {4 << 20}\r\n"
    head += f"Authorization: Bearer {service.keys['anna']}\r\nExpect: 100-continue\r\n\r\n"
    with contextlib.ExitStack() as closing:
        for _ in range(2):
            slow = closing.enter_context(connected(service))
            slow.sendall(head.encode())
            assert slow.recv(1000).startswith(b"HTTP/1.1 100")
        answer = service.infer(digits.test.x[:1], "bob")
        assert (answer.status_code, answer.json()["error"]) == (
            503,
            "the service is busy; try again later",
        )
        assert closing.enter_context(connected(service)).sendall(head.encode()) is None
        waiting = requests.get(f"{service.url}/metrics", timeout=5).text
        assert "countermark_waiting 2.0" in waiting
    while (answer := service.infer(digits.test.x[:1], "bob")).status_code != 200:
        assert answer.status_code == 503
        time.sleep(0.05)


def test_a_body_is_in_memory_once() -> None:
    """In one piece, and not in a second one that is a copy."""
    size = 32 << 20

    async def receive() -> dict[str, object]:
        sent.append(1 << 20)
        return {"type": "http.request", "body": bytes(1 << 20), "more_body": sum(sent) < size}

    async def read() -> tuple[int, int]:
        request = Request({"type": "http", "method": "POST", "headers": []}, receive)
        body = await _body(request, size)
        return len(body), tracemalloc.get_traced_memory()[1]

    sent: list[int] = []
    tracemalloc.start()
    try:
        found, most = asyncio.run(read())
    finally:
        tracemalloc.stop()
    assert found == size
    assert most < 1.5 * size


def test_a_new_connection_is_refused_where_all_others_are_being_answered(start: Start) -> None:
    service = start("--timeout", "60", "--max-waiting", "1")  # at most 4 connections
    head = (
        "POST /v2/models/model/signing HTTP/1.1\r\nHost: x\r\n"
        "Content-Length: 9\r\nExpect: 100-continue\r\n"
    )
    with contextlib.ExitStack() as closing:
        for _ in range(4):
            busy = closing.enter_context(connected(service))
            busy.sendall(f"{head}Authorization: Bearer {service.keys['anna']}\r\n\r\n".encode())
            assert busy.recv(1000).startswith(b"HTTP/1.1 100")
        assert whole(closing.enter_context(connected(service))).startswith(b"HTTP/1.1 503")
        busy.sendall(b"{broken} ")
        assert whole(busy, b"}").startswith(b"HTTP/1.1 400")
        assert exchange(
            service, b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        ).startswith(b"HTTP/1.1 200")


def whole(connection: socket.socket, end: bytes = b"") -> bytes:
    """What comes until the connection is closed, or until it ends so."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while more := connection.recv(10000):
            received += more
            if end and received.endswith(end):
                break
    return received


def exchange(service: Running, sent: bytes) -> bytes:
    """Send bytes on a connection of their own; what comes until it is closed."""
    with connected(service) as connection:
        connection.sendall(sent)
        return whole(connection)


# What a proxy in front may read otherwise.

INFER, HIDDEN = (
    b"POST /v2/models/model/infer HTTP/1.1\r\nHost: x\r\n",
    b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n",
)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
AMBIGUOUS = {
    "both lengths": INFER + b"Content-Length: 5\r\n" + CHUNKED + b"\r\n0\r\n\r\n",
    "both lengths, the other way": INFER + CHUNKED + b"content-length: 5\r\n\r\n0\r\n\r\n",
    "one length twice": INFER + b"Content-Length: 0\r\nContent-Length: 0\r\n\r\n",
    "one length twice in a line": INFER + b"Content-Length: 0, 0\r\n\r\n",
    "two lengths": INFER + b"Content-Length: 0\r\nContent-Length: 5\r\n\r\n",
    "a signed length": INFER + b"Content-Length: +0\r\n\r\n",
    "another coding": INFER + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "no coding": INFER + b"Transfer-Encoding: identity\r\n\r\n",
    "two codings": INFER + CHUNKED + CHUNKED + b"\r\n0\r\n\r\n",
    "a space before the colon": INFER + b"Content-Length : 0\r\n\r\n",
    "a folded line": INFER + b"X-A: b\r\n Content-Length: 5\r\nContent-Length: 0\r\n\r\n",
    "half an end of line": INFER + b"X-A: b\nContent-Length: 0\r\n\r\n",
    "half an end of a head": INFER + b"Content-Length: 0\n\n",
    "a control character": INFER + b"X-A: \x01\r\nContent-Length: 0\r\n\r\n",
    "a carriage return": INFER + b"X-A: a\rb\r\nContent-Length: 0\r\n\r\n",
    "chunks of HTTP/1.0": INFER.replace(b"1.1", b"1.0") + CHUNKED + b"\r\n0\r\n\r\n",
    "HTTP/1.7": INFER.replace(b"1.1", b"1.7") + b"Content-Length: 0\r\n\r\n",
    "HTTP/2.0": INFER.replace(b"1.1", b"2.0") + b"Content-Length: 0\r\n\r\n",
    "two hosts": INFER + b"Host: y\r\n\r\n",
    "no host": INFER.replace(b"Host: x\r\n", b"") + b"\r\n",
    "a whole address": b"GET http://y/v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n",
    "an asterisk": b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    "a tunnel": b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
}
BAD_CHUNKS = (
    b"0x5\r\nhello\r\n0\r\n\r\n",
    b"-1\r\n",
    b"5;\n\r\nhello\r\n0\r\n\r\n",
    b"5\nhello\n0\n\n",
    b"5\r\nhello!0\r\n\r\n",
)


def test_what_a_proxy_may_read_otherwise_is_refused(start: Start) -> None:
    """Each request is followed by one that only one of two readers would see.

    That second request is never answered.
    """
    service = start()
    for name, sent in AMBIGUOUS.items():
        received = exchange(service, sent + HIDDEN)
        assert received.startswith(b"HTTP/1.1 400"), (name, received)
        assert received.count(b"HTTP/1.1 ") == 1, (name, received)
    for chunks in (*BAD_CHUNKS, b"0\r\n\n", b"0\r\nX: y\n\n", b"0\r\n\r\n"):
        received = exchange(service, INFER + CHUNKED + b"\r\n" + chunks + HIDDEN)
        assert received.count(b"HTTP/1.1 ") == 1, (chunks, received)
    old = HIDDEN.replace(b"1.1", b"1.0").replace(b"Host: x", b"Connection: keep-alive")
    assert exchange(service, old + HIDDEN).count(b"HTTP/1.1 200") == 1
    plain = exchange(
        service,
        HIDDEN
        + INFER
        + b"Content-Length: 5\r\n\r\nhello"
        + HIDDEN[:-2]
        + b"Connection: close\r\n\r\n",
    )
    assert [answer[:3] for answer in plain.split(b"HTTP/1.1 ")[1:]] == [b"200", b"401", b"200"]
    assert ended(service).count("\n") == 0


def test_chunks_are_taken_and_end_the_connection(start: Start, digits: Pools) -> None:
    service = start()
    image = digits.test.x[:1]
    tensor = {
        "name": "image",
        "shape": list(image.shape),
        "datatype": "UINT8",
        "data": image.tolist(),
    }
    body = json.dumps({"inputs": [tensor]}).encode()
    parts = (body[k : k + 100] for k in range(0, len(body), 100))
    headers = {"Authorization": f"Bearer {service.keys['anna']}"}
    answer = requests.post(
        f"{service.url}/v2/models/model/infer", data=parts, headers=headers, timeout=10
    )
    assert answer.status_code == 200
    assert answer.headers["Connection"] == "close"
    assert answer.json()["outputs"][0]["data"] == service.labels(image)


def test_nobody_is_sent_elsewhere(start: Start) -> None:
    service = start()
    for path in ("/v2/", "/metrics/", "/v2/models/model/", "/v2/models/model/infer/", "//y/v2"):
        for verb in (requests.get, requests.post):
            answer = verb(
                service.url + path,
                headers={"Host": "elsewhere.example"},
                allow_redirects=False,
                timeout=5,
            )
            assert answer.status_code == 404, path
            assert "location" not in answer.headers


def test_a_body_is_json_as_it_is(start: Start, digits: Pools) -> None:
    service = start()
    address = f"{service.url}/v2/models/model/infer"
    tensor = {
        "name": "image",
        "shape": [1, 1, 8, 8],
        "datatype": "UINT8",
        "data": digits.test.x[0].tolist(),
    }
    cases = [
        ({"Content-Encoding": "identity"}, 200, ""),
        ({"Content-Encoding": ""}, 200, ""),
        ({"Content-Encoding": "gzip"}, 415, "without a content encoding"),
        ({"Content-Encoding": "identity, br"}, 415, "without a content encoding"),
        ({"Inference-Header-Content-Length": "9999"}, 400, "says 9999 bytes of JSON"),
    ]
    for headers, status, reason in cases:
        signed = {**headers, "Authorization": f"Bearer {service.keys['anna']}"}
        answer = requests.post(address, json={"inputs": [tensor]}, headers=signed, timeout=10)
        assert answer.status_code == status, (headers, answer.text)
        assert reason in answer.text


def test_an_attack_says_little_on_standard_error(start: Start) -> None:
    service = start()
    for sent in (
        b"\x16\x03\x01 no HTTP\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: upgrade, close\r\nUpgrade: websocket\r\n\r\n",
    ):
        for _ in range(100):
            exchange(service, sent)
    assert "\n" not in ended(service)


# A log that does not answer, and the end.


def test_a_log_that_another_program_holds_is_told_and_holds_nobody(
    start: Start, digits: Pools
) -> None:
    """The first trial waits for the lock in vain, the next ones not at all."""
    service = start("--drain", "1")
    tied, untied = tied_and_untied(service.folder, digits)

    def ready() -> int:
        return requests.get(f"{service.url}/v2/health/ready", timeout=5).status_code

    with contextlib.closing(sqlite3.connect(service.log, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        for _ in range(3):
            assert service.infer(tied).status_code == 500
            assert ready() == 503
            assert service.infer(untied).status_code == 200
        other.execute("ROLLBACK")
        begun = time.monotonic()
        while ready() != 200:
            assert time.monotonic() - begun < 20
            time.sleep(0.1)
        assert service.infer(tied).status_code == 200
        other.execute("BEGIN IMMEDIATE")
        begun = time.monotonic()
        lines = ended(service).splitlines()
        assert time.monotonic() - begun < 10
    *why, locked, again = lines
    assert "has locked it" in locked
    assert again == "countermark: the query log takes trials again"
    assert why in ([], ["countermark: the query log does not answer"])


HANGS = """
import sys, time
from countermark.cli import main
from countermark.guard import QueryLog
QueryLog.store = lambda self, rows, requests: time.sleep(3600)
QueryLog.close = lambda self: time.sleep(3600)
sys.exit(main())
"""


def test_a_log_that_hangs_does_not_hold_the_end(start: Start, digits: Pools) -> None:
    """Whatever the database does, the service ends with its drain, and who still waits is told."""
    service = start("--timeout", "60", "--drain", "1", command=[sys.executable, "-c", HANGS])
    tied, untied = tied_and_untied(service.folder, digits)
    with ThreadPoolExecutor(1) as threads:
        waits = threads.submit(service.infer, tied)
        begun = time.monotonic()
        while requests.get(f"{service.url}/v2/health/ready", timeout=5).status_code != 503:
            assert time.monotonic() - begun < 20
            time.sleep(0.1)
        assert service.infer(tied).status_code == 500  # at once
        assert service.infer(untied).status_code == 200
        service.process.send_signal(signal.SIGTERM)
        out, errors = service.process.communicate(timeout=10)
        assert waits.result().status_code == 503
    assert service.process.returncode == 0
    assert "stopped; 0 trials" in out
    assert errors == f"countermark: the query log does not answer\n{STOPPING}"


def test_cells_that_are_remembered_do_not_fill_the_memory(
    guarded_folder: Path, digits: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is forgotten is in the log, which stores no cell of a client twice."""
    model, log = load_guarded(guarded_folder, guarded_folder / "key"), Broken()
    log.full = False
    found = model(digits.thief.x, "anna").trials
    tied = digits.thief.x[[trial.row for trial in found]]
    cells = {trial.cell for trial in found}
    monkeypatch.setattr(engine_module, "_MOST_CELLS", 3)
    assert len(cells) > 3

    async def ask() -> None:
        engine = Engine(model, log, max_batch=64, max_waiting=8)  # type: ignore[arg-type]
        for image in [*tied, *tied]:
            for client in ("anna", "bob"):
                await engine.answer(image[None], client)
                assert sum(map(len, engine._seen.values())) <= 3
        engine.stop()
        assert engine.trials == len(log.rows) == len({row.place for row in log.rows})
        assert {row.cell for row in log.rows if row.client == "anna"} == cells

    asyncio.run(ask())


def test_standard_error_says_when_the_log_goes_and_when_it_is_back(
    guarded_folder: Path, digits: Pools, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not once a request; and while it is away no query waits for it."""
    model, log = load_guarded(guarded_folder, guarded_folder / "key"), Broken()
    tied = {client: tied_of(model, digits, client) for client in ("anna", "bob")}

    async def ask() -> None:
        engine = Engine(model, log, max_batch=64, max_waiting=8)  # type: ignore[arg-type]
        for client, image in tied.items():
            log.full = True
            for _ in range(3):
                with pytest.raises(CountermarkError, match="no space"):
                    await engine.answer(image, client)
            log.full = False
            async with asyncio.timeout(10):
                while engine.failed:
                    await asyncio.sleep(0.05)
            assert len(await engine.answer(image, client)) == 1
        engine.stop()
        assert not engine.hangs

    asyncio.run(ask())
    said_ = ["countermark: no space left", "countermark: the query log takes trials again"]
    assert capsys.readouterr().err.splitlines() == 2 * said_


def tied_of(model: GuardedModel, digits: Pools, client: str) -> torch.Tensor:
    """An image whose answer a coin of this client's chooses."""
    return digits.thief.x[[model(digits.thief.x, client).trials[0].row]]


def test_a_second_service_on_an_address_leaves_nothing_behind(
    start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service = start()
    options = {
        "--log": tmp_path / "other.db",
        "--clients": tmp_path / "clients.json",
        "--port": service.url.rpartition(":")[2],
    }
    assert (
        main(
            [
                "serve",
                str(service.folder),
                *(str(word) for pair in options.items() for word in pair),
            ]
        )
        == 2
    )
    assert re.fullmatch(
        r"countermark: cannot listen on 127\.0\.0\.1:\d+: .*; choose another --port or --host\n",
        capsys.readouterr().err,
    )
    assert not (tmp_path / "other.db").exists()


def test_a_stop_right_at_the_start_is_an_orderly_one(start: Start) -> None:
    """The line that says where it listens comes when a signal ends the service in order."""
    service = start(wait=False)
    assert ended(service) == ""


def test_one_image_of_the_models_size_is_no_body_too_large(
    start: Start, guarded_folder: Path, tmp_path: Path
) -> None:
    """A photograph of 300x300 in full precision is 5 MB of JSON, and 64 as bytes are 17 MB."""
    shape, folder = (3, 300, 300), tmp_path / "large"
    folder.mkdir()
    about = replace(describe(guarded_folder), network="narrow", shape=shape)
    save_model(folder, build("narrow", shape, 10, seed=0), about)
    service = start("--unguarded", folder=folder)
    x = torch.rand(4, *shape, dtype=torch.float64)
    assert service.infer(x[:1], datatype="FP64").json()["outputs"][0]["shape"] == [1]
    assert service.infer(x, datatype="FP64").status_code == 413


def test_too_few_files_are_told(start: Start) -> None:
    with pytest.raises(AssertionError, match=r"may open 100 files .*ulimit -n"):
        start(limit="-n 100")


@pytest.mark.parametrize(
    "account",
    [
        {"key_sha256": "0" * 64},
        {"key_sha256": 5, "public_key": None},
        {"key_sha256": "0" * 64, "public_key": None, "old_key_sha256": "0" * 64},
        {"key_sha256": None, "public_key": None, "old_key_sha256": "0" * 64, "old_until": 5},
        {"key_sha256": "0" * 64, "public_key": None, "old_key_sha256": "0", "old_until": 5},
        {"key_sha256": "0" * 64, "public_key": None, "old_key_sha256": "0" * 64, "old_until": 0.5},
        {"key_sha256": "0" * 64, "public_key": None, "old_key_sha256": "0" * 64, "old_until": -1},
        {
            "key_sha256": "0" * 64,
            "public_key": None,
            "old_key_sha256": "0" * 64,
            "old_until": 1 << 60,
        },
        {"key_sha256": "0" * 63, "public_key": None},
        {"key_sha256": "0" * 64, "public_key": 5},
        {"key_sha256": "0" * 64, "public_key": "X" * 64},
        [],
        "account",
    ],
)
def test_a_damaged_file_of_clients_is_told_at_the_start(tmp_path: Path, account: object) -> None:
    write_json(tmp_path / "clients.json", {"format": CLIENTS_FORMAT, "clients": {"anna": account}})
    with pytest.raises(CountermarkError, match=r"clients\.json: the account 'anna' .*backup"):
        Clients(tmp_path / "clients.json")


def test_a_file_of_clients_that_is_full_stays_readable(tmp_path: Path) -> None:
    path, account = tmp_path / "clients.json", {"key_sha256": "0" * 64, "public_key": "0" * 64}
    write_json(
        path, {"format": CLIENTS_FORMAT, "clients": {f"client {k}": account for k in range(5437)}}
    )
    with pytest.raises(CountermarkError, match="no room for more"):
        add_client(path, 50 * "\N{GRINNING FACE}", None)
    Clients(path)


BREAKS = """
import sys
from countermark.cli import main
from countermark.service.engine import Engine
async def answer(*arguments):
    raise RuntimeError("first line\\nsecond line")
Engine.answer = answer
sys.exit(main())
"""


def test_an_exception_in_the_code_is_told_once_and_in_one_line(start: Start, digits: Pools) -> None:
    service = start(command=[sys.executable, "-c", BREAKS])
    for _ in range(3):
        assert service.infer(digits.test.x[:1]).status_code == 500
    lines = ended(service).splitlines()
    assert len(lines) == 1
    assert re.search("RuntimeError: first line second line; set COUNTERMARK_TRACEBACK=1", lines[0])


def test_passes_of_the_model_that_fail_are_told_once(
    digits: Pools, capsys: pytest.CaptureFixture[str]
) -> None:
    async def ask() -> None:
        engine = Engine(torch.nn.Linear(3, 10), None, max_batch=64, max_waiting=8)
        for _ in range(3):
            with pytest.raises(CountermarkError):
                await engine.answer(digits.test.x[:1], "anna")
        engine.stop()

    asyncio.run(ask())
    assert len(capsys.readouterr().err.splitlines()) == 1


# What an operator does and sees.


def until(service: Running, client: str, status: int, image: torch.Tensor) -> None:
    """Ask until the service answers so, because it has seen a change of the file of clients."""
    begun = time.monotonic()
    while service.infer(image, client).status_code != status:
        assert time.monotonic() - begun < 20
        time.sleep(0.05)


def test_a_running_service_follows_the_file_of_clients_and_loses_no_request(
    start: Start, digits: Pools, tmp_path: Path
) -> None:
    """Keys come, change and go, and one file is damaged; whoever may ask is answered throughout."""
    service, path, image = start(), tmp_path / "clients.json", digits.test.x[:1]
    good, answers, over = path.read_bytes(), list[int](), threading.Event()

    def ask() -> None:
        while not over.is_set():
            answers.append(service.infer(image, "anna").status_code)

    body = json.dumps(
        {"inputs": [{"name": "i", "shape": [1, 1, 8, 8], "datatype": "UINT8", "data": [0] * 64}]}
    ).encode()
    head = INFER + f"Authorization: Bearer {service.keys['bob']}\r\n".encode()
    head += f"Content-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n".encode()
    asking = threading.Thread(target=ask)
    asking.start()
    with connected(service) as flying:
        flying.sendall(head)
        assert flying.recv(1000).startswith(b"HTTP/1.1 100")  # the service waits for the body
        revoke_client(path, "bob")
        service.keys["carol"] = add_client(path, "carol", None)
        until(service, "carol", 200, image)
        assert service.infer(image, "bob").status_code == 401
        flying.sendall(body)
        assert whole(flying, b"}").startswith(b"HTTP/1.1 200")
    service.keys["carol, new"] = rotate_client(path, "carol", grace=1.0)
    until(service, "carol, new", 200, image)
    assert service.infer(image, "carol").status_code == 200
    service.keys["carol, newer"] = rotate_client(path, "carol")
    until(service, "carol", 401, image)
    assert service.infer(image, "carol, newer").status_code == 200
    assert service.infer(image, "carol, new").status_code == 401
    path.write_bytes(good[:-9])
    assert service.process.stderr is not None
    while "not valid JSON" not in (line := service.process.stderr.readline()):
        assert re.fullmatch(r".*clients\.json has changed; 2 accounts may ask now\n", line)
    assert "the accounts stay as they were" in line
    for client, status in (("anna", 200), ("carol, newer", 200), ("bob", 401)):
        assert service.infer(image, client).status_code == status
    path.unlink()
    assert "does not exist" in service.process.stderr.readline()
    path.write_bytes(good)
    until(service, "bob", 200, image)
    assert service.infer(image, "carol, newer").status_code == 401
    over.set()
    asking.join()
    assert set(answers) == {200}
    assert ended(service) == f"{path} has changed; 2 accounts may ask now\n"


def test_a_request_is_one_line_for_the_operator_and_tells_no_trial(
    start: Start, digits: Pools, tmp_path: Path
) -> None:
    key = add_client(tmp_path / "clients.json", "anna b status=500", None)
    service = start("--access-log", "--log-format", "json")
    service.keys |= {"odd": key, "stranger": "guess"}
    tied, untied = tied_and_untied(service.folder, digits)
    for image in (untied[:1], tied, tied, untied[:2]):
        assert service.infer(image).status_code == 200
    for client, status in (("anna", 400), ("odd", 400), ("stranger", 401)):
        assert service.infer(untied[:3], client, datatype="INT64").status_code == status
    requests.get(f"{service.url}/v2/none", timeout=5)
    service.process.send_signal(signal.SIGTERM)
    _, errors = service.process.communicate(timeout=20)
    *lines, stop = map(json.loads, errors.splitlines())
    assert {line["event"] for line in lines} == {"request"}
    assert stop["event"] == "stop"
    for line in (*lines, stop):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", line.pop("time"))
    shown = [line.pop("message") for line in lines]
    assert [round(10 * line["seconds"], 6) % 1 for line in lines] == [0.0] * 6
    assert [shown[k].partition(" client=")[2] for k in (0, 5)] == ["anna", "anna b status=500"]
    for line in lines:
        del line["seconds"]
    one, trial, again, two, bad, odd = lines
    assert (
        one
        == trial
        == again
        == {"event": "request", "client": "anna"}
        | {
            "status": 200,
            "images": 1,
        }
    )
    assert (two["images"], bad["status"], odd["client"]) == (2, 400, "anna b status=500")


def test_without_json_a_request_is_one_line_of_text(start: Start, digits: Pools) -> None:
    service = start("--access-log", "--unguarded")
    assert service.infer(digits.test.x[:2]).status_code == 200
    pattern = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ status=200 images=2 seconds=\d+\.\d client=anna\n"
    assert re.fullmatch(pattern, ended(service))


class Moody(torch.nn.Module):
    """A network that fails on everything, or on all that is not blank."""

    def __init__(self) -> None:
        super().__init__()
        self.fails = ""
        self.last = torch.nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fails == "always" or (self.fails == "on images" and x.any()):
            raise RuntimeError(f"it fails {self.fails}")
        return self.last(x.flatten(1))


def test_a_model_that_fails_is_told_apart_from_queries_that_fail(
    digits: Pools, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is tried again without queries: a proxy sends none to a service that is not ready."""
    monkeypatch.setattr(engine_module, "_AGAIN", 0.05)
    monkeypatch.setattr(engine_module, "_QUIET", 0.0)
    network, image = Moody(), digits.test.x[:1]

    async def ask() -> None:
        engine = Engine(network, None, max_batch=64, max_waiting=8)
        for fails, ready in (("on images", True), ("always", False)):
            network.fails = fails
            for _ in range(2):  # the second one comes after the trial with a blank image
                with pytest.raises(CountermarkError, match=fails):
                    await engine.answer(image, "anna")
            assert (engine.ready(), engine.waiting) == (ready, 0)
        network.fails = ""
        async with asyncio.timeout(20):
            while not engine.ready():
                await asyncio.sleep(0.01)
        assert len(await engine.answer(image, "anna")) == 1
        engine.stop()

    asyncio.run(ask())
    said_ = capsys.readouterr().err
    assert said_.count("the model answers again") == 1
    assert said_.endswith("the model answers again\n")


def test_a_model_that_hangs_is_not_ready(digits: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "_STUCK", 0.05)
    network = Slow()

    async def ask() -> None:
        engine = Engine(network, None, max_batch=64, max_waiting=8)
        asked = asyncio.create_task(engine.answer(digits.test.x[:1], "anna"))
        async with asyncio.timeout(20):
            while engine.ready():
                await asyncio.sleep(0.01)
        network.let_go.set()
        assert len(await asked) == 1
        assert engine.ready()
        engine.stop()

    asyncio.run(ask())


FAILS = """
import sys
from countermark.cli import main
from countermark.service.engine import Engine
def fail(*arguments):
    raise RuntimeError("a device is lost")
Engine._pass = Engine._try = fail
sys.exit(main())
"""


def test_readiness_tells_the_model_and_the_log_apart(start: Start, digits: Pools) -> None:
    service = start(command=[sys.executable, "-c", FAILS])

    def tells(model: bool, log: bool) -> None:
        begun = time.monotonic()
        expected = {"ready": model and log, "model": model, "log": log}
        while True:
            answer = requests.get(f"{service.url}/v2/health/ready", timeout=5)
            assert answer.status_code == (200 if answer.json()["ready"] else 503)
            if answer.json() == expected:
                break
            assert time.monotonic() - begun < 20
            time.sleep(0.05)
        assert requests.get(f"{service.url}/v2/health/live", timeout=5).ok

    tells(model=True, log=True)
    assert service.infer(digits.test.x[:1]).status_code == 500
    tells(model=False, log=True)
    service.log.rename(service.log.with_name("away"))
    tells(model=False, log=False)
    assert ended(service).count("a device is lost") == 1


def test_a_clock_that_jumps_costs_no_trial_but_those_before_1970(
    guarded_folder: Path,
    digits: Pools,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The order of trials is that of their numbers; days may go backwards."""
    model = load_guarded(guarded_folder, guarded_folder / "key")
    _, untied = tied_and_untied(guarded_folder, digits)
    first = {trial.cell: trial.row for trial in reversed(model(digits.thief.x, "anna").trials)}
    images = [digits.thief.x[row][None] for row in first.values()]
    days = [20_000, 19_000, 0, -1, -1, 1 << 31, 20_001]
    assert len(images) > len(days)

    async def ask(log: QueryLog) -> None:
        engine = Engine(model, log, max_batch=64, max_waiting=8)
        for day, image in zip(days, images, strict=False):
            clock.time = lambda day=day: 86_400.0 * day + 5  # type: ignore[attr-defined]
            if 0 <= day < 1 << 31:
                assert len(await engine.answer(image, "anna")) == 1
            else:
                with pytest.raises(RowError, match="set the clock"):
                    await engine.answer(image, "anna")
            assert len(await engine.answer(untied, "anna")) == len(untied)
            assert engine.ready()
        for image in images[: len(days)]:  # a trial that was refused is stored when it comes again
            assert len(await engine.answer(image, "anna")) == 1
        engine.stop()

    clock = SimpleNamespace(monotonic=time.monotonic)
    monkeypatch.setattr(engine_module, "time", clock)
    with QueryLog(str(tmp_path / "log.db")) as log:
        asyncio.run(ask(log))
        stored = [row.day for row in log.rows() if row is not None]  # which checks the chain
    assert stored == [20_000, 19_000, 0, 20_001, 20_001, 20_001, 20_001]
    assert capsys.readouterr().err.count("\n") == 1
