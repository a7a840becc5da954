"""Every verb by command line, on a user's own images, network and weights.

    python benchmarks/open_house.py WORK [--each 1200] [--objective standard] [--images 100]

WORK gets a folder of drawn colour images with dirt (7,200 and some odd ones), a module with a
residual network, and weights of it that a plain loop trained. The story is told twice: from scratch
and from those weights. One table says what each command took and found; the same call goes on where
it was. `tests/drawing.py` draws the images and `tests/authority.py` is the timestamp authority.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from authority import Authority  # noqa: E402
from countermark.data import open_data  # noqa: E402
from countermark.networks import Description, describe, open_declared, save_model  # noqa: E402
from countermark.suspects import open_suspect  # noqa: E402
from countermark.suspects.asker import Asking  # noqa: E402
from countermark.terminal import print_table  # noqa: E402
from countermark.thieves import THEFTS, Means  # noqa: E402
from countermark.thieves.steal import untrained  # noqa: E402
from countermark.training import TrainConfig, train  # noqa: E402
from drawing import draw_folder  # noqa: E402
from residual import make  # noqa: E402

NETWORK = "shop:make"
VERDICTS = {"verify": (0, 1, 3), "trace": (0, 1, 3), "adjudicate": (0, 1, 3)}
"""Exit statuses that are an answer; those of all other verbs are 0."""


@dataclass
class Story:
    """Commands in one folder, what they took and what they found.

    Attributes:
        work: the folder.
        size: side of the images in pixels.
        start: the words that begin a command line.
        rows: title, seconds and findings of each command so far.
        found: the values of each command's result, by its title.
    """

    work: Path
    size: int = 32
    start: Sequence[str] = (sys.executable, "-m", "countermark")
    rows: list[list[str]] = field(default_factory=list)
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def data(self) -> list[object]:
        """How the images are to be read."""
        return ["--size", self.size, "--skip-damaged"]

    @property
    def environment(self) -> dict[str, str]:
        """The module of the user's network can be imported from the folder."""
        return {**os.environ, "PYTHONPATH": str(self.work), "COLUMNS": "200"}

    def command(self, *words: object) -> list[str]:
        """A command line; the user's network is named where a model folder wants it."""
        verb = [str(word) for word in words]
        folders = [self.work / word for word in verb if (self.work / word / "model.json").is_file()]
        if verb[0] == "protect" or any(describe(folder).network == NETWORK for folder in folders):
            verb += ["--network", NETWORK]
        return [*self.start, *verb]

    def tell(self, title: str, line: str, *more: object) -> None:
        """Run a command unless it was run before, and note its time and what it found.

        Args:
            title: names the command in the table.
            line: words of the command, with spaces between them.
            more: further words, which may hold spaces.
        """
        words = [*line.split(), *more]
        kept = self.work / f"{title.replace(' ', '-').replace('/', '-')}.json"
        if kept.exists():
            done: dict[str, Any] = json.loads(kept.read_text())
        else:
            begun = time.monotonic()
            said = subprocess.run(
                [*self.command(*words), "--json"],
                capture_output=True,
                text=True,
                cwd=self.work,
                env=self.environment,
            )
            if said.returncode not in VERDICTS.get(str(words[0]), (0,)):
                raise SystemExit(f"{title}: exit {said.returncode}: {said.stderr.strip()}")
            done = {
                "seconds": time.monotonic() - begun,
                "result": json.loads(said.stdout or "{}"),
            }
            kept.write_text(json.dumps(done))
        self.found[title] = _flat(done["result"])
        self.note(title, done["seconds"], _said(self.found[title]))

    def note(self, title: str, seconds: float, said: str) -> None:
        """Add a line to the table, and say it at once."""
        self.rows.append([title, f"{seconds:.0f}", said])
        print(f"{title}: {seconds:.0f} s, {said}", file=sys.stderr, flush=True)


def _said(found: dict[str, Any]) -> str:
    """What is worth a line of the values of a verb's result."""
    wanted = {
        "images": "images",
        "damaged": "damaged",
        "duplicates": "duplicates",
        "test_accuracy": "test",
        "adversarial_accuracy": "adversarial",
        "strict_accuracy": "strict",
        "watermark_accuracy": "mark",
        "verdict": "",
        "log10_p_value": "log10 p",
        "named": "named",
        "tied": "tied",
    }
    parts = [
        f"{title} {_brief(found[name])}".strip()
        for name, title in wanted.items()
        if found.get(name) is not None
    ]
    return ", ".join(parts) or "done"


def _flat(result: dict[str, Any]) -> dict[str, Any]:
    """The values of a result and of what it holds, the outer ones first."""
    inner = [_flat(value) for value in result.values() if isinstance(value, dict)]
    found: dict[str, Any] = {}
    for each in [
        *inner,
        {name: value for name, value in result.items() if not isinstance(value, dict)},
    ]:
        found |= each
    return found


def _brief(value: Any) -> str:
    value = (
        len(value) if isinstance(value, list) and value and isinstance(value[0], list) else value
    )
    return f"{value:.2f}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Length:
    """How much of the story is told.

    Attributes:
        epochs: of the user's own loop and of thieves.
        images: test images of strict evaluation.
        queries: of thieves.
        thefts: those that are tried, `white` among them.
        removals: options of those that are tried.
    """

    epochs: int = 4
    images: int = 100
    queries: int = 2000
    thefts: Sequence[str] = tuple(THEFTS)
    removals: Sequence[str] = (
        "--prune 0.5",
        "--finetune 20 --learning-rate 0.01",
        "--median 3",
        "--denoise 16",
    )


def prepare(work: Path, each: int, size: int) -> None:
    """Draw the images and write the module."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "photos").exists():
        draw_folder(work / "photos.partial", each, size=size, dirty=True)
        (work / "photos.partial").rename(work / "photos")
    shutil.copy(TESTS / "residual.py", work / "shop.py")


def own_weights(work: Path, size: int, epochs: int) -> None:
    """What a user may have: weights that a loop of their own trained on all of the folder."""
    if (work / "own.pt").exists():
        return
    data = open_data(work / "photos", size=size, skip_damaged=True)
    torch.manual_seed(1)
    network = make(data.shape, data.classes)
    train(network, data.train, TrainConfig("standard", None, epochs))
    torch.save(network.state_dict(), work / "own.pt")


def begin(story: Story) -> None:
    """Look at the images, and train a stranger's model on them."""
    story.tell("data check", "data check photos", *story.data)
    plain = "--scheme none --objective standard --seed 1"
    line = f"protect --data photos {plain} --out stranger"
    story.tell("stranger: protect", line, *story.data)


def tell(story: Story, mine: str, authority: Authority, length: Length, *options: object) -> None:
    """One story: protect, measure, steal, remove, guard, serve, trace, claim, judge."""
    stamped = ["--tsa", authority.url, "--roots", authority.root]

    def run(title: str, line: str, *more: object) -> None:
        story.tell(f"{mine}: {title}", line, *more)

    def verify(name: str, suspect: str) -> None:
        run(f"verify {name}".strip(), f"verify {suspect} --key {mine}/key")

    line = f"protect --data photos --out {mine}"
    run("protect", line, *story.data, *options, *stamped)
    run("evaluate --strict", f"evaluate {mine} --strict --images {length.images}")
    verify("", mine)
    verify("stranger", "stranger")
    fewer = f"--queries {length.queries} --epochs {length.epochs}"
    for setting in length.thefts:
        line = f"steal {mine} --setting {setting} --out {mine}-{setting}"
        run(f"steal {setting}", f"{line} {fewer if THEFTS[setting].options else ''}")
        verify(setting, f"{mine}-{setting}")
    for way in length.removals:
        name = way.split()[0].removeprefix("--")
        run(f"remove {way}", f"remove {mine} {way} --out {mine}-{name}")
        verify(name, f"{mine}-{name}")
    run("guard", f"guard {mine} --cost 0.5 --tsa {authority.url}")
    run("export", f"export {mine} --format onnx --out {mine}.onnx")
    verify("onnx", f"{mine}.onnx")
    thief = served(story, mine)
    run("trace", f"trace {thief} --key {mine}/key --log {mine}.db")
    stolen, owners = f"{mine}-white", f"--owner-network {NETWORK}"
    run("claim", f"claim {stolen} --key {mine}/key --out {mine}-claim {owners}", *stamped)
    line = f"adjudicate {mine}-claim --suspect {stolen} {owners} --out {mine}-judgement"
    run("adjudicate", line, "--roots", authority.root)


def served(story: Story, mine: str) -> str:
    """Serve a guarded model and let a client copy it through its API; the copy's folder."""
    copy = story.work / f"{mine}-copied"
    if copy.exists():
        return copy.name
    added = story.command("client", "add", "anna", "--clients", f"{mine}.json", "--json")
    said = subprocess.run(
        added, capture_output=True, text=True, cwd=story.work, env=story.environment, check=True
    )
    line = story.command(
        "serve", mine, "--log", f"{mine}.db", "--clients", f"{mine}.json", "--port", 0
    )
    service = subprocess.Popen(
        line, stderr=subprocess.PIPE, text=True, cwd=story.work, env=story.environment
    )
    begun = time.monotonic()
    try:
        address = None
        while address is None:
            spoken = service.stderr.readline() if service.stderr is not None else ""
            if not spoken:
                raise SystemExit(f"{mine}: serve ended before it listened")
            address = re.search(r"listening on (http://\S+)", spoken)
        named = next(
            value
            for value in json.loads(said.stdout).values()
            if isinstance(value, str) and len(value) > 20
        )
        copied, description, asked = through_the_api(
            story.work / mine, f"{address[1]}/v2/models/model", named
        )
    finally:
        service.terminate()
        service.wait(30)
    copy.mkdir()
    save_model(copy, copied, description)
    story.note(
        f"{mine}: serve",
        time.monotonic() - begun,
        f"{asked} queries answered, exit {service.returncode}",
    )
    return copy.name


def through_the_api(
    mine: Path, address: str, token: str
) -> tuple[torch.nn.Module, Description, int]:
    """What a client makes of the labels of its own images, and how many it asked for."""
    description = describe(mine)
    data = open_declared(description, data=mine.parent / "photos")
    pool = data.pools(description.seed).thief
    asking = Asking(headers=(("Authorization", f"Bearer {token}"),), pixels="uint8")
    service = open_suspect(address, description.shape, asking)
    theft = THEFTS["natural"]
    means = Means(pool=pool, threat=description.threat).given(theft.options)
    copied, description = untrained("natural", description, seed=5)
    return copied, description, theft.run(service, copied, means)


def main() -> None:
    """Tell both stories and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--each", type=int, default=1200, help="images of each of the six classes")
    parser.add_argument("--size", type=int, default=32, help="side of the images in pixels")
    parser.add_argument("--objective", default="standard", help="of the model from scratch")
    parser.add_argument(
        "--epochs", type=int, default=4, help="of the user's own loop, and of thieves"
    )
    parser.add_argument("--images", type=int, default=100, help="test images of strict evaluation")
    given = parser.parse_args()
    work = given.work.resolve()
    prepare(work, given.each, given.size)
    story = Story(work, given.size)
    authority = Authority(work / "authority")
    length = Length(given.epochs, given.images)
    begin(story)
    tell(story, "scratch", authority, length, "--objective", given.objective)
    own_weights(work, given.size, given.epochs)
    tell(story, "weights", authority, length, "--weights", "own.pt")
    print_table("the open house", ["command", "seconds", "found"], story.rows)


if __name__ == "__main__":
    main()
