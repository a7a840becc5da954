"""Show that a study that is killed at random moments ends like one that is not.

    python benchmarks/kill_study.py

Runs the quick profile on digits once undisturbed, then again under `kill -9` of the command and its
workers at 20 random moments, and compares every finished unit and results.json byte for byte. It
takes about twice the time of the study, and what the kills cost.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

COMMAND = [sys.executable, "-m", "countermark", "reproduce", "--data", "digits", "--json", "--out"]


def finish(out: Path) -> float:
    begun = time.monotonic()
    subprocess.run([*COMMAND, str(out)], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - begun


def finished(out: Path) -> int:
    return sum(
        1
        for path in (out / "units").glob("*/manifest.json")
        if not path.parent.name.endswith(".partial")
    )


def kill_once(out: Path, after: float) -> None:
    process = subprocess.Popen(
        [*COMMAND, str(out)],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    time.sleep(after)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/kill_study"))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    calm, killed = arguments.out / "calm", arguments.out / "killed"
    seconds = finish(calm)
    moments = random.Random(arguments.seed)
    for number in range(arguments.kills):
        kill_once(killed, moments.uniform(3, 3 + 1.5 * seconds / arguments.kills))
        print(f"kill {number + 1}: {finished(killed)} units are finished", flush=True)
    finish(killed)
    units = {
        path.parent.name: path.read_bytes() for path in (calm / "units").glob("*/manifest.json")
    }
    again = {
        path.parent.name: path.read_bytes() for path in (killed / "units").glob("*/manifest.json")
    }
    same = (
        units == again
        and (calm / "results.json").read_bytes() == (killed / "results.json").read_bytes()
    )
    print(
        json.dumps(
            {
                "kills": arguments.kills,
                "units": len(units),
                "seconds_undisturbed": round(seconds),
                "identical": same,
            }
        )
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
