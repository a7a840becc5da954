"""`countermark trace`: from whose account was this copy made?"""

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from countermark.errors import CountermarkError
from countermark.evidence import EXIT_STATUS
from countermark.options import AnyData, LogPath, ReadPath, SuspectOptions, verb
from countermark.places import place_name
from countermark.terminal import p_value, print_lines, print_table, unbroken
from countermark.verbs.asking import Answers, ask, asked_how, doubts
from countermark.verbs.looks import Looks, note_look, said_looks

if TYPE_CHECKING:
    import torch

    from countermark.guard import QueryLog, Row, Trace

_SHOWN = 20
_PART = 256  # images at a time


@dataclass(frozen=True, kw_only=True)
class TraceConfig(SuspectOptions):
    """Say from whose account a copy was made.

    The suspect is asked the queries of a log, which are clients' images: whoever runs an endpoint
    sees them.
    """

    key: ReadPath
    """Key folder of the guarded model."""
    log: LogPath
    """Query log: a path or postgresql://..."""
    head: ReadPath | None = None
    """A head of the log that was published before; the log must still lead to it."""
    own_images_only: bool = False
    """Send no client's image that is not in your own data set as well; all other trials are left
    out, whatever their coins."""
    data: AnyData | None = None
    """Where that data set is, if not where the key's source model says."""
    alpha: float = 1e-6
    """Probability that a stranger gets anybody named."""

    def __post_init__(self) -> None:
        """Refuse numbers out of range, and data that nothing needs."""
        super().__post_init__()
        self._open_interval("alpha")
        self._only_for(self.own_images_only, "--own-images-only", "data")
        if self.inside:
            raise CountermarkError("a trace asks a suspect as it is; leave --inside out")


@dataclass(frozen=True)
class Tracing:
    """What a log says about a suspect.

    Attributes:
        suspect: its path or address, or what names a function.
        verdict: `match` if an account is named or all accounts together prove a copy, else `no
            evidence` or `inconclusive`.
        trace: every account, those whose own trials prove a copy, and all of them taken as one.
        rows: trials in the log.
        erased: rows of which only the digest is left.
        void: rows that are no evidence, since they were stored after the log had lost others.
        left_out: trials that were not asked, since their images are clients' alone.
        looks: how often suspects were asked with this key; none where its folder cannot be written.
        answers: how the suspect answered.
        doubts: what a person should know before believing the verdict, in sentences.
    """

    suspect: str
    verdict: str
    trace: "Trace"
    rows: int
    erased: int
    answers: Answers
    doubts: tuple[str, ...]
    void: int = 0
    left_out: int = 0
    looks: Looks | None = None

    @property
    def exit_status(self) -> int:
        """0 match, 1 no evidence, 3 inconclusive."""
        return EXIT_STATUS[self.verdict]


@verb(TraceConfig)
def trace(config: TraceConfig) -> Tracing:
    """Ask the suspect for every trial of the log, and judge each account.

    Raises:
        CountermarkError: the log was changed or belongs to another key, or the suspect cannot be
            asked.

    Example:
        >>> found = cm.trace("copy", key="mine/key", log="log.db")
        >>> found.verdict, found.trace.named
        ('match', ('anna',))
    """
    import torch

    from countermark.guard import QueryLog, read_head, trace_accounts
    from countermark.suspects import NO_ANSWER
    from countermark.watermarks import load_key, load_secret

    key = load_key(Path(config.key))
    shape = tuple(key.watermarks.x.shape[1:])
    published = None if config.head is None else read_head(Path(config.head))
    with QueryLog(config.log, create=False) as log:
        # All of it is checked before anything is asked. Its images may not fit into memory.
        own = _own_images(config) if config.own_images_only else None
        rows: list[Row | None] = []
        sent: list[bool] = []
        for row in log.rows(published):
            # A digest tells as well which accounts asked the same.
            rows.append(row and replace(row, image=_hash(row.image)))
            sent.append(
                row is not None and row.log is not None and (own is None or _hash(row.image) in own)
            )
        erased = log.erased()
        kept = [row for row in rows if row is not None]
        void = sum(row.log is None for row in kept)
        if len(kept) == void:
            raise CountermarkError(
                f"the log {log.shown} holds no trials"
                + (
                    f" but {void} that came after a loss of rows, which are no evidence"
                    if void
                    else "; nobody has asked near a coin yet"
                )
            )
        if not any(sent):
            raise CountermarkError(
                "no trial has an image of your own data set; leave --own-images-only out, which "
                "sends the clients' images to the suspect"
            )
        parts = _images(log, sent, shape)
        data = str(key.c1.get("data"))
        told, answers = ask(config, parts, shape, data, key.clean, key.names)
    asked = torch.tensor([ok for row, ok in zip(rows, sent, strict=True) if row is not None])
    labels = torch.full((len(kept),), NO_ANSWER).masked_scatter(asked, told)
    secret = load_secret(Path(config.key))
    counted = [
        row if ok else replace(row, log=None) for row, ok in zip(kept, asked.tolist(), strict=True)
    ]
    found = trace_accounts(counted, labels, secret, config.alpha, erased, answers.ways)
    verdict = "match" if found.named else found.together
    how = asked_how(config, answers)
    least = min([found.together_log10_p_value, *(each.log10_p_value for each in found.accounts)])
    return Tracing(
        suspect=place_name(config.suspect),
        verdict=verdict,
        trace=found,
        rows=len(rows),
        erased=len(rows) - len(kept),
        answers=answers,
        doubts=doubts(answers, verdict),
        void=void,
        left_out=len(kept) - void - sum(sent),
        looks=note_look(Path(config.key), "trace", config.suspect, how, least, log=True),
    )


def _hash(image: bytes) -> bytes:
    return hashlib.sha256(image).digest()


def _own_images(config: TraceConfig) -> set[bytes]:
    """Digests of the owner's images, as the log has images.

    Raises:
        CountermarkError: the key has no source model any more, or its data cannot be opened.
    """
    from countermark.guard.requests import image_hashes
    from countermark.networks import describe, open_declared

    data = open_declared(describe(Path(config.key) / "source"), data=config.data)
    return {
        digest
        for examples in (data.train, data.test)
        for start in range(0, len(examples), _PART)
        for digest in image_hashes(examples[start : start + _PART].read().x)
    }


def _images(
    log: "QueryLog", sent: Sequence[bool], shape: tuple[int, ...]
) -> "Iterator[torch.Tensor]":
    """The images of rows that were read before, in parts, of those that are sent.

    Raises:
        CountermarkError: a row has an image of another shape, or was erased meanwhile.
    """
    from countermark.guard import images_of

    pairs = zip(sent, log.rows(), strict=False)  # the service may have added some
    there = (now for wanted, now in pairs if wanted)
    while part := list(itertools.islice(there, _PART)):
        whole = [row for row in part if row is not None]
        if len(whole) < len(part):
            raise CountermarkError("rows were erased while the log was read; trace it again")
        yield images_of(whole, shape)


def show(result: Tracing) -> None:
    """Print the accounts and who is named."""
    rows = [
        [
            account.client,
            str(account.agreements),
            f"{account.expected:.1f}",
            str(account.disagreements),
            str(account.neither),
            p_value(account.log10_p_value),
            account.verdict,
        ]
        for account in result.trace.accounts[:_SHOWN]
    ]
    columns = ("account", "agree", "by chance", "other", "neither", "p-value", "verdict")
    print_table(f"{unbroken(result.suspect)}: {result.verdict}", columns, rows)
    if len(result.trace.accounts) > _SHOWN:
        print_lines(
            f"{len(result.trace.accounts) - _SHOWN} more accounts are not shown here; "
            "--json has them."
        )
    if result.trace.named:
        print_lines(
            f"The copy was made from the answers given to: {', '.join(result.trace.named)}."
        )
    elif result.verdict == "match":
        p = p_value(result.trace.together_log10_p_value)
        print_lines(
            f"The copy was made from this service's answers (p {p} over all accounts together), "
            "but no single account can be named."
        )
    else:
        print_lines("Nobody's account can be named.")
    if result.void:
        print_lines(f"{result.void} trials came after a loss of rows, and are no evidence.")
    if result.left_out:
        print_lines(f"{result.left_out} trials were left out, whose images are clients' alone.")
    print_lines(*result.doubts, *said_looks(result.looks))


__all__ = ["Tracing", "show", "trace"]
