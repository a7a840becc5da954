"""The steps of `gpu.sh`: commands, timed; what fails is reported, and the rest goes on.

They run in one process: on a bare machine each would else import for half a minute what others have
installed beside PyTorch. So their times are without that.

At the end a model that the device made is measured on the processor as well: the same folder has to
have the same accuracies there, and its key the same answers, up to rounding.
"""

import contextlib
import gzip
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from countermark.cli import main as main_of_ours

TOTAL = float(
    os.environ.get("TOTAL", 340)
)  # seconds for everything; a step that would begin later is left out
LONGEST = 150.0  # seconds for one step
SHOWN = ("test_accuracy", "adversarial_accuracy", "watermark_accuracy", "cost", "queries")
LARGEST_DIFFERENCE = {
    "test_accuracy": 0.5,
    "adversarial_accuracy": 1.0,
    "watermark_accuracy": 0.5,
}  # points
SMALL = bool(os.environ.get("SMALL"))
EACH = 1500  # training images of a class of CIFAR-10
EPOCHS = (
    12  # of the unmarked colour model; its own recipe takes more than the minutes that there are
)


class Steps:
    """Commands run so far, and what came of them."""

    def __init__(self, out: Path, device: str) -> None:
        """Log to the folder `out`; compute on `device`."""
        self.out, self.device = out, device
        self.begun = time.monotonic()
        self.done: list[dict[str, Any]] = []

    def run(
        self, name: str, *words: object, device: str | None = None, fine: tuple[int, ...] = (0,)
    ) -> dict[str, Any]:
        """Run a command of ours with `--json`; returns what it printed, nothing if it failed."""
        line = [*map(str, words), "--device", device or self.device, "--json"]

        def here(seconds: float, stream: BinaryIO) -> tuple[int, bytes]:
            said, told = io.StringIO(), io.TextIOWrapper(stream, write_through=True)
            signal.signal(signal.SIGALRM, _too_long)
            signal.setitimer(signal.ITIMER_REAL, seconds)
            try:
                with contextlib.redirect_stdout(said), contextlib.redirect_stderr(told):
                    status = main_of_ours(line)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                told.detach()
            return status, said.getvalue().encode()

        return self.record(name, here, fine)

    def record(
        self,
        name: str,
        run: Callable[[float, BinaryIO], tuple[int, bytes]],
        fine: tuple[int, ...] = (0,),
    ) -> dict[str, Any]:
        """Run a step; the last line that it prints may be a JSON object."""
        left = TOTAL - (time.monotonic() - self.begun)
        if left <= 0:
            self.done.append(
                {"step": name, "seconds": 0.0, "status": "left out, no time", "failed": True}
            )
            return {}
        begun = time.monotonic()
        log = self.out / f"{name.replace(' ', '-')}.log"
        with log.open("wb") as stream:
            status, output = run(min(left, LONGEST), stream)
            stream.write(output)
        found: dict[str, Any] = {}
        lines = output.decode(errors="replace").strip().splitlines()
        if lines and lines[-1].startswith("{"):
            found = json.loads(lines[-1])
        words = (
            log.read_text(errors="replace").strip().splitlines()[-1:] if status not in fine else []
        )
        seconds = round(time.monotonic() - begun, 1)
        step = {
            "step": name,
            "seconds": seconds,
            "status": status,
            "failed": status not in fine,
            "found": found,
            "said": words,
        }
        self.done.append(step)
        sys.stdout.write(
            f"{step['seconds']:6.1f} s  {name}: {status} {summary(found)} {' '.join(words)[:300]}\n"
        )
        sys.stdout.flush()
        return found


def _too_long(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def tests(seconds: float, stream: BinaryIO) -> tuple[int, bytes]:
    """The tests that want a GPU, in a process of their own."""
    file = Path(__file__).parent.parent / "tests" / "test_gpu.py"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--maxfail=8",
        "-p",
        "no:cacheprovider",
        str(file),
    ]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stream, timeout=seconds)
    except subprocess.TimeoutExpired as error:
        return 124, error.stdout or b""
    return done.returncode, done.stdout


def summary(found: dict[str, Any]) -> str:
    """What of a result goes into the table."""
    parts = [
        f"{name.replace('_', ' ')} {found[name]:.2f}"
        for name in SHOWN
        if isinstance(found.get(name), float | int)
    ]
    strict, test = found.get("strict"), found.get("test")
    if isinstance(strict, dict):
        parts.append(f"strict accuracy {strict['strict_accuracy']:.2f}")
    if isinstance(test, dict):
        parts.append(f"{test['agreements']}:{test['disagreements']}, {test['verdict']}")
    return ", ".join(parts)


def unpack(kit: Path, work: Path) -> None:
    """Put MNIST into the cache."""
    cache = work / "cache" / "mnist"
    cache.mkdir(parents=True, exist_ok=True)
    for path in (kit / "mnist").iterdir():
        (cache / path.stem).write_bytes(gzip.decompress(path.read_bytes()))


def photographs(kit: Path, work: Path, every: int = 1, most: int | None = None) -> Path:
    """Put CIFAR-10 into a folder of classes, unless it is there.

    Args:
        kit: folder that `gpu_kit.py` made.
        work: folder to put it in.
        every: take one image of so many.
        most: training images of a class at most; of test images two fifteenths of that.
    """
    folder = work / f"cifar10-{every}-{most or 'all'}"
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        with tarfile.open(kit / "cifar10.tar.xz") as archive:
            for number, member in enumerate(archive):
                split, _, image = member.name.split("/")[-3:]
                kept = most is None or int(Path(image).stem) < (
                    most if split == "train" else 2 * most // 15
                )
                if kept and number % every == 0:
                    archive.extract(member, partial, filter="data")
        (partial / "cifar10").rename(folder)
    return folder


def story(steps: Steps, name: str, data: list[object], work: Path) -> Path:
    """Protect, attack and ask one model."""
    folder = work / "models"
    model = folder / name
    images, queries = (20, 400) if SMALL else (1000, 6400)
    if not steps.run(f"{name} protect", "protect", *data, "--out", model):
        return model
    steps.run(f"{name} evaluate strict", "evaluate", model, "--strict", "--images", images)
    steps.run(
        f"{name} steal",
        "steal",
        model,
        "--setting",
        "black",
        "--queries",
        queries,
        "--out",
        folder / f"{name}-stolen",
    )
    steps.run(f"{name} prune", "remove", model, "--prune", 0.5, "--out", folder / f"{name}-pruned")
    steps.run(
        f"{name} finetune",
        "remove",
        model,
        "--finetune",
        1 if SMALL else 5,
        "--out",
        folder / f"{name}-tuned",
    )
    for suspect in ("", "-pruned", "-tuned"):
        steps.run(
            f"{name}{suspect} verify",
            "verify",
            f"{model}{suspect}",
            "--key",
            model / "key",
            fine=(0, 1, 3),
        )
    steps.run(f"{name} guard", "guard", model, "--cost", 0.5)
    return model


def compare(steps: Steps, name: str, model: Path) -> Iterator[dict[str, Any]]:
    """One model on the device and on the processor."""
    if not model.is_dir():
        return
    images = 50 if SMALL else 1000
    ask = ("evaluate", model, "--images", images)
    there, here = (
        steps.run(f"{name} evaluate {device}", *ask, device=device)
        for device in (steps.device, "cpu")
    )
    for measure, most in LARGEST_DIFFERENCE.items():
        if isinstance(there.get(measure), float) and isinstance(here.get(measure), float):
            difference = abs(there[measure] - here[measure])
            yield {
                "model": name,
                "measure": measure,
                "there": there[measure],
                "here": here[measure],
                "same": difference <= most,
            }


def table(steps: Steps, compared: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = [f"{machine['device']}, PyTorch {machine['torch']}, Python {machine['python']}", ""]
    lines += ["| step | seconds | status | result |", "|---|---|---|---|"]
    for step in steps.done:
        lines.append(
            f"| {step['step']} | {step['seconds']} | {step['status']} "
            f"| {summary(step.get('found', {}))} |"
        )
    lines += ["", "| model | measure | device | processor | the same |", "|---|---|---|---|---|"]
    for row in compared:
        lines.append(
            f"| {row['model']} | {row['measure']} | {row['there']:.2f} | {row['here']:.2f} "
            f"| {row['same']} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    kit, work, out = Path(sys.argv[1]), Path(sys.argv[3]), Path(sys.argv[4])
    out.mkdir(parents=True, exist_ok=True)
    unpack(kit, work)
    os.environ["COUNTERMARK_CACHE"] = str(work / "cache")
    steps = Steps(out, sys.argv[2])
    photos = photographs(kit, work, 20 if SMALL else 1, EACH)
    mnist = story(steps, "mnist", ["digits" if SMALL else "mnist"], work)
    cifar = story(steps, "cifar10", [photos, "--epochs", EPOCHS], work)
    compared = [*compare(steps, "mnist", mnist), *compare(steps, "cifar10", cifar)]
    timm: list[object] = [
        photos,
        "--network",
        "timm:resnet18",
        "--objective",
        "standard",
        "--epochs",
        1 if SMALL else 3,
    ]
    steps.run("timm protect", "protect", *timm, "--out", work / "models" / "timm")
    steps.record("paths on the GPU", tests)
    import torch

    from countermark.device import describe

    machine = {
        "device": describe(steps.device, "auto"),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
    (out / "gpu.json").write_text(
        json.dumps({"machine": machine, "steps": steps.done, "compared": compared}, indent=1)
    )
    (out / "gpu.md").write_text(table(steps, compared, machine))
    sys.stdout.write(table(steps, compared, machine))
    failed = [step["step"] for step in steps.done if step["failed"]]
    differing = [row for row in compared if not row["same"]]
    sys.exit(
        f"failed: {', '.join(failed) or 'none'}; differing: {len(differing)}"
        if failed or differing
        else 0
    )


if __name__ == "__main__":
    main()
