"""The command line: Hydra's, but what the user can put right is said in one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from tenslora.config import register_resolvers
from tenslora.errors import TensLoRAError

_FULL = "HYDRA_FULL_ERROR"


def run_app(task: Callable[[DictConfig], None], config_name: str) -> None:
    """Run `task` on the config that Hydra composes from conf/ and the command line.

    A mistake of the user's ends the process with status 1 and one line on standard error; with
    HYDRA_FULL_ERROR=1 it ends with the traceback. In a multirun, Hydra goes on with the other jobs first.
    """
    register_resolvers()
    wants_traceback = os.environ.get(_FULL) == "1"

    def guarded(composed: DictConfig) -> None:
        try:
            task(composed)
        except TensLoRAError as error:
            if wants_traceback or HydraConfig.get().mode == RunMode.MULTIRUN:
                raise
            sys.exit(_line(error))

    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    # Hydra then lets its own errors through instead of printing them over several lines.
    os.environ[_FULL] = "1"
    try:
        hydra.main(version_base="1.3", config_path=os.path.join(root, "conf"), config_name=config_name)(guarded)()
    except (TensLoRAError, HydraException, OmegaConfBaseException) as error:
        if wants_traceback:
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
