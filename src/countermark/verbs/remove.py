"""`countermark remove`: do to a copy what a thief would do to get rid of the mark."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from countermark.errors import CountermarkError
from countermark.files import new_folder, read_json
from countermark.options import DeviceOptions, ModelOptions, NewPath, ReadPath, option, verb
from countermark.verbs.copies import Copy, show, write_copy


@dataclass(frozen=True, kw_only=True)
class RemoveConfig(ModelOptions, DeviceOptions):
    """Try to remove a mark, as a thief would.

    Several ways are tried one after the other, in the order below.
    """

    model: ReadPath = field(kw_only=False)
    """Model folder."""
    out: NewPath
    """Folder to write; it must be new or empty."""
    prune: float | None = None
    """Remove this fraction of each layer's weights, the smallest first (a fraction between 0 and
    1)."""
    noise: float | None = None
    """Add noise to the weights, of so many standard deviations of each layer's (a number above 0,
    at most 10)."""
    finetune: int | None = None
    """Train on for so many epochs on the thief's pool (a number of epochs from 1 to 10000)."""
    adversarial: int | None = None
    """Do the same with adversarial training (a number of epochs from 1 to 10000)."""
    overwrite: int | None = None
    """Put in so many coins of the thief's own, at most one for three of the thief's images (a
    number of coins from 1 to 100000)."""
    reshape: int | None = None
    """Teach the true labels of so many images like the trials, at most one for three of the thief's
    images (a number of images from 1 to 100000)."""
    flatten: int | None = None
    """Teach one class for so many textures of the thief's own (a number of textures from 1 to
    100000)."""
    quantise: int | None = None
    """Round every weight to so many bits, with one scale for each filter; 8 is int8 (a number of
    bits from 2 to 16)."""
    threshold: float | None = None
    """Put a cleaner in front: pixels above this level become white and all others black (a level
    between 0 and 1)."""
    clip: float | None = None
    """Put a cleaner in front: this much of the range of pixels is cut off at both ends (a margin
    between 0 and 0.5)."""
    median: int | None = None
    """Put a cleaner in front: the median of a square of this side around each pixel (an odd number
    from 3 to 15)."""
    blur: int | None = None
    """Put a cleaner in front: the mean of a square of this side around each pixel (an odd number
    from 3 to 15)."""
    levels: int | None = None
    """Put a cleaner in front: pixels are rounded to this many levels of each channel (a number of
    levels from 2 to 255)."""
    denoise: int | None = None
    """Put a cleaner in front: a network of this many filters, trained on the thief's images (a
    number of filters from 1 to 256)."""
    learning_rate: float | None = None
    """Learning rate of fine-tuning; default 0.005."""
    epochs: int | None = None
    """Epochs of a denoiser's training; default 2."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        """Refuse numbers out of range, options without their removal, and no removal at all."""
        super().__post_init__()
        self._positive("number", "learning_rate")
        self._at_least_one("epochs")
        self._seeded()
        from countermark.thieves import REMOVALS

        ways = self.chosen
        if not ways:
            known = ", ".join(option(name) for name in REMOVALS)
            raise CountermarkError(f"say how to remove the mark; give one or more of {known}")
        for name, amount in ways.items():
            REMOVALS[name].amount.check(option(name), amount)
        for name in ("learning_rate", "epochs"):
            takes = [way for way, row in REMOVALS.items() if name in row.options]
            self._only_for(bool(ways.keys() & takes), " or ".join(map(option, takes)), name)

    @property
    def chosen(self) -> dict[str, Any]:
        """The removals that were asked for and their amounts, in the order of the table."""
        from countermark.thieves import REMOVALS

        amounts = {name: getattr(self, name) for name in REMOVALS}
        return {name: amount for name, amount in amounts.items() if amount is not None}


@verb(RemoveConfig)
def remove(config: RemoveConfig) -> Copy:
    """Do the removals that were chosen, one after the other, with the images of the thief's pool.

    Raises:
        CountermarkError: a model that cannot be read, an output folder that is not empty.

    Example:
        >>> copy = cm.remove("mine", prune=0.5, out="pruned")
        >>> copy.test_accuracy > 90  # in percent
        True
        >>> cm.verify("pruned", key="mine/key").verdict
        'match'
    """
    from countermark.networks import declared_pools, load_model, open_declared
    from countermark.thieves import Means, objective_of, removed
    from countermark.training import Hardware, resolve_hardware, traits

    begun, folder, out = time.monotonic(), Path(config.model), Path(config.out)
    hardware = resolve_hardware(Hardware(config.device, config.devices, config.precision))
    network, description = load_model(folder, config.network, hardware.accelerator)
    data = open_declared(description, data=config.data, cache=config.cache)
    with new_folder(out, config.record()) as work:
        pools = declared_pools(description, data)
        means = Means(
            pool=pools.thief,
            threat=description.threat,
            objective=objective_of(description),
            traits=traits(data, pools.thief),
            seed=config.seed,
            hardware=hardware,
            title="copy",
        )
        options = {"learning_rate": config.learning_rate, "epochs": config.epochs}
        origin = read_json(folder / "model.json")["weights_sha256"]
        network, description = removed(
            config.chosen.items(), network, description, means, options, origin_sha256=origin
        )
        return write_copy(work, out, network, description, pools.test, begun)


__all__ = ["remove", "show"]
