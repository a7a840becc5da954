"""Collect what `gpu.sh` and `paper_gpu.sh` take to a machine without a network.

    python benchmarks/gpu_kit.py .kit --cifar10 cifar10.zip    for gpu.sh
    python benchmarks/gpu_kit.py .kit --study                  for paper_gpu.sh

A machine with a GPU usually has PyTorch and its dependencies, and SciPy and Matplotlib; the wheels
are those of our other dependencies, at the versions of constraints.txt. Either kit is less than
55 MB.
"""

import argparse
import gzip
import io
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from countermark.data import fetch

WHEELS = (
    "tyro",
    "docstring_parser",
    "typeguard",
    "cryptography",
    "cffi",
    "pycparser",
    "pooch",
    "platformdirs",
    "lightning-fabric",
    "lightning-utilities",
    "jmespath",
)
STUDY = (
    "click",
    "cloudpickle",
    "dask",
    "distributed",
    "locket",
    "msgpack",
    "partd",
    "psutil",
    "PyYAML",
    "sortedcontainers",
    "tblib",
    "toolz",
    "tornado",
    "zict",
)
"""Wheels of the processes that share a card."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("kit", type=Path, help="folder to make")
    options.add_argument(
        "--cifar10",
        type=Path,
        help="ZIP archive of CIFAR-10 as .../{train,test}/CLASS/*.jpg",
    )
    options.add_argument("--study", action="store_true", help="what the study needs")
    options.add_argument("--python", default="3.12", help="version of Python over there")
    given = options.parse_args()
    if given.cifar10 is None and not given.study:
        options.error("a kit is for gpu.sh (--cifar10), for paper_gpu.sh (--study), or for both")
    given.kit.mkdir(parents=True, exist_ok=True)
    wheels(given.kit / "wheels", given.python, (*WHEELS, *(STUDY if given.study else ())))
    for name in ("mnist", "fashion_mnist") if given.study else ("mnist",):
        known(name, given.kit / name)
    if given.cifar10 is not None:
        cifar10(given.cifar10, given.kit / "cifar10.tar.xz")
    size = sum(path.stat().st_size for path in given.kit.rglob("*") if path.is_file())
    sys.stdout.write(f"{given.kit}: {size / 1e6:.1f} MB\n")


def wheels(folder: Path, python: str, names: Sequence[str]) -> None:
    """Download the wheels for Linux on x86-64; two versions of one would stop the installation."""
    shutil.rmtree(folder, ignore_errors=True)
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", CONSTRAINTS.read_text(), re.MULTILINE))
    wanted = [f"{name}=={pinned[name]}" for name in names]
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    pip = (
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--implementation",
        "cp",
    )
    subprocess.run(
        [*pip, "--python-version", python, *platforms, "--dest", str(folder), *wanted], check=True
    )


def known(name: str, folder: Path) -> None:
    """Compress the files of the cache, which `fetch` has checked."""
    folder.mkdir(exist_ok=True)
    for path in sorted(fetch(name).iterdir()):
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))


def cifar10(archive: Path, made: Path) -> None:
    """Pack all images again, numbered within their class.

    The headers of small JPEG files are most of them and nearly all the same, so packed together
    they take less than a third.
    """
    counts: defaultdict[tuple[str, str], int] = defaultdict(int)
    with zipfile.ZipFile(archive) as whole, tarfile.open(made, "w:xz") as packed:
        for name in sorted(name for name in whole.namelist() if name.endswith(".jpg")):
            split, label, _ = name.split("/")[-3:]
            content = whole.read(name)
            entry = tarfile.TarInfo(f"cifar10/{split}/{label}/{counts[split, label]:05}.jpg")
            entry.size = len(content)
            packed.addfile(entry, io.BytesIO(content))
            counts[split, label] += 1


if __name__ == "__main__":
    main()
