"""What the dashboard asks W&B for, against what a run and a table log."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tenslora.harness.tracking.dashboard import build_report, main
from tests.offline import OfflineRun, Tracked, hide_wandb_keys

pytestmark = pytest.mark.filterwarnings("ignore:Pydantic V1 style")  # wandb_workspaces has validators of that style

OPTIONS = ["--project", "p", "--group", "g", "isorank", "--dataset", "digits", "cola", "--by", "adapter.alpha"]


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    pytest.importorskip("wandb_workspaces", reason="the extra dashboard is not installed")
    main([*OPTIONS, "--dry-run"])
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return printed


def grids(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [block for block in report["blocks"] if block["type"] == "PanelGrid"]


def panel(grid: dict[str, Any], kind: str) -> dict[str, Any]:
    """The only panel of a kind in a grid."""
    (only,) = (panel for panel in grid["panels"] if panel["type"] == kind)
    return only


def passes(run: OfflineRun, filters: str) -> bool:
    """Whether filters of the kind that the dashboard uses let a finished run through."""
    metrics = {"JobType": run.started["job_type"], "Group": run.started["run_group"], "State": "finished"}
    for term in filters.split(" and "):
        match = re.fullmatch(r"""(\w+)\("([\w.]+)"\) (==|in) (.*)""", term)
        assert match, term
        kind, name, operator, text = match.groups()
        allowed = json.loads(text.replace("'", '"'))
        value = metrics[name] if kind == "Metric" else run.config_value(name)
        if value not in (allowed if operator == "in" else [allowed]):
            return False
    return True


def test_each_section_shows_the_runs_that_it_is_about(report: dict[str, Any], tracked: Tracked) -> None:
    tables, digits, cola, settings = grids(report)
    shown = {runset["name"]: runset["filters"] for grid in (tables, digits, cola) for runset in grid["runsets"]}
    assert [passes(tracked.table, filters) for filters in shown.values() if "table" in filters] == [True]
    assert [passes(tracked.run, shown[name]) for name in ("tables", "digits", "cola")] == [False, True, False]
    assert [runset["filters"] for runset in settings["runsets"]] == [shown["digits"], shown["cola"]]


def test_runs_are_grouped_by_what_they_log_as_mean_and_spread(report: dict[str, Any], tracked: Tracked) -> None:
    _, digits, _, _ = grids(report)
    keys = digits["runsets"][0]["groupby"]
    assert [tracked.run.config_value(key.removeprefix("config.")) for key in keys] == ["qkv-isorank", 4]
    for kind in ("LinePlot", "BarPlot"):
        shown = panel(digits, kind)
        assert (shown["groupby_aggfunc"], shown["groupby_rangefunc"]) == ("mean", "stddev")


def test_panels_show_what_a_run_logs(report: dict[str, Any], tracked: Tracked) -> None:
    _, digits, _, _ = grids(report)
    line, bars, points = (panel(digits, kind) for kind in ("LinePlot", "BarPlot", "ScatterPlot"))
    assert {line["x"], *line["y"]} <= set(tracked.run.history[0])
    assert tracked.run.summary[bars["metrics"][0]] == tracked.result["metrics"]["last"]
    assert tracked.run.config_value(points["x"]["name"]) == tracked.result["adapter_parameters"]
    assert tracked.run.summary[points["y"]["name"]] == tracked.result["metrics"]["last"]
    for column in digits["runsets"][0]["pinned_columns"][1:]:
        section, name = column.split(":")
        assert tracked.run.summary[name] if section == "summary" else tracked.run.config_value(name)


def test_the_tables_section_shows_what_a_table_uploads(report: dict[str, Any], tracked: Tracked) -> None:
    tables = grids(report)[0]
    name = panel(tables, "WeavePanelSummaryTable")["table_name"]
    assert tracked.table.summary[f"{name}._type"] == "table-file"
    (media,) = panel(tables, "MediaBrowser")["media_keys"]
    assert tracked.table.summary[f"{media}._type"] == "images/separated"


def test_without_a_group_every_run_of_the_project_is_shown() -> None:
    pytest.importorskip("wandb_workspaces")
    report = build_report("p", "e", [], ["digits"])
    assert all("Group" not in runset.filters for block in report.blocks for runset in getattr(block, "runsets", []))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--project", "p\udcff"], r"--project=p\udcff: must be a text of one line"),
        (["--project", "a/b?c"], "--project=a/b?c: must be a name of at most 128 characters, without /"),
        (["--project", ""], "--project=: must not be an empty text"),
        (["--entity", "a/b"], "--entity=a/b: must be a name of at most 128 characters, without /"),
        (["--group", "g", ""], "--group=: must not be an empty text"),
        (["--dataset", "a/b"], "--dataset=a/b: must be a name of at most 100 letters"),
        (["--by", "adapter.alfa"], "--by adapter.alfa: there is no such setting; did you mean adapter.alpha?"),
    ],
)
def test_a_word_that_no_setting_could_be_is_one_line(words: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--project", "p", *words, "--dry-run"])
    assert str(ended.value).startswith(f"error: {message}")


def test_a_service_that_does_not_accept_the_report_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb_workspaces")
    hide_wandb_keys(monkeypatch, tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(OPTIONS)
    line = str(ended.value)
    assert line.startswith("error: project p: Weights & Biases did not accept the report (No API key configured")
    assert "\n" not in line
    assert capfd.readouterr().err == ""


def test_without_wandb_workspaces_a_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(SystemExit, match=r"^error: .*: pip install -e '\.\[dashboard\]'$"):
        main(OPTIONS)
