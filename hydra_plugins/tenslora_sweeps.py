"""The sweeper of sweep.py, which lets the app decide what to run, and launchers that survive the loss of a job.

Hydra looks for plugins in the package `hydra_plugins` only.
"""

from __future__ import annotations

import copy
import subprocess
import time
from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext, TaskFunction
from hydra_plugins.hydra_submitit_launcher import submitit_launcher
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from tenslora.errors import TensLoRAError

LOOK_SECONDS = 5.0


class TableSweeper(BasicSweeper):
    """Hydra's basic sweeper, except that the app decides what is run.

    The sweeper composes the config of every job and calls ``task.sweep(config, jobs, launch)``. ``config`` is composed
    without the swept values, and ``jobs`` are pairs of (overrides, composed config). ``launch`` runs jobs, each given
    by its overrides, through the launcher, at most `max_batch_size` at a time.
    """

    task: Any

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        if patient := PATIENT.get(config.hydra.launcher._target_):
            config = copy.deepcopy(config)
            with read_write(config), open_dict(config):
                config.hydra.launcher._target_ = f"{patient.__module__}.{patient.__name__}"
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        self.task = task_function

    def sweep(self, arguments: list[str]) -> None:
        assert self.hydra_context and self.config is not None and self.launcher
        if (size := self.max_batch_size) is not None and size < 1:
            raise TensLoRAError(f"hydra.sweeper.max_batch_size={size}: must be at least 1, or null for all at once")
        loader, config, launcher = self.hydra_context.config_loader, self.config, self.launcher
        defaults = [f"{key}={value}" for key, value in (self.params or {}).items()]
        parsed = OverridesParser.create(config_loader=loader).parse_overrides([*defaults, *arguments])
        [overrides] = self.split_arguments(parsed, None)  # a later value of a key replaces an earlier one
        base: dict[tuple[str, ...], DictConfig] = {}
        jobs = []
        for words in overrides:
            # Hydra takes a tenth of a second to compose a config, so jobs that differ only in the seed share one.
            seeds = [word for word in words if word.startswith("seed=")]
            others = tuple(word for word in words if word not in seeds)
            if others not in base:
                base[others] = loader.load_sweep_config(config, list(words))
            composed = copy.deepcopy(base[others])
            if seeds:
                composed.seed = OmegaConf.create(seeds[-1].replace("=", ": ", 1)).seed
            jobs.append((tuple(words), composed))

        def launch(chosen: Sequence[Sequence[str]]) -> Sequence[JobReturn]:
            returned: list[JobReturn] = []
            try:
                for batch in self.split_overrides_to_chunks([list(words) for words in chosen], size):
                    returned += launcher.launch(batch, initial_job_idx=len(returned))
                return returned
            except KeyboardInterrupt:
                if "joblib" in type(launcher).__module__:
                    from joblib.externals.loky import get_reusable_executor

                    get_reusable_executor().shutdown(wait=True, kill_workers=True)
                raise
            except RuntimeError as error:  # when one worker process is killed, joblib ends the whole pool
                raise TensLoRAError(f"the launcher broke off ({error}); the same command goes on") from error

        self.task.sweep(config, jobs, launch)


class _Patient(submitit_launcher.BaseSubmititLauncher):
    """submitit's launcher, except that it waits for the other jobs when one job is cancelled or crashes.

    Hydra's plugin asks for the results in order and raises at the first job without a result, while other jobs still
    run. This launcher waits for every job, and a job that ended without a result counts as failed. submitit itself
    requeues a job that was preempted or ran out of time.
    """

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        import submitit
        from hydra.core.singleton import Singleton
        from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

        given = dict(self.params)
        start = {"folder": given.pop("submitit_folder")}
        if "max_num_timeout" in given:
            start[f"{self._EXECUTOR}_max_num_timeout"] = given.pop("max_num_timeout")
        everywhere = OmegaConf.structured(BaseQueueConf)
        numbers = range(initial_job_idx, initial_job_idx + len(job_overrides))
        try:
            executor = submitit.AutoExecutor(cluster=self._EXECUTOR, **start)
            executor.update_parameters(
                **{key if key in everywhere else f"{self._EXECUTOR}_{key}": value for key, value in given.items()}
            )
            jobs = executor.map_array(
                self,
                [list(words) for words in job_overrides],
                ["hydra.sweep.dir"] * len(numbers),
                list(numbers),
                [f"job_id_for_{number}" for number in numbers],
                [Singleton.get_state()] * len(numbers),
            )
        except (RuntimeError, OSError, submitit.core.utils.FailedJobError) as error:
            raise TensLoRAError(f"hydra/launcher: {self._EXECUTOR} takes no jobs ({error})") from error
        print(f"submitted {len(jobs)} jobs to {self._EXECUTOR}: {_names(jobs)}", flush=True)
        outcomes: dict[str, JobReturn] = {}
        try:
            while len(outcomes) < len(jobs):
                time.sleep(LOOK_SECONDS)
                for job, under_way in zip(jobs, self._are_under_way(jobs), strict=True):
                    if not under_way and job.job_id not in outcomes:
                        outcomes[job.job_id] = self._outcome(job)
        except KeyboardInterrupt:
            print(f"\nsubmitted jobs go on: {_names(jobs)}", flush=True)
            raise
        return [outcomes[job.job_id] for job in jobs]

    def _are_under_way(self, jobs: Sequence[Any]) -> list[bool]:
        return [not job.done() for job in jobs]

    def _outcome(self, job: Any) -> JobReturn:
        try:
            result: JobReturn = job.results()[0]
            return result
        except Exception as error:
            failed = JobReturn()
            failed.status, failed.return_value = JobStatus.FAILED, error
            return failed


class PatientLocalLauncher(_Patient, submitit_launcher.LocalLauncher):
    """The launcher of hydra/launcher=submitit_local."""


class PatientSlurmLauncher(_Patient, submitit_launcher.SlurmLauncher):
    """The launcher of hydra/launcher=submitit_slurm.

    The launcher asks squeue which jobs are left. submitit asks sacct, which does not answer on a cluster without
    accounting.
    """

    def _are_under_way(self, jobs: Sequence[Any]) -> list[bool]:
        left = [not job.paths.result_pickle.exists() for job in jobs]
        asked = _ask("squeue", "--noheader", "--array", "--me", "--format=%i")
        if asked.returncode:  # the controller is busy or restarting, and may answer later
            return left
        queued = set(asked.stdout.split())
        return [is_left and job.job_id in queued for is_left, job in zip(left, jobs, strict=True)]

    def _outcome(self, job: Any) -> JobReturn:
        # On a shared file system a result may appear with a delay.
        for _ in range(10):
            if job.paths.result_pickle.exists():
                return super()._outcome(job)
            time.sleep(LOOK_SECONDS / 10)
        asked = _ask("scontrol", "--oneliner", "show", "job", job.job_id)
        facts = dict(word.split("=", 1) for word in asked.stdout.split() if "=" in word)
        state = facts.get("JobState", "gone").lower()
        failed = JobReturn()
        failed.status = JobStatus.FAILED
        failed.return_value = TensLoRAError(
            f"Slurm job {job.job_id} is {state} without a result; see {job.paths.stderr}"
        )
        return failed


PATIENT = {
    f"{launcher.__module__}.{launcher.__name__}": patient
    for launcher, patient in (
        (submitit_launcher.LocalLauncher, PatientLocalLauncher),
        (submitit_launcher.SlurmLauncher, PatientSlurmLauncher),
    )
}


def _ask(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise TensLoRAError(f"hydra/launcher: {command[0]} cannot be run ({error}); submitted jobs go on") from error


def _names(jobs: Sequence[Any]) -> str:
    return ", ".join(dict.fromkeys(job.job_id.split("_")[0] for job in jobs))
