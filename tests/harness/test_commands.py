"""What ``python -m tenslora.harness.<name>`` prints, where its output goes to something other than a terminal."""

from __future__ import annotations

import atexit
import errno
import importlib
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tenslora.errors import TensLoRAError
from tenslora.harness.commands import command_parser, mistakes_in_one_line, path_argument
from tenslora.harness.stop import NOTICES
from tests.commands import interrupt_import
from tests.conftest import ROOT

PRINTS = """
from tenslora.harness.commands import mistakes_in_one_line
with mistakes_in_one_line():
    print("caf\\u00e9\\n" * 100_000)
"""


@pytest.mark.parametrize(
    ("to", "status", "out", "err"),
    [
        ("| head -n 1", 1, "caf\\xe9\n", ""),
        (">&-", 0, "", ""),
        pytest.param(
            "> /dev/full",
            1,
            "",
            "error: the output: cannot be used (No space left on device)\n",
            marks=pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full"),
        ),
    ],
)
def test_an_output_that_cannot_take_it_all_is_no_traceback(to: str, status: int, out: str, err: str) -> None:
    command = f"set -o pipefail; {shlex.join([sys.executable, '-c', PRINTS])} {to}"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (status, out, err)


@pytest.mark.parametrize(
    ("backend", "left"),
    [
        ("module://backend_of_no_package.inline", None),
        ("module://matplotlib.backends.backend_svg", "same"),
        ("", "same"),
    ],
)
def test_a_notebooks_backend_that_is_not_installed_is_forgotten(
    backend: str, left: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPLBACKEND", backend)
    with mistakes_in_one_line():
        assert os.environ.get("MPLBACKEND") == (backend if left else None)


@pytest.mark.parametrize("command", ["analyse", "compare", "evaluate", "export", "predict", "tracking.dashboard"])
def test_a_commands_file_says_how_it_is_started(command: str) -> None:
    with pytest.raises(SystemExit, match=rf"^error: must be started as python -m tenslora\.harness\.{command}$"):
        runpy.run_path(str(ROOT / "tenslora" / "harness" / f"{command.replace('.', '/')}.py"), run_name="__main__")


@pytest.mark.parametrize(("closed", "lines"), [("2>&-", 1), (">&- 2>&-", 0)])
def test_closed_streams_stop_nothing(closed: str, lines: int) -> None:
    program = f"{shlex.join([sys.executable, 'train.py', '--cfg', 'job', '--package', 'seed'])} {closed}"
    done = subprocess.run(["bash", "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) >= lines


def test_a_current_folder_that_is_gone_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.delitem(sys.modules, "tenslora.harness.early", raising=False)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    message = r"^error: the current folder: cannot be used \(No such file or directory\); change to another$"
    with pytest.raises(SystemExit, match=message):
        importlib.import_module("tenslora.harness.early")


def test_a_python_that_skips_docstrings_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "flags", SimpleNamespace(optimize=2))
    with (
        pytest.raises(SystemExit, match=r"^error: python -O and PYTHONOPTIMIZE: must be left out; "),
        mistakes_in_one_line(),
    ):
        raise AssertionError


NO_FOLDER = "tempfile._candidate_tempdir_list = lambda: ['/dev/null/none']"
NO_TORCH = "sys.modules['torch'] = None"


@pytest.mark.parametrize(
    ("command", "fault", "line"),
    [
        ("evaluate", NO_FOLDER, "TMPDIR: must be a folder that can be written; there is no other for temporary files"),
        # export imports torch before it reads its arguments.
        ("export", NO_FOLDER, "TMPDIR: must be a folder that can be written; there is no other for temporary files"),
        ("export", NO_TORCH, r".*python\S*: .*torch.*; sh run\.sh python uses an environment that has every .*"),
    ],
)
def test_a_library_that_cannot_be_imported_is_one_line(command: str, fault: str, line: str) -> None:
    program = (
        "import runpy, sys, tempfile\n"
        f"{fault}\n"
        f"sys.argv = ['{command}', 'run']\n"
        f"runpy.run_module('tenslora.harness.{command}', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(f"error: {line}\n", done.stderr), done.stderr


@pytest.mark.parametrize(
    ("statement", "line"),
    [
        (
            "from torch import nosuch",
            r"\S*python\S*: cannot import name 'nosuch' from 'torch' .*; sh run\.sh .*",
        ),
        ("from tenslora import nosuch", None),  # where it is matters
        ("raise TensLoRAError('peft 0.18.0: must be 0.21 or later')", r"peft 0\.18\.0: must be 0\.21 or later"),
    ],
)
def test_a_library_of_an_older_version_is_one_line(
    statement: str, line: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.delitem(sys.modules, "tenslora.harness.early", raising=False)
    importlib.import_module("tenslora.harness.early")
    with pytest.raises((ImportError, TensLoRAError)) as raised:
        exec(statement)
    sys.excepthook(raised.type, raised.value, raised.tb)
    said = capsys.readouterr().err
    assert re.fullmatch(f"error: {line}\n" if line else r"(?s)Traceback .*", said), said


def test_a_librarys_warning_that_is_made_an_error_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    strict = ["-X", "warn_default_encoding", "-W", "error::EncodingWarning"]
    command = [sys.executable, *strict, "-m", "tenslora.harness.export", "run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    line = "error: PYTHONWARNINGS and python -W: must not make errors of the libraries' warnings "
    assert done.stderr.startswith(f"{line}(EncodingWarning: ") and done.stderr.count("\n") == 1  # of torch's import
    monkeypatch.setattr(sys, "warnoptions", ["error"])
    with pytest.raises(SystemExit) as ended, mistakes_in_one_line():
        raise UserWarning("a word")
    assert ended.value.code == f"{line}(UserWarning: a word)"


@pytest.mark.parametrize(
    "error", [RuntimeError("can't start new thread"), BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")]
)
def test_a_limit_on_processes_is_named(error: Exception) -> None:
    line = r"^error: the system allows no more threads or processes \("
    with pytest.raises(SystemExit, match=line), mistakes_in_one_line():
        raise error


def test_a_word_that_ends_as_a_line_of_windows_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command_parser("export", None).parse_args(["run\r"])
    assert capsys.readouterr().err.endswith(
        "error: run\\r: ends in a carriage return, as every line of a file from Windows does; take it out (dos2unix)\n"
    )


def test_a_value_that_begins_with_a_dash_is_said_how_to_write(capsys: pytest.CaptureFixture[str]) -> None:
    parser = command_parser("predict", None)
    parser.add_argument("--text")
    with pytest.raises(SystemExit):
        parser.parse_args(["--text", "-bad"])
    assert capsys.readouterr().err.endswith("argument; a value that begins with - is written --text=-...\n")
    assert parser.parse_args(["--text=-bad"]).text == "-bad"


def test_a_path_is_on_disk_and_may_begin_with_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = command_parser("export", None)
    parser.add_argument("--out", type=path_argument)
    assert parser.parse_args(["--out=~/a"]).out == tmp_path / "a"
    with pytest.raises(SystemExit):
        parser.parse_args(["--out", "s3://bucket/a"])
    message = "error: argument --out: s3://bucket/a: must be a path on disk, not an address\n"
    assert capsys.readouterr().err.endswith(message)
    with pytest.raises(SystemExit):
        parser.parse_args(["--out", ""])
    assert capsys.readouterr().err.endswith("error: argument --out: must not be empty\n")


def test_an_error_that_nobody_foresaw_is_one_line_that_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    message = rf"^error: TypeError: .*\(unforeseen, in {re.escape(__file__)}, line \d+; HYDRA_FULL_ERROR=1 shows the"
    with pytest.raises(SystemExit, match=message), mistakes_in_one_line():
        json.dumps({Path})  # in a module of Python's own
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(TypeError), mistakes_in_one_line():
        json.dumps({Path})


@pytest.mark.parametrize(
    ("command", "library", "number", "then"),
    [
        ("analyse", "matplotlib", "SIGINT", "raise"),
        ("compare", "tenslora.harness.results", "SIGINT", "raise"),
        ("evaluate", "tenslora.harness.config", "SIGINT", "raise"),
        ("export", "safetensors", "SIGINT", "raise"),
        ("predict", "tenslora.harness.commands", "SIGINT", "raise"),
        ("predict", "tenslora.harness.commands", "SIGTERM", "raise ImportError"),
        ("predict", "tenslora.harness.commands", "SIGTERM", "pass"),
    ],
)
def test_a_signal_while_a_command_imports_its_libraries_is_one_line(
    command: str, library: str, number: str, then: str
) -> None:
    start = f"runpy.run_module('tenslora.harness.{command}', run_name='__main__', alter_sys=True)"
    done = interrupt_import(library, start, number, then)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU])
@pytest.mark.parametrize("caught", [False, True])
def test_sigterm_or_a_schedulers_notice_is_one_line_and_its_handler_is_put_back(
    caught: bool, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended, mistakes_in_one_line():
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            if not caught:
                raise
        raise ImportError("of a library that has caught KeyboardInterrupt")
    assert (ended.value.code, capsys.readouterr().err) == (130, "interrupted\n")
    assert signal.getsignal(number) is before


def test_a_notice_that_the_program_handles_itself_is_left_to_it() -> None:
    taken: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: taken.append(number))
    try:
        with mistakes_in_one_line():
            signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert taken == [signal.SIGUSR1]


def test_once_a_command_ends_further_signals_change_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at_exit: list[Callable[[], None]] = []
    monkeypatch.setattr(atexit, "register", at_exit.append)
    before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, *NOTICES)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell starts its background jobs without
    try:
        with pytest.raises(SystemExit) as ended, mistakes_in_one_line():
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGUSR1)
                print("tidied up")
        assert (ended.value.code, tuple(capsys.readouterr())) == (130, ("tidied up\n", "interrupted\n"))
        at_exit.pop()()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_command_in_a_thread_needs_no_handler() -> None:
    ended = []

    def work() -> None:
        with mistakes_in_one_line():
            ended.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended


@pytest.mark.parametrize("end", ["--help", "--nosuch"])
@pytest.mark.parametrize("first", ["", None])
def test_a_program_that_runs_a_command_as_a_module_keeps_its_hooks_and_its_path(
    end: str, first: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def own(*_: object) -> None:
        pass

    (tmp_path / "csv.py").write_text("raise SystemExit('a file of the current folder in the place of a library')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path) if first is None else first, *sys.path])
    path = list(sys.path)
    for module in ("tenslora.harness.early", "tenslora.harness.predict", "csv"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "excepthook", own)
    monkeypatch.setattr(sys, "argv", ["predict", end])
    before = signal.signal(signal.SIGTERM, own)
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("tenslora.harness.predict", run_name="__main__")
        assert ended.value.code in (0, 2)
        assert (sys.excepthook, signal.getsignal(signal.SIGTERM), sys.path) == (own, own, path)
    finally:
        signal.signal(signal.SIGTERM, before)
