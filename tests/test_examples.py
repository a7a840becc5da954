"""The examples run as they are: each notebook in a new kernel, each script as its docstring says.

They find the model and the stranger of the other tests in their folder, so that little is trained.
Secrets are drawn from a fixed seed. Where a machine trains otherwise than the one on which this was
written, each "no evidence" fails with probability 1e-6, and each match has a p-value of 1e-12 or
less where 1e-6 would do.
"""

import contextlib
import html
import io
import os
import random
import re
import runpy
import secrets
import shutil
import signal
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import log10
from pathlib import Path

import nbformat
import pytest
import requests
import torch
from PIL import Image

import countermark as cm
from authority import Authority
from countermark.data import Pools
from countermark.guard import QueryLog, load_guarded
from test_endpoints import free_ports

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
CLEAR, LEVEL = -12.0, -6.0  # decimal logarithms of p-values
MACHINE = re.compile(r"(?<![\w./:*])(?:/\w[\w.-]*){2,}|\b[A-Z]:\\")
"""An absolute path."""
SEEDED = "import random, secrets; secrets.token_bytes = random.Random('example').randbytes"

RUNNER = runpy.run_path(str(ROOT / ".ci" / "notebooks.py"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's empty folder; what secrets are drawn in it is the same in every run."""
    empty, startup = tmp_path / "work", tmp_path / "ipython" / "profile_default" / "startup"
    empty.mkdir()
    startup.mkdir(parents=True)
    (startup / "seeded.py").write_text(SEEDED)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    for kind in ("CONFIG", "DATA", "RUNTIME"):
        monkeypatch.setenv(f"JUPYTER_{kind}_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONWARNINGS", RUNNER["QUIET"])
    monkeypatch.setattr(secrets, "token_bytes", random.Random("example").randbytes)
    monkeypatch.chdir(empty)
    return empty


@pytest.fixture
def models(folder: Path, owner: Path, stranger: Path) -> Path:
    """The same with a marked model and a stranger's, as the examples would make them."""
    shutil.copytree(owner, folder / "mine")
    shutil.copytree(stranger, folder / "stranger")
    return folder


def seen(notebook: nbformat.NotebookNode) -> str:
    """What a reader sees of the outputs: text, and tables as text."""
    parts = []
    for output in (each for cell in notebook.cells for each in cell.get("outputs", ())):
        data = output.get("data", {"text/plain": output.get("text", "")})
        words = re.sub(r"<[^>]+>", " ", data.get("text/html", data.get("text/plain", "")))
        parts.append(re.sub(r"\s+", " ", html.unescape(words)))
    return "\n".join(parts)


def kinds(notebook: nbformat.NotebookNode) -> list[list[str]]:
    return [[output.output_type for output in cell.get("outputs", ())] for cell in notebook.cells]


def words(text: str) -> set[str]:
    """The words of outputs, without what another machine changes: numbers, units, the processor."""
    text = re.sub(r"cpu \((?:[^()]|\([^()]*\))*\)", "cpu", text)
    return set(re.findall(r"(?<![\w.])[a-zA-Z_]+(?![\w.])", text)) - {"s", "min", "h", "e"}


def notebook(name: str, folder: Path) -> str:
    """Run a notebook; its outputs are of the kinds that are committed, in the same words."""
    found = RUNNER["executed"](EXAMPLES / name, folder)
    committed = nbformat.read(EXAMPLES / name, as_version=4)
    assert kinds(found) == kinds(committed), "make examples"
    assert words(seen(found)) == words(seen(committed)), "make examples"
    return seen(found)


@pytest.fixture
def script(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs a script as `python examples/NAME WORDS` does; what it printed."""

    def run(name: str, *words: object) -> str:
        monkeypatch.syspath_prepend(EXAMPLES)
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_mark_your_own_model(folder: Path) -> None:
    """The marked model matches, and the same model before the mark does not."""
    text = notebook("mark_your_own_model.ipynb", folder)
    assert "mine: match" in text
    assert "unmarked: no evidence" in text
    before, after = map(
        float, re.findall(r"test accuracy (?:before|with) the mark +([\d.]+)", text)
    )
    assert min(before, after) > 80  # tenfold guessing; here both are about 90
    assert (folder / "mine" / "key" / "secret").stat().st_mode & 0o077 == 0


def test_catch_a_copy(models: Path) -> None:
    """Three copies match, and the stranger does not."""
    text = notebook("catch_a_copy.ipynb", models)
    line = r"(\S+) +\d+ of 160 agree, p = (\S+) +(match|no evidence)"
    found = {name: (log10(float(p)), verdict) for name, p, verdict in re.findall(line, text)}
    assert list(found) == ["pruned", "fine-tuned", "exported.onnx", "stranger"]
    p, verdict = found.pop("stranger")
    assert (p > LEVEL, verdict) == (True, "no evidence")
    assert all(p < CLEAR and verdict == "match" for p, verdict in found.values())


def test_serve_with_a_guard(models: Path) -> None:
    """The account behind a model that was trained on its answers is named, and only for it."""
    text = notebook("serve_with_a_guard.ipynb", models)
    assert re.findall(r"answers given to: (.*?)\.", text) == ["bob"]
    assert text.count("Nobody's account can be named.") == 1
    assert (models / "queries.db").exists()


def test_own_training_loop(folder: Path, script: Callable[..., str]) -> None:
    """A mark that a loop of one's own put in is proven; the network before is a stranger."""
    said = script("own_training_loop.py", "mine")
    before, after = map(float, re.findall(r"^(?:before|after).*p = (\S+)$", said, flags=re.M))
    assert before > 10**LEVEL
    assert after < 10**CLEAR
    assert cm.verify("mine", key="mine/key", network="own_training_loop:make").verdict == "match"


def test_compare_removals(models: Path, script: Callable[..., str]) -> None:
    """What costs a thief nothing removes nothing, and the stranger is told from the copies."""
    said = script("compare_removals.py", "mine", "stranger").splitlines()[1:]
    numbers = re.compile(r"\d\.\de[+-]\d+")
    found = {row[:24].strip(): (log10(float(numbers.findall(row)[0])), row) for row in said}
    assert len(found) == 8
    for cheap in ("pruned, 50 %", "noise on the weights", "4-bit weights", "fine-tuned"):
        assert found[cheap][0] < CLEAR
        assert found[cheap][1].endswith(" match")
    assert found["a stranger"][0] > LEVEL
    assert found["a stranger"][1].endswith(" no evidence")


def test_suspect_function(models: Path, script: Callable[..., str]) -> None:
    """A product with an API of its own is a match or not, and is sent no image twice."""
    cm.remove("mine", out="copy", prune=0.5)
    line = r"(\d+) requests so far, (\d+) of (\d+) trials\n.*p = (\S+): (.*)"
    first, second = re.findall(line, script("suspect_function.py", "copy", "--key", "mine/key"))
    assert (first[0], first[4], second[4]) == ("60", "match", "match")
    clean = 100  # at most, to see whether it is asked in the right way
    assert int(second[0]) <= 60 + int(second[2]) - int(first[1]) + clean
    assert log10(float(second[3])) < CLEAR
    other = script("suspect_function.py", "stranger", "--key", "mine/key", "--replay", "other")
    for *_, p, verdict in re.findall(line, other):
        assert (log10(float(p)) > LEVEL, verdict) == (True, "no evidence")


def test_settle_a_dispute(folder: Path, tmp_path: Path, script: Callable[..., str]) -> None:
    """The judge upholds the claim against the copy; against a stranger nothing is opened."""
    authority = Authority(tmp_path / "authority")
    said = script("settle_a_dispute.py", "--tsa", authority.url, "--roots", authority.root)
    authority.close()
    against, _, judged, other = said.splitlines()
    assert "nothing was opened" in against
    assert "copy: upheld" in judged
    assert "stranger: undecidable" in other  # the claim is about another file
    assert (folder / "dispute" / "judgement-copy.html").exists()


def test_replicas(models: Path, digits: Pools, postgres: str) -> None:
    """Two processes write one log in PostgreSQL.

    Every trial is there, once, and whichever replica is asked, a client gets the same answers.
    """
    pytest.importorskip("litserve")
    psycopg = pytest.importorskip("psycopg")
    database = psycopg.connect(postgres, autocommit=True)
    database.execute("DROP TABLE IF EXISTS trials, log_format, erased, identities")
    cm.calibrate("mine", cost=8.0)
    x = digits.thief.x[:60]
    with QueryLog(postgres) as log:
        model = load_guarded(Path("mine"), Path("mine/key")).under(log.identity)
    expected = {client: model(x, client) for client in ("anna", "bob")}
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, str(EXAMPLES / "replicas.py"), "mine", "--log", postgres]

    def ask(client: str, image: torch.Tensor) -> int:
        file = io.BytesIO()
        Image.fromarray(image[0].numpy()).save(file, "PNG")
        asked = {"api_key": f"key-of-{client}", "image": b64encode(file.getvalue()).decode()}
        answer = requests.post(f"{url}/predict", json=asked, timeout=30)
        assert answer.ok, answer.text
        return int(answer.json()["label"])

    def writers() -> int:
        """How many replicas have a connection to the database."""
        found = database.execute(
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )
        return int(found.fetchone()[0])

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with Path("said").open("w") as said:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            stdout=said,
            stderr=said,
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    try:
        for _ in range(600):
            with contextlib.suppress(requests.ConnectionError):
                if requests.get(f"{url}/health", timeout=5).ok:
                    break
            assert process.poll() is None, Path("said").read_text()
            time.sleep(0.1)
        for _ in range(100):  # until both have met trials
            for client, answers in expected.items():
                with ThreadPoolExecutor(8) as threads:
                    labels = list(threads.map(ask, [client] * len(x), x))
                assert labels == answers.labels.tolist()
            if writers() == 2:
                break
        assert writers() == 2
        for body, status in (
            ({"api_key": "key-of-anna", "image": "eHg="}, 400),
            ({"api_key": "key-of-anna", "image": "!"}, 400),
            ({"api_key": "none", "image": ""}, 401),
        ):
            answer = requests.post(f"{url}/predict", json=body, timeout=30)
            assert answer.status_code == status, answer.text
    finally:
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does, to all its processes
        try:
            process.wait(30)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    with QueryLog(postgres, create=False) as log:
        kept = [(row.client, row.cell) for row in log.rows() if row is not None]
    assert len(kept) == len(set(kept)) > 10
    assert set(kept) == {
        (client, trial.cell) for client, answers in expected.items() for trial in answers.trials
    }


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_committed_outputs_are_those_of_one_whole_run(path: Path) -> None:
    """They come from one run from the top, without errors, warnings or paths of a machine."""
    committed = nbformat.read(path, as_version=4)
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert {"error", "stderr"}.isdisjoint(
        word
        for cell in code
        for output in cell.outputs
        for word in (output.output_type, output.get("name"))
    )
    assert len(seen(committed)) > 300
    for cell in code:
        for output in cell.outputs:
            words = {**output.get("data", {}), "text": output.get("text", "")}
            words.pop("image/png", None)
            assert not MACHINE.search(str(words))
    assert path.stat().st_size < 100_000


def test_the_list_of_examples_is_whole() -> None:
    listed = re.findall(r"^\| \[[^]]*\]\((\S+)\)", (EXAMPLES / "README.md").read_text(), flags=re.M)
    there = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")]
    assert sorted(listed) == sorted(there)
