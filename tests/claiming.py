"""Keys and claims without training: chosen trials, secrets and tokens, for tests of the judge."""

import secrets
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from authority import Authority, stamped
from countermark.claims import Claim, Finding, Opened, open_batch
from countermark.claims.record import ANSWERS_FORMAT
from countermark.files import canonical_json, sha256
from countermark.timestamps import load_roots, read_token
from countermark.watermarks import WatermarkSet, draw_coins, leaf_secrets, second_commitment, sign
from countermark.watermarks.commitment import first_commitment, public_key

MODEL = "ab" * 32  # digest of "the owner's model"
SUSPECT = {"kind": "file", "sha256": "cd" * 32}


def some_trials(
    count: int = 80, batches: int = 2, seed: int = 0, classes: int = 10
) -> WatermarkSet:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)
    answers = (
        torch.stack([torch.randperm(classes, generator=generator)[:2] for _ in range(count)])
        .sort(dim=1)
        .values
    )
    return WatermarkSet(x, answers, torch.arange(count) // (count // batches), torch.arange(count))


def rows_of(opened: Opened, rows: torch.Tensor) -> Opened:
    return replace(
        opened, **{part.name: getattr(opened, part.name)[rows] for part in fields(opened)}
    )


@dataclass
class Claimant:
    """Whoever claims: their key, commitments and tokens."""

    trials: WatermarkSet
    secret: bytes
    signing_key: bytes
    c1: dict[str, Any]
    t1: bytes | None
    c2: dict[str, Any]
    t2: bytes | None
    authority: Authority | None

    @property
    def coins(self) -> torch.Tensor:
        c1 = canonical_json(self.c1)
        beacon = b"" if self.t1 is None else read_token(self.t1, sha256(c1), "T1").beacon
        drawn = draw_coins(c1, beacon, leaf_secrets(self.secret, len(self.trials)))
        return drawn[self.trials.cell]

    @property
    def labels(self) -> torch.Tensor:
        """What a model with the mark answers."""
        return self.trials.answers.gather(1, self.coins.unsqueeze(1)).squeeze(1)

    def claim(
        self, labels: torch.Tensor, batch: int = 0, suspect: dict[str, str] = SUSPECT
    ) -> Claim:
        answers = {
            "format": ANSWERS_FORMAT,
            "c2_sha256": sha256(canonical_json(self.c2)),
            "batch": batch,
            "suspect": suspect,
            "asked": {},
            "labels": labels[self.trials.batch == batch].tolist(),
            "version": "0",
        }
        return Claim(
            c1=self.c1,
            c1_signature=sign(self.signing_key, self.c1),
            t1=self.t1,
            c2=self.c2,
            c2_signature=sign(self.signing_key, self.c2),
            t2=self.t2,
            answers=answers,
            answers_signature=sign(self.signing_key, answers),
            answers_token=None
            if self.authority is None
            else stamped(self.authority, canonical_json(answers)),
            found={},
            opened=open_batch(self.trials, self.secret, batch),
            model=Path(),
        )

    def finding(self, labels: torch.Tensor, batch: int = 0, **options: Any) -> Finding:
        """What a judge finds who asks a suspect with these labels, and the claimant's own model."""
        chosen = self.trials.batch == batch
        roots = [] if self.authority is None else load_roots(self.authority.root)
        found = Finding(
            labels=labels[chosen],
            suspect=SUSPECT,
            model_sha256=MODEL,
            model_labels=self.labels[chosen],
            roots=roots,
        )
        return replace(found, **options)


def claimant(
    trials: WatermarkSet, authority: Authority | None, secret: bytes | None = None, **changes: Any
) -> Claimant:
    """Commit, have it stamped, draw, and commit to a model."""
    secret, signing_key = secret or secrets.token_bytes(32), secrets.token_bytes(32)
    c1 = first_commitment(
        trials, secret, public_key(signing_key), "coin", {"data": "digits", **changes}
    )
    t1 = None if authority is None else stamped(authority, canonical_json(c1))
    c2 = second_commitment(c1, t1, MODEL)
    t2 = None if authority is None else stamped(authority, canonical_json(c2))
    return Claimant(trials, secret, signing_key, c1, t1, c2, t2, authority)
