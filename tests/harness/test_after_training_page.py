"""The blocks of docs/after_training.md, run one after the other as a reader would run them."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.running import run

pytestmark = pytest.mark.slow

DOCS = ROOT / "docs"


def test_the_pages_blocks_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(next(block for block in _blocks("data.md", "python") if 'open("reviews.csv", "w"' in block), {})
    for block in _blocks("after_training.md", "python|sh"):
        if not block.startswith("python "):
            exec(block, {})
            continue
        for line in block.replace("\\\n", " ").splitlines():
            script, *words = shlex.split(line)[1:]
            if script == "-m":
                importlib.import_module(words[0]).main(words[1:])
            else:
                (folder,) = (word for word in words if word.startswith("hydra.run.dir="))
                run(Path(folder.partition("=")[2]), *(word for word in words if word != folder))
    printed = capsys.readouterr().out
    assert re.search(r"6\.png +6 +6 0\.\d{4}", printed)
    assert re.search(r"The train was late\. +travel +travel", printed)
    assert re.search(r"accuracy +(\S+) +in the record: \1\n", printed)
    assert (tmp_path / "predicted.csv").read_text().startswith("text,label,prediction,probability_food")
    assert (tmp_path / "runs" / "digits" / "merged" / "config.json").is_file()


def _blocks(page: str, languages: str) -> list[str]:
    return re.findall(rf"```(?:{languages})\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
