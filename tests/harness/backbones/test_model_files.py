"""What the files of a model's folder may say: a damaged config, image processor or weight is refused in one line."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from tenslora.errors import TensLoRAError
from tenslora.harness.analyse import updates_in
from tenslora.harness.backbones import load_backbone, load_tokenizer
from tenslora.harness.config import ModelConfig
from tenslora.harness.training.tasks import outputs_of
from tests.harness.backbones.tiny_models import (
    SENTENCES,
    VIT_DIGITS,
    assert_refused,
    load_random,
    model_config,
    save_random,
    timm_vit,
    trained_tokenizer,
    transformers_vit,
)
from tests.mutations import as_bytes, damaged, json_like, other_tensors, time_limit

IMAGES = {
    "image_processor_type": "ViTImageProcessor",
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "size": {"height": 8, "width": 8},
    "resample": 2,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Folders of models of transformers: of images, of texts."""
    root = tmp_path_factory.mktemp("models")
    for kind in ("vit", "bert"):
        save_random(root / kind, kind)
    (root / "vit" / "preprocessor_config.json").write_text(json.dumps(IMAGES))
    return [root / "vit", root / "bert"]


@given(data=st.data())
def test_a_changed_file_of_a_model_is_refused_in_one_line_or_serves_a_model(
    folders: list[Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    original = data.draw(st.sampled_from(folders))
    folder = tmp_path_factory.getbasetemp() / "changed_model"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original, folder)
    file = data.draw(st.sampled_from(["config.json", "config.json", *sorted(f.name for f in original.iterdir())]))
    if file.endswith(".json"):
        text = json_like(json.loads((original / file).read_text())).map(as_bytes)
        content = data.draw(st.one_of(text, text, damaged((original / file).read_bytes())))
    elif data.draw(st.booleans()):
        content = save(data.draw(other_tensors(load_file(original / file))), metadata={"format": "pt"})
    else:
        content = data.draw(damaged((original / file).read_bytes()))
    (folder / file).write_bytes(content)
    config, tokenizer = generic(folder), None
    if original.name == "bert":
        config, tokenizer = ModelConfig(**{**vars(config), "modality": "text"}), trained_tokenizer()
    with time_limit():
        try:
            backbone = load_backbone(config, 3, 0, tokenizer)
        except TensLoRAError as error:
            assert str(error).isprintable()
            assert str(folder) in str(error) or str(error).startswith("model")
            assert len(str(error)) < 2000
            return
        assert all(weight.isfinite().all() for weight in backbone.model.state_dict().values())


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """The folder of a ViT of transformers."""
    save_random(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(json.dumps(IMAGES))
    return tmp_path / "vit"


def generic(folder: Path, **changes: Any) -> ModelConfig:
    """The settings of `model=hf_image` for a folder, whose own files say all about its images."""
    own = dict.fromkeys(("architecture", "image_size", "channels", "mean", "std"))
    settings = {"name": "vit", "options": {}, "pretrained": True, "checkpoint": str(folder), "channels": 3, **changes}
    return ModelConfig(**{**vars(model_config("transformers", "image", **settings)), **own, **changes})


def edit(path: Path, **changes: Any) -> None:
    """Change entries of a JSON file; ... deletes one."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_hidden_layers": 10**9}, r"config.json: num_hidden_layers=1000000000: must be from 1 to 1,000"),
        ({"num_hidden_layers": 0}, "config.json: num_hidden_layers=0: must be from 1"),
        ({"num_hidden_layers": 1}, r"it has vit.*\.1\..*, and its config.json declares fewer layers"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers"),
        ({"hidden_size": -1}, "config.json: hidden_size=-1: must be from 1"),
        ({"hidden_size": 10**12}, "config.json: hidden_size=1000000000000: must be from 1 to 1,000,000"),
        ({"hidden_size": 50_000}, "config.json declares [0-9,]+ weights, and its files have [0-9,]+ bytes"),
        ({"layer_norm_eps": math.nan}, "config.json: layer_norm_eps=nan: must be a finite number"),
        ({"hidden_dropout_prob": 1.5}, "config.json: hidden_dropout_prob=1.5: must be at least 0 and below 1"),
        ({"hidden_act": "nope"}, "is not a checkpoint of vit"),
        ({"id2label": []}, "is not a checkpoint of vit"),
        ({"model_type": ...}, "is not a checkpoint of vit"),
        ({"model_type": "nope", "auto_map": {"AutoConfig": "code.Config"}}, "is not a checkpoint of vit"),
    ],
)
def test_a_config_that_is_out_of_range_is_refused(changes: dict[str, Any], problem: str, vit: Path) -> None:
    edit(vit / "config.json", **changes)
    assert_refused(generic(vit), problem)


@pytest.mark.parametrize(("kind", "name"), [(torch.int32, "I32"), (torch.complex64, "C64")])
@pytest.mark.parametrize("method", [..., {"quant_method": "modelopt_fp4x"}])  # which transformers does not know
def test_weights_that_are_no_floats_are_refused(kind: torch.dtype, name: str, method: Any, vit: Path) -> None:
    edit(vit / "config.json", quantization_config=method)
    weights = load_file(vit / "model.safetensors")
    weights = {key: weight.to(kind) if "layernorm" in key else weight for key, weight in weights.items()}
    save_file(weights, vit / "model.safetensors", metadata={"format": "pt"})
    assert_refused(generic(vit), rf"is not a checkpoint of vit: it has \S+ of type {name}; must be of a floating-poin")


def test_a_config_that_asks_for_tuples_makes_no_difference(vit: Path) -> None:
    images = {"pixel_values": torch.ones(2, 3, 8, 8)}
    expected = outputs_of(load_backbone(generic(vit), 3, 0).model.eval(), images)
    edit(vit / "config.json", return_dict=False)
    given = outputs_of(load_backbone(generic(vit), 4, 0).model.eval(), images)  # four classes, past the cache
    torch.testing.assert_close(given[:, :2], expected[:, :2])


@pytest.mark.parametrize("content", ["[]", "5", "null", "", "{", "[" * 99999])
def test_a_config_that_is_no_object_is_refused(content: str, vit: Path) -> None:
    (vit / "config.json").write_text(content)
    assert_refused(generic(vit), "is not a checkpoint of vit")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"image_std": [0.5, 0.0, 0.5]}, "model=vit: its images have std=0.0; must be from 1e-06 to 1e"),
        ({"image_std": [math.nan] * 3}, "std=NaN; must be from"),
        ({"image_mean": [math.inf] * 3}, "mean=Infinity; must be from"),
        ({"image_mean": ["a"] * 3}, "preprocessor_config.json cannot be used"),
        ({"image_mean": math.nan}, "mean=NaN; must be from"),
        ({"rescale_factor": 0}, "preprocessor_config.json cannot be used"),
        ({"size": {"height": -8, "width": -8}}, "size=-8; must be from 1 to 4096"),
        ({"size": {"height": "8", "width": "8"}}, "preprocessor_config.json"),
        ({"resample": 99}, "preprocessor_config.json"),
        (
            {"image_processor_type": "MobileViTImageProcessor", "do_flip_channel_order": True},
            r"takes its images in blue, green and red \(preprocessor_config\.json",
        ),
        (
            {"image_processor_type": "EfficientNetImageProcessor", "rescale_offset": True, "include_top": False},
            r"its images are made with rescale_offset \(preprocessor_config\.json\), which is not known here; ",
        ),
        ({"image_processor_type": "EfficientNetImageProcessor"}, "its images are made with include_top "),
    ],
)
def test_images_that_cannot_be_made_are_refused(changes: dict[str, Any], problem: str, vit: Path) -> None:
    edit(vit / "preprocessor_config.json", **changes)
    assert_refused(generic(vit), problem)


@pytest.mark.parametrize(
    ("images", "problem"),
    [
        ({"input_size": [1, 8]}, "config.json: its images are of no form that timm has"),
        ({"input_size": "a"}, "config.json: its images are of no form that timm has"),
        ({"mean": ["a"]}, 'its images have mean="a"; must be from'),
        ({"std": [0]}, "its images have std=0; must be from"),
        ({"crop_pct": 1e-9}, "its images have crop_ratio=.*; must be from 0.01 to 1"),
        ({"crop_pct": math.nan}, "config.json: its images are of no form that timm has"),
        ({"interpolation": "nope"}, 'its images have interpolation="nope"; must be one of nearest'),
        ([], "config.json: not a config of timm"),
    ],
)
def test_images_of_a_timm_folder_that_cannot_be_made_are_refused(images: Any, problem: str, tmp_path: Path) -> None:
    save_file(load_random("timm vit").model.state_dict(), tmp_path / "model.safetensors")
    own = {"input_size": [1, 8, 8], "mean": [0.5], "std": [0.5], "crop_pct": 1.0, "interpolation": "bilinear"}
    content = {"pretrained_cfg": {**own, **images} if isinstance(images, dict) else [1]}
    (tmp_path / "config.json").write_text(json.dumps(content))
    settings = {"pretrained": True, "checkpoint": str(tmp_path), "options": {**VIT_DIGITS, "img_size": 8}}
    undeclared: dict[str, Any] = dict.fromkeys(("image_size", "channels", "mean", "std"))
    assert_refused(ModelConfig(**{**vars(timm_vit(**settings)), **undeclared}), problem)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_backbone_with_a_damaged_weight_is_refused_by_the_weights_name(value: float, vit: Path) -> None:
    weights = load_file(vit / "model.safetensors")
    name = next(name for name in weights if name.endswith("layernorm.weight"))
    weights[name][3] = value
    save_file(weights, vit / "model.safetensors", metadata={"format": "pt"})
    changes = {"pretrained": True, "checkpoint": str(vit)}
    assert_refused(
        transformers_vit(**changes), rf"^model.checkpoint={vit}: its weight {name} holds a NaN or an infinity$"
    )


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda weight: weight * math.nan, "its weight blocks.0.attn.qkv.weight holds a NaN or an infinity"),
        (lambda weight: weight.double() + 1e300, "its weight blocks.0.attn.qkv.weight holds a NaN or an infinity"),
        (lambda weight: weight.int(), "has blocks.0.attn.qkv.weight of type torch.int32"),
        (lambda weight: weight.to(torch.complex64), "has blocks.0.attn.qkv.weight of type torch.complex64"),
    ],
)
def test_a_timm_file_with_a_damaged_weight_is_refused(damage: Any, problem: str, tmp_path: Path) -> None:
    weights: dict[str, Tensor] = dict(load_random("timm vit").model.state_dict())
    weights["blocks.0.attn.qkv.weight"] = damage(weights["blocks.0.attn.qkv.weight"])
    save_file(weights, tmp_path / "vit.safetensors")
    config = timm_vit(pretrained=True, checkpoint=str(tmp_path / "vit.safetensors"))
    assert_refused(config, rf"^model.checkpoint={tmp_path}/vit.safetensors: .*{problem}")


def test_the_head_of_a_file_may_be_damaged_because_it_is_drawn_anew(vit: Path) -> None:
    weights = load_file(vit / "model.safetensors")
    weights["classifier.weight"] *= math.nan
    save_file(weights, vit / "model.safetensors", metadata={"format": "pt"})
    backbone = load_backbone(transformers_vit(pretrained=True, checkpoint=str(vit)), 7, 0)
    assert all(weight.isfinite().all() for weight in backbone.model.state_dict().values())


def test_code_in_a_models_folder_is_never_run_and_nobody_is_asked(
    vit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("builtins.input", lambda *question: (asked.append(question), "y")[1])  # type: ignore[func-returns-value]
    (vit / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    classes = ("AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoModelForSequenceClassification")
    code = dict.fromkeys((*classes, "AutoImageProcessor", "AutoProcessor"), "code.X")
    edit(vit / "config.json", model_type="nope", architectures=["X"], auto_map=code)
    edit(vit / "preprocessor_config.json", image_processor_type="X", auto_map=code)
    tokens = {"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["code.X", "code.X"]}}
    (vit / "tokenizer_config.json").write_text(json.dumps(tokens))
    lora = tmp_path / "lora"
    lora.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(vit)}
    (lora / "adapter_config.json").write_text(json.dumps(settings))
    text = ModelConfig(**{**vars(generic(vit)), "modality": "text"})
    for load in (
        lambda: load_backbone(generic(vit), 2, 0),
        lambda: load_backbone(text, 2, 0),
        lambda: load_backbone(transformers_vit(pretrained=True, checkpoint=str(vit)), 2, 0),
        lambda: load_tokenizer(text, SENTENCES),
        lambda: updates_in(lora),
    ):
        with pytest.raises(TensLoRAError):
            load()
    assert (asked, (tmp_path / "ran").exists()) == ([], False)
