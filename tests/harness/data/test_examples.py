from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tenslora.errors import TensLoRAError
from tenslora.harness.data.examples import ImageFiles, to_rgb
from tests.harness.data.image_folders import paint


@pytest.mark.parametrize("damage", ["empty", "text", "cut"])
def test_an_image_that_cannot_be_read_is_named(damage: str, tmp_path: Path) -> None:
    paint(tmp_path / "good.jpg", 1)
    path = tmp_path / "bad.jpg"
    Image.effect_noise((64, 64), 50).save(path)
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"this is no image", "cut": content[: len(content) // 2]}[damage])
    images = ImageFiles([tmp_path / "good.jpg", path])
    assert images[0].size == (6, 4)
    with pytest.raises(TensLoRAError, match=r"bad\.jpg: not a readable image") as caught:
        images[1]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [RuntimeError, NotImplementedError, KeyError])
def test_whatever_the_reader_of_a_format_raises_the_image_is_named(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error("odd")

    path = tmp_path / "odd.png"
    paint(path, 1)
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(TensLoRAError, match=r"odd\.png: not a readable image"):
        ImageFiles([path])[0]


def test_an_image_that_pil_cannot_convert_is_named() -> None:
    closed = Image.new("L", (2, 2))
    closed.close()
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "png")
    cut_off = Image.open(io.BytesIO(file.getvalue()[:-40]))
    with pytest.raises(TensLoRAError, match=r"^image 3: not a readable image \("):
        to_rgb(cut_off, "image 3")
    bands = io.BytesIO()
    Image.new("RGB", (2, 2)).save(bands, "tiff")
    of_a_satellite: Any = Image.open(bands)
    of_a_satellite.tag_v2[277] = 5  # PIL reads the first three
    for image in (Image.new("La", (2, 2)), closed, of_a_satellite):
        with pytest.raises(TensLoRAError, match=r"^image 3: cannot be converted to RGB \("):
            to_rgb(image, "image 3")


def test_colours_of_16_bits_are_read_with_8() -> None:
    image = Image.open(io.BytesIO(b"P6 1 1 65535\n" + np.array([40000, 0, 65535], ">u2").tobytes()))
    assert to_rgb(image, "deep.ppm").getpixel((0, 0)) == (40000 // 256, 0, 255)


@pytest.mark.parametrize("form", ["png", "jpeg", "gif", "tiff", "bmp"])
def test_an_image_that_was_closed_before_it_was_read_is_named(form: str, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "image", form)
    with Image.open(tmp_path / "image") as image:
        pass
    with pytest.raises(TensLoRAError, match=r"^image 3: has been closed before it was read; call its load\(\) before$"):
        to_rgb(image, "image 3")
    with Image.open(tmp_path / "image") as image:
        image.load()
    assert to_rgb(image, "image 3").size == (4, 4)


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(TensLoRAError, match=r"nowhere\.jpg: not a readable image"):
        ImageFiles([tmp_path / "nowhere.jpg"])[0]


@pytest.mark.filterwarnings("error")
def test_the_transparency_of_a_palette_is_left_out_without_a_warning(tmp_path: Path) -> None:
    given = Image.effect_noise((8, 8), 50).convert("P")
    given.putpalette([level for number in range(256) for level in (number, 255 - number, 7)])
    expected = given.convert("RGB").tobytes()
    given.info["transparency"] = bytes(range(256))
    given.save(tmp_path / "palette.png")
    assert ImageFiles([tmp_path / "palette.png"])[0].tobytes() == expected
    assert to_rgb(given, "given").tobytes() == expected
    assert given.info["transparency"] == bytes(range(256)), "the user's own image stays as it is"
