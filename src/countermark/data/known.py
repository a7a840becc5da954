"""The data sets that are known by name, one row each: files, class names, threat, pools.

The budgets of MNIST and Fashion-MNIST are those of Thakkar, Zizzo and Maffeis (2023), Table 6;
those of `digits` are ours. What is not known by name gets defaults by kind of image.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from countermark.errors import CountermarkError, choose
from countermark.threat import COLOUR, GREY, Threat

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Known:
    """What is fixed about a data set that is known by name.

    Attributes:
        name: the name used everywhere.
        shape: one image, `(channels, height, width)`.
        class_names: names of the classes, in the order of the labels.
        threat: budgets, and the PGD of the evaluation.
        ood: the data set whose images serve as out-of-distribution watermarks; its own name means
            its rotations by 90 degrees.
        pools: number of examples of the pools that are cut out of the training examples;
            `training` takes the rest. None for the proportions that any data has.
        train: examples that the pools are cut out of.
        test: examples of the test pool.
        batches: batches of a key, one for each later dispute.
        batch_size: trials in a batch.
        mirror: left and right mean nothing in its images.
        shift: pixels of border that mean nothing.
        files: SHA-256 of the uncompressed files by name; empty for sets that come with a library.
    """

    name: str
    shape: Shape
    class_names: tuple[str, ...]
    threat: Threat
    ood: str
    pools: Mapping[str, int] | None = None
    train: int = 60_000
    test: int = 10_000
    batches: int = 2
    batch_size: int = 200
    mirror: bool = False
    shift: int = 0
    files: Mapping[str, str] = field(default_factory=dict)

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


TRAIN_IMAGES = "train-images-idx3-ubyte"
TRAIN_LABELS = "train-labels-idx1-ubyte"
TEST_IMAGES = "t10k-images-idx3-ubyte"
TEST_LABELS = "t10k-labels-idx1-ubyte"

_DIGITS = tuple("0123456789")
_CLOTHES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_IDX_POOLS = {"validation": 2000, "bases": 1000, "thief": 11000}

KNOWN: Mapping[str, Known] = {
    each.name: each
    for each in (
        Known(
            name="mnist",
            shape=(1, 28, 28),
            class_names=_DIGITS,
            threat=Threat(0.25, 25, 0.01, 0.4),
            batch_size=400,
            ood="fashion_mnist",
            pools=_IDX_POOLS,
            shift=1,
            files={
                TRAIN_IMAGES: "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
                TRAIN_LABELS: "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
                TEST_IMAGES: "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
                TEST_LABELS: "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            },
        ),
        Known(
            name="fashion_mnist",
            shape=(1, 28, 28),
            class_names=_CLOTHES,
            threat=GREY,
            ood="mnist",
            pools=_IDX_POOLS,
            mirror=True,
            files={
                TRAIN_IMAGES: "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
                TRAIN_LABELS: "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
                TEST_IMAGES: "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
                TEST_LABELS: "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
            },
        ),
        # 1,797 images of 8x8; every sixth is in the test pool. The other pools keep roughly the
        # proportions of MNIST, but for the watermark bases: a mark's strength counts trials,
        # whatever the size of the data.
        Known(
            name="digits",
            shape=(1, 8, 8),
            class_names=_DIGITS,
            threat=Threat(0.1, 10, 0.025, 0.25),
            ood="digits",
            pools={"validation": 60, "bases": 220, "thief": 280},
            train=1497,
            test=300,
            batch_size=80,
        ),
    )
}


def known(name: str) -> Known:
    """Return the data set called `name`.

    Raises:
        CountermarkError: there is none; the message lists those that there are.
    """
    choose("data set", name, KNOWN)
    return KNOWN[name]


def default_threat(shape: Shape) -> Threat:
    """The threat to images of which only the shape is known.

    Raises:
        CountermarkError: they are neither grey nor coloured.
    """
    if shape[0] not in (1, 3):
        raise CountermarkError(f"images have 1 channel (grey) or 3 (colour), not {shape[0]}")
    return GREY if shape[0] == 1 else COLOUR
