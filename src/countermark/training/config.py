"""How a network is trained: one frozen configuration, and the recipes by name that fill it in."""

from dataclasses import dataclass, field
from typing import get_args

from countermark.choices import Embedding, Precision
from countermark.device import check_device
from countermark.errors import CountermarkError, choose
from countermark.threat import Attack

OBJECTIVES = ("fast", "pgd", "standard")


@dataclass(frozen=True)
class Hardware:
    """Where training runs; Lightning Fabric does the rest.

    Attributes:
        accelerator: `auto`, `cpu`, `cuda`, `cuda:N` or `mps` (see `device.resolve_device`).
        devices: processes, one per device; more than one trains data-parallel (DDP) on batches of
            the same global size.
        precision: `auto` takes bf16 where the device computes in it, else float32.
    """

    accelerator: str = "auto"
    devices: int = 1
    precision: str = "auto"


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        objective: `standard`, `pgd` (every example of every batch is replaced by PGD) or `fast`
            (the same in few steps; a multi-step attack after each epoch detects catastrophic
            overfitting).
        attack: the attack that crafts the batches; `None` for `standard`.
        carry: start each example's attack at the perturbation that it had in the pass before (Zheng
            et al., 2020, "ATTA"): one step then does the work of several. Where the perturbations
            of all examples would take more than 256 MiB, each attack starts at random and takes
            full steps instead.
        flip: mirror a random half of every batch left to right, perturbations included.
        shift: move every batch (on several devices, each device's part of it) by up to this many
            pixels, up or down and left or right, perturbations included; what leaves on one side
            enters on the other.
        dropout: train with the network's dropout; in few passes it costs more than it gives.
        craft_in_training_mode: craft with dropout and batch statistics live, as the published code
            did, instead of in evaluation mode.
        average: decay of the moving average of the weights, 0 for none. Where there is an average,
            the run returns and measures it; batches are crafted and steps taken on the weights
            themselves.
        push: perturb each layer's weights by this share of their norm, up the loss, before the
            gradient of a step is taken (adversarial weight perturbation); 0 for none.
        epochs: passes over the examples.
        batch_size: examples in a step, over all devices.
        learning_rate: of SGD; the peak, where there is a schedule.
        schedule: `constant`, or `triangular` (up to the peak over the first `warmup`, then down to
            0).
        warmup: share of the run over which learning rate and budget grow.
        grow_budget: let the attack's budget grow over the warm-up as well.
        momentum: of SGD.
        nesterov: SGD with Nesterov's momentum.
        weight_decay: of SGD.
        embedding: how watermarks get in: `epoch` (the paper's Algorithm 1: a pass after each epoch)
            or `interleaved` (some join every batch).
        watermark_batch: watermarks in a step.
        seed: seed of the order of examples and of all other randomness of the run.
        hardware: devices and precision.
    """

    objective: str
    attack: Attack | None
    epochs: int
    carry: bool = False
    flip: bool = False
    shift: int = 0
    dropout: bool = True
    craft_in_training_mode: bool = False
    average: float = 0.0
    push: float = 0.0
    batch_size: int = 128
    learning_rate: float = 0.1
    schedule: str = "triangular"
    warmup: float = 0.3
    grow_budget: bool = True
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    embedding: str = "interleaved"
    watermark_batch: int = 16
    seed: int = 0
    hardware: Hardware = field(default_factory=Hardware)

    def __post_init__(self) -> None:
        """Refuse names that do not exist and an objective without its attack."""
        choose("objective", self.objective, OBJECTIVES)
        choose("embedding", self.embedding, get_args(Embedding))
        check_device(self.hardware.accelerator)
        choose("precision", self.hardware.precision, get_args(Precision))
        choose("schedule", self.schedule, ("constant", "triangular"))
        if (self.objective == "standard") != (self.attack is None):
            raise CountermarkError(
                f"the objective {self.objective!r} goes {'without' if self.attack else 'with'} "
                "an attack"
            )
        if not 0 <= self.average < 1:
            raise CountermarkError(
                f"the decay of the average is a number from 0 to below 1, not {self.average}"
            )
        if not 0 <= self.push < 1:
            raise CountermarkError(
                f"weights are perturbed by a share of them from 0 to below 1, not {self.push}"
            )
        if self.shift < 0:
            raise CountermarkError(f"batches are moved by 0 pixels or more, not by {self.shift}")
        if self.epochs < 1 or self.batch_size < 1 or self.hardware.devices < 1:
            raise CountermarkError("epochs, batch size and devices are at least 1")
