"""Networks from anywhere: a name of ours, `module:function`, or a module that is there already."""

from collections.abc import Callable, Sequence

from torch import nn

from countermark.errors import CountermarkError
from countermark.networks.named import NETWORKS, build
from countermark.text import brief


def open_network(
    place: str | Callable[..., nn.Module] | nn.Module,
    shape: tuple[int, int, int],
    classes: int,
    *,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    seed: int | None = None,
    checked: bool = True,
) -> nn.Module:
    """Build a network from pixels of [0, 1] to logits."""
    if isinstance(place, str):
        if place in NETWORKS:
            return build(place, shape, classes, seed)
        raise CountermarkError(f"unknown network {brief(place)}; choose one of {', '.join(NETWORKS)}")
    return place if isinstance(place, nn.Module) else place(shape, classes)
