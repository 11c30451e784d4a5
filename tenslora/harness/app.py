"""The command line: Hydra's, but what the user can put right is said in one line."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig

from tenslora.errors import TensLoRAError
from tenslora.harness.config import register_resolvers

log = logging.getLogger(__name__)

_FULL = "HYDRA_FULL_ERROR"


def run_app(
    task: Callable[[DictConfig], Any], config_name: str, sweep: Callable[[DictConfig, Any, Any], None] | None = None
) -> None:
    """Run `task` on the config that Hydra composes from conf/ and the command line.

    With `sweep`, that decides which jobs of a multirun are carried out: see `hydra_plugins.tenslora_sweeps`.

    A mistake of the user's ends the process with status 1 and one line on standard error; with
    HYDRA_FULL_ERROR=1 it ends with the traceback. In a multirun the line goes to the job's log, Hydra goes on with
    the other jobs, and the process ends with status 1. Ctrl-C or SIGTERM ends it with status 130.
    """
    root = str(Path(__file__).resolve().parents[2])
    guarded = _Task(task, sweep, wants_traceback=os.environ.get(_FULL) == "1")
    # Hydra then lets its own errors through instead of printing them over several lines.
    os.environ[_FULL] = "1"
    # A launcher's jobs start in other processes, on other machines: they are to find this package, wherever they are.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    # As Ctrl-C, so that whatever runs below gets to stop its own processes.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        hydra.main(version_base="1.3", config_path=os.path.join(root, "conf"), config_name=config_name)(guarded)()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        # Before the task has begun, whatever is wrong is with the command line, conf/ or the output folder.
        if guarded.wants_traceback or (guarded.started and not isinstance(error, TensLoRAError)):
            raise
        sys.exit(_line(error))


class _Task:
    """What Hydra calls for each job, here or in a launcher's process, and what its sweeper asks for the whole."""

    def __init__(
        self, task: Callable[[DictConfig], Any], sweep: Callable[..., None] | None, wants_traceback: bool
    ) -> None:
        self.task, self._sweep, self.wants_traceback = task, sweep, wants_traceback
        self.started = False

    def __call__(self, composed: DictConfig) -> Any:
        self.started = True
        try:
            return self.task(composed)
        except TensLoRAError as error:
            if self.wants_traceback:
                raise
            line = _line(error)
        # Out here the error is gone, and with it the frames that held the model: Hydra keeps what is raised until
        # the last job of a multirun is over, and launchers send it through pickle.
        if HydraConfig.get().mode != RunMode.MULTIRUN:
            sys.exit(line)
        log.error(line)
        raise TensLoRAError(line.removeprefix("error: "))

    def sweep(self, config: DictConfig, jobs: Any, launch: Any) -> None:
        assert self._sweep is not None
        self.started = True
        self._sweep(config, jobs, launch)


# On import, so that it is done as well where a launcher's process unpickles a task.
register_resolvers()


def _line(error: Exception) -> str:
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return f"error: {group}={option}: must be one of {', '.join(error.options)}"
    # An error from a data worker comes wrapped in the worker's traceback; its own message is the last line.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any(line.startswith("Original Traceback") for line in lines):
        return f"error: {lines[-1].partition(': ')[2]}"
    return f"error: {' '.join(lines)}"
