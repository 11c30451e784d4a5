"""Real sweeps of tiny jobs: planned, failing, interrupted, killed, shared, and through each launcher."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hydra.core.utils import JobReturn, JobStatus

from sweep import sweep as carry_out_table
from tenslora.errors import TensLoRAError
from tenslora.harness.backbones import EMBEDDED
from tenslora.harness.run_folder import RunFolder
from tests.commands import Command, Commands, Ended
from tests.conftest import ROOT
from tests.running import SHORT, composed, configured, record
from tests.sweeps import claimed_by_a_process, swept

pytestmark = pytest.mark.slow

TINY = [*SHORT, "rank_strategy=isorank", "seed=0"]
TWO_JOBS = "tensor_mode=lora,qkv_depth"

Sweep = Callable[..., Ended]


def sweep_command(folder: Path, words: Sequence[str], accident: str = "") -> Command:
    return Command("sweep.py", [*TINY, "hydra/launcher=basic", *words], folder, accident)


@pytest.fixture
def sweep(commands: Commands) -> Sweep:
    """Carries out a sweep of tiny jobs."""

    def run(folder: Path, *words: str, accident: str = "") -> Ended:
        return commands.run(sweep_command(folder, words, accident))

    return run


def table(folder: Path) -> bytes:
    return (folder / "outputs" / "tables" / "digits" / "table.csv").read_bytes()


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(table(folder).decode().splitlines()))


def completions(folder: Path) -> list[int]:
    """How often each job's log says that the job was completed."""
    return [log.read_text().count(": completed") for log in folder.rglob("train.log")]


@pytest.fixture(scope="module")
def undisturbed(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep of two jobs that nothing has happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = commands.run(sweep_command(folder, [TWO_JOBS]))
    assert (ended.status, ended.err) == (0, "")
    return folder


def test_a_dry_run_prints_the_plan_and_neither_writes_nor_loads_anything(tmp_path: Path) -> None:
    words = ["table=isorank", "dataset=cola,dtd", "seed=2,5,7", "tensor_mode=lora,qkv_depth", "dry_run=true"]
    command = [sys.executable, "-X", "importtime", str(ROOT / "sweep.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "hydra" in imported
    assert not {"torch", "timm", "transformers", "sklearn", "matplotlib"} & imported
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0] == "LoRA and tensor constructions, isorank"
    assert [line for line in lines if " with " in line] == ["cola with roberta_base", "dtd with vit_base"]
    (row,) = {" ".join(line.split()) for line in lines if line.startswith("  qkv_depth")}
    assert row == "qkv_depth isorank 4, 4, 4, 4 6,460 2.9 % 0.07 3 to run"
    assert lines[-1] == "12 jobs: 12 to run"
    assert not list(tmp_path.iterdir())


def test_lists_on_the_command_line_narrow_and_widen_a_table(commands: Commands, tmp_path: Path) -> None:
    given = [
        ["tensor_mode=lora,full,qkv"],
        ["rank_strategy=isoparameters", "tensor_mode=full,lora", "seed=range(3)", "optimizer.lr=1e-3,2e-3"],
        ["rank_strategy=explicit", "tensor_mode=qkv", "rank_strategy.ranks=[2,3,1],[5,5,3]"],
    ]
    ends = commands.run_together([sweep_command(tmp_path, ["dry_run=true", *words]) for words in given])
    assert [(ended.status, ended.err) for ended in ends] == [(0, "")] * 3
    narrow, wide, explicit = (
        [" ".join(line.split()) for line in ended.out.splitlines() if "to run" in line] for ended in ends
    )
    assert [line.split()[0] for line in narrow] == ["lora", "qkv", "full", "3"]
    assert wide == [
        "lora optimizer.lr=0.001 4 6,144 100.0 % 1.00 3 to run",
        "lora optimizer.lr=0.002 4 6,144 100.0 % 1.00 3 to run",
        "full optimizer.lr=0.001 3 to run",
        "full optimizer.lr=0.002 3 to run",
        "12 jobs: 12 to run",
    ]
    # 4 layers: 64 * 2 + 64 * 3 + 3 * 1 + 2 * 3 * 1, and 64 * 5 + 64 * 5 + 3 * 3 + 5 * 5 * 3. The first steps are
    # sqrt(2 * 3 * 1 / 3) and sqrt(5 * 5 * 3 / 3) of LoRA's sqrt(4 * 64 / 3).
    assert [line.split("] ")[1] for line in explicit[:2]] == [
        "2, 3, 1 1,316 21.4 % 0.15 1 to run",
        "5, 5, 3 2,896 47.1 % 0.54 1 to run",
    ]
    assert not list(tmp_path.iterdir())


def test_a_wrong_setting_of_any_job_ends_the_sweep_in_one_line_before_the_first(
    commands: Commands, tmp_path: Path
) -> None:
    wrong = {
        "trainer.epochs=1,0": "trainer.epochs=0: must be at least 1",
        "tensor_mode=lora,nope": "tensor_mode=nope: must be one of att, att_depth",
        "table=nope": "table=nope: must be one of adapted_modules, core_lr, digits",
        "trainer=nope": "trainer=nope: ",
        "tensor_mode=[]": "tensor_mode: is missing",
        "seed=range(0)": "seed=range(0): must be at least one value",
        "seed=range(0,1000000) dry_run=true": "seed=range(0,1000000): must be at most 10,000 values",
        "table.title=null": "table.title=null: must be text",
        "table.name=a/b": "table.name=a/b: must be a name of at most 100 letters",
        "table.score=nope": "table.score=nope: must be one of last, best",
        "dry_run=maybe": "dry_run=maybe: must be true or false",
        "hydra/launcher=joblib hydra.launcher.n_jobs=0": "hydra.launcher.n_jobs=0: must be from 1 to 1024",
        "hydra.sweep.dir=": "hydra.sweep.dir=: must be a folder",
        "hydra.sweep.subdir=same": "hydra.sweep.subdir=same: must be left out",
        "seed=0,1 table.groups={a:[digits]}": "Could not override 'table.groups'",
    }
    ends = commands.run_together([sweep_command(tmp_path, ["tensor_mode=lora", *word.split()]) for word in wrong])
    for ended, message in zip(ends, wrong.values(), strict=True):
        assert (ended.status, ended.out) == (1, "")
        assert ended.err.startswith(f"error: {message}"), ended.err
        assert ended.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_name_for_one_run_of_wandb_is_refused_in_a_sweep(commands: Commands, tmp_path: Path) -> None:
    words = [*TINY, "hydra/launcher=basic", "tensor_mode=lora", "logger=wandb", "dry_run=true"]
    ended = commands.run(Command("sweep.py", words, tmp_path, environment={"WANDB_RUN_ID": "mine"}))
    assert (ended.status, ended.out) == (1, "")
    assert ended.err.startswith("error: WANDB_RUN_ID=mine: must not be set for a sweep")


def test_a_sweep_that_torchrun_starts_is_refused(commands: Commands, tmp_path: Path) -> None:
    words = ["dataset=digits", "tensor_mode=lora", "seed=0", f"hydra.sweep.dir={tmp_path}"]
    environment = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    ended = commands.run(Command("sweep.py", words, tmp_path, environment=environment))
    assert (ended.status, len(ended.err.splitlines())) == (1, 1)
    assert ended.err.startswith("error: WORLD_SIZE=2: must be 1 for sweep.py, and for any hydra/launcher but basic; ")


def test_a_job_whose_record_is_gone_at_the_end_has_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["tensor_mode=lora", "rank_strategy=isorank", "seed=0"]
    job = swept(*words)
    config = composed(*words, f"hydra.sweep.dir={tmp_path}", config_name="sweep", with_hydra=True)
    done = JobReturn()
    done.status, done.return_value = JobStatus.COMPLETED, job.run.digest()
    with pytest.raises(TensLoRAError, match="1 of 1 jobs failed; the same command runs them again"):
        carry_out_table(config, [job], lambda _: [done])
    assert f"digits lora seed 0: its record is no longer in {tmp_path / job.run.folder()}" in capsys.readouterr().out


def test_results_that_could_not_be_written_end_the_sweep_in_one_line_before_the_first(
    commands: Commands, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    ended = commands.run(sweep_command(tmp_path, ["tensor_mode=lora", f"hydra.sweep.dir={tmp_path}/file/outputs"]))
    assert (ended.status, ended.out) == (1, "")
    assert ended.err == f"error: {tmp_path}/file/outputs/tables/digits: cannot be written (Not a directory)\n"
    full = commands.run(
        Command("sweep.py", [*TINY, "hydra/launcher=basic", "tensor_mode=lora"], tmp_path, largest_file=20_000)
    )
    assert (full.status, full.out) == (1, "")
    assert full.err == "error: outputs/tables/digits: cannot be written (File too large)\n"
    figures = tmp_path / "taken" / "tables" / "digits" / "figures"
    figures.parent.mkdir(parents=True)
    figures.touch()
    taken = commands.run(sweep_command(tmp_path, ["tensor_mode=lora", f"hydra.sweep.dir={tmp_path}/taken"]))
    assert (taken.status, taken.out) == (1, "")
    assert taken.err == f"error: {figures}: cannot be written (is a file; must be a folder, or absent)\n"
    assert not list(tmp_path.rglob("train.log"))


def test_a_job_whose_folder_cannot_be_made_is_one_line(sweep: Sweep, tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "digits").touch()
    ended = sweep(tmp_path, "tensor_mode=lora")
    assert (ended.status, ended.err.count("\n")) == (1, 1)
    assert ended.err.startswith("error: hydra.launcher: broke off ([Errno 20] Not a directory: 'outputs/digits/")


def test_at_the_end_the_report_is_complete_and_has_the_command_the_settings_and_the_classes(undisturbed: Path) -> None:
    html = (undisturbed / "outputs" / "tables" / "digits" / "report.html").read_text()
    assert "2 of 2 runs finished." in html
    assert "location.reload" not in html
    assert "python sweep.py" in html and "tensor_mode=lora,qkv_depth" in html
    assert "<dt>optimizer</dt><dd>adamw, lr=0.001" in html
    assert "Accuracy by class" in html


def test_a_job_that_fails_stops_no_other_and_the_same_command_runs_it_again(sweep: Sweep, tmp_path: Path) -> None:
    late = "late.safetensors"  # not there yet
    words = ["tensor_mode=lora", f"model.checkpoint={late},embedded"]
    variants = [f"model.checkpoint={late}", "model.checkpoint=embedded"]
    failing, completed = (f"digits lora {variant} seed 0" for variant in variants)
    reason = f"{variants[0]}: no such file, nor a folder with model.safetensors in it"

    first = sweep(tmp_path, *words)
    assert (first.status, first.err) == (1, "error: 1 of 2 jobs failed; the same command runs them again\n")
    said = first.out.splitlines()
    assert said[-2:] == ["failed:", f"  {failing}: {reason}"]
    assert any(line.startswith("[") and f"/2] {failing}: failed ({reason}), 0:" in line for line in said)
    assert [(row["variant"], row["status"], row["last"] != "", row["problem"]) for row in rows(tmp_path)] == [
        (variants[0], "failed", False, reason),
        (variants[1], "completed", True, ""),
    ]

    def files() -> dict[Path, int]:
        paths = (tmp_path / "outputs" / "digits").rglob("*")
        return {path: path.stat().st_mtime_ns for path in paths if path.is_file() and path.name != ".lock"}

    complete, before = table(tmp_path), files()
    shutil.rmtree(tmp_path / "outputs" / "tables")
    shutil.copy(EMBEDDED, tmp_path / late)
    misspelt = sweep(tmp_path, *words, "collect_only=true", "hydra.sweep.dir=output")
    assert misspelt.err == "error: hydra.sweep.dir=output: no such folder, whose runs could be collected\n"
    assert not (tmp_path / "output").exists()
    collected = sweep(tmp_path, *words, "collect_only=true")
    assert (collected.status, collected.err) == (first.status, first.err)
    assert not any(line.startswith(("skip", "again", "go on", "[")) for line in collected.out.splitlines())
    assert table(tmp_path) == complete
    assert files() == before

    second = sweep(tmp_path, *words)
    assert (second.status, second.err) == (0, "")
    said = second.out.splitlines()
    assert sorted(line for line in said if line.startswith(("skip", "again"))) == [
        f"again: {failing}, which failed ({reason})",
        f"skip: {completed} is done",
    ]
    assert [line.split()[0] for line in said if line.startswith("[")] == ["[2/2]"]
    assert completions(tmp_path) == [1, 1]
    assert [row["status"] for row in rows(tmp_path)] == ["completed"] * 2
    assert len({row["last"] for row in rows(tmp_path)}) == 1, "the two checkpoints are the same file"
    assert not list(tmp_path.rglob("failure.json"))


def test_a_sweep_that_was_terminated_and_killed_ends_as_one_that_was_not(
    sweep: Sweep, undisturbed: Path, tmp_path: Path
) -> None:
    goes_on = "go on: digits lora seed 0, from its checkpoint\n"
    terminated = sweep(tmp_path, TWO_JOBS, accident="terminate step 3")  # in the first job's second epoch
    assert (terminated.status, terminated.err) == (130, "interrupted\n")
    assert not list(tmp_path.rglob("failure.json")) and not list(tmp_path.rglob("result.json"))
    accidents = [
        "kill step 4",  # the first job is done, the second in its first epoch: nothing to go on from
        "kill rename result.json 1",  # the second job's record complete, under its temporary name
    ]
    killed = [sweep(tmp_path, TWO_JOBS, accident=accident) for accident in accidents]
    assert [(ended.status, goes_on in ended.out) for ended in killed] == [(-9, True), (-9, False)]
    last = sweep(tmp_path, TWO_JOBS)
    assert (last.status, last.err) == (0, "")
    assert table(tmp_path) == table(undisturbed)
    for file in [*undisturbed.rglob("adapter.safetensors"), *undisturbed.rglob("head.safetensors")]:
        assert (tmp_path / file.relative_to(undisturbed)).read_bytes() == file.read_bytes()


def test_two_sweeps_on_one_folder_share_the_work(commands: Commands, undisturbed: Path, tmp_path: Path) -> None:
    both = commands.run_together([sweep_command(tmp_path, [TWO_JOBS])] * 2)
    assert [(ended.status, ended.err) for ended in both] == [(0, "")] * 2
    assert completions(tmp_path) == [1, 1]
    assert table(tmp_path) == table(undisturbed)


def test_a_job_of_another_sweep_is_waited_for_and_taken_over_when_that_sweep_dies(
    sweep: Sweep, undisturbed: Path, tmp_path: Path
) -> None:
    theirs, ours = (
        RunFolder(tmp_path / next(undisturbed.rglob(name)).relative_to(undisturbed)) for name in ("lora-*", "qkv_*")
    )
    with claimed_by_a_process(theirs) as holder:

        def die() -> None:
            latest = time.monotonic() + 300  # a sweep that fails to carry out its own job waits for theirs all the same
            while not ours.result.exists() and time.monotonic() < latest:
                time.sleep(0.05)
            time.sleep(1.5)  # the sweep has nothing left but to wait
            holder.kill()

        dying = threading.Thread(target=die)
        dying.start()
        ended = sweep(tmp_path, TWO_JOBS)
        waited = holder.poll() is not None
        holder.kill()
        dying.join()
    assert waited
    assert (ended.status, ended.err) == (0, "")
    assert "wait: digits lora seed 0 is running elsewhere" in ended.out
    assert completions(tmp_path) == [1, 1]
    assert table(tmp_path) == table(undisturbed)


TUNED = [
    "tensor_mode=qkv_depth,head_only", "tune.setting=optimizer.lr", "tune.values=[1e-6,1e-3]", "tune.seeds=[7]",
]  # fmt: skip


def test_a_tuned_sweep_that_was_killed_twice_ends_as_one_that_was_not(sweep: Sweep, tmp_path: Path) -> None:
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for folder in (undisturbed, killed):
        folder.mkdir()
    ended = sweep(undisturbed, *TUNED)
    assert (ended.status, ended.err) == (0, "")
    extended = ended.out.count("extended: digits qkv_depth isorank optimizer.lr=")
    assert 1 <= extended <= 3, "a rate of 1e-6 trains nothing, so that the grid is extended at the other end"
    assert "tuned: digits qkv_depth isorank optimizer.lr=" in ended.out

    # In the first trial's second epoch; then in the last of all jobs, with its record under its temporary name.
    accidents = ["kill step 3", f"kill rename result.json {4 + extended}"]
    assert [sweep(killed, *TUNED, accident=accident).status for accident in accidents] == [-9, -9]
    last = sweep(killed, *TUNED)
    assert (last.status, last.err) == (0, "")
    table = undisturbed / "outputs" / "tables" / "digits-tuned-lr"
    for name in ("table.csv", "trials.csv", "table.md", "table.tex", "figures/trials.svg"):
        assert (killed / table.relative_to(undisturbed) / name).read_bytes() == (table / name).read_bytes()
    assert set(completions(killed)) == {1}

    rows = list(csv.DictReader((table / "table.csv").read_text().splitlines()))
    assert [(row["tensor_mode"], row["scored_on"]) for row in rows] == [("qkv_depth", "test"), ("head_only", "test")]
    trials = list(csv.DictReader((table / "trials.csv").read_text().splitlines()))
    best = max(trials, key=lambda trial: float(trial["last"]))
    assert (rows[0]["tuned"], rows[1]["tuned"]) == (best["variant"], "")
    assert {(trial["scored_on"], trial["seed"], trial["validation_examples"]) for trial in trials} == {
        ("validation", "7", "10")
    }
    assert len(trials) == 2 + extended
    tuned = record(next((undisturbed / "outputs" / "digits").rglob(f"qkv_depth-*{rows[0]['digest']}")))["config"][
        "tuned"
    ]
    assert (tuned["setting"], tuned["seeds"], len(tuned["values"])) == ("optimizer.lr", [7], 2 + extended)


def test_a_run_in_a_table_is_the_one_that_train_py_would_make(undisturbed: Path) -> None:
    assert {row["tensor_mode"]: row["digest"] for row in rows(undisturbed)} == {
        mode: configured(*TINY, f"tensor_mode={mode}").digest() for mode in ("lora", "qkv_depth")
    }


def test_jobs_in_other_processes_outlive_a_killed_sweep_and_have_the_same_results(
    commands: Commands, undisturbed: Path, tmp_path: Path
) -> None:
    launchers = {
        "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=1"],
        "gpus": ["hydra/launcher=gpus", "hydra.launcher.gpus=[0]"],
        "submitit": ["hydra/launcher=submitit_local"],
    }
    for name in (*launchers, "diverged"):
        (tmp_path / name).mkdir()
        # A script of the user's own, which a job must not take for the one that it needs.
        (tmp_path / name / "train.py").write_text("raise SystemExit('another train.py')")
    # The report is written when the first of the two jobs has ended.
    started = [
        sweep_command(tmp_path / name, [TWO_JOBS, *words], accident="kill write report.html 1")
        for name, words in launchers.items()
    ]
    diverging = ["tensor_mode=lora", "hydra/launcher=joblib", "optimizer.lr=1e9", "adapter.alpha=1e6"]
    *killed, failed = commands.run_together([*started, sweep_command(tmp_path / "diverged", diverging)])
    assert [ended.status for ended in killed] == [-9] * 3
    assert "GPUs 0, 1 job at a time on each" in killed[1].out
    assert failed.status == 1
    assert failed.err.splitlines()[-1] == "error: 1 of 1 jobs failed; the same command runs them again"
    (row,) = rows(tmp_path / "diverged")
    assert row["status"] == "failed"
    assert row["problem"].startswith("the training loss is nan at step ")
    again = commands.run_together([sweep_command(tmp_path / name, [TWO_JOBS]) for name in launchers])
    assert [(ended.status, ended.err) for ended in again] == [(0, "")] * 3
    logs = [log.read_text() for log in (tmp_path / "submitit").rglob("*_log.err")]
    assert logs and not any("another train.py" in log for log in logs)
    for name in launchers:
        assert table(tmp_path / name) == table(undisturbed)
