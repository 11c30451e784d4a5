"""Runs train.py many times from one process, which imports everything once and forks each run.

    python kill_driver.py PLAN SETTINGS...

PLAN is a JSON list with one entry for each run: its folder, where to kill it, and its settings beyond SETTINGS. For
each run one line is printed: the signal that ended it, or minus its exit status. Where to kill is one of

- "step N": before the Nth optimizer step that the process makes;
- "write NAME N": while it writes the file of that name for the Nth time, with half of the bytes on disk;
- "rename NAME N": when the file is complete but still has its temporary name;
- "": nowhere.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import sklearn.datasets
import sklearn.metrics
import timm
import torch
import torchvision

import tenslora.harness.training.loop
import train
from tenslora.harness.app import run_app

IMPORTED_EARLY = (sklearn.datasets, sklearn.metrics, timm, torchvision, tenslora.harness.training.loop)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(where: str) -> None:
    """Arrange for this process to die at a place."""
    kind, *name, number = where.split()
    left = int(number)

    def is_there() -> bool:
        nonlocal left
        left -= 1
        return left == 0

    step, fsync, replace = torch.optim.AdamW.step, os.fsync, os.replace

    def killing_step(optimizer: torch.optim.AdamW) -> None:
        if is_there():
            die()
        step(optimizer)

    def killing_fsync(descriptor: int) -> None:
        if name[0] in os.readlink(f"/proc/self/fd/{descriptor}") and is_there():
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            die()
        fsync(descriptor)

    def killing_replace(source: Any, target: Any) -> None:
        if os.path.basename(target) == name[0] and is_there():
            die()
        replace(source, target)

    places = {
        "step": (torch.optim.AdamW, "step", killing_step),
        "write": (os, "fsync", killing_fsync),
        "rename": (os, "replace", killing_replace),
    }
    setattr(*places[kind])


def main() -> None:
    torch.set_num_threads(1)
    for folder, where, settings in json.loads(sys.argv[1]):
        child = os.fork()
        if child == 0:
            if where:
                arm(where)
            sys.argv = ["train.py", f"hydra.run.dir={folder}", *sys.argv[2:], *settings]
            run_app(train.main, "config")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status), flush=True)


if __name__ == "__main__":
    main()
