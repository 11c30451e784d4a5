"""Checking the settings must not wait for the heavy libraries."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import ROOT

_PROGRAM = "import sys, sweep, train, tenslora.harness.config, tenslora.harness.sweeping.plan; print(*sys.modules)"


def test_settings_are_checked_and_sweeps_planned_without_the_heavy_libraries() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "timm", "sklearn", "wandb", "matplotlib", "scipy"}
    assert not heavy & set(done.stdout.split())
