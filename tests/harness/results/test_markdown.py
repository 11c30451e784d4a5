"""A table as Markdown, read back cell by cell."""

from __future__ import annotations

import re
from dataclasses import replace

from tenslora.harness.results.markdown import to_markdown
from tenslora.harness.results.summary import COMPARISON_HEADS, summarize
from tests.tables import COLA, make_run, make_table, sample_table

THREE_ROWS = [
    *(make_run("qkv", "isorank", seed=s, epochs=[score]) for s, score in enumerate((0.5, 0.6, 0.7))),
    *(make_run("lora", seed=s, epochs=[score]) for s, score in enumerate((0.4, 0.6, 0.5))),
    make_run("full", seed=0, epochs=[0.95]),
]


def cells(line: str) -> list[str]:
    """The texts of one line of a Markdown table."""
    return [text.strip() for text in re.split(r"(?<!\\)\|", line)[1:-1]]


def tables(text: str) -> list[list[list[str]]]:
    """The cells of each Markdown table, with its head and the line below it."""
    blocks = [block for block in text.split("\n\n") if block.startswith("| ")]
    return [[cells(line) for line in block.splitlines()] for block in blocks]


def test_a_line_is_label_ranks_counts_and_score_lora_first() -> None:
    main, against_lora, _ = tables(to_markdown(summarize(make_table(THREE_ROWS))))
    assert main == [
        ["construction", "ranks", "parameters", "% of LoRA", "first step", "dtd (accuracy, vit_base)", "paper"],
        ["---", "---", "---:", "---:", "---:", "---:", "---:"],
        ["lora", "4", "221,184", "100.0", "1.00", "50.0 ± 10.0", "73.13"],
        ["qkv isorank", "4, 4, 4", "74,640", "33.7", "0.12", "**60.0** ± 10.0", ""],
        ["full", "-", "-", "-", "-", "95.0", ""],
    ]
    assert against_lora[0] == ["construction", *COMPARISON_HEADS]
    interval = "[\N{MINUS SIGN}14.84, +34.84]"
    assert against_lora[2] == ["qkv isorank", "+10.00", interval, "0.225", "0.225", "0.5000 (0.2500)", "32.64", "3"]


def test_a_swept_setting_has_a_table_of_its_own() -> None:
    runs = [make_run("att", "isorank", epochs=[0.5 + k / 10], variant=(f"adapter.alpha={k}",)) for k in range(2)]
    text = to_markdown(summarize(make_table(runs)))
    assert "## dtd (vit_base) by adapter.alpha" in text
    assert tables(text)[1] == [
        ["construction", "0", "1"],
        ["---", "---:", "---:"],
        ["att isorank", "50.0", "**60.0**"],
    ]


def test_other_scores_have_a_table_of_their_own() -> None:
    runs = [make_run("lora", seed=seed, epochs=[0.5], column=COLA) for seed in range(2)]
    for run, accuracy in zip(runs, (0.6, 0.7), strict=True):
        assert run.record
        run.record["metrics"]["others_last"] = {"accuracy": accuracy, "accuracy_mismatched": 0.25}
    text = to_markdown(summarize(make_table([*runs, make_run("att", "isorank", column=COLA)])))
    assert "## Other scores on cola (minilm)" in text
    assert tables(text)[1] == [
        ["construction", "accuracy", "accuracy_mismatched"],
        ["---", "---:", "---:"],
        ["lora", "65.0 ± 7.1", "25.0 ± 0.0"],
    ]


def test_failures_are_listed_in_a_line_each() -> None:
    runs = [
        make_run("depth", "isorank", seed=1, problem="out of | memory"),
        make_run("att_depth", "isorank", seed=2, column=COLA, problem="diverged\nat step 3"),
        make_run("lora"),
    ]
    text = to_markdown(summarize(make_table(runs)))
    assert [line for line in text.splitlines() if line.startswith("- ")] == [
        r"- depth isorank, dtd with vit_base, seed 1: out of \| memory",
        "- att_depth isorank, cola with minilm, seed 2: diverged at step 3",
    ]


def test_sections_without_content_are_left_out() -> None:
    assert "## The paper's claims" in to_markdown(summarize(sample_table()))
    text = to_markdown(summarize(make_table([make_run("lora", epochs=[0.5])])))
    for heading in ("## The paper's claims", "## Against LoRA", "Failed:"):
        assert heading not in text


def test_every_line_is_as_wide_as_its_head_and_markup_is_escaped() -> None:
    text = to_markdown(summarize(replace(sample_table(), title="a | b", notes=("one | two",))))
    assert len(tables(text)) == 4
    for table in tables(text):
        assert len({len(line) for line in table}) == 1
    assert r"# a \| b" in text
    assert r"one \| two" in text
