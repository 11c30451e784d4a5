from __future__ import annotations

import io
import logging
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file

from tenslora.errors import TensLoRAError
from tenslora.harness.backbones import load_backbone
from tenslora.harness.backbones.transformers_models import _head_of
from tenslora.harness.config import ModelConfig
from tenslora.harness.training.tasks import outputs_of
from tests.harness.backbones.tiny_models import (
    HEADS,
    TEXT,
    assert_refused,
    load_random,
    save_random,
    trained_tokenizer,
    transformers_text,
    transformers_vit,
    weights_of,
)


def saved_model(kind: str, folder: Path) -> ModelConfig:
    if kind == "vit":
        return transformers_vit(checkpoint=str(folder), pretrained=True)
    return transformers_text(kind, checkpoint=str(folder), pretrained=True)


@pytest.mark.parametrize("kind", ["vit", *TEXT])
def test_a_checkpoints_own_head_is_replaced_and_the_rest_stays(kind: str, tmp_path: Path) -> None:
    saved = save_random(tmp_path, kind, classes=7)
    for classes in (7, 3):
        backbone = load_backbone(saved_model(kind, tmp_path), classes, 5)
        weights, head = weights_of(backbone), backbone.head_parameters()
        assert weights.keys() == saved.keys()
        assert all(torch.equal(weights[name], saved[name]) for name in saved if name not in head)
        assert all(weights[name].shape[0] != 7 or classes == 7 for name in head)
        assert not any((weights[name] == 9).any() for name in head)


def test_what_transformers_shows_is_as_it_was_before(tmp_path: Path) -> None:
    save_random(tmp_path)
    shown = transformers.utils.logging
    verbosity, bars = shown.get_verbosity(), shown.is_progress_bar_enabled()
    try:
        shown.set_verbosity_info()
        shown.enable_progress_bar()
        load_backbone(saved_model("vit", tmp_path), 3, 1)
        assert (shown.get_verbosity(), shown.is_progress_bar_enabled()) == (logging.INFO, True)
        shown.disable_progress_bar()
        load_backbone(saved_model("vit", tmp_path), 2, 1)
        assert not shown.is_progress_bar_enabled()
    finally:
        shown.set_verbosity(verbosity)
        (shown.enable_progress_bar if bars else shown.disable_progress_bar)()


def test_a_program_may_have_closed_its_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_random(tmp_path)
    closed = io.StringIO()
    closed.close()
    for classes, stream in ((2, closed), (4, None)):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        load_backbone(saved_model("vit", tmp_path), classes, 0)
        assert (sys.stdout, sys.stderr) == (stream, stream)


def test_a_half_precision_checkpoint_loads_in_float32(tmp_path: Path) -> None:
    saved = {name: tensor.half() for name, tensor in save_random(tmp_path).items()}
    save_file(saved, tmp_path / "model.safetensors", {"format": "pt"})
    weights = weights_of(load_backbone(saved_model("vit", tmp_path), 3, 0))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert all(torch.equal(weights[name], saved[name].float()) for name in saved.keys() - HEADS["vit"])


def test_minilm_from_shared_is_what_transformers_loads(shared: Path) -> None:
    folder = shared / "models" / "minilm_l6"
    plain = transformers.AutoModel.from_pretrained(folder).float().state_dict()
    weights = weights_of(load_backbone(saved_model("bert", folder), 2, 0))
    assert weights.keys() == {f"bert.{name}" for name in plain} | HEADS["bert"]
    for name, tensor in plain.items():
        assert weights[f"bert.{name}"].dtype == tensor.dtype
        assert torch.equal(weights[f"bert.{name}"], tensor)


def test_another_models_checkpoint_is_refused(tmp_path: Path) -> None:
    saved = save_random(tmp_path)
    name = next(name for name in saved if name.startswith("vit.") and name.endswith("weight") and saved[name].ndim == 2)
    for broken in ({k: v for k, v in saved.items() if k != name}, {**saved, name: torch.ones(3, 3)}):
        save_file(broken, tmp_path / "model.safetensors", {"format": "pt"})
        assert_refused(saved_model("vit", tmp_path), rf"model\.checkpoint=.*is not a checkpoint of tiny .*{name}")


def test_an_image_checkpoint_is_not_a_text_models(tmp_path: Path) -> None:
    save_random(tmp_path)
    assert_refused(saved_model("bert", tmp_path), r"model\.checkpoint=.*is not a checkpoint of tiny")


def test_a_named_models_checkpoint_is_of_its_type(tmp_path: Path) -> None:
    save_random(tmp_path, "roberta")
    trained_tokenizer().save_pretrained(tmp_path)
    line = r"^model\.checkpoint=\S+: is not a checkpoint of tiny .*: it is of type roberta, not bert; use model=hf_text"
    assert_refused(saved_model("bert", tmp_path), line)
    load_backbone(saved_model("roberta", tmp_path), 3, 0)


def test_an_option_that_a_checkpoint_overrules_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_random(tmp_path)
    config = saved_model("vit", tmp_path)
    same, other = {"attention_probs_dropout_prob": 0.0}, {"hidden_dropout_prob": 0.5}
    load_backbone(replace(config, options={**config.options, **same, **other}), 3, 0)
    assert [record.getMessage() for record in caplog.records] == [
        "model.options.hidden_dropout_prob=0.5: has no effect, because the checkpoint's config.json says 0.0; "
        "model=hf_image replaces its settings"
    ]


@pytest.mark.parametrize("arguments", [None, {"depth": 2}])
def test_a_model_of_timm_is_to_be_loaded_by_timm(arguments: dict[str, Any] | None, tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=5, **(arguments or {}))
    timm.models.save_for_hf(model, str(tmp_path), model_args=arguments, safe_serialization=True)
    config = transformers_vit(architecture=None, options={}, checkpoint=str(tmp_path), pretrained=True)
    assert_refused(
        config, r"^model\.checkpoint=\S+: is a model of timm, .* use model=timm model\.architecture=test_vit$"
    )


def test_a_head_inside_the_transformer_is_refused() -> None:
    wrapper = transformers.TimmWrapperForImageClassification(transformers.TimmWrapperConfig(architecture="test_vit"))
    with pytest.raises(TensLoRAError, match=r"^model=tiny: its head is inside its Transformer \(TimmWrapperFor"):
        _head_of(transformers_vit(), wrapper)


def test_images_of_a_size_that_the_model_does_not_take_are_refused(tmp_path: Path) -> None:
    save_random(tmp_path)
    config = transformers_vit(checkpoint=str(tmp_path), pretrained=True, image_size=16)
    assert_refused(config, r"model\.image_size=16: must be 8")


def test_a_tensor_that_the_bare_model_lacks_is_noticed_too(shared: Path, tmp_path: Path) -> None:
    folder = shared / "models" / "minilm_l6"
    shutil.copy(folder / "config.json", tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.3.attention.self.query.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert_refused(saved_model("bert", tmp_path), r"encoder\.layer\.3\.attention\.self\.query\.weight")


def test_padding_does_not_change_a_random_roberta() -> None:
    model = load_random("roberta").model.eval()
    alone = dict(trained_tokenizer()(["Yes."], return_tensors="pt"))
    padded = dict(trained_tokenizer()(["Yes."], padding="max_length", max_length=20, return_tensors="pt"))
    with torch.no_grad():
        torch.testing.assert_close(outputs_of(model, padded), outputs_of(model, alone))
