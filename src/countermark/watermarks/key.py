"""The owner's key: a folder that only its owner can read.

It holds the secret that the coins are drawn with, the signing key, the watermark images and
answers, and the signed first commitment. Each load recomputes the Merkle root, so a key with one
altered byte is refused and never judges anybody.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from countermark.data import Examples
from countermark.errors import CountermarkError, choose
from countermark.files import (
    canonical_json,
    make_private_folder,
    read_bytes,
    read_json,
    read_tensors,
    sha256,
    write_bytes,
    write_json,
    write_tensors,
)
from countermark.timestamps import decode_token, encode_token, read_token
from countermark.watermarks.commitment import (
    C1_FORMAT,
    SECRET_BYTES,
    batch_of,
    check_signature,
    draw_coins,
    first_commitment,
    leaf_secrets,
    leaves,
    merkle_root,
    public_key,
    sign,
)
from countermark.watermarks.schemes import SCHEMES, Scheme
from countermark.watermarks.sets import WatermarkSet

KEY_FORMAT = "countermark key 1"
CLEAN_EXAMPLES = 100
"""Most clean examples that `protect` keeps with a key."""
_MOST_CLASSES = 1 << 16
CLEAN = "clean.safetensors"
"""File of the clean examples, in a key and in a claim."""
_PRIVATE = 0o600
_TRIALS_LIMIT = 1 << 30


@dataclass(frozen=True)
class Key:
    """A loaded key.

    Attributes:
        watermarks: images, possible answers, batches, cells.
        labels: int64 `(n,)`, the answer that the marked model is to give to each: the one that the
            coin chose, or the one label of a published scheme.
        others: int64 `(n,)`, the answer that the coin did not choose; -1 where there is only one
            answer.
        c1: the first commitment.
        signature: the signature of `c1`, hexadecimal.
        t1: the timestamp over C1 that the coins were drawn from; None for a private mark.
        clean: clean examples, which show in what way a suspect wants to be asked; None in keys that
            were made without them, and where the file was lost. Nothing is judged by them. C1 has
            their digest, so they are fixed before the coins.
    """

    watermarks: WatermarkSet
    labels: torch.Tensor
    others: torch.Tensor
    c1: Mapping[str, Any]
    signature: str
    t1: bytes | None
    clean: Examples | None = None

    @property
    def scheme(self) -> str:
        """Name of the watermark scheme."""
        return str(self.c1["scheme"])

    @property
    def names(self) -> tuple[str, ...]:
        """Class names in the order of the labels; none in keys of release 0.2.0 and before.

        C1 has them, so a suspect that answers by name cannot be read in an order that fits the
        coins.
        """
        return tuple(self.c1.get("class_names", ()))

    @property
    def rules(self) -> Scheme:
        """What holds for the watermark scheme."""
        return SCHEMES[self.scheme]

    def outcomes(self, answers: torch.Tensor) -> list[int]:
        """Compare a suspect's labels `(n,)` with the key.

        Returns:
            For each watermark +1 if the suspect gives the key's answer, -1 if it gives the other
            one, and 0 if it gives neither.
        """
        return (
            torch.eq(answers, self.labels).int()
            - (torch.eq(answers, self.others) & (self.others >= 0)).int()
        ).tolist()


def new_secrets(folder: Path) -> bytes:
    """Create a key's folder with a secret and a signing key, where it has none yet.

    Both are drawn from the operating system's randomness.

    Returns:
        The secret.
    """
    make_private_folder(folder)
    for name in ("secret", "signing-key"):
        if not (folder / name).exists():
            write_bytes(folder / name, secrets.token_bytes(SECRET_BYTES), _PRIVATE)
    return _read_secret(folder / "secret")


def write_key(
    folder: Path,
    scheme: str,
    watermarks: WatermarkSet,
    provenance: Mapping[str, Any],
    stamp: Callable[[bytes], bytes] | None = None,
    clean: Examples | None = None,
    names: Sequence[str] = (),
) -> Key:
    """Commit to a watermark set under the secrets in `folder`, draw the coins and write the key.

    Args:
        folder: a folder that `new_secrets` prepared.
        scheme: name of one of `SCHEMES`.
        watermarks: the set; it must not depend on the secrets.
        provenance: what else C1 fixes (data set, configuration and pool digests), JSON-ready.
        stamp: has a message timestamped and returns the token; without it the mark is private.
        clean: clean examples that a suspect may see, of no pool that the trials come from.
        names: class names in the order of the labels.
    """
    choose("scheme", scheme, SCHEMES)
    secret, signing_key = _read_secret(folder / "secret"), _read_secret(folder / "signing-key")
    tensors = {name: getattr(watermarks, name) for name in ("x", "answers", "batch", "cell")}
    digest = write_tensors(folder / "trials.safetensors", tensors, mode=_PRIVATE)
    fixed = dict(provenance)
    if clean is not None:
        clean = clean.read()
        shown = {"x": clean.x, "y": clean.y}
        fixed["clean_sha256"] = write_tensors(folder / CLEAN, shown, mode=_PRIVATE)
    if names:
        fixed["class_names"] = list(names)
    c1 = first_commitment(watermarks, secret, public_key(signing_key), scheme, fixed)
    signature = sign(signing_key, c1)
    t1 = None if stamp is None else stamp(canonical_json(c1))
    signed = {
        "c1": c1,
        "c1_signature": signature,
        "t1": encode_token(t1),
        "trials_sha256": digest,
        "format": KEY_FORMAT,
    }
    write_json(
        folder / "key.json", {"key": signed, "signature": sign(signing_key, signed)}, _PRIVATE
    )
    return replace(_key(watermarks, c1, signature, t1, secret), clean=clean)


def load_key(folder: Path) -> Key:
    """Read a key and check all of it.

    Raises:
        CountermarkError: a file is missing, not Countermark's, or has a changed byte.
    """
    if not folder.is_dir():
        raise CountermarkError(f"{folder} is not a key folder; name the folder that holds key.json")
    record = read_json(folder / "key.json")
    signed = record.get("key")
    if not isinstance(signed, dict) or signed.get("format") != KEY_FORMAT:
        raise CountermarkError(
            f"{folder / 'key.json'} is not a key of the format {KEY_FORMAT!r}; "
            "use the release that wrote it"
        )
    c1 = signed.get("c1")
    known = list(SCHEMES)  # a list: what a damaged file has there may not be hashable
    if not isinstance(c1, dict) or c1.get("format") != C1_FORMAT or c1.get("scheme") not in known:
        raise CountermarkError(
            f"{folder / 'key.json'} holds no commitment of the format {C1_FORMAT!r}; "
            "restore it from a backup"
        )
    check_signature(
        str(c1.get("public_key")), signed, str(record.get("signature")), str(folder / "key.json")
    )
    check_signature(
        str(c1.get("public_key")), c1, str(signed.get("c1_signature")), str(folder / "key.json")
    )
    secret = _read_secret(folder / "secret")
    if public_key(_read_secret(folder / "signing-key")) != c1["public_key"]:
        raise CountermarkError(
            f"{folder / 'signing-key'} does not belong to this key; restore it from a backup"
        )
    trials = folder / "trials.safetensors"
    tensors, _, digest = read_tensors(
        trials, _TRIALS_LIMIT, lambda found: _check_form(found, c1, trials)
    )
    if digest != signed.get("trials_sha256"):
        raise CountermarkError(
            f"{trials} was changed after the key was made; restore it from a backup"
        )
    watermarks = WatermarkSet(**tensors)
    _check_fit(watermarks, c1, folder / "key.json")
    if merkle_root(leaves(watermarks, secret)).hex() != c1.get("root"):
        raise CountermarkError(
            f"{folder / 'secret'} does not belong to the committed trials; restore it from a backup"
        )
    names = c1.get("class_names", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CountermarkError(f"{folder / 'key.json'}: its class names are none")
    # Release 0.2.0 had the digest beside C1.
    named = c1.get("clean_sha256", signed.get("clean_sha256"))
    clean = None
    if named is not None and (folder / CLEAN).exists():
        clean = read_clean(folder / CLEAN, str(named), tuple(watermarks.x.shape[1:]))
    t1 = decode_token(signed.get("t1"), f"{folder / 'key.json'}: t1")
    return replace(_key(watermarks, c1, str(signed["c1_signature"]), t1, secret), clean=clean)


def read_clean(path: Path, digest: str, shape: tuple[int, ...]) -> Examples:
    """Read the clean examples of a key, or of a claim.

    Args:
        path: their file.
        digest: SHA-256 of the file, hexadecimal.
        shape: of one image.

    Raises:
        CountermarkError: the file holds something else, or was changed.
    """
    none = CountermarkError(f"{path} does not hold clean examples (images, labels); delete it")

    def check(found: Mapping[str, torch.Tensor]) -> None:
        x, y = found.get("x"), found.get("y")
        if x is None or y is None or (x.dtype, y.dtype, y.dim()) != (torch.uint8, torch.int64, 1):
            raise none
        if not 1 <= len(y) <= CLEAN_EXAMPLES or x.shape != (len(y), *shape):
            raise none

    tensors, _, read = read_tensors(path, _TRIALS_LIMIT, check)
    if read != digest:
        raise CountermarkError(
            f"{path} was changed after the key was made; restore it from a backup or delete it"
        )
    x, y = tensors["x"], tensors["y"]
    if not 0 <= int(y.min()) <= int(y.max()) < _MOST_CLASSES:
        raise none
    return Examples(x, y)


def _check_form(tensors: Mapping[str, torch.Tensor], c1: Mapping[str, Any], path: Path) -> None:
    """Refuse tensors that are not the trials that C1 counts; those of the device `meta` will do."""
    names = {
        "x": (torch.uint8, 4),
        "answers": (torch.int64, 2),
        "batch": (torch.int64, 1),
        "cell": (torch.int64, 1),
    }
    fits = tensors.keys() == names.keys() and all(
        (tensors[n].dtype, tensors[n].dim()) == kind for n, kind in names.items()
    )
    if (
        not fits
        or len({len(tensor) for tensor in tensors.values()}) != 1
        or not len(tensors["x"])
        or tensors["answers"].shape[1] not in (1, 2)
    ):
        raise CountermarkError(
            f"{path} does not hold the trials of a key (images, answers, batches, cells); "
            "restore it from a backup"
        )
    if (c1.get("leaves"), c1.get("shape")) != (len(tensors["x"]), list(tensors["x"].shape[1:])):
        raise CountermarkError(
            f"{path} holds other trials than were committed to; restore it from a backup"
        )


def _check_fit(watermarks: WatermarkSet, c1: Mapping[str, Any], path: Path) -> None:
    """Refuse trials that the statistic is not valid for, or that do not match the counts in C1.

    A "coin" with one answer would score a stranger's model that happens to give it. A cell has the
    number of its first trial, whose coin is the cell's.
    """
    answers, batch, cell = watermarks.answers, watermarks.batch, watermarks.cell
    in_order = bool((answers >= 0).all()) and bool((batch >= 0).all()) and bool((cell >= 0).all())
    rules = SCHEMES[c1["scheme"]]
    in_order = in_order and answers.shape[1] == rules.answers
    if rules.coins:
        in_order = (
            in_order
            and bool((answers[:, 0] < answers[:, 1]).all())
            and bool((cell <= torch.arange(len(cell))).all())
            and all(torch.equal(each[cell], each) for each in (cell, batch, answers))
        )
    count, batches = len(watermarks), int(batch.max()) + 1
    counted = (c1.get("leaves"), c1.get("batches"), c1.get("shape")) == (
        count,
        batches,
        list(watermarks.x.shape[1:]),
    )
    even = (
        in_order
        and count % batches == 0
        and batch.tolist() == [batch_of(i, count, batches) for i in range(count)]
    )
    if not even or not counted:
        raise CountermarkError(
            f"{path} commits to other trials than its scheme allows or than the key holds; "
            "it is not a valid key"
        )


def load_secret(folder: Path) -> bytes:
    """The secret of a key folder, 32 bytes.

    Raises:
        CountermarkError: the folder has none, or it is damaged.
    """
    if not folder.is_dir():
        raise CountermarkError(f"{folder} is not a key folder; name the folder that holds key.json")
    return _read_secret(folder / "secret")


def load_signing_key(folder: Path) -> bytes:
    """The Ed25519 key of a key folder, 32 bytes.

    Raises:
        CountermarkError: the folder has none, or it is damaged.
    """
    return _read_secret(folder / "signing-key")


def _read_secret(path: Path) -> bytes:
    data = read_bytes(path, 2 * SECRET_BYTES)
    if len(data) != SECRET_BYTES:
        raise CountermarkError(
            f"{path} holds {len(data)} bytes instead of {SECRET_BYTES}; restore it from a backup"
        )
    return data


def _key(
    watermarks: WatermarkSet, c1: dict[str, Any], signature: str, t1: bytes | None, secret: bytes
) -> Key:
    if watermarks.answers.shape[1] == 1:
        labels = watermarks.answers[:, 0]
        return Key(watermarks, labels, torch.full_like(labels, -1), c1, signature, t1)
    committed = canonical_json(c1)
    beacon = b"" if t1 is None else read_token(t1, sha256(committed), "the key's timestamp").beacon
    drawn = draw_coins(committed, beacon, leaf_secrets(secret, len(watermarks)))
    coins = drawn[watermarks.cell].unsqueeze(1)
    labels = watermarks.answers.gather(1, coins).squeeze(1)
    return Key(
        watermarks, labels, watermarks.answers.gather(1, 1 - coins).squeeze(1), c1, signature, t1
    )
