"""`countermark evaluate`: test, adversarial, strict and watermark accuracy of a model folder."""

import math
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from countermark.data import cache_folder
from countermark.device import describe, resolve_device
from countermark.errors import CountermarkError
from countermark.files import canonical_json, read_json, sha256
from countermark.options import ModelOptions, OneDeviceOptions, ReadPath, verb
from countermark.terminal import duration, percent, print_lines, print_table, unbroken
from countermark.threat import shown
from countermark.version import __version__

if TYPE_CHECKING:
    from countermark.evaluation import StrictAccuracy


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ModelOptions, OneDeviceOptions):
    """Measure test, adversarial and watermark accuracy.

    All of them are measured on the test pool.
    """

    model: ReadPath = field(kw_only=False)
    """Model folder."""
    key: ReadPath | None = None
    """Key folder; default MODEL/key if there is one."""
    epsilon: float | None = None
    """Budget of the PGD; default that of the model."""
    steps: int | None = None
    """Steps of the PGD; default those of the data set (mnist 25, fashion_mnist 15, digits 10)."""
    step_size: float | None = None
    """Step of the PGD, in pixels; default that of the data set."""
    restarts: int = 1
    """Independent runs; an example must survive all of them."""
    strict: bool = False
    """Then try four stronger attacks (APGD-CE, APGD-T, Square, FAB-T) on what PGD leaves: slow, and
    what to quote as robustness."""
    images: int | None = None
    """Measure on so many test images, taken evenly; default all of them."""

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        super().__post_init__()
        self._open_interval("epsilon", "step_size")
        self._at_least_one("steps", "restarts", "images")


@dataclass(frozen=True)
class Evaluation:
    """Accuracies in percent.

    Attributes:
        model: the model folder.
        weights_sha256: digest of its weights.
        images: number of test images.
        test_accuracy: accuracy on these.
        adversarial_accuracy: accuracy on these under the PGD below.
        strict: accuracy on these under the PGD and then the strict attacks; none unless asked for.
        gap: points between the last two; none without strict attacks.
        gradient_masking: whether the gap is larger than honest models show, so that its cause must
            be found; none without strict attacks.
        watermark_accuracy: agreement with the key; none without one.
        epsilon: L-inf budget of the PGD, in pixels of [0, 1].
        steps: its steps.
        step_size: its step, in pixels.
        restarts: its independent runs.
        device: where all of it was computed, and the precision of the PGD; answers are in float32.
        seconds: wall-clock time of this call; where an interrupted evaluation went on, only of the
            part that was left.
    """

    model: str
    weights_sha256: str
    images: int
    test_accuracy: float
    adversarial_accuracy: float
    strict: "StrictAccuracy | None"
    gap: float | None
    gradient_masking: bool | None
    watermark_accuracy: float | None
    epsilon: float
    steps: int
    step_size: float
    restarts: int
    device: str
    seconds: float


@verb(EvaluateConfig)
def evaluate(config: EvaluateConfig) -> Evaluation:
    """Measure a model folder on the test pool of its data set.

    Raises:
        CountermarkError: the folder, its data set or the key cannot be read, or the key asks with
            images of another shape.

    Example:
        >>> found = cm.evaluate("mine", images=100)
        >>> found.images, found.epsilon
        (100, 0.1)
        >>> found.test_accuracy > found.adversarial_accuracy  # both in percent
        True
    """
    import torch

    from countermark.evaluation import (
        accuracy,
        adversarial_accuracy,
        agreement,
        predict,
        strict_accuracy,
    )
    from countermark.networks import load_model, open_declared, weights_sha256
    from countermark.networks.source import check_network
    from countermark.watermarks import load_key

    begun = time.monotonic()
    model = Path(config.model)
    device = resolve_device(config.device)
    network, description = load_model(model, config.network, device=device)
    if config.network is not None:  # it may be other code than that which was tried by protect
        check_network(network, description.shape, description.classes, "the network")
    folder = Path(config.key) if config.key else model / "key" if (model / "key").is_dir() else None
    watermark_accuracy = None
    if folder is not None:
        key = load_key(folder)
        if tuple(key.watermarks.x.shape[1:]) != description.shape:
            raise CountermarkError(
                f"{folder} holds images of shape {tuple(key.watermarks.x.shape[1:])}; "
                "it is the key of another model"
            )
        watermark_accuracy = agreement(predict(network, key.watermarks.x), key.labels)
    test = open_declared(description, data=config.data, cache=config.cache).test
    if config.images is not None and config.images < len(test):
        # Taken evenly, since the first half of MNIST's test images is easier than the second.
        test = test[torch.arange(config.images) * len(test) // config.images]
    attack = description.threat.at(
        epsilon=config.epsilon, steps=config.steps, step_size=config.step_size
    ).attack
    title, judged = "attacking the model", None
    if config.strict:
        asked = {
            "release": __version__,
            "model": read_json(model / "model.json"),
            "images": test.digest,
            "attack": asdict(attack),
            "restarts": config.restarts,
            "device": device.type,
        }
        checkpoint = _kept_in(config.cache, f"strict-{sha256(canonical_json(asked))[:32]}.json")
        judged = strict_accuracy(
            network, test, attack, restarts=config.restarts, title=title, checkpoint=checkpoint
        )
        if checkpoint is not None:
            checkpoint.unlink(missing_ok=True)
        clean, adversarial = judged.test_accuracy, judged.adversarial_accuracy
    else:
        clean, adversarial = (
            accuracy(network, test),
            adversarial_accuracy(network, test, attack, restarts=config.restarts, title=title),
        )
    return Evaluation(
        model=str(model),
        weights_sha256=weights_sha256(model),
        images=len(test),
        test_accuracy=clean,
        adversarial_accuracy=adversarial,
        strict=judged,
        gap=judged.gap if judged else None,
        gradient_masking=judged.masked if judged else None,
        watermark_accuracy=watermark_accuracy,
        epsilon=attack.epsilon,
        steps=attack.steps,
        step_size=attack.step_size,
        restarts=config.restarts,
        device=describe(device, "auto"),
        seconds=time.monotonic() - begun,
    )


def _kept_in(cache: str | Path | None, name: str) -> Path | None:
    """A file in the cache; none where the cache cannot be written.

    The cache may be a shared one, or there may be no home folder for it.
    """
    try:
        folder = Path(cache) if cache else cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, CountermarkError):
        return None
    return folder / name if os.access(folder, os.W_OK | os.X_OK) else None


def show(result: Evaluation) -> None:
    """Print the accuracies."""
    attack = f"PGD {result.steps} x {shown(result.step_size)} at {shown(result.epsilon)}" + (
        f", {result.restarts} runs" if result.restarts > 1 else ""
    )
    took = f"{duration(result.seconds)} on {result.device}"
    print_table(
        f"{unbroken(result.model)}: {result.images:,} test images ({took})",
        ("", "accuracy"),
        [
            ["test", percent(result.test_accuracy)],
            [f"adversarial ({attack})", percent(result.adversarial_accuracy)],
            ["watermarks", percent(result.watermark_accuracy)],
        ],
    )
    if result.strict is not None:
        _show_strict(result, result.strict)


def _show_strict(result: Evaluation, found: "StrictAccuracy") -> None:
    """Print what each attack left of the images, and what that says about PGD."""
    from countermark.attacks.strict import ENSEMBLE
    from countermark.evaluation import LARGEST_HONEST_GAP

    left, rows = found.test_accuracy, [["none", "", percent(found.test_accuracy)]]
    for name, broken in found.broken.items():
        left -= 100 * broken / max(found.images, 1)
        rows.append([name, str(broken), percent(abs(left))])
    print_table("strict attacks, one after the other", ("attack", "broken", "accuracy left"), rows)
    print_lines(
        f"strict accuracy {found.strict_accuracy:.2f} % of {found.images} images: "
        f"quote this figure. PGD overstates it by {found.gap:.2f} points."
    )
    if found.masked:
        blind = [attack.name for attack in ENSEMBLE if not attack.uses_gradients]
        broken = sum(found.broken[name] for name in blind)
        reach, enough = (
            result.steps * result.step_size,
            math.ceil(8 * result.epsilon / result.step_size),
        )
        attack = f"PGD {result.steps} x {shown(result.step_size)}"
        print_lines(
            f"WARNING: gradient masking? The gap is above {LARGEST_HONEST_GAP:g} points: "
            + (
                f"{attack} cannot cross the budget's ball (try --steps {enough}), or "
                if reach < 2 * result.epsilon
                else ""
            )
            + f"the model hides from PGD what breaks it. {' and '.join(blind)}, "
            f"without any gradients, broke {broken} of the rest."
        )
