"""One frozen configuration for each verb.

It is at once the verb's arguments in Python, its options on the command line, its help, and the
JSON saved beside what it made. Nothing heavy is imported here, so that `countermark --help` is
quick. Ranges and names (data sets, networks, schemes) are checked when a configuration is made,
before PyTorch is loaded; paths are checked by `VerbConfig.placed`, which the command line calls.
"""

import re
from dataclasses import dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from countermark import names
from countermark.data.known import known
from countermark.errors import CountermarkError
from countermark.places import SuspectPlace, check_address, check_free, is_address, place_name
from countermark.text import brief

_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+ *: *[ -~\xa0-\xff]*")


class Place(Enum):
    """What an option's path is to the verb; an option without one is no path."""

    READ = "it must exist"
    NEW = "it must be new or an empty folder"
    WRITTEN = "it may be either"


@dataclass(frozen=True, kw_only=True)
class VerbConfig:
    """What every verb has."""

    json: bool = False
    """Print one JSON object on standard output and nothing else there."""

    def record(self) -> dict[str, Any]:
        """The configuration as JSON-ready values, without what does not change the result (where it goes, how it is shown)."""
        left_out = {"json", "out", "cache", "roots"}
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: place_name(value) if isinstance(value, Path) or callable(value) else value
            for name, value in values.items()
            if name not in left_out
        }

    def placed(self) -> "VerbConfig":
        """The same configuration with `~` expanded in its paths.

        Raises:
            CountermarkError: what is to be read does not exist, or what is to be made is there.
        """
        hints = get_type_hints(type(self), include_extras=True)
        changed: dict[str, Any] = {}
        for name, hint in hints.items():
            value = getattr(self, name)
            for place in getattr(hint, "__metadata__", ()):
                if isinstance(value, tuple):
                    changed[name] = tuple(_placed(path, place, _option(name)) for path in value)
                elif value is not None:
                    changed[name] = _placed(value, place, _option(name))
        return replace(self, **changed)

    def _open_interval(self, *options: str) -> None:
        for name in options:
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise CountermarkError(f"{_option(name)} is a number in (0, 1), not {value}")

    def _at_least_one(self, *options: str, most: int = 1_000_000) -> None:
        for name in options:
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise CountermarkError(f"{_option(name)} is a whole number from 1 to {most}, not {_number(value)}")

    def _positive(self, what: str, *options: str) -> None:
        for name in options:
            value = getattr(self, name)
            if value is not None and not 0 < value < 1e6:
                raise CountermarkError(f"{_option(name)} is a positive {what}, not {value}")

    def _only_for(self, applies: bool, what: str, *options: str) -> None:
        for name in options:
            if not applies and getattr(self, name) is not None:
                raise CountermarkError(f"{_option(name)} goes with {what} only; leave it out")

    def _seeded(self) -> None:
        if any(field.name == "seed" for field in fields(self)) and not 0 <= getattr(self, "seed") < 1 << 32:  # noqa: B009
            raise CountermarkError("--seed is a whole number from 0 to 4294967295")

    def _stamped(self, tsa: str | None) -> None:
        """Refuse roots without an authority, and an address that is none."""
        self._only_for(tsa is not None, "--tsa", "roots")
        if tsa is not None:
            check_address(tsa, "a timestamp authority")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _number(value: int) -> str:
    return str(value) if abs(value) < 1 << 64 else "a number of many digits"


def _placed(value: str | Path, place: Place, option: str) -> str | Path:
    """One path, `~` expanded and held to what its place says; an address (`http://...`) as it is."""
    if is_address(value):
        return value
    try:
        path = Path(value).expanduser()
    except RuntimeError as error:
        reason = f"there is no home folder for {value}"
        raise CountermarkError(f"{option}: {reason}; write the path without ~") from error
    try:
        if place is Place.READ and not path.exists():
            raise CountermarkError(f"{path} does not exist; check {option}")
        if place is Place.NEW:
            check_free(path)
    except (OSError, ValueError) as error:  # no permission, a name that is too long, a zero byte
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise CountermarkError(f"{option}: cannot look for {brief(str(path))}: {reason}; check the path") from error
    if isinstance(value, Path):
        return path
    return str(path) if value.startswith("~") else value


@dataclass(frozen=True, kw_only=True)
class FetchConfig(VerbConfig):
    """Fetch the files of a data set into the cache."""

    name: str
    """Data set: mnist, fashion_mnist (digits needs no files)."""
    source: Annotated[Path | None, Place.READ] = None
    """Folder that has the IDX files (plain or .gz); tried before all other sources."""
    cache: Annotated[Path | None, Place.WRITTEN] = None
    """Folder to keep them in; default $COUNTERMARK_CACHE or the system's cache."""

    def __post_init__(self) -> None:
        """Refuse an unknown data set."""
        known(self.name)


@dataclass(frozen=True, kw_only=True)
class ProtectConfig(VerbConfig):
    """Train a robust model, mark it, and write model, key and commitment."""

    data: str
    """Data set: mnist, fashion_mnist, digits."""
    out: Annotated[Path, Place.NEW]
    """Folder to write; it must be new or empty. Unfinished work waits in OUT.partial and is resumed by the same command."""
    epsilon: float | None = None
    """Training budget (L-inf), in pixels of [0, 1]; default that of the data set (mnist 0.25, fashion_mnist 0.15, digits 0.1)."""
    network: str | None = None
    """Network: small, wide, clipped, paper, surrogate; default that of the recipe (clipped or wide for strong, else small)."""
    scheme: str = "coin"
    """Watermarks: coin (provable), adversarial (the paper's), ood (the baseline), none (an unmarked model)."""
    objective: str = "fast"
    """Training objective: fast (few-step, guarded), strong (the same on a wider network, in tens of minutes), pgd (the paper's), standard
    (no adversary)."""
    seed: int = 0
    """Seed of pools, weights and training; the key's secret is drawn apart from it, by the operating system."""
    epochs: int | None = None
    """Epochs of the unmarked model; default that of the recipe. Where a mark did not take, more of them
    train the marked model on."""
    labels: str | None = None
    """Labels of the scheme adversarial: true (the paper's, default) or source (what the crafting model answers)."""
    watermark_epsilon: float | None = None
    """Budget of the watermarks, above the training budget; default that of the data set."""
    watermark_step_size: float | None = None
    """Step of the crafting, 40 steps; default 2.5 budgets / 40, at full strength. The paper's is 0.01."""
    embedding: str | None = None
    """How watermarks get in: interleaved (default: the unmarked model trains on, marks mixed in) or epoch (Algorithm 1, from scratch)."""
    accelerator: str = "auto"
    """Device: auto, cpu, cuda, mps."""
    devices: int = 1
    """Processes to train on, one a device."""
    precision: str = "auto"
    """auto (bf16 where the processor computes in it), 32-true, bf16-mixed."""
    tsa: str | None = None
    """Address of a timestamp authority (RFC 3161) whose token the coins come out of; without it the mark is private."""
    roots: Annotated[Path | None, Place.READ] = None
    """PEM file of the authority's root certificates, to check its tokens at once."""
    cache: Annotated[Path | None, Place.WRITTEN] = None
    """Folder of the data files; default $COUNTERMARK_CACHE or the system's cache."""

    def __post_init__(self) -> None:
        """Refuse unknown names, numbers out of range, and options that the scheme has no use for."""
        names.choose("network", self.network or "small", names.NETWORKS)
        names.choose("scheme", self.scheme, names.SCHEMES)
        names.choose("objective", self.objective, names.RECIPES)
        names.choose("labels", self.labels or "true", names.LABELS)
        names.choose("embedding", self.embedding or "interleaved", names.EMBEDDINGS)
        names.choose("accelerator", self.accelerator, names.ACCELERATORS)
        names.choose("precision", self.precision, names.PRECISIONS)
        self._open_interval("epsilon", "watermark_epsilon", "watermark_step_size")
        self._at_least_one("epochs")
        self._at_least_one("devices", most=64)
        self._seeded()
        self._only_for(self.scheme == "adversarial", "--scheme adversarial", "labels")
        self._only_for(self.scheme not in ("ood", "none"), "--scheme coin or adversarial", "watermark_epsilon", "watermark_step_size")
        self._only_for(self.scheme != "none", "a scheme that has watermarks", "embedding", "tsa")
        self._stamped(self.tsa)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(VerbConfig):
    """Measure a model on the test pool: test, adversarial and watermark accuracy."""

    model: Annotated[Path, Place.READ]
    """Model folder."""
    key: Annotated[Path | None, Place.READ] = None
    """Key folder; default MODEL/key if there is one."""
    epsilon: float | None = None
    """Budget of the PGD; default that of the model."""
    steps: int | None = None
    """Steps of the PGD; default those of the data set (mnist 25, fashion_mnist 15, digits 10)."""
    step_size: float | None = None
    """Step of the PGD, in pixels; default that of the data set."""
    restarts: int = 1
    """Independent runs; an example must survive all of them."""
    strict: bool = False
    """Then try four stronger attacks (APGD-CE, APGD-T, Square, FAB-T) on what PGD leaves: slow, and what to quote as robustness."""
    images: int | None = None
    """Measure on so many test images, taken evenly; default all of them."""
    cache: Annotated[Path | None, Place.WRITTEN] = None
    """Folder of the data files; default $COUNTERMARK_CACHE or the system's cache."""

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        self._open_interval("epsilon", "step_size")
        self._at_least_one("steps", "restarts", "images")


@dataclass(frozen=True, kw_only=True)
class SuspectConfig(VerbConfig):
    """What every verb has that asks a suspect."""

    suspect: Annotated[SuspectPlace, Place.READ]
    """Model folder, .onnx or .pt2 file, http(s)://HOST/v2/models/NAME (Open Inference Protocol) or
    .../invocations (MLflow); in Python also a function from images to labels."""
    pixels: str = "float"
    """What the suspect takes: float (pixels of [0, 1]) or uint8."""
    layout: str = "nchw"
    """How it takes them: nchw or nhwc."""
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
    replay: Annotated[Path | None, Place.WRITTEN] = None
    """File that keeps the answers; the same command goes on from it and asks nothing twice."""
    headers: tuple[str, ...] = ()
    """HTTP headers for an endpoint, each as 'Name: value'."""

    def __post_init__(self) -> None:
        """Refuse unknown names and numbers out of range."""
        names.choose("kind of pixels", self.pixels, names.PIXELS)
        names.choose("layout", self.layout, names.LAYOUTS)
        self._at_least_one("budget", "repeats")
        if not 0 <= self.retries <= 100:
            raise CountermarkError(f"--retries is a whole number from 0 to 100, not {_number(self.retries)}")
        self._positive("number", "rate", "timeout")
        if not all(_HEADER.fullmatch(header.strip()) for header in self.headers):
            raise CountermarkError("--headers are words of the form 'Name: value', in Latin-1")

    def _place_only(self) -> None:
        """Refuse a function: a judge could not ask it."""
        if callable(self.suspect):
            raise CountermarkError(
                f"a claim is about a file or an address that a judge can ask, not about a function ({place_name(self.suspect)})"
            )


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(SuspectConfig):
    """Ask a suspect for the labels of a key's watermarks and say what they prove."""

    key: Annotated[Path, Place.READ]
    """Key folder, as protect wrote it."""
    alpha: float = 1e-6
    """Level of a match; a judge's is 1e-9."""

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        super().__post_init__()
        self._open_interval("alpha")


@dataclass(frozen=True, kw_only=True)
class ClaimConfig(SuspectConfig):
    """Open one batch of a key against a suspect: a folder that a judge can check."""

    suspect: Annotated[str | Path, Place.READ]
    """Model folder, .onnx or .pt2 file, http(s)://HOST/v2/models/NAME (Open Inference Protocol) or
    .../invocations (MLflow)."""
    key: Annotated[Path, Place.READ]
    """Key folder; it remembers which batches were shown."""
    out: Annotated[Path, Place.NEW]
    """Folder to write; it must be new or empty."""
    model: Annotated[Path | None, Place.READ] = None
    """Folder of the marked model with its commitment.json; default the folder that holds the key."""
    batch: int | None = None
    """Batch to open; default the first that nobody has seen."""
    anyway: bool = False
    """Open it even if a judge could not uphold the claim."""
    tsa: str | None = None
    """Address of a timestamp authority (RFC 3161): fixes the suspect's answers before the trials are shown."""
    roots: Annotated[Path | None, Place.READ] = None
    """PEM file of the authority's root certificates, to check its token at once."""

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        super().__post_init__()
        self._place_only()
        if self.batch is not None and self.batch < 0:
            raise CountermarkError(f"--batch is a number from 0, not {_number(self.batch)}")
        self._stamped(self.tsa)


@dataclass(frozen=True, kw_only=True)
class AdjudicateConfig(SuspectConfig):
    """Judge a claim as a third party: check everything, ask the suspect, and write the judgement as a page and as JSON."""

    suspect: Annotated[str | Path, Place.READ]
    """Model folder, .onnx or .pt2 file, http(s)://HOST/v2/models/NAME (Open Inference Protocol) or
    .../invocations (MLflow)."""
    claim: Annotated[Path, Place.READ]
    """The claim's folder."""
    roots: Annotated[Path, Place.READ]
    """PEM file with the root certificates of the timestamp authorities that you trust."""
    out: Annotated[Path, Place.WRITTEN] = Path("judgement")
    """Where the judgement goes: OUT.html and OUT.json."""
    rival: Annotated[Path | None, Place.READ] = None
    """Claim of somebody else on the same suspect: each mark is asked of the other's model."""
    shown: Annotated[tuple[Path, ...], Place.READ] = ()
    """Claims of the same key that were shown before: a batch counts once."""
    suspect_token: Annotated[Path | None, Place.READ] = None
    """Timestamp (RFC 3161 response, DER) over the suspect's file, if the accused has one."""
    alpha: float = 1e-9
    """Level of the judgement."""

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        super().__post_init__()
        self._place_only()
        self._open_interval("alpha")


@dataclass(frozen=True, kw_only=True)
class GuardConfig(VerbConfig):
    """Calibrate a guard for a model folder: where answers are nearly tied, a client's coins will choose them."""

    model: Annotated[Path, Place.READ]
    """Model folder; guard.json is written there."""
    key: Annotated[Path | None, Place.READ] = None
    """Key folder, for its secret; default MODEL/key."""
    cost: float = 0.1
    """Points of test accuracy that the coins may cost, in expectation."""
    bits: int = 16
    """Keyed projections that cut the cells; up to 2^bits cells for each pair of classes."""
    natural_only: bool = False
    """Coins for near ties only, none for made-up queries that are unlike all training images by more than the model's budget."""
    tsa: str | None = None
    """Address of a timestamp authority (RFC 3161), to show later when the guard was fixed."""
    roots: Annotated[Path | None, Place.READ] = None
    """PEM file of the authority's root certificates, to check its token at once."""
    cache: Annotated[Path | None, Place.WRITTEN] = None
    """Folder of the data files; default $COUNTERMARK_CACHE or the system's cache."""

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        if not 0 < self.cost < 50:
            raise CountermarkError(f"--cost is a number of points in (0, 50), not {self.cost}")
        self._at_least_one("bits", most=64)
        self._stamped(self.tsa)


@dataclass(frozen=True, kw_only=True)
class ServeConfig(VerbConfig):
    """Serve a model by the Open Inference Protocol v2, with coins in its answers and a log of them."""

    model: Annotated[Path, Place.READ]
    """Model folder with a guard.json."""
    log: Annotated[str, Place.WRITTEN]
    """Query log: a path (SQLite) or postgresql://USER:PASSWORD@HOST/DATABASE."""
    clients: Annotated[Path | None, Place.READ] = None
    """File of the clients who may ask, as countermark client add makes it; default MODEL/clients.json."""
    key: Annotated[Path | None, Place.READ] = None
    """Key folder, for its secret; default MODEL/key."""
    name: str = "model"
    """Name of the model in the service's addresses."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8080
    """Port to listen on; 0 takes a free one."""
    unguarded: bool = False
    """Serve the model as it is: no coins, no log."""
    max_batch: int = 64
    """Most images of one request, and of one pass of the model."""
    max_body: int = 4 << 20
    """Most bytes of a request's body."""
    max_waiting: int = 256
    """Most requests that may wait; more are refused with 503."""
    timeout: float = 10.0
    """Seconds that a client may take to send a request, and that an answer may take."""
    drain: float = 10.0
    """Seconds that open requests have to finish when the service is told to stop."""

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        self._at_least_one("max_batch", most=4096)
        self._at_least_one("max_body", most=1 << 30)
        self._at_least_one("max_waiting")
        if not 0 <= self.port < 1 << 16:
            raise CountermarkError(f"--port is a number from 0 to 65535, not {_number(self.port)}")
        self._positive("number of seconds", "timeout", "drain")
        if not self.name.isidentifier():
            raise CountermarkError(f"--name is letters, digits and underscores, not {brief(self.name)}")


@dataclass(frozen=True, kw_only=True)
class TraceConfig(SuspectConfig):
    """Say from whose account a copy was made: ask a suspect for the queries of a log."""

    key: Annotated[Path, Place.READ]
    """Key folder of the guarded model."""
    log: Annotated[str, Place.READ]
    """Query log: a path or postgresql://..."""
    head: Annotated[Path | None, Place.READ] = None
    """A head of the log that was published before; the log must still lead to it."""
    alpha: float = 1e-6
    """Probability that a stranger gets anybody named."""

    def __post_init__(self) -> None:
        """Refuse numbers out of range."""
        super().__post_init__()
        self._open_interval("alpha")


@dataclass(frozen=True, kw_only=True)
class ClientAddConfig(VerbConfig):
    """Let a client ask the service: print a new API key, once, and keep only its digest."""

    name: str
    """Name of the account; the log and every trace use it."""
    clients: Annotated[Path, Place.WRITTEN]
    """File of the clients; it is made if it is new."""
    public_key: str | None = None
    """Ed25519 public key, 64 hexadecimal digits: this client signs its requests, so nobody can ask in its name."""

    def __post_init__(self) -> None:
        """Refuse names that a log could not show, and a public key that is none."""
        if not self.name or len(self.name) > 200 or not self.name.isprintable():
            raise CountermarkError("the name of a client is 1 to 200 printable characters")
        key = self.public_key
        if key is not None and (len(key) != 64 or set(key) - set("0123456789abcdef")):
            raise CountermarkError("--public-key is an Ed25519 public key of 64 lower-case hexadecimal digits")


@dataclass(frozen=True, kw_only=True)
class LogHeadConfig(VerbConfig):
    """Print the head of a query log: publish it or have it timestamped, and what it covers cannot be changed unseen."""

    log: Annotated[str, Place.READ]
    """Query log: a path or postgresql://..."""
    tsa: str | None = None
    """Address of a timestamp authority (RFC 3161): its token becomes part of the head."""
    roots: Annotated[Path | None, Place.READ] = None
    """PEM file of the authority's root certificates, to check its token at once."""

    def __post_init__(self) -> None:
        """Refuse roots without an authority."""
        self._stamped(self.tsa)


@dataclass(frozen=True, kw_only=True)
class LogCheckConfig(VerbConfig):
    """Check every row of a query log and the chain that binds them."""

    log: Annotated[str, Place.READ]
    """Query log: a path or postgresql://..."""
    head: Annotated[Path | None, Place.READ] = None
    """A head that was published before; the log must still lead to it."""
    roots: Annotated[Path | None, Place.READ] = None
    """PEM file with the roots of the timestamp authorities that you trust: the head must carry a token of one."""

    def __post_init__(self) -> None:
        """Refuse roots without a head."""
        self._only_for(self.head is not None, "--head", "roots")


@dataclass(frozen=True, kw_only=True)
class LogEraseConfig(VerbConfig):
    """Erase what a query log holds of a client; the chain still checks."""

    log: Annotated[str, Place.READ]
    """Query log: a path or postgresql://..."""
    client: str
    """Name of the account."""


@dataclass(frozen=True, kw_only=True)
class StealConfig(VerbConfig):
    """Steal a model the way a thief would, to see what the mark survives."""

    victim: Annotated[Path, Place.READ]
    """Model folder of the victim."""
    setting: str
    """white (the weights themselves), black (labels only: Algorithm 2) or grey (the same by the owner's network, trained adversarially)."""
    out: Annotated[Path, Place.NEW]
    """Folder to write; it must be new or empty."""
    queries: int | None = None
    """Labels that a black- or grey-box thief asks for; default the paper's 51,200."""
    seed: int = 0
    """Seed of the surrogate and its training."""
    cache: Annotated[Path | None, Place.WRITTEN] = None
    """Folder of the data files; default $COUNTERMARK_CACHE or the system's cache."""

    def __post_init__(self) -> None:
        """Refuse an unknown setting and numbers out of range."""
        names.choose("setting", self.setting, names.SETTINGS)
        self._at_least_one("queries", most=10_000_000)
        self._only_for(self.setting != "white", "--setting black or grey", "queries")
        self._seeded()


@dataclass(frozen=True, kw_only=True)
class RemoveConfig(VerbConfig):
    """Try to remove a mark by pruning or by fine-tuning; give one of the two."""

    model: Annotated[Path, Place.READ]
    """Model folder."""
    out: Annotated[Path, Place.NEW]
    """Folder to write; it must be new or empty."""
    prune: float | None = None
    """Fraction of each layer's weights to remove, the smallest first."""
    finetune: int | None = None
    """Epochs of fine-tuning on the thief's pool."""
    seed: int = 0
    """Seed of the fine-tuning."""
    cache: Annotated[Path | None, Place.WRITTEN] = None
    """Folder of the data files; default $COUNTERMARK_CACHE or the system's cache."""

    def __post_init__(self) -> None:
        """Refuse numbers out of range, and both removals or neither."""
        if (self.prune is None) == (self.finetune is None):
            raise CountermarkError("give either --prune FRACTION or --finetune EPOCHS")
        self._open_interval("prune")
        self._at_least_one("finetune")
        self._seeded()


@dataclass(frozen=True, kw_only=True)
class PlanConfig(VerbConfig):
    """Say how many trials a wished p-value takes."""

    p: float = 1e-9
    """The wished p-value."""
    agreement: float = 0.9
    """How often the suspect is expected to agree with a coin, above one half."""
    power: float = 0.9
    """Probability of getting there."""


@dataclass(frozen=True, kw_only=True)
class BundleSignConfig(VerbConfig):
    """Sign a model folder with OpenSSF model-signing: every public file of it, in MODEL/model.sig."""

    model: Annotated[Path, Place.READ]
    """Model folder; its key, clients.json and the signature itself are left out."""
    private_key: Annotated[Path, Place.READ]
    """Elliptic-curve private key, PEM."""


@dataclass(frozen=True, kw_only=True)
class BundleCheckConfig(VerbConfig):
    """Check the OpenSSF signature of a model folder."""

    model: Annotated[Path, Place.READ]
    """Model folder with its model.sig."""
    public_key: Annotated[Path, Place.READ]
    """Public key of whoever signed, PEM."""


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig(VerbConfig):
    """Run the paper's study, with the strangers that it lacks, and write a report beside its numbers."""

    out: Annotated[Path, Place.WRITTEN] = Path("study")
    """Folder of the study: report.html, results.json, tables as CSV, and the finished units; the same command goes on where it was."""
    data: tuple[str, ...] = ("mnist", "fashion_mnist")
    """Data sets: mnist, fashion_mnist, digits."""
    profile: str = "quick"
    """quick (under an hour on a laptop), standard (the paper's network, three seeds), paper (its Table 6, 100 epochs; for a GPU)."""
    protocol: tuple[str, ...] = ("clean",)
    """clean (disjoint pools), as-published (the published runs' habits), or both."""
    seeds: int | None = None
    """Owners to train; default those of the profile."""
    plan: bool = False
    """Only list the work, what of it is finished, and an estimate of the time."""
    workers: int | None = None
    """Local processes, one core each; default one for each core; 0 runs everything in this process."""
    scheduler: str | None = None
    """Address of a Dask scheduler (tcp://...) to use instead; its workers must see OUT and the data cache under the same paths."""
    cache: Annotated[Path | None, Place.WRITTEN] = None
    """Folder of the data files; default $COUNTERMARK_CACHE or the system's cache."""

    def __post_init__(self) -> None:
        """Refuse unknown names, numbers out of range, and two engines at once."""
        self._at_least_one("seeds", most=1000)
        if self.workers is not None and not 0 <= self.workers <= 1024:
            raise CountermarkError(f"--workers is a number of processes from 0 to 1024, not {_number(self.workers)}")
        self._only_for(self.scheduler is None, "local processes (leave --scheduler out)", "workers")
        if not self.data or len(set(self.data)) != len(self.data):
            raise CountermarkError("--data names one or more data sets, each once")
        if not self.protocol or len(set(self.protocol)) != len(self.protocol):
            raise CountermarkError("--protocol names clean, as-published, or both, each once")
        for name in self.data:
            known(name)
        for protocol in self.protocol:
            names.choose("protocol", protocol, names.PROTOCOLS)
        names.choose("profile", self.profile, names.PROFILES)


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig(VerbConfig):
    """The whole story in minutes: protect a model, then tell a stolen copy from a stranger."""

    out: Annotated[Path, Place.WRITTEN] = Path("quickstart")
    """Folder to write; a story that was interrupted goes on where it was."""
    data: str = "mnist"
    """Data set: mnist, fashion_mnist, digits."""
    seed: int = 0
    """Seed of the protected model; the stranger has the next one."""
    cache: Annotated[Path | None, Place.WRITTEN] = None
    """Folder of the data files; default $COUNTERMARK_CACHE or the system's cache."""

    def __post_init__(self) -> None:
        """Refuse an unknown data set and a seed out of range."""
        known(self.data)
        self._seeded()
