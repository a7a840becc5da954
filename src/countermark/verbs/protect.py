"""`countermark protect`: train a robust model, mark it, commit to the mark; or mark given weights.

The order is that of the protocol (docs/how-it-works.md): secret, unmarked source model, watermark
inputs and answers, first commitment, coins, marked model, second commitment. An interrupted run
goes on from its last checkpoint to the same result.

The marking goes on until the mark holds (`marking.standing`), for up to `MOST_ROUNDS` rounds of the
recipe. A mark that does not hold after these is refused: nothing is published, and the same command
with more epochs trains the marked model further. Trials and coins stay as they are, since coins
that are drawn until they fit, or trials that are dropped because a model did not learn them, prove
nothing (condition 2).
"""

import copy
import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from countermark.choices import Embedding, Recipe, SchemeName
from countermark.data import KNOWN
from countermark.device import describe, resolve_device
from countermark.errors import CountermarkError
from countermark.files import (
    CHECKPOINT_PREFIX,
    JSON_LIMIT,
    make_private_folder,
    new_folder,
    read_bytes,
    read_json,
    read_tensors,
    sha256,
    write_json,
    write_tensors,
)
from countermark.options import (
    AnyData,
    AnyWeights,
    DataOptions,
    DeviceOptions,
    NewPath,
    ReadPath,
    StampOptions,
    verb,
)
from countermark.places import Network
from countermark.terminal import duration, note, percent, print_lines, print_table, unbroken
from countermark.threat import Threat, shown

if TYPE_CHECKING:
    import torch
    from torch import nn

    from countermark.data import Dataset, Examples, Pools
    from countermark.marking import Standing
    from countermark.timestamps import Stamp
    from countermark.training import TrainConfig
    from countermark.watermarks import Change, Key, Materials

Labels = Literal["true", "source"]
"""Labels of the scheme `adversarial`: the true ones, or those that the source model gives."""
MOST_ROUNDS = 4
"""Rounds of the marking recipe that are made while the mark does not hold, the first among them."""

_TRIED_IMAGES = 250  # training images on which given weights are tried
_FAR_BETTER = 15.0  # points; half of it is the chance of so few images
_NORMALISED: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...] = (
    ((), ()),
    ((0.5,), (0.5,)),
    ((0.5,), (0.25,)),
    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
)
"""Means and deviations that people normalise images with, beside those of the images."""
_CLEANED = 128  # images in a step of a cleaner's training, at most
_CLEANER_STEPS = 500  # of that training, at least; two passes over MNIST are some more
_FORMS_LIMIT = 1 << 34
_ROUNDS = f"{CHECKPOINT_PREFIX}rounds.json"
_ROUNDS_FORMAT = "countermark rounds 1"


@dataclass(frozen=True, kw_only=True)
class ProtectConfig(DataOptions, DeviceOptions, StampOptions):
    """Train a robust model and mark it, or mark your own.

    It writes the model, the key and the commitment.
    """

    data: AnyData = field(kw_only=False)
    """Data set: mnist, fashion_mnist, digits, cifar10, or a place of your own: a folder of class
    folders, a .npz or Parquet file, or module:function; in Python also arrays or any data set of
    images and labels."""
    out: NewPath
    """Folder to write; it must be new or empty. Unfinished work waits in OUT.partial and is resumed
    by the same command."""
    epsilon: float | None = None
    """Training budget (L-inf) in pixels of [0, 1], as 0.03 or 8/255; default that of the data set
    (mnist 0.25, fashion_mnist 0.15, digits 0.1), 8/255 for colour images, 0.15 for grey ones."""
    network: Network | None = None
    """Network: a built-in one (small, wide, clipped, paper, surrogate, resnet, narrow), timm:NAME
    or MODULE:FUNCTION; in Python also a module or a function that makes one. A module counts as
    new, whatever it has learned: give weights as well where it was trained. Default by kind of
    image: small, or wide and clipped for strong; narrow in colour."""
    scheme: Literal[SchemeName, "none"] = "coin"
    """Watermarks: coin (provable), texture (provable on made-up images, which outlast cleaners, but
    can be recognised), mixed (half of either), composite (provable, images of two classes),
    adversarial (the paper's), ood (the baseline), none (an unmarked model)."""
    objective: Recipe | None = None
    """Training objective: fast (few steps, checked for overfitting; the default), strong (for
    longer, in grey on a wider network: tens of minutes, in colour more), pgd (the paper's),
    standard (no adversary; the default with --weights, which are then only marked)."""
    weights: AnyWeights | None = None
    """Trained weights to begin with: .safetensors, or a .pt of your own; in Python also a state
    dict."""
    trained_on: AnyData | None = None
    """Place of the images that these weights were trained on; default the training part of the
    data, and its test part where that had to be cut out."""
    size: int | None = None
    """Side that images are brought to."""
    skip_damaged: bool = False
    """Leave out files that cannot be read."""
    thief_images: int | None = None
    """Training images that the model never sees, kept for the thieves that steal and remove
    simulate; default 11 of 60. With 1 the model learns from nearly all, and nobody can be
    simulated."""
    mean: tuple[float, ...] = ()
    """What a layer in front of the network subtracts from the pixels, one number or one a
    channel."""
    std: tuple[float, ...] = ()
    """What it then divides by."""
    mirror: bool | None = None
    """Left and right mean nothing in the images, so training may mirror them; default what is known
    of the data, else no."""
    shift: int | None = None
    """Pixels of border that mean nothing, by which training may move images; default what is known
    of the data, else an eighth of the side of colour images."""
    seed: int = 0
    """Seed of pools, weights and training; the key's secret is drawn apart from it, by the
    operating system."""
    epochs: int | None = None
    """Epochs of the unmarked model, or of the marking where weights are only marked; default that
    of the recipe. Where a mark did not hold, more of them train the marked model on."""
    labels: Labels | None = None
    """Labels of the scheme adversarial: true (the paper's, default) or source (what the crafting
    model answers)."""
    watermark_epsilon: float | None = None
    """Budget of the watermarks, above the training budget; default that of the data set."""
    watermark_step_size: float | None = None
    """Step of the crafting, 40 steps; default 2.5 budgets / 40, at full strength. The paper's is
    0.01."""
    survive: tuple[str, ...] = ()
    """What coins are to survive on their way to a suspect: jpeg:QUALITY, resize:FACTOR (and back),
    blur:SIDE, median:SIDE, levels:N, clip:MARGIN, threshold:LEVEL, or denoise:FILTERS, a network
    that is trained for it first. Trials are crafted, chosen and learned in these forms too."""
    register: str | None = None
    """Public log in which C1 is registered: rekor, or a JSON file that describes another. The coins
    then come from public randomness a minute later, so that a judge can count how often you drew
    some. Needs --identity, and --tsa for the model."""
    identity: ReadPath | None = None
    """Private key (RSA, PEM, no password) by which you are known; it signs what is registered."""
    embedding: Embedding | None = None
    """How watermarks get in: interleaved (default: the unmarked model trains on, marks mixed in) or
    epoch (Algorithm 1, from scratch)."""

    def __post_init__(self) -> None:
        """Refuse unknown names, numbers out of range, and options that the scheme cannot use."""
        super().__post_init__()
        self._open_interval("epsilon", "watermark_epsilon", "watermark_step_size")
        self._at_least_one("epochs", "thief_images")
        self._seeded()
        marked = self.scheme != "none"
        self._only_for(marked, "a scheme that has watermarks", "embedding", "tsa", "register")
        self._only_for(self.register is not None, "--register", "identity")
        self._only_for(
            self.identity is not None and self.tsa is not None, "--identity and --tsa", "register"
        )
        self._only_for_schemes("labelled", "labels")
        self._only_for_schemes("crafted", "watermark_epsilon", "watermark_step_size")
        if self.survive:
            self._only_for_schemes("surviving", "survive")
        self._only_for(self.weights is not None, "--weights", "trained_on")
        if self.weights is not None and self.embedding == "epoch":
            raise CountermarkError(
                "--embedding epoch trains from scratch; leave it or --weights out"
            )
        if self.weights is not None and not marked and self.objective in (None, "standard"):
            raise CountermarkError(
                "given weights with no mark and no robustness stay what they are; "
                "take a scheme or another objective"
            )

    def _only_for_schemes(self, heed: str, *options: str) -> None:
        """Refuse options that the scheme does not heed."""
        if all(getattr(self, name) is None for name in options):
            return  # and the schemes, which import PyTorch, are not asked
        from countermark.watermarks import SCHEMES

        heeding = [name for name, each in SCHEMES.items() if getattr(each, heed)]
        self._only_for(self.scheme in heeding, f"--scheme {' or '.join(heeding)}", *options)


@dataclass(frozen=True)
class Protection:
    """What protect made, and what it measured on the test pool; accuracies are in percent.

    Attributes:
        folder: the folder that was written.
        scheme: the watermark scheme.
        test_accuracy: accuracy of the marked model.
        adversarial_accuracy: accuracy of the marked model under the PGD of the data set at the
            training budget.
        watermark_accuracy: agreements with the key over all its trials; none for the scheme `none`.
        unmarked_test_accuracy: accuracy of the source model, which is the same model before the
            mark and serves as the control.
        unmarked_adversarial_accuracy: adversarial accuracy of the source model.
        unmarked_watermark_accuracy: agreement of the source model, which never saw a coin.
        mark: what the marked model's answers to its key prove, and what those of a copy prove that
            was pruned as far as it stays usable; none for the scheme `none`.
        marking_epochs: epochs that the marking took, over all its rounds.
        marking_seconds: wall-clock time of the marking in this call.
        known: images of each pool that given weights had been trained on; empty without weights.
        trials: trials in the key.
        epsilon: the training budget, in pixels of [0, 1].
        weights_sha256: digest of the weights file.
        device: where it was trained and measured, and in which precision.
        seconds: wall-clock time of this call (of the last part, where a run was resumed).
    """

    folder: str
    scheme: str
    test_accuracy: float
    adversarial_accuracy: float
    watermark_accuracy: float | None
    unmarked_test_accuracy: float
    unmarked_adversarial_accuracy: float
    unmarked_watermark_accuracy: float | None
    mark: "Standing | None"
    marking_epochs: int
    marking_seconds: float
    known: Mapping[str, int]
    trials: int
    epsilon: float
    weights_sha256: str
    device: str
    seconds: float


@dataclass(frozen=True)
class _Setup:
    """What is decided before the work begins.

    It has the public seed where the work later takes a secret one.

    Attributes:
        config: the options.
        data: the data.
        known: which images given weights were trained on; see `known_images`.
        pools: the pools that the data is cut into.
        threat: budgets, and the PGD of the evaluation.
        network: what builds the network, as later verbs are told.
        training: how the source model is trained; none for given weights that are only marked.
        embedding: how the mark is trained in; none for the scheme `none`.
        weights_sha256: digest of given weights; none without them.
    """

    config: ProtectConfig
    data: "Dataset"
    known: "torch.Tensor | None"
    pools: "Pools"
    threat: Threat
    network: Any
    training: "TrainConfig | None"
    embedding: "TrainConfig | None"
    weights_sha256: str | None

    @property
    def run(self) -> dict[str, Any]:
        """What makes two runs the same run, JSON-ready.

        Images and weights are in it by their digests, wherever they lie.
        """
        found = {
            **_options(self.config),
            "data_sha256": self.data.digest,
            "threat": asdict(self.threat),
            "pools": dict(self.data.held_out),
        }
        if self.data.place in KNOWN:
            found["data"] = self.data.place  # what is known of it by name counts as well
        if self.known is not None:
            found["known_sha256"] = sha256(self.known.numpy().tobytes())
        return (
            found
            if self.weights_sha256 is None
            else {**found, "weights_sha256": self.weights_sha256}
        )

    @property
    def epochs(self) -> int:
        """What `--epochs` counts: epochs of the source model, or else of the marking."""
        return _either(self.training, self.embedding).epochs

    def source(self, seed: int) -> "nn.Module":
        """The network that training, or the mark, begins with."""
        from torch import nn

        from countermark.networks import load_weights, open_network

        config, data, place = self.config, self.data, self.network
        if isinstance(place, nn.Module):
            place = copy.deepcopy(place)  # the user's own stays as it is
        network = open_network(
            place, data.shape, data.classes, mean=config.mean, std=config.std, seed=seed
        )
        if config.weights is not None:
            load_weights(network, config.weights)
        return network

    def history(self) -> list[dict[str, Any]]:
        """What was done before the mark."""
        given, trained = self.weights_sha256, self.training
        events: list[dict[str, Any]] = []
        if given is not None:
            events.append(
                {"event": "given", "weights_sha256": given, "known": dict(self.pools.known)}
            )
        if trained is not None:
            events.append({"event": "trained", "config": asdict(trained)})
        return events


def _set_up(config: ProtectConfig) -> _Setup:
    """Decide everything once.

    Raises:
        CountermarkError: options do not go together, or the data, the network or the hardware does
            not exist.
    """
    from countermark.data import known_images, open_data
    from countermark.networks.weights import weights_sha256
    from countermark.training import (
        Hardware,
        built_in_network,
        fitted,
        gentle,
        marking,
        open_hardware,
        recipe,
        resolve_hardware,
        traits,
    )
    from countermark.watermarks import SCHEMES

    data = open_data(
        config.data, size=config.size, skip_damaged=config.skip_damaged, cache=config.cache
    )
    if config.thief_images is not None:
        data = replace(data, pool_sizes={**data.held_out, "thief": config.thief_images})
    threat = data.threat.at(epsilon=config.epsilon, watermark_epsilon=config.watermark_epsilon)
    known = None
    if config.weights is not None:
        known = known_images(data, config.trained_on, cache=config.cache)
    pools = data.pools(config.seed, known)
    _check_room(config, data, pools)
    given = traits(data, pools.training, mirror=config.mirror, shift=config.shift)
    objective = config.objective or ("fast" if config.weights is None else "standard")
    # The history says what was used.
    hardware = resolve_hardware(Hardware(config.device, config.devices, config.precision))
    options: dict[str, Any] = {"seed": config.seed, "hardware": hardware, "epochs": config.epochs}
    training: TrainConfig | None = recipe(given, objective, threat, **options)
    embedding = marking(_either(training), given, objective)
    if config.embedding == "epoch":
        embedding = replace(_either(training), embedding="epoch")
    most = SCHEMES[config.scheme].watermark_batch if config.scheme in SCHEMES else None
    embedding = replace(embedding, watermark_batch=most or embedding.watermark_batch)
    open_hardware(hardware)  # before a secret is drawn for work that cannot begin
    setup = _Setup(
        config=config,
        data=data,
        known=known,
        pools=pools,
        threat=threat,
        network=config.network or built_in_network(given, objective),
        training=training,
        embedding=None if config.scheme == "none" else embedding,
        weights_sha256=None if config.weights is None else weights_sha256(config.weights),
    )
    # Likewise: it refuses a network that cannot be built, and weights that do not fit.
    network = setup.source(config.seed)
    setup = replace(
        setup,
        training=fitted(_either(training), given, objective, network),
        embedding=setup.embedding and fitted(setup.embedding, given, objective, network),
    )
    if config.weights is None:
        return setup
    _check_input(setup, network)
    if objective != "standard":
        return setup
    gently = gentle(_either(training), given, network, epochs=config.epochs)
    gently = replace(gently, watermark_batch=most or gently.watermark_batch)
    return replace(setup, training=None, embedding=gently)


def _check_input(setup: _Setup, network: "nn.Module") -> None:
    """Try given weights on training images, which they should know, and on normalised ones.

    A network that gets pixels where it wants normalised images learns the mark all the same, and
    then serves nobody. A network that knows nothing is left alone: on uneven classes it may get
    many images right by one answer to all of them, and another normalisation changes which.

    Raises:
        CountermarkError: on images that are normalised otherwise, the weights are far better than
            they are now, and than one answer to all images.
    """
    import torch

    from countermark.data import pixels
    from countermark.evaluation import accuracy

    config, training = setup.config, setup.pools.training
    known = training[torch.arange(0, len(training), max(1, len(training) // _TRIED_IMAGES))]
    x = pixels(known.x[:])
    own = tuple(
        tuple(round(number, 3) for number in each.tolist())
        for each in (x.mean((0, 2, 3)), x.std((0, 2, 3)).clamp_min(0.001))
    )

    def share(mean: tuple[float, ...], std: tuple[float, ...]) -> float:
        setting = replace(setup, config=replace(config, mean=mean, std=std))
        return accuracy(setting.source(config.seed), known)

    right = accuracy(network, known)
    others = {*_NORMALISED, own} - {(config.mean, config.std)}
    fitting = [each for each in others if len(each[0]) in (0, 1, x.shape[1])]
    better, (mean, std) = max((share(*each), each) for each in fitting)
    largest = 100 * int(known.y.bincount().max()) / len(known)
    if better > max(right, largest) + _FAR_BETTER:
        numbers = (" ".join(f"{number:g}" for number in each) for each in (mean, std))
        given = "--mean {} --std {}".format(*numbers) if mean else "no --mean and --std"
        raise CountermarkError(
            f"the given weights get {right:.0f} % of {len(known)} training images right, and "
            f"{better:.0f} % with {given}; declare the normalisation that they were trained with"
        )
    _check_order(network, known, x, right, largest)


def _check_order(
    network: "nn.Module", known: "Examples", x: "torch.Tensor", right: float, largest: float
) -> None:
    """Try whether given weights have their classes or their channels in another order.

    Training would put either right, for a service that goes on to count otherwise.

    Args:
        network: the given weights.
        known: training images.
        x: their pixels.
        right: percentage of them that the weights get right.
        largest: percentage that one answer to all of them gets right.

    Raises:
        CountermarkError: in another order the weights are far better than they are now, and than
            one answer to all images.
    """
    from countermark.evaluation import agreement, predict
    from countermark.suspects import translation

    labels = predict(network, known.x[:])
    translated, meant = translation(labels, known.y)
    enough = max(right, largest) + _FAR_BETTER
    told = f"the given weights get {right:.0f} % of {len(known)} training images right, and"
    if translated > enough:
        pairs = ", ".join(f"{one} is {other}" for one, other in sorted(meant.items())[:5])
        raise CountermarkError(
            f"{told} {translated:.0f} % after an exchange of classes (their class {pairs}...); put "
            "the classes of the weights, or the names of the folders, into the other's order"
        )
    turned = agreement(predict(network, x.flip(1)), known.y) if x.shape[1] == 3 else 0.0
    if turned > enough:
        raise CountermarkError(
            f"{told} {turned:.0f} % with their channels turned around (BGR); let your network turn "
            "them around first"
        )
    if right < largest + _FAR_BETTER:
        note(
            f"{told} one answer to all of them gets {largest:.0f} %: are these the weights that "
            "you mean, and the images as they want them (range of the pixels, size)?"
        )


def _check_room(config: ProtectConfig, data: "Dataset", pools: "Pools") -> None:
    """Refuse, before anything is trained, what would be refused or do harm after it.

    Raises:
        CountermarkError: the model would be written among the images, or there are too few of them
            for a mark.
    """
    import torch

    from countermark.device import seeded
    from countermark.watermarks import SCHEMES, changes

    place, out = data.place, Path(config.out).expanduser().resolve()
    folder = place not in KNOWN and bool(place) and Path(place).is_dir()
    if folder and out.is_relative_to(Path(place).resolve()):
        raise CountermarkError(
            f"{config.out} lies among the images of {place}, and would count as one of their "
            "classes; choose another --out"
        )
    with seeded(torch.device("cpu"), config.seed):  # layers are drawn
        changes(config.survive, data.shape)  # refuses what it does not know
    scheme = SCHEMES.get(config.scheme)
    lacks = data.lacks_bases(pools, scheme.bases) if scheme is not None else None
    if scheme is not None and scheme.coins and lacks is not None:
        raise CountermarkError(
            f"{lacks}; give more images, or --scheme none for a model without a mark"
        )
    if scheme is not None and scheme.check is not None:
        scheme.check(pools.bases, pools.training)


def _either(*configs: "TrainConfig | None") -> "TrainConfig":
    return next(config for config in configs if config is not None)


def made_with(config: ProtectConfig) -> dict[str, Any]:
    """What `config.json` of a folder holds that these options made."""
    return _set_up(config).run


@verb(ProtectConfig)
def protect(config: ProtectConfig) -> Protection:
    """Train, mark and commit; write model, key, commitment and metrics to `config.out`.

    Raises:
        CountermarkError: the output folder is not empty or cannot be written, the authority does
            not answer, or the mark does not hold; in the last case the work waits in OUT.partial
            for more epochs.

    Example:
        >>> made = cm.protect("digits", out="mine")
        >>> made.trials, made.mark.verdict.verdict
        (160, 'match')
    """
    from countermark.data.pools import packed
    from countermark.marking import commit, standing
    from countermark.networks import describing, place_of, save_model
    from countermark.registry import drawing
    from countermark.timestamps import timestamping
    from countermark.training import train
    from countermark.watermarks import new_secrets, secret_seed

    begun = time.monotonic()
    wanted, config = config.epochs, _as_begun(config)
    setup = _set_up(config)
    stamp = timestamping(config.tsa, config.roots)
    drawn_from = drawing(stamp, config.register, config.identity)
    description = describing(
        setup.data,
        place_of(setup.network),
        threat=setup.threat,
        seed=config.seed,
        mean=config.mean,
        std=config.std,
        known=None if setup.known is None else packed(setup.known),
    )
    with new_folder(Path(config.out), setup.run) as folder:
        private = folder / "key"
        # The trials come out of the source model: a marked model's is trained from a seed that only
        # the owner knows.
        secret = None if setup.embedding is None else new_secrets(private)
        seed = config.seed if secret is None else secret_seed(secret, "training")

        def fit(network: "nn.Module", stage: str, how: "TrainConfig", **options: Any) -> None:
            checkpoint = folder / f"{CHECKPOINT_PREFIX}{stage}.safetensors"
            options = {"validation": setup.pools.validation, "checkpoint": checkpoint, **options}
            train(
                network,
                setup.pools.training,
                replace(how, seed=seed),
                title=f"{stage} model",
                **options,
            )

        source, events = setup.source(seed), setup.history()
        if setup.training is not None:
            fit(source, "source", setup.training)
        before = replace(description, history=tuple(events))
        if secret is None or setup.embedding is None:
            digest = save_model(folder, source, before)
            result = _measure(setup, source, source, None, digest)
        else:
            make_private_folder(private / "source")
            save_model(private / "source", source, before, mode=0o600)
            # Given weights were not trained here, so nothing has moved them yet.
            source.to(resolve_device(config.device))
            given = _materials(setup, source, folder, secret)
            key = _make_key(setup, given, private, drawn_from)
            afresh = setup.embedding.embedding == "epoch"
            network = setup.source(seed) if afresh else copy.deepcopy(source)
            marked = _taught(given, key, folder)
            attempts = _attempts(folder, setup.epochs, wanted or setup.epochs)
            started, found, epochs = time.monotonic(), None, 0
            for number, part in enumerate(_parts(setup.embedding, attempts), 1):
                stage = "marked" if number == 1 else f"marked-{number}"
                fit(network, stage, part, watermarks=marked)
                found, epochs = standing(network, key), epochs + part.epochs
                events.append({"event": "marked", "scheme": config.scheme, "config": asdict(part)})
                if found.taken:
                    break
            assert found is not None
            spent = time.monotonic() - started
            _check_taken(found, folder, attempts, epochs, config.scheme)
            digest = save_model(folder, network, replace(description, history=tuple(events)))
            commit(folder, private, key, digest, stamp)
            result = _measure(setup, network, source, key, digest)
            result = replace(result, mark=found, marking_epochs=epochs, marking_seconds=spent)
        result = replace(result, seconds=time.monotonic() - begun)
        write_json(folder / "metrics.json", asdict(result))
    return result


def _options(config: ProtectConfig) -> dict[str, Any]:
    """The options, but for the places of images and weights."""
    places = ("data", "weights", "trained_on")
    return {name: value for name, value in config.record().items() if name not in places}


def _as_begun(config: ProtectConfig) -> ProtectConfig:
    """The options that the unfinished work in OUT.partial was begun with.

    They are those of `config`, unless a mark did not hold there and only the epochs are others.
    """
    try:
        out = Path(config.out).resolve()
        if not (out.with_name(f"{out.name}.partial") / _ROUNDS).is_file():
            return config
    except (OSError, RuntimeError, ValueError):  # a path that `new_folder` refuses
        return config
    begun = read_json(out.with_name(f"{out.name}.partial") / "config.json")
    epochs, record = begun.get("epochs"), _options(config)
    record.pop("epochs")
    same = {name: begun.get(name) for name in record} == record and (
        epochs is None or type(epochs) is int
    )
    return replace(config, epochs=epochs) if same else config


def _attempts(folder: Path, first: int, wanted: int) -> list[int]:
    """The epochs of each attempt at the mark; the last is to be made now, or finished."""
    path = folder / _ROUNDS
    if not path.exists():
        return [first]
    found = read_json(path)
    rounds = found.get("epochs") if found.get("format") == _ROUNDS_FORMAT else None
    if not isinstance(rounds, list) or not all(type(epochs) is int for epochs in rounds):
        rounds = []
    if rounds[:1] != [first] or rounds != sorted(set(rounds)):
        raise CountermarkError(
            f"{path} was changed after it was written; delete {folder} to start anew"
        )
    if wanted > rounds[-1]:
        rounds = [*rounds, wanted]
        write_json(path, {"format": _ROUNDS_FORMAT, "epochs": rounds})
    if wanted not in rounds:
        raise CountermarkError(
            f"the work in {folder} has come to {rounds[-1]} epochs already; give more of them, "
            "or delete it to start anew"
        )
    return rounds


def _parts(embedding: "TrainConfig", attempts: list[int]) -> "list[TrainConfig]":
    """How the marked model is trained, until the mark holds.

    The recipe's run, the same again up to `MOST_ROUNDS` in all, then what each further attempt
    added to the epochs.
    """
    again = replace(embedding, grow_budget=False)
    added = [after - before for before, after in itertools.pairwise(attempts)]
    return [
        embedding,
        *[again] * (MOST_ROUNDS - 1),
        *(replace(again, epochs=each) for each in added),
    ]


def _check_taken(
    found: "Standing", folder: Path, attempts: list[int], epochs: int, scheme: str
) -> None:
    """Refuse a mark that does not hold; what an owner could not prove is not published.

    Raises:
        CountermarkError: it does not; the folder waits for more epochs.
    """
    from countermark.watermarks import SCHEMES

    if found.taken:
        return
    budget = "a larger watermark budget (--watermark-epsilon), " if SCHEMES[scheme].crafted else ""
    write_json(folder / _ROUNDS, {"format": _ROUNDS_FORMAT, "epochs": attempts})
    raise CountermarkError(
        f"after {epochs} epochs of marking {found.why_not()}. Nothing was published; "
        f"the work waits in {folder}, and the same command with --epochs "
        f"{attempts[-1] + epochs} trains it for {epochs} more. If that does not help: "
        f"{budget}a larger network, each in another --out"
    )


def _make_key(setup: _Setup, given: "Materials", private: Path, stamp: "Stamp | None") -> "Key":
    """Make the watermarks, commit to them, draw the coins.

    A key that is already there is read, never drawn anew.

    Raises:
        CountermarkError: the key that is there is for other pools.
    """
    from countermark.watermarks import (
        CLEAN_EXAMPLES,
        SCHEMES,
        load_key,
        write_key,
    )

    config, pools, scheme = setup.config, setup.pools, SCHEMES[setup.config.scheme]
    digests = {name: digest for name, digest in pools.digests().items() if name != "test"}
    if (private / "key.json").exists():
        key = load_key(private)
        if key.c1.get("pools") != digests:
            raise CountermarkError(
                f"{private} is a key for other pools of the data; restore it from a backup, "
                f"or delete {private.parent}"
            )
        return key
    provenance = {
        "data": setup.data.place,
        "pools": digests,
        "crafting": asdict(given.attack) if scheme.crafted else None,
        **({"survive": list(config.survive)} if config.survive else {}),
        "config_sha256": sha256(read_bytes(private.parent / "config.json", JSON_LIMIT)),
    }
    # Held out, used for no trial, and like what a suspect is shown anyway.
    clean = pools.validation[:CLEAN_EXAMPLES].read()
    names = setup.data.class_names
    return write_key(private, config.scheme, scheme.make(given), provenance, stamp, clean, names)


def _materials(setup: _Setup, source: "nn.Module", folder: Path, secret: bytes) -> "Materials":
    """What the watermarks of a run are made of."""
    from countermark.data import load_ood
    from countermark.watermarks import Materials, full_strength, secret_key, secret_seed

    config, pools = setup.config, setup.pools
    attack = full_strength(setup.threat.watermark_epsilon)
    if config.watermark_step_size is not None:
        attack = replace(attack, step_size=config.watermark_step_size)
    return Materials(
        source=source,
        bases=pools.bases,
        outside=lambda: load_ood(setup.data, pools, config.seed, config.cache),
        attack=attack,
        batches=setup.data.batches,
        batch_size=setup.data.batch_size,
        seed=secret_seed(secret, "crafting"),
        key=secret_key(secret, "trials"),
        true_labels=config.labels != "source",
        survive=_survived(setup, source, folder, secret),
        training=pools.training,
    )


def _survived(setup: _Setup, source: "nn.Module", folder: Path, secret: bytes) -> "list[Change]":
    """The changes that trials are to survive.

    A cleaner among them is trained once, in one piece, by as many steps as it takes: the thief's
    passes would be few steps where there are few images.
    """
    import torch

    from countermark.device import batch_size, seeded
    from countermark.evaluation import device_of
    from countermark.networks import load_weights
    from countermark.networks.cleaners import CLEANERS
    from countermark.training import teach_cleaner
    from countermark.watermarks import changes, secret_seed

    seed, images, device = secret_seed(secret, "cleaner"), setup.pools.training, device_of(source)
    together = batch_size(device, setup.data.shape, _CLEANED, _CLEANED)

    def teach(word: str, layer: "nn.Module") -> None:
        path = folder / f"{CHECKPOINT_PREFIX}{word.replace(':', '-')}.safetensors"
        if path.exists():
            load_weights(layer.to(device), path)
            return
        passes = CLEANERS[word.partition(":")[0]].options["epochs"]
        teach_cleaner(
            layer,
            source,
            images,
            budget=setup.threat.watermark_epsilon,
            epochs=max(passes, math.ceil(_CLEANER_STEPS * together / max(1, len(images)))),
            batch_size=together,
            seed=seed,
            title=f"cleaner {word}",
        )
        write_tensors(path, layer.state_dict(), mode=0o600)

    with seeded(torch.device("cpu"), seed):
        return changes(setup.config.survive, setup.data.shape, teach)


def _taught(given: "Materials", key: "Key", folder: Path) -> "Examples":
    """What teaches the marked model the key's answers.

    The forms of a trial are made once: a run that goes on elsewhere might round one otherwise, and
    its checkpoint would be that of another run.
    """
    import torch

    from countermark.data import Examples
    from countermark.watermarks import versions

    if key.rules.members is not None:
        members = key.rules.members(given)
        return Examples(members.x, key.labels[members.y])
    x, forms = key.watermarks.x, 1 + len(given.survive)
    path = folder / f"{CHECKPOINT_PREFIX}forms.safetensors"
    if given.survive and not path.exists():
        write_tensors(path, {"x": torch.cat(versions(x, given.survive))}, mode=0o600)
    taught = read_tensors(path, _FORMS_LIMIT)[0].get("x") if given.survive else x
    if taught is None or taught.dtype != x.dtype or taught.shape != (forms * len(x), *x.shape[1:]):
        raise CountermarkError(f"{path} was changed after it was written; delete it to go on")
    return Examples(taught, key.labels.repeat(forms))


def _measure(
    setup: _Setup, network: "nn.Module", source: "nn.Module", key: "Key | None", digest: str
) -> Protection:
    from countermark.evaluation import accuracy, adversarial_accuracy, agreement, predict

    test, attack = setup.pools.test, setup.threat.attack

    def marked(model: "nn.Module") -> float | None:
        return None if key is None else agreement(predict(model, key.watermarks.x), key.labels)

    clean = accuracy(network, test)
    robust = adversarial_accuracy(network, test, attack, title="attacking the model")
    clean_before, robust_before = clean, robust
    if key is not None:
        clean_before = accuracy(source, test)
        robust_before = adversarial_accuracy(
            source, test, attack, title="attacking the unmarked control"
        )
    return Protection(
        folder=str(setup.config.out),
        scheme=setup.config.scheme,
        test_accuracy=clean,
        adversarial_accuracy=robust,
        watermark_accuracy=marked(network),
        unmarked_test_accuracy=clean_before,
        unmarked_adversarial_accuracy=robust_before,
        unmarked_watermark_accuracy=marked(source),
        mark=None,
        marking_epochs=0,
        marking_seconds=0.0,
        known=dict(setup.pools.known),
        trials=0 if key is None else len(key.watermarks),
        epsilon=setup.threat.epsilon,
        weights_sha256=digest,
        device=describe(setup.config.device, setup.config.precision),
        seconds=0.0,
    )


def show(result: Protection) -> None:
    """Print the accuracies beside those of the unmarked control."""
    rows = {
        "model": (
            result.test_accuracy,
            result.adversarial_accuracy,
            result.watermark_accuracy,
        )
    }
    if result.mark is not None:
        rows["before the mark"] = (
            result.unmarked_test_accuracy,
            result.unmarked_adversarial_accuracy,
            result.unmarked_watermark_accuracy,
        )
    print_table(
        f"{unbroken(result.folder)} ({duration(result.seconds)})",
        ("", "test", f"adversarial at {shown(result.epsilon)}", "watermarks"),
        [[name, *map(percent, values)] for name, values in rows.items()],
    )
    folder = unbroken(result.folder)
    if result.mark is None:
        print_lines(f"wrote {folder}: model.safetensors, model.json, metrics.json")
        return
    took = f"{result.marking_epochs} epochs of marking ({duration(result.marking_seconds)})"
    left = result.mark.left()
    print_lines(f"the mark: {result.mark} after {took}" + (f"; {left}" if left else ""))
    if result.known:
        print_lines(_known_line(result))
    print_lines(
        f"wrote {folder}: model.safetensors, model.json, commitment.json, metrics.json, "
        f"and key/ (secret: {result.trials} trials; keep a backup)"
    )


def _known_line(result: Protection) -> str:
    """What the given weights had seen of what was to be held out."""
    held_out = {name: count for name, count in result.known.items() if name != "training"}
    seen = ", ".join(f"{count} of {name}" for name, count in held_out.items() if count)
    if not seen:
        return "the given weights had seen no image that was held out"
    return (
        f"the given weights had been trained on images that are held out here ({seen}): what is "
        "measured on those flatters, and most before the mark. The mark is valid all the same. "
        "--trained-on says which images they were"
    )
