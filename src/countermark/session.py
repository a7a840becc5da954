"""An HTTP session that is safe with a malicious server.

One deadline holds for the whole answer: a timeout of `requests` is for each read, so a server that
sends a byte of the head or the body now and then would be read for ever. A redirect is only a
status: `requests` would read its body and its address even if told not to follow it.
"""

import http.client
import io
import socket
import time
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection

from countermark.errors import CountermarkError
from countermark.text import sentence

_TIMEOUT = 30.0


class Session(requests.Session):
    """A `requests.Session` whose timeout also limits the whole answer, from the request on."""

    def __init__(self, netrc: bool = False) -> None:
        """Prepare the session for every address.

        The environment's proxies and certificates are used.

        Args:
            netrc: whether a `.netrc` file may give the password for the host. Its entry, or its
                default, replaces an Authorization header that the user gave, and would be shown to
                a suspect.
        """
        super().__init__()
        self.auth = None if netrc else _no_password
        for scheme in ("http://", "https://"):
            self.mount(scheme, _Adapter())

    def get_redirect_target(self, resp: requests.Response) -> None:
        """Say that no answer is a redirect."""
        return


def fetch(
    url: str, whose: str, *, limit: int, body: bytes | None = None, kind: str = "application/json"
) -> bytes:
    """Ask a service that the user chose, which may want a login from `.netrc`.

    Args:
        url: its address.
        whose: what messages call it.
        limit: bytes after which no more of the answer is read.
        body: what is posted; without it the address is only got.
        kind: content type of the body.

    Returns:
        Its answer, or as much of it as is within the limit and a part that tells that it is not.

    Raises:
        CountermarkError: it does not answer, refuses, or sends its callers on.
    """
    answer = b""
    try:
        with (
            Session(netrc=True) as session,
            session.request(
                "GET" if body is None else "POST",
                url,
                data=body,
                headers={} if body is None else {"Content-Type": kind},
                timeout=_TIMEOUT,
                stream=True,
                allow_redirects=False,
            ) as found,
        ):
            if found.is_redirect:
                raise CountermarkError(
                    f"{whose} {url} sends its callers on to {sentence(found.headers['location'])}; "
                    "give that address if you trust it"
                )
            found.raise_for_status()
            for part in found.iter_content(1 << 14):  # whose errors are those of `requests`
                answer += part
                if len(answer) > limit:
                    break
    except (requests.RequestException, OSError, ValueError) as error:
        raise CountermarkError(
            f"{whose} {url} does not answer ({sentence(str(error))}); run the same command again"
        ) from error
    return answer


def _no_password(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Leave a request as it is."""
    return request


class _Reader(io.RawIOBase):
    """What a socket receives, until a deadline."""

    def __init__(self, connection: socket.socket, stream: io.RawIOBase) -> None:
        self._connection, self._stream = connection, stream
        timeout = connection.gettimeout()
        self._deadline = None if timeout is None else time.monotonic() + timeout

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        if self._deadline is not None:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("the answer as a whole took too long")
            self._connection.settimeout(left)
        return self._stream.readinto(buffer)

    def close(self) -> None:
        self._stream.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self.fp = io.BufferedReader(_Reader(sock, self.fp.detach()))


class _Connection(HTTPConnection):
    response_class = _Response


class _SecureConnection(HTTPSConnection):
    response_class = _Response


class _Adapter(HTTPAdapter):
    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        pool: Any = super().get_connection_with_tls_context(*args, **kwargs)
        pool.ConnectionCls = _SecureConnection if pool.scheme == "https" else _Connection
        return pool
