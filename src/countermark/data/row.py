"""What is fixed about a data set that is known by name: one row of the table in `known`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from countermark.data.packages import Package
from countermark.threat import Threat

if TYPE_CHECKING:  # PyTorch is heavy
    from countermark.data.examples import Examples


@dataclass(frozen=True)
class Known:
    """What is fixed about a data set that is known by name.

    Attributes:
        name: the name used everywhere.
        shape: one image, `(channels, height, width)`.
        class_names: names of the classes, in the order of the labels.
        threat: budgets, and the PGD of the evaluation.
        read: reads the training and the test examples, and fetches the files if they are missing.
        ood: the data set whose images serve as out-of-distribution watermarks; None for its own
            images, turned by 90 degrees.
        pools: number of examples in each pool that is cut out of the training examples; `training`
            takes the rest. None for the proportions that any data has.
        train: number of examples that the pools are cut out of.
        test: number of examples in the test pool.
        test_cut: whether these were cut out of what its authors publish as one part.
        batches: batches of a key, one for each later dispute.
        batch_size: trials in a batch.
        ink: whether its pixels are nearly black or nearly white.
        mirror: whether left and right mean nothing in its images.
        shift: pixels of border that mean nothing.
        files: SHA-256 of the files by name, as they are kept; empty for data sets that come with a
            library.
        largest: size of the largest file in bytes, or a little more.
        mirrors: addresses to which the names of the files are appended.
        packed: whether mirrors have the files compressed, as NAME.gz.
        system: where the system may have a copy of the files.
        package: a package that holds the files.
    """

    name: str
    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    threat: Threat
    read: Callable[["Known", Path | None], tuple["Examples", "Examples"]]
    ood: str | None = None
    pools: Mapping[str, int] | None = None
    train: int = 60_000
    test: int = 10_000
    test_cut: bool = False
    batches: int = 2
    batch_size: int = 200
    ink: bool = False
    mirror: bool = False
    shift: int = 0
    files: Mapping[str, str] = field(default_factory=dict)
    largest: int = 1 << 26
    mirrors: tuple[str, ...] = ()
    packed: bool = True
    system: Path | None = None
    package: Package | None = None

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)
