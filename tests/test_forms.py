from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from tenslora.errors import TensLoRAError
from tenslora.forms import from_json


@dataclass(frozen=True)
class Size:
    width: int

    def __post_init__(self) -> None:
        if self.width < 1:
            raise TensLoRAError(f"width={self.width}: must be at least 1")


@dataclass
class Settings:
    alpha: float
    size: Size
    bias: bool = False
    name: str | None = None
    ranks: tuple[int, ...] | None = None
    pattern: dict[str, float] = field(default_factory=dict)


def test_data_of_the_declared_form_become_the_dataclass() -> None:
    data = {"alpha": 4, "size": {"width": 3}, "bias": True, "ranks": [1, 2], "pattern": {"q": 1}}
    settings = from_json(Settings, data)
    assert settings == Settings(4.0, Size(3), True, None, (1, 2), {"q": 1.0})
    assert type(settings.alpha) is type(settings.pattern["q"]) is float
    assert from_json(Settings, {"alpha": 0.5, "size": {"width": 1}}) == Settings(0.5, Size(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": "4"}, 'alpha="4": must be a finite number'),
        ({"alpha": True}, "alpha=true: must be a finite number"),
        ({"alpha": float("nan")}, "alpha=NaN: must be a finite number"),
        ({"alpha": float("-inf")}, "alpha=-Infinity: must be a finite number"),
        ({"alpha": None}, "alpha=null: must be a finite number"),
        ({"alpha": 10**400}, f"alpha=1{'0' * 76}...: must be a finite number"),
        ({"size": 3}, "size=3: must be an object"),
        ({"size": {}}, "size.width: is missing"),
        ({"size": {"width": 1.0}}, "size.width=1.0: must be a whole number"),
        ({"size": {"width": 0}}, "size.width=0: must be at least 1"),
        ({"size": {"width": 1, "he\night": 1}}, r'size."he\night": there is no such field'),
        ({"bias": 0}, "bias=0: must be true or false"),
        ({"name": []}, "name=[]: must be text or null"),
        ({"ranks": 3}, "ranks=3: must be a list or null"),
        ({"ranks": [1, "2"]}, 'ranks[1]="2": must be a whole number'),
        ({"pattern": {"q": None}}, 'pattern["q"]=null: must be a finite number'),
        ({"pattern": [1]}, "pattern=[1]: must be an object"),
    ],
)
def test_data_of_another_form_are_refused_by_the_fields_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TensLoRAError) as caught:
        from_json(Settings, {"alpha": 4.0, "size": {"width": 3}, **changes})
    assert str(caught.value) == message


@pytest.mark.parametrize("data", ["[]", "5", "null", '"text"', "{}", "[" * 900 + "]" * 900])
def test_what_is_no_object_with_the_fields_is_refused(data: str) -> None:
    with pytest.raises(TensLoRAError, match=r"must be an object, not |alpha: is missing"):
        from_json(Settings, json.loads(data))


def test_other_fields_may_be_left_out() -> None:
    assert from_json(Size, {"width": 3, "height": []}, ignore_others=True) == Size(3)
