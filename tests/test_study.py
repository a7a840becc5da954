"""The study: its units, engines, numbers and page.

Units survive anything, engines agree, numbers match hand-made ones, and the page stands alone.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from archives import cifar, known_archive
from countermark.data import KNOWN, Pools, fetch, known
from countermark.errors import CountermarkError
from countermark.evaluation import accuracy
from countermark.files import read_json
from countermark.networks import build, load, load_model
from countermark.networks.cleaners import CLEANERS
from countermark.study import graph, work
from countermark.study import tables as tables_module
from countermark.study.graph import Unit, in_order
from countermark.study.grid import (
    DEFENCES,
    FINETUNED,
    MARKS,
    PROFILES,
    PRUNED,
    STUDIED,
    Cell,
    Computing,
    chosen,
    grid,
)
from countermark.study.markdown import BEYOND, markdown
from countermark.study.report import code_of, write_page, write_report
from countermark.study.results import (
    FIELDS,
    auc,
    estimate,
    measurements,
    where,
)
from countermark.study.run import Place, default_workers, do, run
from countermark.study.statements import Finding, Statement, Verdict, counted, statements
from countermark.study.store import Store
from countermark.study.tables import Table, paper_value, tables
from countermark.study.timing import pass_of, seconds
from countermark.thieves import REMOVALS, THEFTS, Removal
from countermark.threat import shown
from countermark.training import TrainConfig, known_traits, recipe, train
from countermark.verbs.reproduce import ReproduceConfig, _computing
from shorter import shorten
from warm import warm

pytest.importorskip("distributed")

TINY = replace(
    PROFILES["quick"],
    epochs={"digits": 2},
    queries=400,
    strangers=1,
    finetune_examples=64,
    budget_examples=64,
    amounts={"finetune": 1, "adversarial": 1},
)


def squares(options: work.Options, inputs: work.Inputs, folder: Path) -> work.Result:
    """A kind of unit for tests: the sum of its inputs' values and its own, written into a file."""
    if options.get("sleep"):
        time.sleep(options["sleep"])
    if options.get("fails"):
        raise CountermarkError("this unit fails")
    if tries := options.get("tries"):  # a folder in which every try leaves a file
        Path(tries, f"{options['value']}-{time.monotonic_ns()}").touch()
    if "lives" in options and len(list(Path(tries).iterdir())) <= options["lives"]:
        os.kill(os.getpid(), signal.SIGKILL)
    if name := options.get("raises"):
        raise {each.__name__: each for each in (torch.OutOfMemoryError, ZeroDivisionError)}[name](
            "of a driver"
        )
    value = options["value"] + sum(
        read_json(path / "result.json")["value"] for path in inputs.values()
    )
    (folder / "note.txt").write_text(str(value))
    return {"points": [], "value": value}


@pytest.fixture
def arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(work.KINDS, "squares", squares)  # type: ignore[misc]


def unit(value: int, *inputs: Unit, **options: object) -> Unit:
    return Unit(
        "squares",
        {"value": value, **options},
        {str(i): other for i, other in enumerate(inputs)},
        f"unit {value}",
    )


def pyramid() -> list[Unit]:
    leaves = [unit(k) for k in range(4)]
    return [
        *leaves,
        unit(10, *leaves[:2]),
        unit(20, *leaves[2:]),
        unit(30, unit(10, *leaves[:2]), unit(20, *leaves[2:])),
    ]


def running(units: list[Unit], folder: Path, **options: object) -> tuple[Store, int]:
    """Run the units that are not finished; return the store and how many are left."""
    store = Store(folder / "units")
    defaults: dict[str, object] = {
        "workers": 0,
        "scheduler": None,
        "cache": None,
        "log": folder / "log",
        "estimates": {},
        "device": "cpu",
    }
    todo = [unit for unit in units if not store.has(unit)]
    left = run(todo, store, finished=len(units) - len(todo), **{**defaults, **options})  # type: ignore[arg-type]
    return store, left


def run_all(units: list[Unit], folder: Path, **options: object) -> Store:
    """Run all units that are not finished."""
    store, left = running(units, folder, **options)
    assert left == 0
    return store


# --- units and their store ------------------------------------------------------------------------


def test_a_unit_is_named_by_all_that_its_result_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    one = unit(1)
    assert one.digest == unit(1).digest == Unit("squares", {"value": 1}, {}, "another title").digest
    names = {
        one.digest,
        unit(2).digest,
        unit(1, one).digest,
        unit(1, unit(2)).digest,
        Unit("cubes", {"value": 1}, {}, "").digest,
    }
    monkeypatch.setattr(graph, "code_version", lambda: "other code")
    names.add(unit(1).digest)
    assert len(names) == 6


def test_every_file_that_a_units_code_imports_names_it_or_is_plumbing() -> None:
    """What Python loads for the work is compared with what names its units.

    So no new package can be forgotten.
    """
    listing = """
import sys, countermark.study.work
ours = [module for name, module in sys.modules.items() if name.startswith("countermark.")]
print(*(module.__file__ for module in ours if getattr(module, "__file__", None)))
"""
    done = subprocess.run(
        [sys.executable, "-c", listing], capture_output=True, text=True, check=True
    )
    package = Path(graph.__file__).parents[1]
    loaded = {str(Path(path).relative_to(package)) for path in done.stdout.split()}
    named = set(graph.code_files())
    assert {path for path in loaded - named if path.split("/")[0] not in graph._PLUMBING} == set()
    assert {"fast/spectral.py", "fast/training.py", "attacks/asking.py", "study/work.py"} <= named
    for name in graph._PLUMBING:
        assert (package / name).exists()


def copied(folder: Path) -> Path:
    """A copy of the package, to be changed."""
    ignored = shutil.ignore_patterns("__pycache__")
    return shutil.copytree(Path(graph.__file__).parents[1], folder / "countermark", ignore=ignored)


@pytest.mark.parametrize(
    "changed", ["fast/spectral.py", "attacks/local.py", "thieves/steal.py", "study/work.py"]
)
def test_a_changed_line_of_a_units_code_makes_another_unit(changed: str, tmp_path: Path) -> None:
    package = copied(tmp_path)
    before = graph.code_version(package)
    assert before == graph.code_version()
    graph.code_version.cache_clear()
    with (package / changed).open("a") as stream:
        stream.write("\n# a comment changes nothing\n")
    assert graph.code_version(package) == before
    graph.code_version.cache_clear()
    with (package / changed).open("a") as stream:
        stream.write("\nANOTHER = 1\n")
    assert graph.code_version(package) != before
    graph.code_version.cache_clear()


def test_a_new_room_is_found_by_its_import(tmp_path: Path) -> None:
    """Absolute and relative imports, in functions too, of modules and of packages."""
    package = copied(tmp_path)
    for name, source in {
        "room/__init__.py": "from . import part",
        "room/part.py": "def late():\n    import countermark.other.deep",
        "other/__init__.py": "",
        "other/deep.py": "from ..third import thing",
        "third.py": "thing = 1",
    }.items():
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).write_text(source)
    with (package / "fast" / "spectral.py").open("a") as stream:
        stream.write("\nfrom countermark import room\n")
    new = set(graph.code_files(package)) - set(graph.code_files())
    assert new == {
        "room/__init__.py",
        "room/part.py",
        "other/__init__.py",
        "other/deep.py",
        "third.py",
    }


def test_comments_and_docstrings_are_not_code() -> None:
    one = 'def f(x):\n    """Say."""\n    return x + 1\n'
    same = 'def f(x):  # twice\n    """Say more."""\n\n    return (x + 1)\n'
    assert graph._meaning(one) == graph._meaning(same)
    assert graph._meaning(one) != graph._meaning(one.replace("1", "2"))
    below = ('STEPS = 3\n"""Of PGD."""\n', 'STEPS = 3\n"""How many\nsteps."""\n', "STEPS = 3\n")
    assert len({graph._meaning(code) for code in below}) == 1


def test_inputs_come_before_what_starts_from_them_and_each_once() -> None:
    order = in_order(pyramid())
    assert len(order) == 7
    place = {each.digest: i for i, each in enumerate(order)}
    assert all(
        place[other.digest] < place[each.digest] for each in order for other in each.inputs.values()
    )


def test_finished_units_are_never_run_again(
    tmp_path: Path, arithmetic: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = run_all(pyramid(), tmp_path)
    assert store.result(pyramid()[-1])["value"] == 66
    monkeypatch.setitem(work.KINDS, "squares", lambda *_: pytest.fail("ran again"))  # type: ignore[misc]
    run_all(pyramid(), tmp_path)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_a_damaged_unit_is_made_again(tmp_path: Path, arithmetic: None, damage: str) -> None:
    units = pyramid()
    store = run_all(units, tmp_path)
    folder = store.path(units[4])
    if damage == "truncate":
        (folder / "note.txt").write_text("")
    elif damage == "flip":
        (folder / "result.json").write_bytes(
            (folder / "result.json").read_bytes().replace(b"1", b"7")
        )
    elif damage == "remove":
        (folder / "result.json").unlink()
    else:
        (folder / "manifest.json").write_text("{}")
    assert not store.has(units[4])
    assert folder.exists()  # whoever only asks, as a plan does, removes nothing
    assert run_all(units, tmp_path).result(units[4])["value"] == 11


def test_a_unit_that_fails_stops_the_run_and_keeps_what_is_finished(
    tmp_path: Path, arithmetic: None
) -> None:
    good = unit(1)
    bad = unit(2, good, fails=True)
    with pytest.raises(CountermarkError, match="this unit fails"):
        run_all([good, bad, unit(3, bad)], tmp_path)
    assert Store(tmp_path / "units").has(good)


BROKEN = {
    "OutOfMemoryError": "unit 2: the device's memory does not suffice; let fewer",
    "ZeroDivisionError": "unit 2 failed with ZeroDivisionError: of a driver; what is finished",
}
"""What a unit may raise, and what is said of it."""


def run_into(name: str, folder: Path, **options: object) -> None:
    """A unit fails in the middle; what is finished is kept."""
    good = unit(1)
    bad = unit(2, good, raises=name)
    with pytest.raises(CountermarkError, match=BROKEN[name]):
        run_all([good, bad, unit(3, bad)], folder, **options)
    assert Store(folder / "units").has(good)


@pytest.mark.parametrize("name", BROKEN)
def test_a_device_that_fails_is_one_line(tmp_path: Path, arithmetic: None, name: str) -> None:
    run_into(name, tmp_path)


def test_a_store_of_another_release_or_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("mine")
    with pytest.raises(CountermarkError, match="no store"):
        Store(tmp_path / "a")
    Store(tmp_path / "b")
    (tmp_path / "b" / "store.json").write_text('{\n "format": "countermark store 9"\n}\n')
    with pytest.raises(CountermarkError, match="another release"):
        Store(tmp_path / "b")


def test_a_worker_with_other_code_refuses(tmp_path: Path, arithmetic: None) -> None:
    planned = unit(1)
    planned.record["code"] = "another version"
    with pytest.raises(CountermarkError, match="another version"):
        do(planned, Place(tmp_path / "units", None, "cpu"))


def test_a_worker_without_the_device_of_the_study_refuses(tmp_path: Path, arithmetic: None) -> None:
    """What is named after a GPU is never computed on a processor."""
    planned = unit(1, device="cuda")
    with pytest.raises(CountermarkError, match="computes on cpu, but this is a study on cuda"):
        do(planned, Place(tmp_path / "units", None, "cpu"))
    assert not Store(tmp_path / "units").has(planned)


def test_units_that_do_not_fit_into_the_time_are_left_and_made_later(
    tmp_path: Path, arithmetic: None
) -> None:
    """What starts from a unit that was left is left too, and the rest is finished."""
    units = pyramid()
    long = {units[0].digest: 3600.0}
    store, left = running(units, tmp_path, until=time.time() + 600, estimates=long)
    assert left == 3
    assert [store.has(unit) for unit in units] == [False, True, True, True, False, True, False]
    assert "the time is over: 4 of 7" in (tmp_path / "log").read_text()
    assert run_all(units, tmp_path).result(units[-1])["value"] == 66


def test_a_unit_that_waited_until_the_time_was_over_is_left(
    tmp_path: Path, arithmetic: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process held its folder; when that lets go there is no time left for it."""
    one, place = unit(1), Place(tmp_path / "units", None, "cpu", time.time() + 0.5)
    store = Store(tmp_path / "units")
    monkeypatch.setattr("countermark.study.run._POLL", 0.1)
    held = threading.Event()

    def hold(_folder: Path) -> dict[str, object]:
        held.set()
        time.sleep(1)
        raise CountermarkError("given up")

    def holding() -> None:
        with contextlib.suppress(CountermarkError):
            store.make(one, hold)

    holder = threading.Thread(target=holding)
    holder.start()
    held.wait()
    assert do(one, place, 0.3) is None
    holder.join()
    assert not store.has(one)


def test_stores_are_merged_by_copying(tmp_path: Path, arithmetic: None) -> None:
    """Units made on two machines, one of them copied by half, are one store."""
    units = pyramid()
    here, there = run_all(units[:2], tmp_path / "a"), run_all(units[2:4], tmp_path / "b")
    shutil.copytree(there.path(units[2]), here.path(units[2]))
    shutil.copytree(there.path(units[3]), here.path(units[3]))
    (here.path(units[3]) / "note.txt").unlink()
    assert [here.has(unit) for unit in units[:4]] == [True, True, True, False]
    assert run_all(units, tmp_path / "a").result(units[-1])["value"] == 66


def test_a_unit_that_is_copied_in_meanwhile_is_taken(
    tmp_path: Path, arithmetic: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines make the same unit, and the store of one is copied into that of the other."""
    first, one = run_all([unit(1)], tmp_path / "other"), unit(1)

    def overtaken(options: work.Options, inputs: work.Inputs, folder: Path) -> work.Result:
        result = squares(options, inputs, folder)
        shutil.copytree(first.path(one), tmp_path / "mine" / "units" / one.digest)
        return result

    monkeypatch.setitem(work.KINDS, "squares", overtaken)  # type: ignore[misc]
    assert run_all([one], tmp_path / "mine").result(one)["value"] == 1
    assert not list((tmp_path / "mine" / "units").glob("*.partial"))


WORKER = """
import sys, os
sys.path.insert(0, {tests!r})
from countermark.study import work
import test_study
work.KINDS["squares"] = test_study.squares
"""
"""What makes the units of these tests known to another process."""
ALONGSIDE = (
    WORKER
    + """
import time
from pathlib import Path
folder = Path({folder!r})
(folder / f"ready-{{os.getpid()}}").touch()
while len(list(folder.glob("ready-*"))) < 2:
    time.sleep(0.01)
test_study.run_all(test_study.tried(folder), folder)
"""
)


def tried(folder: Path) -> list[Unit]:
    leaves = [unit(k, sleep=0.2, tries=str(folder / "tries")) for k in range(4)]
    return [*leaves, unit(10, *leaves, tries=str(folder / "tries"))]


def test_two_processes_that_write_into_one_store_make_each_unit_once(tmp_path: Path) -> None:
    """They begin at once, with the store itself."""
    (tmp_path / "tries").mkdir()
    code = ALONGSIDE.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    both = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    values = sorted(path.name.split("-")[0] for path in (tmp_path / "tries").iterdir())
    assert values == ["0", "1", "10", "2", "3"]
    assert Store(tmp_path / "units").result(tried(tmp_path)[-1])["value"] == 16


# --- engines --------------------------------------------------------------------------------------


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A real scheduler and two workers on loopback, as on a cluster."""
    preload = tmp_path / "preload.py"
    preload.write_text(WORKER.format(tests=str(Path(__file__).parent)))
    address = tmp_path / "scheduler.json"
    common = {
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
        "env": {**os.environ, "OMP_NUM_THREADS": "1"},
    }
    command = [
        sys.executable,
        "-m",
        "distributed.cli.dask_scheduler",
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--no-dashboard",
    ]
    processes = [subprocess.Popen([*command, "--scheduler-file", str(address)], **common)]  # type: ignore[call-overload]
    workers: list[subprocess.Popen[bytes]] = []
    try:
        while not address.exists():
            time.sleep(0.1)
        for _ in range(2):
            worker = [
                sys.executable,
                "-m",
                "distributed.cli.dask_worker",
                "--scheduler-file",
                str(address),
                "--nthreads",
                "1",
                "--no-nanny",
            ]
            workers.append(
                subprocess.Popen([*worker, "--no-dashboard", "--preload", str(preload)], **common)
            )  # type: ignore[call-overload]
        yield json.loads(address.read_text())["address"], workers
    finally:
        for process in (*workers, *processes):
            process.kill()
            process.wait()


def test_a_cluster_that_loses_a_worker_finishes_with_the_same_numbers(
    tmp_path: Path, arithmetic: None, scheduler: tuple[str, list[subprocess.Popen[bytes]]]
) -> None:
    """One of two workers gets SIGKILL while it works; the other does what is left."""
    address, workers = scheduler
    leaves = [unit(k, sleep=0.7) for k in range(6)]
    units = [*leaves, unit(100, *leaves)]

    def kill_one_at_work() -> None:
        while not any((tmp_path / "units").glob("*/result.json")):
            time.sleep(0.02)
        workers[0].kill()

    killer = threading.Thread(target=kill_one_at_work, daemon=True)
    killer.start()
    store = run_all(units, tmp_path, scheduler=address)
    killer.join()
    assert workers[0].wait() == -signal.SIGKILL
    assert store.result(units[-1])["value"] == 115
    there = {
        path.name: (path / "result.json").read_bytes()
        for path in (tmp_path / "units").iterdir()
        if (path / "result.json").exists()
    }
    here = run_all(units, tmp_path / "again").folder
    assert there == {
        path.name: (path / "result.json").read_bytes()
        for path in here.iterdir()
        if (path / "result.json").exists()
    }


@pytest.fixture
def preloaded(tmp_path: Path) -> Iterator[None]:
    """Local workers know the units of these tests."""
    import dask

    (tmp_path / "preload.py").write_text(WORKER.format(tests=str(Path(__file__).parent)))
    with dask.config.set({"distributed.worker.preload": [str(tmp_path / "preload.py")]}):
        yield


def test_a_local_process_that_is_killed_is_replaced(tmp_path: Path, preloaded: None) -> None:
    (tmp_path / "tries").mkdir()
    units = [unit(1), unit(2, tries=str(tmp_path / "tries"), lives=1)]
    assert run_all([*units, unit(3, *units)], tmp_path, workers=2).result(units[1])["value"] == 2
    assert len(list((tmp_path / "tries").iterdir())) == 2


def test_a_unit_whose_process_is_killed_every_time_is_one_line(
    tmp_path: Path, preloaded: None
) -> None:
    (tmp_path / "tries").mkdir()
    good = unit(1)
    bad = unit(2, good, tries=str(tmp_path / "tries"), lives=1000)
    with pytest.raises(
        CountermarkError, match="unit 2: the processes that were to do it were killed"
    ):
        run_all([good, bad], tmp_path, workers=2)
    assert Store(tmp_path / "units").has(good)


def test_a_cluster_takes_units_in_their_order_and_leaves_what_does_not_fit(
    tmp_path: Path, arithmetic: None, scheduler: tuple[str, list[subprocess.Popen[bytes]]]
) -> None:
    units = [unit(k, sleep=0.3) for k in range(8)]
    run_all(units, tmp_path / "order", scheduler=scheduler[0])
    told = (tmp_path / "order" / "log").read_text()
    first = [int(each) for each in re.findall(r"\] unit (\d)", told)][:2]
    assert max(first) < 4
    units = pyramid()
    limits = {"until": time.time() + 600, "estimates": {units[0].digest: 3600.0}}
    store, left = running(units, tmp_path / "left", scheduler=scheduler[0], **limits)
    assert left == 3
    assert [store.has(unit) for unit in units] == [False, True, True, True, False, True, False]


def test_a_device_that_fails_on_a_cluster_is_one_line(
    tmp_path: Path, arithmetic: None, scheduler: tuple[str, list[subprocess.Popen[bytes]]]
) -> None:
    """So is a cluster whose workers lack the device of the study."""
    for name in BROKEN:
        run_into(name, tmp_path / name, scheduler=scheduler[0])
    with pytest.raises(CountermarkError, match="unit 5: there is no cuda device here"):
        run_all([unit(5, device="cuda")], tmp_path / "c", scheduler=scheduler[0], device="cuda")


def test_a_scheduler_that_does_not_answer_is_an_error(
    tmp_path: Path, arithmetic: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("countermark.study.run._CONNECT", 1)
    with pytest.raises(CountermarkError, match="no Dask scheduler"):
        run_all([unit(1)], tmp_path, scheduler="tcp://127.0.0.1:9")


# --- the grid -------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES)
def test_the_grid_has_every_cell(profile: str) -> None:
    cells = grid(("mnist", "fashion_mnist"), PROFILES[profile], "clean")
    seeds = range(PROFILES[profile].seeds)
    for data in ("mnist", "fashion_mnist"):
        places = [cell.place for cell in cells if cell.place["data"] == data]
        wanted = {
            (s, d, t, r)
            for s in seeds
            for d in DEFENCES
            for t in ("white-box", "black-box", "grey-box")
            for r in ("pruned", "fine-tuned")
        }
        removed = [place for place in places if place["section"] == "removal"]
        assert {(p["seed"], p["defence"], p["setting"], p["removal"]) for p in removed} == wanted
        beyond = {
            place["removal"] if place["removal"] != "none" else place["setting"]
            for place in places
            if place["section"] == "beyond"
        }
        named = {
            "natural",
            "distilled",
            "robust",
            "robust by uncertain queries",
            "int8",
            "noise",
            "adversarially fine-tuned",
            "overwritten",
            "reshaped",
            "flattened",
            "pruned, then fine-tuned",
        }
        assert named | {f"cleaner: {name}" for name in CLEANERS} == beyond
        rows = [*THEFTS.values(), *REMOVALS.values()]
        assert {row.title for row in rows if not row.paper} | {"pruned, then fine-tuned"} == beyond
    assert pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]) == PRUNED
    assert max(FINETUNED) == 40


def test_every_cell_has_a_name_of_its_own_and_patterns_choose_by_it() -> None:
    cells = grid(("mnist", "fashion_mnist"), PROFILES["standard"], "clean")
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    parts = {"clean": cells, "as-published": []}
    assert chosen(parts, ("*",)) == parts
    wanted = chosen(parts, ("mnist/[01]/ADVTR+coin/*-box/none", "*/strict"))["clean"]
    assert {cell.name for cell in wanted if cell.place["section"] == "model"} == {
        f"mnist/{seed}/ADVTR+coin/{theft}-box/none"
        for seed in (0, 1)
        for theft in ("white", "black", "grey")
    }
    assert {cell.place["defence"] for cell in wanted if cell.place["section"] == "strict"} == {
        "ADVTR", "ADVTR+ood", "ADVTR+adversarial", "ADVTR+coin", "ADVTR, trained on",
    }  # fmt: skip
    with pytest.raises(CountermarkError, match="matches nothing of this study"):
        chosen(parts, ("mnist/*", "cifar10/*"))


def test_what_the_script_for_a_gpu_asks_for_is_in_the_study() -> None:
    """`benchmarks/paper_gpu.sh`: the rows of ADVTR without and with each mark, nothing else."""
    script = (Path(__file__).parents[1] / "benchmarks" / "paper_gpu.sh").read_text()
    patterns = re.findall(r"'(\*/[^']+)'", script)
    assert len(patterns) == 5
    for profile in ("standard", "paper"):
        cells = {"clean": grid(("mnist",), PROFILES[profile], "clean")}
        found = chosen(cells, patterns)["clean"]
        sections = {cell.place["section"] for cell in found}
        assert sections == {"model", "strict", "strangers"}
        defences = {cell.place["defence"] for cell in found if "defence" in cell.place}
        assert defences == {"ADVTR", *(f"ADVTR+{scheme}" for scheme in MARKS)}
        stolen = {cell.place["setting"] for cell in found if cell.place["section"] == "model"}
        assert stolen == {"white-box", "black-box", "grey-box"}


def test_a_study_begins_with_the_tables_that_a_reader_asks_for() -> None:
    """All owners' models come first, then their copies, then what strangers answer."""
    cells = grid(("mnist", "fashion_mnist"), PROFILES["standard"], "clean")
    sections = [(cell.place["section"], cell.place.get("setting")) for cell in cells]
    own = sections.index(("model", "black-box"))
    assert {cell.place["data"] for cell in cells[:own]} == {"mnist", "fashion_mnist"}
    assert {setting for _, setting in sections[:own]} == {"white-box"}
    strangers = sections.index(("strangers", None))
    assert {section for section, _ in sections[:strangers]} == {"model"}
    assert "model" not in {section for section, _ in sections[strangers:]}


def test_device_and_precision_are_in_the_name_of_every_unit() -> None:
    """Each unit of a study on a GPU, or in bf16, is another unit than that of float32."""

    def digests(*computing: str) -> set[str]:
        cells = grid(("digits",), TINY, "clean", computing=Computing(*computing))
        return {unit.digest for unit in in_order(cell.unit for cell in cells)}

    plain = digests("cpu", "32-true")
    assert plain == digests()
    for other in (digests("cuda", "32-true"), digests("cpu", "bf16-mixed")):
        assert not plain & other
        assert len(other) == len(plain)


def test_the_profile_paper_steals_as_the_paper_says() -> None:
    """51,200 queries, 10 epochs of batches of 32 at 0.005; the grey-box thief trains against PGD.

    As published, that of Fashion-MNIST takes the budget of MNIST.
    """
    paper = {"queries": 51_200, "epochs": 10, "batch_size": 32, "learning_rate": 0.005}
    for protocol, budget in (("clean", 0.15), ("as-published", 0.25)):
        cells = {
            cell.name: cell
            for cell in grid(("mnist", "fashion_mnist"), PROFILES["paper"], protocol)
        }
        for data, wanted in (("mnist", 0.25), ("fashion_mnist", budget)):
            for setting, network in (("black", "surrogate"), ("grey", "paper")):
                options = cells[f"{data}/0/ADVTR+adversarial/{setting}-box/none"].unit.options
                assert options["means"] == paper
                assert (options["network"], options["thief_objective"]) == (network, "pgd")
                assert options["epsilon"] == wanted


def test_the_profile_paper_trains_owners_and_strangers_as_table_6_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """SGD at a constant 0.005 for 100 epochs, marks by Algorithm 1; our coins get in afterwards."""
    trained: list[TrainConfig] = []

    def watch(
        _network: nn.Module, _training: object, config: TrainConfig, **options: object
    ) -> None:
        trained.append(config)
        assert (options["watermarks"] is not None) == ("watermarks" in asked)

    key = SimpleNamespace(
        watermarks=SimpleNamespace(x=torch.zeros(2, 1, 8, 8)),
        labels=torch.zeros(2, dtype=torch.int64),
        scheme="any",
    )
    monkeypatch.setattr(work, "train", watch)
    monkeypatch.setattr(work, "_load", lambda _folder: build("paper", (1, 8, 8), 10, seed=0))
    monkeypatch.setattr(work, "_key", lambda inputs: key if "watermarks" in inputs else None)
    monkeypatch.setattr(work, "_measured", lambda *_: {})
    monkeypatch.setattr(work._Best, "restore", lambda *_: None)
    assert known_traits("mnist").batch_size == 128
    batch = known_traits("digits").batch_size  # of so few images, less
    profile = replace(PROFILES["paper"], seeds=1, strangers=1, sweep=0)
    for protocol in ("clean", "as-published"):
        units = in_order(cell.unit for cell in grid(("digits",), profile, protocol))
        for unit in (unit for unit in units if unit.kind == "model"):
            asked = dict.fromkeys(unit.inputs, tmp_path)
            folder = tmp_path / protocol / unit.digest
            folder.mkdir(parents=True)
            trained.clear()
            work.train_model(unit.options, asked, folder)
            (config,) = trained
            ours = "coin" in unit.title or "trained on" in unit.title
            robust = "robust" in unit.title or "ADVTR" in unit.title
            assert (config.attack is not None) == robust == (config.objective == "pgd"), unit.title
            assert (config.learning_rate, config.schedule) == (0.005, "constant")
            assert (config.momentum, config.weight_decay, config.nesterov) == (0.9, 5e-4, False)
            assert (config.batch_size, config.dropout) == (batch, True)
            told = (config.epochs, config.embedding, "start" in asked)
            assert told == ((50, "interleaved", True) if ours else (100, "epoch", False))
            assert config.craft_in_training_mode == (robust and protocol == "as-published")


def test_a_row_of_the_table_is_all_that_the_study_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new removal has its cell, its unit, its estimate and its result, with no other change."""
    own = Removal(
        "halved",
        "halve all weights",
        REMOVALS["noise"].amount,
        lambda network, _amount, _means: network,
    )
    monkeypatch.setitem(REMOVALS, "halve", own)  # type: ignore[misc]
    cells = grid(("digits",), TINY, "clean")
    cell = next(cell for cell in cells if cell.place.get("removal") == "halved")
    assert cell.unit.options["removals"] == [["halve", 0.3]]
    assert seconds(cell.unit, {("small", (1, 8, 8), 128): 1e-6}) > 0


def test_every_known_data_set_can_be_studied() -> None:
    """Its sweep begins on the side of the statement that conflicts, and has the other side too."""
    assert set(STUDIED) == set(KNOWN)
    assert {data for data in STUDIED if STUDIED[data].paper} == {"mnist", "fashion_mnist"}
    for data, studied in STUDIED.items():
        threat = KNOWN[data].threat
        first, *others = studied.sweep
        assert first <= threat.epsilon + 0.01 < max(others)
        assert threat.watermark_epsilon not in studied.sweep
        for profile in PROFILES.values():
            cells = grid((data,), profile, "clean", seeds=1)
            swept = {cell.place["budget"] for cell in cells if cell.place["section"] == "sweep"}
            assert swept == set(studied.sweep[: profile.sweep])
            passes = {pass_of(unit) for unit in in_order(cell.unit for cell in cells)}
            assert {shape for _, shape, _ in passes} == {KNOWN[data].shape}
            assert ("narrow" in {name for name, _, _ in passes}) == (data == "cifar10")
            thefts = {unit for unit in in_order(c.unit for c in cells) if unit.kind == "theft"}
            wanted = {unit.options["means"].get("batch_size", 128) for unit in thefts}
            assert {batch for _, _, batch in map(pass_of, thefts)} == wanted
            speed = dict.fromkeys(passes, 1e-6)
            assert all(seconds(cell.unit, speed) > 0 for cell in cells)


def test_a_study_of_colour(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An owner, thefts, other budgets and pictures in colour, on an archive like CIFAR-10's."""
    pools = {"validation": 20, "bases": 160, "thief": 120}
    archive = known_archive(monkeypatch, tmp_path, cifar(100), records=100, pools=pools)
    fetch("cifar10", archive, tmp_path / "cache")
    shorten(monkeypatch, "marking", 1, work)
    profile = replace(TINY, epochs={"cifar10": 1}, queries=200, attack_copies=8, budget_examples=8)
    wanted = ("*/ADVTR+coin/white-box/none", "*/ADVTR+coin/black-box/none", "*/budgets", "*/pict*")
    cells = chosen({"clean": grid(("cifar10",), profile, "clean")}, wanted)
    units = in_order(cell.unit for cell in cells["clean"])
    store = run_all(units, tmp_path, cache=tmp_path / "cache")
    write_report(tmp_path, cells, store, {BEYOND: "CIFAR-10"})
    told = (tmp_path / "results.md").read_text()
    assert "The paper has no CIFAR-10" in told
    for epsilon, steps in STUDIED["cifar10"].budgets:
        assert f"| CIFAR-10 | budget {shown(epsilon)}, {steps} steps of 0.01 |" in told
    (picture,) = (tmp_path / "figures").glob("figure6*")
    assert "watermark at 32/255" in picture.read_text()
    described = load_model(store.path(next(unit for unit in units if "ADVTR+coin" in unit.title)))[
        1
    ]
    assert described.network == "narrow"


def test_every_watermark_set_is_asked_of_strangers() -> None:
    """Each set that a model was marked with is also asked of models that never saw it.

    No stranger was made with its coins.
    """
    cells = grid(("mnist",), PROFILES["standard"], "clean")
    marked = {
        cell.unit.inputs["watermarks"].digest
        for cell in cells
        if "watermarks" in cell.unit.inputs and cell.unit.kind == "model"
    }
    asked = {
        cell.unit.inputs["watermarks"].digest: cell.unit
        for cell in cells
        if cell.unit.kind == "strangers"
    }
    assert marked <= asked.keys()
    for strangers in asked.values():
        for role, stranger in strangers.inputs.items():
            if role != "watermarks":
                assert not [each for each in in_order([stranger]) if each.kind == "watermarks"]


def test_protocols_differ_where_the_published_runs_did(digits: object) -> None:
    options = {"data": "digits", "pool_seed": 0, "protocol": "clean"}
    clean, published = (
        work.pools_of(options),
        work.pools_of({**options, "protocol": "as-published"}),
    )
    test = {bytes(x.numpy().tobytes()) for x in clean.test.x}
    assert not test & {bytes(x.numpy().tobytes()) for x in clean.bases.x}
    assert {bytes(x.numpy().tobytes()) for x in published.bases.x} <= test
    assert {bytes(x.numpy().tobytes()) for x in published.thief.x[:80]} <= test


def test_crafting_in_training_mode_lets_batch_statistics_move(digits: Pools) -> None:
    """The published code crafts with batch norm in training mode.

    Its running statistics then see crafted batches twice.
    """
    config = recipe(known_traits("digits"), "fast", known("digits").threat, epochs=1)
    statistics = []
    for live in (False, True):
        network = build("paper", (1, 8, 8), 10, seed=0)
        train(network, digits.training, replace(config, craft_in_training_mode=live))
        statistics.append(int(network.state_dict()["4.num_batches_tracked"]))
    assert statistics[1] == 2 * statistics[0]


def test_the_published_protocol_picks_its_epoch_on_the_test_set(
    digits: Pools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = work._Best.__call__

    def watching(self: work._Best, epoch: int, network: nn.Module) -> None:
        original(self, epoch, network)
        robust = work.adversarial_accuracy(
            network, digits.test, known("digits").threat.attack, precision="32-true"
        )
        seen.append(
            (
                accuracy(network, digits.test) + robust,
                {n: v.clone() for n, v in network.state_dict().items()},
            )
        )

    monkeypatch.setattr(work._Best, "__call__", watching)
    options = {
        "data": "digits",
        "pool_seed": 0,
        "protocol": "as-published",
        "objective": "fast",
        "network": "small",
        "robust": True,
        "selection": None,
        "device": "cpu",
        "precision": "32-true",
    }
    work.train_model({**options, "seed": 0, "epochs": 6, "attacked": 0}, {}, tmp_path)
    best = max(seen, key=lambda entry: entry[0])[1]
    assert len(seen) == 6
    assert all(
        torch.equal(value, best[name]) for name, value in load(tmp_path).state_dict().items()
    )


# --- numbers --------------------------------------------------------------------------------------


def test_statistics_against_known_values() -> None:
    assert auc([3.0, 4.0], [1.0, 2.0]) == 1.0
    assert auc([1.0, 2.0], [1.0, 2.0]) == 0.5
    assert auc([], [1.0]) is None
    rows = [{"test": value, "unit": str(value)} for value in (1.0, 2.0, 3.0)]
    found = estimate(rows, "test")
    assert found is not None
    assert (found.mean, round(found.half or 0, 3)) == (2.0, 2.484)  # 4.3027 / sqrt(3)
    assert estimate(rows[:1], "test").half is None  # type: ignore[union-attr]


def test_published_numbers() -> None:
    assert paper_value("table1_single_defence", "advtr.adv", "mnist") == 92.82
    assert paper_value("table4_grey_box_theft", "adversarial.watermark", "fashion_mnist") == 60
    assert paper_value("table1_single_defence", "advtr.adv", "digits") is None


# --- a real, tiny study ---------------------------------------------------------------------------


def tiny_grid() -> list[Cell]:
    """A part of the grid that has every kind of cell."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "countermark.study.grid.DEFENCES",
            ("none", "ADVTR", "ADVTR+ood", "ADVTR+adversarial", "ADVTR+coin"),
        )
        patch.setattr("countermark.study.grid.PRUNED", (0.5, 0.7, 0.8))
        patch.setattr("countermark.study.grid.FINETUNED", (1, 3))
        return grid(("digits",), TINY, "clean")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Cell]], Store]:
    """One owner on digits with next to no training: all cells, and the report of them.

    Both protocols' code paths for a marked model are run. Two workers begin. The rest is done here,
    where the training with watermarks can be shortened.
    """
    out = tmp_path_factory.mktemp("study")
    cells = {"clean": tiny_grid()}
    units = in_order(cell.unit for cell in cells["clean"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("countermark.study.run._POLL", 0.1)
        shorten(patch, "marking", 2, work)
        run_all(
            [unit for unit in units if unit.kind == "model" and not unit.inputs], out, workers=2
        )
        store = run_all(units, out)
    write_report(out, cells, store, {"profile": "tiny"})
    return out, cells, store


def test_the_report_is_the_same_for_the_same_units(
    study: tuple[Path, dict[str, list[Cell]], Store], tmp_path: Path
) -> None:
    out, cells, store = study
    write_report(tmp_path, cells, store, {"profile": "tiny"})
    for path in sorted(out.rglob("*")):
        if path.is_file() and "units" not in path.parts and path.name != "log":
            assert (tmp_path / path.relative_to(out)).read_bytes() == path.read_bytes(), path


def test_every_number_names_the_unit_it_came_from(
    study: tuple[Path, dict[str, list[Cell]], Store],
) -> None:
    out, _, store = study
    results = json.loads((out / "results.json").read_text())
    rows = results["measurements"]["clean"]
    assert len(rows) > 150
    assert all((store.folder / row["unit"] / "result.json").is_file() for row in rows)
    for table in results["tables"]["clean"]:
        if table["name"] != "table6":
            assert all(units for units in table["units"]), table["name"]
    assert {table["name"] for table in results["tables"]["clean"]} >= {
        "table1", "table2", "table3", "table4", "table5", "marks", "pruned", "fine-tuned",
        "strangers", "separation", "beyond", "sweep",
    }  # fmt: skip


def test_the_tables_say_what_the_measurements_say(
    study: tuple[Path, dict[str, list[Cell]], Store],
) -> None:
    _, cells, store = study
    rows = measurements(cells["clean"], store, "clean")
    by_name = {table.name: table for table in tables(rows)}
    coin = where(rows, section="model", defence="ADVTR+coin", setting="white-box", removal="none")
    (line,) = [row for row in by_name["marks"].rows if row[1:3] == ("ADVTR+coin", "white-box")]
    assert [line[3], line[5], line[9]] == [
        round(coin[0][metric], 2) for metric in ("test", "adversarial", "watermark")
    ]
    (strict,) = where(rows, section="strict", defence="ADVTR+coin")
    assert line[7] == round(strict["strict"], 2)
    scores = sorted(
        row["watermark"] for row in where(rows, section="strangers", scheme="adversarial")
    )
    (line,) = [row for row in by_name["strangers"].rows if row[1] == "adversarial"]
    assert (line[2], line[4]) == (round(scores[0], 2), round(scores[-1], 2))
    assert line[5].startswith(f"{sum(score >= 50 for score in scores)} of {len(scores)}")


def test_a_claim_is_judged_by_its_numbers(study: tuple[Path, dict[str, list[Cell]], Store]) -> None:
    """The control must fall if one stranger scores as high as the thief, whatever that score is."""
    _, cells, store = study
    rows = measurements(cells["clean"], store, "clean")
    thief = where(
        rows, section="model", defence="ADVTR+adversarial", setting="black-box", removal="none"
    )[0]
    strangers = where(rows, section="strangers", scheme="adversarial")
    for highest, holds in ((60.0, True), (90.0, False)):
        thief["watermark"] = 80.0
        for stranger in strangers:
            stranger["watermark"] = 10.0
        strangers[-1]["watermark"] = highest
        judged = {each.text: each for each in statements({"clean": rows})}
        (control,) = [
            claim for text, claim in judged.items() if "from strangers (black-box)" in text
        ]
        assert control.findings["clean"].holds is holds
        assert control.verdict == f"{'holds' if holds else 'does not hold'} under clean"


def test_seeds_that_disagree_leave_a_statement_undecided() -> None:
    """With several owners a statement is judged by its interval, and with one by its value."""

    def verdicts(*pairs: tuple[float, float]) -> dict[str, str]:
        rows = [
            {**dict.fromkeys(FIELDS), "section": "model", "data": "mnist", "seed": seed,
             "defence": defence, "setting": "white-box", "removal": "none", "unit": "u",
             "adversarial": value}
            for seed, pair in enumerate(pairs)
            for defence, value in zip(("ADVTR", "ADVTR+coin"), pair, strict=True)
        ]  # fmt: skip
        return {each.text: each.findings["clean"].verdict for each in statements({"clean": rows})}

    cheap = "Ours: a model with coins has at most a point less adversarial accuracy than the "
    cheap += "unmarked one."
    reached = "Adversarial training reaches the paper's adversarial accuracy."
    assert verdicts((94.0, 93.5))[cheap] == "holds"
    assert verdicts((94.0, 92.5))[cheap] == "does not hold"
    assert verdicts((94.0, 93.5), (94.2, 93.6), (93.9, 93.5))[cheap] == "holds"
    assert verdicts((94.0, 92.5), (94.2, 92.6), (93.9, 92.5))[cheap] == "does not hold"
    assert verdicts((94.0, 93.6), (94.2, 92.6), (93.9, 93.5))[cheap] == "is undecided"
    # The cost is judged owner by owner, however different the owners are.
    assert verdicts((80.0, 79.5), (95.0, 94.6), (90.0, 89.5))[cheap] == "holds"
    assert verdicts((80.0, 79.5), (95.0, 94.6), (90.0, 89.5))[reached] == "is undecided"


def test_data_that_the_paper_lacks_cannot_overturn_what_it_says() -> None:
    """The paper's statements are judged on its data sets, ours on all."""

    def verdicts(*data_sets: str) -> dict[str, Finding]:
        rows = [
            {**dict.fromkeys(FIELDS), "section": "model", "data": data, "seed": 0,
             "defence": defence, "setting": "white-box", "removal": "none", "unit": "u",
             "adversarial": 90.0 - lost * (data == "cifar10")}
            for data in data_sets
            for defence, lost in (("ADVTR", 0.0), ("ADVTR+adversarial", 9.0), ("ADVTR+coin", 9.0))
        ]  # fmt: skip
        return {each.text: each.findings["clean"] for each in statements({"clean": rows})}

    theirs = "Adversarial watermarks cost at most about five points of adversarial accuracy."
    ours = "Ours: a model with coins has at most a point less adversarial accuracy than the "
    ours += "unmarked one."
    both = verdicts("mnist", "cifar10")
    assert (both[theirs].verdict, both[ours].verdict) == ("holds", "does not hold")
    assert "CIFAR-10 (not judged): 90.00 without, 81.00 with" in both[theirs].told
    assert verdicts("cifar10")[theirs].verdict == "does not hold"


def test_table_6_has_the_settings_of_data_that_the_paper_lacks() -> None:
    content = tables_module.published()["table6_hyperparameters"]
    names = [*content["columns"], *content["training"]]
    settings = {data: {name: f"{data} {name}" for name in names} for data in ("mnist", "cifar10")}
    made = tables_module.hyperparameters(settings)
    told = {(data, name): (paper, ours) for data, name, paper, ours in made.rows}
    assert len(told) == len(made.rows) == 2 * len(names)
    assert told["MNIST", "epochs"] == ("100", "mnist epochs")
    assert told["MNIST", "advtr.epsilon"] == ("0.25", "mnist advtr.epsilon")
    assert told["CIFAR-10", "epochs"] == ("", "cifar10 epochs")


def test_the_count_of_statements_counts_each_once() -> None:
    def statement(*verdicts: Verdict) -> Statement:
        found = zip(("clean", "as-published"), verdicts, strict=False)
        return Statement("It is.", {name: Finding(word, "1") for name, word in found}, False)

    judged = [
        statement("holds", "holds"),
        statement("holds", "was not measured"),
        statement("holds", "does not hold"),
        statement("does not hold", "is undecided"),
        statement("does not hold", "does not hold"),
        statement("was not measured", "was not measured"),
    ]
    assert counted(judged) == (
        "Of 5 statements 2 hold wherever measured, 1 under one protocol only, "
        "1 is undecided and 1 nowhere."
    )
    assert counted(judged[-1:]) == "No statement was measured."
    assert judged[0].verdict == "holds under clean and as-published"
    assert judged[3].verdict == "does not hold under clean; is undecided under as-published"


def test_the_markdown_shows_pictures_and_leads_to_the_numbers(
    study: tuple[Path, dict[str, list[Cell]], Store],
) -> None:
    out, _, _ = study
    text = (out / "results.md").read_text()
    links = set(re.findall(r"\]\(([^)]+)\)", text))
    assert {link for link in links if link.endswith(".svg")} == {
        f"figures/{name}-clean.svg" for name in ("pruned", "fine-tuned", "p_values")
    }
    assert {f"tables/{path.name}" for path in (out / "tables").glob("*.csv")} - links == {
        "tables/measurements.csv"
    }
    assert all((out / link).is_file() for link in links)


def test_a_table_has_both_protocols_side_by_side() -> None:
    """A column that says the same under both is written once, and an empty one is left out."""

    def page(columns: tuple[str, ...], **rows: tuple[tuple[object, ...], ...]) -> list[str]:
        made = {
            protocol.replace("_", "-"): [
                Table("t", "T", "", ("data", *columns), 1, part, ((),) * len(part))
            ]
            for protocol, part in rows.items()
        }
        told = {"clean": Finding("holds", "1"), "as-published": Finding("does not hold", "2")}
        statement = Statement("It holds.", told, True)
        text = markdown("All hold.", [statement], made, dict.fromkeys(made, ()), {}, "make it")
        assert "| **It holds.** | holds. 1 | **does not hold**. 2 |" in text
        return [line for line in text.split("### T")[1].splitlines() if line.startswith("|")]

    assert page(
        ("paper", "ours", "ours ±", "seeds"),
        clean=(("a", 1.0, 2.0, None, 1), ("b", 5.0, 3.0, None, 1)),
        as_published=(("a", 1.0, 4.0, None, 1),),
    ) == [
        "| data | paper | clean | as-published |",
        "|---|---|---|---|",
        "| a | 1.00 | 2.00 | 4.00 |",
        "| b | 5.00 | 3.00 |  |",
    ]
    # A number that one protocol alone has is never shown as that of both.
    assert page(
        ("paper", "ours", "ours ±", "seeds"),
        clean=(("a", 1.0, 2.0, 0.5, 3),),
        as_published=(("b", 2.0, 4.0, None, 1),),
    ) == [
        "| data | paper | ours | seeds |",
        "|---|---|---|---|",
        "| a | 1.00 | 2.00 ± 0.50<br>- | 3<br>- |",
        "| b | 2.00 | -<br>4.00 | -<br>1 |",
    ]
    assert page(
        ("test", "coins", "p"),
        clean=(("a", 1.0, "5:0", -1.0), ("b", 2.0, "6:0", -2.0), ("c", 3.0, None, -3.0)),
        as_published=(("a", 1.5, "5:1", -1.0), ("b", 2.0, "6:1", -2.0)),
    ) == [
        "| data | test | coins | p |",
        "|---|---|---|---|",
        "| a | 1.00<br>1.50 | 5:0<br>5:1 | -1.00 |",
        "| b | 2.00 | 6:0<br>6:1 | -2.00 |",
        "| c | 3.00<br>- |  | -3.00<br>- |",
    ]


def test_figures_can_be_read_in_light_and_dark(
    study: tuple[Path, dict[str, list[Cell]], Store],
) -> None:
    """Text has at least 11 pixels in a generic font, and a dark page inverts all but images."""
    pictures = sorted((study[0] / "figures").glob("*.svg"))
    assert len(pictures) == 7
    for path in pictures:
        svg = path.read_text()
        root = ElementTree.fromstring(svg)
        per_point = 96 / 72  # the width is in points, and the view box has one unit a point
        assert root.attrib["viewBox"].split()[2] + "pt" == root.attrib["width"]
        texts = list(root.iter("{http://www.w3.org/2000/svg}text"))
        assert texts, path
        for text in texts:
            style = text.attrib["style"]
            assert "font-family: sans-serif" in style, path
            assert per_point * float(re.findall(r"font-size: ([\d.]+)px", style)[0]) >= 11, path
        assert ("prefers-color-scheme: dark" in svg) != path.name.startswith("figure6")


CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_stands_alone(
    study: tuple[Path, dict[str, list[Cell]], Store], width: int, scheme: str
) -> None:
    """The page is opened from disk and shows every figure.

    It makes no request and no console message, and does not overflow at desk and phone width.
    """
    sync_api = pytest.importorskip("playwright.sync_api")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        requests, messages = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.goto((study[0] / "report.html").as_uri())
        page.wait_for_function(
            "[...document.images].every(image => image.complete && image.naturalWidth > 0)"
        )
        overflow = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        figures = page.evaluate("document.images.length")
        browser.close()
    assert [url for url in requests if not url.startswith("data:")] == [
        (study[0] / "report.html").as_uri()
    ]
    assert messages == []
    assert overflow <= 0
    assert figures == 7


# --- the verb -------------------------------------------------------------------------------------


def countermark(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [*warm(), "reproduce", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, **options
    )  # type: ignore[call-overload, no-any-return]


def test_few_processes_share_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, processor, accelerator in ((16, 16, 4), (3, 3, 3), (1, 0, 0)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _pid, n=cores: set(range(n)))
        assert default_workers() == processor
        assert default_workers("cuda") == accelerator


def test_the_plan_lists_the_work_and_does_none(tmp_path: Path) -> None:
    done = countermark("--data", "digits", "--plan", "--json", "--out", str(tmp_path / "s"))
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert (
        plan["units"]
        == len(plan["work"])
        == len(in_order(cell.unit for cell in grid(("digits",), PROFILES["quick"], "clean")))
    )
    assert not any(planned["finished"] for planned in plan["work"])
    assert plan["finished"] == 0
    assert plan["seconds_estimated"] > 0
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--profile", "huge"], "unknown profile"),
        (["--protocol", "mine"], "unknown protocol"),
        (["--data", "cifar"], "unknown data set"),
        (["--data", "digits", "digits"], "each once"),
        (["--workers", "-1"], "--workers"),
        (["--workers", "2", "--scheduler", "tcp://127.0.0.1:9"], "--scheduler"),
        (["--seeds", "0"], "--seeds"),
        (["--budget", "0"], "--budget"),
        (["--only", "cifar10/*"], "matches nothing"),
        (["--only", "--seeds", "1"], "--only"),
        (["--budget", "5", "--scheduler", "tcp://127.0.0.1:9"], "--budget goes with local"),
        (["--device", "cuda"], "no cuda device"),
    ],
)
def test_bad_options_are_one_line(tmp_path: Path, arguments: list[str], said: str) -> None:
    done = countermark(*arguments, "--plan", "--out", str(tmp_path / "s"))
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


PARTS = {
    "a fine-tuned copy without coins": ("*/ADVTR+ood/white-box/fine-tuned", "*/ADVTR+coin/*/none"),
    "nothing that both have": ("*/ADVTR+ood/*", "*/ADVTR+adversarial/*"),
    "no figure": ("*/none/white-box/none", "*/strangers/*"),
    "no second protocol": ("*", "*/ADVTR+coin/black-box/none"),
    "a sweep without its default": ("*/sweep/*", "*/sweep strangers/*"),
    "a figure alone": ("*/pictures", "*/plane"),
    "strangers alone": ("digits/bank/*", "*/budgets"),
}
"""Names of cells under either protocol."""


@pytest.mark.parametrize("part", PARTS)
def test_any_part_of_a_study_has_a_page_that_leads_somewhere(
    study: tuple[Path, dict[str, list[Cell]], Store], tmp_path: Path, part: str
) -> None:
    """What was not measured is left out, and the page says whose numbers it has."""
    _, cells, store = study
    protocols = zip(("clean", "as-published"), PARTS[part], strict=True)
    few = {name: chosen({"": cells["clean"]}, (pattern,))[""] for name, pattern in protocols}
    for folder in ("tables", "figures"):  # of an earlier report
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "p_values-clean.svg").write_text("<svg/>")
    write_report(tmp_path, few, store, {"code": "0123456789ab", "device": "cpu in 32-true"})
    page = tmp_path / "site" / "results.md"
    page.parent.mkdir()
    write_page(page, tmp_path)
    text = page.read_text()
    for name in re.findall(r"\]\(([^)]+)\)", text):
        assert (page.parent / name).read_text() == (tmp_path / name).read_text() != "<svg/>"
    tables = json.loads((tmp_path / "results.json").read_text())["tables"]
    names = {name: {table["title"] for table in made} for name, made in tables.items()}
    for name, other in (("clean", "as-published"), ("as-published", "clean")):
        for title in names[name] - names[other]:
            assert f" {title}, protocol {name}\n" in text
    assert code_of(page) == "0123456789ab"


def test_a_study_whose_time_is_over_has_a_page_that_says_so(tmp_path: Path) -> None:
    """Nothing fits into less than a millisecond; the same command without a budget goes on."""
    out, page = tmp_path / "s", tmp_path / "results.md"
    part = ["--data", "digits", "--only", "digits/0/none/white-box/none", "--out", str(out)]
    part += ["--workers", "0", "--page", str(page), "--json"]
    done = countermark(*part, "--budget", "0.00001")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["left"] == 1
    assert "Not finished: 1 of 1 units of work." in page.read_text()
    done = countermark(*part)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["left"] == 0
    assert "Not finished" not in page.read_text()


def test_a_schedulers_workers_may_have_a_device_that_this_machine_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever plans for it has to say what they compute in; that cannot be found out here."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    there = {"scheduler": "tcp://127.0.0.1:9", "device": "cuda"}
    known = ReproduceConfig(**there, precision="bf16-mixed")
    assert _computing(known) == Computing("cuda", "bf16-mixed")
    with pytest.raises(CountermarkError, match=r"no cuda device here.*give --precision as well"):
        _computing(ReproduceConfig(**there))
    with pytest.raises(CountermarkError) as raised:
        _computing(ReproduceConfig(device="cuda"))
    assert "--precision" not in str(raised.value)


def test_a_part_of_a_study_has_its_report_and_its_page(tmp_path: Path) -> None:
    """`--only` makes what a row needs; a page of other code is named before it is written anew."""
    page = tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    page.write_text("# Results\n\nMade by `countermark reproduce`, code 0123456789ab.\n")
    part = ["--data", "digits", "--only", "digits/0/none/white-box/*", "--precision", "32-true"]
    out = tmp_path / "s"
    done = countermark(*part, "--workers", "0", "--page", str(page), "--json", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "was made by code 0123456789ab" in done.stderr
    found = json.loads(done.stdout)
    assert (found["units"], found["left"]) == (3, 0)
    text = page.read_text()
    assert text == (out / "results.md").read_text()
    assert f"code {graph.code_version()[:12]}, device cpu in 32-true" in text
    for name in re.findall(r"\]\(([^)]+)\)", text):
        assert (page.parent / name).read_bytes() == (out / name).read_bytes()
    rows = json.loads((out / "results.json").read_text())["measurements"]["clean"]
    assert {row["defence"] for row in rows} == {"none"}
    again = countermark(*part[:-1], "bf16-mixed", "--plan", "--json", "--out", str(out))
    assert json.loads(again.stdout)["finished"] == 0
    assert "also holds 3 units of other code, options, device or precision" in again.stderr


def test_kill_minus_nine_and_on(tmp_path: Path) -> None:
    """A study that is killed in the middle with its workers goes on when it is run again.

    It ends with the results of one that was not disturbed.
    """
    script = tmp_path / "go.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_study\nfrom pathlib import Path\n"
        "from countermark.study.graph import in_order\n"
        "if __name__ == '__main__':\n"
        "    cells = [c for c in test_study.tiny_grid() "
        "if c.place.get('defence') in ('ADVTR', 'none')]\n"
        "    test_study.run_all(in_order(c.unit for c in cells)[:14], Path(sys.argv[1]), "
        "workers=int(sys.argv[2]))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}

    def results(folder: Path) -> dict[str, bytes]:
        return {
            path.parent.name: path.read_bytes()
            for path in (folder / "units").glob("*/result.json")
            if ".partial" not in str(path)
        }

    (tmp_path / "calm").mkdir()
    (tmp_path / "killed").mkdir()
    subprocess.run(
        [sys.executable, str(script), str(tmp_path / "calm"), "0"], check=True, timeout=200, **quiet
    )  # type: ignore[call-overload]
    command = [sys.executable, str(script), str(tmp_path / "killed"), "1"]
    for finished in (2, 7):
        process = subprocess.Popen(command, start_new_session=True, **quiet)  # type: ignore[call-overload]
        while len(results(tmp_path / "killed")) < finished:
            assert process.poll() is None
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, timeout=200, **quiet)  # type: ignore[call-overload]
    assert len(results(tmp_path / "calm")) == 14
    assert results(tmp_path / "calm") == results(tmp_path / "killed")
