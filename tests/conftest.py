"""What several tests share: backbones with random weights, and where the real data lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

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
