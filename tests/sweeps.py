"""Jobs of a sweep as the command line would compose them, what they would leave behind, and who holds them."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from tenslora.harness.config import register_resolvers
from tenslora.harness.results.record import write_record
from tenslora.harness.sweeping.jobs import Job, plan_jobs
from tests.conftest import ROOT

Composed = tuple[tuple[str, ...], DictConfig]


@cache
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    register_resolvers()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("sweep", list(overrides))


def swept(*overrides: str) -> Composed:
    """What sets one job apart, and its config."""
    config = copy.deepcopy(_composed(tuple(word for word in overrides if not word.startswith("seed="))))
    for word in overrides:
        if word.startswith("seed="):
            config.seed = int(word.removeprefix("seed="))
    return overrides, config


def planned(folder: Path, *overrides: str) -> Job:
    """The one job that these overrides make."""
    (job,) = plan_jobs([swept(*overrides)], folder)
    return job


def complete(job: Job, last: float = 0.5, **changes: Any) -> None:
    """Leave what a finished run leaves, as far as a sweep looks at it."""
    record = {
        "status": "completed",
        "digest": job.digest,
        "ranks": [4],
        "adapter_parameters": 500,
        "lora_parameters": 1000,
        "metrics": {"name": "accuracy", "last": last, "best": last, "best_epoch": 1, "history": []},
        **changes,
    }
    job.folder.mkdir(parents=True, exist_ok=True)
    write_record(job.folder, record)


def diverge(job: Job) -> None:
    """Leave what a run leaves whose loss is no longer a number."""
    complete(job, status="diverged", failure={"message": "the training loss is nan", "step": 3, "lr": 1.0})


_HOLDER = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def held_elsewhere(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """While another process carries out the job in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", _HOLDER, str(folder / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        yield holder
