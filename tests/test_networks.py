"""Networks and weights that the user brings."""

import functools
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from countermark.errors import CountermarkError
from countermark.named_code import called, imported, is_code
from countermark.networks.named import Normalise, build
from countermark.networks.source import check_network, inner, open_network, place_of
from countermark.networks.weights import load_weights
from countermark.threat import Threat

SHAPE = (3, 8, 8)


class Net(nn.Module):
    """A small residual network with batch norm, as users write them."""

    def __init__(self, in_channels: int = 3, num_classes: int = 5, width: int = 6) -> None:
        super().__init__()
        self.conv, self.norm = (
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.second, self.last = (
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.norm(self.conv(x)))
        x = functional.relu(x + self.last(self.second(x)))
        return self.head(x.mean((2, 3)))


def fails(action: Callable[[], Any]) -> str:
    with pytest.raises(CountermarkError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) > 30
    return message


def asked(
    place: Any, classes: int = 5, shape: tuple[int, int, int] = SHAPE, **options: Any
) -> nn.Module:
    network = open_network(place, shape, classes, **options)
    assert network(torch.rand(2, *shape)).shape == (2, classes)
    return network


# What comes in


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the user's own code."""
    folder = tmp_path / "work"
    (folder / "shop").mkdir(parents=True)
    (folder / "shop" / "__init__.py").write_text("")
    (folder / "shop" / "models.py").write_text(
        "from torch import nn\n"
        "def make(shape, classes):\n"
        "    return nn.Sequential(nn.Flatten(), "
        "nn.Linear(shape[0] * shape[1] * shape[2], classes))\n"
        "class Nets:\n"
        "    @staticmethod\n"
        "    def linear():\n"
        "        return make((3, 8, 8), 5)\n"
        "ready = make((3, 8, 8), 5)\n"
        "number = 3\n"
    )
    (folder / "shop" / "needs.py").write_text("import a_module_that_is_not_there\n")
    (folder / "shop" / "broken.py").write_text("x = 1\nraise ValueError('no\\ngood')\n")
    (folder / "shop" / "leaves.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "shop"]:
        monkeypatch.delitem(sys.modules, name)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "shop"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "place", ["shop.models:make", "shop.models:Nets.linear", "shop.models:ready"]
)
def test_code_of_the_working_folder_is_found(shop: Path, place: str) -> None:
    asked(place)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("shp.models:make", "run the command in the folder that holds shp"),
        ("shop.model:make", "there is no module 'shop.model'"),
        ("shop.needs:make", "needs the module 'a_module_that_is_not_there'"),
        ("shop.broken:make", r"ValueError: no good \(broken.py, line 2\)"),
        ("shop.leaves:make", "SystemExit: 3"),
        ("shop.models:mak", "it has make, Nets"),
        ("shop.models:number", "no function that makes a network"),
        ("smal", "choose one of small, wide"),
        ("shop models:make", "choose one of"),
    ],
)
def test_code_that_is_not_there_is_one_line(shop: Path, place: str, said: str) -> None:
    assert re.search(said, fails(lambda: open_network(place, SHAPE, 5)))


@pytest.mark.parametrize(
    ("shape", "classes", "seed", "said"),
    [
        ((3, 32), 10, 0, "shape is"),
        ("332", 10, 0, "shape is"),
        ((3, 0, 32), 10, 0, "shape is"),
        ((3, 32, 32), "2", 0, "classes is"),
        ((3, 32, 32), 1, 0, "classes is"),
        ((3, 32, 32), 10, "a", "seed is"),
    ],
)
@pytest.mark.parametrize("place", ["narrow", nn.Flatten()])
def test_what_is_no_shape_number_of_classes_or_seed_is_one_line(
    place: object, shape: object, classes: object, seed: object, said: str
) -> None:
    assert said in fails(lambda: open_network(place, shape, classes, seed=seed))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("place", "code"),
    [
        ("a:b", True),
        ("a.b:c.d", True),
        ("small", False),
        ("C:\\x", False),
        ("a/b:c", False),
        (":c", False),
        ("a:", False),
        ("a:b:c", False),
    ],
)
def test_what_names_code(place: str, code: bool) -> None:
    assert is_code(place) is code
    if not code:
        fails(lambda: imported(place))


def line(shape: tuple[int, int, int], classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1] * shape[2], classes))


@pytest.mark.parametrize(
    "make",
    [
        line,
        lambda shape, classes: line(shape, classes),
        lambda s, k: line(s, k),
        lambda s, k, extra=3: line(s, k),
        lambda *arguments: line(*arguments),
        lambda classes, shape: line(shape, classes),
        lambda *, num_classes, image_shape: line(image_shape, num_classes),
        lambda pretrained=False, num_classes=1000: line(SHAPE, num_classes),
        lambda: line(SHAPE, 5),
        lambda width=3: line(SHAPE, 5),
        functools.partial(line, classes=5),
        Net,
        lambda **options: line(SHAPE, options.get("classes", 5)),
    ],
)
def test_a_function_is_called_with_what_it_asks_for(make: Callable[..., nn.Module]) -> None:
    asked(make)


def test_a_function_that_wants_something_else_is_refused() -> None:
    for make in (
        lambda width: line(SHAPE, 5),
        lambda shape, width: line(SHAPE, 5),
        lambda a, b, c: line(SHAPE, 5),
    ):
        assert "wants (" in fails(lambda make=make: open_network(make, SHAPE, 5))
    assert called(dict, "dict", {"a": 1}) == {}


def test_a_module_is_used_as_it_is() -> None:
    network = Net().train()
    network.norm.eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    assert open_network(network, SHAPE, 5) is network
    assert [module.training for module in network.modules()] == modes
    open_network(network, SHAPE, 5, seed=3)
    network.eval()
    again = Net()
    again.load_state_dict(before)
    assert torch.equal(again.eval()(torch.ones(1, *SHAPE)), network(torch.ones(1, *SHAPE)))


def test_a_seed_decides_the_weights_of_whatever_is_made() -> None:
    state = torch.random.get_rng_state()
    lazy = lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(5))  # noqa: E731
    for place in ("small", line, Net, lazy):
        one, same, other = (open_network(place, SHAPE, 5, seed=seed) for seed in (1, 1, 2))
        x = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(0))
        assert torch.equal(one.eval()(x), same.eval()(x))
        assert not torch.equal(one(x), other.eval()(x))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_lazy_layers_learn_their_sizes_unchecked_too() -> None:
    def lazy() -> nn.Module:
        layers = nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(5)
        return nn.Sequential(*layers)

    for checked in (True, False):
        network = open_network(lazy, SHAPE, 5, mean=(0.5,), std=(0.5,), checked=checked)
        assert (
            sum(value.numel() for value in network.state_dict().values())
            == 4 * 27 + 4 + 17 + 4 * 36 * 5 + 5
        )


def test_how_a_place_is_written_down() -> None:
    assert place_of("narrow") == "narrow"
    assert place_of(Net) == place_of(Net()) == f"{__name__}:Net"
    assert place_of(line) == f"{__name__}:line"
    assert place_of(functools.partial(line, classes=5)) == "functools:partial"


# A normaliser


def test_a_normaliser_stands_in_front() -> None:
    x = torch.rand(2, *SHAPE)
    bare = open_network("narrow", SHAPE, 5, seed=1).eval()
    for mean, std in (
        ((0.5,), (0.25,)),
        ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)),
        ((0.4, 0.5, 0.6), (0.2,)),
        ((0.0,), (1.0,)),
    ):
        network = open_network("narrow", SHAPE, 5, mean=mean, std=std, seed=1).eval()
        wanted = (x - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
        torch.testing.assert_close(network(x), bare(wanted))
        assert type(inner(network)) is type(bare)
        assert network.state_dict().keys() == {f"1.{name}" for name in bare.state_dict()}
    assert inner(bare) is bare


@pytest.mark.parametrize(
    ("mean", "std", "said"),
    [
        ((0.5,), (), "std is missing"),
        ((), (0.5,), "mean is missing"),
        ((0.5, 0.5), (0.5,), "2 numbers for images of 3 channels"),
        ((123.7, 116.3, 103.5), (58.4, 57.1, 57.4), "divide numbers of 0 to 255"),
        ((0.5,), (0.0,), "std"),
        ((0.5,), (float("nan"),), "std"),
    ],
)
def test_a_normaliser_that_cannot_be_meant(
    mean: tuple[float, ...], std: tuple[float, ...], said: str
) -> None:
    assert said in fails(lambda: open_network("narrow", SHAPE, 5, mean=mean, std=std))


# timm, by a stand-in


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """A module of that name, which notes how it was called."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def create_model(
        name: str, pretrained: bool, in_chans: int, num_classes: int, **options: Any
    ) -> nn.Module:
        calls.append((name, {"pretrained": pretrained, **options}))
        if name == "nothing":
            raise RuntimeError("Unknown model (nothing)")
        network = Net(in_chans, num_classes)
        config = {
            "mean": (0.4, 0.5, 0.6),
            "std": (0.2, 0.3, 0.4),
            "input_size": (3, 224, 224),
            "fixed_input_size": name == "vit",
        }
        if name == "plain":
            return network
        if name == "old":
            network.default_cfg = types.SimpleNamespace(**config)
        else:
            network.pretrained_cfg = config
        return network

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    return calls


@pytest.mark.parametrize("name", ["resnet18", "old"])
def test_networks_of_timm_bring_their_normalisation(timm: list[Any], name: str) -> None:
    network = asked(f"timm:{name}")
    assert (network[0].mean, network[0].std) == ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    assert timm == [(name, {"pretrained": False})]
    assert open_network(f"timm:{name}", SHAPE, 5, mean=(0.1,), std=(0.9,))[0].mean == 0.1
    grey = asked(f"timm:{name}", shape=(1, 8, 8))
    assert grey[0].mean == pytest.approx(0.5)
    assert isinstance(inner(asked("timm:plain")), Net)


def test_networks_of_timm_of_a_fixed_size_are_made_for_the_datas(timm: list[Any]) -> None:
    asked("timm:vit")
    assert timm == [
        ("vit", {"pretrained": False}),
        ("vit", {"pretrained": False, "img_size": (8, 8)}),
    ]
    timm.clear()
    asked("timm:vit", shape=(3, 224, 224))
    assert len(timm) == 1


def test_networks_that_timm_does_not_have(timm: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Unknown model (nothing)" in fails(lambda: open_network("timm:nothing", SHAPE, 5))
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install timm" in fails(lambda: open_network("timm:resnet18", SHAPE, 5))


# What is refused


class Answers(nn.Module):
    """A linear model whose answer is made into something else."""

    def __init__(self, change: Callable[["Answers", torch.Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.change = nn.Linear(192, 5), change

    def forward(self, x: torch.Tensor) -> Any:
        return self.change(self, self.linear(x.flatten(1)))


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = (
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4, track_running_stats=False),
            nn.Linear(4 * 36, 5),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x)).flatten(1))


class Uncopied(Net):
    def __deepcopy__(self, memo: object) -> None:
        raise TypeError("cannot copy this")


def _raise(*_: object) -> None:
    raise RuntimeError("out of luck")


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "raises": (_raise, "RuntimeError: out of luck"),
    "no module": (lambda: "a network", "returned no nn.Module, but an object of the type str"),
    "none": (lambda: None, "type NoneType"),
    "raises on images": (
        lambda: Answers(_raise),
        "on 5 image.s. of 3x8x8: RuntimeError: out of luck",
    ),
    "other size": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(100, 5)),
        "raised an error on 5 image.s. of 3x8x8",
    ),
    "other classes": (lambda: line(SHAPE, 1000), r"of shape \(5, 1000\); the data has 5 classes"),
    "features": (lambda: nn.Conv2d(3, 5, 3), r"of shape \(5, 5, 6, 6\)"),
    "dictionary": (
        lambda: Answers(lambda _, z: {"logits": z}),
        "type dict; let it return the tensor",
    ),
    "pair in training": (
        lambda: Answers(lambda net, z: (z, z) if net.training else z),
        "in training mode answers with .* tuple",
    ),
    "half": (lambda: line(SHAPE, 5).half(), "raised an error|float16"),
    "double": (lambda: Answers(lambda net, z: z).double(), "raised an error|float64"),
    "answers in double": (lambda: Answers(lambda _, z: z.double()), "answers in float64"),
    "softmax": (lambda: nn.Sequential(line(SHAPE, 5), nn.Softmax(1)), "without the softmax"),
    "not finite": (lambda: Answers(lambda _, z: z / 0), "not finite"),
    "nothing to train": (lambda: Answers(lambda _, z: z.detach()).requires_grad_(False), "frozen"),
    "dropout left on": (
        lambda: Answers(lambda _, z: functional.dropout(z, 0.5)),
        "otherwise each time",
    ),
    "mixes": (Mixing, "mixes the examples"),
    "takes the mean": (lambda: Answers(lambda _, z: z - z.mean(0)), "mixes the examples"),
    "no weights": (lambda: Bare(), "has no parameters"),
    "detached": (lambda: Answers(lambda _, z: z.detach()), "no gradient leads"),
    "not copied": (Uncopied, "cannot be copied"),
}


class Bare(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :5]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_classifier_is_refused_in_one_line(name: str) -> None:
    make, said = REFUSED[name]
    assert re.search(said, fails(lambda: open_network(make, SHAPE, 5)))


def test_half_precision_in_one_buffer_is_found() -> None:
    network = Net()
    network.register_buffer("scale", torch.ones(1).half())
    assert "float16" in fails(lambda: open_network(network, SHAPE, 5))


@pytest.mark.parametrize("classes", [2, 5, 100])
def test_honest_networks_are_let_in(classes: int) -> None:
    """Logits of zero, of one value, all positive, and log-probabilities are logits."""
    for change in (
        lambda _, z: 0 * z,
        lambda _, z: z.relu(),
        lambda _, z: z.log_softmax(1),
        lambda _, z: 1e6 * z,
        lambda _, z: 1e-6 * z,
    ):
        network = Answers(change)
        network.linear = nn.Linear(192, classes)
        check_network(network, SHAPE, classes, "mine")


# Weights


@pytest.fixture
def trained() -> Net:
    torch.manual_seed(4)
    network = Net()
    for value in network.state_dict().values():
        value.copy_(torch.rand(value.shape) + 0.5 if value.is_floating_point() else torch.tensor(7))
    return network.eval()


def _same_answers(one: nn.Module, other: nn.Module) -> None:
    x = torch.rand(3, *SHAPE)
    torch.testing.assert_close(one.eval()(x), other.eval()(x))


@pytest.mark.parametrize("ending", ["safetensors", "pt", "pth", "bin", "ckpt"])
@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "model.", "net.", "module._orig_mod.", "model.module."]
)
def test_weights_fit_whatever_wrapper_saved_them(
    trained: Net, tmp_path: Path, ending: str, prefix: str
) -> None:
    state = {prefix + name: value for name, value in trained.state_dict().items()}
    path = tmp_path / f"own.{ending}"
    save_file(state, path) if ending == "safetensors" else torch.save(state, path)
    for options in ({}, {"mean": (0.5,), "std": (0.25,)}):
        network = open_network(Net, SHAPE, 5, **options)
        load_weights(network, path)
        _same_answers(inner(network), trained)


@pytest.mark.parametrize(
    "nested",
    [("state_dict",), ("model",), ("model_state_dict",), ("model", "state_dict"), ("net",)],
)
def test_state_dicts_are_found_in_checkpoints(
    trained: Net, tmp_path: Path, nested: tuple[str, ...]
) -> None:
    kept: Any = trained.state_dict()
    for name in reversed(nested):
        kept = {"epoch": 3, "loss": torch.tensor(0.3), name: kept}
    torch.save(kept, tmp_path / "own.pt")
    network = Net()
    load_weights(network, tmp_path / "own.pt")
    _same_answers(network, trained)


def test_a_submodule_that_was_compiled_alone(trained: Net, tmp_path: Path) -> None:
    torch.save(
        {
            name.replace("conv.", "conv._orig_mod."): value
            for name, value in trained.state_dict().items()
        },
        tmp_path / "own.pt",
    )
    network = Net()
    load_weights(network, tmp_path / "own.pt")
    _same_answers(network, trained)


def test_names_that_begin_like_a_prefix_stay(tmp_path: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x)

    saved, network = Wrapped(), Wrapped()
    torch.save(
        {f"module.{name}": value for name, value in saved.state_dict().items()}, tmp_path / "own.pt"
    )
    load_weights(network, tmp_path / "own.pt")
    _same_answers(network, saved)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_converted(trained: Net, tmp_path: Path, dtype: torch.dtype) -> None:
    torch.save(trained.to(dtype).state_dict(), tmp_path / "own.pt")
    network = Net()
    load_weights(network, tmp_path / "own.pt")
    assert {value.dtype for value in network.parameters()} == {torch.float32}
    _same_answers(network, trained.float())


def test_old_files_lack_the_counter_of_batch_norm(trained: Net, tmp_path: Path) -> None:
    torch.save(
        {name: value for name, value in trained.state_dict().items() if "num_batches" not in name},
        tmp_path / "own.pt",
    )
    network = Net()
    load_weights(network, tmp_path / "own.pt")
    _same_answers(network, trained)


def test_tied_weights_may_be_saved_once(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        first = nn.Linear(5, 5)
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 5), first, nn.ReLU(), first)

    saved, network = tied(), tied()
    torch.save(
        {name: value for name, value in saved.state_dict().items() if not name.startswith("4.")},
        tmp_path / "own.pt",
    )
    load_weights(network, tmp_path / "own.pt")
    _same_answers(network, saved)


class Ran:
    """What a hostile pickle would do."""

    ran = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _mark, ()


def _mark() -> None:
    Ran.ran = True


def _spoilt(state: dict[str, Any]) -> dict[str, Any]:
    return {**state, "head.weight": state["head.weight"].clone().fill_(float("nan"))}


_STRANGE: dict[str, tuple[Callable[[Net, Path], object], str]] = {
    "missing": (
        lambda net, path: torch.save(dict(list(net.state_dict().items())[3:]), path),
        "missing: conv.weight, norm.weight, norm.bias",
    ),
    "surplus": (
        lambda net, path: torch.save(
            {**net.state_dict(), **{f"more.{n}": torch.ones(1) for n in range(9)}}, path
        ),
        "not in the network: more.0, more.1, more.2, more.3, more.4 and 4 more",
    ),
    "shape": (
        lambda net, path: torch.save(Net(num_classes=7).state_dict(), path),
        r"head.weight \(7, 6\) instead of \(5, 6\), head.bias",
    ),
    "another network": (
        lambda net, path: torch.save(build("small", SHAPE, 5).state_dict(), path),
        "missing: .*; not in the network: ",
    ),
    "nan": (
        lambda net, path: torch.save(_spoilt(net.state_dict()), path),
        "not finite .* head.weight",
    ),
    "whole": (lambda net, path: torch.save(net, path), r"torch.save\(network.state_dict\(\)"),
    "hostile": (lambda net, path: torch.save({"a": Ran()}, path), "never unpickled"),
    "list": (lambda net, path: torch.save([1, 2], path), "type list"),
    "tensor": (lambda net, path: torch.save(torch.ones(3), path), "type Tensor"),
    "empty": (lambda net, path: path.write_bytes(b""), "truncated, damaged"),
    "text": (lambda net, path: path.write_text("weights"), "truncated, damaged"),
    "folder": (lambda net, path: path.mkdir(), "is not a file"),
    "nothing": (lambda net, path: None, "does not exist"),
    "integers": (
        lambda net, path: torch.save({n: v.long() for n, v in net.state_dict().items()}, path),
        "as torch.int64",
    ),
    "no entries": (lambda net, path: torch.save({}, path), "no state dict"),
    "numbers": (
        lambda net, path: torch.save({**net.state_dict(), "epoch": 3}, path),
        "no tensors: epoch",
    ),
    "script": (lambda net, path: torch.jit.script(nn.Linear(2, 2)).save(str(path)), "TorchScript"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", _STRANGE)
def test_weights_that_do_not_fit_are_refused_and_nothing_changes(
    trained: Net, tmp_path: Path, name: str
) -> None:
    write, said = _STRANGE[name]
    path = tmp_path / "own.pt"
    write(trained, path)
    network = Net()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert re.search(said, fails(lambda: load_weights(network, path)))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not Ran.ran


def test_a_truncated_file_of_any_length_is_refused(trained: Net, tmp_path: Path) -> None:
    for ending in ("pt", "safetensors"):
        whole, path = tmp_path / f"whole.{ending}", tmp_path / f"own.{ending}"
        state = trained.state_dict()
        save_file(state, whole) if ending == "safetensors" else torch.save(state, whole)
        data = whole.read_bytes()
        for length in (1, 10, 100, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:length])
            fails(lambda path=path: load_weights(Net(), path))


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    for name in ("own.onnx", "own", "own.json", "own.h5"):
        (tmp_path / name).write_bytes(b"x")
        assert ".safetensors, .pt" in fails(lambda name=name: load_weights(Net(), tmp_path / name))


def test_a_normaliser_holds_no_weights() -> None:
    assert not nn.Sequential(Normalise((0.1, 0.2, 0.3), 0.5)).state_dict()


def test_a_function_that_may_ask_for_nothing_is_told_so() -> None:
    with pytest.raises(
        CountermarkError, match=r"shop:photos wants \(place\); it may ask for nothing$"
    ):
        called(lambda place: place, "shop:photos", {})


def test_one_number_normalises_all_channels() -> None:
    x = torch.rand(2, 3, 8, 8)
    one, several = (
        open_network("small", (3, 8, 8), 2, mean=mean, std=mean, seed=0).eval()
        for mean in (0.5, (0.5,))
    )
    assert torch.equal(one(x), several(x))
    with pytest.raises(CountermarkError, match="mean is one number or one a channel, not 'a'"):
        open_network("small", (3, 8, 8), 2, mean="a", std=0.5)  # type: ignore[arg-type]


def test_a_budget_that_is_text_is_no_threat() -> None:
    with pytest.raises(
        CountermarkError, match=r"the epsilon is in pixels, a number in .0, 1., not '8/255'"
    ):
        Threat("8/255", 10, 2 / 255, 16 / 255)  # type: ignore[arg-type]
