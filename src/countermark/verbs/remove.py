"""`countermark remove`: do to a copy what a thief would do to get rid of the mark."""

import time
from typing import Any

from countermark.config import RemoveConfig
from countermark.files import new_folder, read_json
from countermark.networks import load_model, open_declared
from countermark.removal import finetune, prune
from countermark.verbs.copies import Copy, show, write_copy


def remove(config: RemoveConfig) -> Copy:
    """Prune a model, or fine-tune it on the thief's pool, which the owner did not train on.

    Raises:
        CountermarkError: a model that cannot be read, an output folder that is not empty.
    """
    begun = time.monotonic()
    network, description = load_model(config.model)
    data = open_declared(description, cache=config.cache)
    with new_folder(config.out, config.record()) as work:
        pools = data.pools(description.seed)
        origin = read_json(config.model / "model.json")["weights_sha256"]
        event: dict[str, Any]
        if config.prune is not None:
            network, event = prune(network, config.prune), {"event": "pruned", "rate": config.prune, "origin_sha256": origin}
        else:
            epochs = config.finetune or 1
            network = finetune(network, pools.thief, epochs, seed=config.seed, title="fine-tuning")
            event = {"event": "fine-tuned", "epochs": epochs, "origin_sha256": origin}
        return write_copy(work, config.out, network, description, event, pools.test, begun)


__all__ = ["remove", "show"]
