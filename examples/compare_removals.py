"""Try to remove a mark in several ways, and ask each copy for the coins of one key.

    countermark protect digits --out mine
    countermark protect digits --seed 1 --scheme none --out stranger
    python examples/compare_removals.py mine stranger

It prints a line for each copy of `mine`, and one for the stranger, which is no copy. Read it as a
thief would: what did a removal cost, and did it help?
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import countermark as cm

REMOVALS: dict[str, dict[str, Any]] = {
    "pruned, 50 %": {"prune": 0.5},
    "pruned, 80 %": {"prune": 0.8},
    "noise on the weights": {"noise": 0.3},
    "4-bit weights": {"quantise": 4},
    "fine-tuned": {"finetune": 10, "learning_rate": 0.01},
    "pruned, fine-tuned": {"prune": 0.7, "finetune": 10, "learning_rate": 0.01},
    "median filter in front": {"median": 3},
}
"""What a thief may do, as options of `cm.remove`."""


def main() -> None:
    """Make the copies and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="a marked model folder that still has its key")
    parser.add_argument("stranger", help="a model folder without the mark")
    given = parser.parse_args()

    print(f"{'':<24}{'test':>8}{'coins':>10}{'p-value':>10}  verdict")

    def row(name: str, suspect: str, accuracy: float) -> None:
        found = cm.verify(suspect, key=f"{given.model}/key")
        coins = f"{found.test.agreements}:{found.test.disagreements}"
        p = f"{found.test.p_value:.1e}"
        print(f"{name:<24}{accuracy:6.1f} %{coins:>10}{p:>10}  {found.verdict}")

    with tempfile.TemporaryDirectory() as work:
        for number, (name, options) in enumerate(REMOVALS.items()):
            copy = cm.remove(given.model, out=Path(work) / str(number), **options)
            row(name, copy.folder, copy.test_accuracy)
    row("a stranger", given.stranger, cm.evaluate(given.stranger).test_accuracy)


if __name__ == "__main__":
    main()
