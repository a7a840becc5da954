"""Marks in any training loop: `Marking` for a loop of one's own, and what `protect` shares with it.

The order is that of the protocol (docs/how-it-works.md). Making a `Marking` draws the secret, crafts
the trials on the network as it is now, commits to them and only then draws the coins. `mix` hands the
trials to the loop, `check` says what the network has learned, `finish` commits to the weights. There
is no way to choose trials once there are coins: a key that exists is read and goes on as it is.
"""

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import nn

from countermark.data import Dataset, Examples, as_uint8, default_threat, open_data, pixels
from countermark.errors import CountermarkError
from countermark.evaluation import accuracy, agreement, evaluating, predict
from countermark.evidence import JUDGE_ALPHA, Verdict, judge
from countermark.files import canonical_json, locked, read_bytes, write_json
from countermark.named_code import said
from countermark.networks import (
    DataRecord,
    Description,
    check_builds,
    describing,
    open_network,
    save_model,
)
from countermark.networks.source import normaliser, numbers
from countermark.places import check_address, own_path
from countermark.terminal import p_value
from countermark.text import brief
from countermark.thieves.remove import prune
from countermark.threat import budget
from countermark.timestamps import Stamp, encode_token, timestamping
from countermark.training.turns import in_turn
from countermark.watermarks import (
    CLEAN_EXAMPLES,
    SCHEMES,
    Key,
    Materials,
    full_strength,
    load_key,
    new_secrets,
    second_commitment,
    secret_seed,
    sign,
    write_key,
)

PLANNED_PRUNING = (0.5, 0.4, 0.3, 0.2, 0.1)
"""Fractions of the weights that a mark must be able to lose: the largest that leaves a usable copy.

Pruning costs a thief nothing, so it is the removal to expect, and half of the weights cost most
networks little accuracy. A small one may be ruined by less, and a ruined copy is no theft: there the
next smaller fraction counts. The check takes a copy and two passes over some hundred images, and
also tells of a mark that sits on the edge of decisions: such a one is the first to go under
fine-tuning as well.
"""

_RUINED = 10.0  # points of accuracy on the key's clean examples that a usable copy has not lost

_SLACK = 0.02  # pixels outside [0, 1] that interpolation may leave
_WRITTEN = ("model.safetensors", "model.json", "commitment.json")  # in this order
_UNFINISHED = ".torn-finish"  # in the model folder: where they are written first


@dataclass(frozen=True)
class Standing:
    """How a network stands to a key: its answers as it is, and with many of its weights pruned.

    Attributes:
        trials: trials of the key.
        agreement: those answered as the key says, in percent.
        needed: percent at which the scheme counts as learned.
        verdict: what the answers prove; none for a scheme without coins.
        pruned: what those of the pruned copy prove; none likewise, or where every pruning ruins it.
        rate: fraction of the weights that the pruned copy lacks; none where there is no such copy.
    """

    trials: int
    agreement: float
    needed: float
    verdict: Verdict | None
    pruned: Verdict | None
    rate: float | None = None

    @property
    def taken(self) -> bool:
        """Whether the mark holds: enough trials learned, and a judge's p-value after pruning."""
        survives = self.pruned is None or self.pruned.verdict == "match"
        return self.agreement >= self.needed and survives

    def __str__(self) -> str:
        """Agreements and disagreements with the coins and their exact p-value."""
        if self.verdict is None:
            return f"{self.agreement:.1f} % of the watermarks"
        return told(self.verdict)

    def why_not(self) -> str:
        """What is missing, as the beginning of a sentence; for a mark that did not take."""
        if self.agreement < self.needed:
            what, found = ("watermarks", "") if self.verdict is None else ("coins", f" ({self})")
            return (
                f"the mark did not take: the network agrees with {self.agreement:.1f} % of its "
                f"{self.trials} {what}{found} where {self.needed:g} % are needed"
            )
        return f"the mark would not last: {self.left()} is left of {self}, and a judge wants p <= {JUDGE_ALPHA:g}"

    def left(self) -> str:
        """What the pruned copy still proves, for a person; empty where there is none."""
        if self.pruned is None or self.rate is None:
            return ""
        return f"with {100 * self.rate:.0f} % of the weights pruned {told(self.pruned)}"


def told(verdict: Verdict) -> str:
    """Agreements, disagreements and p-value of a verdict, for a person."""
    counted = f"{verdict.agreements}:{verdict.disagreements}"
    return f"{counted}, p = {p_value(verdict.log10_p_value)}"


def standing(network: nn.Module, key: Key) -> Standing:
    """Ask a network for all trials of a key, and once more with some of its weights gone.

    How many that are says `PLANNED_PRUNING`: as many as leave a copy that a thief could use. It is
    measured on the key's clean examples, which are no trials; a key without them takes the largest.

    No trial is dropped and no coin drawn again for what comes out: it only says whether the
    training goes on (condition 2).

    Args:
        network: pixels `(n, c, h, w)` of [0, 1] to logits.
        key: the key of its mark.
    """
    answers = predict(network, key.watermarks.x)
    share = agreement(answers, key.labels)
    if not key.rules.coins:
        return Standing(len(answers), share, key.rules.taken, None, None)

    def judged(given: torch.Tensor) -> Verdict:
        return judge(key.watermarks.cell.tolist(), key.outcomes(given), alpha=JUDGE_ALPHA)

    for rate in PLANNED_PRUNING:
        copy = prune(network, rate)
        if _usable(copy, network, key.clean):
            left = judged(predict(copy, key.watermarks.x))
            return Standing(len(answers), share, key.rules.taken, judged(answers), left, rate)
    return Standing(len(answers), share, key.rules.taken, judged(answers), None)


def _usable(copy: nn.Module, network: nn.Module, clean: Examples | None) -> bool:
    """Whether a copy is nearly as good as the network that it was made from."""
    return clean is None or accuracy(copy, clean) > accuracy(network, clean) - _RUINED


def commit(folder: Path, keys: Path, key: Key, digest: str, stamp: Stamp | None) -> None:
    """Write the public commitment of a marked model, `commitment.json`.

    Without timestamps the mark is private: no judge can tell when the coins were drawn.

    Args:
        folder: the model folder.
        keys: the key folder, which holds the key that signs.
        key: the key.
        digest: SHA-256 of the weights file, in hexadecimal.
        stamp: has a message timestamped; none for a private mark.
    """
    signing_key = read_bytes(keys / "signing-key", 32)
    c2 = second_commitment(key.c1, key.t1, digest)
    record = {
        "kind": "private" if stamp is None else "timestamped",
        "c1": key.c1,
        "c1_signature": key.signature,
        "t1": encode_token(key.t1),
        "c2": c2,
        "c2_signature": sign(signing_key, c2),
        "t2": None if stamp is None else encode_token(stamp(canonical_json(c2))),
    }
    write_json(folder / "commitment.json", record)


class Marking:
    """A mark for a network that is trained in a loop of one's own.

    Example:
        >>> photos = cm.open_data("photos", size=32)
        >>> mark = cm.Marking(net, photos, key="mine/key", epsilon=8 / 255)
        >>> for x, y in loader:
        ...     x, y = mark.mix(x, y, 16)  # 16 trials join the batch
        ...     step(net, x, y)
        >>> print(mark.check(net))
        271:12, p = 3.2e-65
        >>> mark.finish(net, out="mine", network="shop.models:make")

    Attributes:
        key: the key: trials, coins, first commitment.
        threat: the budgets of attackers and of the trials.
        resumed: whether the key was there already; trials and coins are then those of its making,
            and the network that was given now had no part in them.
    """

    def __init__(
        self,
        net: nn.Module,
        bases: Dataset | Examples | tuple[Any, Any],
        *,
        key: str | Path,
        epsilon: float | str | None = None,
        watermark_epsilon: float | str | None = None,
        batches: int | None = None,
        batch_size: int | None = None,
        mean: float | Sequence[float] = (),
        std: float | Sequence[float] = (),
        seed: int = 0,
        clean: Examples | tuple[Any, Any] | None = None,
        tsa: str | None = None,
        roots: str | Path | None = None,
    ) -> None:
        """Draw the secret, craft and commit to the trials, draw the coins; or go on with a key.

        Several processes of one job may do this at once: one makes the key, the others read it.

        Args:
            net: the network before its mark, from pixels `(n, c, h, w)` of [0, 1] to logits, or
                from normalised pixels where `mean` and `std` are given. It is asked in evaluation
                mode and left as it was. With a key that exists it may be at any point of training.
            bases: clean images that the network is not trained on and their true labels:
                `Examples`, or a pair of arrays `(n, c, h, w)` (uint8, or pixels of [0, 1]) and
                `(n,)`; or a data set, whose pools then give them.
            key: folder of the key: new, or made by an earlier `Marking` of the same bases and
                watermark budget, whose trials and coins then stay. It is secret; keep a backup of it.
            epsilon: budget that the network is trained for, in pixels of [0, 1], a number
                or a fraction as "8/255"; default that of the data set or the kind of image.
            watermark_epsilon: budget of the trials, above `epsilon`; the same default.
            batches: batches of trials, one for each later dispute; default 2.
            batch_size: most trials in a batch; default 200. Where the bases do not suffice, batches
                are smaller.
            mean: what the loop takes from the pixels outside the network, one number or one a
                channel.
            std: what it then divides by.
            seed: seed that cuts the pools of a data set; the one that the training pool comes from.
            clean: a few clean examples to keep with the key, given as the bases are, which show
                later whether a suspect is asked in the right way. They must be no bases. Those of a
                data set by default.
            tsa: address of a timestamp authority (RFC 3161); without one the mark is private.
            roots: PEM file of the authority's root certificates.

        Raises:
            CountermarkError: an argument of another type, bases that do not fit the network or are
                too few, clean examples that do not fit it or are bases, a mean without a deviation
                or for other channels, a budget that is not above the training budget,
                a key of another scheme, for other images or made from other bases or at another
                budget, or an authority that does not answer. A key that could not be made leaves
                nothing behind.
        """
        seed = _whole("seed", seed, 0)
        if seed >= 1 << 32:
            raise CountermarkError("seed is a whole number from 0 to 4294967295; take another")
        batches, batch_size = (
            None if each is None else _whole(name, each)
            for name, each in (("batches", batches), ("batch_size", batch_size))
        )
        self._keys = own_path(key, "key")
        self.data: Dataset | None = None
        self.seed = seed
        if isinstance(bases, Dataset):
            self.data, pools = bases, bases.pools(seed)
            clean = pools.validation if clean is None else clean
            examples, threat = pools.bases, bases.threat
            batches, batch_size = batches or bases.batches, batch_size or bases.batch_size
        else:
            examples = _examples(bases)
            threat = default_threat(_shape(examples))
        self.threat = threat.at(
            epsilon=None if epsilon is None else budget(epsilon),
            watermark_epsilon=None if watermark_epsilon is None else budget(watermark_epsilon),
        )
        self.mean, self.std = numbers("mean", mean), numbers("std", std)
        self._shape = _shape(examples)
        self._normalise = normaliser(self._shape, self.mean, self.std) or nn.Identity()
        self._classes = _classes(net, examples, self._normalise)
        if tsa is not None:
            check_address(str(tsa), "a timestamp authority")
        self._stamp = timestamping(tsa, None if roots is None else own_path(roots, "roots"))
        self._turns = 0
        self._on: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        with _key_folder(self._keys):
            self.resumed = (self._keys / "key.json").exists()
            if self.resumed:
                self.key = load_key(self._keys)
                self._check_key(examples)
            else:
                kept = None if clean is None else _clean(clean, examples, self._classes)
                self.key = self._make(net, examples, batches or 2, batch_size or 200, kept)

    def mix(
        self, x: torch.Tensor, y: torch.Tensor, count: int = 16
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Let trials join a batch, those whose turn it is: round after round through all of them.

        Mix last, after the loop's own augmentation: a trial that was moved or blurred is another.

        Args:
            x: the batch `(n, c, h, w)`: uint8, or floating-point pixels as the loop feeds them
                (normalised ones where `mean` and `std` were given).
            y: its labels, int64 `(n,)`.
            count: trials that join. 16 in a batch of 128 are a good beginning.

        Returns:
            Images `(n + count, c, h, w)` and labels `(n + count,)`, of the types and on the devices
            of the batch.

        Raises:
            CountermarkError: a batch of other images or labels than the key has, or pixels outside
                [0, 1] where no normalisation was declared.
        """
        if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
            raise CountermarkError(
                f"the batch is two tensors, images and labels, not {type(x).__name__} and {type(y).__name__}; "
                "mix them in where the loop has tensors"
            )
        if tuple(x.shape[1:]) != self._shape:
            raise CountermarkError(
                f"the batch has images of shape {tuple(x.shape[1:])}, and the trials {self._shape}; "
                "mix them in where images have the shape that the network takes"
            )
        if y.shape != x.shape[:1] or y.dtype != torch.int64:
            raise CountermarkError(
                f"the batch has labels of shape {tuple(y.shape)} and type {y.dtype}; trials have "
                "hard labels, so give int64 of one number an image (no mixed or smoothed labels)"
            )
        if not x.is_floating_point() and x.dtype != torch.uint8:
            raise CountermarkError(
                f"the batch has images of type {x.dtype}; give uint8 or floating-point ones"
            )
        count = _whole("count", count)
        if self._turns == 0 and x.is_floating_point() and not self.mean:
            _check_range(x)
        images, labels = self._resident(x.device)
        turn = in_turn(self._turns, count, len(labels), self.seed).to(x.device)
        self._turns += count
        trials = images[turn]
        if x.is_floating_point():
            trials = self._normalise(pixels(trials)).to(x.dtype)
        return torch.cat((x, trials)), torch.cat((y, labels[turn].to(y.device)))

    def check(self, net: nn.Module) -> Standing:
        """Ask a network, in evaluation mode, for all trials; `print` it for a verdict in one line.

        It costs two passes over some hundred images: once an epoch is often enough.

        Raises:
            CountermarkError: it takes other images or tells other classes apart than the key has.
        """
        classes = _told_apart(net, self.key.watermarks.x[:1], self._normalise)
        if classes != self._classes:
            raise CountermarkError(
                f"the network tells {classes} classes apart, and the one that the marking began with {self._classes}; "
                "give the network that is trained"
            )
        return standing(self._seen(net), self.key)

    def finish(
        self,
        net: nn.Module,
        out: str | Path,
        *,
        network: str = "",
        data: str | Path | Dataset | None = None,
        class_names: Sequence[str] = (),
        history: Sequence[Mapping[str, Any]] = (),
    ) -> Standing:
        """Commit to the marked weights and write the model folder.

        The folder may hold the key already. All of it is written, or nothing.

        Args:
            net: the marked network.
            out: folder to write: new, empty, or with nothing but the key in it.
            network: what builds the network, as later verbs are told by `--network`: a name of
                ours, `timm:NAME` or `module:function`. It is built once, to see that the weights
                fit it. Without it each of them has to be told.
            data: the data that the model is for, a place or a data set; by default the data set
                that gave the bases.
            class_names: names of the classes in the order of the logits, where there is no data set.
            history: what was done to the model, JSON-ready, in order.

        Returns:
            How the network stands to its key.

        Raises:
            CountermarkError: the mark did not take, `network` builds another network, the folder
                cannot be written or holds something else, or the authority does not answer.
        """
        folder = own_path(out, "out")
        found = self.check(net)
        if not found.taken:
            raise CountermarkError(
                f"{found.why_not()}. Nothing was written; train on with trials in the batches "
                f"(more epochs, more trials in a batch, a higher learning rate), and if that does "
                "not help, take a larger watermark budget or a larger network"
            )
        description = self._describe(network, data, class_names, found, history)
        seen = self._seen(net)
        if network:
            check_builds(seen, description)
        with _filled(folder, self._keys) as beside:
            digest = save_model(beside, seen, description)
            commit(beside, self._keys, self.key, digest, self._stamp)
        return found

    def _make(
        self,
        net: nn.Module,
        bases: Examples,
        batches: int,
        batch_size: int,
        clean: Examples | None,
    ) -> Key:
        """Craft, commit, draw: in this order, and once."""
        secret = new_secrets(self._keys)
        attack = full_strength(self.threat.watermark_epsilon)
        trials = SCHEMES["coin"].make(
            Materials(
                source=self._seen(net, checked=True),
                bases=bases,
                outside=lambda: bases,
                attack=attack,
                batches=batches,
                batch_size=batch_size,
                seed=secret_seed(secret, "crafting"),
            )
        )
        provenance = {
            "data": "" if self.data is None else self.data.place,
            "pools": {"bases": bases.digest},
            "crafting": asdict(attack),
        }
        return write_key(self._keys, "coin", trials, provenance, self._stamp, clean)

    def _check_key(self, bases: Examples) -> None:
        """Refuse to go on with a key that is none of this loop's.

        What was committed to before the coins were drawn is compared, and no coin.
        """
        key, where = self.key, self._keys
        if not key.rules.coins:
            raise CountermarkError(
                f"{where} is a key of the scheme {key.scheme}; a marking has coins, choose another folder"
            )
        if (
            tuple(key.watermarks.x.shape[1:]) != self._shape
            or int(key.watermarks.answers.max()) >= self._classes
        ):
            raise CountermarkError(
                f"{where} is a key for images of shape {tuple(key.watermarks.x.shape[1:])} or other classes than "
                f"the network has ({self._classes}); choose another folder"
            )
        if (key.t1 is None) != (self._stamp is None):
            how, what = ("without", "leave tsa out") if key.t1 is None else ("with", "give tsa")
            raise CountermarkError(
                f"the coins of {where} were drawn {how} a timestamp; {what}, or choose another folder"
            )
        if _committed(key, "pools", "bases") != bases.digest:
            raise CountermarkError(
                f"the trials of {where} were made from other bases than are given now, so some of these may "
                "be in the training; give the data and the seed of its making, or choose another folder"
            )
        budget = _committed(key, "crafting", "epsilon")
        if budget != self.threat.watermark_epsilon:
            raise CountermarkError(
                f"the trials of {where} were crafted at a watermark budget of {budget}, not of "
                f"{self.threat.watermark_epsilon:g}; give watermark_epsilon={budget}, or choose another folder"
            )

    def _describe(
        self,
        network: str,
        data: str | Path | Dataset | None,
        class_names: Sequence[str],
        found: Standing,
        history: Sequence[Mapping[str, Any]],
    ) -> Description:
        opened = self.data if data is None else open_data(data)
        event = {"event": "marked", "scheme": self.key.scheme, "agreement": found.agreement}
        more: dict[str, Any] = {"mean": self.mean, "std": self.std, "history": (*history, event)}
        if opened is not None:
            if (opened.shape, opened.classes) != (self._shape, self._classes):
                raise CountermarkError(
                    f"the network takes images of shape {self._shape} to {self._classes} classes, "
                    f"{opened.place or 'the data'} has {opened.shape} and {opened.classes}; give the model's data"
                )
            return describing(opened, network, threat=self.threat, seed=self.seed, **more)
        names = tuple(class_names) or tuple(map(str, range(self._classes)))
        if len(names) != self._classes:
            raise CountermarkError(
                f"{len(names)} class names for {self._classes} classes; give one for each logit"
            )
        return Description(
            network, self._shape, names, DataRecord("", ""), self.threat, self.seed, **more
        )

    def _seen(self, net: nn.Module, *, checked: bool = False) -> nn.Module:
        """The network from pixels of [0, 1]."""
        return open_network(
            net, self._shape, self._classes, mean=self.mean, std=self.std, checked=checked
        )

    def _resident(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """All trials and what the key says of them, on a device."""
        if device not in self._on:
            self._on[device] = self.key.watermarks.x.to(device), self.key.labels.to(device)
        return self._on[device]


def _committed(key: Key, part: str, name: str) -> Any:
    """What a part of a key's first commitment says; none where it says nothing."""
    found = key.c1.get(part)
    return found.get(name) if isinstance(found, Mapping) else None


def _clean(given: Examples | tuple[Any, Any], bases: Examples, classes: int) -> Examples:
    """The clean examples that are kept with a key: in memory, and such that the key can be read again.

    Raises:
        CountermarkError: there are none, they are no images like the bases, have other labels than
            the network has classes, or are bases.
    """
    found = _examples(given, "clean examples")[:CLEAN_EXAMPLES].read()
    if len(found) == 0 or found.x.shape[1:] != bases.x.shape[1:]:
        raise CountermarkError(
            f"there are {len(found)} clean examples of shape {tuple(found.x.shape[1:])} for bases of shape "
            f"{_shape(bases)}; give one or more of this shape, or leave clean out"
        )
    if not 0 <= int(found.y.min()) <= int(found.y.max()) < classes:
        raise CountermarkError(
            f"the clean examples have labels from {int(found.y.min())} to {int(found.y.max())}, and the "
            f"network tells {classes} classes apart; number the classes from 0"
        )
    shared = int(torch.isin(found.contents(), bases.contents()).sum())
    if shared:
        raise CountermarkError(
            f"{shared} of {len(found)} clean examples are bases, and what a suspect is shown may be "
            "none of them; give others, or leave clean out"
        )
    return found


def _examples(given: Examples | tuple[Any, Any], what: str = "bases") -> Examples:
    """Images with labels as uint8 examples on the processor, from arrays or pixels if need be.

    Raises:
        CountermarkError: they are no images with labels.
    """
    if isinstance(given, Examples):
        if given.rows is not None:
            return given
        given = (given.x, given.y)
    try:
        images, labels = (torch.as_tensor(part).cpu().to_dense() for part in given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise CountermarkError(
            f"{what} are Examples, a data set, or a pair of arrays (images, labels): {error}"
        ) from error
    whole = labels.dim() == 1 and not labels.is_floating_point() and not labels.is_complex()
    if images.dim() != 4 or not whole or len(images) != len(labels) or not len(labels):
        raise CountermarkError(
            f"{what} are images (n, c, h, w) and whole labels (n,), not {tuple(images.shape)} and {tuple(labels.shape)} of {labels.dtype}"
        )
    return Examples(
        as_uint8(pixels(images)) if images.dtype != torch.uint8 else images, labels.long()
    )


def _shape(examples: Examples) -> tuple[int, int, int]:
    channels, height, width = examples.x.shape[1:]
    return channels, height, width


def _whole(name: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise CountermarkError(f"{name} is a whole number from {least}, not {brief(value)}")
    return int(value)


def _classes(net: nn.Module, bases: Examples, normalise: nn.Module) -> int:
    """How many classes a network tells apart, if all labels of the bases are among them.

    Raises:
        CountermarkError: it does not take such images, gives no logits, or has not all the labels.
    """
    classes = _told_apart(net, bases.x[:1], normalise)
    if not 0 <= int(bases.y.min()) <= int(bases.y.max()) < classes:
        raise CountermarkError(
            f"the bases have labels from {int(bases.y.min())} to {int(bases.y.max())}, and the "
            f"network tells {classes} classes apart; number the classes from 0"
        )
    return classes


def _told_apart(net: nn.Module, image: torch.Tensor, normalise: nn.Module) -> int:
    """How many classes a network tells apart, by the logits that it gives for one image `(1, c, h, w)`.

    Raises:
        CountermarkError: it is no network, does not take such images, or gives no logits.
    """
    if not isinstance(net, nn.Module):
        raise CountermarkError(
            f"the network is an nn.Module, not {brief(net)}; build it and give it here"
        )
    device = next((each.device for each in net.parameters()), torch.device("cpu"))
    try:
        with evaluating(net), torch.no_grad():
            logits = net(normalise(pixels(image.to(device))))
    except Exception as error:
        raise CountermarkError(
            f"the network does not take images of shape {tuple(image.shape[1:])}: {said(error)}"
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or len(logits) != 1:
        found = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise CountermarkError(
            f"the network gives {found} for one image, where logits (1, classes) are wanted; put a module around it that returns them"
        )
    return logits.shape[1]


def _check_range(x: torch.Tensor) -> None:
    """Refuse normalised pixels that were not declared: trials would join them on another scale."""
    low, high = (float(value) for value in x.detach().aminmax())
    if not (low >= -_SLACK and high <= 1 + _SLACK):
        raise CountermarkError(
            f"the batch has pixels from {low:.3g} to {high:.3g}, outside [0, 1]: it seems to be "
            "normalised outside the network. Say how, Marking(..., mean=, std=), and trials will be "
            "as well"
        )


@contextlib.contextmanager
def _key_folder(folder: Path) -> Iterator[None]:
    """Be alone with a key folder, which is made if there is none and taken away if no key came of it."""
    new = not folder.exists()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise CountermarkError(
            f"cannot create {folder}: {error.strerror}; choose another folder"
        ) from error
    with locked(folder, wait=True):
        try:
            yield
        except BaseException:
            if new and not (folder / "key.json").exists():  # a secret without trials is of no use
                shutil.rmtree(folder, ignore_errors=True)
            raise


@contextlib.contextmanager
def _filled(folder: Path, keys: Path) -> Iterator[Path]:
    """Fill a model folder that may hold its key already: all files of `_WRITTEN`, or none.

    They are written into a folder of their own inside it and moved into place when the block ends
    well, the commitment last. What an interrupted call had moved is told by the commitment that
    still waits there, so no file is ever replaced or taken away that another put there.

    Yields:
        The folder to write the files in.

    Raises:
        CountermarkError: the folder holds something else, cannot be made, or another process fills it.
    """
    new, beside = not folder.exists(), folder / _UNFINISHED
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            moved = _moved(folder)
            others = {entry.name for entry in folder.iterdir() if entry.resolve() != keys.resolve()}
            others -= {_UNFINISHED, *moved}
            if others:
                raise CountermarkError(
                    f"{folder} holds files already ({min(others)}); choose a new folder"
                )
            _take_back(folder)
            try:
                beside.mkdir()
                yield beside
                for name in _WRITTEN:
                    (beside / name).replace(folder / name)
            finally:
                _take_back(folder)
                if new:
                    with contextlib.suppress(OSError):
                        folder.rmdir()
    except OSError as error:
        raise CountermarkError(
            f"cannot write {folder}: {error.strerror or error}; choose another folder"
        ) from error


def _moved(folder: Path) -> list[str]:
    """The files of an unfinished call that it had moved into place; none once all of them are."""
    beside = folder / _UNFINISHED
    if not (beside / _WRITTEN[-1]).exists():
        return []
    return [name for name in _WRITTEN if not (beside / name).exists()]


def _take_back(folder: Path) -> None:
    """Take away what an unfinished call has written; nothing, once all its files are in place."""
    for name in _moved(folder):
        (folder / name).unlink(missing_ok=True)
    if (folder / _UNFINISHED).exists():
        shutil.rmtree(folder / _UNFINISHED)
