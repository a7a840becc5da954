"""Networks by name."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from countermark.attacks import pgd
from countermark.errors import CountermarkError
from countermark.networks.named import NETWORKS, Clip, HalvingConv2d, Normalise, build


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    "shape", [(1, 28, 28), (1, 8, 8), (3, 32, 32), (1, 4, 4), (1, 9, 15), (3, 30, 33), (4, 65, 130)]
)
def test_every_network_maps_pixels_to_logits(name: str, shape: tuple[int, int, int]) -> None:
    network = build(name, shape, 10, seed=0).eval()
    assert network(torch.rand(3, *shape)).shape == (3, 10)


@pytest.mark.parametrize(("name", "weights"), [("resnet", 11_172_170), ("narrow", 308_378)])
def test_the_residual_networks_have_their_weights_whatever_the_size(
    name: str, weights: int
) -> None:
    for side in (8, 32, 63):
        assert (
            sum(parameter.numel() for parameter in build(name, (3, side, side), 10).parameters())
            == weights
        )


@pytest.mark.parametrize(
    ("side", "seen"), [(8, 8), (63, 63), (64, 32), (127, 64), (128, 32), (224, 56)]
)
def test_large_images_are_reduced_before_the_first_stage(side: int, seen: int) -> None:
    first = build("narrow", (3, side, side), 10)[0]
    assert first(torch.rand(1, 3, side, side)).shape[2:] == (seen, seen)


def test_the_narrow_network_is_the_one_that_was_measured() -> None:
    """The layers are computed by hand, in the paper's order.

    Batch norm and ReLU stand before each convolution.
    """
    network = build("narrow", (3, 16, 16), 7, seed=1).eval()
    x = torch.rand(2, 3, 16, 16)
    features = functional.conv2d(x, network[0].weight, padding=1)
    for number in (1, 2, 3, 4):
        block = network[number]
        stride = 1 if number == 1 else 2
        active = functional.relu(block.norm1(features))
        inner = functional.relu(
            block.norm2(functional.conv2d(active, block.conv1.weight, stride=stride, padding=1))
        )
        shortcut = (
            features
            if number == 1
            else functional.conv2d(active, block.shortcut.weight, stride=stride)
        )
        features = shortcut + functional.conv2d(inner, block.conv2.weight, padding=1)
    logits = network[9](functional.relu(network[5](features)).mean((2, 3)))
    torch.testing.assert_close(network(x), logits)


def test_the_papers_network_has_the_papers_layers() -> None:
    shapes = [
        tuple(parameter.shape)
        for name, parameter in build("paper", (1, 28, 28), 10).named_parameters()
        if parameter.dim() > 1
    ]
    assert shapes == [(32, 1, 5, 5), (64, 32, 5, 5), (512, 3136), (10, 512)]


def test_the_normaliser_is_a_layer() -> None:
    network = build("paper", (1, 28, 28), 10).eval()
    assert torch.equal(network[0](torch.tensor([0.0, 0.5, 1.0])), torch.tensor([-1.0, 0.0, 1.0]))


def test_a_normaliser_has_one_number_or_one_a_channel() -> None:
    x = torch.rand(2, 3, 4, 5)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    one_by_one = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    torch.testing.assert_close(Normalise(mean, std)(x), one_by_one)
    torch.testing.assert_close(Normalise(0.1, std)(x)[:, 2], (x[:, 2] - 0.1) / 0.7)
    half = Normalise(mean, std)(x.half())
    assert half.dtype is torch.float16


def test_a_normaliser_by_channel_takes_nothing_from_the_host() -> None:
    """No tensor is made on the host during the forward pass.

    Such a tensor shows as a constant of the trace, and its copy to a GPU fits into no CUDA graph.
    """
    traced = make_fx(Normalise((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))(torch.rand(2, 3, 4, 4))
    assert not dict(traced.named_buffers())


def test_the_clip_clips_and_its_gradient_does_not() -> None:
    layer, x = Clip(0.25, 0.75), torch.tensor([0.0, 0.25, 0.375, 0.75, 1.0], requires_grad=True)
    clipped = layer(x)
    assert torch.equal(clipped, torch.tensor([0.0, 0.0, 0.25, 1.0, 1.0]))
    (gradient,) = torch.autograd.grad(clipped.sum(), x)
    assert torch.equal(gradient, torch.full((5,), 2.0))


def test_an_attack_finds_its_way_back_into_the_clips_range() -> None:
    """PGD gets from the far end of each pixel's box, where the clip is flat, to the other end.

    The other end is the worst of all perturbations.
    """
    model = nn.Sequential(Clip(0.3, 0.7), nn.Flatten(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[2].weight.copy_(torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]))
    x, y = torch.tensor([[[[0.1, 0.2, 0.4, 0.45]]]]), torch.zeros(1, dtype=torch.int64)
    away = torch.zeros_like(x)
    for goal, start, end in ((y, x + 0.3, x - 0.3), (1 - y, x - 0.3, x + 0.3)):
        found = pgd(model, x, goal, epsilon=0.3, steps=7, step_size=0.1, start=start)
        torch.testing.assert_close(found, torch.maximum(end, away))


@pytest.mark.parametrize("size", [(8, 12), (7, 12), (8, 11), (9, 13)])
@pytest.mark.parametrize(("kernel", "padding"), [(4, 1), (8, 3)])
def test_halving_convolution_is_the_ordinary_one(
    kernel: int, padding: int, size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    layer, x = HalvingConv2d(3, 5, kernel), torch.rand(2, 3, *size, requires_grad=True)
    ordinary = functional.conv2d(x, layer.weight, layer.bias, stride=2, padding=padding)
    torch.testing.assert_close(layer(x), ordinary)
    (ours,) = torch.autograd.grad(layer(x).square().sum(), x)
    (theirs,) = torch.autograd.grad(ordinary.square().sum(), x)
    torch.testing.assert_close(ours, theirs)


def test_seed_decides_the_weights_and_leaves_torchs_generator_alone() -> None:
    state = torch.random.get_rng_state()
    first, second, third = (build("small", (1, 8, 8), 10, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first[0].weight, second[0].weight)
    assert not torch.equal(first[0].weight, third[0].weight)


@pytest.mark.parametrize(
    ("name", "shape", "classes"),
    [
        ("nothing", (1, 8, 8), 10),
        ("small", (1, 3, 8), 10),
        ("small", (1, 8, 8), 1),
        ("small", (1, 1 << 20, 1 << 20), 10),
        ("small", (0, 8, 8), 10),
    ],
)
def test_unknown_names_and_impossible_shapes_are_refused(
    name: str, shape: tuple[int, int, int], classes: int
) -> None:
    with pytest.raises(CountermarkError):
        build(name, shape, classes)


def test_every_public_name_resolves() -> None:
    import countermark

    assert all(getattr(countermark, name) is not None for name in countermark.__all__)
    with pytest.raises(AttributeError):
        _ = countermark.nothing
