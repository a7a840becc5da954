"""Timestamps from a real authority on loopback, and every way in which one can be wrong."""

import itertools
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from asn1crypto import cms, core, tsp
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

from authority import Authority, stamped
from countermark.cli import main
from countermark.errors import CountermarkError
from countermark.files import read_json, sha256, write_json
from countermark.guard import load_guarded
from countermark.timestamps import UntrustedError, check_token, decode_token, encode_token, load_roots, read_token, request_token

_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of the curve P-256


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Authority]:
    made = Authority(tmp_path_factory.mktemp("tsa") / "ec")
    yield made
    made.close()


def test_an_authority_is_asked_and_its_token_checked_offline(authority: Authority) -> None:
    token = request_token(authority.url, b"a message", load_roots(authority.root))
    again = check_token(token.response, sha256(b"a message"), load_roots(authority.root), "T")
    assert again == token
    assert len(token.beacon) in (31, 32)
    assert token.time.tzinfo is not None


def test_no_two_tokens_share_a_beacon(authority: Authority, tmp_path: Path) -> None:
    beacons = {request_token(authority.url, b"the same").beacon for _ in range(5)}
    assert len(beacons) == 5
    rsa = Authority(tmp_path / "rsa", key="rsa")
    try:
        assert len(request_token(rsa.url, b"the same", load_roots(rsa.root)).beacon) == 256
    finally:
        rsa.close()


def test_a_token_of_another_message_authority_or_time_is_refused(authority: Authority, tmp_path: Path) -> None:
    token = stamped(authority, b"this")
    with pytest.raises(CountermarkError, match="of something else"):
        read_token(token, sha256(b"that"), "T")
    other, expired = Authority(tmp_path / "other"), Authority(tmp_path / "expired", days=-1)
    try:
        with pytest.raises(UntrustedError, match="no authority under the given roots"):
            check_token(token, sha256(b"this"), load_roots(other.root), "T")
        with pytest.raises(UntrustedError, match="expired"):
            check_token(stamped(expired, b"this"), sha256(b"this"), load_roots(expired.root), "T")
    finally:
        other.close()
        expired.close()


def test_the_second_form_of_a_signature_draws_the_same_coins(authority: Authority) -> None:
    """(r, s) and (r, -s) both verify: were s in the beacon, an owner could choose between two draws."""
    response = stamped(authority, b"this")
    changed = tsp.TimeStampResp.load(response)
    signer = changed["time_stamp_token"]["content"]["signer_infos"][0]
    r, s = decode_dss_signature(signer["signature"].native)
    signer["signature"] = core.OctetString(encode_dss_signature(r, _ORDER - s))
    twin = changed.dump(force=True)
    assert twin != response
    tokens = [check_token(form, sha256(b"this"), load_roots(authority.root), "T") for form in (response, twin)]
    assert tokens[0].beacon == tokens[1].beacon


@pytest.mark.parametrize("name", ["rsassa_pkcs1v15", "sha256_rsa", "rsassa_pss", "sha512_ecdsa"])
def test_what_a_token_says_of_its_algorithm_draws_no_other_coins(authority: Authority, name: str) -> None:
    """The field is not signed, and the verification ignores it."""
    response = stamped(authority, b"this")
    changed = tsp.TimeStampResp.load(response)
    changed["time_stamp_token"]["content"]["signer_infos"][0]["signature_algorithm"] = cms.SignedDigestAlgorithm({"algorithm": name})
    honest = check_token(response, sha256(b"this"), load_roots(authority.root), "T")
    try:
        token = check_token(changed.dump(force=True), sha256(b"this"), load_roots(authority.root), "T")
    except CountermarkError:
        return
    assert token.beacon == honest.beacon


def test_a_token_signed_with_a_certificate_for_something_else_is_refused(tmp_path: Path) -> None:
    """A web server's certificate of the same root, with a forged twin beside it that claims to be an authority's."""
    authority = Authority(tmp_path / "tsa")
    authority.close()
    folder = authority.folder
    honest = tsp.TimeStampResp.load(stamped(authority, b"this"))
    information = honest["time_stamp_token"]["content"]["encap_content_info"]["content"].parsed.dump()
    (folder / "info").write_bytes(information)

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    openssl("req", "-new", "-newkey", "rsa:2048", "-nodes", "-keyout", "web.key", "-out", "web.csr", "-subj", "/CN=web")
    openssl("x509", "-req", "-in", "web.csr", "-CA", "root.pem", "-CAkey", "root.key", "-set_serial", "77", "-out", "web.pem",
            "-extfile", "conf", "-extensions", "web")  # fmt: skip
    openssl("cms", "-sign", "-binary", "-nodetach", "-outform", "DER", "-econtent_type", "1.2.840.113549.1.9.16.1.4",
            "-in", "info", "-signer", "web.pem", "-inkey", "web.key", "-out", "forged")  # fmt: skip
    forged = cms.ContentInfo.load((folder / "forged").read_bytes())
    honest["time_stamp_token"] = forged
    response = honest.dump(force=True)
    with pytest.raises(CountermarkError):
        check_token(response, sha256(b"this"), load_roots(authority.root), "T")
    # The twin: same issuer (or one that differs in case, which OpenSSL takes for the same) and number, with the extension of an authority;
    # it is signed by nobody we know.
    for position, name in itertools.product((0, 1), ("root", "ROOT")):
        openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "x.key", "-out", "x.pem", "-subj", f"/CN={name}",
                "-set_serial", "77", "-config", "conf", "-extensions", "stamping")  # fmt: skip
        openssl("x509", "-in", "x.pem", "-outform", "DER", "-out", "x.der")
        data = cms.ContentInfo.load((folder / "forged").read_bytes())["content"]
        certificates = [cms.CertificateChoices.load((folder / "x.der").read_bytes()), *list(data["certificates"])[:1]]
        data["certificates"] = cms.CertificateSet(certificates if position == 0 else certificates[::-1])
        honest["time_stamp_token"] = {"content_type": "signed_data", "content": data}
        with pytest.raises(CountermarkError):
            check_token(honest.dump(force=True), sha256(b"this"), load_roots(authority.root), "T")


def test_every_changed_byte_of_a_token_is_noticed_or_changes_nothing_that_counts(authority: Authority) -> None:
    response, digest, roots = stamped(authority, b"this"), sha256(b"this"), load_roots(authority.root)
    honest = check_token(response, digest, roots, "T")
    for position in range(len(response)):
        changed = bytearray(response)
        changed[position] ^= 1 << position % 8
        try:
            token = check_token(bytes(changed), digest, roots, "T")
        except CountermarkError:
            continue
        assert (token.time, token.beacon) == (honest.time, honest.beacon), position


@pytest.mark.parametrize("rubbish", [b"", b"0", b"\x30\x00", b"\x30\x80" * 500, b"{}", bytes(70_000)])
def test_rubbish_is_no_timestamp(rubbish: bytes) -> None:
    with pytest.raises(CountermarkError, match="T"):
        read_token(rubbish, sha256(b"this"), "T")


def test_a_token_has_one_spelling_in_json() -> None:
    assert decode_token(encode_token(b"abc"), "T") == b"abc"
    assert decode_token(None, "T") is None
    for text in ("YWJj\n", "YWJ", "Yw==YWJj", "YWI=\n", "YWJ=", 3, "\u00e9"):
        with pytest.raises(CountermarkError, match="base64"):
            decode_token(text, "T")


@pytest.mark.parametrize(
    ("url", "message"),
    [("ftp://a/b", "http"), ("http://user:word@a/b", "password"), ("a", "http"), ("http://127.0.0.1:9/", "does not answer")],
)
def test_a_bad_address_is_an_error(url: str, message: str) -> None:
    with pytest.raises(CountermarkError, match=message):
        request_token(url, b"x")


def test_roots_that_are_none_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "roots.pem").write_text("-----BEGIN CERTIFICATE-----\nYWJj\n-----END CERTIFICATE-----\n")
    with pytest.raises(CountermarkError, match="no certificates"):
        load_roots(tmp_path / "roots.pem")


def test_a_guards_timestamp_is_not_lost(authority: Authority, owner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(owner, folder)
    before = read_json(folder / "commitment.json")
    stamping = ["--roots", str(authority.root), "--tsa"]
    assert main(["guard", str(folder), "--cost", "4", *stamping, "http://127.0.0.1:9/"]) == 2
    assert not (folder / "guard.json").exists()  # nothing is half-written where the authority cannot be asked
    assert read_json(folder / "commitment.json") == before
    assert main(["guard", str(folder), "--cost", "4", *stamping, authority.url]) == 0
    stamped = read_json(folder / "commitment.json")
    assert stamped["t3"] is not None
    assert main(["guard", str(folder), "--cost", "4"]) == 0  # the very same
    assert read_json(folder / "commitment.json") == stamped
    capsys.readouterr()
    assert main(["guard", str(folder), "--cost", "5"]) == 2
    assert "another guard, which was timestamped" in capsys.readouterr().err
    assert read_json(folder / "commitment.json") == stamped
    guard = read_json(folder / "guard.json")
    load_guarded(folder, folder / "key")
    (folder / "guard.json").unlink()
    assert main(["guard", str(folder), "--cost", "5"]) == 0
    assert read_json(folder / "commitment.json")["t3"] is None
    write_json(folder / "guard.json", guard)
    with pytest.raises(CountermarkError, match=r"not the guard that .*commitment\.json commits to"):
        load_guarded(folder, folder / "key")
