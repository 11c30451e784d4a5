"""What is checked before the first of several runs starts, of sweep.py or of train.py with -m."""

from __future__ import annotations

import os
import sys
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class MultirunCheck(Callback):
    """Refuses to start several runs at once in each of the processes that torchrun or accelerate launch has started.

    A run waits for its other processes. If these carry out their runs in other orders, it waits without an end.
    """

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
