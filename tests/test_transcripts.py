"""Every code block of the README and of docs/ is run, and the output that it shows is compared.

A page is one session, from its first block to its last, in a folder of its own that holds what a
reader is taken to have (`_world`). Commands go to a real shell and a real command line, statements
of Python are executed in one namespace a page. The commands in running text and in tables are
parsed.

What would take minutes is made shorter by `SHORTER`; what cannot run here is in `NOT_RUN`, with the
reason. Neither may name what the pages no longer hold. Any other block is run, or fails.
"""

import ast
import contextlib
import functools
import hashlib
import importlib
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import requests
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import countermark
from authority import Authority
from countermark import cli
from countermark.errors import CountermarkError
from countermark.networks.named import build
from drawing import draw_folder
from public_log import LocalLog
from shorter import take_any_mark
from warm import UNPRUNED, warm

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = ("console", "sh", "python", "json", "text")
"""Labels of blocks: commands with their output, commands alone, Python, JSON, and what is no code
(formulas)."""
PROGRAMS = ("countermark", "curl", "kill", "make", "openssl", "python", "seq")
"""What a command may begin with; the names of variables that it sets may stand before it."""

_OWN = "protect photos --size 32 --network shop.models:make --weights own.pt"
SHORTER: Mapping[str, str] = {
    r"protect cifar10 --network narrow --objective standard": _OWN,
    r"protect cifar10 --network narrow": _OWN.partition(" --weights")[0],
    r"(?<=remove) scratch": " scratch --network shop.models:make",
    r"protect digits --network shop.models:make(?: --weights own.pt)?(?= --out)": _OWN,
    r"protect --data photos --size 32(?= --out)": _OWN,
    # A judge's pages need a mark with a timestamp, and the others do not mind it.
    r"protect digits(?= --out)(?!.*--tsa)": "protect digits --tsa URL",
    r"protect digits(?!.*--weights|.*--network)": "protect digits --objective standard --epochs 10",
    r"--finetune \d+": "--finetune 1",
    r"guard mine --cost 0.1": "guard mine --cost 8",  # so that few queries meet many coins
    r"photos --size 32": "photos --size 8",
    r"(--regist(?:er|ry)) rekor": r"\1 log.json",  # on loopback
    r'"photos", size=32': '"photos", size=8',
    r"torch.zeros\(1, 3, 32, 32\)": "torch.zeros(1, 1, 8, 8)",
    r"--mean 3$": "--mean 30",  # with which a stranger of ten epochs always answers the same
    r"^make (?=\w)": f"make -n -C {ROOT} ",  # the target exists, and so do those that it needs
}
"""What commands and statements become where they would take minutes, by regular expression."""
NOT_RUN: Mapping[str, str] = {
    "git clone COUNTERMARK && cd countermark": "the address is the reader's",
    "source .venv/bin/activate": "the environment is the test's own",
    "torchrun": "tests/test_processes.py starts it, on less than a folder of photographs",
    "countermark claim their.onnx --key mine/key --log": "tests/test_signed.py does, with a client",
    "countermark adjudicate claim --suspect their.onnx --client-key": "likewise",
    "python benchmarks/service_load.py": "a load of minutes, for a machine that does nothing else",
}
"""Commands that cannot run here, by their beginning, and why."""
EXACT = ("data check", "plan")
"""Verbs whose numbers do not depend on the run. Those of all others are masked; an error never."""
REMEMBERED = ("protect", "remove")
"""Verbs that are not run a second time with the same options on the same files."""
VERDICTS = ("verify", "trace", "adjudicate")
"""Verbs whose exit status says what they found, where a page shows no output."""
PLACEHOLDERS: Mapping[str, str] = {
    "VERB": "verify",
    "data fetch NAME": "data fetch mnist",
    "--tsa URL": "--tsa https://host",
}
"""What stands for a name in commands of the running text."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its label, and its lines with the number of the first."""

    language: str
    line: int
    text: str


def _blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page."""
    for found in re.finditer(r"^( *)```(.*)\n((?:.*\n)*?)\1```$", page.read_text(), re.MULTILINE):
        line = page.read_text().count("\n", 0, found.start(3)) + 1
        yield Block(found[2], line, re.sub(rf"^{found[1]}", "", found[3], flags=re.MULTILINE))


def _running_text(page: Path) -> str:
    return re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def _commands(block: Block) -> Iterator[tuple[str, str]]:
    """The commands of a block, each with the output that is shown below it."""
    if block.language == "sh":
        for command in re.sub(r"\\\n", " ", block.text).splitlines():
            if command.strip() and not command.startswith("#"):
                yield command, ""
        return
    before, *parts = re.split(r"^\$ ", block.text, flags=re.MULTILINE)
    assert not before.strip(), "a console block begins with a command, behind '$ '"
    for part in parts:
        command, output = re.fullmatch(r"((?:.*\\\n)*.*\n)((?:.*\n)*)", part).groups()
        yield re.sub(r"\\\n", " ", command).strip(), output


@functools.cache
def _shortened(text: str) -> str:
    for long, short in SHORTER.items():
        text = re.sub(long, short, text, flags=re.MULTILINE)
    return text


def _without_comment(command: str) -> str:
    return re.sub(r"\s+#.*", "", command)


# What is compared.


def _normal(text: str, exact: bool) -> str:
    """One line of words, with numbers and digests masked."""
    text = re.sub(r"─+", "─", text)
    if not exact:
        text = re.sub(r"\b[0-9a-f]{16,}\b", "HASH", text)
        text = re.sub(r"\b\d+ (?:h|min|s)(?: \d+ (?:min|s))?\b", "TIME", text)
        text = re.sub(r"-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?", "N", text)
    return " ".join(text.split())


def _missing(shown: str, real: str, exact: bool) -> str | None:
    """The first line of what is shown that the real output does not have behind those before it.

    A page may shorten an output, so whole lines, the end of a line, and what stands for `...` may
    be absent. Where lines are wrapped does not matter.
    """
    text, at = _normal(real, exact), 0
    for line in shown.splitlines():
        for part in re.split(r"\.\.\.|…", line):
            if not (wanted := _normal(part, exact)):
                continue
            found = re.compile(rf"(?<!\S){re.escape(wanted)}(?![\w%])").search(text, at)
            if found is None:
                return line
            at = found.end()
    return None


@pytest.mark.parametrize(
    ("shown", "exact", "missing"),
    [
        ("copy: match\n agree neither\n 157 0\n", False, None),
        ("copy: match\n 157 0", True, " 157 0"),
        ("copy: match\n 158 0", True, None),
        ("agree neither\ncopy: match", False, "copy: match"),  # the order counts
        ("copy: mat", False, "copy: mat"),
        ("copy: ...\n158 ... p = 6.8e-49", True, None),
        ("no evidence", False, "no evidence"),
    ],
)
def test_what_is_shown_must_be_there_in_order(shown: str, exact: bool, missing: str) -> None:
    real = "copy: match\n\n  agree   neither\n ────────\n  158   0\n\nhow often:\np = 6.8e-49\n"
    assert _missing(shown, real, exact) == missing


# What a reader has.


@dataclass(frozen=True)
class World:
    """What all sessions share.

    Attributes:
        folder: what a reader has in the working folder; each page gets a copy.
        authority: the timestamp authority that `--tsa` names.
        environment: of commands.
        remembered: what commands wrote and said, by their options and files.
    """

    folder: Path
    authority: Authority
    environment: dict[str, str]
    remembered: dict[str, tuple[Path, str]]


_WRONG = """
from torch import nn

def softmax(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes), nn.Softmax(1))

def imagenet(shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 1000))
"""


def _write_photos(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The first 600 digits as PNG files in class folders, and the same as pixels of [0, 1]."""
    digits = load_digits()
    images = (digits.images[:600] * 15.9).astype(numpy.uint8)
    for number, (image, label) in enumerate(zip(images, digits.target, strict=False)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / str(label) / f"{number:05}.png")
    return torch.from_numpy(images).unsqueeze(1) / 255, torch.from_numpy(digits.target[:600])


def _step(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """A step of plain training, as a reader's own loop has it."""
    net.zero_grad()
    functional.cross_entropy(net(x), y).backward()
    with torch.no_grad():
        for weight in net.parameters():
            weight -= 0.1 * weight.grad


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Make the images, the network, its weights and the models of the README's first mark."""
    base = tmp_path_factory.mktemp("transcripts")
    folder, programs = base / "work", base / "bin"
    x, y = _write_photos(folder / "photos")
    draw_folder(folder / "shapes", 200, dirty=True)
    (folder / "shop").mkdir()
    (folder / "shop" / "models.py").write_text(_their_own_code())
    (folder / "shop" / "wrong.py").write_text(_WRONG)
    with pytest.MonkeyPatch.context() as patch:
        _import_the_readers_code(patch, folder)
        torch.manual_seed(0)
        net = _network()
        for _ in range(15):
            for rows in torch.randperm(len(x)).split(16):
                _step(net, x[rows], y[rows])
        weights = {f"module.{name}": value for name, value in net.state_dict().items()}
        torch.save(weights, folder / "own.pt")
    authority, log = Authority(base / "authority"), LocalLog(folder)
    shutil.copy(authority.root, folder / "roots.pem")
    programs.mkdir()
    for name, words in {"countermark": warm(), "python": [sys.executable]}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        (programs / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "COUNTERMARK_CACHE": str(base / "cache"),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "80",
    }
    made = World(folder, authority, environment, {})
    with Session(made, folder) as session:
        for line in (
            "protect digits --out mine",
            "remove mine --prune 0.5 --out copy",
            "protect digits --seed 1 --scheme none --out stranger",
        ):
            session.command(f"countermark {line}", "")
    yield made
    authority.close()
    log.close()


def _their_own_code() -> str:
    """The module that docs/networks.md shows."""
    return next(
        block.text
        for block in _blocks(ROOT / "docs" / "networks.md")
        if block.text.startswith("# shop/models.py")
    )


def _import_the_readers_code(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Have Python find the modules of a working folder, as it finds them for a reader."""
    patch.syspath_prepend(folder)
    for name in [each for each in sys.modules if each.partition(".")[0] == "shop"]:
        patch.delitem(sys.modules, name)


def _network(shape: tuple[int, ...] = (1, 8, 8), classes: int = 10) -> nn.Module:
    made: nn.Module = importlib.import_module("shop.models").make(shape, classes)
    return made


# A session.


class Session:
    """One page's commands and statements, in one folder."""

    def __init__(self, world: World, folder: Path) -> None:
        """Start a shell in the folder."""
        self.world, self.folder = world, folder
        self.names: dict[str, Any] = {}
        self.given: set[str] = set()
        self.stolen: dict[str, str] = {}  # whose weights a thief's file has
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = str(free.getsockname()[1])
        self.shell = subprocess.Popen(
            ["bash", "--norc"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            env=world.environment,
        )

    def __enter__(self) -> "Session":
        """Begin."""
        return self

    def __exit__(self, *_: object) -> None:
        """End what still runs, such as a service."""
        with contextlib.suppress(BrokenPipeError):
            self.shell.communicate("kill $(jobs -p) 2>/dev/null; wait\n", timeout=60)

    def command(self, line: str, shown: str) -> None:
        """Run a command and compare what it says with what the page shows."""
        line = _without_comment(line)
        if line.startswith(tuple(NOT_RUN)):
            return
        words = shlex.split(re.sub(r"^\w+=\$\(", "", line))
        program = next((word for word in words if not re.match(r"\w+=", word)), None)
        assert program in (None, *PROGRAMS), (
            f"{line!r}: this test does not know how to run {program!r}; add it to PROGRAMS, or the"
            " command to NOT_RUN with the reason"
        )
        line = re.sub(r"(?<=--tsa )\S+", self.world.authority.url, _shortened(line))
        line = line.replace("8080", self.port)
        serves = line.startswith("countermark serve")
        line += " &" if serves and not line.endswith("&") else ""
        fails = shown.startswith("countermark: ")
        verb = _verb(line)
        if not fails:
            self._clear(re.findall(r"--out (\S+)", line))
        self._steal(line)
        status, said = self._remembered(line) if verb in REMEMBERED else self._run(line)
        if serves:
            self._wait_for_the_service()
            if "--unguarded" not in line:
                self._ask_the_service()
        known = (0, 1, 3) if verb in VERDICTS else (2,) if fails else (0,)
        assert status in known, f"{line}: ended with {status}:\n{said}"
        lost = _missing(shown, self._as_a_reader_sees(said), fails or verb in EXACT)
        assert lost is None, f"{line}: the page shows\n{lost}\nand the command says\n{said}"

    def python(self, source: str) -> None:
        """Execute a block, and compare what it prints with the comments behind `print`."""
        if place := re.match(r"# ([\w/]+\.py)\n", source):  # a file that the reader writes
            assert (self.folder / place[1]).read_text() == source
            return
        source = _shortened(source).replace("8080", self.port)
        tree = ast.parse(source)
        self._clear(re.findall(r'\bout="(\S+?)"', source))
        self._give(source, tree)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            for statement in tree.body:
                self._steal(ast.unparse(statement))
                code = compile(ast.Module([statement], []), "the page", "exec")
                exec(code, self.names)
        shown = "\n".join(re.findall(r"^ *print\(.*\)  # (.+)$", source, flags=re.MULTILINE))
        lost = _missing(shown, said.getvalue(), False)
        assert lost is None, f"the page says\n{lost}\nand Python prints\n{said.getvalue()}"

    def _run(self, line: str) -> tuple[int, str]:
        """Have the shell run a line; what it says comes with the exit status."""
        assert self.shell.stdin is not None
        assert self.shell.stdout is not None
        end = "the end of the command:"
        self.shell.stdin.write(f'{{ {line}\n}} </dev/null\necho "\n{end} $?"\n')
        self.shell.stdin.flush()
        said: list[str] = []
        watchdog = threading.Timer(120, self.shell.kill)
        watchdog.start()
        for each in self.shell.stdout:
            if each.startswith(end):
                watchdog.cancel()
                return int(each.removeprefix(end)), "".join(said)
            said.append(each)
        raise AssertionError(f"{line}: it did not end within two minutes:\n{''.join(said)}")

    def _remembered(self, line: str) -> tuple[int, str]:
        """The same as `_run`, out of memory where the same was run on the same files before."""
        name, words = cli._named(shlex.split(line)[1:])
        given = cli._parse(name, _config(name), words)
        digest = hashlib.sha256(repr(given).encode())
        inputs = {str(getattr(given, each.name)) for each in fields(given)} | {"shop"}
        for each in sorted(inputs - {str(given.out)}):
            place = self.folder / each
            for file in [place, *sorted(place.rglob("*"))]:
                digest.update(file.read_bytes() if file.is_file() else b"")
        key, out = digest.hexdigest(), self.folder / given.out
        if key not in self.world.remembered:
            # So few photos do not always teach a mark that a pruned copy keeps.
            few = f"{UNPRUNED}=1 " if "protect photos" in line else ""
            status, said = self._run(few + line)
            if status != 0:
                return status, said
            kept = self.world.folder.parent / key
            shutil.copytree(out, kept)
            self.world.remembered[key] = kept, said
        kept, said = self.world.remembered[key]
        if not out.exists():
            shutil.copytree(kept, out)
        return 0, said

    def _clear(self, places: list[str]) -> None:
        """Remove what is to be written: a page may show several ways to the same folder."""
        for place in places:
            path = self.folder / place
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def _steal(self, text: str) -> None:
        """Make the files of a thief that the text asks: exports of `mine` as it is by now."""
        for name in re.findall(r"\btheirs?\.onnx\b", text):
            if f"--out {name}" in text:
                self.stolen[name] = ""  # the page makes it
                continue
            weights = (self.folder / "mine" / "model.safetensors").read_bytes()
            owner = hashlib.sha256(weights).hexdigest()
            if self.stolen.get(name, "") not in ("", owner) or not (self.folder / name).exists():
                self._clear([name])
                place = json.loads((self.folder / "mine" / "model.json").read_text())["network"][
                    "place"
                ]
                own = [f"--network {place}"] if ":" in place else []
                status, said = self._run(" ".join(["countermark export mine --out", name, *own]))
                assert status == 0, said
                self.stolen[name] = owner

    def _give(self, source: str, tree: ast.Module) -> None:
        """Make the names that a block takes for granted."""
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        bound = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        made = set(self.names) - self.given  # by the page, which goes before
        self.given -= bound
        for name in {node.id for node in names} - bound - made:
            if name in GIVEN:
                self.names[name] = GIVEN[name](self, source)
                self.given.add(name)

    def _wait_for_the_service(self) -> None:
        for _ in range(600):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", int(self.port))) == 0:
                    return
            time.sleep(0.05)
        raise AssertionError("the service did not start within half a minute")

    def _ask_the_service(self) -> None:
        """Send the photos as the client whose key the shell has, so that the log has trials."""
        key = self.api_key()
        for x in torch.as_tensor(_photos(self, "").train.x[:]).split(50):
            tensor = {"name": "image", "shape": list(x.shape), "datatype": "UINT8"}
            answer = requests.post(
                f"http://127.0.0.1:{self.port}/v2/models/model/infer",
                json={"inputs": [{**tensor, "data": x.flatten().tolist()}]},
                headers={"Authorization": f"Bearer {key}"},
                timeout=30,
            )
            assert answer.ok, answer.text

    def api_key(self) -> str:
        """The API key that the shell has in KEY."""
        said = self._run('echo "key=$KEY"')[1]
        return str(re.findall(r"^key=(.+)$", said, flags=re.MULTILINE)[0])

    def _as_a_reader_sees(self, said: str) -> str:
        return said.replace(str(self.folder), "/home/me/work").replace(self.port, "8080")


def _verb(line: str) -> str:
    words = shlex.split(line)
    with contextlib.suppress(CountermarkError):
        return cli._named(words[1:])[0] if words[0] == "countermark" else ""
    return ""


def _config(name: str) -> Any:
    file = cli._file(name)
    return getattr(importlib.import_module(f"countermark.verbs.{file}"), file).config


# What the pages take for granted in Python.


def _photos(session: Session, _: str) -> Any:
    return countermark.open_data(session.folder / "photos", size=8)


def _own(session: Session, _: str) -> nn.Module:
    """The network with the weights of own.pt."""
    net = _network()
    weights = torch.load(session.folder / "own.pt", weights_only=True)
    net.load_state_dict({name.removeprefix("module."): value for name, value in weights.items()})
    return net


def _images(session: Session, _: str) -> torch.Tensor:
    return torch.as_tensor(_photos(session, _).test.x[:32])


def _loader(session: Session, _: str) -> Any:
    """Batches of the training pool, as pixels of [0, 1]."""
    training = _photos(session, _).pools(seed=0).training
    return DataLoader(TensorDataset(training.x / 255, training.y), batch_size=128)


def _lightning_module(session: Session, _: str) -> Any:
    class Module(pytest.importorskip("pytorch_lightning").LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = _own(session, _)

        def training_step(self, batch: Any, _index: int) -> torch.Tensor:
            return functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.05)

    return Module()


def _trainer(_: Session, source: str) -> Any:
    if "transformers" in source:
        return pytest.importorskip("transformers").Trainer
    quiet = {"accelerator": "cpu", "devices": 1, "logger": False}
    quiet |= dict.fromkeys(("enable_progress_bar", "enable_checkpointing"), False)
    trainer = pytest.importorskip("pytorch_lightning").Trainer
    return lambda **options: trainer(**quiet, **options)


def _hugging_model(*_: object) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        image_size=8, patch_size=4, num_channels=1, num_labels=10,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def _hugging_arguments(session: Session, _: str) -> Any:
    pytest.importorskip("accelerate")
    return pytest.importorskip("transformers").TrainingArguments(
        output_dir=str(session.folder / "run"), num_train_epochs=1, use_cpu=True, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip


def _hugging_data(session: Session, _: str) -> list[dict[str, Any]]:
    training = _photos(session, _).pools(seed=0).training
    pixels = (training.x / 255 - 0.5) / 0.5
    pairs = zip(pixels, training.y.tolist(), strict=True)
    return [{"pixel_values": image, "labels": label} for image, label in pairs]


GIVEN: Mapping[str, Callable[[Session, str], Any]] = {
    "cm": lambda *_: countermark,
    "make": lambda *_: importlib.import_module("shop.models").make,
    "photos": _photos,
    "net": _own,
    "KEY": lambda session, _: session.api_key(),
    "network": lambda *_: build("small", (1, 8, 8), 10),
    "images": _images,
    "loader": _loader,
    "step": lambda *_: _step,
    "module": _lightning_module,
    "Trainer": _trainer,
    "model": _hugging_model,
    "processor": lambda *_: SimpleNamespace(image_mean=[0.5], image_std=[0.5]),
    "args": _hugging_arguments,
    "data": _hugging_data,
}
"""Names that a block uses and no block of its page makes, and how they are made."""


# The tests.


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_has_a_label_and_a_fence(page: Path) -> None:
    for block in _blocks(page):
        assert block.language in LANGUAGES, (
            f"{page.name}:{block.line}: label the block with one of {', '.join(LANGUAGES)}"
        )
    for line in _running_text(page).splitlines():
        assert "```" not in line, f"{page.name}: a fence that is not closed: {line}"
        assert not re.match(r" {4,}(?:\$ |>>> |countermark )", line), (
            f"{page.name}: put the command into a fenced block: {line.strip()}"
        )


@pytest.mark.parametrize(
    "page", [each for each in PAGES if list(_blocks(each))], ids=lambda page: page.name
)
def test_every_block_runs_and_says_what_is_shown(
    page: Path, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python takes any mark, since two rounds more would cost half a minute."""
    folder = tmp_path / "work"
    shutil.copytree(world.folder, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COUNTERMARK_CACHE", world.environment["COUNTERMARK_CACHE"])
    _import_the_readers_code(monkeypatch, folder)
    take_any_mark(monkeypatch)
    with Session(world, folder) as session:
        for block in _blocks(page):
            try:
                _run(session, block)
            except Exception as error:
                error.add_note(f"in {page.name}, the block at line {block.line}")
                raise


def _run(session: Session, block: Block) -> None:
    match block.language:
        case "console" | "sh":
            for command, shown in _commands(block):
                session.command(command, shown)
        case "python":
            session.python(block.text)
        case "json":
            json.loads(block.text)
        case "text":
            assert not re.search(r"^(?:\$|>>>|countermark) ", block.text, flags=re.MULTILINE)
        case _:
            raise AssertionError(f"a label of LANGUAGES that is not run: {block.language}")


def test_nothing_is_made_shorter_or_left_out_that_no_page_has() -> None:
    blocks = [block for page in PAGES for block in _blocks(page)]
    commands = [
        command
        for block in blocks
        if block.language in ("console", "sh")
        for command, _ in _commands(block)
    ]
    statements = [block.text for block in blocks if block.language == "python"]
    for beginning in NOT_RUN:
        assert any(command.startswith(beginning) for command in commands), beginning
    used = set()
    for text in [*commands, *statements]:
        for long, short in SHORTER.items():
            changed = re.sub(long, short, text, flags=re.MULTILINE)
            used |= {long} if changed != text else set()
            text = changed
    assert used == set(SHORTER)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_in_running_text_parses(page: Path) -> None:
    """Verbs are known, options as well, and where all is there the values are in order.

    Names of formats, such as `countermark key 1`, are written like commands.
    """
    for code in re.findall(r"`([^`\n]+)`", _running_text(page)):
        assert (fault := _fault(code)) is None, f"{page.name}: `{code}`: {fault}"


def _fault(code: str) -> str | None:
    """What is wrong with code in a line, if it is a command at all."""
    for name, meant in PLACEHOLDERS.items():
        code = code.replace(name, meant)
    if re.fullmatch(r"countermark \w+ \d+", code):
        return None if code in _literals() else "no format has this name"
    words = code.split()
    if words[0] == "countermark" and words[1:]:
        words = words[1:]
    elif not _verb(f"countermark {code}") or not re.search(" --[a-z]", code):
        return None
    if words[:1] == ["--version"] or "--help" in words:
        return None
    try:
        name, rest = cli._named(words)
        if rest:
            cli._parse(name, _config(name), rest)
    except CountermarkError as error:
        return None if re.search(r" (?:is|are) missing; ", str(error)) else str(error)
    return None


@functools.cache
def _literals() -> set[str]:
    """The strings of the source that begin with the name of the package."""
    source = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    return set(re.findall(r'"(countermark [a-z]\w* \d+)"', source))


@pytest.mark.parametrize(
    "code",
    ["countermark verfy x", "countermark verify x --kay y", "evaluate mine --strickt",
     "countermark trial 1", "countermark protect digits --out x --epochs many"],
)  # fmt: skip
def test_a_wrong_command_in_running_text_is_found(code: str) -> None:
    assert _fault(code)


def test_every_row_of_the_table_of_verbs_parses() -> None:
    """The commands of docs/use.md stand in the first column, without the name of the program."""
    table = (ROOT / "docs" / "use.md").read_text().partition("\n## Options")[0]
    rows = re.findall(r"^\| (`.+?) \|", table, flags=re.MULTILINE)
    commands = [code for row in rows for code in re.findall(r"`([^`]+)`", row)]
    assert len(commands) > 20
    for code in commands:
        assert (fault := _fault(f"countermark {code}")) is None, f"`{code}`: {fault}"
