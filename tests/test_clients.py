"""The accounts of the guarded service: their file, and the verbs that change it."""

import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

import countermark as cm
from countermark.cli import main
from countermark.errors import CountermarkError
from countermark.files import JSON_LIMIT, read_json, write_json
from countermark.guard.points import is_of_small_order
from countermark.guard.requests import is_receipt
from countermark.service import clients as clients_module
from countermark.service.clients import CLIENTS_FORMAT, Clients, public_key_of, rotate_client

PUBLIC = "ab" * 32
RELEASES = ("0.1.0", "0.2.0")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "clients.json"


def name_of(path: Path, api_key: str) -> str | None:
    found = Clients(path).find(api_key)
    return found and found.name


def test_a_rotation_ends_the_old_key(path: Path) -> None:
    old = cm.client_add("anna", clients=path, public_key=PUBLIC).api_key
    other = cm.client_add("bob", clients=path).api_key
    new = cm.client_rotate("anna", clients=path).api_key
    assert [name_of(path, key) for key in (old, new, other)] == [None, "anna", "bob"]
    found = Clients(path).find(new)
    assert found is not None
    assert found.public_key == PUBLIC
    assert new not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_rotation_ends_the_old_key_even_while_the_clock_goes_back(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = cm.client_add("anna", clients=path).api_key
    backwards = itertools.count(1.8e9, -10)
    monkeypatch.setattr(clients_module.time, "time", lambda: next(backwards))
    cm.client_rotate("anna", clients=path)
    assert name_of(path, old) is None


def test_within_the_grace_both_keys_are_valid_by_the_clock(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the clock goes back, the old key is valid again; a second rotation ends it."""
    keys = [cm.client_add("anna", clients=path).api_key]
    clock = [1.8e9]
    monkeypatch.setattr(clients_module.time, "time", lambda: clock[0])
    keys.append(cm.client_rotate("anna", clients=path, grace=2).api_key)
    for later, valid in ((0, [True, True]), (7199, [True, True]), (7200, [False, True])):
        clock[0] = 1.8e9 + later
        assert [name_of(path, key) == "anna" for key in keys] == valid
    running = Clients(path)
    for clock[0], valid in ((-5.0, [True, True]), (9e9, [False, True]), (1.8e9, [True, True])):
        assert [running.find(key) is not None for key in keys] == valid
    assert cm.client_list(path).accounts[0].old_key_until == "2027-01-15T10:00:00Z"
    keys.append(cm.client_rotate("anna", clients=path, grace=0.5).api_key)
    assert [name_of(path, key) for key in keys] == [None, "anna", "anna"]
    clock[0] += 1800
    assert cm.client_list(path).accounts[0].old_key_until is None
    cm.client_add("bob", clients=path)
    assert "old_until" not in path.read_text()  # what is over is not kept


def test_a_public_key_may_be_a_file(path: Path, tmp_path: Path) -> None:
    """As openssl writes it. A private key is refused: it stays with the client."""
    mine, other = Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1())
    form = (Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    files = {
        "public.pem": mine.public_key().public_bytes(*form),
        "private.pem": mine.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        "another.pem": other.public_key().public_bytes(*form),
        "empty.pem": b"",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name in ("private.pem", "another.pem", "empty.pem", "none.pem", ".", "AB" * 32, "a\0"):
        key = name if name.isupper() else f"{tmp_path}/{name}"
        with pytest.raises(CountermarkError, match=r"is not: give 64 .*, or the PEM file that"):
            cm.client_add("anna", clients=path, public_key=key)
    assert not path.exists()
    key = cm.client_add("anna", clients=path, public_key=str(tmp_path / "public.pem")).api_key
    found = Clients(path).find(key)
    assert found is not None
    assert found.public_key == mine.public_key().public_bytes_raw().hex()


def test_a_key_of_small_order_is_refused_however_it_is_spelt(path: Path, tmp_path: Path) -> None:
    """Nobody needs a private key for one, so its signatures bind nobody."""
    p, top = (1 << 255) - 19, 1 << 255
    eighth = int("7a03ac9277fdc74ec6cc392cfa53202a0f67100d760b3cba4fd84d3d706a17c7", 16)
    heights = [y for y in (0, 1, p - 1, p, p + 1, eighth, p - eighth) if y < top]
    spelt = [(y + sign).to_bytes(32, "little") for y in heights for sign in (0, top)]
    assert len(set(spelt)) == 14
    form = (Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for raw in spelt:
        key = Ed25519PublicKey.from_public_bytes(raw)
        (tmp_path / "small.pem").write_bytes(key.public_bytes(*form))
        for given in (raw.hex(), str(tmp_path / "small.pem")):
            with pytest.raises(CountermarkError, match=f"{raw.hex()} is a key of small order"):
                cm.client_add("eve", clients=path, public_key=given)
    assert not path.exists()
    identity = Ed25519PublicKey.from_public_bytes(spelt[heights.index(1) * 2])
    forged = (1).to_bytes(32, "little") + bytes(32)
    identity.verify(forged, b"whatever was asked")
    nobodys = identity.public_bytes_raw().hex()
    assert not is_receipt(nobodys, bytes(32), [1], forged)  # nor is it believed where it is known
    for _ in range(20):
        mine = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
        assert public_key_of(mine.hex(), "--public-key") == mine.hex()
        assert not is_of_small_order(mine.hex())


def test_a_revoked_account_keeps_its_name(path: Path) -> None:
    """A trace names clients, so nobody else may ever be called so."""
    key = cm.client_add("anna", clients=path, public_key=PUBLIC).api_key
    old = cm.client_rotate("anna", clients=path, grace=5).api_key
    for _ in range(2):
        assert cm.client_revoke("anna", clients=path).name == "anna"
        assert name_of(path, key) is name_of(path, old) is None
    with pytest.raises(CountermarkError, match="no name is ever given again"):
        cm.client_add("anna", clients=path)
    with pytest.raises(CountermarkError, match="revoked, for good"):
        cm.client_rotate("anna", clients=path)
    (listed,) = cm.client_list(path).accounts
    assert (listed.name, listed.signs, listed.state, listed.old_key_until) == (
        "anna",
        True,  # the rows of the log can still be checked
        "revoked",
        None,
    )


def test_what_is_wrong_with_the_file_is_told_once(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = cm.client_add("anna", clients=path).api_key
    running, good = Clients(path), path.read_bytes()
    for data, said in (
        (b"{", "not valid JSON"),
        (b"{}\n", "is not a file of clients"),
        (good, "has changed; 1 accounts may ask now"),
        (b"{", "not valid JSON"),
        (None, "does not exist"),
        (good, "has changed"),
    ):
        path.unlink() if data is None else path.write_bytes(data)
        for _ in range(3):
            running.refresh()
            assert running.find(key) is not None
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
        assert line.endswith("the accounts stay as they were") is (data != good)


@pytest.mark.parametrize("release", RELEASES)
def test_the_file_of_an_earlier_release_goes_on(path: Path, release: str) -> None:
    shutil.copy(Path(__file__).parent / "golden" / release / "mine" / "clients.json", path)
    before = read_json(path)
    assert before["format"] == "countermark clients 1"
    assert [account.state for account in cm.client_list(path).accounts] == ["active"]
    assert read_json(path) == before  # reading writes nothing
    key = cm.client_add("bob", clients=path).api_key
    after = read_json(path)
    assert after["format"] == CLIENTS_FORMAT != before["format"]
    assert after["clients"]["anna"] == before["clients"]["anna"]
    assert name_of(path, key) == "bob"
    new = cm.client_rotate("anna", clients=path).api_key
    assert name_of(path, new) == "anna"


@pytest.mark.parametrize(
    "account",
    [
        {"key_sha256": None, "public_key": None},
        {"key_sha256": "0" * 64, "public_key": None} | {"old_key_sha256": "0" * 64, "old_until": 5},
    ],
)
def test_what_no_earlier_release_wrote_is_damage_in_its_format(
    path: Path, account: dict[str, object]
) -> None:
    record = {"format": CLIENTS_FORMAT, "clients": {"anna": account}}
    write_json(path, record)
    Clients(path)
    write_json(path, {**record, "format": "countermark clients 1"})
    with pytest.raises(CountermarkError, match="'anna' is damaged"):
        Clients(path)
    write_json(path, {**record, "format": "countermark clients 3"})
    with pytest.raises(CountermarkError, match="not a file of clients that this release can read"):
        Clients(path)


def test_in_a_full_file_keys_can_be_changed_and_accounts_revoked(path: Path) -> None:
    account = {"key_sha256": "0" * 64, "public_key": "0" * 64}
    names = [f"client {number}" for number in range(5437)]
    record = {"format": "countermark clients 1", "clients": dict.fromkeys(names, account)}
    write_json(path, record)
    names[-1] += "x" * (JSON_LIMIT - path.stat().st_size)
    write_json(path, {**record, "clients": dict.fromkeys(names, account)})
    assert path.stat().st_size == JSON_LIMIT
    new = rotate_client(path, names[7])
    assert name_of(path, new) == names[7]
    with pytest.raises(CountermarkError, match="no room for more; take out clients whom no log"):
        rotate_client(path, names[8], grace=1.0)
    cm.client_revoke(names[7], clients=path)
    assert name_of(path, new) is None


def test_the_verbs_on_the_command_line(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> tuple[int, str, str]:
        status = main(["client", *words])
        return status, *capsys.readouterr()

    file = ["--clients", str(path)]
    status, old, said = run("add", "anna", *file)
    assert (status, said) == (0, "a running service knows anna within seconds\n")
    run("add", "carol", "--public-key", PUBLIC, *file)
    status, new, said = run("rotate", "anna", *file)
    assert (status, name_of(path, new.strip())) == (0, "anna")
    assert name_of(path, old.strip()) is None
    assert said.endswith("the old key of anna ends then\n")
    assert run("rotate", "carol", "--grace", "48", *file)[2].endswith("ends after 48 hours\n")
    assert "stays taken" in run("revoke", "anna", *file)[1].replace("\n", " ")
    shown = run("list", str(path))[1]
    assert re.search(r"anna +no +revoked", shown)
    assert re.search(r"carol +yes +active +\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", shown)
    listed = json.loads(run("list", str(path), "--json")[1])["accounts"]
    assert [account["name"] for account in listed] == ["anna", "carol"]
    before = path.read_bytes()
    for words, reason in {
        ("add", "anna", *file): "who was revoked; a trace names clients",
        ("add", "carol", *file): "has a client 'carol' already",
        ("rotate", "anna", *file): "was revoked, for good",
        ("rotate", "carl", *file): "no client 'carl' (did you mean carol?)",
        ("rotate", "x\x1b[2J", *file): "no client 'x\\x1b[2J'",
        ("revoke", "bob", *file): "countermark client list shows all",
        ("rotate", "carol", "--grace", "-1", *file): "0 to 8784 hours",
        ("rotate", "carol", "--grace", "9000", *file): "0 to 8784 hours",
        ("rotate", "carol", "--grace", "inf", *file): "--grace",
        ("revoke", "carol", "--clients", f"{path}.none"): "does not exist",
        ("list", f"{path}.none"): "does not exist",
        ("list", str(path.parent)): "is not a file",
    }.items():
        status, out, said = run(*words)
        assert (status, out, said.count("\n")) == (2, "", 1), words
        assert reason in said, (words, said)
    assert path.read_bytes() == before
