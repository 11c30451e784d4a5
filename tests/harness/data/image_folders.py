"""Small image datasets in torchvision's layout, whose images are told apart by how red they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from tenslora.harness.config import ImageDatasetConfig, TransformConfig
from tenslora.harness.data import Dataset, Examples, load_dataset

TINY_DTD = {
    "train": ["dotted/d1.jpg", "dotted/d2.jpg", "woven/w1.jpg"],
    "val": ["woven/w2.jpg", "dotted/d3.jpg"],
    "test": ["woven/w3.jpg", "dotted/d4.jpg", "woven/w4.jpg"],
}


def load(name: str, root: Path | None, seed: int = 0, **changes: Any) -> Dataset:
    """Load a dataset; it trains on its train split and is tested on its test split unless `changes` say otherwise."""
    settings: dict[str, Any] = {
        "metrics": ("accuracy",),
        "train_splits": ("train",),
        "test_split": "test",
        "train_size": None,
        "train_fraction": None,
        **changes,
    }
    transform = TransformConfig(1.0, True, "bilinear", 0.0, False, True)
    folder = None if root is None else str(root)
    return load_dataset(
        ImageDatasetConfig(name=name, modality="image", root=folder, transform=transform, **settings), seed
    )


def paint(path: Path, red: int) -> None:
    """Write an image of 6 x 4 pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (red, 0, 0)).save(path, format="PNG")


def reds(examples: Examples) -> list[int]:
    """How red each image is."""
    return [examples.inputs[i].getpixel((0, 0))[0] for i in range(len(examples))]


def write_dtd(root: Path, splits: dict[str, list[str]]) -> Path:
    """Write the images of each split, which are red by 1, 2, 3 and so on."""
    folder = root / "dtd" / "dtd"
    (folder / "labels").mkdir(parents=True)
    red = 0
    for split, names in splits.items():
        (folder / "labels" / f"{split}1.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            red += 1
            paint(folder / "images" / name, red)
    return root


def write_eurosat(root: Path) -> Path:
    """Write 30 images of three classes; an image's class number is its red modulo 3."""
    for red in range(30):
        paint(root / "eurosat" / "2750" / ["Forest", "River", "SeaLake"][red % 3] / f"{red}.jpg", red)
    return root
