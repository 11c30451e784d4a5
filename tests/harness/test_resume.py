"""Real runs of train.py, killed with SIGKILL at chosen points and resumed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT
from tests.running import SHORT, record

# One process imports everything once and forks a run for each entry of its plan: (folder, resume, where to kill).
# Where: "step N", before the Nth optimizer step of the process; "write N", inside its Nth write of a file, with half
# of the bytes on disk; "replace N", when its Nth file is written but has not taken its name; or "" for not at all.
DRIVER = """
import json, os, signal, sys
import torch, torchvision, timm, sklearn.datasets, sklearn.metrics
import tenslora.files, tenslora.harness.training.loop
import train
from tenslora.harness.app import run_app

def killing(function, number):
    calls = iter(range(1, 1000))
    def wrapped(*args):
        if next(calls) == number:
            if function is real_fsync:
                os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    return wrapped

real_fsync = os.fsync
torch.set_num_threads(1)
for folder, resume, where in json.loads(sys.argv[1]):
    pid = os.fork()
    if pid == 0:
        kind, _, number = where.partition(" ")
        if kind == "step":
            torch.optim.AdamW.step = killing(torch.optim.AdamW.step, int(number))
        elif kind == "write":
            os.fsync = killing(os.fsync, int(number))
        elif kind == "replace":
            os.replace = killing(os.replace, int(number))
        sys.argv = ["train.py", f"hydra.run.dir={folder}", f"resume={resume}", *sys.argv[2:]]
        run_app(train.main, "config")
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status))
"""

OVERRIDES = [*SHORT, "trainer.epochs=4", "trainer.batch_size=16", "adapter.dropout=0.2", "dataset.transform.flip=true"]


def drive(plan: list[tuple[Path, bool, str]]) -> list[int]:
    """The signal that ended each run, 0 for none."""
    words = json.dumps([(str(folder), resume, where) for folder, resume, where in plan])
    command = [sys.executable, "-c", DRIVER, words, *OVERRIDES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.splitlines() if line.lstrip("-").isdigit()]


def test_a_run_killed_anywhere_and_resumed_equals_one_that_was_not(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    kills = [
        "step 2",  # in the first epoch: nothing to resume from yet
        "write 1",  # half of the first checkpoint written
        "step 7",  # in the second epoch
        "replace 1",  # the second epoch's checkpoint complete, under its temporary name
        "write 2",  # the third epoch's checkpoint
        "write 2",  # the fourth epoch's done, half of the adapter written
        "replace 3",  # all there but the record's name
    ]
    ended = drive([(whole, False, ""), *((broken, True, kill) for kill in kills), (broken, True, "")])
    assert ended == [0, *[9] * len(kills), 0]
    assert record(broken)["metrics"] == record(whole)["metrics"]
    assert len(record(whole)["metrics"]["history"]) == 4
    for file in ("adapter.safetensors", "head.safetensors"):
        assert (broken / file).read_bytes() == (whole / file).read_bytes()


def test_resuming_a_finished_run_changes_nothing_and_other_settings_are_refused(tmp_path: Path) -> None:
    assert drive([(tmp_path, False, ""), (tmp_path, True, "step 1")]) == [0, 0]
    command = [sys.executable, "train.py", f"hydra.run.dir={tmp_path}", "resume=true", *OVERRIDES, "optimizer.lr=0.5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "is of a run with other settings" in done.stderr
