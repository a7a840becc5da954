"""From a copy back to the account it was made from: each client's trials, asked of the suspect, in the order of the log.

Under the null ("the suspect does not depend on this client's coins") each agreement is a coin of known chance, given all that came
before, however the client chose his queries and whenever he stopped. How many trials there are may depend on coins, so the count is not
binomial: the verdict is the e-process's anytime p, times the number of clients.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from countermark.errors import CountermarkError
from countermark.evidence import ALPHA, EProcess, decide
from countermark.guard.core import WHOLE, client_key, coin
from countermark.guard.log import Row

_SHARES = np.array([[0.02], [0.1], [0.5], [0.9]])  # of the accounts, as gamblers guess, that a copy came from


@dataclass(frozen=True)
class Traced:
    """What one client's trials say.

    Attributes:
        client: name of the account.
        verdict: `match` (p <= alpha), `no evidence`, or `inconclusive` (too few usable trials to ever reach alpha).
        log10_p_value: decimal logarithm of the anytime p-value, times the number of clients.
        agreements: trials that the suspect answers as the coin chose.
        disagreements: trials that it answers with the other class.
        neither: trials that it answers with a third class, or not at all.
        expected: agreements that a model which never saw the coins would have on average.
        log10_e_value: decimal logarithm of the evidence now: the factor by which bets on the coins have grown.
    """

    client: str
    verdict: str
    log10_p_value: float
    agreements: int
    disagreements: int
    neither: int
    expected: float
    log10_e_value: float


@dataclass(frozen=True)
class Trace:
    """What a log says about a suspect.

    Attributes:
        accounts: every client of the log, the strongest evidence first.
        named: the clients whose own trials prove the copy, at the level alpha for all of them together.
        together: verdict on all accounts as one, `match` where the suspect depends on the coins of some of them.
        together_log10_p_value: decimal logarithm of its anytime p-value.
        alpha: the level.
    """

    accounts: tuple[Traced, ...]
    named: tuple[str, ...]
    together: str
    together_log10_p_value: float
    alpha: float


def trace_accounts(rows: Sequence[Row], answers: torch.Tensor, secret: bytes, alpha: float = ALPHA) -> Trace:
    """Find the accounts whose coins a suspect remembers.

    Args:
        rows: the log's rows, in order, all clients mixed as they came.
        answers: int64 `(n,)`, what the suspect answers to their images; anything that is no class of the two counts as neither.
        secret: the owner's, from which every coin is drawn again.
        alpha: probability that a stranger gets anybody named.

    Raises:
        CountermarkError: a row's answer is not what this key's coin chose, or answers and rows differ in number.
    """
    if len(rows) != len(answers):
        raise CountermarkError(f"{len(rows)} trials and {len(answers)} answers; give one answer for each trial")
    keys: dict[tuple[str, str], bytes] = {}
    books: dict[str, _Book] = {}
    pool, best = _Pool(), _Pool()
    for row, answer in zip(rows, answers.tolist(), strict=True):
        account = (row.model, row.client)
        if account not in keys:
            keys[account] = client_key(secret, row.model, row.client)
        tails = coin(keys[account], row.cell) < row.chance
        if row.answer != (row.tails if tails else row.heads):
            raise CountermarkError(
                f"a trial of {row.client!r} was answered otherwise than this key's coin says; the log belongs to another key"
            )
        book = books.setdefault(row.client, _Book())
        book.settle(row, answer, tails)
        pool.update(row.client, book.process)
        best.update(row.client, book.best)
    accounts = sorted((book.traced(client, len(books), alpha) for client, book in books.items()), key=lambda found: found.log10_p_value)
    together = pool.log10_p_value
    verdict = decide(together, best.log10_p_value, math.log10(alpha))
    named = tuple(found.client for found in accounts if found.verdict == "match")
    return Trace(tuple(accounts), named, verdict, together, alpha)


class _Book:
    """One account's bets."""

    def __init__(self) -> None:
        self.process, self.best = EProcess(), EProcess()
        self.counts = {1: 0, -1: 0, 0: 0}
        self.expected = 0.0

    def settle(self, row: Row, answer: int, tails: bool) -> None:
        if answer not in (row.heads, row.tails):
            self.counts[0] += 1
            return
        chance = (row.chance if answer == row.tails else WHOLE - row.chance) / WHOLE
        outcome = 1 if (answer == row.tails) == tails else -1
        self.counts[outcome] += 1
        self.expected += chance
        self.process.update(outcome, chance)
        self.best.update(1, chance)

    def traced(self, client: str, clients: int, alpha: float) -> Traced:
        p = min(0.0, self.process.log10_p_value + math.log10(clients))
        reachable = self.best.log10_p_value + math.log10(clients)
        verdict = decide(p, reachable, math.log10(alpha))
        wealth = self.process.log_e / math.log(10)
        counts = self.counts
        return Traced(client, verdict, p, counts[1], counts[-1], counts[0], self.expected, wealth)


class _Pool:
    """Bets on all accounts as one: each gambler of the e-process believes the same of every account that the copy came from.

    Which accounts those are nobody knows, so a gambler puts a share of what an account's bets are worth into them and keeps the rest; the
    product over the accounts is a wealth, since their coins are independent, and the mean over gamblers and shares is one too.
    """

    def __init__(self) -> None:
        self._factors: dict[str, np.ndarray] = {}
        self._logs = np.zeros(1)
        self._highest = 0.0

    def update(self, account: str, process: EProcess) -> None:
        wealth = np.logaddexp(np.log1p(-_SHARES), np.log(_SHARES) + np.array(process.gamblers)[None, :])
        self._logs = self._logs + wealth - self._factors.get(account, 0.0)
        self._factors[account] = wealth
        top = float(self._logs.max())
        self._highest = max(self._highest, top + math.log(float(np.exp(self._logs - top).mean())))

    @property
    def log10_p_value(self) -> float:
        return -self._highest / math.log(10)


def images_of(rows: Sequence[Row], shape: tuple[int, ...]) -> torch.Tensor:
    """The rows' queries, uint8 `(n, *shape)`.

    Raises:
        CountermarkError: they are of another shape.
    """
    size = math.prod(shape)
    if any(len(row.image) != size for row in rows):
        raise CountermarkError(f"the log holds queries of another shape than {tuple(shape)}; it belongs to another model")
    data = bytearray(b"".join(row.image for row in rows))
    return torch.frombuffer(data, dtype=torch.uint8).reshape(len(rows), *shape) if data else torch.empty(0, *shape, dtype=torch.uint8)
