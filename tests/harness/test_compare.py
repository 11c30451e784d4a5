"""The command that puts finished tables side by side."""

from __future__ import annotations

from pathlib import Path

import pytest

from tenslora.harness.compare import main
from tests.harness.results.test_protocols import ABOVE, BELOW, runs_of, written


def test_finished_tables_become_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    direct, tuned = (written(tmp_path, name, runs_of(gains)) for name, gains in (("d", BELOW), ("t", ABOVE)))
    out = tmp_path / "tables" / "joint"
    main([f"direct={direct}", f"tuned={tuned}", "--out", str(out)])
    files = capsys.readouterr().out.split()
    assert str(out / "claims.csv") in files
    assert all(Path(file).is_file() for file in files)
    html = (out / "report.html").read_text()
    assert f"python -m tenslora.harness.compare direct={direct}" in html
    assert f"tuned: {tuned}" in (out / "table.md").read_text()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["outputs/tables/digits"], "error: outputs/tables/digits: must be a protocol and a table's folder, such as"),
        (["a=nowhere"], "error: nowhere: must be the folder of a table, with its table.csv"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(words: list[str], line: str, tmp_path: Path) -> None:
    out = tmp_path / "joint"
    with pytest.raises(SystemExit) as ended:
        main([*words, "--out", str(out)])
    assert str(ended.value).startswith(line)
    assert "\n" not in str(ended.value)
    assert not out.exists()


def test_a_table_is_not_replaced_by_its_comparison(tmp_path: Path) -> None:
    folder = written(tmp_path, "d", runs_of(BELOW))
    before = (folder / "table.csv").read_bytes()
    with pytest.raises(SystemExit, match=r"^error: --out \S+: must not be one of the tables, which it would replace$"):
        main([f"direct={folder}", "--out", str(folder / ".." / "d")])
    assert (folder / "table.csv").read_bytes() == before
