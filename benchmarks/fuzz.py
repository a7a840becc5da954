"""Fuzz every parser, guided by coverage: python benchmarks/fuzz.py -runs=1000000 (needs: pip install atheris).

The first byte of an input chooses the parser; the inputs are spoiled as in tests/test_fuzz.py. Options are libFuzzer's.
"""

import random
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

with atheris.instrument_imports(include=["countermark"]):
    from fuzzing import attempt, parsers, spoil

PARSERS = list(parsers().values())


def one(data: bytes) -> None:
    """Parse one input."""
    if data:
        attempt(PARSERS[data[0] % len(PARSERS)][1], data[1:])


def mutate(data: bytes, most: int, seed: int) -> bytes:
    """Spoil an input, or begin again from an honest one."""
    rng = random.Random(seed)
    if not data or rng.random() < 0.2:
        chosen = rng.randrange(len(PARSERS))
        data = bytes([chosen]) + PARSERS[chosen][0]
    spoiled: bytes = spoil(data[1:], rng)
    return (data[:1] + spoiled)[:most]


if __name__ == "__main__":
    atheris.Setup([sys.argv[0], "-max_len=262144", "-rss_limit_mb=4096", "-timeout=20", *sys.argv[1:]], one, custom_mutator=mutate)
    atheris.Fuzz()
