"""Hostile files and messages: every parser refuses or accepts, and nothing else escapes.

`COUNTERMARK_FUZZ=1000000 pytest tests/test_fuzz.py` makes that many inputs in all; benchmarks/fuzz.py does it guided by coverage.
"""

import os
import random
import resource

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from countermark.errors import CountermarkError
from fuzzing import attempt, log_place, parsers, spoil, spoil_log

INPUTS = int(os.environ.get("COUNTERMARK_FUZZ", "4000"))
PARSERS = parsers()


@pytest.mark.parametrize("name", PARSERS)
def test_spoiled_inputs_are_refused_or_read(name: str) -> None:
    example, parser = PARSERS[name]
    rng = random.Random(name)
    count = INPUTS // len(PARSERS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    accepted = 0
    data = example
    for number in range(count):
        data = spoil(example if number % 4 else data, rng)  # every fourth is spoiled twice or more
        try:
            accepted += attempt(parser, data)
        except Exception as error:
            raise AssertionError(f"{name}: {type(error).__name__}: {error} for {data[:300]!r}") from error
    print(f"\n{name}: {count} inputs, {accepted} accepted")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 << 10  # kibibytes


@pytest.mark.parametrize("name", PARSERS)
@settings(deadline=None, max_examples=25)
@given(data=st.binary(max_size=400))
def test_any_bytes_are_refused_or_read(name: str, data: bytes) -> None:
    attempt(PARSERS[name][1], data)


def test_honest_inputs_are_read() -> None:
    """Or the fuzzing would test nothing: the examples are those that the parsers are for."""
    refused = [name for name, (example, parser) in PARSERS.items() if not attempt(parser, example)]
    assert set(refused) <= {"timestamp", "replay"}  # the token is one of something else; the replay has a made-up format


def test_a_spoiled_log_is_refused() -> None:
    place, rng, refused = log_place(), random.Random(5), 0
    honest = place.read(place.file)
    count = max(40, INPUTS // 200)
    for _ in range(count):
        spoil_log(place, rng)
        try:
            assert place.read(place.file) == honest  # the change wrote what was there before
        except CountermarkError:
            refused += 1
    assert refused > count // 2
