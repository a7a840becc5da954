"""`countermark steal`: make the copy that a thief would make."""

import time
from dataclasses import asdict, replace

from countermark.config import StealConfig
from countermark.evaluation import predict
from countermark.files import new_folder
from countermark.networks import build, load_model, open_declared
from countermark.theft import JacobianTheft, steal_black_box
from countermark.verbs.copies import Copy, show, write_copy


def steal(config: StealConfig) -> Copy:
    """Steal a model.

    `white` takes the weights; `black` trains a surrogate on labels alone (Algorithm 2), `grey` the owner's network, and adversarially.

    Raises:
        CountermarkError: unknown setting, a victim that cannot be read, an output folder that is not empty.
    """
    begun = time.monotonic()
    victim, description = load_model(config.victim)
    data = open_declared(description, cache=config.cache)
    with new_folder(config.out, config.record()) as work:
        pools = data.pools(description.seed)
        if config.setting == "white":
            return write_copy(work, config.out, victim, description, {"event": "stolen", "setting": "white"}, pools.test, begun)
        network = "surrogate" if config.setting == "black" else description.network
        attack = None if config.setting == "black" else description.threat.attack
        options = JacobianTheft(queries=config.queries or JacobianTheft.queries, attack=attack, seed=config.seed)
        surrogate = build(network, description.shape, description.classes, seed=config.seed)
        asked = steal_black_box(lambda x: predict(victim, x), surrogate, pools.thief, options, title="stealing")
        event = {"event": "stolen", "setting": config.setting, "queries": asked, "options": asdict(options)}
        return write_copy(work, config.out, surrogate, replace(description, network=network), event, pools.test, begun)


__all__ = ["show", "steal"]
