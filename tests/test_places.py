"""Addresses that cannot be asked, and those that would put a password into files others read."""

import contextlib
import shutil
from pathlib import Path

import pytest

from countermark.cli import main
from countermark.errors import CountermarkError
from countermark.files import new_folder, read_json
from countermark.places import check_address
from countermark.suspects import Endpoint

RELEASE = Path(__file__).parent / "golden" / "0.1.0"


@pytest.mark.parametrize(
    "url",
    [
        "http://h/v2/models/m",
        "https://h:8443/x/invocations",
        "http://[::1]:80/v2/models/m",
        "http://h/v2/models/a@b",
    ],
)
def test_an_address_is_taken_as_it_is(url: str) -> None:
    assert check_address(url, "an endpoint") == url


@pytest.mark.parametrize(
    "url",
    [
        "http://owner:secret@h/v2/models/m",
        "http://secret@h/v2/models/m",
        "https://:secret@h:1/x/invocations",
        "http://a@secret@h/v2/models/m",
        "http://owner:sec/secret@h/v2/models/m",
        "http://owner:secret@[h/v2/models/m",
        "http://owner:secret@h:port/v2/models/m",
        "http://owner:\nsecret@h/v2/models/m",
        "http://h\\secret@i/v2/models/m",
    ],
)
def test_a_password_in_an_address_is_refused_and_not_repeated(url: str) -> None:
    for ask in (lambda: check_address(url, "an endpoint"), lambda: Endpoint(url)):
        with pytest.raises(CountermarkError, match="the address of an endpoint") as found:
            ask()
        assert "secret" not in str(found.value)


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http:///v2/models/m",
        "http://[::1",
        "http://h:port/",
        "http://h:99999/",
        "ftp://h/",
        "",
    ],
)
def test_what_is_no_address_is_one_error(url: str) -> None:
    with pytest.raises(CountermarkError, match="the address of an authority is http"):
        check_address(url, "an authority")


@pytest.mark.parametrize("verb", ["verify", "trace", "claim", "adjudicate", "tsa"])
@pytest.mark.parametrize("json", [False, True])
def test_a_password_in_an_address_gets_into_no_file(
    verb: str, json: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The endpoint is never asked: the address is refused before anything is opened or written."""
    shutil.copytree(RELEASE, tmp_path / "release")
    before = sorted(tmp_path.rglob("*"))
    mine, replay = tmp_path / "release" / "mine", str(tmp_path / "replay.jsonl")
    key = ["--key", str(mine / "key")]
    given = ["--suspect", "http://owner:secret@127.0.0.1:9/v2/models/m", "--replay", replay]
    roots = ["--roots", str(tmp_path / "release" / "roots.pem")]
    arguments = {
        "verify": ["verify", *given, *key],
        "trace": ["trace", *given, *key, "--log", str(tmp_path / "release" / "log.db")],
        "claim": ["claim", *given, *key, "--out", str(tmp_path / "claim"), "--anyway"],
        "adjudicate": [
            "adjudicate",
            str(tmp_path / "release" / "claim"),
            *given,
            *roots,
            "--out",
            str(tmp_path / "j"),
        ],
        "tsa": [
            "log",
            "head",
            str(tmp_path / "release" / "log.db"),
            "--tsa",
            "http://owner:secret@127.0.0.1:9/",
        ],
    }[verb]
    assert main([*arguments, *(["--json"] if json else [])]) == 2
    said = capfd.readouterr()
    assert "password" in said.err
    assert "secret" not in said.out + said.err
    after = [path for path in sorted(tmp_path.rglob("*")) if not path.name.startswith("log.db")]
    assert after == [path for path in before if not path.name.startswith("log.db")]
    assert not any(b"owner:secret" in path.read_bytes() for path in after if path.is_file())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data_sha256": "b"}, "with other images; run it again"),
        (
            {"data_sha256": "b", "pools": {"bases": 9}, "threat": {}},
            "with other images; run it again",
        ),
        (
            {"weights_sha256": "c", "seed": 2},
            r"with other weights and other options \(seed\); run it again",
        ),
        ({"known_sha256": "d"}, "with other images that the weights were trained on; run"),
        ({"pools": {"bases": 9}}, r"with other options \(pools\); run"),
        (dict.fromkeys("abcdefg", 1), r"with other options \(a, b, c, d, e, \.\.\.\); run"),
    ],
)
def test_unfinished_work_says_what_is_other(
    tmp_path: Path, change: dict[str, object], words: str
) -> None:
    run = {"seed": 1, "data_sha256": "a", "pools": {"bases": 8}}
    with contextlib.suppress(KeyboardInterrupt), new_folder(tmp_path / "new", run) as folder:
        (folder / "checkpoint-source").write_text("work")
        raise KeyboardInterrupt
    with (
        pytest.raises(CountermarkError, match=words),
        new_folder(tmp_path / "new", {**run, **change}),
    ):
        pass
    assert (tmp_path / "new.partial" / "checkpoint-source").exists()


@pytest.mark.parametrize("earlier", [{"seed": 1}, {"seed": 1, "register": None}])
@pytest.mark.parametrize("later", [{"seed": 1}, {"seed": 1, "identity": None, "register": None}])
def test_unfinished_work_goes_on_where_versions_know_other_options(
    tmp_path: Path, earlier: dict[str, object], later: dict[str, object]
) -> None:
    with contextlib.suppress(KeyboardInterrupt), new_folder(tmp_path / "new", earlier) as folder:
        (folder / "checkpoint-source").write_text("work")
        raise KeyboardInterrupt
    with new_folder(tmp_path / "new", later) as folder:
        assert (folder / "checkpoint-source").exists()
    assert read_json(tmp_path / "new" / "config.json") == earlier  # a key may have its digest
