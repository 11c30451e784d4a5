from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tenslora.harness.run_folder import RunFolder
from tests.conftest import ROOT
from tests.running import record, run


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    # Of 65 examples in batches of 32 the last batch holds one, so that one process has none of it.
    overrides = ["trainer.epochs=1", "trainer.batch_size=32", "dataset.train_size=65", "trainer.device=cpu"]
    overrides += ["trainer.clip_norm=1.0", "dataset.transform.flip=true"]
    run(tmp_path / "one", *overrides)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    command = [*launch, *overrides, f"hydra.run.dir={tmp_path / 'two'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    one, two = record(tmp_path / "one"), record(tmp_path / "two")
    assert (one["processes"], two["processes"]) == (1, 2)
    for alone, shared in zip(one["metrics"]["history"], two["metrics"]["history"], strict=True):
        assert shared == pytest.approx(alone, abs=1e-5)
    for file in ("adapter.safetensors", "head.safetensors"):
        ours, theirs = load_file(tmp_path / "one" / file), load_file(tmp_path / "two" / file)
        for name, tensor in ours.items():
            torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-5)
    alone, shared = (RunFolder(tmp_path / name).read_predictions()["test"] for name in ("one", "two"))
    assert np.array_equal(alone.labels, shared.labels)
    np.testing.assert_allclose(alone.outputs, shared.outputs, atol=2e-3)
