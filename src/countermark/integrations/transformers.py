"""A mark in Hugging Face's `Trainer` (`pip install 'countermark[transformers]'`).

The callback puts a hook before the model's forward: trials join the batch there, in training mode
alone, on the model's device. A data collator would be the other place, but with several workers
each of them has a copy of it, and the trials would not take their turns.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from countermark.errors import CountermarkError
from countermark.marking import Marking, Standing

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise CountermarkError(
        "transformers is not installed; pip install 'countermark[transformers]'"
    ) from error


class Logits(nn.Module):
    """An image classifier of transformers as a network to logits, for `Marking` and for `load`.

    Example:
        >>> mark = cm.Marking(Logits(model), photos, key="mine/key",
        ...                   mean=processor.image_mean, std=processor.image_std)
    """

    def __init__(self, model: nn.Module) -> None:
        """Wrap a model; its weights stay its own."""
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits `(n, classes)` for images `(n, c, h, w)` as the model takes them."""
        logits: torch.Tensor = self.model(pixel_values=x).logits
        return logits


class MarkingCallback(TrainerCallback):  # type: ignore[misc]  # it has no types
    """Mixes the trials of a `Marking` into every training batch, checks it, and finishes it.

    Batches hold `pixel_values` and `labels`, as image classifiers take them. Evaluation is left
    alone.

    Example:
        >>> called = MarkingCallback(mark, out="mine")
        >>> Trainer(model=model, args=args, train_dataset=data, callbacks=[called]).train()

    Attributes:
        standing: how the model stood to its key when it was last checked.
    """

    def __init__(
        self, mark: Marking, *, count: int = 16, out: str | Path | None = None, **finishing: Any
    ) -> None:
        """Prepare a callback.

        Args:
            mark: the mark, made of `Logits(model)` before the training begins. In a data-parallel
                job every process makes one over the same key folder.
            count: trials that join a batch.
            out: model folder to write at the end, if any.
            finishing: further arguments of `Marking.finish`.
        """
        self.mark, self.count, self.out, self.finishing = mark, count, out, finishing
        self.standing: Standing | None = None
        self._hook: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Put the hook before the forward.

        Raises:
            CountermarkError: labels are smoothed, which the Trainer does outside the model.
        """
        if args.label_smoothing_factor:
            raise CountermarkError(
                "with label_smoothing_factor the loss is taken outside the model, where no trial "
                "can join the labels; set it to 0"
            )
        self._hook = given["model"].register_forward_pre_hook(self._mix, with_kwargs=True)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Check the mark, and note the agreement in the history of the Trainer."""
        self.standing = self.mark.check(Logits(given["model"]))
        state.log_history.append(
            {
                "mark_agreement": self.standing.agreement,
                "epoch": state.epoch,
                "step": state.global_step,
            }
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Take the hook away, and write the model folder, in one process.

        Raises:
            CountermarkError: see `Marking.finish`, above all where the mark did not take.
        """
        self._hook.remove()
        if self.out is not None and state.is_world_process_zero:
            self.standing = self.mark.finish(Logits(given["model"]), self.out, **self.finishing)

    def _mix(self, model: nn.Module, arguments: Any, given: dict[str, Any]) -> Any:
        if not model.training:
            return None
        if given.get("pixel_values") is None or given.get("labels") is None:
            raise CountermarkError(
                f"the model is given {', '.join(given) or 'nothing by name'} in training; trials "
                "join pixel_values and labels, which compute_loss must hand to the model"
            )
        x, y = self.mark.mix(given["pixel_values"], given["labels"], self.count)
        return arguments, {**given, "pixel_values": x, "labels": y}
