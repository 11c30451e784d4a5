"""The images that a backbone takes: their size, and how pixels become numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from tenslora.errors import TensLoRAError
from tenslora.forms import shown
from tenslora.harness.config import ModelConfig, TransformConfig
from tenslora.harness.config.schema import IMAGENET

INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")
"""torchvision's names of Pillow's methods of resizing, in the order of Pillow's numbers."""


@dataclass(frozen=True)
class ImageInput:
    """How an image becomes a backbone's input.

    The image is resized, its centre is cut out, and pixels in [0, 1] become (pixel - mean) / std.

    Args:
        size: the height and the width of the input, in pixels.
        channels: the number of channels, 1 (grey) or 3 (RGB).
        mean: the mean of each channel.
        std: the standard deviation of each channel.
        crop_ratio: the size of the input divided by the size that the image is resized to.
        squash: True to resize both sides to that size; False to resize the shorter side and keep the proportions.
        interpolation: the method of resizing, as torchvision names it.
    """

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_ratio: float = 1.0
    squash: bool = True
    interpolation: str = "bilinear"

    def under(self, transform: TransformConfig) -> ImageInput:
        """The input of a run: what the dataset's settings leave open (null) stays as the model has it.

        Args:
            transform: the dataset's settings.

        Raises:
            TensLoRAError: if the settings ask for ImageNet's mean of three channels, and the model has another number.
        """
        given = {name: getattr(transform, name) for name in ("crop_ratio", "squash", "interpolation")}
        if transform.normalize == "imagenet":
            if self.channels != len(IMAGENET[0]):
                raise TensLoRAError(
                    f"dataset.transform.normalize=imagenet: the model has {self.channels} channels, not 3"
                )
            given["mean"], given["std"] = IMAGENET
        elif not transform.normalize:  # pixels stay in [0, 1]
            given["mean"], given["std"] = (0.0,) * self.channels, (1.0,) * self.channels
        return replace(self, **{name: value for name, value in given.items() if value is not None})

    @property
    def resized(self) -> int:
        """The size that an image is resized to before its centre is cut out, in pixels."""
        return round(self.size / self.crop_ratio)

    def as_timm_config(self) -> dict[str, Any]:
        """timm's data config, with which `timm.data.create_transform` makes the same input of an image."""
        # timm rounds down where `resized` rounds to the nearest, so that its ratio may have to be a little smaller.
        ratios = (self.crop_ratio, self.size / self.resized, self.size / (self.resized + 0.5))
        return {
            "input_size": [self.channels, self.size, self.size],
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "crop_pct": next(ratio for ratio in ratios if math.floor(self.size / ratio) == self.resized),
            "crop_mode": "squash" if self.squash else "center",
        }

    def as_transformers_config(self) -> dict[str, Any]:
        """The content of preprocessor_config.json, with which transformers makes the same input of an image.

        The processor is CLIP's, because ViT's does not cut out the centre. If an odd number of pixels is cut off, the
        centre of transformers lies one pixel further left or up. Its fast processors resize without PIL, which changes
        pixels a little; `use_fast=False` or `backend="pil"` avoids that.
        """
        from PIL import Image

        squashed = {"height": self.resized, "width": self.resized}
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": self.channels == 3,
            "do_resize": True,
            "size": squashed if self.squash else {"shortest_edge": self.resized},
            "resample": int(Image.Resampling[self.interpolation.upper()]),
            "do_center_crop": True,
            "crop_size": {"height": self.size, "width": self.size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }


def resolve_image_input(config: ModelConfig, own: ImageInput) -> ImageInput:
    """The images that a model takes: as its settings say, and where they are null, as its own files say.

    Args:
        config: the model's settings.
        own: the images that the model takes according to its own files.

    Raises:
        TensLoRAError: if the model takes neither grey images nor those of three colours, or if its own mean or standard
            deviation is for another number of channels.
    """
    given: dict[str, Any] = {
        "size": config.image_size,
        "channels": config.channels,
        "mean": config.mean,
        "std": config.std,
    }
    resolved = replace(own, **{name: value for name, value in given.items() if value is not None})
    if resolved.channels not in (1, 3):
        raise TensLoRAError(
            f"model: {config.name} takes images of {resolved.channels} channels; must take 1 (grey) or 3 (red, green "
            f"and blue)"
        )
    for name, values in (("mean", resolved.mean), ("std", resolved.std)):
        if len(values) == resolved.channels:
            continue
        if getattr(config, name) is not None:
            raise TensLoRAError(
                f"model.{name}={shown(list(values))}: must have one number for each channel, and the images of "
                f"{config.name} have {resolved.channels}"
            )
        raise TensLoRAError(
            f"model.{name}=null: {config.name} has a {name} of {len(values)} channels, and the images have "
            f"{resolved.channels}; set model.channels={len(values)}, or model.mean and model.std"
        )
    _require_usable(config, resolved)
    return resolved


def _require_usable(config: ModelConfig, images: ImageInput) -> None:
    """Check what the files of a model say of its images."""
    ranges = [
        ("size", [images.size], 1, 4096),
        ("mean", images.mean, -1e6, 1e6),
        ("std", images.std, 1e-6, 1e6),
        ("crop_ratio", [images.crop_ratio], 0.01, 1),
    ]
    for name, values, low, high in ranges:
        for value in values:
            if not isinstance(value, (int, float)) or not low <= value <= high:
                raise TensLoRAError(
                    f"model={config.name}: its images have {name}={shown(value)}; must be from {low:g} to {high:g}"
                )
    if images.interpolation not in INTERPOLATIONS:
        raise TensLoRAError(
            f"model={config.name}: its images have interpolation={shown(images.interpolation)}; must be one of "
            f"{', '.join(INTERPOLATIONS)}"
        )


def require_whole_patches(config: ModelConfig, size: int, patch_size: object, stride: object = None) -> None:
    """Check that images divide into a model's patches; the libraries would cut off the rest of an image.

    Args:
        config: the model's settings.
        size: the height and the width of the images, in pixels.
        patch_size: the height and the width of a patch, one number or two; anything else for a model without patches.
        stride: the distance between two patches, in the same form; None if it is their size. Patches that overlap, as
            in PVT v2, cover images of any size.

    Raises:
        TensLoRAError: if they do not.
    """
    if stride is not None and stride != patch_size:
        return
    sides = patch_size if isinstance(patch_size, (tuple, list)) else [patch_size]
    for side in sides:
        if isinstance(side, int) and size % side:
            given = str(size) if config.image_size else f"null (by the model's options or files, {size})"
            raise TensLoRAError(
                f"model.image_size={given}: must be a multiple of {side}, the size of the patches of {config.name}"
            )
