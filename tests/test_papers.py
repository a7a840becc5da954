"""The papers of a model: valid for whom they are, true to the folder, and silent about the mark."""

import ast
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from huggingface_hub import ModelCard

import countermark as cm
from countermark.cli import main
from countermark.files import canonical_json, file_sha256
from countermark.signing import check_folder, sign_folder

GOLDEN = Path(__file__).parent / "golden"
EVALUATION = {
    "images": 300,
    "test_accuracy": 98.0,
    "adversarial_accuracy": 80.0,
    "strict": {"strict_accuracy": 71.0, "broken": {"PGD": 54, "APGD-CE": 20, "Square": 7}},
    "epsilon": 0.05,
    "steps": 20,
    "step_size": 0.01,
    "restarts": 3,
    "watermark_accuracy": 100.0,
}


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A model folder that a release wrote, with its key."""
    return shutil.copytree(GOLDEN / "0.2.0" / "mine", tmp_path / "mine")


def changed(folder: Path, file: str, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads((folder / file).read_text())
    change(record)
    (folder / file).write_bytes(canonical_json(record))


def measured(folder: Path, **other: Any) -> Path:
    """What `evaluate --strict --json` prints of a folder."""
    path = folder.parent / "evaluation.json"
    digest = json.loads((folder / "model.json").read_text())["weights_sha256"]
    path.write_text(json.dumps({**EVALUATION, "weights_sha256": digest, **other}))
    return path


def valid(bom: Path) -> dict[str, Any]:
    """A bill that the official schema takes, and whose references lead somewhere."""
    wrong = JsonStrictValidator(SchemaVersion.V1_6).validate_str(bom.read_text())
    assert wrong is None, str(wrong)[:500]
    found: dict[str, Any] = json.loads(bom.read_text())
    model = found["metadata"]["component"]
    known = {each["bom-ref"] for each in (model, *found["components"])}
    for each in found["dependencies"]:
        assert {each["ref"], *each["dependsOn"]} <= known
    assert {each["ref"] for each in model["modelCard"]["modelParameters"]["datasets"]} <= known
    return found


@pytest.mark.parametrize("release", ["0.1.0", "0.2.0"])
def test_the_front_matter_is_what_the_hub_takes(release: str, tmp_path: Path) -> None:
    folder = GOLDEN / release / "mine"
    path = tmp_path / "card.md"
    made = cm.card(folder, out=path, license="apache-2.0", tags=("digits", "pytorch"))
    assert (made.path, made.sha256, made.figures) == (str(path), file_sha256(path), 2)
    data = ModelCard.load(path).data
    assert (data.license, data.library_name, data.pipeline_tag) == (
        "apache-2.0",
        "countermark",
        "image-classification",
    )
    assert data.tags == ["pytorch", "adversarial-robustness", "digits"]
    said = json.loads((folder / "metrics.json").read_text())
    clean, robust = data.eval_results
    assert (clean.metric_type, clean.dataset_type, clean.dataset_split) == (
        "accuracy",
        "digits",
        "test",
    )
    assert clean.metric_value == pytest.approx(said["test_accuracy"] / 100, abs=1e-6)
    assert robust.metric_value == pytest.approx(said["adversarial_accuracy"] / 100, abs=1e-6)
    assert {name: robust.metric_args[name] for name in ("attack", "norm", "epsilon", "steps")} == {
        "attack": "PGD",
        "norm": "L-inf",
        "epsilon": 0.1,
        "steps": 10,
    }


def test_a_licence_is_on_the_card_only_if_it_is_given(mine: Path) -> None:
    cm.card(mine)
    assert ModelCard.load(mine / "README.md").data.license is None
    with pytest.raises(cm.CountermarkError, match="--license takes an identifier"):
        cm.card(mine, license="Apache 2.0")


def test_the_code_on_the_card_runs(mine: Path) -> None:
    cm.card(mine)
    [code] = re.findall(r"```python\n(.*?)```", (mine / "README.md").read_text(), re.DOTALL)
    known: dict[str, Any] = {}
    exec(compile(ast.parse(code.replace("path/to/this/folder", str(mine))), "card", "exec"), known)
    assert known["logits"].shape == (1, 10)


def test_papers_are_those_of_the_same_model_without_a_mark(mine: Path, tmp_path: Path) -> None:
    """So nothing in them can depend on the mark; a card tells of one only if it is asked to."""
    bare = tmp_path / "bare" / "mine"
    shutil.copytree(mine, bare, ignore=shutil.ignore_patterns("key", "commitment.json", "config.*"))

    def forget(record: dict[str, Any]) -> None:
        record["history"] = [each for each in record["history"] if each["event"] != "marked"]
        record |= {"seed": 7, "pools": {"known": None, "sizes": None}}
        record["threat"]["watermark_epsilon"] = 0.9

    kept = ("test_accuracy", "adversarial_accuracy", "epsilon")
    figures = json.loads((mine / "metrics.json").read_text())
    changed(bare, "model.json", forget)
    (bare / "metrics.json").write_bytes(canonical_json({name: figures[name] for name in kept}))
    for folder in (mine, bare):
        cm.card(folder)
        cm.bom(folder)
    for name in ("README.md", "bom.json"):
        assert (mine / name).read_bytes() == (bare / name).read_bytes()
        text = (mine / name).read_text()
        assert not re.search(r"\b(mark\w*|watermark\w*|coins?|trials?|keys?|seeds?|pools?)\b", text)
    told = tmp_path / "told.md"
    cm.card(mine, out=told, tell_mark=True)
    silent = (mine / "README.md").read_text().splitlines()
    more = [line for line in told.read_text().splitlines() if line not in silent]
    assert more[0] == "## Mark"
    assert len(more) == 3
    with pytest.raises(cm.CountermarkError, match="no mark to tell of"):
        cm.card(bare, out=tmp_path / "no.md", tell_mark=True)
    assert not (tmp_path / "no.md").exists()


def test_names_from_outside_stay_text(mine: Path) -> None:
    names = ["a: [b", "`c`\n```", '"d"\u202e', "# <script>", "😀", "\udcff", "|", "no", "~", "\x85"]
    folder = mine.rename(mine.with_name("- x: *y* <b>\u2028\U0001f600"))
    changed(folder, "model.json", lambda record: record.update(class_names=names))
    changed(folder, "model.json", lambda record: record["data"].update(place="/home/anna/secret"))
    cm.card(folder, tags=("no: 'x'", "null"))
    text = (folder / "README.md").read_text()
    assert "anna" not in text
    assert ModelCard(text).data.tags[-2:] == ["no: 'x'", "null"]
    assert ModelCard(text).data.model_name == "- x: *y* <b>\\u2028😀"
    assert "# - x: \\*y\\* &lt;b&gt;" in text
    [said] = re.findall(r"```json\n(.*)\n```\n", text)
    assert json.loads(said)[:3] == ["a: [b", "`c`\\n```", '"d"\\u202e']
    assert len(json.loads(said)) == len(names)
    cm.bom(folder)
    assert valid(folder / "bom.json")["components"][0]["name"] == "a data set of its maker's own"
    assert "anna" not in (folder / "bom.json").read_text()


def test_a_network_of_the_users_own_and_its_normaliser_are_said(mine: Path) -> None:
    network = {"place": "shop.models:make", "mean": [0.5], "std": [0.25]}
    changed(mine, "model.json", lambda record: record.update(network=network))
    changed(mine, "model.json", lambda record: record["data"].update(size=8))
    cm.card(mine)
    text = (mine / "README.md").read_text()
    assert 'cm.load("path/to/this/folder", network="shop.models:make")' in text
    assert "(mean 0.5; deviation 0.25)" in text
    assert "largest centred square" in text


def test_the_bill_is_valid_and_the_same_every_time(mine: Path, tmp_path: Path) -> None:
    made = cm.bom(mine)
    again = cm.bom(mine, out=tmp_path / "again.json")
    assert made.path == str(mine / "bom.json")
    assert (mine / "bom.json").read_bytes() == (tmp_path / "again.json").read_bytes()
    assert made.sha256 == again.sha256 == file_sha256(mine / "bom.json")
    found = valid(mine / "bom.json")
    model = found["metadata"]["component"]
    assert model["type"] == "machine-learning-model"
    assert model["hashes"] == [
        {"alg": "SHA-256", "content": file_sha256(mine / "model.safetensors")}
    ]
    data, *libraries = found["components"]
    declared = json.loads((mine / "model.json").read_text())["data"]["sha256"]
    assert data["hashes"] == [{"alg": "SHA-256", "content": declared}]
    assert {each["name"]: each["version"] for each in libraries} == {
        "countermark": cm.__version__,
        "torch": torch.__version__,
    }
    assert "timestamp" not in found["metadata"]
    cm.bom(mine, out=tmp_path / "timed.json", time=True)
    timed = valid(tmp_path / "timed.json")
    assert timed["metadata"]["timestamp"]
    assert timed["serialNumber"] != found["serialNumber"]


def test_data_and_figures_that_nobody_knows_are_left_out(mine: Path) -> None:
    (mine / "metrics.json").unlink()
    changed(mine, "model.json", lambda record: record["data"].update(sha256=None))
    assert cm.bom(mine).figures == cm.card(mine).figures == 0
    found = valid(mine / "bom.json")
    assert "hashes" not in found["components"][0]
    assert "quantitativeAnalysis" not in found["metadata"]["component"]["modelCard"]
    assert ModelCard.load(mine / "README.md").data.eval_results is None


def test_an_evaluation_brings_the_strict_accuracy(mine: Path) -> None:
    evaluation = measured(mine)
    assert cm.card(mine, evaluation=evaluation).figures == 3
    strict = ModelCard.load(mine / "README.md").data.eval_results[2]
    assert (strict.metric_value, strict.metric_args["attack"], strict.metric_args["epsilon"]) == (
        0.71,
        "PGD, APGD-CE, Square",
        0.05,
    )
    text = (mine / "README.md").read_text()
    assert "## Measured on 300 test images" in text
    assert (
        "| strict accuracy | worst case of PGD, APGD-CE, Square within 0.05, L-inf | 71.00 % |"
        in (text)
    )
    assert "Quote the strict accuracy" in text
    cm.bom(mine, evaluation=evaluation)
    card = valid(mine / "bom.json")["metadata"]["component"]["modelCard"]
    assert [each["value"] for each in card["quantitativeAnalysis"]["performanceMetrics"]] == [
        "0.98",
        "0.8",
        "0.71",
    ]


def test_figures_that_flatter_say_so(mine: Path) -> None:
    changed(mine, "metrics.json", lambda record: record.update(known={"test": 12}))
    cm.card(mine)
    assert (
        "trained on 12 images of the test part, so these figures flatter"
        in (mine / "README.md").read_text()
    )


def test_a_signature_covers_the_papers(mine: Path, tmp_path: Path) -> None:
    pytest.importorskip("model_signing")
    private, public = tmp_path / "k.pem", tmp_path / "k.pub"
    for command in (
        ["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private],
        ["ec", "-in", private, "-pubout", "-out", public],
    ):
        subprocess.run(["openssl", *map(str, command)], check=True, capture_output=True)
    cm.card(mine)
    cm.bom(mine)
    sign_folder(mine, private)
    check_folder(mine, public)
    for name in ("README.md", "bom.json"):
        before = (mine / name).read_bytes()
        (mine / name).write_bytes(before + b"\n")
        with pytest.raises(cm.CountermarkError):
            check_folder(mine, public)
        (mine / name).write_bytes(before)
    check_folder(mine, public)


@pytest.mark.parametrize("verb", [cm.card, cm.bom])
def test_papers_that_would_be_wrong_are_not_written(verb: Callable[..., Any], mine: Path) -> None:
    out = mine.parent / "paper"

    def refused(words: str, **options: Any) -> None:
        with pytest.raises(cm.CountermarkError, match=words):
            verb(mine, out=out, **options)
        assert not out.exists()

    refused("measured on other weights", evaluation=measured(mine, weights_sha256="ab" * 32))
    refused("a usable figure", evaluation=measured(mine, test_accuracy="high"))
    refused("a usable figure", evaluation=measured(mine, strict={}))
    (mine.parent / "words").write_text("98 %")
    refused("is not JSON", evaluation=mine.parent / "words")
    (mine.parent / "words").write_text('{"test_accuracy": 98}')
    refused("which weights were measured", evaluation=mine.parent / "words")
    changed(mine, "metrics.json", lambda record: record.update(weights_sha256="ab" * 32))
    refused(r"metrics\.json was measured on other weights")
    changed(mine, "metrics.json", lambda record: record.update(adversarial_accuracy=180))
    refused(r"metrics\.json lacks a usable figure")
    with (mine / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    refused("is not the file that model.json describes")
    out.write_text("edited by hand")
    with pytest.raises(cm.CountermarkError, match="is there already"):
        verb(mine, out=out)
    assert out.read_text() == "edited by hand"


def test_the_command_line_says_what_was_written(
    mine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(mine.parent)
    assert main(["card", "mine", "--license", "mit"]) == 0
    assert main(["bom", "mine"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "wrote mine/README.md: a model card, 2 figures",
        "wrote mine/bom.json: CycloneDX 1.6, 2 figures",
    ]
    assert main(["card", "mine"]) == 2
    assert "is there already" in capsys.readouterr().err
