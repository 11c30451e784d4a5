from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tenslora.errors import LONGEST_MESSAGE, TensLoRAError
from tenslora.harness.data.unlabelled import unlabelled


def test_paths_images_and_arrays_are_the_same_image(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "image.png")
    given = [str(tmp_path / "image.png"), tmp_path / "image.png", image, pixels, torch.from_numpy(pixels)]
    examples = unlabelled(given, "image")
    assert len(examples) == len(given)
    for read in examples.inputs:
        assert read.mode == "RGB"
        assert np.array_equal(np.asarray(read), pixels)


def test_grey_arrays_may_have_a_channel() -> None:
    pixels = np.arange(30, dtype=np.uint8).reshape(6, 5)
    for read in unlabelled([pixels, pixels[..., None], Image.fromarray(pixels)], "image").inputs:
        assert np.array_equal(np.asarray(read)[..., 0], pixels)


def test_sentences_and_pairs() -> None:
    assert unlabelled(["a", "b"], "text").inputs == [("a",), ("b",)]
    assert unlabelled([("a", "b"), ["c", "d"]], "text").inputs == [("a", "b"), ("c", "d")]


@pytest.mark.parametrize(
    ("inputs", "modality", "message"),
    [
        ("a sentence", "text", "inputs of type str: must be a list of sentences"),
        (Path("a.png"), "image", "inputs of type PosixPath: must be a list of images"),
        (["nowhere.png"], "image", "nowhere.png: no such file"),
        (["s3://b/a.png"], "image", "^image=s3://b/a.png: must be a path on disk, not an address$"),
        (["/dev/null"], "image", "/dev/null: must be a file, not a pipe or a device"),
        (["y" * 300], "image", r"y: cannot be read \(File name too long\)"),
        (["y" * 99_000], "image", r"^y+\.\.\.y+: cannot be read \(File name too long\)$"),
        ([Path("/")], "image", r"/: is a folder; must be an image, such as each of /\*$"),
        ([np.zeros((3, 4))], "image", "an image of type ndarray: must be a path, a PIL image, or an array of bytes"),
        ([np.zeros((3, 4, 5), np.uint8)], "image", "an image of type ndarray: must be"),
        ([np.zeros(64, np.uint8)], "image", "an image of type ndarray: must be"),
        ([np.uint8(3)], "image", "an image of type uint8: must be"),
        ([torch.tensor(3, dtype=torch.uint8)], "image", "an image of type Tensor: must be"),
        ([torch.zeros(3, 4, requires_grad=True)], "image", "an image of type Tensor: must be"),
        ([np.zeros((0, 0), np.uint8)], "image", "an image of width 0 and height 0: must have pixels"),
        ([Image.new("L", (3, 0))], "image", "an image of width 3 and height 0: must have pixels"),
        ([7], "image", "an image of type int: must be"),
        ([7], "text", "7: must be a sentence, or a pair of sentences"),
        ([{"text": "x" * 50_000}], "text", r"^{'text': 'x+\.\.\.x+'}: must be a sentence, or a pair of sentences$"),
        (["a", " "], "text", "a sentence: must not be empty"),
        (["a\udcff"], "text", r"'a\\udcff': must be text in UTF-8"),
        ([("a", "b", "c")], "text", "must be a sentence, or a pair of sentences"),
        (["a", ("b", "c")], "text", "sentences: must be all single sentences, or all pairs"),
    ],
)
def test_anything_else_is_one_line(inputs: Any, modality: str, message: str) -> None:
    with pytest.raises(TensLoRAError, match=message) as caught:
        unlabelled(inputs, modality)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= LONGEST_MESSAGE
