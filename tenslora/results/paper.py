"""What the paper reports, where we hold a source for it, and what our runs say to its claims."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from tenslora.results.table import Column, Row, Table


@dataclass(frozen=True)
class Verdict:
    """One claim of the paper and what the runs of a table say to it.

    table: isorank, isoparameters or both. verdict: "holds", "does not hold" or "not decided by these runs".
    because: the numbers behind it, in a sentence.
    """

    claim: str
    table: str
    verdict: str
    because: str


@cache
def paper() -> dict[str, Any]:
    """paper.yaml: scores, claims and settings of arXiv 2509.19391. A cell that is absent there is unknown."""
    import yaml

    content: dict[str, Any] = yaml.safe_load((files("tenslora.results") / "paper.yaml").read_text())
    return content
