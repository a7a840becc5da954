"""Bring a mark into a training loop of your own, in plain PyTorch.

    python examples/own_training_loop.py mine

A small network learns the digits of scikit-learn. Then `cm.Marking` draws the coins, and the same
loop goes on with trials among its batches until the mark holds. The last lines compare the marked
network with the one before, which is a stranger to the coins. `mine/key` is secret.
"""

import argparse
import copy

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import countermark as cm


def make() -> nn.Module:
    """Build the network: pixels of [0, 1] in, logits out."""
    layers = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(64 * 9, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def main() -> None:
    """Train, mark, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", help="folder to write; it must be new")
    out = parser.parse_args().out

    torch.manual_seed(0)
    digits = cm.open_data("digits")
    pools = digits.pools(seed=0)  # training and trials share no image
    images, labels = pools.training.x.float() / 255, pools.training.y
    loader = DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True)
    net = make()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)

    def one_epoch(mark: cm.Marking | None) -> None:
        net.train()
        for x, y in loader:
            if mark is not None:
                x, y = mark.mix(x, y, 16)  # 16 trials join the batch
            optimizer.zero_grad()
            functional.cross_entropy(net(x), y).backward()
            optimizer.step()

    for _ in range(20):
        one_epoch(None)
    unmarked = copy.deepcopy(net)

    mark = cm.Marking(net, digits, key=f"{out}/key")  # trials, first commitment, coins
    epochs = 0
    while epochs < 100 and not mark.check(net).taken:
        one_epoch(mark)
        epochs += 1
    found = mark.finish(net, out, network="own_training_loop:make")  # refused if it does not hold
    print(f"before the mark       {mark.check(unmarked)}")
    print(f"after {epochs:3d} epochs      {found}")
    print(f"pruned                {found.left()}")


if __name__ == "__main__":
    main()
