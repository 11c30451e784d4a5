"""Checking the settings must not wait for the heavy libraries."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator

from tests.conftest import ROOT

_PROGRAM = "import sys, sweep, train, tenslora.harness.config, tenslora.harness.sweeping.plan; print(*sys.modules)"


def test_settings_are_checked_and_sweeps_planned_without_the_heavy_libraries() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "timm", "sklearn", "wandb", "matplotlib", "scipy"}
    assert not heavy & set(done.stdout.split())


def test_a_run_does_not_import_peft() -> None:
    """PEFT imports most of transformers. Read from the source, since another test may have imported PEFT here."""
    found, left = set(), ["train"]
    while left:
        module = left.pop()
        path = ROOT / module.replace(".", "/")
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if module not in found and file.is_file():
            found.add(module)
            tree = ast.parse(file.read_text())
            # train.py imports what it needs inside functions; elsewhere a function's import is put off on purpose.
            left += _imported(tree, with_functions=module == "train")
    assert {"tenslora.adapter", "tenslora.harness.adapted_model"} <= found
    assert "tenslora.peft" not in found


def _imported(node: ast.AST, with_functions: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module:
            parts = child.module.split(".")
            yield from (".".join(parts[: n + 1]) for n in range(len(parts)))
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        elif not isinstance(child, ast.FunctionDef | ast.ClassDef) or with_functions:
            is_for_types = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            if not is_for_types:
                yield from _imported(child, with_functions)
