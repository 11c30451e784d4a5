"""Results that several tests look at, written once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tenslora.harness.results import write_results
from tenslora.harness.results.report import to_html
from tenslora.harness.results.summary import summarize
from tests.tables import sample_table, small_table


@pytest.fixture(scope="session")
def small_results(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The files of `small_table`, in a folder that has nothing else."""
    return write_results(small_table(), tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def sample_report() -> str:
    """The HTML report of `sample_table`."""
    return to_html(summarize(sample_table()))
