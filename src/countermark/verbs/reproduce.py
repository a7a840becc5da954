"""`countermark reproduce`: the paper's study beside its numbers, with the control that it lacks."""

import importlib.util
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from countermark.choices import Precision, Protocol, Size
from countermark.data import known
from countermark.errors import CountermarkError
from countermark.options import DataOptions, OneDeviceOptions, WrittenPath, verb
from countermark.terminal import duration, note, print_lines, print_table, unbroken
from countermark.version import __version__

if TYPE_CHECKING:
    from countermark.study.graph import Unit
    from countermark.study.grid import Cell, Computing


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig(DataOptions, OneDeviceOptions):
    """Run the paper's study and compare the numbers.

    The study has the strangers that the paper's lacks.
    """

    out: WrittenPath = "study"
    """Folder of the study: report.html, results.json, tables as CSV, and the finished units; the
    same command goes on where it was."""
    data: tuple[str, ...] = ("mnist", "fashion_mnist")
    """Data sets: mnist, fashion_mnist, digits, cifar10; the paper has the first two."""
    profile: Size = "quick"
    """quick (an hour or two on a laptop), standard (the paper's network, three seeds), paper (its
    Table 6, 100 epochs; for a GPU)."""
    protocol: tuple[Protocol, ...] = ("clean",)
    """clean (disjoint pools), as-published (the published runs' habits), or both."""
    seeds: int | None = None
    """Owners to train; default those of the profile."""
    only: tuple[str, ...] = ("*",)
    """Shell patterns of what to measure, such as 'mnist/0/ADVTR*/*-box/none'; all that it needs is
    made as well. --plan --json lists the names."""
    plan: bool = False
    """Only list the work, what of it is finished, and an estimate of the time."""
    budget: float | None = None
    """Minutes after which no unit of work is begun that would not be finished in them; the report
    is then of what is there, and the same command goes on."""
    page: WrittenPath | None = None
    """Markdown file to write as well, with its tables and figures beside it."""
    precision: Precision = "auto"
    """Precision of training and of the search of PGD; auto takes bf16 where the device computes in
    it."""
    workers: int | None = None
    """Local processes, one core each; default one for each core, at most four that share a GPU; 0
    runs everything in this process."""
    scheduler: str | None = None
    """Address of a Dask scheduler (tcp://...) to use instead; its workers must see OUT and the data
    cache under the same paths."""

    def __post_init__(self) -> None:
        """Refuse unknown names, numbers out of range, and two engines at once."""
        super().__post_init__()
        self._at_least_one("seeds", most=1000)
        self._whole("workers", 0, 1024)
        self._positive("number of minutes", "budget")
        local = "local processes (leave --scheduler out)"
        self._only_for(self.scheduler is None, local, "workers", "budget")
        if not self.data or len(set(self.data)) != len(self.data):
            raise CountermarkError("--data names one or more data sets, each once")
        if not self.protocol or len(set(self.protocol)) != len(self.protocol):
            raise CountermarkError("--protocol names clean, as-published, or both, each once")
        if not self.only:
            raise CountermarkError("--only takes one or more shell patterns; leave it out for all")
        for name in self.data:
            known(name)


@dataclass(frozen=True)
class Planned:
    """One unit of a plan.

    Attributes:
        title: what it is.
        names: what `only` chooses it by; none for what others start from.
        kind: its kind.
        unit: its name, 64 hexadecimal digits.
        finished: whether it is in the store.
        seconds: estimated for one core; 0 if it is finished.
    """

    title: str
    names: tuple[str, ...]
    kind: str
    unit: str
    finished: bool
    seconds: float


@dataclass(frozen=True)
class Reproduction:
    """A finished study, or its plan.

    Attributes:
        folder: the folder of the study.
        units: number of units of work.
        finished: units that were finished before this call.
        left: units that are not finished.
        seconds_estimated: wall-clock time that the others were expected to take.
        report: the HTML file; none for a plan.
        work: for a plan, every unit in the order of their needs.
        verdicts: what the study found, in sentences.
        seconds: wall-clock time of this call.
    """

    folder: str
    units: int
    finished: int
    left: int
    seconds_estimated: float
    report: str | None
    work: tuple[Planned, ...]
    verdicts: tuple[str, ...]
    seconds: float


@verb(ReproduceConfig)
def reproduce(config: ReproduceConfig) -> Reproduction:
    """Run the study, or only plan it; write report.html, results.json and tables to `config.out`.

    Raises:
        CountermarkError: a name is unknown, the folder is not a study's, a unit failed, or the
            scheduler does not answer; whatever is finished is kept.

    Example:
        >>> study = cm.reproduce(data=("digits",), plan=True)
        >>> study.units, study.finished
        (153, 0)
    """
    from countermark.study.graph import in_order
    from countermark.study.grid import PROFILES, chosen, grid
    from countermark.study.report import write_page, write_report
    from countermark.study.run import default_workers, run
    from countermark.study.store import Store

    begun, out = time.monotonic(), Path(config.out)
    page = Path(config.page) if config.page is not None else None
    if not config.plan:
        _look_at(page)
    profile, computing = PROFILES[config.profile], _computing(config)
    whole: dict[str, list[Cell]] = {
        protocol: grid(config.data, profile, protocol, config.seeds, computing)
        for protocol in config.protocol
    }
    cells = chosen(whole, config.only)
    units = in_order(cell.unit for part in cells.values() for cell in part)
    store = Store(out / "units", create=not config.plan)
    if others := store.others(in_order(cell.unit for part in whole.values() for cell in part)):
        note(
            f"{unbroken(out)} also holds {others} units of other code, options, device or "
            "precision, which this study does not use"
        )
    todo = [unit for unit in units if not store.has(unit)]
    workers = (
        0
        if config.scheduler is not None
        else default_workers(computing.device)
        if config.workers is None
        else config.workers
    )
    if not config.plan:
        _needs_extras(distributed=workers > 0 or config.scheduler is not None)
    estimates = _estimates(todo, config, computing, workers)
    expected = sum(estimates.values()) / max(workers, 1)
    finished = len(units) - len(todo)
    if config.plan:
        names: dict[str, list[str]] = {}
        for cell in (cell for part in cells.values() for cell in part):
            names.setdefault(cell.unit.digest, []).append(cell.name)
        work = tuple(
            Planned(
                unit.title,
                tuple(dict.fromkeys(names.get(unit.digest, ()))),
                unit.kind,
                unit.digest,
                unit.digest not in estimates,
                estimates.get(unit.digest, 0.0),
            )
            for unit in units
        )
        return Reproduction(
            str(out),
            len(units),
            finished,
            len(todo),
            expected,
            None,
            work,
            (),
            time.monotonic() - begun,
        )
    left = run(
        todo,
        store,
        finished=finished,
        workers=workers,
        scheduler=config.scheduler,
        cache=Path(config.cache).absolute() if config.cache is not None else None,
        device=config.device if config.device != "auto" else computing.device,
        until=None if config.budget is None else time.time() + 60 * config.budget,
        log=out / "study.log",
        estimates=estimates,
    )
    about = _about(config, computing, len(units), left)
    verdicts = write_report(out, cells, store, about, _command(config))
    if page is not None:
        write_page(page, out)
    report = str(out / "report.html")
    return Reproduction(
        str(out),
        len(units),
        finished,
        left,
        expected,
        report,
        (),
        verdicts,
        time.monotonic() - begun,
    )


def _computing(config: ReproduceConfig) -> "Computing":
    """Where and in what the study computes: what `auto` means is settled here, once."""
    from countermark.device import resolve_device, resolve_precision
    from countermark.study.grid import Computing

    kind = config.device.partition(":")[0]
    if config.scheduler is not None and kind != "auto" and config.precision != "auto":
        return Computing(kind, config.precision)  # workers have what this machine may lack
    try:
        device = resolve_device(config.device)
    except CountermarkError as error:
        if config.scheduler is None:
            raise
        raise CountermarkError(
            f"{error}. If the scheduler's workers have it, give --precision as well"
        ) from error
    return Computing(device.type, resolve_precision(device, config.precision))


def _look_at(page: Path | None) -> None:
    """Make sure of the folder of a page, and say so if other code made the page that is there."""
    from countermark.study.graph import code_version
    from countermark.study.report import code_of

    if page is None:
        return
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CountermarkError(
            f"cannot create {page.parent} for --page: {error.strerror}; choose another place"
        ) from error
    if not page.exists():
        return
    before, now = code_of(page), code_version()[:12]
    if before != now:
        note(
            f"{unbroken(page)} was made by {'code ' + before if before else 'older code'}, and "
            f"this is code {now}: its numbers are not those of this code"
        )


def _about(
    config: ReproduceConfig, computing: "Computing", units: int, left: int
) -> dict[str, str]:
    from countermark.study.graph import code_version, environment
    from countermark.study.grid import PROFILES, STUDIED
    from countermark.study.markdown import BEYOND, MISSING

    profile = PROFILES[config.profile]
    beyond = " or ".join(STUDIED[data].title for data in config.data if not STUDIED[data].paper)
    measured = {
        "the strict accuracy": profile.strict,
        "Table 5 and the plane": profile.budget_examples,
        "the adversarial accuracy of copies and strangers": profile.attack_copies,
        "the test accuracy after removals": profile.test_removals,
        "the choice of an epoch as published": profile.selection,
    }
    missing = {MISSING: f"{left} of {units} units of work"} if left else {}
    return {
        **missing,
        "profile": config.profile,
        **({"only": " ".join(config.only)} if config.only != ("*",) else {}),
        "data": ", ".join(config.data),
        **({BEYOND: beyond} if beyond else {}),
        "protocol": ", ".join(config.protocol),
        "owners' seeds": ", ".join(map(str, range(config.seeds or profile.seeds))),
        "strangers of each kind": str(profile.strangers),
        "owner's network": ", ".join(
            dict.fromkeys(STUDIED[data].network or profile.network for data in config.data)
        ),
        "queries of Algorithm 2": str(profile.queries),
        **{f"images of {what}": _taken(config.data, count) for what, count in measured.items()},
        "images that thieves fine-tune on": (
            f"at most {profile.finetune_examples}"
            if profile.finetune_examples
            else "all of the thief's pool"
        ),
        "thieves' epochs, batch and rate": (
            "the usual ones"
            if profile.haste is None
            else "{:g} of the usual epochs, batches of {}, rate {:g}".format(*profile.haste)
        ),
        "units of work": str(units),
        "code": code_version()[:12],
        "device": f"{computing.device} in {computing.precision}",
        **environment(),
        "version": __version__,
    }


def _taken(data: Sequence[str], count: int | None) -> str:
    """How many test images `study.work.every` takes of each data set."""
    if count is None:
        return "all"
    tests = {name: range(known(name).test) for name in data}
    taken = {name: len(test[:: max(1, len(test) // count)]) for name, test in tests.items()}
    if len(set(taken.values())) == 1:
        return str(taken[data[0]])
    return ", ".join(f"{number} ({name})" for name, number in taken.items())


def _command(config: ReproduceConfig) -> str:
    seeds = [] if config.seeds is None else ["--seeds", str(config.seeds)]
    only = ["--only", *config.only] if config.only != ("*",) else []
    given = {"--device": config.device, "--precision": config.precision}
    where = [word for name, value in given.items() if value != "auto" for word in (name, value)]
    words = [
        "--profile",
        config.profile,
        "--data",
        *config.data,
        "--protocol",
        *config.protocol,
        *seeds,
        *only,
        *where,
    ]
    return shlex.join(["countermark", "reproduce", *words])


def _estimates(
    todo: "list[Unit]", config: ReproduceConfig, computing: "Computing", workers: int
) -> dict[str, float]:
    """Seconds of each unit: on one core, or on a device that the workers share.

    For a cluster this machine's processor stands in.
    """
    from countermark.study.timing import measure_speed, pass_of, seconds
    from countermark.training import Hardware

    here = config.scheduler is None or computing.device == "cpu"
    hardware = Hardware(config.device, precision=computing.precision) if here else Hardware("cpu")
    speed = measure_speed(map(pass_of, todo), hardware)
    shared = 1 if computing.device == "cpu" else max(workers, 1)
    return {unit.digest: shared * seconds(unit, speed) for unit in todo}


def _needs_extras(*, distributed: bool) -> None:
    wanted = ("matplotlib", "scipy", *(("dask", "distributed") if distributed else ()))
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        raise CountermarkError(
            f"a study needs {', '.join(missing)}; pip install 'countermark[study]'"
        )


def show(result: Reproduction) -> None:
    """Print what was found, or what there is to do."""
    if result.report is None:
        kinds = sorted({planned.kind for planned in result.work})
        rows = []
        for kind in kinds:
            part = [planned for planned in result.work if planned.kind == kind]
            ready = sum(planned.finished for planned in part)
            rows.append(
                [
                    kind,
                    str(len(part)),
                    str(ready),
                    duration(sum(planned.seconds for planned in part)),
                ]
            )
        print_table(
            f"{unbroken(result.folder)}: {result.units} units",
            ("kind of unit", "units", "finished", "to go on one core"),
            rows,
        )
        print_lines(
            f"about {duration(result.seconds_estimated)} to go, by a short calibration on this "
            "machine; --json lists every unit"
        )
        return
    print_lines(
        *result.verdicts,
        *(
            [f"{result.left} of {result.units} units are left; the same command makes them"]
            if result.left
            else []
        ),
        "",
        (
            f"wrote {unbroken(result.report)} (and results.json, tables/*.csv, figures/*.svg; "
            f"{duration(result.seconds)})"
        ),
    )


__all__ = ["Planned", "Reproduction", "reproduce", "show"]
