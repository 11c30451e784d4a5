"""A table as LaTeX, checked for its structure without a TeX."""

from __future__ import annotations

import re
from dataclasses import replace

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
    assert text.startswith("% Needs \\usepackage{booktabs}.\n")
    begun, ended = (re.findall(rf"\\{word}\{{(\w+)\}}", text) for word in ("begin", "end"))
    assert sorted(begun) == sorted(ended) == ["table", "table", "tabular", "tabular"]
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
        "construction", r"\midrule", "lora", r"\midrule", "qkv isorank", r"\midrule", "full", r"\bottomrule",
    ]  # fmt: skip
    assert r"qkv isorank & 4, 4, 4 & 74,640 & 33.7 & \textbf{60.0} $\pm$ 10.0 &  \\" in body
    assert r"full & -- & -- & -- & 95.0 &  \\" in body


def test_each_table_has_its_label() -> None:
    def labels(*columns: Column) -> list[str]:
        runs = [replace(run, column=column) for column in columns for run in swept_table("adapter.init", "ab").runs]
        return re.findall(r"\\label\{(.*)\}", to_latex(summarize(make_table(runs))))

    assert labels(DTD) == ["tab:sample", "tab:sample-by-setting", "tab:sample-against-lora"]
    assert labels(DTD, COLA) == [
        "tab:sample",
        "tab:sample-by-setting-1",
        "tab:sample-by-setting-2",
        "tab:sample-against-lora",
    ]
    assert "against-lora" not in to_latex(summarize(make_table([make_run("lora", epochs=[0.5])])))
