"""Trace a copy to the account that it was made from.

The suspect is asked each client's trials, in the order of the log. Under the null hypothesis ("the
suspect does not depend on this client's coins"), each agreement is a coin of known chance, given
everything before it, however the client chose the queries and whenever they stopped. The number of
trials may depend on coins, so the number of agreements is not binomial: the verdict rests on the
anytime p-value of an e-process.

The number of accounts may depend on coins as well (whoever has no luck with one account may open
another), so p is not multiplied by their number. Instead, the level is divided in an order that is
fixed before any coin of an account is drawn: half of it, 1/(1 x 2), goes to all accounts together,
1/(2 x 3) to the account whose first trial came first, 1/(3 x 4) to the second, and so on; the sum
never exceeds the whole level (a union bound).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from countermark.errors import CountermarkError
from countermark.evidence import ALPHA, EProcess, decide
from countermark.guard.core import WHOLE, client_key, coin
from countermark.guard.log import Row
from countermark.guard.requests import opening_of
from countermark.text import brief

# The gamblers' guesses at the share of the accounts that a copy came from.
_SHARES = np.array([[0.002], [0.02], [0.1], [0.5], [0.9]])


@dataclass(frozen=True)
class Traced:
    """What one client's trials say.

    Attributes:
        client: name of the account.
        verdict: `match` (p <= alpha), `no evidence`, or `inconclusive` (too few usable trials to
            ever reach alpha).
        log10_p_value: decimal logarithm of the anytime p-value, corrected: multiplied by
            (n + 1)(n + 2) for the n-th account of the log.
        log10_p_alone: the same without the correction, for an account that was suspected before
            anything was asked.
        agreements: trials that the suspect answers as the coin chose.
        disagreements: trials that it answers with the other class.
        neither: trials that it answers with a third class, or not at all.
        expected: average number of agreements of a model that never saw the coins.
        log10_e_value: decimal logarithm of the current evidence: the factor by which bets on the
            coins have grown.
    """

    client: str
    verdict: str
    log10_p_value: float
    log10_p_alone: float
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
        named: the clients whose own trials prove the copy, at the level alpha for all of them
            together.
        together: verdict on all accounts as one, `match` if the suspect depends on the coins of
            some of them.
        together_log10_p_value: decimal logarithm of the anytime p-value of `together`, corrected:
            multiplied by two.
        alpha: probability that a stranger gets anybody named, or counts as a copy at all.
    """

    accounts: tuple[Traced, ...]
    named: tuple[str, ...]
    together: str
    together_log10_p_value: float
    alpha: float


def trace_accounts(
    rows: Sequence[Row],
    answers: torch.Tensor,
    secret: bytes,
    alpha: float = ALPHA,
    erased: int = 0,
    ways: int = 1,
) -> Trace:
    """Find the accounts whose coins a suspect remembers.

    Args:
        rows: the log's rows, in order, all clients mixed as they came; those that a lost part of
            the log made void are no trials.
        answers: int64 `(n,)`, the suspect's answers to the rows' images; anything that is not one
            of a row's two classes counts as neither.
        secret: the owner's secret, from which every coin is drawn again.
        alpha: probability that a stranger gets anybody named, or counts as a copy at all.
        erased: accounts that were erased from the log, at most (`QueryLog.erased`). They may have
            been erased because of what they said, so each keeps its place in the order, and counts
            in all accounts together as one whose bets were all lost.
        ways: the ways in which the suspect could have been asked; p-values are multiplied by it.

    Raises:
        CountermarkError: a row's answer is not what this key's coin chose, or answers and rows
            differ in number.
    """
    if len(rows) != len(answers):
        raise CountermarkError(
            f"{len(rows)} trials and {len(answers)} answers; give one answer for each trial"
        )
    keys: dict[tuple[str, str, bytes, bytes], bytes] = {}
    books: dict[str, Book] = {}
    pool, best = _Pool(erased), _Pool(erased)
    for row, answer in zip(rows, answers.tolist(), strict=True):
        book = books.setdefault(row.client, Book())
        if row.log is None:
            continue
        account = (row.model, row.client, row.log, opening_of(row.request))
        if account not in keys:
            keys[account] = client_key(secret, *account)
        tails = coin(keys[account], row.cell) < row.chance
        if row.answer != (row.tails if tails else row.heads):
            raise CountermarkError(
                f"a trial of {brief(row.client)} was answered otherwise than this key's coin says; "
                "the log belongs to another key, or to other models too (give each model a log of "
                "its own)"
            )
        book.enter(row, answer, tails)
        pool.update(row.client, book.process)
        best.update(row.client, book.best)
    found = [
        book.traced(client, _spent(erased + number) + math.log10(ways), alpha)
        for number, (client, book) in enumerate(books.items(), 1)
    ]
    accounts = sorted(found, key=lambda account: account.log10_p_value)
    factor = _spent(0) + math.log10(ways)
    together = min(0.0, pool.log10_p_value + factor)
    verdict = decide(together, best.log10_p_value + factor, math.log10(alpha))
    named = tuple(account.client for account in accounts if account.verdict == "match")
    return Trace(tuple(accounts), named, verdict, together, alpha)


def _spent(place: int) -> float:
    """Return the decimal logarithm of the factor that corrects p at a place, from 0.

    The inverses of the factors 1 x 2, 2 x 3, 3 x 4, ... add up to 1.
    """
    return math.log10((place + 1) * (place + 2))


class Asked(Protocol):
    """A trial of an answer mark: two classes, and the chance of tails in 65536ths."""

    @property
    def heads(self) -> int:
        """The smaller of the two classes."""

    @property
    def tails(self) -> int:
        """The larger of the two classes."""

    @property
    def chance(self) -> int:
        """Probability of tails, in 65536ths."""


class Book:
    """One account's bets.

    Attributes:
        process: the bets.
        best: the same bets on a suspect that always agrees.
        counts: trials by outcome: 1 agrees, -1 gives the other class, 0 neither.
        expected: average number of agreements of a model that never saw the coins.
    """

    def __init__(self) -> None:
        """Begin without trials."""
        self.process, self.best = EProcess(), EProcess()
        self.counts = {1: 0, -1: 0, 0: 0}
        self.expected = 0.0

    def enter(self, trial: Asked, answer: int, tails: bool) -> None:
        """Enter the next trial, the suspect's answer to it, and whether its coin fell on tails."""
        if answer not in (trial.heads, trial.tails):
            self.counts[0] += 1
            return
        chance = (trial.chance if answer == trial.tails else WHOLE - trial.chance) / WHOLE
        outcome = 1 if (answer == trial.tails) == tails else -1
        self.counts[outcome] += 1
        self.expected += chance
        self.process.update(outcome, chance)
        self.best.update(1, chance)

    def traced(self, client: str, spent: float, alpha: float) -> Traced:
        """Judge the trials, with p times ten to the power of `spent`."""
        alone = self.process.log10_p_value
        p = min(0.0, alone + spent)
        verdict = decide(p, self.best.log10_p_value + spent, math.log10(alpha))
        wealth = self.process.log_e / math.log(10)
        counts = self.counts
        return Traced(
            client, verdict, p, alone, counts[1], counts[-1], counts[0], self.expected, wealth
        )


class _Pool:
    """Bets on all accounts as one.

    Each gambler of the e-process believes the same of every account that the copy came from. Nobody
    knows which accounts those are, so a gambler puts a share of their stake into the bets on an
    account and keeps the rest. The product over the accounts is a wealth, since their coins are
    independent, and so is the mean over gamblers and shares.
    """

    def __init__(self, lost: int) -> None:
        self._factors: dict[str, np.ndarray] = {}
        self._logs = lost * np.log1p(-_SHARES)
        self._highest = 0.0

    def update(self, account: str, process: EProcess) -> None:
        wealth = np.logaddexp(
            np.log1p(-_SHARES), np.log(_SHARES) + np.array(process.gamblers)[None, :]
        )
        self._logs = self._logs + wealth - self._factors.get(account, 0.0)
        self._factors[account] = wealth
        top = float(self._logs.max())
        self._highest = max(self._highest, top + math.log(float(np.exp(self._logs - top).mean())))

    @property
    def log10_p_value(self) -> float:
        return 0.0 - self._highest / math.log(10)


def images_of(rows: Sequence[Row], shape: tuple[int, ...]) -> torch.Tensor:
    """Return the rows' queries, uint8 `(n, *shape)`.

    Raises:
        CountermarkError: the queries have another shape.
    """
    size = math.prod(shape)
    if any(len(row.image) != size for row in rows):
        raise CountermarkError(
            f"the log holds queries of another shape than {tuple(shape)}; it belongs to another "
            "model"
        )
    data = bytearray(b"".join(row.image for row in rows))
    return (
        torch.frombuffer(data, dtype=torch.uint8).reshape(len(rows), *shape)
        if data
        else torch.empty(0, *shape, dtype=torch.uint8)
    )
