"""Carries out train.py and sweep.py in forks of one process that has imported everything, so that each starts at once.

Every line on standard input is a JSON list of commands, which run at the same time; the answer is a JSON list of their
exit statuses. `tests.commands.Commands` is the other end, and says what a command holds.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra.core.plugins
import joblib
import matplotlib.figure
import scipy.stats
import submitit
import timm
import torch
import torchvision

import tenslora.harness.results.figures
import tenslora.harness.results.report
import tenslora.harness.training.loop
import train

IMPORTED = (joblib, matplotlib.figure, scipy.stats, submitit, timm, torchvision, tenslora.harness, train)
"""What a command would otherwise import itself."""

SIGNALS = {"kill": signal.SIGKILL, "interrupt": signal.SIGINT, "terminate": signal.SIGTERM}
PLACES: dict[str, tuple[Any, str]] = {
    "step": (torch.optim.AdamW, "step"),
    "write": (os, "fsync"),
    "replace": (os, "replace"),
}

_fsync = os.fsync


def _raising(function: Callable[..., Any], number: int, end: signal.Signals) -> Callable[..., Any]:
    calls = 0

    def wrapped(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            if function is _fsync:
                os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
            signal.raise_signal(end)  # in this thread, so that it arrives exactly here
        return function(*args)

    return wrapped


def _carry_out(command: dict[str, Any]) -> None:
    for number, file in enumerate(command["files"], start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    if command["accident"]:
        end, place, number = command["accident"].split()
        owner, name = PLACES[place]
        setattr(owner, name, _raising(getattr(owner, name), int(number), SIGNALS[end]))
    if command["largest_file"]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (command["largest_file"],) * 2)
    os.environ.update(command["environment"])
    root = Path.cwd()
    sys.path[0] = str(root)  # as for `python <root>/train.py`
    os.chdir(command["folder"])
    sys.argv = [command["script"], *command["words"]]
    runpy.run_path(str(root / command["script"]), run_name="__main__")


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs without it
    hydra.core.plugins.Plugins.instance()  # looks for Hydra's plugins
    torch.set_num_threads(1)
    gc.freeze()  # the forks' garbage collection need not walk through all that was imported
    for line in sys.stdin:
        processes = []
        for command in json.loads(line):
            process = os.fork()
            if process == 0:
                _carry_out(command)
                sys.exit()
            processes.append(process)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
        print(json.dumps(statuses), flush=True)


if __name__ == "__main__":
    main()
