"""Fixtures; the digits models are made once per run and shared by all test processes."""

import fcntl
import math
import os
import random
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from countermark.data import Pools, load_pools
from countermark.memory import keep_freed_memory
from countermark.training import loop
from countermark.verbs.protect import protect


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    keep_freed_memory()


@pytest.fixture(scope="session", autouse=True)
def _every_checkpoint() -> None:
    """Let no disk that is slow for a moment decide where an interrupted run goes on."""
    loop._QUICK = math.inf


def _made_once(factory: pytest.TempPathFactory, name: str, **options: object) -> Path:
    shared = (
        factory.getbasetemp().parent
        if factory.getbasetemp().name.startswith("popen")
        else factory.getbasetemp()
    )
    folder = shared / f"shared-{name}"
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with (
                pytest.MonkeyPatch.context() as patch
            ):  # what a drawn secret decides is the same in every run
                patch.setattr(secrets, "token_bytes", random.Random(name).randbytes)
                protect("digits", out=folder, **options)  # type: ignore[arg-type]
    return folder


@pytest.fixture(scope="session")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that protect made with coins. Read only."""
    return _made_once(tmp_path_factory, "owner")


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of an unmarked model of another seed. Read only."""
    return _made_once(tmp_path_factory, "stranger", scheme="none", seed=1, epochs=15)


@pytest.fixture(scope="session")
def digits() -> Pools:
    """The pools of digits for seed 0."""
    return load_pools("digits", 0)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The address of a PostgreSQL that the tests started."""
    found = [path.parent for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))]
    found += [Path(path).parent for path in [shutil.which("initdb")] if path]
    if not found:
        pytest.skip("PostgreSQL is not installed")
    folder = Path(
        tempfile.mkdtemp(prefix="postgres-")
    )  # pytest closes its own folders to other users again and again
    user: list[str] = []
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        shutil.chown(folder, "postgres", "postgres")
    data, run = folder / "data", {"check": True, "capture_output": True, "timeout": 120, "cwd": "/"}
    subprocess.run(
        [
            *user,
            str(found[0] / "initdb"),
            "-D",
            str(data),
            "-U",
            "owner",
            "-A",
            "trust",
            "--no-sync",
            "--encoding=UTF8",
        ],
        **run,
    )  # type: ignore[call-overload]
    options = f"-c listen_addresses='' -c unix_socket_directories={folder}"
    control = [*user, str(found[0] / "pg_ctl"), "-D", str(data), "-w"]
    subprocess.run([*control, "-l", str(folder / "server.log"), "-o", options, "start"], **run)  # type: ignore[call-overload]
    yield f"postgresql://owner@/postgres?host={folder}"
    subprocess.run([*control, "-m", "immediate", "stop"], **run)  # type: ignore[call-overload]
    shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty query log in each of the databases."""
    if request.param == "sqlite":
        yield str(tmp_path / "log.db")
        return
    import psycopg

    url = request.getfixturevalue("postgres")
    tables = "trials, log_format, erased, identities, openings, requests"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"DROP TABLE IF EXISTS {tables}")
    yield url
