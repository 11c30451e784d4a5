"""The settings of a sweep as a whole: its table, and what is done with it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError

from tenslora.errors import TensLoRAError, first_line
from tenslora.harness.config.checks import FolderName, in_one_line, matching, one_of, require_plain_values


@dataclass(frozen=True)
class TableConfig:
    """A table.

    Args:
        name: names the table's folder.
        title: what the table and its figures are headed with.
        score: the score of a run that is shown: "last", after the last epoch, or "best", of all epochs.
        groups: the datasets of each group, by the group's name.
    """

    name: FolderName
    title: Annotated[str, matching(r".{1,200}", "must be at most 200 characters")]
    score: Annotated[str, one_of(("last", "best"))]
    groups: dict[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        for name, datasets in self.groups.items():
            if not datasets:
                raise TensLoRAError(f"groups.{name}=[]: must be a list of at least one dataset")


@dataclass(frozen=True)
class SweepConfig:
    """The settings that all jobs of a sweep share and that are not settings of a run.

    Args:
        table: the table.
        dry_run: whether to print the plan and stop.
        collect_only: whether to run nothing, and to rebuild the table from the existing records.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", coerce_numbers_to_str=True)

    table: TableConfig
    dry_run: bool
    collect_only: bool


def sweep_config(config: DictConfig) -> SweepConfig:
    """The checked settings of a sweep as a whole.

    Args:
        config: the composed config of the sweep or of one of its jobs.

    Raises:
        TensLoRAError: for an invalid setting. The message names it, its value and what would be valid.
    """
    names = ["table", "dry_run", "collect_only"]
    try:
        given: Any = OmegaConf.to_container(OmegaConf.masked_copy(config, names), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise TensLoRAError(f"{error.full_key}: {first_line(error)}") from error
    require_plain_values(given, ())
    try:
        return _schema().validate_python(given)
    except ValidationError as error:
        raise in_one_line(error, SweepConfig) from error


@cache
def _schema() -> TypeAdapter[SweepConfig]:
    return TypeAdapter(SweepConfig)
