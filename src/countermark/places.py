"""Places that a user gives: suspects, networks, addresses, and folders to write.

The addresses are those of endpoints and timestamp authorities.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import urlsplit, urlunsplit

from countermark.errors import CountermarkError
from countermark.text import brief, sentence

if TYPE_CHECKING:
    import torch
    from torch import nn

    SuspectPlace = str | Path | Callable[[torch.Tensor], torch.Tensor]
    Network = str | nn.Module | Callable[..., nn.Module]
    Weights = str | Path | Mapping[str, torch.Tensor]
else:  # torch is heavy
    SuspectPlace = str | Path | Callable[..., Any]
    Network = str | Callable[..., Any]
    Weights = str | Path | object
# `Network` is what builds a network, or one that is built: see `networks.open_network`.
# `Weights` are a file of them, or a state dict: see `networks.load_weights`.

Pixels = Literal["float", "uint8"]
"""What a suspect takes: pixels of [0, 1], or bytes."""
Layout = Literal["nchw", "nhwc"]
"""How it takes them."""
Channels = Literal["rgb", "bgr"]
"""In which order it takes three channels."""
ImageForm = Literal["png", "jpeg"]
"""How image files are sent to it."""
ApiName = Literal[
    "oip", "mlflow", "torchserve", "tfserving", "vertex", "sagemaker", "hf", "gradio", "json"
]
"""Kinds of API that an endpoint may have; `json` is one that the user describes."""


class EndpointAddress(NamedTuple):
    """How an endpoint is called and asked.

    Attributes:
        name: the model's address, without a query string, which may hold a secret.
        metadata: where its metadata are asked for.
        infer: where it is asked in the Open Inference Protocol.
        given: as it was given, without a fragment; where any other API is asked.
        query_sha256: SHA-256 of its query string, which may say which of several models is asked;
            empty if it has none.
    """

    name: str
    metadata: str
    infer: str
    given: str
    query_sha256: str


_MODEL = re.compile(r"(.*/v2/models/[^/].*?)(/infer)?")


def is_address(place: object) -> bool:
    """Whether a place is an address and no path; whether it can be asked is another question."""
    return isinstance(place, str) and "://" in place


def endpoint_address(url: str) -> EndpointAddress:
    """Read the address of an endpoint.

    Args:
        url: `http(s)://HOST[:PORT]/...`, with or without a query string. A model of the Open
            Inference Protocol is `.../v2/models/NAME[/versions/V][/infer]` and has one name,
            however its address ends.

    Raises:
        CountermarkError: it cannot be asked, or holds a password.
    """
    parts = urlsplit(check_address(url, "an endpoint"))._replace(fragment="")
    path = parts.path.rstrip("/")
    found = _MODEL.fullmatch(path)
    model, asked = (path, path) if found is None else (found[1], f"{found[1]}/infer")
    name = urlunsplit(parts._replace(path=model, query=""))
    metadata, infer = (urlunsplit(parts._replace(path=each)) for each in (model, asked))
    query = hashlib.sha256(parts.query.encode()).hexdigest() if parts.query else ""
    return EndpointAddress(name, metadata, infer, urlunsplit(parts), query)


def place_name(place: object) -> str:
    """What a place is called in messages and files.

    A path, a name or an address is called as it is given, but an address without its query string,
    which may hold a secret. A function is called `python:MODULE.QUALIFIED_NAME`, and any other
    object likewise by its type.
    """
    if is_address(place):
        return str(place).partition("?")[0]
    while isinstance(place, partial):
        place = place.func
    if isinstance(place, str | Path):
        return str(place)
    named: Any = place if hasattr(place, "__qualname__") else type(place)
    return f"python:{named.__module__}.{named.__qualname__}"


def check_address(url: str, whose: str) -> str:
    """Refuse an address that cannot be asked, or that holds a password.

    Addresses are written to claims, judgements, replay logs and configurations, and are shown as
    they are. The message leaves out what may be the password.

    Args:
        url: the address.
        whose: what messages call the place, such as "an endpoint".

    Raises:
        CountermarkError: not http(s)://HOST/..., or with a name or a password before the host.
    """
    hidden = sentence(re.sub(r"//.*@", "//...@", url, flags=re.DOTALL).partition("?")[0])
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets that do not close, a port that is no number
        usable = False
    if not usable:
        raise CountermarkError(f"the address of {whose} is http(s)://HOST[:PORT]/..., not {hidden}")
    if "@" in parts.netloc:
        raise CountermarkError(
            f"the address of {whose} is saved and shown as it is, "
            "so it may hold no name or password, "
            f"as {hidden} does; an endpoint takes them as --headers 'Authorization: ...'"
        )
    return url


def own_path(place: object, name: str) -> Path:
    """A path that was given in Python, with `~` expanded.

    Args:
        place: what was given.
        name: what messages call it.

    Raises:
        CountermarkError: it is no path, or there is no such home folder.
    """
    if not isinstance(place, str | Path) or "\0" in str(place):
        raise CountermarkError(f"{name} is a path, not {brief(place)}")
    try:
        return Path(place).expanduser()
    except RuntimeError as error:
        raise CountermarkError(
            f"{name}: there is no home folder for {brief(str(place))}; write the path without ~"
        ) from error


def check_new(path: Path) -> None:
    """Refuse a place where a file cannot be written without replacing something."""
    if path.exists() or path.is_symlink():
        raise CountermarkError(f"{path} is there already; give another name or delete it")


def check_free(path: Path) -> None:
    """Refuse a place that a finished folder could not be renamed to."""
    if path.is_dir():
        if any(path.iterdir()):
            raise CountermarkError(f"{path} is not empty; choose a new folder or empty it first")
        if path.is_mount() or not path.name:
            raise CountermarkError(
                f"{path} is a mount point, which cannot be replaced; choose a folder below it"
            )
    elif path.exists():
        raise CountermarkError(f"{path} is a file; choose a new folder")
