"""Finished runs, loaded: the model scores what the record says."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tenslora.attachment import adapter_of
from tenslora.errors import TensLoRAError
from tenslora.harness.backbones import EMBEDDED
from tenslora.harness.load_run import load_run
from tenslora.harness.run_folder import RunFolder
from tests.running import SHORT, accuracy_of, record, run


@pytest.mark.parametrize("finished", ["digits_run", "sentences_run"])
def test_a_run_with_an_adapter_scores_what_its_record_says(finished: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(finished)
    loaded = load_run(folder)
    assert adapter_of(loaded.backbone.model).ranks == tuple(loaded.record["ranks"])
    assert accuracy_of(loaded) == record(folder)["metrics"]["history"][-1]["accuracy"]


def test_full_fine_tuning_scores_what_its_record_says(tmp_path: Path) -> None:
    run(tmp_path, *SHORT, "tensor_mode=full", "optimizer.lr=0.001")
    assert accuracy_of(load_run(tmp_path)) == record(tmp_path)["metrics"]["last"]


def test_the_backbone_may_have_moved(digits_run: Path, tmp_path: Path) -> None:
    shutil.copy(EMBEDDED, tmp_path / "moved.safetensors")
    loaded = load_run(digits_run, str(tmp_path / "moved.safetensors"))
    assert accuracy_of(loaded) == record(digits_run)["metrics"]["last"]


def test_a_run_that_left_no_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TensLoRAError, match=r"result\.json: not a readable record"):
        load_run(tmp_path)
    RunFolder(tmp_path).write_record({"status": "diverged"})
    with pytest.raises(TensLoRAError, match=rf"^{tmp_path}: the run has diverged; it left no weights$"):
        load_run(tmp_path)
