"""What a record says of a run."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tenslora.errors import TensLoRAError
from tenslora.harness import run_record
from tenslora.harness.run_record import describe_environment, describe_run, summarize_history
from tenslora.harness.training.metrics import METRICS
from tests.offline import Tracked
from tests.running import SHORT, run

HISTORY = [{"epoch": e, "accuracy": a, "f1": a / 2} for e, a in ((1, 0.25), (2, 0.75), (3, 0.5), (4, 0.75), (5, 0.5))]


def test_last_is_the_headline_and_best_is_the_first_to_reach_it() -> None:
    metrics = summarize_history(HISTORY, ["accuracy", "f1"])
    assert (metrics["name"], metrics["last"], metrics["best"], metrics["best_epoch"]) == ("accuracy", 0.5, 0.75, 2)
    assert metrics["others_last"] == {"f1": 0.25}
    assert metrics["history"] == HISTORY


def test_best_is_the_lowest_score_where_a_smaller_one_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "accuracy", replace(METRICS["accuracy"], larger_is_better=False))
    metrics = summarize_history(HISTORY, ["accuracy"])
    assert (metrics["best"], metrics["best_epoch"]) == (0.25, 1)


def test_a_metric_of_ones_own_has_another_name_than_what_a_record_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METRICS, "lr", replace(METRICS["accuracy"], name="lr"))
    with pytest.raises(TensLoRAError, match=r"^dataset\.metrics: a score must not be called lr, because each epoch"):
        run(tmp_path, *SHORT, "dataset.metrics=[accuracy,lr]")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_run_without_a_finished_epoch_has_no_scores() -> None:
    metrics = summarize_history([], ["accuracy"])
    assert (metrics["last"], metrics["best"], metrics["history"]) == (None, None, [])


def test_the_environment_names_versions_and_commit() -> None:
    environment = describe_environment()
    assert environment["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert environment["git"] is None or len(environment["git"]["commit"]) == 40


def test_a_runs_record_holds_what_the_tables_need(tracked: Tracked) -> None:
    record = tracked.result
    assert record["status"] == "completed"
    assert (record["model"], record["dataset"], record["tensor_mode"]) == ("vit_digits", "digits", "qkv")
    assert (record["rank_strategy"], record["ranks"], record["factorization"]) == ("isorank", [4, 4, 4], "tucker")
    # 4 tensors of (64, 64, 3) at rank 4, LoRA's 4 (64 + 64) twelve times, a head of 64 x 5 + 5
    assert record["adapter_parameters"] == 4 * (4 * (64 + 64 + 3) + 4**3)
    assert record["lora_parameters"] == 12 * 4 * 128
    assert record["head_parameters"] == 325
    assert record["trained_parameters"] == record["adapter_parameters"] + 325
    assert {"train", "wait", "evaluate", "data", "backbone"} == set(record["seconds"])
    assert 0 < record["seconds"]["wait"] < record["seconds"]["train"]
    assert record["steps_per_second"] > 0
    assert record["config"]["optimizer"]["lr"] == 1e-3


def test_a_run_in_a_few_lines_has_ranks_parameters_and_scores(tracked: Tracked) -> None:
    record = tracked.result
    assert describe_run(record).splitlines() == [
        "qkv on digits with vit_digits, seed 0: completed",
        "ranks (isorank): d_in 4, d_out 4, projection 4",
        "adapter: 2,352 parameters, 38.3 % of LoRA's 6,144",
        "head: 325 parameters; trained in all: 2,677",
        f"accuracy: last {record['metrics']['last']:.4f}, best {record['metrics']['best']:.4f} "
        f"(epoch {record['metrics']['best_epoch']})",
    ]
    of_validation = describe_run({**record, "scored_on": "validation"})
    assert of_validation.splitlines()[-1].startswith("validation accuracy: last ")
    of_f1 = {**record, "classes": ["bad", "good"], "metrics": {**record["metrics"], "name": "f1"}}
    assert describe_run(of_f1).splitlines()[-1] == "f1 is that of the class good, the second of the two"


@pytest.mark.parametrize(("mode", "trained"), [("head_only", 325), ("full", None)])
def test_reference_rows_have_no_adapter(mode: str, trained: int | None, tmp_path: Path) -> None:
    record = run(tmp_path, *SHORT, "trainer.max_steps=1", f"tensor_mode={mode}")
    assert record["adapter_parameters"] == 0
    assert record["ranks"] is None
    assert record["trained_parameters"] == (trained or record["total_parameters"])
    assert not (tmp_path / "adapter.safetensors").exists()
    assert (tmp_path / ("head.safetensors" if trained else "model.safetensors")).exists()
    assert "ranks" not in describe_run(record)


def test_the_commit_is_the_codes_also_where_git_is_told_of_another_repository(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_record._git.cache_clear()
    commit = run_record._git()
    monkeypatch.setenv("GIT_DIR", str(tmp_path))
    run_record._git.cache_clear()
    assert run_record._git() == commit  # None outside a clone


def test_a_repository_that_does_not_track_the_code_is_not_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "mine")
    code = tmp_path / "copied" / "run_record.py"
    code.parent.mkdir()
    code.touch()
    monkeypatch.setattr(run_record, "__file__", str(code))
    assert run_record._git.__wrapped__() is None
    git("add", "copied")
    tracked = run_record._git.__wrapped__()
    assert tracked is not None
    assert tracked["changed"]


def test_what_is_no_commit_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    git = tmp_path / "git"
    git.write_text("#!/bin/sh\necho warning: your git is old\n")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert run_record._git.__wrapped__() is None
