"""What a thief has and how hard they try; every theft and every removal takes the same."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from countermark.data import Examples
from countermark.threat import Attack, Threat
from countermark.training import Hardware, Traits, kind_of

_LOOKED_AT = 1000  # images that tell the kind of all of them


def _forget(_name: str, _value: Any) -> None:
    """Keep no notes."""


@dataclass(frozen=True, kw_only=True)
class Means:
    """The means of a thief. A theft or removal uses those that it needs and no others.

    Attributes:
        pool: the thief's own images, which the owner did not train on; thefts never use their
            labels.
        threat: the budgets of the victim's kind of image, which anybody knows.
        attack: what a thief who trains adversarially trains against; the threat's PGD where there
            is none.
        objective: name of the recipe by which a thief puts in a mark of their own.
        traits: what that recipe depends on; by default what the pool shows.
        seeds: natural images that Algorithm 2 starts with (the paper: 200).
        queries: labels or probabilities that the thief may ask for.
        epochs: passes over the data, in each round where there are several.
        batch_size: of the training.
        learning_rate: of the training.
        clamp: keep synthetic queries within [0, 1]; the published code did not.
        seed: seed of everything random.
        hardware: devices and precision of the training.
        title: names the progress bar; none is shown without it.
        after_epoch: called with each epoch's number, from 1, and the network, where a removal
            trains for some epochs.
        note: called with the name and the value of what is worth recording beside the copy.
    """

    pool: Examples
    threat: Threat
    attack: Attack | None = None
    objective: str = "fast"
    traits: Traits | None = None
    seeds: int = 200
    queries: int = 51_200
    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 0.005
    clamp: bool = True
    seed: int = 0
    hardware: Hardware = field(default_factory=Hardware)
    title: str | None = None
    after_epoch: Callable[[int, Any], None] | None = None
    note: Callable[[str, Any], None] = _forget

    @property
    def training_attack(self) -> Attack:
        """What a thief who trains adversarially trains against."""
        return self.attack or self.threat.attack

    def shown_traits(self) -> Traits:
        """What a thief's recipe goes by: the known traits, or what the pool shows."""
        return self.traits or Traits(kind_of(self.pool.x[:_LOOKED_AT]), len(self.pool))

    def given(
        self, defaults: Mapping[str, Any], chosen: Mapping[str, Any] | None = None
    ) -> "Means":
        """The same means with the options of a theft or removal.

        Args:
            defaults: the options that it takes, by the names of the attributes here.
            chosen: what was chosen, `None` where nothing was; what it does not take is left alone.
        """
        wanted = {name: value for name, value in (chosen or {}).items() if value is not None}
        kept = {name: value for name, value in wanted.items() if name in defaults}
        return replace(self, **{**defaults, **kept})
