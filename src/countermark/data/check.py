"""What a place holds, before anything is trained on it.

The findings are the good, converted and damaged images, the duplicates, and the pools.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from countermark.errors import CountermarkError

if TYPE_CHECKING:
    from countermark.data.reading import Found


@dataclass(frozen=True)
class Findings:
    """What a place holds, and whether it will do.

    Attributes:
        found: what was found at the place.
        size: side that images were brought to.
        shape: one image, `(channels, height, width)`; none where no data set can be made of it.
        digest: SHA-256 of the data set, which model folders declare; none where there is none.
        pools: examples of each pool that would be cut; none where they cannot be.
        problem: why it cannot be used, or not for a mark; none where it can.
    """

    found: "Found"
    size: int | None
    shape: tuple[int, int, int] | None = None
    digest: str | None = None
    pools: Mapping[str, int] | None = None
    problem: str | None = None

    @property
    def exit_status(self) -> int:
        """0 where it will do, 1 where it will not."""
        return int(self.problem is not None)


def check_data(
    place: Any,
    *,
    size: int | None = None,
    skip_damaged: bool = False,
    cache: str | Path | None = None,
) -> Findings:
    """Read everything at a place, and report what is there.

    The arguments are those of `open_data`. What was read is kept in the cache, so that training
    does not read it again.

    Raises:
        CountermarkError: there is no data at the place, or its layout cannot be read.
    """
    import torch

    from countermark.data.pools import POOLS
    from countermark.data.reading import count_duplicates
    from countermark.data.source import Options, read_data

    found, data = read_data(
        place, Options(size, skip_damaged, None if cache is None else Path(cache))
    )
    if data is None:
        return Findings(found, size, problem=found.complaint(size=size, skip_damaged=skip_damaged))
    if found.duplicates is None:
        labels, numbers = (
            torch.cat(both).numpy()
            for both in ((data.train.y, data.test.y), (data.train.contents(), data.test.contents()))
        )
        duplicates, disputed = count_duplicates(labels, numbers)
        found = replace(found, duplicates=duplicates, disputed=disputed)
    findings = Findings(found, size, data.shape, data.digest)
    try:
        cut = data.pools(0)
    except CountermarkError as error:
        return replace(findings, problem=str(error))
    pools = {name: len(getattr(cut, name)) for name in POOLS}
    lacks = data.lacks_bases(cut)
    problem = None
    if lacks is not None:
        problem = (
            f"{found.place}: {lacks}; a model can be trained on it, and a mark in it would prove "
            "little: give more images"
        )
    return replace(findings, pools=pools, problem=problem)
