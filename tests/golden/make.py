"""Make the golden files of a release with `python tests/golden/make.py VERSION`.

Run it once for each release; existing files are never made again. Every later release must be able
to read them (tests/test_golden.py). Their key is an example, and its secret is public.
"""

import json
import os
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402

from answered import first_rows  # noqa: E402
from authority import Authority  # noqa: E402
from countermark import adjudicate, calibrate, claim, log_head, protect  # noqa: E402
from countermark.data import load_pools  # noqa: E402
from countermark.guard import QueryLog, load_guarded, weights_sha256  # noqa: E402
from countermark.networks import load_model, save_model  # noqa: E402
from countermark.service.clients import add_client  # noqa: E402
from countermark.thieves.remove import prune  # noqa: E402


def main(version: str) -> None:
    """Make one folder of every file that a user keeps."""
    place = HERE / version
    place.mkdir()
    os.chdir(place)  # files name no folder of this machine
    out = Path()
    authority = Authority(place / "authority")
    mine = out / "mine"
    protect("digits", out=mine, epochs=15, tsa=authority.url, roots=authority.root)
    calibrate(mine, cost=2.0, tsa=authority.url)
    add_client(mine / "clients.json", "anna", None)
    with QueryLog(str(out / "log.db")) as log:
        x = load_pools("digits", 0).thief.x
        answered = load_guarded(mine, mine / "key").under(log.identity)(x, "anna")
        rows = list(first_rows(answered, weights_sha256(mine), "anna", log.identity).values())
        print(sum(log.append(rows)), "rows in the log")
    network, description = load_model(mine)
    (out / "theirs").mkdir()
    save_model(out / "theirs", prune(network, 0.3), description)
    claim(key=mine / "key", suspect=out / "theirs", out=out / "claim", tsa=authority.url)
    adjudicate(out / "claim", suspect=out / "theirs", roots=authority.root, out=out / "judgement")
    head = log_head(str(out / "log.db"), tsa=authority.url)
    (out / "head.json").write_text(json.dumps(vars(head)))
    shutil.copy(authority.root, out / "roots.pem")
    authority.close()
    for left in (authority.folder, mine / "key" / "source", out / "theirs"):
        shutil.rmtree(left)
    for extra in ("log.db-wal", "log.db-shm", "judgement.html"):
        (out / extra).unlink(missing_ok=True)
    for file in out.rglob("*.json"):
        file.chmod(0o644)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
