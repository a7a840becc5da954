"""`countermark steal`: make the copy that a thief would make."""

import time
from dataclasses import dataclass, field
from pathlib import Path

from countermark.choices import Setting
from countermark.files import new_folder
from countermark.options import DeviceOptions, ModelOptions, NewPath, ReadPath, verb
from countermark.verbs.copies import Copy, show, write_copy


@dataclass(frozen=True, kw_only=True)
class StealConfig(ModelOptions, DeviceOptions):
    """Steal a model as a thief would.

    The stolen model shows what the mark survives.
    """

    victim: ReadPath = field(kw_only=False)
    """Model folder of the victim."""
    setting: Setting
    """What the thief has: white (the weights themselves), black (labels only, on images that the
    thief makes up: Algorithm 2), grey (the same by the owner's network, trained adversarially),
    natural (labels only, of the thief's own images), robust (the same, trained adversarially by the
    recipe fast), best (labels of the thief's images, moved to where the copy is least sure), distil
    (probabilities of the thief's own images, by the owner's network)."""
    out: NewPath
    """Folder to write; it must be new or empty."""
    queries: int | None = None
    """Most answers that the thief asks for; default the paper's 51,200."""
    epochs: int | None = None
    """Passes over the data, in each round of Algorithm 2; default 10, for robust 25, for other
    thefts of a single round 20."""
    seed: int = 0
    """Seed of the copy's weights and of its training."""

    def __post_init__(self) -> None:
        """Refuse an unknown setting, options that it does not take, and numbers out of range."""
        super().__post_init__()
        self._at_least_one("queries", "epochs", most=10_000_000)
        self._seeded()
        if self.queries is None and self.epochs is None:
            return  # and the thefts, which import PyTorch, are not asked
        from countermark.thieves import THEFTS

        for name in ("queries", "epochs"):
            takes = [setting for setting, theft in THEFTS.items() if name in theft.options]
            self._only_for(self.setting in takes, f"--setting {', '.join(takes)}", name)


@verb(StealConfig)
def steal(config: StealConfig) -> Copy:
    """Steal a model by one of the thefts of `countermark.thieves`, from the thief's pool.

    Raises:
        CountermarkError: unknown setting, a victim that cannot be read, an output folder that is
            not empty.

    Example:
        >>> copy = cm.steal("mine", setting="white", out="stolen")  # takes the weights themselves
        >>> cm.verify("stolen", key="mine/key").verdict
        'match'
    """
    from countermark.networks import declared_pools, load_model, open_declared
    from countermark.thieves import THEFTS, Means, stolen
    from countermark.training import Hardware, resolve_hardware, traits

    begun, out = time.monotonic(), Path(config.out)
    hardware = resolve_hardware(Hardware(config.device, config.devices, config.precision))
    victim, description = load_model(Path(config.victim), config.network, hardware.accelerator)
    data = open_declared(description, data=config.data, cache=config.cache)
    with new_folder(out, config.record()) as work:
        pools = declared_pools(description, data)
        means = Means(
            pool=pools.thief,
            threat=description.threat,
            traits=traits(data, pools.thief),
            seed=config.seed,
            hardware=hardware,
            title="stolen copy",
        )
        chosen = {"queries": config.queries, "epochs": config.epochs}
        means = means.given(THEFTS[config.setting].options, chosen)
        copied, description = stolen(config.setting, victim, description, means, config.network)
        return write_copy(work, out, copied, description, pools.test, begun)


__all__ = ["show", "steal"]
