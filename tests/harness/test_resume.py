"""Real runs of train.py, killed with SIGKILL at chosen points and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import Command, Commands, Ended
from tests.running import SHORT, record

SETTINGS = [*SHORT, "trainer.epochs=3", "trainer.batch_size=16", "adapter.dropout=0.2", "dataset.transform.flip=true"]
STEPS_PER_EPOCH = 4

KILLS = [
    "kill step 2",  # in the first epoch: there is nothing to resume from
    "kill write checkpoint.safetensors 1",
    f"kill step {STEPS_PER_EPOCH + 3}",  # in the second epoch
    "kill rename checkpoint.safetensors 1",
    "kill write checkpoint.safetensors 2",  # in the third epoch
    "kill write adapter.safetensors 1",
    "kill rename result.json 1",
]


@pytest.mark.slow
def test_a_run_killed_anywhere_and_resumed_equals_one_that_was_not(commands: Commands, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def train(folder: Path, *words: str, accident: str = "") -> Ended:
        return commands.run(Command("train.py", [*SETTINGS, f"hydra.run.dir={folder}", *words], tmp_path, accident))

    assert train(whole).status == 0
    for kill in KILLS:
        ended = train(broken, "resume=true", accident=kill)
        assert ended.status == -9, f"{kill}: {ended.err}"
    assert train(broken, "resume=true").status == 0
    assert train(whole, "resume=true", accident="kill step 1").status == 0  # makes no step, and so is not killed
    refused = train(whole, "resume=true", "optimizer.lr=0.5")
    assert refused.status == 1
    assert "is of a run with other settings" in refused.err.splitlines()[-1]

    assert len(record(whole)["metrics"]["history"]) == 3
    assert record(broken)["metrics"] == record(whole)["metrics"]
    for file in ("adapter.safetensors", "head.safetensors", "predictions.safetensors"):
        assert (broken / file).read_bytes() == (whole / file).read_bytes()
