"""What a sweep has found while it tuned one setting of each row: the scores of all values, and the chosen ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tenslora.harness.results.table import Column, Row, Table


@dataclass(frozen=True)
class Tuning:
    """The values of one setting that were tried for each row of a table, and the value that the row's runs have.

    Args:
        setting: the setting, such as "optimizer.lr".
        trials: the runs that choose, as a table. A row of it is a row of the tuned table with a value of the setting,
            as the last assignment of its variant.
        chosen: the row of `trials` whose value is the best, by row and column of the tuned table. It lacks the rows
            that are not tuned, and those whose value is not decided yet.
        at_edge: the rows and columns whose value is the smallest or the largest that was tried, so that the best one
            may lie beyond it.
    """

    setting: str
    trials: Table
    chosen: Mapping[tuple[Row, Column], Row] = field(default_factory=dict)
    at_edge: frozenset[tuple[Row, Column]] = frozenset()

    def value(self, row: Row, column: Column) -> str:
        """The value that a row of the table has in a column, as text; empty if it is not tuned or not decided yet."""
        chosen = self.chosen.get((row, column))
        return chosen.value_of(self.setting) or "" if chosen else ""

    def text(self, row: Row, column: Column) -> str:
        """The value as a table shows it: with a remark if it is at the edge of what was tried."""
        return self.value(row, column) + " (edge)" * ((row, column) in self.at_edge)

    @property
    def name(self) -> str:
        """The setting without its group, such as "lr"."""
        return self.setting.rpartition(".")[2]

    @property
    def edge_note(self) -> str:
        """A sentence on the rows whose value is at the edge of what was tried; empty if there are none."""
        if not self.at_edge:
            return ""
        several = len(self.trials.columns) > 1
        names = [
            f"{row.label}{f' on {column.label}' if several else ''} ({self.value(row, column)})"
            for row, column in self.chosen
            if (row, column) in self.at_edge
        ]
        return (
            f"The best {self.setting} may lie beyond the values that were tried, because the best of them is the "
            f"smallest or the largest: {', '.join(names)}."
        )
