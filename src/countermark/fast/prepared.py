"""A network made ready to be attacked: the same logits from fewer and cheaper layers.

An attack runs one network in evaluation mode thousands of times and needs nothing but the logits
and the gradient of the input. So everything that is constant is computed once: batch norm and
normaliser are folded into the weights of a neighbouring layer (Jacob et al., 2018, section 3.2),
dropout is removed, max-pooling by two and its ReLU become one function, a convolution of few
channels works on blocks of pixels, and one of wide filters over many channels works on frequencies.
This is done to plain layers in an `nn.Sequential`. Modules that compute with their own code, such
as residual blocks, are left to inside.py, and a layer that is not known here stays as it is.
"""

import copy
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional

from countermark.errors import CountermarkError
from countermark.fast.inside import Quickened, constant_map, fold_into, quickened
from countermark.fast.pooling import FEW, Pool, block_filters, pooled, pooled_blocks, suits_blocks
from countermark.fast.sequence import flat_layers, is_plain, join_pools
from countermark.fast.spectral import SpectralConv2d
from countermark.networks.named import HalvingConv2d, Normalise


class Prepared(nn.Module):
    """A network in evaluation mode whose weights want no gradients; `prepare` makes it.

    It takes pixels of any precision, and its logits are float32.
    """

    def __init__(self, layers: nn.Sequential, dtype: torch.dtype) -> None:
        """Hold `layers`, which compute in `dtype`."""
        super().__init__()
        self.dtype = dtype
        self.layers = layers.eval().requires_grad_(False).to(dtype)
        if dtype is not torch.float32:
            self.layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits `(n, classes)` of pixels `(n, c, h, w)`."""
        layout = torch.preserve_format if self.dtype is torch.float32 else torch.channels_last
        x = x.to(dtype=self.dtype, memory_format=layout)
        logits: torch.Tensor = self.layers(x)
        return logits.float()

    def train(self, mode: bool = True) -> "Prepared":
        """Stay in evaluation mode: what was folded cannot be trained."""
        return super().train(False)


def prepare(network: nn.Module, dtype: torch.dtype = torch.float32) -> Prepared:
    """Copy a network for attacks; the copy's logits are those of the network in evaluation mode.

    They are the same within rounding.

    Args:
        network: pixels `(n, c, h, w)` of [0, 1] to logits, in any precision; it is not changed.
        dtype: what the copy computes in, whatever the network does. `torch.bfloat16` keeps 8 bits
            of each number and pays off where `device.computes_bf16`. An attack on such a copy that
            stops when an example is misclassified also stops for some that the network itself
            classifies correctly: check the answers of the network, and attack those examples again
            on the network itself, as `evaluation.adversarial_accuracy` does.

    Raises:
        CountermarkError: `network` is a prepared copy that computes in something else.
    """
    if isinstance(network, Prepared):
        if network.dtype is not dtype:
            raise CountermarkError(
                f"this copy computes in {network.dtype}; prepare the network itself for {dtype}"
            )
        return network
    with torch.no_grad():
        copied = _copied(network).eval()
        if dtype_of(copied) in (torch.float16, torch.bfloat16):
            copied.float()  # what is folded together is rounded once, at the end
        place = next((value.device for value in copied.parameters()), None)
        folded = _fold_back(_apart(flat_layers(copied)), place)
        layers = [
            quickened(layer)
            for layer in _fold_forward(join_pools(folded), by_frequency=dtype is torch.float32)
        ]
        if dtype is not torch.float32:
            layers = _flatten_pixels(layers)
        return Prepared(nn.Sequential(*_in_place(layers)), dtype)


def worth_preparing(network: nn.Module) -> bool:
    """Whether a prepared copy has fewer layers to run.

    If so, making one pays off even for a single step of an attack.
    """
    layers = prepare(network).layers
    return len(layers) < len(flat_layers(network)) or any(
        isinstance(layer, Quickened) and layer.folded for layer in layers
    )


def dtype_of(model: nn.Module, default: torch.dtype = torch.float32) -> torch.dtype:
    """The precision of the model's first floating-point parameter; `default` if it has none."""
    return next((each.dtype for each in model.parameters() if each.is_floating_point()), default)


class Affine(nn.Module):
    """The map x * scale + shift, with one scale and shift for all channels or one per channel."""

    def __init__(self, scale: torch.Tensor, shift: torch.Tensor, flat: bool = False) -> None:
        """Hold `scale` and `shift`, `(1,)` or `(channels,)`.

        `flat` says that all inputs are tensors `(n, features)`.
        """
        super().__init__()
        self.flat = flat
        self.scale, self.shift = nn.Parameter(scale), nn.Parameter(shift)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `(n, channels, ...)`."""
        shape = (1, -1) + (1,) * (x.dim() - 2)
        return x * self.scale.view(shape) + self.shift.view(shape)


class ShiftedConv2d(nn.Module):
    """A convolution of x * scale + shift in which the padding stays zero.

    It equals the convolution of x with scaled weights, plus what the padded convolution makes of
    the shift alone. That second part depends on the place: it is an image of constants, computed
    once for each size of image.
    """

    def __init__(self, affine: Affine, layer: nn.Conv2d, by_frequency: bool) -> None:
        """Compute `layer(affine(x))`, by way of its frequencies if `by_frequency`."""
        super().__init__()
        self.layer = layer
        self.shift = nn.Parameter(affine.shift.to(layer.weight))
        self.weight = nn.Parameter(layer.weight * affine.scale.view(1, -1, 1, 1))
        self.spectral = SpectralConv2d(self.weight, None) if by_frequency else None
        self._constants: dict[tuple[int, int, torch.dtype, torch.device], torch.Tensor] = {}

    def constants(self, x: torch.Tensor) -> torch.Tensor:
        """What is added to the convolution of images of the size of `x`: `(1, filters, h', w')`."""
        place = (x.shape[2], x.shape[3], x.dtype, x.device)
        if place not in self._constants:
            with torch.no_grad():
                self._constants[place] = self.layer(
                    self.shift.view(1, -1, 1, 1).expand(1, x.shape[1], *x.shape[2:])
                )
        return self._constants[place]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve `(n, c, h, w)`."""
        layer = self.layer
        if self.spectral is not None:
            convolved: torch.Tensor = self.spectral(x)
        else:
            convolved = functional.conv2d(
                x, self.weight, None, layer.stride, layer.padding, layer.dilation
            )
        return convolved.add_(self.constants(x))


class PooledConv2d(nn.Module):
    """A convolution of few channels, max-pooling by two and a ReLU, on blocks of 2x2 pixels.

    As in `networks.named.HalvingConv2d`, and for the same reason, each pixel of a block is a
    channel. So is each place of the block in the result: pooling is a maximum over four groups of
    channels.
    """

    def __init__(self, affine: Affine | None, layer: nn.Conv2d, relu: bool) -> None:
        """Compute `layer(affine(x))`, pool it, and apply the ReLU if `relu`.

        The scale and the shift of `affine` are one number each.
        """
        super().__init__()
        self.relu = relu
        scale, shift = (1.0, 0.0) if affine is None else (float(affine.scale), float(affine.shift))
        self.value = -shift / scale  # `affine` maps it to 0, with which the layer pads
        self.kernel, self.padding = layer.kernel_size[0], int(layer.padding[0])
        self.filters = nn.Parameter(layer.weight * scale)
        self.bias = nn.Parameter(
            layer.weight.sum((1, 2, 3)) * shift + (0 if layer.bias is None else layer.bias)
        )
        self.block_filters = nn.Parameter(block_filters(self.filters))
        self.block_bias = nn.Parameter(self.bias.repeat(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `(n, c, h, w)` to `(n, filters, h'/2, w'/2)`; the convolution makes h' by w'."""
        before = self.padding
        height, width = (side + 2 * before - self.kernel + 1 for side in x.shape[2:])
        if height % 2 or width % 2:
            return pooled(
                functional.conv2d(
                    functional.pad(x, (before,) * 4, value=self.value), self.filters, self.bias
                ),
                self.relu,
            )
        best = pooled_blocks(
            x, self.kernel, before, self.value, self.block_filters, self.block_bias, self.relu
        )
        return best.contiguous() if x.dtype is torch.float32 else best


class FlattenPixels(nn.Module):
    """Flatten pixel by pixel, each with all its channels.

    Tensors in channels-last layout need not be moved in memory for that.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map `(n, c, h, w)` to `(n, h * w * c)`."""
        return x.permute(0, 2, 3, 1).flatten(1)


def _copied(network: nn.Module) -> nn.Module:
    """Make a deep copy.

    Tensors that were computed from parameters (by pruning, by weight norm, or as features that code
    keeps) are copied as numbers.
    """
    values = [
        value
        for module in network.modules()
        for held in vars(module).values()
        for value in _held(held)
    ]
    return copy.deepcopy(
        network, {id(value): value.detach().clone() for value in values if not value.is_leaf}
    )


def _held(value: object) -> Iterator[torch.Tensor]:
    """The tensors in an attribute of a module."""
    if isinstance(value, torch.Tensor):
        yield value
    for each in (
        value.values()
        if isinstance(value, dict)
        else value
        if isinstance(value, list | tuple)
        else ()
    ):
        yield from _held(each)


def _apart(layers: list[nn.Module]) -> list[nn.Module]:
    """Copy repeated layers, since what is folded into one place does not belong in another."""
    return [
        copy.deepcopy(layer) if any(layer is other for other in layers[:number]) else layer
        for number, layer in enumerate(layers)
    ]


def _fold_back(layers: list[nn.Module], place: torch.device | None) -> list[nn.Module]:
    """Drop what does nothing, and fold each constant map into the layer just before it.

    Maps are folded into convolutions and linear layers. Behind other layers an `Affine` is left, on
    the device `place` of the network's weights.
    """
    done: list[nn.Module] = []
    flat = False  # whether tensors are (n, features) here, for certain
    for layer in layers:
        if is_plain(layer, nn.Dropout, nn.Dropout2d, nn.Identity):
            continue
        affine = _affine(layer, flat, place)
        before = done[-1] if done else None
        if affine is None:
            done.append(layer)
            flatten = flattens(layer)
            flat = flatten or (flat and is_plain(layer, nn.Linear, nn.ReLU, nn.Tanh))
        elif before is not None and is_plain(before, nn.Conv2d, HalvingConv2d, nn.Linear):
            assert isinstance(before, nn.Conv2d | nn.Linear)
            fold_into(before, affine.scale, affine.shift)
        else:
            done.append(affine)
    return done


def _affine(layer: nn.Module, flat: bool, place: torch.device | None) -> Affine | None:
    """The constant map that a layer is in evaluation mode, if it is one."""
    if is_plain(layer, Normalise):
        assert isinstance(layer, Normalise)
        mean, std = (
            torch.tensor(each, dtype=torch.float64).view(-1) for each in (layer.mean, layer.std)
        )
        scale, shift = (each.float().to(place) for each in (1 / std, -mean / std))
        return Affine(scale, shift)
    if not is_plain(layer, nn.BatchNorm2d, *((nn.BatchNorm1d,) if flat else ())):
        return None
    assert isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d)
    # Without running statistics it normalises each batch by itself.
    return None if layer.running_mean is None else Affine(*constant_map(layer), flat)


def _fold_forward(layers: list[nn.Module], by_frequency: bool) -> list[nn.Module]:
    """Fold each `Affine` into the layer after it where that is exact.

    This also chooses how each convolution is computed.
    """
    done: list[nn.Module] = []
    rest = layers[::-1]
    while rest:
        layer = rest.pop()
        affine = layer if isinstance(layer, Affine) and rest else None
        if affine is not None:
            layer = rest.pop()
        if (
            isinstance(layer, nn.Conv2d)
            and is_plain(layer, nn.Conv2d)
            and layer.groups == 1
            and layer.padding_mode == "zeros"
        ):
            pool = rest[-1] if rest else None
            if isinstance(pool, Pool) and _poolable(affine, layer):
                done.append(PooledConv2d(affine, layer, pool.relu))
                rest.pop()
            elif affine is None and _halves(layer):
                halving = HalvingConv2d(layer.in_channels, layer.out_channels, layer.kernel_size[0])
                halving.weight, halving.bias = layer.weight, layer.bias
                done.append(halving)
            elif by_frequency and SpectralConv2d.suits(layer):
                done.append(
                    ShiftedConv2d(
                        affine or Affine(torch.ones(1), torch.zeros(1)), layer, by_frequency=True
                    )
                )
            else:
                done.append(
                    layer if affine is None else ShiftedConv2d(affine, layer, by_frequency=False)
                )
            continue
        if affine is not None and flattens(layer) and rest and is_plain(rest[-1], nn.Linear):
            done.append(layer)
            affine, layer = Affine(affine.scale, affine.shift, flat=True), rest.pop()
        if (
            affine is not None
            and affine.flat
            and isinstance(layer, nn.Linear)
            and is_plain(layer, nn.Linear)
        ):
            each = layer.in_features // len(affine.scale)  # features that share a channel
            bias = layer.weight @ affine.shift.repeat_interleave(each)
            layer.bias = nn.Parameter(bias if layer.bias is None else bias + layer.bias)
            layer.weight = nn.Parameter(layer.weight * affine.scale.repeat_interleave(each))
            affine = None
        done += [layer] if affine is None else [affine, layer]
    return done


def _flatten_pixels(layers: list[nn.Module]) -> list[nn.Module]:
    """Flatten in memory order before a linear layer, and put its weight columns in that order."""
    done: list[nn.Module] = []
    channels: int | None = None  # of the tensors here, where that is certain
    for layer, after in zip(layers, [*layers[1:], None], strict=True):
        linear = after if isinstance(after, nn.Linear) and is_plain(after, nn.Linear) else None
        if linear and channels and flattens(layer) and linear.in_features % channels == 0:
            columns = linear.weight.view(linear.out_features, channels, -1)
            linear.weight = nn.Parameter(columns.transpose(1, 2).flatten(1))
            done.append(FlattenPixels())
        else:
            done.append(layer)
        if isinstance(layer, ShiftedConv2d):
            channels = layer.layer.out_channels
        elif isinstance(layer, PooledConv2d):
            channels = len(layer.filters)
        elif isinstance(layer, nn.Conv2d) and is_plain(layer, nn.Conv2d, HalvingConv2d):
            channels = layer.out_channels
        elif not is_plain(layer, nn.ReLU, Pool, Affine):
            channels = None
    return done


def flattens(layer: nn.Module) -> bool:
    """Whether a layer brings `(n, ...)` to `(n, features)` and nothing else."""
    return (
        isinstance(layer, nn.Flatten)
        and is_plain(layer, nn.Flatten)
        and (layer.start_dim, layer.end_dim) == (1, -1)
    )


def _poolable(affine: Affine | None, layer: nn.Conv2d) -> bool:
    return suits_blocks(layer) and (
        affine is None or (len(affine.scale) == 1 and float(affine.scale) != 0)
    )


def _halves(layer: nn.Conv2d) -> bool:
    """Whether `networks.named.HalvingConv2d` computes the same, and faster."""
    kernel = layer.kernel_size[0]
    square = (
        layer.kernel_size == (kernel, kernel)
        and layer.padding == (kernel // 2 - 1, kernel // 2 - 1)
        and kernel % 2 == 0
    )
    return (
        square and layer.in_channels <= FEW and layer.stride == (2, 2) and layer.dilation == (1, 1)
    )


def _in_place(layers: list[nn.Module]) -> list[nn.Module]:
    """Let a ReLU overwrite a result that the layer before it does not need again."""
    fresh = nn.Conv2d, HalvingConv2d, ShiftedConv2d, nn.Linear
    return [
        nn.ReLU(inplace=True)
        if number and is_plain(layer, nn.ReLU) and is_plain(layers[number - 1], *fresh)
        else layer
        for number, layer in enumerate(layers)
    ]
