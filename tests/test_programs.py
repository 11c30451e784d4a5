"""The programs, such as those in benchmarks/, examples/ and scripts/, end a user's mistake and Ctrl-C in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tenslora.errors import TensLoRAError
from tenslora.harness.training.processes import most_threads
from tests.conftest import ROOT

PROGRAMS = [
    path.relative_to(ROOT)
    for folder in (".", "benchmarks", "examples", "scripts")
    for path in (ROOT / folder).glob("*.py")
]
BENCHMARKS = ["benchmarks.epoch_time", "benchmarks.layer_time", "benchmarks.step_time"]
OUT = [*((name, "--out") for name in BENCHMARKS), ("scripts.pretrain_vit_digits", "path")]


@pytest.mark.parametrize("program", sorted(PROGRAMS), ids=str)
def test_a_program_starts_from_its_file_anywhere_and_ctrl_c_ends_it_in_one_line(program: Path, tmp_path: Path) -> None:
    for library in ("torch", "hydra", "peft"):  # one of which every program imports
        (tmp_path / f"{library}.py").write_text("raise KeyboardInterrupt")
    words = ["--cola", ".", "--dtd", "."] if program.stem == "epoch_time" else []
    done = subprocess.run(
        [sys.executable, str(ROOT / program), *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"},  # as python -P
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def refused(program: str, *words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The line with which a program refuses a command line."""
    with pytest.raises(SystemExit) as caught:
        import_module(program).main(list(words))
    assert caught.value.code == 2
    return capsys.readouterr().err.splitlines()[-1].partition(": error: argument ")[2]


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [
        ("epoch_time", ("--steps", "0"), "--steps: 0: must be a whole number of at least 1"),
        ("epoch_time", ("--cases", "dtd/plain", "--dtd", "/no"), "--dtd: /no: no such folder"),
        ("layer_time", ("--tokens", "0"), "--tokens: 0: must be a whole number of at least 1"),
        ("layer_time", ("--tokens", "100"), "--tokens: 100: must be a multiple of 8"),
        ("layer_time", ("--repeats", "1.5"), "--repeats: 1.5: must be a whole number of at least 1"),
        ("layer_time", ("--threads", "-1"), "--threads: -1: must be a whole number of at least 1"),
        ("layer_time", ("--threads", "100000"), f"--threads: 100000: must be at most {most_threads()}, four times the"),
        ("step_time", ("--threads", "3000000000"), f"--threads: 3000000000: must be at most {most_threads()}, four"),
        ("step_time", ("--at-once", "0"), "--at-once: 0: must be a whole number of at least 1"),
        ("step_time", ("--batch", "0"), "--batch: 0: must be a whole number of at least 1"),
        ("step_time", ("--rounds", "0"), "--rounds: 0: must be a whole number of at least 1"),
        (
            "step_time",
            ("--variants", "floor"),
            "--variants: must name another variant than floor, which is always measured",
        ),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    program: str,
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(f"benchmarks.{program}", *words, capsys=capsys).startswith(message)


@pytest.mark.parametrize(("program", "argument"), OUT)
def test_a_file_that_cannot_be_written_is_one_line_before_anything_is_computed(
    program: str, argument: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    option = [argument] if argument.startswith("--") else []
    for path, reason in (
        (tmp_path, f"{tmp_path}: cannot be written (is a folder; must be the name of a file)"),
        (tmp_path / "file" / "x", f"{tmp_path / 'file'}: cannot be written (is a file; must be a folder)"),
        (tmp_path / "pipe", f"{tmp_path / 'pipe'}: cannot be written (is a pipe or a device; must be a file)"),
    ):
        assert refused(program, *option, str(path), capsys=capsys) == f"{argument}: {reason}"


def test_settings_that_train_does_not_take_are_refused_before_the_first_case(tmp_path: Path) -> None:
    words = ["--cola", str(tmp_path), "--cases", "cola/random", "--out", str(tmp_path / "x.json"), "--"]
    for word, message in (
        ("traner.epochs=1", "^traner.epochs: there is no such setting; did you mean trainer.epochs"),
        ("trainer.epochs=x", "^trainer.epochs=x: must be a whole number"),
        ("trainer.epochs=[", "^no viable alternative at input"),
    ):
        with pytest.raises(TensLoRAError, match=message):
            import_module("benchmarks.epoch_time").main([*words, word])
