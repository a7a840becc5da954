"""Where computing happens: devices by name, and what a batch is on each of them.

A device is named on the command line or in a configuration, and resolved once, before anything is
hashed or saved. From there on it is where the model is: whoever runs a model moves images to it
batch by batch, and brings back labels.

PyTorch is imported when a device is looked for, so that a misspelt name is refused before that.
"""

import contextlib
import functools
import math
import os
import platform
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from countermark.errors import CountermarkError
from countermark.text import brief

if TYPE_CHECKING:
    import torch

_NAMED = re.compile(r"auto|cpu|mps|cuda(:[0-9]{1,4})?")
_PRECISIONS = {"32-true": "float32", "bf16-mixed": "bf16"}
_ON_CPU = 1 << 20  # values of the images that go through a model at once: 341 of 32x32x3
_ON_GPU = 7_680_000  # 2,500 of 32x32x3, whose activations in a residual network fill a large GPU
_LARGE = 40 << 30  # bytes of a large GPU's memory; on a smaller one batches are smaller as well
_FEWEST = 4  # images of the smallest batch


def check_device(name: str) -> None:
    """Refuse what is no name of a device.

    Whether there is such a device, `resolve_device` finds out.

    Raises:
        CountermarkError: it is none of `auto`, `cpu`, `cuda`, `cuda:N` and `mps`.
    """
    if not _NAMED.fullmatch(name):
        known = "choose one of auto, cpu, cuda, cuda:N, mps"
        raise CountermarkError(f"unknown device {brief(name)}; {known}")


def resolve_device(device: "str | torch.device" = "auto") -> "torch.device":
    """Find a device of this machine.

    Args:
        device: `auto` (the first CUDA device where there is one, else Apple's GPU, else the
            processor), `cpu`, `cuda` (the first of them), `cuda:N` or `mps`.

    Returns:
        The device, with its number where there may be several.

    Raises:
        CountermarkError: no such name, or no such device here.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    import torch

    name = str(device)
    if not isinstance(device, torch.device):
        check_device(name)
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if found else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise CountermarkError("there is no Apple GPU (mps) that PyTorch can use here; take cpu")
    if kind != "cuda":
        return torch.device(kind)
    if not found:
        built = "finds none" if torch.version.cuda else "was built without CUDA"
        raise CountermarkError(
            f"there is no cuda device here: PyTorch {torch.__version__} {built}; take cpu, "
            "or install a driver and a build of PyTorch that fit"
        )
    if int(number or 0) >= found:
        there = "the only one is cuda:0" if found == 1 else f"there are cuda:0 to cuda:{found - 1}"
        raise CountermarkError(f"there is no device {name} here; {there}")
    return torch.device("cuda", int(number or 0))


def resolve_precision(device: "torch.device", precision: str = "auto") -> str:
    """What a precision means on a device.

    Args:
        device: where computing happens.
        precision: `auto` (bf16 where the device computes in it, else float32), `32-true` or
            `bf16-mixed`.

    Returns:
        `32-true` or `bf16-mixed`.

    Raises:
        CountermarkError: no such precision.
    """
    if precision == "auto":
        return "bf16-mixed" if computes_bf16(device) else "32-true"
    if precision not in _PRECISIONS:
        known = ", ".join(("auto", *_PRECISIONS))
        raise CountermarkError(f"unknown precision {brief(precision)}; choose one of {known}")
    return precision


def computes_bf16(device: "torch.device | str") -> bool:
    """Whether a device multiplies bf16 matrices by instructions of its own."""
    import torch

    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_available() and bool(
            torch.cuda.is_bf16_supported(including_emulation=False)
        )
    return kind == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())  # AMX implies it


def describe(device: "str | torch.device", precision: str | None = None) -> str:
    """Name a device in a result, and the precision of the computing there.

    Args:
        device: the device, as `resolve_device` takes it.
        precision: as `resolve_precision` takes it; none where all of it is in float32.

    Returns:
        For example `cuda:0 (NVIDIA H100 80GB HBM3), bf16`, or `cpu (AMD EPYC 9R14), float32`.
    """
    import torch

    device = resolve_device(device)
    model = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    name = str(device) + (f" ({model})" if model else "")
    return f"{name}, {_PRECISIONS[resolve_precision(device, precision or '32-true')]}"


@functools.cache
def _processor() -> str:
    """The processor's model, as far as the system tells it."""
    with contextlib.suppress(OSError):
        found = re.search(
            r"^model name\s*: *(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def torchrun_processes() -> int:
    """How many processes torchrun started, this one among them; 0 where it started none."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def batch_size(
    device: "torch.device", shape: Sequence[int], most: int, most_on_gpu: int = 2500
) -> int:
    """How many images to run through a model at once.

    A processor is quickest while activations stay in its cache, a GPU while it has much to do.
    Large images come in smaller batches everywhere, since their activations have to fit.

    Args:
        device: where the model is.
        shape: one image, `(channels, height, width)`.
        most: images at a time on a processor.
        most_on_gpu: images at a time elsewhere.
    """
    import torch

    values = max(1, math.prod(shape))
    if device.type == "cpu":
        return max(_FEWEST, min(most, _ON_CPU // values))
    share = 1.0
    if device.type == "cuda":
        share = min(1.0, torch.cuda.get_device_properties(device).total_memory / _LARGE)
    return max(_FEWEST, min(most_on_gpu, int(share * _ON_GPU) // values))


def sent(tensor: "torch.Tensor", device: "torch.device") -> "torch.Tensor":
    """The tensor on the device; the host does not wait for a GPU that is at work."""
    return tensor.to(device, non_blocking=device.type == "cuda")


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Let cuDNN choose deterministic kernels in the block, and leave its other settings alone.

    `torch.backends.cudnn.flags` switches cuDNN off unless it is told not to, and convolutions then
    take fifty times as long.
    """
    import torch

    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        yield
    finally:
        torch.backends.cudnn.deterministic = before


@contextlib.contextmanager
def seeded(device: "torch.device", seed: int | None) -> Iterator[None]:
    """Make the block's randomness a function of the seed, and restore torch's generators after it.

    In the block, cuDNN chooses deterministic kernels, so that one device gives the same numbers
    again.

    Args:
        device: where the block computes; its generator is seeded along with the CPU's.
        seed: the seed; with None, the generators continue from their present state.
    """
    import torch

    forked = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    state = torch.mps.get_rng_state() if device.type == "mps" else None
    try:
        with forked, deterministic():
            if seed is not None:
                torch.manual_seed(seed)
            yield
    finally:
        if state is not None:
            torch.mps.set_rng_state(state)
