"""What is refused before the first of several runs starts."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict

from tenslora.harness.app import run_app
from tenslora.harness.launch_check import LaunchCheck
from tests.running import composed


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_launcher_under_torchrun_is_refused(launcher: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def never(_: object) -> None:
        raise AssertionError("nothing was to be trained")

    words = ["-m", "seed=0,1", f"hydra/launcher={launcher}", f"hydra.sweep.dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        SystemExit, match=r"^error: WORLD_SIZE=2: must be 1 for sweep\.py, and for any hydra/launcher b"
    ):
        run_app(never, "config")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["config", "sweep"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("hydra/launcher=joblib hydra.launcher.n_jobs=0", "n_jobs=0: must be from 1 to 1024, or -1 for as many as "),
        ("hydra/launcher=joblib hydra.launcher.n_jobs=100000000", "n_jobs=100000000: must be from 1 to 1024, or -1"),
        ("hydra/launcher=joblib hydra.launcher.backend=nope", "backend=nope: must be loky or null"),
        ("hydra/launcher=joblib hydra.launcher.timeout=9", "timeout=9.0: must be null, because joblib would break off"),
        (
            "hydra/launcher=joblib hydra.launcher.pre_dispatch=0",
            "pre_dispatch=0: must be all, a whole number from 1, or",
        ),
        ("hydra/launcher=submitit_local hydra.launcher.timeout_min=0", "timeout_min=0: must be a whole number from 1"),
        ("hydra/launcher=gpus hydra.launcher.jobs_per_gpu=1.5", "jobs_per_gpu=1.5: must be a whole number from 1"),
        (
            "hydra/launcher=gpus hydra.launcher.jobs_per_gpu=${oc.env:NO}",
            """jobs_per_gpu=${oc.env:NO}: "Environment variable 'NO' not found\"""",
        ),
        ("hydra/launcher=basic hydra.launcher._target_=${no}", "_target_=${no}: Interpolation key 'no' not found"),
        ("hydra/launcher=basic hydra.sweeper._target_=${no}", "_target_=${no}: Interpolation key 'no' not found"),
        (
            "hydra.sweep.dir=${hydra:runtime.cwd}/a",
            "dir=${hydra:runtime.cwd}/a: ${hydra:...} has no value before a job of a multirun begins; ${hydra.runtime.",
        ),
        (
            "hydra.sweep.dir=a/${hydra.job.num}",
            "dir=a/${hydra.job.num}: hydra.job.num has no value before a job of a multirun begins; ${hydra.runtime.cw",
        ),
        ("hydra/launcher=basic hydra.sweeper.max_batch_size=0", "max_batch_size=0: must be a whole number from 1, or"),
        ("hydra/launcher=submitit_local hydra.sweep.dir=a%jb", "a%jb: must not contain %j, which submitit and Slurm "),
    ],
)
def test_what_a_launcher_cannot_use_is_one_line(
    name: str, words: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)  # a run of another test may have left its own
    config = composed(*words.split(), config_name=name, with_hydra=True)
    with pytest.raises(SystemExit) as ended:
        LaunchCheck().on_multirun_start(config)
    assert re.match(rf"error: hydra\.\w+\.(dir=/\S*)?{re.escape(message)}", str(ended.value.code))


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        (
            "config",
            "params={tensor_mode: [lora, att]}",
            "hydra.sweeper.params.tensor_mode=['lora', 'att']: must be one option; several are written with commas",
        ),
        (
            "sweep",
            "params={dry_run: true}",
            "hydra.sweeper.params.dry_run=true: is a setting of the whole sweep; must stand outside of params",
        ),
        (
            "sweep",
            "params={hydra.sweep.dir: elsewhere}",
            "hydra.sweeper.params.hydra.sweep.dir=elsewhere: is a setting of the whole sweep; must stand outside",
        ),
        ("config", "seed=range(3,3)", "seed=range(3,3): must be at least one value"),
        ("config", "optimizer.lr=interval(0,1)", "optimizer.lr=interval(0,1): must be a list of values or a range"),
    ],
)
def test_what_a_sweeper_would_take_wrongly_is_one_line(name: str, words: str, message: str) -> None:
    config = composed(config_name=name, with_hydra=True)
    with open_dict(config):
        if params := words.partition("params=")[2]:
            config.hydra.sweeper.params = OmegaConf.create(params)
        else:
            config.hydra.overrides.task = [words]
    with pytest.raises(SystemExit) as ended:
        LaunchCheck().on_multirun_start(config)
    assert str(ended.value.code).startswith(f"error: {message}")


def test_a_folder_may_refer_to_what_is_known_before_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLACE", "a")
    config = composed("hydra.sweep.dir=${hydra.runtime.cwd}/${oc.env:PLACE}", config_name="sweep", with_hydra=True)
    config.hydra.runtime.cwd = "/here"  # as Hydra sets it for a command
    LaunchCheck().on_multirun_start(config)
    assert config.hydra.sweep.dir == "/here/a"


def test_a_number_may_be_written_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBER", "2")
    number = "${oc.env:NUMBER}"
    words = [f"hydra.launcher.jobs_per_gpu={number}", f"hydra.sweeper.max_batch_size={number}"]
    config = composed("hydra/launcher=gpus", *words, config_name="sweep", with_hydra=True)
    LaunchCheck().on_multirun_start(config)
    assert (config.hydra.launcher.jobs_per_gpu, config.hydra.sweeper.max_batch_size) == (2, 2)


def test_runs_one_after_the_other_may_have_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(name: str, *words: str) -> Any:
        return LaunchCheck().on_multirun_start(composed(*words, config_name=name, with_hydra=True))

    check("sweep", "hydra/launcher=joblib")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check("config", "hydra/launcher=basic")
    with pytest.raises(SystemExit):
        check("sweep", "hydra/launcher=basic")
