"""Runs of train.py inside the test process, composed as the command line composes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from tenslora.harness.config import RunConfig, register_resolvers, validate
from tests.conftest import ROOT
from train import train

# A run that is over in a second: two batches an epoch, the last one uneven.
SHORT = ["trainer.epochs=2", "dataset.train_size=50", "trainer.device=cpu"]


def composed(*overrides: str) -> DictConfig:
    register_resolvers()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", list(overrides))


def configured(*overrides: str) -> RunConfig:
    """The settings of a run, as train.py would have them."""
    return validate(composed(*overrides))


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    """Train in `folder` and return the record that was written there."""
    train(configured(*overrides), folder, show_progress=False)
    return record(folder)


def record(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return loaded
