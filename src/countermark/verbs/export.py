"""`countermark export`: a model folder as one file that other programs run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from countermark.errors import CountermarkError
from countermark.onnx_file import Exported, export_model
from countermark.options import ModelOptions, NewFile, ReadPath, verb
from countermark.terminal import print_lines, unbroken

if TYPE_CHECKING:
    import torch

    from countermark.networks import Description


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ModelOptions):
    """Write a model as one file that other programs run."""

    model: ReadPath = field(kw_only=False)
    """Model folder."""
    out: NewFile
    """File to write, such as mine.onnx."""
    format: Literal["onnx"] = "onnx"
    """Format: onnx, with a free number of images, pixels of [0, 1] in and logits out."""
    features: bool = False
    """Give features as a second output, which a guard needs (serve --network FILE.onnx)."""
    images: int = 1000
    """Test images on which the answers of the file are compared with the model's."""

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        super().__post_init__()
        self._at_least_one("images")


@verb(ExportConfig)
def export(config: ExportConfig) -> Exported:
    """Export a model folder, and compare the answers of the file with the model's.

    They are compared on test images of the data that the model declares, or on noise where that
    data cannot be opened and no other place is named.

    Raises:
        CountermarkError: the folder cannot be read; see also `countermark.onnx_file.export_model`.

    Example:
        >>> made = cm.export("mine", out="mine.onnx", images=50)
        >>> made.images, made.compared_on, made.labels_differ
        (50, 'test images', 0)
    """
    from countermark.networks import load_model, weights_sha256
    from countermark.networks.source import check_network

    folder = Path(config.model)
    network, description = load_model(folder, config.network)
    if config.network is not None:  # it may be other code than that which was tried by protect
        check_network(network, description.shape, description.classes, "the network")
    images = _test_images(description, config)
    return export_model(
        network,
        description.shape,
        config.out,
        class_names=description.class_names,
        images=images,
        weights_sha256=weights_sha256(folder),
        features=config.features,
    )


def _test_images(description: "Description", config: ExportConfig) -> "torch.Tensor | None":
    import torch

    from countermark.networks import open_declared

    try:
        test = open_declared(description, data=config.data, cache=config.cache).test
    except CountermarkError:
        if config.data is not None:
            raise
        return None  # the answers are compared on noise, and the result says so
    count = min(config.images, len(test))
    evenly = torch.arange(count) * len(test) // max(count, 1)
    return test.batch(evenly, torch.device("cpu"))[0]


def show(result: Exported) -> None:
    """Print what was written and how it compares."""
    print_lines(
        f"wrote {unbroken(result.path)}: {result.bytes / 1e6:.2f} MB, ONNX opset "
        f"{result.opset}, any number of images, pixels of [0, 1] in, logits out",
        f"compared with the model on {result.images} {result.compared_on}: {result.labels_differ} "
        f"labels differ, logits by at most {result.largest_difference:.2g}",
    )
