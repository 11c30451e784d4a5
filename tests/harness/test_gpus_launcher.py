"""The launcher of hydra/launcher=gpus, on a machine that need not have a GPU: by what each job is given to see."""

from __future__ import annotations

import importlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest
from hydra._internal.callbacks import Callbacks
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, ListConfig, OmegaConf

from tenslora.errors import TensLoRAError
from tests.conftest import ROOT
from tests.running import composed


def plugin() -> Any:
    """The launcher's module. It is not imported above, because Hydra imports it anew when it looks for plugins."""
    return importlib.import_module("hydra_plugins.tenslora_gpus")


# The processes of the launcher get what is defined here by value, and need not import the tests with torch and pytest.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Loader:
    """Composes the config of a job: what all jobs share, and the job's number."""

    def load_sweep_config(self, config: DictConfig, overrides: Sequence[str]) -> DictConfig:
        job = config.copy()
        job.number = int(overrides[0].removeprefix("number="))
        return job


def launch(folder: Path, task: Callable[[DictConfig], Any], jobs: int, gpus: Any, jobs_per_gpu: int) -> list[JobReturn]:
    # As on the command line, composing makes Hydra import its plugins anew, and with them the classes of this config.
    hydra = composed("hydra/job_logging=none", "hydra/hydra_logging=none", with_hydra=True).hydra
    OmegaConf.set_struct(hydra, False)
    hydra.output_subdir, hydra.sweep.dir, hydra.sweep.subdir = None, str(folder), "job"
    shared = OmegaConf.create({"hydra": hydra, "number": 0, "jobs": jobs, "folder": str(folder)})
    launcher = plugin().GpusLauncher(ListConfig(gpus), jobs_per_gpu)
    context = SimpleNamespace(config_loader=Loader(), callbacks=Callbacks())
    launcher.setup(hydra_context=context, task_function=task, config=shared)
    return list(launcher.launch([[f"number={number}"] for number in range(jobs)], initial_job_idx=0))


def test_all_jobs_run_at_once_and_each_sees_one_gpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def task(config: DictConfig) -> tuple[int, str, int]:
        import os
        import time
        from pathlib import Path

        Path(config.folder, f"{config.number}.began").touch()
        while len(list(Path(config.folder).glob("*.began"))) < config.jobs:  # for ever, if not all run at once
            time.sleep(0.01)
        return config.number, os.environ["CUDA_VISIBLE_DEVICES"], os.getpid()

    outcomes = [outcome.return_value for outcome in launch(tmp_path, task, jobs=3, gpus=[3, "GPU-5f"], jobs_per_gpu=2)]
    assert [(number, gpu) for number, gpu, _ in outcomes] == [(0, "3"), (1, "GPU-5f"), (2, "3")]
    assert len({process for _, _, process in outcomes}) == 3
    assert capfd.readouterr().out == "GPUs 3, GPU-5f, 2 jobs at a time on each\n"


def test_a_job_that_dies_or_fails_leaves_the_others_alone(tmp_path: Path) -> None:
    def task(config: DictConfig) -> int:
        import os

        if config.number == 0:
            os.kill(os.getpid(), 9)
        if config.number == 2:
            raise type("CannotBePickled", (Exception,), {})("the device is lost")
        return os.getpid()

    killed, second, failed, last = launch(tmp_path, task, jobs=4, gpus=[0], jobs_per_gpu=1)
    assert [outcome.status for outcome in (killed, failed)] == [JobStatus.FAILED] * 2
    assert str(killed._return_value) == "its process was ended by SIGKILL"
    assert str(failed._return_value) == "CannotBePickled: the device is lost"
    processes = {second.return_value, last.return_value}
    assert len(processes) == 2, "a process in which a job has failed is replaced"
    assert not any(map(is_alive, processes))


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_process_of_a_launcher_ends_when_the_launcher_is_killed() -> None:
    # The reader gets the end of the file when the last process that holds the other end is gone.
    script = """if True:
        import multiprocessing, time
        from tenslora.harness import app
        def job():
            app.end_with_the_launcher()
            print("began", flush=True)
            time.sleep(600)
        app._WATCH_SECONDS = 0.1
        multiprocessing.get_context("fork").Process(target=job).start()
        time.sleep(600)
    """
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout
        assert launcher.stdout.readline() == b"began\n"
        launcher.send_signal(signal.SIGKILL)
        ready, _, _ = select.select([launcher.stdout], [], [], 10)
        assert ready and launcher.stdout.read() == b""


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        (0, r"^hydra\.launcher\.gpus=0: must be a list of different GPUs such as \[0,1\], or null for all$"),
        (ListConfig([]), r"^hydra\.launcher\.gpus=\[\]: must be"),
        (ListConfig([0, "0"]), r"^hydra\.launcher\.gpus=\[0, '0'\]: must be"),
        (ListConfig([-1]), r"^hydra\.launcher\.gpus=\[-1\]: must be"),
        (ListConfig(["cuda:0"]), r"^hydra\.launcher\.gpus=\['cuda:0'\]: must be"),
    ],
)
def test_wrong_settings_are_refused_before_anything_runs(gpus: Any, message: str) -> None:
    launcher = plugin().GpusLauncher(gpus)
    with pytest.raises(TensLoRAError, match=message):
        launcher.setup(hydra_context=None, task_function=None, config=None)


@pytest.mark.parametrize(
    ("there", "variable", "named", "used"),
    [
        (3, None, None, ["0", "1", "2"]),
        (2, "4, 7", None, ["4", "7"]),
        (1, "GPU-8932f937", None, ["GPU-8932f937"]),
        (1, "2,-1,3", None, ["2"]),
        (1, "2,none,3", None, ["2"]),
        (4, None, ["3", "1"], ["3", "1"]),
        (1, "0", ["5"], ["5"]),  # the list replaces the variable
        (0, None, ["0", "1"], ["0", "1"]),  # torch may see none where the jobs do
    ],
)
def test_the_gpus_are_those_named_or_those_this_process_may_use(
    monkeypatch: pytest.MonkeyPatch, there: int, variable: str | None, named: list[str] | None, used: list[str]
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: there)
    set_or_delete(monkeypatch, variable)
    assert plugin().visible_gpus(named) == used


@pytest.mark.parametrize(
    ("there", "variable", "named", "message"),
    [
        (0, None, None, r"no GPU found; name them as hydra\.launcher\.gpus=\[0,1\], or choose"),
        (0, "", None, "no GPU found"),
        (0, "-1", None, "no GPU found"),
        (0, "NoDevFiles", None, "no GPU found"),  # Slurm's word where a job has none
        (2, None, ["1", "2"], "GPU 2 does not exist; there are 2, from 0"),
    ],
)
def test_a_gpu_that_is_not_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, there: int, variable: str | None, named: list[str] | None, message: str
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: there)
    set_or_delete(monkeypatch, variable)
    with pytest.raises(TensLoRAError, match=message):
        plugin().visible_gpus(named)


def set_or_delete(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    if value is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
