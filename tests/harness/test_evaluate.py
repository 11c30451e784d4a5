"""The command that scores a finished run again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tenslora.harness.evaluate import main, scores_of
from tenslora.harness.run_folder import RunFolder
from tests.running import SHORT, record, run


def scores(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, float]:
    main([*words, "--format", "jsonl"])
    printed = json.loads(capsys.readouterr().out)
    return {name: value for name, value in printed.items() if name not in ("dataset", "examples")}


@pytest.mark.parametrize("finished", ["digits_run", "sentences_run"])
def test_the_scores_are_those_of_the_record_to_the_last_digit(
    finished: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = request.getfixturevalue(finished)
    assert scores(capsys, str(folder)) == scores_of(RunFolder(folder).read_record())
    main([str(folder)])
    first, *lines = capsys.readouterr().out.splitlines()
    assert f"{record(folder)['test_examples']} test examples" in first
    assert all(line.split()[1] == line.split()[-1] for line in lines)


def test_a_validation_split_or_the_test_split_is_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, *SHORT, "dataset.validation=0.3", "trainer.precision=bf16")
    assert scores(capsys, str(tmp_path)) == scores_of(record(tmp_path))
    on_test = scores(capsys, str(tmp_path), "dataset.validation=null")
    assert list(on_test) == ["test_loss", "accuracy"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("dataset.root=/nowhere", "dataset.root=/nowhere: no such folder"),
        ("dataset.rot=x", "dataset.rot: there is no such setting; did you mean dataset.root"),
        ("optimizer.lr=1", "optimizer.lr=1: must be written as dataset.<setting>=<value>"),
        ("dataset=cola", "dataset=cola: must be written as dataset.<setting>=<value>"),
        ("dataset.root", "dataset.root: must be written as"),
    ],
)
def test_a_mistake_is_one_line(word: str, message: str, sentences_run: Path) -> None:
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        main([str(sentences_run), word])
