from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tenslora.errors import TensLoRAError
from tenslora.harness.config import LoggerConfig, settings
from tenslora.harness.results.table import Column, Row, Run, Table
from tenslora.harness.tracking import Tracker, _has_key, start_tracker, track_table
from tests.conftest import ROOT
from tests.offline import OFFLINE, Tracked, no_wandb_key, read
from tests.running import composed


@pytest.fixture
def _no_wandb_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_wandb_key(monkeypatch, tmp_path)


def test_a_run_says_what_it_is(tracked: Tracked) -> None:
    started, config, result = tracked.run.started, tracked.run.config, tracked.result
    assert (started["project"], started["run_group"], started["job_type"]) == ("p", "g", "train")
    assert started["tags"] == ["mine", "digits"]
    assert started["display_name"] == "digits-vit_digits-qkv-isorank-seed0"
    assert config["row"] == "qkv-isorank"
    assert config["dataset"]["name"] == "digits"
    assert config["optimizer"]["lr"] == 1e-3
    assert config["adapter_parameters"] == result["adapter_parameters"]
    assert config["head_parameters"] == result["head_parameters"]
    assert config["percent_of_lora"] == pytest.approx(100 * result["adapter_parameters"] / result["lora_parameters"])


def test_a_run_logs_every_metric_under_its_own_name_and_the_headline_as_score(tracked: Tracked) -> None:
    history = tracked.result["metrics"]["history"]
    names = set(history[0])
    assert [{name: row[name] for name in names} for row in tracked.run.history] == history
    assert [row["score"] for row in tracked.run.history] == [entry["accuracy"] for entry in history]


def test_a_runs_summary_has_what_it_came_to_and_cost(tracked: Tracked) -> None:
    summary, result = tracked.run.summary, tracked.result
    assert summary["score"] == summary["last"] == result["metrics"]["last"]
    assert (summary["best"], summary["best_epoch"]) == (result["metrics"]["best"], result["metrics"]["best_epoch"])
    assert summary["steps_per_second"] == pytest.approx(result["steps_per_second"])
    assert summary["seconds"]["train"] == pytest.approx(result["seconds"]["train"])
    assert (summary["status"], tracked.run.exit_code) == ("completed", 0)


def test_a_run_uploads_adapter_and_head_as_one_artifact(tracked: Tracked) -> None:
    assert tracked.run.artifacts == {"model": ["adapter.safetensors", "head.safetensors"]}


@pytest.mark.usefixtures("_no_wandb_key")
def test_lora_has_no_strategy_in_its_name_and_a_run_that_breaks_off_has_failed(tmp_path: Path) -> None:
    config = composed("tensor_mode=lora", "dataset=cola", "model=minilm", "rank_strategy=isoparameters", "seed=3")
    facts = {
        "dataset": "cola", "model": "minilm", "tensor_mode": "lora", "seed": 3, "adapter_parameters": 100,
        "lora_parameters": 100,
    }  # fmt: skip
    with pytest.raises(KeyboardInterrupt), start_tracker(OFFLINE, tmp_path, settings(config), facts) as tracker:
        tracker.epoch({"epoch": 1, "step": 5, "matthews": 0.25, "accuracy": 0.75})
        raise KeyboardInterrupt
    run = read(tmp_path)
    assert run.started["display_name"] == "cola-minilm-lora-seed3"
    assert run.config["row"] == "lora"
    assert run.history[0]["score"] == 0.25
    assert run.exit_code == 1


def test_a_table_is_a_run_in_the_group_of_its_runs(tracked: Tracked) -> None:
    started = tracked.table.started
    assert (started["project"], started["run_group"], started["job_type"]) == ("p", "isorank", "table")
    assert (started["display_name"], started["tags"]) == ("isorank", ["isorank"])
    assert tracked.table.exit_code == 0


def lines(tracked: Tracked, name: str) -> list[dict[str, Any]]:
    content = json.loads((tracked.table.folder / "files" / tracked.table.summary[f"{name}.path"]).read_text())
    return [dict(zip(content["columns"], line, strict=True)) for line in content["data"]]


def test_a_tables_results_are_means_differences_and_intervals(tracked: Tracked) -> None:
    lora, qkv, alpha = lines(tracked, "results")
    measured = tracked.result["metrics"]["last"]
    assert (lora["row"], qkv["row"], alpha["row"]) == ("lora", "qkv-isorank", "qkv-isorank-adapter.alpha=1")
    assert (lora["mean"], lora["sd"]) == (pytest.approx(0.55), pytest.approx(0.1 / 2**0.5))
    assert lora["difference"] is None
    assert qkv["adapter_parameters"] == tracked.result["adapter_parameters"]
    assert qkv["percent_of_lora"] == pytest.approx(tracked.run.config["percent_of_lora"])
    assert (qkv["metric"], qkv["seeds"]) == ("accuracy", 2)
    assert qkv["mean"] == pytest.approx((measured + 0.7) / 2)
    assert qkv["difference"] == pytest.approx((measured - 0.5 + 0.7 - 0.6) / 2)
    # Student's t with one degree of freedom: the 97.5 % quantile is 12.706, and p an arctangent.
    spread = abs((measured - 0.5) - (0.7 - 0.6)) / 2
    assert qkv["high"] - qkv["low"] == pytest.approx(2 * 12.7062 * spread, rel=1e-4)
    assert qkv["p"] == pytest.approx(1 - 2 / math.pi * math.atan(abs(qkv["difference"]) / spread))
    assert (alpha["mean"], alpha["seeds"], alpha["problems"]) == (None, 0, "it burnt")


def test_a_table_has_a_line_per_run(tracked: Tracked) -> None:
    found = lines(tracked, "runs")
    assert [(line["row"], line["seed"], line["status"]) for line in found] == [
        ("lora", 0, "completed"),
        ("lora", 1, "completed"),
        ("qkv-isorank", 0, "completed"),
        ("qkv-isorank", 1, "completed"),
        ("qkv-isorank-adapter.alpha=1", 0, "failed"),
    ]
    assert found[2]["last"] == tracked.result["metrics"]["last"]
    assert found[2]["digest"] == tracked.result["digest"]
    assert found[4]["last"] is None


def test_a_tables_files_go_up_as_images_page_and_artifact(tracked: Tracked) -> None:
    table = tracked.table
    assert table.artifacts["table"] == ["against.png", "report.html", "scores.png", "table.csv"]
    assert table.summary["figures.captions"] == ["scores", "against"]
    assert all((table.folder / "files" / path).is_file() for path in table.summary["figures.filenames"])
    assert (table.folder / "files" / table.summary["report.path"]).read_text() == "<p>report.html</p>"


@pytest.mark.usefixtures("_no_wandb_key")
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tags": ["x" * 65]}, r"logger\.tags: Tag 'x+\.\.\.x+' is 65 characters\. Tags must be between 1 and 64 char"),
        ({"project": "a/b"}, r"logger: Weights & Biases takes no such run \(Invalid project name 'a/b'"),
    ],
)
def test_what_wandb_does_not_take_is_named(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    table = Table("t", "T", (Run(Row("lora"), Column("d", "m"), 0, "x"),))
    with pytest.raises(TensLoRAError, match=message) as raised:
        track_table(replace(OFFLINE, **wrong), tmp_path, table, [])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("config", [LoggerConfig(name="none"), LoggerConfig(name="wandb", mode="disabled")])
def test_nothing_watches_where_none_is_wanted(config: LoggerConfig, tmp_path: Path) -> None:
    assert type(start_tracker(config, tmp_path, {}, {})) is Tracker
    track_table(config, tmp_path, Table("t", "T", ()), [tmp_path / "none.png"])
    assert not list(tmp_path.iterdir())


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
