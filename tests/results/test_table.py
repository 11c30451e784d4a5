from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tenslora.errors import TensLoRAError
from tenslora.results.table import collect, markdown


def record(mode: str, seed: int, last: float, strategy: str = "isorank", **changes: Any) -> dict[str, Any]:
    return {
        "schema": 1, "status": "completed", "digest": f"{mode}{seed}{strategy}{last}", "dataset": "d", "model": "m",
        "tensor_mode": mode, "rank_strategy": strategy, "ranks": [4], "seed": seed, "adapter_parameters": 500,
        "lora_parameters": 1000, "metrics": {"name": "accuracy", "last": last, "best": 0.9},
        "identity": {"seed": seed, "rank_strategy": strategy, "optimizer": {"lr": 1e-3}}, **changes,
    }  # fmt: skip


def test_rows_are_means_and_deviations_over_seeds_in_the_papers_order() -> None:
    runs = [record("qkv", seed, last) for seed, last in ((0, 0.5), (1, 0.7), (2, 0.6))]
    table = markdown([*runs, record("lora", 0, 0.8), record("head_only", 0, 0.1, ranks=None)]).splitlines()
    assert [line.split(" | ")[2] for line in table[2:]] == ["head_only", "lora", "qkv isorank"]
    assert "| 500 | 50.0 | accuracy | 60.0 ± 10.0 | 90.0 ± 0.0 |" in table[4]
    assert table[3].endswith("| 80.0 | 90.0 |")


def test_lora_is_one_row_whatever_the_strategy() -> None:
    table = markdown([record("lora", 0, 0.8, strategy) for strategy in ("isorank", "isoparameters")])
    assert len(table.splitlines()) == 3


def test_runs_that_differ_in_more_than_the_seed_are_not_averaged() -> None:
    other = {"seed": 1, "rank_strategy": "isorank", "optimizer": {"lr": 1.0}}
    with pytest.raises(TensLoRAError, match="differ in more than the seed"):
        markdown([record("qkv", 0, 0.5), record("qkv", 1, 0.6, identity=other)])


def test_only_completed_runs_are_collected(tmp_path: Path) -> None:
    for name, status in (("a", "completed"), ("b", "diverged")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(record("qkv", 0, 0.5, status=status)))
    assert len(collect(tmp_path)) == 1
    with pytest.raises(TensLoRAError, match="no completed runs"):
        collect(tmp_path / "b")
