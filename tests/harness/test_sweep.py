"""Real sweeps of tiny jobs: planned, failing, interrupted, killed, shared, and through each launcher."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tenslora.harness.backbones import EMBEDDED
from tenslora.harness.config import digest
from tests.conftest import ROOT
from tests.running import SHORT, composed
from tests.sweeps import held_elsewhere

# One process imports everything once and, for each line of its input, forks the sweeps on it and waits for all of them.
# A sweep is [folder, arguments, where, files for its output]. Where: "" or what happens to it, counted over all of its
# jobs: "kill step 2", before the second optimizer step; "kill write 3", inside the third write of a file, with half of
# the bytes on disk; "kill replace 3", when the third file is written but has not taken its name; "interrupt step 2",
# Ctrl-C; "terminate step 2", SIGTERM.
DRIVER = """
import gc, json, os, runpy, signal, sys
import joblib, matplotlib.figure, scipy.stats, sklearn.datasets, sklearn.metrics, submitit, timm, torch, torchvision
import hydra.core.plugins, tenslora.harness.results.figures, tenslora.harness.results.report, tenslora.harness.training.loop, train

def at(function, number, end):
    calls = iter(range(1, 10000))
    def wrapped(*args):
        if next(calls) == number:
            if function is real_fsync:
                os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
            signal.raise_signal(end)  # in this thread, and so just here
        return function(*args)
    return wrapped

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without it
hydra.core.plugins.Plugins.instance()
real_fsync = os.fsync
torch.set_num_threads(1)
gc.freeze()  # the forks' garbage collection need not walk through all of this
for line in sys.stdin:
    pids = []
    for folder, words, where, files in json.loads(line):
        pid = os.fork()
        if pid == 0:
            for number, file in enumerate(files, start=1):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
            if where:
                end, kind, number = where.split()
                end = {"kill": signal.SIGKILL, "interrupt": signal.SIGINT, "terminate": signal.SIGTERM}[end]
                places = {"step": (torch.optim.AdamW, "step"), "write": (os, "fsync"), "replace": (os, "replace")}
                module, name = places[kind]
                setattr(module, name, at(getattr(module, name), int(number), end))
            sys.path[0] = os.getcwd()  # as it is for `python <there>/sweep.py`
            os.chdir(folder)
            sys.argv = ["sweep.py", *words]
            runpy.run_path(os.path.join(sys.path[0], "sweep.py"), run_name="__main__")
            sys.exit()
        pids.append(pid)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
"""


TINY = [*SHORT, "hydra/launcher=basic", "rank_strategy=isorank", "seed=0"]


@dataclass(frozen=True)
class Ended:
    """How a sweep ended: its status (the signal's number, negative, if one killed it) and what it printed."""

    status: int
    out: str
    err: str


class Driver:
    """Runs sweeps of tiny jobs, each in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self, folder: Path, *words: str, where: str = "") -> Ended:
        (ended,) = self.together((folder, words), where=where)
        return ended

    def together(self, *sweeps: tuple[Path, Sequence[str]], where: str = "") -> list[Ended]:
        """Run sweeps, given as (folder, arguments), at the same time."""
        assert self.process.stdin and self.process.stdout
        request: list[Any] = []
        for folder, words in sweeps:
            self.count += 1
            files = [str(self.folder / f"{self.count}.{name}") for name in ("out", "err")]
            request.append((str(folder), [*TINY, *words], where, files))
        print(json.dumps(request), file=self.process.stdin, flush=True)
        statuses = json.loads(self.process.stdout.readline())
        return [
            Ended(status, *(Path(file).read_text() for file in files))
            for status, (*_, files) in zip(statuses, request, strict=True)
        ]


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    driver = Driver(tmp_path_factory.mktemp("driver"))
    yield driver
    assert driver.process.stdin
    driver.process.stdin.close()
    driver.process.wait(timeout=60)


def table(folder: Path) -> bytes:
    return (folder / "outputs" / "tables" / "digits" / "table.csv").read_bytes()


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(table(folder).decode().splitlines()))


def completions(folder: Path) -> list[int]:
    """How often each job's log says that it has been completed."""
    return [log.read_text().count(": completed") for log in folder.rglob("train.log")]


TWO = "tensor_mode=lora,qkv_depth"


@pytest.fixture(scope="module")
def whole(drive: Driver, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep of two jobs that nothing has happened to."""
    folder = tmp_path_factory.mktemp("whole")
    assert drive(folder, TWO).status == 0
    return folder


def test_a_dry_run_prints_the_plan_and_neither_writes_nor_loads_anything(tmp_path: Path) -> None:
    script = """
import os, runpy, sys
sys.path[0] = os.path.dirname(sys.argv[1])
runpy.run_path(sys.argv.pop(1), run_name="__main__")
print("loaded:", *({"torch", "timm", "transformers", "sklearn", "matplotlib"} & set(sys.modules)))
"""
    words = ["table=isorank", "dataset=cola,dtd", "seed=2,5,7", "dry_run=true"]
    command = [sys.executable, "-c", script, str(ROOT / "sweep.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[-1] == "loaded:"
    assert lines[-2] == "48 jobs: 48 to run"
    assert lines[0] == "LoRA and the seven constructions, isorank"
    assert [line for line in lines if " with " in line] == ["cola with roberta_base", "dtd with vit_base"]
    (row,) = {" ".join(line.split()) for line in lines if line.startswith("  qkv_depth")}
    assert row == "qkv_depth isorank 4, 4, 4, 4 6,460 2.9 % 3 to run"
    assert not list(tmp_path.iterdir())


def test_lists_on_the_command_line_narrow_and_widen_a_table(drive: Driver, tmp_path: Path) -> None:
    asked = [
        ["tensor_mode=lora,full,qkv"],
        ["rank_strategy=isoparameters", "tensor_mode=full,lora", "seed=range(3)", "optimizer.lr=1e-3,2e-3"],
        ["rank_strategy=explicit", "tensor_mode=qkv", "rank_strategy.ranks=[2,3,1],[5,5,3]"],
    ]
    ends = drive.together(*((tmp_path, ["dry_run=true", *words]) for words in asked))
    assert [(ended.status, ended.err) for ended in ends] == [(0, "")] * 3
    narrow, wide, explicit = (
        [" ".join(line.split()) for line in ended.out.splitlines() if "to run" in line] for ended in ends
    )
    assert [line.split()[0] for line in narrow] == ["lora", "qkv", "full", "3"]
    assert wide == [
        "lora optimizer.lr=0.001 4 6,144 100.0 % 3 to run",
        "lora optimizer.lr=0.002 4 6,144 100.0 % 3 to run",
        "full optimizer.lr=0.001 3 to run",
        "full optimizer.lr=0.002 3 to run",
        "12 jobs: 12 to run",
    ]
    # 4 layers: 64 * 2 + 64 * 3 + 3 * 1 + 2 * 3 * 1, and 64 * 5 + 64 * 5 + 3 * 3 + 5 * 5 * 3
    assert [line.split("] ")[1] for line in explicit[:2]] == [
        "2, 3, 1 1,316 21.4 % 1 to run",
        "5, 5, 3 2,896 47.1 % 1 to run",
    ]
    assert not list(tmp_path.iterdir())


def test_every_ablation_is_a_table_of_its_own(drive: Driver, tmp_path: Path) -> None:
    jobs = {
        "rank_sensitivity": 4 * 7,
        "initialisation": 7 * 3,
        "head_layout": 4 * 2,
        "factorizations": 7 * 3,
        "core_lr": 4 * 5,
        "adapted_modules": 3 * 5,
    }
    words = ["dry_run=true", "rank_strategy=isoparameters"]
    ends = drive.together(*((tmp_path, [*words, f"table={table}"]) for table in jobs))
    for ended, count in zip(ends, jobs.values(), strict=True):
        assert (ended.status, ended.err) == (0, "")
        assert ended.out.splitlines()[-1] == f"{count} jobs: {count} to run"
    assert not list(tmp_path.iterdir())


def test_a_wrong_setting_of_any_job_ends_it_in_one_line_before_the_first(drive: Driver, tmp_path: Path) -> None:
    wrong = {
        "seed=0,-1": "seed=-1: must be at least 0",
        "trainer.epochs=1,0": "trainer.epochs=0: must be at least 1",
        "tensor_mode=lora,nope": "tensor_mode=nope: must be one of att, att_depth",
        "table=nope": "table=nope: must be one of adapted_modules, core_lr, digits",
    }
    ends = drive.together(*((tmp_path, ["tensor_mode=lora", word]) for word in wrong))
    for ended, message in zip(ends, wrong.values(), strict=True):
        assert (ended.status, ended.out) == (1, "")
        assert ended.err.startswith(f"error: {message}")
        assert ended.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_job_that_fails_stops_no_other_and_the_same_command_runs_it_again(drive: Driver, tmp_path: Path) -> None:
    late = "late.safetensors"  # not there yet
    words = ["tensor_mode=lora", f"model.checkpoint={late},embedded", "seed=0,1"]
    variants = [f"model.checkpoint={late}", "model.checkpoint=embedded"]
    labels = [f"digits lora {variant} seed {seed}" for variant in variants for seed in (0, 1)]
    reason = f"{variants[0]}: no such file, nor a folder with model.safetensors in it"

    first = drive(tmp_path, *words)
    assert (first.status, first.err) == (1, "error: 2 of 4 jobs failed; the same command runs them again\n")
    said = first.out.splitlines()
    assert said[-3:] == ["failed:", *(f"  {label}: {reason}" for label in labels[:2])]
    for label in labels[:2]:
        assert any(line.startswith("[") and f"/4] {label}: failed ({reason}), 0:" in line for line in said)
    assert [(row["variant"], row["status"], row["last"] != "", row["problem"]) for row in rows(tmp_path)] == [
        *[(variants[0], "failed", False, reason)] * 2,
        *[(variants[1], "completed", True, "")] * 2,
    ]

    def files() -> dict[Path, int]:
        found = (tmp_path / "outputs" / "digits").rglob("*")
        return {path: path.stat().st_mtime_ns for path in found if path.is_file()}

    complete, before = table(tmp_path), files()
    shutil.rmtree(tmp_path / "outputs" / "tables")
    shutil.copy(EMBEDDED, tmp_path / late)
    collected = drive(tmp_path, *words, "collect_only=true")
    assert (collected.status, collected.err) == (first.status, first.err)
    assert not any(line.startswith(("skip", "again", "go on", "[")) for line in collected.out.splitlines())
    assert table(tmp_path) == complete
    assert files() == before

    second = drive(tmp_path, *words)
    assert (second.status, second.err) == (0, "")
    said = second.out.splitlines()
    assert sorted(line for line in said if line.startswith(("skip", "again"))) == [
        *(f"again: {label}, which failed ({reason})" for label in labels[:2]),
        *(f"skip: {label} is done" for label in labels[2:]),
    ]
    assert [line.split()[0] for line in said if line.startswith("[")] == ["[3/4]", "[4/4]"]
    assert completions(tmp_path) == [1] * 4
    assert [row["status"] for row in rows(tmp_path)] == ["completed"] * 4
    assert [row["last"] for row in rows(tmp_path)][:2] == [row["last"] for row in rows(tmp_path)][2:]
    assert not list(tmp_path.rglob("failure.json"))


def test_a_sweep_that_was_interrupted_and_killed_anywhere_ends_as_one_that_was_not(
    drive: Driver, whole: Path, tmp_path: Path
) -> None:
    interrupted = drive(tmp_path, TWO, where="interrupt step 3")  # in the first job's second epoch
    assert (interrupted.status, interrupted.err) == (130, "interrupted\n")
    goes_on = "go on: digits lora seed 0, from its checkpoint\n"
    terminated = drive(tmp_path, TWO, where="terminate step 1")
    assert (terminated.status, terminated.err) == (130, "interrupted\n")
    assert goes_on in terminated.out
    assert not list(tmp_path.rglob("failure.json")) and not list(tmp_path.rglob("result.json"))
    kills = [
        "kill write 1",  # half of the first job's second checkpoint written
        "kill replace 4",  # the first job's record complete, under its temporary name
        "kill step 2",  # in the second job's first epoch: nothing to go on from
        "kill replace 8",  # all jobs done: 5 files of the second job's, then table.csv without its name
    ]
    killed = [drive(tmp_path, TWO, where=kill) for kill in kills]
    assert [ended.status for ended in killed] == [-9] * len(kills)
    assert [goes_on in ended.out for ended in killed] == [True, True, True, False]
    last = drive(tmp_path, TWO)
    assert (last.status, last.err) == (0, "")
    assert "2 jobs: 2 done" in last.out
    assert table(tmp_path) == table(whole)
    for file in [*whole.rglob("adapter.safetensors"), *whole.rglob("head.safetensors")]:
        assert (tmp_path / file.relative_to(whole)).read_bytes() == file.read_bytes()


def test_two_sweeps_on_one_folder_share_the_work(drive: Driver, whole: Path, tmp_path: Path) -> None:
    both = drive.together((tmp_path, [TWO]), (tmp_path, [TWO]))
    assert [(ended.status, ended.err) for ended in both] == [(0, ""), (0, "")]
    assert completions(tmp_path) == [1, 1]
    assert table(tmp_path) == table(whole)


def test_what_another_sweep_has_in_hand_is_waited_for_and_taken_over_when_it_dies(
    drive: Driver, whole: Path, tmp_path: Path
) -> None:
    theirs, ours = (tmp_path / next(whole.rglob(name)).relative_to(whole) for name in ("lora-*", "qkv_depth-*"))
    with held_elsewhere(theirs) as holder:

        def die() -> None:
            while not (ours / "result.json").exists() and holder.poll() is None:
                time.sleep(0.05)
            time.sleep(1.5)  # the sweep has nothing left but to wait
            holder.kill()

        dying = threading.Thread(target=die)
        dying.start()
        ended = drive(tmp_path, TWO)
        waited = holder.poll() is not None
        holder.kill()
        dying.join()
    assert waited
    assert (ended.status, ended.err) == (0, "")
    assert "wait: digits lora seed 0 is running elsewhere" in ended.out
    assert completions(tmp_path) == [1, 1]
    assert table(tmp_path) == table(whole)


def test_a_runs_identity_in_a_table_is_train_pys(whole: Path) -> None:
    words = [*SHORT, "rank_strategy=isorank"]
    assert {row["tensor_mode"]: row["digest"] for row in rows(whole)} == {
        mode: digest(composed(*words, f"tensor_mode={mode}")) for mode in ("lora", "qkv_depth")
    }


def test_every_launcher_makes_the_same_table(drive: Driver, tmp_path: Path) -> None:
    words = ["tensor_mode=lora", "optimizer.lr=1e-3,1e30"]  # one is completed and one diverges
    launchers = {"basic": [], "joblib": ["hydra.launcher.n_jobs=2"], "submitit_local": []}
    for name in launchers:
        (tmp_path / name).mkdir()
    ends = drive.together(
        *((tmp_path / name, [*words, f"hydra/launcher={name}", *more]) for name, more in launchers.items())
    )
    for name, ended in zip(launchers, ends, strict=True):
        last = ended.err.splitlines()[-1:]
        assert (ended.status, last) == (1, ["error: 1 of 2 jobs failed; the same command runs them again"]), name
        assert [row["status"] for row in rows(tmp_path / name)] == ["completed", "failed"]
        assert table(tmp_path / name) == table(tmp_path / "basic")
        assert sum(line.startswith(("[1/2]", "[2/2]")) for line in ended.out.splitlines()) == 2
    assert "submitted 2 jobs to local" in ends[-1].out
