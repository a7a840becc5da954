"""Marks in any training loop: the class `Marking`, and what `protect` shares with it.

The order is that of the protocol (docs/how-it-works.md). Creating a `Marking` draws the secret,
crafts the trials on the network in its current state, commits to them and only then draws the
coins. `mix` adds the trials to the loop's batches, `check` tells what the network has learned,
`finish` commits to the weights. There is no way to choose trials once there are coins: an existing
key is read and continued as it is.
"""

import contextlib
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import nn

from countermark.choices import SchemeName
from countermark.data import Dataset, Examples, as_uint8, default_threat, open_data, pixels
from countermark.data.dataset import SMALLEST_BATCH
from countermark.errors import CountermarkError
from countermark.evaluation import accuracy, agreement, evaluating, predict
from countermark.evidence import JUDGE_ALPHA, Verdict, judge
from countermark.files import (
    JSON_LIMIT,
    canonical_json,
    locked,
    read_bytes,
    read_tensors,
    write_bytes,
    write_json,
)
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
from countermark.registry import drawing
from countermark.terminal import note, p_value
from countermark.text import brief
from countermark.thieves.remove import prune
from countermark.threat import budget
from countermark.timestamps import Stamp, encode_token, timestamping
from countermark.training.turns import in_turn
from countermark.watermarks import (
    CLEAN_EXAMPLES,
    SCHEMES,
    Change,
    Key,
    Materials,
    WatermarkSet,
    changes,
    full_strength,
    load_key,
    new_secrets,
    second_commitment,
    secret_key,
    secret_seed,
    sign,
    versions,
    write_key,
)

PLANNED_PRUNING = (0.5, 0.4, 0.3, 0.2, 0.1)
"""Fractions of the weights whose pruning a mark must survive.

The largest one that leaves a usable copy counts. Pruning costs a thief nothing, so it is the
removal attack to expect, and pruning half of the weights costs most networks little accuracy. Less
may ruin a small network, and a ruined copy is no theft: there, the next smaller fraction counts.
The check takes a copy of the network and two passes over some hundred images. It also detects a
mark that lies at the edge of decisions: such a mark is the first to be lost under fine-tuning as
well.
"""

# A copy that loses this many points of accuracy on the key's clean examples counts as ruined.
_RUINED = 10.0

_TRIED, _HARDLY = 250, 15.0  # bases, and points that are better than one answer to all of them
_SLACK = 0.02  # how far interpolation may take pixel values outside [0, 1]
_WRITTEN = ("model.safetensors", "model.json", "commitment.json")  # in this order
_ASKED = "c1.json"  # in the key folder: the C1 whose coins somebody was asked for
_UNFINISHED = ".torn-finish"  # in the model folder: where they are written first


@dataclass(frozen=True)
class Standing:
    """How well a network carries the mark of a key: as it is, and with many of its weights pruned.

    Attributes:
        trials: number of trials of the key.
        agreement: trials that are answered as the key says, in percent.
        needed: percentage at which the scheme counts as learned.
        verdict: what the answers prove; `None` for a scheme without coins.
        pruned: what the answers of the pruned copy prove; `None` for a scheme without coins, or if
            every pruning ruins the copy.
        rate: fraction of the weights that were pruned from the copy; `None` if there is no such
            copy.
    """

    trials: int
    agreement: float
    needed: float
    verdict: Verdict | None
    pruned: Verdict | None
    rate: float | None = None

    @property
    def taken(self) -> bool:
        """Whether the mark holds.

        Enough trials are learned, and the answers still convince a judge, the pruned copy's too.
        """
        proven = (each is None or each.verdict == "match" for each in (self.verdict, self.pruned))
        return self.agreement >= self.needed and all(proven)

    def __str__(self) -> str:
        """Agreements and disagreements with the coins and their exact p-value."""
        if self.verdict is None:
            return f"{self.agreement:.1f} % of the watermarks"
        return told(self.verdict)

    def why_not(self) -> str:
        """Say what is missing, as the beginning of a sentence; for a mark that did not take."""
        if self.agreement < self.needed:
            what, found = ("watermarks", "") if self.verdict is None else ("coins", f" ({self})")
            return (
                "the mark did not take: the network agrees with "
                f"{math.floor(10 * self.agreement) / 10:.1f} % of its {self.trials} {what}{found} "
                f"where {self.needed:g} % are needed"
            )
        if self.verdict is not None and self.verdict.verdict != "match":
            return f"the mark did not take: {self}, and a judge wants p <= {JUDGE_ALPHA:g}"
        return (
            f"the mark would not last: {self.left()} is left of {self}, and a judge wants p <= "
            f"{JUDGE_ALPHA:g}"
        )

    def left(self) -> str:
        """Say what the pruned copy still proves, for a person; empty if there is no copy."""
        if self.pruned is None or self.rate is None:
            return ""
        more = " (more would ruin a copy)" if self.rate < PLANNED_PRUNING[0] else ""
        return f"with {100 * self.rate:.0f} % of the weights pruned{more} {told(self.pruned)}"


def told(verdict: Verdict) -> str:
    """Format the agreements, disagreements and p-value of a verdict for a person."""
    counted = f"{verdict.agreements}:{verdict.disagreements}"
    return f"{counted}, p = {p_value(verdict.log10_p_value)}"


def standing(network: nn.Module, key: Key) -> Standing:
    """Ask a network all trials of a key, and ask again with some of its weights pruned.

    How many weights are pruned follows from `PLANNED_PRUNING`: as many as leave a copy that a thief
    could use. This is measured on the key's clean examples, which are not trials; a key without
    them takes the largest fraction.

    No trial is dropped and no coin drawn again because of the result: it only decides whether the
    training goes on (condition 2).

    Args:
        network: takes pixel values `(n, c, h, w)` in [0, 1] to logits.
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
    """Tell whether a copy is nearly as good as the network that it was made from.

    A network of many classes may get few images right, and a copy with half of them is ruined.
    """
    if clean is None:
        return True
    whole = accuracy(network, clean)
    return accuracy(copy, clean) > max(whole - _RUINED, whole / 2)


def commit(folder: Path, keys: Path, key: Key, digest: str, stamp: Stamp | None) -> None:
    """Write the public commitment of a marked model, `commitment.json`.

    Without timestamps the mark is private: no judge can tell when the coins were drawn.

    Args:
        folder: the model folder.
        keys: the key folder, which holds the signing key.
        key: the key.
        digest: SHA-256 of the weights file, in hexadecimal.
        stamp: obtains a timestamp for a message; `None` for a private mark.
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
        >>> import torch
        >>> from torch.nn.functional import cross_entropy
        >>> digits = cm.open_data("digits")
        >>> training = digits.pools().training
        >>> net = cm.load("stranger")  # your network, as far as you have trained it
        >>> mark = cm.Marking(net, digits, key="own/key")
        >>> optimiser = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        >>> for _ in range(100):  # epochs, until the mark holds
        ...     if mark.check(net).taken:
        ...         break
        ...     for rows in torch.randperm(len(training)).split(64):
        ...         x, y = mark.mix(training.x[rows] / 255, training.y[rows], 16)
        ...         optimiser.zero_grad()
        ...         cross_entropy(net(x), y).backward()  # 16 trials have joined the batch
        ...         optimiser.step()
        >>> mark.finish(net, out="own", network="small").verdict.verdict
        'match'

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
        scheme: SchemeName = "coin",
        survive: str | Sequence[str] = (),
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
        register: str | Path | None = None,
        identity: str | Path | None = None,
    ) -> None:
        """Draw the secret, craft and commit to the trials, draw the coins; or continue with a key.

        Several processes of one job may do this at once: one makes the key, the others read it.

        Args:
            net: the network before it is marked. It takes pixel values `(n, c, h, w)` in [0, 1], or
                normalised ones if `mean` and `std` are given, to logits. It is run in evaluation
                mode and left as it was. With an existing key it may be at any point of training.
            bases: clean images that the network is not trained on, with their true labels:
                `Examples`, or a pair of arrays `(n, c, h, w)` (uint8, or pixel values in [0, 1])
                and `(n,)`; or a data set, whose pools then provide them.
            key: folder of the key: new, or made by an earlier `Marking` with the same scheme,
                changes, bases and watermark budget, whose trials and coins are then kept. It is
                secret; keep a backup of it.
            scheme: what the trials are: "coin" (perturbed bases), "texture" (made-up images, which
                last longer on photographs but can be recognised), or "mixed" (half of either).
                Textures are made of no bases, which then only show what the network takes.
            survive: changes that perturbed bases are to survive, such as "jpeg:75" or
                "threshold:0.5", as `protect` takes them; not "denoise", which is trained first. The
                trials join batches in each of these forms.
            epsilon: budget that the network is trained for, for pixel values in [0, 1], a number or
                a fraction such as "8/255"; by default that of the data set or of the kind of image.
            watermark_epsilon: budget of the trials, above `epsilon`; the same default.
            batches: batches of trials, one for each later dispute; default 2.
            batch_size: largest number of trials in a batch, from 40; default 200. If there are too
                few bases, batches are smaller.
            mean: what the loop subtracts from pixel values outside the network, one number or one
                per channel.
            std: what it then divides by.
            seed: seed that splits a data set into pools; the same that the training pool comes
                from.
            clean: a few clean examples to keep with the key, given in the same form as the bases,
                which show later whether a suspect is queried in the right way. They must not be
                bases. By default those of the data set.
            tsa: address of a timestamp authority (RFC 3161); without one the mark is private.
            roots: PEM file of the authority's root certificates.
            register: public log in which the commitment is registered, "rekor" or the path of a
                file that describes another; the coins then come from public randomness a minute
                later, for which this waits. It goes with `identity` and `tsa`.
            identity: private key (RSA, PEM, no password) that signs what is registered.

        Raises:
            CountermarkError: an argument has the wrong type; the scheme is none of these, or does
                not heed an option; the bases do not fit the network or are too few; the clean
                examples do not fit it or are bases; a mean is given without a deviation or for
                other channels; the watermark budget is not above the training budget; the key is of
                another scheme, for other images, to survive other changes, or made from other bases
                or at another budget; or the authority does not answer. A key that could not be made
                leaves nothing behind.
        """
        seed = _whole("seed", seed, 0)
        if seed >= 1 << 32:
            raise CountermarkError("seed is a whole number from 0 to 4294967295; take another")
        batches, batch_size = (
            None if each is None else _whole(name, each, least)
            for name, each, least in (
                ("batches", batches, 1),
                ("batch_size", batch_size, SMALLEST_BATCH),
            )
        )
        self._keys = own_path(key, "key")
        self._scheme = scheme
        self._survive = _words(survive)
        _check_scheme(scheme, self._survive, watermark_epsilon)
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
        self._changes = _untrained(self._survive, self._shape)
        if tsa is not None:
            check_address(str(tsa), "a timestamp authority")
        if (register is None) != (identity is None) or (register is not None and tsa is None):
            raise CountermarkError("register and identity go together, and with tsa")
        self._stamp = timestamping(tsa, None if roots is None else own_path(roots, "roots"))
        self._registers = (register, identity)
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
        """Add the trials whose turn it is to a batch, going round through all of them.

        Call `mix` last, after the loop's own augmentation: a trial that is shifted or blurred is no
        longer the same trial.

        Args:
            x: the batch `(n, c, h, w)`: uint8, or floating-point pixel values as the loop feeds
                them (normalised if `mean` and `std` were given).
            y: its labels, int64 `(n,)`.
            count: number of trials to add; 16 in a batch of 128 are a good start.

        Returns:
            Images `(n + count, c, h, w)` and labels `(n + count,)`, of the types and on the devices
            of the batch.

        Raises:
            CountermarkError: the batch has other images or labels than the key, or pixel values
                outside [0, 1] although no normalisation was declared.
        """
        if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
            raise CountermarkError(
                f"the batch is two tensors, images and labels, not {type(x).__name__} and "
                f"{type(y).__name__}; mix them in where the loop has tensors"
            )
        if tuple(x.shape[1:]) != self._shape:
            raise CountermarkError(
                f"the batch has images of shape {tuple(x.shape[1:])}, and the trials "
                f"{self._shape}; mix them in where images have the shape that the network takes"
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
        """Ask a network, in evaluation mode, all trials; `print` the result for a one-line verdict.

        This costs two passes over some hundred images: once an epoch is often enough.

        Raises:
            CountermarkError: the network takes other images or has other classes than the key.
        """
        classes = _told_apart(net, self.key.watermarks.x[:1], self._normalise)
        if classes != self._classes:
            raise CountermarkError(
                f"the network tells {classes} classes apart, and the one that the marking began "
                f"with {self._classes}; give the network that is trained"
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

        The folder may already hold the key. Either all of the model folder is written, or nothing.

        Args:
            net: the marked network.
            out: folder to write: new, empty, or with nothing but the key in it.
            network: what builds the network, as later commands are told with `--network`: the name
                of a built-in network, `timm:NAME` or `module:function`. It is built once, to see
                that the weights fit it. Without it, each later command has to be told.
            data: the data that the model is for, a place or a data set; by default the data set
                that provided the bases.
            class_names: names of the classes in the order of the logits, if there is no data set.
            history: what was done to the model, JSON-ready, in order.

        Returns:
            How well the network carries the mark of the key.

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
        """Make the key: craft, commit and draw, in this order and only once."""
        register, identity = self._registers
        private = None if identity is None else own_path(identity, "identity")
        drawn_from = drawing(self._stamp, register, private)
        secret = new_secrets(self._keys)
        asked, stored = self._keys / _ASKED, self._keys / "trials.safetensors"
        attack = full_strength(self.threat.watermark_epsilon)
        rules = SCHEMES[self._scheme]
        if rules.crafted and not asked.exists():
            _doubt(self._seen(net), bases)
        trials = (
            WatermarkSet(**read_tensors(stored, stored.stat().st_size)[0])
            if asked.exists()
            else rules.make(
                Materials(
                    source=self._seen(net, checked=True),
                    bases=bases,
                    outside=lambda: bases,
                    attack=attack,
                    batches=batches,
                    batch_size=batch_size,
                    seed=secret_seed(secret, "crafting"),
                    key=secret_key(secret, "trials"),
                    survive=self._changes,
                )
            )
        )
        provenance = {
            "data": "" if self.data is None else self.data.place,
            "pools": {"bases": bases.digest},
            "crafting": asdict(attack) if rules.crafted else None,
            **({"survive": list(self._survive)} if self._survive else {}),
        }
        names = () if self.data is None else self.data.class_names
        stamp = None if drawn_from is None else partial(_asked_once, asked, drawn_from)
        key = write_key(self._keys, self._scheme, trials, provenance, stamp, clean, names)
        asked.unlink(missing_ok=True)
        return key

    def _check_key(self, bases: Examples) -> None:
        """Refuse to continue with a key that does not belong to this loop.

        The comparison covers what was committed to before the coins were drawn, and no coin.
        """
        key, where = self.key, self._keys
        made_for = tuple(key.c1.get("survive") or ())
        if (key.scheme, made_for) != (self._scheme, self._survive):
            asked, made = (
                f"the scheme {each}" + (f" to survive {' '.join(words)}" if words else "")
                for each, words in ((self._scheme, self._survive), (key.scheme, made_for))
            )
            raise CountermarkError(
                f"{where} is a key of {made}, not of {asked}; give what it was made with, or "
                "choose another folder"
            )
        if (
            tuple(key.watermarks.x.shape[1:]) != self._shape
            or int(key.watermarks.answers.max()) >= self._classes
        ):
            raise CountermarkError(
                f"{where} is a key for images of shape {tuple(key.watermarks.x.shape[1:])} or "
                f"other classes than the network has ({self._classes}); choose another folder"
            )
        if (key.t1 is None) != (self._stamp is None):
            how, what = ("without", "leave tsa out") if key.t1 is None else ("with", "give tsa")
            raise CountermarkError(
                f"the coins of {where} were drawn {how} a timestamp; {what}, or choose another "
                "folder"
            )
        if key.rules.crafted and _committed(key, "pools", "bases") != bases.digest:
            raise CountermarkError(
                f"the trials of {where} were made from other bases than are given now, so some of "
                "these may be in the training; give the data and the seed of its making, or choose "
                "another folder"
            )
        budget = _committed(key, "crafting", "epsilon")
        if key.rules.crafted and budget != self.threat.watermark_epsilon:
            raise CountermarkError(
                f"the trials of {where} were crafted at a watermark budget of {budget}, not of "
                f"{self.threat.watermark_epsilon:g}; give watermark_epsilon={budget}, or choose "
                "another folder"
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
                    f"{opened.place or 'the data'} has {opened.shape} and {opened.classes}; give "
                    "the model's data"
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
        """Return the network as a function of pixel values in [0, 1]."""
        return open_network(
            net, self._shape, self._classes, mean=self.mean, std=self.std, checked=checked
        )

    def _resident(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return all trials in all forms and what the key says of them, on a device."""
        if device not in self._on:
            forms = versions(self.key.watermarks.x, self._changes)
            labels = self.key.labels.repeat(len(forms))
            self._on[device] = torch.cat(forms).to(device), labels.to(device)
        return self._on[device]


def _check_scheme(scheme: str, survive: Sequence[str], watermark_epsilon: object) -> None:
    """Refuse schemes whose trials a loop cannot mix in, and options that a scheme does not heed.

    Raises:
        CountermarkError: it is none of those that it can, or an option does not go with it.
    """
    fitting = {name: each for name, each in SCHEMES.items() if each.coins and not each.members}
    if scheme not in tuple(fitting):  # of any type
        raise CountermarkError(
            f"a marking takes the scheme {' or '.join(fitting)}, not {brief(scheme)}; protect "
            "makes the others"
        )
    if watermark_epsilon is not None and not fitting[scheme].crafted:
        raise CountermarkError(f"the scheme {scheme} has no budget; leave watermark_epsilon out")
    if survive and not fitting[scheme].surviving:
        raise CountermarkError(f"the scheme {scheme} crafts no trials; leave survive out")


def _words(given: str | Sequence[str]) -> tuple[str, ...]:
    words = (given,) if isinstance(given, str) else given
    if not isinstance(words, tuple | list) or not all(isinstance(word, str) for word in words):
        raise CountermarkError(f"survive is a list of words as jpeg:75, not {brief(given)}")
    return tuple(words)


def _untrained(words: Sequence[str], shape: tuple[int, int, int]) -> list[Change]:
    """Return the changes that words name.

    Raises:
        CountermarkError: a word names none, or one that is trained first.
    """
    try:
        found = changes(words, shape)
    except CountermarkError as error:
        raise CountermarkError(str(error).replace("--survive", "survive")) from error
    for word, change in zip(words, found, strict=True):
        if next(change.layer.parameters(), None) is not None:
            raise CountermarkError(
                f"{word} is a network that is trained first, which only protect does; leave it "
                "out of survive, and let protect go on with a key that was made with it"
            )
    return found


def _committed(key: Key, part: str, name: str) -> Any:
    """Return an entry of a part of a key's first commitment; `None` if it is missing."""
    found = key.c1.get(part)
    return found.get(name) if isinstance(found, Mapping) else None


def _clean(given: Examples | tuple[Any, Any], bases: Examples, classes: int) -> Examples:
    """Read the clean examples to keep with a key into memory, and check them.

    The checks make sure that the key can be read again.

    Raises:
        CountermarkError: there are no examples, they are not images like the bases, have other
            labels than the network has classes, or are bases.
    """
    found = _examples(given, "clean examples")[:CLEAN_EXAMPLES].read()
    if len(found) == 0 or found.x.shape[1:] != bases.x.shape[1:]:
        raise CountermarkError(
            f"there are {len(found)} clean examples of shape {tuple(found.x.shape[1:])} for bases "
            f"of shape {_shape(bases)}; give one or more of this shape, or leave clean out"
        )
    if not 0 <= int(found.y.min()) <= int(found.y.max()) < classes:
        raise CountermarkError(
            f"the clean examples have labels from {int(found.y.min())} to {int(found.y.max())}, "
            f"and the network tells {classes} classes apart; number the classes from 0"
        )
    shared = int(torch.isin(found.contents(), bases.contents()).sum())
    if shared:
        raise CountermarkError(
            f"{shared} of {len(found)} clean examples are bases, and what a suspect is shown may "
            "be none of them; give others, or leave clean out"
        )
    return found


def _examples(given: Examples | tuple[Any, Any], what: str = "bases") -> Examples:
    """Return images with labels as uint8 examples on the CPU, converted if need be.

    Raises:
        CountermarkError: they are not images with labels.
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
            f"{what} are images (n, c, h, w) and whole labels (n,), not {tuple(images.shape)} and "
            f"{tuple(labels.shape)} of {labels.dtype}"
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
    """Return how many classes a network tells apart, if they include all labels of the bases.

    Raises:
        CountermarkError: the network does not take such images, gives no logits, or lacks some of
            the labels.
    """
    classes = _told_apart(net, bases.x[:1], normalise)
    if not 0 <= int(bases.y.min()) <= int(bases.y.max()) < classes:
        raise CountermarkError(
            f"the bases have labels from {int(bases.y.min())} to {int(bases.y.max())}, and the "
            f"network tells {classes} classes apart; number the classes from 0"
        )
    return classes


def _told_apart(net: nn.Module, image: torch.Tensor, normalise: nn.Module) -> int:
    """Return how many classes a network tells apart.

    It is the number of logits that the network gives for one image `(1, c, h, w)`.

    Raises:
        CountermarkError: it is not a network, does not take such images, or gives no logits.
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
            f"the network gives {found} for one image, where logits (1, classes) are wanted; put a "
            "module around it that returns them"
        )
    return logits.shape[1]


def _check_range(x: torch.Tensor) -> None:
    """Refuse normalised pixels that were not declared: trials would join them on another scale."""
    low, high = (float(value) for value in x.detach().aminmax())
    if not (low >= -_SLACK and high <= 1 + _SLACK):
        raise CountermarkError(
            f"the batch has pixels from {low:.3g} to {high:.3g}, outside [0, 1]: it seems to be "
            "normalised outside the network. Say how, Marking(..., mean=, std=), and trials will "
            "be as well"
        )


@contextlib.contextmanager
def _key_folder(folder: Path) -> Iterator[None]:
    """Lock a key folder, which is created if there is none.

    A new folder is removed again if no key was made in it, and nobody was asked for its coins.
    """
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
            kept = (folder / name for name in ("key.json", _ASKED))
            if new and not any(path.exists() for path in kept):  # a secret alone is of no use
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _doubt(seen: nn.Module, bases: Examples) -> None:
    """Say so if the network that crafts the trials can hardly tell the classes apart."""
    tried = bases[torch.arange(0, len(bases), max(1, len(bases) // _TRIED))]
    right = agreement(predict(seen, tried.x[:]), tried.y)
    largest = 100 * int(tried.y.bincount().max()) / len(tried)
    if right < largest + _HARDLY:
        note(
            f"the network gets {right:.0f} % of {len(tried)} bases right, and one answer to all of "
            f"them {largest:.0f} %: a key's trials are made once, on what it can tell apart now; "
            "train it first, and say mean= and std= if it wants normalised images"
        )


def _asked_once(path: Path, stamp: Stamp, message: bytes) -> bytes:
    """Have C1 stamped, which is kept in `path` first.

    Coins are drawn once: whoever is interrupted while they wait for the stamp goes on with the same
    trials, and another C1 would be another draw, which a public log counts.

    Raises:
        CountermarkError: it is not the C1 that was kept there.
    """
    if path.exists() and read_bytes(path, JSON_LIMIT) != message:
        raise CountermarkError(
            f"{path.parent} was interrupted while its coins were drawn, and other images, options "
            "or classes are given now; give those, or choose another folder, which is another draw"
        )
    write_bytes(path, message, 0o600)
    return stamp(message)


@contextlib.contextmanager
def _filled(folder: Path, keys: Path) -> Iterator[Path]:
    """Fill a model folder that may already hold its key: all files of `_WRITTEN`, or none.

    They are written into a subfolder of their own and moved into place when the block ends without
    an error, the commitment last. As long as the commitment is still in the subfolder, it shows
    what an interrupted call had moved, so no file that another program put there is ever replaced
    or removed.

    Yields:
        The folder to write the files in.

    Raises:
        CountermarkError: the folder holds something else, cannot be created, or is being filled by
            another process.
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
    """List the files that an unfinished call had moved into place.

    The list is empty once all of them are.
    """
    beside = folder / _UNFINISHED
    if not (beside / _WRITTEN[-1]).exists():
        return []
    return [name for name in _WRITTEN if not (beside / name).exists()]


def _take_back(folder: Path) -> None:
    """Remove what an unfinished call has written; nothing once all its files are in place."""
    for name in _moved(folder):
        (folder / name).unlink(missing_ok=True)
    if (folder / _UNFINISHED).exists():
        shutil.rmtree(folder / _UNFINISHED)
