"""Training in two processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tenslora.harness.run_folder import RunFolder
from tests.commands import Command, Commands, started_by_torchrun
from tests.running import record, run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("quantization", ["null", "int8"])
def test_two_processes_train_what_one_does(quantization: str, commands: Commands, tmp_path: Path) -> None:
    # Of 65 examples in batches of 32 the last batch holds one, so that one process has none of it.
    overrides = ["trainer.epochs=1", "trainer.batch_size=32", "dataset.train_size=65", "trainer.device=cpu"]
    overrides += ["trainer.clip_norm=1.0", "dataset.transform.flip=true", f"model.quantization={quantization}"]
    run(tmp_path / "one", *overrides)
    command = Command("train.py", [*overrides, f"hydra.run.dir={tmp_path / 'two'}"], tmp_path)
    ends = commands.run_together(started_by_torchrun(command, 2))
    assert [ended.status for ended in ends] == [0, 0], ends
    one, two = record(tmp_path / "one"), record(tmp_path / "two")
    assert (one["processes"], two["processes"]) == (1, 2)
    for alone, both in zip(one["metrics"]["history"], two["metrics"]["history"], strict=True):
        assert both == pytest.approx(alone, abs=1e-5)
    for file in ("adapter.safetensors", "head.safetensors"):
        ours, theirs = load_file(tmp_path / "one" / file), load_file(tmp_path / "two" / file)
        for name, tensor in ours.items():
            torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-5)
    alone, both = (RunFolder(tmp_path / name).read_predictions()["test"] for name in ("one", "two"))
    assert np.array_equal(alone.labels, both.labels)
    np.testing.assert_allclose(alone.outputs, both.outputs, atol=2e-3)


def test_two_processes_with_different_settings_or_folders_are_refused(commands: Commands, tmp_path: Path) -> None:
    for word, name in (("seed", "seed"), ("hydra.run.dir", "the run's folder")):
        words = ["trainer.device=cpu", f"hydra.run.dir={tmp_path}/run", f"{word}=${{oc.env:RANK}}"]
        ends = commands.run_together(started_by_torchrun(Command("train.py", words, tmp_path), 2))
        for ended in ends:
            assert (ended.status, ended.err.count("\n")) == (1, 1)
            assert ended.err.startswith(f"error: {name}: must be the same in all processes that share a run, and is ")
    assert not list(tmp_path.rglob("checkpoint.safetensors"))
