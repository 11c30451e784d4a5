"""What several tests share: backbones with random weights, and where the real data lies."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.offline import Tracked

# Small tensors gain nothing from threads, and test processes side by side would fight over the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"real data and models are not at hand ({SHARED})")
    return SHARED


@pytest.fixture(scope="session")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracked]:
    """One short run and one table as W&B holds them offline."""
    from tests.offline import hide_wandb_keys, track_run_and_table

    folder = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        hide_wandb_keys(patch, folder)
        yield track_run_and_table(folder)
