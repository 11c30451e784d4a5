"""Runs of train.py inside the test process, composed as the command line composes them."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from tenslora.harness.config import RunConfig, register_resolvers, validate
from tenslora.harness.data import load_dataset
from tenslora.harness.data.encoding import encode
from tenslora.harness.load_run import LoadedRun
from tenslora.harness.training.tasks import outputs_of
from tests.conftest import ROOT
from train import train

CONF = ROOT / "conf"

# A run that is over in a second: two batches an epoch, the last one uneven.
SHORT = ["trainer.epochs=2", "dataset.train_size=50", "trainer.device=cpu"]


def composed(*overrides: str, config_name: str = "config", with_hydra: bool = False) -> DictConfig:
    """The config that Hydra composes for these words of a command line.

    Hydra takes a tenth of a second for what needs its files, which is done once for each choice of options. The other
    values are set afterwards, as Hydra does it.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    values = [override for override in parsed if _is_a_value(override)]
    choices = (override.input_line or "" for override in parsed if override not in values)
    config = copy.deepcopy(_composed(config_name, with_hydra, *choices))
    for override in values:
        OmegaConf.update(config, override.key_or_group, override.value(), force_add=override.is_add())
    return config


def configured(*overrides: str) -> RunConfig:
    """The settings of a run, as train.py would have them."""
    return validate(composed(*overrides))


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    """Train in `folder` and return the record that was written there."""
    train(configured(*overrides), folder, show_progress=False)
    return record(folder)


def record(folder: Path) -> dict[str, Any]:
    """What a run's result.json holds."""
    loaded: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return loaded


def accuracy_of(loaded: LoadedRun) -> float:
    """The share that a loaded run gets right of the examples that it was scored on."""
    run, backbone = loaded.run, loaded.backbone
    dataset = load_dataset(run.dataset, run.seed)
    data = encode(dataset, run.dataset, backbone, loaded.tokenizer)
    inputs, labels = data.collate([data.scored[index] for index in range(len(data.scored))])
    with torch.no_grad():
        predicted = outputs_of(backbone.model.eval(), inputs).argmax(dim=1)
    return float((predicted == labels).double().mean())


def _is_a_value(override: Override) -> bool:
    return not override.is_delete() and not (CONF / override.key_or_group).is_dir()


@cache
def _composed(config_name: str, with_hydra: bool, *overrides: str) -> DictConfig:
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(config_name, list(overrides), return_hydra_config=with_hydra)
