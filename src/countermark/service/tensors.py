"""What a request of the Open Inference Protocol v2 asks, and what its answer says.

Tensors are numbers in JSON, or bytes behind the JSON: the protocol's extension of binary data. A
tensor of BYTES holds image files, which are decoded as the images of a data set are. Whatever a
body holds, reading it takes memory in the order of its length: what it could grow into is counted
before it is parsed, and an image file may have only so many pixels for its length.
"""

import base64
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import PngImagePlugin

from countermark.data import as_uint8
from countermark.data.images import Array, DamagedError, fitted
from countermark.errors import CountermarkError

Shape = tuple[int, int, int]

_NUMBERS = {"UINT8": ("<u1", 255), "FP16": ("<f2", 1), "FP32": ("<f4", 1), "FP64": ("<f8", 1)}
"""Data types of pixels: how their bytes are read, and the value of a white pixel."""
_FILES = "BYTES"
JSON_LENGTH = "Inference-Header-Content-Length"
"""Header of a body whose JSON is followed by bytes: the length of the JSON."""
BESIDES = 1 << 12
"""Bytes of a request, at most, besides the pixels of a binary tensor."""
SIGNED_BODY = 1 << 20
"""Bytes of a signed request, at most, which are taken whatever the service's own limits are.

A request that got no answer is sent again as it was signed, also to a service that has come back
with lower limits.
"""
DATATYPES = (*_NUMBERS, _FILES)
"""Data types that a request may have."""
OUTPUTS = {"label": "INT64", "class": "BYTES"}
"""What can be asked: the number of the class and its name. The label is what nobody asks for."""
_SPARE = 1000  # commas and brackets of a body besides those of its data
_LENGTH = 4  # bytes of the number before an element of BYTES
_MOST_DIGITS = 18  # of a length in a header
# A photograph as JPEG takes a quarter of a byte a pixel or more. A flat image takes a thousandth,
# and up to 25 bytes a pixel while it is decoded.
_SMALL = 1 << 21  # pixels that any image file may have, as many as a screen has
_A_BYTE = 4  # pixels that it may have besides, for each of its bytes
# A scan of a JPEG passes over the whole image, and may be empty; encoders write ten or twenty.
_MOST_SCANS = 100
_SCAN = re.compile(rb"\xff\xda\x00(?:\x06\x00|\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")
"""How a scan begins that libjpeg takes: marker, length, number of components."""
# Characters of texts in a PNG file, of which Pillow unpacks 64 million, of up to four bytes each.
PngImagePlugin.MAX_TEXT_MEMORY = 1 << 22


class RefusedError(Exception):
    """A request that is not answered, with the status and the reason that the client gets."""

    def __init__(self, status: int, reason: str) -> None:
        """Refuse with an HTTP status."""
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True)
class Asked:
    """What a request asks.

    Attributes:
        identity: of the request; `None` if it has none.
        images: uint8 `(n, c, h, w)`, or the content of image files.
        outputs: names of the outputs in the order of the answer, each with whether it goes behind
            the JSON as bytes.
    """

    identity: str | None
    images: torch.Tensor | tuple[bytes, ...]
    outputs: tuple[tuple[str, bool], ...]


def parse_request(
    body: bytes | bytearray, json_length: str | None, shape: Shape, most: int
) -> Asked:
    """Read the body of a request.

    Args:
        body: what the client sent.
        json_length: what the header `JSON_LENGTH` says, where there is one.
        shape: shape of one image, `(channels, height, width)`.
        most: largest number of images in a request.

    Raises:
        RefusedError: it is not a request of the protocol, or its pixels are not valid.
    """
    text, binary = _parts(body, json_length)
    pixels, rows = math.prod(shape), 1 + shape[0] + shape[0] * shape[1]
    wanted = f"[n, {', '.join(map(str, shape))}]"
    if (
        text.count(b",") > most * pixels + _SPARE
        or text.count(b"[") + text.count(b"{") > most * rows + _SPARE
    ):
        raise RefusedError(
            400, f"the body has more values than 1 to {most} images of the shape {wanted}"
        )
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, "the body is not valid JSON") from error
    value = value if isinstance(value, dict) else {}
    identity = value.get("id")
    if identity is not None and not (isinstance(identity, str) and _encodes(identity)):
        raise RefusedError(400, "id is a string of Unicode characters")
    inputs = value.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise RefusedError(400, "inputs is a list of one tensor: {name, shape, datatype, data}")
    kind, declared = inputs[0].get("datatype"), inputs[0].get("shape")
    if not isinstance(kind, str) or kind not in DATATYPES:
        raise RefusedError(400, f"datatype is one of {', '.join(DATATYPES)}")
    if (
        not isinstance(declared, list)
        or not declared
        or any(type(side) is not int for side in declared)
        or declared[1:] != ([] if kind == _FILES else list(shape))
    ):
        wanted = "[n], for n image files" if kind == _FILES else wanted
        raise RefusedError(400, f"shape is {wanted}")
    if not 1 <= declared[0] <= most:
        raise RefusedError(400, f"a request has 1 to {most} images")
    outputs = _outputs(value)
    data = _data(inputs[0], binary)
    if kind == _FILES:
        return Asked(identity, _files(data, declared[0]), outputs)
    return Asked(identity, as_uint8(torch.from_numpy(_pixels(data, kind, declared))), outputs)


def decoded(
    files: Sequence[bytes],
    shape: Shape,
    most: int | None = None,
    given_up: Callable[[], bool] = lambda: False,
) -> torch.Tensor:
    """Decode image files as the model takes them, uint8 `(n, c, h, w)`.

    Args:
        files: their content.
        shape: shape of one image, `(channels, height, width)`.
        most: pixels of the largest image that is decoded; default what the length of a file allows.
        given_up: tells whether nobody waits any more; asked before each file.

    Raises:
        RefusedError: one of them cannot be read, has too many pixels or scans, or nobody waits.
    """
    images = np.empty((len(files), *shape), np.uint8)
    for place, file in enumerate(files):
        if given_up():
            raise RefusedError(408, "the request was given up")
        try:
            images[place] = read_file(file, shape, most)
        except DamagedError as error:
            raise RefusedError(400, f"image {place} of the request: {error}") from error
        except CountermarkError as error:  # the model takes no image files
            raise RefusedError(400, str(error)) from error
    return torch.from_numpy(images)


def read_file(file: bytes, shape: Shape, most: int | None = None) -> Array:
    """Decode an image file of a client, in memory and time of the order of its length.

    Args:
        file: its content.
        shape: shape of the image, `(channels, height, width)`.
        most: as for `decoded`.

    Returns:
        uint8 `(channels, height, width)`.

    Raises:
        DamagedError: it cannot be read, or has too many pixels or scans.
        CountermarkError: the shape is of no image file.
    """
    scans = _SCAN.finditer(file) if file.startswith(b"\xff\xd8") else iter(())
    if any(itertools.islice(scans, _MOST_SCANS, None)):
        raise DamagedError(f"has more than the {_MOST_SCANS} scans that are decoded of a JPEG")
    return fitted(file, shape, most or most_for(file))


def most_for(file: bytes) -> int:
    """How many pixels an image file of a client may have, so that it takes memory for its length.

    Example:
        >>> most_for(bytes(1000))
        2101152
    """
    return _SMALL + _A_BYTE * len(file)


def answer(
    asked: Asked, labels: Sequence[int], class_names: Sequence[str], said: Mapping[str, Any]
) -> tuple[bytes, int | None]:
    """Write the answer to a request.

    Args:
        asked: what was asked.
        labels: a label for each image.
        class_names: a name for each label.
        said: what the answer says besides.

    Returns:
        The body, and the length of its JSON where bytes follow.
    """
    outputs, binary = list[dict[str, Any]](), bytearray()
    for name, as_bytes in asked.outputs:
        values = labels if name == "label" else [class_names[label] for label in labels]
        output = {"name": name, "datatype": OUTPUTS[name], "shape": [len(labels)]}
        if as_bytes:
            packed = _packed(values)
            binary += packed
            outputs.append({**output, "parameters": {"binary_data_size": len(packed)}})
        else:
            outputs.append({**output, "data": values})
    identity = {} if asked.identity is None else {"id": asked.identity}
    text = json.dumps(
        {**said, **identity, "outputs": outputs}, ensure_ascii=False, separators=(",", ":")
    ).encode()
    return text + binary, len(text) if any(as_bytes for _, as_bytes in asked.outputs) else None


def _packed(values: Sequence[int] | Sequence[str]) -> bytes:
    """A tensor of INT64 or of BYTES, as its bytes."""
    words = [value.encode() for value in values if isinstance(value, str)]
    if words:
        return b"".join(len(word).to_bytes(_LENGTH, "little") + word for word in words)
    return np.array(values, "<i8").tobytes()


def _parts(
    body: bytes | bytearray, json_length: str | None
) -> tuple[bytes | bytearray, memoryview | None]:
    """The JSON of a body, and what follows it; `None` where no header says that bytes follow."""
    if json_length is None:
        return body, None
    number = json_length.strip()
    if not (number.isascii() and number.isdigit() and len(number) <= _MOST_DIGITS):
        raise RefusedError(400, f"{JSON_LENGTH} is a number of bytes")
    length = int(number)
    if length > len(body):
        raise RefusedError(
            400,
            f"{JSON_LENGTH} says {length} bytes of JSON, and the body has {len(body)}",
        )
    return body[:length], memoryview(body)[length:]


def _parameters(value: Mapping[str, Any]) -> Mapping[str, Any]:
    found = value.get("parameters")
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise RefusedError(400, "parameters is an object")
    return found


def _flag(parameters: Mapping[str, Any], name: str, otherwise: bool) -> bool:
    found = parameters.get(name, otherwise)
    if not isinstance(found, bool):
        raise RefusedError(400, f"{name} is true or false")
    return found


def _outputs(value: Mapping[str, Any]) -> tuple[tuple[str, bool], ...]:
    """The outputs that a request asks for: the label where it names none."""
    otherwise = _flag(_parameters(value), "binary_data_output", False)
    given = value.get("outputs") or [{"name": "label"}]
    if (
        not isinstance(given, list)
        or len(given) > len(OUTPUTS)
        or not all(isinstance(each, dict) for each in given)
    ):
        raise RefusedError(400, f"outputs is a list of {{name}}, of {' and '.join(OUTPUTS)}")
    found: dict[str, bool] = {}
    for each in given:
        name, parameters = each.get("name"), _parameters(each)
        if not isinstance(name, str) or name not in OUTPUTS or name in found:
            raise RefusedError(400, f"the outputs are {' and '.join(OUTPUTS)}, each at most once")
        for unknown in ("classification", "shared_memory_region"):
            if unknown in parameters:
                raise RefusedError(400, f"{unknown} is not offered here; ask for the outputs alone")
        found[name] = _flag(parameters, "binary_data", otherwise)
    return tuple(found.items())


def _data(tensor: Mapping[str, Any], binary: memoryview | None) -> object:
    """The data of the one input: what stands in the JSON, or the bytes that follow it."""
    size = _parameters(tensor).get("binary_data_size")
    follow = 0 if binary is None else len(binary)
    if size is None:
        if follow:
            raise RefusedError(
                400, f"{follow} bytes follow the JSON, and no binary_data_size says what they are"
            )
        return tensor.get("data")
    if "data" in tensor:
        raise RefusedError(400, "an input has data or binary_data_size, and not both")
    if binary is None:
        raise RefusedError(400, f"binary_data_size needs the header {JSON_LENGTH}")
    if type(size) is not int or size != follow:
        raise RefusedError(400, f"binary_data_size is not the {follow} bytes that follow the JSON")
    return binary


def _pixels(data: object, kind: str, shape: list[int]) -> np.ndarray[Any, Any]:
    """The pixels of a tensor of numbers, uint8 or float32, in an array of their own."""
    stored, white = _NUMBERS[kind]
    dtype, count = np.dtype(stored), math.prod(shape)
    if isinstance(data, memoryview):
        if len(data) != count * dtype.itemsize:
            raise RefusedError(
                400,
                f"binary_data_size of {'x'.join(map(str, shape))} {kind} is "
                f"{count * dtype.itemsize}, not {len(data)}",
            )
        array = np.frombuffer(data, dtype)
    else:
        numbers = _numbers(data)
        if numbers is None or len(numbers) != count:
            raise RefusedError(400, f"data is not {'x'.join(map(str, shape))} numbers")
        try:
            array = np.array(numbers, np.float64)
        except OverflowError:  # an integer of hundreds of digits
            array = np.array([math.inf])
        if kind == "UINT8" and float in set(map(type, numbers)):
            raise RefusedError(400, "pixels of UINT8 are whole numbers")
    with np.errstate(invalid="ignore"):  # NaN
        low, high = array.min(), array.max()
    if not (low >= 0 and high <= white):  # what is no number (NaN) is not there either
        raise RefusedError(400, f"pixels of {kind} are numbers from 0 to {white}")
    return np.array(array, np.uint8 if kind == "UINT8" else np.float32).reshape(shape)


def _numbers(data: object) -> list[int | float] | None:
    """Return the numbers in a list, or in lists of one length at each depth.

    The result is `None` for anything else.
    """
    level: list[Any] = data if isinstance(data, list) else []
    while level and set(map(type, level)) == {list}:
        if len(set(map(len, level))) > 1:
            return None
        level = list(itertools.chain.from_iterable(level))
    return level if level and set(map(type, level)) <= {int, float} else None


def _files(data: object, count: int) -> tuple[bytes, ...]:
    """The elements of a tensor of BYTES: base64 in JSON, each behind its length in bytes."""
    if not isinstance(data, memoryview):
        if not isinstance(data, list) or len(data) != count:
            raise RefusedError(400, f"data is not {count} image files in base64")
        try:
            return tuple(base64.b64decode(each, validate=True) for each in data)
        except (ValueError, TypeError) as error:
            raise RefusedError(400, f"data is not {count} image files in base64") from error
    found, at = list[bytes](), 0
    for _ in range(count):
        length = int.from_bytes(data[at : at + _LENGTH], "little")
        at += _LENGTH
        found.append(bytes(data[at : at + length]))
        at += length
    if at != len(data):  # behind its end, where a length says more than is there
        raise RefusedError(
            400,
            f"the bytes are not {count} elements, each behind its length in {_LENGTH} bytes, "
            "little-endian",
        )
    return tuple(found)


def _encodes(text: str) -> bool:
    """Tell whether a text can be sent.

    Escapes of JSON may encode half a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
