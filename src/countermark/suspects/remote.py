"""Asking a model behind HTTP: the Open Inference Protocol v2 and MLflow's `/invocations`.

Only labels are used, whatever is returned. What was answered is written to a replay log at once, so a claim that was cut off goes on
where it was and asks nothing twice. A refusal, a connection that is dropped, a timeout after all retries or an answer that changes is no
answer (-1): it weakens the evidence and stops nothing.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
import torch
from urllib3.exceptions import MaxRetryError, NewConnectionError

from countermark.data import as_uint8, pixels
from countermark.errors import CountermarkError
from countermark.files import sha256
from countermark.suspects.session import Session

NO_ANSWER = -1
PIXELS = ("float", "uint8")
LAYOUTS = ("nchw", "nhwc")
_RESPONSE_LIMIT = 1 << 24
_REPLAY_LIMIT = 1 << 28
_FIRST_WAIT = 0.5  # seconds before the first retry; then twice as long each time
_LONGEST_WAIT = 30.0
_PATIENCE = 5  # requests in a row that bring nothing
_WASTED = 30  # and in all


@dataclass(frozen=True)
class Asking:
    """How a suspect wants to be asked, and how much.

    Attributes:
        pixels: `float` (of [0, 1]) or `uint8` (whole numbers from 0 to 255).
        layout: `nchw` or `nhwc`.
        mean: subtracted from pixels of [0, 1], one number or one a channel.
        std: what they are then divided by.
        batch_size: images in a request.
        budget: most images that may be sent, counted every time (in a batch, again alone, in a retry); the rest stay without an answer.
        rate: most requests in a second.
        retries: how often a request that failed (no connection, a time-out, 429 or 5xx) is made again.
        timeout: seconds to wait for a connection, and then for the whole of an answer.
        repeats: how often each image is asked; only an answer that is the same every time counts.
        replay: file that keeps the answers.
        headers: HTTP headers, such as an Authorization.
    """

    pixels: str = "float"
    layout: str = "nchw"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    batch_size: int = 32
    budget: int | None = None
    rate: float | None = None
    retries: int = 4
    timeout: float = 30.0
    repeats: int = 1
    replay: Path | None = None
    headers: tuple[tuple[str, str], ...] = ()


def prepare(x: torch.Tensor, asking: Asking) -> torch.Tensor:
    """Images `(n, c, h, w)` as the suspect wants them.

    Raises:
        CountermarkError: an unknown kind of pixels or layout, or as many means or deviations as there are no channels.
    """
    if asking.pixels not in PIXELS or asking.layout not in LAYOUTS:
        raise CountermarkError(f"pixels are one of {', '.join(PIXELS)} and the layout is one of {', '.join(LAYOUTS)}")
    if asking.pixels == "uint8":
        if asking.mean or asking.std:
            raise CountermarkError("mean and deviation go with float pixels; leave them out for uint8")
        images = as_uint8(x)
    else:
        images = pixels(x)
        for values, apply in ((asking.mean, torch.sub), (asking.std, torch.div)):
            if values:
                if len(values) not in (1, x.shape[1]) or (apply is torch.div and min(values) <= 0):
                    raise CountermarkError(f"give one mean and one positive deviation, or {x.shape[1]} of each, not {values}")
                images = apply(images, torch.tensor(values).reshape(1, -1, 1, 1))
    return images.permute(0, 2, 3, 1).contiguous() if asking.layout == "nhwc" else images


class Endpoint:
    """A suspect behind a URL; call it with images `(n, c, h, w)`, get int64 labels `(n,)`, -1 where there is no answer.

    Attributes:
        asked: images sent so far in this process, counted every time.
        refused: images that got no answer.
        changed: images whose answers differed between repeats.
    """

    def __init__(self, url: str, asking: Asking | None = None) -> None:
        """Take `http(s)://HOST/v2/models/NAME[/versions/V]` as the Open Inference Protocol, `.../invocations` as MLflow.

        Raises:
            CountermarkError: the URL is neither, or the replay log cannot be read.
        """
        self.url, self._asking = url.rstrip("/"), asking or Asking()
        self._mlflow = self.url.endswith("/invocations")
        if not self._mlflow and "/v2/models/" not in self.url:
            raise CountermarkError(
                f"{url} is neither .../v2/models/NAME (Open Inference Protocol) nor .../invocations (MLflow); give one of these"
            )
        self.asked = self.refused = self.changed = 0
        self._session = Session()
        self._session.headers.update(dict(self._asking.headers))
        self._input: str | None = None
        self._last = -math.inf
        self._known = _read_replay(self._asking.replay, self.url, self._asking.repeats)
        self._reached = bool(self._known)  # it was there once: from now on silence is a refusal
        self._silent = self._gone = 0  # requests in a row that brought nothing; that found nobody to connect to
        self._wasted = 0  # requests in all that brought nothing, for all their retries
        self._trouble = ""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Ask for labels.

        Raises:
            CountermarkError: nothing answers at all, or not any more; what was answered is in the replay log.
        """
        images = prepare(x, self._asking)
        names = [_digest(image) for image in images]
        todo = [i for i, name in enumerate(names) if name not in self._known]
        todo = list({names[i]: i for i in reversed(todo)}.values())[::-1]  # each image once
        for start in range(0, len(todo), self._asking.batch_size):
            part = todo[start : start + self._asking.batch_size]
            if self._asking.budget is not None:
                part = part[: max(0, (self._asking.budget - self.asked) // self._asking.repeats)]
            if part:
                self._keep([names[i] for i in part], self._repeated(images[part]))
        if self._silent and not self._reached:
            raise self._unreachable()
        labels = torch.tensor([self._known.get(name, NO_ANSWER) for name in names], dtype=torch.int64)
        self.refused = int((labels == NO_ANSWER).sum())
        return labels

    def _repeated(self, images: torch.Tensor) -> list[int]:
        rounds = [self._batch(images) for _ in range(self._asking.repeats)]
        same = [answers[0] if len(set(answers)) == 1 else NO_ANSWER for answers in zip(*rounds, strict=True)]
        self.changed += sum(len({*answers} - {NO_ANSWER}) > 1 for answers in zip(*rounds, strict=True))
        return same

    def _batch(self, images: torch.Tensor) -> list[int]:
        """Answers to a batch; one that is refused is asked image by image."""
        answers = self._request(images)
        if answers is None and len(images) > 1:
            singles = [self._request(images[i : i + 1]) for i in range(len(images))]
            return [NO_ANSWER if single is None else single[0] for single in singles]
        return [NO_ANSWER] * len(images) if answers is None else answers

    def _request(self, images: torch.Tensor) -> list[int] | None:
        """One request; none if it is refused or makes no sense."""
        if self._mlflow:
            body: dict[str, Any] = {"inputs": images.tolist()}
        else:
            kind = "UINT8" if images.dtype == torch.uint8 else "FP32"
            data = images.flatten().tolist()
            body = {"inputs": [{"name": self._input_name(), "shape": list(images.shape), "datatype": kind, "data": data}]}
        path = self.url if self._mlflow else f"{self.url}/infer"
        found = self._send("POST", path, body, len(images))
        return None if found is None else _labels(found, len(images), self._mlflow)

    def _input_name(self) -> str:
        """The name of the model's input, from its metadata."""
        if self._input is None:
            inputs = (self._send("GET", self.url, None) or {}).get("inputs")
            first = inputs[0] if isinstance(inputs, list) and inputs and isinstance(inputs[0], dict) else {}
            self._input = str(first.get("name", "input"))
        return self._input

    def _send(self, method: str, path: str, body: dict[str, Any] | None, images: int = 0) -> dict[str, Any] | None:
        """Send with retries, as far as the budget goes; none for a refusal, and for silence where somebody is there.

        After a few requests in a row that brought nothing, or many in all, each is made once, so that retries do not multiply the time.

        Raises:
            CountermarkError: there is nobody to connect to, at first or in a few requests in a row.
        """
        nobody = False
        for attempt in range(self._asking.retries + 1):
            if self._asking.budget is not None and images > self._asking.budget - self.asked:
                break
            if attempt:
                time.sleep(min(_FIRST_WAIT * 2 ** (attempt - 1), _LONGEST_WAIT))
            if self._asking.rate is not None:
                time.sleep(max(0.0, self._last + 1 / self._asking.rate - time.monotonic()))
                self._last = time.monotonic()
            self.asked += images
            try:
                with self._session.request(
                    method, path, json=body, timeout=self._asking.timeout, stream=True, allow_redirects=False
                ) as response:
                    self._reached = True
                    found = _json(response) if response.status_code == 200 else None
                if response.status_code < 500:
                    self._silent = self._gone = 0
                    if response.status_code != 429:
                        return found
                nobody = False
            except requests.RequestException as error:
                self._trouble, nobody = type(error).__name__, _is_nobody(error)
            if (self._silent >= _PATIENCE or self._wasted >= _WASTED) and not nobody:
                break
        self._silent += 1
        self._wasted += 1
        self._gone = self._gone + 1 if nobody else 0
        if nobody and (not self._reached or self._gone >= _PATIENCE):
            raise self._unreachable()
        return None

    def _unreachable(self) -> CountermarkError:
        go_on = "check the address, and run the same command again to go on"
        if self._asking.replay is not None and self._known:
            go_on += f", or with --budget 1 to judge by what {self._asking.replay} has"
        return CountermarkError(f"{self.url} cannot be reached ({self._trouble}); {go_on}")

    def _keep(self, names: Sequence[str], labels: Sequence[int]) -> None:
        answered = {name: label for name, label in zip(names, labels, strict=True) if label != NO_ANSWER}
        self._known.update(answered)
        if self._asking.replay is not None and answered:
            try:
                with self._asking.replay.open("a") as stream:
                    for name, label in answered.items():
                        entry = {"url": self.url, "image": name, "label": label, "repeats": self._asking.repeats}
                        stream.write(json.dumps(entry) + "\n")
            except OSError as error:
                raise CountermarkError(f"cannot write {self._asking.replay}: {error.strerror}; choose another replay log") from error


def _digest(image: torch.Tensor) -> str:
    """What stands for a question in the replay log: the image as it is sent, so that one prepared otherwise is another question."""
    return sha256(f"{image.dtype} {list(image.shape)} ".encode() + image.contiguous().numpy().tobytes())


def _is_nobody(error: requests.RequestException) -> bool:
    """Whether no connection was made, so that the suspect cannot have seen what was asked."""
    cause = error.args[0] if error.args else None
    nobody = isinstance(cause, MaxRetryError) and isinstance(cause.reason, NewConnectionError)
    return nobody or isinstance(error, requests.exceptions.ConnectTimeout | requests.exceptions.ProxyError)


def _json(response: requests.Response) -> dict[str, Any] | None:
    data = b""
    for chunk in response.iter_content(1 << 16):
        data += chunk
        if len(data) > _RESPONSE_LIMIT:
            return None
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _labels(found: dict[str, Any], count: int, mlflow: bool) -> list[int] | None:
    """Labels out of a response: integers `(n,)` or `(n, 1)`, or one row of scores for each image."""
    try:
        if mlflow:
            values = torch.tensor(found["predictions"], dtype=torch.float64)
        else:
            output = found["outputs"][0]
            values = torch.tensor(output["data"], dtype=torch.float64).reshape(output["shape"])
        if values.dim() == 2 and values.shape[1] > 1:
            values = torch.where(torch.isfinite(values).all(1), values.argmax(1), NO_ANSWER)
        values = values.reshape(-1)
        if len(values) != count:
            return None
        whole = torch.isfinite(values) & (values == values.round()) & (values >= 0) & (values < 1 << 31)
        return torch.where(whole, values, NO_ANSWER).long().tolist()
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, OverflowError):
        return None


def _read_replay(path: Path | None, url: str, repeats: int = 1) -> dict[str, int]:
    """The log's answers that count here: of this address, and given as often as is asked now."""
    if path is None or not path.exists():
        return {}
    known: dict[str, int] = {}
    try:
        if path.stat().st_size > _REPLAY_LIMIT:
            raise CountermarkError(f"{path} is larger than any replay log; choose another file")
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
                image, label, often = entry["image"], entry["label"], entry["repeats"]
                whole = isinstance(image, str) and type(label) is int and 0 <= label < 1 << 31 and type(often) is int
                if entry["url"] == url and whole and often >= repeats:
                    known[image] = label
            except (ValueError, KeyError, TypeError, RecursionError):
                continue  # a line that a crash cut short, or an early one that does not say how often, whose image is not as it was sent
    except (OSError, UnicodeDecodeError) as error:
        raise CountermarkError(f"cannot read {path} as a replay log; choose another file") from error
    return known
