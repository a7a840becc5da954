"""How a model is asked for logits, and when those are an answer."""

import torch
from torch import nn

from countermark.errors import CountermarkError
from countermark.fast import Prepared, dtype_of

NOT_FINITE = (
    "the model answers with logits that are not finite numbers (NaN or infinity), and the largest "
    "of those is no answer; look for weights that diverged or a precision that overflows, and mask "
    "a class by a large negative number instead of -inf"
)


def ask(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Logits `(n, classes)` of pixels `(n, c, h, w)`, in float32 or float64.

    The pixels are rounded to the precision that the model's parameters have, so that a model in
    half precision is asked about what it would see of an image in any case.
    """
    if not isinstance(model, Prepared):  # a prepared copy takes any precision
        x = x.to(dtype_of(model, x.dtype))
    logits: torch.Tensor = model(x)
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


def answers(logits: torch.Tensor) -> torch.Tensor:
    """The class of the largest logit, `(n,)`.

    Raises:
        CountermarkError: a logit is NaN or infinite.
    """
    return finite(logits).argmax(1)


def finite(logits: torch.Tensor) -> torch.Tensor:
    """The logits themselves.

    Raises:
        CountermarkError: one of them is NaN or infinite.
    """
    if not bool(torch.isfinite(logits).all()):
        raise CountermarkError(NOT_FINITE)
    return logits
