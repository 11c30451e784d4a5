from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from tenslora.errors import TensLoRAError
from tenslora.harness.backbones import EMBEDDED, load_backbone
from tenslora.harness.backbones.timm_models import weights_file
from tenslora.harness.training.tasks import outputs_of
from tests.harness.backbones.tiny_models import (
    HEADS,
    VIT_DIGITS,
    assert_refused,
    equal,
    load_random,
    timm_vit,
    vit_digits,
    weights_of,
)
from tests.running import configured


def test_vit_digits_is_the_embedded_checkpoint_in_float32() -> None:
    saved = load_file(EMBEDDED)
    weights = weights_of(load_backbone(vit_digits(), 5, 0))
    assert weights.keys() == saved.keys() | HEADS["timm vit"]
    for name, tensor in saved.items():
        assert weights[name].dtype == torch.float32
        assert torch.equal(weights[name], tensor.float())


def test_vit_digits_computes_what_timm_does_with_the_file() -> None:
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=0, **VIT_DIGITS)
    plain.load_state_dict({name: tensor.float() for name, tensor in load_file(EMBEDDED).items()})
    images = torch.randn(3, 1, 8, 8)
    backbone = load_backbone(vit_digits(), 5, 0)
    with torch.no_grad():
        features = cast(Any, backbone.model).eval().forward_features(images)
        torch.testing.assert_close(features, plain.eval().forward_features(images))
        assert outputs_of(backbone.model, {backbone.input_name: images}).shape == (3, 5)


@pytest.mark.parametrize("form", ["folder", "file"])
def test_vit_small_from_shared_has_its_grid_of_positions_resampled(form: str, shared: Path) -> None:
    folder = shared / "models" / "vit_small_patch14"
    config = timm_vit(
        name="vit_small_timm",
        architecture="vit_small_patch14_dinov2",
        options={"img_size": 112},
        channels=3,
        image_size=112,
        pretrained=True,
        checkpoint=str(folder if form == "folder" else folder / "model.safetensors"),
    )
    weights = weights_of(load_backbone(config, 10, 0))
    saved = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    assert weights.keys() - saved.keys() == HEADS["timm vit"]
    for name in saved.keys() - {"pos_embed"}:
        assert torch.equal(weights[name], saved[name]), name
    positions = saved["pos_embed"]
    assert weights["pos_embed"].shape == (1, 1 + 8 * 8, 384)
    assert torch.equal(weights["pos_embed"][:, 0], positions[:, 0])
    grid = positions[:, 1:].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, (8, 8), mode="bicubic", antialias=True).flatten(2).mT
    torch.testing.assert_close(weights["pos_embed"][:, 1:], expected)


def test_a_checkpoint_may_be_a_pickled_dictionary(tmp_path: Path) -> None:
    saved = {name: tensor.float() for name, tensor in load_file(EMBEDDED).items()}
    torch.save({"state_dict": saved}, tmp_path / "pytorch_model.bin")
    weights = weights_of(load_backbone(vit_digits(checkpoint=str(tmp_path)), 5, 0))
    assert all(torch.equal(weights[name], tensor) for name, tensor in saved.items())


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize("kind", ["sparse tensor", "tensor on the device meta"])
def test_a_weight_without_its_numbers_in_a_row_is_named(kind: str, tmp_path: Path) -> None:
    saved = load_file(EMBEDDED)
    name = "blocks.0.mlp.fc1.weight"
    saved[name] = saved[name].to_sparse() if kind == "sparse tensor" else saved[name].to("meta")
    torch.save(saved, tmp_path / "odd.pth")
    line = rf"^model\.checkpoint=\S+odd\.pth: {name} is a {kind}; must be a dense tensor with numbers$"
    assert_refused(vit_digits(checkpoint=str(tmp_path / "odd.pth")), line)


def test_a_file_of_numpy_is_no_checkpoint(tmp_path: Path) -> None:
    np.savez(tmp_path / "Ti_16.npz", cls=np.zeros(3))
    line = r"^model\.checkpoint=\S+npz: damaged, or not a checkpoint \(a zip file that torch has not written"
    assert_refused(vit_digits(checkpoint=str(tmp_path / "Ti_16.npz")), line)


@pytest.mark.filterwarnings("ignore:`torch.jit")  # which torch calls deprecated
def test_a_torchscript_archive_is_no_checkpoint(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "jit.pt")  # type: ignore[no-untyped-call]
    line = (
        r"^model\.checkpoint=\S+jit\.pt: damaged, or not a checkpoint \(a TorchScript archive; save the model's state"
    )
    assert_refused(vit_digits(checkpoint=str(tmp_path / "jit.pt")), line)


def test_a_checkpoint_may_bring_a_head_of_another_size(tmp_path: Path) -> None:
    saved = {**load_file(EMBEDDED), "head.weight": torch.ones(9, 64), "head.bias": torch.ones(9)}
    save_file(saved, tmp_path / "model.safetensors")
    weights = weights_of(load_backbone(vit_digits(checkpoint=str(tmp_path)), 5, 0))
    assert equal(weights, weights_of(load_backbone(vit_digits(), 5, 0)))


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("another width", r"(lacks|has) \S+ of shape|lacks|shape"),
        ("a tensor too few", r"lacks blocks\.1\.attn\.qkv\.weight"),
        ("a tensor too many", r"has blocks\.4\.attn\.qkv\.weight"),
        ("a tensor of another shape", r"has norm\.weight of shape \(3,\), not \(64,\)"),
        ("weights of DeepSpeed's ZeRO-3", r"has cls_token of shape \(0,\), not \(1, 1, 64\), as DeepSpeed's"),
        ("no positions", r"has pos_embed of shape \(1, 0, 64\)"),
        ("another family", r"lacks \S+ and \d+ more"),
    ],
)
def test_another_models_checkpoint_is_refused(change: str, difference: str, tmp_path: Path) -> None:
    weights = load_file(EMBEDDED)
    if change == "another width":
        options = {**VIT_DIGITS, "embed_dim": 32}
        weights = timm.create_model("vit_tiny_patch16_224", num_classes=2, **options).state_dict()
    elif change == "a tensor too few":
        del weights["blocks.1.attn.qkv.weight"]
    elif change == "a tensor too many":
        weights["blocks.4.attn.qkv.weight"] = torch.ones(192, 64)
    elif change == "a tensor of another shape":
        weights["norm.weight"] = torch.ones(3)
    elif change == "weights of DeepSpeed's ZeRO-3":
        weights = {name: torch.empty(0) for name in weights}
    elif change == "no positions":
        weights["pos_embed"] = torch.empty(1, 0, 64)
    else:
        weights = weights_of(load_random("bert"))
    path = tmp_path / "other.safetensors"
    save_file(weights, path)
    assert_refused(
        vit_digits(checkpoint=str(path)),
        rf"model\.checkpoint=\S*other\.safetensors: is not a checkpoint of vit_digits .*{difference}",
    )


@pytest.mark.parametrize("arguments", [{"num_heads": 6}, {"act_layer": "relu"}])
def test_arguments_that_the_shapes_do_not_tell_are_those_of_the_weights(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    common = {**VIT_DIGITS, "embed_dim": 48, "num_heads": 3}  # three heads are timm's default for this model
    saved = {**common, **arguments, "drop_path_rate": 0.1}
    model = timm.create_model("vit_tiny_patch16_224", **saved)
    timm.models.save_for_hf(model, str(tmp_path), model_args=saved, safe_serialization=True)
    own = {name: value for name, value in common.items() if name not in arguments}
    [(name, value)] = arguments.items()
    assert_refused(
        vit_digits(checkpoint=str(tmp_path), options=own),
        rf'model\.options=.*: must have the arguments of the model whose weights these are, .*"{name}": "?{value}',
    )
    load_backbone(vit_digits(checkpoint=str(tmp_path), options={**own, **arguments}), 5, 0)


def test_an_exported_folder_says_what_follows_from_its_arguments(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", **VIT_DIGITS)
    timm.models.save_for_hf(model, str(tmp_path), model_args=VIT_DIGITS, safe_serialization=True)
    config = vit_digits(checkpoint=str(tmp_path), image_size=None)  # 8, by config.json
    options = {**VIT_DIGITS}
    del options["patch_size"]  # 16 is timm's
    line = r'^model\.options=.*: must have the arguments of the model whose weights these are, {"patch_size": 2,'
    assert_refused(replace(config, options=options), line)
    line = r"^model\.image_size=null \(by the model's options or files, 8\): must be a multiple of 3, the size"
    assert_refused(replace(config, options={**options, "patch_size": 3}), line)
    with pytest.raises(TensLoRAError, match=r"^model\.architecture=local-dir:x: .*; give the folder as model\."):
        load_backbone(replace(config, architecture="local-dir:x"), 5, 0)


def test_an_architecture_that_the_shapes_do_not_tell_is_that_of_the_weights(tmp_path: Path) -> None:
    quick, plain = "vit_base_patch16_clip_quickgelu_224", "vit_base_patch16_clip_224.openai"
    model = timm.create_model(quick, **VIT_DIGITS)
    timm.models.save_for_hf(model, str(tmp_path), model_args=VIT_DIGITS, safe_serialization=True)
    config = vit_digits(checkpoint=str(tmp_path))
    line = rf"^model\.architecture=vit_base_patch16_clip_224\.openai: must be {quick}, the architecture of these"
    assert_refused(replace(config, architecture=plain), line)
    for own in (quick, f"{quick}.openai"):
        load_backbone(replace(config, architecture=own), 5, 0)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**saved, "architecture": "vit_of_tomorrow"}))
    assert_refused(replace(config, architecture=quick), r'its architecture "?vit_of_tomorrow"? does not make one')


def test_a_checkpoint_of_another_user_is_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(EMBEDDED.read_bytes())
    monkeypatch.setattr(os, "access", lambda path, _: path != file)  # root may read every file
    with pytest.raises(TensLoRAError, match=rf"^model\.checkpoint=.*: {file} cannot be read \(Permission denied\)$"):
        weights_file(str(tmp_path))


@pytest.mark.parametrize(("option", "lacking"), [({"depth": 5}, r"blocks\.4\."), ({"reg_tokens": 4}, "reg_token$")])
def test_the_embedded_checkpoint_fits_only_its_model(option: dict[str, int], lacking: str) -> None:
    config = vit_digits(options={**VIT_DIGITS, **option})
    assert_refused(config, rf"is not a checkpoint of vit_digits .*lacks {lacking}")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_tiny_patch16_224_in21k"])  # the latter is deprecated
def test_a_model_is_built_for_the_size_of_the_images_also_where_all_of_them_is_declared(name: str) -> None:
    run = configured(
        "model=timm", f"model.architecture={name}", "model.pretrained=false", "+model.options.depth=1",
        "model.image_size=32", "model.channels=1", "model.mean=[0.5]", "model.std=[0.5]",
    )  # fmt: skip
    backbone = load_backbone(run.model, 3, 0)
    assert outputs_of(backbone.model, {backbone.input_name: torch.zeros(2, 1, 32, 32)}).shape == (2, 3)
