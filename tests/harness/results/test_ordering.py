"""What orders the rows, against rank correlations computed by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import pytest

from tenslora.harness.results.markdown import to_markdown
from tenslora.harness.results.ordering import orderings
from tenslora.harness.results.report import to_html
from tenslora.harness.results.summary import summarize
from tenslora.harness.results.table import Run
from tests.tables import make_run, make_table, swept_table

ROWS = [("lora", ""), ("att", "isorank"), ("qkv", "isorank"), ("depth", "isoparameters")]
STEPS = {"lora": 32.0, "att": 8.0, "qkv": 4.0, "depth": 64.0}
DIRECT = {"lora": 0.7, "att": 0.6, "qkv": 0.65, "depth": 0.75, "head_only": 0.1}
EQUAL = {"lora": 0.7, "att": 0.72, "qkv": 0.65, "depth": 0.69, "head_only": 0.1}


def runs_of(scores: Mapping[str, float], steps: Mapping[str, float], *variant: str) -> list[Run]:
    """One seed of four rows and of head_only, with these scores and first steps."""
    runs = []
    for mode, strategy in [*ROWS, ("head_only", "")]:
        run = make_run(mode, strategy, epochs=[scores[mode]], variant=variant)
        record = {**(run.record or {}), "first_step": steps.get(mode), "lora_first_step": 32.0}
        runs.append(replace(run, record=record))
    return runs


def test_the_numbers_are_those_of_the_ranks() -> None:
    # Four ranks that differ by d have the correlation 1 - 6 sum(d^2) / (4 (16 - 1)).
    both = [
        *runs_of(DIRECT, STEPS, "protocol=direct"),
        *runs_of(EQUAL, dict.fromkeys(STEPS, 32.0), "protocol=first_step"),
    ]
    direct, equal = orderings(summarize(make_table(both, by="protocol")))
    assert (direct.protocol, direct.rows, equal.protocol, equal.rows) == ("direct", 4, "first_step", 4)
    assert [direct.span, equal.span] == pytest.approx([15, 7])
    assert direct.first_step == pytest.approx(1 - 6 * (1 + 1) / 60)  # qkv, att, lora, depth and att, qkv, lora, depth
    assert equal.first_step is None
    sizes = {run.row.tensor_mode: run.size.parameters or 0 for run in both}
    by_size = sorted(STEPS, key=lambda mode: sizes[mode])
    by_score = sorted(STEPS, key=lambda mode: DIRECT[mode])
    squares = sum((by_size.index(mode) - by_score.index(mode)) ** 2 for mode in STEPS)
    assert direct.parameters == pytest.approx(1 - 6 * squares / 60)
    # By their scores at equal first steps: qkv, depth, lora, att
    assert equal.first_step_under_first == pytest.approx(1 - 6 * (4 + 4) / 60)
    assert equal.scores_under_first == pytest.approx(1 - 6 * (9 + 1 + 4) / 60)
    assert (direct.first_step_under_first, direct.scores_under_first) == (None, None)


def test_a_table_shows_them_and_a_sweep_of_a_setting_has_none() -> None:
    summary = summarize(make_table(runs_of(DIRECT, STEPS)))
    text = to_markdown(summary)
    (line,) = re.findall(r"## What orders the rows\n\n.*\n\n.*\n.*\n(.*)\n", text)
    assert line.startswith("| dtd with vit_base | 4 | 15.0 | 0.80 | ")
    html = to_html(summary)
    assert 'id="ordering-table"' in html
    assert '<td class="number">0.80</td>' in html
    assert "What orders the rows" not in to_markdown(summarize(make_table(runs_of(DIRECT, STEPS)[:3])))
    assert orderings(summarize(swept_table("adapter.alpha", ["1", "4", "16"]))) == []
