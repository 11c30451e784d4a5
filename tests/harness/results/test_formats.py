from __future__ import annotations

import csv as csv_module
import io
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tenslora.harness.results.formats import csv, latex, markdown
from tenslora.harness.results.table import Run
from tests.conftest import ROOT
from tests.tables import COLA, DTD, made, table, whole


def cells_of(line: str) -> list[str]:
    return [text.strip() for text in re.split(r"(?<!\\)\|", line)[1:-1]]


def md_table(text: str, number: int = 0) -> list[list[str]]:
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    return [cells_of(line) for line in blocks[number]]


THREE = [
    *(made("qkv", "isorank", seed=s, epochs=[0.9, score]) for s, score in enumerate((0.5, 0.6, 0.7))),
    *(made("lora", seed=s, epochs=[0.1, score]) for s, score in enumerate((0.4, 0.6, 0.5))),
    made("full", seed=0, epochs=[0.95]),
]


def test_a_line_is_label_ranks_counts_and_mean_with_deviation_lora_first() -> None:
    lines = md_table(markdown(table(THREE)))
    assert lines[0] == ["construction", "ranks", "parameters", "% of LoRA", "dtd (accuracy, vit_base)", "paper"]
    assert lines[2:] == [
        ["lora", "4", "221,184", "100.0", "50.0 ± 10.0", "73.13"],
        ["qkv isorank", "4, 4, 4", "74,640", "33.7", "**60.0** ± 10.0", ""],
        ["full", "-", "-", "-", "95.0", ""],
    ]


def test_a_setting_that_is_swept_stands_across_once_more() -> None:
    runs = [
        *(made("qkv", "isorank", seed=s, epochs=[0.4 + s / 10], variant=("adapter.init=normal",)) for s in range(2)),
        made("qkv", "isorank", epochs=[0.6], variant=("adapter.init=orthogonal",)),
        made("att", "isorank", epochs=[0.3], variant=("adapter.init=orthogonal",)),
        made("lora", epochs=[0.5]),  # which starts as it starts
    ]
    text = markdown(table(runs))
    assert "## dtd (vit_base) by adapter.init" in text
    grid = md_table(text.partition("by adapter.init")[2])
    assert grid[0] == ["construction", "normal", "orthogonal"]
    assert grid[2:] == [
        ["lora", "50.0", "50.0"],
        ["att isorank", "", "30.0"],
        ["qkv isorank", "45.0 ± 7.1", "**60.0**"],
    ]
    assert r"\label{tab:sample-by-setting}" in latex(table(runs))
    both = latex(table([*runs, made("lora", column=COLA, epochs=[0.5])]))
    assert r"\label{tab:sample-by-setting-1}" in both and r"\label{tab:sample-by-setting-2}" in both
    assert "by adapter.init" not in markdown(table(THREE))


def test_the_caption_tells_which_score_is_shown() -> None:
    last, best = markdown(table(THREE)), markdown(table(THREE, score="best"))
    assert "after the last epoch in per cent, mean ± standard deviation over 1 to 3 seeds" in last
    assert "of the best epoch" in best
    assert md_table(best)[3][4] == "**90.0** ± 0.0"


def test_the_paper_stands_beside_only_the_columns_that_it_has() -> None:
    runs = [made("lora", epochs=[0.5], column=column) for column in (DTD, COLA)]
    runs += [made("qkv_depth", strategy, epochs=[0.5]) for strategy in ("isorank", "isoparameters")]
    runs += [made("qkv_depth", "isorank", epochs=[0.5], variant=("alpha=8",))]
    lines = md_table(markdown(table(runs)))
    assert lines[0][4:] == ["dtd (accuracy, vit_base)", "paper", "cola (matthews, minilm)"]
    assert {line[0]: line[5] for line in lines[2:]} == {
        "lora": "73.13", "qkv_depth isorank": "71.59", "qkv_depth isoparameters": "74.13",
        "qkv_depth isorank alpha=8": "",
    }  # fmt: skip


def test_counts_that_differ_between_backbones_stand_side_by_side() -> None:
    rows = (("lora", ""), ("att", "isorank"))
    runs = [made(mode, strategy, epochs=[0.5], column=column) for mode, strategy in rows for column in (DTD, COLA)]
    text = markdown(table(runs))
    assert md_table(text)[3][1:4] == ["4, 4, 4", "123,840 / 31,968", "56.0 / 57.8"]
    assert "differ between backbones: vit_base / minilm." in text


def test_all_that_show_the_best_mean_are_bold() -> None:
    scores = {"att": 0.70012, "qkv": 0.69951, "depth": 0.6994}
    runs = [made(mode, "isorank", epochs=[score]) for mode, score in scores.items()]
    shown = [line[4] for line in md_table(markdown(table(runs)))[2:]]
    assert shown == ["**70.0**", "**70.0**", "69.9"]


def test_a_cell_tells_what_it_lacks_and_a_list_tells_why() -> None:
    def cell(mode: str, *problems: str) -> list[Run]:
        return [made(mode, "isorank", seed=s, epochs=[] if p else [0.5], problem=p) for s, p in enumerate(problems)]

    runs = [
        *cell("att", "", "", ""),
        *cell("qkv", "", "missing", ""),
        *cell("depth", "", "out of | memory", "missing"),
        *cell("att_qkv", "missing", "missing", "missing"),
        *cell("att_depth", "missing", "diverged\nat step 3", "missing"),
    ]
    text = markdown(table(runs))
    assert [line[4] for line in md_table(text)[2:]] == [
        "**50.0** ± 0.0",
        "**50.0** ± 0.0 (2 of 3 seeds)",
        "**50.0** (1 of 3 seeds, 1 failed)",
        "missing",
        "failed",
    ]
    assert [line for line in text.splitlines() if line.startswith("- ")] == [
        r"- depth isorank, dtd with vit_base, seed 1: out of \| memory",
        "- att_depth isorank, dtd with vit_base, seed 1: diverged at step 3",
    ]


def test_against_lora_is_a_paired_t_test_in_points() -> None:
    # Differences 10, 0 and 20 points: 10 ± t(0.975; 2) 10 / sqrt 3, with t = 4.30265 from a printed table.
    text = markdown(table(THREE))
    assert "two-sided paired t-test" in text
    assert "not corrected for the number of comparisons" in text
    assert md_table(text, 1)[2:] == [
        ["qkv isorank", "dtd", "vit_base", "+10.00", "[\N{MINUS SIGN}14.84, +34.84]", "0.225", "3"],
        ["full", "dtd", "vit_base", "+55.00", "-", "-", "1"],
    ]


def test_without_lora_there_is_nothing_against_it() -> None:
    assert "Against LoRA" not in markdown(table([run for run in THREE if run.row.tensor_mode != "lora"]))
    assert "against-lora" not in latex(table([run for run in THREE if run.row.tensor_mode != "lora"]))


def test_the_papers_claims_follow_where_there_are_any() -> None:
    assert "## The paper's claims" in markdown(whole())
    assert "## The paper's claims" not in markdown(table([made("lora", epochs=[0.5])]))


def test_every_markdown_row_is_as_wide_as_its_head() -> None:
    text = markdown(replace(whole(), title="a | b", notes=("one | two",)))
    for block in text.split("\n\n"):
        if block.startswith("| "):
            assert len({len(cells_of(line)) for line in block.splitlines()}) == 1
    assert r"# a \| b" in text
    assert r"one \| two" in text


def width(row: str) -> int:
    cells = re.split(r"(?<!\\)&", row.removesuffix(r"\\"))
    return sum(int(found[1]) if (found := re.match(r"\s*\\multicolumn\{(\d+)\}", cell)) else 1 for cell in cells)


@pytest.mark.parametrize("columns", [(DTD,), (DTD, COLA)], ids=["one column", "two columns"])
def test_latex_is_well_formed(columns: tuple[object, ...]) -> None:
    runs = tuple(run for run in whole().runs if run.column in columns)
    text = latex(replace(whole(), runs=runs, title="50 % of_a & b # c", notes=("{x} ~ $y^2$ \\ <z>",)))
    assert text.startswith("% Needs \\usepackage{booktabs}.\n")
    begun, ended = (re.findall(rf"\\{word}\{{(\w+)\}}", text) for word in ("begin", "end"))
    assert sorted(begun) == sorted(ended) == ["table", "table", "tabular", "tabular"]
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")
    assert len(re.findall(r"(?<!\\)\$", text)) % 2 == 0
    for tabular in re.findall(r"\\begin\{tabular\}(.*?)\\end\{tabular\}", text, flags=re.DOTALL):
        alignment = re.match(r"\{([lcr]+)\}", tabular)
        rows = [line for line in tabular.splitlines() if line.endswith(r"\\")]
        assert alignment and {width(row) for row in rows} == {len(alignment[1])}
        assert [tabular.count(rule) for rule in (r"\toprule", r"\bottomrule")] == [1, 1]
    for line in text.splitlines():
        if not line.startswith("%") and r"\label" not in line:
            assert not re.search(r"(?<!\\)[%#_]", line)
    assert r"50 \% of\_a \& b \# c" in text
    assert r"\{x\} \textasciitilde{} \$y\textasciicircum{}2\$ \textbackslash{} $<$z$>$" in text


def test_latex_sets_lora_and_the_reference_rows_off_by_rules() -> None:
    body = latex(table(THREE)).partition(r"\end{tabular}")[0].splitlines()
    names = [line.split(" & ")[0] for line in body[body.index(r"\toprule") :]]
    assert [n for n in names if not n.startswith(r"\cmidrule")][2:] == [
        r"construction", r"\midrule", "lora", r"\midrule", "qkv isorank", r"\midrule", "full", r"\bottomrule",
    ]  # fmt: skip
    assert r"qkv isorank & 4, 4, 4 & 74,640 & 33.7 & \textbf{60.0} $\pm$ 10.0 &  \\" in body


def parsed(text: str) -> list[dict[str, str]]:
    return list(csv_module.DictReader(io.StringIO(text)))


def test_csv_has_a_line_for_every_run_in_the_tables_order() -> None:
    sample = whole()
    lines = parsed(csv(replace(sample, runs=tuple(reversed(sample.runs)))))
    assert len(lines) == len(sample.runs)
    keys = [(line["dataset"], line["tensor_mode"], line["rank_strategy"], int(line["seed"])) for line in lines]
    assert keys[:3] == [("cola", "lora", "", 0), ("cola", "lora", "", 1), ("cola", "lora", "", 2)]
    assert [line["status"] for line in lines].count("failed") == 1
    assert [line["status"] for line in lines].count("missing") == 1


def test_csv_holds_what_was_recorded_at_full_precision() -> None:
    run = made("qkv", "isorank", seed=3, epochs=[0.1 + 0.2, 1 / 3, 0.2], variant=("a=1", "b=2"))
    (line,) = parsed(csv(table([run])))
    assert line == {
        "dataset": "dtd", "model": "vit_base", "tensor_mode": "qkv", "rank_strategy": "isorank", "variant": "a=1;b=2",
        "seed": "3", "digest": "qkv-isorank-dtd-3", "status": "completed", "metric": "accuracy", "last": "0.2",
        "best": "0.3333333333333333", "best_epoch": "2", "epochs": "3", "steps": "48", "ranks": "4 4 4",
        "adapter_parameters": "74640", "lora_parameters": "221184", "percent_of_lora": repr(100 * 74640 / 221184),
        "head_parameters": "325", "train_examples": "1000", "test_examples": "400", "problem": "",
    }  # fmt: skip


def test_csv_gives_no_score_of_a_run_that_has_failed_and_the_plan_of_one_that_is_missing() -> None:
    runs = [made("att", "isorank", epochs=[0.5], problem="diverged"), made("qkv", "isorank")]
    failed, missing = parsed(csv(table(runs)))
    assert (failed["status"], failed["last"], failed["best"], failed["epochs"]) == ("failed", "", "", "1")
    assert failed["problem"] == "diverged"
    assert (failed["adapter_parameters"], failed["ranks"]) == ("123840", "4 4 4")
    assert (missing["status"], missing["adapter_parameters"], missing["ranks"]) == ("missing", "74640", "4 4 4")


def test_csv_depends_on_no_time_place_or_version() -> None:
    def elsewhere(run: Run) -> Run:
        if run.record is None:
            return run
        other = {"versions": {"torch": "9.9"}, "platform": "elsewhere", "git": None}
        return replace(run, record={**run.record, "seconds": {"train": 99.0}, "device": "cpu", "environment": other})

    sample = whole()
    assert csv(replace(sample, runs=tuple(map(elsewhere, sample.runs)))) == csv(sample)


def test_the_results_room_needs_no_torch_and_loads_heavy_libraries_only_in_use() -> None:
    asked = (
        "import sys; from tenslora.harness.results import figures, formats, report, table;"
        "print([name for name in ('torch', 'matplotlib', 'jinja2', 'scipy', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_form_of_a_table_needs_torch(tmp_path: Path) -> None:
    asked = (
        "import sys, pathlib; from tests.tables import made, table; from tenslora.harness.results import write_results;"
        "sample = table([made('lora', epochs=[.5, .6]), made('qkv', 'isorank', epochs=[.5, .6])]);"
        "write_results(sample, pathlib.Path(sys.argv[1])); print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", asked, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
