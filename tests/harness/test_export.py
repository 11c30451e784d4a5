"""Exported runs, loaded again by PEFT, transformers and timm, against the adapted model itself."""

from __future__ import annotations

import copy
import json
import os
import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
import yaml
from filelock import FileLock
from peft import PeftModel
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tenslora import TensLoRAError
from tenslora.harness import export as module
from tenslora.harness.backbones import load_backbone
from tenslora.harness.data import load_dataset
from tenslora.harness.export import export, main
from tenslora.harness.load_run import LoadedRun, load_run
from tenslora.harness.stages import ranks_text, stages_in_file
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


@pytest.fixture(scope="module")
def images_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run on images with a ViT of transformers, of random weights on disk."""
    root = tmp_path_factory.mktemp("images_run")
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    settings = transformers.ViTConfig(image_size=8, patch_size=4, **sizes)
    torch.manual_seed(0)
    transformers.ViTForImageClassification(settings).save_pretrained(root / "vit")
    config = root / "vit" / "config.json"  # transformers reads this setting, and does not write it
    config.write_text(json.dumps({**json.loads(config.read_text()), "output_attentions": True}))
    random = np.random.default_rng(0)
    for index in range(48):
        red = (index % 2) * 255
        pixels = random.integers(0, 256, (12, 10, 3), np.uint8) // 2 + np.array([red // 2, 0, 0], np.uint8)
        path = root / "images" / ("train" if index < 32 else "test") / ("grey", "red")[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    run(
        root / "run", "dataset=image_folder", f"dataset.root={root}/images", "model=hf_image",
        f"model.checkpoint={root}/vit", "model.image_size=8", "model.channels=3", "model.mean=[0.5,0.4,0.3]",
        "model.std=[0.5,0.5,0.6]", "trainer.epochs=2", "trainer.batch_size=8", "optimizer.lr=0.02", "tensor_mode=qkv",
        "rank_strategy=isorank", "dataset.transform.crop_ratio=0.8", "dataset.transform.squash=true",
        "dataset.transform.interpolation=bicubic",
    )  # fmt: skip
    return root / "run"


@pytest.fixture(scope="module", params=["digits_run", "sentences_run", "images_run", "staged_run"])
def finished(request: pytest.FixtureRequest) -> Finished:
    folder: Path = request.getfixturevalue(request.param)
    loaded = load_run(folder)
    generator = torch.Generator().manual_seed(0)
    if image_input := loaded.image_input:
        shape = (3, image_input.channels, image_input.size, image_input.size)
        batch = {loaded.backbone.input_name: torch.randn(shape, generator=generator)}
    else:
        batch = {"input_ids": torch.randint(5, 50, (3, 7), generator=generator)}
    return Finished(folder, loaded, batch, outputs_of(loaded.backbone.model.eval(), batch))


@pytest.mark.parametrize("form", ["peft", "tenslora"])
def test_peft_loads_a_run_written_for_it(finished: Finished, tmp_path: Path, form: str) -> None:
    main([str(finished.folder), "--format", form, "--out", str(tmp_path / "peft")])
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]
    loaded = finished.loaded
    fresh = load_backbone(loaded.run.model, len(loaded.record["classes"]), loaded.run.seed, loaded.tokenizer).model
    untrained = outputs_of(copy.deepcopy(fresh).eval(), finished.batch)
    assert (untrained - finished.logits).abs().max() > 1e-2, "the run has learned something that could be lost"
    finished.assert_equal_logits(PeftModel.from_pretrained(fresh, str(tmp_path / "peft")))


@pytest.mark.parametrize("form", ["peft", "tenslora"])
def test_the_model_card_of_a_peft_adapter_says_what_it_is_and_its_code_loads_it(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder, form: str
) -> None:
    main([str(finished.folder), "--format", form, "--out", str(tmp_path / "peft")])
    assert not recwarn.list
    card, record = (tmp_path / "peft" / "README.md").read_text(), finished.loaded.record
    _, metadata, text = card.split("---\n", maxsplit=2)
    assert set(yaml.safe_load(metadata)) == {"base_model", "library_name", "pipeline_tag", "tags"}
    for value in (
        record["tensor_mode"], record["rank_strategy"], ranks_text(stages_in_file(record["ranks"])), record["dataset"],
        f"{record['metrics']['last']:.4f}", ", ".join(record["classes"]),
    ):  # fmt: skip
        assert value in text
    _, begun, code = text.partition("```python\n")
    if not finished.loaded.run.model.pretrained:
        assert not begun
        return
    monkeypatch.chdir(tmp_path / "peft")
    names: dict[str, Any] = {}
    exec(code.partition("```")[0], names)
    finished.assert_equal_logits(names["model"])


def test_an_adapter_written_for_peft_is_no_larger_than_the_runs(digits_run: Path, tmp_path: Path) -> None:
    main([str(digits_run), "--format", "tenslora", "--out", str(tmp_path / "tenslora")])
    weights = load_file(tmp_path / "tenslora" / "adapter_model.safetensors")
    count = sum(weight.numel() for name, weight in weights.items() if "tenslora" in name)
    assert count == load_run(digits_run).record["adapter_parameters"]


def test_its_own_library_loads_a_merged_run_and_predicts_the_same(finished: Finished, tmp_path: Path) -> None:
    out, loaded = tmp_path / "merged", finished.loaded
    main([str(finished.folder), "--format", "merged", "--out", str(out)])
    inputs = load_dataset(loaded.run.dataset, loaded.run.seed).test.inputs
    if loaded.run.model.library == "timm":
        model = timm.create_model(f"local-dir:{out}", pretrained=True)
        transform: Any = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        batch = {"x": torch.stack([transform(image) for image in inputs])}
        wrapped = transformers.AutoModelForImageClassification.from_pretrained(out).eval()
        assert wrapped.config.id2label == dict(enumerate(loaded.classes))
        torch.testing.assert_close(wrapped(finished.batch["x"]).logits, finished.logits, rtol=0, atol=1e-5)
    elif loaded.tokenizer is None:
        model = transformers.AutoModelForImageClassification.from_pretrained(out)
        processor = transformers.AutoImageProcessor.from_pretrained(out, use_fast=False)
        batch = processor(images=list(inputs), return_tensors="pt")
    else:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(out)
        tokenizer = transformers.AutoTokenizer.from_pretrained(out)
        batch = tokenizer([sentence for (sentence,) in inputs], padding=True, return_tensors="pt")
    finished.assert_equal_logits(model)
    if loaded.run.model.library == "transformers":
        assert model.config.id2label == dict(enumerate(loaded.classes))
    with torch.no_grad():
        made = outputs_of(model, dict(batch)).softmax(-1)
    expected = [list(each.probabilities.values()) for each in loaded.predict(inputs)]
    torch.testing.assert_close(made, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-5)


def test_weights_that_a_model_of_timm_shares_are_written_twice(digits_run: Path, tmp_path: Path) -> None:
    loaded = load_run(digits_run)
    model: Any = loaded.backbone.model
    model.fc_norm = model.norm
    (tmp_path / "file").touch()
    for folder, message in ((None, "folder: must be text or a Path"), (tmp_path / "file", "folder=.*: cannot be writ")):
        for write in (module.export_merged, partial(module.export_adapter, as_lora=True)):
            with pytest.raises(TensLoRAError, match=f"^{message}"):
                write(loaded, folder)  # type: ignore[arg-type]
    module.export_merged(loaded, f"{tmp_path}/made")
    written = load_file(tmp_path / "made" / "model.safetensors")
    assert torch.equal(written["fc_norm.weight"], written["norm.weight"])


def test_texts_are_prepared_and_answered_as_in_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts.csv").write_text(
        "text,label\n" + "".join(f"the {'ab'[n % 2]} sat {n},{'ab'[n % 2]}\n" for n in range(20))
    )
    base, name = transformers.BertTokenizerFast, "bert-\N{GRINNING FACE}"
    Path("vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "sat", "a", "b"]))
    base("vocab.txt").save_pretrained(name)
    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    settings = transformers.BertConfig(vocab_size=9, initializer_range=1.0, problem_type="regression", **sizes)
    transformers.BertForSequenceClassification(settings).save_pretrained(name)
    run(
        tmp_path / "run", "dataset=text", "dataset.root=texts.csv", "dataset.max_length=4", "model=hf_text",
        f"model.checkpoint='{name}'", "trainer.epochs=1", "optimizer.lr=0.1",
    )  # fmt: skip
    texts = ["a the a the b the sat", "b"]
    expected = [each.probabilities for each in load_run("run").predict(texts)]
    export(Path("run"), "merged", Path("merged"))
    answers = transformers.pipeline("text-classification", model="merged", top_k=None)(texts, truncation=True)
    for answer, probabilities in zip(answers, expected, strict=True):
        assert {each["label"]: each["score"] for each in answer} == pytest.approx(probabilities, abs=1e-5)
    export(Path("run"), "peft", Path("peft"))
    card = Path("peft/README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == str(tmp_path / name)
    monkeypatch.chdir("peft")
    exec(card.partition("```python\n")[2].partition("```")[0], {})


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_others_may_read_an_export_if_the_umask_says_so(digits_run: Path, tmp_path: Path, form: str) -> None:
    before = os.umask(0o022)
    try:
        export(digits_run, form, tmp_path / "out")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "out").iterdir()} == {0o644}


def test_an_impossible_export_is_one_line(digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"error: .*: must be the folder of a finished run, with its result\.json"):
        main([str(tmp_path), "--format", "peft", "--out", str(tmp_path / "new" / "deep" / "a")])
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(SystemExit, match=rf"error: --out {tmp_path}/link: is a link to gone, which does not exist"):
        main([str(digits_run), "--format", "peft", "--out", str(tmp_path / "link")])
    (tmp_path / "link").unlink()
    with pytest.raises(SystemExit, match=rf"error: --out {tmp_path}: exists already"):
        main([str(digits_run), "--format", "peft", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"no such file"):
        words = ["--format", "peft", "--out", str(tmp_path / "new"), "--checkpoint", "nowhere.safetensors"]
        main([str(digits_run), *words])
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, "merged", "out"), "run: must be text or a Path, and is None"),
        (("run", "onnx", "out"), "form=onnx: must be one of peft, tenslora, merged"),
        (("run", "merged", 1), "out: must be text or a Path, and is of type int"),
        (("run", "merged", "out"), "run: no such folder"),
    ],
)
def test_each_argument_of_an_export_in_a_program_is_checked(
    arguments: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TensLoRAError, match=f"^{message}$"):
        export(*arguments)
    assert not list(tmp_path.iterdir())


def test_two_exports_to_one_folder_do_not_mix(digits_run: Path, tmp_path: Path) -> None:
    other = tmp_path / ".new.tmp"
    other.mkdir()
    (other / "half").touch()
    with (
        FileLock(other / ".lock"),
        pytest.raises(SystemExit, match=r"error: --out \S+/new: another process is writing"),
    ):
        main([str(digits_run), "--format", "merged", "--out", str(tmp_path / "new")])
    assert (other / "half").exists()
    # Without the other process, what it has left is removed.
    main([str(digits_run), "--format", "merged", "--out", str(tmp_path / "new")])
    assert not {"half", ".lock"} & {file.name for file in (tmp_path / "new").iterdir()}
    assert not other.exists()


def test_a_folder_that_no_export_has_made_is_not_emptied(digits_run: Path, tmp_path: Path) -> None:
    (tmp_path / ".new.tmp").mkdir()
    (tmp_path / ".new.tmp" / "mine").touch()
    with pytest.raises(
        SystemExit, match=r"^error: --out \S+/new: cannot be written \(\.new\.tmp beside it is of no ex"
    ):
        main([str(digits_run), "--format", "merged", "--out", str(tmp_path / "new")])
    assert (tmp_path / ".new.tmp" / "mine").exists()


def test_what_a_link_leads_to_is_not_removed(digits_run: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    (tmp_path / ".new.tmp").symlink_to("other")
    with pytest.raises(SystemExit, match=r"^error: --out \S+/new: cannot be written \(\.new\.tmp beside it is a link"):
        main([str(digits_run), "--format", "merged", "--out", str(tmp_path / "new")])
    assert (tmp_path / "other" / "file").exists()


def test_a_folder_in_another_encoding_is_one_line(digits_run: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^error: --out \S+: must be text in UTF-8$"):
        main([str(digits_run), "--format", "merged", "--out", str(tmp_path / "caf\udce9")])
    assert list(tmp_path.iterdir()) == []


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


def test_sigterm_leaves_nothing(digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(_: LoadedRun, folder: Path) -> None:
        (folder / "half").touch()
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(module, "FORMATS", {"peft": stopped})
    with pytest.raises(SystemExit) as ended:
        main([str(digits_run), "--format", "peft", "--out", str(tmp_path / "new" / "peft")])
    assert ended.value.code == 130
    assert list(tmp_path.iterdir()) == []
