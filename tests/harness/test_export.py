"""Exported runs, loaded again by PEFT, transformers and timm, against the adapted model itself."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn

from tenslora import TensLoRAError
from tenslora.harness import export as module
from tenslora.harness.backbones import load_backbone
from tenslora.harness.export import export, main
from tenslora.harness.load_run import LoadedRun, load_run
from tenslora.harness.training.tasks import outputs_of
from tests.running import run


@dataclass(frozen=True)
class Finished:
    """A finished run, a batch for its model, and the model's logits."""

    folder: Path
    loaded: LoadedRun
    batch: dict[str, Tensor]
    logits: Tensor

    def assert_equal_logits(self, model: nn.Module) -> None:
        torch.testing.assert_close(outputs_of(model.eval(), self.batch), self.logits, rtol=0, atol=1e-5)


@pytest.fixture(scope="module", params=["digits_run", "sentences_run"])
def finished(request: pytest.FixtureRequest) -> Finished:
    folder: Path = request.getfixturevalue(request.param)
    loaded = load_run(folder)
    generator = torch.Generator().manual_seed(0)
    if loaded.run.model.modality == "image":
        batch = {"x": torch.randn(3, 1, 8, 8, generator=generator)}
    else:
        batch = {"input_ids": torch.randint(5, 50, (3, 7), generator=generator)}
    return Finished(folder, loaded, batch, outputs_of(loaded.backbone.model.eval(), batch))


def test_peft_loads_a_run_written_for_it(finished: Finished, tmp_path: Path) -> None:
    main([str(finished.folder), "--format", "peft", "--out", str(tmp_path / "peft")])
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]
    loaded = finished.loaded
    fresh = load_backbone(loaded.run.model, len(loaded.record["classes"]), loaded.run.seed, loaded.tokenizer).model
    untrained = outputs_of(copy.deepcopy(fresh).eval(), finished.batch)
    assert (untrained - finished.logits).abs().max() > 1e-2, "the run has learned something that could be lost"
    finished.assert_equal_logits(PeftModel.from_pretrained(fresh, str(tmp_path / "peft")))


def test_its_own_library_loads_a_merged_run(finished: Finished, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    main([str(finished.folder), "--format", "merged", "--out", str(out)])
    if finished.loaded.run.model.library == "timm":
        model = timm.create_model(f"local-dir:{out}", pretrained=True)
        assert tuple(model.pretrained_cfg["mean"]) == finished.loaded.run.model.mean
    else:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(out)
        assert transformers.AutoTokenizer.from_pretrained(out)("the cat")["input_ids"]
        assert model.config.id2label == dict(enumerate(finished.loaded.record["classes"]))
    finished.assert_equal_logits(model)


def test_an_impossible_export_is_one_line(digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"error: .*: must be the folder of a finished run, with its result\.json"):
        main([str(tmp_path), "--format", "peft", "--out", str(tmp_path / "new")])
    with pytest.raises(SystemExit, match=rf"error: --out {tmp_path}: exists already"):
        main([str(digits_run), "--format", "peft", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"no such file"):
        words = ["--format", "peft", "--out", str(tmp_path / "new"), "--checkpoint", "nowhere.safetensors"]
        main([str(digits_run), *words])
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_a_run_without_an_adapter_is_only_written_merged(tmp_path: Path) -> None:
    run(tmp_path / "run", "trainer.epochs=1", "dataset.train_size=50", "tensor_mode=head_only")
    with pytest.raises(SystemExit, match="tensor_mode=head_only: has no adapter; --format merged"):
        main([str(tmp_path / "run"), "--format", "peft"])
    main([str(tmp_path / "run"), "--format", "merged"])
    assert (tmp_path / "run" / "merged" / "model.safetensors").is_file()


def test_an_export_for_which_there_is_no_room_leaves_nothing(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: LoadedRun, folder: Path) -> None:
        (folder / "half").touch()
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(module, "FORMATS", {"peft": full})
    with pytest.raises(TensLoRAError, match=r"--out .*peft: cannot be written \(.*No space left"):
        export(digits_run, "peft", tmp_path / "peft")
    assert list(tmp_path.iterdir()) == []
