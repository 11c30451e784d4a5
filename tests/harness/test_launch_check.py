"""What is refused before the first of several runs starts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

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


def test_runs_one_after_the_other_may_have_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(name: str, *words: str) -> Any:
        return LaunchCheck().on_multirun_start(composed(*words, config_name=name, with_hydra=True))

    check("sweep", "hydra/launcher=joblib")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check("config", "hydra/launcher=basic")
    with pytest.raises(SystemExit):
        check("sweep", "hydra/launcher=basic")
