"""What ``python -m tenslora.harness.<name>`` prints, where its output goes to something other than a terminal."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PRINTS = """
from tenslora.harness.commands import mistakes_in_one_line
with mistakes_in_one_line():
    print("caf\\u00e9\\n" * 100_000)
"""


@pytest.mark.parametrize(
    ("to", "status", "out", "err"),
    [
        ("| head -n 1", 1, "caf\\xe9\n", ""),
        (">&-", 0, "", ""),
        pytest.param(
            "> /dev/full",
            1,
            "",
            "error: the output: cannot be used (No space left on device)\n",
            marks=pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full"),
        ),
    ],
)
def test_an_output_that_cannot_take_it_all_is_no_traceback(to: str, status: int, out: str, err: str) -> None:
    command = f"set -o pipefail; {shlex.join([sys.executable, '-c', PRINTS])} {to}"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (status, out, err)
