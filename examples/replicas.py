"""Replicas of a service of your own: LitServe runs two processes that write one log.

    countermark guard mine
    python examples/replicas.py mine --log postgresql://USER:PASSWORD@HOST/DATABASE --port 8000

On several machines, start it on each of them with the same model, key and log. Then no trial is
lost or stored twice, and a client gets the same answer from every replica. Install LitServe with
`pip install litserve`. A client asks like this:

    curl http://127.0.0.1:8000/predict -H 'Content-Type: application/json' \
        -d '{"api_key": "key-of-anna", "image": "'$(base64 -w0 three.png)'"}'
"""

import argparse
import base64
import binascii

import litserve
from fastapi import HTTPException

import countermark as cm

ACCOUNTS = {"key-of-anna": "anna", "key-of-bob": "bob"}  # how your clients sign in is up to you


class Replica(litserve.LitAPI):  # type: ignore[misc]
    """One process: LitServe hands requests to it while others wait for the model or the log."""

    def __init__(self, model: str, log: str) -> None:
        """Remember what `setup` opens, which runs in each process."""
        super().__init__(enable_async=True)
        self.model, self.log = model, log

    def setup(self, device: str) -> None:
        """Load the model with its guard, and open the log."""
        self.guard = cm.Guarded(self.model, log=self.log, device=device)

    async def decode_request(self, request: dict[str, str]) -> tuple[bytes, str]:
        """Find out who asks, and what."""
        if request.get("api_key") not in ACCOUNTS:
            raise HTTPException(401, "unknown client")
        try:
            image = base64.b64decode(request.get("image", ""), validate=True)
        except (binascii.Error, ValueError, TypeError):
            raise HTTPException(400, "image is the base64 of an image file") from None
        return image, ACCOUNTS[request["api_key"]]

    async def predict(self, asked: tuple[bytes, str]) -> dict[str, object]:
        """Classify; the trial is in the log before the answer is given."""
        try:
            return vars(await self.guard.classify(*asked))
        except cm.DamagedError as error:
            raise HTTPException(400, str(error)) from None
        except cm.CountermarkError:  # for you to see on standard error, and not for clients
            raise HTTPException(503, "try again later") from None

    async def encode_response(self, found: dict[str, object]) -> dict[str, object]:
        """Give the client the label and the name of the class."""
        return found


def main() -> None:
    """Serve until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Two replicas of a service, and one log")
    parser.add_argument("model", help="model folder with a guard and its key")
    parser.add_argument("--log", required=True, help="postgresql://USER:PASSWORD@HOST/DATABASE")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    server = litserve.LitServer(
        Replica(options.model, options.log), accelerator="cpu", workers_per_device=2
    )
    server.run(host="127.0.0.1", port=options.port, generate_client_file=False)


if __name__ == "__main__":
    main()
