"""The settings of a sweep that tunes one setting of each row of its table: the group tune of conf/."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from tenslora.errors import TensLoRAError
from tenslora.harness.config.checks import NonNegativeInt, in_one_line, shown, within

Value = float | int | bool | str | None
"""A value that can be tuned."""


def _single(value: Any) -> Any:
    if isinstance(value, (list, tuple, dict)):
        raise ValueError("must be a number or a word")
    return value


_CHOSEN_OTHERWISE = ("seed", "dataset.validation", "trainer.evaluate")
"""Settings that cannot be tuned, because they say how it is tuned."""

_OF_THE_TABLE = ("tensor_mode.name", "rank_strategy.name", "dataset.name", "dataset.test_split", "model.name")
"""Settings that cannot be tuned, because a run with another value belongs to another row or column of the table."""


@dataclass(frozen=True)
class TuneConfig:
    """How one setting is tuned: its values, and the runs that choose among them.

    Args:
        setting: the setting, such as "optimizer.lr".
        values: the values to choose from, each once; numbers in rising order.
        seeds: the seeds of the runs that choose.
        validation: the fraction of the training split that these runs are scored on.

    Raises:
        TensLoRAError: for fewer than two different values, or fewer than one seed.
    """

    setting: str
    values: tuple[Annotated[Value, BeforeValidator(_single)], ...]
    seeds: tuple[NonNegativeInt, ...]
    validation: Annotated[float, within(0, 1, above=True, below=True)]

    def __post_init__(self) -> None:
        if self.setting in _CHOSEN_OTHERWISE:
            raise TensLoRAError(f"setting={self.setting}: must be another setting, because tune itself sets this one")
        if self.setting in _OF_THE_TABLE:
            raise TensLoRAError(
                f"setting={self.setting}: must be another setting, because rows and columns of the table differ in it"
            )
        if len(set(self.values)) < len(self.values) or len(self.values) < 2:
            raise TensLoRAError(f"values={shown(self.values)}: must be at least two values, all different")
        for value in self.values:
            if isinstance(value, str) and not re.fullmatch(r"[\w./-]+", value):
                raise TensLoRAError(f"values={shown(self.values)}: must be numbers or words")
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            raise TensLoRAError(f"seeds={shown(self.seeds)}: must be at least one seed, all different")
        if self.is_numeric:
            object.__setattr__(self, "values", tuple(sorted(self.values, key=_number)))

    @property
    def is_numeric(self) -> bool:
        """Whether all values are numbers, so that a grid of them has two edges."""
        return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in self.values)

    @property
    def name(self) -> str:
        """The setting without its group, such as "lr"."""
        return self.setting.rpartition(".")[2]


@dataclass(frozen=True)
class _Group:
    tune: TuneConfig


def tune_config(composed: Mapping[str, Any]) -> TuneConfig | None:
    """The checked settings of the group tune.

    Args:
        composed: the plain values of the group: `setting`, `values`, `seeds` and `validation`.

    Returns:
        The settings; None if nothing is tuned.

    Raises:
        TensLoRAError: for an invalid setting. The message names it, its value and what would be valid.
    """
    names = [field.name for field in fields(TuneConfig)]
    if unknown := next((name for name in composed if name not in names), None):
        raise TensLoRAError(f"tune.{unknown}: there is no such setting; a file in tune/ holds {', '.join(names)}")
    if composed.get("setting") is None:
        if composed.get("values"):
            raise TensLoRAError(f"tune.setting=null: must be the setting whose values are {shown(composed['values'])}")
        return None
    try:
        return TypeAdapter(_Group).validate_python({"tune": dict(composed)}).tune
    except ValidationError as error:
        raise in_one_line(error, _Group) from error


def _number(value: Value) -> float:
    assert isinstance(value, (int, float))
    return float(value)
