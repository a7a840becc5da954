"""Every path stays on its device, in a process of its own.

A pretended device makes autograd start threads for it, and no process with such threads can be
forked; other tests do that.
"""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import elsewhere


def test_every_path_stays_on_its_device() -> None:
    there = Path(__file__).with_name("test_device.py")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:randomly",
        str(there),
    ]
    environment = {**os.environ, elsewhere.APART: "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_the_tests_of_a_gpu_are_left_out_for_no_other_reason_than_that_there_is_none() -> None:
    try:
        importlib.import_module("test_gpu")
    except pytest.skip.Exception as reason:
        pytest.fail(f"with a GPU they would be left out as well: {reason}")
