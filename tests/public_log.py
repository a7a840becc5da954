"""A public log with Rekor's API, and a drand chain beside it, both on loopback.

The log signs what it takes and knows entries by their key. The chain is of one signer. Both run by
a clock that a test may set.
"""

import base64
import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_public_key,
)

from countermark.beacons import limit_kept
from countermark.registry import LOG_FORMAT, PublicLog, public_log

with limit_kept():
    from py_ecc.bls.g2_primitives import G1_to_pubkey, G2_to_signature
    from py_ecc.bls.hash_to_curve import hash_to_G1
    from py_ecc.optimized_bls12_381 import G2, multiply

_DOMAIN = b"BLS_SIG_BLS12381G1_XMD:SHA-256_SSWU_RO_NUL_"
GENESIS, PERIOD = 1_700_000_000, 3


def pem_of(key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey) -> str:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def new_identity(folder: Path, name: str = "owner") -> tuple[Path, Path]:
    """A private and a public key in PEM files."""
    key = rsa.generate_private_key(65537, 2048)
    private, public = folder / f"{name}-private.pem", folder / f"{name}.pem"
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_text(pem_of(key.public_key()))
    return private, public


class LocalLog:
    """A log and a chain: `file` describes both.

    Attributes:
        behind: seconds by which the log's clock is behind; as many as that, and nobody waits.
        entries: what it holds, as Rekor gives it.
        hidden: numbers of entries that its index leaves out.
    """

    def __init__(self, folder: Path) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.secret = int.from_bytes(hashlib.sha256(str(folder).encode()).digest()[:31], "big")
        self.behind, self.entries, self.hidden = 120, list[dict[str, Any]](), set[int]()
        self.spoil = lambda answer: answer
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.file = folder / "log.json"
        chain = {
            "address": self.url,
            "hash": hashlib.sha256(b"a chain").hexdigest(),
            "public_key": G2_to_signature(multiply(G2, self.secret)).hex(),
            "genesis_time": GENESIS,
            "period": PERIOD,
            "schemeID": "bls-unchained-g1-rfc9380",
        }
        described = {
            "format": LOG_FORMAT,
            "address": self.url,
            "public_key": pem_of(self.key.public_key()),
            "beacon": chain,
        }
        self.file.write_text(json.dumps(described))

    @property
    def log(self) -> PublicLog:
        return public_log(self.file)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def round(self, number: int) -> bytes:
        message = hashlib.sha256(number.to_bytes(8, "big")).digest()
        return bytes(
            G1_to_pubkey(multiply(hash_to_G1(message, _DOMAIN, hashlib.sha256), self.secret))
        )

    def enter(self, proposed: dict[str, Any], at: int | None = None) -> dict[str, Any] | None:
        """Take an entry; none if it is there already, as Rekor has it."""
        body = base64.b64encode(json.dumps(proposed, separators=(",", ":")).encode()).decode()
        if body in [entry["body"] for entry in self.entries]:
            return None
        entry = {
            "body": body,
            "integratedTime": int(time.time()) - self.behind if at is None else at,
            "logID": hashlib.sha256(
                self.key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            ).hexdigest(),
            "logIndex": len(self.entries),
        }
        signed = json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()
        promise = base64.b64encode(self.key.sign(signed, ec.ECDSA(hashes.SHA256()))).decode()
        whole = {**entry, "verification": {"signedEntryTimestamp": promise}}
        self.entries.append(whole)
        return whole

    def named(self, number: int) -> str:
        return hashlib.sha256(b"%d" % number).hexdigest()

    def answer(self, path: str, body: dict[str, Any] | None) -> Any:
        if path == "/api/v1/log/publicKey":
            return pem_of(self.key.public_key())
        if path == "/api/v1/log/entries" and body is not None:
            made = self.enter(body)
            return None if made is None else {self.named(made["logIndex"]): made}
        if path == "/api/v1/index/retrieve" and body is not None:
            wanted = load_pem_public_key(base64.b64decode(body["publicKey"]["content"]))
            return [
                self.named(number)
                for number, entry in enumerate(self.entries)
                if number not in self.hidden and _key_of(entry) == wanted
            ]
        if path == "/api/v1/log/entries/retrieve" and body is not None:
            assert len(body["entryUUIDs"]) <= 10  # as the public instance wants it
            known = {self.named(number): entry for number, entry in enumerate(self.entries)}
            return [{name: known[name]} for name in body["entryUUIDs"]]
        number = int(path.rpartition("/")[2])
        return {"round": number, "signature": self.round(number).hex()}

    def _handler(log) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._say(log.answer(self.path, None))

            def do_POST(self) -> None:
                size = int(self.headers["Content-Length"])
                self._say(log.answer(self.path, json.loads(self.rfile.read(size))))

            def _say(self, answer: Any) -> None:
                answer = log.spoil(answer)
                said = answer if isinstance(answer, str) else json.dumps(answer)
                self.send_response(409 if answer is None else 200)
                self.send_header("Content-Length", str(len(said.encode())))
                self.end_headers()
                self.wfile.write(said.encode())

            def log_message(self, *_arguments: object) -> None:
                pass

        return Handler


def _key_of(entry: dict[str, Any]) -> Any:
    content = json.loads(base64.b64decode(entry["body"]))["spec"]["signature"]["publicKey"]
    return load_pem_public_key(base64.b64decode(content["content"]))
