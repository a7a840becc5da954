"""Logits of images that differ from known ones in one small window.

They are computed only where the window reaches. A pixel affects a few places of a convolution and
of the pools after it, and the first linear layer sees the difference at those places alone.
Everything behind that layer is computed in full, and so is everything behind a layer that is not
known here.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from countermark.attacks.asking import ask
from countermark.fast import Affine, Pool, PooledConv2d, Prepared, ShiftedConv2d, flattens, is_plain
from countermark.networks.named import Clip, HalvingConv2d

Window = tuple[int, int, int, int]  # top, bottom, left, right; the ends are outside


@dataclass(frozen=True)
class _Stage:
    """A convolution or a max-pooling, and the pointwise layers behind it.

    Attributes:
        kernel: side of the square of inputs that one result depends on.
        stride: step from one such square to the next.
        padding: places that are added at each border.
        value: what stands in these places.
        filters: weights of the convolution; `None` for a max-pooling. A max-pooling with a kernel
            of 1 changes nothing: it carries pointwise layers that have no such layer before them.
        bias: of the convolution, if it has one.
        shifted: the layer that the convolution belongs to, if that adds constants to its result.
        pointwise: layers that treat each place by itself.
    """

    kernel: int
    stride: int
    padding: int
    value: float
    filters: torch.Tensor | None
    bias: torch.Tensor | None
    shifted: ShiftedConv2d | None
    pointwise: list[nn.Module]


class Local:
    """Images and what a network makes of them, kept so that small changes are cheap to try.

    Attributes:
        x: the images, `(n, c, h, w)`.
        logits: their logits, `(n, classes)`.
    """

    def __init__(self, model: nn.Module, x: torch.Tensor) -> None:
        """Compute everything in full once.

        This looks into the layers of a model from `prepare` if the model and the images are in
        float32. Any other model is one layer, which is always computed in full.
        """
        known = (
            isinstance(model, Prepared) and model.dtype is x.dtype is torch.float32 and x.dim() == 4
        )
        layers = list(model.layers) if isinstance(model, Prepared) and known else [model]
        self._stages, rest = _stages(layers)
        # The input of each stage, and the result of the last one. With channels last, a window is
        # a few long rows in memory.
        self._states = [x.clone(memory_format=torch.channels_last) if x.dim() == 4 else x.clone()]
        for stage in self._stages:
            self._states.append(
                _result(stage, self._states[-1]).contiguous(memory_format=torch.channels_last)
            )
        first = rest[1] if len(rest) > 1 and flattens(rest[0]) else None
        self._linear = (
            first if isinstance(first, nn.Linear) and is_plain(first, nn.Linear) else None
        )
        self._dense: torch.Tensor | None = None  # what the linear layer makes of the last state
        if self._linear is not None:
            self._dense = self._linear(self._states[-1].flatten(1))
            shape = self._states[-1].shape[1:]
            self._weight = (
                self._linear.weight.view(-1, *shape).permute(2, 3, 1, 0).contiguous()
            )  # rows, columns, channels, features
            rest = rest[2:]
        self._rest = rest[0] if len(rest) == 1 else nn.Sequential(*rest)
        self.logits = ask(
            self._rest, self._states[-1] if self._dense is None else self._dense.clone()
        )
        self._tried: (
            tuple[list[tuple[Window, torch.Tensor]], torch.Tensor | None, torch.Tensor] | None
        ) = None

    @property
    def x(self) -> torch.Tensor:
        """The images."""
        return self._states[0]

    def keep(self, rows: torch.Tensor) -> None:
        """Keep the images for which `rows`, `(n,)`, is true."""
        self._states = [state[rows] for state in self._states]
        self._dense = None if self._dense is None else self._dense[rows]
        self.logits = self.logits[rows]
        self._tried = None

    def ask(self, patch: torch.Tensor, top: int, left: int) -> torch.Tensor:
        """Logits `(n, classes)` of the images with a patch put in at one place.

        Args:
            patch: new pixels `(n, c, height, width)`.
            top: first row of the patch.
            left: first column of the patch.
        """
        window: Window = (top, top + patch.shape[2], left, left + patch.shape[3])
        changes = [(window, patch)]
        for stage, state in zip(self._stages, self._states, strict=False):
            window, patch = _reached(stage, state, window, patch)
            if patch.numel() == 0:  # the window lies between two strides, so nothing sees it
                self._tried = (changes, self._dense, self.logits)
                return self.logits
            changes.append((window, patch))
        dense = None
        if self._linear is not None and self._dense is not None:
            state = self._states[-1]
            difference = (patch - _inside(state, window)).permute(0, 2, 3, 1).flatten(1)
            weight = self._weight[window[0] : window[1], window[2] : window[3]].flatten(0, 2)
            dense = torch.addmm(self._dense, difference, weight)
            logits = ask(self._rest, dense.clone())
        else:
            state = self._states[-1].clone()
            _inside(state, window).copy_(patch)
            logits = ask(self._rest, state)
        self._tried = (changes, dense, logits)
        return logits

    def accept(self, rows: torch.Tensor) -> None:
        """Make the change that was last asked about in the images where `rows`, `(n,)`, is true."""
        assert self._tried is not None
        changes, dense, logits = self._tried
        chosen = torch.nonzero(rows).flatten()
        if len(chosen) == 0:
            return
        for state, (window, patch) in zip(self._states, changes, strict=False):
            inside = _inside(state, window)
            inside[chosen] = patch[chosen]
        if dense is not None and self._dense is not None:
            self._dense[chosen] = dense[chosen]
        self.logits = self.logits.index_copy(0, chosen, logits[chosen])


def _stages(layers: list[nn.Module]) -> tuple[list[_Stage], list[nn.Module]]:
    """The stages that a network begins with, and the layers behind them."""
    stages: list[_Stage] = []
    for number, layer in enumerate(layers):
        if stages and is_plain(layer, nn.ReLU, nn.Tanh, Affine):
            stages[-1].pointwise.append(layer)
        elif is_plain(layer, Clip):
            stages.append(_Stage(1, 1, 0, 0.0, None, None, None, [layer]))
        elif isinstance(layer, Pool) and is_plain(layer, Pool):
            stages.append(_pool(layer))
        elif isinstance(layer, PooledConv2d):
            stages += [
                _Stage(
                    layer.kernel, 1, layer.padding, layer.value, layer.filters, layer.bias, None, []
                ),
                _pool(layer),
            ]
        elif isinstance(layer, ShiftedConv2d) and _square(layer.layer):
            stride, padding = layer.layer.stride[0], int(layer.layer.padding[0])
            stages.append(
                _Stage(layer.weight.shape[2], stride, padding, 0.0, layer.weight, None, layer, [])
            )
        elif (
            isinstance(layer, nn.Conv2d)
            and is_plain(layer, nn.Conv2d, HalvingConv2d)
            and _square(layer)
        ):
            stage = _Stage(
                layer.kernel_size[0],
                layer.stride[0],
                int(layer.padding[0]),
                0.0,
                layer.weight,
                layer.bias,
                None,
                [],
            )
            stages.append(stage)
        else:
            return stages, layers[number:]
    return stages, []


def _pool(layer: Pool | PooledConv2d) -> _Stage:
    return _Stage(2, 2, 0, 0.0, None, None, None, [nn.ReLU()] if layer.relu else [])


def _square(layer: nn.Conv2d) -> bool:
    pairs = layer.kernel_size, layer.stride, layer.padding
    even = all(isinstance(pair, tuple) and pair[0] == pair[1] for pair in pairs)
    return even and layer.dilation == (1, 1) and layer.groups == 1 and layer.padding_mode == "zeros"


def _inside(state: torch.Tensor, window: Window) -> torch.Tensor:
    top, bottom, left, right = window
    return state[..., top:bottom, left:right]


def _result(stage: _Stage, state: torch.Tensor) -> torch.Tensor:
    """Compute a stage in full."""
    result = _convolved(stage, functional.pad(state, (stage.padding,) * 4, value=stage.value))
    if stage.shifted is not None:
        result = result + stage.shifted.constants(state)
    for layer in stage.pointwise:
        result = layer(result)
    return result


def _convolved(stage: _Stage, x: torch.Tensor) -> torch.Tensor:
    if stage.filters is None:
        return functional.max_pool2d(x, stage.kernel)
    return functional.conv2d(x, stage.filters, stage.bias, stage.stride)


def _reached(
    stage: _Stage, state: torch.Tensor, window: Window, patch: torch.Tensor
) -> tuple[Window, torch.Tensor]:
    """Which window of a stage's result changes with a window of its input, and the result there."""
    top, bottom, left, right = window
    first_row, last_row, above, below = _span(stage, state.shape[2], top, bottom)
    first_column, last_column, before, behind = _span(stage, state.shape[3], left, right)
    reached = first_row, last_row, first_column, last_column
    if last_row <= first_row or last_column <= first_column:
        return reached, patch[..., :0, :0]
    region = torch.empty(
        (*state.shape[:2], below - above, behind - before),
        dtype=state.dtype,
        device=state.device,
        memory_format=torch.channels_last,
    )
    region.fill_(stage.value)
    known = max(above, 0), min(below, state.shape[2]), max(before, 0), min(behind, state.shape[3])
    _inside(
        region, (known[0] - above, known[1] - above, known[2] - before, known[3] - before)
    ).copy_(_inside(state, known))
    rows = slice(max(top, above), min(bottom, below))
    columns = slice(max(left, before), min(right, behind))
    region[
        ..., rows.start - above : rows.stop - above, columns.start - before : columns.stop - before
    ] = patch[..., rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    result = _convolved(stage, region)
    if stage.shifted is not None:
        result = result + _inside(stage.shifted.constants(state), reached)
    for layer in stage.pointwise:
        result = layer(result)
    return reached, result


def _span(stage: _Stage, size: int, start: int, end: int) -> tuple[int, int, int, int]:
    """Follow the pixels from `start` to before `end` through a stage, along one direction.

    Returns:
        Start and end of the results that these pixels reach, and start and end of the pixels that
        those results depend on.
    """
    count = (size + 2 * stage.padding - stage.kernel) // stage.stride + 1
    first = max(0, -(-(start + stage.padding - stage.kernel + 1) // stage.stride))
    last = min(count, (end - 1 + stage.padding) // stage.stride + 1)
    return (
        first,
        last,
        first * stage.stride - stage.padding,
        (last - 1) * stage.stride - stage.padding + stage.kernel,
    )
