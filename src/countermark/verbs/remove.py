"""`countermark remove`: do to a copy what a thief would do to get rid of the mark."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from countermark.errors import CountermarkError
from countermark.files import new_folder, read_json
from countermark.networks import declared_pools, load_model, open_declared
from countermark.options import DataOptions, NewPath, ReadPath, verb
from countermark.removal import finetune, prune
from countermark.verbs.copies import Copy, show, write_copy


@dataclass(frozen=True, kw_only=True)
class RemoveConfig(DataOptions):
    """Try to remove a mark by pruning or by fine-tuning; give one of the two."""

    model: ReadPath = field(kw_only=False)
    """Model folder."""
    out: NewPath
    """Folder to write; it must be new or empty."""
    prune: float | None = None
    """Fraction of each layer's weights to remove, the smallest first."""
    finetune: int | None = None
    """Epochs of fine-tuning on the thief's pool."""
    seed: int = 0
    """Seed of the fine-tuning."""

    def __post_init__(self) -> None:
        """Refuse numbers out of range, and both removals or neither."""
        super().__post_init__()
        if (self.prune is None) == (self.finetune is None):
            raise CountermarkError("give either --prune FRACTION or --finetune EPOCHS")
        self._open_interval("prune")
        self._at_least_one("finetune")
        self._seeded()


@verb(RemoveConfig)
def remove(config: RemoveConfig) -> Copy:
    """Prune a model, or fine-tune it on the thief's pool, which the owner did not train on.

    Raises:
        CountermarkError: a model that cannot be read, an output folder that is not empty.
    """
    begun, folder, out = time.monotonic(), Path(config.model), Path(config.out)
    network, description = load_model(folder)
    data = open_declared(description, cache=config.cache)
    with new_folder(out, config.record()) as work:
        pools = declared_pools(description, data, cache=config.cache)
        origin = read_json(folder / "model.json")["weights_sha256"]
        event: dict[str, Any]
        if config.prune is not None:
            network, event = prune(network, config.prune), {"event": "pruned", "rate": config.prune, "origin_sha256": origin}
        else:
            epochs = config.finetune or 1
            network = finetune(network, pools.thief, epochs, seed=config.seed, title="fine-tuning")
            event = {"event": "fine-tuned", "epochs": epochs, "origin_sha256": origin}
        return write_copy(work, out, network, description, event, pools.test, begun)


__all__ = ["remove", "show"]
