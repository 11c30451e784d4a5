"""Files that list images with their labels: a line is "path label"."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tenslora.errors import TensLoRAError
from tenslora.files import require_file


@dataclass(frozen=True)
class ImageList:
    """The content of a list.

    Args:
        file: the list.
        lines: the number of the line of each image, from 1.
        paths: the images.
        labels: the label of each image, as it is written.
    """

    file: Path
    lines: Sequence[int]
    paths: Sequence[Path]
    labels: Sequence[str]


def read_image_list(file: Path, root: Path, setting: str) -> ImageList:
    """Read a list of images.

    The label is the last word of a line, so that a path may contain spaces. Empty lines are skipped.

    Args:
        file: the list.
        root: the folder that paths are relative to. An image that is not there is looked for in its folder `images`.
        setting: the setting that names the list, with its value, for messages: "dataset.train_list=train.txt".

    Returns:
        The list.

    Raises:
        TensLoRAError: if the file cannot be read or is empty, or for a line that is not a path and a label, whose
            image does not exist, whose label is too long for a number, or that contradicts an earlier one.
    """
    try:
        require_file(file)
        content = file.read_text(encoding="utf-8-sig")
    except TensLoRAError as error:
        raise TensLoRAError(f"{setting}: {error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise TensLoRAError(f"{setting}: {file}: not a readable text file ({error})") from error
    lines, paths, labels = [], [], []
    seen: dict[tuple[int, int], tuple[Path, str]] = {}  # by the file itself, which may be written in several ways
    for number, line in enumerate(content.split("\n"), start=1):
        words = line.strip().rsplit(maxsplit=1)
        if not words:
            continue
        if len(words) < 2:
            raise TensLoRAError(f"{setting}: line {number} of {file} must be 'path label', but is {line.strip()!r}")
        if words[1].isdecimal():
            try:
                int(words[1])
            except ValueError as error:  # Python's int has a limit of 4,300 digits
                raise TensLoRAError(
                    f"{setting}: line {number} of {file}: the label {words[1][:20]}... is too long for a number "
                    f"({len(words[1]):,} digits); must be a shorter one, or a name"
                ) from error
        places = [root / words[0], root / "images" / words[0]]
        path = next((place for place in places if os.path.isfile(place)), None)  # also of a name that is too long
        if path is None:
            raise TensLoRAError(f"{setting}: line {number} of {file}: neither {places[0]} nor {places[1]} exists")
        status = path.stat()
        first, label = seen.setdefault((status.st_dev, status.st_ino), (path, words[1]))
        if label != words[1]:
            same = "" if first == path else f", which is {first},"
            raise TensLoRAError(
                f"{setting}: line {number} of {file}: gives {path}{same} the label {words[1]}, and an "
                f"earlier line {label}"
            )
        lines.append(number)
        paths.append(path)
        labels.append(words[1])
    if not lines:
        raise TensLoRAError(f"{setting}: {file} is empty")
    return ImageList(file, lines, paths, labels)
