"""The launcher of hydra/launcher=gpus: the jobs of a sweep, spread over the GPUs of one machine.

Every job runs in a process that sees one GPU alone. A process carries out several jobs one after the other, so that
torch, the backbone and the dataset are not loaded anew for each; a process in which a job has failed is replaced,
because an error on the device leaves CUDA unusable there.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import signal
from collections import deque
from collections.abc import Sequence
from itertools import takewhile
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, ListConfig

from tenslora.errors import TensLoRAError

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

VISIBLE = "CUDA_VISIBLE_DEVICES"
_NAME = re.compile(r"\d+|(GPU|MIG)-[\w/-]+")


class GpusLauncher(Launcher):
    """Carries out jobs on the GPUs of this machine, each in a process that sees one GPU.

    A job whose process dies counts as failed, and the others go on. All processes end with this one: when it is
    interrupted they are killed, and when it is killed they notice (`tenslora.harness.app`).

    Args:
        gpus: the GPUs, as CUDA_VISIBLE_DEVICES names them: numbers or UUIDs; None for all that this process may use.
        jobs_per_gpu: how many jobs share a GPU at a time.
    """

    def __init__(self, gpus: ListConfig | None = None, jobs_per_gpu: int = 1) -> None:
        self.gpus, self.jobs_per_gpu = gpus, jobs_per_gpu

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep what a job needs, and check the names of the GPUs before anything runs."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config
        if self.gpus is not None:
            names = list(self.gpus) if isinstance(self.gpus, ListConfig) else []
            if (
                not names
                or len(set(map(str, names))) < len(names)
                or not all(_NAME.fullmatch(str(name)) for name in names)
            ):
                raise TensLoRAError(
                    f"hydra.launcher.gpus={self.gpus}: must be a list of different GPUs such as [0,1], or null for all"
                )

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Carry out the jobs.

        Args:
            job_overrides: the overrides of each job.
            initial_job_idx: the number of the first job.

        Returns:
            The outcome of each job, in the order of `job_overrides`.

        Raises:
            TensLoRAError: if no GPU is found, or if one of `gpus` does not exist.
        """
        import cloudpickle
        from hydra.core.singleton import Singleton

        gpus = visible_gpus(None if self.gpus is None else list(map(str, self.gpus)))
        # The GPUs take turns, so that few jobs are spread over all of them.
        count = min(len(gpus) * self.jobs_per_gpu, len(job_overrides))
        threads = max(1, (os.cpu_count() or 1) // count)
        idle = deque(_Worker(gpus[number % len(gpus)], threads) for number in range(count))
        workers = tuple(idle)
        shared = (self.hydra_context, self.config, self.task_function, Singleton.get_state())
        waiting = deque(range(len(job_overrides)))
        at_work: dict[Connection, tuple[_Worker, int]] = {}
        outcomes: dict[int, JobReturn] = {}
        jobs = "1 job" if self.jobs_per_gpu == 1 else f"{self.jobs_per_gpu} jobs"
        print(f"GPUs {', '.join(gpus)}, {jobs} at a time on each", flush=True)
        try:
            while waiting or at_work:
                while waiting and idle:
                    worker, number = idle.popleft(), waiting.popleft()
                    job = (initial_job_idx + number, list(job_overrides[number]), *shared)
                    at_work[worker.start(cloudpickle.dumps(job))] = (worker, number)
                ready = wait(at_work)
                for connection in [each for each in at_work if each in ready]:
                    worker, number = at_work.pop(connection)
                    outcomes[number] = worker.outcome()
                    if not waiting or outcomes[number].status is JobStatus.FAILED:
                        worker.end()
                    idle.append(worker)
        finally:
            for worker in workers:
                worker.end()
        return [outcomes[number] for number in range(len(job_overrides))]


def visible_gpus(chosen: Sequence[str] | None) -> list[str]:
    """The GPUs to use, as CUDA_VISIBLE_DEVICES names them.

    CUDA is not initialised in this process: torch counts the devices by NVML.

    Args:
        chosen: the GPUs that the user has named; None for all that this process may use.

    Raises:
        TensLoRAError: if there is no GPU, or if one of `chosen` does not exist.
    """
    import torch

    allowed = os.environ.get(VISIBLE)
    if chosen is None and allowed is not None:
        # As for CUDA itself, what is no GPU's name, such as -1 or Slurm's NoDevFiles, hides itself and what follows.
        names = (name.strip() for name in allowed.split(","))
        chosen = list(takewhile(re.compile(r"\d|GPU-|MIG-").match, names))
    count = torch.cuda.device_count()
    if chosen is None:
        chosen = list(map(str, range(count)))
    elif count and allowed is None:
        for name in chosen:
            if name.isdecimal() and int(name) >= count:
                raise TensLoRAError(f"hydra.launcher.gpus: GPU {name} does not exist; there are {count}, from 0")
    if not chosen:
        raise TensLoRAError(
            "hydra/launcher=gpus: no GPU found; name them as hydra.launcher.gpus=[0,1], or choose hydra/launcher=joblib"
        )
    return list(chosen)


class _Worker:
    """A process that carries out jobs, one after the other, and sees one GPU.

    Args:
        gpu: the GPU's name in CUDA_VISIBLE_DEVICES.
        threads: how many CPU threads a job may use, unless OMP_NUM_THREADS or the job's settings say otherwise.
    """

    def __init__(self, gpu: str, threads: int) -> None:
        self.gpu, self.threads = gpu, threads
        self.process: SpawnProcess | None = None
        self.connection: Connection | None = None

    def start(self, job: bytes) -> Connection:
        """Give the process a job; start the process if there is none.

        Returns:
            The connection, which is ready as soon as `outcome` can be asked for.
        """
        if self.process is None or self.connection is None or not self.process.is_alive():
            self.end()
            spawn = get_context("spawn")
            self.connection, theirs = spawn.Pipe()
            self.process = spawn.Process(target=_carry_out_jobs, args=(theirs, self.gpu, self.threads))
            # Ctrl-C reaches every process of the terminal. The workers leave it to this process, which kills them. The
            # signal is blocked from the start, because a process inherits what is blocked; the resource tracker, which
            # multiprocessing starts with the first process, would unblock it again.
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            try:
                self.process.start()
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            theirs.close()
        with contextlib.suppress(OSError):  # if the process has died just now, `outcome` says so
            self.connection.send_bytes(job)
        return self.connection

    def outcome(self) -> JobReturn:
        """The outcome of the job, once the connection is ready."""
        assert self.connection is not None and self.process is not None
        try:
            outcome: JobReturn = pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            self.process.join()
            outcome = JobReturn()
            outcome.status = JobStatus.FAILED
            outcome.return_value = TensLoRAError(f"its process {_how_it_ended(self.process.exitcode or 0)}")
        return outcome

    def end(self) -> None:
        """Kill the process, if there is one."""
        if self.process is not None and self.connection is not None:
            self.connection.close()
            self.process.kill()
            self.process.join()
        self.process = self.connection = None


def _carry_out_jobs(connection: Connection, gpu: str, threads: int) -> None:
    # torch is imported with the first job, so it sees what is set here.
    os.environ[VISIBLE] = gpu
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    import cloudpickle
    from hydra_plugins.hydra_joblib_launcher._core import execute_job

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while True:
        try:
            job = connection.recv_bytes()
        except EOFError:
            return
        number, overrides, context, config, task, state = cloudpickle.loads(job)
        outcome = execute_job(number, overrides, context, config, task, state)
        if outcome.status is JobStatus.FAILED and not isinstance(outcome._return_value, TensLoRAError):
            # Not every exception can be pickled, and none keeps its traceback. The job's log has both.
            outcome.return_value = RuntimeError(f"{type(outcome._return_value).__name__}: {outcome._return_value}")
        # Hydra may have imported its plugins anew since the config was made. pickle then no longer knows their classes.
        connection.send_bytes(cloudpickle.dumps(outcome))


def _how_it_ended(status: int) -> str:
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
