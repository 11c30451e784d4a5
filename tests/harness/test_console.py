from __future__ import annotations

import logging
import logging.config
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from tenslora.harness.console import LogFile, asking_nobody
from tests.running import CONF


@pytest.fixture
def formatter() -> logging.Formatter:
    """The console's formatter, as conf/ sets it up."""
    content = OmegaConf.load(CONF / "hydra" / "job_logging" / "run.yaml").formatters.console
    configurator = logging.config.DictConfigurator({"version": 1})
    made: logging.Formatter = configurator.configure_formatter(dict(content))
    return made


def record(level: int, message: str, *arguments: object) -> logging.LogRecord:
    return logging.LogRecord("train", level, "train.py", 1, message, arguments, None)


def test_on_a_terminal_a_message_stands_alone_and_a_warning_says_so(
    formatter: logging.Formatter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert formatter.format(record(logging.INFO, "epoch %d", 1)) == "epoch 1"
    assert formatter.format(record(logging.WARNING, "no GPU")) == "warning: no GPU"
    try:
        raise ValueError("wrong")
    except ValueError:
        failed = record(logging.ERROR, "the job failed")
        failed.exc_info = sys.exc_info()
    assert formatter.format(failed).startswith("error: the job failed\nTraceback")
    assert formatter.format(failed).endswith("ValueError: wrong")


def test_in_a_file_every_message_has_its_time_origin_and_level(
    formatter: logging.Formatter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    line = formatter.format(record(logging.INFO, "epoch %d", 1))
    assert line.startswith("[20")
    assert line.endswith("][train][INFO] - epoch 1")


@pytest.mark.parametrize("name", ["run", "sweep"])
def test_requests_to_the_hub_are_not_logged(name: str) -> None:
    loggers = OmegaConf.load(CONF / "hydra" / "job_logging" / f"{name}.yaml").loggers
    assert {loggers[one].level for one in ("httpx", "httpx2", "huggingface_hub", "urllib3")} == {"WARNING"}


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_what_hydra_writes_is_not_written_through_links(link: Callable[[Path, Path], None], tmp_path: Path) -> None:
    cached, log, settings = tmp_path / "cached", tmp_path / "train.log", tmp_path / ".hydra" / "config.yaml"
    cached.write_text("an earlier run\n")
    settings.parent.mkdir()
    link(cached, log)
    link(cached, settings)
    handler = LogFile(str(log))
    handler.emit(record(logging.INFO, "this run"))
    handler.close()
    settings.write_text("this run\n")
    assert cached.read_text() == "an earlier run\n"
    assert (log.read_text(), settings.read_text()) == ("an earlier run\nthis run\n", "this run\n")


def test_a_log_takes_names_that_are_no_text(tmp_path: Path) -> None:
    handler = LogFile(str(tmp_path / "train.log"))
    handler.handleError = pytest.fail  # type: ignore[method-assign, assignment]
    handler.emit(record(logging.INFO, os.fsdecode(b"caf\xe9 and \xc3\xbc")))
    handler.close()
    assert (tmp_path / "train.log").read_text("utf-8") == "caf\\udce9 and \N{LATIN SMALL LETTER U WITH DIAERESIS}\n"


def test_nobody_is_asked_in_a_sweeps_job(monkeypatch: pytest.MonkeyPatch) -> None:
    at_a_terminal = SimpleNamespace(isatty=lambda: True)
    monkeypatch.setattr(sys, "stdin", at_a_terminal)
    with asking_nobody():
        assert (sys.stdin.isatty(), sys.stdin.read()) == (False, "")
    assert sys.stdin is at_a_terminal
