"""What W&B holds of a run and of a table, read back from its offline files."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import pwd
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.sdk import wandb_setup

from tenslora.errors import TensLoRAError
from tenslora.harness.config import LoggerConfig
from tenslora.harness.results.table import Column, Row, Run, Table
from tenslora.harness.sweeping.jobs import _as_job
from tenslora.harness.tracking import check_for_sweep, start_tracker, track_table
from tenslora.harness.tracking.wandb_tracker import _has_key
from tests import records
from tests.events import FACTS
from tests.offline import OFFLINE, Tracked, hide_wandb_keys, read_offline_run
from tests.running import configured
from tests.tables import make_run, make_table


@pytest.fixture
def _without_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hide_wandb_keys(monkeypatch, tmp_path)


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


@pytest.mark.usefixtures("_without_keys")
def test_lora_has_no_strategy_in_its_name_and_a_run_that_breaks_off_has_failed(tmp_path: Path) -> None:
    run = configured("tensor_mode=lora", "dataset=cola", "model=minilm", "rank_strategy=isoparameters", "seed=3")
    run = replace(run, logger=OFFLINE)
    facts = {
        "adapter_parameters": 100,
        "lora_parameters": 100,
        "first_step": 8.0,
        "lora_first_step": 8.0,
        "scores": ["matthews", "accuracy"],
    }
    with pytest.raises(KeyboardInterrupt), start_tracker(run, tmp_path, facts) as tracker:
        tracker.epoch({"epoch": 1, "step": 5, "matthews": 0.25, "accuracy": 0.75})
        raise KeyboardInterrupt
    tracked = read_offline_run(tmp_path)
    assert tracked.started["display_name"] == "cola-minilm-lora-seed3"
    assert tracked.config["row"] == "lora"
    assert tracked.history[0]["score"] == 0.25
    assert tracked.exit_code == 1


@pytest.mark.usefixtures("_without_keys")
def test_a_programs_own_run_stays_open(tmp_path: Path) -> None:
    facts = {"adapter_parameters": 1, "lora_parameters": 1, "scores": ["accuracy"]}
    with wandb.init(mode="offline", dir=str(tmp_path), settings=wandb.Settings(silent=True)) as own:
        own.log({"a": 1})
        with start_tracker(replace(configured(), logger=OFFLINE), tmp_path / "run", facts) as tracker:
            tracker.epoch({"epoch": 1, "step": 5, "accuracy": 0.75})
            tracker.abandon()
        assert wandb.run is own
        own.log({"a": 2})
    assert [row["a"] for row in read_offline_run(tmp_path).history] == [1, 2]
    assert [row["score"] for row in read_offline_run(tmp_path / "run").history] == [0.75]


def test_a_table_is_a_run_in_the_group_of_its_runs(tracked: Tracked) -> None:
    started = tracked.table.started
    assert (started["project"], started["run_group"], started["job_type"]) == ("p", "isorank", "table")
    assert (started["display_name"], started["tags"]) == ("isorank", ["isorank"])
    assert tracked.table.exit_code == 0


def lines(tracked: Tracked, name: str) -> list[dict[str, Any]]:
    """The lines of a W&B Table by the names of its columns."""
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
    assert (alpha["mean"], alpha["seeds"], alpha["problems"]) == (None, 0, "out of memory")


def test_a_table_has_a_line_per_run(tracked: Tracked) -> None:
    runs = lines(tracked, "runs")
    assert [(line["row"], line["seed"], line["status"]) for line in runs] == [
        ("lora", 0, "completed"),
        ("lora", 1, "completed"),
        ("qkv-isorank", 0, "completed"),
        ("qkv-isorank", 1, "completed"),
        ("qkv-isorank-adapter.alpha=1", 0, "failed"),
    ]
    assert runs[2]["last"] == tracked.result["metrics"]["last"]
    assert runs[2]["digest"] == tracked.result["digest"]
    assert runs[4]["last"] is None


def test_a_tables_files_go_up_as_images_page_and_artifact(tracked: Tracked) -> None:
    table = tracked.table
    assert table.artifacts["table"] == ["against.png", "report.html", "scores.png", "table.csv"]
    assert table.summary["figures.captions"] == ["scores", "against"]
    assert all((table.folder / "files" / path).is_file() for path in table.summary["figures.filenames"])
    assert (table.folder / "files" / table.summary["report.path"]).read_text() == "<p>report.html</p>"


@pytest.mark.usefixtures("_without_keys")
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tags": ["x" * 65]}, r"logger\.tags: Tag 'x+\.\.\.x+' is 65 characters\. Tags must be between 1 and 64 char"),
        ({"project": "a/b"}, r"logger: Weights & Biases does not accept the run \(Invalid project name 'a/b'"),
    ],
)
def test_what_wandb_does_not_take_is_named(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    table = Table("t", "T", (Run(Row("lora"), Column("d", "m"), 0, "x"),))
    with pytest.raises(TensLoRAError, match=message) as raised:
        track_table(replace(OFFLINE, **wrong), tmp_path, table, [])
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("_without_keys")
def test_a_folder_that_wandb_cannot_make_is_named(tmp_path: Path) -> None:
    (tmp_path / "wandb").touch()
    table = Table("t", "T", (Run(Row("lora"), Column("d", "m"), 0, "x"),))
    with pytest.raises(
        TensLoRAError, match=r"^logger: Weights & Biases cannot write \S+/wandb\S* \(Not a directory\)$"
    ):
        track_table(OFFLINE, tmp_path, table, [])


@pytest.mark.usefixtures("_without_keys")
@pytest.mark.parametrize("lost", ["define_metric", "log", "finish"])
def test_wandbs_own_process_that_is_gone_is_told(lost: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def gone(*_: Any, **__: Any) -> None:
        raise ConnectionResetError("Connection lost")

    facts = {"adapter_parameters": 1, "lora_parameters": 1, "scores": ["accuracy"]}
    monkeypatch.setattr(wandb.Run, lost, gone)
    with (
        pytest.raises(TensLoRAError, match=r"^logger: Weights & Biases has broken off \(Connection lost\), as when"),
        start_tracker(replace(configured(), logger=OFFLINE), tmp_path, facts) as tracker,
    ):
        tracker.epoch({"epoch": 1, "step": 5, "accuracy": 0.75})
        tracker.finish(records.finished(configured()), [])
    monkeypatch.undo()
    if lost != "define_metric":
        tracker.abandon()  # or W&B would report what later tests print
    wandb.teardown()


@pytest.mark.usefixtures("_without_keys")
def test_wandbs_defaults_of_another_form_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config-defaults.yaml").write_text("lr: 0.1\n")
    monkeypatch.chdir(tmp_path)
    line = r"^logger: Weights & Biases cannot use its own settings \(.*\); look at config-defaults\.yaml in "
    with pytest.raises(TensLoRAError, match=line):
        track_table(OFFLINE, tmp_path, make_table([make_run("lora", epochs=[0.5])]), [])


def test_wandbs_own_variables_are_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PROJECT", "ENTITY", "RUN_GROUP"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    plain = configured("logger=wandb").logger
    assert (plain.project, plain.entity, plain.group) == ("tenslora", None, None)
    for name in ("PROJECT", "ENTITY", "RUN_GROUP"):
        monkeypatch.setenv(f"WANDB_{name}", name.lower())
    ours = configured("logger=wandb", "logger.group=given").logger
    assert (ours.project, ours.entity, ours.group) == ("project", "entity", "given")
    assert configured("logger=wandb").digest() == configured().digest()


@pytest.mark.parametrize(
    ("variable", "folder", "reason"),
    [("WANDB_DATA_DIR", "file", "is a file; must be a folder"), ("XDG_DATA_HOME", "file/wandb", "Not a directory")],
)
def test_a_folder_for_copies_that_cannot_be_written_is_refused_before_the_run(
    variable: str, folder: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.delenv("WANDB_DATA_DIR", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "file"))
    line = rf"^WANDB_DATA_DIR={tmp_path}/{folder}: cannot be written \({reason}\)$"
    with pytest.raises(TensLoRAError, match=line):
        start_tracker(replace(configured("dataset=cola"), logger=OFFLINE), tmp_path, FACTS)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "adapter.safetensors"), "No space left on device"),
        (PermissionError("Unable to write staging files to x."), r"Unable to write staging files to x\."),
    ],
)
def test_a_full_disk_is_wandbs_and_not_that_of_the_file(
    error: OSError, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(wandb.Artifact, "add_file", full)
    line = rf"^logger: Weights & Biases cannot keep copies of files \({reason}\); WANDB_DATA_DIR"
    with pytest.raises(TensLoRAError, match=line):
        track_table(OFFLINE, tmp_path, make_table([make_run("lora", epochs=[0.5])]), [tmp_path / "table.md"])


@pytest.mark.usefixtures("_without_keys")
def test_what_wandb_disabled_has_left_is_heeded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(wandb.setup().settings, "mode", "disabled")  # as read from W&B's file of settings
    run = replace(configured(), logger=replace(OFFLINE, mode="auto"))
    start_tracker(run, tmp_path, FACTS).abandon()
    assert not list(tmp_path.glob("wandb/*run-*"))


def test_without_a_home_in_the_environment_wandbs_folder_is_the_one_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # to be put back
        monkeypatch.delenv(name)
    monkeypatch.setattr(wandb.setup().settings, "mode", "disabled")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    start_tracker(replace(configured(), logger=replace(OFFLINE, mode="auto")), tmp_path, FACTS).abandon()
    assert os.environ["WANDB_CACHE_DIR"] == f"{pwd.getpwuid(os.getuid()).pw_dir}/.cache/wandb"


@pytest.mark.parametrize(
    "line",
    [
        "WANDB_MODE=ofline: Input should be 'online', 'offline'",
        "WANDB_HTTP_TIMEOUT=abc: Input should be a valid number",
        f"WANDB_TAGS={'x' * 80}: Tag 'x+...x+' is 80 characters",
        "WANDB_RUN_ID=a/b: Weights & Biases does not accept the run",
        "WANDB_SERVICE=garbage: Weights & Biases cannot use it",
    ],
)
def test_a_variable_that_wandb_does_not_take_is_named(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _, value = line.partition(":")[0].partition("=")
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(wandb_setup, "_singleton", None)  # it reads its variables once
    table = Table("t", "T", (Run(Row("lora"), Column("d", "m"), 0, "x"),))
    with pytest.raises(TensLoRAError, match=f"^{line}"):
        track_table(replace(OFFLINE, mode="auto"), tmp_path, table, [])


@pytest.mark.usefixtures("_without_keys")
@pytest.mark.parametrize("mode", ["auto", "offline"])
def test_without_a_key_one_line_says_so_and_how_to_upload(
    mode: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run = replace(configured(), logger=replace(OFFLINE, mode=mode))
    place = tmp_path / "my run"
    place.mkdir()
    start_tracker(run, place, FACTS).abandon()
    (folder,) = place.glob("wandb/offline-run-*")
    assert [entry.getMessage() for entry in caplog.records if entry.name.startswith("tenslora")] == [
        "Weights & Biases is offline, because there is no API key (`wandb login` stores one); "
        f"to upload the run: wandb sync '{folder}'"
    ]


@pytest.mark.usefixtures("_without_keys")
def test_a_table_says_why_it_is_not_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    table = Table("t", "T", (Run(Row("lora"), Column("d", "m"), 0, "x"),))
    assert track_table(OFFLINE, tmp_path, table, []) == "Weights & Biases is offline"


@pytest.mark.parametrize(
    ("host", "expected"), [("api.wandb.ai", True), ("wandb.example.org", True), ("example.com", False), (None, False)]
)
@pytest.mark.usefixtures("_without_keys")
def test_a_key_in_the_netrc_file_is_seen(
    host: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if host:
        (tmp_path / "keys").write_text(f"machine {host}\n  login user\n  password {'a' * 40}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "keys"))
    assert _has_key("https://wandb.example.org/path") == expected


@pytest.mark.usefixtures("_without_keys")
def test_a_netrc_file_in_another_encoding_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes("machine git.example.org login me password grüße\n".encode("latin-1"))
    monkeypatch.setenv("NETRC", str(tmp_path / "keys"))
    with pytest.raises(TensLoRAError, match=rf"^{tmp_path}/keys: must be text in UTF-8"):
        track_table(OFFLINE, tmp_path, Table("t", "T", (Run(Row("lora"), Column("d", "m"), 0, "x"),)), [])


@pytest.mark.usefixtures("_without_keys")
def test_a_page_is_read_as_it_was_written_in_any_locale(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page, read = tmp_path / "report.html", Path.read_text
    page.write_text("<p>50 ± 1</p>", encoding="utf-8")
    as_ascii = lambda path, encoding="ascii", errors=None: read(path, encoding, errors)  # noqa: E731
    monkeypatch.setattr(Path, "read_text", as_ascii)
    track_table(OFFLINE, tmp_path, Table("t", "T", (Run(Row("lora"), Column("d", "m"), 0, "x"),)), [page])


def test_the_runs_of_a_sweep_must_not_share_an_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "abc")
    check_for_sweep(LoggerConfig())
    with pytest.raises(TensLoRAError, match=r"^WANDB_RUN_ID=abc: must not be set for a sweep, "):
        check_for_sweep(OFFLINE)


@pytest.mark.usefixtures("_without_keys")
def test_a_name_that_is_longer_than_a_tag_is_cut(tmp_path: Path) -> None:
    run = Run(Row("lora"), Column("digits", "m"), 0, "x")
    track_table(replace(OFFLINE, group="g", tags=()), tmp_path, Table("n" * 80, "T", (run,)), [])
    assert read_offline_run(tmp_path).started["tags"] == ["n" * 64]
    assert _as_job(configured("logger=wandb"), "n" * 80).logger.tags[0] == "n" * 64


def test_a_key_in_the_environment_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    assert _has_key("https://wandb.example.org")
