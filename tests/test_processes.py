"""Training in two processes on the CPU: how they are started, and what they share."""

import os
import pickle
import subprocess
import sys
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from torch import nn

from countermark import cli
from countermark.data import Examples, Rows
from countermark.device import torchrun_processes
from countermark.errors import CountermarkError
from countermark.evaluation import accuracy
from countermark.threat import Attack
from countermark.training import Hardware, TrainConfig, loop, open_hardware, train

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="two processes need fork")

CONFIG = TrainConfig(
    "fast",
    Attack(0.1, 1, 0.125),
    carry=True,
    average=0.9,
    push=0.05,
    epochs=2,
    batch_size=16,
    hardware=Hardware("cpu", 2, "32-true"),
)
TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0"}


def images(count: int, seed: int = 0) -> Examples:
    """Noise, brighter in the rows of its class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 4
    x = torch.randint(0, 128, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    for label in range(4):
        x[y == label, :, 2 * label : 2 * label + 2] += 64
    return Examples(x, y)


def network(seed: int = 0) -> nn.Module:
    """Batch norm remembers nothing but the last batch, which differs by process."""
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(4, momentum=1.0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([value.double().flatten() for value in model.state_dict().values()])


def joined_run(folder: str) -> None:
    """What each process of torchrun does in the test of it."""
    rank, model = os.environ["RANK"], network()
    records = train(model, images(64), CONFIG, validation=images(9, 1))
    with pytest.raises(CountermarkError) as refused:
        train(network(int(rank)), images(64), CONFIG)
    found = {"weights": weights(model), "records": records, "refused": str(refused.value)}
    Path(folder, rank).write_bytes(pickle.dumps(found))


def test_each_process_measures_a_part_and_the_figures_are_those_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def measured(model: nn.Module, part: Examples, _attack: Attack, *, seed: int) -> float:
        with (tmp_path / str(len(part))).open("a") as file:
            file.write(f"{weights(model).tolist()}\n")
        return accuracy(model, part)

    monkeypatch.setattr(loop, "adversarial_accuracy", measured)
    model, validation, marks = network(), images(33, 1), images(15, 2)
    config = replace(CONFIG, learning_rate=0.001, embedding="epoch")
    last = train(model, images(128), config, validation=validation, watermarks=marks)[-1]
    first, second = ((tmp_path / part).read_text().splitlines() for part in ("17", "16"))
    # Both measure the same network before the run, and the network and its average at each end.
    assert first == second
    assert len(set(first)) == 5
    assert last.accuracy == last.adversarial_accuracy == accuracy(model, validation)
    assert last.watermark_accuracy == accuracy(model, marks)
    assert 20 < accuracy(model, validation) < 80


def test_a_run_of_two_processes_resumes_within_an_epoch_to_the_very_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is interrupted in both epochs, and only the first process finds a checkpoint due."""
    data, validation = images(192), images(33, 1)
    undisturbed, resumed = network(), network()
    expected = train(undisturbed, data, CONFIG, validation=validation)
    step, rested = loop._step, tmp_path / "rested"
    monkeypatch.setattr(loop, "_TOLD", 4)

    def tiring(run: loop._Run, *arguments: object) -> torch.Tensor:
        first = run.fabric.global_rank == 0
        loop._CHECKPOINT_SECONDS = -1.0 if first else 1e9
        stop = 19 if rested.exists() else 7  # of 12 steps an epoch
        if first and run.step == stop:
            rested.touch()
            raise KeyError(f"after {loop.read_tensors(tmp_path / 'point', 1 << 30)[1]['step']}")
        return step(run, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "_step", tiring)
    for kept in (4, 16):
        with pytest.raises(CountermarkError, match=f"after {kept}"):
            train(network(), data, CONFIG, validation=validation, checkpoint=tmp_path / "point")
    monkeypatch.setattr(loop, "_step", step)
    records = train(resumed, data, CONFIG, validation=validation, checkpoint=tmp_path / "point")
    assert torch.equal(weights(resumed), weights(undisturbed))
    assert records == expected


def test_the_processes_of_torchrun_train_together(tmp_path: Path) -> None:
    """Both get what processes that are started for the run find; different weights are refused."""
    script = tmp_path / "script.py"
    script.write_text(f"import test_processes\ntest_processes.joined_run({str(tmp_path)!r})")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=here, timeout=300)
    assert done.returncode == 0, done.stderr
    model = network()
    records = train(model, images(64), CONFIG, validation=images(9, 1))
    for rank in ("0", "1"):
        found = pickle.loads((tmp_path / rank).read_bytes())
        assert found["records"] == records
        assert torch.equal(found["weights"], weights(model))
        assert "different weights, images or settings" in found["refused"]


def test_one_process_of_torchrun_does_the_work_of_a_verb(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The others end at once, and it forgets torchrun, to start processes of its own."""
    protect = ["protect", "digits", "--out", str(tmp_path / "out")]
    for name, value in (TORCHRUN | {"ROLE_ARN": "mine", "LOCAL_CACHE": "mine"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "1")
    assert cli.main(protect) == 0
    assert not any(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("RANK", "0")
    assert cli.main(protect) == 2
    assert "started 2 processes, and --devices is 1; give --devices 2" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert cli.main(protect) == 2
    assert "on several machines" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert torchrun_processes() == 2
    assert cli.main([*protect[:2], "--out", str(Path(__file__)), "--devices", "2"]) == 2
    assert "torchrun" not in capsys.readouterr().err
    assert torchrun_processes() == 0
    assert not set(TORCHRUN) & set(os.environ)
    assert os.environ["ROLE_ARN"] == os.environ["LOCAL_CACHE"] == "mine"


def test_devices_are_as_many_as_torchrun_started_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CountermarkError, match="started 2 processes for 3 devices"):
        open_hardware(Hardware("cpu", 3))


def test_processes_are_started_in_a_job_of_slurm_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fabric would refuse the job's tasks, or give all processes the number of one of them."""
    for name, value in {"NTASKS": "2", "PROCID": "0", "LOCALID": "0", "JOB_NAME": "mark"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for devices in (1, 2):
        assert open_hardware(Hardware("cpu", devices)).world_size == devices


def test_processes_get_images_by_path_or_in_shared_memory(tmp_path: Path) -> None:
    """A process that is spawned gets its examples through a pipe, and no pixels among them."""
    held = images(1000)
    (tmp_path / "images").write_bytes(held.x.numpy().tobytes())
    rows = Examples(Rows(tmp_path / "images", tuple(held.x.shape)), held.y)  # type: ignore[arg-type]
    for examples in (held, rows[10:], rows):
        assert len(ForkingPickler.dumps(examples)) < 2000
    again = pickle.loads(ForkingPickler.dumps(rows[10:]))
    assert torch.equal(again.x[:], held.x[10:])
