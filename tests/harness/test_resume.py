"""Real runs of train.py, killed with SIGKILL at chosen points and resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT
from tests.running import SHORT, record

OVERRIDES = [*SHORT, "trainer.epochs=3", "trainer.batch_size=16", "adapter.dropout=0.2", "dataset.transform.flip=true"]
STEPS_PER_EPOCH = 4

KILLS = [
    "step 2",  # in the first epoch: there is nothing to resume from
    "write checkpoint.safetensors 1",
    f"step {STEPS_PER_EPOCH + 3}",  # in the second epoch
    "rename checkpoint.safetensors 1",
    "write checkpoint.safetensors 2",  # in the third epoch
    "write adapter.safetensors 1",
    "rename result.json 1",
]


def test_a_run_killed_anywhere_and_resumed_equals_one_that_was_not(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    plan = [
        (whole, "", []),
        *((broken, kill, ["resume=true"]) for kill in KILLS),
        (broken, "", ["resume=true"]),
        (whole, "step 1", ["resume=true"]),  # makes no step, and so is not killed
        (whole, "", ["resume=true", "optimizer.lr=0.5"]),
    ]
    words = json.dumps([(str(folder), kill, settings) for folder, kill, settings in plan])
    driver = [sys.executable, str(Path(__file__).with_name("kill_driver.py")), words, *OVERRIDES]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(driver, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ends = [int(line) for line in done.stdout.splitlines() if line.lstrip("-").isdigit()]
    assert ends == [0, *[9] * len(KILLS), 0, 0, -1], done.stderr
    assert "is of a run with other settings" in done.stderr.splitlines()[-1]

    assert len(record(whole)["metrics"]["history"]) == 3
    assert record(broken)["metrics"] == record(whole)["metrics"]
    for file in ("adapter.safetensors", "head.safetensors", "predictions.safetensors"):
        assert (broken / file).read_bytes() == (whole / file).read_bytes()
