"""One table: carries out every run of the table, then writes the table, its figures and a report.

    python sweep.py table=isoparameters
    python sweep.py table=isorank dataset=dtd,cola seed=0,1 hydra/launcher=submitit_slurm

A sweep that is started again goes on where it stopped. Its results are in outputs/tables/<table>.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tenslora.errors import TensLoRAError
from tenslora.harness.app import run_app

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from hydra.core.utils import JobReturn
    from omegaconf import DictConfig


def run_job(composed: DictConfig) -> str | None:
    """Carry out one run of the table, in the process that the launcher starts for it.

    Args:
        composed: the config of the job.

    Returns:
        The result of `carry_out`.
    """
    from hydra.core.hydra_config import HydraConfig

    from tenslora.harness.config import validate
    from tenslora.harness.run_folder import RunFolder
    from tenslora.harness.sweeping.jobs import carry_out
    from train import train

    hydra_config = HydraConfig.get()
    # Progress bars of several processes would overwrite each other.
    in_this_process = hydra_config.launcher._target_.endswith("BasicLauncher")
    return carry_out(
        validate(composed),
        RunFolder(Path(hydra_config.runtime.output_dir)),
        composed.table.name,
        lambda run, path: train(run, path, show_progress=in_this_process),
    )


def sweep(
    config: DictConfig,
    composed: list[tuple[tuple[str, ...], DictConfig]],
    launch: Callable[[Sequence[Sequence[str]]], Sequence[JobReturn]],
) -> None:
    """Carry out a sweep: plan it, run the jobs that are not done, collect the results.

    Args:
        config: the composed config, without the swept values.
        composed: (overrides, composed config) of each job.
        launch: a function that runs jobs, each given by its overrides, through Hydra's launcher, and returns when all
            of them have ended.

    Raises:
        TensLoRAError: if jobs have failed; the results are written first.
    """
    from hydra.core.utils import JobStatus

    from tenslora.harness.results import write_results
    from tenslora.harness.results.paper import stand_in
    from tenslora.harness.results.settings import command_of, settings_of
    from tenslora.harness.results.table import Table, groups_of
    from tenslora.harness.sweeping.jobs import ELSEWHERE, Job, Look, State, overwrite, plan_jobs
    from tenslora.harness.sweeping.plan import announcements, plan
    from tenslora.harness.sweeping.progress import Progress
    from tenslora.harness.tracking import track_table

    outputs = Path(config.hydra.sweep.dir)
    folder = outputs / "tables" / config.table.name
    jobs = plan_jobs(composed, outputs)
    if config.overwrite and not config.dry_run:
        overwrite(jobs, config.collect_only)
    groups, settings = groups_of(config.table.groups), settings_of(job.run.settings() for job in jobs)

    def collect(looks: Mapping[Job, Look]) -> Table:
        runs = tuple(job.in_table(look) for job, look in looks.items())
        table = Table(config.table.name, config.table.title, runs, config.table.score, groups=groups)
        notes = tuple(filter(None, [stand_in(table)]))
        return replace(table, notes=notes, command=command_of(sys.argv), settings=settings)

    looks = {job: job.look() for job in jobs}
    print(plan(collect(looks), looks), flush=True)
    if config.dry_run:
        return

    todo = [] if config.collect_only else [job for job, look in looks.items() if look.state is not State.DONE]
    if not config.collect_only:
        print("\n".join(["", *announcements(looks)]), flush=True)
    if todo:
        from tenslora.harness.results.report import write_report

        print(f"report: {folder / 'report.html'}, written anew as jobs end\n", flush=True)
        with Progress(jobs, looks, lambda looks, goes_on: write_report(collect(looks), folder, goes_on)):
            while todo:
                elsewhere = []
                for job, outcome in zip(todo, launch([job.overrides for job in todo]), strict=True):
                    if outcome.status is JobStatus.FAILED:
                        if job.look().problem is None:  # the job was killed before it could write a reason
                            job.folder.write_failure(outcome._return_value)
                    elif outcome.return_value == ELSEWHERE:
                        elsewhere.append(job)
                # Another sweep carries out these jobs. If that sweep stops, this sweep takes them over.
                while any(job.look().state is State.RUNNING for job in elsewhere):
                    time.sleep(1)
                todo = [job for job in elsewhere if job.look().state is not State.DONE]

    looks = {job: job.look() for job in jobs}
    table = collect(looks)
    files = write_results(table, folder)
    offline = track_table(jobs[0].run.logger, folder, table, files)
    print("\n".join(["", *(str(file) for file in files)]))
    if offline:
        print(f"\n{offline}; to upload: find {outputs} -name 'offline-run-*' -prune -exec wandb sync {{}} +")
    failed = {job: look.problem for job, look in looks.items() if look.problem}
    if failed:
        print("\n".join(["", "failed:", *(f"  {job.label}: {problem}" for job, problem in failed.items())]))
        raise TensLoRAError(f"{len(failed)} of {len(jobs)} jobs failed; the same command runs them again")


if __name__ == "__main__":
    run_app(run_job, config_name="sweep", sweep=sweep)
