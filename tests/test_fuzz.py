"""Hostile files and messages: every parser refuses or accepts, and nothing else escapes.

`COUNTERMARK_FUZZ=1000000 pytest tests/test_fuzz.py` makes that many inputs in all;
benchmarks/fuzz.py uses coverage to guide them.
"""

import gc
import os
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from countermark.errors import CountermarkError
from crafting import craft_cells, odd_roots
from fuzzing import Kind, attempt, kinds, log_place

INPUTS = int(os.environ.get("COUNTERMARK_FUZZ", "4000"))
KINDS = kinds()
QUICK = [name for name, kind in KINDS.items() if not kind.alone]
_DEARER = 10  # a process of its own costs as much as so many other inputs


@pytest.mark.parametrize("name", KINDS)
def test_spoiled_inputs_are_refused_or_read(name: str) -> None:
    kind = KINDS[name]
    rng = random.Random(name)
    count = max(10, INPUTS // len(KINDS) // (_DEARER if kind.alone else 1))
    accepted = 0
    data = kind.example
    for number in range(count):
        # Every fourth is spoiled twice or more.
        data = kind.spoil(kind.example if number % 4 else data, rng)
        accepted += attempt(kind, data)
    print(f"\n{name}: {count} inputs, {accepted} accepted")


@pytest.mark.parametrize("name", QUICK)
@settings(deadline=None, max_examples=25)
@given(data=st.binary(max_size=400))
def test_any_bytes_are_refused_or_read(name: str, data: bytes) -> None:
    attempt(KINDS[name], data)


def test_honest_inputs_are_read() -> None:
    """Or the fuzzing would test nothing: the examples are those that the parsers are for."""
    refused = [name for name, kind in KINDS.items() if not attempt(kind, kind.example)]
    # The token is one of something else; the replay has a made-up format.
    assert set(refused) <= {"timestamp", "replay", "crafted replay"}


def test_nothing_stays_in_memory_when_the_fuzzing_is_over() -> None:
    """Its folders lie where only memory is, which fills up."""
    place = log_place()
    around = place.folder.parent
    assert place.file.is_relative_to(around)
    del place
    gc.collect()
    assert not around.exists()


def test_a_spoiled_log_is_refused() -> None:
    place, rng, refused = log_place(), random.Random(5), 0
    honest = place.read(place.file)
    count = max(40, INPUTS // 200)
    for _ in range(count):
        data = craft_cells(place.example, rng)
        try:
            assert place(data) == honest  # the change wrote what was there before
        except CountermarkError:
            refused += 1
    assert refused > count // 2


ROOTS = odd_roots(KINDS["roots"].example)


@pytest.mark.parametrize("name", ROOTS)
def test_odd_roots_are_refused_or_read(name: str) -> None:
    attempt(KINDS["roots"], ROOTS[name])


class Panic(BaseException):
    """What a library in Rust raises where it gives up; it is no `Exception`."""


def _hangs(_data: bytes) -> object:
    while True:
        pass


FAULTS = {
    "panic": (lambda _: (_ for _ in ()).throw(Panic("no")), "Panic: no"),
    "exit": (lambda _: exit(0), "SystemExit"),
    "error": (lambda _: {}["x"], "KeyError"),
    "memory": (lambda _: bytearray(b"x") * (1 << 29), "MiB of memory"),
    "addresses": (lambda _: bytearray(1 << 34), "MemoryError"),
    "crash": (lambda _: os.abort(), "a crash"),
    "time": (_hangs, "more than 1 seconds"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_a_parser_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fuzzers see what they are for."""
    parse, words = FAULTS[name]
    if name == "time":
        monkeypatch.setattr("fuzzing._MOST_SECONDS", 1)
    for alone in [True] if name in ("crash", "time") else [False, True]:
        with pytest.raises(AssertionError, match=words):
            attempt(Kind(b"", parse, lambda data, _: data), b"", alone=alone)
