"""Shorter markings for tests to which it does not matter how much of a mark so few epochs leave.

And training in another process, watched by its checkpoint.
"""

import contextlib
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from countermark import training
from countermark.errors import CountermarkError
from countermark.files import read_tensors
from countermark.marking import Standing
from countermark.training import TrainConfig


def shorten(
    patch: pytest.MonkeyPatch, name: str, epochs: int, module: ModuleType = training
) -> None:
    """Let `recipe` or `marking` take so few epochs, where `module` looks for them."""
    made: Callable[..., TrainConfig] = getattr(module, name)
    patch.setattr(
        module, name, lambda *given, **options: replace(made(*given, **options), epochs=epochs)
    )


def mark_shortly(patch: pytest.MonkeyPatch, epochs: int) -> None:
    """Let a mark take so few epochs, in one round."""
    shorten(patch, "marking", epochs)


def take_any_mark(patch: pytest.MonkeyPatch) -> None:
    """Let every mark hold."""
    patch.setattr(Standing, "taken", True)


def wait_for_epoch(epoch: int, folder: Path, process: "subprocess.Popen[Any]") -> None:
    """Wait until the source model that a process trains has come so far, or the process is done."""
    checkpoint = folder / "checkpoint-source.safetensors"
    for _ in range(6000):
        # The file may not be there yet, or be replaced while it is read.
        with contextlib.suppress(CountermarkError):
            if len(read_tensors(checkpoint, 1 << 30)[1]["records"]) >= epoch:
                return
        if process.poll() is not None:
            assert process.returncode == 0
            return
        time.sleep(0.01)
    raise AssertionError(f"epoch {epoch} did not come within a minute")
