"""Archives that stand in for those of known data sets."""

import hashlib
import io
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from countermark.data import KNOWN, originals


def change(monkeypatch: pytest.MonkeyPatch, name: str, **fields: object) -> None:
    """Change the row of a known data set."""
    monkeypatch.setitem(KNOWN, name, replace(KNOWN[name], **fields))


def tar(files: dict[str, bytes], kind: str) -> bytes:
    """An archive of some files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{kind}") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def cifar(records: int, *, drop: str = "", label: int = 1) -> bytes:
    """An archive like CIFAR-10's, with few images in each of its files."""
    generator = np.random.default_rng(2)
    files = {}
    for name in (
        *(f"data_batch_{i}.bin" for i in (3, 1, 5, 4, 2)),
        "test_batch.bin",
    ):  # in no order
        batch = generator.integers(0, 256, (records, 3073), dtype=np.uint8)
        batch[:, 0] = np.arange(records) % 10
        batch[0, 0] = label
        files[f"cifar-10-batches-bin/{name}"] = batch.tobytes()
    files["cifar-10-batches-bin/readme.html"] = b"hello"
    return tar(
        {name: data for name, data in files.items() if not drop or not name.endswith(drop)}, "gz"
    )


def known_archive(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    data: bytes,
    records: int = 40,
    pools: Mapping[str, int] | None = None,
) -> Path:
    """Write an archive, and know it for CIFAR-10's; there is no mirror."""
    monkeypatch.setattr(originals, "_CIFAR_IMAGES", records)
    path = tmp_path / "given" / originals.CIFAR_ARCHIVE
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    change(
        monkeypatch,
        "cifar10",
        files={originals.CIFAR_ARCHIVE: hashlib.sha256(data).hexdigest()},
        mirrors=(),
        pools=pools,
    )
    return path
