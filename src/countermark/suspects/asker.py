"""Asking a suspect that may refuse, fail, or change its mind: an endpoint or a function.

Only labels are used, whatever is returned.
What was answered is written to a replay log at once, so that a claim that was cut off goes on where
it was and asks nothing twice.
It is an error if a suspect never answers anything; the message quotes its last reply. From its
first answer on, a refusal, a failure after all retries or an answer that changes is no answer (-1):
it weakens the evidence and stops nothing.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, get_args

import torch

from countermark.data import as_uint8, pixels
from countermark.errors import CountermarkError, choose
from countermark.files import sha256
from countermark.places import Channels, Layout, Pixels

NO_ANSWER = -1
MOST_LABELS = 1 << 31
"""Labels are whole numbers from 0 to below this."""
_REPLAY_LIMIT = 1 << 28
_FIRST_WAIT = 0.5  # seconds before the first retry; then twice as long each time
_LONGEST_WAIT = 30.0
_LONGEST_HEEDED = 300.0  # seconds that a suspect may ask to be left alone
_LONGEST_FRUITLESS = 300.0  # seconds waited since the last answer; then nothing is retried
_PATIENCE = 5  # requests in a row that bring nothing
_SHORTEST_SECRET = 8  # characters of a secret, or of its beginning, that messages leave out
_WASTED = 30  # and in all

T = TypeVar("T")


@dataclass(frozen=True)
class Asking:
    """How a suspect wants to be asked, and how much.

    Attributes:
        size: side of the square that images are scaled to; none leaves them as they are.
        channels: `rgb` or `bgr`, the order of three channels.
        pixels: `float` (of [0, 1]) or `uint8` (whole numbers from 0 to 255).
        layout: `nchw` or `nhwc`; none is what the API is used to, else `nchw`.
        mean: subtracted from pixels of [0, 1], one number or one a channel.
        std: what they are then divided by.
        names: names of the classes, in the order of the labels.
        foreign: other class names get numbers beyond all labels, so that a match can be found.
        api: name of the API of an endpoint; none has its address tell it.
        send: what is sent to an API of the user's own; see `countermark.suspects.apis`.
        read: JMESPath expression of where its answers are.
        form: of image files that are sent: `png` or `jpeg`.
        quality: of a JPEG.
        batch_size: images in a request.
        budget: most images that may be sent, counted every time (in a batch, again alone, in a
            retry); the rest stay without an answer.
        rate: most requests in a second.
        retries: how often a request that failed (no connection, a time-out, 429 or 5xx, an
            exception of a function) is made again.
        timeout: seconds to wait for a connection, and then for the whole of an answer.
        repeats: how often each image is asked; only an answer that is the same every time counts.
        replay: file that keeps the answers.
        headers: HTTP headers, such as an Authorization.
        begin: number of the inner place of an ONNX file that the images are given to.
    """

    size: int | None = None
    channels: str = "rgb"
    pixels: str = "float"
    layout: str | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    names: tuple[str, ...] = ()
    foreign: bool = False
    api: str | None = None
    send: tuple[str, ...] = ()
    read: str = ""
    form: str = "png"
    quality: int = 95
    batch_size: int = 32
    budget: int | None = None
    rate: float | None = None
    retries: int = 4
    timeout: float = 30.0
    repeats: int = 1
    replay: Path | None = None
    headers: tuple[tuple[str, str], ...] = ()
    begin: int | None = None


class RefusalError(CountermarkError):
    """The suspect is there and does not answer this; the same again would change nothing."""

    def __init__(self, words: str, advice: str = "", final: bool = False) -> None:
        """Keep what the suspect said.

        Args:
            words: what it said.
            advice: what the user can do.
            final: it is not about these images: the suspect refuses whatever is asked.
        """
        super().__init__(words)
        self.advice, self.final = advice, final


class FailureError(CountermarkError):
    """The suspect gave no answer this time and may give one the next time."""

    def __init__(
        self,
        words: str,
        there: bool = True,
        nobody: bool = False,
        busy: bool = False,
        wait: float = 0.0,
    ) -> None:
        """Keep what happened.

        Args:
            words: what happened.
            there: somebody answered.
            nobody: no connection was made, so the suspect cannot have seen what was asked.
            busy: it asks for patience, so it is alive.
            wait: seconds after which it wants to be asked again.
        """
        super().__init__(words)
        self.there, self.nobody, self.busy, self.wait = there, nobody, busy, wait


def as_taken(x: torch.Tensor, asking: Asking) -> torch.Tensor:
    """Convert images `(n, c, h, w)` to what the suspect takes.

    Raises:
        CountermarkError: an unknown kind of pixels or layout, or a number of means or deviations
            that is not that of the channels.
    """
    choose("pixels", asking.pixels, get_args(Pixels))
    choose("layout", asking.layout or "nchw", get_args(Layout))
    choose("channels", asking.channels, get_args(Channels))
    if asking.size is not None and tuple(x.shape[2:]) != (asking.size, asking.size):
        x = _scaled(x, asking.size)
    if asking.channels == "bgr":
        if x.shape[1] != 3:
            raise CountermarkError(f"images of {x.shape[1]} channels have no order bgr")
        x = x.flip(1)
    if asking.pixels == "uint8":
        if asking.mean or asking.std:
            raise CountermarkError(
                "mean and deviation go with float pixels; leave them out for uint8"
            )
        images = as_uint8(x)
    else:
        images = pixels(x)
        for values, apply in ((asking.mean, torch.sub), (asking.std, torch.div)):
            if values:
                if len(values) not in (1, x.shape[1]) or (apply is torch.div and min(values) <= 0):
                    raise CountermarkError(
                        f"give one mean and one positive deviation, or {x.shape[1]} of each, "
                        f"not {values}"
                    )
                images = apply(images, torch.tensor(values).reshape(1, -1, 1, 1))
    return images.permute(0, 2, 3, 1).contiguous() if asking.layout == "nhwc" else images


def _scaled(x: torch.Tensor, size: int) -> torch.Tensor:
    """Images `(n, c, h, w)` scaled to a square with antialiasing; uint8 ones stay so."""
    scaled = torch.nn.functional.interpolate(
        pixels(x), (size, size), mode="bilinear", antialias=True
    ).clamp_(0, 1)
    return as_uint8(scaled) if x.dtype == torch.uint8 else scaled


class Asker:
    """Asks a suspect: from images `(n, c, h, w)` to int64 labels `(n,)`, -1 for no answer.

    Attributes:
        name: what messages and the replay log call the suspect.
        asked: images sent so far in this process, counted every time.
        refused: images of the last call that got no answer.
        changed: images whose answers differed between repeats.
        trouble: why the last request that brought nothing did so; empty if all of them did.
        form: what changes images on their way and is part of the question, such as a JPEG's
            quality.
        secrets: what messages leave out, even where the suspect says it.
        declared: the options that say which images it takes.
    """

    def __init__(
        self,
        name: str,
        answer: Callable[[torch.Tensor], Sequence[int]],
        asking: Asking,
        *,
        which: str = "",
    ) -> None:
        """Take the suspect's own way to answer.

        Args:
            name: of the suspect.
            answer: from prepared images to a label for each, -1 where it gives none; it raises
                `RefusalError` and `FailureError`, and any other error ends the asking.
            asking: how, and how much.
            which: which of several models that share this name; the replay log keeps them apart.

        Raises:
            CountermarkError: the replay log cannot be read.
        """
        self.name, self._answer, self._asking = name, answer, asking
        self.form, self.secrets = "", frozenset[str]()
        self.declared = "--pixels, --layout"
        self.asked = self.refused = self.changed = 0
        self.trouble = self._advice = ""
        self._last = -math.inf
        how = (asking.send, asking.read, asking.names, *([which] if which else []))
        self._how = sha256(json.dumps(how).encode())
        early = None if which else self._how
        self._known = read_replay(asking.replay, name, asking.repeats, self._how, early)
        self._waited = 0.0  # seconds since the last answer
        self._answered = bool(self._known)  # once it has answered, refusals do not end the asking
        self._reached = self._answered  # once it was reached, silence counts as a refusal
        self._silent = 0  # requests in a row without an answer
        self._gone = 0  # requests in a row without a connection
        self._wasted = 0  # requests without an answer after all their retries, in all
        self._barren = 0  # requests for images that were not answered
        self._closed = 0  # refusals in a row that are not about the images

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Ask for labels.

        Raises:
            CountermarkError: nothing was ever answered, or nobody can be connected to any more;
                what was answered is in the replay log.
        """
        count = self._asking.batch_size
        names = [  # a part at a time: as the suspect takes them, images may be much larger
            _digest(image, self.form)
            for part in torch.split(x, count)
            for image in as_taken(part, self._asking)
        ]
        todo = [i for i, name in enumerate(names) if name not in self._known]
        todo = list({names[i]: i for i in reversed(todo)}.values())[::-1]  # each image once
        for start in range(0, len(todo), count):
            if self._closed >= _PATIENCE:  # such as a credential that has expired
                break
            part = todo[start : start + count]
            if self._asking.budget is not None:
                left = self._asking.budget - self.asked
                part = part[: max(0, left // self._asking.repeats)]
            if part:
                images = as_taken(x[part], self._asking)
                self._keep([names[i] for i in part], self._repeated(images))
        if self._barren and not self._answered:
            raise self._stopped()
        answers = [self._known.get(name, NO_ANSWER) for name in names]
        labels = torch.tensor(answers, dtype=torch.int64)
        self.refused = int((labels == NO_ANSWER).sum())
        return labels

    def _repeated(self, images: torch.Tensor) -> list[int]:
        rounds = [self._batch(images) for _ in range(self._asking.repeats)]
        every = list(zip(*rounds, strict=True))
        self.changed += sum(len({*answers} - {NO_ANSWER}) > 1 for answers in every)
        return [answers[0] if len(set(answers)) == 1 else NO_ANSWER for answers in every]

    def _batch(self, images: torch.Tensor) -> Sequence[int]:
        """Answers to a batch; one that is refused for what is in it is asked image by image."""
        answers = self._request(images)
        if answers is None and len(images) > 1 and not self._closed:
            singles = [self._request(images[i : i + 1]) for i in range(len(images))]
            return [NO_ANSWER if single is None else single[0] for single in singles]
        return [NO_ANSWER] * len(images) if answers is None else answers

    def _request(self, images: torch.Tensor) -> Sequence[int] | None:
        """Answers to one request; none if there are none.

        Raises:
            CountermarkError: nothing was ever answered, and it is clear that nothing will be.
        """
        answers = self._attempt(lambda: self._answer(images), len(images))
        self._answered = self._answered or answers is not None
        return answers

    def _attempt(self, send: Callable[[], T], images: int = 0) -> T | None:
        """Send with retries, as far as the budget goes; none if there is no answer.

        After a few requests in a row that brought nothing, or many in all, each is made once, so
        that retries do not multiply the time. So it is after the first one where nothing was ever
        answered.

        Raises:
            CountermarkError: there is nobody to connect to, at first or in a few requests in a row;
                or nothing was ever answered, and it is clear that nothing will be.
        """
        failure: FailureError | None = None
        for attempt in range(self._asking.retries + 1):
            if self._asking.budget is not None and images > self._asking.budget - self.asked:
                break
            self._wait(attempt, 0.0 if failure is None else failure.wait)
            self.asked += images
            try:
                found = send()
            except RefusalError as refusal:
                self._alive()
                self._closed = self._closed + 1 if refusal.final else 0
                self._note(refusal, refusal.advice, images, refusal.final)
                return None
            except FailureError as error:
                failure = error
                self._reached = self._reached or error.there
                if error.busy:
                    self._alive()
                if not error.nobody and self._impatient(error.busy):
                    break
            else:
                self._alive()
                self._closed, self._waited = 0, 0.0
                return found
        if failure is not None:
            self._silent += 1
            self._wasted += 1
            self._gone = self._gone + 1 if failure.nobody else 0
            self._note(failure, "", images, False)
            if failure.nobody and (not self._reached or self._gone >= _PATIENCE):
                raise self._stopped(gone=True) from failure
        return None

    def _wait(self, attempt: int, wanted: float) -> None:
        if attempt:
            wait = min(_FIRST_WAIT * 2 ** (attempt - 1), _LONGEST_WAIT)
            wait = max(wait, min(wanted, _LONGEST_HEEDED))
            time.sleep(wait)
            self._waited += wait
        if self._asking.rate is not None:
            time.sleep(max(0.0, self._last + 1 / self._asking.rate - time.monotonic()))
            self._last = time.monotonic()

    def _impatient(self, busy: bool) -> bool:
        hangs_from_the_start = self._wasted > 0 and not self._answered and not busy
        return (
            hangs_from_the_start
            or self._silent >= _PATIENCE
            or self._wasted >= _WASTED
            or self._waited >= _LONGEST_FRUITLESS
        )

    def _alive(self) -> None:
        self._reached, self._silent, self._gone = True, 0, 0

    def _note(self, error: CountermarkError, advice: str, images: int, final: bool) -> None:
        """Remember why a request brought nothing; stop where nothing was and will be answered."""
        self.trouble, self._advice = _without(str(error), self.secrets), advice
        self._barren += images > 0
        if images and not self._answered and (final or self._barren >= _PATIENCE):
            raise self._stopped() from error

    def _stopped(self, gone: bool = False) -> CountermarkError:
        if self._reached and not gone:
            advice = self._advice or f"see that it takes such images ({self.declared})"
            return CountermarkError(f"{self.name} answers nothing: {self.trouble}; {advice}")
        go_on = "check the address, and run the same command again to go on"
        if self._asking.replay is not None and self._known:
            go_on += f", or with --budget 1 to judge by what {self._asking.replay} has"
        return CountermarkError(f"{self.name} cannot be reached ({self.trouble}); {go_on}")

    def _keep(self, names: Sequence[str], labels: Sequence[int]) -> None:
        every = zip(names, labels, strict=True)
        answered = {name: label for name, label in every if label != NO_ANSWER}
        self._known.update(answered)
        path, repeats = self._asking.replay, self._asking.repeats
        if path is not None and answered:
            try:
                with path.open("a") as stream:
                    for name, label in answered.items():
                        entry = {"url": self.name, "image": name, "label": label}
                        more = {"repeats": repeats, "how": self._how}
                        stream.write(json.dumps(entry | more) + "\n")
            except OSError as error:
                raise CountermarkError(
                    f"cannot write {path}: {error.strerror}; choose another replay log"
                ) from error


def _without(text: str, secrets: Iterable[str]) -> str:
    """A text without secrets, or without the beginning of one that was cut short."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
        for end in range(len(secret) - 1, _SHORTEST_SECRET - 1, -1):
            text = text.replace(secret[:end], "***")
    return text


def _digest(image: torch.Tensor, form: str) -> str:
    """The digest by which the replay log knows a question: that of the image as it is sent.

    The same image in another form, such as uint8 instead of float, is another question.
    """
    data = image.contiguous().numpy().tobytes()
    return sha256(f"{form}{image.dtype} {list(image.shape)} ".encode() + data)


def read_replay(
    path: Path | None,
    name: str,
    repeats: int = 1,
    how: str | None = None,
    early: str | None = None,
) -> dict[str, int]:
    """The log's answers that count here: of this suspect, and given as often as is asked now.

    What is sent and read, and the names of the classes, are the same. An early log does not say;
    its answers were asked as `early`.
    """
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
                whole = type(label) is int and 0 <= label < MOST_LABELS and type(often) is int
                whole = whole and how in (None, entry.get("how", early))
                if entry["url"] == name and isinstance(image, str) and whole and often >= repeats:
                    known[image] = label
            except (ValueError, KeyError, TypeError, RecursionError):
                # A line that a crash cut short, or an early one, which does not say how often it
                # was asked and whose image is not as it was sent.
                continue
    except (OSError, UnicodeDecodeError) as error:
        raise CountermarkError(
            f"cannot read {path} as a replay log; choose another file"
        ) from error
    return known
