"""What the Tab key offers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hydra import initialize_config_dir
from hydra._internal.core_plugins.bash_completion import BashCompletion
from hydra.core.global_hydra import GlobalHydra
from hydra.plugins.completion_plugin import CompletionPlugin

from tenslora.harness.completion import complete_options_in_folders
from tests.running import CONF


@pytest.fixture
def completion(monkeypatch: pytest.MonkeyPatch) -> Iterator[BashCompletion]:
    """Hydra's completion for bash, with the options in folders."""
    # The method is set again after the test.
    monkeypatch.setattr(CompletionPlugin, "_query_config_groups", CompletionPlugin._query_config_groups)
    complete_options_in_folders()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield BashCompletion(GlobalHydra.instance().config_loader())


@pytest.mark.parametrize(
    ("typed", "offers"),
    [
        ("experiment=paper/", [f"experiment=paper/{name}" for name in ("cola", "dtd", "eurosat", "mrpc")]),
        ("experiment=paper/d", ["experiment=paper/dtd"]),
        ("seed=1 +experiment=fact", ["+experiment=fact_tk", "+experiment=fact_tt"]),
        ("dataset=vtab/k", ["dataset=vtab/kitti"]),
        ("dataset=ba", []),  # what is in base/ is no option
        ("optimizer.weight", ["optimizer.weight_decay="]),
        ("tensor_mode=qkv", ["tensor_mode=qkv", "tensor_mode=qkv_depth"]),
    ],
)
def test_options_in_folders_are_offered_beside_hydras_own(
    typed: str, offers: list[str], completion: BashCompletion
) -> None:
    assert completion._query("config", typed) == offers
