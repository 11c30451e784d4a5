"""What the forms of a tuned table show of the choice of its values."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import PathCollection

from tenslora.harness.results import write_results
from tenslora.harness.results.csv import to_csv
from tenslora.harness.results.figures import figures_of
from tenslora.harness.results.latex import to_latex
from tenslora.harness.results.markdown import to_markdown
from tenslora.harness.results.report import to_html
from tenslora.harness.results.summary import summarize
from tenslora.harness.tracking.wandb_tracker import _result_lines
from tests.drawn import only_axes
from tests.tables import make_run, small_table, tuned_table

SUMMARY = summarize(tuned_table())
EDGE = (
    "The best optimizer.lr may lie beyond the values that were tried, because the best of them is the smallest or the "
    "largest: qkv isorank (0.001)."
)


def test_the_table_has_the_chosen_value_beside_the_score_and_the_validation_score_of_every_value_below() -> None:
    text = to_markdown(SUMMARY)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[0].endswith("| dtd (accuracy, vit_base) | paper | lr |")
    assert [line.split(" | ")[-1].rstrip(" |") for line in lines[2:5]] == ["0.004", "0.001 (edge)", ""]
    heading = lines.index("| construction | 0.001 | 0.004 | 0.016 |")
    assert lines[heading + 2 : heading + 4] == [
        "| lora | 50.0 ± 1.4 | **60.0** ± 1.4 | 40.0 ± 1.4 |",
        "| qkv isorank | **70.0** ± 1.4 | 60.0 ± 1.4 | 50.0 ± 1.4 |",
    ]
    assert text.count(EDGE) == 2
    assert "Validation score after the last epoch with each value of optimizer.lr. The runs have the seeds 7, 8" in text
    assert "lr: the row's optimizer.lr, chosen on other seeds by its validation score." in text


def test_what_one_value_for_all_rows_costs_is_said() -> None:
    # 0.001: 50 and 70; 0.004: 60 and 60; 0.016: 40 and 50. LoRA loses ten points with the first, qkv with the second.
    sentence = (
        "If all rows of dtd with vit_base get the same value, 0.001 is the best; it costs a row 5.0 on average, and "
        "lora the most, 10.0."
    )
    assert sentence in SUMMARY.trials_caption


def test_latex_has_the_same() -> None:
    text = to_latex(SUMMARY)
    assert r"\multicolumn{3}{c}{dtd (vit\_base)}" in text
    assert r"lora & 50.0 $\pm$ 1.4 & \textbf{60.0} $\pm$ 1.4 & 40.0 $\pm$ 1.4 \\" in text
    assert r"\label{tab:sample-trials}" in text


def test_the_report_has_the_same_and_the_figure() -> None:
    html = to_html(SUMMARY)
    assert '<td class="number" data-sort="0.001">0.001 (edge)</td>' in html
    assert "The choice of optimizer.lr" in html and 'id="trials-table-1"' in html
    assert "6 of 6 runs finished; 12 of 12 trials finished." in html
    assert 'aria-label="Validation score by optimizer.lr: dtd' in html


def test_the_figure_rings_the_chosen_values() -> None:
    (figure,) = (figure for figure in figures_of(SUMMARY) if figure.name == "trials")
    axes = only_axes(figure.draw(figure.panels))
    rings = [np.asarray(ring.get_offsets()) for ring in axes.collections if isinstance(ring, PathCollection)]
    assert sorted(np.concatenate(rings).round().tolist()) == [[0, 70], [1, 60]]
    assert axes.get_ylabel() == "validation accuracy after the last epoch (%)"


def test_a_figure_has_the_trials_over_their_first_steps() -> None:
    (figure,) = (figure for figure in figures_of(SUMMARY) if figure.name == "trials_by_first_step")
    axes = only_axes(figure.draw(figure.panels))
    record = make_run("qkv", "isorank", epochs=[0.5]).record
    assert record
    expected = {
        name: [step * rate for rate in (0.001, 0.004, 0.016)]
        for name, step in (("lora", record["lora_first_step"]), ("qkv", record["first_step"]))
    }
    lora, qkv = ([curve.get_xdata(), curve.get_ydata()] for curve in axes.get_lines())
    np.testing.assert_allclose(np.array(lora, dtype=float), [expected["lora"], [50, 60, 40]])
    np.testing.assert_allclose(np.array(qkv, dtype=float), [expected["qkv"], [70, 60, 50]])


def test_a_setting_that_does_not_change_the_step_has_no_such_figure() -> None:
    table = tuned_table()
    assert table.tuning
    config = {"adapter": {"alpha": 4.0}, "optimizer": {"lr": 0.001}}
    trials = [replace(run, record={**(run.record or {}), "config": config}) for run in table.tuning.trials.runs]
    tuning = replace(table.tuning, trials=replace(table.tuning.trials, runs=tuple(trials)))
    names = [figure.name for figure in figures_of(summarize(replace(table, tuning=tuning)))]
    assert "trials" in names and "trials_by_first_step" not in names


def test_a_line_for_each_run_and_for_each_trial(tmp_path: Path) -> None:
    files = {path.name: path for path in write_results(tuned_table(), tmp_path)}
    rows = list(csv.DictReader(files["table.csv"].read_text().splitlines()))
    assert [(row["tuned"], row["at_edge"]) for row in rows] == [
        *[("optimizer.lr=0.004", "False")] * 2, *[("optimizer.lr=0.001", "True")] * 2, *[("", "False")] * 2,
    ]  # fmt: skip
    trials = list(csv.DictReader(files["trials.csv"].read_text().splitlines()))
    assert [(trial["tensor_mode"], trial["variant"], trial["seed"]) for trial in trials[:2]] == [
        ("lora", "optimizer.lr=0.001", "7"),
        ("lora", "optimizer.lr=0.001", "8"),
    ]
    assert len(trials) == 12
    assert {"trials.png", "trials.svg"} <= files.keys()


def test_weights_and_biases_gets_the_values_and_their_scores() -> None:
    lora, qkv, head_only = _result_lines(SUMMARY)
    assert (lora["lr"], qkv["lr"], head_only["lr"]) == ("0.004", "0.001 (edge)", "")
    assert SUMMARY.trials
    trials = _result_lines(SUMMARY.trials)
    assert [(line["row"], line["mean"]) for line in trials if line["tensor_mode"] == "qkv"] == [
        ("qkv-isorank-optimizer.lr=0.001", pytest.approx(0.7)),
        ("qkv-isorank-optimizer.lr=0.004", pytest.approx(0.6)),
        ("qkv-isorank-optimizer.lr=0.016", pytest.approx(0.5)),
    ]


@pytest.mark.parametrize("form", [to_markdown, to_csv, to_html])
def test_a_table_that_is_not_tuned_says_nothing_of_it(form: object) -> None:
    assert callable(form)
    assert "tuned" not in form(summarize(small_table()))
