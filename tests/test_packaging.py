"""What users install: the wheel and the source archive.

Both are built without network, the wheel from the source archive, and the wheel is run in an
environment of its own.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import countermark
from countermark import cli

ROOT = Path(__file__).parents[1]
NAME = f"countermark-{countermark.__version__}"
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    "COLUMNS": "80",
    "OMP_NUM_THREADS": "1",
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_NO_INDEX": "1",
}

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("pip", "setuptools")),
    reason="pip and setuptools build the wheel",
)


def run(*command: object, cwd: Path, status: int = 0) -> str:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive, built from a copy of the project."""
    project = tmp_path_factory.mktemp("project")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, project)
    for name in ("src", "tests", "docs", "benchmarks"):
        left_out = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, project / name, ignore=left_out)
    build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    run(sys.executable, "-c", build, cwd=project)
    return project / "dist" / f"{NAME}.tar.gz"


@pytest.fixture(scope="module")
def wheel(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip_wheel = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
    run(*pip_wheel, archive, "--wheel-dir", folder, cwd=folder)
    return folder / f"{NAME}-py3-none-any.whl"


def source_files() -> set[str]:
    paths = (ROOT / "src" / "countermark").rglob("*")
    files = [path for path in paths if path.is_file() and path.parent.name != "__pycache__"]
    return {path.relative_to(ROOT / "src").as_posix() for path in files}


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        metadata = file.read(f"{NAME}.dist-info/METADATA").decode()
    assert {"countermark/py.typed", "countermark/study/published.json"} <= names
    inside = {name for name in names if name.startswith("countermark/")}
    assert inside == source_files()
    assert {name.split("/")[0] for name in names - inside} == {f"{NAME}.dist-info"}
    assert f"{NAME}.dist-info/licenses/LICENSE" in names
    assert "License-Expression: Apache-2.0\n" in metadata


def test_the_source_archive_has_what_the_wheel_is_built_from(archive: Path) -> None:
    with tarfile.open(archive) as file:
        members = [member.name for member in file.getmembers() if member.isfile()]
    names = {name.removeprefix(f"{NAME}/") for name in members}
    assert {name for name in names if name.startswith("src/countermark/")} == {
        f"src/{name}" for name in source_files()
    }
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"} <= names
    assert not any(name.startswith(("tests/", "docs/", "benchmarks/")) for name in names)


@pytest.fixture(scope="module")
def home(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of its own, with the wheel.

    The libraries are those of the environment that runs the tests.
    """
    home = tmp_path_factory.mktemp("home") / "environment"
    venv.create(home, symlinks=True, with_pip=False)
    python = home / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel, cwd=home)
    [site] = home.glob("lib/python*/site-packages")
    libraries = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "libraries.pth").write_text("\n".join(libraries) + "\n")
    where = run(python, "-c", "import countermark; print(countermark.__file__)", cwd=home)
    assert Path(where.strip()) == site / "countermark" / "__init__.py"
    return home


def test_an_installed_wheel_runs(home: Path) -> None:
    command = home / "bin" / "countermark"
    version = run(command, "--version", cwd=home)
    assert version == f"countermark {countermark.__version__}\n"
    found = run(command, "plan", "--p", "1e-9", "--agreement", "0.75", "--json", cwd=home)
    planned = countermark.plan(p=1e-9, agreement=0.75)
    assert json.loads(found)["trials"] == planned.trials
    shown = run(command, "plan", "--p", "1e-9", "--agreement", "0.75", cwd=home)
    assert f"{planned.trials} trials" in shown
    help_of_all = run(command, "--help", cwd=home)
    assert all(cli._summary(verb) in help_of_all for verb in cli.VERBS)


def test_an_installed_wheel_trains_a_model_and_judges_it(home: Path, tmp_path: Path) -> None:
    """The first steps of the README, without the mark: that takes longer and needs no other file.

    The key is that of an example, so the model is a stranger: no evidence, which is status 1.
    """
    command, golden = home / "bin" / "countermark", ROOT / "tests" / "golden" / "0.1.0" / "mine"
    short = ("--scheme", "none", "--objective", "standard", "--epochs", 5)
    run(command, "protect", "digits", *short, "--out", "stranger", cwd=tmp_path)
    key = shutil.copytree(golden / "key", tmp_path / "key")  # which notes each look
    verify = ("verify", "stranger", "--key", key, "--json")
    found = json.loads(run(command, *verify, cwd=tmp_path, status=1))
    assert (found["test"]["verdict"], found["test"]["trials"]) == ("no evidence", 160)
    assert found["answers"]["clean_accuracy"] > 50


def test_the_citation_and_the_changelog_are_of_this_version() -> None:
    version = countermark.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    changelog = (ROOT / "CHANGELOG.md").read_text()
    [newest, *_] = re.findall(r"^## (?!Unreleased)(\S+)", changelog, re.MULTILINE)
    assert newest == version


def test_the_versions_that_make_installs_are_within_the_ranges() -> None:
    """An extra that no pin of constraints.txt fits could not be installed with them."""
    packaging = pytest.importorskip("packaging.requirements")
    pins = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    for text in (*project["dependencies"], *(each for extra in extras for each in extra)):
        wanted = packaging.Requirement(text)
        assert pins[wanted.name.lower()] in wanted.specifier, text
