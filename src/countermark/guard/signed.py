"""What clients signed, in the database of a query log: their openings and all their requests.

A judge must see that nothing was left out, so the log keeps every image that a client who signs has
asked, with its answer. Rows of the log hold only first trials.
"""

import json
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from countermark.errors import CountermarkError
from countermark.files import canonical_json
from countermark.guard.database import METADATA, has
from countermark.guard.requests import (
    NOTHING_BEFORE,
    ConflictError,
    Opening,
    Request,
    SignedRequest,
    hashes_of,
    read_opening,
)

_LABEL = 4  # bytes

_OPENINGS = sa.Table(
    "openings",
    METADATA,
    sa.Column("digest", sa.LargeBinary, primary_key=True),
    sa.Column("client", sa.Text, nullable=False),
    sa.Column("log", sa.LargeBinary, nullable=False),
    sa.Column("record", sa.LargeBinary, nullable=False),
)
_REQUESTS = sa.Table(
    "requests",
    METADATA,
    sa.Column("opening", sa.LargeBinary, primary_key=True),
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("digest", sa.LargeBinary, nullable=False),
    sa.Column("signature", sa.LargeBinary, nullable=False),
    sa.Column("images", sa.LargeBinary, nullable=False),
    sa.Column("labels", sa.LargeBinary, nullable=False),
    sa.Column("day", sa.BigInteger, nullable=False),
)


def store_opening(connection: sa.Connection, identity: bytes | None, opening: Opening) -> None:
    """Store an opening, unless the log has it.

    Raises:
        ConflictError: it is of another log identity, or the account has another opening of the
            same terms.
    """
    account = opening.terms["account"]
    if opening.log != identity:
        raise ConflictError("the query log has another identity; open again")
    same = [
        known
        for known in read_openings(connection, account)
        if known is None or (known.terms, known.client) == (opening.terms, opening.client)
    ]
    if any(known is None or known.digest != opening.digest for known in same):
        raise ConflictError(
            "the account has signed requests with another state; use that one, or ask the owner "
            "for another account"
        )
    if same:
        return
    for table in (_OPENINGS, _REQUESTS):
        table.create(connection, checkfirst=True)
    record = canonical_json(opening.record())
    values = {"digest": opening.digest, "client": account, "log": opening.log, "record": record}
    connection.execute(_OPENINGS.insert().values(values))


def read_openings(connection: sa.Connection, client: str | None) -> list[Opening | None]:
    """Read all openings, or those of one client; `None` for one that was changed."""
    wanted = {} if client is None else {"client": client}
    return [_opening(*values) for values in _openings(connection, **wanted)]


def last_request(connection: sa.Connection, opening: bytes) -> tuple[int, bytes]:
    """Read the number and the digest of the last request of an opening."""
    if not has(connection, _REQUESTS):
        return 0, NOTHING_BEFORE
    found = connection.execute(
        sa.select(_REQUESTS.c.number, _REQUESTS.c.digest)
        .where(_REQUESTS.c.opening == opening)
        .order_by(_REQUESTS.c.number.desc())
        .limit(1)
    ).first()
    return (0, NOTHING_BEFORE) if found is None else (found.number, found.digest)


def store_requests(
    connection: sa.Connection, identity: bytes | None, requests: Sequence[Request]
) -> list[str | None]:
    """Store requests that go on from the last ones; say of each why it is refused, or `None`."""
    refused: list[str | None] = []
    fresh: dict[bytes, Request] = {}
    ends: dict[bytes, tuple[int, bytes]] = {}
    for each in requests:
        signed, opening = each.signed, each.signed.opening
        if opening not in ends:
            if not _openings(connection, digest=opening, client=each.client, log=identity):
                refused.append("the account has no such opening in the query log; open again")
                continue
            ends[opening] = last_request(connection, opening)
        number, digest = ends[opening]
        reason = None
        if (signed.number, signed.previous) == (number + 1, digest):
            ends[opening] = signed.number, signed.digest
            fresh[signed.place] = each
        elif signed.digest != _known(connection, signed, fresh):
            reason = (
                f"request {signed.number} does not go on from the last one that the query log has, "
                f"which is number {number}"
            )
        refused.append(reason)
    values = [
        {
            "opening": each.signed.opening,
            "number": each.signed.number,
            "digest": each.signed.digest,
            "signature": each.signed.signature,
            "images": each.images,
            "labels": b"".join(label.to_bytes(_LABEL, "big") for label in each.labels),
            "day": each.day,
        }
        for each in fresh.values()
    ]
    if values:
        connection.execute(_REQUESTS.insert(), values)
    return refused


def read_request(
    connection: sa.Connection, opening: Opening, after: int, previous: bytes
) -> tuple[bool, Request | None]:
    """Read the next request of an opening.

    Args:
        connection: a transaction.
        opening: the opening.
        after: number of the request before.
        previous: its digest.

    Returns:
        Whether there is one, and the request; `None` if it was changed, or does not lead there.
    """
    if not has(connection, _REQUESTS):
        return False, None
    wanted = (
        sa.select(_REQUESTS)
        .where(_REQUESTS.c.opening == opening.digest, _REQUESTS.c.number > after)
        .order_by(_REQUESTS.c.number)
        .limit(1)
    )
    found = connection.execute(wanted).mappings().first()
    if found is None:
        return False, None
    stored = {name: value if isinstance(value, bytes) else b"" for name, value in found.items()}
    images, labels, day = stored["images"], stored["labels"], found["day"]
    places = range(0, len(labels), _LABEL)
    told = tuple(int.from_bytes(labels[at : at + _LABEL], "big") for at in places)
    if not told or len(images) % len(told) or len(labels) % _LABEL or type(day) is not int:
        return True, None
    hashes = hashes_of(images, len(told))
    signed = SignedRequest(opening.digest, after + 1, previous, hashes, stored["signature"])
    fits = (found["number"], found["digest"]) == (signed.number, signed.digest)
    if not (fits and signed.is_signed(opening.client)):
        return True, None
    return True, Request(opening.terms["account"], signed, images, told, day)


def erase_requests(connection: sa.Connection, client: str) -> bool:
    """Remove what a client signed; tell whether there was anything."""
    if not has(connection, _OPENINGS):
        return False
    theirs = sa.select(_OPENINGS.c.digest).where(_OPENINGS.c.client == client)
    connection.execute(_REQUESTS.delete().where(_REQUESTS.c.opening.in_(theirs)))
    return bool(connection.execute(_OPENINGS.delete().where(_OPENINGS.c.client == client)).rowcount)


def _openings(connection: sa.Connection, **wanted: Any) -> list[Sequence[Any]]:
    """Read digest, client, log and record of the openings with some values."""
    if not has(connection, _OPENINGS):
        return []
    which = (_OPENINGS.c[name] == value for name, value in wanted.items())
    order = _OPENINGS.c.client, _OPENINGS.c.digest
    return list(connection.execute(sa.select(_OPENINGS).where(*which).order_by(*order)))


def _opening(digest: Any, client: Any, log: Any, record: Any) -> Opening | None:
    try:
        opening = read_opening(json.loads(record))
    except (CountermarkError, ValueError, TypeError, RecursionError):
        return None
    fits = (digest, client, log) == (opening.digest, opening.terms["account"], opening.log)
    return opening if fits and opening.is_signed else None


def _known(connection: sa.Connection, signed: SignedRequest, fresh: dict[bytes, Request]) -> bytes:
    """The digest of the request that has a request's place."""
    if signed.place in fresh:
        return fresh[signed.place].signed.digest
    found = connection.scalar(
        sa.select(_REQUESTS.c.digest).where(
            _REQUESTS.c.opening == signed.opening, _REQUESTS.c.number == signed.number
        )
    )
    return found if isinstance(found, bytes) else b""
