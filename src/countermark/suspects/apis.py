"""The kinds of API that a suspect may have: what is sent to them, and where their answers stand.

Most are a row of words: what `--send` would say, and what `--read` would. Two have calls of their
own. Their public descriptions are those of the Open Inference Protocol, MLflow, TorchServe,
TensorFlow Serving (and KServe's first protocol), Vertex AI, SageMaker, the Hugging Face Inference
API and Gradio.
"""

import base64
import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote, urlsplit, urlunsplit

import jmespath
import torch
from jmespath.exceptions import JMESPathError

from countermark.data.images import encode
from countermark.errors import CountermarkError, choose
from countermark.places import EndpointAddress
from countermark.suspects.answers import shown
from countermark.suspects.asker import Asking, RefusalError
from countermark.text import brief, sentence

_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "raw": "application/octet-stream"}
_FORMS = ("image", *_TYPES)
_AT = re.compile(rf"@({'|'.join(_FORMS)})")
_IN_TEXT = re.compile(rf"\$base64_({'|'.join(_FORMS)})\b")
_FIELD = re.compile(r"([^\s={}\[\]\"]+)=(.*)", re.DOTALL)
_ARRAYS = "$arrays"
_NUMBERS = {"$array", _ARRAYS, "raw"}  # forms that are no image file
_DEEPEST = 50  # levels of a JSON text of the user's
_MOST_SIDES = 8  # of an answer's tensor: lists are nested as deeply
_ADVICE = (
    "--send is 'NAME=@png' for a form, '@png' for a bare body, or a JSON text with "
    '"$base64_png", "$array" or "$arrays" in it; png may be jpeg or raw'
)


class Line(Protocol):
    """What an API needs of an endpoint: its address, how it is asked, and one exchange at a time.

    Attributes:
        address: the endpoint's.
        asking: how it wants its images.
    """

    address: EndpointAddress
    asking: Asking

    def metadata(self) -> Any:
        """What it says about its model, asked once; nothing if it says nothing."""

    def exchange(self, method: str, address: str, **sent: Any) -> Any:
        """Send one request and read its answer: a JSON value, or a text that is none.

        Args:
            method: of HTTP.
            address: where.
            **sent: what `requests.request` takes as the body.
        """


@dataclass(frozen=True)
class Api:
    """One kind of API.

    Attributes:
        ask: from an endpoint and prepared images to the answer to each, in any form that
            `labels_of` reads.
        address: what the end of such an address looks like, where it can be told.
        many: whether one request holds several images.
        files: whether images go as files, so that the form of arrays has no meaning.
        layout: of its arrays, unless the user says otherwise.
        about: what is put behind the address to ask about the model.
    """

    ask: Callable[[Line, torch.Tensor], Any]
    address: str = ""
    many: bool = False
    files: bool = False
    layout: str = "nchw"
    about: str = ""


def found_api(address: EndpointAddress, asking: Asking) -> tuple[Api, str, bool]:
    """The API of an endpoint, its name, and whether its address alone told it.

    Raises:
        CountermarkError: the address tells no API and none is named, or options of one API are
            given with another.
    """
    name, guessed = asking.api, asking.api is None
    if name is not None:
        choose("api", name, (*APIS, "json"))
    if name == "json":
        return _own(asking), name, guessed
    if asking.send or asking.read:
        raise CountermarkError("--send and --read describe an API of your own; give --api json")
    if name is None:
        path = address.infer.partition("?")[0].rstrip("/")
        name = next((each for each in APIS if re.search(APIS[each].address, path)), None)
    if name is None:
        raise CountermarkError(
            f"{sentence(address.name)} does not tell what API it has; name it with "
            f"--api {', '.join(APIS)}, or describe it with --api json --send ... --read ..."
        )
    return APIS[name], name, guessed


def _own(asking: Asking) -> Api:
    """The API that `--send` and `--read` describe.

    Raises:
        CountermarkError: they describe none.
    """
    if not asking.send:
        raise CountermarkError(f"--api json needs --send, what is sent: {_ADVICE}")
    read = asking.read or "@"
    _compiled(read)
    _, _, forms = _parsed(tuple(asking.send))
    return _row(*asking.send, read=read, many=_ARRAYS in forms, files=forms.isdisjoint(_NUMBERS))


def _row(*send: str, read: str = "@", media: str = "", many: bool = False, **more: Any) -> Api:
    """An API that is asked in one request, described by what is sent and where the answers are."""

    def ask(line: Line, images: torch.Tensor) -> Any:
        sent = _rendered(send, images, line.asking)
        if media:
            sent["headers"] = {"Content-Type": media}
        found = _read(read, line.exchange("POST", line.address.given, **sent))
        return found if many else [found]

    return Api(ask, many=many, **more)


def _read(expression: str, value: Any) -> Any:
    """What an expression of JMESPath finds in an answer.

    Raises:
        RefusalError: it finds nothing, or its functions cannot take what they find.
    """
    try:
        found = _compiled(expression).search(value)
    except (JMESPathError, ValueError, ArithmeticError, TypeError, RecursionError):
        found = None
    if found is None:
        raise RefusalError(
            f"200 with nothing at {brief(expression)} ({shown(value)})", "check --api and --read"
        )
    return found


@functools.cache
def _compiled(expression: str) -> Any:
    """An expression of JMESPath, ready to be used.

    Raises:
        CountermarkError: it is none.
    """
    try:
        return jmespath.compile(expression)
    except (JMESPathError, ValueError, RecursionError) as error:
        raise CountermarkError(
            f"--read {brief(expression)} is no JMESPath expression ({sentence(str(error))}); for "
            "example predictions[0].label"
        ) from error


@functools.cache
def _parsed(words: tuple[str, ...]) -> tuple[str, Any, set[str]]:
    """What the words of `--send` describe: a `body`, a `form` or `json`, and its forms of images.

    Raises:
        CountermarkError: nothing.
    """
    if len(words) == 1 and (found := _AT.fullmatch(words[0])):
        return "body", found[1], {found[1]}
    fields = [_FIELD.fullmatch(word) for word in words]
    kind, value, forms = "", None, set[str]()
    if all(fields):
        kind, value = "form", [(each[1], each[2]) for each in fields if each]
        forms = {found[1] for _, text in value if (found := _AT.fullmatch(text))}
    elif len(words) == 1:
        try:
            kind, value = "json", json.loads(words[0])
            forms = _forms(value)
        except (ValueError, RecursionError) as error:
            raise CountermarkError(f"{brief(words[0])} is no JSON; {_ADVICE}") from error
    if not forms:
        raise CountermarkError(f"{brief(' '.join(words))} sends no image; {_ADVICE}")
    if len(forms) > 1 and not forms.isdisjoint(_NUMBERS):
        raise CountermarkError(
            f"{brief(' '.join(words))} sends an image in several forms "
            f"({', '.join(sorted(forms))}); numbers and raw bytes stand alone"
        )
    return kind, value, forms


def _forms(value: Any, depth: int = 0) -> set[str]:
    """The forms of images in a JSON value.

    Raises:
        ValueError: it is nested too deeply, or holds NaN or an infinity, which JSON has not.
    """
    if depth > _DEEPEST or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError("nested too deeply, or a number that JSON has not")
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return {form for each in value for form in _forms(each, depth + 1)}
    if value in ("$array", _ARRAYS):
        return {value}
    return set(_IN_TEXT.findall(value)) if isinstance(value, str) else set()


def _rendered(words: tuple[str, ...], images: torch.Tensor, asking: Asking) -> dict[str, Any]:
    """The body of a request, as `requests.request` takes it."""
    kind, value, _ = _parsed(words)
    if kind == "json":
        return {"json": _filled(value, images, asking)}
    if kind == "body":
        data, media = encoded(images[0], value, asking)
        return {"data": data, "headers": {"Content-Type": media}}
    parts: list[tuple[str, tuple[Any, ...]]] = []
    for name, text in value:
        found = _AT.fullmatch(text)
        if found is None:
            parts.append((name, (None, text)))
        else:
            data, media = encoded(images[0], found[1], asking)
            parts.append((name, (f"image.{media.partition('/')[2]}", data, media)))
    return {"files": parts}


def _filled(value: Any, images: torch.Tensor, asking: Asking) -> Any:
    """A JSON value with the images in their places."""
    if isinstance(value, dict):
        return {key: _filled(each, images, asking) for key, each in value.items()}
    if isinstance(value, list):
        return [_filled(each, images, asking) for each in value]
    if value == "$array":
        return images[0].tolist()
    if value == _ARRAYS:
        return images.tolist()
    if isinstance(value, str):
        return _IN_TEXT.sub(
            lambda found: base64.b64encode(encoded(images[0], found[1], asking)[0]).decode(), value
        )
    return value


def encoded(image: torch.Tensor, form: str, asking: Asking) -> tuple[bytes, str]:
    """One prepared image in a form, and the media type of that.

    Args:
        image: uint8 `(c, h, w)`; for the form `raw` any array, whose bytes are taken.
        form: `png`, `jpeg`, `raw`, or `image` for the one that is asked with.
        asking: names that form, and the quality of a JPEG.

    Raises:
        CountermarkError: an image file cannot hold so many channels.
    """
    form = asking.form if form == "image" else form
    if form == "raw":
        return image.contiguous().numpy().tobytes(), _TYPES[form]
    if len(image) not in (1, 3):
        raise CountermarkError(
            f"an image file has 1 or 3 channels, not {len(image)}; send arrays, for example with "
            """--api json --send '{"image": "$array"}'"""
        )
    options = {"quality": asking.quality} if form == "jpeg" else {}
    return encode(image.numpy(), form, **options), _TYPES[form]


def _open_inference(line: Line, images: torch.Tensor) -> Any:
    """The Open Inference Protocol: one tensor there, and one back in the shape that it declares."""
    found = line.metadata()
    inputs = found.get("inputs") if isinstance(found, dict) else None
    first = inputs[0] if isinstance(inputs, list) and inputs else {}
    tensor = {
        "name": str(first.get("name", "input") if isinstance(first, dict) else "input"),
        "shape": list(images.shape),
        "datatype": "UINT8" if images.dtype == torch.uint8 else "FP32",
        "data": images.flatten().tolist(),
    }
    answer = line.exchange("POST", line.address.infer, json={"inputs": [tensor]})
    try:
        output = answer["outputs"][0]
        sides = len(output["shape"])
        if sides > _MOST_SIDES:
            raise RefusalError(f"200 with a tensor of {sides} dimensions ({shown(answer)})")
        return _shaped(_flat(output["data"]), [int(side) for side in output["shape"]])
    except (LookupError, TypeError, ValueError, OverflowError, RecursionError):
        raise RefusalError(f"200 with neither labels nor scores ({shown(answer)})") from None


def _flat(data: Any, depth: int = _MOST_SIDES) -> list[Any]:
    """The values in lists, lists of lists, and so on."""
    if not isinstance(data, list) or not depth:
        raise TypeError("no list, or nested too deeply")
    return [
        value
        for each in data
        for value in (_flat(each, depth - 1) if isinstance(each, list) else [each])
    ]


def _shaped(values: Sequence[Any], shape: Sequence[int]) -> Any:
    """Values in nested lists of a shape."""
    for side in reversed(shape[1:]):
        if side < 1 or len(values) % side:
            raise ValueError("another number of values")
        values = [list(values[i : i + side]) for i in range(0, len(values), side)]
    if not shape or len(values) != shape[0]:
        raise ValueError("another number of values")
    return list(values)


def _gradio(line: Line, images: torch.Tensor) -> Any:
    """Gradio's calls: the image is uploaded, a function of the app is called, its events are read.

    The address is that of a call, or that of the app: then its one function is called, or `predict`
    if there are several.
    """
    parts = urlsplit(line.address.given)
    root, _, name = re.sub(r"/(gradio_api/)?call/", "\0", parts.path.rstrip("/")).partition("\0")

    def at(path: str) -> str:
        return urlunsplit(parts._replace(path=f"{root}/gradio_api/{path}"))

    name = name or _only_call(line.metadata())
    data, media = encoded(images[0], "image", line.asking)
    file = {"files": (f"image.{media.partition('/')[2]}", data, media)}
    paths = line.exchange("POST", at("upload"), files=file)
    if not isinstance(paths, list) or not paths or not isinstance(paths[0], str):
        raise RefusalError(f"200 with no place of the uploaded image ({shown(paths)})")
    call = f"call/{name}"
    given = {"path": paths[0], "meta": {"_type": "gradio.FileData"}}
    event = line.exchange("POST", at(call), json={"data": [given]})
    number = event.get("event_id") if isinstance(event, dict) else None
    if not isinstance(number, str) or not re.fullmatch(r"[\w-]+", number):
        raise RefusalError(f"200 with no event_id ({shown(event)})")
    told = line.exchange("GET", at(f"{call}/{number}"))
    complete = re.search(r"^event: complete\s+data: (.*)$", str(told), re.MULTILINE)
    try:
        return json.loads(complete[1] if complete else "")[:1]
    except (ValueError, TypeError, LookupError, RecursionError):
        raise RefusalError(f"the call brought no result ({sentence(str(told))})") from None


def _only_call(about: Any) -> str:
    """The function of an app that is meant where the address names none."""
    calls = about.get("named_endpoints") if isinstance(about, dict) else None
    names: list[str] = [str(name).strip("/") for name in calls] if isinstance(calls, dict) else []
    if "predict" in names or not names:
        return "predict"
    if len(names) > 1:
        raise RefusalError(
            f"the app has the functions {sentence(', '.join(names))}",
            "name one at the end of the address: .../gradio_api/call/NAME",
            final=True,
        )
    return quote(names[0], safe="")


APIS: Mapping[str, Api] = {
    "oip": Api(_open_inference, r"/v2/models/[^/].*", many=True),
    "vertex": _row(
        '{"instances": [{"content": "$base64_image"}]}',
        read="predictions[0]",
        address=r"/endpoints/[^/]+:predict$",
        files=True,
    ),
    "sagemaker": _row(
        "@image",
        media="application/x-image",
        address=r"/endpoints/[^/]+/invocations$",
        files=True,
    ),
    "mlflow": _row(
        '{"inputs": "$arrays"}', read="predictions", many=True, address=r"/invocations$"
    ),
    "torchserve": _row("@image", address=r"/predictions/[^/]+(/[^/]+)?$", files=True),
    "tfserving": _row(
        '{"instances": "$arrays"}',
        read="predictions",
        many=True,
        address=r"/v1/models/[^/]+(/(versions|labels)/[^/]+)?:predict$",
        layout="nhwc",
    ),
    "hf": _row("@image", address=r"huggingface\.co/.*models/", files=True),
    "gradio": Api(_gradio, r"(/call/[^/]+|\.hf\.space)$", files=True, about="/gradio_api/info"),
}
"""Every API with a name, in the order in which an address is compared with them."""
