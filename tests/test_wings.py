"""The library imports nothing of the harness, and needs torch, safetensors and numpy alone. No model's code is run."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tenslora
from tests.conftest import ROOT

PACKAGE = ROOT / "tenslora"
LIBRARY = [path for path in sorted(PACKAGE.rglob("*.py")) if path.relative_to(PACKAGE).parts[0] != "harness"]


def test_the_names_of_the_library_are_completed() -> None:
    assert set(tenslora.__all__) <= set(dir(tenslora))


def imported_modules(source: str) -> Iterator[str]:
    """The full name of each module that `source` imports, also inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
            # `from tenslora import harness` imports a module too.
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module == "tenslora")


def forbidden_imports(path: Path) -> list[str]:
    """What a module of the library imports and must not."""
    allowed = {*sys.stdlib_module_names, "torch", "safetensors", "numpy", "tenslora"}
    if path.parent == PACKAGE / "peft":
        allowed |= {"peft"}
    if path == PACKAGE / "hub.py":
        allowed |= {"huggingface_hub"}  # imported only where a name on the hub is given, see tests/library_alone.py
    modules = list(imported_modules(path.read_text()))
    return [
        module
        for module in modules
        if module.split(".")[0] not in allowed or module.split(".")[:2] == ["tenslora", "harness"]
    ]


def test_the_library_imports_its_dependencies_alone() -> None:
    assert len(LIBRARY) > 15
    assert {path.name: forbidden_imports(path) for path in LIBRARY if forbidden_imports(path)} == {}


def test_imports_that_are_forbidden_are_seen(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(
        "import torch, hydra.core\nfrom tenslora import harness, ranks\n"
        "def f():\n    from tenslora.harness.config import x\n    from . import y\n    import peft\n"
    )
    assert sorted(forbidden_imports(module)) == sorted(
        ["hydra.core", "tenslora.harness", "tenslora.harness.config", ".", "peft"]
    )


@pytest.mark.slow
def test_every_verb_works_where_only_the_dependencies_can_be_imported(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.library_alone", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def calls_that_might_run_a_models_code(source: str) -> list[str]:
    """The calls by which transformers loads or builds a model, and that do not say trust_remote_code=False."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        if node.func.attr not in ("from_pretrained", "from_config"):
            continue
        if ast.unparse(node.func) == "PeftModel.from_pretrained":  # is given a model, and reads settings and weights
            continue
        said = [keyword.value for keyword in node.keywords if keyword.arg == "trust_remote_code"]
        if not (len(said) == 1 and isinstance(said[0], ast.Constant) and said[0].value is False):
            found.append(ast.unparse(node))
    return found


def test_no_call_may_run_the_code_of_a_model() -> None:
    folders = ("tenslora", "hydra_plugins", "benchmarks", "scripts", "examples")
    paths = [ROOT / "train.py", ROOT / "sweep.py", *(path for name in folders for path in (ROOT / name).rglob("*.py"))]
    assert {path.name: calls for path in paths if (calls := calls_that_might_run_a_models_code(path.read_text()))} == {}


def test_calls_that_might_run_a_models_code_are_seen() -> None:
    source = """
AutoModel.from_pretrained(name)
AutoModel.from_config(config, trust_remote_code=True)
one.of(them).from_pretrained(name, **settings)
AutoModel.from_pretrained(name, trust_remote_code=False)
"""
    assert len(calls_that_might_run_a_models_code(source)) == 3
