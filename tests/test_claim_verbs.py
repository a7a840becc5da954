"""The verbs protect, claim and adjudicate as a user runs them.

The tests use a real authority, real files, and files with hostile contents.
"""

import base64
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from authority import Authority, stamped
from countermark import claims
from countermark.claims import suspect_identity
from countermark.cli import main
from countermark.errors import CountermarkError
from countermark.files import locked, read_json, sha256, write_json, write_tensors
from countermark.guard import QueryLog, Row
from countermark.networks import load_model, save_model
from countermark.networks.named import build
from countermark.options import option
from countermark.signing import check_folder, sign_folder
from countermark.thieves.remove import prune
from countermark.verbs.adjudicate import adjudicate
from countermark.verbs.claim import claim
from countermark.verbs.export import export
from countermark.verbs.log_check import log_check
from countermark.verbs.log_head import log_head
from countermark.verbs.protect import protect
from countermark.verbs.remove import remove
from countermark.watermarks import load_key
from described import described
from shorter import mark_shortly, take_any_mark

ELSEWHERE = "http://127.0.0.1:9/v2/models/m"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Authority]:
    made = Authority(tmp_path_factory.mktemp("tsa") / "ec")
    yield made
    made.close()


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Path:
    """A model that protect made with timestamps."""
    folder = tmp_path_factory.mktemp("marked") / "mine"
    protect("digits", out=folder, epochs=12, tsa=authority.url, roots=authority.root)
    return folder


@pytest.fixture(scope="module")
def pruned(marked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    network, description = load_model(marked)
    network = prune(network, 0.3)
    folder = tmp_path_factory.mktemp("pruned") / "theirs"
    folder.mkdir()
    save_model(folder, network, description)
    return folder


@pytest.fixture(scope="module")
def claimed(
    marked: Path, pruned: Path, authority: Authority, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A claim against the pruned copy, of the first batch."""
    out = tmp_path_factory.mktemp("claim") / "claim"
    found = claim(
        key=marked / "key", suspect=pruned, out=out, tsa=authority.url, roots=authority.root
    )
    assert (found.batch, found.left, found.timestamped) == (0, 1, True)
    return out


def test_protect_takes_its_coins_from_the_token(marked: Path) -> None:
    record = read_json(marked / "commitment.json")
    assert record["kind"] == "timestamped"
    assert record["t1"]
    assert record["t2"]
    assert read_json(marked / "key" / "key.json")["key"]["t1"] == record["t1"]


def test_a_claim_is_judged_from_its_files_alone(
    claimed: Path, pruned: Path, authority: Authority, tmp_path: Path
) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(claimed, moved)
    found = adjudicate(moved, suspect=pruned, roots=authority.root, out=tmp_path / "out" / "j")
    assert (found.verdict, found.exit_status) == ("upheld", 0)
    record = json.loads((tmp_path / "out" / "j.json").read_text())
    assert record["verdict"] == "upheld"
    assert record["test"]["agreements"] == found.test.agreements
    assert "<script" not in (tmp_path / "out" / "j.html").read_text()


def test_the_claim_holds_one_batch_and_nothing_of_the_secret(claimed: Path, marked: Path) -> None:
    everything = b"".join(path.read_bytes() for path in claimed.rglob("*") if path.is_file())
    secret = (marked / "key" / "secret").read_bytes()
    assert secret not in everything
    assert secret.hex().encode() not in everything
    assert str(marked).encode() not in everything


def test_the_key_remembers_what_was_shown(
    marked: Path, pruned: Path, claimed: Path, authority: Authority, tmp_path: Path
) -> None:
    key = tmp_path / "mine" / "key"
    shutil.copytree(marked, tmp_path / "mine")
    (key / "spent.json").write_bytes((marked / "key" / "spent.json").read_bytes())
    second = claim(key=key, suspect=pruned, out=tmp_path / "second", tsa=authority.url)
    assert (second.batch, second.left) == (1, 0)
    with pytest.raises(CountermarkError, match="were shown"):
        claim(key=key, suspect=pruned, out=tmp_path / "third", tsa=authority.url)
    again = claim(key=key, suspect=pruned, out=tmp_path / "again", batch=0, tsa=authority.url)
    assert again.batch == 0
    options = {"suspect": pruned, "roots": authority.root, "out": tmp_path / "j"}
    assert (
        adjudicate(tmp_path / "again", shown=(claimed,), **options).verdict == "upheld"
    )  # the same accusation
    assert adjudicate(tmp_path / "second", shown=(claimed,), **options).verdict == "upheld"
    with pytest.raises(CountermarkError, match="batches 0 to 1"):
        claim(key=key, suspect=pruned, out=tmp_path / "fifth", batch=9, tsa=authority.url)
    (key / "spent.json").write_text("{}")
    with pytest.raises(CountermarkError):
        claim(key=key, suspect=pruned, out=tmp_path / "sixth", tsa=authority.url)


def test_a_copy_behind_a_cleaner_is_claimed_and_judged_from_inside(
    marked: Path, stranger: Path, authority: Authority, tmp_path: Path
) -> None:
    mine, common = tmp_path / "mine", {"tsa": authority.url, "roots": authority.root}
    shutil.copytree(marked, mine)
    (mine / "key" / "spent.json").unlink(missing_ok=True)
    for origin, name in ((marked, "copy"), (stranger, "other")):
        remove(origin, out=tmp_path / name, blur=9)
        export(tmp_path / name, out=tmp_path / f"{name}.onnx")
    file, other = tmp_path / "copy.onnx", tmp_path / "other.onnx"
    with pytest.raises(CountermarkError, match="nothing was opened"):
        claim(key=mine / "key", suspect=file, out=tmp_path / "plain", **common)
    made = claim(key=mine / "key", suspect=file, out=tmp_path / "claim", inside=True, **common)
    assert made.looks is not None
    assert made.looks.suspect == 2
    asked = read_json(tmp_path / "claim" / "claim.json")["answers"]["asked"]
    assert asked["inside"]["places"] == made.answers.ways > 1
    judging = {"suspect": file, "roots": authority.root, "out": tmp_path / "j"}
    judged = adjudicate(tmp_path / "claim", inside=True, **judging)
    assert judged.verdict == "upheld"
    assert judged.test.log10_p_value == pytest.approx(made.test.log10_p_value)
    assert adjudicate(tmp_path / "claim", **judging).verdict != "upheld"
    accused = claim(
        key=mine / "key", suspect=other, out=tmp_path / "false", inside=True, anyway=True, **common
    )
    assert accused.test.verdict != "match"
    judging["suspect"] = other
    assert adjudicate(tmp_path / "false", inside=True, **judging).verdict != "upheld"


def test_a_batch_that_was_opened_against_an_endpoint_is_not_opened_again(
    marked: Path, pruned: Path, authority: Authority, tmp_path: Path
) -> None:
    """The accused could show the second claim, and the first would be undecidable."""
    shutil.copytree(marked, tmp_path / "mine")
    key = tmp_path / "mine" / "key"
    (key / "spent.json").unlink(missing_ok=True)
    again: dict[str, Any] = {"key": key, "suspect": pruned, "batch": 0, "tsa": authority.url}
    claim(**again, out=tmp_path / "first")
    (entry,) = read_json(key / "spent.json")["batches"]
    assert entry["kind"] == "file"
    claim(**again, out=tmp_path / "second")
    theirs = {**again, "suspect": ELSEWHERE, "out": tmp_path / "none"}
    with pytest.raises(CountermarkError, match="batch 0 was shown before, and nobody"):
        claim(**theirs)
    unfinished = tmp_path / "none.partial"
    unfinished.mkdir()  # as a claim leaves it that was killed while it asked
    write_json(unfinished / "config.json", {"batch": 0, "suspect": suspect_identity(ELSEWHERE)})
    with pytest.raises(CountermarkError, match="another has opened its batch 0 since"):
        claim(**{**theirs, "batch": None})
    entry = {**entry, "kind": "endpoint"}
    write_json(key / "spent.json", {"format": "countermark spent 1", "batches": [entry]}, 0o600)
    with pytest.raises(CountermarkError, match="batch 0 was opened against an endpoint"):
        claim(**again, out=tmp_path / "third")
    assert claim(**again, out=tmp_path / "fourth", anyway=True).batch == 0
    assert claim(**{**again, "batch": None}, out=tmp_path / "fifth").batch == 1


@pytest.mark.parametrize("other", [False, True])
def test_a_claim_that_was_interrupted_takes_no_batch_that_another_opened_since(
    marked: Path,
    pruned: Path,
    authority: Authority,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    other: bool,
) -> None:
    """Once it is spent for this very claim, this claim goes on with it."""
    shutil.copytree(marked, tmp_path / "mine")
    key = tmp_path / "mine" / "key"
    (key / "spent.json").unlink(missing_ok=True)
    asked: dict[str, Any] = {"key": key, "suspect": pruned, "tsa": authority.url}
    with monkeypatch.context() as patch:
        if other:  # before it is spent, or after
            room = sys.modules["countermark.verbs.claim"]
            patch.setattr(room, "note_look", lambda *_given, **_options: 1 / 0)
        else:
            patch.setattr(claims, "write_claim", lambda *_given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            claim(**asked, out=tmp_path / "interrupted")
    unfinished = tmp_path / "interrupted.partial"
    unfinished.mkdir(exist_ok=True)  # as a process leaves it that is killed
    write_json(unfinished / "config.json", {"batch": 0, "suspect": suspect_identity(pruned)})
    if other:
        assert claim(**asked, out=tmp_path / "second").batch == 0
        with pytest.raises(CountermarkError, match="another has opened its batch 0 since"):
            claim(**asked, out=tmp_path / "interrupted")
        shutil.rmtree(unfinished)
        assert claim(**asked, out=tmp_path / "interrupted").batch == 1
    else:
        assert claim(**asked, out=tmp_path / "interrupted").batch == 0
        assert not list((tmp_path / "interrupted").glob("*spent*"))


def test_a_long_name_inside_a_suspect_fills_no_claim(
    marked: Path, authority: Authority, tmp_path: Path
) -> None:
    """The name of a tensor is the suspect's: one of a megabyte spent a batch for no claim."""
    mine, common = tmp_path / "mine", {"tsa": authority.url, "roots": authority.root}
    shutil.copytree(marked, mine)
    (mine / "key" / "spent.json").unlink(missing_ok=True)
    remove(marked, out=tmp_path / "copy", blur=9)
    export(tmp_path / "copy", out=tmp_path / "copy.onnx")
    made = onnx.load(tmp_path / "copy.onnx")
    inner = next(
        each.output[0]
        for each in made.graph.node
        if made.graph.input[0].name in each.input and each.op_type != "Shape"
    )
    for node in made.graph.node:
        for names in (node.input, node.output):
            names[:] = ["n" * 1_100_000 if name == inner else name for name in names]
    onnx.save(made, tmp_path / "long.onnx")
    suspect = tmp_path / "long.onnx"
    claim(key=mine / "key", suspect=suspect, out=tmp_path / "claim", inside=True, **common)
    judging = {"suspect": suspect, "roots": authority.root, "out": tmp_path / "j"}
    assert adjudicate(tmp_path / "claim", inside=True, **judging).verdict == "upheld"
    assert (tmp_path / "j.json").stat().st_size < 100_000


def test_a_stranger_is_not_claimed_against_and_nothing_is_opened(
    marked: Path, stranger: Path, authority: Authority, tmp_path: Path
) -> None:
    shutil.copytree(marked, tmp_path / "mine")
    (tmp_path / "mine" / "key" / "spent.json").unlink(missing_ok=True)
    with pytest.raises(CountermarkError, match="nothing was opened"):
        claim(
            key=tmp_path / "mine" / "key",
            suspect=stranger,
            out=tmp_path / "claim",
            tsa=authority.url,
        )
    assert not (tmp_path / "claim").exists()
    assert not (tmp_path / "mine" / "key" / "spent.json").exists()


def test_a_claim_without_timestamps_says_so(
    owner: Path, tmp_path: Path, authority: Authority
) -> None:
    shutil.copytree(owner, tmp_path / "mine")
    with pytest.raises(CountermarkError, match=r"private: it has no T1.*Nothing was opened"):
        claim(key=tmp_path / "mine" / "key", suspect=owner, out=tmp_path / "claim")
    assert not (tmp_path / "mine" / "key" / "spent.json").exists()
    found = claim(key=tmp_path / "mine" / "key", suspect=owner, out=tmp_path / "claim", anyway=True)
    assert not found.timestamped
    status = main(
        [
            "adjudicate",
            str(tmp_path / "claim"),
            "--suspect",
            str(owner),
            "--roots",
            str(authority.root),
            "--out",
            str(tmp_path / "j"),
        ]
    )
    assert status == 3


def test_the_command_line_tells_the_verdict_by_its_status(
    claimed: Path,
    pruned: Path,
    stranger: Path,
    authority: Authority,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = ["--roots", str(authority.root), "--out", str(tmp_path / "j")]
    assert main(["adjudicate", str(claimed), "--suspect", str(pruned), *common]) == 0
    assert "The claim is upheld" in capsys.readouterr().out
    assert (
        main(["adjudicate", str(claimed), "--suspect", str(stranger), *common]) == 3
    )  # not the accused
    assert main(["adjudicate", str(tmp_path), "--suspect", str(pruned), *common]) == 2
    assert (
        main(
            [
                "adjudicate",
                str(claimed),
                "--suspect",
                str(pruned),
                "--roots",
                str(tmp_path / "none.pem"),
                *common[2:],
            ]
        )
        == 2
    )
    assert main(["adjudicate", str(claimed), "--suspect", str(pruned), "--json", *common]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["verdict"] == "upheld"


RELEASE = Path(__file__).parent / "golden" / "0.1.0"


def network_of(width: int) -> Callable[..., nn.Module]:
    """What builds a network of a user's own, which the weights of another width do not fit."""

    def build_it(shape: tuple[int, int, int], classes: int) -> nn.Module:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(math.prod(shape), width), nn.ReLU(), nn.Linear(width, classes)
        )

    return build_it


def put_model(folder: Path, width: int, place: str) -> Path:
    folder.mkdir(exist_ok=True)
    save_model(
        folder, network_of(width)((1, 8, 8), 10), described(place, (1, 8, 8), 10, "digits", 0.1, 0)
    )
    return folder


def test_three_models_of_a_judgement_may_have_three_networks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, name in enumerate(("mine", "hers")):
        shutil.copytree(RELEASE / "claim", tmp_path / name)
        put_model(tmp_path / name / "model", 5 + number, f"shop.{name}:make")
    suspect = put_model(tmp_path / "theirs", 7, "shop.theirs:make")
    options: dict[str, Any] = {
        "suspect": suspect,
        "roots": RELEASE / "roots.pem",
        "out": tmp_path / "j",
        "rival": tmp_path / "hers",
    }
    named = {
        "owner_network": network_of(5),
        "rival_network": network_of(6),
        "network": network_of(7),
    }
    assert (
        adjudicate(tmp_path / "mine", **options, **named).verdict != "upheld"
    )  # nothing is as it was committed to
    for left in named:
        with pytest.raises(
            CountermarkError, match=f"imported only if you name it: {option(left)} "
        ):
            adjudicate(
                tmp_path / "mine",
                **options,
                **{name: each for name, each in named.items() if name != left},
            )
    with pytest.raises(CountermarkError, match="--rival-network goes with --rival only"):
        adjudicate(tmp_path / "mine", suspect=suspect, roots=RELEASE / "roots.pem", **named)
    words = [
        "adjudicate",
        str(RELEASE / "claim"),
        "--suspect",
        str(suspect),
        "--roots",
        str(RELEASE / "roots.pem"),
    ]
    assert main([*words, "--out", str(tmp_path / "j"), "--owner-network", "shop:make"]) == 2
    assert "a built-in one; leave --owner-network out" in " ".join(capsys.readouterr().err.split())


def test_an_owner_and_a_suspect_may_have_two_networks(tmp_path: Path) -> None:
    shutil.copytree(RELEASE / "mine", tmp_path / "mine")
    put_model(tmp_path / "mine", 5, "shop.models:make")
    suspect = put_model(tmp_path / "theirs", 7, "shop.theirs:make")
    options: dict[str, Any] = {
        "key": tmp_path / "mine" / "key",
        "out": tmp_path / "claim",
        "anyway": True,
    }
    with pytest.raises(CountermarkError, match="--owner-network MODULE:FUNCTION"):
        claim(suspect, **options, network=network_of(7))
    found = claim(suspect, **options, network=network_of(7), owner_network=network_of(5))
    assert found.test.verdict != "match"
    assert (tmp_path / "claim" / "claim.json").exists()


def test_an_authority_that_does_not_answer_stops_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(CountermarkError, match="does not answer"):
        protect("digits", out=tmp_path / "mine", tsa="http://127.0.0.1:9/")
    assert not (tmp_path / "mine").exists()
    assert not (tmp_path / "mine.partial").exists()


def test_an_interrupted_run_does_not_draw_its_coins_again(
    authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second token would be a second draw: the resumed run reads the first one."""
    from countermark import training
    from countermark.verbs import protect as room

    options = {"out": tmp_path / "mine", "epochs": 2, "tsa": authority.url}
    true_train = training.train
    calls: list[int] = []

    def stops(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return true_train(*arguments, **options)  # type: ignore[arg-type]

    mark_shortly(monkeypatch, 2)
    take_any_mark(monkeypatch)
    monkeypatch.setattr(room, "_make_key", lambda *a: _small_key(a))
    monkeypatch.setattr(training, "train", stops)
    with pytest.raises(KeyboardInterrupt):
        protect("digits", **options)  # type: ignore[arg-type]
    first = read_json(tmp_path / "mine.partial" / "key" / "key.json")["key"]["t1"]
    monkeypatch.setattr(training, "train", true_train)
    served = authority.served
    protect("digits", **options)  # type: ignore[arg-type]
    assert read_json(tmp_path / "mine" / "key" / "key.json")["key"]["t1"] == first
    assert authority.served == served + 2  # a trial, and T2


def _small_key(arguments: tuple) -> object:
    """The true function with trials that need no good source model."""
    from countermark.watermarks import WatermarkSet, load_key, write_key

    _setup, _given, private, stamp = arguments
    if (private / "key.json").exists():
        return load_key(private)
    x = torch.randint(
        0, 256, (4, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    trials = WatermarkSet(x, torch.tensor([[0, 1]] * 4), torch.arange(4) // 2, torch.arange(4))
    return write_key(private, "coin", trials, {"data": "digits"}, stamp)


def test_a_head_with_a_token_shows_when_the_log_was_so(
    authority: Authority, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, head = tmp_path / "log.db", tmp_path / "head.json"
    with QueryLog(str(path)) as log:
        row = Row("aa" * 32, "anna", b"cell", b"image", 1, 2, 3, 1, 4, log=log.identity)
        log.append([row])
    assert (
        main(["log", "head", str(path), "--tsa", authority.url, "--roots", str(authority.root)])
        == 0
    )
    head.write_text(capsys.readouterr().out)
    found = log_check(str(path), head=head, roots=authority.root)
    assert found.stamped is not None
    record = json.loads(head.read_text())
    head.write_text(json.dumps({**record, "hash": "00" * 32}))
    with pytest.raises(CountermarkError):
        log_check(str(path), head=head, roots=authority.root)
    bare = log_head(str(path))
    head.write_text(
        json.dumps({"format": bare.format, "rows": bare.rows, "hash": bare.hash, "token": None})
    )
    with pytest.raises(CountermarkError, match="no timestamp") as caught:
        log_check("postgresql://owner:hidden@127.0.0.1:9/log", head=head, roots=authority.root)
    assert "hidden" not in str(caught.value)


def test_a_folder_is_signed_as_a_whole(pruned: Path, tmp_path: Path) -> None:
    pytest.importorskip("model_signing")
    folder = tmp_path / "theirs"
    shutil.copytree(pruned, folder)
    (folder / "key").mkdir()
    (folder / "key" / "secret").write_bytes(b"s")
    for name in ("mine", "other"):
        subprocess.run(
            [
                "openssl",
                "ecparam",
                "-name",
                "prime256v1",
                "-genkey",
                "-noout",
                "-out",
                f"{name}.pem",
            ],
            cwd=tmp_path,
            check=True,
        )
        subprocess.run(
            ["openssl", "ec", "-in", f"{name}.pem", "-pubout", "-out", f"{name}.pub"],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )
    sign_folder(folder, tmp_path / "mine.pem")
    check_folder(folder, tmp_path / "mine.pub")
    (folder / "key" / "secret").write_bytes(b"t")  # the key is not part of it
    check_folder(folder, tmp_path / "mine.pub")
    with pytest.raises(CountermarkError):
        check_folder(folder, tmp_path / "other.pub")
    (folder / "extra").write_text("x")
    with pytest.raises(CountermarkError):
        check_folder(folder, tmp_path / "mine.pub")
    (folder / "extra").unlink()
    text = (folder / "model.json").read_text()
    (folder / "model.json").write_text(text.replace("digits", "digitz"))
    with pytest.raises(CountermarkError):
        check_folder(folder, tmp_path / "mine.pub")
    (folder / "model.json").write_text(text)
    assert main(["bundle", "check", str(folder), "--public-key", str(tmp_path / "mine.pub")]) == 0
    assert main(["bundle", "sign", str(tmp_path), "--private-key", str(tmp_path / "mine.pem")]) == 2


@pytest.mark.parametrize("spelling", ["absolute", "mine", ".", "mine/", "other/../mine", "link"])
def test_a_secret_is_in_no_signature_however_the_folder_is_spelled(
    spelling: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each spelling signs the public files only, and each signature holds under every other one."""
    pytest.importorskip("model_signing")
    folder = tmp_path / "mine"
    shutil.copytree(Path(__file__).parent / "golden" / "0.1.0" / "mine", folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to(folder)
    private, public = tmp_path / "k.pem", tmp_path / "k.pub"
    subprocess.run(
        ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private],
        check=True,
    )
    subprocess.run(
        ["openssl", "ec", "-in", private, "-pubout", "-out", public],
        check=True,
        capture_output=True,
    )
    monkeypatch.chdir(folder if spelling == "." else tmp_path)
    given = str(folder) if spelling == "absolute" else spelling
    assert main(["bundle", "sign", given, "--private-key", str(private)]) == 0
    assert main(["bundle", "check", given, "--public-key", str(public)]) == 0
    assert main(["bundle", "check", str(folder), "--public-key", str(public)]) == 0
    capsys.readouterr()
    envelope = json.loads((folder / "model.sig").read_text())["dsseEnvelope"]
    statement = json.loads(base64.b64decode(envelope["payload"]))
    resources = statement["predicate"]["resources"]
    secret = [
        path for path in [*(folder / "key").rglob("*"), folder / "clients.json"] if path.is_file()
    ]
    assert {entry["name"] for entry in resources} == {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path not in secret and path.name != "model.sig"
    }
    for path in secret:
        assert str(path.relative_to(folder)) not in {entry["name"] for entry in resources}
        assert sha256(path.read_bytes()) not in json.dumps(statement)
    for path in secret:  # they are no part of what is published
        path.unlink()
    assert main(["bundle", "check", given, "--public-key", str(public)]) == 0
    shutil.copy(private, folder / "k.pem")
    assert main(["bundle", "sign", given, "--private-key", str(folder / "k.pem")]) == 2
    assert "lies in the folder that it signs" in capsys.readouterr().err


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_no_change_of_one_byte_makes_a_forged_claim_upheld(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Change one bit of a claim that accuses a true copy and fails only because of a signature.

    It may be refused with a reason or judged, but it must not crash.
    """
    source = _CLAIMED["forged"]
    folder = tmp_path_factory.mktemp("changed") / "claim"
    shutil.copytree(source, folder)
    name = data.draw(
        st.sampled_from(
            ["claim.json", "trials.safetensors", "model/model.json", "model/model.safetensors"]
        )
    )
    content = bytearray((folder / name).read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    (folder / name).write_bytes(bytes(content))
    try:
        found = adjudicate(
            folder, suspect=_CLAIMED["suspect"], roots=_CLAIMED["roots"], out=folder.parent / "j"
        )
    except CountermarkError:
        return
    assert found.verdict != "upheld"


_CLAIMED: dict[str, Path] = {}


@pytest.fixture(autouse=True)
def _known(
    claimed: Path, pruned: Path, authority: Authority, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if "forged" not in _CLAIMED:
        forged = tmp_path_factory.mktemp("forged") / "claim"
        shutil.copytree(claimed, forged)
        record = read_json(forged / "claim.json")
        write_json(forged / "claim.json", {**record, "answers_signature": record["c2_signature"]})
        _CLAIMED.update(forged=forged, suspect=pruned, roots=authority.root)


def test_a_dishonest_claim_folder_is_an_error(
    claimed: Path, pruned: Path, authority: Authority, tmp_path: Path
) -> None:
    """Files that never end, wait for ever, or are another model's."""
    weights, other = tmp_path / "claim" / "model" / "model.safetensors", tmp_path / "other"
    other.mkdir()
    save_model(
        other,
        build("small", (3, 32, 32), 10, seed=0),
        described("small", (3, 32, 32), 10, "digits", 0.1, 0),
    )
    for spoil in (
        lambda: os.mkfifo(weights),
        lambda: weights.symlink_to("/dev/zero"),
        lambda: weights.mkdir(),
        lambda: [
            shutil.copy(other / name, weights.parent / name)
            for name in ("model.safetensors", "model.json")
        ],
    ):
        shutil.rmtree(tmp_path / "claim", ignore_errors=True)
        shutil.copytree(claimed, tmp_path / "claim")
        weights.unlink()
        spoil()
        with pytest.raises(CountermarkError):
            adjudicate(tmp_path / "claim", suspect=pruned, roots=authority.root, out=tmp_path / "j")
    assert not (tmp_path / "j.json").exists()


def test_a_judgement_leaves_nothing_of_an_earlier_one(
    claimed: Path, pruned: Path, authority: Authority, tmp_path: Path
) -> None:
    for suffix in (".html", ".json"):
        (tmp_path / f"j{suffix}").write_text("upheld")
    with pytest.raises(CountermarkError):
        adjudicate(claimed, suspect=tmp_path, roots=authority.root, out=tmp_path / "j")
    assert not list(tmp_path.glob("j.*"))
    with pytest.raises(CountermarkError, match="beginning of two files"):
        adjudicate(claimed, suspect=pruned, roots=authority.root, out=Path("/"))


def test_two_claims_at_once_do_not_spend_one_batch(
    marked: Path, pruned: Path, authority: Authority, tmp_path: Path
) -> None:
    with locked(marked / "key"), pytest.raises(CountermarkError, match="another process"):
        claim(key=marked / "key", suspect=pruned, out=tmp_path / "claim", tsa=authority.url)


def test_a_timestamp_of_the_suspect_is_looked_at(
    marked: Path, authority: Authority, tmp_path: Path, claimed: Path, pruned: Path
) -> None:
    token = tmp_path / "suspect.tsr"
    token.write_bytes(stamped(authority, (pruned / "model.safetensors").read_bytes()))
    options = {"claim": claimed, "suspect": pruned, "roots": authority.root, "out": tmp_path / "j"}
    assert (
        adjudicate(suspect_token=token, **options).verdict == "upheld"
    )  # stamped after T2: it frees nobody


def test_a_copy_with_its_classes_in_another_order_is_judged_by_matching(
    marked: Path, pruned: Path, authority: Authority, tmp_path: Path
) -> None:
    """The claim carries the key's clean examples, which were fixed before the coins."""
    shutil.copytree(marked, tmp_path / "mine")
    network, description = load_model(pruned)
    last = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1]
    with torch.no_grad():
        for values in (last.weight, last.bias):
            values.copy_(values.roll(3, 0))
    (tmp_path / "theirs").mkdir()
    save_model(tmp_path / "theirs", network, description)
    common: dict[str, Any] = {"key": tmp_path / "mine" / "key", "suspect": tmp_path / "theirs"}
    common |= {"tsa": authority.url, "roots": authority.root, "batch": 1}
    with pytest.raises(CountermarkError, match="would not convince a judge"):
        claim(**common, out=tmp_path / "plain")
    found = claim(**common, out=tmp_path / "claim", match=True)
    matched = found.answers.matched
    assert matched is not None
    assert (matched.ways, matched.classes) == (2, tuple((i, (i - 3) % 10) for i in range(10)))

    def judged(**options: Any) -> str:
        asked: dict[str, Any] = {"suspect": tmp_path / "theirs", "roots": authority.root}
        return adjudicate(tmp_path / "claim", out=tmp_path / "j", **asked, **options).verdict

    asked = read_json(tmp_path / "claim" / "claim.json")["answers"]["asked"]
    assert (asked["match"], asked["matched"]["ways"]) == (True, 2)
    assert judged() != "upheld"
    assert judged(match=True) == "upheld"
    assert read_json(tmp_path / "j.json")["asked"]["matched"] == asked["matched"]
    # Other clean examples could have been chosen to fit the coins.
    clean = load_key(tmp_path / "mine" / "key").clean
    assert clean is not None
    write_tensors(tmp_path / "claim" / "clean.safetensors", {"x": clean.x, "y": 9 - clean.y})
    with pytest.raises(CountermarkError, match=r"clean\.safetensors was changed"):
        judged(match=True)
    (tmp_path / "claim" / "clean.safetensors").unlink()
    assert judged(match=True) == "upheld"  # by the catalogue's examples of a data set that is known
