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
