"""`countermark claim`: fix a suspect's answers, then show a judge what they are tested by."""

import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from countermark.errors import CountermarkError
from countermark.evidence import JUDGE_ALPHA, Verdict, judge
from countermark.files import (
    CHECKPOINT_PREFIX,
    canonical_json,
    locked,
    new_folder,
    read_bytes,
    read_json,
    sha256,
    write_json,
)
from countermark.options import LogPath, NewPath, ReadPath, StampOptions, SuspectOptions, verb
from countermark.places import Network
from countermark.terminal import p_value, print_lines, print_table, unbroken
from countermark.verbs.accounts import claim_account
from countermark.verbs.asking import Answers, ask, asked_how, doubts
from countermark.verbs.looks import Looks, note_look, said_looks
from countermark.version import __version__

if TYPE_CHECKING:
    import torch

    from countermark.claims import Claim
    from countermark.watermarks import Key

SPENT_FORMAT = "countermark spent 1"
_OWN = f"{CHECKPOINT_PREFIX}spent.json"  # what an unfinished claim has spent itself


@dataclass(frozen=True, kw_only=True)
class ClaimConfig(SuspectOptions, StampOptions):
    """Show a judge part of a key, or what a client signed.

    The claim is a folder with one batch of the key's trials and the answers of a suspect. With
    --log it is one with all requests of a client who signs, for a copy of the answers.
    """

    suspect: ReadPath = field(kw_only=False)
    """Model folder, .onnx or .pt2 file, or http(s)://HOST/... of a service (see --api)."""
    key: ReadPath
    """Key folder; it remembers which batches were shown."""
    out: NewPath
    """Folder to write; it must be new or empty."""
    model: ReadPath | None = None
    """Folder of the marked model with its commitment.json; default the folder that holds the
    key."""
    owner_network: Network | None = None
    """module:function that builds the marked model's network, unless it is a built-in one; in
    Python also a function or a module."""
    log: LogPath | None = None
    """Query log, a path or postgresql://..., for a claim against one account."""
    client: str | None = None
    """Name of that account, which signs its requests."""
    batch: int | None = None
    """Batch to open; default the first that nobody has seen."""
    anyway: bool = False
    """Open it even if a judge could not uphold the claim, or an earlier one with that batch."""

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        super().__post_init__()
        self._whole("batch", 0, 1_000_000)
        self._only_for(self.log is not None, "--log", "client")
        self._only_for(self.log is None, "a claim of a key's batch", "batch", "tsa")
        if (self.client is None) != (self.log is None):
            raise CountermarkError("--log needs the account that is claimed: --client NAME")
        if self.log is not None and self.match:
            raise CountermarkError(
                "--match needs clean examples that were fixed before the coins, which a claim "
                "against an account has not; say how the suspect is asked, and leave --match out"
            )


@dataclass(frozen=True)
class Claimed:
    """What was claimed.

    Attributes:
        folder: the claim; it is for the judge, and whoever sees it can unlearn what it shows.
        batch: the batch that it opens; none in a claim against an account.
        left: batches of the key that nobody has seen; none in such a claim.
        test: the exact test on this batch; its p-value is times the number of batches. Against an
            account, the e-process on its trials.
        timestamped: whether the claim has all its timestamps; without them a judge finds it
            undecidable. A claim against an account needs none.
        answers: how the suspect answered.
        doubts: what a person should know before believing the verdict, in sentences.
        looks: how often suspects were asked with this key; none where its folder cannot be written.
    """

    folder: str
    batch: int | None
    left: int | None
    test: Verdict
    timestamped: bool
    answers: Answers
    doubts: tuple[str, ...]
    looks: Looks | None = None


@verb(ClaimConfig)
def claim(config: ClaimConfig) -> Claimed:
    """Ask the suspect for one batch of the key, have its answers timestamped, and write the claim.

    With `log` and `client`, ask for the account's trials instead, and write all that it signed. The
    batch is noted as spent in the key folder before anything of it is shown. A batch that
    would not convince a judge is not opened, unless `anyway` is set.

    Raises:
        CountermarkError: the key, the model or the suspect cannot be read; the key has no batch
            left; the answers prove nothing; or the timestamp authority does not answer.

    Example:
        >>> claimed = cm.claim(
        ...     "theirs", key="mine/key", out="accusation", tsa="https://tsa.example.com"
        ... )
        >>> claimed.test.verdict, claimed.timestamped
        ('match', True)
        >>> claimed.left  # batches that nobody has seen yet
        0
    """
    from countermark.claims import Claim, open_batch, suspect_identity, write_claim
    from countermark.claims.record import ANSWERS_FORMAT
    from countermark.timestamps import decode_token, timestamping
    from countermark.watermarks import load_key, load_secret, sign

    folder, out = Path(config.key), Path(config.out)
    if config.log is not None:
        return _against_account(config, config.log, str(config.client))
    key, secret = load_key(folder), load_secret(folder)
    if not key.rules.coins:
        raise CountermarkError(
            f"the scheme {key.scheme!r} has no exact test, so a judge can do nothing with a "
            "claim; only coins can be claimed"
        )
    model = Path(config.model) if config.model else folder.parent
    commitment = _commitment(model / "commitment.json", key)
    batches, suspect = int(key.c1["batches"]), suspect_identity(config.suspect)
    with locked(folder):
        spent = _spent(folder / "spent.json")
        batch = _choose(config, key, spent, str(suspect["kind"]))
        made = Claim(
            c1=key.c1,
            c1_signature=key.signature,
            t1=key.t1,
            c2=commitment["c2"],
            c2_signature=str(commitment.get("c2_signature")),
            t2=decode_token(commitment.get("t2"), f"{model / 'commitment.json'}: t2"),
            answers={},
            answers_signature="",
            answers_token=None,
            found={},
            opened=open_batch(key.watermarks, secret, batch),
            model=model,
            # Those of an older key are not in C1: a judge could not know that they came first.
            clean=key.clean if config.match and "clean_sha256" in key.c1 else None,
        )
        _check_worth(config, made)
        stamp = timestamping(config.tsa, config.roots)
        # Its configuration has no paths and headers of the owner's: a judge reads it.
        with new_folder(out, {"suspect": suspect, "batch": batch}) as work:
            x, data = made.opened.x, str(key.c1.get("data"))
            tested = partial(_tested, key, batch, made.opened.cell.tolist())
            shape = tuple(x.shape[1:])
            labels, answers = ask(config, [x], shape, data, key.clean, key.names, tested)
            test = tested(labels, answers.ways)
            how = asked_how(config, answers)
            p = test.log10_p_value
            looks = note_look(folder, "claim", config.suspect, how, p, identity=suspect)
            if test.verdict != "match" and not config.anyway:
                raise CountermarkError(
                    f"the suspect's answers to batch {batch} would not convince a judge "
                    f"({test.agreements} as the coins fell, {test.disagreements} the other "
                    f"way; p = {p_value(test.log10_p_value)}); nothing was opened"
                )
            record = {
                "format": ANSWERS_FORMAT,
                "c2_sha256": sha256(canonical_json(made.c2)),
                "batch": batch,
                "suspect": suspect,
                "asked": how,
                "labels": labels.tolist(),
                "version": __version__,
            }
            made = replace(
                made,
                answers=record,
                answers_signature=sign(read_bytes(folder / "signing-key", 32), record),
                answers_token=None if stamp is None else stamp(canonical_json(record)),
                found=_found(test, batches),
            )
            entry = {
                "batch": batch,
                "kind": suspect["kind"],
                "day": int(time.time() // 86400),
                "answers_sha256": sha256(canonical_json(record)),
            }
            # First beside the claim: whoever goes on with it knows that the batch was spent for it.
            own = [*_spent(work / _OWN), entry]
            for path, entries in ((work / _OWN, own), (folder / "spent.json", [*spent, entry])):
                write_json(path, {"format": SPENT_FORMAT, "batches": entries}, 0o600)
            write_claim(work, made)
    return Claimed(
        folder=str(out),
        batch=batch,
        left=batches - len({int(entry["batch"]) for entry in (*spent, entry)}),
        test=test,
        timestamped=None not in (made.t1, made.t2, made.answers_token),
        answers=answers,
        doubts=doubts(answers, test.verdict),
        looks=looks,
    )


def _against_account(config: ClaimConfig, log: str, client: str) -> Claimed:
    key = Path(config.key)
    made = claim_account(
        config,
        suspect=config.suspect,
        key=key,
        model=Path(config.model) if config.model else key.parent,
        log=log,
        client=client,
        out=Path(config.out),
        network=config.owner_network,
        anyway=config.anyway,
    )
    said = doubts(made.answers, made.test.verdict)
    return Claimed(str(config.out), None, None, made.test, True, made.answers, said, made.looks)


def _tested(
    key: "Key", batch: int, cells: list[int], labels: "torch.Tensor", ways: int = 1
) -> Verdict:
    outcomes = _outcomes(key, batch, labels)
    batches = int(key.c1["batches"])
    return judge(cells, outcomes, alpha=JUDGE_ALPHA, batches=batches, ways=ways)


def _commitment(path: Path, key: "Key") -> dict[str, Any]:
    if not path.exists():
        raise CountermarkError(
            f"{path} does not exist: the key does not lie in its model's folder; name that folder "
            "with --model"
        )
    record = read_json(path)
    if record.get("c1") != key.c1 or not isinstance(record.get("c2"), dict):
        raise CountermarkError(
            f"{path} is not the commitment of this key; name the marked model's folder with --model"
        )
    return record


def _spent(path: Path) -> list[dict[str, Any]]:
    """What a file remembers of batches that were shown."""
    if not path.exists():
        return []
    entries = read_json(path).get("batches")
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and type(entry.get("batch")) is int for entry in entries
    ):
        raise CountermarkError(
            f"{path} is damaged; restore it from a backup, or batches that were shown would count "
            "as secret"
        )
    return entries


def _choose(config: ClaimConfig, key: "Key", spent: list[dict[str, Any]], suspect: str) -> int:
    batches = int(key.c1["batches"])
    out = Path(config.out)
    unfinished = out.with_name(out.name + ".partial")
    if (unfinished / "config.json").exists():
        batch = read_json(unfinished / "config.json").get("batch")
        if type(batch) is int and 0 <= batch < batches and config.batch in (None, batch):
            own = _spent(unfinished / _OWN)  # it may have been spent when this was interrupted
            if not any(entry["batch"] == batch for entry in spent if entry not in own):
                return batch
            if config.batch is None:
                raise CountermarkError(
                    f"{unfinished} holds a claim that was interrupted, and another has opened its "
                    f"batch {batch} since; delete that folder, and the claim opens a batch that "
                    "was not shown"
                )
    if config.batch is not None:
        if config.batch >= batches:
            raise CountermarkError(f"the key has batches 0 to {batches - 1}, not {config.batch}")
        before = [entry.get("kind") for entry in spent if entry["batch"] == config.batch]
        if "endpoint" in before and not config.anyway:
            raise CountermarkError(
                f"batch {config.batch} was opened against an endpoint, whose age nobody knows: a "
                "second claim with it, shown by the accused, leaves the first undecidable; open "
                "another batch, or this one with --anyway once the first was judged"
            )
        if before and suspect == "endpoint" and not config.anyway:
            raise _shown_before(config.batch)
        return config.batch
    for batch in range(batches):
        if batch not in [entry["batch"] for entry in spent]:
            return batch
    raise CountermarkError(
        f"all {batches} batches of the key were shown; --batch N opens one again, "
        "which counts only against suspects that were fixed before"
    )


def _shown_before(batch: int) -> CountermarkError:
    return CountermarkError(
        f"batch {batch} was shown before, and nobody knows how old an endpoint is: against it the "
        "batch counts no more once the accused shows the earlier claim; open another batch, or "
        "this one with --anyway"
    )


def _check_worth(config: ClaimConfig, made: "Claim") -> None:
    """Refuse to open a batch for a claim that no answers of the suspect could make a judge uphold.

    Raises:
        CountermarkError: it is such a claim, and `anyway` is not set.
    """
    from countermark.claims import commitment_faults
    from countermark.timestamps import load_roots

    _, digest = made.network(config.owner_network)
    roots = None if config.roots is None else load_roots(Path(config.roots))
    faults = commitment_faults(made, digest, roots)
    if config.tsa is None:
        faults.append("the answers would have no timestamp (--tsa URL)")
    if faults and not config.anyway:
        raise CountermarkError(
            f"a judge could not uphold this claim: {'; '.join(faults)}. Nothing was opened; "
            "--anyway opens it all the same"
        )


def _outcomes(key: "Key", batch: int, labels: "torch.Tensor") -> list[int]:
    import torch

    chosen = key.watermarks.batch == batch
    whole = torch.full_like(key.labels, -1)
    whole[chosen] = labels
    return [
        outcome
        for outcome, inside in zip(key.outcomes(whole), chosen.tolist(), strict=True)
        if inside
    ]


def _found(test: Verdict, batches: int) -> dict[str, Any]:
    record = asdict(test)
    return {
        name: record[name] for name in ("agreements", "disagreements", "neither", "log10_p_value")
    } | {"batches": batches}


def show(result: Claimed) -> None:
    """Print what the claim says."""
    counted = (result.test.agreements, result.test.disagreements, result.test.neither)
    columns = ["agree", "other answer", "neither", "p-value"]
    row = [*map(str, counted), p_value(result.test.log10_p_value)]
    if result.batch is None:
        print_table(unbroken(result.folder), columns, [row])
        print_lines(
            f"wrote {unbroken(result.folder)}: claim.json, requests.safetensors, model/. It holds "
            "every image that the client has asked; give it to the judge alone."
        )
    else:
        columns, row = ["batch", *columns, "batches left"], [str(result.batch), *row]
        print_table(unbroken(result.folder), columns, [[*row, str(result.left)]])
        print_lines(
            "The p-value includes that any batch could have been opened.",
            f"wrote {unbroken(result.folder)}: claim.json, trials.safetensors, model/. "
            "Give it to the judge; whoever sees it can unlearn this batch.",
        )
    if not result.timestamped:
        print_lines(
            "It lacks timestamps (protect and claim take --tsa URL), "
            "so a judge will find it undecidable."
        )
    print_lines(*result.doubts, *said_looks(result.looks))


__all__ = ["Claimed", "claim", "show"]
