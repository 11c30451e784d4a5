"""The command line: Hydra's, but what the user can put right is said in one line."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig

from tenslora.config import register_resolvers
from tenslora.errors import TensLoRAError

log = logging.getLogger(__name__)

_FULL = "HYDRA_FULL_ERROR"


def run_app(task: Callable[[DictConfig], None], config_name: str) -> None:
    """Run `task` on the config that Hydra composes from conf/ and the command line.

    A mistake of the user's ends the process with status 1 and one line on standard error; with
    HYDRA_FULL_ERROR=1 it ends with the traceback. In a multirun the line goes to the job's log, Hydra goes on with
    the other jobs, and the process ends with status 1.
    """
    register_resolvers()
    wants_traceback = os.environ.get(_FULL) == "1"

    started = False

    def guarded(composed: DictConfig) -> None:
        nonlocal started
        started, line = True, None
        try:
            task(composed)
        except TensLoRAError as error:
            if wants_traceback:
                raise
            line = _line(error)
        # Out here the error is gone, and with it the frames that held the model: Hydra keeps what is raised until
        # the last job of a multirun is over, and launchers send it through pickle.
        if line and HydraConfig.get().mode != RunMode.MULTIRUN:
            sys.exit(line)
        if line:
            log.error(line)
            raise TensLoRAError(line.removeprefix("error: "))

    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    # Hydra then lets its own errors through instead of printing them over several lines.
    os.environ[_FULL] = "1"
    try:
        hydra.main(version_base="1.3", config_path=os.path.join(root, "conf"), config_name=config_name)(guarded)()
    except Exception as error:
        # Before the task has begun, whatever is wrong is with the command line, conf/ or the output folder.
        if wants_traceback or (started and not isinstance(error, TensLoRAError)):
            raise
        sys.exit(_line(error))


def _line(error: Exception) -> str:
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return f"error: {group}={option}: must be one of {', '.join(error.options)}"
    # An error from a data worker comes wrapped in the worker's traceback; its own message is the last line.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any(line.startswith("Original Traceback") for line in lines):
        return f"error: {lines[-1].partition(': ')[2]}"
    return f"error: {' '.join(lines)}"
