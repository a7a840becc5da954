"""Write a network as one ONNX file that other programs run.

The file takes pixels of [0, 1], any number of images at once, and gives logits, and features for a
guard if these are wanted. It is written only if its answers are those of the network: the two are
compared on images first, in batches of several sizes, torch against onnxruntime. The file holds no
paths and no code of the machine that it was made on.
"""

import copy
import importlib.util
import io
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from countermark.device import batch_size
from countermark.errors import CountermarkError
from countermark.files import sha256, write_bytes
from countermark.places import check_new
from countermark.text import brief
from countermark.version import __version__

if TYPE_CHECKING:
    import torch
    from torch import nn

Shape = tuple[int, int, int]

INPUT, OUTPUTS = "pixels", ("logits", "features")

_OPSET = 17  # onnxruntime reads it since 1.12; the newer exporter writes 18 at least
_OPSET_NEW = 18
_LARGEST = (1 << 31) - (1 << 20)  # bytes that one file of protocol buffers may have
_BATCH = 64
_NOISE = 256  # images of noise, where there are no others
_ROUNDING = 1e-3  # of the largest logit: what two ways of computing the same may differ by


@dataclass(frozen=True)
class Exported:
    """An ONNX file and how its answers compare with the network's.

    Attributes:
        path: the file.
        sha256: its digest.
        bytes: its size.
        opset: the version of ONNX's operators that it is written in.
        images: how many images both were asked about.
        compared_on: what these were: `test images` or `images of noise`.
        labels_differ: images that the two give different labels; logits so close to a tie that
            rounding decides.
        largest_difference: of a logit.
    """

    path: str
    sha256: str
    bytes: int
    opset: int
    images: int
    compared_on: str
    labels_differ: int
    largest_difference: float


def export_model(
    network: "nn.Module",
    shape: Shape,
    path: str | Path,
    *,
    class_names: Sequence[str] = (),
    images: "torch.Tensor | None" = None,
    weights_sha256: str | None = None,
    features: bool = False,
) -> Exported:
    """Write a network as one ONNX file with a free number of images.

    Args:
        network: pixels `(n, c, h, w)` of [0, 1] to logits `(n, classes)`; it is not changed.
        shape: one image, `(channels, height, width)`.
        path: the file to write, which must not be there.
        class_names: names of the classes in the order of the logits, kept in the file's metadata.
        images: what the answers are compared on, `(n, c, h, w)`, uint8 or pixels of [0, 1]; noise
            where there are none.
        weights_sha256: digest of the weights, kept in the file's metadata.
        features: give what enters the linear layer that runs last as a second output.

    Raises:
        CountermarkError: onnx or onnxruntime is missing, the file is there already, the network has
            operators that ONNX does not have or is too large for one file, or the file's answers
            are not the network's. Nothing is left behind then.

    Example:
        >>> export_model(network, (3, 32, 32), "mine.onnx", images=test.x)  # doctest: +SKIP
        Exported(path='mine.onnx', sha256='...', bytes=1257394, opset=17, images=1000, ...)
    """
    import torch

    from countermark.networks import WithFeatures

    path = Path(path)
    if missing := [
        each for each in ("onnx", "onnxruntime") if importlib.util.find_spec(each) is None
    ]:
        raise CountermarkError(
            f"exporting needs {' and '.join(missing)}; pip install 'countermark[onnx]'"
        )
    if path.suffix != ".onnx":
        raise CountermarkError(f"{path} is to be an ONNX file; give it a name that ends with .onnx")
    check_new(path)
    size = sum(
        value.numel() * value.element_size()
        for value in (*network.parameters(), *network.buffers())
    )
    if size > _LARGEST:
        raise CountermarkError(
            f"the network has {size / 1e9:.1f} GB of weights, and one ONNX file holds 2 GB at "
            "most; export a smaller one"
        )
    plain = copy.deepcopy(network).cpu().float().eval()
    if features:
        plain = WithFeatures(plain)
    model = _traced(plain, shape)
    _state(model, shape, class_names, weights_sha256)
    data: bytes = model.SerializeToString()
    asked, compared_on = (
        torch.rand(_NOISE, *shape, generator=torch.Generator().manual_seed(0)),
        "images of noise",
    )
    if images is not None and len(images):
        asked, compared_on = images, "test images"
    differ, largest = _compared(plain, data, asked)
    write_bytes(path, data)
    opset = max(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    return Exported(
        str(path), sha256(data), len(data), opset, len(asked), compared_on, differ, largest
    )


def _traced(network: "nn.Module", shape: Shape) -> Any:
    """Make the ONNX model with torch's older exporter, or else with the newer one.

    The older one is quick, the newer one supports more networks.

    Raises:
        CountermarkError: neither can write the network.
    """
    import onnx
    import torch

    reasons = []
    for exporter in (_by_tracing, _by_export):
        try:
            # Zeros and no data, since what is traced may keep its input.
            model = exporter(network, torch.zeros(2, *shape))
            onnx.checker.check_model(model, full_check=True)
            return model
        except Exception as error:  # of any kind: a library's, or an operator's that is not there
            reasons.append(
                f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
            )
    raise CountermarkError(
        f"torch cannot write this network as ONNX: {brief('; then '.join(reasons))[1:-1]}"
    )


def _by_tracing(network: "nn.Module", x: "torch.Tensor") -> Any:
    import onnx
    import torch

    written = io.BytesIO()
    free = {name: {0: "n"} for name in (INPUT, *_outputs(network))}
    _quietly(
        lambda: torch.onnx.export(
            network,
            (x,),
            written,  # type: ignore[arg-type]
            input_names=[INPUT],
            output_names=_outputs(network),
            dynamic_axes=free,
            opset_version=_OPSET,
            dynamo=False,
        )
    )
    return onnx.load_model_from_string(written.getvalue())


def _by_export(network: "nn.Module", x: "torch.Tensor") -> Any:
    import torch

    if importlib.util.find_spec("onnxscript") is None:
        raise CountermarkError(
            "torch's newer exporter needs onnxscript; pip install 'countermark[onnx]'"
        )
    program = _quietly(
        lambda: torch.onnx.export(
            network,
            (x,),
            input_names=[INPUT],
            output_names=_outputs(network),
            dynamic_shapes=({0: torch.export.Dim("n")},),
            opset_version=_OPSET_NEW,
            dynamo=True,
            verbose=False,
        )
    )
    return program.model_proto


def _quietly(work: Callable[[], Any]) -> Any:
    import torch

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # what a trace takes for constant is compared below
        return work()


def _outputs(network: "nn.Module") -> list[str]:
    from countermark.networks import WithFeatures

    return list(OUTPUTS if isinstance(network, WithFeatures) else OUTPUTS[:1])


def _state(
    model: Any, shape: Shape, class_names: Sequence[str], weights_sha256: str | None
) -> None:
    """Say in the file what it takes and gives, and remove all traces of where it was made.

    Exporters write paths and lines of code into the file.
    """
    for graph in _graphs(model):
        for part in (*graph.node, *getattr(graph, "value_info", ())):
            part.doc_string = ""
            del part.metadata_props[:]
        graph.doc_string = ""
        del graph.metadata_props[:]
    del model.metadata_props[:]
    said: Mapping[str, Any] = {
        "image_shape": list(shape),
        "pixels": [0, 1],
        "class_names": list(class_names),
    }
    for name, value in {
        "made_by": f"countermark {__version__}",
        **({} if weights_sha256 is None else {"weights_sha256": weights_sha256}),
        **{name: json.dumps(value) for name, value in said.items()},
    }.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = name, value


def _graphs(model: Any) -> list[Any]:
    found = [model.graph, *model.functions]
    for graph in found:  # which grows by the graphs inside operators
        found += [
            inside
            for node in graph.node
            for each in node.attribute
            for inside in (each.g, *each.graphs)
            if inside.node
        ]
    return found


def _compared(network: "nn.Module", data: bytes, images: "torch.Tensor") -> tuple[int, float]:
    """How many labels differ between network and file, and the largest difference of a logit.

    Raises:
        CountermarkError: more than rounding accounts for.
    """
    import onnxruntime
    import torch

    from countermark.attacks import ask, finite
    from countermark.data import pixels
    from countermark.evaluation import evaluating

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    batch = batch_size(torch.device("cpu"), images.shape[1:], _BATCH)
    names = _outputs(network)
    differ, largest, highest = 0, dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    with evaluating(network), torch.no_grad():
        start = 0
        while start < len(images):
            count = (1, 3, batch)[min(start, 2)] if start < 4 else batch  # one, some, many
            x = pixels(images[start : start + count])
            told = network(x) if len(names) > 1 else (ask(network, x),)
            try:
                given = session.run(names, {INPUT: x.numpy()})
            except Exception as error:
                raise CountermarkError(
                    f"the exported file does not answer {len(x)} image(s): {brief(str(error))}; "
                    "nothing was written"
                ) from error
            for name, wanted, values in zip(names, map(finite, told), given, strict=True):
                found = torch.from_numpy(values)
                if found.shape != wanted.shape:
                    raise CountermarkError(
                        f"the exported file answers {len(x)} image(s) with {name} of the "
                        f"shape {tuple(found.shape)}, the network of "
                        f"{tuple(wanted.shape)}; nothing was written"
                    )
                if name == names[0]:
                    differ += int((found.argmax(1) != wanted.argmax(1)).sum())
                gap = (found - wanted).abs()
                largest[name] = max(largest[name], float(gap.nan_to_num(nan=torch.inf).max()))
                highest[name] = max(highest[name], float(wanted.abs().max()))
            start += count
    for name in names:
        if largest[name] > _ROUNDING * highest[name] + 1e-5:
            raise CountermarkError(
                f"the exported file is not the network: of {len(images)} images {differ} get other "
                f"labels, and {name} differ by up to {largest[name]:.3g}; nothing was written "
                "(does its code depend on numbers, or on how many images there are?)"
            )
    return differ, largest[names[0]]
