"""train.py started again, twice at a time, or for another number of epochs."""

from __future__ import annotations

import contextlib
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tenslora.harness.backbones import EMBEDDED
from tenslora.harness.run_folder import RunFolder
from tests.commands import Command, Commands, Ended
from tests.conftest import ROOT
from tests.running import SHORT, record
from tests.sweeps import claimed_by_a_process

ONE_EPOCH = [*SHORT, "trainer.epochs=1"]


def started(commands: Commands, folder: Path, *words: str, accident: str = "") -> Ended:
    return commands.run(Command("train.py", words, folder, accident))


def run_folder(folder: Path) -> Path:
    """The folder of the only run below the folder in which train.py was started."""
    (path,) = folder.glob("outputs/*/*/*")
    return path


def log_of(folder: Path) -> str:
    return (run_folder(folder) / "train.log").read_text()


def test_a_finished_run_is_not_carried_out_again_unless_it_is_to_be_overwritten(
    commands: Commands, tmp_path: Path
) -> None:
    assert started(commands, tmp_path, *ONE_EPOCH).status == 0
    files = {name: run_folder(tmp_path) / name for name in ("result.json", "checkpoint.safetensors")}
    before = {name: file.stat().st_mtime_ns for name, file in files.items()}
    score = record(run_folder(tmp_path))["metrics"]["last"]

    again = started(commands, tmp_path, *ONE_EPOCH, "resume=true")
    assert again.status == 0
    assert f"accuracy: last {score:.4f}" in again.out + again.err
    assert "nothing was done, because this run is finished; overwrite=true trains it anew" in again.out + again.err
    assert {name: file.stat().st_mtime_ns for name, file in files.items()} == before

    assert started(commands, tmp_path, *ONE_EPOCH, "overwrite=true").status == 0
    assert all(file.stat().st_mtime_ns > before[name] for name, file in files.items())
    assert record(run_folder(tmp_path))["metrics"]["last"] == score


def test_a_folder_of_a_run_with_other_settings_is_refused(commands: Commands, tmp_path: Path) -> None:
    here = f"hydra.run.dir={tmp_path}/run"
    refused = "is of a run with other settings (its digest is "
    assert started(commands, tmp_path, *SHORT, here, accident="kill step 3").status == -9  # in the second epoch
    stopped = started(commands, tmp_path, *SHORT, here, "seed=1")
    assert (stopped.status, stopped.err.count("\n")) == (1, 1)
    assert stopped.err.startswith(f"error: {tmp_path}/run/checkpoint.safetensors: {refused}")
    assert started(commands, tmp_path, *SHORT, here).status == 0
    finished = started(commands, tmp_path, *SHORT, here, "seed=1")
    assert (finished.status, finished.err.count("\n")) == (1, 1)
    assert finished.err.startswith(f"error: {tmp_path}/run/result.json: {refused}")
    assert record(tmp_path / "run")["seed"] == 0
    assert started(commands, tmp_path, *SHORT, here, "seed=1", "overwrite=true").status == 0
    assert record(tmp_path / "run")["seed"] == 1


def test_a_record_that_cannot_be_read_is_said_and_the_run_is_trained(commands: Commands, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text("[]")
    (tmp_path / "run" / ".result.json.12.tmp").write_text("half")  # of a process that was killed
    ended = started(commands, tmp_path, *ONE_EPOCH, f"hydra.run.dir={tmp_path}/run")
    assert ended.status == 0
    assert "result.json: not a readable record (" in ended.out and "; the run is trained anew" in ended.out
    assert record(tmp_path / "run")["status"] == "completed"
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_run_does_not_write_into_the_folder_of_its_backbone(commands: Commands, tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    shutil.copy(EMBEDDED, weights)
    before = weights.read_bytes()
    words = [*SHORT, "tensor_mode=full", f"model.checkpoint={tmp_path}", f"hydra.run.dir={tmp_path}"]
    ended = commands.run(Command("train.py", words, tmp_path))
    assert (ended.status, ended.err.count("\n")) == (1, 1)
    assert f"model.checkpoint={tmp_path}: is the run's own folder" in ended.err
    assert weights.read_bytes() == before


def test_overwriting_and_resuming_contradict_each_other(commands: Commands, tmp_path: Path) -> None:
    ended = started(commands, tmp_path, *ONE_EPOCH, "overwrite=true", "resume=true")
    assert ended.status == 1
    assert "error: overwrite=true: must be false with resume=true" in ended.err


def test_resuming_without_a_checkpoint_says_so_and_starts(commands: Commands, tmp_path: Path) -> None:
    assert started(commands, tmp_path, *ONE_EPOCH, "resume=true").status == 0
    assert f"resume=true: there is no checkpoint in {run_folder(tmp_path)}; the run starts" in log_of(tmp_path)


@pytest.mark.parametrize("accident", ["", "kill step 3"])
def test_a_longer_run_says_why_it_does_not_continue_the_shorter_one(
    accident: str, commands: Commands, tmp_path: Path
) -> None:
    commands.run(Command("train.py", SHORT, tmp_path, accident=accident))
    shorter = run_folder(tmp_path)
    assert (shorter / "result.json").is_file() == (not accident)
    longer = started(commands, tmp_path, *SHORT, "trainer.epochs=3", "resume=true")
    assert f"this is another run than {shorter}, which has trainer.epochs=2: the learning rate falls" in longer.out
    other = started(commands, tmp_path, *ONE_EPOCH, "optimizer.lr=0.1")
    assert "another run" not in other.out + other.err


def test_a_second_process_is_refused(commands: Commands, tmp_path: Path) -> None:
    with claimed_by_a_process(RunFolder(tmp_path / "run")):
        ended = started(commands, tmp_path, *ONE_EPOCH, f"hydra.run.dir={tmp_path}/run")
    assert ended.status == 1
    assert ended.err == f"error: {tmp_path}/run: another process is carrying out a run there; wait for it, or stop it\n"
    assert not (tmp_path / "run" / "result.json").exists()


def test_a_run_on_a_terminal_prints_bare_lines(tmp_path: Path) -> None:
    ours, its = pty.openpty()
    words = [*ONE_EPOCH, "tensor_mode=lora", f"hydra.run.dir={tmp_path / 'run'}"]
    with subprocess.Popen([sys.executable, ROOT / "train.py", *words], stdin=its, stdout=its, stderr=its) as process:
        os.close(its)
        said = b""
        with contextlib.suppress(OSError):  # at the end of a terminal
            while part := os.read(ours, 4096):
                said += part
    os.close(ours)
    assert process.returncode == 0, said
    assert b"\r\nlora on digits with vit_digits, seed 0: completed\r\n" in said
