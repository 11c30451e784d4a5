"""All files of a table."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tenslora.harness.results import write_results
from tests.conftest import ROOT
from tests.tables import make_run, make_table


def test_every_form_is_written_and_nothing_else(small_results: list[Path]) -> None:
    folder = small_results[0].parent
    drawn = ("score_vs_parameters", "learning_curves", "score_vs_first_step")
    figures = [f"figures/{name}.{kind}" for name in drawn for kind in ("png", "svg")]
    names = ["table.md", "table.tex", "table.csv", "against_lora.csv", "claims.csv", *figures, "report.html"]
    assert small_results == [folder / name for name in names]
    assert {path for path in folder.rglob("*") if path.is_file()} == set(small_results)
    assert all(path.stat().st_size for path in small_results)


def test_before_the_first_score_there_are_no_figures(tmp_path: Path) -> None:
    paths = write_results(make_table([make_run("lora"), make_run("att", "isorank")]), tmp_path)
    assert [path.name for path in paths] == [
        "table.md",
        "table.tex",
        "table.csv",
        "against_lora.csv",
        "claims.csv",
        "report.html",
    ]
    text = paths[-1].read_text()
    assert "0 of 2 runs finished, 2 missing." in text
    assert 'role="img"' not in text


def test_another_process_writes_the_same_bytes_without_torch(small_results: list[Path], tmp_path: Path) -> None:
    command = [sys.executable, str(Path(__file__).parent / "write_sample.py"), str(tmp_path)]
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    before, after = done.stdout.splitlines()
    assert before == "", "heavy libraries are loaded only when a table is written"
    assert "matplotlib" in after and "torch" not in after
    folder = small_results[0].parent
    for path in small_results:
        assert (tmp_path / path.relative_to(folder)).read_bytes() == path.read_bytes()
