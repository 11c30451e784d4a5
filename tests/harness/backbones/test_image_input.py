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
from transformers import AutoImageProcessor

from tenslora.harness.backbones import Backbone
from tenslora.harness.backbones.image_input import ImageInput
from tenslora.harness.config import ImageDatasetConfig, TransformConfig
from tenslora.harness.data import Dataset, Examples
from tenslora.harness.data.encoding import encode
from tests.running import configured

SQUASHED = ImageInput(24, 3, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
CUT = ImageInput(24, 3, (0.5,) * 3, (0.5,) * 3, 0.9, False, "bicubic")  # from 26.67, which timm rounds down
BOTH = ImageInput(30, 3, (0.5,) * 3, (0.5,) * 3, 0.875, True, "bicubic")  # from 34.29
GREY = ImageInput(14, 1, (0.4,), (0.2,), 0.95, False, "bilinear")

IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (41, 57, 3), np.uint8))


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
