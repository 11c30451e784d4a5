"""Runs of a backbone with batch norms, whose running statistics move in training although their weights are frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tenslora.errors import TensLoRAError
from tenslora.harness.backbones import load_backbone
from tenslora.harness.export import export
from tenslora.harness.load_run import load_run
from tenslora.harness.training.checkpoint import save_checkpoint
from tests.commands import Command, Commands, started_by_torchrun
from tests.running import SHORT, record, run

MOBILEVIT = [*SHORT, "model=timm", "model.architecture=mobilevit_xxs", "model.pretrained=false", "model.image_size=32"]
VARIANCE = "stem.bn.running_var"


class Stopped(Exception):
    """Stands in for the end of the process."""


def test_a_run_that_was_stopped_ends_as_one_that_was_not_and_is_loaded_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_and_stop(*args: Any) -> None:
        save_checkpoint(*args)
        raise Stopped

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(whole, *MOBILEVIT)
    with monkeypatch.context() as patched:
        patched.setattr("tenslora.harness.training.loop.save_checkpoint", save_and_stop)
        with pytest.raises(Stopped):
            run(broken, *MOBILEVIT)
    run(broken, *MOBILEVIT, "resume=true")
    for file in ("adapter.safetensors", "head.safetensors", "predictions.safetensors"):
        assert (broken / file).read_bytes() == (whole / file).read_bytes()
    is_scored_as_recorded(whole)
    is_exported_to_peft(whole, tmp_path / "peft")
    head = whole / "head.safetensors"
    saved = load_file(head)
    save_file({name: tensor for name, tensor in saved.items() if name != VARIANCE}, head)
    with pytest.raises(TensLoRAError, match=rf"head\.safetensors: lacks {VARIANCE}$"):
        load_run(whole)
    save_file({**saved, VARIANCE: -saved[VARIANCE]}, head)
    with pytest.raises(TensLoRAError, match=rf"head\.safetensors: {VARIANCE} holds a negative number$"):
        load_run(whole)


@pytest.mark.parametrize("tensor_mode", ["full", "head_only"])
def test_a_run_without_an_adapter_is_loaded_as_it_was(tensor_mode: str, tmp_path: Path) -> None:
    run(tmp_path, *MOBILEVIT, f"tensor_mode={tensor_mode}", "trainer.epochs=1")
    is_scored_as_recorded(tmp_path)


@pytest.mark.slow
def test_two_processes_score_with_the_statistics_that_are_saved(commands: Commands, tmp_path: Path) -> None:
    words = [*MOBILEVIT, "trainer.epochs=1", f"hydra.run.dir={tmp_path}"]
    ends = commands.run_together(started_by_torchrun(Command("train.py", words, tmp_path), 2))
    assert [ended.status for ended in ends] == [0, 0], ends
    loaded, last = load_run(tmp_path), record(tmp_path)["metrics"]["history"][-1]
    evaluation = loaded.evaluate()
    assert evaluation.loss == pytest.approx(last["test_loss"], abs=1e-5)


def is_exported_to_peft(folder: Path, out: Path) -> None:
    from peft import PeftModel

    export(folder, "peft", out)
    loaded, x = load_run(folder), torch.randn(2, 3, 32, 32)
    plain = load_backbone(loaded.run.model, len(loaded.classes), loaded.run.seed).model
    exported = PeftModel.from_pretrained(plain, str(out)).eval()
    torch.testing.assert_close(exported(x), loaded.backbone.model.eval()(x), rtol=0, atol=1e-6)


def is_scored_as_recorded(folder: Path) -> None:
    loaded, last = load_run(folder), record(folder)["metrics"]["history"][-1]
    assert torch.equal(loaded.backbone.model.get_buffer("stem.bn.num_batches_tracked"), torch.tensor(last["step"]))
    evaluation = loaded.evaluate()
    assert (evaluation.loss, evaluation.scores["accuracy"]) == (last["test_loss"], last["accuracy"])
