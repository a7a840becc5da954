"""A pretend device, `away`, that computes on the processor but refuses what a GPU refuses.

Its tensors wrap CPU tensors. An operation that mixes one of them with a plain tensor raises an
error, as mixing GPU and CPU tensors does. So does filling one of them from a CPU generator. A test
without a GPU therefore finds a tensor that was left on the processor.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing

APART = "COUNTERMARK_TESTS_APART"
"""Set where a process was made for the tests of the pretend device."""

_MAY_MIX = ("copy_", "_to_copy")  # what moves tensors
_TAKE_INDICES = (
    "index",
    "index_put_",
    "index_put",
    "_index_put_impl_",
)  # a GPU takes the processor's indices here


class _Module:
    """What `torch.away` has to have."""

    @staticmethod
    def is_available() -> bool:
        return True

    is_initialized = is_available

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def manual_seed_all(seed: int) -> None:  # its random numbers are the processor's
        return

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16]


class Away(torch.Tensor):
    """A tensor of the pretend device; `here` is what it wraps."""

    here: torch.Tensor

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> "Away":
        result = torch.Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            here.stride(),
            here.storage_offset(),
            dtype=here.dtype,
            device="away:0",
            requires_grad=False,
        )
        result.here = here
        return result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> Any:
        return self.here.tolist()

    def __repr__(self) -> str:
        return f"Away({self.here!r})"


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket.__name__
    leaves = pytree.tree_leaves((args, kwargs))
    away = [leaf for leaf in leaves if isinstance(leaf, Away)]
    left = [
        leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Away)
    ]
    if name in _TAKE_INDICES:
        left = [] if isinstance(args[0], Away) else left
    if name not in _MAY_MIX and away and any(tensor.dim() or name == "cat" for tensor in left):
        raise RuntimeError(
            f"expected all tensors on one device, but {name} got some on away:0"
            " and some on the processor"
        )
    if any(isinstance(leaf, torch.Generator) for leaf in leaves):
        raise RuntimeError(f"expected a generator of away:0, but {name} got one of the processor")
    target = kwargs.get("device")
    inside = {**kwargs, **({"device": torch.device("cpu")} if target is not None else {})}
    if inside.pop("pin_memory", None):
        raise RuntimeError("only the processor's memory can be pinned")
    found = func(
        *pytree.tree_map_only(Away, lambda leaf: leaf.here, args),
        **pytree.tree_map_only(Away, lambda leaf: leaf.here, inside),
    )
    if target is not None and torch.device(target).type == "cpu":
        return found
    wrapped = pytree.tree_map_only(torch.Tensor, Away, found)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if away else wrapped


def _boxed(operation: Any, *args: Any, **kwargs: Any) -> Any:
    return _run(operation, args, kwargs)


_library: list[Any] = []


def pretend_device() -> torch.device:
    """Register the device in this process, once."""
    if not _library:
        backend_registration = pytest.importorskip("torch.utils.backend_registration")
        if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
            pytest.skip("this PyTorch knows no devices in Python")
        backend_registration._setup_privateuseone_for_python_backend(
            "away", backend_module=_Module()
        )
        made = torch.library.Library("_", "IMPL")
        made.fallback(_boxed, "PrivateUse1")
        _library.append(made)
    return torch.device("away:0")


class Fabric:
    """What training asks of Lightning's Fabric, for one process on the pretend device."""

    world_size, global_rank = 1, 0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def launch(self, function: Any, *args: Any) -> Any:
        return function(self, *args)

    def setup(self, network: torch.nn.Module, optimiser: torch.optim.Optimizer) -> tuple[Any, Any]:
        return network.to(self.device), optimiser

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def broadcast(self, value: Any) -> Any:
        return value

    def all_reduce(self, value: torch.Tensor) -> torch.Tensor:
        return value


def parameters_away(network: torch.nn.Module) -> Iterator[bool]:
    return (isinstance(value.data, Away) for value in network.state_dict().values())
