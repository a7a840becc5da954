"""The HTTP interface: the Open Inference Protocol v2 and Prometheus metrics, an ASGI application.

It serves the protocol's health, metadata and infer addresses. What anybody can read here reveals
nothing about trials: neither their number nor the times of answers. So there is no metric of how
long answers take, and none may be added: a first trial waits for the log.
"""

import asyncio
import itertools
import json
import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from countermark.data import as_uint8
from countermark.errors import CountermarkError
from countermark.guard.requests import check_request, image_hashes
from countermark.service.clients import Client, Clients
from countermark.service.engine import BusyError, Engine
from countermark.service.messages import tell
from countermark.version import __version__

_KINDS = {"UINT8": 255, "FP32": 1, "FP64": 1}
"""Data types of a tensor, each with the value of a white pixel."""
_BODY = 4 << 20  # bytes
_NUMBER = 32  # bytes of JSON that hold any pixel value with what stands around it
_SPARE = 1000  # commas and brackets of a body besides those of its data


@dataclass(frozen=True)
class Limits:
    """What a request may take: images, bytes of its body, seconds."""

    max_batch: int
    max_body: int
    timeout: float


def body_limit(shape: tuple[int, int, int]) -> int:
    """Return how many bytes a body may have: 4 MiB, or what one image takes as JSON."""
    return max(_BODY, _NUMBER * math.prod(shape))


class RefusedError(Exception):
    """A request that is not answered, with the status and the reason that the client gets."""

    def __init__(self, status: int, reason: str) -> None:
        """Refuse with an HTTP status."""
        super().__init__(reason)
        self.status = status


def application(
    engine: Engine,
    clients: Clients,
    *,
    name: str,
    shape: tuple[int, int, int],
    model_sha256: str,
    limits: Limits,
    access_log: bool = False,
) -> Starlette:
    """Build the ASGI application that serves one model.

    Args:
        engine: answers the queries; whoever made it stops it.
        clients: who may ask.
        name: name of the model in the addresses.
        shape: shape of one image, `(channels, height, width)`.
        model_sha256: digest of the weights; clients include it in what they sign.
        limits: what a request may take.
        access_log: whether standard error gets one line for each request of a client.
    """
    registry = CollectorRegistry()
    requests = Counter(
        "countermark_requests", "Requests to infer, by HTTP status", ["status"], registry=registry
    )
    images = Counter("countermark_images", "Images that were answered", registry=registry)
    waiting = Gauge("countermark_waiting", "Requests that wait for an answer", registry=registry)
    waiting.set_function(lambda: engine.waiting)

    described = {
        "name": name,
        "versions": ["1"],
        "platform": "countermark",
        "inputs": [{"name": "image", "datatype": "FP32", "shape": [-1, *shape]}],
        "outputs": [{"name": "label", "datatype": "INT64", "shape": [-1]}],
        "parameters": {"model_sha256": model_sha256},
    }

    async def infer(request: Request) -> Response:
        begun, client, count = time.monotonic(), None, 0
        try:
            _named(request, name)
            client = _client(request, clients)
            async with asyncio.timeout(limits.timeout):
                body = await _body(request, limits.max_body)
            if len(body) > 1 << 16:
                identity, x = await asyncio.to_thread(parse_images, body, shape, limits.max_batch)
            else:
                identity, x = parse_images(body, shape, limits.max_batch)
            count = len(x)
            signature, hashes = _signed(request, client, model_sha256, x)
            async with asyncio.timeout(limits.timeout):
                labels = await engine.answer(x, client.name, signature, hashes)
            images.inc(len(labels))
            response: Response = JSONResponse(
                {
                    "model_name": name,
                    "model_version": "1",
                    **({"id": identity} if identity is not None else {}),
                    "outputs": [
                        {
                            "name": "label",
                            "datatype": "INT64",
                            "shape": [len(labels)],
                            "data": labels,
                        }
                    ],
                }
            )
        except RefusedError as refusal:
            response = _error(refusal.status, str(refusal))
        except BusyError as busy:
            response = _error(503, str(busy))
        except TimeoutError:
            response = _error(
                408, f"the request or its answer took longer than {limits.timeout:g} seconds"
            )
        except ClientDisconnect:
            response = _error(400, "the request ended too early")
        except CountermarkError:  # the engine says on standard error why
            response = _error(500, "the query could not be answered; try again later")
        except asyncio.CancelledError:  # the server was told to stop and has waited long enough
            response = _error(503, "the service stops; try again later")
        requests.labels(str(response.status_code)).inc()
        if access_log and client is not None:  # strangers could fill a disk
            _tell_access(client, response.status_code, count, time.monotonic() - begun)
        return response

    async def live(_request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(_request: Request) -> Response:
        told = {"ready": engine.ready(), "model": engine.works, "log": engine.stores()}
        return JSONResponse(told, status_code=200 if told["ready"] else 503)

    async def model_ready(request: Request) -> Response:
        return await _guarded(request, ready)

    async def server(_request: Request) -> Response:
        return JSONResponse({"name": "countermark", "version": __version__, "extensions": []})

    async def metadata(request: Request) -> Response:
        async def found(_request: Request) -> Response:
            return JSONResponse(described)

        return await _guarded(request, found)

    async def metrics(_request: Request) -> Response:
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4")

    async def _guarded(request: Request, then: Any) -> Response:
        try:
            _named(request, name)
        except RefusedError as refusal:
            return _error(refusal.status, str(refusal))
        answered: Response = await then(request)
        return answered

    async def missing(_request: Request, error: Exception) -> Response:
        status = int(getattr(error, "status_code", 404))
        return _error(
            status,
            "there is no such address here"
            if status == 404
            else "this address takes another method",
        )

    model = "/v2/models/{model}"
    routes = [
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
        Route("/v2", server),
        *(Route(f"{place}/ready", model_ready) for place in (model, model + "/versions/{version}")),
        *(
            Route(f"{place}/infer", infer, methods=["POST"])
            for place in (model, model + "/versions/{version}")
        ),
        *(Route(place, metadata) for place in (model, model + "/versions/{version}")),
        Route("/metrics", metrics),
    ]
    served = Starlette(routes=routes, exception_handlers={404: missing, 405: missing})
    served.router.redirect_slashes = False  # a redirect goes wherever the Host header says
    return served


def _tell_access(client: Client, status: int, images: int, seconds: float) -> None:
    """Tell of a request; in tenths of a second, in which the commit of a trial hardly shows."""
    facts = {
        "status": status,
        "images": images,
        "seconds": round(seconds, 1),
        "client": client.name,  # last, because a name may have spaces
    }
    tell("request", " ".join(f"{name}={value}" for name, value in facts.items()), **facts)


def _error(status: int, reason: str) -> Response:
    headers = (
        {"WWW-Authenticate": "Bearer"}
        if status == 401
        else {"Retry-After": "1"}
        if status == 503
        else None
    )
    return JSONResponse({"error": reason}, status_code=status, headers=headers)


def _named(request: Request, name: str) -> None:
    if request.path_params["model"] != name or request.path_params.get("version", "1") != "1":
        raise RefusedError(404, "there is no such model here")


def _client(request: Request, clients: Clients) -> Client:
    scheme, _, api_key = request.headers.get("authorization", "").partition(" ")
    client = clients.find(api_key.strip()) if scheme.lower() == "bearer" else None
    if client is None:
        raise RefusedError(
            401, "unknown client; send a header 'Authorization: Bearer YOUR-API-KEY'"
        )
    return client


async def _body(request: Request, limit: int) -> bytes:
    encodings = ",".join(request.headers.getlist("content-encoding")).lower().split(",")
    if any(encoding.strip() not in ("", "identity") for encoding in encodings):
        raise RefusedError(415, "send the body without a content encoding")
    if "inference-header-content-length" in request.headers:
        taken = (
            "binary tensors are not taken here; send JSON data (tritonclient: set "
            "binary_data=False)"
        )
        raise RefusedError(400, taken)
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise RefusedError(413, f"the body has more than {limit} bytes")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise RefusedError(413, f"the body has more than {limit} bytes")
    return bytes(body)


def parse_images(
    body: bytes, shape: tuple[int, int, int], most: int
) -> tuple[str | None, torch.Tensor]:
    """Read the JSON of a request.

    Whatever the body is, this takes memory in the order of its length: what it could grow into is
    counted before it is parsed, and only numbers become an array.

    Args:
        body: what the client sent.
        shape: shape of one image, `(channels, height, width)`.
        most: largest number of images in a request.

    Returns:
        The identity of the request, `None` if it has none, and its images, uint8 `(n, c, h, w)`.

    Raises:
        RefusedError: it is not a request of the protocol, or its pixels are not valid.
    """
    pixels, rows = math.prod(shape), 1 + shape[0] + shape[0] * shape[1]
    wanted = f"[n, {', '.join(map(str, shape))}]"
    if (
        body.count(b",") > most * pixels + _SPARE
        or body.count(b"[") + body.count(b"{") > most * rows + _SPARE
    ):
        raise RefusedError(
            400, f"the body has more values than 1 to {most} images of the shape {wanted}"
        )
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, "the body is not valid JSON") from error
    inputs = value.get("inputs") if isinstance(value, dict) else None
    identity = value.get("id") if isinstance(value, dict) else None
    if identity is not None and not (isinstance(identity, str) and _encodes(identity)):
        raise RefusedError(400, "id is a string of Unicode characters")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise RefusedError(400, "inputs is a list of one tensor: {name, shape, datatype, data}")
    given = inputs[0]
    declared, kind = given.get("shape"), given.get("datatype")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise RefusedError(400, f"datatype is one of {', '.join(_KINDS)}")
    if (
        not isinstance(declared, list)
        or any(type(side) is not int for side in declared)
        or declared[1:] != list(shape)
    ):
        raise RefusedError(400, f"shape is {wanted}")
    if not 1 <= declared[0] <= most:
        raise RefusedError(400, f"a request has 1 to {most} images")
    numbers = _numbers(given.get("data"))
    if numbers is None or len(numbers) != math.prod(declared):
        raise RefusedError(400, f"data is not {'x'.join(map(str, declared))} numbers")
    white = _KINDS[kind]
    try:
        array = np.array(numbers, np.float64)
    except OverflowError:  # an integer of hundreds of digits
        array = np.array([math.inf])
    if not ((array >= 0) & (array <= white)).all():  # what is no number (NaN) is not there either
        raise RefusedError(400, f"pixels of {kind} are numbers from 0 to {white}")
    if kind == "UINT8" and float in set(map(type, numbers)):
        raise RefusedError(400, "pixels of UINT8 are whole numbers")
    x = torch.from_numpy(
        array.astype(np.uint8 if kind == "UINT8" else np.float32).reshape(declared)
    )
    return identity, as_uint8(x)


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


def _encodes(text: str) -> bool:
    """Tell whether a text can be sent.

    Escapes of JSON may encode half a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _signed(
    request: Request, client: Client, model_sha256: str, x: torch.Tensor
) -> tuple[bytes, list[bytes]]:
    """Return the signature of a client who signs, with the hashes of the images.

    Both are empty for a client who does not sign.
    """
    if client.public_key is None:
        return b"", []
    hashes = image_hashes(x)
    try:
        signature = bytes.fromhex(request.headers.get("countermark-signature", ""))
    except ValueError:
        signature = b""
    if not check_request(client.public_key, model_sha256, hashes, signature):
        raise RefusedError(
            401,
            "this client signs its requests; the header Countermark-Signature is missing or does "
            "not fit the images",
        )
    return signature, hashes
