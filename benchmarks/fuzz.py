"""Fuzz every parser, guided by coverage.

    pip install atheris
    python benchmarks/fuzz.py -runs=1000000

The first byte of an input chooses the kind; the inputs are spoiled and crafted as in
tests/test_fuzz.py, but parsed in this process. Options are libFuzzer's. `KIND="crafted log"` in the
environment fuzzes one kind alone.
"""

import os
import random
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

with atheris.instrument_imports(include=["countermark"]):
    from fuzzing import attempt, kinds

CHOSEN = os.environ.get("KIND")
KINDS = [kind for name, kind in kinds().items() if CHOSEN in (None, name)]


def one(data: bytes) -> None:
    """Parse one input."""
    if data:
        attempt(KINDS[data[0] % len(KINDS)], data[1:], alone=False)


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """Spoil an input, or begin again from an honest one."""
    rng = random.Random(seed)
    if not data or rng.random() < 0.2:
        chosen = rng.randrange(len(KINDS))
        data = bytes([chosen]) + KINDS[chosen].example
    kind = KINDS[data[0] % len(KINDS)]
    spoiled: bytes = kind.spoil(data[1:], rng)
    return (data[:1] + spoiled)[:most]


if __name__ == "__main__":
    limits = ["-max_len=524288", "-rss_limit_mb=4096", "-timeout=20"]
    atheris.Setup([sys.argv[0], *limits, *sys.argv[1:]], one, custom_mutator=mutate)
    atheris.Fuzz()
