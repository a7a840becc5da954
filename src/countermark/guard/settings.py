"""`guard.json`: the calibrated guard of a model folder."""

from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from countermark.bundle import load_bundle, load_with_data, save_bundle
from countermark.errors import CountermarkError
from countermark.files import canonical_json, read_json, sha256, write_json
from countermark.guard.calibration import Calibration
from countermark.guard.core import Guard, GuardSettings
from countermark.guard.foreign import DETECTOR, Detector
from countermark.guard.model import FIELDS, GuardedModel
from countermark.watermarks import load_secret

GUARD_FORMAT = "countermark guard 1"
_LARGEST = {"offsets": 64, "features": 1 << 20}


def write_guard(folder: Path, calibration: Calibration, pool_sha256: str, detector: Detector | None = None) -> dict[str, Any]:
    """Write `guard.json` into a model folder, and the detector of foreign queries into a folder `detector` of it; return the former."""
    record = {"format": GUARD_FORMAT, **asdict(calibration), "validation_sha256": pool_sha256}
    for name in ("offsets", "foreign_offsets"):
        record["settings"][name] = list(record["settings"][name])
    if detector is not None:
        description = load_bundle(folder)[1]
        place = folder / "detector"
        place.mkdir(exist_ok=True)
        digest = save_bundle(place, detector.network, replace(description, network=DETECTOR, classes=2, history=()))
        record["detector"] = {"weights_sha256": digest, "threshold": detector.threshold}
    write_json(folder / "guard.json", record)
    return record


def read_guard(folder: Path) -> GuardSettings:
    """The settings of a model folder's guard.

    Raises:
        CountermarkError: the folder has none, or it is not one of ours.
    """
    return GuardSettings(**_settings(_record(folder), folder / "guard.json"))


def _record(folder: Path) -> dict[str, Any]:
    path = folder / "guard.json"
    if not path.exists():
        raise CountermarkError(f"{folder} has no guard; calibrate one with: countermark guard {folder}")
    record = read_json(path)
    if record.get("format") != GUARD_FORMAT:
        raise CountermarkError(f"{path} is not a guard of the format {GUARD_FORMAT!r}; use the release that wrote it")
    return record


def _settings(record: Mapping[str, Any], path: Path) -> dict[str, Any]:
    settings = record.get("settings")
    if not isinstance(settings, dict) or not _fits(settings):
        raise CountermarkError(f"{path} lacks usable settings; it is damaged or not one of ours, calibrate again")
    lists = {name: tuple(settings.get(name, ())) for name in ("offsets", "foreign_offsets")}
    return {**settings, **lists}


def _fits(settings: Mapping[str, Any]) -> bool:
    settings = {"foreign_reach": 0.0, "foreign_offsets": [], "outline": 0, **settings}
    if settings.keys() != {field.name for field in fields(GuardSettings)}:
        return False
    digest, offsets, far = settings["model_sha256"], settings["offsets"], settings["foreign_offsets"]
    return (
        isinstance(digest, str)
        and len(digest) == 64
        and not set(digest) - set("0123456789abcdef")
        and all(type(settings[name]) is float and settings[name] > 0 for name in ("slope", "reach"))
        and type(settings["foreign_reach"]) is float
        and settings["foreign_reach"] >= 0
        and isinstance(offsets, list)
        and isinstance(far, list)
        and 1 <= len(offsets) <= _LARGEST["offsets"]
        and len(far) <= _LARGEST["offsets"]
        and all(type(offset) is float for offset in offsets + far)
        and all(type(settings[name]) is int and 0 <= settings[name] <= _LARGEST["features"] for name in ("features", "outline"))
        and settings["features"] >= 1
    )


def load_guarded(folder: Path, key: Path) -> GuardedModel:
    """Load a model folder behind its guard.

    Args:
        folder: a model folder with a `guard.json`.
        key: the owner's key folder, for its secret.

    Raises:
        CountermarkError: something is missing or damaged, or the guard was calibrated for other weights.
    """
    settings = read_guard(folder)
    network, description, _ = load_with_data(folder)
    if weights_sha256(folder) != settings.model_sha256:
        raise CountermarkError(f"{folder / 'guard.json'} was calibrated for other weights; run countermark guard {folder} again")
    detector = None
    if settings.foreign_reach > 0:
        detector = _detector(folder, _record(folder).get("detector"), description.shape)
        if settings.outline != FIELDS * FIELDS * description.shape[0]:
            raise CountermarkError(f"{folder / 'guard.json'} was calibrated for images of another shape; calibrate again")
    return GuardedModel(network, Guard(settings, load_secret(key)), detector)


def _detector(folder: Path, record: object, shape: tuple[int, int, int]) -> Detector:
    path = folder / "detector"
    network, description = load_bundle(path)
    if not isinstance(record, dict) or weights_sha256(path) != record.get("weights_sha256"):
        raise CountermarkError(f"{path} is not the detector that {folder / 'guard.json'} names; calibrate again")
    threshold = record.get("threshold")
    if type(threshold) is not float or (description.shape, description.classes) != (shape, 2):
        raise CountermarkError(f"{path} does not tell queries of this model apart; calibrate again")
    return Detector(network, threshold)


def weights_sha256(folder: Path) -> str:
    """Digest of a model folder's weights, as its description has it (`load_bundle` checks that it is true)."""
    return str(read_json(folder / "model.json").get("weights_sha256"))


def guard_sha256(record: Mapping[str, Any]) -> str:
    """Digest of a guard's configuration, for the second commitment."""
    return sha256(canonical_json(record))
