"""Thefts and removals beyond the verbs' own: what a thief with other means takes and destroys."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from countermark import theft as theft_room
from countermark.data import Pools, known, pixels
from countermark.evaluation import accuracy, agreement, predict
from countermark.networks import load
from countermark.networks.named import build
from countermark.removal import add_noise, finetune, prune, quantise
from countermark.study import work
from countermark.theft import JacobianTheft, distil, steal_black_box
from countermark.threat import Attack
from countermark.training import known_traits, recipe, train


def small(seed: int = 5) -> nn.Module:
    return build("small", (1, 8, 8), 10, seed=seed)


def test_natural_queries_alone_copy_the_victim_without_its_labels(owner: Path, digits: Pools) -> None:
    """As many seeds as queries: one round, every label from the victim, none from the data."""
    victim, copy, asked = load(owner), small(), []

    def answering(x: torch.Tensor) -> torch.Tensor:
        asked.append(len(x))
        return predict(victim, x)

    wrong = replace(digits.thief, y=torch.zeros_like(digits.thief.y))
    queries = steal_black_box(answering, copy, wrong, JacobianTheft(seeds=200, queries=200, epochs=60, learning_rate=0.05))
    assert (queries, asked) == (200, [200])
    assert agreement(predict(copy, digits.test.x), predict(victim, digits.test.x)) > 60


def test_a_distilled_copy_follows_probabilities(owner: Path, digits: Pools) -> None:
    victim, copy = load(owner), small()
    distil(victim, copy, replace(digits.thief, y=torch.zeros_like(digits.thief.y)), 60)
    assert agreement(predict(copy, digits.test.x), predict(victim, digits.test.x)) > 60


def test_queries_stay_within_the_pixels_unless_the_published_code_is_replayed(digits: Pools) -> None:
    x, y = pixels(digits.thief.x[:20]), digits.thief.y[:20]
    clamped = theft_room._augment(small(), x, y, JacobianTheft())
    free = theft_room._augment(small(), x, y, JacobianTheft(clamp=False))
    assert 0 <= float(clamped.min()) <= float(clamped.max()) <= 1
    assert float(free.min()) < 0
    assert torch.equal(free.clamp(0, 1), clamped)


def test_noise_is_as_large_as_it_says_and_the_model_stays(owner: Path) -> None:
    network = load(owner)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    noisy = add_noise(network, 0.5, seed=3)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    change, weight = noisy.state_dict()["5.weight"] - before["5.weight"], before["5.weight"]
    assert float(change.std() / weight.std()) == pytest.approx(0.5, rel=0.02)
    assert torch.equal(noisy.state_dict()["5.weight"], add_noise(network, 0.5, seed=3).state_dict()["5.weight"])
    assert not torch.equal(noisy.state_dict()["5.weight"], add_noise(network, 0.5, seed=4).state_dict()["5.weight"])


def test_int8_answers_nearly_as_before(owner: Path, digits: Pools) -> None:
    pytest.importorskip("torchao")
    network = load(owner)
    quantised = quantise(network)
    x = pixels(digits.test.x)
    with torch.no_grad():
        assert not torch.equal(quantised(x), network(x))
    assert agreement(predict(quantised, digits.test.x), predict(network, digits.test.x)) > 90


def test_fine_tuning_tells_after_each_epoch_and_keeps_the_model(owner: Path, digits: Pools) -> None:
    network, told = load(owner), []
    before = {name: value.clone() for name, value in network.state_dict().items()}
    tuned = finetune(network, digits.thief, 3, attack=Attack(0.1, 1, 0.125), after_epoch=lambda epoch, net: told.append((epoch, net)))
    assert [epoch for epoch, _ in told] == [1, 2, 3]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert accuracy(tuned, digits.test) > 80


def test_crafting_in_training_mode_lets_batch_statistics_move(digits: Pools) -> None:
    """The published code crafts with batch norm live: its running statistics then see crafted batches twice."""
    config = recipe(known_traits("digits"), "fast", known("digits").threat, epochs=1)
    statistics = []
    for live in (False, True):
        network = build("paper", (1, 8, 8), 10, seed=0)
        train(network, digits.training, replace(config, craft_in_training_mode=live))
        statistics.append(int(network.state_dict()["4.num_batches_tracked"]))
    assert statistics[1] == 2 * statistics[0]


def test_the_published_protocol_picks_its_epoch_on_the_test_set(digits: Pools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = work._Best.__call__

    def watching(self: work._Best, epoch: int, network: nn.Module) -> None:
        original(self, epoch, network)
        robust = work.adversarial_accuracy(network, digits.test, self.attack)
        seen.append((accuracy(network, digits.test) + robust, {n: v.clone() for n, v in network.state_dict().items()}))

    monkeypatch.setattr(work._Best, "__call__", watching)
    options = {"data": "digits", "pool_seed": 0, "protocol": "as-published", "objective": "fast", "network": "small"}
    work.train_model({**options, "seed": 0, "epochs": 6, "attacked": 0}, {}, tmp_path)
    best = max(seen, key=lambda entry: entry[0])[1]
    assert len(seen) == 6
    assert all(torch.equal(value, best[name]) for name, value in load(tmp_path).state_dict().items())


def test_removals_of_a_network_with_tied_weights_keep_them_tied(digits: Pools) -> None:
    """Tied weights are pruned and disturbed once, not once for each layer that has them."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    network[3].weight = network[1].weight
    noisy, pruned = add_noise(network, 0.5), prune(network, 0.25)
    tuned = finetune(network, digits.thief[:64], 1)
    for changed in (noisy, pruned, tuned):
        assert changed[3].weight is changed[1].weight
    noise = (noisy[1].weight - network[1].weight).std() / network[1].weight.std()
    assert 0.45 < float(noise.detach()) < 0.55
    assert int((pruned[1].weight == 0).sum()) == 64 * 64 // 4
    assert not torch.equal(tuned[1].weight, network[1].weight)
