"""The sweeper of sweep.py, which lets the app decide what to run, and launchers that survive the loss of a job.

Hydra looks for plugins in the package `hydra_plugins` only.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor
from typing import Any, cast

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext, TaskFunction
from hydra_plugins.hydra_submitit_launcher import submitit_launcher
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from tenslora.errors import TensLoRAError, first_line
from tenslora.harness.app import OF_LOGGING, end_with_the_launcher
from tenslora.harness.sweeping.composing import Composer, words_of_jobs

LOOK_SECONDS = 5.0
SAY_AGAIN_SECONDS = 300.0  # how long a wait may go on without a new line if only the number of pending jobs changes


class TableSweeper(BasicSweeper):
    """Hydra's basic sweeper, except that the app decides what is run.

    The sweeper checks the settings of every job and calls ``task.sweep(config, jobs, launch)``. ``config`` is composed
    without the swept values, and each of ``jobs`` is a `Composed`. ``launch`` runs jobs, each given by its overrides,
    through the launcher, at most `max_batch_size` at a time.
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
        loader, config, launcher = self.hydra_context.config_loader, self.config, self.launcher
        params = OmegaConf.to_container(self.params, resolve=True) if OmegaConf.is_config(self.params) else self.params
        defaults = [f"{key}={as_word(value)}" for key, value in cast(dict[str, Any], params or {}).items()]
        composer = Composer(loader, config)
        jobs = [composer.composed(words) for words in words_of_jobs(loader, [*defaults, *arguments])]

        if "joblib" in type(launcher).__module__:
            # Otherwise a worker that has not begun its first job would outlive this process if that is killed.
            cast(Any, launcher).joblib["initializer"] = end_with_the_launcher

        def launch(chosen: Sequence[Sequence[str]]) -> Sequence[JobReturn]:
            returned: list[JobReturn] = []
            try:
                for batch in self.split_overrides_to_chunks([list(words) for words in chosen], self.max_batch_size):
                    returned += launcher.launch(batch, initial_job_idx=len(returned))
                return returned
            except KeyboardInterrupt:
                if "joblib" in type(launcher).__module__:
                    from joblib.externals.loky import get_reusable_executor

                    get_reusable_executor().shutdown(wait=True, kill_workers=True)
                raise
            except TensLoRAError:
                raise
            # A job's own error is in what the launcher returns. This one is the launcher's: when one worker process is
            # killed, joblib ends the whole pool, and it reads its environment variables only now.
            except Exception as error:
                said = first_line(error)
                if said.startswith(OF_LOGGING):
                    raise
                variables = [item for item in os.environ.items() if item[0].startswith("LOKY_")]
                place = next((f"{name}={value}" for name, value in variables if repr(value) in said), "hydra.launcher")
                goes_on = "; the same command goes on" if isinstance(error, BrokenExecutor) else ""
                raise TensLoRAError(f"{place}: broke off ({said}){goes_on}") from error

        self.task.sweep(config, jobs, launch)


def as_word(value: Any) -> str:
    """A value of a table's YAML file as it is written on the command line.

    >>> [as_word(value) for value in ("0,1", None, [None, "a,b"], {"core": 0.1})]
    ['0,1', 'null', "[null,'a,b']", '{core:0.1}']

    Args:
        value: the value. A text is taken as it stands, because it may be several values.
    """

    def within(item: Any) -> str:
        return repr(item) if isinstance(item, str) else as_word(item)

    if value is None:
        return "null"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{within(item)}" for key, item in value.items()) + "}"
    return "[" + ",".join(map(within, value)) + "]" if isinstance(value, list) else str(value)


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
            with contextlib.redirect_stderr(io.StringIO()):  # submitit prints what it also raises
                jobs = executor.map_array(
                    self,
                    [list(words) for words in job_overrides],
                    ["hydra.sweep.dir"] * len(numbers),
                    list(numbers),
                    [f"job_id_for_{number}" for number in numbers],
                    [Singleton.get_state()] * len(numbers),
                )
        except (RuntimeError, OSError, submitit.core.utils.FailedJobError) as error:
            advice = settings_for(str(error)) if self._EXECUTOR == "slurm" else ""
            raise TensLoRAError(
                f"hydra/launcher: {self._EXECUTOR} takes no jobs ({error}){advice and f'; {advice}'}"
            ) from error
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

    The launcher asks squeue which jobs are left, and why those that have not started are waiting. submitit asks sacct,
    which does not answer on a cluster without accounting.
    """

    def __init__(self, **params: Any) -> None:
        super().__init__(**params)
        self._pending = PendingJobs()

    def _are_under_way(self, jobs: Sequence[Any]) -> list[bool]:
        from tqdm import tqdm

        left = [not job.paths.result_pickle.exists() for job in jobs]
        asked = _ask("squeue", "--noheader", "--array", "--me", "--format=%i|%T|%r")
        if asked.returncode:  # the controller is busy or restarting, and may answer later
            return left
        lines = (line.split("|", 2) for line in asked.stdout.split("\n"))
        queued = {line[0]: line[1:] for line in lines if len(line) == 3}  # a site may print news before them
        reasons = [queued[job.job_id][1] for job in jobs if queued.get(job.job_id, ("", ""))[0] == "PENDING"]
        for line in self._pending.news(reasons):
            tqdm.write(line)  # which moves the sweep's progress bar out of the way
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


class PendingJobs:
    """What to say of the jobs that wait in Slurm's queue: how many there are and why, whenever the reasons change."""

    def __init__(self) -> None:
        self.said: set[str] = set()
        self.said_at = 0.0

    def news(self, reasons: Sequence[str]) -> Iterator[str]:
        """The lines that are new.

        Args:
            reasons: for each pending job the reason that squeue gives.
        """
        counts = Counter(reasons)
        new = counts.keys() - self.said
        if counts.keys() == self.said and time.monotonic() - self.said_at < SAY_AGAIN_SECONDS:
            return
        self.said, self.said_at = set(counts), time.monotonic()
        if counts:
            listed = ", ".join(f"{number} {_in_words(reason)}" for reason, number in counts.most_common())
            yield f"pending in Slurm's queue: {listed}"
        for reason in filter(is_permanent, sorted(new)):
            advice = settings_for(reason)
            yield f"{reason} does not clear by itself{advice and f'; {advice}'}; Ctrl-C and scancel end the wait"


_PERMANENT = re.compile(
    r"AccountNotAllowed|BadConstraints|DeadLine|DependencyNeverSatisfied|InvalidAccount|InvalidQOS|JobHeld\w+"
    r"|JobHoldMaxRequeue|MaxMemPerLimit|Partition(Config|NodeLimit|TimeLimit)|QOSNotAllowed|ReservationDeleted"
    r"|(Assoc|QOS)Max\w+Per(Job|Node)(Limit)?|QOSMin\w+"
)
"""The reasons of slurm.schedmd.com/job_reason_codes.html that neither time nor the end of other jobs removes."""

_SETTINGS = {
    "gres|generic resource": "hydra.launcher.gpus_per_node=0 asks for no GPU",
    "mem": "see hydra.launcher.mem_gb",
    "time|wall|minutes": "see hydra.launcher.timeout_min",
    "cpu": "see hydra.launcher.cpus_per_task",
    "account": "see hydra.launcher.account",
    "qos": "see hydra.launcher.qos",
    "feature": "see hydra.launcher.constraint",
    "partition name|partition specified": "see hydra.launcher.partition",
    "held|hold": "scontrol release starts it",
    "node|constraints|PartitionConfig": "see hydra.launcher.cpus_per_task, mem_gb, gpus_per_node and partition",
}
"""What to do about a reason or a refusal of Slurm's that contains one of these words; the first that fits."""


def is_permanent(reason: str) -> bool:
    """Whether a job that is pending for this reason will never start, unless its request or the cluster changes."""
    return _PERMANENT.fullmatch(re.split(r"[ ,]", reason)[0]) is not None


def settings_for(text: str) -> str:
    """What to do about a reason or a refusal of Slurm's; empty if nothing is known."""
    return next((advice for words, advice in _SETTINGS.items() if re.search(words, text, re.IGNORECASE)), "")


def _in_words(reason: str) -> str:
    return "None (not yet considered)" if reason == "None" else reason


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
