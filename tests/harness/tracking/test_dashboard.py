from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tenslora.harness.tracking.dashboard import build_report, main
from tests.conftest import ROOT
from tests.offline import Offline, Tracked, no_wandb_key

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
    (found,) = (panel for panel in grid["panels"] if panel["type"] == kind)
    return found


def configured(run: Offline, name: str) -> Any:
    """What `name` is in the run's config, whose values W&B keeps under "value" below the first key."""
    found: Any = run.config
    for key in (key for key in name.split(".") if key != "value"):
        found = found[key]
    return found


def passes(run: Offline, filters: str) -> bool:
    """Whether a finished run is let through by filters of the kind that the dashboard uses."""
    run_level = {"JobType": run.started["job_type"], "Group": run.started["run_group"], "State": "finished"}
    for term in filters.split(" and "):
        kind, name, operator, text = re.fullmatch(r"""(\w+)\("([\w.]+)"\) (==|in) (.*)""", term).groups()  # type: ignore[union-attr]
        wanted = json.loads(text.replace("'", '"'))
        value = run_level[name] if kind == "Metric" else configured(run, name)
        if value not in (wanted if operator == "in" else [wanted]):
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
    assert [configured(tracked.run, key.removeprefix("config.")) for key in keys] == ["qkv-isorank", 4]
    for kind in ("LinePlot", "BarPlot"):
        shown = panel(digits, kind)
        assert (shown["groupby_aggfunc"], shown["groupby_rangefunc"]) == ("mean", "stddev")


def test_panels_show_what_a_run_logs(report: dict[str, Any], tracked: Tracked) -> None:
    _, digits, _, _ = grids(report)
    line, bars, points = (panel(digits, kind) for kind in ("LinePlot", "BarPlot", "ScatterPlot"))
    assert {line["x"], *line["y"]} <= set(tracked.run.history[0])
    assert tracked.run.summary[bars["metrics"][0]] == tracked.result["metrics"]["last"]
    assert configured(tracked.run, points["x"]["name"]) == tracked.result["adapter_parameters"]
    assert tracked.run.summary[points["y"]["name"]] == tracked.result["metrics"]["last"]
    for column in digits["runsets"][0]["pinned_columns"][1:]:
        section, name = column.split(":")
        assert tracked.run.summary[name] if section == "summary" else configured(tracked.run, name)


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


@pytest.fixture
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    no_wandb_key(monkeypatch, tmp_path)
    yield


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize(
    ("before", "message"),
    [
        ("", "error: project p: Weights & Biases did not take the report (No API key configured"),
        ("sys.modules['wandb_workspaces'] = None; ", "pip install tenslora[dashboard]"),
    ],
)
def test_what_keeps_it_from_building_is_one_line(before: str, message: str) -> None:
    code = f"import sys; {before}from tenslora.harness.tracking.dashboard import main; main()"
    command = [sys.executable, "-c", code, *OPTIONS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
