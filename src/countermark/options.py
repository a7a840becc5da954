"""What the options of all verbs share.

A verb is one file of `verbs/`: a frozen configuration, whose fields are the options and whose
docstrings are their help, and a function that does the work. `verb` makes of the two the public
function, which takes the options as keywords; the command line calls the same function. The
configuration is also what is saved as JSON beside what was made.

Every option is held to its type when a configuration is made, in Python as on the command line, and
what a `Place` says of a path is checked before the work begins. Nothing heavy is imported here.
"""

import ast
import contextlib
import functools
import inspect
import itertools
import re
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from enum import Enum
from numbers import Integral, Real
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, ParamSpec, TypeVar

from countermark.choices import Precision
from countermark.device import check_device
from countermark.errors import CountermarkError, choose
from countermark.named_code import is_code
from countermark.places import (
    ApiName,
    Channels,
    ImageForm,
    Layout,
    Network,
    Pixels,
    SuspectPlace,
    Weights,
    check_address,
    check_free,
    check_new,
    is_address,
    place_name,
)
from countermark.text import brief
from countermark.threat import budget

if TYPE_CHECKING:
    from countermark.data import DataPlace
else:  # torch is heavy
    DataPlace = str | Path | object

_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+ *: *[ -~\xa0-\xff]*")

_PLAIN = (bool, int, float, str, NoneType)

_Given = ParamSpec("_Given")
_Config = TypeVar("_Config", bound="VerbConfig")
_Result = TypeVar("_Result")


class Place(Enum):
    """What a verb does with the path of an option; other options are not paths."""

    READ = "it must exist"
    NEW = "it must be new or an empty folder"
    NEW_FILE = "it must be new"
    WRITTEN = "it may be either"
    NAMED = "it may be a name as well, or a thing in Python"
    ASKED = "it must exist, or be module:function"


ReadPath = Annotated[str | Path, Place.READ]
NewPath = Annotated[str | Path, Place.NEW]
NewFile = Annotated[str | Path, Place.NEW_FILE]
WrittenPath = Annotated[str | Path, Place.WRITTEN]
LogPath = Annotated[str, Place.READ]  # or the address of a database
NewLogPath = Annotated[str, Place.WRITTEN]
AnyData = Annotated[DataPlace, Place.NAMED]
AnyWeights = Annotated[Weights, Place.READ]  # a file; in Python also a state dict

KINDS: Mapping[type, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number, or a fraction as 8/255",
    str: "text",
    Path: "a path",
}
"""What an option takes, in words, by its type."""


def _written(value: Any) -> Any:
    """An option as JSON can hold it; an object of Python is represented by its name."""
    several = isinstance(value, tuple) and all(isinstance(each, (*_PLAIN, Path)) for each in value)
    if several:
        return [_written(each) for each in value]
    return value if isinstance(value, _PLAIN) else place_name(value)


@dataclass(frozen=True, kw_only=True)
class VerbConfig:
    """Options of every verb.

    A field that is not keyword-only, `field(kw_only=False)`, is the verb's main place: the first
    argument in Python, and on the command line a word that needs no option's name.
    """

    json: bool = False
    """Print one JSON object on standard output and nothing else there."""

    def __post_init__(self) -> None:
        """Hold every option to its type; `str` becomes `Path` where a path is meant."""
        for name, hint in hints_of(type(self)).items():
            object.__setattr__(self, name, _held(name, hint, getattr(self, name)))

    def record(self) -> dict[str, Any]:
        """The configuration as JSON-ready values, without what does not change the result."""
        left_out = {"json", "out", "cache", "roots", "identity"}
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: _written(value) for name, value in values.items() if name not in left_out}

    def placed(self: _Config) -> _Config:
        """The same configuration with `~` expanded in its paths.

        Raises:
            CountermarkError: what is to be read does not exist, or what is to be made is there.
        """
        changed: dict[str, Any] = {}
        for name, hint in hints_of(type(self)).items():
            value = getattr(self, name)
            for place in places_in(hint):
                if isinstance(value, tuple) and place is not Place.NAMED:
                    changed[name] = tuple(_placed(path, place, option(name)) for path in value)
                elif isinstance(value, str | Path):
                    changed[name] = _placed(value, place, option(name))
        return replace(self, **changed)

    def _open_interval(self, *options: str) -> None:
        for name in options:
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise CountermarkError(f"{option(name)} is a number in (0, 1), not {value}")

    def _whole(self, name: str, least: int, most: int) -> None:
        value = getattr(self, name)
        if value is not None and not least <= value <= most:
            shown = str(value) if abs(value) < 1 << 64 else "a number of many digits"
            raise CountermarkError(
                f"{option(name)} is a whole number from {least} to {most}, not {shown}"
            )

    def _at_least_one(self, *options: str, most: int = 1_000_000) -> None:
        for name in options:
            self._whole(name, 1, most)

    def _positive(self, what: str, *options: str) -> None:
        for name in options:
            value = getattr(self, name)
            if value is not None and not 0 < value < 1e6:
                raise CountermarkError(f"{option(name)} is a positive {what}, not {value}")

    def _only_for(self, applies: bool, what: str, *options: str) -> None:
        for name in options:
            if not applies and getattr(self, name) is not None:
                raise CountermarkError(f"{option(name)} goes with {what} only; leave it out")

    def _seeded(self) -> None:
        self._whole("seed", 0, (1 << 32) - 1)


@dataclass(frozen=True, kw_only=True)
class DataOptions(VerbConfig):
    """Options of verbs that read a data set."""

    cache: WrittenPath | None = None
    """Folder of the data files; default $COUNTERMARK_CACHE or the system's cache."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(DataOptions):
    """Options of verbs that read a model folder and its data."""

    data: AnyData | None = None
    """The data's place, where it is not where the folder says."""
    network: Network | None = None
    """module:function that builds the network, unless it is a built-in one; in Python also a
    function or a module."""


@dataclass(frozen=True, kw_only=True)
class OneDeviceOptions(VerbConfig):
    """Options of verbs that run a model."""

    device: str = "auto"
    """Where to compute: auto (a GPU where there is one), cpu, cuda, cuda:N or mps."""

    def __post_init__(self) -> None:
        """Refuse an unknown name of a device."""
        super().__post_init__()
        check_device(self.device)

    def record(self) -> dict[str, Any]:
        """The configuration with the kind of device that is meant on this machine."""
        from countermark.device import resolve_device

        return {**super().record(), "device": resolve_device(self.device).type}


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(OneDeviceOptions):
    """Options of verbs that train a model."""

    devices: int = 1
    """Processes to train on, one a device."""
    precision: Precision = "auto"
    """Precision of the training; auto takes bf16 where the device computes in it."""

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        super().__post_init__()
        self._at_least_one("devices", most=64)

    def record(self) -> dict[str, Any]:
        """The configuration with the precision that is meant on this machine."""
        from countermark.device import resolve_device, resolve_precision

        return {
            **super().record(),
            "precision": resolve_precision(resolve_device(self.device), self.precision),
        }


@dataclass(frozen=True, kw_only=True)
class StampOptions(VerbConfig):
    """Options of verbs that ask a timestamp authority."""

    tsa: str | None = None
    """Address of a timestamp authority (RFC 3161), whose token proves later what existed at a
    time."""
    roots: ReadPath | None = None
    """PEM file of the authority's root certificates, to check its tokens at once."""

    def __post_init__(self) -> None:
        """Refuse roots without an authority, and an address that is none."""
        super().__post_init__()
        self._only_for(self.tsa is not None, "--tsa", "roots")
        if self.tsa is not None:
            check_address(self.tsa, "a timestamp authority")


@dataclass(frozen=True, kw_only=True)
class SuspectOptions(OneDeviceOptions):
    """Options of verbs that ask a suspect."""

    suspect: Annotated[SuspectPlace, Place.ASKED] = field(kw_only=False)
    """Model folder, .onnx or .pt2 file, http(s)://HOST/... of a service (see --api), or
    module:function from images to labels; in Python also the function itself."""
    network: Network | None = None
    """module:function that builds the network of a suspect that is a model folder, unless it is a
    built-in one."""
    api: ApiName | None = None
    """What an address speaks: oip (Open Inference Protocol), mlflow, torchserve, tfserving, vertex,
    sagemaker, hf (Hugging Face), gradio, or json: your own words; default what the address looks
    like."""
    send: tuple[str, ...] = ()
    """What --api json sends: 'NAME=@png' (a form), '@png' (a bare body), or JSON with
    "$base64_png", "$array" or "$arrays" (all images of a request) in it. Secrets go into headers:
    this is saved."""
    read: str = ""
    """Where the answers are, as a JMESPath expression such as predictions[0].label; default the
    whole answer."""
    form: ImageForm = "png"
    """How image files are sent: png or jpeg."""
    quality: int = 95
    """Quality of a JPEG that is sent."""
    classes: ReadPath | None = None
    """File with the class names in the order of the key's labels, one a line, for answers by name;
    default those of the key."""
    match: bool = False
    """Find out from clean examples how the suspect wants to be asked and which of its classes is
    which. The p-value is multiplied by the number of ways."""
    inside: bool = False
    """Give the images of an .onnx file also to its inner places that have their shape (the first
    and the last 32), behind a cleaner in front. The p-value is multiplied by the number of
    places."""
    pixels: Pixels = "float"
    """What the suspect takes: float (pixels of [0, 1]) or uint8."""
    layout: Layout | None = None
    """How it takes them: nchw or nhwc; default nchw, but nhwc for --api tfserving."""
    channels: Channels = "rgb"
    """In which order: rgb or bgr."""
    size: int | None = None
    """Side of the square that images are scaled to before they are sent."""
    mean: tuple[float, ...] = ()
    """Subtracted from float pixels first, one number or one a channel."""
    std: tuple[float, ...] = ()
    """What they are then divided by."""
    budget: int | None = None
    """Most images to ask of an endpoint or a function; the rest count as not answered."""
    rate: float | None = None
    """Most requests a second to an endpoint, or calls of a function."""
    repeats: int = 1
    """How often the same image is asked; an answer that changes counts as none."""
    retries: int = 4
    """How often a failed request is made again, with longer and longer pauses."""
    timeout: float = 30.0
    """Seconds to wait for an endpoint."""
    replay: WrittenPath | None = None
    """File that keeps the answers; the same command goes on from it and asks nothing twice."""
    headers: tuple[str, ...] = ()
    """HTTP headers for an endpoint, each as 'Name: value'."""
    bearer: str | None = None
    """Environment variable that holds a token, which is sent as 'Authorization: Bearer ...'."""

    def __post_init__(self) -> None:
        """Refuse numbers out of range and headers that are none."""
        super().__post_init__()
        self._at_least_one("budget", "repeats")
        self._at_least_one("size", most=1 << 10)
        self._whole("quality", 1, 100)
        self._whole("retries", 0, 100)
        self._positive("number", "rate", "timeout")
        if not all(_HEADER.fullmatch(header.strip()) for header in self.headers):
            raise CountermarkError("--headers are words of the form 'Name: value', in Latin-1")


def option(name: str) -> str:
    """How a field is called on the command line."""
    return f"--{name.replace('_', '-')}"


def required(field: "Field[Any]") -> bool:
    """Whether an option has no default."""
    return field.default is MISSING and field.default_factory is MISSING


def owner_of(config: type, name: str) -> type:
    """The class that declares an option: the verb's own configuration, or a shared one."""
    return next(each for each in config.__mro__ if name in vars(each).get("__annotations__", ()))


def verb(
    config: Callable[_Given, _Config],
) -> Callable[[Callable[[_Config], _Result]], Callable[_Given, _Result]]:
    """Make the public function of a verb: it takes the fields of a configuration as keywords.

    Its signature is that of the configuration, for type checkers and at run time, and its docstring
    lists the options. The configuration stays at hand as the function's attribute `config`. What it
    returns is shown in a notebook as the `show` of its module prints it.

    Args:
        config: the configuration's class.

    Example:
        >>> @verb(PlanConfig)  # doctest: +SKIP
        ... def plan(config: PlanConfig) -> Plan: ...
        >>> plan(p=1e-9).trials  # doctest: +SKIP
        69
    """

    def made(work: Callable[[_Config], _Result]) -> Callable[_Given, _Result]:
        @functools.wraps(work)
        def function(*arguments: _Given.args, **options: _Given.kwargs) -> _Result:
            try:
                given = config(*arguments, **options)
            except TypeError as error:  # in the words of the function that was called
                raise TypeError(
                    str(error).replace(f"{config.__name__}.__init__()", f"{work.__name__}()")
                ) from None
            placed = given.placed()
            with _live():
                return work(placed)

        result = typing.get_type_hints(work)["return"]
        module = sys.modules[work.__module__]
        if isinstance(config, type):
            _put_own_first(config)
            hints = typing.get_type_hints(config)
            given = inspect.signature(config).parameters
            taken = [
                given[each.name].replace(annotation=hints[each.name]) for each in fields(config)
            ]
            del function.__wrapped__  # it has another signature
            function.__doc__ = _documentation(work.__doc__ or "", config, result)
            function.__annotations__ = {**hints, "return": result}
            vars(function)["__signature__"] = inspect.Signature(taken, return_annotation=result)
            vars(function)["config"] = config
        result._repr_html_ = lambda found: _html(module, found)
        return function

    return made


def _live() -> contextlib.AbstractContextManager[None]:
    """One place in a notebook for all progress of the call; nothing anywhere else."""
    if "IPython" not in sys.modules:
        return contextlib.nullcontext()
    from countermark.terminal import live

    return live()


def _html(module: ModuleType, found: object) -> str:
    from countermark.terminal import as_html

    return as_html(lambda: module.show(found))


def _put_own_first(config: type) -> None:
    """Order the fields as help lists them.

    First comes the main place, then what must be given, the verb's own options and the shared
    ones, those of every verb last. A dataclass puts inherited fields first. All fields but the main
    place are keyword-only, so nothing else depends on their order.
    """
    known: dict[str, Field[Any]] = vars(config)["__dataclass_fields__"]

    def place(each: "Field[Any]") -> tuple[bool, bool, int]:
        owner = config.__mro__.index(owner_of(config, each.name))
        return each.kw_only is not False, not required(each), owner

    ordered = sorted(known.values(), key=place)
    known.update({each.name: known.pop(each.name) for each in ordered})


def _documentation(written: str, config: type, result: type) -> str:
    """The docstring of a verb in Google's style, with its options and what it returns."""
    summary, *rest = re.split(r"\n\n(?=Raises:\n|Example:\n)", inspect.cleandoc(written))
    words, returned = words_of(config), (inspect.getdoc(result) or "").partition("\n")[0]
    said = [f"{each.name}: {words.get(each.name, '')}" for each in fields(config)]
    arguments, returns = (
        "\n".join(
            textwrap.fill(line, 96, initial_indent=" " * 4, subsequent_indent=" " * 8)
            for line in lines
        )
        for lines in (said, [f"{result.__name__}: {returned}"])
    )
    return "\n\n".join([summary, f"Args:\n{arguments}", f"Returns:\n{returns}", *rest])


def words_of(config: type) -> dict[str, str]:
    """What is written below each field of a configuration, and of those that it is made from."""
    found: dict[str, str] = {}
    for owner in reversed(config.__mro__):
        if owner is not object:
            found |= _module_words(owner.__module__).get(owner.__name__, {})
    return found


@functools.cache
def _module_words(module: str) -> dict[str, dict[str, str]]:
    """What is written below the fields of a module's classes; nothing where there is no source."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError):
        return {}
    return {
        node.name: {
            line.target.id: " ".join(below.value.value.split())
            for line, below in itertools.pairwise(node.body)
            if isinstance(line, ast.AnnAssign)
            and isinstance(line.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        }
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }


def hints_of(config: type["VerbConfig"]) -> dict[str, Any]:
    """The types of options, with their places."""
    return typing.get_type_hints(config, include_extras=True)


def places_in(hint: Any) -> Iterator[Place]:
    """The places anywhere in a type."""
    yield from (mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Place))
    for part in typing.get_args(hint):
        if not isinstance(part, Place):
            yield from places_in(part)


def _held(name: str, hint: Any, value: Any) -> Any:
    """A value as its type has it.

    Raises:
        CountermarkError: it is of another type, or no name that the option takes.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        made = _held(name, parts[0], value)
        path = (
            isinstance(made, str) and Path in typing.get_args(parts[0]) and Place.NAMED not in parts
        )
        code = Place.ASKED in parts and isinstance(made, str) and is_code(made)
        return Path(made) if path and not code and not is_address(made) else made
    if origin is Literal:
        choose(name.replace("_", " "), value, parts)
        return value
    if origin is tuple and isinstance(value, tuple | list | Real):
        return tuple(
            _held(name, parts[0], each)
            for each in (value if isinstance(value, tuple | list) else (value,))
        )
    if origin in (typing.Union, UnionType):
        rest = [part for part in parts if part is not NoneType]
        if value is None and len(rest) < len(parts):
            return None
        if len(rest) == 1:
            return _held(name, rest[0], value)
        if isinstance(value, str | Path) or (
            set(rest) != {str, Path} and value is not None and not isinstance(value, Real)
        ):
            return value  # a place, or the thing itself
    if hint is float and isinstance(value, str):
        with contextlib.suppress(CountermarkError):
            return budget(value)
    if hint in _NUMBERS and isinstance(value, _NUMBERS[hint]) and type(value) is not bool:
        return hint(value)
    if hint in (bool, str) and isinstance(value, hint):
        return value
    raise CountermarkError(f"{option(name)} takes {_kind(hint)}, not {brief(value)}")


def _kind(hint: Any) -> str:
    """What a type takes, in words."""
    if hint in KINDS:
        return KINDS[hint]
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(typing.get_args(hint))}"
    parts = [part for part in typing.get_args(hint) if part not in (NoneType, ...)]
    if typing.get_origin(hint) is tuple:
        return f"one value or more, each {_kind(parts[0])}"
    if len(parts) > 1 and Path not in parts and not any(isinstance(part, Place) for part in parts):
        return "a name or module:function"
    return _kind(Path if Path in parts else parts[0])


def takes_several(config: type[VerbConfig], name: str) -> bool:
    """Whether an option takes several values."""
    return "tuple" in str(hints_of(config)[name])


def wrong(config: type[VerbConfig], name: str, words: Sequence[str]) -> str:
    """Why words cannot be an option's value."""
    hint = hints_of(config)[name]
    try:
        if words:
            _held(name, hint, tuple(words) if takes_several(config, name) else " ".join(words))
    except CountermarkError as error:
        return str(error)
    given = f"not {brief(' '.join(words))}" if words else "and none is given"
    return f"{option(name)} takes {_kind(hint)}, {given}"


_NUMBERS: Mapping[Any, Any] = {int: Integral, float: Real}


def _placed(value: str | Path, place: Place, name: str) -> str | Path:
    """One path, `~` expanded and held to what its place says; an address as it is."""
    named = place is Place.NAMED and not str(value).startswith("~")
    if named or is_address(value) or (place is Place.ASKED and is_code(str(value))):
        return value
    try:
        path = Path(value).expanduser()
    except RuntimeError as error:
        reason = f"there is no home folder for {value}"
        raise CountermarkError(f"{name}: {reason}; write the path without ~") from error
    try:
        if "\0" in str(path):
            raise ValueError("it has a zero byte in it")
        if place in (Place.READ, Place.ASKED) and not path.exists():
            raise CountermarkError(f"{path} does not exist; check {name}")
        if place is Place.NEW:
            check_free(path)
        if place is Place.NEW_FILE:
            check_new(path)
    except (OSError, ValueError) as error:  # no permission, a name that is too long, a zero byte
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise CountermarkError(
            f"{name}: cannot look for {brief(str(path))}: {reason}; check the path"
        ) from error
    if isinstance(value, Path):
        return path
    return str(path) if value.startswith("~") else value
