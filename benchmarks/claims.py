"""Make true claims before a judge, and measure what a judgement costs.

The suspects are copies pruned up to 80 %, and copies of a thief who unlearns the batch that was
shown.

    python benchmarks/claims.py --data mnist fashion_mnist --seeds 0 1 2
    python benchmarks/claims.py --timing

Models are protected with a timestamp authority on loopback (`openssl ts`) and kept in runs/claims;
every claim and every judgement goes through the verbs. False claims are in tests/test_claims.py
(COUNTERMARK_CLAIMS=2000).
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from countermark import adjudicate, claim, protect
from countermark.claims import write_claim
from countermark.data import Examples, load_pools, open_data
from countermark.errors import CountermarkError
from countermark.evaluation import accuracy
from countermark.memory import keep_freed_memory
from countermark.networks import Description, describing, load_model, open_declared, save_model
from countermark.networks.named import build
from countermark.thieves.remove import prune
from countermark.training import TrainConfig, train
from countermark.watermarks import load_key

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from authority import Authority
from claiming import claimant, some_trials
from peak import peak

PRUNED = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def judged(
    mine: Path,
    network: nn.Module,
    description: Description,
    batch: int,
    authority: Authority,
    work: Path,
) -> tuple[str, float | None]:
    """Claim one batch against a copy and judge it: the verdict, and log10 of p."""
    copy = work / "copy"
    copy.mkdir(parents=True, exist_ok=True)
    save_model(copy, network, description)
    out = work / f"claim-{time.monotonic_ns()}"
    try:
        claim(key=mine / "key", suspect=copy, out=out, batch=batch, tsa=authority.url)
    except CountermarkError as error:
        return f"not claimed: {error}", None
    found = adjudicate(out, suspect=copy, roots=authority.root, out=work / "judgement")
    return found.verdict, found.test.log10_p_value


def unlearned(
    mine: Path, network: nn.Module, description: Description, batch: int, epochs: int
) -> nn.Module:
    """Return the copy of a thief who has seen one batch.

    They tune their copy on that batch with the other answers, and on their own data.
    """
    key = load_key(mine / "key")
    seen = key.watermarks.batch == batch
    pool = open_declared(description).pools(description.seed).thief[slice(0, 4000)]
    wrong = Examples(key.watermarks.x[seen], key.others[seen])
    config = TrainConfig(
        objective="standard", attack=None, epochs=epochs, learning_rate=0.02, seed=5
    )
    train(network, pool, config, watermarks=wrong)
    return network


def play(runs: Path, data: str, seed: int, authority: Authority) -> None:
    """Protect, steal, claim, judge."""
    mine, work = runs / f"{data}-{seed}", runs / f"work-{data}"
    if not mine.exists():
        protect(data, seed=seed, out=mine, tsa=authority.url, roots=authority.root)
    test = load_pools(data, seed).test
    for share in (0.0, *PRUNED):
        network, description = load_model(mine)
        if share:
            network = prune(network, share)
        for batch in range(2):
            verdict, p = judged(mine, network, description, batch, authority, work)
            record = {
                "data": data,
                "seed": seed,
                "pruned": share,
                "batch": batch,
                "verdict": verdict,
                "log10_p": p,
            }
            print(json.dumps({**record, "test_accuracy": accuracy(network, test)}), flush=True)
    for epochs in (1, 3):
        network, description = load_model(mine)
        forgetful = unlearned(mine, network, description, 0, epochs)
        for batch in range(2):
            verdict, p = judged(mine, forgetful, description, batch, authority, work)
            record = {
                "data": data,
                "seed": seed,
                "unlearned": 0,
                "epochs": epochs,
                "batch": batch,
                "verdict": verdict,
                "log10_p": p,
            }
            print(json.dumps({**record, "test_accuracy": accuracy(forgetful, test)}), flush=True)


def prepare_timing(runs: Path, authority: Authority, trials: int = 1000) -> Path:
    """Write a claim of one batch of a thousand trials on images of MNIST's size.

    Its model has random weights, which cost the same to ask.
    """
    folder = runs / "timing"
    model = folder / "model"
    model.mkdir(parents=True, exist_ok=True)
    digest = save_model(
        model, build("small", (1, 28, 28), 10, seed=0), describing(open_data("mnist"), "small")
    )
    made = some_trials(2 * trials)
    made = replace(made, x=torch.randint(0, 256, (2 * trials, 1, 28, 28), dtype=torch.uint8))
    owner = claimant(made, authority)
    out = folder / "claim"
    out.mkdir(exist_ok=True)
    write_claim(
        out,
        replace(owner.claim(owner.labels, suspect={"kind": "file", "sha256": digest}), model=model),
    )
    return folder


TIMED = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from countermark import adjudicate
import countermark.claims, countermark.verbs.adjudicate, countermark.data.fetch, \
cryptography, asn1crypto.cms, rfc3161_client
sys.path.insert(0, sys.argv[3])
from peak import peak
folder = Path(sys.argv[1])
begun = time.perf_counter()
found = adjudicate(folder / "claim", suspect=folder / "model", roots=sys.argv[2], \
out=folder / "judgement")
print(time.perf_counter() - begun, peak() / 2**20, found.test.trials)
"""


def timing(runs: Path, authority: Authority, rounds: int = 5) -> None:
    """Adjudicate in fresh processes: seconds after imports, peak memory."""
    folder = prepare_timing(runs, authority)
    for _ in range(rounds):
        done = subprocess.run(
            [sys.executable, "-c", TIMED, folder, authority.root, Path(__file__).parent],
            capture_output=True,
            text=True,
            check=True,
        )
        seconds, mebibytes, trials = done.stdout.split()
        print(
            json.dumps(
                {
                    "seconds": round(float(seconds), 3),
                    "MiB": round(float(mebibytes)),
                    "trials": int(trials),
                }
            ),
            flush=True,
        )


def main() -> None:
    """Play what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=["mnist", "fashion_mnist"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/claims"))
    parser.add_argument(
        "--timing", action="store_true", help="only what a judgement of 1,000 trials costs"
    )
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    options.runs.mkdir(parents=True, exist_ok=True)
    authority = Authority(options.runs / "authority")
    try:
        if options.timing:
            timing(options.runs, authority)
        else:
            for seed in options.seeds:
                for data in options.data:
                    play(options.runs, data, seed, authority)
    finally:
        authority.close()
    print(f"peak memory {peak() >> 20} MiB", file=sys.stderr)


if __name__ == "__main__":
    main()
