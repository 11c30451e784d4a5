"""The blocks of docs/models.md, run one after the other as a reader would run them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import Commands
from tests.conftest import ROOT
from tests.harness.data.test_data_page import run_blocks

pytestmark = pytest.mark.slow


def test_the_pages_blocks_run(tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    logged = run_blocks((ROOT / "docs" / "models.md").read_text(), tmp_path, commands, "trainer.max_steps=2")
    names = ("digits/vit_tiny_patch16_224", "reviews/my-bert", "digits/vit_digits")
    assert len(logged) == len(names)
    for log, name in zip(logged, names, strict=True):
        assert f"outputs/{name}/" in log
        assert "accuracy: last" in log
