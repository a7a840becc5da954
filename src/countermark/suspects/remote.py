"""A model behind HTTP: the Open Inference Protocol v2 and MLflow's `/invocations`.

`Asker` does the asking; here is what one request and one answer look like.
If an answer cannot be used, the error says why: the status, what the server wrote, or what is wrong
with the labels.
"""

import json
import re
from typing import Any

import requests
import torch
from urllib3.exceptions import MaxRetryError, NewConnectionError

from countermark.places import endpoint_address
from countermark.session import Session
from countermark.suspects.asker import (
    MOST_LABELS,
    NO_ANSWER,
    Asker,
    Asking,
    FailureError,
    RefusalError,
)
from countermark.text import sentence

_RESPONSE_LIMIT = 1 << 24
_WORDS_LIMIT = 1 << 12
_LONGEST_NUMBER = 32  # characters of a number that is written as a string
_MARKUP = re.compile(r"<(script|style)\b.*?</\1>|<[^>]*>", re.DOTALL | re.IGNORECASE)
_CREDENTIALS = "give it what it wants with --headers, such as 'Authorization: Bearer ...'"
_ADDRESS = "check the address: .../v2/models/NAME or .../invocations"
_FINAL = {
    401: _CREDENTIALS,
    403: _CREDENTIALS,
    404: _ADDRESS,
    405: _ADDRESS,
    407: "check the proxy in HTTP_PROXY and HTTPS_PROXY",
    410: _ADDRESS,
}
"""Statuses that are about the address or the client and not about the images: what to do."""


class Endpoint(Asker):
    """A suspect behind a URL; see `Asker` for how it is called and what it keeps."""

    def __init__(self, url: str, asking: Asking | None = None) -> None:
        """Take an address of the Open Inference Protocol or of MLflow.

        Args:
            url: `http(s)://HOST/v2/models/NAME[/versions/V][/infer]` or `.../invocations`, with
                or without a query string.
            asking: how, and how much.

        Raises:
            CountermarkError: the URL is neither or holds a password, or the replay log cannot be
                read.
        """
        asking = asking or Asking()
        self._address = endpoint_address(url)
        super().__init__(self._address.name, self._infer, asking)
        self._timeout = asking.timeout
        self._session = Session()
        self._session.headers.update(dict(asking.headers))
        self._input: str | None = None

    def _infer(self, images: torch.Tensor) -> list[int]:
        if self._address.mlflow:
            body: dict[str, Any] = {"inputs": images.tolist()}
        else:
            tensor = {
                "name": self._input_name(),
                "shape": list(images.shape),
                "datatype": "UINT8" if images.dtype == torch.uint8 else "FP32",
                "data": images.flatten().tolist(),
            }
            body = {"inputs": [tensor]}
        return _labels(
            self._exchange("POST", self._address.infer, body), len(images), self._address.mlflow
        )

    def _input_name(self) -> str:
        """The name of the model's input, from its metadata; `input` where there are none."""
        if self._input is None:
            found = self._attempt(lambda: self._exchange("GET", self._address.metadata)) or {}
            inputs = found.get("inputs")
            first = inputs[0] if isinstance(inputs, list) and inputs else {}
            self._input = str(first.get("name", "input") if isinstance(first, dict) else "input")
        return self._input

    def _exchange(
        self, method: str, address: str, body: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """One request and its answer, a JSON object.

        Raises:
            RefusalError: it was refused, or the answer is something else.
            FailureError: there was none, or the server asks to come again.
        """
        try:
            with self._session.request(
                method,
                address,
                json=body,
                timeout=self._timeout,
                stream=True,
                allow_redirects=False,
            ) as response:
                return _object(response)
        except (requests.RequestException, UnicodeError) as error:
            if isinstance(error, ValueError) or "CERTIFICATE_VERIFY_FAILED" in str(error):
                # An address or a header that cannot be sent, or a certificate that does not hold.
                advice = "check the address, --headers, and REQUESTS_CA_BUNDLE for its certificate"
                words = sentence(f"{type(error).__name__}: {error}")
                raise RefusalError(words, advice, final=True) from error
            nobody = _is_nobody(error)
            raise FailureError(type(error).__name__, there=False, nobody=nobody) from error


def _is_nobody(error: requests.RequestException) -> bool:
    """Whether no connection was made, so that the suspect cannot have seen what was asked."""
    cause = error.args[0] if error.args else None
    nobody = isinstance(cause, MaxRetryError) and isinstance(cause.reason, NewConnectionError)
    kinds = requests.exceptions.ConnectTimeout | requests.exceptions.ProxyError
    return nobody or isinstance(error, kinds)


def _object(response: requests.Response) -> dict[str, Any]:
    """The JSON object of a response."""
    status = response.status_code
    said = sentence(f"{status} {response.reason or ''}")
    if 300 <= status < 400:  # its body is not even looked at
        where = sentence(response.headers.get("Location", "nowhere"))
        advice = "redirects are not followed; give the address that it leads to, if you trust it"
        raise RefusalError(f"{said}, to {where}", advice, final=True)
    if status != 200:
        words = _words(_body(response, _WORDS_LIMIT))
        said += f" ({words})" if words else ""
        if status == 429 or status >= 500:
            raise FailureError(said, busy=status == 429)
        raise RefusalError(said, _FINAL.get(status, ""), final=status in _FINAL)
    data = _body(response, _RESPONSE_LIMIT + 1)
    if len(data) > _RESPONSE_LIMIT:
        raise RefusalError(f"{said} with an answer of more than {_RESPONSE_LIMIT} bytes")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        words = f"{said} with something else than a JSON object ({_words(data)})"
        raise RefusalError(words, _ADDRESS, final=True)
    return value


def _body(response: requests.Response, limit: int) -> bytes:
    data = b""
    for chunk in response.iter_content(min(limit, 1 << 16)):
        data += chunk
        if len(data) >= limit:
            break
    return data


def _words(data: bytes) -> str:
    """The first words of a body, without the markup of a page."""
    text = data[:_WORDS_LIMIT].decode(errors="replace")
    return sentence(_MARKUP.sub(" ", text) if text.lstrip()[:1] == "<" else text)


def _labels(found: dict[str, Any], count: int, mlflow: bool) -> list[int]:
    """Labels out of a response: integers for each image, or one row of scores.

    Sides of 1 after the first do not matter, and a number may be written as a string.

    Raises:
        RefusalError: the response holds something else.
    """
    try:
        if mlflow:
            values = _numbers(found["predictions"])
        else:
            output = found["outputs"][0]
            values = _numbers(output["data"]).reshape([int(side) for side in output["shape"]])
    except (
        KeyError,
        IndexError,
        TypeError,
        ValueError,
        RuntimeError,
        OverflowError,
        RecursionError,
    ):
        raise RefusalError(f"200 with neither labels nor scores ({_shown(found)})") from None
    shape = [side for i, side in enumerate(values.shape) if i == 0 or side != 1]
    if not values.numel() or not shape or len(values) != count or len(shape) > 2:
        raise RefusalError(
            f"200 with answers of the shape {tuple(values.shape)} to {count} images, where labels "
            f"({count},) or scores ({count}, classes) are expected"
        )
    values = values.reshape(shape)
    if values.dim() == 2:
        scored = torch.isfinite(values).all(1)
        values = torch.where(scored, values.argmax(1), NO_ANSWER)
    whole = torch.isfinite(values) & (values == values.round())
    whole &= (values >= 0) & (values < MOST_LABELS)
    if not bool(whole.any()):
        raise RefusalError(f"200 with no label in it ({_shown(found)})")
    return torch.where(whole, values, NO_ANSWER).long().tolist()


def _numbers(data: Any) -> torch.Tensor:
    """A list of numbers as a float64 tensor.

    Raises:
        RefusalError: class names.
        ValueError: and other errors of a list that is no array of numbers.
    """
    try:
        return torch.tensor(data, dtype=torch.float64)
    except (TypeError, ValueError):
        return torch.tensor(_without_strings(data), dtype=torch.float64)


def _without_strings(data: Any) -> Any:
    if isinstance(data, list):
        return [_without_strings(part) for part in data]
    if not isinstance(data, str):
        return data
    try:
        return float(data if len(data) <= _LONGEST_NUMBER else "")
    except ValueError:
        raise RefusalError(
            f"200 with a class name, {sentence(data)!r}, for a label",
            "serve it with class numbers or scores; which name is which class is not known here",
            final=True,
        ) from None


def _shown(found: dict[str, Any]) -> str:
    """The beginning of an answer."""
    try:
        return sentence(json.dumps(found)[:_WORDS_LIMIT])
    except RecursionError:
        return "nested too deeply to be shown"


__all__ = ["Endpoint"]
