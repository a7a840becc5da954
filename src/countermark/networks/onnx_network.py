"""A network that onnxruntime computes: the ONNX file that was exported from a model folder.

It answers and cannot be trained or attacked. It is the owner's own file: onnxruntime runs it in
this process, unlike a suspect's.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from countermark.device import resolve_device
from countermark.errors import CountermarkError
from countermark.files import read_bytes
from countermark.networks.folder import Description, describe, load_model, weights_sha256
from countermark.places import Network
from countermark.text import brief

_LARGEST = 1 << 31  # bytes that one file of protocol buffers may have
_OUTPUTS = ["logits", "features"]


class OnnxNetwork(nn.Module):
    """Pixels of [0, 1], `(n, c, h, w)`, to logits `(n, classes)`, on the processor."""

    def __init__(self, session: Any) -> None:
        """Take a session of onnxruntime with one input and the outputs `logits` and `features`."""
        super().__init__()
        self._session = session
        self._input = session.get_inputs()[0].name

    def with_features(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute logits `(n, classes)` and features `(n, d)`."""
        found = self._session.run(_OUTPUTS, {self._input: x.numpy()})
        logits, features = (torch.from_numpy(each) for each in found)
        return logits, features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute logits `(n, classes)`."""
        return self.with_features(x)[0]


def load_answering(
    folder: Path, network: Network | None = None, device: torch.device | str = "cpu"
) -> tuple[nn.Module, Description]:
    """Read what answers for a model folder: its network, or the ONNX file exported from it.

    Args:
        folder: the folder. Where an ONNX file answers, its `model.safetensors` is not needed.
        network: as for `load_model`, or the path of an ONNX file that `countermark export
            --features` wrote.
        device: as for `resolve_device`; an ONNX file computes on the processor.

    Raises:
        CountermarkError: see `load_model`; or the ONNX file cannot be read, has no features, or was
            exported from other weights.
    """
    if not isinstance(network, str) or not network.lower().endswith(".onnx"):
        return load_model(folder, network, resolve_device(device))
    if str(device) not in ("auto", "cpu"):
        raise CountermarkError(
            f"{network} computes on the processor here; leave --device out, or --network for "
            f"PyTorch on {device}"
        )
    return _opened(Path(network).expanduser(), folder), describe(folder)


def _opened(path: Path, folder: Path) -> OnnxNetwork:
    """The network of an ONNX file, which must be that of the folder's model."""
    try:
        import onnxruntime
    except ImportError as error:
        raise CountermarkError(
            f"{path} needs onnxruntime; pip install 'countermark[onnx]'"
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(
            read_bytes(path, _LARGEST), options, providers=["CPUExecutionProvider"]
        )
    except CountermarkError:
        raise
    except Exception as error:  # onnxruntime's are of many kinds
        raise CountermarkError(f"onnxruntime cannot load {path}: {brief(str(error))}") from error
    said, description = session.get_modelmeta().custom_metadata_map, describe(folder)
    if [each.name for each in session.get_outputs()] != _OUTPUTS or "weights_sha256" not in said:
        raise CountermarkError(
            f"{path} does not give the features that a guard needs; export it anew: countermark "
            f"export {folder} --features --out FILE.onnx"
        )
    if said["weights_sha256"] != weights_sha256(folder):
        raise CountermarkError(
            f"{path} was exported from other weights than those of {folder}; export it anew"
        )
    if said.get("image_shape") != json.dumps(list(description.shape)):
        raise CountermarkError(f"{path} takes images of another shape than {folder}")
    return OnnxNetwork(session)
