"""Carries out commands in forks of one process that has imported everything, so that each starts at once.

Every line on standard input is a JSON list of commands, which run at the same time; the answer is a JSON list of their
exit statuses. `tests.commands.Commands` is the other end, and says what a command holds.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import torch
from hydra.core.plugins import Plugins

IMPORTED = (
    "datasets",
    "jinja2",
    "joblib",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
    "scipy.stats",
    "sklearn.metrics",
    "submitit",
    "tenslora.harness.adapted_model",
    "tenslora.harness.backbones",
    "tenslora.harness.results.figures",
    "tenslora.harness.results.report",
    "tenslora.harness.training.loop",
    "tests.peft.train_in_trainer",
    "timm",
    "torchvision.transforms.v2",
    "train",
    "transformers.models.bert.modeling_bert",
)
"""What a command would otherwise import itself."""

SIGNALS = {"kill": signal.SIGKILL, "interrupt": signal.SIGINT, "terminate": signal.SIGTERM}


def _arrange(accident: str) -> None:
    end, place, *file, number = accident.split()
    owner, name = {"step": (torch.optim.AdamW, "step"), "write": (os, "fsync"), "rename": (os, "replace")}[place]
    function = getattr(owner, name)
    left = int(number)

    def wrapped(*arguments: Any) -> Any:
        nonlocal left
        # "write" has a file descriptor, "rename" two paths.
        path = os.readlink(f"/proc/self/fd/{arguments[0]}") if place == "write" else str(arguments[-1])
        is_meant = all(word in path for word in file)
        left -= is_meant
        if is_meant and left == 0:
            if place == "write":
                os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
            signal.raise_signal(SIGNALS[end])  # in this thread, so that it arrives exactly here
        return function(*arguments)

    setattr(owner, name, wrapped)


def _carry_out(command: dict[str, Any]) -> None:
    for number, file in enumerate(command["files"], start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    if command["accident"]:
        _arrange(command["accident"])
    if command["largest_file"]:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (command["largest_file"],) * 2)
    os.environ.update(command["environment"])
    # The hub's client has read its environment on import.
    huggingface_hub.constants.HF_HUB_OFFLINE = "HF_HUB_OFFLINE" in command["environment"]
    root = Path.cwd()
    sys.path[0] = str(root)  # as for `python <root>/train.py`
    os.chdir(command["folder"])
    sys.argv = [command["script"], *command["words"]]
    if command["script"].endswith(".py"):
        runpy.run_path(str(root / command["script"]), run_name="__main__")
    else:
        runpy.run_module(command["script"], run_name="__main__", alter_sys=True)


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts its background jobs without it
    for module in IMPORTED:
        importlib.import_module(module)
    Plugins.instance()  # looks for Hydra's plugins
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
