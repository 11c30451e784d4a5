"""The project's own files agree, and its code is clean."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT


def test_the_lock_is_within_pyprojects_ranges() -> None:
    lines = (ROOT / "requirements.lock").read_text().split()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line) for line in lines)
    locked = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in itertools.chain(project["dependencies"], *project["optional-dependencies"].values()):
        requirement = Requirement(line)
        if requirement.name != project["name"]:  # an extra may name the others
            assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), line


def test_ci_runs_the_readmes_test_command() -> None:
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    commands = [line for line in ci.splitlines() if line and not line.startswith(("#", "set ", "cd "))]
    assert len(commands) == 1
    assert commands[0] in readme


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["ruff", "check", "."], id="lint"),
        pytest.param(["ruff", "format", "--check", "."], id="format"),
        pytest.param(["mypy"], id="types", marks=pytest.mark.slow),  # without a cache, as in CI
    ],
)
def test_the_code_is_clean(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_git_ignores_no_source() -> None:
    files = [path for folder in ("tenslora", "tests", "conf") for path in (ROOT / folder).rglob("*")]
    sources = [str(path.relative_to(ROOT)) for path in files if path.suffix in (".py", ".yaml", ".safetensors")]
    done = subprocess.run(["git", "check-ignore", *sources], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == ""


def test_a_file_and_its_name_agree() -> None:
    for path in Path(ROOT / "conf").glob("*/*.yaml"):
        content = yaml.safe_load(path.read_text())
        if path.parent.name in ("experiment", "debug", "tune"):  # which have settings of other groups
            continue
        if path.parent.name == "logger":  # of which a run may have several
            assert content is None or content[path.stem] is True
            continue
        settings = content.get(path.parent.name) or content
        # A user's own data and models are named after their files.
        is_own = path.stem in ("image_folder", "text", "timm", "hf_image", "hf_text")
        assert settings["name"] == (None if is_own else path.stem)
