"""Exports against the adapted model itself, loaded back by PEFT, transformers and timm."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors import SafetensorError

from tenslora import TensLoRAError
from tenslora.harness import export
from tenslora.harness.backbones import load_backbone, logits_of
from tenslora.harness.export import main
from tenslora.harness.load_run import load_run
from tests.running import SHORT, run


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    run(folder, "trainer.epochs=1", "dataset.train_size=64", "optimizer.lr=0.05", "tensor_mode=att_qkv")
    return folder


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cola")
    lines = [f"x\t{number % 2}\t\tthe {('cat', 'dog', 'bird')[number % 3]} sat {number} times" for number in range(40)]
    for name in ("in_domain_train", "in_domain_dev", "out_of_domain_dev"):
        (root / "raw").mkdir(exist_ok=True)
        (root / "raw" / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    folder = root / "run"
    sizes = "hidden_size:24,num_hidden_layers:2,num_attention_heads:3,intermediate_size:32"
    run(
        folder,
        "dataset=cola",
        f"dataset.root={root}",
        "model=minilm",
        "model.pretrained=false",
        "model.geometry=null",
        f"model.options={{model_type:bert,{sizes}}}",
        "trainer.epochs=1",
        "optimizer.lr=0.05",
        "tensor_mode=depth",
        "rank_strategy=isorank",
    )
    return folder


@pytest.fixture(params=["digits", "sentences"])
def finished(request: pytest.FixtureRequest) -> Iterator[tuple[Path, dict[str, torch.Tensor]]]:
    folder: Path = request.getfixturevalue(request.param)
    generator = torch.Generator().manual_seed(0)
    if request.param == "digits":
        yield folder, {"x": torch.randn(3, 1, 8, 8, generator=generator)}
    else:
        yield folder, {"input_ids": torch.randint(5, 50, (3, 7), generator=generator)}


def test_a_run_written_for_peft_is_loaded_by_it_with_equal_logits(
    finished: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    from peft import PeftModel

    folder, batch = finished
    trained = load_run(folder)
    expected = logits_of(trained.backbone.model.eval(), batch)
    main([str(folder), "--format", "peft", "--out", str(tmp_path / "peft")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["peft"]
    assert (tmp_path / "peft" / "adapter_model.safetensors").is_file()
    fresh = load_backbone(trained.run.model, len(trained.record["classes"]), trained.run.seed, trained.tokenizer).model
    before = logits_of(copy.deepcopy(fresh).eval(), batch)
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path / "peft")).eval()
    torch.testing.assert_close(logits_of(loaded, batch), expected, rtol=0, atol=1e-5)
    assert (before - expected).abs().max() > 1e-2  # the run has learned something that could be lost


def test_a_run_written_whole_is_loaded_by_its_own_library_with_equal_logits(
    finished: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder, batch = finished
    trained = load_run(folder)
    expected = logits_of(trained.backbone.model.eval(), batch)
    out = tmp_path / "merged"
    main([str(folder), "--format", "merged", "--out", str(out)])
    if trained.run.model.library == "timm":
        loaded = timm.create_model(f"local-dir:{out}", pretrained=True)
        assert tuple(loaded.pretrained_cfg["mean"]) == trained.run.model.mean
    else:
        loaded = transformers.AutoModelForSequenceClassification.from_pretrained(out)
        assert transformers.AutoTokenizer.from_pretrained(out)("the cat")["input_ids"]
        assert loaded.config.id2label == dict(enumerate(trained.record["classes"]))
    torch.testing.assert_close(logits_of(loaded.eval(), batch), expected, rtol=0, atol=1e-5)


def test_what_cannot_be_exported_is_said_in_a_line(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"error: .*result\.json: not a readable record"):
        main([str(tmp_path), "--format", "peft", "--out", str(tmp_path / "new")])
    with pytest.raises(SystemExit, match=rf"error: --out {tmp_path}: is there already"):
        main([str(digits), "--format", "peft", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"no such file"):
        main([str(digits), "--format", "peft", "--out", str(tmp_path / "new"), "--checkpoint", "nowhere.safetensors"])
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_a_run_without_an_adapter_is_written_merged_only(tmp_path: Path) -> None:
    run(tmp_path / "run", "trainer.epochs=1", "dataset.train_size=50", "tensor_mode=head_only")
    with pytest.raises(SystemExit, match="tensor_mode=head_only: has no adapter; --format merged"):
        main([str(tmp_path / "run"), "--format", "peft"])
    main([str(tmp_path / "run"), "--format", "merged"])
    assert (tmp_path / "run" / "merged" / "model.safetensors").is_file()


def test_no_room_is_said_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "run", *SHORT)

    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setitem(export.FORMATS, "peft", full)  # type: ignore[arg-type]
    with pytest.raises(TensLoRAError, match=r"--out .*peft: cannot be written \(.*No space left"):
        export.export(tmp_path / "run", "peft", tmp_path / "peft")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
