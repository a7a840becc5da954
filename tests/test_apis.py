"""Suspects behind every kind of API, each imitated on loopback from its public description."""

import base64
import contextlib
import email
import email.policy
import io
import json
import math
import os
import re
import signal
import socket
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from PIL import Image

from countermark.cli import main
from countermark.data import Pools, pixels
from countermark.errors import CountermarkError
from countermark.evaluation import predict
from countermark.networks import load
from countermark.suspects import APIS, Asking, Endpoint, open_suspect
from countermark.suspects.answers import Names, labels_of
from countermark.suspects.asker import RefusalError
from countermark.verbs.export import export
from countermark.verbs.verify import verify

SHAPE = (1, 8, 8)
CLASSES = ["Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine"]
Answer = tuple[int, str, bytes]


def told(value: Any, status: int = 200) -> Answer:
    return status, "application/json", json.dumps(value).encode()


class Server:
    """An HTTP server with a model behind it; `answer` says what comes to a request."""

    def __init__(self, folder: Path) -> None:
        self.network = load(folder)
        self.answer: Callable[[str, str, Any, bytes], Answer] = lambda *_request: told({}, 404)
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.events: dict[str, Any] = {}
        self.extra: dict[str, str] = {}  # headers of the next answers
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.do_POST()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                server.requests.append((self.path, dict(self.headers), body))
                status, media, data = server.answer(self.command, self.path, self.headers, body)
                self.send_response(status)
                self.send_header("Content-Type", media)
                self.send_header("Content-Length", str(len(data)))
                for name, value in server.extra.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.root = f"http://127.0.0.1:{self.server.server_port}"

    def scores(self, images: Any) -> list[list[float]]:
        """Probabilities for images `(n, 1, 8, 8)` of [0, 1]."""
        with torch.no_grad():
            x = torch.as_tensor(np.asarray(images, dtype=np.float32))
            return self.network(x).softmax(1).tolist()

    def of_file(self, data: bytes) -> list[float]:
        with Image.open(io.BytesIO(data)) as image:
            return self.scores(np.asarray(image.convert("L"))[None, None] / 255)[0]

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def serve(request: pytest.FixtureRequest) -> Iterator[Callable[[Path], Server]]:
    running: list[Server] = []

    def start(folder: Path) -> Server:
        running.append(Server(folder))
        return running[-1]

    yield start
    for server in running:
        server.stop()


def parts(headers: Any, body: bytes) -> dict[str, bytes]:
    """The fields of a form."""
    text = f"Content-Type: {headers['content-type']}\r\n\r\n".encode() + body
    message = email.message_from_bytes(text, policy=email.policy.HTTP)
    return {
        str(part.get_param("name", header="content-disposition")): part.get_payload(decode=True)
        for part in message.iter_parts()  # type: ignore[attr-defined]
    }


def ranked(scores: list[float], names: list[str]) -> list[tuple[str, float]]:
    return sorted(zip(names, scores, strict=True), key=lambda each: -each[1])[:5]


# --- the servers, as their makers describe them ---------------------------------------------------

NUMBERS = [str(number) for number in range(10)]


def torchserve(server: Server, _method: str, path: str, _headers: Any, body: bytes) -> Answer:
    assert path == "/predictions/digits"
    return told(dict(ranked(server.of_file(body), NUMBERS)))


def tfserving(server: Server, _method: str, path: str, _headers: Any, body: bytes) -> Answer:
    assert path == "/v1/models/digits:predict"
    x = np.array(json.loads(body)["instances"])
    assert x.shape[1:] == (8, 8, 1)
    return told({"predictions": server.scores(x.transpose(0, 3, 1, 2))})


def vertex(server: Server, _method: str, path: str, _headers: Any, body: bytes) -> Answer:
    assert path == "/v1/projects/p/locations/l/endpoints/7:predict"
    [instance] = json.loads(body)["instances"]
    best = ranked(server.of_file(base64.b64decode(instance["content"], validate=True)), NUMBERS)
    row = {
        "ids": [str(900 + i) for i in range(len(best))],
        "displayNames": [name for name, _ in best],
        "confidences": [score for _, score in best],
    }
    return told({"predictions": [row], "deployedModelId": "3", "modelVersionId": "1"})


def sagemaker(server: Server, _method: str, path: str, headers: Any, body: bytes) -> Answer:
    assert (path, headers["content-type"]) == (
        "/endpoints/digits/invocations",
        "application/x-image",
    )
    return told(server.of_file(body))


def hugging_face(server: Server, _method: str, _path: str, headers: Any, body: bytes) -> Answer:
    if headers["authorization"] != "Bearer hf_token":
        return told({"error": "Invalid credentials in Authorization header"}, 401)
    best = ranked(server.of_file(body), NUMBERS)
    return told([{"label": name, "score": score} for name, score in best])


def gradio(server: Server, method: str, path: str, headers: Any, body: bytes) -> Answer:
    if path == "/gradio_api/info":
        return told({"named_endpoints": {"/classify": {"parameters": []}}, "unnamed_endpoints": {}})
    if path == "/gradio_api/upload":
        place = f"/files/{len(server.events)}"
        server.events[place] = parts(headers, body)["files"]
        return told([place])
    if method == "POST" and path == "/gradio_api/call/classify":
        [file] = json.loads(body)["data"]
        assert file["meta"] == {"_type": "gradio.FileData"}
        name = f"event{len(server.events)}"
        server.events[name] = server.of_file(server.events[file["path"]])
        return told({"event_id": name})
    best = ranked(server.events[path.rpartition("/")[2]], NUMBERS)
    data = {
        "label": best[0][0],
        "confidences": [{"label": name, "confidence": score} for name, score in best],
    }
    text = f"event: heartbeat\ndata: null\n\nevent: complete\ndata: {json.dumps([data])}\n\n"
    return 200, "text/event-stream; charset=utf-8", text.encode()


def mlflow(server: Server, _method: str, path: str, _headers: Any, body: bytes) -> Answer:
    assert path == "/invocations"
    return told({"predictions": server.scores(json.loads(body)["inputs"])})


def oip(server: Server, method: str, path: str, _headers: Any, body: bytes) -> Answer:
    if method == "GET":
        return told({"inputs": [{"name": "image", "datatype": "FP32", "shape": [-1, 1, 8, 8]}]})
    assert path == "/v2/models/digits/infer"
    [tensor] = json.loads(body)["inputs"]
    scores = server.scores(np.array(tensor["data"]).reshape(tensor["shape"]))
    data = [value for row in scores for value in row]
    output = {"name": "probs", "datatype": "FP32", "shape": [len(scores), 10], "data": data}
    return told({"outputs": [output]})


def form(server: Server, _method: str, path: str, headers: Any, body: bytes) -> Answer:
    """A small FastAPI service: a file in a form goes in, a class name comes out."""
    assert path == "/classify?version=3"
    fields = parts(headers, body)
    assert fields["mode"] == b"fast"
    return told({"label": ranked(server.of_file(fields["file"]), CLASSES)[0][0].upper()})


def nested(server: Server, _method: str, _path: str, _headers: Any, body: bytes) -> Answer:
    """A service whose JSON is deeper: an image as a data address, and arrays of objects back."""
    start, _, data = json.loads(body)["input"]["image"].partition(",")
    assert start == "data:image/png;base64"
    best = ranked(server.of_file(base64.b64decode(data)), CLASSES)
    return told({"result": {"top": [{"class": name, "prob": score} for name, score in best]}})


def batches(server: Server, _method: str, _path: str, _headers: Any, body: bytes) -> Answer:
    """A service that takes arrays of several images and answers with an object for each."""
    scores = server.scores(json.loads(body)["x"])
    return told({"y": [{"category": int(np.argmax(row)), "score": max(row)} for row in scores]})


def text(server: Server, _method: str, _path: str, _headers: Any, body: bytes) -> Answer:
    """A service that takes a bare file and answers with a word."""
    return 200, "text/plain; charset=utf-8", ranked(server.of_file(body), CLASSES)[0][0].encode()


SERVED: dict[str, tuple[Callable[..., Answer], str, list[str]]] = {
    "torchserve": (torchserve, "/predictions/digits", []),
    "tfserving": (tfserving, "/v1/models/digits:predict", []),
    "vertex": (vertex, "/v1/projects/p/locations/l/endpoints/7:predict", []),
    "sagemaker": (sagemaker, "/endpoints/digits/invocations", []),
    "hf": (hugging_face, "/models/me/digits", ["--api", "hf", "--bearer", "HF_TOKEN"]),
    "gradio": (gradio, "", ["--api", "gradio"]),
    "mlflow": (mlflow, "/invocations", []),
    "oip": (oip, "/v2/models/digits", []),
    "form": (
        form,
        "/classify?version=3",
        ["--api", "json", "--send", "file=@png", "mode=fast", "--read", "label"],
    ),
    "nested": (
        nested,
        "/",
        [
            *("--api", "json", "--read", "result.top"),
            *("--send", '{"input": {"image": "data:image/png;base64,$base64_png"}}'),
        ],
    ),
    "batches": (batches, "/", ["--api", "json", "--send", '{"x": "$arrays"}', "--read", "y"]),
    "text": (text, "/", ["--api", "json", "--send", "@png"]),
}
NAMED = ("form", "nested", "text")  # answer with class names that the key does not have


@pytest.fixture
def names(tmp_path: Path) -> Path:
    """The class names of those services, in the order of the labels."""
    path = tmp_path / "classes.txt"
    path.write_text("\n".join(name.lower() for name in CLASSES))
    return path


def verifying(kind: str, server: Server, owner: Path, names: Path) -> list[str]:
    """The command that asks a server for the coins; the server speaks that API from now on."""
    answer, path, options = SERVED[kind]
    server.answer = lambda *request: answer(server, *request)
    classes = ["--classes", str(names)] if kind in NAMED else []
    return ["verify", server.root + path, "--key", str(owner / "key"), *options, *classes]


@pytest.mark.parametrize("kind", SERVED)
def test_a_copy_behind_any_api_is_a_full_match_by_one_command(
    kind: str,
    owner: Path,
    serve: Callable[[Path], Server],
    names: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    assert main([*verifying(kind, serve(owner), owner, names), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    trials = found["test"]["trials"]
    assert (found["test"]["agreements"], found["answers"]["unanswered"]) == (trials, 0)
    assert found["answers"]["clean_accuracy"] > 80
    assert "version=3" not in found["suspect"]


@pytest.mark.parametrize("kind", SERVED)
def test_a_stranger_behind_any_api_is_no_evidence(
    kind: str,
    owner: Path,
    stranger: Path,
    serve: Callable[[Path], Server],
    names: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    assert main(verifying(kind, serve(stranger), owner, names)) == 1


def test_a_function_is_named_on_the_command_line(
    owner: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It may answer by name, and is imported only because it was named."""
    source = f"""
        import countermark as cm

        model = cm.load({str(owner)!r})

        def ask(images):
            labels = model(images).argmax(1).tolist()
            return [{{"label": str(label), "score": 0.9}} for label in labels]
    """
    (tmp_path / "theirs.py").write_text("\n".join(line[8:] for line in source.splitlines()))
    monkeypatch.chdir(tmp_path)
    assert main(["verify", "theirs:ask", "--key", str(owner / "key"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["test"]["agreements"] == found["test"]["trials"]
    assert main(["verify", "theirs:model", "--key", str(owner / "key"), "--api", "hf"]) == 2
    assert "--api has no meaning for a function as suspect" in capsys.readouterr().err
    assert main(["verify", "theirs:nobody", "--key", str(owner / "key")]) == 2
    assert "there is no 'nobody' in the module 'theirs'" in capsys.readouterr().err


def test_a_wrong_guess_at_an_api_is_said(
    owner: Path, serve: Callable[[Path], Server], capsys: pytest.CaptureFixture[str]
) -> None:
    """The address looks like MLflow's, and a service of another kind is behind it."""
    server = serve(owner)
    server.answer = lambda *_request: told({"label": "3"})
    assert main(["verify", f"{server.root}/invocations", "--key", str(owner / "key")]) == 2
    said = capsys.readouterr().err
    assert "200 with nothing at 'predictions'" in said
    assert "its address looks like that of the API mlflow; --api names another" in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "does not tell what API it has; name it with --api oip, vertex"),
        (["--api", "soap"], "api"),
        (["--api", "json"], "--api json needs --send"),
        (["--send", "@png"], "give --api json"),
        (["--api", "json", "--send", "hello"], "is no JSON; --send is"),
        (["--api", "json", "--send", '{"image": "png"}'], "sends no image; --send is"),
        (["--api", "json", "--send", "a=1", "b=2"], "sends no image"),
        (["--api", "json", "--send", "@png", "--read", "a["], "is no JMESPath expression"),
        (["--api", "json", "--send", "@png", "--read", "(" * 5000], "is no JMESPath expression"),
        (["--api", "json", "--send", "@png", "--read", f"`{'[' * 5000}`"], "is no JMESPath"),
        (["--api", "json", "--send", '{"image": "$arrayx"}'], "sends no image"),
        (["--api", "json", "--send", '{"x": NaN, "image": "$array"}'], "is no JSON"),
        (["--api", "json", "--send", '{"x": 1e999, "image": "$array"}'], "is no JSON"),
        (["--api", "json", "--send", f'{"[" * 600}"$array"{"]" * 600}'], "is no JSON"),
        (["--api", "json", "--send", '{"a": "$array", "b": "$base64_png"}'], "in several forms"),
        (["--api", "json", "--send", "a=@png", "b=@raw"], "in several forms (png, raw)"),
        (["--api", "hf", "--layout", "nhwc"], "takes image files, for which --layout has no"),
        (["--api", "hf", "--mean", "0.5"], "takes image files, for which --mean has no"),
        (["--api", "hf", "--bearer", "NO_SUCH_TOKEN"], "has no variable 'NO_SUCH_TOKEN'"),
        (["--api", "hf", "--quality", "0"], "--quality"),
    ],
)
def test_apis_that_are_asked_for_wrongly_are_refused_before_anything_is_sent(
    owner: Path,
    serve: Callable[[Path], Server],
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    words: str,
) -> None:
    server = serve(owner)
    assert main(["verify", server.root, "--key", str(owner / "key"), *options]) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert server.requests == []


@pytest.mark.parametrize(
    ("read", "label"),
    [
        ("max_by(predictions, &probability).tag", 7),
        ("sort_by(predictions, &probability)[-1].tag", 7),
        ("predictions[::0]", None),
        ("ceil(endless)", None),
        ("@" + "|[@,@]" * 40, None),
    ],
)
def test_any_expression_reads_or_is_refused(
    owner: Path, serve: Callable[[Path], Server], read: str, label: int | None
) -> None:
    """One with functions is none of nothing; some fail in ways of their own, or grow for ever."""
    server = serve(owner)
    found = [{"tag": "7", "probability": 0.9}, {"tag": "2", "probability": 0.1}]
    server.answer = lambda *_request: told({"predictions": found, "endless": math.inf})
    suspect = Endpoint(server.root, Asking(api="json", send=("@png",), read=read))
    if label is None:
        with pytest.raises(CountermarkError, match=r"200 with (nothing at|neither labels)"):
            suspect(torch.rand(1, *SHAPE))
    else:
        assert suspect(torch.rand(1, *SHAPE)).tolist() == [label]


@pytest.mark.parametrize("send", ["raw_file=@png", '{"draw": "$base64_png"}', "a=$arrays f=@png"])
def test_only_a_form_of_images_decides_what_is_sent(
    owner: Path, serve: Callable[[Path], Server], send: str
) -> None:
    """A field may be called raw, and a word that is no place of an image is sent as it is."""
    server = serve(owner)
    server.answer = lambda *_request: told({"label": 3})
    words = (send,) if send.startswith("{") else tuple(send.split())
    suspect = Endpoint(server.root, Asking(api="json", send=words))
    assert suspect(torch.rand(2, *SHAPE)).tolist() == [3, 3]
    assert len(server.requests) == 2


def test_fields_of_one_name_are_all_sent(owner: Path, serve: Callable[[Path], Server]) -> None:
    server = serve(owner)
    server.answer = lambda *_request: told({"label": 3})
    Endpoint(server.root, Asking(api="json", send=("f=@png", "tag=a", "tag=b")))(
        torch.rand(1, *SHAPE)
    )
    assert server.requests[0][2].count(b'name="tag"') == 2


def test_names_that_nobody_told_are_said_with_what_to_do(
    owner: Path, serve: Callable[[Path], Server], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    server = serve(owner)
    server.answer = lambda *request: text(server, *request)
    asked = ["--api", "json", "--send", "@png"]
    assert main(["verify", server.root, "--key", str(owner / "key"), *asked]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(
        r"a class name that is not the key's, '\w+', .*--classes FILE, one a line", said
    )
    (tmp_path / "empty.txt").write_text("\n \n")
    words = ["verify", server.root, "--key", str(owner / "key"), *asked]
    assert main([*words, "--classes", str(tmp_path / "empty.txt")]) == 2
    assert "holds no class names; write one a line" in capsys.readouterr().err


def test_the_quality_of_a_jpeg_is_part_of_the_question(
    owner: Path, digits: Pools, serve: Callable[[Path], Server], tmp_path: Path
) -> None:
    """What was answered at another quality is asked anew, and nothing is asked twice."""
    server = serve(owner)
    server.answer = lambda *request: torchserve(server, *request)
    url, x = f"{server.root}/predictions/digits", digits.test.x[:5]
    for quality, sent in ((50, 5), (50, 5), (95, 10)):
        asking = Asking(form="jpeg", quality=quality, replay=tmp_path / "replay.jsonl")
        Endpoint(url, asking)(x)
        assert len(server.requests) == sent
    assert all(body[:2] == b"\xff\xd8" for _, _, body in server.requests)
    assert len(server.requests[0][2]) < len(server.requests[9][2])


def test_a_file_is_the_image_and_one_request(
    owner: Path, digits: Pools, serve: Callable[[Path], Server]
) -> None:
    server = serve(owner)
    server.answer = lambda *request: sagemaker(server, *request)
    x = digits.test.x[:7]
    url = f"{server.root}/endpoints/digits/invocations"
    assert torch.equal(open_suspect(url, SHAPE)(pixels(x)), predict(load(owner), x))
    sent = [np.asarray(Image.open(io.BytesIO(body))) for _, _, body in server.requests]
    assert np.array_equal(np.stack(sent), x[:, 0].numpy())


@pytest.mark.parametrize(
    ("after", "least"), [("2", 2.0), ("Fri, 01 Jan 2100 00:00:00 GMT", 300.0), ("soon", 0.0)]
)
def test_a_busy_server_is_asked_again_when_it_says(
    owner: Path,
    digits: Pools,
    serve: Callable[[Path], Server],
    monkeypatch: pytest.MonkeyPatch,
    after: str,
    least: float,
) -> None:
    """429 with Retry-After is heeded, in seconds and as a date, for five minutes at most."""
    waits: list[float] = []
    monkeypatch.setattr("countermark.suspects.asker.time.sleep", waits.append)
    server = serve(owner)
    server.extra = {"Retry-After": after}

    def answer(*request: Any) -> Answer:
        return told({}, 429) if len(server.requests) == 1 else torchserve(server, *request)

    server.answer = answer
    labels = Endpoint(f"{server.root}/predictions/digits")(digits.test.x[:1])
    assert labels.tolist() == predict(load(owner), digits.test.x[:1]).tolist()
    assert max(waits) >= least
    assert max(waits) <= 300.5


def test_cookies_of_a_server_are_kept(
    owner: Path, digits: Pools, serve: Callable[[Path], Server]
) -> None:
    """A gate that sets a cookie with its first refusal and wants it from then on."""
    server = serve(owner)
    server.extra = {"Set-Cookie": "seen=1; Path=/"}

    def answer(method: str, path: str, headers: Any, body: bytes) -> Answer:
        if "seen=1" not in headers.get("cookie", ""):
            return told({}, 503)
        return torchserve(server, method, path, headers, body)

    server.answer = answer
    labels = Endpoint(f"{server.root}/predictions/digits")(digits.test.x[:3])
    assert labels.tolist() == predict(load(owner), digits.test.x[:3]).tolist()


def test_a_server_that_is_busy_for_ever_is_not_waited_for_every_time(
    owner: Path, serve: Callable[[Path], Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("countermark.suspects.asker.time.sleep", waits.append)
    server = serve(owner)
    server.extra = {"Retry-After": str(10**12)}
    server.answer = lambda *_request: told({}, 429)
    with pytest.raises(CountermarkError, match="429"):
        Endpoint(f"{server.root}/predictions/digits")(torch.rand(9, *SHAPE))
    assert sum(waits) <= 600


SECRET = "a0b1c2d3e4f5g6h7i8j9"


@pytest.mark.parametrize("cut", [0, 180])
@pytest.mark.parametrize("status", [200, 302, 403, 500])
def test_no_message_holds_a_secret_that_a_server_says(
    owner: Path, serve: Callable[[Path], Server], status: int, cut: int
) -> None:
    """It says what it was sent, as pages for developers do; a message is cut short somewhere."""
    server = serve(owner)
    said = f"{'-' * cut} Bearer {SECRET}, {SECRET[::-1]}"
    server.extra = {"Location": f"https://127.0.0.1/predict?key={SECRET[::-1]}"}
    server.answer = lambda *_request: told({"headers": said}, status)
    headers = (("Authorization", f"Bearer {SECRET}"),)
    address = f"{server.root}/predictions/digits?key={SECRET[::-1]}"
    with pytest.raises(CountermarkError) as caught:
        Endpoint(address, Asking(headers=headers, retries=0))(torch.rand(5, *SHAPE))
    assert str(status) in str(caught.value)
    assert SECRET[:8] not in str(caught.value)
    assert SECRET[::-1][:8] not in str(caught.value)


def test_a_query_string_is_in_no_message_about_a_broken_connection(
    owner: Path, serve: Callable[[Path], Server]
) -> None:
    """TLS with a server that speaks none; `requests` says the whole address."""
    server = serve(owner)
    address = f"{server.root.replace('http', 'https')}/predictions/digits?k=short"
    with pytest.raises(CountermarkError, match="SSLError") as caught:
        Endpoint(address, Asking(retries=0))(torch.rand(5, *SHAPE))
    assert "short" not in str(caught.value)


def test_a_token_of_several_lines_is_refused_and_not_shown(
    owner: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN", f"{SECRET}\nmore")
    address = "http://127.0.0.1:1/predictions/digits"
    options = ["--key", str(owner / "key"), "--bearer", "TOKEN"]
    assert main(["verify", address, *options]) == 2
    said = capsys.readouterr().err
    assert "'TOKEN' of the environment holds several lines" in said
    assert SECRET not in said


@pytest.mark.parametrize(
    ("path", "posted"),
    [
        ("/predict/", "/predict/"),
        ("/predict/?a=b#c", "/predict/?a=b"),
        ("/v2/models/m:classify", "/v2/models/m:classify"),
    ],
)
def test_an_api_of_ones_own_is_asked_at_the_address_that_is_given(
    owner: Path, serve: Callable[[Path], Server], path: str, posted: str
) -> None:
    """Some servers redirect `/predict` to `/predict/`, and not every `/v2/models` is the OIP's."""
    server = serve(owner)
    server.answer = lambda *_request: told(3, 201)  # as some frameworks answer a POST
    suspect = Endpoint(f"{server.root}{path}", Asking(api="json", send=("@png",)))
    assert suspect(torch.rand(1, *SHAPE)).tolist() == [3]
    assert [each[0] for each in server.requests] == [posted]


def test_gradio_is_asked_with_the_query_string(
    owner: Path, serve: Callable[[Path], Server]
) -> None:
    server = serve(owner)
    with pytest.raises(CountermarkError, match="404"):
        Endpoint(f"{server.root}/app?k=1", Asking(api="gradio"))(torch.rand(1, *SHAPE))
    paths = [each[0] for each in server.requests]
    assert paths == ["/app/gradio_api/info?k=1", "/app/gradio_api/upload?k=1"]


def test_a_replay_log_answers_only_what_was_read_in_the_same_way(
    owner: Path, serve: Callable[[Path], Server], tmp_path: Path
) -> None:
    """Answers that were read from the wrong place, or with other names, are not kept as right."""
    server = serve(owner)
    server.answer = lambda *_request: told({"id": 4, "label": "dog"})
    x, log = torch.rand(2, *SHAPE), tmp_path / "log"

    def asked(read: str, *names: str) -> list[int]:
        asking = Asking(api="json", send=("@png",), read=read, names=names, replay=log)
        return Endpoint(server.root, asking)(x).tolist()

    assert asked("id", "dog", "cat") == [4, 4]
    assert asked("label", "dog", "cat") == [0, 0]
    assert asked("label", "cat", "dog") == [1, 1]
    assert len(server.requests) == 6
    assert asked("label", "cat", "dog") == [1, 1]
    assert len(server.requests) == 6


@pytest.mark.parametrize(
    ("media", "data"),
    [
        ("text/plain", "\ufeffcafé".encode()),
        ("text/plain; charset=iso-8859-1", "café".encode("latin-1")),
        ("text/html; charset=utf-8", "Café".encode()),  # what Flask says of a string
        ("application/json", json.dumps({"label": "cafe\u0301"}).encode()),
        ("application/json", '{"label": "café"}'.encode("latin-1")),
        ("application/json", '{"label": "café"}'.encode("utf-16")),
    ],
)
def test_a_name_is_read_in_the_encodings_of_servers(
    owner: Path, serve: Callable[[Path], Server], media: str, data: bytes
) -> None:
    server = serve(owner)
    server.answer = lambda *_request: (200, media, data)
    asking = Asking(api="json", send=("@png",), names=("tea", "café"))
    assert Endpoint(server.root, asking)(torch.rand(1, *SHAPE)).tolist() == [1]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("\ufeffdog\ncat\n3\n4\n5\n6\n7\n8\n9\n10\n".encode(), ""),
        (b"dog\ncat\n", "--classes has 2 names, and the key has 10 classes"),
        (b"dog\ncat\ndog\n", "names 'dog' 2 times"),
        ("dog\ncat\n".encode("utf-16"), "is no text in UTF-8"),
        (b"\x00\x01\n\x02", "is no text in UTF-8"),
        (b"a\n" * (1 << 20), "larger than"),
    ],
)
def test_class_names_are_read_whole_or_refused(
    owner: Path,
    serve: Callable[[Path], Server],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    data: bytes,
    words: str,
) -> None:
    server, names = serve(owner), tmp_path / "names.txt"
    names.write_bytes(data)
    server.answer = lambda *_request: told("dog")
    options = ["--key", str(owner / "key"), "--api", "hf", "--classes", str(names)]
    assert main(["verify", server.root, *options]) == (2 if words else 1)
    assert words in " ".join(capsys.readouterr().err.split())
    assert bool(server.requests) is not bool(words)


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
def test_a_function_may_answer_with_a_list_of_scalars_or_rows(kind: Callable[..., Any]) -> None:
    for rows in ([1, 0], [[0.1, 0.9], [0.9, 0.1]]):
        suspect = open_suspect(lambda _x, rows=rows: list(kind(rows)), SHAPE)
        assert suspect(torch.rand(2, *SHAPE)).tolist() == [1, 0]


# --- the real ones --------------------------------------------------------------------------------

_HOME = Path(__file__).parents[1]
_GRADIO = _HOME / ".venv-gradio" / "bin" / "python"
_TORCHSERVE = _HOME / ".venv-torchserve" / "bin"
_MODEL = """
import sys

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("stolen.onnx", providers=["CPUExecutionProvider"])


def scores(image):
    x = np.asarray(image.convert("L"), np.float32)[None, None] / 255
    logits = session.run(None, {session.get_inputs()[0].name: x})[0][0]
    odds = np.exp(logits - logits.max())
    return {str(label): float(odd) for label, odd in enumerate(odds / odds.sum())}
"""
_APP = """
import gradio

app = gradio.Interface(scores, gradio.Image(type="pil"), gradio.Label(num_top_classes=5))
app.launch(server_name="127.0.0.1", server_port=int(sys.argv[1]))
"""
_HANDLER = """
import io

from PIL import Image


class Handler:
    def initialize(self, context):
        pass

    def handle(self, data, context):
        rows = [row.get("data") or row.get("body") for row in data]
        return [scores(Image.open(io.BytesIO(bytes(row)))) for row in rows]


service = Handler()


def handle(data, context):
    return service.handle(data, context) if data else None
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: list[str], folder: Path, ready: str) -> Iterator[None]:
    """A server that is asked until it answers."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GRADIO_ANALYTICS_ENABLED": "0"}
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 120
            while True:
                with contextlib.suppress(requests.RequestException):
                    if requests.get(ready, timeout=1).ok:
                        break
                assert process.poll() is None, (folder / "server.log").read_text()[-2000:]
                assert time.monotonic() < deadline, (folder / "server.log").read_text()[-2000:]
                time.sleep(0.3)
            yield
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(30)


def verified(url: str, owner: Path, *options: str) -> tuple[int, int]:
    """Agreements and trials."""
    found = verify(url, key=owner / "key", api=options[0] if options else None)  # type: ignore[arg-type]
    return found.test.agreements, found.test.trials


@pytest.mark.slow
@pytest.mark.skipif(not _GRADIO.exists(), reason="make slow installs Gradio")
def test_a_copy_behind_a_real_gradio_is_a_full_match(owner: Path, tmp_path: Path) -> None:
    export(owner, out=tmp_path / "stolen.onnx")
    (tmp_path / "app.py").write_text(_MODEL + _APP)
    port = free_port()
    with running([str(_GRADIO), "app.py", str(port)], tmp_path, f"http://127.0.0.1:{port}/"):
        for address in ("", "/gradio_api/call/scores"):
            agreed, trials = verified(f"http://127.0.0.1:{port}{address}", owner, "gradio")
            assert agreed >= 0.95 * trials


# --- reading labels -------------------------------------------------------------------------------

FORMS: dict[str, tuple[Any, int]] = {
    "a number": (2, 2),
    "a whole float": (2.0, 2),
    "a number in words": ("2", 2),
    "a name": ("cat", 1),
    "another case": ("Cat", 1),
    "an underscore": ("polar_bear", 2),
    "scores": ([0.1, 0.7, 0.2], 1),
    "a tie": ([0.4, 0.4, 0.2], -1),
    "no number": ([0.1, None, 0.2], -1),
    "a row": ([[0.1, 0.7, 0.2]], 1),
    "probabilities by name": ({"dog": 0.2, "polar bear": 0.8}, 2),
    "a tie of names": ({"dog": 0.5, "cat": 0.5}, -1),
    "objects": ([{"label": "dog", "score": 0.1}, {"label": "cat", "score": 0.9}], 1),
    "one object": ({"class": "cat", "probability": 0.3}, 1),
    "lists": ({"displayNames": ["cat", "dog"], "confidences": [0.2, 0.8]}, 0),
    "a label beside scores": ({"label": "dog", "confidences": [{"label": "dog"}]}, 0),
    "scores in an object": ({"scores": [0.1, 0.1, 0.8]}, 2),
}


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ({"shape": [50_000, *[1] * 2000], "data": [1] * 50_000}, "a tensor of 2001 dimensions"),
        ({"shape": [1], "data": json.loads("[" * 900 + "1" + "]" * 900)}, "neither labels nor"),
    ],
)
def test_a_tensor_of_too_many_dimensions_is_refused(
    owner: Path, serve: Callable[[Path], Server], output: dict[str, Any], reason: str
) -> None:
    """Each value would be wrapped in as many lists."""
    server = serve(owner)
    server.answer = lambda method, *_: told(
        {"outputs": [output]} if method == "POST" else {"inputs": [{}]}
    )
    suspect = Endpoint(f"{server.root}/v2/models/digits", Asking())
    tracemalloc.start()
    try:
        with pytest.raises(CountermarkError, match=reason):
            suspect(torch.zeros(1, *SHAPE))
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("answer", "label"), FORMS.values(), ids=FORMS.keys())
def test_forms_of_an_answer(answer: Any, label: int) -> None:
    names = Names(["dog", "cat", "polar bear"])
    assert labels_of([answer, 1], 2, names) == [label, 1]


@pytest.mark.parametrize(
    "answer",
    [
        None,
        True,
        {},
        [],
        [[1, 2], [3, 4]],
        {"a": "b"},
        [{"label": "cat"}] * 2,
        {"label": {}},
        [[[]]],
    ],
)
def test_what_is_no_answer_is_refused(answer: Any) -> None:
    with pytest.raises(RefusalError, match=r"neither labels nor scores|shape"):
        labels_of([answer, 1], 2, Names(["dog", "cat"]))


def test_names_that_are_spelt_alike_are_told_apart_by_their_spelling() -> None:
    names = Names(["Crane", "crane"])
    assert [names.number(name) for name in ("Crane", "crane")] == [0, 1]
    with pytest.raises(RefusalError, match="class name that is not the key's, 'CRANE'"):
        labels_of(["CRANE"], 1, names)


def test_foreign_names_have_numbers_of_their_own() -> None:
    names = Names(["dog"], foreign=True)
    found = labels_of(["Katze", "dog", "Hund", "Katze"], 4, names)
    assert found[0] == found[3] > 1 << 29
    assert len({*found}) == 3
    assert found[1] == 0


def test_every_api_of_the_table_is_served_in_a_test() -> None:
    assert {*APIS} <= {*SERVED}


def test_an_app_of_several_functions_is_asked_which(
    owner: Path, serve: Callable[[Path], Server], capsys: pytest.CaptureFixture[str]
) -> None:
    server = serve(owner)
    server.answer = lambda *_request: told({"named_endpoints": {"/a": {}, "/b": {}}})
    command = ["verify", server.root, "--api", "gradio", "--key", str(owner / "key")]
    assert main(command) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "the app has the functions a, b; name one at the end of the address" in said


def test_an_image_file_of_two_channels_is_refused(
    owner: Path, serve: Callable[[Path], Server]
) -> None:
    server = serve(owner)
    with pytest.raises(CountermarkError, match="1 or 3 channels, not 2; send arrays"):
        Endpoint(f"{server.root}/predictions/m")(torch.zeros(1, 2, 8, 8))
