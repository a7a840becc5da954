"""Every verb by command line, on a user's own images, network and weights.

    python benchmarks/open_house.py WORK [--each 1200] [--objective standard] [--images 100]

WORK gets a folder of drawn colour images with dirt (7,200 and some odd ones), a module with a
residual network, and weights of it that a plain loop trained. The story is told twice: from scratch
and from those weights. One table says what each command took and found; the same call goes on where
it was. `tests/drawing.py` draws the images and `tests/authority.py` is the timestamp authority.
"""

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))

from authority import Authority  # noqa: E402
from countermark.networks import Description, describe, open_declared, save_model  # noqa: E402
from countermark.suspects import open_suspect  # noqa: E402
from countermark.suspects.asker import Asking  # noqa: E402
from countermark.terminal import print_table  # noqa: E402
from countermark.thieves import THEFTS, Means  # noqa: E402
from countermark.thieves.steal import untrained  # noqa: E402
from countermark.training import TrainConfig, train  # noqa: E402
from drawing import draw_folder  # noqa: E402

DATA = ["--size", "32", "--skip-damaged"]
NETWORK = "shop:make"
VERDICTS = {"verify": (0, 1), "trace": (0, 1, 3), "adjudicate": (0, 1, 3)}
"""Exit statuses that are an answer; those of all other verbs are 0."""


@dataclass
class Story:
    """Commands in one folder, what they took and what they found."""

    work: Path
    rows: list[list[str]] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        """The module of the user's network can be imported from the folder."""
        return {**os.environ, "PYTHONPATH": str(self.work), "COLUMNS": "200"}

    def command(self, *words: object) -> list[str]:
        """A command line, with the user's network where the verb wants it named."""
        verb = [str(word) for word in words]
        line = [sys.executable, "-m", "countermark"]
        if "--network" not in verb and self.takes(verb[0], "--network"):
            verb += ["--network", NETWORK]
        return [*line, *verb]

    def takes(self, verb: str, option: str) -> bool:
        """Whether a verb has an option."""
        line = [sys.executable, "-m", "countermark", verb, "--help"]
        said = subprocess.run(line, capture_output=True, text=True, env=self.environment)
        return option in said.stdout

    def tell(self, title: str, *words: object, out: str | None = None) -> dict[str, Any]:
        """Run a command unless what it makes is there, and note its time and what it found."""
        kept = self.work / f"{title.replace(' ', '-').replace('/', '-')}.json"
        if kept.exists() and (out is None or (self.work / out).exists()):
            found: dict[str, Any] = json.loads(kept.read_text())
        else:
            begun = time.monotonic()
            done = subprocess.run(
                [*self.command(*words), "--json"],
                capture_output=True,
                text=True,
                cwd=self.work,
                env=self.environment,
            )
            if done.returncode not in VERDICTS.get(str(words[0]), (0,)):
                raise SystemExit(f"{title}: exit {done.returncode}: {done.stderr.strip()}")
            found = {
                "seconds": time.monotonic() - begun,
                "status": done.returncode,
                "result": json.loads(done.stdout or "{}"),
            }
            kept.write_text(json.dumps(found))
        self.note(title, found["seconds"], _said(found["result"]))
        return dict(found["result"])

    def note(self, title: str, seconds: float, said: str) -> None:
        """Add a line to the table, and say it at once."""
        self.rows.append([title, f"{seconds:.0f}", said])
        print(f"{title}: {seconds:.0f} s, {said}", file=sys.stderr, flush=True)


def _said(result: dict[str, Any]) -> str:
    """What is worth a line of a verb's result."""
    wanted = {
        "images": "images",
        "damaged": "damaged",
        "doubles": "doubles",
        "test_accuracy": "test",
        "adversarial_accuracy": "adversarial",
        "strict_accuracy": "strict",
        "watermark_accuracy": "mark",
        "verdict": "",
        "log10_p_value": "log10 p",
        "named": "named",
        "tied": "tied",
    }
    found = _flat(result)
    parts = [f"{title} {_brief(found[name])}".strip() for name, title in wanted.items() if found.get(name) is not None]
    return ", ".join(parts) or "done"


def _flat(result: dict[str, Any]) -> dict[str, Any]:
    """The values of a result and of what it holds, the outer ones first."""
    inner = [_flat(value) for value in result.values() if isinstance(value, dict)]
    found: dict[str, Any] = {}
    for each in [*inner, {name: value for name, value in result.items() if not isinstance(value, dict)}]:
        found |= each
    return found


def _brief(value: Any) -> str:
    value = len(value) if isinstance(value, list) and value and isinstance(value[0], list) else value
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def prepare(work: Path, each: int) -> None:
    """Draw the images and write the module."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "photos").exists():
        draw_folder(work / "photos.partial", each, dirty=True)
        (work / "photos.partial").rename(work / "photos")
    shutil.copy(TESTS / "residual.py", work / "shop.py")


def own_weights(work: Path, epochs: int) -> None:
    """What a user may have: weights that a loop of their own trained on all of the folder."""
    if (work / "own.pt").exists():
        return
    from countermark.data import open_data  # the images once more, as a user's loop would read them

    sys.path.insert(0, str(work))
    shop = importlib.import_module("shop")
    data = open_data(work / "photos", size=32, skip_damaged=True)
    torch.manual_seed(1)
    network = shop.make(data.shape, data.classes)
    train(network, data.train, TrainConfig("standard", None, epochs))
    torch.save(network.state_dict(), work / "own.pt")


def tell(story: Story, mine: str, authority: Authority, epochs: int, images: int, *options: object) -> None:
    """One story: protect, measure, steal, remove, guard, serve, trace, claim, judge."""
    stamped = ["--tsa", authority.url, "--roots", authority.root]
    key = f"{mine}/key"
    story.tell(f"{mine}: protect", "protect", "--data", "photos", *DATA, "--out", mine, *options, *stamped, out=mine)
    story.tell(f"{mine}: evaluate --strict", "evaluate", mine, "--strict", "--images", images)
    story.tell(f"{mine}: verify", "verify", mine, "--key", key)
    for setting in THEFTS:
        copy, fewer = f"{mine}-{setting}", []
        if THEFTS[setting].options:
            fewer = ["--queries", 2000, "--epochs", epochs]
        story.tell(f"{mine}: steal {setting}", "steal", mine, "--setting", setting, "--out", copy, *fewer, out=copy)
        story.tell(f"{mine}: verify {setting}", "verify", copy, "--key", key)
    for way in (("--prune", 0.5), ("--finetune", 20, "--learning-rate", 0.01), ("--median", 3), ("--denoise", 16)):
        copy = f"{mine}-{way[0][2:]}"
        story.tell(f"{mine}: remove {' '.join(map(str, way))}", "remove", mine, *way, "--out", copy, out=copy)
        story.tell(f"{mine}: verify {way[0][2:]}", "verify", copy, "--key", key)
    story.tell(f"{mine}: guard", "guard", mine, "--cost", 0.5, "--tsa", authority.url)
    thief = served(story, mine)
    story.tell(f"{mine}: trace", "trace", thief, "--key", key, "--log", f"{mine}.db")
    pruned = f"{mine}-prune"
    claim = f"{mine}-claim"
    story.tell(f"{mine}: claim", "claim", pruned, "--key", key, "--out", claim, *stamped, out=claim)
    judged = ["--roots", authority.root, "--out", f"{mine}-judgement"]
    story.tell(f"{mine}: adjudicate", "adjudicate", claim, "--suspect", pruned, *judged)


def served(story: Story, mine: str) -> str:
    """Serve a guarded model and let a client copy it through its API; the copy's folder."""
    copy = story.work / f"{mine}-copied"
    if copy.exists():
        return copy.name
    added = story.command("client", "add", "anna", "--clients", f"{mine}.json", "--json")
    said = subprocess.run(added, capture_output=True, text=True, cwd=story.work, env=story.environment, check=True)
    line = story.command("serve", mine, "--log", f"{mine}.db", "--clients", f"{mine}.json", "--port", 0)
    service = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, cwd=story.work, env=story.environment)
    begun = time.monotonic()
    try:
        address = None
        while address is None:
            spoken = service.stderr.readline() if service.stderr is not None else ""
            if not spoken:
                raise SystemExit(f"{mine}: serve ended before it listened")
            address = re.search(r"listening on (http://\S+)", spoken)
        named = next(value for value in json.loads(said.stdout).values() if isinstance(value, str) and len(value) > 20)
        copied, description, asked = through_the_api(story.work / mine, f"{address[1]}/v2/models/model", named)
    finally:
        service.terminate()
        service.wait(30)
    copy.mkdir()
    save_model(copy, copied, description)
    story.note(f"{mine}: serve", time.monotonic() - begun, f"{asked} queries answered, exit {service.returncode}")
    return copy.name


def through_the_api(mine: Path, address: str, token: str) -> tuple[torch.nn.Module, Description, int]:
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
    parser.add_argument("--objective", default="standard", help="of the model from scratch")
    parser.add_argument("--epochs", type=int, default=4, help="of the user's own loop, and of thieves")
    parser.add_argument("--images", type=int, default=100, help="test images of strict evaluation")
    given = parser.parse_args()
    work = given.work.resolve()
    prepare(work, given.each)
    story = Story(work)
    authority = Authority(work / "authority")
    story.tell("data check", "data", "check", "photos", *DATA)
    scratch = ["--network", NETWORK, "--objective", given.objective]
    tell(story, "scratch", authority, given.epochs, given.images, *scratch)
    own_weights(work, given.epochs)
    weights = ["--network", NETWORK, "--weights", "own.pt"]
    tell(story, "weights", authority, given.epochs, given.images, *weights)
    print_table("the open house", ["command", "seconds", "found"], story.rows)


if __name__ == "__main__":
    main()
