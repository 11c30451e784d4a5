"""Adapts, trains, saves, loads and merges a plain torch model with nothing but the library's own dependencies.

    python -m tests.library_alone <folder>

The folder takes the saved adapter. Anything that goes wrong ends the program with a traceback.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

DEPENDENCIES = ("torch", "safetensors", "numpy")


class OnlyDependencies(MetaPathFinder):
    """Finds a module only if it is in the standard library, in the library's dependencies or in their own dependencies.

    Args:
        finders: what looks for the modules.
    """

    def __init__(self, finders: Sequence[Any]) -> None:
        distributions = set().union(*map(_with_requirements, DEPENDENCIES))
        packages = importlib.metadata.packages_distributions().items()
        installed_with_them = {name for name, owners in packages if distributions & set(map(_canonical, owners))}
        self.finders = finders
        self.allowed = {*sys.stdlib_module_names, *installed_with_them, "tenslora", "tests"}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """As the finders do, but None for a module of any other package."""
        package = fullname.partition(".")[0]
        if package not in self.allowed and not package.startswith("_sysconfigdata"):  # Python's build writes that one
            return None
        return next(filter(None, (finder.find_spec(fullname, path, target) for finder in self.finders)), None)


def _with_requirements(distribution: str) -> set[str]:
    # The distribution and what it requires, directly and indirectly, without extras.
    found, waiting = set(), {_canonical(distribution)}
    while waiting:
        found.add(name := waiting.pop())
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # required on another platform
            continue
        names = {_canonical(re.split(r"[^\w.-]", line)[0]) for line in requirements if "extra ==" not in line}
        waiting |= names - found
    return found


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main(folder: Path) -> None:
    """Use every verb of the library once, each against what it promises."""
    import torch
    from torch.nn import functional as F

    from tenslora import AdapterConfig, RankStrategy, attach, detach, disabled, load, merge, save_pretrained, unmerge
    from tests.plain_transformer import PlainTransformer

    torch.manual_seed(0)
    model, x = PlainTransformer(), torch.randn(16, 5, 24)
    labels = (x[:, :, 0].mean(1) > 0).long()
    backbone = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = model(x)

    attach(model, AdapterConfig("att_qkv_depth", RankStrategy("isoparameters"), adapt="all"), train=["head"])
    torch.testing.assert_close(model(x), before)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    trained = model(x).detach()

    other = PlainTransformer()
    other.load_state_dict(backbone)
    load(other, save_pretrained(model, folder / "adapter"))
    assert torch.equal(other(x), trained)

    with torch.no_grad():
        model.head.load_state_dict({name: backbone[f"head.{name}"] for name in ("weight", "bias")})
    trained = model(x).detach()
    with disabled(model):
        torch.testing.assert_close(model(x), before)
    merge(model)
    torch.testing.assert_close(model(x), trained, rtol=1e-4, atol=1e-5)
    unmerge(model)
    torch.testing.assert_close(model(x), trained, rtol=1e-4, atol=1e-5)
    detach(model)
    assert model.state_dict().keys() == backbone.keys()
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


if __name__ == "__main__":
    sys.meta_path[:] = [OnlyDependencies(list(sys.meta_path))]
    assert not any(
        map(
            importlib.util.find_spec,
            ("hydra", "omegaconf", "transformers", "timm", "peft", "scipy", "yaml", "huggingface_hub"),
        )
    )
    main(Path(sys.argv[1]))
