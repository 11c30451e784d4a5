"""What is checked before a command starts its run, or the first of several."""

from __future__ import annotations

import os
import sys
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class MultirunCheck(Callback):
    """Refuses to start several runs at once in each of the processes that torchrun or accelerate launch has started.

    A run waits for its other processes. If these carry out their runs in other orders, it waits without an end.

    A single run is carried out by no launcher, whose settings are then lost: it warns of them.
    """

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        if not config.hydra.launcher._target_.endswith("BasicLauncher"):
            name = config.hydra.runtime.choices["hydra/launcher"]
            print(
                f"hydra/launcher={name}: has no effect on a single run, which starts here and now; add -m to launch it",
                file=sys.stderr,
            )

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        in_order = config.hydra.launcher._target_.endswith("BasicLauncher")
        count = os.environ.get("WORLD_SIZE", "1")
        if count == "1" or (in_order and not config.hydra.sweeper._target_.endswith("TableSweeper")):
            return
        sys.exit(  # because Hydra only warns of another error of a callback
            f"error: WORLD_SIZE={count}: must be 1 for sweep.py, and for any hydra/launcher but basic; torchrun and "
            f"accelerate launch share a single run of train.py among processes, and a launcher carries out several "
            f"runs at once"
        )
