"""Fixtures and settings of all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from tests.commands import Commands
    from tests.offline import Tracked

# Small tensors gain nothing from threads, and several test processes would compete for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# Tests over all files and settings: a few examples, always the same. By hand: --hypothesis-profile=large.
hypothesis.settings.register_profile(
    "ci",
    max_examples=30,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.register_profile(
    "large", hypothesis.settings.get_profile("ci"), max_examples=5000, derandomize=False, print_blob=True
)
hypothesis.settings.load_profile("ci")

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture
def one_process() -> Iterator[None]:
    """torch.distributed in this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes seconds, and runs before all others")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Several processes share the tests. A long one that began last would run alone while the others wait.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def shared() -> Path:
    """The folder of real data and models, if this machine has it."""
    if not SHARED.is_dir():
        pytest.skip(f"there is no folder of real data and models ({SHARED})")
    return SHARED


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Carries out commands, with a hub in the place of Hugging Face's."""
    from tests.commands import Commands
    from tests.hub_server import serving

    with serving(tmp_path_factory.mktemp("hub")) as hub:
        started = Commands(tmp_path_factory.mktemp("commands"), hub)
        yield started
        started.stop()


@pytest.fixture(scope="session")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    """One short run and one table as W&B holds them offline."""
    from tests.offline import hide_wandb_keys, track_run_and_table

    folder = tmp_path_factory.mktemp("tracked")
    with pytest.MonkeyPatch.context() as patch:
        hide_wandb_keys(patch, folder)
        return track_run_and_table(folder)
