"""A mark in a training loop of Lightning (`pip install 'countermark[lightning]'`).

The callback wraps the module's `training_step`: it is given a batch that trials have joined, after
the data module's own hooks and on the batch's device. `on_train_batch_start` is no place for that,
since it cannot replace a batch, and a batch may be a tuple.
"""

import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from countermark.errors import CountermarkError
from countermark.marking import Marking, Standing

# One library has two names, and classes of its own under each.
_NAMES = ("lightning.pytorch", "pytorch_lightning")


def _library() -> Any:
    """The Lightning that the program uses, or the one that there is."""
    for name in sorted(_NAMES, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise CountermarkError("Lightning is not installed; pip install 'countermark[lightning]'")


class MarkingCallback(_library().Callback):  # type: ignore[misc]  # a class of one of two libraries
    """Mixes the trials of a `Marking` into every training batch, checks it, and finishes it.

    Batches are `(images, labels)` or mappings that have both. After each epoch the agreement with
    the coins is logged as `mark_agreement`, in percent.

    Example:
        >>> mark = cm.Marking(module.net, photos, key="mine/key", epsilon=8 / 255)
        >>> called = MarkingCallback(mark, net=lambda module: module.net, out="mine")
        >>> Trainer(max_epochs=4, callbacks=[called]).fit(module, loader)

    Attributes:
        standing: how the network stood to its key when it was last checked.
    """

    def __init__(
        self,
        mark: Marking,
        *,
        net: Callable[[Any], nn.Module] = lambda module: module,
        count: int = 16,
        keys: tuple[str, str] = ("image", "label"),
        out: str | Path | None = None,
        **finishing: Any,
    ) -> None:
        """Prepare a callback.

        Args:
            mark: the mark, made before the training begins. In a data-parallel job every process
                makes one over the same key folder.
            net: finds the marked network in the Lightning module; the module itself by default.
            count: trials that join a batch.
            keys: names of images and labels in batches that are mappings.
            out: model folder to write at the end, if any.
            finishing: further arguments of `Marking.finish`.
        """
        super().__init__()
        self.mark, self.net, self.count, self.keys = mark, net, count, keys
        self.out, self.finishing = out, finishing
        self.standing: Standing | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Wrap the training step."""
        step = pl_module.training_step

        @functools.wraps(step)
        def mixed(batch: Any, *arguments: Any, **options: Any) -> Any:
            return step(self.mixed(batch), *arguments, **options)

        pl_module.training_step = mixed

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Check the mark and log it."""
        self.standing = self.mark.check(self.net(pl_module))
        pl_module.log("mark_agreement", self.standing.agreement, rank_zero_only=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the model folder, in one process.

        Raises:
            CountermarkError: see `Marking.finish`, above all where the mark did not take.
        """
        if self.out is not None and trainer.is_global_zero:
            self.standing = self.mark.finish(self.net(pl_module), self.out, **self.finishing)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Take the wrapping away."""
        vars(pl_module).pop("training_step", None)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the wrapping away."""
        vars(pl_module).pop("training_step", None)

    def mixed(self, batch: Any) -> Any:
        """A batch that trials have joined.

        Raises:
            CountermarkError: it has another form, or see `Marking.mix`.
        """
        if isinstance(batch, Mapping) and set(batch) == set(self.keys):
            images, labels = self.keys
            x, y = self.mark.mix(batch[images], batch[labels], self.count)
            return {images: x, labels: y}
        if isinstance(batch, tuple | list) and len(batch) == 2:
            x, y = batch
            return self.mark.mix(x, y, self.count)
        raise CountermarkError(
            "a batch is (images, labels), or a mapping of just these two by the names that "
            f"`keys` gives, not {type(batch).__name__} of "
            f"{len(batch) if hasattr(batch, '__len__') else 1} parts: what else belongs to an "
            "image is not known of a trial; call Marking.mix in training_step instead"
        )
