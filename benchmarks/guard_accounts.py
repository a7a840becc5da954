"""Trace copies among twenty accounts.

The suspects are copies of thieves with one account, two and ten, of thieves who ask the same with
three or five accounts and vote, and a stranger. One account asked half of the thief's queries.

    python benchmarks/guard_accounts.py --data fashion_mnist --seed 0 --queries 2000

It also measures what it costs a thief to guess which queries are trials and to answer those at
random. The models are those of `guard_power.py` (runs/guard), and are made if they are not there.
"""

import argparse
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from countermark.data import Examples, known, load_pools, pixels
from countermark.evaluation import accuracy, predict
from countermark.files import write_json
from countermark.guard import Guard, GuardedModel, Row, images_of, trace_accounts
from countermark.guard.core import client_key, coin
from countermark.memory import keep_freed_memory
from countermark.networks import load_model
from countermark.watermarks import load_secret
from guard_power import COST, Account, _standard, calibrated, protected

CLIENTS = 20
KEYS = 200  # of the simulated services that a stranger is traced at
ALPHAS = (0.05, 0.01, 0.001)


class Randomising(nn.Module):
    """A copy that answers at random, of its two best classes, where it is least sure."""

    def __init__(self, copy: nn.Module, natural: torch.Tensor, share: float, seed: int) -> None:
        """Randomise the `share` of natural queries with the smallest margin."""
        super().__init__()
        self.copy, self.generator = copy, torch.Generator().manual_seed(seed)
        with torch.no_grad():
            best = torch.cat(
                [copy(pixels(part)).topk(2, dim=1).values for part in torch.split(natural, 500)]
            )
        self.threshold = (best[:, 0] - best[:, 1]).quantile(share)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, the two best exchanged by chance."""
        logits: torch.Tensor = self.copy(x)
        values, classes = logits.topk(2, dim=1)
        flip = (values[:, 0] - values[:, 1] < self.threshold) & (
            torch.rand(len(x), generator=self.generator) < 0.5
        )
        swapped = logits.scatter(1, classes, values.flip(1))
        return torch.where(flip.unsqueeze(1), swapped, logits)


def interleaved(accounts: list[Account]) -> list[Row]:
    """Return the log of a service that all accounts asked at the same time.

    The thief's account comes last and so has the least share of the level.
    """
    columns = [list(account.rows.values()) for account in reversed(accounts)]
    longest = max(map(len, columns))
    return [column[i] for i in range(longest) for column in columns if i < len(column)]


def again(rows: list[Row], secret: bytes) -> list[Row]:
    """The same queries at a service with another secret."""
    keys = {
        client: client_key(secret, rows[0].model, client) for client in {row.client for row in rows}
    }
    return [
        replace(
            row, answer=row.tails if coin(keys[row.client], row.cell) < row.chance else row.heads
        )
        for row in rows
    ]


def main() -> None:
    """Play and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="fashion_mnist")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--queries", type=int, default=2000)
    parser.add_argument("--runs", type=Path, default=Path("runs/guard"))
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    data, seed, count = options.data, options.seed, options.queries
    folder, pools, shape = (
        options.runs / f"{data}-{seed}",
        load_pools(options.data, options.seed),
        known(options.data).shape,
    )
    protected(options.runs, data, seed)
    network, secret = load_model(folder)[0], load_secret(folder / "key")
    found = calibrated(folder, network, data, pools, COST[data])
    model = GuardedModel(network, Guard(found.settings, secret))
    generator = torch.Generator().manual_seed(seed)
    asked = [torch.randperm(len(pools.thief), generator=generator)[:count] for _ in range(CLIENTS)]
    asked[1] = torch.cat(
        (asked[0][: count // 2], asked[1][count // 2 :])
    )  # half of the thief's queries
    tenths = [index[: count // 10] if k < 10 else index for k, index in enumerate(asked)]

    def service(asked: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[Row]]:
        accounts = [Account(model, f"client {k}") for k in range(CLIENTS)]
        return [
            account(pools.thief.x[index]) for account, index in zip(accounts, asked, strict=True)
        ], interleaved(accounts)

    answers, rows = service(asked)
    record: dict[str, object] = {"data": data, "seed": seed, "queries": count, "trials": len(rows)}

    def traced(name: str, suspect: nn.Module, rows: list[Row] = rows) -> None:
        result = trace_accounts(rows, predict(suspect, images_of(rows, shape)), secret)
        first = [
            (account.client, round(account.log10_p_value, 1)) for account in result.accounts[:3]
        ]
        record[name] = {
            "named": result.named,
            "together_log10_p": result.together_log10_p_value,
            "first": first,
        }
        print(name, json.dumps(record[name]), flush=True)

    def taught(asked: list[torch.Tensor], answers: list[torch.Tensor]) -> nn.Module:
        return _standard(
            Examples(torch.cat([pools.thief.x[index] for index in asked]), torch.cat(answers)),
            data,
            seed,
        )

    copy = taught(asked[:1], answers[:1])
    traced("one account", copy)
    traced("two accounts that pool their answers", taught(asked[:2], answers[:2]))
    spread, log = service(tenths)
    traced("ten accounts, a tenth of the queries each", taught(tenths[:10], spread[:10]), log)
    stranger = load_model(options.runs / f"{data}-{seed}-stranger")[0]
    for size in (3, 5):
        same = [asked[0]] * size + asked[size:]
        told, log = service(same)
        votes = torch.stack(told[:size]).mode(0).values
        voting = taught(same[:1], [votes])
        traced(f"{size} accounts that ask the same and vote", voting, log)
        record[f"test accuracy of a vote of {size}"] = accuracy(voting, pools.test)
        traced(f"stranger, where {size} accounts ask the same", stranger, log)
        if size == 3:
            agreed = told[0] == told[1]
            dropping = taught([asked[0][agreed]], [told[0][agreed]])
            traced("2 accounts that ask the same and drop what differs", dropping, log)
            record["test accuracy without what differs"] = accuracy(dropping, pools.test)
    traced("stranger", stranger)
    for share in (0.05, 0.1, 0.2, 0.4):
        evading = Randomising(copy, pools.validation.x, share, seed)
        traced(f"copy that answers its least sure {share:.0%} at random", evading)
        print(
            f"  its test accuracy {accuracy(evading, pools.test):.2f}, "
            f"without {accuracy(copy, pools.test):.2f}",
            flush=True,
        )
        record[f"test accuracy at {share:.0%}"] = accuracy(evading, pools.test)
    record["test accuracy"] = accuracy(copy, pools.test)
    labels, chance = predict(stranger, images_of(rows, shape)), random.Random(seed)
    lowest = []
    for _ in range(KEYS):
        fresh = chance.randbytes(32)
        result = trace_accounts(again(rows, fresh), labels, fresh)
        lowest.append((result.accounts[0].log10_p_value, result.together_log10_p_value))
    rates = {
        alpha: [sum(p[place] <= math.log10(alpha) for p in lowest) / KEYS for place in (0, 1)]
        for alpha in ALPHAS
    }
    record["stranger, fresh keys"] = {
        str(alpha): {"somebody named": named, "together": together}
        for alpha, (named, together) in rates.items()
    }
    print("stranger, fresh keys", json.dumps(record["stranger, fresh keys"]))
    write_json(options.runs / f"accounts-{data}-{seed}-{count}.json", record)


if __name__ == "__main__":
    main()
