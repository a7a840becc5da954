"""What is left of a model's coins after removals, as a table: docs/suspect.md.

    countermark protect mnist --out mine
    python benchmarks/outlast.py mine --out runs/outlast
    python benchmarks/outlast.py mine --out runs/outlast --only "--denoise 24" "--overwrite 800"

Each removal makes a copy in OUT, with the thief's own pool of labelled images, and the copy is
asked for the whole key. A copy that is there is not made again. The source model, which never saw a
coin, stands beside them.
"""

import argparse
import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from countermark import remove, verify
from countermark.files import read_json
from first_light import once

REMOVALS = (
    "--threshold 0.5",
    "--clip 0.35",
    "--blur 3",
    "--median 3",
    "--levels 4",
    "--denoise 24",
    "--denoise 48 --epochs 8",
    "--prune 0.8",
    "--finetune 20",
    "--finetune 20 --learning-rate 0.05",
    "--overwrite 800",
    "--reshape 800",
    "--flatten 3000",
)


def options(words: str) -> dict[str, Any]:
    """The options of `remove` that these words of the command line stand for."""
    given = words.split()
    names = [word.removeprefix("--").replace("-", "_") for word in given[::2]]
    values = [float(word) if "." in word else int(word) for word in given[1::2]]
    return dict(zip(names, values, strict=True))


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="model folder with its key")
    parser.add_argument("--out", type=Path, required=True, help="folder of the copies")
    parser.add_argument("--only", nargs="*", default=REMOVALS, help="some removals")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    print("| removal | test, PGD | coins | log10 p |\n|---|---|---|---|")
    suspects: dict[str, Path] = {"the model": given.model}
    for words in given.only:
        folder = given.out / words.replace("--", "").replace(" ", "-")
        once(folder, partial(remove, given.model, out=folder, **options(words)))
        suspects[f"`{words}`"] = folder
    suspects["the source model"] = given.model / "key" / "source"
    with tempfile.TemporaryDirectory() as apart:  # the owner's ledger is for the owner's looks
        key = Path(apart) / "key"
        shutil.copytree(given.model / "key", key)
        show(suspects, key)


def show(suspects: Mapping[str, Path], key: Path) -> None:
    """Print a row for each suspect."""
    for title, folder in suspects.items():
        scores = folder / "metrics.json"
        found = read_json(scores) if scores.exists() else {}
        accuracies = ", ".join(
            f"{found[name]:.2f}"
            for name in ("test_accuracy", "adversarial_accuracy")
            if name in found
        )
        test = verify(folder, key=key).test
        coins = f"{test.agreements}:{test.disagreements}"
        exponent = "" if test.log10_p_value is None else f"{test.log10_p_value:.1f}"
        print(f"| {title} | {accuracies} | {coins} | {exponent} |", flush=True)


if __name__ == "__main__":
    main()
