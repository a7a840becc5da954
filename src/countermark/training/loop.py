"""The training loop: standard, adversarial or fast, with or without watermarks, on any devices.

All randomness of a step comes from (seed, step), so a run that was interrupted anywhere resumes
from its checkpoint to exactly the weights of an undisturbed run. Devices, precision and data
parallelism are left to Lightning Fabric, which is imported only here and only when training starts.
"""

import contextlib
import copy
import hashlib
import logging
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.spawn import ProcessException
from torch.nn import functional

from countermark.attacks import Recording, pgd
from countermark.data import Examples, pixels
from countermark.device import (
    resolve_device,
    resolve_precision,
    seeded,
    sent,
    torchrun_processes,
)
from countermark.errors import CountermarkError
from countermark.evaluation import adversarial_accuracy, agreement, device_of, evaluating, predict
from countermark.fast import Recorded, capturable, prepare, quick_to_train, worth_preparing
from countermark.files import canonical_json, read_tensors, sha256, write_tensors
from countermark.terminal import bar, duration
from countermark.threat import Attack
from countermark.training.config import Hardware, TrainConfig
from countermark.training.turns import in_turn, seed_of, shuffled
from countermark.training.views import View, random_view

_CHECKPOINT_SECONDS = 30.0
_QUICK = 0.1  # seconds; a checkpoint that takes less is written after every epoch
_BETWEEN = 20  # times what a slower one takes lie between two of them
_LARGEST = 1 << 34  # bytes of a checkpoint
_MOST_CARRIED = 1 << 28  # bytes of carried perturbations, of which there are three copies at times
_SMALL_ROOM = 4 << 30  # bytes assumed to be free on a device that does not report them
_MOVED = 1000  # examples at a time that are moved to a device
_RESIDENT = 0.5  # of a GPU's free memory that the examples may take
_COLOURS = 3  # channels of an image in colour
_TOLD = 20  # steps from one line of progress to the next
_CHECKED = 500  # validation examples of the check for catastrophic overfitting
_CHECK_STEPS = 10
_UNITS = 127  # of a carried perturbation in one budget
_COLLAPSE = 20.0  # points of adversarial accuracy lost in one epoch: catastrophic overfitting
# Below this share of what the run started with, an epoch has collapsed, whatever later epochs may
# win back.
_START_SHARE = 0.25
_FLAT = 1e-12  # added to the norm of a gradient, which may be 0
_MOST_STEPS = 16  # with so many attack steps, a fall has another cause than too few steps

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Epoch:
    """Figures at the end of an epoch; accuracies in percent, `None` where nothing was measured.

    Attributes:
        epoch: its number, from 1.
        loss: mean training loss.
        accuracy: on the validation examples.
        adversarial_accuracy: on the first 500 of them, under a 10-step PGD of the training budget.
        watermark_accuracy: agreement with the watermark labels.
        attack_steps: steps of the training attack.
        redone: the fast objective collapsed in this epoch, which was undone and is run again with
            more steps.
    """

    epoch: int
    loss: float
    accuracy: float | None
    adversarial_accuracy: float | None
    watermark_accuracy: float | None
    attack_steps: int
    redone: bool = False

    def standing(self) -> str:
        """What was measured, for a line on standard error."""
        named = (
            ("of the validation images", self.accuracy),
            ("under attack", self.adversarial_accuracy),
            ("of the watermarks", self.watermark_accuracy),
        )
        return ", ".join(f"{value:.1f} % {what}" for what, value in named if value is not None)


def train(
    network: nn.Module,
    examples: Examples,
    config: TrainConfig,
    *,
    validation: Examples | None = None,
    watermarks: Examples | None = None,
    checkpoint: Path | None = None,
    after_epoch: Callable[[int, nn.Module], None] | None = None,
    title: str | None = None,
    bounded: bool = True,
) -> list[Epoch]:
    """Train `network` in place; it stays on the device that it was trained on.

    Several devices have a process each, which is started for the run. Where torchrun has started
    as many already, each of them calls this function with the same arguments, takes its part in
    the run, and gets the trained network.

    Args:
        network: pixels `(n, c, h, w)` of [0, 1] to logits, in float32; tied weights stay tied.
        examples: training images, uint8 or pixels of [0, 1], and labels.
        config: objective, schedule, embedding, seed, devices.
        validation: held-out examples for the check for catastrophic overfitting and for the
            progress line; never the test pool.
        watermarks: watermark images and their labels, embedded as `config.embedding` says.
        checkpoint: file to save to and to resume from, after each epoch and twice a minute where
            that takes little time; a run that it shows as finished is not run again. All processes
            have to see it.
        after_epoch: called in the first process with an epoch's number, from 1, and the network,
            before the epoch is in the checkpoint; after an interruption it may be called for the
            same epochs once more.
        title: names the progress bar; without it nothing is shown.
        bounded: refuse training images outside [0, 1] (see `data.pixels`).

    Returns:
        One record per epoch.

    Raises:
        CountermarkError: a checkpoint of another run, devices that do not exist, a network that is
            not in float32, no examples or an empty watermark set, images outside [0, 1], a loss
            or logits that are no longer finite, or processes of torchrun that were given different
            arguments.
    """
    _check(network, examples, validation, watermarks, bounded)
    hardware = resolve_hardware(config.hardware)
    # A run that was begun in one precision or on one kind of device does not go on in another.
    config = _carrying(
        replace(
            config,
            hardware=replace(hardware, accelerator=resolve_device(hardware.accelerator).type),
        ),
        examples,
    )
    fabric = open_hardware(hardware)
    if hardware.devices > min(config.batch_size, len(examples)):
        raise CountermarkError(
            f"{hardware.devices} devices cannot share batches of "
            f"{min(config.batch_size, len(examples))} examples; take fewer"
        )
    with seeded(fabric.device, None), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning_fabric")
        with tempfile.TemporaryDirectory() as temporary:
            # Weights come back through a file: the pipe from a forked process holds 64 KiB.
            result = Path(temporary) / "trained.safetensors"
            try:
                fabric.launch(
                    _run,
                    network,
                    examples,
                    config,
                    validation,
                    watermarks,
                    checkpoint,
                    after_epoch,
                    title,
                    result,
                )
            except ProcessException as error:
                # It comes from one of several processes, with its traceback as text.
                reason = str(error).strip().splitlines()[-1]
                raise CountermarkError(
                    f"training stopped in one of {hardware.devices} processes: {reason}"
                ) from error
            state, meta, _ = read_tensors(result, _LARGEST)
    network.to(fabric.device).load_state_dict(state)
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return [Epoch(**record) for record in meta["records"]]


def _check(
    network: nn.Module,
    examples: Examples,
    validation: Examples | None,
    watermarks: Examples | None,
    bounded: bool,
) -> None:
    """Refuse input that no run can use; the steps do not check the range of images again."""
    other = {each.dtype for each in network.parameters() if each.is_floating_point()} - {
        torch.float32
    }
    if other:
        raise CountermarkError(
            f"the network has weights of type {other.pop()}, and training takes float32; "
            "call network.float() first"
        )
    if len(examples) == 0:
        raise CountermarkError("there are no examples to train on; give at least one")
    if watermarks is not None and len(watermarks) == 0:
        raise CountermarkError(
            "the watermark set is empty, so nothing can be embedded; "
            "give watermarks, or None to train without"
        )
    for given, within in ((examples, bounded), (validation, True), (watermarks, True)):
        if given is not None and given.x.dtype != torch.uint8:
            pixels(given.x, bounded=within)


def open_hardware(hardware: Hardware) -> Any:
    """The Lightning Fabric of some hardware.

    Raises:
        CountermarkError: there is no such hardware.
    """
    from lightning_fabric import Fabric  # 3 s of import
    from lightning_fabric.plugins.environments import LightningEnvironment

    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    logging.getLogger("lightning_fabric").setLevel(logging.ERROR)
    found = resolve_hardware(hardware)
    device = resolve_device(found.accelerator)
    several, here = found.devices > 1, _processes_here(found.devices)
    devices = [device.index] if device.index is not None and not several else here
    precision: Any = found.precision
    joined = _joined(found.devices)
    own = "ddp_spawn" if device.type == "cuda" else "ddp_fork"
    try:
        return Fabric(
            accelerator=device.type,
            devices=devices,
            num_nodes=found.devices // here,
            strategy=("ddp" if joined else own) if several else "auto",
            # SLURM would number processes that are started here by its own.
            plugins=None if joined else LightningEnvironment(),
            precision=precision,
        )
    except (RuntimeError, ValueError) as error:
        raise CountermarkError(
            f"cannot train on {found.devices} {found.accelerator} device(s): {error}"
        ) from error


def _joined(processes: int) -> bool:
    """Whether a run on so many processes takes those of torchrun, and starts none."""
    return processes > 1 and torchrun_processes() > 0


def _processes_here(processes: int) -> int:
    """How many of them are on this machine; those of torchrun may be on several."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if _joined(processes) else processes


def resolve_hardware(hardware: Hardware) -> Hardware:
    """What `auto` means on this machine.

    Raises:
        CountermarkError: there is no such device, there are fewer of them, or torchrun started
            another number of processes.
    """
    device = resolve_device(hardware.accelerator)
    if hardware.devices > 1 and ":" in hardware.accelerator:
        raise CountermarkError(
            f"{hardware.accelerator} is one device; "
            f"leave its number out for {hardware.devices} of them"
        )
    started = torchrun_processes()
    if hardware.devices > 1 and started not in (0, hardware.devices):
        raise CountermarkError(
            f"torchrun started {started} process{'' if started == 1 else 'es'} for "
            f"{hardware.devices} devices; make the numbers equal"
        )
    wanted = _processes_here(hardware.devices)
    there = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device.type, wanted)
    if wanted > there:
        raise CountermarkError(f"there are no {wanted} {device.type} devices here; take {there}")
    named = str(device) if device.index else device.type  # the first one needs no number
    return Hardware(named, hardware.devices, resolve_precision(device, hardware.precision))


def _carrying(config: TrainConfig, examples: Examples) -> TrainConfig:
    """The same run, without carried perturbations where those of all examples are too large."""
    if not config.carry or config.attack is None or math.prod(examples.x.shape) <= _MOST_CARRIED:
        return config
    full = with_steps(replace(config.attack, steps=0), config.attack.steps)
    return replace(config, carry=False, attack=replace(full, random_start=True))


class _Run:
    """The state of one training process; everything in it but the data is in the checkpoint."""

    def __init__(
        self,
        fabric: Any,
        network: nn.Module,
        examples: Examples,
        config: TrainConfig,
        fingerprint: str,
    ) -> None:
        self.fabric = fabric
        self.config = config
        self.fingerprint = fingerprint
        self.layout = _layout(network, examples)
        network.to(memory_format=self.layout)  # type: ignore[call-overload]
        self.optimiser = torch.optim.SGD(
            network.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
            fused=fabric.device.type in ("cpu", "cuda"),
        )
        self.averaged = (
            copy.deepcopy(network).to(fabric.device).requires_grad_(False)
            if config.average
            else None
        )
        on_cpu = fabric.device.type == "cpu"
        self.precise = config.hardware.precision == "32-true"
        # On a GPU folding would take longer than the steps that it saves.
        crafts = config.attack is not None and not config.craft_in_training_mode
        self.prepares = crafts and on_cpu and worth_preparing(network)
        records = _records(network, fabric.device)
        self.crafting = Recording(network, self._attacked) if crafts and records else None
        self.descent = (
            Recorded(self._descend, self._unchanged) if records and fabric.world_size == 1 else None
        )
        self.wrapped, self.stepper = fabric.setup(
            quick_to_train(network) if on_cpu and self.precise else network, self.optimiser
        )
        self.network = network
        self.pushed: list[torch.Tensor] = [
            each
            for each in network.parameters()
            if config.push and each.requires_grad and each.dim() > 1
        ]
        self.dropouts = [
            layer for layer in network.modules() if isinstance(layer, nn.Dropout | nn.Dropout2d)
        ]
        self.step = 0
        self.saved = time.monotonic()  # when the last checkpoint was written
        self.cost = 0.0  # seconds that the quickest one took
        self.loss = 0.0  # summed over the epoch so far
        self.unread: list[tuple[int, torch.Tensor]] = []  # losses by step, not in the sum yet
        self.attack = config.attack
        self.best = 0.0  # highest adversarial accuracy after an epoch so far
        self.initial = 0.0  # that of the weights the run started with
        self.records: list[dict[str, Any]] = []
        self.carried = (
            _first_perturbations(examples, config).to(fabric.device) if config.carry else None
        )
        self.carried_before = None if self.carried is None else self.carried.clone()
        self.epoch_start = self.tensors()

    @property
    def result(self) -> nn.Module:
        """What the run returns and measures: the averaged network where there is one."""
        return self.network if self.averaged is None else self.averaged

    def descend(
        self, x: torch.Tensor, y: torch.Tensor, rate: float, push: bool = True
    ) -> torch.Tensor:
        """One step down the loss of the inputs `x` and labels `y`; returns that loss."""
        self._set_modes()
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        x = x.contiguous(memory_format=self.layout)
        with self._pushed(x, y, self.fabric.autocast) if push else contextlib.nullcontext():
            loss = functional.cross_entropy(self.wrapped(x), y)
            self.fabric.backward(loss)
        self.stepper.step()
        self.stepper.zero_grad(set_to_none=True)
        self.average(self.share)
        return loss.detach()

    def replay(self, x: torch.Tensor, y: torch.Tensor, rate: float) -> torch.Tensor:
        """The same as `descend` for batches of one size, replayed on a GPU."""
        assert self.descent is not None
        rates = [x.new_full((), number) for number in (rate, self.share)]
        self.descent.load(x.contiguous(memory_format=self.layout), y, *rates)
        loss: torch.Tensor = self.descent.replay()
        return loss.clone()

    def _descend(
        self, x: torch.Tensor, y: torch.Tensor, rate: torch.Tensor, share: torch.Tensor
    ) -> torch.Tensor:
        """What `replay` records."""
        self._set_modes()
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        with self._pushed(x, y, self._uncached):
            with self._uncached():
                logits = self.network(x)
            loss = functional.cross_entropy(logits.float(), y)
            loss.backward()  # type: ignore[no-untyped-call]
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.average(share)
        return loss.detach()

    @contextlib.contextmanager
    def _pushed(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        computing: Callable[[], contextlib.AbstractContextManager[Any]],
    ) -> Iterator[None]:
        """In the block, each layer's weights are moved up the loss, as far as `push` says.

        Gradients at weights that are so perturbed lead to flatter minima, where robustness carries
        over to new images (Wu, Xia and Wang, 2020, "AWP").
        """
        if not self.pushed:
            yield
            return
        weights = self.pushed
        with computing():
            logits = self.network(x)
        loss = functional.cross_entropy(logits.float(), y)
        slopes = list(torch.autograd.grad(loss, weights, materialize_grads=True))
        with torch.no_grad():
            if self.fabric.world_size > 1:  # each process has seen a share of the batch
                slopes = [self.fabric.all_reduce(slope) for slope in slopes]
            before = [weight.clone() for weight in weights]
            lengths = torch._foreach_norm(weights)
            torch._foreach_mul_(lengths, self.config.push)
            steepness = torch._foreach_norm(slopes)
            torch._foreach_add_(steepness, _FLAT)
            moves = torch._foreach_mul(slopes, torch._foreach_div(lengths, steepness))
            torch._foreach_add_(weights, list(moves))
        yield
        with torch.no_grad():
            torch._foreach_copy_(weights, before)

    def _set_modes(self) -> None:
        """Let the network compute as it does in training."""
        self.wrapped.train()
        if not self.config.dropout:
            for layer in self.dropouts:
                layer.eval()

    @property
    def share(self) -> float:
        """How far the average moves towards the weights in this step.

        Young averages move faster, or they would remember the first step for long.
        """
        return 1 - min(self.config.average, (self.step + 1) / (self.step + 10))

    def average(self, share: float | torch.Tensor) -> None:
        """Move the average towards the weights."""
        if self.averaged is None:
            return
        (means, values), counts = _pairs(self.averaged, self.network)
        moves = torch._foreach_sub(values, means)
        torch._foreach_mul_(moves, share)
        torch._foreach_add_(means, moves)
        for count, value in zip(*counts, strict=True):
            count.copy_(value)

    @contextlib.contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Undo at the end of the block what its steps did."""
        before = self.tensors()
        buffers = [buffer.clone() for buffer in self.network.buffers()]  # some are in no state
        try:
            yield
        finally:
            self.restore(before)
            for buffer, value in zip(self.network.buffers(), buffers, strict=True):
                buffer.copy_(value)

    def tensors(self) -> State:
        """A copy of weights, buffers, their average and momentum."""
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        if self.averaged is not None:
            tensors |= {
                f"averaged.{name}": value for name, value in self.averaged.state_dict().items()
            }
        for name, parameter in self.network.named_parameters():
            momentum = self.optimiser.state.get(parameter, {}).get("momentum_buffer")
            tensors[f"momentum.{name}"] = (
                torch.zeros_like(parameter) if momentum is None else momentum
            )
        return {name: value.detach().cpu().clone() for name, value in tensors.items()}

    def restore(self, tensors: State) -> None:
        """Put a copy that `tensors` made back in place."""
        for name, value in self.network.state_dict().items():
            value.copy_(tensors[f"network.{name}"])
        for name, value in self.averaged.state_dict().items() if self.averaged is not None else ():
            value.copy_(tensors[f"averaged.{name}"])
        for name, parameter in self.network.named_parameters():
            state = self.optimiser.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.empty_like(parameter)
            state["momentum_buffer"].copy_(tensors[f"momentum.{name}"])  # a recording uses it

    def read(self) -> None:
        """Add the losses that are waiting to the epoch's; all processes do it after the same step.

        Raises:
            CountermarkError: one of them is not finite.
        """
        if self.unread:
            # Their mean over the processes: a loss that is not finite stops all of them at once.
            losses = self.fabric.all_reduce(torch.stack([loss for _, loss in self.unread]))
            for (step, _), value in zip(self.unread, losses.tolist(), strict=True):
                _check_loss(value, step)
                self.loss += value
            self.unread.clear()

    @property
    def worth_saving(self) -> bool:
        """Whether a checkpoint takes little of the time since the last one."""
        apart = time.monotonic() - self.saved
        return self.cost < _QUICK or apart >= _BETWEEN * self.cost

    def save(self, path: Path | None) -> None:
        """Write the checkpoint, in the first process; all processes have shared what they have."""
        begun = time.monotonic()
        self.read()
        if path is None or self.fabric.global_rank != 0:
            return
        state = {
            **self.tensors(),
            **{f"start.{name}": value for name, value in self.epoch_start.items()},
        }
        if self.carried is not None and self.carried_before is not None:
            state |= {"carried": self.carried, "carried_before": self.carried_before}
        attack_steps = self.attack.steps if self.attack else 0
        run = {
            "run": self.fingerprint,
            "step": self.step,
            "loss": self.loss,
            "best": self.best,
            "initial": self.initial,
        }
        run["attack_steps"] = attack_steps
        write_tensors(path, state, {**run, "records": self.records}, mode=0o600)
        self.saved = time.monotonic()
        took = self.saved - begun
        self.cost = min(self.cost, took) if self.cost else took  # a disk that hung once is none

    def load(self, path: Path) -> None:
        try:
            tensors, meta, _ = read_tensors(path, _LARGEST)
        except CountermarkError as error:
            raise CountermarkError(f"{error}; delete it to start anew") from error
        if meta.get("run") != self.fingerprint:
            raise CountermarkError(
                f"{path} is the checkpoint of another run "
                "(options, data, weights, device or another kind of processor); "
                "delete it to start anew"
            )
        try:
            self._take(tensors, meta)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CountermarkError(
                f"{path} was changed after it was written ({error}); delete it to start anew"
            ) from error

    def _take(self, tensors: State, meta: dict[str, Any]) -> None:
        """Go on from the content of a checkpoint."""
        numbers = {"step": int, "attack_steps": int, "loss": float, "best": float, "initial": float}
        if (
            any(type(meta[name]) is not kind for name, kind in numbers.items())
            or meta["step"] < 0
            or meta["attack_steps"] < 0
        ):
            raise ValueError("its numbers are none of a run")
        self.restore(
            {name: value for name, value in tensors.items() if not name.startswith("start.")}
        )
        self.epoch_start = {
            name.removeprefix("start."): value
            for name, value in tensors.items()
            if name.startswith("start.")
        }
        if self.carried is not None:
            self.carried = tensors["carried"].to(self.carried.device)
            self.carried_before = tensors["carried_before"].to(self.carried.device)
        self.step, self.loss, self.records = meta["step"], meta["loss"], meta["records"]
        self.best, self.initial = meta["best"], meta["initial"]
        for record in self.records:
            Epoch(**record)
        if self.attack is not None:
            self.attack = with_steps(self.attack, meta["attack_steps"])

    def perturb(
        self, chosen: torch.Tensor, x: torch.Tensor, y: torch.Tensor, grown: float, view: View
    ) -> torch.Tensor:
        """Craft the batch of the examples `chosen`, shown in a `view`, with the attack.

        The attack's budget and step size are scaled by `grown`.
        """
        attack = self.attack
        if attack is None:
            return x
        unit = attack.epsilon / _UNITS
        options: dict[str, Any] = {
            **asdict(attack),
            "epsilon": grown * attack.epsilon,
            "step_size": grown * attack.step_size,
        }
        options["start"] = (
            None if self.carried is None else x + view.of(self.carried[chosen]).to(x.dtype) * unit
        )
        if self.crafting is not None and options["epsilon"] > 0:
            crafted = self.crafting(x, y, **options)
        else:
            self.wrapped.train(self.config.craft_in_training_mode)
            quick = (
                prepare(self.network, torch.float32 if self.precise else torch.bfloat16)
                if self.prepares
                else self.network
            )
            with contextlib.nullcontext() if self.prepares else self.fabric.autocast():
                crafted = pgd(quick, x, y, **options, bounded=False)
        if self.carried is not None:
            self.carried[chosen] = view.undo(((crafted - x) / unit).round_().to(torch.int8))
        return crafted

    @contextlib.contextmanager
    def _attacked(self) -> Iterator[None]:
        """How the network computes while it is attacked."""
        with evaluating(self.network), self._uncached():
            yield

    def _uncached(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of the training, without a cache of cast weights.

        A recording would keep such a cache for ever.
        """
        if self.precise:
            return contextlib.nullcontext()
        return torch.autocast(self.fabric.device.type, torch.bfloat16, cache_enabled=False)

    def share_carried(self) -> None:
        """Give every process the perturbations that the others found.

        In an epoch each example is crafted by one process only. The others still have its
        perturbation of before the epoch, or that of this epoch if it was shared already.
        """
        if (
            self.carried is not None
            and self.carried_before is not None
            and self.fabric.world_size > 1
        ):
            high = self.fabric.all_reduce(self.carried.clone(), reduce_op="max")
            low = self.fabric.all_reduce(self.carried.clone(), reduce_op="min")
            self.carried = torch.where(high == self.carried_before, low, high)

    def share_buffers(self, network: nn.Module) -> None:
        """Give every process the buffers of the first one, such as batch norm's statistics.

        DDP does so before the next step, but attacks and measurements come earlier.
        """
        if self.fabric.world_size == 1:
            return
        buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
        if buffers:
            together = torch.cat([buffer.flatten() for buffer in buffers])
            torch.distributed.broadcast(together, 0)
            parts = torch.split(together, [buffer.numel() for buffer in buffers])
            for buffer, part in zip(buffers, parts, strict=True):
                buffer.copy_(part.view_as(buffer))


def _first_perturbations(examples: Examples, config: TrainConfig) -> torch.Tensor:
    """Random perturbations to begin with, int8 in units of 1/127 of the budget.

    They are up to half a budget large, or next to none if the budget grows.
    """
    most = _UNITS // (20 if config.grow_budget else 2)
    generator = torch.Generator().manual_seed(seed_of(config.seed, "carried"))
    return torch.randint(-most, most + 1, examples.x.shape, generator=generator, dtype=torch.int8)


def with_steps(attack: Attack, steps: int) -> Attack:
    """The same attack in another number of steps.

    Its step size still covers the budget 1.25 times (2.5 times for several steps).
    """
    if steps == attack.steps:
        return attack
    return replace(
        attack, steps=steps, step_size=(1.25 if steps == 1 else 2.5 / steps) * attack.epsilon
    )


def _run(
    fabric: Any,
    network: nn.Module,
    examples: Examples,
    config: TrainConfig,
    validation: Examples | None,
    watermarks: Examples | None,
    checkpoint: Path | None,
    after_epoch: Callable[[int, nn.Module], None] | None,
    title: str | None,
    result: Path,
) -> None:
    joined = _joined(fabric.world_size)
    if fabric.world_size > 1 and fabric.device.type == "cpu" and not joined:
        # A forked process that finds OpenMP's threads gone would wait for them for ever.
        torch.set_num_threads(1)
    if fabric.world_size > 1:
        torch.backends.cudnn.deterministic = True  # of this process, which was made for the run
    batch_size = min(config.batch_size, len(examples))
    per_epoch = len(examples) // batch_size
    total = config.epochs * per_epoch
    fingerprint = _fingerprint(network, examples, config, validation, watermarks)
    if joined:
        _check_same(fabric, fingerprint, checkpoint is not None)
    run = _Run(fabric, network, examples, config, fingerprint)
    if checkpoint is not None and fabric.broadcast(checkpoint.exists()):
        run.load(checkpoint)
    elif config.objective == "fast" and validation is not None:
        run.initial = _measured(run, run.network, validation)
    near = _near(examples, fabric.device)
    marks = watermarks.to(fabric.device) if watermarks is not None else None
    shown = (
        bar(title, total, run.step)
        if title is not None and fabric.global_rank == 0
        else contextlib.nullcontext(None)
    )
    begun = run.step // per_epoch
    with shown as progress:
        while run.step < total:
            epoch, position = divmod(run.step, per_epoch)
            order = shuffled(len(examples), config.seed, "epoch", epoch).to(near.y.device)
            for number in range(position, per_epoch):
                chosen = order[number * batch_size : (number + 1) * batch_size][
                    fabric.global_rank :: fabric.world_size
                ]
                batch = Examples(*near.batch(chosen, fabric.device))
                loss = _step(run, batch, chosen, marks, (run.step + 0.5) / total)
                run.unread.append((run.step, loss))
                run.share_buffers(run.network)
                run.step += 1
                if run.step % _unread(fabric.device) == 0:
                    run.read()
                if progress is not None:
                    progress.advance()
                    if run.step % _TOLD == 0:
                        mean = run.loss / (number + 1)
                        progress.text(f"epoch {epoch + 1} of {config.epochs}, loss {mean:.3f}")
                if checkpoint is not None and number + 1 < per_epoch and _due(run):
                    run.share_carried()
                    run.save(checkpoint)
            if marks is not None and config.embedding == "epoch":
                _embedding_pass(run, marks, epoch, (run.step - 0.5) / total)
            run.share_carried()
            record = _end_epoch(run, epoch, per_epoch, validation, marks)
            if progress is not None and record.redone:
                progress.note(
                    f"{title}: epoch {record.epoch} collapsed (catastrophic overfitting) "
                    f"and is run again with {2 * record.attack_steps} attack steps"
                )
                progress.advance(-per_epoch)
            if after_epoch is not None and fabric.global_rank == 0 and not record.redone:
                after_epoch(record.epoch, run.result)
            if run.step == total or run.worth_saving:
                run.save(checkpoint)
            if progress is not None and run.step == total:
                progress.note(_trained(title, record, config.epochs - begun, progress.seconds))
    run.crafting = run.descent = None  # gives their memory on the device back
    if fabric.global_rank == 0 or joined:
        # A file holds no tied weights: each name has a copy. Loading them in place keeps the ties.
        state = {
            name: value.detach().cpu().clone() for name, value in run.result.state_dict().items()
        }
        write_tensors(result, state, {"records": run.records}, mode=0o600)


def _check_same(fabric: Any, fingerprint: str, kept: bool) -> None:
    """Refuse to begin where the processes of torchrun were given different runs."""
    number = torch.tensor(2 * int(fingerprint[:15], 16) + kept, device=fabric.device)
    if len(fabric.all_gather(number).unique()) > 1:
        raise CountermarkError(
            "the processes of torchrun have different weights, images or settings; call "
            "torch.manual_seed before the network is made, and give each process all images and "
            "the same checkpoint"
        )


def _due(run: _Run) -> bool:
    """Whether it is time for a checkpoint.

    The clocks of several processes differ, so the first one decides for all of them. It is asked
    only now and then, since the others wait for its answer.
    """
    due = time.monotonic() - run.saved > _CHECKPOINT_SECONDS and run.worth_saving
    if run.fabric.world_size == 1:
        return due
    return run.step % _TOLD == 0 and bool(run.fabric.broadcast(due))


def _trained(title: str | None, last: Epoch, epochs: int, seconds: float) -> str:
    """What stays on the screen of a training: how long it took, and what came of it."""
    counted = f"{epochs} epoch{'' if epochs == 1 else 's'}"
    line = f"{title}: trained for {counted} in {duration(seconds)}"
    return f"{line}; {last.standing()}" if last.standing() else line


_Pairs = tuple[list[torch.Tensor], list[torch.Tensor]]


def _pairs(averaged: nn.Module, network: nn.Module) -> tuple[_Pairs, _Pairs]:
    """What is averaged, and what is copied (batch norm counts steps), each with what it is of.

    Tied weights are in it once.
    """
    weights = network.state_dict()
    means: _Pairs = ([], [])
    counts: _Pairs = ([], [])
    for name, mean in _apart(averaged.state_dict()).items():
        for pair, tensor in zip(
            means if mean.is_floating_point() else counts, (mean, weights[name]), strict=True
        ):
            pair.append(tensor)
    return means, counts


def _records(network: nn.Module, device: torch.device) -> bool:
    """Whether the steps of a training run from recordings."""
    return device.type == "cuda" and capturable(network)


def _layout(network: nn.Module, examples: Examples) -> torch.memory_format:
    """How batches and weights lie in memory: channels last for images in colour.

    Convolutions over many channels take less than half the time so (docs/log.md). Code that wants
    the other order, such as `view` behind a convolution, keeps it.
    """
    if examples.x.shape[1] != _COLOURS:
        return torch.contiguous_format
    few = (
        pixels(examples.x[:2], bounded=False)
        .to(device_of(network))
        .contiguous(memory_format=torch.channels_last)
    )
    try:
        with evaluating(network), torch.no_grad():
            network(few)
    except RuntimeError:
        return torch.contiguous_format
    return torch.channels_last


def _near(examples: Examples, device: torch.device) -> Examples:
    """The examples on the device if they fit beside the network.

    Otherwise they stay where they are, to be moved batch by batch.
    """
    if device.type == "cpu":
        return examples
    size = math.prod(examples.x.shape) * examples.x.dtype.itemsize
    room = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _SMALL_ROOM
    if size > _RESIDENT * room:
        return examples
    x = torch.empty(examples.x.shape, dtype=examples.x.dtype, device=device)
    for i in range(0, len(x), _MOVED):  # the memory of the CPU need not hold all of them
        x[i : i + _MOVED] = examples.x[i : i + _MOVED].to(device)
    return Examples(x, examples.y.to(device))


def _apart(state: State) -> State:
    """Weights and buffers by name, tied ones by the first of their names alone."""
    first = {(value.data_ptr(), value.numel()): name for name, value in reversed(state.items())}
    return {
        name: value
        for name, value in state.items()
        if first[value.data_ptr(), value.numel()] == name
    }


def _step(
    run: _Run, batch: Examples, chosen: torch.Tensor, marks: Examples | None, done: float
) -> torch.Tensor:
    """Take one optimiser step on a batch.

    Args:
        run: the state of the process.
        batch: the examples of the step.
        chosen: their numbers among all examples.
        marks: watermarks, or `None`.
        done: share of the run that is complete.

    Returns:
        The mean loss, on the run's device.
    """
    config, fabric = run.config, run.fabric
    _set_seed(fabric.device, seed_of(config.seed, "step", run.step, fabric.global_rank))
    x, y = pixels(batch.x, bounded=False), batch.y  # `train` has looked at their range
    grown = _grown(config, done)
    view = random_view(len(x), config.flip, config.shift).to(x.device)
    x = view.of(x)
    inputs = [run.perturb(chosen, x, y, grown, view)]
    if marks is not None and config.embedding == "interleaved":
        most = config.watermark_batch
        turn = in_turn(run.step * most, most, len(marks), config.seed)
        turn = sent(turn[fabric.global_rank :: fabric.world_size], x.device)
        inputs.append(pixels(marks.x[turn], bounded=False))
        y = torch.cat((y, marks.y[turn]))
    descend = run.descend if run.descent is None else run.replay
    return descend(torch.cat(inputs), y, _rate(config, done))


def _check_loss(value: float, step: int) -> None:
    """Refuse to go on from a loss that is not finite."""
    if not math.isfinite(value):
        raise CountermarkError(
            f"the training loss is {value} at step {step}: the weights diverged, "
            "or were not sound to begin with"
        )


def _unread(device: torch.device) -> int:
    """Steps whose losses are read together: reading a number from a GPU waits for the GPU."""
    return 1 if device.type == "cpu" else _TOLD


def _embedding_pass(run: _Run, marks: Examples, epoch: int, done: float) -> None:
    """Make the pass of Algorithm 1 over the watermarks, after an epoch.

    It uses plain cross-entropy and the same optimiser.
    """
    order = shuffled(len(marks), run.config.seed, "watermarks", epoch)
    for number, chosen in enumerate(torch.split(order, run.config.watermark_batch)):
        _set_seed(run.fabric.device, seed_of(run.config.seed, "watermark step", epoch, number))
        share = chosen[run.fabric.global_rank :: run.fabric.world_size]
        # Batch norm needs two examples, and DDP needs every process.
        if len(chosen) >= 2 * run.fabric.world_size:
            x = pixels(marks.x[share], bounded=False)
            loss = run.descend(x, marks.y[share], _rate(run.config, done), push=False)
            _check_loss(float(run.fabric.all_reduce(loss)), run.step)


def _end_epoch(
    run: _Run, epoch: int, per_epoch: int, validation: Examples | None, marks: Examples | None
) -> Epoch:
    """Measure the epoch.

    Under the fast objective, an epoch that collapsed is undone, and attacks take twice the steps
    from there on.
    """
    run.read()
    config = run.config
    clean = adversarial = watched = marked = None
    run.share_buffers(run.network)
    run.share_buffers(run.result)

    def correct(part: Examples) -> float:
        return agreement(predict(run.result, part.x), part.y.cpu())

    if validation is not None:
        clean = _over_all(run.fabric, correct, validation)
        if config.attack is not None:
            # The network is watched: an average would show a collapse epochs later.
            watched = _measured(run, run.network, validation)
            adversarial = (
                watched if run.averaged is None else _measured(run, run.averaged, validation)
            )
    if marks is not None:
        marked = _over_all(run.fabric, correct, marks)
    attack_steps = run.attack.steps if run.attack else 0
    fallen = watched is not None and watched < run.best - _COLLAPSE
    least = run.initial * _START_SHARE
    if validation is not None and watched is not None and watched < least and not fallen:
        # While the budget grows, the network need not resist all of it.
        grown = _grown(config, (run.step - 0.5) / (config.epochs * per_epoch))
        fallen = (watched if grown == 1 else _measured(run, run.network, validation, grown)) < least
    collapsed = config.objective == "fast" and fallen and attack_steps < _MOST_STEPS
    record = Epoch(
        epoch + 1, run.loss / per_epoch, clean, adversarial, marked, attack_steps, collapsed
    )
    run.loss = 0.0
    if collapsed and run.attack is not None:
        run.restore(run.epoch_start)
        run.carried = None if run.carried_before is None else run.carried_before.clone()
        run.attack = with_steps(run.attack, 2 * run.attack.steps)
        run.step = epoch * per_epoch
    else:
        run.best = max(run.best, watched or 0.0)
        run.epoch_start = run.tensors()
        run.carried_before = None if run.carried is None else run.carried.clone()
    run.records.append(asdict(record))
    return record


def _measured(run: _Run, network: nn.Module, validation: Examples, share: float = 1.0) -> float:
    """Adversarial accuracy on a few validation examples, in enough steps to detect a collapse.

    It is that under a share of the budget.
    """
    assert run.config.attack is not None
    check = with_steps(run.config.attack, _CHECK_STEPS)
    check = replace(check, epsilon=share * check.epsilon, step_size=share * check.step_size)

    def left(part: Examples) -> float:
        return adversarial_accuracy(network, part, check, seed=run.config.seed)

    return _over_all(run.fabric, left, validation[:_CHECKED])


def _over_all(fabric: Any, share: Callable[[Examples], float], examples: Examples) -> float:
    """A share of the examples, in percent, of which each process measures its part."""
    if fabric.world_size == 1:
        return share(examples)
    part = examples[fabric.global_rank :: fabric.world_size]
    count = torch.tensor(round(share(part) * len(part) / 100), device=fabric.device)
    return 100 * int(fabric.all_reduce(count, reduce_op="sum")) / max(len(examples), 1)


def _grown(config: TrainConfig, done: float) -> float:
    """The share of the budget that the attack has at a share of the run."""
    return min(1.0, done / config.warmup) if config.grow_budget and config.warmup > 0 else 1.0


def _rate(config: TrainConfig, done: float) -> float:
    if config.schedule == "constant":
        return config.learning_rate
    rising = done / config.warmup if config.warmup > 0 else 1.0
    return config.learning_rate * min(rising, (1 - done) / (1 - config.warmup))


def _set_seed(device: torch.device, seed: int) -> None:
    """Seed what a step draws from.

    `torch.manual_seed` also visits devices that do not exist, which takes it a millisecond.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def _fingerprint(
    network: nn.Module,
    examples: Examples,
    config: TrainConfig,
    validation: Examples | None,
    watermarks: Examples | None,
) -> str:
    """What makes two runs the same run.

    It is computed before the first step, so the initial weights are part of it.
    """
    weights = hashlib.sha256()
    for name, value in network.state_dict().items():
        weights.update(name.encode())
        weights.update(value.detach().cpu().contiguous().numpy().tobytes())
    return sha256(
        canonical_json(
            {
                "config": asdict(config),
                "examples": examples.digest,
                "validation": validation.digest if validation is not None else None,
                "watermarks": watermarks.digest if watermarks is not None else None,
                "weights": weights.hexdigest(),
            }
        )
    )
