"""One table: carries out every run of the table, then writes the table, its figures and a report.

    python sweep.py table=isoparameters
    python sweep.py table=isorank dataset=dtd,cola seed=0,1 hydra/launcher=submitit_slurm

A sweep that is started again goes on where it stopped. Its results are in outputs/tables/<table>.
"""

from __future__ import annotations

import os
import sys

if sys.flags.safe_path:  # python -P does not look beside this file
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import tenslora.harness.early  # isort: skip  # noqa: F401  catches Ctrl-C from here on
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tenslora.errors import TensLoRAError
from tenslora.harness.app import run_app

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from hydra.core.utils import JobReturn
    from omegaconf import DictConfig

    from tenslora.harness.sweeping.jobs import Composed, Job, Look


def run_job(composed: DictConfig) -> str:
    """Carry out one run of the table, in the process that the launcher starts for it.

    Args:
        composed: the config of the job.

    Returns:
        The result of `carry_out`.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from tenslora.harness.config import validate
    from tenslora.harness.config.sweep import sweep_config
    from tenslora.harness.run_folder import RunFolder
    from tenslora.harness.sweeping.jobs import carry_out
    from tenslora.harness.sweeping.tuning import tune_of
    from train import train

    hydra_config = HydraConfig.get()
    if hydra_config.mode != RunMode.MULTIRUN or not hydra_config.sweeper._target_.endswith("TableSweeper"):
        raise TensLoRAError(
            "hydra.mode and hydra/sweeper: must be MULTIRUN and table; train.py carries out single runs"
        )
    # Progress bars of several processes would overwrite each other.
    in_this_process = hydra_config.launcher._target_.endswith("BasicLauncher")
    return carry_out(
        replace(validate(composed), tuned=tune_of(composed)),
        RunFolder(Path(hydra_config.runtime.output_dir)),
        sweep_config(composed).table.name,
        lambda run, path: train(run, path, show_progress=in_this_process),
    )


def sweep(
    config: DictConfig,
    composed: list[Composed],
    launch: Callable[[Sequence[Sequence[str]]], Sequence[JobReturn]],
) -> None:
    """Carry out a sweep: plan it, run the jobs that are not done, collect the results.

    Args:
        config: the composed config, without the swept values.
        composed: what the overrides of each job make.
        launch: a function that runs jobs, each given by its overrides, through Hydra's launcher, and returns when all
            of them have ended.

    Raises:
        TensLoRAError: if the results could not be written, before anything runs; and if jobs have failed, after the
            results are written.
    """
    from omegaconf import OmegaConf

    from tenslora.harness.config.sweep import sweep_config
    from tenslora.harness.results import check_places, write_results
    from tenslora.harness.results.paper import stand_in
    from tenslora.harness.results.settings import command_of, settings_of
    from tenslora.harness.results.table import Table, changed_data
    from tenslora.harness.run_folder import check_writable
    from tenslora.harness.sweeping.jobs import State, launch_jobs, overwrite, plan_jobs
    from tenslora.harness.sweeping.plan import announcements, cost, news, plan, tuning_plan
    from tenslora.harness.sweeping.progress import Progress
    from tenslora.harness.sweeping.tuning import Known, Stages, name_of, tune_of
    from tenslora.harness.tracking import check_for_sweep, track_table

    settings, tune = sweep_config(config), tune_of(config)
    outputs, name, title = Path(config.hydra.sweep.dir), name_of(config), settings.table.title
    title = f"{title}, tuned over {tune.setting}" if tune else title
    folder = outputs / "tables" / name
    written: Any = OmegaConf.to_container(config.hydra.sweep)  # its folder may refer to other settings
    stages = Stages(plan_jobs(composed, outputs, str(written["dir"])), tune)
    known = stages.look()
    check_for_sweep(stages.jobs[0].run.logger)
    if settings.collect_only and not outputs.is_dir():
        what = "is a file; must be a folder" if outputs.exists() else "no such folder"
        raise TensLoRAError(f"hydra.sweep.dir={outputs}: {what}, whose runs could be collected")
    if not settings.dry_run:
        check_writable(folder)
        check_places(folder)
    anew = stages.jobs[0].run.overwrite
    if anew:
        overwrite(list(known.looks), collect_only=settings.collect_only, dry_run=settings.dry_run)
        known = stages.look()

    def collect(known: Known) -> Table:
        table = Table(name, title, stages.runs(known), settings.table.score, groups=settings.table.groups)
        tuning = stages.tuning(known, name, title)
        notes = tuple(filter(None, [stand_in(table), changed_data(table), tuning.edge_note if tuning else ""]))
        of_runs = settings_of(job.run.settings() for job in known.jobs if job in known.looks)
        return replace(table, notes=notes, command=command_of(sys.argv), settings=of_runs, tuning=tuning)

    if tune:
        print(tuning_plan(known), end="\n\n")
    print(plan(collect(known), known.looks))
    print(cost(known.open), end="", flush=True)
    if settings.dry_run:
        if anew and (done := sum(look.state is State.DONE for look in known.looks.values())):
            print(f"overwrite=true: the sweep would train anew what is done, {done} of {len(known.looks)} jobs")
        return

    tried: set[Job] = set()
    if not settings.collect_only:
        print("\n".join(["", *announcements(known.looks)]), flush=True)
        if known.open:
            print(f"report: {folder / 'report.html'}, written anew as jobs end\n", flush=True)
    while todo := [job for job in known.open if job not in tried and not settings.collect_only]:
        from tenslora.harness.results.report import write_report

        def report(looks: Mapping[Job, Look], goes_on: bool, known: Known = known) -> None:
            write_report(collect(replace(known, looks={**known.looks, **looks})), folder, goes_on)

        shown = [job for job, look in known.looks.items() if job in todo or look.state is State.DONE]
        with Progress(shown, known.looks, report):
            launch_jobs(todo, launch)
        tried.update(todo)
        earlier, known = known, stages.look()
        print("".join(f"{line}\n" for line in news(earlier, known)), end="", flush=True)

    table = collect(known)
    files = write_results(table, folder)
    offline = track_table(stages.jobs[0].run.logger, folder, table, files)
    print("\n".join(["", *(str(file) for file in files)]))
    if offline:
        place = shlex.quote(str(outputs))
        print(f"\n{offline}; to upload: find {place} -name 'offline-run-*' -prune -exec wandb sync {{}} +")
    lost = {
        job: f"its record is no longer in {job.folder.path}"
        for job, look in known.looks.items()
        if job in tried and look.state in (State.NEW, State.BEGUN)
    }
    if failed := {**known.failed, **lost}:
        print("\n".join(["", "failed:", *(f"  {job.label}: {problem}" for job, problem in failed.items())]))
        raise TensLoRAError(f"{len(failed)} of {len(known.looks)} jobs failed; the same command runs them again")
    if untuned := [
        f"{search.jobs[0].label}: {choice.problem}" for search, choice in known.choices.items() if choice.problem
    ]:
        raise TensLoRAError(f"tune.values: no value works for {len(untuned)} rows, such as {untuned[0]}")


if __name__ == "__main__":
    run_app(run_job, config_name="sweep", sweep=sweep)
