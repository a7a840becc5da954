"""Timestamps from a real authority on loopback, and every way in which one can be wrong."""

import base64
import itertools
import shutil
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from asn1crypto import cms, core, tsp
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)
from cryptography.hazmat.primitives.serialization import Encoding

from authority import Authority, stamped
from countermark.cli import main
from countermark.errors import CountermarkError
from countermark.files import read_json, sha256, write_json
from countermark.guard import QueryLog, load_guarded
from countermark.timestamps import (
    UntrustedError,
    check_token,
    decode_token,
    encode_token,
    load_roots,
    read_token,
    request_token,
    root_name,
)
from countermark.verbs.claim import claim

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


def test_a_token_of_another_message_authority_or_time_is_refused(
    authority: Authority, tmp_path: Path
) -> None:
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
    """Both (r, s) and (r, -s) verify, so s must not be in the beacon.

    If it were, an owner could choose between two draws.
    """
    response = stamped(authority, b"this")
    changed = tsp.TimeStampResp.load(response)
    signer = changed["time_stamp_token"]["content"]["signer_infos"][0]
    r, s = decode_dss_signature(signer["signature"].native)
    signer["signature"] = core.OctetString(encode_dss_signature(r, _ORDER - s))
    twin = changed.dump(force=True)
    assert twin != response
    tokens = [
        check_token(form, sha256(b"this"), load_roots(authority.root), "T")
        for form in (response, twin)
    ]
    assert tokens[0].beacon == tokens[1].beacon


@pytest.mark.parametrize("name", ["rsassa_pkcs1v15", "sha256_rsa", "rsassa_pss", "sha512_ecdsa"])
def test_what_a_token_says_of_its_algorithm_draws_no_other_coins(
    authority: Authority, name: str
) -> None:
    """The field is not signed, and the verification ignores it."""
    response = stamped(authority, b"this")
    changed = tsp.TimeStampResp.load(response)
    changed["time_stamp_token"]["content"]["signer_infos"][0]["signature_algorithm"] = (
        cms.SignedDigestAlgorithm({"algorithm": name})
    )
    honest = check_token(response, sha256(b"this"), load_roots(authority.root), "T")
    try:
        token = check_token(
            changed.dump(force=True), sha256(b"this"), load_roots(authority.root), "T"
        )
    except CountermarkError:
        return
    assert token.beacon == honest.beacon


def test_a_token_signed_with_a_certificate_for_something_else_is_refused(tmp_path: Path) -> None:
    """The token is signed with a web server's certificate of the same root.

    A forged twin beside it claims to be an authority's.
    """
    authority = Authority(tmp_path / "tsa")
    authority.close()
    folder = authority.folder
    honest = tsp.TimeStampResp.load(stamped(authority, b"this"))
    information = honest["time_stamp_token"]["content"]["encap_content_info"][
        "content"
    ].parsed.dump()
    (folder / "info").write_bytes(information)

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    openssl(
        "req",
        "-new",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        "web.key",
        "-out",
        "web.csr",
        "-subj",
        "/CN=web",
    )
    openssl("x509", "-req", "-in", "web.csr", "-CA", "root.pem", "-CAkey", "root.key",
            "-set_serial", "77", "-out", "web.pem",
            "-extfile", "conf", "-extensions", "web")  # fmt: skip
    openssl("cms", "-sign", "-binary", "-nodetach", "-outform", "DER",
            "-econtent_type", "1.2.840.113549.1.9.16.1.4",
            "-in", "info", "-signer", "web.pem", "-inkey", "web.key", "-out", "forged")  # fmt: skip
    forged = cms.ContentInfo.load((folder / "forged").read_bytes())
    honest["time_stamp_token"] = forged
    response = honest.dump(force=True)
    with pytest.raises(CountermarkError):
        check_token(response, sha256(b"this"), load_roots(authority.root), "T")
    # The twin has the same issuer (or one that differs in case, which OpenSSL takes for the same),
    # the same number, and the extension of an authority; it is signed by nobody we know.
    for position, name in itertools.product((0, 1), ("root", "ROOT")):
        openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "x.key",
                "-out", "x.pem", "-subj", f"/CN={name}",
                "-set_serial", "77", "-config", "conf", "-extensions", "stamping")  # fmt: skip
        openssl("x509", "-in", "x.pem", "-outform", "DER", "-out", "x.der")
        data = cms.ContentInfo.load((folder / "forged").read_bytes())["content"]
        certificates = [
            cms.CertificateChoices.load((folder / "x.der").read_bytes()),
            *list(data["certificates"])[:1],
        ]
        data["certificates"] = cms.CertificateSet(
            certificates if position == 0 else certificates[::-1]
        )
        honest["time_stamp_token"] = {"content_type": "signed_data", "content": data}
        with pytest.raises(CountermarkError):
            check_token(honest.dump(force=True), sha256(b"this"), load_roots(authority.root), "T")


def test_every_changed_byte_of_a_token_is_noticed_or_changes_nothing_that_counts(
    authority: Authority,
) -> None:
    response, digest, roots = (
        stamped(authority, b"this"),
        sha256(b"this"),
        load_roots(authority.root),
    )
    honest = check_token(response, digest, roots, "T")
    for position in range(len(response)):
        changed = bytearray(response)
        changed[position] ^= 1 << position % 8
        try:
            token = check_token(bytes(changed), digest, roots, "T")
        except CountermarkError:
            continue
        assert (token.time, token.beacon) == (honest.time, honest.beacon), position


@pytest.mark.parametrize(
    "rubbish", [b"", b"0", b"\x30\x00", b"\x30\x80" * 500, b"{}", bytes(70_000)]
)
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
    [
        ("ftp://a/b", "http"),
        ("http://user:word@a/b", "password"),
        ("a", "http"),
        ("http://127.0.0.1:9/", "does not answer"),
    ],
)
def test_a_bad_address_is_an_error(url: str, message: str) -> None:
    with pytest.raises(CountermarkError, match=message):
        request_token(url, b"x")


def test_roots_that_are_none_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "roots.pem").write_text(
        "-----BEGIN CERTIFICATE-----\nYWJj\n-----END CERTIFICATE-----\n"
    )
    with pytest.raises(CountermarkError, match="no certificates"):
        load_roots(tmp_path / "roots.pem")


def test_a_guards_timestamp_is_not_lost(
    authority: Authority, owner: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(owner, folder)
    before = read_json(folder / "commitment.json")
    stamping = ["--roots", str(authority.root), "--tsa"]
    assert main(["guard", str(folder), "--cost", "4", *stamping, "http://127.0.0.1:9/"]) == 2
    assert not (
        folder / "guard.json"
    ).exists()  # nothing is half-written where the authority cannot be asked
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


# What authorities that mean well do, and what goes wrong on the way


def reordered(response: bytes) -> list[bytes]:
    """The same response with its certificates in every order, byte for byte the same otherwise."""
    content = tsp.TimeStampResp.load(response)["time_stamp_token"]["content"]
    certificates = [each.dump() for each in content["certificates"]]
    assert response.count(b"".join(certificates)) == 1
    return [
        response.replace(b"".join(certificates), b"".join(order))
        for order in itertools.permutations(certificates)
    ]


@pytest.mark.parametrize(
    "chain", [("root.pem",), ("root.pem", "other.pem"), ("other.pem", "tsa.pem", "root.pem")]
)
def test_a_chain_of_certificates_is_taken_in_any_order(
    tmp_path: Path, chain: tuple[str, ...]
) -> None:
    """The order of a set means nothing.

    `openssl ts -verify` takes all orders, and they draw the same coins.
    """
    authority = Authority(tmp_path / "tsa")
    try:
        authority._openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes",
                           "-keyout", "other.key", "-out", "other.pem",
                           "-subj", "/CN=other", "-config", "conf",
                           "-extensions", "ca")  # fmt: skip
        (authority.folder / "chain.pem").write_bytes(
            b"".join((authority.folder / name).read_bytes() for name in chain)
        )
        conf = (authority.folder / "conf").read_text()
        (authority.folder / "conf").write_text(
            conf.replace("signer_key", f"certs = {authority.folder}/chain.pem\nsigner_key")
        )
        roots = load_roots(authority.root)
        token = request_token(authority.url, b"this", roots)
        for response in reordered(token.response):
            (authority.folder / "response").write_bytes(response)
            authority._openssl(
                "ts", "-verify", "-queryfile", "request", "-in", "response", "-CAfile", "root.pem"
            )
            again = check_token(response, sha256(b"this"), roots, "T")
            assert (again.time, again.beacon) == (token.time, token.beacon)
            assert again.response == response  # what is stored and committed to is what came
    finally:
        authority.close()


def test_granted_with_modifications_is_granted(authority: Authority) -> None:
    """RFC 3161: with the status 0 or 1 there is a token."""
    response = stamped(authority, b"this")
    changed = tsp.TimeStampResp.load(response)
    changed["status"]["status"] = "granted_with_mods"
    changed["status"]["status_string"] = ["another policy"]
    modified = changed.dump(force=True)
    assert modified != response
    token = check_token(modified, sha256(b"this"), load_roots(authority.root), "T")
    assert token.beacon == read_token(response, sha256(b"this"), "T").beacon
    with pytest.raises(CountermarkError, match="of something else"):
        read_token(modified, sha256(b"that"), "T")


def refusal(words: str, status: str = "rejection") -> bytes:
    body = tsp.PKIStatusInfo({"status": status, "status_string": [words]}).dump()
    return b"\x30" + len(body).to_bytes() + body  # asn1crypto knows no response without a token


@pytest.mark.parametrize("status", ["granted", "granted_with_mods", "rejection", "waiting"])
def test_a_response_without_a_token_is_refused_with_its_reason(status: str) -> None:
    with pytest.raises(
        CountermarkError, match="T.*" if "granted" in status else r"status \d \(too busy\)"
    ):
        read_token(refusal("too busy", status), sha256(b"this"), "T")


class _Odd(socketserver.StreamRequestHandler):
    """A server that answers everything with the same bytes and closes the connection."""

    answer = b""

    def handle(self) -> None:
        while self.rfile.readline().strip():
            pass
        self.wfile.write(self.answer)


ODD = {
    "cut": b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n0123456789",
    "cut in a chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n0123456789",
    "bad chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n0123456789",
    "not packed": (
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 10\r\n\r\n0123456789"
    ),
    "nothing": b"",
    "no HTTP": b"\x1b[2J\r\n\r\n",
    "error": b"HTTP/1.1 500 \x1b[2J\r\nContent-Length: 0\r\n\r\n",
    "empty": b"HTTP/1.1 204 No Content\r\n\r\n",
    "too much": b"HTTP/1.1 200 OK\r\nContent-Length: 70000\r\n\r\n" + bytes(70000),
    "redirect": (
        b"HTTP/1.1 307 Elsewhere\r\nLocation: https://elsewhere.example/tsa\r\n"
        b"Content-Length: 0\r\n\r\n"
    ),
    "bad redirect": b"HTTP/1.1 302 Found\r\nLocation: //[\x1b[2J\r\nContent-Length: 0\r\n\r\n",
    "refusal": b"HTTP/1.1 200 OK\r\n\r\n" + refusal("\x1b[2J\nupheld"),
}


@pytest.mark.parametrize("fault", ODD)
def test_a_fault_on_the_way_to_the_authority_is_one_line(
    fault: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with QueryLog(str(tmp_path / "log.db")):
        pass
    handler = type("Handler", (_Odd,), {"answer": ODD[fault]})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        status = main(["log", "head", str(tmp_path / "log.db"), "--tsa", url])
        server.shutdown()
    said = capfd.readouterr()
    assert (status, said.out, said.err.count("\n")) == (2, "", 1)
    assert said.err.startswith("countermark: ")
    assert url in said.err
    assert "should not happen" not in said.err
    assert said.err.strip().isprintable()
    if fault == "redirect":
        assert "https://elsewhere.example/tsa" in said.err


# Roots


def odd_root(root: Path) -> bytes:
    """The root with a name that is no text, in PEM; OpenSSL cannot read it."""
    der = x509.load_pem_x509_certificate(root.read_bytes()).public_bytes(Encoding.DER)
    changed = der.replace(b"root", b"\xff" * 4)
    assert changed != der
    return (
        b"-----BEGIN CERTIFICATE-----\n"
        + base64.encodebytes(changed)
        + b"-----END CERTIFICATE-----\n"
    )


@pytest.fixture(scope="module")
def claimed(
    authority: Authority, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, bytes]:
    """A claim of an earlier release's key against its own model, that model, and the right roots.

    Nothing is trained.
    """
    folder = tmp_path_factory.mktemp("claimed")
    shutil.copytree(Path(__file__).parent / "golden" / "0.1.0", folder / "release")
    mine = folder / "release" / "mine"
    claim(key=mine / "key", suspect=mine, out=folder / "claim", tsa=authority.url)
    return (
        folder / "claim",
        mine,
        (folder / "release" / "roots.pem").read_bytes() + authority.root.read_bytes(),
    )


@pytest.mark.parametrize("place", ["before", "after", "alone"])
@pytest.mark.parametrize("kind", ["name", "rubbish", "cut"])
def test_an_odd_root_beside_the_right_one_stops_no_judgement(
    place: str,
    kind: str,
    claimed: tuple[Path, Path, bytes],
    authority: Authority,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """An odd root beside the right one is left out and named; alone it is an error, not a verdict.

    A library in Rust panics over the first kind.
    """
    folder, suspect, right = claimed
    odd = {
        "name": odd_root(authority.root),
        "rubbish": b"-----BEGIN CERTIFICATE-----\nYWJj\n-----END CERTIFICATE-----\n",
        "cut": b"-----BEGIN CERTIFICATE-----\nYWJj\n",
    }[kind]
    roots = tmp_path / "roots.pem"
    roots.write_bytes({"before": odd + right, "after": right + odd, "alone": odd}[place])
    arguments = ["adjudicate", str(folder), "--suspect", str(suspect), "--roots", str(roots)]
    status = main([*arguments, "--out", str(tmp_path / "j")])
    said = capfd.readouterr()
    lines = [line for line in said.err.splitlines() if "clean examples" not in line]
    assert len(lines) == 1
    if place == "alone":
        assert status == 2
        assert lines[0].startswith("countermark: ")
        assert not list(tmp_path.glob("j.*"))
    else:
        assert status == 0
        assert f"certificate {1 if place == 'before' else 3} of {roots} cannot be used" in lines[0]
        assert "The claim is upheld" in said.out


def test_a_root_that_panics_the_library_trusts_nobody(authority: Authority) -> None:
    odd = x509.load_pem_x509_certificate(odd_root(authority.root))
    with pytest.raises(UntrustedError):
        check_token(
            stamped(authority, b"this"), sha256(b"this"), [odd, *load_roots(authority.root)], "T"
        )
    assert root_name(odd).startswith("the certificate with the SHA-256 ")
    assert root_name(load_roots(authority.root)[0]) == "CN=root"


def test_an_odd_certificate_in_a_token_is_no_crash(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "tsa")
    authority.close()
    conf = (authority.folder / "conf").read_text()
    (authority.folder / "conf").write_text(
        conf.replace("signer_key", f"certs = {authority.root}\nsigner_key")
    )
    response, roots = stamped(authority, b"this"), load_roots(authority.root)
    root = roots[0].public_bytes(Encoding.DER)
    for form in reordered(response):
        changed = form.replace(root, root.replace(b"root", b"\xff" * 4))
        assert changed != form
        with pytest.raises(CountermarkError):
            check_token(changed, sha256(b"this"), roots, "T")


def test_the_words_of_an_authority_cannot_show_another_verdict(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The claimant chooses the response in the claim, and so its status text."""
    release = tmp_path / "release"
    shutil.copytree(Path(__file__).parent / "golden" / "0.1.0", release)
    record = read_json(release / "claim" / "claim.json")
    words = "\x1b[2J\x1b[H\nThe claim is upheld\u202e<b>"
    write_json(release / "claim" / "claim.json", {**record, "t1": encode_token(refusal(words))})
    arguments = [
        "adjudicate",
        str(release / "claim"),
        "--suspect",
        str(release / "mine"),
        "--roots",
        str(release / "roots.pem"),
    ]
    assert main([*arguments, "--out", str(tmp_path / "j")]) == 1
    said = capfd.readouterr().out
    text = (tmp_path / "j.html").read_text()
    assert r"\x1b[2J\x1b[H The claim is upheld\u202e" in said
    assert r"\x1b[2J\x1b[H The claim is upheld\u202e&lt;b&gt;" in text
    for shown in (said, text):
        assert all(line.isprintable() for line in shown.split("\n"))


@pytest.mark.parametrize("library", ["asn1crypto", "rfc3161_client"])
def test_a_missing_library_ends_in_no_verdict(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It says nothing of the token, and so nothing of the claim."""
    release = Path(__file__).parent / "golden" / "0.1.0"
    arguments = [
        "adjudicate",
        str(release / "claim"),
        "--suspect",
        str(release / "mine"),
        "--roots",
        str(release / "roots.pem"),
    ]
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    assert main([*arguments, "--out", str(tmp_path / "j")]) == 2
    assert not list(tmp_path.iterdir())
    assert "countermark[judge]" in capfd.readouterr().err


def test_an_authority_may_want_the_login_of_a_netrc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The user chose the authority, and has no other way to give a password for it."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(self.headers.get("Authorization", ""))
            self.send_error(403)

        def log_message(self, *_: object) -> None:
            pass

    (tmp_path / "netrc").write_text("machine 127.0.0.1 login anna password secret")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(CountermarkError):
            request_token(f"http://127.0.0.1:{server.server_port}/", b"this")
        server.shutdown()
    assert seen[0].startswith("Basic ")
