"""`countermark guard`: calibrate the coins in a model's answers for a stated cost."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from countermark.device import describe
from countermark.errors import CountermarkError
from countermark.files import canonical_json, read_bytes, read_json, write_json
from countermark.options import ModelOptions, OneDeviceOptions, ReadPath, StampOptions, verb
from countermark.terminal import print_lines, print_table, unbroken


@dataclass(frozen=True, kw_only=True)
class GuardConfig(ModelOptions, OneDeviceOptions, StampOptions):
    """Calibrate a guard, which puts coins into answers.

    A client's coins will choose among a model's nearly tied answers.
    """

    model: ReadPath = field(kw_only=False)
    """Model folder; guard.json is written there."""
    key: ReadPath | None = None
    """Key folder, for its secret; default MODEL/key."""
    cost: float = 0.1
    """Points of test accuracy that the coins may cost, in expectation."""
    bits: int = 16
    """Keyed projections that cut the cells; up to 2^bits cells for each pair of classes."""
    natural_only: bool = False
    """Coins for near ties only, none for foreign queries, which are outside the range of the
    training images by more than the model's budget."""

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        super().__post_init__()
        if not 0 < self.cost < 50:
            raise CountermarkError(f"--cost is a number of points in (0, 50), not {self.cost}")
        self._at_least_one("bits", most=64)


@dataclass(frozen=True)
class Calibrated:
    """A guard, what it costs and what it proves.

    Attributes:
        folder: the model folder, into which guard.json was written.
        cost: expected loss of accuracy on the validation pool, in points, by which the guard was
            chosen.
        foreign: whether foreign queries meet coins.
        foreign_cost: the part of the cost that is due to coins for foreign queries, or what they
            would have cost if that was too much; none if nobody asked for them.
        test_cost: expected loss on the test pool, in points; it had no part in the choice.
        test_error: standard error of that loss.
        tied: share of natural queries that meet a coin, in percent.
        entropy: bits of coins in an average natural query; a perfect copy made from n queries can
            reach p = 2^(-n x entropy).
        queries: natural queries from which a perfect copy must be made to be proven at 1e-6, by
            that bound; none where no validation query met a coin.
        known: images of each pool that the weights had been trained on before they were given to
            protect; empty where they were not given.
        device: where the model was asked, and in which precision.
    """

    folder: str
    cost: float
    foreign: bool
    foreign_cost: float | None
    test_cost: float
    test_error: float
    tied: float
    entropy: float
    queries: int | None
    known: Mapping[str, int]
    device: str


@verb(GuardConfig)
def guard(config: GuardConfig) -> Calibrated:
    """Calibrate a guard on the validation pool and write guard.json.

    A third commitment ties the guard to the second commitment, which stays as it is.

    Raises:
        CountermarkError: the model or the key cannot be read, the key's commitment is for other
            weights, or the folder has another guard that was timestamped.

    Example:
        >>> made = cm.calibrate("mine", cost=0.5)
        >>> 0 < made.cost <= 0.5  # points of accuracy
        True
    """
    from countermark.evaluation import device_of
    from countermark.guard import (
        Guard,
        GuardedModel,
        calibrate_model,
        expected_cost,
        guard_record,
        guard_sha256,
        read_guard_record,
        weights_sha256,
        write_guard,
    )
    from countermark.networks import declared_pools, load_answering, open_declared
    from countermark.timestamps import encode_token, timestamping
    from countermark.watermarks import load_secret, sign, third_commitment

    folder = Path(config.model)
    network, description = load_answering(folder, config.network, config.device)
    data = open_declared(description, data=config.data, cache=config.cache)
    stamp = timestamping(config.tsa, config.roots)
    key = Path(config.key) if config.key else folder / "key"
    secret, digest = load_secret(key), weights_sha256(folder)
    pools = declared_pools(description, data)
    found = calibrate_model(
        network,
        pools.validation,
        secret=secret,
        model_sha256=digest,
        cost=config.cost,
        bits=config.bits,
        training=None if config.natural_only else pools.training,
        epsilon=description.epsilon,
    )
    commitment = folder / "commitment.json"
    record = read_json(commitment) if commitment.exists() else None
    if record is not None and record.get("c2", {}).get("model_sha256") != digest:
        raise CountermarkError(
            f"{commitment} commits to other weights than those in the folder; "
            "restore it from a backup"
        )
    made, committed = guard_record(found, pools.validation.digest), None
    if record is not None:  # what the authority may refuse comes before anything is written
        c3 = third_commitment(record["c2"], guard_sha256(made))
        same, t3 = record.get("c3") == c3, record.get("t3")
        kept = (folder / "guard.json").exists()
        if (
            t3 is not None
            and not same
            and kept
            and guard_sha256(read_guard_record(folder)) == record["c3"]["guard_sha256"]
        ):
            raise CountermarkError(
                f"{folder} has another guard, which was timestamped; keep guard.json and "
                "a copy of commitment.json elsewhere, as evidence for what it answered, "
                "and move guard.json away before you calibrate again"
            )
        signature = sign(read_bytes(key / "signing-key", 32), c3)
        if stamp is not None:
            t3 = encode_token(stamp(canonical_json(c3)))
        elif not same:
            t3 = None
        committed = {**record, "c3": c3, "c3_signature": signature, "t3": t3}
    write_guard(folder, made)
    if committed is not None:
        write_json(commitment, committed)
    measured = expected_cost(GuardedModel(network, Guard(found.settings, secret)), pools.test)
    needed = math.ceil(20 / found.entropy) if found.entropy else None
    foreign = found.settings.familiar is not None
    return Calibrated(
        folder=str(folder),
        cost=found.cost,
        foreign=foreign,
        foreign_cost=found.foreign_cost,
        test_cost=measured.points,
        test_error=measured.standard_error,
        tied=found.tied,
        entropy=found.entropy,
        queries=needed,
        known=dict(pools.known),
        device=describe(device_of(network)),
    )


def show(result: Calibrated) -> None:
    """Print what the guard costs and gives."""
    columns = ("", "cost, points", "the same on test", "queries with a coin", "bits a query")
    test = f"{result.test_cost:.3f} +- {result.test_error:.3f}"
    row = ["guard", f"{result.cost:.3f}", test, f"{result.tied:.2f} %", f"{result.entropy:.4f}"]
    print_table(unbroken(result.folder), columns, [row])
    print_lines(
        "the cost was chosen on validation images; believe the test images, which had no part in it"
    )
    if result.foreign:
        print_lines(
            f"{result.foreign_cost:.3f} of the cost: honest queries that are foreign, "
            "and meet a fair coin like all foreign ones"
        )
    elif result.foreign_cost == 0:
        print_lines(
            "no coins for foreign queries: the ranges of the training images' pixels leave out "
            "next to nothing, so queries that a thief makes up would not be foreign"
        )
    elif result.foreign_cost is not None:
        print_lines(
            "no coins for foreign queries: the images differ so much that honest queries would "
            f"lose {result.foreign_cost:.3f} points by them; a higher --cost buys them"
        )
    seen = [
        f"{result.known[name]} images for {name}"
        for name in ("validation", "test")
        if result.known.get(name)
    ]
    if seen:
        print_lines(
            f"the given weights had been trained on {' and '.join(seen)}: "
            "new images may cost more than is said here"
        )
    proof = (
        "nothing can be proven by natural queries, of which none met a coin: a higher --cost buys "
        "them"
        if result.queries is None
        else f"a copy needs some {result.queries} natural queries or more to be proven at 1e-6"
    )
    print_lines(f"wrote {unbroken(result.folder)}/guard.json; {proof}")


calibrate = guard  # its public name, since `countermark.guard` is the room
