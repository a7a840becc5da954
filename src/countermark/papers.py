"""Papers of a model: a model card for readers, and a bill of materials for programs.

The card is Markdown with the front matter of the Hugging Face Hub
(https://huggingface.co/docs/hub/model-cards), the bill a CycloneDX ML-BOM in JSON
(https://cyclonedx.org/docs/1.6/json/). Both say what the model folder says of itself, and which
releases of torch and Countermark wrote them: the same folder and releases give the same bytes.

Neither tells of the key, of seeds, of what was held out, or of the marking. That there is a mark is
told on a card if its owner wants so, and nowhere else: whoever reads it is warned or deterred, and
what was told cannot be taken back.
"""

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from countermark.data import KNOWN
from countermark.errors import CountermarkError
from countermark.files import JSON_LIMIT, canonical_json, file_sha256, read_bytes, read_json, sha256
from countermark.html import escape
from countermark.networks import NETWORKS, Description, describe, weights_sha256
from countermark.text import brief, visible
from countermark.threat import Attack, shown
from countermark.version import __version__

_TASK = "image-classification"
_SETTINGS = ("epsilon", "steps", "step_size")


@dataclass(frozen=True)
class Figure:
    """One measured figure.

    Attributes:
        name: what was measured.
        percent: how much of it.
        under: the attack with its budget; empty without one.
        settings: the same for programs.
    """

    name: str
    percent: float
    under: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """What a model folder says of itself that its papers tell.

    Attributes:
        name: the folder's name.
        description: what `model.json` says.
        weights_sha256: digest of `model.safetensors`.
        figures: what was measured; empty where nobody says.
        images: test images that it was measured on; none where nobody says how many.
        known: images of the whole test part that given weights had been trained on; none without
            such weights.
        marked: whether there is a commitment to a mark.
    """

    name: str
    description: Description
    weights_sha256: str
    figures: tuple[Figure, ...]
    images: int | None
    known: int | None
    marked: bool

    @property
    def data(self) -> str:
        """The name of the data set; a place of the user's own stays private."""
        place = self.description.data.place
        return place if place in KNOWN else "a data set of its maker's own"

    @property
    def training(self) -> list[str]:
        """What was done to the model, a sentence each, without the marking."""
        told = ((_TOLD.get(str(event.get("event"))), event) for event in self.description.history)
        return [tell(event) for tell, event in told if tell is not None]

    @property
    def robust(self) -> bool:
        """Whether it was trained on adversarial examples."""
        return any(
            _entry(event, "config").get("attack") is not None
            for event in self.description.history
            if event.get("event") == "trained"
        )


def read_facts(folder: Path, evaluation: Path | None = None) -> Facts:
    """Read what the papers of a model folder tell, and hold its weights to their digest.

    Args:
        folder: a model folder.
        evaluation: what `countermark evaluate --json` printed of it, instead of `metrics.json`.

    Raises:
        CountermarkError: a file is missing or damaged, or the files are of several models.
    """
    description = describe(folder)
    digest = file_sha256(folder / "model.safetensors")
    if digest != weights_sha256(folder):
        raise CountermarkError(
            f"{folder / 'model.safetensors'} is not the file that model.json describes "
            "(SHA-256 differs); restore it from a backup"
        )
    metrics = folder / "metrics.json"
    measured = read_json(metrics) if metrics.exists() else {}
    known = _entry(measured, "known").get("test")
    path = evaluation or metrics
    if evaluation is not None:
        measured = _printed(evaluation)
    figures: list[Figure] = []
    try:
        if measured:
            figures = _figures(measured, description.threat.attack)
    except (KeyError, TypeError, ValueError) as error:
        raise CountermarkError(
            f"{path} lacks a usable figure ({brief(str(error))}); it is damaged or not a file of "
            "Countermark"
        ) from error
    if measured.get("weights_sha256", digest) != digest:
        raise CountermarkError(
            f"{path} was measured on other weights than those in {folder}; measure these"
        )
    return Facts(
        folder.resolve().name,
        description,
        digest,
        tuple(figures),
        _count(measured.get("images")),
        _count(known),
        (folder / "commitment.json").exists(),
    )


def _printed(path: Path) -> dict[str, Any]:
    """What a verb printed with `--json`."""
    try:
        found = json.loads(read_bytes(path, JSON_LIMIT))
    except (ValueError, RecursionError) as error:
        raise CountermarkError(
            f"{path} is not JSON; give what countermark evaluate MODEL --json printed"
        ) from error
    if not isinstance(found, dict) or "weights_sha256" not in found:
        raise CountermarkError(
            f"{path} does not say which weights were measured; give what countermark evaluate "
            "MODEL --json printed"
        )
    return found


def _figures(measured: Mapping[str, Any], usual: Attack) -> list[Figure]:
    """The figures of `metrics.json`, under the model's own attack, or those of an evaluation."""
    pgd = replace(
        usual, **{name: measured[name] for name in _SETTINGS if measured.get(name) is not None}
    )
    restarts = measured.get("restarts", 1)
    within = f"within {shown(pgd.epsilon)}, L-inf"
    settings = {"attack": "PGD", "norm": "L-inf", **asdict(pgd), "restarts": restarts}
    found = [
        Figure("accuracy", _percent(measured["test_accuracy"])),
        Figure(
            "adversarial accuracy",
            _percent(measured["adversarial_accuracy"]),
            f"PGD {pgd.steps} x {shown(pgd.step_size)}"
            f"{f', {restarts} runs' if restarts > 1 else ''} {within}",
            settings,
        ),
    ]
    if measured.get("strict") is not None:
        strict = measured["strict"]
        attacks = ", ".join(map(visible, strict["broken"]))
        found.append(
            Figure(
                "strict accuracy",
                _percent(strict["strict_accuracy"]),
                f"worst case of {attacks} {within}",
                {**settings, "attack": attacks},
            )
        )
    return found


def _percent(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 100:
        raise ValueError("a share in percent")
    return float(value)


def _count(value: Any) -> int | None:
    return value if type(value) is int else None


def _entry(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """What a record holds under a name, if that is a record itself; else an empty one."""
    found = record.get(name)
    return found if isinstance(found, dict) else {}


# What was done to a model.


def _trained(event: Mapping[str, Any]) -> str:
    config = _entry(event, "config")
    said = ", ".join(
        f"{words} {_number(config[name])}"
        for name, words in {
            "epochs": "epochs",
            "batch_size": "batch size",
            "learning_rate": "learning rate",
            "momentum": "momentum",
            "weight_decay": "weight decay",
        }.items()
        if name in config
    )
    moved = [
        words
        for name, words in {"flip": "mirrored left to right", "shift": "moved"}.items()
        if config.get(name)
    ]
    against, attack = "without an adversary", _entry(config, "attack")
    if attack:
        steps, size, budget = (
            _number(attack.get(each)) for each in ("steps", "step_size", "epsilon")
        )
        against = f"on adversarial examples (PGD, {steps} x {size} within {budget}, L-inf)"
    augmented = f"; images were {' and '.join(moved)} at random" if moved else ""
    return f"Trained by SGD {against}: {said}{augmented}."


def _removed(event: Mapping[str, Any]) -> str:
    return f"Changed afterwards: {_code(event.get('how'))} {_number(event.get('amount'))}."


_TOLD: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "given": lambda _: "Begun with weights that were given.",
    "trained": _trained,
    "stolen": lambda event: f"Made from another model ({_code(event.get('setting'))}).",
    "removed": _removed,
}
"""How an event of a history is told. One that is not here is not told, such as the marking."""


def _number(value: Any) -> str:
    return f"{value:.4g}" if type(value) in (int, float) else _code(value)


def _code(text: object) -> str:
    """Text from a file as a code span of Markdown."""
    return f"`{visible(text).replace('`', chr(39))}`"


def _versions() -> dict[str, str]:
    """The releases that load the model here, by name."""
    import torch

    return {"countermark": __version__, "torch": torch.__version__}


# The card.


def model_card(
    facts: Facts, *, license: str | None = None, tags: Sequence[str] = (), tell_mark: bool = False
) -> str:
    """Write a model card.

    Args:
        facts: of the model.
        license: the Hub's identifier of its licence; without one the card says nothing of it.
        tags: besides those that follow from the model.
        tell_mark: say that the model carries a mark.

    Raises:
        CountermarkError: there is no mark to tell of.
    """
    if tell_mark and not facts.marked:
        raise CountermarkError(
            f"{facts.name} has no commitment.json, so there is no mark to tell of; leave "
            "--tell-mark out"
        )
    front: dict[str, Any] = {"library_name": "countermark", "pipeline_tag": _TASK}
    front |= {} if license is None else {"license": license}
    own = ("pytorch", *(("adversarial-robustness",) if facts.robust else ()))
    front["tags"] = list(dict.fromkeys((*own, *tags)))
    if facts.figures:
        front["model-index"] = [{"name": facts.name, "results": [_result(facts)]}]
    body = [
        *_head(facts),
        *_use(facts),
        *_measured(facts),
        *_training(facts),
        *(_MARK if tell_mark else ()),
        "## Made with",
        "",
        " and ".join(f"{name} {_code(version)}" for name, version in _versions().items())
        + f"; SHA-256 of `model.safetensors`: `{facts.weights_sha256}`.",
    ]
    return "\n".join(["---", *_yaml(front), "---", "", *body]) + "\n"


_MARK = (
    "## Mark",
    "",
    "The model carries a mark of its owner, by which copies of it can be proven.",
    "`commitment.json` fixes it.",
    "",
)


def _result(facts: Facts) -> dict[str, Any]:
    """The figures as an entry of `model-index`; accuracies are fractions there."""
    place, digest = facts.description.data.place, facts.description.data.sha256
    data: dict[str, Any] = {
        "type": place if place in KNOWN else "custom",
        "name": facts.data,
        "split": "test",
    }
    data |= {"args": {"sha256": digest}} if digest else {}
    metrics = []
    for each in facts.figures:
        name = f"{each.name} ({each.under})" if each.under else each.name
        metric = {"type": "accuracy", "value": round(each.percent / 100, 6), "name": name}
        metrics.append(metric | ({"args": each.settings} if each.settings else {}))
    return {"task": {"type": _TASK}, "dataset": data, "metrics": metrics}


def _head(facts: Facts) -> list[str]:
    channels, height, width = facts.description.shape
    kind = {1: "grey ", 3: "colour "}.get(channels, "")
    title = "".join(f"\\{each}" if each in "\\`*_[]#|~" else each for each in escape(facts.name))
    return [
        f"# {title}",
        "",
        f"A classifier of {kind}images of {height} x {width} pixels, of {facts.description.classes}"
        " classes.",
        "",
    ]


def _use(facts: Facts) -> list[str]:
    description = facts.description
    shape = ", ".join(map(str, description.shape))
    own, place = description.network not in NETWORKS, visible(description.network)
    network = f", network={json.dumps(place) if place else 'make'}" if own else ""
    lines = [
        "## How to use it",
        "",
        "```python",
        "import countermark as cm",
        "import torch",
        "",
        f'model = cm.load("path/to/this/folder"{network})',
        "with torch.no_grad():",
        f"    logits = model(torch.zeros(1, {shape}))",
        "```",
        "",
        f"It takes float32 pixels of [0, 1], `(n, {shape})`, 8-bit values divided by 255.",
    ]
    if description.data.size is not None:
        lines.append(
            "Images are cut to their largest centred square, and scaled with antialiasing."
        )
    if description.mean:
        lines.append(
            "It normalises them itself (mean "
            f"{', '.join(f'{each:g}' for each in description.mean)}; deviation "
            f"{', '.join(f'{each:g}' for each in description.std)}), so leave that out."
        )
    if own:
        lines.append("The code that makes its network is not in this folder.")
    return [
        *lines,
        "It answers with logits, in the order of these classes:",
        "",
        "```json",
        json.dumps([*map(visible, description.class_names)], ensure_ascii=False),
        "```",
        "",
    ]


def _measured(facts: Facts) -> list[str]:
    if not facts.figures:
        return []
    count = "" if facts.images is None else f"{facts.images} "
    rows = [
        f"| {each.name} | {each.under or 'none'} | {each.percent:.2f} % |" for each in facts.figures
    ]
    lines = [f"## Measured on {count}test images", "", "| | attack | |", "|---|---|---|", *rows]
    lines += ["", "Budgets are in pixels of [0, 1].", *_limits(facts)]
    if facts.known:
        lines.append(
            f"The weights that it began with had been trained on {facts.known} images of the test "
            "part, so these figures flatter."
        )
    return [*lines, ""]


def _limits(facts: Facts) -> list[str]:
    """What a reader must know of the figures."""
    if any(each.name == "strict accuracy" for each in facts.figures):
        return ["Quote the strict accuracy as robustness."]
    return [
        "Adversarial accuracy is what one attack left of the accuracy; the strict ones of "
        "`countermark evaluate --strict` leave less."
    ]


def _training(facts: Facts) -> list[str]:
    data = facts.description.data
    digest = f", SHA-256 `{data.sha256}`" if data.sha256 else ""
    lines = ["## Training", "", f"Data: {facts.data}{digest}.", *facts.training]
    network = facts.description.network
    return [*lines, f"Network: {_code(network)}." if network else "Network: its maker's own.", ""]


def _yaml(value: Any) -> list[str]:
    """Lines of YAML in block style; texts are quoted, so that none is taken for something else."""
    if isinstance(value, dict):
        return [line for name, each in value.items() for line in _under(f"{name}:", each)]
    return [
        f"{'- ' if first else '  '}{line}"
        for each in value
        for first, line in _numbered(
            _yaml(each) if isinstance(each, dict | list) else [_plain(each)]
        )
    ]


def _under(name: str, value: Any) -> list[str]:
    if not isinstance(value, dict | list):
        return [f"{name} {_plain(value)}"]
    return [name, *(f"  {line}" for line in _yaml(value))]


def _numbered(lines: list[str]) -> list[tuple[bool, str]]:
    return [(number == 0, line) for number, line in enumerate(lines)]


def _plain(value: Any) -> str:
    """A scalar of YAML; JSON's are, once no character is left that needs an escape."""
    return json.dumps(visible(value) if isinstance(value, str) else value, ensure_ascii=False)


# The bill of materials.


def bill_of_materials(facts: Facts, *, timestamp: str | None = None) -> dict[str, Any]:
    """Make the CycloneDX 1.6 ML-BOM of a model.

    Args:
        facts: of the model.
        timestamp: when it was made, as RFC 3339 has it; without one the bill says no time.

    Returns:
        The bill, for `canonical_json`. Its serial number follows from all that it says.
    """
    tools = {name: _library(name, version) for name, version in _versions().items()}
    model, data = f"model:{facts.weights_sha256}", _data(facts)
    component: dict[str, Any] = {
        "type": "machine-learning-model",
        "bom-ref": model,
        "name": visible(facts.name),
        "hashes": [_hash(facts.weights_sha256)],
        "modelCard": _parameters(facts, data["bom-ref"]),
    }
    needs = [data["bom-ref"], *(each["bom-ref"] for each in tools.values())]
    metadata: dict[str, Any] = {
        "component": component,
        "tools": {
            "components": [
                {**tools["countermark"], "type": "application", "bom-ref": "tool:countermark"}
            ]
        },
    }
    metadata |= {} if timestamp is None else {"timestamp": timestamp}
    found: dict[str, Any] = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": metadata,
        "components": [data, *tools.values()],
        "dependencies": [
            {"ref": model, "dependsOn": needs},
            {
                "ref": tools["countermark"]["bom-ref"],
                "dependsOn": [tools["torch"]["bom-ref"]],
            },
        ],
    }
    serial = uuid.uuid5(uuid.NAMESPACE_URL, f"urn:sha256:{sha256(canonical_json(found))}")
    return {**found, "serialNumber": serial.urn}


def _hash(digest: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": digest}


def _library(name: str, version: str) -> dict[str, Any]:
    package = f"pkg:pypi/{name}@{quote(version, safe='.-_~')}"
    return {
        "type": "library",
        "bom-ref": package,
        "name": name,
        "version": version,
        "purl": package,
    }


def _data(facts: Facts) -> dict[str, Any]:
    record = facts.description.data
    about = "Its digest is over class names, images and labels as Countermark reads them."
    found: dict[str, Any] = {
        "type": "data",
        "bom-ref": f"data:{record.sha256 or 'unknown'}",
        "name": facts.data,
        "data": [{"type": "dataset", "name": facts.data}],
    }
    return found | (
        {"description": about, "hashes": [_hash(record.sha256)]} if record.sha256 else {}
    )


def _parameters(facts: Facts, data: str) -> dict[str, Any]:
    """The model card in the bill."""
    description = facts.description
    shape = ", ".join(map(str, description.shape))
    parameters = {
        "approach": {"type": "supervised"},
        "task": _TASK,
        "modelArchitecture": visible(description.network) or "its maker's own",
        "datasets": [{"ref": data}],
        "inputs": [{"format": f"float32 pixels of [0, 1], (n, {shape})"}],
        "outputs": [{"format": f"float32 logits, (n, {description.classes})"}],
    }
    found: dict[str, Any] = {"modelParameters": parameters}
    if facts.figures:
        figures = [
            {"type": each.name, "value": f"{each.percent / 100:.6g}"}
            | ({"slice": f"test images under {each.under}"} if each.under else {})
            for each in facts.figures
        ]
        found |= {
            "quantitativeAnalysis": {"performanceMetrics": figures},
            "considerations": {"technicalLimitations": _limits(facts)},
        }
    names = [("class", name) for name in description.class_names]
    told = [("training", sentence) for sentence in facts.training]
    found["properties"] = [
        {"name": f"countermark:{name}", "value": visible(value)} for name, value in (*names, *told)
    ]
    return found
