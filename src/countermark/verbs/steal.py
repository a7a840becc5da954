"""`countermark steal`: make the copy that a thief would make."""

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from countermark.evaluation import predict
from countermark.files import new_folder
from countermark.networks import build, declared_pools, load_model, open_declared
from countermark.options import DataOptions, NewPath, ReadPath, verb
from countermark.theft import JacobianTheft, steal_black_box
from countermark.verbs.copies import Copy, show, write_copy

Setting = Literal["white", "black", "grey"]
"""What a thief has: the weights, labels alone, or labels and the owner's network."""


@dataclass(frozen=True, kw_only=True)
class StealConfig(DataOptions):
    """Steal a model the way a thief would, to see what the mark survives."""

    victim: ReadPath = field(kw_only=False)
    """Model folder of the victim."""
    setting: Setting
    """white (the weights themselves), black (labels only: Algorithm 2) or grey (the same by the owner's network, trained adversarially)."""
    out: NewPath
    """Folder to write; it must be new or empty."""
    queries: int | None = None
    """Labels that a black- or grey-box thief asks for; default the paper's 51,200."""
    seed: int = 0
    """Seed of the surrogate and its training."""

    def __post_init__(self) -> None:
        """Refuse an unknown setting and numbers out of range."""
        super().__post_init__()
        self._at_least_one("queries", most=10_000_000)
        self._only_for(self.setting != "white", "--setting black or grey", "queries")
        self._seeded()


@verb(StealConfig)
def steal(config: StealConfig) -> Copy:
    """Steal a model.

    `white` takes the weights; `black` trains a surrogate on labels alone (Algorithm 2), `grey` the owner's network, and adversarially.

    Raises:
        CountermarkError: unknown setting, a victim that cannot be read, an output folder that is not empty.
    """
    begun, out = time.monotonic(), Path(config.out)
    victim, description = load_model(Path(config.victim))
    data = open_declared(description, cache=config.cache)
    with new_folder(out, config.record()) as work:
        pools = declared_pools(description, data, cache=config.cache)
        if config.setting == "white":
            return write_copy(work, out, victim, description, {"event": "stolen", "setting": "white"}, pools.test, begun)
        network = "surrogate" if config.setting == "black" else description.network
        attack = None if config.setting == "black" else description.threat.attack
        options = JacobianTheft(queries=config.queries or JacobianTheft.queries, attack=attack, seed=config.seed)
        surrogate = build(network, description.shape, description.classes, seed=config.seed)
        asked = steal_black_box(lambda x: predict(victim, x), surrogate, pools.thief, options, title="stealing")
        event = {"event": "stolen", "setting": config.setting, "queries": asked, "options": asdict(options)}
        return write_copy(work, out, surrogate, replace(description, network=network), event, pools.test, begun)


__all__ = ["show", "steal"]
