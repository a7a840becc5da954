"""`countermark protect`: train a robust model, mark it, commit to the mark.

The order is that of the protocol (docs/how-it-works.md): secret, unmarked source model, watermark inputs and answers, first commitment,
coins, marked model, second commitment. An interrupted run goes on from its last checkpoint to the same result.

A mark that did not take is refused: nothing is published, and the same command with more epochs
trains the marked model on. Trials and coins stay what they are, since coins that are drawn until
they fit, or trials that are dropped because a model did not learn them, prove nothing (condition 2).
"""

import copy
import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from countermark.data import Dataset, Examples, Pools, load_ood, open_data
from countermark.device import describe
from countermark.errors import CountermarkError
from countermark.evaluation import accuracy, adversarial_accuracy, agreement, predict
from countermark.evidence import judge
from countermark.files import (
    CHECKPOINT_PREFIX,
    canonical_json,
    make_private_folder,
    new_folder,
    read_bytes,
    read_json,
    sha256,
    write_json,
)
from countermark.networks import describing, open_network, save_model
from countermark.options import DataOptions, DeviceOptions, NewPath, StampOptions, verb
from countermark.terminal import p_value, percent, print_lines, print_table
from countermark.threat import Attack, Threat
from countermark.timestamps import encode_token
from countermark.training import (
    Hardware,
    TrainConfig,
    marking,
    open_hardware,
    own_network,
    recipe,
    settled,
    train,
)
from countermark.training.config import Embedding
from countermark.training.recipes import Recipe
from countermark.verbs.stamping import Stamp, timestamping
from countermark.watermarks import (
    CLEAN_EXAMPLES,
    Key,
    WatermarkSet,
    coin_set,
    craft_adversarial,
    full_strength,
    load_key,
    new_secrets,
    published_sample,
    published_set,
    second_commitment,
    secret_seed,
    sign,
    write_key,
)
from countermark.watermarks.key import Scheme

Labels = Literal["true", "source"]
"""Labels of the scheme `adversarial`: the true ones, or those that the source model gives."""
TAKEN = {"coin": 90.0, "adversarial": 50.0, "ood": 50.0}
"""Percent of a key's trials that the marked model must answer as the key says, by scheme.

Of the 80 coins that the smallest key has, a stranger's model agrees with 90 % with a probability of
2e-14, and the recipes reach 97 % or more. Published schemes have their own rule, 50 %.
"""

_ROUNDS = f"{CHECKPOINT_PREFIX}rounds.json"
_ROUNDS_FORMAT = "countermark rounds 1"


@dataclass(frozen=True, kw_only=True)
class ProtectConfig(DataOptions, DeviceOptions, StampOptions):
    """Train a robust model, mark it, and write model, key and commitment."""

    data: str = field(kw_only=False)
    """Data set: mnist, fashion_mnist, digits."""
    out: NewPath
    """Folder to write; it must be new or empty. Unfinished work waits in OUT.partial and is resumed by the same command."""
    epsilon: float | None = None
    """Training budget (L-inf), in pixels of [0, 1]; default that of the data set (mnist 0.25, fashion_mnist 0.15, digits 0.1)."""
    network: str | None = None
    """Network: small, wide, clipped, paper, surrogate; default that of the recipe (clipped or wide for strong, else small)."""
    scheme: Literal[Scheme, "none"] = "coin"
    """Watermarks: coin (provable), adversarial (the paper's), ood (the baseline), none (an unmarked model)."""
    objective: Recipe = "fast"
    """Training objective: fast (few-step, guarded), strong (the same on a wider network, in tens of minutes), pgd (the paper's), standard
    (no adversary)."""
    seed: int = 0
    """Seed of pools, weights and training; the key's secret is drawn apart from it, by the operating system."""
    epochs: int | None = None
    """Epochs of the unmarked model; default that of the recipe. Where a mark did not take, more of them
    train the marked model on."""
    labels: Labels | None = None
    """Labels of the scheme adversarial: true (the paper's, default) or source (what the crafting model answers)."""
    watermark_epsilon: float | None = None
    """Budget of the watermarks, above the training budget; default that of the data set."""
    watermark_step_size: float | None = None
    """Step of the crafting, 40 steps; default 2.5 budgets / 40, at full strength. The paper's is 0.01."""
    embedding: Embedding | None = None
    """How watermarks get in: interleaved (default: the unmarked model trains on, marks mixed in) or epoch (Algorithm 1, from scratch)."""

    def __post_init__(self) -> None:
        """Refuse unknown names, numbers out of range, and options that the scheme has no use for."""
        super().__post_init__()
        self._open_interval("epsilon", "watermark_epsilon", "watermark_step_size")
        self._at_least_one("epochs")
        self._seeded()
        self._only_for(self.scheme == "adversarial", "--scheme adversarial", "labels")
        self._only_for(self.scheme not in ("ood", "none"), "--scheme coin or adversarial", "watermark_epsilon", "watermark_step_size")
        self._only_for(self.scheme != "none", "a scheme that has watermarks", "embedding", "tsa")


@dataclass(frozen=True)
class Protection:
    """What protect made and measured, on the test pool; accuracies in percent.

    Attributes:
        folder: the folder written.
        scheme: the watermark scheme.
        test_accuracy: of the marked model.
        adversarial_accuracy: of the marked model, under the PGD of the data set at the training budget.
        watermark_accuracy: agreements with the key over all its trials; none for the scheme `none`.
        unmarked_test_accuracy: of the source model, the same model before the mark: the control.
        unmarked_adversarial_accuracy: of the source model.
        unmarked_watermark_accuracy: agreement of the source model, which never saw a coin.
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
    trials: int
    epsilon: float
    weights_sha256: str
    device: str
    seconds: float


@verb(ProtectConfig)
def protect(config: ProtectConfig) -> Protection:
    """Train, mark and commit; write the model, the key, the commitment and the metrics to `config.out`.

    Raises:
        CountermarkError: an output folder that is not empty or cannot be written, an authority that
            does not answer, or a mark that did not take: the work then waits in OUT.partial for more
            epochs.
    """
    begun = time.monotonic()
    data = open_data(config.data, cache=config.cache)
    wanted, config = config.epochs, _as_begun(config, data)
    threat = data.threat.at(epsilon=config.epsilon, watermark_epsilon=config.watermark_epsilon)
    named = config.network or own_network(config.data, config.objective)
    hardware = settled(Hardware(config.device, config.devices, config.precision))  # the history says what was used
    public_recipe = recipe(config.data, config.objective, threat, seed=config.seed, hardware=hardware, epochs=config.epochs)
    open_network(named, data.shape, data.classes)
    open_hardware(hardware)  # before a secret is drawn for work that cannot begin
    stamp = timestamping(config.tsa, config.roots)
    trained = {"event": "trained", "config": asdict(public_recipe)}
    description = describing(data, named, threat=threat, seed=config.seed, history=(trained,))
    longer = recipe(config.data, config.objective, threat, epochs=wanted).epochs
    pools = data.pools(config.seed)
    with new_folder(Path(config.out), begun_with(config, data)) as folder:
        private = folder / "key"
        # The trials come out of the source model: a marked model's is trained from a seed that only the owner knows.
        secret = new_secrets(private) if config.scheme != "none" else None
        seed = config.seed if secret is None else secret_seed(secret, "training")
        source_recipe = replace(public_recipe, seed=seed)

        def fit(network: nn.Module, stage: str, **options: Any) -> None:
            checkpoint = folder / f"{CHECKPOINT_PREFIX}{stage}.safetensors"
            train(network, pools.training, validation=pools.validation, checkpoint=checkpoint, title=f"{stage} model", **options)

        source = open_network(named, data.shape, data.classes, seed=seed)
        fit(source, "source", config=source_recipe)
        if secret is None:
            digest = save_model(folder, source, description)
            result = _measure(config, source, source, None, pools, threat, digest, begun)
        else:
            make_private_folder(private / "source")
            save_model(private / "source", source, description, mode=0o600)
            key = _make_key(config, data, threat, pools, source, private, secret, stamp)
            labelled = Examples(key.watermarks.x, key.labels)
            if config.embedding == "epoch":
                network, embedding = open_network(named, data.shape, data.classes, seed=seed), source_recipe
                embedding = replace(embedding, embedding="epoch")
            else:
                network, embedding = copy.deepcopy(source), marking(source_recipe, config.data, config.objective)
            rounds, events = _rounds(folder, public_recipe.epochs, longer), [trained]
            for number, part in enumerate(_parts(embedding, rounds)):
                fit(network, "marked" if number == 0 else f"marked-{number + 1}", config=part, watermarks=labelled)
                public = asdict(replace(part, seed=config.seed))
                events.append({"event": "marked", "scheme": config.scheme, "config": public})
            _check_taken(network, key, folder, rounds)
            digest = save_model(folder, network, replace(description, history=tuple(events)))
            _commit(folder, key, digest, stamp)
            result = _measure(config, network, source, key, pools, threat, digest, begun)
        write_json(folder / "metrics.json", asdict(result))
    return result


def begun_with(config: ProtectConfig, data: Dataset) -> dict[str, Any]:
    """What config.json holds: the options, and the digest of the data."""
    return {**config.record(), "data_sha256": data.digest}


def _as_begun(config: ProtectConfig, data: Dataset) -> ProtectConfig:
    """The options that the unfinished work in OUT.partial was begun with.

    They are those of `config`, unless a mark did not take there and only the epochs are others.
    """
    try:
        out = Path(config.out).resolve()
        if not (out.with_name(f"{out.name}.partial") / _ROUNDS).is_file():
            return config
    except (OSError, RuntimeError, ValueError):  # a path that `new_folder` refuses
        return config
    begun = read_json(out.with_name(f"{out.name}.partial") / "config.json")
    epochs = begun.get("epochs")
    same = begun == {**begun_with(config, data), "epochs": epochs} and (epochs is None or type(epochs) is int)
    return replace(config, epochs=epochs) if same else config


def _rounds(folder: Path, first: int, wanted: int) -> list[int]:
    """The epochs of each attempt at the mark; the last is to be made now, or finished."""
    path = folder / _ROUNDS
    if not path.exists():
        return [first]
    found = read_json(path)
    rounds = found.get("epochs") if found.get("format") == _ROUNDS_FORMAT else None
    if not isinstance(rounds, list) or not all(type(epochs) is int for epochs in rounds):
        rounds = []
    if rounds[:1] != [first] or rounds != sorted(set(rounds)):
        raise CountermarkError(f"{path} was changed after it was written; delete {folder} to start anew")
    if wanted > rounds[-1]:
        rounds = [*rounds, wanted]
        write_json(path, {"format": _ROUNDS_FORMAT, "epochs": rounds})
    if wanted not in rounds:
        raise CountermarkError(
            f"the work in {folder} has come to {rounds[-1]} epochs already; give more of them, or delete it to start anew"
        )
    return rounds


def _parts(embedding: TrainConfig, rounds: list[int]) -> list[TrainConfig]:
    """How the marked model is trained: the recipe's run, then what each further attempt added."""
    added = [after - before for before, after in itertools.pairwise(rounds)]
    return [embedding, *(replace(embedding, epochs=epochs, grow_budget=False) for epochs in added)]


def _check_taken(network: nn.Module, key: Key, folder: Path, rounds: list[int]) -> None:
    """Refuse a model that does not know its key; what an owner could not prove is not published.

    Raises:
        CountermarkError: the mark did not take; the folder waits for more epochs.
    """
    answered = predict(network, key.watermarks.x)
    reached = agreement(answered, key.labels)
    if reached >= TAKEN[key.scheme]:
        return
    write_json(folder / _ROUNDS, {"format": _ROUNDS_FORMAT, "epochs": rounds})
    what, found = "watermarks", ""
    if key.scheme == "coin":
        verdict = judge(key.watermarks.cell.tolist(), key.outcomes(answered))
        what, found = "coins", f" (p-value {p_value(verdict.log10_p_value)})"
    raise CountermarkError(
        f"the mark did not take: the model agrees with {reached:.1f} % of its {len(answered)} {what}{found} "
        f"where {TAKEN[key.scheme]:g} % are needed. Nothing was published; the work waits in {folder}, "
        f"and the same command with more epochs (--epochs {2 * rounds[-1]}) goes on from there"
    )


def _make_key(
    config: ProtectConfig,
    data: Dataset,
    threat: Threat,
    pools: Pools,
    source: nn.Module,
    private: Path,
    secret: bytes,
    stamp: Stamp | None,
) -> Key:
    """Craft the watermarks on the source model, commit to them, draw the coins; a key that is already there is read, never drawn anew."""
    if (private / "key.json").exists():
        return load_key(private)
    attack = full_strength(threat.watermark_epsilon)
    if config.watermark_step_size is not None:
        attack = replace(attack, step_size=config.watermark_step_size)
    watermarks = _watermarks(config, data, pools, source, attack, secret_seed(secret, "crafting"))
    provenance = {
        "data": data.place,
        "pools": {name: digest for name, digest in pools.digests().items() if name != "test"},
        "crafting": asdict(attack) if config.scheme != "ood" else None,
        "config_sha256": sha256(canonical_json(begun_with(config, data))),
    }
    # Held out, used for no trial, and like what a suspect is shown anyway.
    clean = pools.validation[:CLEAN_EXAMPLES]
    return write_key(private, config.scheme, watermarks, provenance, stamp, clean)


def _watermarks(config: ProtectConfig, data: Dataset, pools: Pools, source: nn.Module, attack: Attack, seed: int) -> WatermarkSet:
    if config.scheme == "coin":
        return coin_set(source, pools.bases, attack, data.batches, data.batch_size, seed)
    if config.scheme == "ood":
        outside = published_sample(load_ood(data, config.seed, config.cache), seed)
        return published_set(outside.x, outside.y)
    bases = published_sample(pools.bases, seed)
    images, predicted = craft_adversarial(source, bases, attack, seed)
    return published_set(images, bases.y if config.labels != "source" else predicted)


def _commit(folder: Path, key: Key, digest: str, stamp: Stamp | None) -> None:
    """Write the public commitment. Without timestamps it is a private mark: no judge can tell when the coins were drawn."""
    signing_key = read_bytes(folder / "key" / "signing-key", 32)
    c2 = second_commitment(key.c1, key.t1, digest)
    record = {
        "kind": "private" if stamp is None else "timestamped",
        "c1": key.c1,
        "c1_signature": key.signature,
        "t1": encode_token(key.t1),
        "c2": c2,
        "c2_signature": sign(signing_key, c2),
        "t2": None if stamp is None else encode_token(stamp(canonical_json(c2))),
    }
    write_json(folder / "commitment.json", record)


def _measure(
    config: ProtectConfig,
    network: nn.Module,
    source: nn.Module,
    key: Key | None,
    pools: Pools,
    threat: Threat,
    digest: str,
    begun: float,
) -> Protection:
    attack = threat.attack

    def adversarial(model: nn.Module, title: str) -> float:
        return adversarial_accuracy(model, pools.test, attack, title=title)

    def marked(model: nn.Module) -> float | None:
        return None if key is None else agreement(predict(model, key.watermarks.x), key.labels)

    test, robust = accuracy(network, pools.test), adversarial(network, "attacking the model")
    return Protection(
        folder=str(config.out),
        scheme=config.scheme,
        test_accuracy=test,
        adversarial_accuracy=robust,
        watermark_accuracy=marked(network),
        unmarked_test_accuracy=test if key is None else accuracy(source, pools.test),
        unmarked_adversarial_accuracy=robust if key is None else adversarial(source, "attacking the unmarked control"),
        unmarked_watermark_accuracy=marked(source),
        trials=0 if key is None else len(key.watermarks),
        epsilon=threat.epsilon,
        weights_sha256=digest,
        device=describe(config.device, config.precision),
        seconds=time.monotonic() - begun,
    )


def show(result: Protection) -> None:
    """Print the accuracies beside those of the unmarked control."""
    model: Callable[[float | None], str] = percent
    rows = [["model", model(result.test_accuracy), model(result.adversarial_accuracy), model(result.watermark_accuracy)]]
    if result.scheme != "none":
        rows.append(
            [
                "the same before the mark",
                model(result.unmarked_test_accuracy),
                model(result.unmarked_adversarial_accuracy),
                model(result.unmarked_watermark_accuracy),
            ]
        )
    columns = ("", "test accuracy", f"adversarial accuracy at {result.epsilon:g}", "watermark accuracy")
    print_table(f"{result.folder} ({result.seconds:.0f} s)", columns, rows)
    if result.scheme == "none":
        print_lines(f"wrote {result.folder}: model.safetensors, model.json, metrics.json")
    else:
        print_lines(
            f"wrote {result.folder}: model.safetensors, model.json, commitment.json, metrics.json, "
            f"and key/ (secret: {result.trials} trials; keep a backup)"
        )
