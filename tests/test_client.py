"""The client, with real services on loopback and with one that misbehaves in every way."""

import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from PIL import Image

import countermark as cm
from countermark.data.images import fitted
from countermark.errors import CountermarkError
from countermark.evaluation import predict
from countermark.guard import QueryLog
from countermark.guard.requests import classes_sha256
from countermark.networks import load
from countermark.service.client import Classification
from countermark.verbs.guard import guard
from serving import Service, drawn, serving, untrained

SHAPE = (3, 32, 32)
NAMES = tuple("abcdefgh")
KEY = "a-key-that-nobody-may-see"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(tmp_path_factory.mktemp("untrained") / "model", SHAPE, NAMES)


@pytest.fixture(scope="module")
def service(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("served")
    with serving(model, folder, "--unguarded", "--max-batch", "5") as found:
        yield found


def classified(labels: list[int]) -> tuple[Classification, ...]:
    return tuple(Classification(label, NAMES[label]) for label in labels)


# Real services.


def test_images_of_all_kinds_are_classified_in_their_order(
    service: Service, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COUNTERMARK_API_KEY", f"{service.key}\n")
    x = drawn(12, SHAPE)
    stream = io.BytesIO()
    Image.fromarray(drawn(1, (3, 80, 60))[0].permute(1, 2, 0).numpy()).save(stream, "JPEG")
    (tmp_path / "cat.jpg").write_bytes(stream.getvalue())
    photograph = torch.from_numpy(fitted(stream.getvalue(), SHAPE).copy())
    given: list[Any] = [
        *x[:6],
        str(tmp_path / "cat.jpg"),
        tmp_path / "cat.jpg",
        stream.getvalue(),
        *(x[6:9].float() / 255),
        *(x[9:].permute(0, 2, 3, 1).numpy()),
    ]
    wanted = torch.cat([x[:6], photograph.expand(3, *SHAPE), x[6:]])
    labels = predict(load(model), wanted).tolist()
    assert len(set(labels)) > 2
    with cm.Client(service.url) as client:
        assert client.classify(given) == classified(labels)
        assert client.classify(iter(given)) == classified(labels)
        assert client.classify(x) == classified(predict(load(model), x).tolist())
        assert client.classify([]) == ()
        assert service.key not in repr(client)


def test_a_client_who_signs_is_believed_and_another_is_not(
    digits: Any, tmp_path: Path, owner: Path
) -> None:
    """A private key comes from a file, from its content, or as its 32 bytes."""
    folder, private = tmp_path / "model", Ed25519PrivateKey.generate()
    shutil.copytree(owner, folder)
    guard(folder, cost=8.0)
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "anna.pem").write_bytes(pem)
    public = private.public_key().public_bytes_raw().hex()
    x = digits.thief.x[:6]
    with serving(folder, tmp_path, public=public) as service:
        state = tmp_path / "state"
        given: list[Any] = [tmp_path / "anna.pem", pem, private.private_bytes_raw()]
        for sign, part in zip(given, torch.split(x, 2), strict=True):
            with cm.Client(service.url, service.key, sign=sign, state=state) as client:
                client.classify(part.float() / 255)
        other = Ed25519PrivateKey.generate().private_bytes_raw()
        more = tmp_path / "other"
        for options, reason in (
            ({}, r"401 .*signs its requests.*; check .*sign="),
            ({"sign": other, "state": more}, "signed requests with another state"),
        ):
            with (
                cm.Client(service.url, service.key, **options) as client,
                pytest.raises(CountermarkError, match=reason),
            ):
                client.classify(x[:1])
        with QueryLog(str(tmp_path / "log.db")) as log:
            (opening,) = log.openings("anna")
            asked = b"".join(each.images for each in log.requests(opening))
    assert opening.client == public
    assert asked == x.numpy().tobytes()


def test_what_is_wrong_is_said_without_the_api_key(service: Service, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    bad: list[tuple[Any, str]] = [
        (["nowhere.jpg"], r"nowhere\.jpg: No such file"),
        ([tmp_path / "text.png"], r"text\.png: is not a PNG"),
        ([b"GIF89a"], "image 0: is not a PNG"),
        ([*drawn(7, SHAPE), np.zeros((3, 8, 8))], r"image 7 has the shape \(3, 8, 8\)"),
        ([np.full(SHAPE, 7.0)], "image 0: holds floating-point values from 7 to 7"),
        ([None], "image 0: holds values of type object"),
        ("cat.jpg", r"a list of images, also of one: \[image\]"),
        (tmp_path / "cat.jpg", "a list of images"),
    ]
    with cm.Client(service.url, service.key) as client:
        for images, reason in bad:
            with pytest.raises(CountermarkError, match=reason):
                client.classify(images)
    x = drawn(1, SHAPE)
    asked = [
        (
            service.url,
            "nobody",
            r"answered 401 \(unknown client.*; check key= or COUNTERMARK_API_KEY",
        ),
        (f"{service.url}s", service.key, "answered 404 .*; check the address"),
        (f"{service.url}/versions/2", service.key, "answered 404"),
        (
            "http://127.0.0.1:9/v2/models/m",
            service.key,
            r"gave no answer \(ConnectionError\); check",
        ),
    ]
    for url, key, reason in asked:
        with cm.Client(url, key) as client, pytest.raises(CountermarkError, match=reason) as found:
            client.classify(x)
        assert key not in str(found.value)


def test_bad_arguments_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    url = "http://h/v2/models/m"
    monkeypatch.delenv("COUNTERMARK_API_KEY", raising=False)
    with pytest.raises(CountermarkError, match=r"key=\.\.\., or in COUNTERMARK_API_KEY"):
        cm.Client(url)
    for key in ("", " ", "two words", "a\nb", "schlüssel", 7):
        with pytest.raises(CountermarkError, match="the API key is a word") as found:
            cm.Client(url, key)  # type: ignore[arg-type]
        assert "schl" not in str(found.value)
    for place in ("http://h/invocations", "h/v2/models/m", "http://h"):
        with pytest.raises(CountermarkError, match=r"/v2/models/NAME|http\(s\)://HOST"):
            cm.Client(place, KEY)
    for timeout in (0, -1, float("inf"), float("nan"), None):
        with pytest.raises(CountermarkError, match="positive number of seconds"):
            cm.Client(url, KEY, timeout=timeout)  # type: ignore[arg-type]
    other = ec.generate_private_key(ec.SECP256R1())
    mine = Ed25519PrivateKey.generate()
    keys = [
        other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        mine.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"x")),
        bytes(31),
        b"",
    ]
    for sign in keys:
        with pytest.raises(CountermarkError, match="sign is an Ed25519 private key"):
            cm.Client(url, KEY, sign=sign, state=tmp_path / "state")
    with pytest.raises(CountermarkError, match=r"cannot read .*none: No such file"):
        cm.Client(url, KEY, sign=tmp_path / "none", state=tmp_path / "state")


# One that misbehaves.

ABOUT = {
    "inputs": [{"name": "image", "shape": [-1, *SHAPE]}],
    "parameters": {"model_sha256": "00" * 32, "max_batch": 8, "max_body": 1 << 20},
}
Reply = tuple[int, dict[str, str], Any]


class Peer:
    """A service whose answers to infer a test writes; it notes how many images each request had."""

    def __init__(self, respond: Callable[[int, int], Reply], about: Any = ABOUT) -> None:
        self.sizes: list[int] = []
        peer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.reply(200, {}, about)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                text = body[: int(self.headers["Inference-Header-Content-Length"])]
                peer.sizes.append(json.loads(text)["inputs"][0]["shape"][0])
                self.reply(*respond(peer.sizes[-1], len(peer.sizes)))

            def reply(self, status: int, headers: dict[str, str], value: Any) -> None:
                if status == 0:
                    self.close_connection = True
                    return
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                for name, said in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, said)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self.server.serve_forever, args=[0.01], daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v2/models/m"

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def well(count: int) -> Reply:
    outputs = [{"name": "label", "data": [1] * count}, {"name": "class", "data": ["b"] * count}]
    return 200, {}, {"outputs": outputs}


def test_a_request_that_is_too_large_is_split() -> None:
    """A proxy takes less than the service says that it takes."""

    def proxy(count: int, _number: int) -> Reply:
        return well(count) if count <= 3 else (413, {}, b"<html>too large</html>")

    with Peer(proxy) as peer, cm.Client(peer.url, KEY) as client:
        assert client.classify(drawn(9, SHAPE)) == classified([1] * 9)
        assert peer.sizes == [8, 4, 2, 2, 4, 2, 2, 1]
    with (
        Peer(lambda *_: (413, {}, {})) as peer,
        cm.Client(peer.url, KEY) as client,
        pytest.raises(CountermarkError, match=r"one image is too large.*\(413\); raise --max-body"),
    ):
        client.classify(drawn(2, SHAPE))


def test_batches_fit_into_the_body_that_the_service_takes() -> None:
    about = {**ABOUT, "parameters": {**ABOUT["parameters"], "max_body": 3 * 3072 + 5000}}  # type: ignore[dict-item]
    with Peer(lambda count, _: well(count), about) as peer, cm.Client(peer.url, KEY) as client:
        client.classify(drawn(7, SHAPE))
        assert peer.sizes == [3, 3, 1]


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_service_is_asked_again_when_it_says(
    status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    waits = ["3", formatdate(time.time() + 500, usegmt=True), "soon", None]
    waits += ["0", formatdate(0)]

    def busy(count: int, number: int) -> Reply:
        if number > len(waits):
            return well(count)
        said = waits[number - 1]
        return status, {} if said is None else {"Retry-After": said}, {"error": "busy"}

    with Peer(busy) as peer, cm.Client(peer.url, KEY, timeout=1000) as client:
        assert client.classify(drawn(2, SHAPE)) == classified([1, 1])
    first, date, *unsaid = [wait for wait in waited if wait != 0.01]
    assert first == 3
    assert 400 < date <= 500
    assert unsaid == [1.0, 1.0, 0.05, 0.05]


def test_a_service_that_stays_busy_or_silent_is_an_error_in_time() -> None:
    begun = time.monotonic()
    silent = {"Content-Length": "1000"}
    cases: list[tuple[Reply, str]] = [
        ((503, {"Retry-After": "60"}, {"error": "full"}), r"503 \(full\); asking again in 60 sec"),
        ((429, {"Retry-After": "9" * 400}, {}), "429; asking again in 1e"),
        ((200, silent, b"{"), r"gave no answer \(\w+\); asking again .* the timeout of 0.5 sec"),
        ((0, {}, b""), r"gave no answer \(ConnectionError\); check the address"),
    ]
    for reply, reason in cases:
        with (
            Peer(lambda *_, reply=reply: reply) as peer,  # type: ignore[misc]
            cm.Client(peer.url, KEY, timeout=0.5) as client,
            pytest.raises(CountermarkError, match=reason),
        ):
            client.classify(drawn(1, SHAPE))
    assert time.monotonic() - begun < 60


def test_a_dropped_connection_is_asked_again() -> None:
    with (
        Peer(lambda count, number: (0, {}, b"") if number < 3 else well(count)) as peer,
        cm.Client(peer.url, KEY) as client,
    ):
        assert client.classify(drawn(1, SHAPE)) == classified([1])
        assert peer.sizes == [1, 1, 1]


def test_answers_that_are_none_are_errors() -> None:
    cases: list[tuple[Reply, str]] = [
        ((200, {}, b"<html>"), "answered 200; which is no JSON|200; .*no JSON object"),
        ((200, {}, []), "no JSON object"),
        ((200, {}, {"outputs": []}), "not with a label and a class for each image"),
        (well(3), "not with a label and a class"),
        (
            (
                200,
                {},
                {"outputs": [{"name": "label", "data": ["x"]}, {"name": "class", "data": ["x"]}]},
            ),
            "not with",
        ),
        ((302, {"Location": "http://127.0.0.1:9/"}, {}), "redirects are not followed"),
        ((400, {}, {"error": f"I saw {KEY}\x1b[2J"}), r"400 \(I saw API-KEY\\x1b\[2J\)$"),
        ((500, {}, {"error": {"deep": 1}}), "answered 500"),
    ]
    for reply, reason in cases:
        with (
            Peer(lambda *_, reply=reply: reply) as peer,  # type: ignore[misc]
            cm.Client(peer.url, KEY) as client,
            pytest.raises(CountermarkError, match=reason) as found,
        ):
            client.classify(drawn(1, SHAPE))
        assert KEY not in str(found.value)


@pytest.mark.parametrize(
    "about",
    [
        {},
        {**ABOUT, "inputs": [{"shape": [-1, 3, 32]}]},
        {**ABOUT, "inputs": [{"shape": [-1, 0, 0, 0]}]},
        {**ABOUT, "inputs": [{"shape": [-1, 3, 10**6, 10**6]}]},  # more than any memory
        {**ABOUT, "parameters": {}},
        {**ABOUT, "parameters": {**ABOUT["parameters"], "max_batch": None}},  # type: ignore[dict-item]
    ],
)
def test_another_kind_of_service_is_told(about: Any) -> None:
    with (
        Peer(lambda count, _: well(count), about) as peer,
        cm.Client(peer.url, KEY) as client,
        pytest.raises(CountermarkError, match="does not describe its model"),
    ):
        client.classify(drawn(1, SHAPE))


def test_a_client_needs_nothing_of_the_service() -> None:
    """The extra `serve` need not be installed."""
    code = "import sys\nfor name in ('sqlalchemy', 'starlette', 'uvicorn', 'prometheus_client'):\n"
    code += "    sys.modules[name] = None\nimport countermark as cm\n"
    code += "print(cm.Client('http://h/v2/models/m', 'x'))"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert said.stdout == "Client('http://h/v2/models/m')\n"


TERMS = {f"{name}_sha256": "ab" * 32 for name in ("model", "network", "guard", "cells", "coins")}
TERMS |= {"log": "cd" * 16, "account": "anna", "owner": "ef" * 32}
TERMS |= {"classes_sha256": classes_sha256(NAMES)}
SIGNING = {
    **ABOUT,
    "parameters": {**ABOUT["parameters"], "signing": True, "class_names": NAMES},  # type: ignore[dict-item]
    **{"terms": TERMS, "opening": None, "number": 0, "digest": "00" * 32},
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"parameters": ABOUT["parameters"]}, "takes no signed requests"),
        ({"terms": None}, "does not say what it signs"),
        ({"terms": {**TERMS, "more": "x"}}, "does not say what it signs"),
        ({"terms": {**TERMS, "log": ""}}, "does not say what it signs"),
        ({"number": "0"}, "does not say what it signs"),
        ({"digest": []}, "does not say what it signs"),
        ({"opening": "x"}, "does not say what it signs"),
        ({"opening": {}}, "another state"),
        ({"terms": {**TERMS, "classes_sha256": "ab" * 32}}, "does not say what it signs"),
        ({}, "without a receipt"),
        ({"said": "c"}, "class of another name"),
    ],
)
def test_a_hostile_service_gets_nothing_else_signed(
    change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    """It is told in one sentence, and the request that was signed is the one that stays."""
    private, state = Ed25519PrivateKey.generate().private_bytes_raw(), tmp_path / "state"
    sent: list[str] = []

    def respond(count: int, _number: int) -> Reply:
        label, name = well(count)[2]["outputs"]
        said = {**name, "data": [change.get("said", "b")] * count}
        return 200, {"Countermark-Receipt": "zz"}, {"outputs": [label, said]}

    with (
        Peer(respond, {**SIGNING, **change}) as peer,
        cm.Client(peer.url, KEY, sign=private, state=state) as client,
    ):
        send = client._exchange

        def exchange(method: str, address: str, body: Any = None, headers: Any = None) -> Any:
            if method == "POST" and address.endswith("/signing"):
                return object()
            sent.extend(value for name, value in (headers or {}).items() if name.endswith("nature"))
            return send(method, address, body, headers)

        client._exchange = exchange  # type: ignore[method-assign]
        for images in (drawn(1, SHAPE), drawn(1, SHAPE, seed=5)):
            with pytest.raises(CountermarkError, match=reason):
                client.classify(images)
    assert len(set(sent)) <= 1
