"""Compare Countermark with its peers on colour photographs, on one thread.

    PYTHONPATH=.bench python benchmarks/colour_peers.py cifar10 --model runs/colour/mine

Two measurements, and `--only` takes one of them:

time      processor time to each of some PGD-20 accuracies on 500 validation images, from the same
          initial weights of the network `narrow` and on the same training images: our recipe
          `fast`; the single-step recipe of Wong, Rice and Kolter (2020, "Fast is better than
          free", section 5); and a loop with the 7-step PGD of torchattacks. The PGD-20 after each
          epoch does not count; what our training itself looks at, does.
strict    our strict evaluation beside pyautoattack's on the images of `--model`, a model folder
          (`benchmarks/strict.py`)

The data are any place that `protect` takes. `make bench` installs the peers in .bench.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from bench import by_torchattacks
from countermark.data import Dataset, Examples, open_data, pixels
from countermark.evaluation import adversarial_accuracy
from countermark.memory import keep_freed_memory
from countermark.networks.named import build
from countermark.terminal import print_table
from countermark.threat import Attack
from countermark.training import TrainConfig, recipe, train, traits
from strict import compare

NETWORK, VALIDATION = "narrow", 500
PADDING = 4  # pixels around an image out of which a peer cuts the image again

Craft = Callable[[nn.Module, torch.Tensor, torch.Tensor, float], torch.Tensor]
AfterEpoch = Callable[[int, nn.Module], None]
Training = Callable[[nn.Module, AfterEpoch], None]


class EnoughError(Exception):
    """The highest accuracy was reached, or the time is over."""


@dataclass
class Race:
    """One contender on its way to the wanted accuracies.

    Attributes:
        name: of the contender.
        validation: the images that are measured on.
        epsilon: the budget.
        wanted: PGD-20 accuracies to reach, in percent; at the highest it is over.
        most: seconds of the processor after which it is over.
        seconds: of the processor, so far.
        found: seconds and PGD-20 accuracy after each epoch.
    """

    name: str
    validation: Examples
    epsilon: float
    wanted: Sequence[float]
    most: float
    seconds: float = 0.0
    found: list[tuple[float, float]] = field(default_factory=list)
    _since: float = 0.0

    def until(self, accuracy: float) -> float | None:
        """Seconds until an epoch ended with at least this accuracy; none if no epoch did."""
        return next((seconds for seconds, found in self.found if found >= accuracy), None)

    def run(self, training: Callable[[AfterEpoch], None]) -> None:
        """Run a training, which is given what to call after each epoch."""
        self._since = time.process_time()
        try:
            training(self.after_epoch)
        except EnoughError:
            return

    def after_epoch(self, epoch: int, network: nn.Module) -> None:
        """Stop the clock, measure, and go on unless it is enough."""
        self.seconds += time.process_time() - self._since
        attack = Attack(self.epsilon, 20, 2 / 255)
        accuracy = adversarial_accuracy(network, self.validation, attack)
        self.found.append((self.seconds, accuracy))
        line = {"contender": self.name, "epoch": epoch, "cpu_seconds": self.seconds}
        print(json.dumps({**line, "pgd": accuracy}), flush=True)
        if accuracy >= max(self.wanted) or self.seconds > self.most:
            raise EnoughError
        self._since = time.process_time()


@dataclass(frozen=True)
class Peer:
    """A recipe of others, as a loop of PyTorch.

    Attributes:
        craft: from network, images, labels and budget to adversarial images.
        rate: learning rate at a share of the run that is done.
        epochs: of the run; none for those of our recipe.
        training_mode: whether the network is in training mode while it is attacked.
    """

    craft: Craft
    rate: Callable[[float], float]
    epochs: int | None = None
    training_mode: bool = False


def seven_steps(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The PGD of torchattacks (Madry et al., 2018): seven steps of a quarter of the budget."""
    return by_torchattacks(model, x, y, Attack(epsilon, 7, epsilon / 4))


def single_step(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epsilon: float) -> torch.Tensor:
    """One step of 1.25 budgets from a random start (Wong, Rice and Kolter, 2020, Algorithm 3)."""
    start = torch.empty_like(x).uniform_(-epsilon, epsilon)
    start = ((x + start).clamp(0, 1) - x).requires_grad_()
    (gradient,) = torch.autograd.grad(functional.cross_entropy(model(x + start), y), start)
    moved = (start.detach() + 1.25 * epsilon * gradient.sign()).clamp(-epsilon, epsilon)
    return (x + moved).clamp(0, 1)


PEERS: Mapping[str, Peer] = {
    "single step": Peer(single_step, lambda done: 0.4 * min(done, 1 - done), 15, True),
    "torchattacks, 7 steps": Peer(seven_steps, lambda done: 0.1 * (1 - done)),
}
"""The single-step recipe's rate rises to 0.2 in the middle of the run, and falls to 0."""


def augmented(x: torch.Tensor) -> torch.Tensor:
    """Images that are padded and cut out again at random, half of them mirrored."""
    count, _, height, width = x.shape
    padded = functional.pad(x, [PADDING] * 4)
    places = torch.randint(0, 2 * PADDING + 1, (count, 2)).tolist()
    cut = [
        image[:, down : down + height, right : right + width]
        for image, (down, right) in zip(padded, places, strict=True)
    ]
    moved = torch.stack(cut)
    return torch.where(torch.rand(count, 1, 1, 1) < 0.5, moved.flip(3), moved)


def by_hand(
    peer: Peer,
    training: Examples,
    config: TrainConfig,
    epsilon: float,
    network: nn.Module,
    after_epoch: AfterEpoch,
) -> None:
    """Train as somebody does who uses none of ours; `config` gives the batch and the epochs."""
    torch.manual_seed(0)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    per_epoch = len(training) // config.batch_size
    epochs = peer.epochs or config.epochs
    for epoch in range(epochs):
        order = torch.randperm(len(training))
        for step in range(per_epoch):
            chosen = order[step * config.batch_size : (step + 1) * config.batch_size]
            x, y = augmented(pixels(training.x[chosen])), training.y[chosen]
            optimiser.param_groups[0]["lr"] = peer.rate(
                (epoch * per_epoch + step) / (epochs * per_epoch)
            )
            network.train(peer.training_mode)
            crafted = peer.craft(network, x, y, epsilon)
            network.train()
            optimiser.zero_grad()
            functional.cross_entropy(network(crafted), y).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        after_epoch(epoch + 1, network)


def race(
    data: Dataset, wanted: Sequence[float], most: float, few: int | None, epochs: int | None
) -> None:
    """Run all contenders, and print a table."""
    pools, epsilon = data.pools(0), data.threat.epsilon
    training = pools.training[:few].read()
    config = recipe(traits(data, training, mirror=True), "fast", data.threat, epochs=epochs)
    config = replace(config, batch_size=min(config.batch_size, len(training)))

    def ours(network: nn.Module, after_epoch: AfterEpoch) -> None:
        train(network, training, config, validation=pools.validation, after_epoch=after_epoch)

    contenders: dict[str, Training] = {"countermark": ours}
    for name, peer in PEERS.items():
        contenders[name] = partial(by_hand, peer, training, config, epsilon)
    races = []
    for name, work in contenders.items():
        network = build(NETWORK, data.shape, data.classes, seed=0)
        races.append(Race(name, pools.validation[:VALIDATION], epsilon, wanted, most))
        races[-1].run(partial(work, network))
    rows = []
    for each in races:
        best = max(accuracy for _, accuracy in each.found)
        row = [each.name, str(len(each.found)), f"{each.seconds:.0f}", f"{best:.1f} %"]
        for accuracy in wanted:
            seconds, ours_took = each.until(accuracy), races[0].until(accuracy)
            times = f" ({seconds / ours_took:.2f})" if seconds and ours_took else ""
            row.append(f"{seconds:.0f}{times}" if seconds else "not reached")
        rows.append(row)
    columns = ("", "epochs", "CPU seconds", "best", *(f"to {each:g} %" for each in wanted))
    print_table("CPU seconds to a PGD-20 accuracy, and times ours", columns, rows)


def main() -> None:
    """Make the measurements."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="a place that protect takes")
    parser.add_argument("--only", choices=["time", "strict"])
    parser.add_argument("--model", type=Path, help="model folder of the strict evaluation")
    parser.add_argument("--images", type=int, default=500, help="of the strict evaluation")
    parser.add_argument(
        "--wanted",
        type=float,
        nargs="+",
        default=[26.0, 30.0, 34.0, 38.0],
        help="PGD-20 accuracies, percent",
    )
    parser.add_argument("--most", type=float, default=5400.0, help="CPU seconds of a contender")
    parser.add_argument("--few", type=int, help="train on so many images only, to try it")
    parser.add_argument("--epochs", type=int, help="of our recipe and the torchattacks loop")
    given = parser.parse_args()
    if given.only != "time" and given.model is None:
        parser.error("the strict evaluation needs --model")
    torch.set_num_threads(1)
    keep_freed_memory()
    if given.only != "strict":
        race(open_data(given.data), given.wanted, given.most, given.few, given.epochs)
    if given.only != "time":
        compare(given.model, given.images, ["countermark", "pyautoattack"], data=given.data)


if __name__ == "__main__":
    main()
