"""What a user gets wrong, through the command line itself: one line, and a status that is not zero."""

from __future__ import annotations

import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from PIL import Image

import train
from tenslora.harness import app
from tenslora.harness.app import run_app
from tenslora.harness.cache import cache_latest
from tenslora.harness.config import validate
from tenslora.harness.config.schema import LoggerConfig
from tenslora.harness.stop import Stop
from tenslora.harness.training.processes import Processes
from tests.commands import Command, Commands, interrupt_import
from tests.conftest import ROOT
from tests.running import CONF, SHORT


def refused(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> str:
    """The line that `python train.py <words>` ends with."""
    monkeypatch.setattr(sys, "argv", ["train.py", f"hydra.run.dir={folder}", *words])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit) as ended:
        run_app(train.main, "config")
    assert isinstance(ended.value.code, str), "sys.exit prints a string to standard error, and the status is 1"
    assert ended.value.code.startswith("error: ")
    assert "\n" not in ended.value.code
    assert os.environ["HYDRA_FULL_ERROR"] == "0", "the next command of a notebook reads it too"
    return ended.value.code.removeprefix("error: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        # Hydra's own
        (["tensor_mode=nope"], "tensor_mode=nope: must be one of att, att_depth"),
        (["+tensor_mode=lora"], "+tensor_mode=lora: tensor_mode has an option already, which is changed without the +"),
        (["debug=null"], "debug=null: must be one of fast, overfit, profile; leave it out for none of them"),
        (["trainer/epochs=1"], "trainer/epochs: there is no such setting; did you mean trainer.epochs?"),
        (["--lr", "0.1"], "--lr: is no option; a setting is written name=value, such as optimizer.lr=0.001"),
        (["--config", "a"], "--config: must be one of --config-path, --config-name, --config-dir"),
        (["seed=0", "1"], "1: must be written name=value; several values have commas between them, as a=0,1"),
        (["-v"], "-v: is no option; --help lists all"),
        (["--local-rank=0"], "--local-rank=0: is what torch.distributed.launch adds; use torchrun"),
        (
            ["optimizer.learning_rate=1"],
            "optimizer.learning_rate: there is no such setting; did you mean optimizer.lr?",
        ),
        (["seed=1", "--config-dir", ".", "optimizer.lr=-2"], "optimizer.lr=-2: must be at least 0"),
        (
            ["--trainer.epochs=1"],
            "--trainer.epochs=1: must be written trainer.epochs=1, without hyphens (W&B's agent: ${",
        ),
        (["--config-dir=missing"], "--config-dir missing: must be one folder, which has a folder for each group in it"),
        *[
            (
                [f"hydra.searchpath={path}", "experiment=mine"],
                f"hydra.searchpath={path}: must be a list of folders and packages, as [file://mine,pkg://my_pa",
            )
            for path in ("mine", "[1]", "[https://mine/conf]")
        ],
        *[
            ([f"hydra.searchpath=[{path}]", "experiment=mine"], "hydra.searchpath: gone: no such folder or package")
            for path in ("gone", "file://gone", "pkg://gone")
        ],
        (["++hydra.searchpath=[mine]"], "++hydra.searchpath=[mine]: must be written without +"),
        (["--run", "--multirun"], "Only one of --run, --multirun"),
        (["seed=0,1"], "seed=0,1: is several values; add -m for a run of each, or use sweep.py; a list needs"),
        (["model=swin_tiny", "model.geometry={d_in:8}"], "model.geometry={d_in:8}: must be a list"),
        (["model=vit_base", "model.geometry=[{d_in:8}]"], "model.geometry=[{d_in:8}]: must be a dictionary"),
        (["tensor_mode"], "tensor_mode: must be written name=value"),
        (["table=[digits,dtd]"], "table=[digits,dtd]: must be one option"),
        (["tensor_mode=[lora,att]"], "tensor_mode=[lora,att]: must be one option; several are written tensor_mode=a,b"),
        (["optimizer=null"], "optimizer=null: must be one of adamw"),
        (["trainer=nope"], "trainer=nope: "),
        (["hydra.run.dir="], "hydra.run.dir=: must be a folder"),
        (["hydra.run.dir=???"], "hydra.run.dir=???: must be a folder"),
        (["hydra.run.dir=a/${no}"], "hydra.run.dir=a/${no}: Interpolation key 'no' not found"),
        (["hydra.verbose=${no}"], "hydra.verbose=${no}: Interpolation key 'no' not found"),
        (["hydra.launcher._target_=${no}"], "hydra.launcher._target_=${no}: Interpolation key 'no' not found"),
        (["dataset=base/image"], "dataset=base/image: must be one of cifar10, cola, digits, "),
        (["-m", "dataset=digits,base/text"], "dataset=base/text: must be one of cifar10, cola, digits, "),
        (["table=base/table"], "table=base/table: is a setting of sweep.py"),
        (["seed=0,1 tensor_mode=lora"], "tensor_mode=lora: is several settings in one word; each must be a word of"),
        (["seed=0,1 -m"], "seed=0,1 -m: is several settings in one word; each must be a word of its own"),
        (["-m seed=0,1"], "-m seed=0,1: is several settings in one word; each must be a word of its own"),
        (["-m", "hydra.sweeper.params.seed=1"], "must be written as the setting itself with its values, as in -m s"),
        (["-m", "+hydra.sweeper.params.seed=1"], "as in -m seed=1"),
        (["-m", "+hydra.sweeper.params={seed: 1}"], "as in -m seed=1"),
        (["-sc", "install=tcsh"], "install=tcsh: must be one of bash, fish, zsh"),
        (
            ["--shell-completion"],
            "--shell-completion: needs one of install=<shell>, uninstall=<shell> and query=<shell>",
        ),
        (["-sc", "query=bash"], "query=bash: is for the shell, which sets COMP_LINE; install=bash sets the shell up"),
        (['hydra.run.dir="~/run"'], 'hydra.run.dir="~/run": must be written without ~'),
        (['hydra.run.dir="~root/run"'], 'hydra.run.dir="~root/run": must be written without ~'),
        (["hydra.run.dir=s3://bucket/run"], "hydra.run.dir=s3://bucket/run: must be a path on disk, not an address"),
        (["warm_start=https://host/lora"], "warm_start=https://host/lora: must be a path on disk, not an address"),
        (["hydra.run.dir='a\0b'"], "hydra.run.dir, hydra.sweep.dir and hydra.job.name: must not hold a NUL"),
        (["hydra.job.name='a\0b'"], "hydra.run.dir, hydra.sweep.dir and hydra.job.name: must not hold a NUL"),
        (["hydra.launcher=null"], "hydra.launcher=null: must be the settings of a launcher"),
        (["+hydra.job.env_set={A:[1]}"], "env_set={A:[1]}: cannot be used by Hydra (TypeError: str expected, not List"),
        ([f"dataset.metrics={'[' * 300}{']' * 300}"], "dataset.metrics: must not be nested more than 16 levels deep"),
        ([f"+model.options.b={'{a:' * 100}1{'}' * 100}"], "+model.options.b: must not be nested more than 16 levels"),
        (["hydra.verbose=3"], "hydra.verbose=3: cannot be used by Hydra (AssertionError"),
        (
            ["hydra.job_logging.root.level=LOUD"],
            "level=LOUD: cannot be used (Unable to configure root logger: Unknown level: 'LOUD')",
        ),
        (
            ["hydra.job_logging.formatters.simple.format='%(nope)s'"],
            "hydra.job_logging: cannot use the format %(nope)s (Formatting field not found in record: 'nope')",
        ),
        (["hydra.job.env_copy=[NOPE]"], "hydra.job.env_copy=[NOPE]: cannot be used by Hydra (KeyError: 'NOPE')"),
        (
            ["warm_start=~/a"],
            """warm_start=~/a: is not a value that Hydra can read; other characters need quotes, as in 'w""",
        ),
        (["warm_start=a=1"], """quotes, as in 'warm_start="a=1"'"""),
        (["warm_start=a(1)"], """quotes, as in 'warm_start="a(1)"'"""),
        (["hydra.job.chdir=true"], "hydra.job.chdir=true: must be false, because paths are relative to the current"),
        (["seed=\udcff"], r"seed=\udcff: must be text in UTF-8"),
        (["seed=1\r"], r"seed=1\r: ends in a carriage return, as every line of a file from Windows does"),
        ([""], "the command line: has an empty word, as of a shell variable that is not set"),
        (["optimizer.lr=5e\u22124"], "is no setting that Hydra can read; it holds \u2212 (MINUS SIGN)"),
        (["\u2013m", "seed=0,1"], "\u2013m: is no setting that Hydra can read; it holds \u2013 (EN DASH)"),
        (["seed\uff1a1"], "it holds \uff1a (FULLWIDTH COLON)"),
        # the settings'
        (["optimizer.lr=-0.001"], "optimizer.lr=-0.001: must be at least 0"),
        (["rank_strategy=explicit"], "rank_strategy.ranks=null: tensor_mode qkv_depth needs 4 integers"),
        # those of the data, the backbone, the device
        (["dataset=dtd", "dataset.root=missing"], "dataset.root=missing: no such folder; the folder should hold dtd"),
        (["model.checkpoint=missing"], "model.checkpoint=missing: no such file"),
        ([f"warm_start={'y' * 300}"], "y/adapter_config.json: cannot be read (File name too long)"),
        (["dataset=dtd", f"dataset.root={'y' * 300}"], "y: cannot be used (File name too long)"),
        (["model.geometry.layers=6", "rank_strategy=isorank"], "layers=6: the backbone that was loaded has 4"),
        (["trainer.device=cuda:77"], "trainer.device=cuda:77: this machine has"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert message in refused(monkeypatch, tmp_path, *words)
    assert not (tmp_path / "result.json").exists()


def test_half_a_line_that_the_shell_asks_about_prints_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMP_LINE", 'python train.py "a b')
    monkeypatch.setattr(sys, "argv", ["train.py", "-sc", "query=bash"])
    with pytest.raises(SystemExit) as ended:
        run_app(train.main, "config")
    assert (ended.value.code, *capsys.readouterr()) == (1, "", "")


def test_a_python_that_skips_asserts_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "flags", SimpleNamespace(optimize=1))
    assert refused(monkeypatch, tmp_path, *SHORT).startswith("python -O and PYTHONOPTIMIZE: must be left out")


def test_an_empty_variable_of_wandb_is_as_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("PROJECT", "ENTITY", "RUN_GROUP"):
        monkeypatch.setenv(f"WANDB_{name}", "")
    monkeypatch.setattr(sys, "argv", ["train.py", "logger=wandb", f"hydra.run.dir={tmp_path}"])
    loggers: list[LoggerConfig] = []
    run_app(lambda composed: loggers.append(validate(composed).logger), "config")
    assert [(own.project, own.entity, own.group) for own in loggers] == [("tenslora", None, None)]


def test_an_error_in_a_data_worker_is_one_line_without_the_workers_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("River", "Sea"):
        folder = tmp_path / "eurosat" / "2750" / name
        folder.mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8)).save(folder / f"{name}_{number}.jpg")
    broken = tmp_path / "eurosat" / "2750" / "Sea" / "Sea_2.jpg"
    broken.write_bytes(b"not an image")
    words = ["dataset=eurosat", "model=vit_digits", f"dataset.root={tmp_path}", "trainer.device=cpu"]
    line = refused(monkeypatch, tmp_path, *words, "trainer.workers=1")
    assert line.startswith(f"{broken}: not a readable image")


def test_an_output_folder_that_cannot_be_made_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = refused(monkeypatch, tmp_path / "file" / "run", *SHORT)
    assert line == f"{tmp_path}/file/run: cannot be written (Not a directory)"


def test_an_output_folder_behind_a_link_to_nowhere_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "outputs").symlink_to(tmp_path / "purged" / "outputs")
    line = refused(monkeypatch, tmp_path / "outputs", *SHORT)
    assert f"{tmp_path}/outputs is a link to {tmp_path}/purged/outputs, which does not exist" in line


def test_a_current_folder_that_hydra_cannot_name_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "${JOB}").mkdir()
    monkeypatch.chdir(tmp_path / "${JOB}")
    assert refused(monkeypatch, tmp_path, *SHORT).endswith(
        "/${JOB}: the path of the current folder must not contain ${"
    )


def test_a_file_of_configs_that_would_not_be_read_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = tmp_path / "mine" / "optimizer" / "adamw.yaml"
    own.parent.mkdir(parents=True)
    shutil.copy(CONF / "optimizer" / "adamw.yaml", own)
    words = [*SHORT, "--config-dir", str(tmp_path / "mine"), "optimizer.lr=-1"]
    assert refused(monkeypatch, tmp_path / "run", *words).startswith("optimizer.lr=-1: must be at least 0")
    own.write_text(own.read_text().replace("lr: 1.0e-3", "lr: 2.0e-3"))
    words = [*SHORT, "--config-dir", str(tmp_path / "mine")]
    assert refused(monkeypatch, tmp_path / "run", *words) == (
        f"{own}: would not be read, because {CONF}/optimizer/adamw.yaml comes first; give it another name"
    )


@pytest.mark.parametrize("joined", [False, True])
def test_a_file_without_its_first_line_is_one_line(
    joined: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = tmp_path / "mine" / "preset" / "own.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("defaults:\n  - override /tensor_mode: att\n")
    folder = str(tmp_path / "mine")
    words = [f"--config-dir={folder}"] if joined else ["--config-dir", folder]
    for given in (["preset=own"], ["preset=own", "hydra.mode=MULTIRUN", "seed=0"]):
        line = refused(monkeypatch, tmp_path / "run", *words, *given)
        assert line.startswith("preset/own.yaml: must begin with the line # @package _global_")
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(sys, "argv", ["sweep.py", *words, "preset=own", "seed=0,1", f"hydra.sweep.dir={tmp_path}"])
    with pytest.raises(SystemExit, match=r"^error: preset/own\.yaml: must begin with the line # @package _global_"):
        run_app(train.main, "sweep")


def test_a_second_command_of_a_process_has_no_traceback_either(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", f"hydra.run.dir={tmp_path}", "seed=x"])
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    for _ in range(2):
        with pytest.raises(SystemExit, match="seed=x: must be a whole number"):
            run_app(train.main, "config")


def test_a_second_command_of_a_process_reads_files_that_have_changed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    read = cache_latest(1)(lambda: file.read_text())
    seen = []
    monkeypatch.setattr(sys, "argv", ["train.py", f"hydra.run.dir={tmp_path / 'run'}"])
    for content in ("before", "after"):
        file.write_text(content)
        run_app(lambda _: seen.append(read()), "config")
    assert seen == ["before", "after"]


def test_a_log_that_cannot_be_written_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "train.log").mkdir()  # as root, a folder without the right to write is no obstacle
    line = refused(monkeypatch, tmp_path, *SHORT)
    assert line == f"{tmp_path}/train.log: cannot be written (Is a directory)"


def test_a_log_that_is_a_pipe_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train.log")
    line = refused(monkeypatch, tmp_path, *SHORT)
    assert line == f"{tmp_path}/train.log: cannot be written (Is a pipe)"


def test_a_setting_that_asks_for_the_folder_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    line = refused(monkeypatch, tmp_path, "seed=${run_folder:}")
    assert line.startswith("seed: ${run_folder:} must not be in a setting")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.py", "-m", "hydra/sweeper=table", "seed=0"], "error: hydra/sweeper=table: is for sweep.py"),
        (["sweep.py", "-cn", "config", "dry_run=true"], "error: --config-name config: is for train.py; leave it out"),
        (
            ["train.py", "+hydra.callbacks.own._target_=nowhere.Own"],
            "error: hydra.callbacks.own._target_=nowhere.Own: cannot be imported (No module named 'nowhere')",
        ),
        (["train.py", "--cfg", "hydra", "--resolve"], "error: --cfg hydra --resolve: must be --cfg all --resolve, or"),
        (["sweep.py", "hydra.mode=RUN"], "error: hydra.mode=RUN: must be MULTIRUN for sweep.py"),
        (["sweep.py", "hydra.launcher=null"], "error: hydra.launcher=null: must be the settings of a launcher"),
        (["sweep.py", "seed=${hydra:job.num}"], "error: seed: ${hydra:...} is not known where a sweep plans its jobs"),
        (["sweep.py", "hydra/sweeper=basic", "seed=0"], "error: hydra/sweeper=basic: must be table for sweep.py"),
        (
            ["sweep.py", "hydra/launcher=joblib", "hydra.launcher.n_jobs=null"],
            "error: hydra.launcher.n_jobs=null: cannot be set (",
        ),
    ],
)
def test_a_script_with_the_other_ones_sweeper_is_one_line(
    words: list[str], message: str, commands: Commands, tmp_path: Path
) -> None:
    script, *others = words
    places = [f"hydra.run.dir={tmp_path}/run", f"hydra.sweep.dir={tmp_path}/runs"]
    ended = commands.run(Command(script, [*others, *SHORT, *places], tmp_path))
    assert ended.status == 1
    assert ended.err.splitlines()[-1].startswith(message)
    assert not list(tmp_path.rglob("result.json"))
    assert script == "train.py" or not list(tmp_path.iterdir())


def test_the_log_says_why_a_start_failed(commands: Commands, tmp_path: Path) -> None:
    words = ["model.checkpoint=missing", f"hydra.run.dir={tmp_path}"]
    ended = commands.run(Command("train.py", words, tmp_path))
    assert ended.status == 1
    assert "model.checkpoint=missing: no such file" in (tmp_path / "train.log").read_text()
    assert ended.err.count("no such file") == 1


def test_resuming_from_a_damaged_checkpoint_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.safetensors").write_bytes(b"half")
    line = refused(monkeypatch, tmp_path, *SHORT, "resume=true")
    assert line.startswith(f"{tmp_path}/checkpoint.safetensors: not a readable safetensors file")


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting a small disk needs root")
def test_a_disk_that_is_really_full_ends_the_run_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"this machine lets nobody mount: {mounted.stderr.decode().strip()}")
    try:
        line = refused(monkeypatch, disk, *SHORT, "tensor_mode=lora", "rank_strategy.rank=16")
        assert line.startswith(f"{disk}/checkpoint.safetensors: cannot be written (No space left on device)")
        assert not (disk / "result.json").exists()
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)  # the run's log file is still open


def test_a_file_that_cannot_be_written_ends_the_run_in_one_line_and_leaves_what_was_there(
    commands: Commands, tmp_path: Path
) -> None:
    (tmp_path / "result.json").write_text('{"old": true}')
    ended = commands.run(Command("train.py", [*SHORT, f"hydra.run.dir={tmp_path}"], tmp_path, largest_file=20_000))
    assert ended.status == 1
    (error,) = (line for line in ended.err.splitlines() if line.startswith("error: "))
    assert error.startswith(f"error: {tmp_path}/checkpoint.safetensors: cannot be written (File too large)")
    assert (tmp_path / "result.json").read_text() == '{"old": true}'
    assert not list(tmp_path.glob(".*.tmp"))


def test_the_process_itself_ends_with_status_1_and_the_line(tmp_path: Path) -> None:
    command = [sys.executable, "train.py", "optimizer.lr=-1", f"hydra.run.dir={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: optimizer.lr=-1: must be at least 0\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xef\xbb\xbf# @package _global_\nseed: 1\n", "begins with a byte order mark; save it as UTF-8 without one"),
        (b"---\n# @package _global_\nseed: 1\n", "# @package _global_: must be the first line, before ---"),
        (
            b"# @package _global_\n# caf\xe9\n",
            "must be text in UTF-8 ('utf-8' codec can't decode byte 0xe9 in position",
        ),
        (b"# @package _global_\nseed: !!set {a, b}\n", "Value 'set' is not a supported primitive type"),
        (
            b"# @package _global_\nseed: 1\n<<<<<<< HEAD\nalpha: 4\n",
            ", line 4: is not YAML (could not find expected ':')",
        ),
        (
            b"# @package _global_\ndefaults:\n  - override /tensor_mode: [full, lora]\n",
            "override /tensor_mode: must be one option, and is ['full', 'lora']",
        ),
        (b"defaults:\n  - override tensor_mode: [full, lora]\n", "override tensor_mode: must be one option, and is ["),
        (b"# @package _global_\nadapter:\n\talpha: 4\n", ", line 3: is not YAML (found character '\\t' that cannot"),
    ],
)
def test_a_config_file_of_ones_own_that_hydra_would_read_wrongly_is_named(
    content: bytes, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "own.yaml").write_bytes(content)
    line = refused(monkeypatch, tmp_path / "run", "--config-dir", str(tmp_path), "+experiment=own")
    assert line.startswith(f"{tmp_path}/experiment/own.yaml{message if message[0] == ',' else f': {message}'}")


@pytest.mark.parametrize(
    ("defaults", "message"),
    [
        (b"  override /tensor_mode: att\n", "Invalid defaults list in 'experiment/own', defaults must be a list"),
        (b"  - own\n", "a config file's defaults name the file itself"),
        (
            b"  - /tensor_mode: att\n",
            "a config file's defaults choose tensor_mode a second time; write it there as - ov",
        ),
    ],
)
def test_defaults_of_ones_own_that_hydra_cannot_follow_are_one_line(
    defaults: bytes, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "own.yaml").write_bytes(b"# @package _global_\ndefaults:\n" + defaults)
    line = refused(monkeypatch, tmp_path / "run", "--config-dir", str(tmp_path), "experiment=own")
    assert line.startswith(message)


@pytest.mark.parametrize("place", ["experiment/own.yaml", "nowhere", ".:."])
def test_a_config_dir_that_is_no_folder_is_named(place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "own.yaml").write_text("# @package _global_\nseed: 1\n")
    line = refused(monkeypatch, tmp_path / "run", "--config-dir", f"{tmp_path}/{place}", "experiment=own")
    assert line.startswith(f"--config-dir {tmp_path}/{place}: must be one folder")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Ran out of input"),
        (pickle.dumps([1]), "'list' object has no attribute 'hydra'"),
        (None, r"File \S*/config.pickle does not exist!"),
    ],
)
@pytest.mark.filterwarnings("ignore:Experimental rerun", "ignore:Config overrides")
def test_a_config_that_cannot_be_run_again_is_named(
    content: bytes | None, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "config.pickle"
    if content is not None:
        file.write_bytes(content)
    line = refused(monkeypatch, tmp_path / "run", "--experimental-rerun", str(file))
    assert re.fullmatch(
        rf"--experimental-rerun {file}: must be a config.pickle that Hydra has written \({message}\)", line
    )


def test_a_file_of_ones_own_under_a_name_that_hydra_does_not_look_for_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "optimizer").mkdir()
    file = tmp_path / "optimizer" / "mine.yml"
    file.write_text("name: adamw\n")
    line = refused(monkeypatch, tmp_path / "run", "--config-dir", str(tmp_path), "optimizer=mine")
    assert line == f"optimizer=mine: {file} must end in .yaml"


@pytest.mark.parametrize("word", ["table=isorank", "tune=size", "+tune=lr"])
def test_a_setting_of_sweeps_is_told_as_such(word: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    line = refused(monkeypatch, tmp_path / "run", word, "adapter.alhpa=1")
    assert line == f"{word}: is a setting of sweep.py, which carries out the runs of a table"


def test_a_launcher_of_a_single_run_is_told_to_have_no_effect(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(monkeypatch, tmp_path / "run", "hydra/launcher=joblib", "optimizer.lr=-1")
    assert capsys.readouterr().err.startswith("hydra/launcher=joblib: has no effect on a single run, which starts here")


def test_options_in_a_folder_of_the_search_path_are_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "preset").mkdir()
    (tmp_path / "preset" / "own.yaml").write_text("# @package _global_\nseed: 1\n")
    words = [f"hydra.searchpath=[file://{tmp_path}]", "preset=own"]
    line = refused(monkeypatch, tmp_path / "run", *words, "optimizer.lrr=1")
    assert line == "optimizer.lrr: there is no such setting; did you mean optimizer.lr?"


def test_a_setting_that_is_given_several_times_in_a_row_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(monkeypatch, tmp_path / "run", "seed=0", "seed=1", "seed=x")
    assert line.startswith("seed=x: must be a whole number")
    assert capsys.readouterr().err == (
        "seed=0 seed=1 seed=x: only seed=x counts; several values are written seed=0,1,x, with -m or for sweep.py\n"
    )
    refused(monkeypatch, tmp_path / "run", "seed=0", "optimizer.lr=-1", "seed=1", "seed=1")
    assert not capsys.readouterr().err, "a script may add settings behind others"


def test_a_traceback_is_printed_on_request(commands: Commands, tmp_path: Path) -> None:
    words = ["optimizer.lr=-1", f"hydra.run.dir={tmp_path}"]
    ended = commands.run(Command("train.py", words, tmp_path, environment={"HYDRA_FULL_ERROR": "1"}))
    assert ended.status == 1
    assert "Traceback" in ended.err
    assert "TensLoRAError: optimizer.lr=-1: must be at least 0" in ended.err


@pytest.mark.parametrize("multirun", [False, True])
def test_an_error_that_nobody_foresaw_is_one_line_and_its_traceback_is_in_the_log(
    multirun: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any, **__: Any) -> NoReturn:
        raise KeyError("blocks")

    monkeypatch.setattr(train, "train", broken)
    words = ["-m", f"hydra.sweep.dir={tmp_path}"] if multirun else []
    line = refused(monkeypatch, tmp_path, *SHORT, *words)
    place = rf"in {re.escape(__file__)}, line \d+"
    assert re.fullmatch(rf"KeyError: 'blocks' \(unforeseen, {place}; HYDRA_FULL_ERROR=1 shows the traceback\)", line)
    (log,) = tmp_path.rglob("train.log")
    assert "Traceback" in log.read_text()
    printed = "".join(capsys.readouterr())
    assert "Traceback" not in printed
    assert multirun or not printed, "no line of Hydra's own"


def test_a_multirun_goes_on_past_a_job_that_fails(commands: Commands, tmp_path: Path) -> None:
    words = ["-m", *SHORT, "trainer.epochs=1", "optimizer.lr=-1,1e-3", f"hydra.sweep.dir={tmp_path}"]
    ended = commands.run(Command("train.py", words, tmp_path))
    assert ended.status == 1
    assert len(list(tmp_path.rglob("result.json"))) == 1
    assert ended.err.splitlines()[-1] == "error: optimizer.lr=-1: must be at least 0"


def test_a_run_whose_record_could_not_be_read_again_does_not_train(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Processes, "name", "a processor\nwith two lines")
    line = refused(monkeypatch, tmp_path, *SHORT)
    assert line.startswith(f"{tmp_path}/result.json: not a readable record (device=")
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("accident", ["interrupt step 2", "terminate step 2"])
def test_a_stopped_run_ends_with_status_130(accident: str, commands: Commands, tmp_path: Path) -> None:
    ended = commands.run(Command("train.py", [*SHORT, f"hydra.run.dir={tmp_path}"], tmp_path, accident=accident))
    assert ended.status == 130
    assert ended.err.splitlines()[-1] == "interrupted"
    assert (tmp_path / "train.log").read_text().rstrip().endswith("interrupted")


@pytest.mark.parametrize("library", ["tenslora.harness.app", "hydra"])
def test_ctrl_c_while_libraries_are_imported_ends_with_status_130_and_one_line(library: str) -> None:
    done = interrupt_import(library, "runpy.run_path('train.py', run_name='__main__')")
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_a_log_that_cannot_be_written_prints_nothing_in_a_launchers_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", True)  # as in a process that has just begun
    pickle.loads(pickle.dumps(app._Task(len, None, Stop(), wants_traceback=False)))
    assert not logging.raiseExceptions
