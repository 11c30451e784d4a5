"""Writes a small table to a folder in a process of its own, and prints which heavy libraries it has loaded.

The first line it prints has those loaded before anything was written, the second those loaded afterwards.
"""

from __future__ import annotations

import sys
from pathlib import Path

import tenslora.harness.results.paper
import tenslora.harness.results.summary
import tenslora.harness.run_record
import tenslora.harness.tracking  # noqa: F401
from tenslora.harness.results import write_results
from tests.tables import small_table


def loaded() -> list[str]:
    return [name for name in ("torch", "matplotlib", "jinja2", "scipy", "numpy", "wandb") if name in sys.modules]


if __name__ == "__main__":
    print(*loaded())
    write_results(small_table(), Path(sys.argv[1]))
    print(*loaded())
