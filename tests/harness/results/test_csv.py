"""A table as CSV, read back by the csv module."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import pytest

from tenslora.harness.results.csv import comparison_to_csv, to_csv
from tenslora.harness.results.summary import summarize
from tenslora.harness.results.table import Run, Table
from tests.tables import make_run, make_table, sample_table


def lines(table: Table) -> list[dict[str, str]]:
    """The lines of a table's CSV by the names in its head."""
    return list(csv.DictReader(io.StringIO(to_csv(summarize(table)))))


def test_there_is_a_line_for_every_run_in_the_tables_order() -> None:
    sample = sample_table()
    reversed_lines = lines(replace(sample, runs=tuple(reversed(sample.runs))))
    assert len(reversed_lines) == len(sample.runs)
    keys = [(line["dataset"], line["tensor_mode"], line["rank_strategy"], line["seed"]) for line in reversed_lines]
    assert keys[:3] == [("cola", "lora", "", "0"), ("cola", "lora", "", "1"), ("cola", "lora", "", "2")]
    statuses = [line["status"] for line in reversed_lines]
    assert (statuses.count("failed"), statuses.count("missing")) == (1, 1)


def test_a_line_holds_what_was_recorded_at_full_precision() -> None:
    run = make_run("qkv", "isorank", seed=3, epochs=[0.1 + 0.2, 1 / 3, 0.2], variant=("a=1", "b=2"))
    (line,) = lines(make_table([run]))
    assert line == {
        "dataset": "dtd", "model": "vit_base", "tensor_mode": "qkv", "rank_strategy": "isorank", "variant": "a=1;b=2",
        "seed": "3", "digest": "qkv-isorank-dtd-3", "status": "completed", "metric": "accuracy", "last": "0.2",
        "best": "0.3333333333333333", "best_epoch": "2", "epochs": "3", "steps": "48", "ranks": "4 4 4",
        "adapter_parameters": "74640", "lora_parameters": "221184", "percent_of_lora": repr(100 * 74640 / 221184),
        "first_step": "4.0", "lora_first_step": "32.0", "relative_first_step": "0.125",
        "head_parameters": "325", "train_examples": "1000", "test_examples": "400", "validation_examples": "",
        "scored_on": "test", "problem": "",
    }  # fmt: skip


def test_a_failed_run_has_no_score_and_a_missing_one_has_its_planned_size() -> None:
    failed, missing = lines(
        make_table([make_run("att", "isorank", epochs=[0.5], problem="diverged"), make_run("qkv", "isorank")])
    )
    assert (failed["status"], failed["last"], failed["best"], failed["epochs"]) == ("failed", "", "", "1")
    assert failed["problem"] == "diverged"
    assert (failed["adapter_parameters"], failed["ranks"]) == ("123840", "4 4 4")
    assert (missing["status"], missing["adapter_parameters"], missing["ranks"]) == ("missing", "74640", "4 4 4")


def test_a_comparison_is_a_line_with_its_tests_in_points() -> None:
    def compared(runs: list[Run]) -> list[dict[str, str]]:
        return list(csv.DictReader(io.StringIO(comparison_to_csv(summarize(make_table(runs))))))

    runs = [make_run("lora", seed=seed, epochs=[0.5]) for seed in range(3)]
    assert compared(runs) == []
    runs += [make_run("qkv", "isorank", seed=seed, epochs=[0.6 + seed / 8], variant=("a=1",)) for seed in range(3)]
    runs += [make_run("att", "isorank", seed=9, epochs=[0.6])]
    qkv, att = sorted(compared(runs), key=lambda line: line["variant"], reverse=True)
    place = {"dataset": "dtd", "model": "vit_base", "tensor_mode": "qkv", "rank_strategy": "isorank", "variant": "a=1"}
    assert qkv.items() >= {**place, "seeds": "3", "permutation_p": "0.25", "smallest_permutation_p": "0.25"}.items()
    assert float(qkv["mean"]) == pytest.approx(22.5)
    assert qkv["p"] == qkv["holm_p"]
    assert qkv["above"] == ""
    assert (att["tensor_mode"], att["mean"], att["p"], att["seeds"]) == ("att", "", "", "")


def test_nothing_depends_on_time_place_or_version() -> None:
    def elsewhere(run: Run) -> Run:
        if run.record is None:
            return run
        other = {"versions": {"torch": "9.9"}, "platform": "elsewhere", "git": None}
        return replace(run, record={**run.record, "seconds": {"train": 99.0}, "device": "cpu", "environment": other})

    sample = sample_table()
    assert lines(replace(sample, runs=tuple(map(elsewhere, sample.runs)))) == lines(sample)
