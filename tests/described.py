"""Descriptions of models in few words."""

from typing import Any

from countermark.data import known
from countermark.networks import DataRecord, Description


def described(
    network: str,
    shape: tuple[int, int, int],
    classes: int,
    data: str,
    epsilon: float,
    seed: int,
    history: tuple[dict[str, Any], ...] = (),
) -> Description:
    """A model for the images of a data set that is known, whose digest nobody looks at."""
    names = tuple(map(str, range(classes)))
    threat = known(data).threat.at(epsilon=epsilon)
    return Description(
        network, shape, names, DataRecord(data, "0" * 64), threat, seed, history=history
    )
