"""Shorter markings for tests to which it does not matter how much of a mark so few epochs leave."""

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

from countermark.marking import Standing
from countermark.training import TrainConfig


def mark_shortly(patch: pytest.MonkeyPatch, room: ModuleType, epochs: int) -> None:
    """Let `room` mark in so few epochs, in one round."""
    true_marking = room.marking

    def short(*arguments: Any) -> TrainConfig:
        made: TrainConfig = replace(true_marking(*arguments), epochs=epochs)
        return made

    patch.setattr(room, "marking", short)


def take_any_mark(patch: pytest.MonkeyPatch) -> None:
    """Let every mark hold."""
    patch.setattr(Standing, "taken", True)
