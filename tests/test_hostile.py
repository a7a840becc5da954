"""What a hostile environment does to the command line.

The tests have closed streams, full disks, odd names, edited files and signals.
"""

import os
import pty
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from countermark.cli import main
from countermark.data import Pools, known
from countermark.errors import CountermarkError
from countermark.files import (
    read_bytes,
    read_json,
    read_tensors,
    write_bytes,
    write_json,
    write_tensors,
)
from countermark.networks import load_model, save_model
from countermark.networks.named import build
from countermark.training import known_traits, recipe, train
from shorter import wait_for_epoch
from warm import COLD, warm


def shell(
    script: str, folder: Path, start: list[str] | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script; its commands begin as said, or in a warm process."""
    command = shlex.join(start or warm())
    whole = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    whole.pop(
        "PYTHONUNBUFFERED", None
    )  # what a stream could not take would not come up again at Python's end
    return subprocess.run(
        ["bash", "-c", script.replace("countermark ", f"{command} ")],
        cwd=folder,
        env=whole,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def one_line_of_two(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") <= 1, done.stderr


@pytest.mark.parametrize(
    "script",
    [
        "countermark verify --suspect {owner} --key {owner}/key >/dev/full",
        "countermark verify --suspect nope --key {owner}/key 2>/dev/full",
        "countermark verify --suspect nope --key {owner}/key 2>&-",
        "set -o pipefail; countermark verify --suspect {owner} --key {owner}/key | true",
        "ulimit -v 400000; countermark verify --suspect {owner} --key {owner}/key",
        "countermark protect --data digits --out d --devices 1000",
        "countermark protect --data digits --out d --epochs 1" + 400 * "0",
        "countermark verify --suspect {owner} --key ''",
        "countermark verify --suspect {owner} --suspect {owner} --key {owner}/key",
        "countermark data fetch mnist --cache {owner}/model.json",
        "countermark protect --data digits --out d --scheme ood --labels true",
        "countermark protect --data digits --out d --scheme none --watermark-epsilon 0.3",
        "countermark steal --victim {owner} --setting white --queries 5 --out d",
    ],
)
def test_a_verdict_is_never_mistaken_for_an_error(script: str, owner: Path, tmp_path: Path) -> None:
    """Status 1 is a verdict: whatever else goes wrong is status 2 and at most one line."""
    start = COLD if "ulimit" in script or "&-" in script or "nope" in script else None
    one_line_of_two(shell(script.format(owner=owner), tmp_path, start))
    assert not (tmp_path / "d").exists()


def test_a_verdict_is_the_status_of_a_real_process_and_of_a_warm_one(
    owner: Path, tmp_path: Path
) -> None:
    script = f"countermark verify --suspect {owner}/key/source --key {owner}/key --json"
    real, forked = shell(script, tmp_path, COLD), shell(script, tmp_path)
    assert (real.returncode, real.stderr) == (1, "")
    # The second one is another look.
    said = [re.sub(r'"looks": \{[^}]*\}', "", each.stdout) for each in (real, forked)]
    assert said[0] == said[1] != ""
    assert (forked.returncode, forked.stderr) == (real.returncode, real.stderr)


@pytest.mark.parametrize(
    "script",
    ["countermark plan >&-", "countermark plan 2>&-", "countermark plan --json >&- 2>&- <&-"],
)
def test_closed_streams_do_not_change_the_outcome(script: str, tmp_path: Path) -> None:
    assert shell(script, tmp_path, COLD).returncode == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8:strict"])
def test_names_that_the_terminal_cannot_show(encoding: str, owner: Path, tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe6\x97\xa5 bad\xff")).symlink_to(owner)
    start = (
        COLD if encoding == "ascii" else None
    )  # Python itself reads the variable; the warm process does as it does
    done = shell(
        f"countermark verify --suspect *bad* --key {owner}/key",
        tmp_path,
        start,
        PYTHONIOENCODING=encoding,
    )
    assert done.returncode == 0, done.stderr


def test_option_errors_are_plain_on_a_terminal(tmp_path: Path) -> None:
    """A terminal gets tyro's colours taken out, not turned into question marks."""
    leader, follower = pty.openpty()
    try:
        command = [*COLD, "verify", "--suspect", "m"]
        done = subprocess.run(
            command,
            stdout=follower,
            stderr=follower,
            stdin=follower,
            env={**os.environ, "TERM": "xterm-256color"},
            check=False,
        )
        said = os.read(leader, 65536).decode()
    finally:
        os.close(leader)
        os.close(follower)
    assert done.returncode == 2
    assert "--key" in said
    assert "\x1b" not in said
    assert "?" not in said


def test_a_full_log_does_not_stop_training(tmp_path: Path) -> None:
    done = shell(
        "countermark protect --data digits --scheme none --epochs 2 --out d 2>/dev/full", tmp_path
    )
    assert done.returncode == 0
    assert (tmp_path / "d" / "model.json").exists()


def test_a_refused_device_leaves_nothing_behind(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    one_line_of_two(shell("countermark protect --data digits --out d --device cuda", tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "status", "said"),
    [(signal.SIGTERM, 143, "stopped"), (signal.SIGINT, 130, "interrupted")],
)
def test_termination_is_orderly_and_takes_the_child_along(
    number: int, status: int, said: str, tmp_path: Path
) -> None:
    """A signal in the middle of training: one line, its status, and the same command goes on."""
    command = [
        *COLD,
        "protect",
        "--data",
        "digits",
        "--scheme",
        "none",
        "--out",
        str(tmp_path / "d"),
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert process.stderr is not None
    wait_for_epoch(2, tmp_path / "d.partial", process)
    process.send_signal(number)
    rest = process.stderr.read()
    assert process.wait(60) == status
    assert said in rest
    assert "Traceback" not in rest
    assert (tmp_path / "d.partial").is_dir()


@pytest.mark.parametrize(
    "change",
    [{"step": None}, {"step": "a"}, {"step": -5}, {"attack_steps": "x"}, {"records": [{"a": 1}]}],
)
def test_an_edited_checkpoint_is_refused(
    change: dict[str, object], tmp_path: Path, digits: Pools
) -> None:
    config = recipe(known_traits("digits"), "fast", known("digits").threat, epochs=1)
    path = tmp_path / "checkpoint"
    train(build("small", (1, 8, 8), 10, seed=0), digits.training, config, checkpoint=path)
    tensors, meta, _ = read_tensors(path, 1 << 30)
    meta |= change
    write_tensors(path, tensors, {name: value for name, value in meta.items() if value is not None})
    with pytest.raises(CountermarkError, match="delete it"):
        train(build("small", (1, 8, 8), 10, seed=0), digits.training, config, checkpoint=path)


def test_logits_that_are_not_finite_are_no_answer(owner: Path, tmp_path: Path) -> None:
    network, description = load_model(owner)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(3e38)
    save_model(tmp_path, network, description)
    done = shell(f"countermark verify --suspect . --key {owner}/key", tmp_path)
    one_line_of_two(done)
    assert "not finite" in done.stderr


@pytest.mark.parametrize(
    ("mask", "new"),
    [(0o000, 0o666), (0o002, 0o664), (0o022, 0o644), (0o027, 0o640), (0o077, 0o600)],
)
def test_new_files_follow_the_umask_and_replaced_ones_stay_as_they_are(
    mask: int, new: int, tmp_path: Path
) -> None:
    before = os.umask(mask)
    try:
        write_json(tmp_path / "a", {})
        write_bytes(tmp_path / "b", b"")
        write_tensors(tmp_path / "c", {})
        save_model(tmp_path, *load_model(Path(__file__).parent / "golden" / "0.1.0" / "mine"))
        assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {new}
        write_json(tmp_path / "secret", {}, 0o600)
        (tmp_path / "a").chmod(0o640)
        (tmp_path / "b").chmod(0o444)
        write_json(tmp_path / "a", {"again": 1})
        write_bytes(tmp_path / "b", b"again")
        write_json(tmp_path / "c", {}, 0o600)
    finally:
        os.umask(before)
    assert read_bytes(tmp_path / "b", 9) == b"again"
    modes = {
        name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a", "b", "c", "secret")
    }
    assert modes == {"a": 0o640, "b": 0o444, "c": 0o600, "secret": 0o600}


def test_no_json_is_written_that_could_not_be_read(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"x": "a" * 1000}, limit=2000)
    with pytest.raises(CountermarkError, match="nothing was written"):
        write_json(tmp_path / "a", {"x": "b" * 2000}, limit=2000)
    assert read_json(tmp_path / "a", limit=2000) == {"x": "a" * 1000}
    with pytest.raises(CountermarkError, match="larger than"):
        read_json(tmp_path / "a", limit=900)


def without_the_extra(folder: Path) -> str:
    """A folder for PYTHONPATH in whose presence nothing of the extra `serve` can be imported."""
    names = ("sqlalchemy", "psycopg", "starlette", "uvicorn", "prometheus_client", "h11")
    (folder / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({names}))\n"
    )
    return f"{folder}:{os.environ.get('PYTHONPATH', '')}"


def test_what_needs_the_extra_serve_says_so(tmp_path: Path) -> None:
    """One after the other in one process."""
    golden = Path(__file__).parent / "golden" / "0.1.0"
    mine, log = str(golden / "mine"), str(golden / "log.db")
    lines = [
        ["serve", mine, "--log", "x.db"],
        ["trace", "--suspect", mine, "--key", f"{mine}/key", "--log", log],
    ]
    lines += [["log", "check", log], ["log", "head", log]]
    script = (
        "from countermark.cli import main\n"
        f"for line in {lines!r}:\n    print(main(line), flush=True)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": without_the_extra(tmp_path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.split() == len(lines) * ["2"]
    said = done.stderr.splitlines()
    assert len(said) == len(lines), done.stderr
    assert all("pip install 'countermark[serve]'" in line for line in said)
    assert not (tmp_path / "x.db").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "--log is missing"),
        ("--unguarded --log x.db", "--log goes with a guard only"),
        ("--unguarded --head head.json", "--head goes with a guard only"),
        ("--unguarded --key mine/key", "--key goes with a guard only"),
    ],
)
def test_a_log_goes_with_a_guard_and_with_nothing_else(
    options: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(f"serve mine {options}".split()) == 2
    assert said in capsys.readouterr().err


def test_a_cost_that_buys_no_coin_proves_nothing(
    owner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(owner, tmp_path / "mine")
    assert main(["guard", str(tmp_path / "mine"), "--cost", "1e-9"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "nothing can be proven by natural queries" in said


def test_a_guard_is_calibrated_without_the_extra_serve(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(Path(__file__).parent / "golden" / "0.1.0" / "mine", mine)
    for name in ("guard.json", "commitment.json"):
        (mine / name).unlink()
    done = shell(
        "countermark guard mine --cost 2", tmp_path, COLD, PYTHONPATH=without_the_extra(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    assert (mine / "guard.json").exists()
