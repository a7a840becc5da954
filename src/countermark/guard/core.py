"""The answer mark: near a decision boundary, a keyed coin chooses which class is returned.

The coin of a cell moves the boundary between two classes slightly to one side or the other, for one
client. A cell is a neighbourhood: a pair of classes and the signs of keyed projections of the
model's features. Copies of a query that differ by small noise therefore meet the same coin. Each
client has their own coins: what one client learns says nothing about the coins of another.

Queries that no honest client sends (`countermark.guard.foreign`) meet fair coins, also further from
the boundary. Their cells are made from a coarse outline of the image, so that all the variants that
a thief makes of one image in small steps tend to meet one coin. A thief who trains adversarially
smooths the answers over such a family of variants, and their copy keeps the coin only if the family
shares it.

Every function here is pure: logits, features and images go in, answers and trials come out.
`countermark.guard.model` applies them to a network. They compute with NumPy: a query has few
numbers, and each operation of PyTorch takes longer to start and lets other threads in between.
"""

import hashlib
import hmac
import itertools
import math
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from countermark.errors import CountermarkError
from countermark.guard.foreign import HonestRanges, outlines

WHOLE = 1 << 16
"""Chances are whole numbers of 65536ths, so that a coin can be reproduced exactly."""
STEPS = 64
"""Chances of near ties are rounded to 64ths.

A difference in the last bits of a logit then seldom changes a chance.
"""
CELLS, FOREIGN = b"countermark guard cells", b"countermark guard foreign cells"
"""Labels under which the keyed projections of features and of outlines are derived."""
SEED = 32
"""Bytes of what one kind of keyed projections comes from."""
ELSEWHERE = b"\xff\xff"
"""The first bytes of a foreign query's cell; no class has this number."""
_MOST_CLOSE = 6  # classes that may be one of a query's two best
_MOST_DOUBTFUL = 6  # projections of a query that may be on either side
_REMEMBERED = 1000  # clients whose keys are kept in memory

Numbers = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class GuardSettings:
    """What a calibrated guard needs besides the secret; public.

    Attributes:
        model_sha256: digest of the weights that the guard was calibrated for.
        slope: steepness of the chances: the second class is returned with probability
            1 / (1 + exp(slope x margin)).
        reach: largest margin (difference of the two highest logits) at which there is a coin.
        offsets: the value that each keyed projection of the features is compared with; their number
            determines the number of cells.
        features: number of features.
        familiar: what honest queries look like; any other query meets a fair coin. `None` if only
            near ties meet coins.
        outlines: as `offsets`, for the keyed projections of the outlines of foreign queries.
        steps: chances are rounded to whole multiples of 1 / steps; a power of two.
    """

    model_sha256: str
    slope: float
    reach: float
    offsets: tuple[float, ...]
    features: int
    familiar: HonestRanges | None = None
    outlines: tuple[float, ...] = ()
    steps: int = STEPS


@dataclass(frozen=True)
class Question:
    """A query that a coin answers, or one that a coin may answer if it is not sure.

    Attributes:
        row: position of the query among the queries of the call.
        cell: the pair of classes and the signs of the projections, preceded by two more bytes if
            the query is foreign.
        heads: the smaller of the two classes.
        tails: the larger of the two classes.
        chance: probability of tails before the coin is drawn, in 65536ths.
        sure: whether there certainly is a coin, and cell, pair and chance stay the same wherever
            logits and features lie within the tolerance.
    """

    row: int
    cell: bytes
    heads: int
    tails: int
    chance: int
    sure: bool


@dataclass(frozen=True)
class AnswerTrial(Question):
    """A query whose answer a coin chose.

    Attributes:
        answer: the class that was returned.
    """

    answer: int


class Cells:
    """Which queries meet coins, and in which cells; no coin is needed for that.

    Attributes:
        settings: what the guard was calibrated to.
        seeds: what the keyed projections come from, 64 bytes (`cell_seeds`).
    """

    def __init__(self, settings: GuardSettings, seeds: bytes) -> None:
        """Derive the projections.

        Args:
            settings: what the guard was calibrated to.
            seeds: as `cell_seeds` derives them from the owner's secret.
        """
        self.settings, self.seeds = settings, seeds
        width = len(settings.offsets)
        self._near = _Codes(projections(seeds[:SEED], settings.features, width), settings.offsets)
        # Made with the first foreign query, which tells how many values an outline has.
        self._far: _Codes | None = None

    def questions(
        self,
        logits: torch.Tensor,
        features: torch.Tensor,
        images: torch.Tensor | None = None,
        tolerance: float = 0.0,
    ) -> list[Question]:
        """Find the queries that a coin answers and, with a `tolerance`, those that one may answer.

        The result does not depend on any coin: a query that is not sure may be computed again in
        another way without biasing the coins.

        Args:
            logits: as for `answer`.
            features: as for `answer`.
            images: as for `answer`.
            tolerance: each logit is off by less than this fraction of 1 + the largest absolute
                logit of its query, and each projection of the features by less than this fraction
                of 1 + the sum of their absolute values.

        Raises:
            CountermarkError: as for `answer`.
        """
        self._check(logits, features)
        settings, usual = self.settings, self.settings.familiar
        if usual is not None and (
            images is None
            or images.dtype is not torch.uint8
            or images.numel() != len(logits) * usual.values
        ):
            raise CountermarkError(
                f"this guard looks at the images as well; give the {len(logits)} that were asked, "
                f"uint8, {usual.values} values each"
            )
        scores, inner = _array(logits), _array(features)
        if not (np.isfinite(scores).all() and np.isfinite(inner).all()):
            raise CountermarkError(
                "the model answered with logits or features that are not finite; nothing can be "
                "returned for these queries"
            )
        foreign = (
            np.zeros(len(scores), dtype=bool)
            if usual is None or images is None
            else usual.foreign(images)
        )
        margins, heads, tails = boundary(scores)
        # Of a difference of two logits.
        slack = 2 * tolerance * (1 + np.abs(scores).max(1).astype(np.float64))
        (met,) = np.nonzero((np.abs(margins) <= settings.reach + slack) | foreign)
        if not len(met):
            return []
        foreign, margins, slack = foreign[met], margins[met], slack[met]
        heads, tails = heads[met], tails[met]
        scores, inner = scores[met].astype(np.float64), inner[met].astype(np.float64)
        codes, distances = self._near(inner)
        rows = np.arange(len(met))
        second = np.minimum(scores[rows, heads], scores[rows, tails])
        scores[rows, heads] = scores[rows, tails] = -math.inf
        same_pair = second - scores.max(1) >= slack
        same_cell = distances >= tolerance * (1 + np.abs(inner).sum(1))
        sure = same_pair & (foreign | same_cell & (np.abs(margins) <= settings.reach - slack))
        low, middle, high = (
            self._chances(margins + shift, foreign) for shift in (-slack, 0, slack)
        )
        found = []
        for place, (row, head, tail, far) in enumerate(
            zip(*(column.tolist() for column in (met, heads, tails, foreign)), strict=True)
        ):
            pair = head.to_bytes(2, "big") + tail.to_bytes(2, "big")
            cell = (
                ELSEWHERE + pair + self._outline_code(images[row : row + 1])
                if far and images is not None
                else pair + codes[place]
            )
            certain = bool(sure[place]) and low[place] == high[place]
            found.append(Question(row, cell, head, tail, middle[place], certain))
        return found

    def possible(
        self,
        question: Question,
        logits: torch.Tensor,
        features: torch.Tensor,
        tolerance: float,
    ) -> list[bytes]:
        """List the cells that one query may be in, wherever it is computed; or beginnings of them.

        An empty beginning, of all cells, stands for too many. Whether a query is foreign, and its
        outline, follow from the image alone.

        Args:
            question: the query's, as `questions` found it.
            logits: `(1, classes)`.
            features: `(1, features)`.
            tolerance: as for `questions`.
        """
        scores, inner = _array(logits)[0].astype(np.float64), _array(features).astype(np.float64)
        slack = 2 * tolerance * (1 + np.abs(scores).max())
        close = np.flatnonzero(scores >= np.sort(scores)[-2] - slack).tolist()
        if len(close) > _MOST_CLOSE:
            return [b""]
        pairs = [
            heads.to_bytes(2, "big") + tails.to_bytes(2, "big")
            for heads, tails in itertools.combinations(close, 2)
        ]
        if question.cell.startswith(ELSEWHERE):
            outline = question.cell[len(ELSEWHERE) + 4 :]
            return [ELSEWHERE + pair + outline for pair in pairs]
        codes = self._near.within(inner, tolerance * (1 + np.abs(inner).sum()))
        return [pair + code for pair in pairs for code in codes]

    def _outline_code(self, image: torch.Tensor) -> bytes:
        outline = outlines(image).numpy()
        if self._far is None:
            offsets = self.settings.outlines
            signs = projections(self.seeds[SEED:], outline.shape[1], len(offsets))
            self._far = _Codes(signs, offsets)
        return self._far(outline)[0][0]

    def _chances(self, margins: Numbers, foreign: npt.NDArray[np.bool_]) -> list[int]:
        """Compute the chances of tails at signed margins, in 65536ths."""
        logits = self.settings.slope * margins
        return [
            WHOLE // 2 if far else tails_chance(logit, self.settings.steps)
            for logit, far in zip(logits.tolist(), foreign.tolist(), strict=True)
        ]

    def _check(self, logits: torch.Tensor, features: torch.Tensor) -> None:
        """Refuse logits or features that the guard was not calibrated for."""
        fits = (
            logits.dim() == 2
            and logits.shape[1] >= 2
            and features.shape == (len(logits), self.settings.features)
        )
        if not fits:
            raise CountermarkError(
                f"the guard was calibrated for {self.settings.features} features; it got logits "
                f"{tuple(logits.shape)} and features {tuple(features.shape)}"
            )


class Guard:
    """The coins of one owner for one model.

    Attributes:
        settings: what the guard was calibrated to.
        cells: which queries meet coins.
        log: identity of the query log that gets the trials.
    """

    def __init__(self, settings: GuardSettings, secret: bytes, log: bytes = b"") -> None:
        """Derive the projections from the owner's secret.

        Args:
            settings: what the guard was calibrated to.
            secret: the owner's secret.
            log: identity of the query log that gets the trials (`QueryLog.identity`), which is part
                of every coin.
        """
        self.settings, self.log = settings, log
        self._secret = secret
        self.cells = Cells(settings, cell_seeds(secret, settings.model_sha256))
        self.questions = self.cells.questions
        # Any number of names may ask. A key that was forgotten is derived again, and is the same.
        derive = partial(client_key, secret, settings.model_sha256, log=log)
        self._key = lru_cache(_REMEMBERED)(derive)

    def answer(
        self,
        logits: torch.Tensor,
        features: torch.Tensor,
        client: str,
        images: torch.Tensor | None = None,
        opening: bytes = b"",
    ) -> tuple[torch.Tensor, list[AnswerTrial]]:
        """Answer queries of one client.

        Args:
            logits: `(n, classes)`.
            features: `(n, features)`, from the layer that the cells are made from.
            client: name of the account that asks; each account has its own coins.
            images: the queries, uint8 `(n, c, h, w)`; needed if the settings have `familiar`.
            opening: digest of the opening of a client who signs (`guard.requests`).

        Returns:
            int64 answers `(n,)`, and the trials among them in order. Only a client's first trial in
            a cell is evidence.

        Raises:
            CountermarkError: the shapes differ from those that the guard was calibrated for, values
                are not finite, or images are missing.
        """
        trials = [
            self.flip(question, client, opening)
            for question in self.questions(logits, features, images)
        ]
        answers = logits.argmax(1)
        for trial in trials:
            answers[trial.row] = trial.answer
        return answers, trials

    def under(self, log: bytes) -> "Guard":
        """Make the same guard with the coins of a query log, by its identity."""
        return Guard(self.settings, self._secret, log)

    def flip(self, question: Question, client: str, opening: bytes = b"") -> AnswerTrial:
        """Answer a client's question with their coin."""
        tail = coin(self._key(client, opening=opening), question.cell) < question.chance
        return AnswerTrial(**vars(question), answer=question.tails if tail else question.heads)

    def account_secret(self, client: str) -> bytes:
        """Derive what the coins of a client who signs come from; see the function."""
        return account_secret(self._secret, self.settings.model_sha256, client, self.log)


class _Codes:
    """The codes of cells: which of several keyed projections are above their offsets."""

    def __init__(self, signs: torch.Tensor, offsets: tuple[float, ...]) -> None:
        self._signs, self._offsets = signs.numpy(), np.array(offsets)

    def __call__(self, values: Numbers) -> tuple[list[bytes], Numbers]:
        """Compute the code of each row of values and its distance to the nearest offset, `(n,)`.

        The distance is the smallest absolute difference between a projection and its offset.
        """
        above = values @ self._signs - self._offsets
        width = (len(self._offsets) + 7) // 8
        codes = [
            sum(1 << place for place, bit in enumerate(bits) if bit).to_bytes(width, "big")
            for bits in (above > 0).tolist()
        ]
        return codes, np.abs(above).min(1)

    def within(self, values: Numbers, slack: float) -> list[bytes]:
        """List the codes that one row of values may have if projections are off by `slack`.

        It is an empty code, which begins all others, where that would be too many.
        """
        above = (values @ self._signs - self._offsets)[0]
        doubtful = np.flatnonzero(np.abs(above) <= slack).tolist()
        if len(doubtful) > _MOST_DOUBTFUL:
            return [b""]
        width = (len(self._offsets) + 7) // 8
        sure = sum(1 << place for place, bit in enumerate((above > 0).tolist()) if bit)
        for place in doubtful:
            sure &= ~(1 << place)
        return [
            (sure + sum(1 << place for place in chosen)).to_bytes(width, "big")
            for count in range(len(doubtful) + 1)
            for chosen in itertools.combinations(doubtful, count)
        ]


def boundary(logits: Numbers) -> tuple[Numbers, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Find the two highest classes of each row, heads < tails, and the signed margin.

    The margin is the logit of tails minus the logit of heads, in float64.
    """
    rows, rest = np.arange(len(logits)), logits.copy()
    first = rest.argmax(1)
    rest[rows, first] = -math.inf
    second = rest.argmax(1)
    heads, tails = np.minimum(first, second), np.maximum(first, second)
    margins = logits[rows, tails].astype(np.float64) - logits[rows, heads].astype(np.float64)
    return margins, heads, tails


def tails_chance(logit: float, steps: int = STEPS) -> int:
    """Compute the chance of tails, 1 / (1 + exp(-logit)), in 65536ths.

    It is rounded to multiples of 1 / steps and is never 0 or 1.
    """
    if logit < 0:
        return WHOLE - tails_chance(-logit, steps)
    return WHOLE // steps * min(steps - 1, round(steps / (1 + math.exp(-logit))))


def consistent_scores(logits: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Compute probabilities `(n, classes)` whose highest is the answer.

    Where a coin chose the second class, the two highest probabilities change places. Scores tell a
    thief more than labels do, and equal scores tell them where the coins are; return none unless
    you must.
    """
    scores = logits.softmax(1)
    first = scores.argmax(1)
    swapped = scores.clone()
    rows = torch.arange(len(scores), device=scores.device)
    swapped[rows, first], swapped[rows, answers] = scores[rows, answers], scores[rows, first]
    # Of equal scores the first would be taken for the answer.
    highest, even = swapped.max(1).values, swapped.argmax(1) != answers
    swapped[rows[even], answers[even]] = torch.nextafter(highest[even], highest.new_full((), 2.0))
    return swapped


def client_key(
    secret: bytes, model_sha256: str, client: str, log: bytes = b"", opening: bytes = b""
) -> bytes:
    """Derive a client's key from the owner's secret.

    K_client = HMAC-SHA-256(secret,
    "countermark guard client 2" | model digest | log's identity | length of the name | name).
    A log that release 0.2.0 or an earlier one made has no identity, and the label has no 2.
    A client who signs has an opening, whose digest the key depends on (`signed_key`).
    """
    if opening:
        return signed_key(account_secret(secret, model_sha256, client, log), opening)
    label = b"countermark guard client 2" if log else b"countermark guard client"
    return _of_client(label, secret, model_sha256, client, log)


def account_secret(secret: bytes, model_sha256: str, client: str, log: bytes) -> bytes:
    """Derive what the coins of a client who signs come from, once their opening is known.

    It is HMAC-SHA-256(secret,
    "countermark guard account 1" | model digest | log's identity | length of the name | name).
    A judge gets it, and learns nothing of other accounts or of the key's leaves.
    """
    return _of_client(b"countermark guard account 1", secret, model_sha256, client, log)


def signed_key(account: bytes, opening: bytes) -> bytes:
    """Derive the key of a client who signs.

    K_client = HMAC-SHA-256(account's secret, "countermark guard client 3" | opening's digest). The
    owner has committed to the account's secret in the opening, to which the client then adds 32
    random bytes: neither of them can choose the coins.
    """
    return hmac.digest(account, b"countermark guard client 3" + opening, "sha256")


def _of_client(label: bytes, secret: bytes, model_sha256: str, client: str, log: bytes) -> bytes:
    name = client.encode()
    framed = bytes.fromhex(model_sha256) + log + len(name).to_bytes(8, "big") + name
    return hmac.digest(secret, label + framed, "sha256")


def coin(key: bytes, cell: bytes) -> int:
    """Draw a client's coin in a cell: uniform in 0 to 65535.

    It falls on tails where it is below the trial's chance.
    """
    return int.from_bytes(hmac.digest(key, b"coin" + cell, "sha256")[:2], "big")


def cell_seeds(secret: bytes, model_sha256: str) -> bytes:
    """Derive what the keyed projections of features and of outlines come from, 32 bytes each.

    Each is HMAC-SHA-256(secret, label | model digest), with the labels `CELLS` and `FOREIGN`.
    """
    model = bytes.fromhex(model_sha256)
    return b"".join(hmac.digest(secret, label + model, "sha256") for label in (CELLS, FOREIGN))


def projections(seed: bytes, features: int, count: int) -> torch.Tensor:
    """Derive keyed signs, float64 `(features, count)`, from SHAKE-256 over a seed."""
    stream = hashlib.shake_256(seed).digest((features * count + 7) // 8)
    bits = torch.tensor(list(stream), dtype=torch.int64).unsqueeze(1) >> torch.arange(8) & 1
    return (2.0 * bits.flatten()[: features * count].double() - 1).reshape(features, count)


def _array(values: torch.Tensor) -> Numbers:
    if values.dtype not in (torch.float32, torch.float64):
        values = values.float() if values.is_floating_point() else values.double()
    return values.detach().numpy()
