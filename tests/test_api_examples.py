"""Every public function and class has an example in its docstring, and every example runs.

The examples run in a small world: the golden files of a release (a marked model `mine` with its key
and guard, a `claim`, `roots.pem`), and what is made of them below. Each example has a copy of the
world to itself, so none depends on another. Only addresses and ports are put in by the test.
"""

import contextlib
import doctest
import inspect
import os
import re
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import requests
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from PIL import Image

import countermark as cm
from answered import first_rows
from authority import Authority
from countermark.evaluation import predict
from countermark.files import canonical_json
from countermark.guard import QueryLog, load_guarded, weights_sha256
from countermark.networks import load_model, save_model
from drawing import draw_folder
from serving import serving
from shorter import shorten

RELEASE = Path(__file__).parent / "golden" / "0.1.0"
FROM_NOTHING = ("protect", "quickstart")  # they make the model that the other examples have


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Authority]:
    made = Authority(tmp_path_factory.mktemp("authority") / "tsa")
    yield made
    made.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which a user of the examples works."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(RELEASE, folder, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for left in ("log.db", "head.json", "judgement.json", "mine/guard.json"):
            Path(left).unlink()
        Path("mine/clients.json").unlink()
        cm.remove("mine", prune=0.3, out="theirs")  # which the claim is about
        cm.protect("digits", out="stranger", scheme="none", objective="standard", epochs=2)
        draw_folder(Path("photos"), each=30, size=16, dirty=True)
        cm.calibrate("mine", cost=20.0)
        copied_through_the_service()
        draw_a_three()
        Path("head.json").write_bytes(canonical_json(asdict(cm.log_head("log.db"))))
        private = ec.generate_private_key(ec.SECP256R1())
        Path("signer.pem").write_bytes(
            private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        )
        Path("signer.pub").write_bytes(
            private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        )
    return folder


def copied_through_the_service() -> None:
    """Write `log.db`, what anna asked the guarded model, and `copy`, which learned the answers."""
    guarded, digest = load_guarded(Path("mine"), Path("mine/key")), weights_sha256(Path("mine"))
    with QueryLog("log.db") as log:
        answered = guarded.under(log.identity)(cm.open_data("digits").train.x, "anna")
        rows = first_rows(answered, digest, "anna", log.identity)
        log.append(list(rows.values()))
    asked = [np.frombuffer(row.image, np.uint8).reshape(1, 8, 8) for row in rows.values()]
    x = torch.from_numpy(np.stack(asked)) / 255
    y = torch.tensor([row.answer for row in rows.values()])
    network, description = load_model(Path("mine"))
    optimiser = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(2000):
        if float((predict(network, x) == y).double().mean()) >= 0.99:
            break
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(network(x), y).backward()
        optimiser.step()
    Path("copy").mkdir()
    save_model(Path("copy"), network, description)


def draw_a_three() -> None:
    """Write `three.png`, to which anna gets the right answer in the log `queries.db`."""
    test = cm.open_data("digits").test
    with QueryLog("queries.db") as log:
        guarded = load_guarded(Path("mine"), Path("mine/key")).under(log.identity)
    answers = guarded(test.x[:], "anna").labels
    place = int(((answers == 3) & (test.y == 3)).nonzero()[0])
    Image.fromarray(np.asarray(test.x[place][0])).save("three.png")


def examples(name: str) -> doctest.DocTest:
    """The examples in the docstring of a public name."""
    text = inspect.getdoc(getattr(cm, name)) or ""
    return doctest.DocTestParser().get_doctest(text, {"cm": cm}, name, None, None)


def failures(test: doctest.DocTest) -> str:
    """What an example gave that its docstring does not say."""
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    return "".join(said)


def end_when_it_serves(port: int, over: threading.Event) -> None:
    """Press Ctrl-C once the service at a port answers, unless the example is over before."""
    while not over.wait(0.05):
        with contextlib.suppress(OSError):  # it does not listen yet
            if requests.get(f"http://127.0.0.1:{port}/v2/health/live", timeout=5).ok:
                os.kill(os.getpid(), signal.SIGINT)
                return


@pytest.mark.parametrize("name", cm.__all__)
def test_every_public_name_has_an_example_that_runs(
    name: str,
    world: Path,
    authority: Authority,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if name not in FROM_NOTHING:
        shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    shorten(monkeypatch, "recipe", 3)
    shorten(monkeypatch, "marking", 18)  # it goes on until the mark holds
    test = examples(name)
    assert test.examples
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for example in test.examples:
        assert "SKIP" not in example.source
        example.source = example.source.replace("https://tsa.example.com", authority.url)
        example.source = example.source.replace("port=8080", f"port={port}")
    over = threading.Event()
    with contextlib.ExitStack() as ending:
        if name == "Client":
            service = ending.enter_context(serving(Path("mine"), tmp_path, "--unguarded"))
            example = test.examples[0]
            example.source = re.sub(r"http:[^\"]+", service.url, example.source)
            example.source = example.source.replace("API KEY", service.key)
        if name == "serve":
            threading.Thread(target=end_when_it_serves, args=[port, over], daemon=True).start()
        said = failures(test)
        over.set()
    assert not said, said


def test_an_example_that_says_something_else_fails() -> None:
    text = ">>> cm.plan(p=1e-9, agreement=0.75).trials\n200\n"
    parser = doctest.DocTestParser()
    assert "Got:\n    201" in failures(parser.get_doctest(text, {"cm": cm}, "plan", None, None))
