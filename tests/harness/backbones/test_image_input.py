"""The images that a model takes, in the words of timm and of transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, ViTConfig

from tenslora.errors import TensLoRAError
from tenslora.harness.backbones import Backbone, load_backbone
from tenslora.harness.backbones.image_input import ImageInput
from tenslora.harness.config import ImageDatasetConfig, ModelConfig, TransformConfig
from tenslora.harness.data import Dataset, Examples
from tenslora.harness.data.encoding import encode
from tests.harness.backbones.tiny_models import VIT, assert_refused
from tests.running import configured

SQUASHED = ImageInput(24, 3, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
CUT = ImageInput(24, 3, (0.5,) * 3, (0.5,) * 3, 0.9, False, "bicubic")  # from 26.67, which timm rounds down
BOTH = ImageInput(30, 3, (0.5,) * 3, (0.5,) * 3, 0.875, True, "bicubic")  # from 34.29
GREY = ImageInput(14, 1, (0.4,), (0.2,), 0.95, False, "bilinear")

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (41, 57, 3), np.uint8))


SQUASHING = {"image_processor_type": "ViTImageProcessor", "size": {"height": 24, "width": 24}, "resample": 3}
CUTTING = {
    "image_processor_type": "BitImageProcessor",
    "size": {"shortest_edge": 28},
    "crop_size": {"height": 24, "width": 24},
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
}
PROCESSORS = {
    "squashed": SQUASHING,
    "cut": CUTTING,
    "cut by a ratio": {
        "image_processor_type": "ConvNextImageProcessor",
        "size": {"shortest_edge": 24},
        "crop_pct": 0.857,
        "resample": 3,
    },
    "not normalized": {**SQUASHING, "do_normalize": False},
    "one number for all channels": {**SQUASHING, "image_mean": 0.4, "image_std": 0.3},
    "from 0 to 255": {**SQUASHING, "do_rescale": False, "image_mean": [120, 120, 120], "image_std": [60, 60, 60]},
    "from -1 to 1": {**SQUASHING, "rescale_factor": 1 / 127.5, "image_mean": [1, 1, 1], "image_std": [1, 1, 1]},
}
"""Contents of preprocessor_config.json, for images of 24 x 24 pixels."""


def as_in_a_run(image_input: ImageInput, image: Image.Image) -> Tensor:
    config = configured("dataset=dtd", "dataset.root=.").dataset
    assert isinstance(config, ImageDatasetConfig)
    config = replace(config, transform=TransformConfig(None, None, None, 0.0, False, True))
    examples = Examples([image], [0])
    backbone = Backbone(torch.nn.Identity(), [], "x", image_input)
    data = encode(Dataset(examples, examples, ("a", "b")), config, backbone, None)
    return data.collate([data.scored[0]])[0]["x"][0]


@pytest.mark.parametrize("image_input", [SQUASHED, CUT, BOTH, GREY])
def test_timm_makes_the_same_input_of_an_image(image_input: ImageInput) -> None:
    transform: Any = timm.data.create_transform(**image_input.as_timm_config())
    image = IMAGE.convert("RGB" if image_input.channels == 3 else "L")
    torch.testing.assert_close(transform(image), as_in_a_run(image_input, image))


@pytest.mark.parametrize("image_input", [SQUASHED, replace(CUT, crop_ratio=24 / 28), BOTH])
def test_transformers_makes_the_same_input_of_an_image(image_input: ImageInput, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(image_input.as_transformers_config()))
    processor = AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)  # the fast one does not resize with PIL
    made = processor(images=IMAGE, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(made, as_in_a_run(image_input, IMAGE), rtol=0, atol=1e-5)


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """The config.json of a ViT that takes images of 24 x 24 pixels; each test's has a path of its own."""
    folder = tmp_path / "my vit"
    ViTConfig(**{**VIT, "image_size": 24}).save_pretrained(folder)
    return folder


def generic(*words: str) -> ModelConfig:
    return configured("dataset=dtd", "dataset.root=.", *words).model


def load_random_of(config: ModelConfig) -> ImageInput | None:
    return load_backbone(config, 3, 0).image_input


@pytest.mark.parametrize("kind", PROCESSORS)
def test_a_generic_models_images_are_those_of_its_processor(kind: str, vit: Path) -> None:
    (vit / "preprocessor_config.json").write_text(json.dumps(PROCESSORS[kind]))
    config = generic("model=hf_image", f"model.checkpoint='{vit}'", "model.pretrained=false")
    assert config.name == "my-vit"
    image_input = load_backbone(config, 3, 0).image_input
    assert image_input is not None
    made = AutoImageProcessor.from_pretrained(vit, use_fast=False)(images=IMAGE, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(as_in_a_run(image_input, IMAGE), made.float(), rtol=0, atol=1e-4)


def test_a_processor_that_cuts_nothing_off_large_images_is_followed(vit: Path) -> None:
    large = {"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 384}, "crop_pct": 0.9}
    (vit / "preprocessor_config.json").write_text(json.dumps(large))
    ViTConfig(**{**VIT, "image_size": 384}).save_pretrained(vit)
    found = load_random_of(generic("model=hf_image", f"model.checkpoint='{vit}'", "model.pretrained=false"))
    assert found is not None and (found.size, found.crop_ratio, found.squash) == (384, 1.0, True)


def test_without_a_processor_a_model_does_not_guess(vit: Path) -> None:
    words = ["model=hf_image", f"model.checkpoint='{vit}'"]
    declared = [*words, "model.image_size=24", "model.channels=3", "model.mean=[0,0,0]", "model.std=[1,1,1]"]
    assert load_random_of(generic(*words, "model.pretrained=false")) == ImageInput(24, 3, (0.5,) * 3, (0.5,) * 3)
    assert load_random_of(generic(*declared, "model.pretrained=false")) == ImageInput(24, 3, (0.0,) * 3, (1.0,) * 3)
    assert_refused(generic(*words), r"model\.checkpoint=.*my vit: (has no preprocessor_config|is not a checkpoint)")


@pytest.mark.parametrize("size", [224, 48])
def test_a_timm_models_images_are_those_of_timm(size: int) -> None:
    tiny = ["+model.options.embed_dim=24", "+model.options.depth=2", "+model.options.num_heads=2"]
    architecture = "vit_tiny_patch16_224"
    words = ["model=timm", f"model.architecture={architecture}", "model.pretrained=false", *tiny]
    image_input = load_random_of(generic(*words, *([] if size == 224 else [f"model.image_size={size}"])))
    assert image_input is not None
    own = timm.data.resolve_model_data_config(timm.create_model(architecture))
    transform: Any = timm.data.create_transform(**{**own, "input_size": (3, size, size)})
    torch.testing.assert_close(as_in_a_run(image_input, IMAGE), transform(IMAGE))


def test_images_that_do_not_fit_the_model_are_refused() -> None:
    words = ["model=timm", "model.architecture=vit_tiny_patch16_224", "model.pretrained=false"]
    with pytest.raises(TensLoRAError, match=r"model\.image_size=225: must be a multiple of 16"):
        generic(*words, "model.image_size=225")
    assert_refused(generic(*words, "model.channels=1"), r"model\.mean=null: .* 3 channels, and the images have 1; set")


@pytest.mark.parametrize(
    ("word", "line"),
    [
        (
            "model.mean=[0.3]",
            r"model\.mean=\[0\.3\]: must have one number for each channel, .* have 3$",
        ),
        (
            "model.channels=1",
            r"model\.mean=null: .* of 3 channels, .* have 1; set model\.channels=3, or ",
        ),
    ],
)
def test_a_mean_of_another_number_of_channels_is_refused(word: str, line: str) -> None:
    words = ["model=timm", "model.architecture=vit_tiny_patch16_224", "model.pretrained=false", "model.image_size=32"]
    assert_refused(generic(*words, word), line)


def test_a_model_of_other_channels_than_images_have_is_refused() -> None:
    words = ["model=timm", "model.architecture=vit_tiny_patch16_224", "model.pretrained=false", "model.image_size=32"]
    words += ["+model.options.in_chans=4", "model.mean=[0,0,0,0]", "model.std=[1,1,1,1]"]
    assert_refused(generic(*words), r"^model: \S+ takes images of 4 channels; must take 1 \(grey\) or 3")


def test_patches_that_overlap_take_images_of_any_size() -> None:
    words = ["model=timm", "model.architecture=pvt_v2_b0", "model.pretrained=false", "model.image_size=32"]
    image_input = load_random_of(generic(*words))  # patches of 7 pixels, one every 4
    assert image_input is not None and image_input.size == 32


def test_a_datasets_settings_come_before_the_models_own() -> None:
    words = ["dataset=dtd", "model=timm", "model.architecture=vit_tiny_patch16_224"]
    for more, expected in (([], CUT), (["dataset.transform.crop_ratio=1"], replace(CUT, crop_ratio=1.0))):
        dataset = configured(*words, *more).dataset
        assert isinstance(dataset, ImageDatasetConfig)
        assert CUT.under(dataset.transform) == expected
    named = configured("dataset=dtd").dataset
    assert isinstance(named, ImageDatasetConfig)
    assert CUT.under(named.transform) == replace(CUT, crop_ratio=1.0, squash=True, interpolation="bilinear")
