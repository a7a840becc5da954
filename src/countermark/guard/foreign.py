"""Queries that no honest client sends, told apart from those that one might.

A thief who makes his queries up (Algorithm 2 and its kin walk away from natural images, step by step) asks where nobody else does. There
coins cost no honest client anything, so they may be fair ones and reach far beyond near ties. The owner plays two such thieves against the
bare model, a plain one and one who trains adversarially, and a small network learns to tell their queries from natural images, moved a
little, under noise, and from adversarial examples of the budget. It never sees a coin, so what it chooses is a trial like any other.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional

from countermark.attacks import pgd
from countermark.data import Examples, Pools, as_uint8, pixels
from countermark.evaluation import Attack, evaluating, predict
from countermark.models import build
from countermark.theft import JacobianTheft, steal_black_box
from countermark.training import TrainConfig, train

DETECTOR = "small"
"""The network that tells queries apart, by name."""
WALKED = 6_400
"""Queries of each of the owner's own thieves."""
_NATURAL = 8_000  # training images that stand for honest clients
_SHIFT = 2  # pixels by which an honest client's image may be moved
_HONEST = 0.999  # share of honest queries that stay below the threshold
_EPOCHS = 4
_CHUNK = 500


@dataclass(frozen=True)
class Detector:
    """What tells queries apart.

    Attributes:
        network: pixels to two logits, honest and foreign.
        threshold: difference of the two above which a query is foreign.
    """

    network: nn.Module
    threshold: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """How far above the threshold images `(n, c, h, w)`, uint8 or pixels, are; float32 `(n,)`, foreign where positive."""
        with torch.no_grad():
            parts = [self.network(pixels(part)) for part in torch.split(x, _CHUNK) if len(part)]
        logits = torch.cat(parts) if parts else torch.empty(0, 2)
        return logits[:, 1] - logits[:, 0] - self.threshold


def learn_detector(
    network: nn.Module, pools: Pools, epsilon: float, *, seed: int = 0, walked: int = WALKED, titles: tuple[str, str] | None = None
) -> Detector:
    """Play two thieves against `network` and learn to tell their queries from honest ones.

    Args:
        network: the model to guard, bare: pixels to logits.
        pools: thefts start from training images, thresholds come from validation images.
        epsilon: budget within which a query is honest, in pixels of [0, 1].
        seed: seed of all of it.
        walked: queries that each thief makes.
        titles: names of two progress bars, the thefts' and the training's; none are shown without them.
    """
    natural = pools.training[slice(0, _NATURAL)]
    theft, training = titles or (None, None)
    honest = torch.cat(_honest(network, natural, epsilon, seed))
    robust = Attack(epsilon, 1, 1.25 * epsilon)
    plain = JacobianTheft(queries=walked, seed=seed)
    thieves = plain, replace(plain, attack=robust, batch_size=128, learning_rate=0.05, epochs=5)
    foreign = torch.cat([_walk(network, pools.training, thief, theft) for thief in thieves])
    y = torch.cat((torch.zeros(len(honest), dtype=torch.int64), torch.ones(len(foreign), dtype=torch.int64)))
    shape = (int(natural.x.shape[1]), int(natural.x.shape[2]), int(natural.x.shape[3]))
    detector = build(DETECTOR, shape, 2, seed=seed)
    config = TrainConfig(objective="standard", attack=None, epochs=_EPOCHS, learning_rate=0.05, nesterov=True, seed=seed)
    train(detector, Examples(torch.cat((honest, foreign)), y), config, title=training)
    bare = Detector(detector.eval(), 0.0)
    kinds = _honest(network, pools.validation, epsilon, seed + 1)
    return Detector(bare.network, max(float(bare(kind).quantile(_HONEST)) for kind in kinds))


def _walk(network: nn.Module, seeds: Examples, theft: JacobianTheft, title: str | None) -> torch.Tensor:
    """What a thief asks beyond his natural seeds, uint8."""
    asked: list[torch.Tensor] = []

    def victim(x: torch.Tensor) -> torch.Tensor:
        asked.append(as_uint8(x))
        return predict(network, asked[-1])

    shape = (int(seeds.x.shape[1]), int(seeds.x.shape[2]), int(seeds.x.shape[3]))
    with torch.no_grad():
        classes = network(pixels(seeds.x[:1])).shape[1]
    copy = build("surrogate" if theft.attack is None else "small", shape, classes, seed=theft.seed)
    steal_black_box(victim, copy, seeds, theft, title=title)
    return torch.cat(asked[1:])


def _honest(network: nn.Module, examples: Examples, epsilon: float, seed: int) -> list[torch.Tensor]:
    """Queries that an honest client might send, uint8, one tensor for each kind."""
    generator = torch.Generator().manual_seed(seed)
    x = pixels(examples.x)
    height, width, side = int(x.shape[2]), int(x.shape[3]), 2 * _SHIFT + 1
    framed, moved = functional.pad(x, (_SHIFT,) * 4), x.clone()
    for place, part in enumerate(torch.chunk(torch.randperm(len(x), generator=generator), side * side)):
        down, across = divmod(place, side)
        moved[part] = framed[part, :, down : down + height, across : across + width]
    uniform = 2 * torch.rand(x.shape, generator=generator) - 1
    normal = torch.randn(x.shape, generator=generator)
    with evaluating(network), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = zip(torch.split(x, _CHUNK), torch.split(examples.y, _CHUNK), strict=True)
        adversarial = torch.cat([pgd(network, a, y, epsilon=epsilon, steps=10, step_size=epsilon / 4) for a, y in parts])
    kinds = x, moved, x + epsilon * uniform, x + epsilon * uniform.sign(), x + epsilon / 2 * normal, adversarial
    return [as_uint8(kind.clamp(0, 1)) for kind in kinds]
