"""Any value in any setting: a run with a record that can be written, or one line. Given by hand: 5,000 examples."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import PurePosixPath
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tenslora.errors import TensLoRAError
from tenslora.harness.config import RunConfig, validate
from tests.harness.config.any_value import NUMBERS, TEXTS, VALUES, like
from tests.running import configured

BASES = (
    (),
    ("dataset=cola", "rank_strategy=isorank", "logger=wandb"),
    ("dataset=text", "dataset.root=reviews.csv", "tensor_mode=lora"),
    ("dataset=image_folder", "dataset.root=pets", "model=timm", "model.architecture=vit_tiny_patch16_224"),
    ("tensor_mode=full",),
)


@cache
def settings_of(words: tuple[str, ...]) -> dict[str, Any]:
    return configured(*words).settings()


def paths_in(settings: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all settings and groups."""
    if path:
        yield path
    if isinstance(settings, dict):
        for name, value in settings.items():
            yield from paths_in(value, (*path, name))


@st.composite
def settings_with_any_values(draw: st.DrawFn, bases: Sequence[tuple[str, ...]] = BASES) -> dict[str, Any]:
    """The settings of a run in which one to three of them have any value, or are not there, or are new.

    Args:
        draw: draws values.
        bases: the words of a command line that make the other settings, one of which is drawn.
    """
    settings = copy.deepcopy(settings_of(draw(st.sampled_from(bases))))
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        *groups, name = draw(st.sampled_from(list(paths_in(settings))))
        group = settings
        for each in groups:
            group = group[each]
        how = draw(st.sampled_from(["like", "like", "like", "like", "any", "number", "text", "list", "missing", "new"]))
        if how == "missing":
            del group[name]
        elif how == "new":
            group[draw(TEXTS)] = draw(VALUES)
        elif how == "list":
            group[name] = draw(st.lists(st.one_of(NUMBERS, TEXTS), max_size=4))
        else:
            group[name] = draw({"like": like(group[name]), "any": VALUES, "number": NUMBERS, "text": TEXTS}[how])
        if not settings:
            break
    return settings


@given(settings_with_any_values())
def test_any_value_of_any_setting_is_valid_or_one_line(settings: dict[str, Any]) -> None:
    try:
        run = validate(settings)
    except TensLoRAError as error:
        assert is_one_line(str(error)), repr(str(error))
    else:
        assert_has_a_place_and_a_record(run)


def is_one_line(message: str) -> bool:
    return message.isprintable() and 0 < len(message) <= 1500


def assert_has_a_place_and_a_record(run: RunConfig) -> None:
    written = json.dumps(run.settings(), allow_nan=False)
    written.encode()
    assert validate(json.loads(written)) == run
    folder = PurePosixPath(run.folder())
    assert not folder.is_absolute()
    assert len(folder.parts) == 3 and ".." not in folder.parts
    assert all(len(part.encode()) <= 255 for part in folder.parts)
