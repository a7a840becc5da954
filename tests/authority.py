"""A timestamp authority on loopback, made with `openssl ts`.

It has a root certificate and, under it, the certificate of the authority, which a test may make
expired.
"""

import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from rfc3161_client import HashAlgorithm, TimestampRequestBuilder

_CONFIG = """
[ca]
basicConstraints = critical, CA:true
keyUsage = critical, keyCertSign
[stamping]
basicConstraints = critical, CA:false
keyUsage = critical, digitalSignature
extendedKeyUsage = critical, timeStamping
[web]
basicConstraints = critical, CA:false
extendedKeyUsage = serverAuth
[tsa]
default_tsa = here
[here]
serial = {folder}/serial
signer_cert = {folder}/tsa.pem
signer_key = {folder}/tsa.key
signer_digest = sha256
default_policy = 1.2.3.4.1
digests = sha256, sha512
ess_cert_id_alg = sha256
ordering = no
tsa_name = no
"""


class Authority:
    """An authority: `url` to ask, `root` to trust."""

    def __init__(
        self, folder: Path, key: str = "ec", extensions: str = "stamping", days: int = 30
    ) -> None:
        folder = folder.resolve()
        self.folder, self.root = folder, folder / "root.pem"
        if not (folder / "tsa.pem").exists():
            self._make(folder, key, extensions, days)
        self.lock = threading.Lock()
        self.served = 0
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def _make(self, folder: Path, key: str, extensions: str, days: int) -> None:
        folder.mkdir(parents=True)
        (folder / "conf").write_text(_CONFIG.format(folder=folder))
        (folder / "serial").write_text("01")
        algorithm = ["ec", "-pkeyopt", "ec_paramgen_curve:P-256"] if key == "ec" else ["rsa:2048"]
        self._openssl(
            "req", "-x509", "-newkey", *algorithm, "-nodes", "-keyout", "root.key",
            "-out", "root.pem", "-days", "60", "-subj", "/CN=root", "-config", "conf",
            "-extensions", "ca",
        )  # fmt: skip
        self._openssl(
            "req",
            "-new",
            "-newkey",
            *algorithm,
            "-nodes",
            "-keyout",
            "tsa.key",
            "-out",
            "tsa.csr",
            "-subj",
            "/CN=tsa",
        )
        self._openssl(
            "x509", "-req", "-in", "tsa.csr", "-CA", "root.pem", "-CAkey", "root.key",
            "-CAcreateserial", "-out", "tsa.pem", "-days", str(days), "-extfile", "conf",
            "-extensions", extensions,
        )  # fmt: skip

    def reply(self, request: bytes) -> bytes:
        with self.lock:
            self.served += 1
            (self.folder / "request").write_bytes(request)
            self._openssl(
                "ts", "-reply", "-queryfile", "request", "-out", "response", "-config", "conf"
            )
            return (self.folder / "response").read_bytes()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.folder, check=True, capture_output=True)

    def _handler(authority) -> type[BaseHTTPRequestHandler]:  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = authority.reply(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.send_header("Content-Type", "application/timestamp-reply")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_arguments: object) -> None:
                pass

        return Handler


def stamped(authority: Authority, message: bytes) -> bytes:
    """A token without the way over HTTP."""
    request = (
        TimestampRequestBuilder()
        .data(message)
        .hash_algorithm(HashAlgorithm.SHA256)
        .nonce(nonce=True)
        .cert_request(cert_request=True)
        .build()
    )
    return authority.reply(request.as_bytes())


if __name__ == "__main__":  # python tests/authority.py FOLDER
    import sys

    running = Authority(Path(sys.argv[1]))
    print(f"--tsa {running.url} --roots {running.root}", flush=True)
    threading.Event().wait()
