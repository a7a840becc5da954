"""`guard.json`: the calibrated guard of a model folder."""

import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from countermark.errors import CountermarkError
from countermark.files import JSON_LIMIT, canonical_json, read_json, sha256, write_json
from countermark.guard.calibration import Calibration
from countermark.guard.core import WHOLE, Guard, GuardSettings
from countermark.guard.foreign import MOST_VALUES, HonestRanges
from countermark.guard.model import GuardedModel
from countermark.networks import load_answering, weights_sha256
from countermark.places import Network
from countermark.watermarks import load_secret

GUARD_FORMAT = "countermark guard 1"
_NAME = "guard.json"
_LIMIT = JSON_LIMIT + 4 * MOST_VALUES  # bytes: two hexadecimal digits for each end of each range
_LARGEST = {"offsets": 64, "features": 1 << 20}


def guard_record(calibration: Calibration, pool_sha256: str) -> dict[str, Any]:
    """Build what `guard.json` holds."""
    record = {"format": GUARD_FORMAT, **asdict(calibration), "validation_sha256": pool_sha256}
    for name in ("offsets", "outlines"):
        record["settings"][name] = list(record["settings"][name])
    return record


def write_guard(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the record of a guard as a model folder's `guard.json`."""
    write_json(folder / _NAME, record, limit=_LIMIT)


def read_guard_record(folder: Path) -> dict[str, Any]:
    """Read what a model folder's `guard.json` holds.

    Raises:
        CountermarkError: the folder has no `guard.json`, or the file is damaged or of another
            format.
    """
    path = folder / _NAME
    if not path.exists():
        raise CountermarkError(
            f"{folder} has no guard; calibrate one with: countermark guard {folder}"
        )
    record = read_json(path, _LIMIT)
    if record.get("format") != GUARD_FORMAT:
        raise CountermarkError(
            f"{path} is not a guard of the format {GUARD_FORMAT!r}; use the release that wrote it"
        )
    return record


def read_guard(folder: Path) -> GuardSettings:
    """Read the settings of a model folder's guard.

    Raises:
        CountermarkError: the folder has no `guard.json`, or the file is damaged or of another
            format.
    """
    path, record = folder / _NAME, read_guard_record(folder)
    settings = record.get("settings")
    if isinstance(settings, dict):
        # A guard of near ties alone may lack `familiar` and `outlines`; one from before chances
        # were rounded coarsely lacks `steps`.
        settings = {"familiar": None, "outlines": [], "steps": WHOLE, **settings}
    if not isinstance(settings, dict) or not _fits(settings):
        raise CountermarkError(
            f"{path} lacks usable settings; it is damaged or not a file of Countermark, "
            "calibrate again"
        )
    usual = settings["familiar"]
    lists = {name: tuple(settings[name]) for name in ("offsets", "outlines")}
    return GuardSettings(
        **{**settings, **lists, "familiar": None if usual is None else HonestRanges(**usual)}
    )


def _fits(settings: Mapping[str, Any]) -> bool:
    if settings.keys() != {field.name for field in fields(GuardSettings)} or not _fits_familiar(
        settings["familiar"], settings["outlines"]
    ):
        return False
    digest, offsets, features, steps = (
        settings[name] for name in ("model_sha256", "offsets", "features", "steps")
    )
    return (
        _is_hexadecimal(digest)
        and len(digest) == 64
        and all(type(settings[name]) is float and settings[name] > 0 for name in ("slope", "reach"))
        and _are_offsets(offsets)
        and type(features) is int
        and 1 <= features <= _LARGEST["features"]
        and type(steps) is int
        and 2 <= steps <= WHOLE
        and steps & (steps - 1) == 0
    )


def _fits_familiar(usual: object, outlines: object) -> bool:
    if usual is None:
        return outlines == []
    if not isinstance(usual, dict) or usual.keys() != {"lowest", "highest"}:
        return False
    low, high = usual["lowest"], usual["highest"]
    return (
        _is_hexadecimal(low)
        and _is_hexadecimal(high)
        and len(low) == len(high)
        and len(low) % 2 == 0
        and len(low) <= 2 * MOST_VALUES
        and _are_offsets(outlines)
    )


def _is_hexadecimal(value: object) -> bool:
    return isinstance(value, str) and not set(value) - set("0123456789abcdef")


def _are_offsets(values: object) -> bool:
    return (
        isinstance(values, list)
        and 1 <= len(values) <= _LARGEST["offsets"]
        and all(type(value) is float for value in values)
    )


def load_guarded(
    folder: Path, key: Path, network: Network | None = None, device: torch.device | str = "cpu"
) -> GuardedModel:
    """Load a model folder together with its guard.

    Args:
        folder: a model folder with a `guard.json`.
        key: the owner's key folder, for its secret.
        network: what builds the network, unless it is a built-in one; or an ONNX file, as for
            `load_answering`.
        device: the device that the network computes on.

    Raises:
        CountermarkError: something is missing or damaged, the guard was calibrated for other
            weights, or it is not the one that the folder commits to.
    """
    settings = read_guard(folder)
    committed = (
        read_json(folder / "commitment.json").get("c3")
        if (folder / "commitment.json").exists()
        else None
    )
    if isinstance(committed, dict) and committed.get("guard_sha256") != guard_sha256(
        read_guard_record(folder)
    ):
        raise CountermarkError(
            f"{folder / _NAME} is not the guard that {folder / 'commitment.json'} commits to; "
            "restore it, or calibrate again"
        )
    built, description = load_answering(folder, network, device)
    if weights_sha256(folder) != settings.model_sha256:
        raise CountermarkError(
            f"{folder / _NAME} was calibrated for other weights; run countermark guard {folder} "
            "again"
        )
    if settings.familiar is not None and settings.familiar.values != math.prod(description.shape):
        raise CountermarkError(
            f"{folder / _NAME} was calibrated for images of another shape; calibrate again"
        )
    return GuardedModel(built, Guard(settings, load_secret(key)))


def guard_sha256(record: Mapping[str, Any]) -> str:
    """Compute the digest of a guard's configuration, for the third commitment."""
    return sha256(canonical_json(record))
