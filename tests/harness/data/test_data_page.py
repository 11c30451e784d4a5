"""The blocks of docs/data.md, run one after the other as a reader would run them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tenslora.harness.data import load_dataset
from tenslora.harness.evaluate import scores_of
from tenslora.harness.load_run import load_run
from tests.commands import Command, Commands
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "data.md").read_text()
SECTIONS = [section for section in re.split(r"(?m)^## ", PAGE) if "```sh\n" in section]


def run_blocks(text: str, folder: Path, commands: Commands, *more: str) -> list[str]:
    """Run the Python and shell blocks of a text in a folder, and return what each command logged.

    `more` is added to each command.
    """
    logged = []
    for language, block in re.findall(r"```(python|sh)\n(.*?)```", text, re.DOTALL):
        if language == "python":
            exec(compile(block, "docs/data.md", "exec"), {})
            continue
        for line in block.replace("\\\n", " ").splitlines():
            python, script, *words = shlex.split(line)
            assert python == "python"
            ended = commands.run(Command(script, [*words, *more], folder))
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
            check_finished(log, tmp_path)


def check_finished(log: str, folder: Path) -> None:
    """Check that a run, whose folder is in its log, scores again what its record says, and predicts what it did."""
    record = re.search(r"record: (.+)/result\.json", log)
    assert record
    loaded = load_run(folder / record[1])
    evaluation = loaded.evaluate()
    (split, kept), *_ = evaluation.predictions.items()
    assert {f"{split}_loss": evaluation.loss, **evaluation.scores} == scores_of(loaded.record)
    inputs = load_dataset(loaded.run.dataset, loaded.run.seed).scored.inputs
    predictions = loaded.predict([inputs[index] for index in range(len(inputs))])
    names = [loaded.classes[number] for number in kept.predicted] if loaded.classes else kept.predicted.tolist()
    assert [each.answer for each in predictions] == names
