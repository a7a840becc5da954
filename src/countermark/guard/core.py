"""The answer mark: near a decision boundary, a keyed coin chooses which of the two classes is returned.

The coin of a cell moves the boundary between two classes by a little, to one side or the other, for one client. Cells are neighbourhoods
(signs of keyed projections of the model's features, and the pair of classes), so that copies of a query under small noise meet the same
coin. Coins are a client's own: what one client learns tells him nothing about another's.

Queries that no honest client sends (`countermark.guard.foreign`) meet fair coins, further from the boundary. Their cells are made of what
the image looks like from afar, so that all that a thief makes of one image by small steps tends to meet one coin: a thief who trains
adversarially smooths answers over such a family, and keeps the coin only if the family shares it.

Every function here is pure: logits, features and images in, answers and trials out. `countermark.guard.model` puts them around a network.
"""

import hashlib
import hmac
import math
from dataclasses import dataclass

import torch

from countermark.errors import CountermarkError
from countermark.guard.foreign import Familiar, outlines

WHOLE = 1 << 16
"""Chances are whole numbers of 65536ths, so that a coin can be drawn again exactly."""
CELLS, FOREIGN = b"countermark guard cells", b"countermark guard foreign cells"
"""What the keyed projections of features and of outlines are drawn under."""
ELSEWHERE = b"\xff\xff"
"""What a foreign query's cell begins with: no class has this number."""


@dataclass(frozen=True)
class GuardSettings:
    """What a calibrated guard needs beside the secret; public.

    Attributes:
        model_sha256: digest of the weights that it was calibrated for.
        slope: steepness of the chances: the second class is returned with probability 1 / (1 + exp(slope x margin)).
        reach: largest margin (difference of the two highest logits) at which there is a coin.
        offsets: for each keyed projection of the features the value that it is compared with; their number sets that of the cells.
        features: number of features.
        familiar: what honest queries look like; any other query meets a fair coin. None where only near ties do.
        outlines: as `offsets`, for the keyed projections of such queries' outlines.
    """

    model_sha256: str
    slope: float
    reach: float
    offsets: tuple[float, ...]
    features: int
    familiar: Familiar | None = None
    outlines: tuple[float, ...] = ()


@dataclass(frozen=True)
class AnswerTrial:
    """A query whose answer a coin chose.

    Attributes:
        row: its position among the queries of the call.
        cell: the pair of classes and the signs of the projections, with two bytes more where the query was foreign.
        heads: the smaller class of the two.
        tails: the larger one.
        chance: of tails, before the coin fell, in 65536ths.
        answer: the class that was returned.
    """

    row: int
    cell: bytes
    heads: int
    tails: int
    chance: int
    answer: int


class Guard:
    """The coins of one owner for one model."""

    def __init__(self, settings: GuardSettings, secret: bytes) -> None:
        """Derive the projections from the owner's secret."""
        self.settings = settings
        self._secret = secret
        self._near = _Cells(projections(secret, settings.model_sha256, settings.features, len(settings.offsets)), settings.offsets)
        self._far: _Cells | None = None  # made with the first foreign query: its signs are as many as an outline has values
        self._keys: dict[str, bytes] = {}

    def answer(
        self, logits: torch.Tensor, features: torch.Tensor, client: str, images: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[AnswerTrial]]:
        """Answer queries of one client.

        Args:
            logits: `(n, classes)`.
            features: `(n, features)`, from the layer that the cells are made of.
            client: name of the account that asks; its coins are its own.
            images: the queries, uint8 `(n, c, h, w)`; needed where the settings say what is familiar.

        Returns:
            int64 answers `(n,)`, and the trials among them in order. Only a client's first trial in a cell is evidence.

        Raises:
            CountermarkError: other shapes than the guard was calibrated for, values that are not finite, or no images.
        """
        self.check(logits, features)
        answers = logits.argmax(1)
        margins, heads, tails = boundary(logits)
        usual = self.settings.familiar
        if usual is not None and (images is None or images.dtype is not torch.uint8 or images.numel() != len(logits) * usual.values):
            raise CountermarkError(
                f"this guard looks at the images as well; give the {len(logits)} that were asked, uint8, {usual.values} values each"
            )
        foreign = torch.zeros(len(logits), dtype=torch.bool) if images is None else self.foreign(images)
        met = torch.nonzero(self.meets_coin(margins, foreign)).flatten()
        if client not in self._keys:
            self._keys[client] = client_key(self._secret, self.settings.model_sha256, client)
        trials = []
        for row in met.tolist():
            pair = int(heads[row]).to_bytes(2, "big") + int(tails[row]).to_bytes(2, "big")
            if images is not None and foreign[row]:
                cell = ELSEWHERE + pair + self._outline_code(images[row : row + 1])
            else:
                cell = pair + self._near(features[row])
            chance = self.chance(float(margins[row]), bool(foreign[row]))
            tail = coin(self._keys[client], cell) < chance
            answer = int(tails[row] if tail else heads[row])
            answers[row] = answer
            trials.append(AnswerTrial(row, cell, int(heads[row]), int(tails[row]), chance, answer))
        return answers, trials

    def foreign(self, images: torch.Tensor) -> torch.Tensor:
        """Which of images `(n, c, h, w)`, uint8, no honest client sends: bool `(n,)`."""
        settings = self.settings
        return torch.zeros(len(images), dtype=torch.bool) if settings.familiar is None else settings.familiar.foreign(images)

    def meets_coin(self, margins: torch.Tensor, foreign: torch.Tensor) -> torch.Tensor:
        """Which queries a coin answers, bool `(n,)`, given signed margins and which of them are foreign."""
        return (margins.abs() <= self.settings.reach) | foreign

    def _outline_code(self, image: torch.Tensor) -> bytes:
        outline = outlines(image)[0]
        if self._far is None:
            offsets = self.settings.outlines
            self._far = _Cells(projections(self._secret, self.settings.model_sha256, len(outline), len(offsets), FOREIGN), offsets)
        return self._far(outline)

    def chance(self, margin: float, foreign: bool) -> int:
        """The chance of tails at a signed margin, in 65536ths."""
        return WHOLE // 2 if foreign else tails_chance(self.settings.slope * margin)

    def check(self, logits: torch.Tensor, features: torch.Tensor) -> None:
        """Refuse what the guard was not calibrated for.

        Raises:
            CountermarkError: other shapes, or values that are not finite.
        """
        fits = logits.dim() == 2 and logits.shape[1] >= 2 and features.shape == (len(logits), self.settings.features)
        if not fits:
            raise CountermarkError(
                f"the guard was calibrated for {self.settings.features} features; it got logits {tuple(logits.shape)} "
                f"and features {tuple(features.shape)}"
            )
        if not bool(torch.isfinite(logits).all()) or not bool(torch.isfinite(features).all()):
            raise CountermarkError(
                "the model answered with logits or features that are not finite; nothing can be returned for these queries"
            )


class _Cells:
    """The code of a cell: which of some keyed projections are above their offsets."""

    def __init__(self, signs: torch.Tensor, offsets: tuple[float, ...]) -> None:
        self._signs, self._offsets = signs, torch.tensor(offsets, dtype=torch.float64)

    def __call__(self, values: torch.Tensor) -> bytes:
        bits = (values.double() @ self._signs > self._offsets).tolist()
        return sum(1 << place for place, bit in enumerate(bits) if bit).to_bytes((len(bits) + 7) // 8, "big")


def boundary(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The two highest classes of each row, heads < tails, and the signed margin, logit of tails minus logit of heads, in float64."""
    pair = logits.topk(2, dim=1).indices.sort(dim=1).values
    values = logits.double().gather(1, pair)
    return values[:, 1] - values[:, 0], pair[:, 0], pair[:, 1]


def tails_chance(logit: float) -> int:
    """1 / (1 + exp(-logit)) in whole 65536ths, never 0 or all of them."""
    if logit < 0:
        return WHOLE - tails_chance(-logit)
    return min(WHOLE - 1, round(WHOLE / (1 + math.exp(-logit))))


def consistent_scores(logits: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Probabilities `(n, classes)` whose highest is the answer: where a coin chose the second class, the two highest change places.

    Scores tell a thief more than labels do, and equal scores tell him where the coins are; return none unless you must.
    """
    scores = logits.softmax(1)
    first = scores.argmax(1)
    swapped = scores.clone()
    rows = torch.arange(len(scores), device=scores.device)
    swapped[rows, first], swapped[rows, answers] = scores[rows, answers], scores[rows, first]
    return swapped


def client_key(secret: bytes, model_sha256: str, client: str) -> bytes:
    """K_client = HMAC-SHA-256(secret, "countermark guard client" | model digest | length of the name | name)."""
    name = client.encode()
    return hmac.digest(secret, b"countermark guard client" + bytes.fromhex(model_sha256) + len(name).to_bytes(8, "big") + name, "sha256")


def coin(key: bytes, cell: bytes) -> int:
    """A client's coin in a cell: uniform below 65536, tails where it is below the trial's chance."""
    return int.from_bytes(hmac.digest(key, b"coin" + cell, "sha256")[:2], "big")


def projections(secret: bytes, model_sha256: str, features: int, count: int, under: bytes = CELLS) -> torch.Tensor:
    """Keyed signs, float64 `(features, count)`, out of SHAKE-256 over HMAC-SHA-256(secret, `under` | model digest)."""
    seed = hmac.digest(secret, under + bytes.fromhex(model_sha256), "sha256")
    stream = hashlib.shake_256(seed).digest((features * count + 7) // 8)
    bits = torch.tensor(list(stream), dtype=torch.int64).unsqueeze(1) >> torch.arange(8) & 1
    return (2.0 * bits.flatten()[: features * count].double() - 1).reshape(features, count)
