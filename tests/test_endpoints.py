"""Suspects behind HTTP.

The tests use a peer that misbehaves in every way, and a real MLServer and a real Triton that serve
a stolen model.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch

from countermark.claims import suspect_identity
from countermark.claims.judgement import is_accused
from countermark.cli import main
from countermark.data import Pools
from countermark.errors import CountermarkError
from countermark.evaluation import predict
from countermark.files import sha256
from countermark.networks import load
from countermark.places import place_name
from countermark.session import Session
from countermark.suspects import Asking, Endpoint, as_taken, asker, open_suspect
from countermark.verbs.verify import VerifyConfig
from countermark.watermarks import load_key

SHAPE = (1, 8, 8)
Respond = Callable[[dict[str, Any], int], tuple[int, Any]]


class Peer:
    """An HTTP server whose answers a test writes.

    The test sets `respond(request, number) -> (status, body)`; status 0 drops the connection.
    """

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.respond: Respond = lambda _request, _number: (200, {})
        self.metadata = 200
        self.location = "http://127.0.0.1:1/"
        peer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                peer.paths.append(self.path)
                self.reply(
                    peer.metadata,
                    {"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [-1, 1, 8, 8]}]},
                )

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["content-length"])))
                peer.requests.append(request)
                peer.paths.append(self.path)
                peer.headers.append(dict(self.headers))
                self.reply(*peer.respond(request, len(peer.requests)))

            def reply(self, status: int, body: Any) -> None:
                if status == 0:
                    return
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Location", peer.location)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.root = f"http://127.0.0.1:{self.server.server_port}"
        self.url = f"{self.root}/v2/models/m"

    def sent(self) -> int:
        """Images that came, every time counted."""
        return sum(request["inputs"][0]["shape"][0] for request in self.requests)

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def peer() -> Iterator[Peer]:
    found = Peer()
    yield found
    found.stop()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("countermark.suspects.asker._FIRST_WAIT", 0.01)


def brightness(request: dict[str, Any], _number: int) -> tuple[int, Any]:
    """A model: label 1 for bright images, 0 for dark ones."""
    tensor = request["inputs"][0]
    x = np.array(tensor["data"], dtype=float).reshape(tensor["shape"])
    labels = (x.reshape(len(x), -1).mean(1) > 0.5).astype(int).tolist()
    return 200, {
        "outputs": [{"name": "label", "datatype": "INT64", "shape": [len(labels)], "data": labels}]
    }


def images(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.rand(count, *SHAPE, generator=generator)
        + torch.rand(count, 1, 1, 1, generator=generator)
        - 0.5
    ).clamp(0, 1)


def test_labels_of_an_endpoint(peer: Peer) -> None:
    peer.respond = brightness
    x = images(70)
    labels = open_suspect(peer.url, SHAPE, Asking(headers=(("Authorization", "Bearer k"),)))(x)
    assert torch.equal(labels, (x.flatten(1).mean(1) > 0.5).long())
    assert [len(request["inputs"][0]["data"]) for request in peer.requests] == [
        32 * 64,
        32 * 64,
        6 * 64,
    ]
    assert peer.requests[0]["inputs"][0]["name"] == "pixels"
    assert peer.headers[0]["Authorization"] == "Bearer k"


def test_scores_become_labels_and_nonsense_becomes_no_answer(peer: Peer) -> None:
    def scores(request: dict[str, Any], _number: int) -> tuple[int, Any]:
        count = request["inputs"][0]["shape"][0]
        rows = [[0.1, 0.7, 0.2], [None, 1, 2], [5.0, 1.0, 2.0]][:count]
        flat = [value if value is not None else 1e400 for row in rows for value in row]
        return 200, {"outputs": [{"shape": [count, 3], "data": flat}]}

    peer.respond = scores
    assert Endpoint(peer.url)(images(3)).tolist() == [1, -1, 0]


NONSENSE: dict[str, Any] = {
    "no JSON": b"<html>",
    "a list": [],
    "no outputs": {},
    "empty outputs": {"outputs": []},
    "words": {"outputs": [{"shape": [2], "data": ["a", "b"]}]},
    "more": {"outputs": [{"shape": [3], "data": [1, 1, 1]}]},
    "other shape": {"outputs": [{"shape": [99999999999], "data": [1, 2]}]},
    "halves": {"outputs": [{"shape": [2], "data": [0.5, 1.5]}]},
    "negative": {"outputs": [{"shape": [2], "data": [-3, -1]}]},
    "huge": {"outputs": [{"shape": [2], "data": [1e30, 1e40]}]},
    "deep": b"[" * 100_000,
    "endless": b" " * ((1 << 24) + 10),
}


@pytest.mark.parametrize("body", NONSENSE.values(), ids=NONSENSE.keys())
@pytest.mark.parametrize("kind", ["oip", "mlflow"])
def test_nonsense_is_no_answer(peer: Peer, body: Any, kind: str) -> None:
    """From a suspect that answered before; from one that never did it is an error."""
    sense = {"predictions": [1], "outputs": [{"shape": [1], "data": [1]}]}
    peer.respond = lambda _request, number: (200, sense if number == 1 else body)
    url = peer.url if kind == "oip" else f"{peer.root}/invocations"
    suspect = Endpoint(url)
    assert suspect(images(1, seed=1)).tolist() == [1]
    assert suspect(images(2)).tolist() == [-1, -1]
    assert suspect.refused == 2
    with pytest.raises(CountermarkError, match="answers nothing: 200"):
        Endpoint(url)(images(2))


def test_trouble_is_retried_and_a_redirect_is_not_followed(peer: Peer) -> None:
    peer.respond = lambda request, number: (
        (503, {}) if number == 1 else (429, {}) if number == 2 else brightness(request, number)
    )
    assert Endpoint(peer.url)(images(2)).min() >= 0
    assert len(peer.requests) == 3
    peer.respond = lambda request, number: brightness(request, number) if number == 4 else (302, {})
    suspect = Endpoint(peer.url)
    assert suspect(images(1)).min() >= 0
    assert suspect(images(1, seed=1)).tolist() == [-1]
    assert len(peer.requests) == 5


def test_one_refused_image_does_not_spoil_its_batch(peer: Peer) -> None:
    def picky(request: dict[str, Any], number: int) -> tuple[int, Any]:
        data = request["inputs"][0]["data"]
        return (
            (400, {"error": "no"})
            if 0.123 in [round(value, 3) for value in data]
            else brightness(request, number)
        )

    peer.respond = picky
    x = images(5)
    x[2, 0, 0, 0] = 0.123
    labels = Endpoint(peer.url)(x)
    assert [label >= 0 for label in labels.tolist()] == [True, True, False, True, True]


def test_answers_that_change_are_no_answers(peer: Peer) -> None:
    def fickle(request: dict[str, Any], number: int) -> tuple[int, Any]:
        count = request["inputs"][0]["shape"][0]
        return 200, {"outputs": [{"shape": [count], "data": [number % 2, *[7] * (count - 1)]}]}

    peer.respond = fickle
    suspect = Endpoint(peer.url, Asking(repeats=2))
    assert suspect(images(4)).tolist() == [-1, 7, 7, 7]
    assert (suspect.changed, suspect.asked) == (1, 8)


def test_a_budget_is_kept(peer: Peer) -> None:
    peer.respond = brightness
    labels = Endpoint(peer.url, Asking(budget=10, batch_size=4))(images(30))
    assert int((labels >= 0).sum()) == 10
    assert sum(request["inputs"][0]["shape"][0] for request in peer.requests) == 10


@pytest.mark.parametrize("status", [400, 503, 0])
@pytest.mark.parametrize("repeats", [1, 3])
def test_a_budget_counts_every_image_that_is_sent(peer: Peer, status: int, repeats: int) -> None:
    peer.respond = lambda _request, _number: (status, {})
    suspect = Endpoint(peer.url, Asking(budget=10, batch_size=4, repeats=repeats))
    with pytest.raises(CountermarkError):  # nothing was ever answered
        suspect(images(30))
    assert 0 < peer.sent() == suspect.asked <= 10
    assert suspect.changed == 0


def test_a_budget_that_ends_between_repeats_changes_no_answer(peer: Peer) -> None:
    peer.respond = lambda request, number: (
        (400, {}) if request["inputs"][0]["shape"][0] > 1 else brightness(request, number)
    )
    suspect = Endpoint(peer.url, Asking(budget=8, batch_size=4, repeats=2))
    assert suspect(images(4)).max() == -1
    assert (suspect.asked, suspect.changed) == (8, 0)


def test_a_rate_is_kept(peer: Peer) -> None:
    peer.respond = brightness
    begun = time.monotonic()
    Endpoint(peer.url, Asking(rate=20, batch_size=1))(images(6))
    assert time.monotonic() - begun > 5 / 20


def test_a_replay_log_goes_on_where_it_was(peer: Peer, tmp_path: Path) -> None:
    replay, x = tmp_path / "replay.jsonl", images(30)
    peer.respond = lambda request, number: brightness(request, number) if number < 3 else (500, {})
    asking = Asking(batch_size=10, retries=0, replay=replay)
    first = Endpoint(peer.url, asking)(x)
    assert int((first >= 0).sum()) == 20
    replay.write_text(replay.read_text() + '{"url": "cut off')
    peer.respond = brightness
    peer.requests.clear()
    second = Endpoint(peer.url, asking)(torch.cat((x, x[:5])))
    assert torch.equal(second[:30], (x.flatten(1).mean(1) > 0.5).long())
    assert torch.equal(second[30:], second[:5])
    assert sum(request["inputs"][0]["shape"][0] for request in peer.requests) == 10
    assert (
        Endpoint(f"{peer.root}/v2/models/other", asking)(x).tolist() == second[:30].tolist()
    )  # another model is asked anew
    assert sum(request["inputs"][0]["shape"][0] for request in peer.requests) == 40


@pytest.mark.parametrize(
    "other",
    [
        Asking(mean=(0.5,)),
        Asking(mean=(0.25,), std=(0.5,)),
        Asking(pixels="uint8"),
        Asking(layout="nhwc"),
        Asking(mean=(0.25,), repeats=2),
    ],
)
def test_a_replay_log_answers_only_what_was_asked_in_the_same_way(
    peer: Peer, tmp_path: Path, other: Asking
) -> None:
    replay, x = tmp_path / "replay.jsonl", images(6)
    peer.respond = lambda request, _number: (
        200,
        {"outputs": [{"shape": [6], "data": [len(peer.requests)] * 6}]},
    )
    asking = Asking(mean=(0.25,), replay=replay)
    assert Endpoint(peer.url, asking)(x).tolist() == [1] * 6
    peer.respond = brightness
    Endpoint(peer.url, dataclasses.replace(other, replay=replay))(x)
    assert peer.sent() == 6 + 6 * other.repeats
    assert Endpoint(peer.url, asking)(x).min() >= 0  # still known
    assert peer.sent() == 6 + 6 * other.repeats


def test_early_replay_logs_do_not_say_how_and_are_asked_anew(peer: Peer, tmp_path: Path) -> None:
    replay, x = tmp_path / "replay.jsonl", images(1)
    entry = {"url": peer.url, "image": sha256(x[0].numpy().tobytes()), "label": 5}
    replay.write_text(json.dumps(entry) + "\n")
    peer.respond = brightness
    assert Endpoint(peer.url, Asking(replay=replay))(x).tolist() != [5]
    assert peer.sent() == 1


# --- suspects that mean harm ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["oip", "oip without metadata", "mlflow"])
def test_a_connection_that_is_dropped_is_a_refusal(peer: Peer, tmp_path: Path, kind: str) -> None:
    """The first image and ten others are answered by hanging up; every other answer counts."""
    x = images(60)
    poisoned = [0, *range(20, 30)]
    x[poisoned, 0, 0, 0] = 0.123

    def picky(request: dict[str, Any], _number: int) -> tuple[int, Any]:
        tensor = request["inputs"] if kind == "mlflow" else request["inputs"][0]
        pixels = np.array(tensor if kind == "mlflow" else tensor["data"], dtype=float).reshape(
            -1, 64
        )
        if 0.123 in pixels[:, 0].round(3):
            return 0, None
        labels = (pixels.mean(1) > 0.5).astype(int).tolist()
        return 200, {"predictions": labels, "outputs": [{"shape": [len(labels)], "data": labels}]}

    peer.respond, peer.metadata = picky, 0 if kind == "oip without metadata" else 200
    suspect = Endpoint(
        f"{peer.root}/invocations" if kind == "mlflow" else peer.url,
        Asking(replay=tmp_path / "replay.jsonl"),
    )
    expected = (x.flatten(1).mean(1) > 0.5).long()
    expected[poisoned] = -1
    assert torch.equal(suspect(x), expected)
    assert suspect.refused == 11


def test_verify_judges_by_the_answers_that_a_hostile_suspect_gave(
    owner: Path, peer: Peer, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load(owner)

    def picky(request: dict[str, Any], _number: int) -> tuple[int, Any]:
        tensor = request["inputs"][0]
        x = torch.tensor(tensor["data"]).reshape(tensor["shape"])
        labels = predict(model, x).tolist()
        hang_up = len(x) > 1 or int(x.sum() * 1000) % 8 == 0
        return (
            (0, None) if hang_up else (200, {"outputs": [{"shape": [len(labels)], "data": labels}]})
        )

    peer.respond = picky
    assert main(["verify", "--suspect", peer.url, "--key", str(owner / "key"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["test"]["verdict"] == "match"
    assert 0 < found["answers"]["unanswered"] < found["test"]["trials"] / 3


def test_a_suspect_that_always_hangs_up_was_never_there(peer: Peer) -> None:
    peer.metadata, peer.respond = 0, lambda _request, _number: (0, None)
    with pytest.raises(CountermarkError, match="cannot be reached"):
        Endpoint(peer.url)(images(3))


@pytest.mark.parametrize("status", [0, 503])
def test_a_suspect_that_stays_silent_is_not_waited_for_every_time(
    peer: Peer, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("countermark.suspects.asker.time.sleep", waits.append)
    peer.respond = lambda request, number: (
        brightness(request, number) if number < 2 else (status, None)
    )
    labels = Endpoint(peer.url, Asking(batch_size=10))(images(200))
    assert int((labels >= 0).sum()) == 10
    assert len(waits) == 5 * 4  # five requests, with all their retries


def test_a_suspect_that_dies_is_left_and_what_it_said_is_kept(
    owner: Path, peer: Peer, tmp_path: Path
) -> None:
    replay, x = tmp_path / "replay.jsonl", images(200)

    def dies(request: dict[str, Any], number: int) -> tuple[int, Any]:
        if number == 3:
            peer.stop()
        return brightness(request, number)

    peer.respond = dies
    asking = Asking(batch_size=10, retries=1, replay=replay)
    begun = time.monotonic()
    for _ in range(2):  # and again when the command is run again
        with pytest.raises(
            CountermarkError,
            match=r"cannot be reached .* run the same command again to go on, or with --budget 1",
        ):
            Endpoint(peer.url, asking)(x)
        assert len(replay.read_text().splitlines()) == 30
    labels = Endpoint(peer.url, dataclasses.replace(asking, budget=1))(x)
    assert torch.equal(labels[:30], (x[:30].flatten(1).mean(1) > 0.5).long())
    assert labels[30:].max() == -1
    assert time.monotonic() - begun < 60


@pytest.fixture
def dripping() -> Iterator[Callable[[bytes], str]]:
    """A server that sends something at once, and then a byte now and then without end."""
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        begin = [b""]

        def drip(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                connection.recv(1 << 16)
                connection.sendall(begin[0])
                while not stop.wait(0.1):
                    connection.sendall(b"1")

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(
                        target=drip, args=(listening.accept()[0],), daemon=True
                    ).start()

        def start(data: bytes) -> str:
            begin[0] = data
            threading.Thread(target=serve, daemon=True).start()
            return f"http://127.0.0.1:{listening.getsockname()[1]}/invocations"

        yield start
        stop.set()


@pytest.mark.parametrize(
    "begin", [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n"]
)
def test_an_answer_that_drips_is_none(dripping: Callable[[bytes], str], begin: bytes) -> None:
    suspect = Endpoint(dripping(begin), Asking(timeout=0.5, retries=0))
    begun = time.monotonic()
    with pytest.raises(CountermarkError, match="cannot be reached"):
        suspect(images(1))
    assert time.monotonic() - begun < 30  # it would go on for ever


def test_one_that_hangs_from_the_start_is_not_retried_for_ever(
    dripping: Callable[[bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five requests, of which only the first is made more than once."""
    monkeypatch.setattr(asker, "_FIRST_WAIT", 0.01)
    suspect = Endpoint(dripping(b""), Asking(timeout=0.1))
    with pytest.raises(CountermarkError):
        suspect(images(8 * 32))
    assert suspect.asked == 32 * 5 + 4  # the batch is asked again image by image


def test_a_redirect_is_not_even_looked_at(peer: Peer, dripping: Callable[[bytes], str]) -> None:
    peer.respond, peer.location = lambda _request, _number: (302, {}), "http://["
    with pytest.raises(CountermarkError, match=r"302 Found, to http://\[;"):
        Endpoint(peer.url)(images(1))
    suspect = Endpoint(
        dripping(b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 9999\r\n\r\n"),
        Asking(timeout=9),
    )
    begun = time.monotonic()
    with pytest.raises(CountermarkError, match="302 Found, to /;"):
        suspect(images(1))
    assert time.monotonic() - begun < 30  # it would go on for ever


def test_mlflow_invocations(peer: Peer) -> None:
    def predictions(request: dict[str, Any], _number: int) -> tuple[int, Any]:
        return 200, {"predictions": [int(np.mean(image) > 0.5) for image in request["inputs"]]}

    peer.respond = predictions
    x = images(40)
    assert torch.equal(
        open_suspect(f"{peer.root}/invocations", SHAPE)(x), (x.flatten(1).mean(1) > 0.5).long()
    )


def test_declared_differences(peer: Peer) -> None:
    x = images(3)
    assert as_taken(x, Asking(pixels="uint8")).dtype == torch.uint8
    assert as_taken(x.expand(3, 3, 8, 8), Asking(layout="nhwc")).shape == (3, 8, 8, 3)
    normalised = as_taken(x, Asking(mean=(0.5,), std=(0.25,)))
    assert torch.allclose(normalised, (x - 0.5) / 0.25)
    for wrong in (
        Asking(pixels="bf16"),
        Asking(layout="hwc"),
        Asking(mean=(1.0, 2.0)),
        Asking(std=(0.0,)),
        Asking(pixels="uint8", mean=(0.5,)),
    ):
        with pytest.raises(CountermarkError):
            as_taken(x, wrong)
    peer.respond = brightness
    Endpoint(peer.url, Asking(pixels="uint8", layout="nhwc"))(x)
    assert (peer.requests[0]["inputs"][0]["datatype"], peer.requests[0]["inputs"][0]["shape"]) == (
        "UINT8",
        [3, 8, 8, 1],
    )


@pytest.mark.parametrize("url", ["http://host/predict?code=secret", "https://host/v2/"])
def test_addresses_that_tell_no_api(url: str) -> None:
    words = r"host/(predict|v2/?) does not tell what API it has; name it with --api"
    with pytest.raises(CountermarkError, match=words):
        open_suspect(url, SHAPE)


def test_nobody_there(owner: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert (
        main(
            [
                "verify",
                "--suspect",
                f"http://127.0.0.1:{port}/v2/models/m",
                "--key",
                str(owner / "key"),
                "--retries",
                "1",
            ]
        )
        == 2
    )
    assert "cannot be reached" in capsys.readouterr().err


def test_a_suspect_that_wants_other_images_is_doubted(
    owner: Path, digits: Pools, peer: Peer, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load(owner)

    def centred(request: dict[str, Any], _number: int) -> tuple[int, Any]:
        tensor = request["inputs"][0]
        x = (
            torch.tensor(tensor["data"]).reshape(tensor["shape"]) * -0.5 + 0.5
        )  # a copy behind a preprocessing of its own
        labels = predict(model, x.clamp(0, 1)).tolist()
        return 200, {"outputs": [{"shape": [len(labels)], "data": labels}]}

    peer.respond = centred
    main(["verify", "--suspect", peer.url, "--key", str(owner / "key")])
    assert "clean examples right" in " ".join(capsys.readouterr().out.split())
    assert (
        main(
            [
                "verify",
                "--suspect",
                peer.url,
                "--key",
                str(owner / "key"),
                "--mean",
                "1",
                "--std",
                "-2",
            ]
        )
        == 2
    )
    assert "positive deviation" in capsys.readouterr().err
    assert (
        main(["verify", "--suspect", str(owner), "--key", str(owner / "key"), "--layout", "nhwc"])
        == 2
    )
    capsys.readouterr()


def test_a_check_on_clean_examples_that_is_not_made_is_said(
    owner: Path,
    tmp_path: Path,
    peer: Peer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(owner / "key", tmp_path / "key")
    (tmp_path / "key" / "clean.safetensors").unlink()  # a key of 0.1.0 has none

    def asked(*more: str) -> str:
        main(["verify", "--suspect", peer.url, "--key", str(tmp_path / "key"), "--json", *more])
        found = json.loads(capsys.readouterr().out)
        unchecked = [
            doubt
            for doubt in found["doubts"]
            if doubt.startswith("It was not checked on clean examples")
        ]
        assert (found["answers"]["clean_accuracy"] is None) == bool(unchecked)
        return " ".join(unchecked)

    peer.respond = brightness
    assert asked() == ""
    assert "the budget was spent" in asked("--budget", "3")
    monkeypatch.setattr("countermark.verbs.asking.is_cached", lambda _data: False)
    assert "not in the cache; countermark data fetch digits" in asked()
    monkeypatch.setattr("countermark.verbs.asking.KNOWN", {})
    assert "not one that is known by name" in asked()


def test_a_suspect_that_is_gone_before_the_clean_examples_is_judged(
    owner: Path, peer: Peer, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = len(load_key(owner / "key").watermarks)

    def dies(request: dict[str, Any], number: int) -> tuple[int, Any]:
        if peer.sent() == trials:
            peer.stop()
        return brightness(request, number)

    peer.respond = dies
    assert main(
        ["verify", "--suspect", peer.url, "--key", str(owner / "key"), "--retries", "0"]
    ) in (1, 3)
    assert "cannot be reached" in " ".join(capsys.readouterr().out.split())


# --- addresses and answers as servers have them ---------------------------------------------------


@pytest.mark.parametrize(
    ("address", "posted"),
    [
        ("/v2/models/m", "/v2/models/m/infer"),
        ("/v2/models/m/", "/v2/models/m/infer"),
        ("/v2/models/m/infer", "/v2/models/m/infer"),
        ("/v2/models/m/versions/3/infer/", "/v2/models/m/versions/3/infer"),
        ("/v2/models/infer", "/v2/models/infer/infer"),
        ("/v2/models/m?code=a%2Fb&x=1", "/v2/models/m/infer?code=a%2Fb&x=1"),
        ("/v2/models/m/infer?code=1#top", "/v2/models/m/infer?code=1"),
        ("/serve/invocations?code=1", "/serve/invocations?code=1"),
    ],
)
def test_an_address_is_asked_at_the_right_place(peer: Peer, address: str, posted: str) -> None:
    peer.respond = lambda _request, _number: (
        200,
        {"predictions": [1], "outputs": [{"shape": [1], "data": [1]}]},
    )
    assert open_suspect(f"{peer.root}{address}", SHAPE)(images(1)).tolist() == [1]
    assert peer.paths[-1] == posted
    if posted.endswith("/infer?code=a%2Fb&x=1"):
        assert peer.paths[0] == "/v2/models/m?code=a%2Fb&x=1"  # the metadata want the code too


def test_an_address_with_and_without_infer_is_one_suspect(peer: Peer, tmp_path: Path) -> None:
    peer.respond = brightness
    asking = Asking(replay=tmp_path / "replay.jsonl")
    first = Endpoint(peer.url, asking)(images(3))
    assert torch.equal(Endpoint(f"{peer.url}/infer", asking)(images(3)), first)
    assert peer.sent() == 3


@pytest.mark.parametrize(
    "url",
    [
        "http:///v2/models/m",
        "http://h:99999999/v2/models/m",
        "http://[/v2/models/m",
        "http://h/v2/models/",
    ],
)
def test_addresses_of_nobody_are_refused_at_once(url: str) -> None:
    with pytest.raises(CountermarkError, match=r"tell what API|http\(s\)://HOST"):
        open_suspect(url, SHAPE)


@pytest.mark.parametrize(
    "url", ["HTTP://owner:secret@h/v2/models/m", "ftp://owner:secret@h/m", "http:///m?code=secret"]
)
def test_no_spelling_of_an_address_lets_a_secret_out(url: str) -> None:
    for refused in (lambda: open_suspect(url, SHAPE), lambda: suspect_identity(url)):
        with pytest.raises(CountermarkError) as caught:
            refused()
        assert "secret" not in str(caught.value)


def test_a_query_string_is_sent_and_kept_nowhere(peer: Peer, tmp_path: Path) -> None:
    peer.respond = brightness
    url = f"{peer.url}/infer?code=secret"
    suspect = Endpoint(url, Asking(replay=tmp_path / "replay.jsonl"))
    suspect(images(3))
    assert all(path.endswith("?code=secret") for path in peer.paths)
    kept = (tmp_path / "replay.jsonl").read_text() + suspect.name + place_name(url)
    assert "secret" not in kept + json.dumps(suspect_identity(url))
    assert suspect_identity(peer.url) == {"kind": "endpoint", "url": peer.url}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("?model=a", "?model=a", True),
        ("?model=a", "?model=b", False),
        ("?model=a", "", False),
        ("", "?model=b", False),
        ("", "", True),
    ],
)
def test_a_query_string_tells_models_at_one_address_apart(
    peer: Peer, tmp_path: Path, one: str, other: str, same: bool
) -> None:
    """What one of them answered is no answer of another, nor is a claim against one."""
    peer.respond = brightness
    asking = Asking(replay=tmp_path / "replay.jsonl")
    Endpoint(peer.url + one, asking)(images(3))
    asked = len(peer.requests)
    Endpoint(peer.url + other, asking)(images(3))
    assert (len(peer.requests) == asked) == same
    accused, identity = suspect_identity(peer.url + one), suspect_identity(peer.url + other)
    assert is_accused(accused, identity) == same
    assert is_accused({"kind": "endpoint", "url": peer.url + one}, identity) == same  # of 0.1.0


def test_headers_tell_models_at_one_address_apart_and_credentials_do_not(
    peer: Peer, tmp_path: Path
) -> None:
    peer.respond = brightness
    chosen = (("X-Target-Model", "a"), ("Authorization", "Bearer one"))
    asking = Asking(replay=tmp_path / "replay.jsonl", headers=chosen)
    Endpoint(peer.url, asking)(images(3))
    asked = len(peer.requests)
    renewed = (chosen[0], ("Authorization", "Bearer two"))
    Endpoint(peer.url, dataclasses.replace(asking, headers=renewed))(images(3))
    assert len(peer.requests) == asked
    other = (("X-Target-Model", "b"), chosen[1])
    Endpoint(peer.url, dataclasses.replace(asking, headers=other))(images(3))
    assert len(peer.requests) > asked


def test_a_credential_that_expires_stops_the_asking_and_keeps_the_answers(peer: Peer) -> None:
    peer.respond = lambda request, number: (
        brightness(request, number) if number == 1 else (401, {"error": "expired"})
    )
    suspect = Endpoint(peer.url, Asking(batch_size=4))
    labels = suspect(images(80))
    assert (labels != -1).sum() == 4
    assert len(peer.requests) == 1 + 5
    assert "401" in suspect.trouble


UNDERSTOOD: dict[str, Any] = {
    "strings": {"shape": [2], "data": ["3", "7"]},
    "a shape of strings": {"shape": ["2", "1"], "data": [3, 7]},
    "nested strings": {"shape": [2, 1], "data": [["3"], ["7"]]},
    "scores as strings": {"shape": [2, 8], "data": [*"00090000", *"00000009"]},
    "maps of one pixel": {
        "shape": [2, 8, 1, 1],
        "data": [0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9],
    },
    "a row each": {"shape": [2, 1, 8], "data": [0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9]},
}


@pytest.mark.parametrize("output", UNDERSTOOD.values(), ids=UNDERSTOOD.keys())
@pytest.mark.parametrize("kind", ["oip", "mlflow"])
def test_labels_are_read_as_servers_write_them(
    peer: Peer, output: dict[str, Any], kind: str
) -> None:
    nested = np.array(output["data"]).reshape([int(side) for side in output["shape"]]).tolist()
    peer.respond = lambda _request, _number: (200, {"outputs": [output], "predictions": nested})
    url = peer.url if kind == "oip" else f"{peer.root}/invocations"
    assert Endpoint(url)(images(2)).tolist() == [3, 7]


REFUSED_BY_NAME: dict[str, tuple[Any, str]] = {
    "class names": ({"shape": [1], "data": ["cat"]}, "class name, 'cat'"),
    "a map": ({"shape": [1, 2, 2], "data": [0] * 4}, r"shape \(1, 2, 2\) to 1 images"),
    "too many": ({"shape": [3], "data": [3, 3, 3]}, r"shape \(3,\) to 1 images"),
    "probabilities": ({"shape": [1, 1], "data": [0.25]}, "no label in it"),
    "an endless number": ({"shape": [1], "data": ["1" * 999]}, "class name"),
    "objects": ({"shape": [1], "data": [{"colour": "red"}]}, "neither labels nor scores"),
}


@pytest.mark.parametrize(("output", "words"), REFUSED_BY_NAME.values(), ids=REFUSED_BY_NAME.keys())
def test_answers_that_are_no_labels_are_refused_by_name(
    peer: Peer, output: Any, words: str
) -> None:
    peer.respond = lambda _request, _number: (200, {"outputs": [output]})
    with pytest.raises(CountermarkError, match=words):
        Endpoint(peer.url)(images(1))


# --- suspects that refuse everybody ---------------------------------------------------------------

_PAGE = (
    b"<html><head><style>p { color: red }</style></head><body><p>Please\n log in</p></body></html>"
)
REFUSALS: dict[str, tuple[int, Any, str, int]] = {
    "no credentials": (
        401,
        {"error": "no token"},
        r'401 Unauthorized \(\{"error": "no token"\}\).*--headers',
        1,
    ),
    "forbidden": (403, b"blocked\x1b[2J", r"403 Forbidden \(blocked\\x1b\[2J\).*--headers", 1),
    "no such model": (
        404,
        {"error": "no model m"},
        "404 Not Found .*no model m.*check the address",
        1,
    ),
    "moved": (301, {}, "301 Moved Permanently, to http://127.0.0.1:1/; .*give the address", 1),
    "a login page": (200, _PAGE, r"than JSON \(Please log in\); check the address", 1),
    "bad request": (400, {"error": "shape mismatch"}, "400 Bad Request .*shape mismatch", 5),
    "an error in a 200": (200, {"error": "model not ready"}, "model not ready", 5),
    "a crash": (500, {"error": "expected 3 channels"}, "500 .*expected 3 channels", 25),
    "long words": (400, b"x" * 100_000, r"400 Bad Request \(x{197}\.\.\.\);", 5),
}


@pytest.mark.parametrize(
    ("status", "body", "words", "most"), REFUSALS.values(), ids=REFUSALS.keys()
)
def test_a_suspect_that_refuses_everything_is_said_early(
    owner: Path,
    peer: Peer,
    capsys: pytest.CaptureFixture[str],
    status: int,
    body: Any,
    words: str,
    most: int,
) -> None:
    peer.respond = lambda _request, _number: (status, body)
    assert main(["verify", "--suspect", peer.url, "--key", str(owner / "key")]) == 2
    said = capsys.readouterr()
    assert re.search(words, said.err)
    assert len(said.err.splitlines()) == 1
    assert len(peer.requests) <= most
    assert said.out == ""


def test_a_batch_that_is_too_large_is_asked_image_by_image(peer: Peer) -> None:
    peer.respond = lambda request, number: (
        brightness(request, number) if request["inputs"][0]["shape"][0] == 1 else (413, {})
    )
    assert Endpoint(peer.url)(images(20)).min() >= 0


def test_a_suspect_that_blocks_half_way_is_judged_and_its_words_are_said(
    owner: Path, peer: Peer, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load(owner)

    def blocks(request: dict[str, Any], number: int) -> tuple[int, Any]:
        if number > 3:
            return 403, {"error": "too many questions"}
        tensor = request["inputs"][0]
        labels = predict(model, torch.tensor(tensor["data"]).reshape(tensor["shape"])).tolist()
        return 200, {"outputs": [{"shape": [len(labels)], "data": labels}]}

    peer.respond = blocks
    assert main(["verify", "--suspect", peer.url, "--key", str(owner / "key")]) == 0
    said = capsys.readouterr().out
    assert "64 trials got no answer" in said
    assert '403 Forbidden ({"error": "too many questions"})' in " ".join(said.split())


# --- what the environment may add, and what not ---------------------------------------------------


@pytest.fixture
def netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A password of the user's for every host."""
    (tmp_path / "netrc").write_text("default login me password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.mark.usefixtures("netrc")
def test_the_header_of_the_user_wins_and_no_password_goes_to_a_suspect(peer: Peer) -> None:
    peer.respond = brightness
    Endpoint(peer.url, Asking(headers=(("Authorization", "Bearer k"),)))(images(1))
    Endpoint(peer.url)(images(1))
    assert [headers.get("Authorization") for headers in peer.headers] == ["Bearer k", None]


def test_proxies_and_certificates_of_the_environment_count(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", peer.root)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/somewhere/roots.pem")
    peer.respond = brightness
    assert Endpoint("http://nowhere.invalid/v2/models/m")(images(2)).min() >= 0
    assert peer.paths[-1] == "http://nowhere.invalid/v2/models/m/infer"
    settings = Session().merge_environment_settings(
        "https://nowhere.invalid/", {}, True, None, None
    )
    assert settings["verify"] == "/somewhere/roots.pem"
    monkeypatch.setenv("NO_PROXY", "nowhere.invalid")
    with pytest.raises(CountermarkError, match="cannot be reached"):
        Endpoint("http://nowhere.invalid/v2/models/m", Asking(retries=0))(images(1))


@pytest.mark.parametrize("header", ["no colon", "a b: c", "X: a\nb", "X: \u20ac", ": x"])
def test_headers_that_cannot_be_sent_are_refused(header: str) -> None:
    with pytest.raises(CountermarkError, match="--headers"):
        VerifyConfig("http://h/invocations", key=Path("key"), headers=(header,))


# --- a real MLServer ------------------------------------------------------------------------------

_MLSERVER = Path(__file__).parents[1] / ".venv-peers" / "bin" / "mlserver"
_RUNTIME = """
import numpy as np
import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Stolen(MLModel):
    async def load(self) -> bool:
        self.session = onnxruntime.InferenceSession("stolen.onnx", \
providers=["CPUExecutionProvider"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        x = NumpyCodec.decode_input(payload.inputs[0]).astype(np.float32)
        logits = self.session.run(None, {self.session.get_inputs()[0].name: x})[0]
        output = NumpyCodec.encode_output(name="logits", payload=logits)
        return InferenceResponse(model_name=self.name, outputs=[output])
"""


def free_ports(count: int) -> list[int]:
    ports = []
    for _ in range(count):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    return ports


def export(model: torch.nn.Module, path: Path) -> None:
    torch.onnx.export(
        model,
        (torch.zeros(2, *SHAPE),),
        str(path),
        dynamo=False,
        dynamic_axes={"x": {0: "n"}},
        input_names=["x"],
    )


def wait_until_ready(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    for _ in range(1500):
        try:
            if requests.get(f"{url}/ready", timeout=5).ok:
                return
        except requests.RequestException:
            pass
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    raise AssertionError(log.read_text())


@pytest.fixture
def mlserver(owner: Path, tmp_path: Path) -> Iterator[str]:
    """The address of an MLServer that serves the owner's stolen weights."""
    if not _MLSERVER.exists():
        pytest.skip("MLServer is not installed; make test does it")
    ports = free_ports(3)
    export(load(owner), tmp_path / "stolen.onnx")
    (tmp_path / "runtime.py").write_text(_RUNTIME)
    (tmp_path / "model-settings.json").write_text(
        json.dumps({"name": "stolen", "implementation": "runtime.Stolen"})
    )
    settings = {
        "host": "127.0.0.1",
        "http_port": ports[0],
        "grpc_port": ports[1],
        "metrics_port": ports[2],
        "parallel_workers": 0,
    }
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    with (tmp_path / "server.log").open("w") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [str(_MLSERVER), "start", "."], cwd=tmp_path, stdout=log, stderr=log, env=environment
        )
        try:
            wait_until_ready(
                f"http://127.0.0.1:{ports[0]}/v2/models/stolen", process, tmp_path / "server.log"
            )
            yield f"http://127.0.0.1:{ports[0]}/v2/models/stolen"
        finally:
            process.terminate()
            process.wait(30)


@pytest.mark.filterwarnings("ignore")
def test_a_stolen_model_behind_mlserver_is_convicted(
    mlserver: str, owner: Path, digits: Pools, capsys: pytest.CaptureFixture[str]
) -> None:
    assert torch.equal(
        open_suspect(mlserver, SHAPE)(digits.test.x), predict(load(owner), digits.test.x)
    )
    assert main(["verify", "--suspect", mlserver, "--key", str(owner / "key"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["test"]["verdict"], found["answers"]["unanswered"]) == ("match", 0)
    assert found["answers"]["clean_accuracy"] > 80


# --- a real Triton --------------------------------------------------------------------------------

_TRITON = Path(__file__).parents[1] / ".venv-triton" / "bin" / "python"
_BINDING = """
import sys

import numpy as np
import onnxruntime
from pytriton.decorators import batch
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

session = onnxruntime.InferenceSession("stolen.onnx", providers=["CPUExecutionProvider"])


@batch
def infer(image):
    return {"label": session.run(None, {"x": image})[0].argmax(1).astype(np.int64)[:, None]}


ports = [int(word) for word in sys.argv[1:]]
with Triton(config=TritonConfig(http_port=ports[0], grpc_port=ports[1], metrics_port=ports[2], \
http_address="127.0.0.1")) as triton:
    image = Tensor(name="image", dtype=np.float32, shape=(1, 8, 8))
    label = Tensor(name="label", dtype=np.int64, shape=(1,))
    triton.bind("stolen", infer, inputs=[image], outputs=[label], \
config=ModelConfig(max_batch_size=64))
    triton.serve()
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_stolen_model_behind_triton_is_convicted(
    owner: Path, digits: Pools, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not _TRITON.exists():
        pytest.skip("Triton is not installed; make slow does it")
    export(load(owner), tmp_path / "stolen.onnx")
    (tmp_path / "serve.py").write_text(_BINDING)
    ports = free_ports(3)
    with (tmp_path / "server.log").open("w") as log:
        command = [str(_TRITON), "serve.py", *map(str, ports)]
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True
        )
        url = f"http://127.0.0.1:{ports[0]}/v2/models/stolen"
        try:
            wait_until_ready(url, process, tmp_path / "server.log")
            assert torch.equal(
                open_suspect(url, SHAPE)(digits.test.x), predict(load(owner), digits.test.x)
            )
            assert main(["verify", "--suspect", url, "--key", str(owner / "key"), "--json"]) == 0
            assert json.loads(capsys.readouterr().out)["test"]["verdict"] == "match"
        finally:
            os.killpg(process.pid, signal.SIGINT)  # Triton's own order to stop
            process.wait(60)
