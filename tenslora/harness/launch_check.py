"""Checks whether the chosen launcher can do what it is asked, before a command starts its run or its runs."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import (
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    UnsupportedInterpolationType,
)

from tenslora.errors import TensLoRAError, first_line
from tenslora.harness.commands import takes_one
from tenslora.harness.config import SWEEP_KEYS
from tenslora.harness.config.checks import shown
from tenslora.harness.sweeping.composing import values_of

MOST_WORKERS = 1024
"""How many worker processes joblib may be asked for."""

_NUMBERS = {
    "hydra.launcher.n_jobs": f"must be from 1 to {MOST_WORKERS}, or -1 for as many as there are processors",
    "hydra.launcher.jobs_per_gpu": "must be a whole number from 1",
    "hydra.launcher.timeout_min": "must be a whole number from 1",
    "hydra.sweeper.max_batch_size": "must be a whole number from 1, or null for all at once",
}
"""The settings of Hydra that count something, and what each of them must be."""

_REPLACED = re.compile(r"%[0-9]*[AaJjNnstux]")  # in a path, by submitit or by Slurm


class LaunchCheck(Callback):
    """Checks what a multirun asks of its launcher: the settings of Hydra that would end in another library's words.

    It warns of a launcher that has nothing to launch, and refuses one in processes that share their runs.

    Hydra carries out a single run in its own process, so the settings of a launcher are lost. The processes that
    torchrun or accelerate launch has started share each run: a run waits for all of them, without an end if they carry
    out their runs in different orders.
    """

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        with _ends_in_one_line():
            _require_launcher(config)
            in_order = _in_order(config)
        if not in_order:
            name = config.hydra.runtime.choices["hydra/launcher"]
            print(
                f"hydra/launcher={name}: has no effect on a single run, which starts here and now; add -m to launch it",
                file=sys.stderr,
            )

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        with _ends_in_one_line():
            _require_launcher(config)
            for setting in ("hydra.sweep.dir", "hydra.launcher", "hydra.sweeper"):
                _resolve(OmegaConf.select(config, setting, throw_on_missing=True))
            for setting in _NUMBERS:
                _check_number(config, setting)
            _check_folder(config)
            _check_joblib(config)
            _check_params(config)
            if config.hydra.sweeper._target_.endswith("BasicSweeper"):
                _check_values(config)
        count = os.environ.get("WORLD_SIZE", "1")
        if count == "1" or (_in_order(config) and not _carries_out_table(config)):
            return
        sys.exit(
            f"error: WORLD_SIZE={count}: must be 1 for sweep.py, and for any hydra/launcher but basic; torchrun and "
            f"accelerate launch share a single run of train.py among processes, and a launcher carries out several "
            f"runs at once"
        )


def unresolved(error: BaseException) -> str | None:
    """The line for a setting of Hydra that has no value, or that refers to something without one.

    Args:
        error: what was raised when the setting was read.

    Returns:
        The line; None for any other error.
    """
    of_values = (InterpolationResolutionError, UnsupportedInterpolationType, MissingMandatoryValue)
    if not isinstance(error, of_values) or not str(error.full_key).startswith("hydra."):
        return None
    reason = re.sub(r"^\w+ (raised )?while resolving interpolation: ", "", first_line(error))
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key}: is missing"
    of_jobs = re.fullmatch(r"Missing mandatory value: (hydra\.job\.\w+)", reason)
    if of_jobs or reason == "HydraConfig was not set":
        known = of_jobs[1] if of_jobs else "${hydra:...}"
        reason = f"{known} has no value before a job of a multirun begins; ${{hydra.runtime.cwd}}, with a dot, has one"
    written: Any = OmegaConf.to_container(error.parent_node._get_root()) if error.parent_node else None
    for key in str(error.full_key).split("."):
        written = written.get(key) if isinstance(written, dict) else None
    return f"{error.full_key}{f'={shown(written)}' if written else ''}: {reason}"


@contextlib.contextmanager
def _ends_in_one_line() -> Iterator[None]:
    # Hydra only warns of any other error of a callback, and goes on.
    try:
        yield
    except (OmegaConfBaseException, TensLoRAError) as error:
        sys.exit(f"error: {TensLoRAError(unresolved(error) or first_line(error))}")


def _resolve(node: Any) -> None:
    """Read every setting in a config, for the error of one that cannot be read. Hydra's own would not name it."""
    for key in range(len(node)) if isinstance(node, ListConfig) else node if isinstance(node, DictConfig) else ():
        if not OmegaConf.is_missing(node, key):
            _resolve(node[key])


def _require_launcher(config: DictConfig) -> None:
    if not isinstance(config.hydra.launcher, DictConfig):
        raise TensLoRAError(f"hydra.launcher={shown(config.hydra.launcher)}: must be the settings of a launcher")


def _in_order(config: DictConfig) -> bool:
    """Whether the launcher is Hydra's basic one, which carries out one run after the other in this process."""
    return str(config.hydra.launcher._target_).endswith("BasicLauncher")


def _carries_out_table(config: DictConfig) -> bool:
    return str(config.hydra.sweeper._target_).endswith("TableSweeper")


def _check_number(config: DictConfig, setting: str) -> None:
    value = OmegaConf.select(config, setting, default=1)
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,9}", value, re.ASCII):  # as ${oc.env:...} gives it
        value = int(value)
        with read_write(config), open_dict(config):
            OmegaConf.update(config, setting, value)
    is_workers = setting.endswith(".n_jobs")
    if value is None and setting.endswith(".max_batch_size"):
        return
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or not (0 < abs(value) <= MOST_WORKERS if is_workers else value > 0):
        raise TensLoRAError(f"{setting}={shown(value)}: {_NUMBERS[setting]}")


def _check_folder(config: DictConfig) -> None:
    folder = os.path.abspath(config.hydra.sweep.dir)
    if "submitit_folder" in config.hydra.launcher and (pattern := _REPLACED.search(folder)):
        raise TensLoRAError(
            f"hydra.sweep.dir={folder}: must not contain {pattern[0]}, which submitit and Slurm replace in paths; "
            f"choose another folder, or another launcher"
        )


def _check_joblib(config: DictConfig) -> None:
    launcher = config.hydra.launcher
    if not str(launcher._target_).endswith("JoblibLauncher"):
        return
    if (backend := launcher.get("backend")) not in (None, "loky"):
        raise TensLoRAError(f"hydra.launcher.backend={backend}: must be loky or null, because Hydra uses no other")
    if (timeout := launcher.get("timeout")) is not None:
        raise TensLoRAError(f"hydra.launcher.timeout={timeout}: must be null, because joblib would break off all runs")
    given = str(launcher.get("pre_dispatch", "all"))
    whole = "[1-9][0-9]*"  # of 0, joblib would run nothing
    if not re.fullmatch(rf"all|({whole}\*)?n_jobs(\*{whole})?|{whole}", given.replace(" ", "")):
        raise TensLoRAError(
            f"hydra.launcher.pre_dispatch={shown(given)}: must be all, a whole number from 1, or such as 2*n_jobs"
        )


def _check_params(config: DictConfig) -> None:
    params = config.hydra.sweeper.get("params")
    for name, value in params.items() if isinstance(params, DictConfig) else ():
        key = str(name)
        place = f"hydra.sweeper.params.{key}={shown(value)}"
        if isinstance(value, ListConfig) and takes_one(key):  # which Hydra would merge
            raise TensLoRAError(f"{place}: must be one option; several are written with commas, without brackets")
        if _carries_out_table(config) and key.partition(".")[0] in (*SWEEP_KEYS, "hydra"):  # a job would ignore it
            raise TensLoRAError(f"{place}: is a setting of the whole sweep; must stand outside of params")


def _check_values(config: DictConfig) -> None:
    hydra = GlobalHydra.instance().hydra
    parser = OverridesParser.create(config_loader=hydra.config_loader if hydra else None)
    for override in parser.parse_overrides(list(config.hydra.overrides.task)):
        if override.is_sweep_override():
            values_of(override)
