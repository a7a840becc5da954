"""A client of the guarded service: images go in, classes come out.

Images are brought to the model's shape here, by the code that read its training images, and are
sent as bytes. So a large photograph is not sent whole, the service decodes no files, and a client
who signs their requests signs the pixels that the service sees. Such a client asks one request
after the other.
"""

import email.utils
import itertools
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import requests
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from countermark.data.images import Array, DamagedError, as_array, eight_bits, fitted, from_array
from countermark.errors import CountermarkError
from countermark.guard.requests import RECEIPT_HEADER, checked_terms, classes_sha256
from countermark.places import endpoint_address, own_path
from countermark.service.state import State
from countermark.service.tensors import BESIDES, JSON_LENGTH, SIGNED_BODY
from countermark.session import Session
from countermark.text import brief, sentence

_VARIABLE = "COUNTERMARK_API_KEY"
_MOST = 1 << 24  # bytes of an answer
_MOST_SIGNED = SIGNED_BODY - BESIDES  # of pixels: such a request cannot be split afterwards
_LONGEST_SIDE = 1 << 13  # pixels of an image that a service may ask for
_AGAIN = 1.0  # seconds until a busy service is asked again that does not say when
_AT_ONCE = 0.05  # seconds until a service is asked again that dropped the connection
_DROPPED = 2  # connections of a request that may be dropped
_ADVICE = {
    200: "which is no JSON object; check the address: http(s)://HOST/v2/models/NAME",
    **dict.fromkeys(
        (301, 302, 307, 308), "redirects are not followed; give the address that it leads to"
    ),
    401: f"check key= or {_VARIABLE}, and sign= where the account has a public key",
    403: f"check key= or {_VARIABLE}",
    404: "check the address: http(s)://HOST/v2/models/NAME",
    409: "the query log was renewed or put back; make the client again, and tell the owner",
}
_BUSY = (429, 503)


@dataclass(frozen=True)
class Classification:
    """What the service says of an image.

    Attributes:
        label: number of the class.
        class_name: its name.
    """

    label: int
    class_name: str


@dataclass(frozen=True)
class _Model:
    """What the service says of its model.

    Attributes:
        shape: shape of an image, `(channels, height, width)`.
        most: images that fit into a request.
        names: names of its classes, in the order of the labels.
    """

    shape: tuple[int, int, int]
    most: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class _Answer:
    """A JSON object that the service answered, and its receipt for a signed request."""

    value: dict[str, Any]
    receipt: str


class Client:
    """Asks a guarded service for the classes of images.

    A service that is busy (429 or 503) is asked again when it says, and a request that is too large
    for it or for a proxy (413) is split.

    Example:
        >>> with cm.Client("http://127.0.0.1:8080/v2/models/model", key="API KEY") as client:
        ...     found = client.classify(["photos/disc/00000.png"])
        >>> type(found[0].label), found[0].class_name in "0123456789"
        (<class 'int'>, True)
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        sign: str | Path | bytes | None = None,
        state: str | Path | None = None,
        timeout: float = 30.0,
    ) -> None:
        """Prepare to ask; nothing is sent yet.

        Args:
            url: the model's address, `http(s)://HOST/v2/models/NAME`.
            key: API key, as `countermark client add` prints it; default the environment variable
                `COUNTERMARK_API_KEY`. It is never shown.
            sign: Ed25519 private key of a client who signs their requests: the path or the content
                of a PEM file without a password, or 32 bytes.
            state: folder in which a client who signs keeps where their requests stand, and the
                owner's receipts. Keep it: it is their evidence, and the account goes on from it.
            timeout: seconds that a request may take, with all waiting for a busy service.

        Raises:
            CountermarkError: one of these cannot be used, or there is no API key.
        """
        address = endpoint_address(url)
        if address.infer == address.metadata:
            raise CountermarkError(f"{address.name} is not http(s)://HOST/v2/models/NAME")
        if not (isinstance(timeout, int | float) and 0 < timeout < float("inf")):
            raise CountermarkError(f"timeout is a positive number of seconds, not {brief(timeout)}")
        self.url = address.name
        self._address, self._timeout = address, float(timeout)
        self._key = _checked(os.environ.get(_VARIABLE) if key is None else key)
        if (sign is None) != (state is None):
            raise CountermarkError(
                "a client who signs needs both sign= and state=, a folder for what they signed"
            )
        self._state: State | None = None
        if sign is not None:
            self._state = State(own_path(state, "state"), _private_key(sign))
        self._opened = False
        self._model: _Model | None = None
        self._session = Session()
        self._session.headers["Authorization"] = f"Bearer {self._key}"

    def __repr__(self) -> str:
        """Show the address, and neither key."""
        return f"Client({self.url!r})"

    def __enter__(self) -> Self:
        """Return this client, which is closed at the end."""
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        """Close the connections."""
        self.close()

    def close(self) -> None:
        """Close the connections; the next request opens them again."""
        self._session.close()

    def classify(self, images: Iterable[Any]) -> tuple[Classification, ...]:
        """Ask for the classes of images.

        Args:
            images: each the path of a PNG, JPEG, WebP or BMP file, the content of one, or an array
                or a tensor: `(c, h, w)`, `(h, w, c)` or `(h, w)`, uint8 or pixels of [0, 1]. Files
                are brought to the model's shape; arrays must have it.

        Returns:
            One for each image, in their order.

        Raises:
            CountermarkError: an image cannot be read, or the service cannot be reached, refuses, or
                stays busy longer than the timeout.
        """
        if isinstance(images, str | Path | bytes):
            raise CountermarkError("classify takes a list of images, also of one: [image]")
        model = self._model = self._model or self._described()
        found: list[Classification] = []
        rest = iter(images)
        while chosen := list(itertools.islice(rest, model.most)):
            pixels = [
                _pixels(image, model.shape, place)
                for place, image in enumerate(chosen, start=len(found))
            ]
            found += self._ask(model, np.stack(pixels))
        return tuple(found)

    def _described(self) -> _Model:
        """What the service's metadata say of the model."""
        answer = self._exchange("GET", self._address.metadata)
        found = {} if answer is None else answer.value
        try:
            about = found["parameters"]
            channels, height, width = (int(side) for side in found["inputs"][0]["shape"][1:])
            pixels = channels * height * width
            if max(height, width) > _LONGEST_SIDE:
                raise ValueError
            body = int(about["max_body"]) - BESIDES
            if self._state is not None:
                body = min(body, _MOST_SIGNED)
            most = min(int(about["max_batch"]), body // pixels)
            names = tuple(str(name) for name in about.get("class_names", ()))
            model = _Model((channels, height, width), max(1, most), names)
            signing = self._state is None or about.get("signing") is True
        except (LookupError, TypeError, ValueError, ZeroDivisionError):
            raise CountermarkError(
                f"{self.url} does not describe its model as Countermark's service does; check the "
                "address, and that the service is as new as this client"
            ) from None
        if not signing:
            raise CountermarkError(
                f"{self.url} takes no signed requests: it has no guard, or is an older release; "
                "leave sign= and state= out"
            )
        return model

    def _ask(self, model: _Model, pixels: Array) -> list[Classification]:
        """Ask for uint8 images `(n, c, h, w)`, in two requests where one is too large."""
        if self._state is not None:
            return self._ask_signed(self._state, model, pixels)
        answer = self._send(pixels, {})
        if answer is None and len(pixels) > 1:
            half = len(pixels) // 2
            return self._ask(model, pixels[:half]) + self._ask(model, pixels[half:])
        return self._classes(answer, pixels)

    def _ask_signed(self, state: State, model: _Model, pixels: Array) -> list[Classification]:
        """Sign and ask, after a request that got no answer."""
        with state.alone():
            if not self._opened:
                self._open(state, model)
            if state.waiting is not None and not np.array_equal(state.waiting, pixels):
                self._send_signed(state, model, state.waiting)
            return self._send_signed(state, model, pixels)

    def _send_signed(self, state: State, model: _Model, pixels: Array) -> list[Classification]:
        signed = state.sign(pixels)
        answer = self._send(pixels, signed.headers())
        if answer is None:
            raise CountermarkError(
                f"{self.url}: the request that was signed is too large (413), and nothing else can "
                "be asked with this state before it is answered; have the limit of a proxy before "
                f"the service raised to {pixels.size + BESIDES} bytes"
            )
        classes = self._classes(answer, pixels)
        # The receipt is for labels; what they are called was fixed in the opening.
        names = dict(enumerate(model.names))
        if any(names.get(each.label) != each.class_name for each in classes):
            raise CountermarkError(
                f"{self.url} answered with a class of another name than its label has; do not go "
                "on with it"
            )
        state.answered(signed, [each.label for each in classes], answer.receipt)
        return classes

    def _open(self, state: State, model: _Model) -> None:
        """Learn the service's terms, and sign an opening where there is none of them."""
        address = self._address.metadata + "/signing"
        answer = self._exchange("GET", address)
        try:
            told = {} if answer is None else answer.value
            terms = checked_terms(told["terms"])
            if terms["classes_sha256"] != classes_sha256(model.names):
                raise ValueError
            if not (
                type(told["number"]) is int
                and isinstance(told["digest"], str)
                and isinstance(told["opening"], dict | None)
            ):
                raise ValueError
        except (LookupError, TypeError, ValueError, CountermarkError):
            raise CountermarkError(
                f"{self.url} does not say what it signs as Countermark's service does; check the "
                "address"
            ) from None
        opening = state.opening(told)
        if opening is not None:
            state.begin(opening)
            body = json.dumps(opening.record()).encode()
            if self._exchange("POST", address, body, {"Content-Type": "application/json"}) is None:
                raise CountermarkError(f"{self.url} takes no opening (413); check the address")
        self._opened = True

    def _send(self, pixels: Array, headers: Mapping[str, str]) -> _Answer | None:
        """Ask for uint8 images `(n, c, h, w)` in one request; `None` if it is too large."""
        tensor = {"name": "image", "shape": list(pixels.shape), "datatype": "UINT8"}
        text = json.dumps(
            {
                "inputs": [{**tensor, "parameters": {"binary_data_size": pixels.size}}],
                "outputs": [{"name": "label"}, {"name": "class"}],
            }
        ).encode()
        sent = {"Content-Type": "application/octet-stream", JSON_LENGTH: str(len(text)), **headers}
        return self._exchange("POST", self._address.infer, text + pixels.tobytes(), sent)

    def _classes(self, answer: _Answer | None, pixels: Array) -> list[Classification]:
        """What the service answered of some images."""
        if answer is None:
            raise CountermarkError(
                f"{self.url}: one image is too large (413); raise --max-body of the service, or "
                "the limit of a proxy before it"
            )
        try:
            data = {output["name"]: output["data"] for output in answer.value["outputs"]}
            classes = [
                Classification(int(label), str(name))
                for label, name in zip(data["label"], data["class"], strict=True)
            ]
            if len(classes) != len(pixels):
                raise ValueError
        except (LookupError, TypeError, ValueError):
            raise CountermarkError(
                f"{self.url} answered, but not with a label and a class for each image; check the "
                "address"
            ) from None
        return classes

    def _exchange(
        self, method: str, address: str, body: bytes | None = None, headers: Any = None
    ) -> _Answer | None:
        """One request and its answer, however often it must be sent; `None` if it is too large.

        It may be sent again, since the service gives a client the same answer to the same image.
        """
        end, dropped = time.monotonic() + self._timeout, 0
        while True:
            left = max(0.001, end - time.monotonic())
            try:
                with self._session.request(
                    method,
                    address,
                    data=body,
                    headers=headers,
                    timeout=left,
                    stream=True,
                    allow_redirects=False,
                ) as response:
                    status, waits = response.status_code, response.headers.get("Retry-After", "")
                    receipt = response.headers.get(RECEIPT_HEADER, "")
                    value = _object(_content(response))
            except requests.RequestException as error:
                dropped += 1
                said = f"gave no answer ({type(error).__name__})"
                advice = "check the address, and whether the service runs"
                again, wait = dropped <= _DROPPED, _AT_ONCE
            else:
                if status == 200 and value is not None:
                    return _Answer(value, receipt)
                if status == 413:
                    return None
                said = f"answered {status}{self._reason(value)}"
                advice = _ADVICE.get(status, "")
                again, wait = status in _BUSY, max(_AT_ONCE, _seconds(waits))
            if again and time.monotonic() + wait < end:
                time.sleep(wait)
                continue
            if again:
                advice = (
                    f"asking again in {wait:.3g} seconds would be later than the timeout of "
                    f"{self._timeout:g} seconds allows; try again later, or give a longer one"
                )
            raise CountermarkError(f"{self.url} {said}{advice and f'; {advice}'}")

    def _reason(self, value: dict[str, Any] | None) -> str:
        """What the service said of an error, without the API key if that is in it."""
        said = str((value or {}).get("error", "")).replace(self._key, "API-KEY")
        return f" ({sentence(said)})" if said else ""


def _checked(key: object) -> str:
    """An API key that can stand in a header."""
    if key is None:
        raise CountermarkError(f"give the API key as key=..., or in {_VARIABLE}")
    key = key.strip() if isinstance(key, str) else ""
    if not (key and key.isascii() and key.isprintable() and " " not in key):
        raise CountermarkError(
            "the API key is a word of ASCII characters, as countermark client add prints it"
        )
    return key


def _private_key(given: object) -> bytes:
    """The 32 bytes of an Ed25519 private key."""
    if not isinstance(given, bytes):
        path = own_path(given, "sign")
        try:
            given = path.read_bytes()
        except OSError as error:
            raise CountermarkError(f"cannot read {path}: {error.strerror}") from error
    if len(given) == 32:
        return given
    try:
        found = load_pem_private_key(given, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        found = None
    if not isinstance(found, Ed25519PrivateKey):
        raise CountermarkError(
            "sign is an Ed25519 private key: a PEM file without a password, or 32 bytes"
        )
    return found.private_bytes_raw()


def _pixels(image: object, shape: tuple[int, int, int], place: int) -> Array:
    """One image as the model takes it, uint8 `(c, h, w)`."""
    name = sentence(str(image)) if isinstance(image, str | Path) else f"image {place}"
    try:
        if isinstance(image, bytes):
            return fitted(image, shape)
        if isinstance(image, str | Path):
            return fitted(own_path(image, "an image"), shape)
        array = as_array(image)
        found = eight_bits(array)[0] if array.shape == shape else from_array(array).pixels
    except DamagedError as error:
        raise CountermarkError(f"{name}: {error}") from error
    if found.shape != shape:
        raise CountermarkError(
            f"{name} has the shape {found.shape} (channels, height, width), and the model takes "
            f"{shape}; files are brought to it, arrays are not"
        )
    return found


def _content(response: requests.Response) -> bytes:
    """The body of an answer, cut off where it is too long to be one."""
    data = bytearray()
    for chunk in response.iter_content(1 << 16):
        data += chunk
        if len(data) > _MOST:
            break
    return bytes(data)


def _object(content: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _seconds(waits: str) -> float:
    """How long a header Retry-After says to wait, in seconds; it may be a date."""
    if waits.isascii() and waits.isdigit():
        return float(waits[:9])
    try:
        date = email.utils.parsedate_to_datetime(waits)
        return date.timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return _AGAIN
