"""Thefts: how a copy comes about.

White-box is the model itself. Black-box is Algorithm 2 of Thakkar, Zizzo and Maffeis (2023), after
Papernot et al. (2017): the thief sees labels only, trains a surrogate on seeds of their own, and
asks next where the surrogate's answers change fastest. Grey-box is the same with the owner's
network and adversarial training. Distillation (Hinton et al., 2015) needs the victim's
probabilities. A thief with many images asks for their labels and for nothing else ("Knockoff Nets",
Orekondy et al., 2019, without its choice of queries).
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from countermark.attacks import ask, finite
from countermark.data import Examples, Rows, as_uint8, pixels
from countermark.device import batch_size, seeded
from countermark.errors import CountermarkError
from countermark.evaluation import asked, device_of, evaluating, predict
from countermark.networks import Description
from countermark.places import Network
from countermark.terminal import bar, duration
from countermark.thieves.means import Means
from countermark.threat import Threat
from countermark.training import TrainConfig, recipe, train

Shape = tuple[int, int, int]
Answers = Callable[[torch.Tensor], torch.Tensor]
"""What a thief sees: images `(n, c, h, w)` to labels `(n,)` or probabilities `(n, classes)`."""

_TOGETHER = 250  # images at a time on a processor
_SEARCHES = 10  # steps to where a copy is least sure
_PAPER_STEP = 0.1  # of Algorithm 2 on MNIST and Fashion-MNIST
_STEP_IN_BUDGETS = 0.4  # the same on MNIST, whose budget is 0.25


@dataclass(frozen=True)
class Theft:
    """One way to steal a model.

    Attributes:
        title: what the copy is called in tables.
        help: one line for the help of the verb.
        sees: what the thief gets to see of the victim: none where they have the model itself, and
            with it the copy; else a function of the network and the means that gives the answers.
        network: the copy's network, from the place of the victim's and the shape of one image.
        run: trains the copy in place from the answers and the means, and returns how many answers
            it asked for.
        options: the options that it takes, by their names in `Means`, and their defaults.
        passes: about how many images go through the copy and back in an epoch, from the queries,
            the size of the pool, and the steps of the thief's own attack; for the study's estimate.
        paper: whether it is one of the paper's; the study has the others in a section of their own.
    """

    title: str
    help: str
    sees: Callable[[nn.Module, Means], Answers] | None
    network: Callable[[str, Shape], str]
    run: Callable[[Answers, nn.Module, Means], int]
    options: Mapping[str, Any] = field(default_factory=dict)
    passes: Callable[[int, int, int], float] = lambda queries, pool, _steps: min(queries, pool)
    paper: bool = False


def labels(victim: nn.Module, means: Means) -> Answers:
    """The victim's labels, and nothing else of it."""
    return lambda x: predict(victim, x, bounded=means.clamp)


def probabilities(victim: nn.Module, _means: Means) -> Answers:
    """The victim's probabilities of all classes.

    Raises:
        CountermarkError: when asked, if logits are not finite.
    """
    return lambda x: asked(victim, x, lambda logits: finite(logits).softmax(1).float())


def surrogate_for(shape: Shape) -> str:
    """The name of the network of a thief who does not know the owner's.

    Grey images get the paper's surrogate, which takes them in multiples of four pixels; all others
    a network that learns from colour images.
    """
    grey = shape[0] == 1 and shape[1] % 4 == 0 and shape[2] % 4 == 0
    return "surrogate" if grey else "narrow"


def augmentation_step(shape: Shape, threat: Threat) -> float:
    """The length of a step of Algorithm 2, in pixels of [0, 1].

    It is the paper's 0.1 for grey images. For colour images, whose budgets are far smaller, it is
    0.4 of the budget, the ratio that the paper's step has on MNIST.
    """
    return _PAPER_STEP if shape[0] == 1 else _STEP_IN_BUDGETS * threat.epsilon


def algorithm_2(answers: Answers, copied: nn.Module, means: Means) -> int:
    """Train a copy by Jacobian augmentation.

    The data doubles each round until the queries are spent.

    Args:
        answers: the victim's labels.
        copied: the thief's network, trained in place.
        means: seeds, queries, epochs of each round.

    Returns:
        The number of labels asked for.

    Raises:
        CountermarkError: the thief has no images, or the copy's logits are not finite.
    """
    return _augmented(answers, copied, means, adversarial=False)


def algorithm_2_adversarially(answers: Answers, copied: nn.Module, means: Means) -> int:
    """Do the same as `algorithm_2`, and train adversarially: the paper's grey-box thief."""
    return _augmented(answers, copied, means, adversarial=True)


def _augmented(answers: Answers, copied: nn.Module, means: Means, *, adversarial: bool) -> int:
    x = pixels(_some(means.pool, min(means.seeds, means.queries)).x[:])
    y = answers(x)
    step = augmentation_step((x.shape[1], x.shape[2], x.shape[3]), means.threat)
    rounds = max(1, 1 + (max(means.queries // len(x), 1) - 1).bit_length())
    sizes = [min(len(x) << number, means.queries) for number in range(rounds)]
    with (
        bar(means.title, means.epochs * sum(sizes))
        if means.title is not None
        else contextlib.nullcontext() as progress
    ):

        def count(_epoch: int, _network: nn.Module) -> None:
            if progress is not None:
                progress.advance(len(x))
                progress.text(f"{len(x):,} answers")

        for number in range(rounds):
            config = TrainConfig(
                objective="pgd" if adversarial else "standard",
                attack=means.training_attack if adversarial else None,
                epochs=means.epochs,
                batch_size=means.batch_size,
                learning_rate=means.learning_rate,
                schedule="constant",
                grow_budget=False,
                seed=means.seed * 1000 + number,
                hardware=means.hardware,
            )
            # Another process could not count here.
            after = count if means.hardware.devices == 1 else None
            train(copied, Examples(x, y), config, bounded=means.clamp, after_epoch=after)
            room = means.queries - len(x)
            if room <= 0:
                break
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(means.seed))[
                :room
            ]
            queries = augment(copied, x[order], y[order], step, clamp=means.clamp)
            x, y = torch.cat((x, queries)), torch.cat((y, answers(queries)))
        if progress is not None:
            took = duration(progress.seconds)
            progress.note(f"{means.title}: trained on {len(x):,} answers in {took}")
    return len(x)


def augment(
    network: nn.Module, x: torch.Tensor, y: torch.Tensor, step: float, *, clamp: bool = True
) -> torch.Tensor:
    """Jacobian augmentation, x + step sign(dF_y/dx).

    Args:
        network: the surrogate, pixels to logits.
        x: pixels `(n, c, h, w)`.
        y: the victim's labels `(n,)`.
        step: in pixels.
        clamp: keep the result within [0, 1].
    """
    device = device_of(network)
    parts = []
    with evaluating(network):
        for few in _parts(x, device):
            points = x[few].to(device).requires_grad_()
            chances = functional.softmax(finite(ask(network, points)), dim=1)
            chosen = chances.gather(1, y[few].to(device).unsqueeze(1)).sum()
            (gradient,) = torch.autograd.grad(chosen, points)
            moved = points.detach() + step * gradient.sign()
            parts.append((moved.clamp_(0, 1) if clamp else moved).cpu())
    return torch.cat(parts)


def learn_answers(answers: Answers, copied: nn.Module, means: Means) -> int:
    """Train a copy on the victim's answers to natural images, labels or probabilities.

    Args:
        answers: the victim's.
        copied: the thief's network, trained in place.
        means: the pool, at most as many of its images as there are queries, and the epochs.

    Returns:
        The number of answers asked for.

    Raises:
        CountermarkError: the thief has no images.
    """
    config = TrainConfig(
        objective="standard",
        attack=None,
        epochs=means.epochs,
        batch_size=means.batch_size,
        learning_rate=means.learning_rate,
        seed=means.seed,
        hardware=means.hardware,
    )
    return _learned(answers, copied, means, config)


def learn_answers_robustly(answers: Answers, copied: nn.Module, means: Means) -> int:
    """Do the same as `learn_answers` by the recipe `fast`, so that the copy resists attacks.

    Training on perturbed images smooths the answers, and a coin in one answer is easily lost.
    """
    config = recipe(
        means.shown_traits(),
        "fast",
        means.threat,
        seed=means.seed,
        hardware=means.hardware,
        epochs=means.epochs,
    )
    return _learned(answers, copied, means, config)


def learn_uncertain(answers: Answers, copied: nn.Module, means: Means) -> int:
    """Train a copy on images of which it is as unsure as it can be (BEST: Li et al., ICLR 2023).

    In each epoch of the first half the thief takes some of their images, moves them within the
    budget of adversarial training to where the copy gives all classes the same probability, and
    asks for the labels there. In every epoch the copy goes once through all that was asked so far.
    So a copy of a robust model becomes robust, with no label of a clean image.

    Args:
        answers: the victim's labels.
        copied: the thief's network, trained in place.
        means: the pool, whose images are used in turn, and the epochs, half of which share the
            queries.

    Returns:
        The number of labels asked for.

    Raises:
        CountermarkError: the thief has no images, or the copy's logits are not finite.
    """
    pool = _some(means.pool, means.queries).read()
    device, parts = device_of(copied), min(-(-means.epochs // 2), means.queries)
    sizes = [(number + 1) * means.queries // parts for number in range(parts)]
    sizes += [means.queries] * (means.epochs - parts)
    optimiser = torch.optim.SGD(
        copied.parameters(), means.learning_rate, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    steps = sum(-(-size // means.batch_size) for size in sizes)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, means.learning_rate, steps)
    x, y = torch.empty(0, *pool.x.shape[1:], dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
    shown = bar(means.title, len(sizes)) if means.title is not None else contextlib.nullcontext()
    with seeded(device, means.seed), shown as progress:
        for size in sizes:
            taken = torch.arange(len(y), size) % len(pool)
            clear = pool.x[taken]
            moved = [
                as_uint8(_uncertain(copied, pixels(clear[few].to(device)), means)).cpu()
                for few in _parts(clear, device)
            ]
            x, y = torch.cat((x, *moved)), torch.cat((y, *map(answers, moved)))
            copied.train()
            for rows in torch.split(torch.randperm(len(y)), means.batch_size):
                if len(rows) == 1 < len(y):
                    continue  # batch norm takes no single value
                logits = finite(ask(copied, pixels(x[rows].to(device)))).float()
                loss = functional.cross_entropy(logits, y[rows].to(device))
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
                schedule.step()
            if progress is not None:
                progress.advance()
        if progress is not None:
            took = duration(progress.seconds)
            progress.note(f"{means.title}: trained on {len(y):,} answers in {took}")
    copied.eval()
    return len(y)


def _uncertain(copied: nn.Module, x: torch.Tensor, means: Means) -> torch.Tensor:
    """Move pixels within the budget to where a network is least sure of any class."""
    epsilon = means.threat.epsilon
    moved = (x + epsilon * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    with evaluating(copied):
        for _ in range(_SEARCHES):
            moved.requires_grad_(True)
            logits = finite(ask(copied, moved)).float()
            (gradient,) = torch.autograd.grad(-logits.log_softmax(1).mean(1).sum(), moved)
            moved = moved.detach() - 2.5 * epsilon / _SEARCHES * gradient.sign()
            moved = torch.clamp(moved, x - epsilon, x + epsilon).clamp_(0, 1)
    return moved.detach()


def _learned(answers: Answers, copied: nn.Module, means: Means, config: TrainConfig) -> int:
    """Train a copy on the pool's images with the victim's answers; how many were asked for."""
    natural = _some(means.pool, means.queries)
    told = [answers(natural.x[few]) for few in _parts(natural.x, device_of(copied))]
    train(copied, Examples(natural.x, torch.cat(told)), config, title=means.title)
    return len(natural)


def _parts(x: torch.Tensor | Rows, device: torch.device) -> Iterator[slice]:
    """The parts of images that go through a model together."""
    count = batch_size(device, x.shape[1:], _TOGETHER)
    return (slice(i, i + count) for i in range(0, len(x), count))


def _some(pool: Examples, count: int) -> Examples:
    """The first `count` images of a thief, or all of them."""
    if min(len(pool), count) < 1:
        raise CountermarkError(
            "there is no image to ask the victim about; give the thief at least one image and one "
            "query"
        )
    return pool[:count]


def stolen(
    name: str,
    victim: nn.Module,
    description: Description,
    means: Means,
    network: Network | None = None,
) -> tuple[nn.Module, Description]:
    """Steal a model by its folder's description.

    Args:
        name: of the theft, from `THEFTS`.
        victim: the model, pixels `(n, c, h, w)` of [0, 1] to logits.
        description: of the victim.
        means: what the thief has, with the options of the theft (see `Means.given`).
        network: what builds the victim's network, unless it is a built-in one.

    Returns:
        The copy and its description, in whose history the theft stands.

    Raises:
        CountermarkError: the thief has no images, or the network cannot be built.
    """
    theft, copied, asked = THEFTS[name], victim, 0
    if theft.sees is not None:
        copied, description = untrained(name, description, network, seed=means.seed)
        copied.to(device_of(victim))
        asked = theft.run(theft.sees(victim, means), copied, means)
    options = {option: getattr(means, option) for option in theft.options}
    event = {"event": "stolen", "setting": name, "queries": asked, "options": options}
    return copied, replace(description, history=(*description.history, event))


def untrained(
    name: str, description: Description, network: Network | None = None, *, seed: int = 0
) -> tuple[nn.Module, Description]:
    """Build the network that a thief trains: the victim's, or one of the thief's choice.

    Args:
        name: of the theft, from `THEFTS`.
        description: of the victim.
        network: what builds the victim's network, unless it is a built-in one.
        seed: seed of the weights.

    Returns:
        The network and its description.

    Raises:
        CountermarkError: the network cannot be built.
    """
    place = THEFTS[name].network(description.network, description.shape)
    if place != description.network:
        description = replace(description, network=place, mean=(), std=(), cleaners=())
        network = None
    return description.build(network, seed=seed), description


def _nothing(_answers: Answers, _copied: nn.Module, _means: Means) -> int:
    """Ask nothing and train nothing."""
    return 0


def _the_owners(place: str, _shape: Shape) -> str:
    return place


def _another(_place: str, shape: Shape) -> str:
    return surrogate_for(shape)


_ALGORITHM_2 = {"queries": 51_200, "epochs": 10, "batch_size": 32, "learning_rate": 0.005}
_NATURAL = {"queries": 51_200, "epochs": 20, "batch_size": 128, "learning_rate": 0.05}

THEFTS: Mapping[str, Theft] = {
    "white": Theft("white-box", "the weights themselves", None, _the_owners, _nothing, paper=True),
    "black": Theft(
        "black-box",
        "labels only, on images that the thief makes up: Algorithm 2",
        labels,
        _another,
        algorithm_2,
        _ALGORITHM_2,
        lambda queries, _pool, _steps: 2 * queries,
        paper=True,
    ),
    "grey": Theft(
        "grey-box",
        "the same by the owner's network, trained adversarially",
        labels,
        _the_owners,
        algorithm_2_adversarially,
        _ALGORITHM_2,
        lambda queries, _pool, steps: 2 * queries * (1 + steps),
        paper=True,
    ),
    "natural": Theft(
        "natural",
        "labels only, of the thief's own images",
        labels,
        _another,
        learn_answers,
        _NATURAL,
    ),
    "robust": Theft(
        "robust",
        "the same, trained adversarially by the recipe fast",
        labels,
        _another,
        learn_answers_robustly,
        {"queries": 51_200, "epochs": 25},
        lambda queries, pool, _steps: 3 * min(queries, pool),
    ),
    "best": Theft(
        "robust by uncertain queries",
        "labels of the thief's images, moved to where the copy is least sure",
        labels,
        _another,
        learn_uncertain,
        {"queries": 51_200, "epochs": 25, "learning_rate": 0.05, "batch_size": 64},
        lambda queries, _pool, _steps: (1 + _SEARCHES) * queries,
    ),
    "distil": Theft(
        "distilled",
        "probabilities of the thief's own images, by the owner's network",
        probabilities,
        _the_owners,
        learn_answers,
        _NATURAL,
    ),
}
"""The thefts by the names that the verb takes."""
