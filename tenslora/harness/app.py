"""The command line of train.py and sweep.py: Hydra's entry point, except that a user's mistake prints as one line."""

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

_ROOT = Path(__file__).resolve().parents[2]
_FULL_ERROR = "HYDRA_FULL_ERROR"


def run_app(
    task: Callable[[DictConfig], Any], config_name: str, sweep: Callable[[DictConfig, Any, Any], None] | None = None
) -> None:
    """Run `task` on the config that Hydra composes from conf/ and the command line.

    A user's mistake ends the process with status 1 and one line on standard error; HYDRA_FULL_ERROR=1 adds the
    traceback. In a multirun the line goes to the job's log, Hydra goes on with the other jobs, and the process ends
    with status 1. Ctrl-C or SIGTERM ends the process with status 130.

    Args:
        task: carries out one job.
        config_name: the name of the main config file in conf/.
        sweep: decides which jobs of a multirun are carried out; see `hydra_plugins.tenslora_sweeps.TableSweeper`. None
            for an application without a table.
    """
    guarded = _Task(task, sweep, wants_traceback=os.environ.get(_FULL_ERROR) == "1")
    # With this setting Hydra raises its own errors instead of printing them over several lines.
    os.environ[_FULL_ERROR] = "1"
    # A launcher starts jobs in other processes, perhaps on other machines, which have to find this package.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    # SIGTERM becomes KeyboardInterrupt, so that the code below can stop its own processes.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        hydra.main(version_base="1.3", config_path=str(_ROOT / "conf"), config_name=config_name)(guarded)()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        mistake = _mistake(error)
        # Until the task begins, the mistake is in the command line, in conf/ or in the output folder.
        if guarded.wants_traceback or (guarded.started and not isinstance(mistake, TensLoRAError)):
            raise
        sys.exit(_line(mistake))


class _Task:
    """The function that Hydra calls for each job, in this process or a launcher's. `TableSweeper` calls its `sweep`."""

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
        # The error is raised anew outside of the except block, without the frames that hold the model: Hydra keeps
        # each job's error until the last job of a multirun is over, and launchers pickle it.
        if HydraConfig.get().mode != RunMode.MULTIRUN:
            sys.exit(line)
        log.error(line)
        raise TensLoRAError(line.removeprefix("error: "))

    def sweep(self, config: DictConfig, jobs: Any, launch: Any) -> None:
        assert self._sweep is not None
        self.started = True
        self._sweep(config, jobs, launch)


# Resolvers are registered on import, so that a process in which a launcher unpickles a task has them too.
register_resolvers()


def _mistake(error: BaseException) -> BaseException:
    # ${run_folder:} checks the settings, and OmegaConf wraps the error of a resolver.
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, TensLoRAError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return error


def _line(error: BaseException) -> str:
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return f"error: {group}={option}: must be one of {', '.join(error.options)}"
    # An error from a data worker comes wrapped in the worker's traceback; its own message is the last line.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any(line.startswith("Original Traceback") for line in lines):
        return f"error: {lines[-1].partition(': ')[2]}"
    return f"error: {' '.join(lines)}"
