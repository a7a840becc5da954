"""Prepared networks: the same logits and gradients as the network in evaluation mode."""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune, weight_norm

from countermark.attacks import pgd
from countermark.attacks.local import Local
from countermark.errors import CountermarkError
from countermark.fast import (
    Prepared,
    SpectralConv2d,
    dtype_of,
    prepare,
    quick_to_train,
    worth_preparing,
)
from countermark.fast.inside import Quickened
from countermark.networks.named import NETWORKS, HalvingConv2d, Normalise, build


def lived_in(network: nn.Module, seed: int = 0) -> nn.Module:
    """Give every batch norm weights and statistics like those of a trained network.

    Some scales are negative.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and layer.running_mean is not None:
            layer.running_mean.normal_(generator=generator)
            layer.running_var.uniform_(0.2, 3, generator=generator)
            if layer.affine:
                nn.init.normal_(layer.weight, generator=generator)
                nn.init.normal_(layer.bias, generator=generator)
    return network.eval()


def gradient(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    (found,) = torch.autograd.grad(network(x).square().sum(), x)
    return found


def same(
    network: nn.Module, shape: tuple[int, int, int], seed: int = 0, deep: bool = False
) -> Prepared:
    """Check logits and gradients on random images and return what was prepared.

    The network computes in double precision: where a ReLU or a maximum is nearly undecided,
    rounding decides the gradient, and differently on each processor. A `deep` network has so many
    such places that its gradient is compared with that of a copy that computes in double precision
    as well.
    """
    x = torch.rand(5, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    prepared = prepare(network.double())
    torch.testing.assert_close(prepared(x), network(x).float(), rtol=1e-4, atol=2e-5)
    wanted = gradient(network, x)
    found = gradient(prepare(network, torch.float64) if deep else prepared, x)
    torch.testing.assert_close(
        found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()) + 1e-7
    )
    return prepared


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 12, 16), (2, 9, 15)])
@pytest.mark.parametrize("name", NETWORKS)
def test_our_networks_keep_their_logits(name: str, shape: tuple[int, int, int]) -> None:
    same(lived_in(build(name, shape, 10, seed=1)), shape, deep=name in ("resnet", "narrow"))


def test_nothing_but_cheap_layers_is_left_of_the_papers_network() -> None:
    prepared = same(lived_in(build("paper", (1, 28, 28), 10, seed=1)), (1, 28, 28))
    kinds = [type(layer).__name__ for layer in prepared.layers]
    assert kinds == ["PooledConv2d", "ShiftedConv2d", "Pool", "Flatten", "Linear", "ReLU", "Linear"]


def twice(width: int) -> list[nn.Module]:
    """Layers that stand in more than one place of a network."""
    relu, convolution = nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
    return [convolution, nn.BatchNorm2d(width), relu, convolution, nn.BatchNorm2d(width), relu]


_BLOCKS = {
    "convolution": lambda c, n: [nn.Conv2d(c, n, 3, padding=1)],
    "without bias": lambda c, n: [nn.Conv2d(c, n, 3, padding=1, bias=False)],
    "wide": lambda c, n: [nn.Conv2d(c, n, 5, padding=2)],
    "dilated": lambda c, n: [nn.Conv2d(c, n, 3, padding=2, dilation=2)],
    "circular": lambda c, n: [nn.Conv2d(c, n, 3, padding=1, padding_mode="circular")],
    "same": lambda c, n: [nn.Conv2d(c, n, 3, padding="same")],
    "halving": lambda c, n: [HalvingConv2d(c, n), nn.Upsample(scale_factor=2)],
    "batch norm": lambda c, n: [nn.Conv2d(c, n, 1), nn.BatchNorm2d(n)],
    "bare batch norm": lambda c, n: [
        nn.Conv2d(c, n, 1),
        nn.ReLU(),
        nn.BatchNorm2d(n, affine=False),
    ],
    "batch's own norm": lambda c, n: [
        nn.Conv2d(c, n, 1),
        nn.BatchNorm2d(n, track_running_stats=False),
    ],
    "two norms": lambda c, n: [nn.Conv2d(c, n, 1), nn.Tanh(), nn.BatchNorm2d(n), nn.BatchNorm2d(n)],
    "unknown": lambda c, n: [
        nn.Conv2d(c, n, 1),
        nn.GroupNorm(1, n),
        nn.BatchNorm2d(n),
        nn.Softplus(),
    ],
    "relu and pool": lambda c, n: [
        nn.Conv2d(c, n, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Upsample(scale_factor=2),
    ],
    "pool and relu": lambda c, n: [
        nn.Conv2d(c, n, 5, padding=2),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Upsample(scale_factor=2),
    ],
    "other pool": lambda c, n: [nn.Conv2d(c, n, 1), nn.MaxPool2d(3, stride=1, padding=1)],
    "dropout": lambda c, n: [nn.Conv2d(c, n, 1), nn.Dropout(0.5), nn.Identity()],
    "the same again": lambda c, n: [nn.Conv2d(c, n, 1), *2 * [nn.Sequential(*twice(n))]],
    "inner": lambda c, n: [
        nn.Sequential(nn.Conv2d(c, n, 1), nn.ReLU(), nn.Sequential(nn.BatchNorm2d(n)))
    ],
}


@settings(max_examples=60, deadline=None)
@given(
    blocks=st.lists(st.sampled_from(sorted(_BLOCKS)), min_size=1, max_size=4),
    channels=st.sampled_from([1, 3, 6]),
    normalised=st.sampled_from(["no", "one", "each"]),
    end=st.sampled_from(["linear", "norm before", "norm between", "rows"]),
    seed=st.integers(0, 1000),
)
def test_random_networks_keep_their_logits(
    blocks: list[str], channels: int, normalised: str, end: str, seed: int
) -> None:
    torch.manual_seed(seed)
    each = [0.2 + 0.1 * number for number in range(channels)]
    layers: list[nn.Module] = {
        "no": [],
        "one": [Normalise(0.3, 0.6)],
        "each": [Normalise(each, each[::-1])],
    }[normalised]
    width = channels
    for block in blocks:
        layers += _BLOCKS[block](width, 4)
        width = 4
    flat = width * 8 * 8
    layers += {
        "linear": lambda: [nn.Flatten(), nn.Linear(flat, 5)],
        "norm before": lambda: [
            nn.BatchNorm2d(width),
            nn.Dropout(),
            nn.Flatten(),
            nn.Linear(flat, 5, bias=False),
        ],
        "norm between": lambda: [
            nn.Flatten(),
            nn.Linear(flat, 6),
            nn.BatchNorm1d(6),
            nn.ReLU(),
            nn.BatchNorm1d(6),
            nn.Linear(6, 5),
        ],
        "rows": lambda: [
            nn.BatchNorm2d(width),
            nn.Linear(8, 4),
            nn.Flatten(),
            nn.Linear(flat // 2, 5),
        ],
    }[end]()
    same(lived_in(nn.Sequential(*layers), seed), (channels, 8, 8), seed)


@pytest.mark.parametrize("size", [8, 9, 10, 11])
@pytest.mark.parametrize("kernel", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_pooled_convolutions_of_any_size(size: int, kernel: int, padding: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        Normalise(0.5, 0.5),
        nn.Conv2d(2, 3, kernel, padding=padding),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(2),
        nn.Tanh(),
    )
    same(network, (2, size, size))


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(5, 17),
    width=st.integers(5, 17),
    kernel=st.sampled_from([5, 7, 9]),
    channels=st.integers(16, 20),
    filters=st.integers(16, 24),
    images=st.integers(1, 4),
)
def test_convolutions_by_frequency_are_convolutions(
    height: int, width: int, kernel: int, channels: int, filters: int, images: int
) -> None:
    torch.manual_seed(height)
    layer = nn.Conv2d(channels, filters, kernel, padding=kernel // 2, bias=False).double()
    assert SpectralConv2d.suits(layer)
    x = torch.randn(images, channels, height, width, dtype=torch.float64)
    quick = SpectralConv2d(layer.weight.detach(), None).requires_grad_(False)
    torch.testing.assert_close(quick(x), layer(x))
    torch.testing.assert_close(gradient(quick, x), gradient(layer, x))
    transposed = (
        x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    )  # as it comes from such a convolution
    torch.testing.assert_close(quick(transposed), layer(x))


@pytest.mark.parametrize("kernel", [2, 4, 6])
@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("normalised", [False, True])
def test_convolutions_with_stride_two_are_halved_where_that_is_the_same(
    kernel: int, padding: int, normalised: bool
) -> None:
    first = [Normalise(0.3, 0.6)] if normalised else []
    prepared = same(
        nn.Sequential(
            *first, nn.Conv2d(2, 5, kernel, stride=2, padding=padding), nn.ReLU(), nn.Flatten()
        ),
        (2, 12, 16),
    )
    assert isinstance(prepared.layers[0], HalvingConv2d) == (
        padding == kernel // 2 - 1 and not normalised
    )


def test_wide_convolutions_go_by_frequency_and_others_do_not() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.Tanh(),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 20, 5, padding=2),
        nn.Tanh(),
        nn.Conv2d(20, 16, 5, padding=1),
        nn.Conv2d(16, 16, 7, padding=3),
        nn.Flatten(),
    )
    prepared = same(lived_in(network), (3, 14, 18))
    kinds = [isinstance(layer, SpectralConv2d) for layer in prepared.modules()]
    assert sum(kinds) == 2
    same(lived_in(network), (3, 40, 36))  # too large for it: computed as ever
    assert not any(
        isinstance(layer, SpectralConv2d) for layer in prepare(network, torch.bfloat16).modules()
    )


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 12, 16)])
def test_a_network_of_quick_layers_trains_alike(shape: tuple[int, int, int]) -> None:
    network = lived_in(build("paper", shape, 10, seed=1)).double()
    for layer in network.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0  # masks are drawn in the order of memory
    twin = copy.deepcopy(network)
    quick = quick_to_train(twin)
    assert {id(parameter) for parameter in quick.parameters()} == {
        id(parameter) for parameter in twin.parameters()
    }
    x, y = torch.rand(6, *shape, dtype=torch.float64), torch.arange(6)
    for trained, answers in ((network, network.train()(x)), (twin, quick.train()(x))):
        functional.cross_entropy(answers, y).backward()
        torch.optim.SGD(trained.parameters(), lr=0.1).step()
    for (name, value), other in zip(
        network.state_dict().items(), twin.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, other, msg=name)


def test_networks_with_nothing_to_hasten_come_back() -> None:
    for name in ("small", "wide", "surrogate"):
        network = build(name, (1, 28, 28), 10, seed=1)
        assert quick_to_train(network) is network
    own = nn.Linear(3, 2)
    assert quick_to_train(own) is own


def test_a_layer_that_stands_in_several_places_stays_in_all() -> None:
    pool, relu = nn.MaxPool2d(2), nn.ReLU()
    body = [
        nn.Conv2d(1, 8, 3, padding=1),
        relu,
        pool,
        nn.Conv2d(8, 8, 5, padding=2),
        relu,
        pool,
        nn.Flatten(),
        nn.Linear(128, 9),
        relu,
    ]
    network = nn.Sequential(*body, nn.Linear(9, 10))
    same(network, (1, 16, 16))
    x = torch.rand(4, 1, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(quick_to_train(network)(x), network(x), rtol=1e-4, atol=2e-5)
    own = nn.Sequential(*twice(4), nn.Flatten())
    same(lived_in(own), (4, 8, 8))


def test_a_prepared_copy_is_not_prepared_for_another_precision() -> None:
    prepared = prepare(build("paper", (1, 8, 8), 10, seed=0))
    prepared(torch.rand(2, 1, 8, 8))
    with pytest.raises(CountermarkError, match="prepare the network itself"):
        prepare(prepared, torch.bfloat16)


def test_layers_that_hooks_or_subclasses_changed_stay_as_they_are() -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    hooked = nn.Conv2d(4, 4, 3)
    hooked.register_forward_hook(lambda layer, given, result: result + 1)
    pruned = prune.l1_unstructured(nn.Conv2d(4, 4, 3), "weight", 0.5)
    network = nn.Sequential(
        Doubled(1, 4, 3),
        nn.BatchNorm2d(4),
        hooked,
        nn.BatchNorm2d(4),
        pruned,
        nn.BatchNorm2d(4),
        nn.Flatten(),
    )
    same(lived_in(network), (1, 12, 12))


def test_the_callers_network_does_not_change() -> None:
    network = lived_in(build("paper", (1, 8, 8), 10, seed=0)).train()
    before = copy.deepcopy(network.state_dict())
    prepared = prepare(network)
    prepared.train()
    pgd(
        prepared,
        torch.rand(4, 1, 8, 8),
        torch.zeros(4, dtype=torch.int64),
        epsilon=0.1,
        steps=2,
        step_size=0.1,
    )
    assert network.training
    assert all(layer.training for layer in network.modules())
    assert not any(layer.training for layer in prepared.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert prepare(prepared) is prepared


def test_a_pools_gradient_goes_to_the_first_of_equal_pixels() -> None:
    x = torch.randint(0, 3, (50, 2, 4, 4), generator=torch.Generator().manual_seed(0)).float() - 1
    network = nn.Sequential(nn.MaxPool2d(2), nn.ReLU())
    torch.testing.assert_close(gradient(prepare(network), x), gradient(network, x))


def test_bf16_agrees_with_float32() -> None:
    shape = (1, 12, 16)
    x = torch.rand(200, *shape, generator=torch.Generator().manual_seed(1))
    halves = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.Tanh(), nn.Flatten(2), nn.Flatten(), nn.Linear(6 * 10 * 14, 10)
    )
    named = [build(name, shape, 10, seed=2) for name in NETWORKS]
    for network in (
        lived_in(one) for one in (*named, halves, nn.Sequential(nn.Flatten(), nn.Linear(192, 10)))
    ):
        wanted, found = network(x).detach(), prepare(network, torch.bfloat16)(x)
        assert found.dtype is torch.float32
        assert float((found - wanted).abs().max()) < 0.05 * float(wanted.abs().max())
        one, other = gradient(network, x), gradient(prepare(network, torch.bfloat16), x)
        assert float(functional.cosine_similarity(one.flatten(), other.flatten(), dim=0)) > 0.98


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 12, 16)])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_and_its_copies_take_an_empty_batch(
    name: str, shape: tuple[int, int, int]
) -> None:
    """Gradients of the input pass through as well, and one image more is computed as ever."""
    network = lived_in(build(name, shape, 7, seed=1))
    for model in (
        network,
        quick_to_train(network),
        prepare(network),
        prepare(network, torch.bfloat16),
    ):
        x = torch.empty(0, *shape, requires_grad=True)
        logits = model(x)
        assert logits.shape == (0, 7)
        (found,) = torch.autograd.grad(logits.sum(), x)
        assert found.shape == x.shape
        assert model(torch.rand(1, *shape)).shape == (1, 7)


def _other(
    layer: nn.Module, before: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that computes something other than the layer does.

    A copy of the layer still calls the layer itself, in whichever precision the layer has.
    """
    return lambda x: 1 - before(x.to(dtype_of(layer, x.dtype))).to(x.dtype)


def _patched(layer: nn.Module) -> None:
    layer.forward = _other(layer, layer.forward)  # type: ignore[method-assign]


def _as_accelerate_does(layer: nn.Module) -> None:
    layer._old_forward = layer.forward  # type: ignore[assignment]

    def forward(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return _other(module, module._old_forward)(x)  # type: ignore[arg-type]

    layer.forward = functools.update_wrapper(functools.partial(forward, layer), layer._old_forward)  # type: ignore[method-assign]


def _called(layer: nn.Module) -> None:
    layer._call_impl = _other(layer, layer._call_impl)  # type: ignore[method-assign]


def _subclassed(layer: nn.Module) -> None:
    layer.__class__ = type(
        "Other",
        (type(layer),),
        {"__call__": lambda self, x: 1 - type(self).__mro__[1].__call__(self, x)},
    )


_CHANGES = {
    "forward": _patched,
    "accelerate": _as_accelerate_does,
    "call": _called,
    "subclass": _subclassed,
    "hook": lambda layer: layer.register_forward_hook(lambda *parts: 1 - parts[2]),
}
_PLACES = {
    "convolution": [1],
    "pool": [2],
    "relu": [3],
    "norm": [4],
    "flatten": [7],
    "linear": [8],
    "inner": [0],
    "whole": [],
}


def changeable() -> nn.Sequential:
    torch.manual_seed(0)
    first = nn.Sequential(Normalise(0.4, 0.5))
    layers = [
        first,
        nn.Conv2d(1, 16, 5, padding=2),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.BatchNorm2d(16),
        nn.Conv2d(16, 16, 5, padding=2),
    ]
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(16 * 4 * 4, 5))


@pytest.mark.parametrize("change", _CHANGES)
@pytest.mark.parametrize("place", _PLACES)
def test_a_layer_that_computes_something_else_is_not_taken_apart(place: str, change: str) -> None:
    """Whatever hangs on a layer or on the whole network, its copies compute what it computes."""
    network, plain = lived_in(changeable()), lived_in(changeable())
    layer: nn.Module = network
    for number in _PLACES[place]:
        layer = network[number]
    _CHANGES[change](layer)
    x = torch.rand(4, 1, 8, 8)
    assert not torch.allclose(network(x), plain(x), atol=1e-2)
    torch.testing.assert_close(quick_to_train(network)(x), network(x), rtol=1e-4, atol=2e-5)
    with torch.no_grad():
        torch.testing.assert_close(
            Local(prepare(network), x).logits, network(x), rtol=1e-4, atol=2e-5
        )
    same(network, (1, 8, 8))


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize(
    "wrap", [weight_norm, parametrizations.weight_norm, parametrizations.spectral_norm]
)
def test_weights_that_are_computed_are_computed_in_copies_too(wrap: object) -> None:
    network = lived_in(changeable())
    for number in (1, 5, 8):
        wrap(network[number])  # type: ignore[operator]
    same(network.eval(), (1, 8, 8))


def test_a_hook_around_every_module_runs_around_every_layer() -> None:
    network, seen = lived_in(changeable()), []
    handle = nn.modules.module.register_module_forward_hook(
        lambda layer, *_: seen.append(type(layer))
    )
    try:
        prepare(network)(torch.rand(1, 1, 8, 8))
    finally:
        handle.remove()
    assert {nn.Conv2d, nn.MaxPool2d, nn.BatchNorm2d} <= set(seen)


def test_quantised_weights_are_left_alone() -> None:
    """Weights of a tensor subclass compute what they like; no batch norm is folded into them."""
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    network = lived_in(
        nn.Sequential(
            nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 5)
        )
    )
    quantised, x = copy.deepcopy(network), torch.rand(3, 1, 8, 8)
    torchao.quantize_(quantised, torchao.Int8DynamicActivationInt8WeightConfig())
    with torch.no_grad():
        torch.testing.assert_close(prepare(quantised)(x), quantised(x), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["small", "clipped", "paper"])
def test_a_network_of_any_precision_is_prepared(name: str, dtype: torch.dtype) -> None:
    """The copy computes in float32, whatever precision the network and the images have."""
    exact = lived_in(build(name, (1, 8, 8), 10, seed=1))
    x = torch.rand(5, 1, 8, 8)
    network = copy.deepcopy(exact).to(dtype)
    prepared = prepare(network)
    scale = float(exact(x).detach().abs().max())
    for images in (x, x.to(dtype)):
        logits = prepared(images)
        assert logits.dtype is torch.float32
        torch.testing.assert_close(
            logits, exact(x), rtol=0, atol=0.05 * scale if dtype.itemsize < 4 else 1e-4 * scale
        )
    assert all(parameter.dtype is dtype for parameter in network.parameters())


def test_what_is_folded_lies_where_the_network_lies() -> None:
    """A normaliser holds no tensor and so no device; the device without memory stands for a GPU."""
    layers = [
        Normalise(0.4, 0.5),
        nn.Conv2d(2, 5, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(80, 3),
    ]
    network = nn.Sequential(*layers).to("meta")
    assert prepare(network)(torch.rand(2, 2, 8, 8, device="meta")).shape == (2, 3)


# Networks that compute by code of their own


class Block(nn.Module):
    """Residual blocks as users write them, one kind after another."""

    def __init__(self, kind: str, width: int) -> None:
        super().__init__()
        self.kind = kind
        groups = 2 if kind == "groups" else 1
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=kind == "bias", groups=groups)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width, affine=kind != "bare")
        self.pool, self.up, self.dropout = (
            nn.MaxPool2d(2),
            nn.Upsample(scale_factor=2),
            nn.Dropout(0.5),
        )
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width, 1), nn.Sigmoid())
        self.kept: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor, scale: float | None = None) -> torch.Tensor:
        relu, kind = functional.relu, self.kind
        if kind == "before":  # pre-activation
            return x + self.conv2(relu(self.norm2(self.conv1(relu(self.norm1(x))))))
        if kind == "one norm twice":
            return x + self.norm1(self.conv2(relu(self.norm1(self.conv1(x)))))
        if kind == "one convolution twice":
            return x + self.norm2(self.conv1(relu(self.norm1(self.conv1(x)))))
        if kind == "looks":  # at the numbers: no trace follows it
            x = x if float(x.detach().abs().max()) >= 0 else -x
        if kind == "asks for a tensor" and not isinstance(x, torch.Tensor):
            return self.norm1(self.conv1(x))  # what a trace sees, and nobody else
        if kind == "counts":
            assert len(x) >= 0
        inner = self.conv1(x)
        if kind in ("used twice", "asks for a tensor"):
            return x + self.norm1(inner) + inner
        y = relu(self.norm1(inner))
        if kind == "keeps":
            self.kept = [y]
        if kind == "pool":
            y = self.up(self.pool(y))
        if kind == "dropout":
            y = functional.dropout(self.dropout(y), 0.5, self.training)
        if kind == "another argument" and scale is not None:
            return self.norm2(y)
        y = self.norm2(self.conv2(y))
        if kind == "gate":
            y = y * self.gate(y)
        if kind == "weights":  # of a layer, used by hand as well
            y = y + functional.conv2d(x, self.conv2.weight, padding=1)
        if kind == "statistics":
            y = y + self.norm2.running_mean.mean()
        return y + x if kind == "open" else relu(y + x)


_KINDS = (
    "after",
    "before",
    "bias",
    "bare",
    "groups",
    "open",
    "pool",
    "dropout",
    "gate",
    "keeps",
    "another argument",
)
_ODD = (
    "counts",
    "one norm twice",
    "one convolution twice",
    "used twice",
    "looks",
    "asks for a tensor",
    "weights",
    "statistics",
)


class Residual(nn.Module):
    def __init__(self, kinds: list[str], channels: int, head: str) -> None:
        super().__init__()
        self.head = head
        self.first, self.norm = nn.Conv2d(channels, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.blocks = nn.Sequential(*(Block(kind, 4) for kind in kinds))
        self.last = nn.Linear(4 if head == "mean" else 4 * 64, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(functional.relu(self.norm(self.first(x))))
        if self.head == "mean":
            return self.last(x.mean((2, 3)))
        return self.last(x.view(x.size(0), -1) if self.head == "view" else torch.flatten(x, 1))


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(_KINDS + _ODD), min_size=1, max_size=4),
    channels=st.sampled_from([1, 3]),
    head=st.sampled_from(["mean", "view", "flatten"]),
    wrapped=st.sampled_from(["alone", "normalised", "in pieces"]),
    seed=st.integers(0, 1000),
)
def test_random_residual_networks_keep_their_logits(
    kinds: list[str], channels: int, head: str, wrapped: str, seed: int
) -> None:
    torch.manual_seed(seed)
    network: nn.Module = Residual(kinds, channels, head)
    if wrapped == "normalised":
        network = nn.Sequential(Normalise((0.3,) * channels, 0.6), network)
    if wrapped == "in pieces":
        network = nn.Sequential(
            network.first, network.norm, *network.blocks, nn.Flatten(), nn.Linear(256, 5)
        )
    same(lived_in(network, seed), (channels, 8, 8), seed, deep=True)


def folded(network: nn.Module) -> list[int]:
    return [layer.folded for layer in prepare(network).layers if isinstance(layer, Quickened)]


@pytest.mark.parametrize("kind", _KINDS)
def test_batch_norms_behind_convolutions_are_folded(kind: str) -> None:
    network = lived_in(Residual([kind], 3, "mean"))
    assert folded(network) == [2 if kind == "before" else 3]
    assert worth_preparing(network)
    prepared = same(network, (3, 8, 8), deep=True)
    left = [layer for layer in prepared.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(left) == (
        1 if kind == "before" else 0
    )  # the copy is what computes, and the network itself is given up


@pytest.mark.parametrize(
    ("kind", "norms"),
    [
        ("one norm twice", 1),
        ("one convolution twice", 1),
        ("used twice", 1),
        ("weights", 2),
        ("statistics", 2),
    ],
)
def test_what_would_change_something_else_is_not_folded(kind: str, norms: int) -> None:
    network = lived_in(Residual([kind], 3, "mean"))
    assert folded(network) == [norms]
    prepared = same(network, (3, 8, 8), deep=True)
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in prepared.modules()) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_copy_that_computes_something_else_is_given_up(dtype: torch.dtype) -> None:
    """A trace is misled by code that asks for the kind of its input; the first images show it."""
    network = lived_in(Residual(["asks for a tensor"], 3, "mean")).double()
    assert folded(network) == [2]
    prepared = prepare(network, dtype)
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64)
    assert prepared(x[:0]).shape == (0, 5)  # nothing is compared on no images
    torch.testing.assert_close(
        prepared(x), network(x).float(), rtol=1e-4, atol=0.1 if dtype is torch.bfloat16 else 2e-5
    )
    assert not any(isinstance(layer, nn.Identity) for layer in prepared.modules())


def test_code_that_cannot_be_followed_runs_as_it_is() -> None:
    network = lived_in(Residual(["looks"], 3, "view"))
    assert folded(network) == [0]
    assert not worth_preparing(network)
    same(network, (3, 8, 8), deep=True)


@pytest.mark.parametrize("head", ["mean", "view", "flatten"])
def test_a_copy_in_bf16_runs_code_that_views_memory(head: str) -> None:
    network = lived_in(Residual(["after", "before"], 3, head))
    x = torch.rand(20, 3, 8, 8)
    wanted, found = network(x).detach(), prepare(network, torch.bfloat16)(x)
    assert float((found - wanted).abs().max()) < 0.05 * float(wanted.abs().max())


@pytest.mark.parametrize("change", _CHANGES)
@pytest.mark.parametrize("place", ["conv1", "norm1", "norm2", "gate", ""])
def test_a_layer_inside_that_computes_something_else_is_not_folded(place: str, change: str) -> None:
    torch.manual_seed(5)  # every change moves a logit by 0.14 or more; by chance it may be less
    network, plain = (lived_in(Residual(["gate"], 3, "mean")) for _ in range(2))
    plain.load_state_dict(network.state_dict())
    block = network.blocks[0]
    _CHANGES[change](block.get_submodule(place))
    x = torch.rand(4, 3, 8, 8)
    assert not torch.allclose(network(x), plain(x), atol=1e-3)
    same(network, (3, 8, 8), deep=True)


def test_parametrised_weights_inside_stay() -> None:
    network = lived_in(Residual(["after"], 3, "mean"))
    parametrizations.weight_norm(network.blocks[0].conv1)
    assert folded(network) == [2]
    same(network.eval(), (3, 8, 8), deep=True)


def test_what_a_network_keeps_of_its_computation_is_its_own() -> None:
    network = lived_in(Residual(["keeps"], 3, "mean"))
    network(torch.rand(2, 3, 8, 8))
    before = network.blocks[0].kept[0]
    prepare(network)(torch.rand(3, 3, 8, 8))
    assert network.blocks[0].kept[0] is before
