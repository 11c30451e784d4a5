"""The means over groups of datasets, against those that Convpass's authors published for VTAB-1k beside each task."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import yaml

from tenslora.errors import TensLoRAError
from tenslora.harness.results.csv import to_csv
from tenslora.harness.results.figures.panels import panels_of
from tenslora.harness.results.latex import to_latex
from tenslora.harness.results.markdown import to_markdown
from tenslora.harness.results.report import to_html
from tenslora.harness.results.summary import summarize
from tenslora.harness.results.table import Column, Row, Table
from tests.running import CONF
from tests.tables import DIGITS, make_run, make_table

VTAB = yaml.safe_load((CONF / "table" / "vtab.yaml").read_text())
GROUPS = {name: tuple(datasets) for name, datasets in VTAB["table"]["groups"].items()}

# https://github.com/JieShibo/PETL-ViT/blob/main/convpass/README.md, in the order of GROUPS.
FULL = "68.9 87.7 64.3 97.2 86.9 87.4 38.8 79.7 95.7 84.2 73.9 56.3 58.6 41.7 65.5 57.5 46.7 25.7 29.1"
PROMPTS = "78.8 90.8 65.8 98.0 88.3 78.1 49.6 81.8 96.1 83.4 68.4 68.5 60.0 46.5 72.8 73.6 47.9 32.9 37.8"
PUBLISHED = {"Natural": (75.88, 78.48), "Specialized": (83.36, 82.43), "Structured": (47.64, 54.98)}
PUBLISHED_MEAN = (68.96, 71.96)

# The prompts' scores stand in a row of LoRA's, those of full fine-tuning in a row of att's.
ROWS = {"att": FULL, "lora": PROMPTS}


def vtab_table(seeds: int = 1) -> Table:
    tasks = [task for group in GROUPS.values() for task in group]
    runs = [
        make_run(mode, "isorank" if mode == "att" else "", seed=seed, column=Column(task, "vit_base"), epochs=[score])
        for mode, numbers in ROWS.items()
        for task, number in zip(tasks, numbers.split(), strict=True)
        for seed in range(seeds)
        for score in [float(number) / 100 + 0.01 * seed]
    ]
    return make_table(runs, groups=GROUPS)


def test_the_means_are_the_published_ones() -> None:
    summary = summarize(vtab_table())
    shown = [each.column.dataset for each in summary.columns][19:]
    assert shown == ["Natural", "Specialized", "Structured", "mean of groups"]
    lora, att = summary.rows
    for number, expected in enumerate([*PUBLISHED.values(), PUBLISHED_MEAN], start=19):
        assert (att.cells[number].mean, lora.cells[number].mean) == pytest.approx(expected, abs=0.05)
    assert [cell.best for cell in lora.cells[19:]] == [True, False, True, True]
    assert {each.metric for each in summary.columns} == {"accuracy"}


def test_latex_has_a_table_for_each_group_and_one_for_their_means() -> None:
    text = to_latex(summarize(vtab_table()))
    parts = re.findall(r"\\label\{(.*)\}|\\multicolumn\{1\}\{c\}\{(\S+|mean of groups)\}", text)
    shown: dict[str, list[str]] = {"": []}
    for label, column in parts:
        if label:
            shown[label] = []
        else:
            shown[[*shown][-1]].append(column.replace("\\_", "_"))
    labels = ["tab:sample", *(f"tab:sample-part{number}" for number in (2, 3, 4))]
    assert [len(shown[label]) for label in labels] == [7, 4, 8, 4]
    assert shown["tab:sample-part2"] == list(GROUPS["Specialized"])


def test_a_group_has_not_the_name_of_a_dataset() -> None:
    with pytest.raises(TensLoRAError, match=r"^table\.groups\.digits: is the name of a dataset of the table"):
        make_table([make_run("att", column=DIGITS)], groups={"digits": ["digits", "other"]})


def test_the_tables_tasks_are_those_of_its_groups() -> None:
    swept = VTAB["hydra"]["sweeper"]["params"]["dataset"].replace(" ", "").split(",")
    assert swept == [task.replace("_", "/", 1) for group in GROUPS.values() for task in group]


def test_each_seed_has_a_mean_of_its_own() -> None:
    table = vtab_table(seeds=3)
    row = Row("att", "isorank")
    scores = table.scores(row, Column("mean of groups", "vit_base"))
    assert [100 * score for score in scores.values()] == pytest.approx([68.96, 69.96, 70.96], abs=0.02)
    *_, comparison = summarize(table).comparisons
    assert (comparison.column.dataset, comparison.row) == ("mean of groups", row)
    assert comparison.difference is not None
    assert comparison.difference.mean == pytest.approx(68.96 - 71.96, abs=0.02)


def test_every_format_shows_the_means() -> None:
    scores = {"dtd": 0.5, "eurosat": 0.9, "cola": 0.4}
    runs = [
        make_run(mode, "isorank" if mode == "att" else "", column=Column(task, "vit_base"), epochs=[score - below])
        for mode, below in (("lora", 0.0), ("att", 0.1))
        for task, score in scores.items()
    ]
    summary = summarize(make_table(runs, groups={"Vision": ["dtd", "eurosat"], "Text": ["cola"]}))
    assert "70.0** | **40.0** | **55.0** |" in to_markdown(summary)
    assert "| att isorank | mean of groups with vit_base | \N{MINUS SIGN}10.00 |" in to_markdown(summary)
    assert r"\emph{mean of groups (vit\_base)}" in to_latex(summary)
    assert '<span class="mean best">55.0</span>' in to_html(summary)
    assert to_csv(summary).count("\n") == 1 + 6  # one line for each run
    assert "Vision (2), Text (1), mean of groups (2)" in summary.caption
    assert [panel.column.dataset for panel in panels_of(summary)] == list(scores)


def test_a_mean_lacks_the_seeds_that_a_task_lacks() -> None:
    table = vtab_table(seeds=2)
    lacking = replace(table.runs[-1], record=None, problem="missing")  # the last seed of LoRA's last structured task
    lora = summarize(replace(table, runs=(*table.runs[:-1], lacking))).rows[0]
    assert [cell.remark for cell in lora.cells[19:]] == ["", "", "(1 of 2 seeds)", "(1 of 2 seeds)"]
    empty = summarize(replace(table, runs=tuple(replace(run, record=None, problem="missing") for run in table.runs)))
    assert {cell.remark for row in empty.rows for cell in row.cells} == {"missing"}


def test_a_table_of_some_tasks_has_only_the_means_that_it_can_have() -> None:
    table = vtab_table()
    some = replace(table, runs=tuple(run for run in table.runs if run.column.dataset != "vtab_cifar"))
    assert [column.dataset for column in some.group_columns] == ["Specialized", "Structured"]
