"""A table as LaTeX: its structure, and where there is a TeX, its width."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tenslora.harness.results.latex import to_latex
from tenslora.harness.results.summary import summarize
from tenslora.harness.results.table import Column
from tests.tables import COLA, DTD, make_run, make_table, sample_table, swept_table


def width(row: str) -> int:
    """How many LaTeX columns a row of a tabular fills."""
    cells = re.split(r"(?<!\\)&", row.removesuffix(r"\\"))
    spans = [re.match(r"\s*\\multicolumn\{(\d+)\}", cell) for cell in cells]
    return sum(int(span[1]) if span else 1 for span in spans)


@pytest.mark.parametrize("columns", [(DTD,), (DTD, COLA)], ids=["one column", "two columns"])
def test_latex_is_well_formed(columns: tuple[Column, ...]) -> None:
    table = sample_table(columns)
    text = to_latex(summarize(replace(table, title="50 % of_a & b # c", notes=("{x} ~ $y^2$ \\ <z>",))))
    assert text.startswith("% Needs \\usepackage{booktabs,graphicx}.\n")
    begun, ended = (re.findall(rf"\\{word}\{{(\w+)\}}", text) for word in ("begin", "end"))
    # the scores, with the sizes beside them or in a table of their own, the comparison and the verdicts
    assert sorted(begun) == sorted(ended) == sorted(["table", "tabular"] * (2 + len(columns)))
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")
    assert len(re.findall(r"(?<!\\)\$", text)) % 2 == 0
    for tabular in re.findall(r"\\begin\{tabular\}(.*?)\\end\{tabular\}", text, flags=re.DOTALL):
        alignment = re.match(r"\{([lcr]+)\}", tabular)
        rows = [line for line in tabular.splitlines() if line.endswith(r"\\")]
        assert alignment
        assert {width(row) for row in rows} == {len(alignment[1])}
        assert [tabular.count(rule) for rule in (r"\toprule", r"\bottomrule")] == [1, 1]
    for line in text.splitlines():
        if not line.startswith("%") and r"\label" not in line:
            assert not re.search(r"(?<!\\)[%#_]", line)
    assert r"50 \% of\_a \& b \# c" in text
    assert r"\{x\} \textasciitilde{} \$y\textasciicircum{}2\$ \textbackslash{} $<$z$>$" in text


def test_a_row_that_lacks_a_backbone_has_no_sizes_there() -> None:
    pairs = [("lora", "", DTD), ("lora", "", COLA), ("att", "isorank", COLA)]
    runs = [make_run(mode, strategy, epochs=[0.5], column=column) for mode, strategy, column in pairs]
    sizes = to_latex(summarize(make_table(runs))).partition("tab:sample-sizes")[2]
    assert r"lora & 4 & 221,184 & 100.0 & 1.00 & 4 & 55,296 & 100.0 & 1.00 \\" in sizes.splitlines()
    assert r"att & -- & -- & -- & -- & 4, 4, 4 & 31,968 & 57.8 & 0.12 \\" in sizes.splitlines()


def test_a_superscript_counts_the_seeds_with_a_score() -> None:
    runs = [make_run("lora", seed=seed, epochs=[0.5] * (seed < 2)) for seed in range(3)]
    text = to_latex(summarize(make_table(runs)))
    assert r"\textbf{50.0} $\pm$ 0.0$^{2/3}$ &" in text
    assert "A superscript counts the seeds that have a score where some have none." in text
    assert "superscript" not in to_latex(summarize(make_table(runs[:2])))


@pytest.mark.parametrize("columns", [(DTD,), (DTD, COLA)], ids=["one column", "two columns"])
def test_no_table_is_wider_than_the_text_of_an_article(columns: tuple[Column, ...], tmp_path: Path) -> None:
    if not (pdflatex := shutil.which("pdflatex")):
        pytest.skip("needs pdflatex")
    tables = to_latex(summarize(sample_table(columns)))
    document = rf"\documentclass{{article}}\usepackage{{booktabs,graphicx}}\begin{{document}}{tables}\end{{document}}"
    (tmp_path / "table.tex").write_text(document.replace(r"\begin{document}%", "\\begin{document}\n%"))
    command = [pdflatex, "-halt-on-error", "-draftmode", "table.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "Overfull" not in done.stdout


def test_rules_set_lora_and_the_reference_rows_apart() -> None:
    runs = [
        *(make_run("qkv", "isorank", seed=s, epochs=[score]) for s, score in enumerate((0.5, 0.6, 0.7))),
        make_run("lora", epochs=[0.5]),
        make_run("full", epochs=[0.95]),
    ]
    text = to_latex(summarize(make_table(runs)))
    body = text.partition(r"\end{tabular}")[0].partition(r"\toprule")[2].splitlines()
    names = [line.split(" & ")[0] for line in body if not line.startswith(r"\cmidrule")]
    assert names[2:] == [
        "construction", r"\midrule", "lora", r"\midrule", r"\multicolumn{7}{l}{\emph{isorank}} \\", "qkv", r"\midrule",
        "full", r"\bottomrule",
    ]  # fmt: skip
    assert r"qkv & 4, 4, 4 & 74,640 & 33.7 & 0.12 & \textbf{60.0} $\pm$ 10.0 &  \\" in body
    assert r"full & -- & -- & -- & -- & 95.0 &  \\" in body


def test_each_table_has_its_label() -> None:
    def labels(*columns: Column) -> list[str]:
        runs = [replace(run, column=column) for column in columns for run in swept_table("adapter.init", "ab").runs]
        return re.findall(r"\\label\{(.*)\}", to_latex(summarize(make_table(runs))))

    assert labels(DTD) == ["tab:sample", "tab:sample-by-setting", "tab:sample-against-lora"]
    assert labels(DTD, COLA) == [
        "tab:sample",
        "tab:sample-sizes",
        "tab:sample-by-setting-1",
        "tab:sample-by-setting-2",
        "tab:sample-against-lora",
    ]
    assert "against-lora" not in to_latex(summarize(make_table([make_run("lora", epochs=[0.5])])))


def test_a_label_is_one_that_latex_can_read() -> None:
    text = to_latex(summarize(replace(sample_table(), name="50%_a#b}\n~")))
    labels = re.findall(r"\\label\{(.*)\}$", text, re.MULTILINE)
    assert "tab:50-_a-b---" in labels
    assert all(re.fullmatch(r"tab:50-_a-b---[\w-]*", label) for label in labels)
