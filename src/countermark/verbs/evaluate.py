"""`countermark evaluate`: test, adversarial and watermark accuracy of a model folder."""

import time
from dataclasses import dataclass

from countermark.bundle import load_with_data
from countermark.config import EvaluateConfig
from countermark.data import load_pools
from countermark.errors import CountermarkError
from countermark.evaluation import Attack, accuracy, adversarial_accuracy, agreement, predict
from countermark.report import percent, print_table
from countermark.watermarks import load_key


@dataclass(frozen=True)
class Evaluation:
    """Accuracies in percent.

    Attributes:
        model: the model folder.
        test_accuracy: on the test pool.
        adversarial_accuracy: on the test pool, under the PGD below.
        watermark_accuracy: agreement with the key; none without one.
        epsilon: L-inf budget of the PGD, in pixels of [0, 1].
        steps: its steps.
        step_size: its step, in pixels.
        restarts: its independent runs.
        seconds: wall-clock time.
    """

    model: str
    test_accuracy: float
    adversarial_accuracy: float
    watermark_accuracy: float | None
    epsilon: float
    steps: int
    step_size: float
    restarts: int
    seconds: float


def evaluate(config: EvaluateConfig) -> Evaluation:
    """Measure a model folder on the test pool of its data set.

    Raises:
        CountermarkError: the folder, its data set or the key cannot be read, or the key asks with images of another shape.
    """
    begun = time.monotonic()
    network, description, catalogued = load_with_data(config.model)
    folder = config.key or (config.model / "key" if (config.model / "key").is_dir() else None)
    watermark_accuracy = None
    if folder is not None:
        key = load_key(folder)
        if tuple(key.watermarks.x.shape[1:]) != description.shape:
            raise CountermarkError(f"{folder} holds images of shape {tuple(key.watermarks.x.shape[1:])}; it is the key of another model")
        watermark_accuracy = agreement(predict(network, key.watermarks.x), key.labels)
    test = load_pools(description.data, description.seed, config.cache).test
    attack = Attack(
        epsilon=config.epsilon or description.epsilon,
        steps=config.steps or catalogued.steps,
        step_size=config.step_size or catalogued.step_size,
    )
    return Evaluation(
        model=str(config.model),
        test_accuracy=accuracy(network, test),
        adversarial_accuracy=adversarial_accuracy(network, test, attack, restarts=config.restarts, title="attacking the model"),
        watermark_accuracy=watermark_accuracy,
        epsilon=attack.epsilon,
        steps=attack.steps,
        step_size=attack.step_size,
        restarts=config.restarts,
        seconds=time.monotonic() - begun,
    )


def show(result: Evaluation) -> None:
    """Print the accuracies."""
    attack = f"PGD {result.steps} x {result.step_size:g} at {result.epsilon:g}" + (
        f", {result.restarts} runs" if result.restarts > 1 else ""
    )
    print_table(
        f"{result.model} ({result.seconds:.0f} s)",
        ("", "test accuracy", f"adversarial accuracy ({attack})", "watermark accuracy"),
        [["model", percent(result.test_accuracy), percent(result.adversarial_accuracy), percent(result.watermark_accuracy)]],
    )
