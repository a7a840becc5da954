"""What `steal` and `remove` share: a copy measured and written as a model folder of its own."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from countermark.device import describe
from countermark.files import write_json
from countermark.terminal import duration, percent, print_lines, print_table, unbroken
from countermark.threat import shown

if TYPE_CHECKING:
    from torch import nn

    from countermark.data import Examples
    from countermark.networks import Description


@dataclass(frozen=True)
class Copy:
    """A copy and its accuracies on the test pool, in percent.

    Attributes:
        folder: the folder written.
        test_accuracy: on the test pool.
        adversarial_accuracy: under the PGD of the data set, at the model's budget.
        epsilon: that budget, in pixels of [0, 1].
        device: where it was measured, and the precision of the PGD.
        seconds: wall-clock time.
    """

    folder: str
    test_accuracy: float
    adversarial_accuracy: float
    epsilon: float
    device: str
    seconds: float


def write_copy(
    work: Path,
    out: Path,
    network: "nn.Module",
    description: "Description",
    test: "Examples",
    begun: float,
) -> Copy:
    """Write the copy into the folder under construction `work` and measure it.

    Args:
        work: where to write.
        out: the folder that it will become.
        network: the copy.
        description: of the copy, with what was done in its history.
        test: the test pool.
        begun: `time.monotonic()` when the work began.
    """
    from countermark.evaluation import accuracy, adversarial_accuracy, device_of
    from countermark.networks import save_model

    save_model(work, network, description)
    result = Copy(
        folder=str(out),
        test_accuracy=accuracy(network, test),
        adversarial_accuracy=adversarial_accuracy(
            network, test, description.threat.attack, title="attacking the copy"
        ),
        epsilon=description.epsilon,
        device=describe(device_of(network), "auto"),
        seconds=time.monotonic() - begun,
    )
    write_json(work / "metrics.json", asdict(result))
    return result


def show(result: Copy) -> None:
    """Print the accuracies of a copy."""
    print_table(
        f"{unbroken(result.folder)} ({duration(result.seconds)})",
        ("", "test", f"adversarial at {shown(result.epsilon)}"),
        [["copy", percent(result.test_accuracy), percent(result.adversarial_accuracy)]],
    )
    print_lines(f"wrote {unbroken(result.folder)}: model.safetensors, model.json, metrics.json")
