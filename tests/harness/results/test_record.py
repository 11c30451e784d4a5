from __future__ import annotations

from pathlib import Path

import pytest

from tenslora.errors import TensLoRAError
from tenslora.harness.results.record import environment, metrics_of, read_record, summary, write_record
from tests.running import SHORT, run

HISTORY = [{"epoch": e, "accuracy": a, "f1": a / 2} for e, a in ((1, 0.25), (2, 0.75), (3, 0.5), (4, 0.75), (5, 0.5))]


def test_last_is_the_headline_and_best_is_the_first_to_reach_it() -> None:
    metrics = metrics_of(HISTORY, ["accuracy", "f1"])
    assert (metrics["name"], metrics["last"], metrics["best"], metrics["best_epoch"]) == ("accuracy", 0.5, 0.75, 2)
    assert metrics["others_last"] == {"f1": 0.25}
    assert metrics["history"] == HISTORY


def test_a_run_without_a_finished_epoch_has_no_scores() -> None:
    metrics = metrics_of([], ["accuracy"])
    assert (metrics["last"], metrics["best"], metrics["history"]) == (None, None, [])


def test_a_record_is_read_back_and_other_schemas_are_refused(tmp_path: Path) -> None:
    write_record(tmp_path, {"x": [1, None]})
    assert read_record(tmp_path)["x"] == [1, None]
    (tmp_path / "result.json").write_text('{"schema": 99}')
    with pytest.raises(TensLoRAError, match="schema 99"):
        read_record(tmp_path)
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(TensLoRAError, match="not a readable record"):
        read_record(tmp_path)


def test_the_environment_names_versions_and_commit() -> None:
    import torch

    found = environment()
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert found["git"] is None or len(found["git"]["commit"]) == 40


def test_a_runs_record_holds_what_the_tables_need(tmp_path: Path) -> None:
    record = run(tmp_path, *SHORT, "tensor_mode=att_qkv", "rank_strategy=isorank")
    assert record["status"] == "completed"
    assert (record["model"], record["dataset"], record["tensor_mode"]) == ("vit_digits", "digits", "att_qkv")
    assert (record["rank_strategy"], record["ranks"], record["factorization"]) == ("isorank", [4, 4, 4, 4], "tucker")
    # 4 tensors of (64, 16, 4, 3) at rank 4, LoRA's 4 (64 + 64) twelve times, a head of 64 x 5 + 5
    assert record["adapter_parameters"] == 4 * (4 * (64 + 16 + 4 + 3) + 4**4)
    assert record["lora_parameters"] == 12 * 4 * 128
    assert record["head_parameters"] == 325
    assert record["trained_parameters"] == record["adapter_parameters"] + 325
    assert {"train", "wait", "evaluate", "data", "backbone"} == set(record["seconds"])
    assert 0 < record["seconds"]["wait"] < record["seconds"]["train"]
    assert record["steps_per_second"] > 0
    assert record["config"]["optimizer"]["lr"] == 1e-3
    text = summary(record)
    assert "ranks (isorank): d_in 4, d_head 4, head 4, projection 4" in text
    assert f"{record['adapter_parameters']:,} parameters" in text
    assert f"last {record['metrics']['last']:.4f}" in text


@pytest.mark.parametrize(("mode", "trained"), [("head_only", 325), ("full", None)])
def test_reference_rows_have_no_adapter(mode: str, trained: int | None, tmp_path: Path) -> None:
    record = run(tmp_path, *SHORT, f"tensor_mode={mode}")
    assert record["adapter_parameters"] == 0
    assert record["ranks"] is None
    assert record["trained_parameters"] == (trained or record["total_parameters"])
    assert not (tmp_path / "adapter.safetensors").exists()
    assert (tmp_path / ("head.safetensors" if trained else "model.safetensors")).exists()
