"""`countermark remove`: do to a copy what a thief would do to get rid of the mark."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any

from typing_extensions import Doc

from countermark.errors import CountermarkError
from countermark.files import new_folder, read_json
from countermark.networks import declared_pools, load_model, open_declared
from countermark.options import DeviceOptions, ModelOptions, NewPath, ReadPath, option, verb
from countermark.thieves import REMOVALS, Means, Removal, objective_of, removed
from countermark.training import Hardware, resolve_hardware, traits
from countermark.verbs.copies import Copy, show, write_copy


@dataclass(frozen=True, kw_only=True)
class RemovalConfig(ModelOptions, DeviceOptions):
    """Try to remove a mark, as a thief would.

    Several ways are tried one after the other, in the order below.
    """

    model: ReadPath = field(kw_only=False)
    """Model folder."""
    out: NewPath
    """Folder to write; it must be new or empty."""
    learning_rate: float | None = None
    """Learning rate of fine-tuning; default 0.005."""
    epochs: int | None = None
    """Epochs of a denoiser's training; default 2."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        """Refuse numbers out of range, options without their removal, and no removal at all."""
        super().__post_init__()
        if not self.chosen:
            ways = ", ".join(option(name) for name in REMOVALS)
            raise CountermarkError(f"say how to remove the mark; give one or more of {ways}")
        for name, amount in self.chosen.items():
            REMOVALS[name].amount.check(option(name), amount)
        for name in ("learning_rate", "epochs"):
            takes = [option(way) for way, row in REMOVALS.items() if name in row.options]
            self._only_for(
                any(name in REMOVALS[way].options for way in self.chosen), " or ".join(takes), name
            )
        self._positive("number", "learning_rate")
        self._at_least_one("epochs")
        self._seeded()

    @property
    def chosen(self) -> dict[str, float]:
        """The removals that were asked for and their amounts, in the order of the table."""
        amounts = {name: getattr(self, name, None) for name in REMOVALS}
        return {name: amount for name, amount in amounts.items() if amount is not None}


def with_options(removals: Mapping[str, Removal]) -> Any:
    """The configuration with an option for each row of a table: its name takes its amount."""
    fields = [
        (
            name,
            Annotated[
                row.amount.kind | None,
                Doc(f"{row.help[0].upper()}{row.help[1:]} ({row.amount.range})."),
            ],
            field(default=None),
        )
        for name, row in removals.items()
    ]
    about = {"__module__": __name__, "__doc__": RemovalConfig.__doc__}
    return make_dataclass(
        "RemoveConfig", fields, bases=(RemovalConfig,), namespace=about, frozen=True, kw_only=True
    )


RemoveConfig = with_options(REMOVALS)


@verb(RemoveConfig)
def remove(config: RemovalConfig) -> Copy:
    """Do the removals that were chosen, one after the other, with the images of the thief's pool.

    Raises:
        CountermarkError: a model that cannot be read, an output folder that is not empty.
    """
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
            title="removing",
        )
        options = {"learning_rate": config.learning_rate, "epochs": config.epochs}
        origin = read_json(folder / "model.json")["weights_sha256"]
        network, description = removed(
            config.chosen.items(), network, description, means, options, origin_sha256=origin
        )
        return write_copy(work, out, network, description, pools.test, begun)


__all__ = ["remove", "show"]
