"""The HTTP interface: the Open Inference Protocol v2 and Prometheus metrics, an ASGI application.

It serves the protocol's health, metadata and infer addresses, with the bodies of `tensors`, and one
of its own for clients who sign. What anybody can read here reveals nothing about trials: neither
their number nor the times of answers. So there is no metric of how long answers take, and none may
be added: a first trial waits for the log.
"""

import asyncio
import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from countermark.errors import CountermarkError
from countermark.guard.requests import RECEIPT_HEADER, ConflictError
from countermark.service.clients import Client, Clients
from countermark.service.engine import BusyError, Engine
from countermark.service.messages import tell
from countermark.service.signing import Signing
from countermark.service.tensors import (
    BESIDES,
    DATATYPES,
    JSON_LENGTH,
    OUTPUTS,
    SIGNED_BODY,
    RefusedError,
    answer,
    decoded,
    parse_request,
)
from countermark.version import __version__

_BODY = 4 << 20  # bytes
_NUMBER = 32  # bytes of JSON that hold any pixel value with what stands around it
_QUICK = 1 << 16  # bytes of a body, and pixels of its image files, that are read without a thread
_OPENING = 1 << 14  # bytes of an opening
_READERS = 4  # threads that read bodies, at most: each may hold a large image
_MOST_IMAGES = 4096  # the largest --max-batch

Result = TypeVar("Result")


@dataclass(frozen=True)
class Limits:
    """What a request may take: images, bytes of its body, seconds."""

    max_batch: int
    max_body: int
    timeout: float


def body_limit(shape: tuple[int, int, int], max_batch: int) -> int:
    """How many bytes a body may have.

    These are 4 MiB, or what one image takes as JSON, or the largest batch as bytes.
    """
    values = math.prod(shape)
    return max(_BODY, _NUMBER * values, max_batch * values + BESIDES)


def application(
    engine: Engine,
    clients: Clients,
    *,
    name: str,
    shape: tuple[int, int, int],
    class_names: Sequence[str],
    model_sha256: str,
    limits: Limits,
    signing: Signing | None,
    access_log: bool = False,
) -> Starlette:
    """Build the ASGI application that serves one model.

    Args:
        engine: answers the queries; whoever made it stops it.
        clients: who may ask.
        name: name of the model in the addresses.
        shape: shape of one image, `(channels, height, width)`.
        class_names: names of the classes, in the order of the labels.
        model_sha256: digest of the weights.
        limits: what a request may take.
        signing: what clients need who sign; `None` without a guard, where nothing is signed.
        access_log: whether standard error gets one line for each request of a client.
    """
    registry = CollectorRegistry()
    requests = Counter(
        "countermark_requests", "Requests to infer, by HTTP status", ["status"], registry=registry
    )
    images = Counter("countermark_images", "Images that were answered", registry=registry)
    waiting = Gauge("countermark_waiting", "Requests that wait for an answer", registry=registry)
    waiting.set_function(lambda: engine.waiting)

    names = [each.encode(errors="replace").decode() for each in class_names]  # halves of characters
    described = JSONResponse(
        {
            "name": name,
            "versions": ["1"],
            "platform": "countermark",
            "inputs": [{"name": "image", "datatype": "FP32", "shape": [-1, *shape]}],
            "outputs": [
                {"name": output, "datatype": kind, "shape": [-1]}
                for output, kind in OUTPUTS.items()
            ],
            "parameters": {
                "model_sha256": model_sha256,
                "class_names": names,
                "datatypes": DATATYPES,
                "max_batch": limits.max_batch,
                "max_body": limits.max_body,
                "signing": signing is not None,
            },
        }
    )
    readers = ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1), "read")
    signers = ThreadPoolExecutor(1, "sign")  # which wait for the database
    # What a client has signed is sent again as it is, also to a service that has other limits now.
    most_signed = min(_MOST_IMAGES, SIGNED_BODY // math.prod(shape))
    signed_limits = Limits(
        max(limits.max_batch, most_signed), max(limits.max_body, SIGNED_BODY), limits.timeout
    )

    async def apart(
        function: Callable[[], Result], threads: ThreadPoolExecutor = readers
    ) -> Result:
        """Run what takes long in a thread, so that the service goes on."""
        async with asyncio.timeout(limits.timeout):
            return await asyncio.get_running_loop().run_in_executor(threads, function)

    async def read_files(files: tuple[bytes, ...]) -> torch.Tensor:
        """Decode image files: small images at once, which is quicker than to wake a thread."""
        if sum(map(len, files)) <= _QUICK:
            with contextlib.suppress(RefusedError):  # a larger one, or one that is damaged
                return decoded(files, shape, _QUICK // len(files))
        given_up = threading.Event()
        try:
            return await apart(partial(decoded, files, shape, given_up=given_up.is_set))
        finally:
            given_up.set()  # a thread that is left behind ends with the file that it decodes

    @contextlib.contextmanager
    def explained() -> Iterator[None]:
        """Say on standard error why signing failed; the engine says it of its own failures."""
        try:
            yield
        except ConflictError:
            raise
        except CountermarkError as error:
            engine.complain(str(error))
            raise

    async def infer(request: Request) -> Response:
        begun, client, count = time.monotonic(), None, 0
        try:
            _named(request, name)
            client = _client(request, clients)
            signs = signing is not None and client.public_key is not None
            allowed = signed_limits if signs else limits
            with engine.reading():  # before any of the body is
                async with asyncio.timeout(limits.timeout):
                    body = await _body(request, allowed.max_body)
                read = partial(
                    parse_request, body, request.headers.get(JSON_LENGTH), shape, allowed.max_batch
                )
                asked = await apart(read) if len(body) > _QUICK else read()
                x = asked.images
                if not isinstance(x, torch.Tensor):
                    if len(x) > limits.max_batch:  # a file takes more time than its pixels
                        raise RefusedError(400, f"a request has 1 to {limits.max_batch} files")
                    x = await read_files(x)
            count = len(x)
            receipt = ""
            if signing is not None and signs:
                with signing.turn(client):
                    ask = partial(signing.request, client, request.headers, x)
                    with explained():
                        signed = await apart(ask, signers)
                    async with asyncio.timeout(limits.timeout):
                        labels = await engine.answer(x, client.name, signed)
                    with explained():
                        receipt = signing.receipt(signed, labels)
            else:
                async with asyncio.timeout(limits.timeout):
                    labels = await engine.answer(x, client.name)
            images.inc(len(labels))
            said = {"model_name": name, "model_version": "1"}
            content, json_length = answer(asked, labels, names, said)
            response: Response = (
                Response(content, media_type="application/json")
                if json_length is None
                else Response(
                    content,
                    headers={JSON_LENGTH: str(json_length)},
                    media_type="application/octet-stream",
                )
            )
            if receipt:
                response.headers[RECEIPT_HEADER] = receipt
        except RefusedError as refusal:
            response = _error(refusal.status, str(refusal))
        except ConflictError as conflict:
            response = _error(409, str(conflict))
        except BusyError as busy:
            response = _error(503, str(busy))
        except TimeoutError:
            response = _error(
                408, f"the request or its answer took longer than {limits.timeout:g} seconds"
            )
        except ClientDisconnect:
            response = _error(400, "the request ended too early")
        except CountermarkError:  # standard error has been told why
            response = _error(500, "the query could not be answered; try again later")
        except asyncio.CancelledError:  # the server was told to stop and has waited long enough
            response = _error(503, "the service stops; try again later")
        requests.labels(str(response.status_code)).inc()
        if access_log and client is not None:  # strangers could fill a disk
            _tell_access(client, response.status_code, count, time.monotonic() - begun)
        return response

    async def opening(request: Request) -> Response:
        """Tell a client who signs what an opening is about, or take theirs."""
        try:
            _named(request, name)
            client = _client(request, clients)
            if signing is None:
                raise RefusedError(404, "this service has no guard, and nothing is signed here")
            if request.method == "GET":
                told = await apart(partial(signing.state, client), signers)
            else:
                async with asyncio.timeout(limits.timeout):
                    body = await _body(request, _OPENING)
                told = await apart(partial(signing.begin, client, _json(body)), signers)
        except RefusedError as refusal:
            return _error(refusal.status, str(refusal))
        except ConflictError as conflict:
            return _error(409, str(conflict))
        except TimeoutError:
            return _error(408, f"this took longer than {limits.timeout:g} seconds")
        except ClientDisconnect:
            return _error(400, "the request ended too early")
        except CountermarkError as error:
            tell("complaint", str(error))
            return _error(503, "the query log cannot be used; try again later")
        return JSONResponse(told)

    async def live(_request: Request) -> Response:
        return JSONResponse({"live": True})

    async def ready(_request: Request) -> Response:
        told = {"ready": engine.ready(), "model": engine.works, "log": engine.stores()}
        return JSONResponse(told, status_code=200 if told["ready"] else 503)

    async def model_ready(request: Request) -> Response:
        return await _guarded(request, ready)

    async def server(_request: Request) -> Response:
        return JSONResponse(
            {"name": "countermark", "version": __version__, "extensions": ["binary_tensor_data"]}
        )

    async def metadata(request: Request) -> Response:
        async def found(_request: Request) -> Response:
            return described

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
        *(
            Route(f"{place}/signing", opening, methods=["GET", "POST"])
            for place in (model, model + "/versions/{version}")
        ),
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


async def _body(request: Request, limit: int) -> bytearray:
    encodings = ",".join(request.headers.getlist("content-encoding")).lower().split(",")
    if any(encoding.strip() not in ("", "identity") for encoding in encodings):
        raise RefusedError(415, "send the body without a content encoding")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise RefusedError(413, f"the body has more than {limit} bytes")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise RefusedError(413, f"the body has more than {limit} bytes")
    return body


def _json(body: bytearray) -> object:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, "the body is no JSON") from error
