"""One table: every run that it needs, then the table, its figures and a report.

    python sweep.py table=isoparameters
    python sweep.py table=isorank dataset=dtd,cola seed=0,1 hydra/launcher=submitit_slurm

Started again, it goes on where it stopped. Results are left in outputs/tables/<table>.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tenslora.errors import TensLoRAError
from tenslora.harness.app import run_app

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hydra.core.utils import JobReturn
    from omegaconf import DictConfig


def job(composed: DictConfig) -> str | None:
    """One run of the table, in whatever process the launcher starts for it."""
    from hydra.core.hydra_config import HydraConfig

    from tenslora.harness.sweeping.jobs import carry_out
    from train import train

    hydra = HydraConfig.get()
    in_this_process = hydra.launcher._target_.endswith("BasicLauncher")  # elsewhere, bars would write over each other
    return carry_out(
        composed, Path(hydra.runtime.output_dir), lambda run, folder: train(run, folder, shown=in_this_process)
    )


def sweep(
    config: DictConfig,
    composed: list[tuple[tuple[str, ...], DictConfig]],
    launch: Callable[[Sequence[Sequence[str]]], Sequence[JobReturn]],
) -> None:
    """The whole: plan, run what is not done, collect.

    config: as composed, without what is swept. composed: each job's overrides and config. launch: runs lists of
    overrides through Hydra's launcher and returns when all have ended.
    """
    from hydra.core.utils import JobStatus

    from tenslora.harness.results import write_results
    from tenslora.harness.results.paper import stand_in
    from tenslora.harness.results.table import Table
    from tenslora.harness.sweeping.jobs import ELSEWHERE, State, note_failure, plan_jobs
    from tenslora.harness.sweeping.plan import announcements, plan
    from tenslora.harness.sweeping.progress import Progress
    from tenslora.harness.tracking import track_table

    outputs = Path(config.hydra.sweep.dir)
    jobs = plan_jobs(composed, outputs)

    def collect() -> Table:
        table = Table(config.table.name, config.table.title, tuple(job.run() for job in jobs), config.table.score)
        return replace(table, notes=tuple(filter(None, [stand_in(table)])))

    print(plan(collect(), jobs), flush=True)
    if config.dry_run:
        return

    todo = [] if config.collect_only else [job for job in jobs if job.state() is not State.DONE]
    if not config.collect_only:
        print("\n".join(["", *announcements(jobs)]), flush=True)
    if todo:
        with Progress(jobs):
            while todo:
                returned = launch([job.overrides for job in todo])
                elsewhere = []
                for job, outcome in zip(todo, returned, strict=True):
                    if outcome.status is JobStatus.FAILED:
                        if job.problem() is None:  # killed, and so without a word of its own
                            note_failure(job.folder, outcome._return_value)
                    elif outcome.return_value == ELSEWHERE:
                        elsewhere.append(job)
                # Another sweep has these in hand; should it break off, they are ours after all.
                while any(job.state() is State.RUNNING for job in elsewhere):
                    time.sleep(1)
                todo = [job for job in elsewhere if job.state() is not State.DONE]

    table = collect()
    files = write_results(table, outputs / "tables" / table.name)
    track_table(jobs[0].settings.logger, outputs / "tables" / table.name, table, files)
    print("\n".join(["", *(str(file) for file in files)]))
    failed = [job for job in jobs if job.problem()]
    if failed:
        print("\n".join(["", "failed:", *(f"  {job.label}: {job.problem()}" for job in failed)]))
        raise TensLoRAError(f"{len(failed)} of {len(jobs)} jobs failed; the same command runs them again")


if __name__ == "__main__":
    run_app(job, config_name="sweep", sweep=sweep)
