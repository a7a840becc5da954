"""Trace a copy to the account that it was made from.

The suspect is asked each client's trials, in the order of the log. Under the null hypothesis ("the
suspect does not depend on this client's coins"), each agreement is a coin of known chance, given
everything before it, however the client chose the queries and whenever they stopped. The number of
trials may depend on coins, so the number of agreements is not binomial: the verdict rests on the
anytime p-value of an e-process.

The number of accounts may depend on coins as well (whoever has no luck with one account may open
another), so p is not multiplied by their number. Instead, the level is divided in an order that is
fixed before any coin of an account is drawn. The account whose first trial came first gets
1/(2 x 3) of it, the second 1/(3 x 4), and so on, which is a half. A quarter goes to all accounts
together. The last quarter goes to the accounts again, as to members of a vote (below): 1/(1 x 2),
1/(2 x 3) of it and so on. The sum never exceeds the whole level (a union bound).

Thieves may ask the same with several accounts and train on the majority of the answers. Each coin
then decides only where the others are divided, so bets on each account by itself win little.
Others bet as somebody who knows of the vote: how much they stake on a coin depends on the coins
that earlier accounts had on the same image, or in the same cell. Those are known before the coin
falls, so the bets stay fair. They would not where accounts were erased, perhaps because of their
coins: nobody bets on votes in such a log.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
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

_VOTES = ((3, "image"), (5, "image"), (3, "cell"))
"""What gamblers believe of thieves who vote: with how many accounts, on the same images or only
with images of the same cells."""
_TOGETHER = 0.6
"""Accounts count as of one thief while they share this part of the trials that each of them had,
the earlier one until it asked the same."""
_SHARED = 3  # trials, from which on that is asked
_FEW = 20  # accounts with one image, or in one cell; whatever more of them share is no vote
# Half of the stakes of all accounts together is on copies without a vote.
_WEIGHTS = (0.5, *[0.5 / len(_VOTES)] * len(_VOTES))


@dataclass(frozen=True)
class Traced:
    """What one client's trials say.

    Attributes:
        client: name of the account.
        verdict: `match` (p <= alpha), `no evidence`, or `inconclusive` (too few usable trials to
            ever reach alpha).
        log10_p_value: decimal logarithm of the anytime p-value, corrected: multiplied by
            (n + 1)(n + 2) for the n-th account of the log; or, where that is smaller, of the bets
            on a vote, multiplied by 4 n (n + 1).
        log10_p_alone: the same without the correction, for an account that was suspected before
            anything was asked.
        agreements: trials that the suspect answers as the coin chose.
        disagreements: trials that it answers with the other class.
        neither: trials that it answers with a third class, or not at all.
        expected: average number of agreements of a model that never saw the coins.
        log10_e_value: decimal logarithm of the current evidence: the factor by which bets on the
            coins of this account by itself have grown.
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
            multiplied by four.
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
            been erased because of what they said, so each keeps its place in the order, counts in
            all accounts together as one whose bets were all lost, and ends all bets on votes.
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
    votes = None if erased else _Votes()
    pool, best = _Pool(erased, _WEIGHTS if votes else _WEIGHTS[:1]), _Pool(erased, _WEIGHTS[:1])
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
        voted = [] if votes is None else votes.enter(row, answer, tails)
        pool.update([(row.client, book.process), *voted])
        best.update([(row.client, book.best)])
    found = []
    for place, (client, book) in enumerate(books.items(), erased):
        alone = _spent(place + 1) + math.log10(ways)
        vote = 0.0
        if votes is not None:
            vote = votes.log10_p_value(client) + _spent(place) + math.log10(4 * ways)
        found.append(book.traced(client, alone, alpha, vote))
    accounts = sorted(found, key=lambda account: account.log10_p_value)
    factor = math.log10(4 * ways)
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

    def traced(self, client: str, spent: float, alpha: float, voted: float = 0.0) -> Traced:
        """Judge the trials, with p times ten to the power of `spent`, or with that of a vote."""
        alone = self.process.log10_p_value
        p = min(0.0, alone + spent, voted)
        verdict = decide(p, self.best.log10_p_value + spent, math.log10(alpha))
        wealth = self.process.log_e / math.log(10)
        counts = self.counts
        return Traced(
            client, verdict, p, alone, counts[1], counts[-1], counts[0], self.expected, wealth
        )


@lru_cache(maxsize=1 << 16)
def _leaning(size: int, agreeing: int, other: int, chance: float) -> float:
    """How probable it is that the next coin falls on the side of a vote's outcome.

    The vote is of `size` coins, which fall on that side with probability `chance`; `agreeing` of
    them did, and `other` did not. It is `chance` where the vote is over, or cannot have had that
    outcome.
    """

    def won(agreeing: int, other: int) -> float:
        """The probability of the outcome, given these coins."""
        left = size - agreeing - other
        return sum(
            (
                math.comb(left, more) * chance**more * (1 - chance) ** (left - more)
                for more in range(left + 1)
                if 2 * (agreeing + more) > size
            ),
            start=0.0,
        )

    if agreeing + other >= size or (whole := won(agreeing, other)) == 0:
        return chance
    return chance * won(agreeing + 1, other) / whole


class _Bets:
    """Bets on one account as on one that voted, one process of each belief."""

    def __init__(self) -> None:
        self.processes = tuple(EProcess() for _ in _VOTES)
        self._highest = 0.0

    def settle(self) -> None:
        """Note how high the mean of them has risen."""
        if max(max(process.gamblers) for process in self.processes) > self._highest:
            logs = [process.log_e for process in self.processes]
            top = max(logs)
            mean = sum(math.exp(log - top) for log in logs) / len(logs)
            self._highest = max(self._highest, top + math.log(mean))

    @property
    def log10_p_value(self) -> float:
        return 0.0 - self._highest / math.log(10)


class _Votes:
    """Bets on each account as on one of several that voted, and on all of those as on one thief.

    Who votes with whom is told by what they ask: see `_TOGETHER`.
    """

    def __init__(self) -> None:
        self._bets: dict[str, _Bets] = defaultdict(_Bets)
        self._thieves: dict[tuple[int, str], EProcess] = defaultdict(EProcess)
        # The coin of each account in a place, and the number of its trials before.
        self._met: dict[tuple[str, str, bytes], dict[str, tuple[int, int]]] = defaultdict(dict)
        self._shared: Counter[tuple[str, str, str]] = Counter()
        self._trials: Counter[str] = Counter()
        self._places: dict[str, int] = {}  # in the order of first trials

    def log10_p_value(self, client: str) -> float:
        """Decimal logarithm of the anytime p-value of the bets on an account."""
        return self._bets[client].log10_p_value

    def enter(self, row: Row, answer: int, tails: bool) -> list[tuple[str, EProcess]]:
        """Enter the next trial, as a book does.

        Returns:
            For each belief the bets that the trial belongs to, on a thief who is called after the
            first of their accounts.
        """
        self._places.setdefault(row.client, len(self._places))
        places = {"image": row.image, "cell": row.cell}
        met = {by: self._met[row.model, by, place] for by, place in places.items()}
        others = {by: self._others(row.client, by, found) for by, found in met.items()}
        chance = (row.chance if answer == row.tails else WHOLE - row.chance) / WHOLE
        outcome = 1 if (answer == row.tails) == tails else -1
        if answer not in (row.heads, row.tails):
            outcome = 0
        entered = []
        for number, (size, by) in enumerate(_VOTES):
            coins = [met[by][other][0] for other in others[by]]
            agreeing = coins.count(answer)
            leaning = _leaning(size, agreeing, len(coins) - agreeing, chance)
            # The share of the usual stake that this belief is worth.
            stake = max(0.0, (leaning - chance) / (1 - chance))
            thief = min((row.client, *others[by]), key=self._places.__getitem__)
            for bet in (self._bets[row.client].processes[number], self._thieves[number, thief]):
                bet.update(outcome, chance, stake)
            entered.append((thief, self._thieves[number, thief]))
        self._bets[row.client].settle()
        for by, found in met.items():
            if len(found) < _FEW:
                for other in found:
                    self._shared[self._pair(by, row.client, other)] += 1
                found[row.client] = row.answer, self._trials[row.client]
        self._trials[row.client] += 1
        return entered

    def _others(self, client: str, by: str, found: Mapping[str, tuple[int, int]]) -> list[str]:
        """The accounts of one place that ask the same as this one does."""
        return [
            other
            for other, (_, before) in found.items()
            if other != client
            and (shared := self._shared[self._pair(by, client, other)]) >= _SHARED
            and shared >= _TOGETHER * max(self._trials[client], before)
        ]

    @staticmethod
    def _pair(by: str, first: str, second: str) -> tuple[str, str, str]:
        return (by, first, second) if first < second else (by, second, first)


class _Pool:
    """Bets on all accounts as one.

    Each gambler of the e-process believes the same of every account that the copy came from. Nobody
    knows which accounts those are, so a gambler puts a share of their stake into the bets on an
    account and keeps the rest. The product over the accounts is a wealth, since their coins are
    independent, and so is the mean over gamblers and shares, and over what else they believe.
    """

    def __init__(self, lost: int, weights: Sequence[float]) -> None:
        """Begin with `lost` accounts on which all was lost, and a share of the stakes a belief."""
        self._factors: dict[tuple[int, str], np.ndarray] = {}
        shares = np.log(np.array(weights) * len(weights))[:, None, None]
        gamblers = np.zeros(len(EProcess().gamblers))
        self._logs = shares + lost * np.log1p(-_SHARES) + gamblers
        self._highest = 0.0

    def update(self, bets: Sequence[tuple[str, EProcess]]) -> None:
        """Enter how bets stand, on one account for each belief."""
        for belief, (account, process) in enumerate(bets):
            wealth = np.logaddexp(
                np.log1p(-_SHARES), np.log(_SHARES) + np.array([process.gamblers])
            )
            self._logs[belief] += wealth - self._factors.get((belief, account), 0.0)
            self._factors[belief, account] = wealth
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
