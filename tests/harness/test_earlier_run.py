"""A run's folder as the version before RunConfig left it: loaded, exported, resumed, and skipped by a sweep."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from tenslora.harness.export import main as export
from tenslora.harness.load_run import load_run
from tenslora.harness.sweeping.jobs import State
from tests.running import accuracy_of, record, run
from tests.sweeps import planned

NAME = "digits/vit_digits/att_qkv_depth-isorank-seed0-aadfd2fefbd7"
SETTINGS = ("tensor_mode=att_qkv_depth", "rank_strategy=isorank")
FILES = ("result.json", "adapter.safetensors", "head.safetensors", "checkpoint.safetensors")


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """A copy of the outputs that hold the run."""
    shutil.copytree(Path(__file__).parent / "earlier_outputs" / NAME, tmp_path / NAME)
    return tmp_path


def test_it_scores_what_its_record_says(outputs: Path) -> None:
    assert accuracy_of(load_run(outputs / NAME)) == record(outputs / NAME)["metrics"]["last"]


def test_it_is_exported(outputs: Path) -> None:
    export([str(outputs / NAME), "--format", "merged"])
    loaded = load_run(outputs / NAME)
    model = timm.create_model(f"local-dir:{outputs / NAME / 'merged'}", pretrained=True)
    merged = replace(loaded, backbone=replace(loaded.backbone, model=model))
    assert accuracy_of(merged) == record(outputs / NAME)["metrics"]["last"]


def test_it_is_resumed_as_a_run_that_has_finished(outputs: Path) -> None:
    # The adapter's header may have gained entries since; its tensors are the same.
    adapter = load_file(outputs / NAME / "adapter.safetensors")
    before = {name: (outputs / NAME / name).read_bytes() for name in FILES[2:]}
    metrics = record(outputs / NAME)["metrics"]
    assert run(outputs / NAME, *SETTINGS, "resume=true")["metrics"] == metrics
    assert {name: (outputs / NAME / name).read_bytes() for name in FILES[2:]} == before
    again = load_file(outputs / NAME / "adapter.safetensors")
    assert again.keys() == adapter.keys()
    assert all(torch.equal(again[name], adapter[name]) for name in adapter)


def test_a_sweep_takes_it_for_done(outputs: Path) -> None:
    job = planned(outputs, *SETTINGS, "seed=0")
    assert job.folder.path == outputs / NAME
    assert job.look().state is State.DONE
    assert job.in_table(job.look()).score("last") == record(outputs / NAME)["metrics"]["last"]
