"""The command line as a user meets it: JSON, exit statuses, one-line errors, no partial output."""

import ast
import dataclasses
import importlib
import inspect
import json
import os
import re
import resource
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

import countermark
from countermark import choices, cli, html, options, terminal
from countermark.attacks.strict import STAGES
from countermark.data import KNOWN, open_data
from countermark.networks import load, load_model, save_model
from countermark.networks.named import NETWORKS
from countermark.study.grid import PROFILES
from countermark.text import visible
from countermark.thieves import REMOVALS, THEFTS
from countermark.threat import GREY
from countermark.training import loop, recipe, traits
from countermark.verbs import plan
from countermark.verbs.protect import ProtectConfig
from countermark.watermarks import SCHEMES, load_key
from countermark.watermarks import key as key_module
from shorter import mark_shortly, take_any_mark, wait_for_epoch
from warm import COLD, warm

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def ask(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    status, out, _ = run(capsys, *arguments, "--json")
    assert out.count("\n") == 1
    return status, json.loads(out)


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert out == ""
    line = err.rstrip("\n").split("\n")[-1]
    assert line.startswith("countermark: ")
    assert "Traceback" not in err
    return line


def test_protect_writes_what_it_promises(owner: Path) -> None:
    assert {path.name for path in owner.iterdir()} == {
        "model.safetensors",
        "model.json",
        "key",
        "commitment.json",
        "metrics.json",
        "config.json",
    }
    assert stat.S_IMODE((owner / "key").stat().st_mode) == 0o700
    assert {
        stat.S_IMODE(path.stat().st_mode) for path in (owner / "key").rglob("*") if path.is_file()
    } == {0o600}
    assert {
        stat.S_IMODE(path.stat().st_mode) for path in (owner / "key").rglob("*") if path.is_dir()
    } == {0o700}
    metrics = json.loads((owner / "metrics.json").read_text())
    assert metrics["watermark_accuracy"] > 90
    assert metrics["test_accuracy"] > 90
    assert metrics["adversarial_accuracy"] > 60
    assert (
        metrics["unmarked_watermark_accuracy"] < 75
    )  # coins of 160 trials: as many agree once in 10^10 times
    assert not list(owner.parent.glob("*.partial"))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Shorten the second training on digits, the one with the watermarks.

    There is no option for its number of epochs.
    """

    return lambda epochs: mark_shortly(monkeypatch, epochs)


def test_strong_takes_its_own_network_and_keeps_the_mark(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    short: Callable[..., None],
) -> None:
    """The averaged weights are what is saved, and they still know the coins."""
    out = tmp_path / "strong"
    short(40)
    take_any_mark(monkeypatch)  # half as many epochs as the recipe has
    status, made = ask(
        capsys, "protect", "--data", "digits", "--out", out, "--objective", "strong", "--epochs", 20
    )
    assert status == 0
    assert made["watermark_accuracy"] > 80
    assert made["test_accuracy"] > 90
    assert made["adversarial_accuracy"] > 60
    description = json.loads((out / "model.json").read_text())
    assert description["network"]["place"] == "wide"
    assert all(event["config"]["average"] > 0 for event in description["history"])
    assert (
        ask(capsys, "verify", "--suspect", out, "--key", out / "key")[1]["test"]["verdict"]
        == "match"
    )


def test_verdicts_and_exit_statuses(
    owner: Path, stranger: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found = ask(capsys, "verify", "--suspect", owner, "--key", owner / "key")
    assert (status, found["test"]["verdict"]) == (0, "match")
    assert (
        found["test"]["agreements"] + found["test"]["disagreements"] + found["test"]["neither"]
        == found["test"]["trials"]
        == 160
    )
    assert found["test"]["log10_smallest_p_value"] == pytest.approx(-160 * np.log10(2))
    assert found["test"]["log10_p_value"] == pytest.approx(np.log10(found["test"]["p_value"]))
    for innocent in (stranger, owner / "key" / "source"):
        status, found = ask(capsys, "verify", "--suspect", innocent, "--key", owner / "key")
        assert (status, found["test"]["verdict"]) == (1, "no evidence")
        assert 1e-6 < found["test"]["p_value"] < 1


def test_a_suspect_that_gives_neither_answer_is_inconclusive(
    owner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("ReduceMin", ["f"], ["m"], axes=[1], keepdims=0),
        helper.make_node("Cast", ["m"], ["i"], to=TensorProto.INT64),
        helper.make_node("Add", ["i", "c"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "nine",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, None)],
        [numpy_helper.from_array(np.array(77), "c")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(tmp_path / "nine.onnx"))
    status, found = ask(
        capsys, "verify", "--suspect", tmp_path / "nine.onnx", "--key", owner / "key"
    )
    assert (
        status,
        found["test"]["verdict"],
        found["test"]["neither"],
        found["test"]["p_value"],
    ) == (3, "inconclusive", 160, 1.0)


def test_evaluate_measures_what_protect_measured(
    owner: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = json.loads((owner / "metrics.json").read_text())
    status, found = ask(capsys, "evaluate", "--model", owner)
    assert status == 0
    for name in ("test_accuracy", "adversarial_accuracy", "watermark_accuracy"):
        assert found[name] == metrics[name]
    assert found["seconds"] > 0
    _, weak = ask(capsys, "evaluate", "--model", owner, "--epsilon", "0.02", "--steps", "3")
    assert weak["adversarial_accuracy"] > found["adversarial_accuracy"]


def test_evaluate_strictly(owner: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = ask(capsys, "evaluate", "--model", owner, "--strict", "--images", "20")
    judged: dict[str, Any] = found["strict"]  # type: ignore[assignment]
    assert (status, found["images"], judged["images"]) == (0, 20, 20)
    assert judged["strict_accuracy"] <= judged["adversarial_accuracy"] <= judged["test_accuracy"]
    assert found["gap"] == judged["adversarial_accuracy"] - judged["strict_accuracy"]
    assert set(judged["broken"]) == set(STAGES[1:])
    broken = judged["test_accuracy"] - judged["strict_accuracy"]
    assert sum(judged["broken"].values()) == pytest.approx(broken * 20 / 100)
    status, printed, _ = run(capsys, "evaluate", "--model", owner, "--strict", "--images", "20")
    assert status == 0
    assert f"strict accuracy {judged['strict_accuracy']:.2f} % of 20 images" in printed
    assert ("gradient masking" in printed) is found["gradient_masking"]
    assert "0" in fails(capsys, "evaluate", "--model", owner, "--images", "0")


def test_theft_and_removal(owner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, white = ask(
        capsys, "steal", "--victim", owner, "--setting", "white", "--out", tmp_path / "white"
    )
    assert white["folder"] == str(tmp_path / "white")
    assert (tmp_path / "white" / "model.safetensors").read_bytes() == (
        owner / "model.safetensors"
    ).read_bytes()
    assert not (tmp_path / "white" / "key").exists()
    ask(
        capsys,
        "remove",
        "--model",
        tmp_path / "white",
        "--prune",
        0.5,
        "--out",
        tmp_path / "pruned",
    )
    weight = load(tmp_path / "pruned")[0].weight
    assert float((weight == 0).double().mean()) == 0.5
    assert ask(capsys, "verify", "--suspect", tmp_path / "pruned", "--key", owner / "key")[0] == 0
    _, tuned = ask(
        capsys,
        "remove",
        "--model",
        tmp_path / "pruned",
        "--finetune",
        3,
        "--out",
        tmp_path / "tuned",
    )
    assert tuned["test_accuracy"] > 80
    assert ask(capsys, "verify", "--suspect", tmp_path / "tuned", "--key", owner / "key")[0] == 0
    history = json.loads((tmp_path / "tuned" / "model.json").read_text())["history"]
    assert [event["event"] for event in history] == [
        "trained",
        "marked",
        "stolen",
        "removed",
        "removed",
    ]
    assert [event.get("how") for event in history[3:]] == ["prune", "finetune"]
    assert history[4]["learning_rate"] == 0.005


def test_removals_in_a_row_and_a_cleaner_are_one_command(
    owner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One command with two removals makes the same copy as two commands.

    A copy behind a cleaner can be loaded, verified and put behind another cleaner.
    """
    both = ["--finetune", 2, "--learning-rate", 0.01, "--prune", 0.5]
    ask(capsys, "remove", owner, *both, "--out", tmp_path / "both")
    ask(capsys, "remove", owner, "--prune", 0.5, "--out", tmp_path / "one")
    ask(
        capsys,
        "remove",
        tmp_path / "one",
        "--finetune",
        2,
        "--learning-rate",
        0.01,
        "--out",
        tmp_path / "two",
    )
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("both", "two")]
    assert weights[0] == weights[1]
    ask(capsys, "remove", owner, "--median", 3, "--out", tmp_path / "behind")
    ask(capsys, "remove", tmp_path / "behind", "--levels", 4, "--out", tmp_path / "twice")
    assert json.loads((tmp_path / "twice" / "model.json").read_text())["cleaners"] == [
        ["median", 3.0],
        ["levels", 4.0],
    ]
    assert ask(capsys, "verify", tmp_path / "twice", "--key", owner / "key")[0] in (0, 1)
    x = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        model = load(tmp_path / "twice")
        assert torch.equal(model(x), load(owner)(model[1][0](model[0](x))))


def test_black_box_theft_sees_labels_only(
    owner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, stolen = ask(
        capsys,
        "steal",
        "--victim",
        owner,
        "--setting",
        "black",
        "--queries",
        1000,
        "--out",
        tmp_path / "black",
    )
    assert status == 0
    assert stolen["test_accuracy"] > 50
    description = json.loads((tmp_path / "black" / "model.json").read_text())
    assert description["network"]["place"] == "surrogate"
    assert description["history"][-1]["queries"] == 1000
    assert ask(capsys, "verify", "--suspect", tmp_path / "black", "--key", owner / "key")[0] == 1


def test_grey_box_theft_takes_the_owners_network_and_trains_adversarially(
    owner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _ = ask(
        capsys,
        "steal",
        "--victim",
        owner,
        "--setting",
        "grey",
        "--queries",
        400,
        "--out",
        tmp_path / "grey",
    )
    assert status == 0
    description = json.loads((tmp_path / "grey" / "model.json").read_text())
    assert description["network"]["place"] == "small"
    assert description["history"][-1]["options"] == {
        "queries": 400,
        "epochs": 10,
        "batch_size": 32,
        "learning_rate": 0.005,
    }


@pytest.mark.parametrize(
    "options",
    [
        ["--scheme", "ood", "--epochs", 4],
        [
            "--scheme",
            "adversarial",
            "--watermark-step-size",
            "0.01",
            "--labels",
            "source",
            "--epochs",
            4,
        ],
        ["--scheme", "ood", "--embedding", "epoch", "--objective", "standard", "--epochs", 20],
    ],
)
def test_published_schemes(
    options: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "published"
    _, made = ask(capsys, "protect", "--data", "digits", "--out", out, *options)
    assert made["trials"] == 100
    status, found = ask(capsys, "verify", "--suspect", out, "--key", out / "key")
    assert (status, found["test"]["verdict"], found["test"]["p_value"]) == (3, "inconclusive", None)
    assert found["watermark_accuracy"] == made["watermark_accuracy"]
    assert found["published_rule"] == ("copy" if found["watermark_accuracy"] >= 50 else "no copy")


def test_tables_are_printed_without_json(owner: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "verify", "--suspect", owner, "--key", owner / "key")
    assert status == 0
    assert "match" in out
    assert "smallest possible" in out
    assert run(capsys, "plan", "--p", "1e-9")[1].startswith("69 trials")


BAD = {
    "unknown data": ["protect", "--data", "cifar", "--out", "{new}"],
    "unknown network": ["protect", "--data", "digits", "--network", "resnot", "--out", "{new}"],
    "unknown scheme": ["protect", "--data", "digits", "--scheme", "magic", "--out", "{new}"],
    "unknown objective": ["protect", "--data", "digits", "--objective", "magic", "--out", "{new}"],
    "unknown embedding": ["protect", "--data", "digits", "--embedding", "magic", "--out", "{new}"],
    "unknown labels": ["protect", "--data", "digits", "--labels", "magic", "--out", "{new}"],
    "unknown precision": ["protect", "--data", "digits", "--precision", "fp4", "--out", "{new}"],
    "unknown device": ["protect", "--data", "digits", "--device", "abacus", "--out", "{new}"],
    "budget 0": ["protect", "--data", "digits", "--epsilon", "0", "--out", "{new}"],
    "budget 1": ["protect", "--data", "digits", "--epsilon", "1", "--out", "{new}"],
    "budget 8 of 255": ["protect", "--data", "digits", "--epsilon", "8", "--out", "{new}"],
    "budget nan": ["protect", "--data", "digits", "--epsilon", "nan", "--out", "{new}"],
    "watermark below training": [
        "protect",
        "--data",
        "digits",
        "--watermark-epsilon",
        "0.05",
        "--out",
        "{new}",
    ],
    "no epochs": ["protect", "--data", "digits", "--epochs", "0", "--out", "{new}"],
    "negative seed": ["protect", "--data", "digits", "--seed", "-1", "--out", "{new}"],
    "non-empty folder": ["protect", "--data", "digits", "--out", "{full}"],
    "folder is a file": ["protect", "--data", "digits", "--out", "{file}"],
    "folder cannot be made": ["protect", "--data", "digits", "--out", "{file}/below"],
    "no model": ["evaluate", "--model", "{empty}"],
    "model is a file": ["evaluate", "--model", "{file}"],
    "no key": ["verify", "--suspect", "{owner}", "--key", "{empty}"],
    "no suspect": ["verify", "--suspect", "{new}", "--key", "{owner}/key"],
    "pt2 suspect": ["verify", "--suspect", "{pt2}", "--key", "{owner}/key"],
    "alpha": ["verify", "--suspect", "{owner}", "--key", "{owner}/key", "--alpha", "2"],
    "unknown setting": ["steal", "--victim", "{owner}", "--setting", "clear", "--out", "{new}"],
    "no victim": ["steal", "--victim", "{empty}", "--setting", "white", "--out", "{new}"],
    "no queries": [
        "steal",
        "--victim",
        "{owner}",
        "--setting",
        "black",
        "--queries",
        "0",
        "--out",
        "{new}",
    ],
    "queries of a thief who asks nothing": [
        "steal",
        "{owner}",
        "--setting",
        "white",
        "--queries",
        "5",
        "--out",
        "{new}",
    ],
    "a rate without fine-tuning": [
        "remove",
        "{owner}",
        "--prune",
        "0.5",
        "--learning-rate",
        "0.1",
        "--out",
        "{new}",
    ],
    "epochs without a denoiser": [
        "remove",
        "{owner}",
        "--finetune",
        "2",
        "--epochs",
        "2",
        "--out",
        "{new}",
    ],
    "an even window": ["remove", "{owner}", "--median", "4", "--out", "{new}"],
    "a broken number": ["remove", "{owner}", "--levels", "3.5", "--out", "{new}"],
    "no number": ["remove", "{owner}", "--noise", "nan", "--out", "{new}"],
    "neither removal": ["remove", "--model", "{owner}", "--out", "{new}"],
    "prune all": ["remove", "--model", "{owner}", "--prune", "1", "--out", "{new}"],
    "removal into a full folder": [
        "remove",
        "--model",
        "{owner}",
        "--prune",
        "0.5",
        "--out",
        "{full}",
    ],
    "fetch unknown": ["data", "fetch", "cifar"],
    "fetch nothing": ["data", "fetch"],
    "data what": ["data", "drop", "mnist"],
    "fetch from an empty folder": [
        "data",
        "fetch",
        "mnist",
        "--source",
        "{empty}",
        "--cache",
        "{new}",
    ],
    "plan": ["plan", "--agreement", "0.5"],
    "no verb": [],
    "unknown verb": ["destroy"],
    "unknown option": ["verify", "--suspekt", "x", "--key", "y"],
    "missing option": ["verify", "--suspect", "x"],
    "not a number": ["protect", "--data", "digits", "--epsilon", "much", "--out", "{new}"],
    "quickstart in a folder of something else": [
        "quickstart",
        "--data",
        "digits",
        "--out",
        "{full}",
    ],
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(
    name: str, owner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("keep")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("keep")
    (tmp_path / "model.pt2").write_bytes(b"PK")
    places = {place: tmp_path / place for place in ("full", "empty", "file", "new")} | {
        "owner": owner,
        "pt2": tmp_path / "model.pt2",
    }
    before = sorted(tmp_path.rglob("*"))
    line = fails(capsys, *(argument.format(**places) for argument in BAD[name]))
    assert len(line) > 30
    left = [
        path
        for path in sorted(tmp_path.rglob("*"))
        if path not in before and path.name not in ("mnist", "new")
    ]
    assert left == []
    assert (tmp_path / "full" / "precious").read_text() == "keep"


def test_nan_weights_of_a_suspect(
    owner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, description = load_model(owner)
    model[0].weight.data[0] = float("nan")
    save_model(tmp_path, model, description)
    assert "finite" in fails(capsys, "verify", "--suspect", tmp_path, "--key", owner / "key")


def test_a_key_of_another_data_set(
    owner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from countermark.networks.named import build
    from described import described

    save_model(
        tmp_path,
        build("small", (1, 28, 28), 10, seed=0),
        described("small", (1, 28, 28), 10, "mnist", 0.25, 0),
    )
    assert "shape" in fails(capsys, "verify", "--suspect", tmp_path, "--key", owner / "key")
    assert "shape" in fails(capsys, "evaluate", "--model", tmp_path, "--key", owner / "key")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    assert "cannot create" in fails(
        capsys, "protect", "--data", "digits", "--out", tmp_path / "new"
    )


def test_a_full_disk_is_an_error_and_the_command_can_be_run_again(
    owner: Path, tmp_path: Path
) -> None:
    """A limit on file size stands in for a full disk.

    Writing fails in the middle of the weights.
    """

    def small_disk() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    line = ["remove", "--model", str(owner), "--prune", "0.5", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [*COLD, *line], capture_output=True, text=True, preexec_fn=small_disk, env=ENVIRONMENT
    )
    assert done.returncode == 2, done.stderr
    assert "cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
    assert subprocess.run([*warm(), *line], capture_output=True, env=ENVIRONMENT).returncode == 0


def test_interruption_is_clean_and_resumes_to_the_same_result(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    short: Callable[..., None],
) -> None:
    """Interrupt the training of the source model and of the marked model with Ctrl-C.

    The interrupts come at the ends of epochs. With the same secret, the result is the same as that
    of an undisturbed run.
    """
    short(8)
    monkeypatch.setattr(key_module.secrets, "token_bytes", lambda count: b"k" * count)
    monkeypatch.setattr(
        loop, "_measured", lambda *_networks: 50.0
    )  # no epoch is redone, and the count is exact
    take_any_mark(monkeypatch)  # nor does it matter how much of the mark so few epochs leave
    arguments = ["protect", "--data", "digits", "--epochs", 3, "--json"]
    assert run(capsys, *arguments, "--out", tmp_path / "undisturbed")[0] == 0
    end_epoch, left = loop._end_epoch, [0]

    def tiring(*a: object) -> object:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return end_epoch(*a)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "_end_epoch", tiring)
    statuses = []
    while not statuses or statuses[-1] != 0:
        left[0] = 4
        status, out, err = run(capsys, *arguments, "--out", tmp_path / "resumed")
        statuses.append(status)
        if status:
            assert out == ""
            assert "again to continue" in err
            assert not (tmp_path / "resumed").exists()
            assert (tmp_path / "resumed.partial").is_dir()
    assert statuses == [130, 130, 0]  # 3 epochs of the source model, 8 of marking
    first, second = tmp_path / "undisturbed", tmp_path / "resumed"
    for path in sorted(first.rglob("*")):
        if path.is_file() and path.name != "metrics.json":
            assert path.read_bytes() == (second / path.relative_to(first)).read_bytes(), path.name
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (first, second))
    times = {"seconds": 0, "marking_seconds": 0, "folder": ""}
    assert {**ours, **times} == {**theirs, **times}


def test_killed_at_any_moment_and_resumed(tmp_path: Path) -> None:
    """SIGKILL while it trains, several times; the finished folder is that of an undisturbed run."""
    base = [*warm(), "protect", "--data", "digits", "--scheme", "none", "--epochs", "10", "--out"]
    subprocess.run(
        [*base, str(tmp_path / "whole")], check=True, capture_output=True, env=ENVIRONMENT
    )
    command = [*base, str(tmp_path / "killed")]
    for epoch in (1, 3, 6):
        child = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT
        )
        wait_for_epoch(epoch, tmp_path / "killed.partial", child)
        child.kill()
        child.communicate()
        if (tmp_path / "killed").exists():  # it was quicker than the signal
            break
    else:
        subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT)
    for name in ("model.safetensors", "model.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_unfinished_work_of_other_options_is_not_mixed_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "config.json").write_text("{}\n")
    (tmp_path / "new.partial" / "checkpoint-source.safetensors").write_text("work")
    assert "other options" in fails(
        capsys, "protect", "--data", "digits", "--out", tmp_path / "new"
    )
    assert (tmp_path / "new.partial" / "checkpoint-source.safetensors").exists()


@pytest.mark.parametrize("place", ["dangling", "loop", "up", "root", "mount"])
def test_places_that_cannot_become_a_folder_are_refused_before_the_work(
    place: str, owner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to("/proc/nowhere/at/all")
    places = {"up": owner / "key" / "..", "root": Path("/"), "mount": Path("/dev/shm")}
    fails(
        capsys,
        "remove",
        "--model",
        owner,
        "--prune",
        "0.5",
        "--out",
        places.get(place, tmp_path / place),
    )


def test_a_link_to_an_empty_folder_is_followed(
    owner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert (
        ask(capsys, "remove", "--model", owner, "--prune", "0.5", "--out", tmp_path / "link")[0]
        == 0
    )
    assert (tmp_path / "real" / "model.json").exists()


def test_torn_files_of_a_killed_run_do_not_end_up_in_the_result(
    owner: Path, tmp_path: Path
) -> None:
    from countermark.files import new_folder

    partial = tmp_path / "new.partial"
    (partial / "key").mkdir(parents=True)
    (partial / "key" / ".torn-secret.abc").write_text("half")
    (partial / "checkpoint-x").write_text("whole")
    with new_folder(tmp_path / "new", {}):
        pass
    assert [path.name for path in sorted((tmp_path / "new").rglob("*"))] == ["config.json", "key"]


def test_a_large_limit_costs_no_memory(tmp_path: Path) -> None:
    from countermark.files import read_bytes

    (tmp_path / "file").write_bytes(b"abc")
    assert read_bytes(tmp_path / "file", 1 << 50) == b"abc"


def test_a_suspects_words_cannot_steer_the_terminal(
    owner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from onnx import TensorProto, helper

    graph = helper.make_graph(
        [helper.make_node("\x1b[2J\x07Run", ["x"], ["y"], domain="evil\x1b")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    (tmp_path / "x.onnx").write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString()
    )
    assert fails(
        capsys, "verify", "--suspect", tmp_path / "x.onnx", "--key", owner / "key"
    ).isprintable()


HOSTILE = "a\x1b[2J\x07\nholds  The test \u202edleht\u2066\u200b[red]:smile: \ud800\x9b\u2028"
"""Clears a terminal, forges a line, reorders it, colours it, and cannot be encoded."""


def test_what_is_shown_is_printable_and_says_what_was_there() -> None:
    assert (
        visible("a picture.onnx: 98.8 % \u00fc \u6a21 [red]")
        == "a picture.onnx: 98.8 % \u00fc \u6a21 [red]"
    )
    assert visible("\x1b[2J\n\u202e\ud800\x7f") == r"\x1b[2J\n\u202e\ud800\x7f"
    assert visible(HOSTILE).isprintable()
    assert visible(visible(HOSTILE)) == visible(HOSTILE)


@pytest.mark.parametrize("way", ["lines", "table", "note", "bar", "error"])
def test_no_foreign_word_steers_a_terminal(
    way: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a real terminal too, where rich would colour, replace and wrap."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "300")
    if way == "lines":
        terminal.print_lines(HOSTILE)
    elif way == "table":
        terminal.print_table(HOSTILE, ["", "a"], [[HOSTILE, HOSTILE]])
    elif way == "note":
        terminal.note(HOSTILE)
    elif way == "bar":
        with terminal.bar(HOSTILE, 2) as running:
            running.text(HOSTILE)
            running.note(HOSTILE)
    else:
        cli._fail(HOSTILE)
    said = "".join(capsys.readouterr())
    ours = re.sub(
        r"\x1b\[[0-9;?]*[a-zA-Z]", "", said.replace("\x1b[2J", "CLEARED")
    )  # the style of a title, the bar
    words = " ".join(HOSTILE.split()) if way == "error" else HOSTILE  # an error is one line
    assert visible(words) in ours
    assert "CLEARED" not in ours
    assert "".join(ours.split()).isprintable()


def test_nothing_on_a_page_is_html_or_reorders_it() -> None:
    assert html.escape(f"<b>{HOSTILE}") == f"&lt;b&gt;{visible(HOSTILE)}"


class _Panic(BaseException):
    """Like the panic of a library in Rust, which is no `Exception`."""


def _raising(error: BaseException) -> Any:
    def raises(*_arguments: object) -> None:
        raise error

    return raises


@pytest.mark.parametrize(
    "error",
    [
        SystemExit(0),
        SystemExit(1),
        SystemExit(3),
        SystemExit("x"),
        _Panic("x\n\x1b"),
        RecursionError(),
    ],
)
@pytest.mark.parametrize("where", ["the verb", "showing", "JSON", "the status"])
@pytest.mark.parametrize("traceback", [False, True])
def test_nothing_but_a_verdict_ends_with_the_status_of_one(
    error: BaseException,
    where: str,
    traceback: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if traceback:
        monkeypatch.setenv("COUNTERMARK_TRACEBACK", "1")
    if where == "the verb":
        monkeypatch.setattr(plan, "trials_needed", _raising(error))
    elif where == "showing":
        monkeypatch.setattr(plan, "show", _raising(error))
    elif where == "JSON":
        monkeypatch.setattr(terminal, "print_json", _raising(error))
    else:
        monkeypatch.setattr(plan.Plan, "exit_status", property(_raising(error)), raising=False)
    status, _, err = run(capsys, "plan", "--p", "1e-9", *(["--json"] if where == "JSON" else []))
    assert status == 2
    assert err.rstrip("\n").split("\n")[-1].startswith("countermark: ")
    assert "\x1b" not in err
    if not traceback:
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    "part", ["countermark.cli", "countermark.options", "tyro", "countermark.verbs.plan", "rich"]
)
def test_an_installation_that_cannot_be_imported_is_an_error(part: str) -> None:
    """Python itself would end with 1, which means "no evidence" or "dismissed"."""
    code = (
        f"import runpy, sys; sys.modules[{part!r}] = None; "
        "sys.argv = ['countermark', 'plan', '--p', '1e-9']; "
    )
    code += "runpy.run_module('countermark', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("countermark: ")
    assert done.stderr.count("\n") == 1


def test_help_is_a_success(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "plan", "--help")
    assert status == 0
    assert "--agreement" in out


def test_the_command_is_the_one_that_catches_everything() -> None:
    scripts = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"][
        "scripts"
    ]
    assert scripts == {"countermark": "countermark.__main__:main"}


def test_models_for_other_data_are_refused_by_every_verb(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from countermark.networks.named import build
    from described import described

    for number, (shape, classes) in enumerate([((1, 28, 28), 10), ((1, 8, 8), 5)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_model(
            folder,
            build("small", shape, classes, seed=0),
            described("small", shape, classes, "digits", 0.1, 0),
        )
        assert "other data" in fails(capsys, "evaluate", "--model", folder)
        assert "other data" in fails(
            capsys, "remove", "--model", folder, "--finetune", 1, "--out", tmp_path / "out"
        )
        assert "other data" in fails(
            capsys, "steal", "--victim", folder, "--setting", "white", "--out", tmp_path / "out"
        )


def test_two_processes_do_not_write_one_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from countermark.files import new_folder

    with new_folder(tmp_path / "new", {}):
        assert "another process" in fails(
            capsys, "protect", "--data", "digits", "--out", tmp_path / "new"
        )


def test_help_names_every_name_that_there_is() -> None:
    verbs = ("protect", "steal", "evaluate")
    helps = alone(*(f"{verb} --help" for verb in verbs))
    assert [status for status, _, _ in helps] == [0, 0, 0]
    text = dict(zip(verbs, (out for _, out, _ in helps), strict=True))
    for name in (*KNOWN, *NETWORKS):
        assert name in text["protect"]


def config_of(verb: str) -> Any:
    module = importlib.import_module(f"countermark.verbs.{cli._file(verb)}")
    return getattr(module, cli._file(verb)).config


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_option_has_a_word_of_help(verb: str) -> None:
    words = options.words_of(config_of(verb))
    assert [field.name for field in fields(config_of(verb)) if not words.get(field.name)] == []


def test_a_closed_pipe_is_no_traceback(owner: Path) -> None:
    command = f"{shlex.join(warm())} verify --suspect {owner} --key {owner}/key | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=ENVIRONMENT)
    assert "Traceback" not in done.stderr


def test_quickstart_tells_the_story_and_keeps_what_it_did(
    tmp_path: Path, owner: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "story"
    shutil.copytree(owner, out / "model")
    status, text, _ = run(capsys, "quickstart", "--data", "digits", "--out", out)
    assert status == 0
    assert text.count("kept from an earlier run") == 1
    status, story = ask(capsys, "quickstart", "--data", "digits", "--out", out)
    verdicts = [suspect["verification"]["test"]["verdict"] for suspect in story["suspects"]]
    # Each run draws a new secret, and the 160 trials on digits are few: the p-value of the copy
    # with 80 % pruned is not always below 1e-6.
    assert [verdicts[i] for i in (0, 1, 4)] == ["match", "no evidence", "no evidence"]
    for copy in (story["suspects"][i]["verification"]["test"] for i in (2, 3)):
        assert copy["agreements"] > copy["disagreements"]
    next_commands = [line.strip() for line in text.split("try next")[1].strip().splitlines()]
    assert len(next_commands) == 3
    assert all(command.startswith("countermark ") for command in next_commands)
    # Parts of another story are not passed off as this one's.
    assert "other options" in fails(
        capsys, "quickstart", "--data", "digits", "--seed", 7, "--out", out, "--json"
    )
    shutil.rmtree(out / "pruned")
    shutil.copytree(out / "finetuned", out / "pruned")
    assert "other options" in fails(
        capsys, "quickstart", "--data", "digits", "--out", out, "--json"
    )


def test_the_library_says_what_the_command_line_says(owner: Path) -> None:
    found = countermark.verify(owner, key=owner / "key")
    assert found.verdict == "match"
    model = countermark.load(str(owner))
    key = load_key(owner / "key")
    with torch.no_grad():
        assert torch.equal(model(key.watermarks.x.float() / 255).argmax(1), key.labels) == (
            found.test.agreements == found.test.trials
        )


def alone(*lines: str, torch: bool = True, **options: Any) -> list[tuple[int, str, str]]:
    """Run command lines in one child process; status, output and error of each.

    Without `torch` importing it is an error there.
    """
    script = f"""
import contextlib, io, json, shlex, sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch" and not {torch}:
            raise ImportError("torch was imported")
sys.meta_path.insert(0, NoTorch())
from countermark import cli
found = []
for line in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main(shlex.split(line))
        except SystemExit as stop:
            status = stop.code
    found.append((status, out.getvalue(), err.getvalue()))
print(json.dumps(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        check=False,
        **options,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(each) for each in json.loads(done.stdout)]


VERBS = cli.VERBS


def test_the_version_is_said_without_torch() -> None:
    assert alone("--version", torch=False) == [(0, f"countermark {countermark.__version__}\n", "")]


def test_help_lists_every_verb_and_a_groups_help_its_actions() -> None:
    groups = ["data", "client", "log", "bundle"]
    helps = alone(
        "--help",
        "-h",
        *(f"{group} {option}" for group in groups for option in ("--help", "-h")),
        torch=False,
    )
    assert all(status == 0 and err == "" for status, _, err in helps)
    texts = [out for _, out, _ in helps]
    assert texts[0] == texts[1]
    for number, group in enumerate(groups):
        assert texts[2 + 2 * number] == texts[3 + 2 * number]
        for name in VERBS:
            assert (f"  {name} " in texts[2 + 2 * number]) == name.startswith(f"{group} ")


def test_help_is_one_screen_grouped_by_what_people_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = cli._overview().splitlines()
    assert all(len(line) <= 80 for line in lines)
    listed = [line for line in lines if line.startswith("  ")]
    assert len(listed) == len(VERBS) <= 30  # one line each
    # Two spaces or more part the columns: the task, where one begins, the verb and its summary.
    rows = [re.split(r" {2,}", line.strip()) for line in listed]
    assert [row[-2:] for row in rows] == [[name, cli._summary(name)] for name in VERBS]
    begun = {row[0]: row[1] for row in rows if len(row) == 3}
    assert begun == {task: names[0] for task, names in cli.TASKS.items()}


def test_nothing_to_do_lists_every_verb_in_one_line() -> None:
    [(status, out, err)] = alone("", torch=False)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert all(name in err for name in VERBS)
    [(status, out, err)] = alone("log", torch=False)
    assert all(name in err for name in ("log head", "log check", "log erase"))


def test_help_of_a_verb_is_calm_and_imports_no_torch() -> None:
    """It has every option once and fits 80 columns; what was never given is no default."""
    columns = {**ENVIRONMENT, "COLUMNS": "80"}
    lines = [f"{verb} --help" for verb in VERBS]
    for verb, (status, out, err) in zip(
        VERBS, alone(*lines, torch=False, env=columns), strict=True
    ):
        assert (status, err) == (0, ""), verb
        assert out.startswith(f"usage: countermark {verb} ")
        assert max(map(len, out.splitlines())) <= 80
        assert "None" not in out
        listed = re.findall(r"^  (--[a-z-]+)", out, re.MULTILINE)
        assert listed == [options.option(field.name) for field in fields(config_of(verb))]
        assert listed[-1] == "--json"


def test_the_help_on_verify_has_its_own_options_before_the_shared_ones(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = run(capsys, "verify", "--help")[1]
    assert out.startswith("usage: countermark verify SUSPECT --key PATH [OPTIONS]\n")
    heads = re.findall(r"^(\S.*):$", out, re.MULTILINE)
    asks, runs = "Options of verbs that ask a suspect", "Options of verbs that run a model"
    assert heads == ["Options", asks, runs, "Options of every verb"]
    assert "--alpha NUMBER        Level of a match; a judge's is 1e-9. [1e-06]" in out
    assert "--pixels float|uint8" in out
    assert "--mean NUMBER ..." in out


COMPLETED = {
    "": [*dict.fromkeys(verb.split()[0] for verb in VERBS), "--help", "--version", "--completion"],
    "pro": ["protect"],
    "data ": ["fetch", "check"],
    "log c": ["check"],
    "log check --": ["--log", "--head", "--roots", "--json"],
    "verify --pix": ["--pixels"],
    "verify copy --pixels ": ["float", "uint8"],
    "protect digits --mirror T": ["True"],
    "protect digits --scheme c": ["coin", "composite"],
    "reproduce --protocol as": ["as-published"],
    "verify ": [],  # nothing of ours: the shell completes paths
    "verify copy --key my": [],
    "bundle sign mi": [],
    "--completion ": ["bash", "zsh"],
}


def test_bash_completes_verbs_options_and_choices(capsys: pytest.CaptureFixture[str]) -> None:
    script = run(capsys, "--completion", "bash")[1]
    for line in COMPLETED:
        words = shlex.join(["countermark", *line.split(" ")])
        script += f"COMP_WORDS=({words}); COMP_CWORD={line.count(' ') + 1}\n"
        script += '_countermark; echo "${COMPREPLY[*]}"\n'
    script += "complete -p countermark\n"
    done = subprocess.run(["bash", "-u"], input=script, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    *found, how = done.stdout.splitlines()
    assert dict(zip(COMPLETED, map(str.split, found), strict=True)) == COMPLETED
    assert how == "complete -o bashdefault -o default -F _countermark countermark"


ZSH = """
zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell 'PS1=; source ./completion; print ready $((1 + 1))'
zpty -r shell out '*ready 2*'
zpty -w -n shell $'countermark verify x --pix\\t'
zpty -r shell out '*pixels*'
zpty -w -n shell $'ui\\t'
zpty -r shell out '*uint8*'
print -r -- $out
"""


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_completes_at_the_tab_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "completion").write_text(run(capsys, "--completion", "zsh")[1])
    done = subprocess.run(
        ["zsh", "-f", "-c", ZSH],
        cwd=tmp_path,
        env={**ENVIRONMENT, "ZDOTDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert "uint8" in done.stdout, done


def test_the_completion_of_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--completion"], ["--completion", "tcsh"], ["--completion", "bash", "zsh"]):
        assert "choose one of bash, zsh" in fails(capsys, *words)


MISTAKES = {
    "verfy --suspect x": "did you mean verify?",
    "fetch mnist": "did you mean data fetch?",
    "log chek x": "did you mean log check?",
    "log drop": "log head, log check, log erase, log renew",
    "destroy": "unknown verb 'destroy'; countermark --help",
    "x" * 5000: "unknown verb 'xxx",
    "--json verify": "first",
    "verify --suspekt x --key y": "did you mean --suspect?",
    f"plan --{'x' * 5000} 3": "unknown option",
    "verify --suspect x": "--key is missing; see countermark verify --help",
    "adjudicate": "--claim, --suspect are missing",
    "protect --data digits --out {new} --epsilon much": (
        "--epsilon takes a number, or a fraction as 8/255, not 'much'"
    ),
    "protect --data digits --out {new} --epochs 1.5": "--epochs takes a whole number, not '1.5'",
    "protect --data digits --out {new} --epochs": (
        "--epochs takes a whole number, and none is given"
    ),
    f"protect --data digits --out {{new}} --seed {'9' * 6000}": "--seed takes a whole number",
    "verify --suspect {full} --key {full} --mean 0.5 x": (
        "--mean takes a number, or a fraction as 8/255, not 'x'"
    ),
    "plan --p 0.1 extra": "'extra' belongs to no option",
    "plan --json=no": "'no' belongs to no option",
    "plan --p_ 1": "unknown option",
}


def test_mistakes_in_options_are_one_short_line(tmp_path: Path) -> None:
    places = {"new": tmp_path / "new", "full": tmp_path}
    for line, (status, out, err) in zip(
        MISTAKES, alone(*(line.format(**places) for line in MISTAKES), torch=False), strict=True
    ):
        assert (status, out, err.count("\n")) == (2, "", 1), line
        assert MISTAKES[line] in err
        assert len(err) < 200
        assert "--help" in err


NAMED = {
    "data fetch cifar": "choose one of mnist, fashion_mnist, digits",
    "protect --data cifar --out {new}": (
        "there is no data at 'cifar' (did you mean cifar10?); give mnist, fashion_mnist,"
    ),
    "quickstart --data cifar --out {new}": "there is no data at 'cifar' (did you mean cifar10?)",
    "reproduce --data digits cifar --out {new}": "data set",
    "reproduce --profile vast": "quick, standard, paper",
    "reproduce --protocol dirty": "clean, as-published",
    **{
        f"protect --data digits --out {{new}} --{option} magic": f"unknown {option} 'magic'"
        for option in (
            "network",
            "scheme",
            "objective",
            "embedding",
            "labels",
            "device",
            "precision",
        )
    },
    "protect --data digits --out {new} --epsilon 2": "--epsilon is a number in (0, 1)",
    "protect --data digits --out {new} --watermark-epsilon 0.05": "above the training budget 0.1",
    "protect --data digits --out {new} --tsa ftp://x": "http(s)://HOST",
    "protect --data digits --out {full}": "not empty",
    "protect --data digits --out {full}/file": "is a file",
    "export {full} --out {full}/file": "is there already; give another name",
    "steal --victim {full} --setting clear --out {new}": "white, black, grey",
    "steal --victim {new} --setting white --out {new}": "check --victim",
    "remove --model {full} --prune 0.5 --out {full}": "not empty",
    "claim --suspect {full} --key {full} --out {full}": "not empty",
    "evaluate --model {new}": "{new} does not exist; check --model",
    "evaluate --model {full} --key {new}": "check --key",
    "verify --suspect {new} --key {full}": "check --suspect",
    "verify --suspect http://127.0.0.1:9/v2/models/m --key {new}": "check --key",
    "verify --suspect {full} --key {full} --pixels rgb": "float, uint8",
    "verify --suspect {full} --key {full} --layout chw": "nchw, nhwc",
    "adjudicate {new} --suspect {full} --roots {full}": "check --claim",
    "adjudicate {full} --suspect {full} --roots {full} --shown {full} {new}": "check --shown",
    "guard {new}": "check --model",
    "serve {full} --log {new} --port 99999": "65535",
    "trace --suspect {full} --key {full} --log {new}": "check --log",
    "log check {new}": "check --log",
    "bundle check {full} --public-key {new}": "check --public-key",
    "client add anna --clients {new} --public-key zz": "64 lower-case hexadecimal",
    f"evaluate --model {'x' * 300}": "check the path",
    "evaluate --model ~nobody-at-all/x": "without ~",
}


def test_options_are_checked_before_the_work_begins(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    places = {"new": tmp_path / "new", "full": tmp_path}
    for line, (status, out, err) in zip(
        NAMED, alone(*(line.format(**places) for line in NAMED)), strict=True
    ):
        assert (status, out, err.count("\n")) == (2, "", 1), (line, err)
        assert NAMED[line].format(**places) in err, line
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_choices_of_options_are_the_tables() -> None:
    assert get_args(choices.Setting) == tuple(THEFTS)
    assert get_args(choices.SchemeName) == tuple(SCHEMES)
    assert set(get_args(choices.Size)) == set(PROFILES)
    given = traits(open_data("digits"), open_data("digits").train)
    for objective in get_args(choices.Recipe):
        assert recipe(given, objective, GREY).epochs > 0


def test_the_options_of_a_theft_and_of_removals_are_the_tables() -> None:
    """Each row is an option with the words of the row, in the order of the table."""
    said = options.words_of(config_of("steal"))["setting"]
    for name, theft in THEFTS.items():
        assert f"{name} ({theft.help})" in said
    own = options.words_of(config_of("remove"))
    assert [name for name in own if name in REMOVALS] == list(REMOVALS)
    for name, removal in REMOVALS.items():
        help_of_row = f"{removal.help[0].upper()}{removal.help[1:]} ({removal.amount.range})."
        assert own[name] == help_of_row
        assert options.hints_of(config_of("remove"))[name] == removal.amount.kind | None


def test_functions_refuse_what_the_command_line_refuses(tmp_path: Path) -> None:
    wrong: dict[str, dict[str, Any]] = {
        "unknown scheme 'magic'; choose one of ": {"scheme": "magic"},
        "--epochs takes a whole number, not '3'": {"epochs": "3"},
        "--epochs takes a whole number, not True": {"epochs": True},
        "--epsilon takes a number": {"epsilon": "much"},
        "--network takes a name or module:function, not 3": {"network": 3},
        "--tsa takes text, not b'x'": {"tsa": b"x"},
        "--json takes true or false": {"json": 1},
        "--cache takes a path, not 3": {"cache": 3},
    }
    for words, given in wrong.items():
        with pytest.raises(countermark.CountermarkError, match=words):
            countermark.protect("digits", out=tmp_path / "new", **given)
    with pytest.raises(countermark.CountermarkError, match="does not exist; check --model"):
        countermark.evaluate(str(tmp_path / "none"))
    assert list(tmp_path.iterdir()) == []


def test_functions_take_numbers_and_paths_as_they_come() -> None:
    found = ProtectConfig(
        "digits", out="a/b/", epsilon="8/255", epochs=np.int64(3), seed=np.int32(1)
    )  # type: ignore[arg-type]
    assert (found.out, found.epsilon) == (Path("a/b"), 8 / 255)
    assert (type(found.epochs), found.seed) == (int, 1)
    assert ProtectConfig("digits", out=Path("a/b"), epsilon=8 / 255, epochs=3, seed=1) == found
    assert json.dumps(found.record())


@pytest.mark.parametrize("verb", cli.VERBS)
def test_a_function_says_what_it_takes(verb: str) -> None:
    module = importlib.import_module(f"countermark.verbs.{cli._file(verb)}")
    function, config = getattr(module, cli._file(verb)), config_of(verb)
    parameters = inspect.signature(function).parameters
    assert set(parameters) == {field.name for field in fields(config)}
    assert [name for name in parameters if f"\n    {name}: " not in function.__doc__] == []
    assert len([each for each in parameters.values() if each.kind is not each.KEYWORD_ONLY]) <= 1
    assert dataclasses.is_dataclass(inspect.signature(function).return_annotation)
    assert cli._summary(verb) == str(inspect.getdoc(config)).splitlines()[0]


def test_the_public_names_are_those_that_a_type_checker_sees() -> None:
    tree = ast.parse(Path(countermark.__file__).read_text())
    seen = {
        alias.asname: f"{node.module.removeprefix('countermark.')}.{alias.name}"
        for block in tree.body
        if isinstance(block, ast.If)
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names
    }
    assert seen == countermark._PUBLIC
    for name in countermark.__all__:
        assert getattr(countermark, name) is not None
    assert {
        name for name in countermark.__all__ if hasattr(getattr(countermark, name), "config")
    } >= {"calibrate" if verb == "guard" else cli._file(verb) for verb in cli.VERBS}


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'tyro', 'rich', 'numpy', 'lightning_fabric', 'onnx'}"
    code = f"import sys, countermark.cli; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_home_folder_is_expanded_in_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell leaves the `~` of `--out=~/x` as it is, so the command line expands it.

    It must do so in every path or in none.
    """
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "there").mkdir()
    (tmp_path / "log.db").write_text("")

    def parsed(verb: str, *words: str) -> Any:
        return cli._parse(verb, config_of(verb), list(words)).placed()

    protect = parsed("protect", "digits", "--out=~/new", "--cache=~/c")
    assert (protect.out, protect.cache) == (tmp_path / "new", tmp_path / "c")
    assert parsed("evaluate", "~/there", "--data=~/photos").data == str(tmp_path / "photos")
    assert parsed("evaluate", "~/there", "--data=digits").data == "digits"
    judged = parsed(
        "adjudicate",
        "~/there",
        "--suspect=~/there",
        "--roots=~/log.db",
        "--shown",
        "~/there",
        "~/log.db",
    )
    assert judged.claim == tmp_path / "there"
    assert str(judged.suspect) == str(tmp_path / "there")
    assert judged.shown == (tmp_path / "there", tmp_path / "log.db")
    assert judged.out == Path("judgement")
    assert parsed("log check", "--log=~/log.db").log == str(tmp_path / "log.db")
    address = "postgresql://anna:~/@host/log"
    assert parsed("log check", "--log", address).log == address


def test_every_path_of_a_verb_has_its_place() -> None:
    """Or it would be neither expanded nor looked for."""
    for verb in VERBS:
        for name, hint in options.hints_of(config_of(verb)).items():
            if "Path" in str(hint) or name == "log":
                assert list(options.places_in(hint)), (verb, name)


def test_help_says_what_the_code_takes() -> None:
    [(_, verify, _), (_, judged, _)] = alone("verify --help", "adjudicate --help")
    for text in (verify, judged):
        assert all(
            word in " ".join(text.split())
            for word in (".onnx", ".pt2", "http(s)://", "--api", "function")
        )


QUICK = """
import functools
from countermark import evaluation
evaluation.strict = functools.partial(evaluation.strict, steps=3, queries=20)
"""
NO_HOME = """
import json, os, pwd, sys
pwd.getpwuid = lambda uid: (_ for _ in ()).throw(KeyError(uid))
from countermark import cli
{quick}
for environment, line in json.load(sys.stdin):
    os.environ.update(environment)
    print(cli.main(line), flush=True)
    for name in environment:
        del os.environ[name]
"""


def test_without_a_home_folder_only_what_needs_a_cache_is_refused(
    owner: Path, tmp_path: Path
) -> None:
    """Run several command lines in one process whose user has no usable home folder.

    There is none when Python starts, and later `HOME` or the cache variable names nonsense.
    """
    strict = ["evaluate", "--model", str(owner), "--strict", "--images", "2"]
    places = [
        {},
        {"HOME": "/nonexistent"},
        {"HOME": "/dev/null"},
        {"COUNTERMARK_CACHE": "~/x"},
        {"COUNTERMARK_CACHE": "/dev/null"},
    ]
    lines = [(place, strict) for place in places] + [({}, ["data", "fetch", "mnist"])]
    variables = {
        name: value
        for name, value in ENVIRONMENT.items()
        if not name.startswith(("XDG", "HOME", "COUNTERMARK"))
    }
    command = [sys.executable, "-c", NO_HOME.format(quick=QUICK)]
    done = subprocess.run(
        command, input=json.dumps(lines), capture_output=True, text=True, env=variables, check=True
    )
    statuses = [line for line in done.stdout.splitlines() if line.isdigit()]
    assert statuses == [*len(places) * ["0"], "2"], done.stderr
    assert done.stdout.count("strict accuracy") == len(places)
    refused = [line for line in done.stderr.splitlines() if line.startswith("countermark: ")]
    assert len(refused) == 1
    assert refused[0].startswith(
        "countermark: there is no home folder for the data files; name another folder"
    )
    assert done.stderr.splitlines()[-1] == refused[0]


def test_a_source_folder_without_metadata_of_the_package_knows_its_version(owner: Path) -> None:
    source = Path(countermark.__file__).parents[1]
    script = f"""
import importlib.metadata, sys
def gone(name):
    if name == "countermark":
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)
found, importlib.metadata.version = importlib.metadata.version, gone
sys.path.insert(0, {str(source)!r})
from countermark import cli
{QUICK}
raise SystemExit(cli.main(["evaluate", "--model", {str(owner)!r}, "--strict", "--images", "2", \
"--json"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stderr
    for path in source.rglob("*.py"):
        assert "importlib.metadata" not in path.read_text()


def test_a_full_disk_does_not_stop_a_strict_evaluation(
    owner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it keeps to go on from is a convenience."""

    def full(*_: object, **__: object) -> None:
        raise countermark.CountermarkError("cannot write: No space left on device")

    monkeypatch.setattr("countermark.evaluation.write_json", full)
    found = countermark.evaluate(owner, strict=True, images=2, cache=tmp_path)
    assert found.strict is not None


def test_what_code_of_the_user_prints_does_not_stand_beside_the_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "noisy_place.py").write_text(
        "import numpy as np\n"
        "print('one moment')\n"
        "def images():\n"
        "    x = np.random.default_rng(0).integers(0, 256, (400, 8, 8), dtype=np.uint8)\n"
        "    return x, np.arange(400) % 4\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", "check", "noisy_place:images", "--json"]) in (0, 1)
    out, err = capsys.readouterr()
    assert json.loads(out)["problem"] is None
    assert "one moment" in err
