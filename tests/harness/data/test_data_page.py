"""The blocks of docs/data.md, run one after the other as a reader would run them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.commands import Command, Commands
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "data.md").read_text()
SECTIONS = [section for section in re.split(r"(?m)^## ", PAGE) if "```sh\n" in section]


def run_blocks(text: str, folder: Path, commands: Commands) -> list[str]:
    """Run the Python and shell blocks of a text in a folder, and return what each command logged."""
    logged = []
    for language, block in re.findall(r"```(python|sh)\n(.*?)```", text, re.DOTALL):
        if language == "python":
            exec(compile(block, "docs/data.md", "exec"), {})
            continue
        for line in block.replace("\\\n", " ").splitlines():
            python, script, *words = shlex.split(line)
            assert python == "python"
            ended = commands.run(Command(script, words, folder))
            assert ended.status == 0, ended.err
            logged.append(ended.out + ended.err)
    return logged


def test_the_pages_blocks_run(tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for section in SECTIONS:
        title = section.splitlines()[0]
        logged = run_blocks(section, tmp_path, commands)
        assert logged, title
        for log in logged:
            score = re.search(r"last (\S+), best", log)
            assert score and float(score[1]) > 0.5, f"{title}: {log}"  # chance is at most 1 in 3
