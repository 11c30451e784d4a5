"""A run with several loggers that was killed and resumed."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.commands import Command, Commands
from tests.running import SHORT


@dataclass(frozen=True)
class Resumed:
    """A run that was killed in its second epoch and resumed.

    Args:
        killed: a copy of its folder after the kill.
        folder: its folder in the end.
        history: of its record.
    """

    killed: Path
    folder: Path
    history: list[dict[str, Any]]


@pytest.fixture(scope="session")
def resumed(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Resumed:
    """Trained with the loggers csv and tensorboard."""
    root = tmp_path_factory.mktemp("resumed")
    words = [*SHORT, "tensor_mode=qkv", "logger=[csv,tensorboard]", "resume=true", "hydra.run.dir=run"]
    assert commands.run(Command("train.py", words, root, "kill step 4")).status == -9
    shutil.copytree(root / "run", root / "killed")
    ended = commands.run(Command("train.py", words, root))
    assert ended.status == 0, ended.err
    record = json.loads((root / "run" / "result.json").read_text())
    return Resumed(root / "killed", root / "run", record["metrics"]["history"])
