"""A data set: its examples, and what is to be known of them."""

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from countermark.data.examples import Examples
from countermark.data.pools import Pools, cut, sizes
from countermark.threat import Threat

SMALLEST_BATCH = 40
"""Trials of the smallest batch that is worth having: all of them agreeing is 2^-40, \
beyond a judge's 1e-9."""


@dataclass(frozen=True)
class Dataset:
    """Images with labels, wherever they came from.

    Attributes:
        place: where from: a name, a folder, a file, `module:function`; empty for objects.
        train: examples that the pools are cut out of.
        test: examples of the test pool, only ever measured.
        class_names: names of the classes, in the order of the labels.
        threat: budgets of attackers and watermarks, and the PGD of an evaluation.
        size: side that images were brought to; none where they had one shape.
        skip_damaged: whether files that could not be read were left out.
        converted: how many images were converted, by what they were.
        damaged: the files that were left out.
        duplicates: images that are equal to an earlier one.
        parts: how many examples came as which part; those of a validation part are the last of
            `train`. Empty where only `train` and `test` are known.
        test_cut: whether the test part was cut out of what came as one, because there was none.
        pool_sizes: examples of the pools; none for the proportions that any data has.
        batches: batches of a key, one for each later dispute.
        batch_size: most trials in a batch.
        mirror: left and right mean nothing in its images.
        shift: pixels of border that mean nothing.
        ood: the data set whose images serve as out-of-distribution watermarks; none for its own
            images, turned by 90 degrees.
        by_content: equal images never fall into two pools; the pools of 0.1.0 did not look.
    """

    place: str
    train: Examples
    test: Examples
    class_names: tuple[str, ...]
    threat: Threat
    size: int | None = None
    skip_damaged: bool = False
    converted: Mapping[str, int] = field(default_factory=dict)
    damaged: tuple[str, ...] = ()
    duplicates: int = 0
    parts: Mapping[str, int] = field(default_factory=dict)
    test_cut: bool = False
    pool_sizes: Mapping[str, int] | None = None
    batches: int = 2
    batch_size: int = 200
    mirror: bool = False
    shift: int = 0
    ood: str | None = None
    by_content: bool = True

    @property
    def shape(self) -> tuple[int, int, int]:
        """One image, `(channels, height, width)`."""
        channels, height, width = self.train.x.shape[1:]
        return channels, height, width

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def colour(self) -> bool:
        """Whether images have colours."""
        return self.shape[0] == 3

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over the class names and all examples.

        It is the same for the same data, wherever the data is stored.
        """
        state = hashlib.sha256(repr(self.class_names).encode())
        state.update(bytes.fromhex(self.train.digest) + bytes.fromhex(self.test.digest))
        return state.hexdigest()

    @property
    def held_out(self) -> Mapping[str, int]:
        """Sizes of the pools that are cut out of the training part, except `training` itself."""
        return self.pool_sizes or sizes(len(self.train))

    def pools(self, seed: int = 0, known: torch.Tensor | None = None) -> Pools:
        """Cut the five disjoint pools; see `countermark.data.pools.cut`."""
        return cut(
            self.train, self.test, seed, known, wanted=self.held_out, by_content=self.by_content
        )

    def lacks_bases(self, pools: Pools, least: int = SMALLEST_BATCH) -> str | None:
        """Say what is missing for a mark, or return None if there are enough bases.

        The text is the beginning of a sentence.

        Args:
            pools: the pools that were cut.
            least: the fewest bases of a batch.
        """
        bases = len(pools.bases)
        if bases >= self.batches * least:
            return None
        return f"{bases} watermark bases are too few for {self.batches} batches of {least} trials"
