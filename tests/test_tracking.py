from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tenslora.config import LoggerConfig
from tenslora.tracking import Tracker, _has_key, start_tracker
from tests.conftest import ROOT
from tests.running import SHORT, run


def records(path: Path) -> Iterator[Any]:
    """The protobuf records of an offline run's file: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    content = path.read_bytes()
    assert content[:4] == b":W&B"
    position, joined = 7, b""
    while position + 7 <= len(content):
        if 32768 - position % 32768 < 7:  # too short a rest of the block for another header
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        joined += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            record = Record()
            record.ParseFromString(joined)
            joined = b""
            yield record


@pytest.fixture
def _no_wandb_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))


@pytest.mark.usefixtures("_no_wandb_key")
def test_an_offline_run_holds_settings_metrics_counts_and_the_adapter(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = run(folder, *SHORT, "logger=wandb", "logger.project=p", "logger.group=g", "logger.tags=[t1,t2]")
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    kept = list(records(file))
    deadline = time.monotonic() + 60
    while not any(r.WhichOneof("record_type") == "exit" for r in kept):  # W&B's own process writes it a little later
        assert time.monotonic() < deadline
        time.sleep(0.2)
        kept = list(records(file))

    started = next(r.run for r in kept if r.WhichOneof("record_type") == "run")
    assert (started.project, started.run_group, list(started.tags)) == ("p", "g", ["t1", "t2"])
    config = {item.key: json.loads(item.value_json) for item in started.config.update}
    assert config["optimizer"]["lr"] == 1e-3
    assert config["adapter_parameters"] == result["adapter_parameters"]
    assert config["head_parameters"] == result["head_parameters"]

    rows = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in r.history.item}
        for r in kept
        if r.WhichOneof("record_type") == "history"
    ]
    names = set(result["metrics"]["history"][0])
    assert [{name: row[name] for name in names} for row in rows] == result["metrics"]["history"]

    artifacts = [r.request.log_artifact.artifact for r in kept if r.request.HasField("log_artifact")]
    artifacts += [r.artifact for r in kept if r.WhichOneof("record_type") == "artifact"]
    assert [(a.type, [entry.path for entry in a.manifest.contents]) for a in artifacts] == [
        ("model", ["adapter.safetensors", "head.safetensors"])
    ]


@pytest.mark.parametrize("config", [LoggerConfig(name="none"), LoggerConfig(name="wandb", mode="disabled")])
def test_nothing_watches_where_none_is_wanted(config: LoggerConfig, tmp_path: Path) -> None:
    assert type(start_tracker(config, tmp_path, {}, {})) is Tracker


def test_only_one_of_several_processes_reports(tmp_path: Path) -> None:
    assert type(start_tracker(LoggerConfig(name="wandb", mode="offline"), tmp_path, {}, {}, watch=False)) is Tracker


def test_a_run_that_does_not_want_wandb_does_without_it(tmp_path: Path) -> None:
    # timm imports it where it can, so that looking for it among the modules would say nothing about us.
    code = (
        "import sys; sys.modules['wandb'] = None\n"
        "import pathlib; from tests.running import run, SHORT\n"
        "run(pathlib.Path(sys.argv[1]), *SHORT, 'trainer.max_steps=1')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)
    assert (tmp_path / "result.json").is_file()


@pytest.mark.parametrize(
    ("host", "found"), [("api.wandb.ai", True), ("wandb.example.org", True), ("example.com", False), (None, False)]
)
@pytest.mark.usefixtures("_no_wandb_key")
def test_a_key_in_the_netrc_file_is_seen(
    host: str | None, found: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if host:
        (tmp_path / "keys").write_text(f"machine {host}\n  login user\n  password {'a' * 40}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "keys"))
    assert _has_key("https://wandb.example.org/path") == found


def test_a_key_in_the_environment_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    assert _has_key("https://wandb.example.org")
