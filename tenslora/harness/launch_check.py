"""Checks whether the chosen launcher can do what it is asked, before a command starts its run or its runs."""

from __future__ import annotations

import os
import sys
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class LaunchCheck(Callback):
    """Warns of a launcher that has nothing to launch, and refuses one in processes that share their runs.

    Hydra carries out a single run in its own process, so the settings of a launcher are lost. The processes that
    torchrun or accelerate launch has started share each run: a run waits for all of them, without an end if they carry
    out their runs in different orders.
    """

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        if not _in_order(config):
            name = config.hydra.runtime.choices["hydra/launcher"]
            print(
                f"hydra/launcher={name}: has no effect on a single run, which starts here and now; add -m to launch it",
                file=sys.stderr,
            )

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        count = os.environ.get("WORLD_SIZE", "1")
        if count == "1" or (_in_order(config) and not config.hydra.sweeper._target_.endswith("TableSweeper")):
            return
        sys.exit(  # because Hydra only warns of another error of a callback
            f"error: WORLD_SIZE={count}: must be 1 for sweep.py, and for any hydra/launcher but basic; torchrun and "
            f"accelerate launch share a single run of train.py among processes, and a launcher carries out several "
            f"runs at once"
        )


def _in_order(config: DictConfig) -> bool:
    """Whether the launcher is Hydra's basic one, which carries out one run after the other in this process."""
    return str(config.hydra.launcher._target_).endswith("BasicLauncher")
