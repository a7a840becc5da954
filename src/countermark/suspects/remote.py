"""A model behind HTTP, whatever its API.

`Asker` does the asking, and `apis` knows what is sent to each API; here is one request and one
answer. If an answer cannot be used, the error says why: the status, what the server wrote, or what
is wrong with the labels.
"""

import json
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import parse_qsl, quote, quote_plus, urlsplit, urlunsplit

import requests
import torch
from urllib3.exceptions import MaxRetryError, NewConnectionError

from countermark.errors import CountermarkError
from countermark.files import canonical_json, sha256
from countermark.places import endpoint_address
from countermark.session import Session
from countermark.suspects.answers import Names, labels_of
from countermark.suspects.apis import found_api
from countermark.suspects.asker import Asker, Asking, FailureError, RefusalError
from countermark.text import sentence

_RESPONSE_LIMIT = 1 << 22  # read as JSON, it takes fifty times as much memory
_WORDS_LIMIT = 1 << 12
_MARKUP = re.compile(r"<(script|style)\b.*?</\1>|<[^>]*>", re.DOTALL | re.IGNORECASE)
_CREDENTIALS = "give it what it wants with --headers, such as 'Authorization: Bearer ...'"
_ADDRESS = "check the address and --api"
_FINAL = {
    401: _CREDENTIALS,
    403: _CREDENTIALS,
    404: _ADDRESS,
    405: _ADDRESS,
    407: "check the proxy in HTTP_PROXY and HTTPS_PROXY",
    410: _ADDRESS,
}
"""Statuses that are about the address or the client and not about the images: what to do."""
_TEXTS = ("text/plain", "text/html", "text/event-stream")


class Endpoint(Asker):
    """A suspect behind a URL; see `Asker` for how it is called and what it keeps.

    Attributes:
        address: where it is.
        asking: how it is asked.
        api: the name of its API.
        files: whether it takes image files, and no arrays.
    """

    def __init__(self, url: str, asking: Asking | None = None) -> None:
        """Take an address.

        Args:
            url: `http(s)://HOST/...`, with or without a query string.
            asking: how, and how much; it names the API, unless the address tells it.

        Raises:
            CountermarkError: the URL cannot be asked or holds a password, its API is not known or
                takes no such images, or the replay log cannot be read.
        """
        asking = asking or Asking()
        self.address = endpoint_address(url)
        self._row, self.api, self._guessed = found_api(self.address, asking)
        self.files = self._row.files
        if self.files:
            _check_files(asking, self.api)
            asking = replace(asking, pixels="uint8")
        asking = replace(
            asking,
            layout=asking.layout or self._row.layout,
            batch_size=asking.batch_size if self._row.many else 1,
        )
        self.asking, self._names = asking, Names(asking.names, foreign=asking.foreign)
        super().__init__(self.address.name, self._infer, asking, which=self._which(asking))
        lossy = any("jpeg" in word for word in (asking.form, *asking.send))
        self.form = f"jpeg {asking.quality} " if lossy else ""
        self._session = Session()
        self._headers = dict(asking.headers)
        self.secrets = frozenset(_secrets(url, asking.headers))
        if self.files:
            self.declared = "--api, --send, --form"
        self._metadata: Any = None

    def _which(self, asking: Asking) -> str:
        """What else than the address may say which model is asked: query string and headers.

        A digest of them; empty if there are none. Credentials change while the model is the same.
        """
        chosen = {
            name.lower(): value for name, value in asking.headers if name.lower() != "authorization"
        }
        if not chosen and not self.address.query_sha256:
            return ""
        return sha256(canonical_json([self.address.query_sha256, chosen]))

    def _infer(self, images: torch.Tensor) -> list[int]:
        try:
            return labels_of(self._row.ask(self, images), len(images), self._names)
        except RefusalError as refusal:
            if self._guessed and not self._answered:
                guess = f"its address looks like that of the API {self.api}; --api names another"
                refusal.advice = f"{refusal.advice}; {guess}" if refusal.advice else guess
            raise

    def metadata(self) -> Any:
        """What the endpoint says about the model, asked once; nothing if it says nothing."""
        if self._metadata is None:
            parts = urlsplit(self.address.metadata)
            address = urlunsplit(parts._replace(path=parts.path + self._row.about))
            found = self._attempt(lambda: self.exchange("GET", address))
            self._metadata = found or {}
        return self._metadata

    def exchange(self, method: str, address: str, **sent: Any) -> Any:
        """One request and its answer: a JSON value, or a text where the server says that it is one.

        Raises:
            RefusalError: it was refused, or the answer is something else.
            FailureError: there was none, or the server asks to come again.
        """
        sent["headers"] = {**sent.get("headers", {}), **self._headers}
        try:
            with self._session.request(
                method,
                address,
                timeout=self.asking.timeout,
                stream=True,
                allow_redirects=False,
                **sent,
            ) as response:
                return _value(response)
        except (requests.RequestException, UnicodeError) as error:
            if isinstance(error, ValueError) or "CERTIFICATE_VERIFY_FAILED" in str(error):
                # An address or a header that cannot be sent, or a certificate that does not hold.
                advice = "check the address, --headers, and REQUESTS_CA_BUNDLE for its certificate"
                words = _broken(error)
                raise RefusalError(words, advice, final=True) from error
            nobody = _is_nobody(error)
            words = type(error).__name__ if nobody else _broken(error)
            raise FailureError(words, there=False, nobody=nobody) from error


def _secrets(url: str, headers: Iterable[tuple[str, str]]) -> Iterator[str]:
    """The words of headers and of a query string that nobody else should read."""
    query = urlsplit(url).query
    words = [word for _, value in headers for word in value.split()]
    for word in (*words, query, *(value for _, value in parse_qsl(query))):
        for each in (word, quote(word), quote_plus(word)):
            if len(each) >= 8 or word == query != "":
                yield each


def _broken(error: Exception) -> str:
    """What broke a request off, without its address, whose query string may hold a secret."""
    cause = error.args[0] if error.args else None
    reason = cause.reason if isinstance(cause, MaxRetryError) else error
    return sentence(re.sub(r"\?[^\s'\")]*", "?...", f"{type(error).__name__}: {reason}"))


def _check_files(asking: Asking, api: str) -> None:
    """Refuse what can be said of arrays only.

    Raises:
        CountermarkError: something of that kind is said.
    """
    given = [
        name
        for name, usual in (("layout", None), ("mean", ()), ("std", ()))
        if getattr(asking, name) != usual
    ]
    if given:
        raise CountermarkError(
            f"the API {api} takes image files, for which --{given[0]} has no meaning; leave it out"
        )


def _is_nobody(error: requests.RequestException) -> bool:
    """Whether no connection was made, so that the suspect cannot have seen what was asked."""
    cause = error.args[0] if error.args else None
    nobody = isinstance(cause, MaxRetryError) and isinstance(cause.reason, NewConnectionError)
    kinds = requests.exceptions.ConnectTimeout | requests.exceptions.ProxyError
    return nobody or isinstance(error, kinds)


def _value(response: requests.Response) -> Any:
    """The JSON value of a response, or the text of one that says it is text."""
    status = response.status_code
    said = sentence(f"{status} {response.reason or ''}")
    if 300 <= status < 400:  # its body is not even looked at
        where = sentence(response.headers.get("Location", "nowhere"))
        advice = "redirects are not followed; give the address that it leads to, if you trust it"
        raise RefusalError(f"{said}, to {where}", advice, final=True)
    if status not in (200, 201):
        words = _words(_body(response, _WORDS_LIMIT))
        said += f" ({words})" if words else ""
        if status == 429 or status >= 500:
            raise FailureError(said, busy=status == 429, wait=_wanted_wait(response))
        raise RefusalError(said, _FINAL.get(status, ""), final=status in _FINAL)
    data = _body(response, _RESPONSE_LIMIT + 1)
    if len(data) > _RESPONSE_LIMIT:
        raise RefusalError(f"{said} with an answer of more than {_RESPONSE_LIMIT} bytes")
    try:
        text = data.decode(json.detect_encoding(data))
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        media = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if media in _TEXTS and not text.lstrip().startswith("<"):
            return text.strip()
        words = f"{said} with something else than JSON ({_words(data)})"
        raise RefusalError(words, _ADDRESS, final=True) from None


def _wanted_wait(response: requests.Response) -> float:
    """The seconds after which a server wants to be asked again; 0 where it does not say."""
    said = response.headers.get("Retry-After", "").strip()
    if said.isascii() and said.isdigit():
        return float(said[:9])
    try:
        return max(0.0, parsedate_to_datetime(said).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


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


__all__ = ["Endpoint"]
