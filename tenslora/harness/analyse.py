"""How far the updates of a trained adapter can be compressed along each of their axes.

    python -m tenslora.harness.analyse <run or PEFT folder>

prints, for d_in, d_out, d_head, head, projection and depth, the rank that keeps 90 and 99 per cent of the updates'
energy when that axis alone is cut, and writes the whole spectrum as spectra.json and as a figure.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from tenslora.adapter import load_adapter
from tenslora.constructions import Geometry
from tenslora.decomposition import Updates, spectra
from tenslora.errors import TensLoRAError
from tenslora.files import write_json
from tenslora.harness.results.figures import energy_by_rank, write_figure
from tenslora.peft.saved_lora import CONFIG, read_config, read_updates
from tenslora.projections import find_projections


def updates_in(folder: Path, model: str | None = None, adapt: str = "qkv") -> tuple[Geometry, Updates]:
    """The updates that a run's adapter, or the LoRA in a PEFT folder, adds to its backbone.

    model: for a LoRA, the backbone whose sizes it has, a local folder or a name on the hub; the one that the LoRA names
    unless given. adapt: for a LoRA, which matrices to look at. Raises TensLoRAError if there is no such adapter.
    """
    if not (folder / CONFIG).is_file():
        adapter = load_adapter(folder / "adapter.safetensors")
        with torch.no_grad():
            each = [adapter.dense(layer) for layer in range(adapter.geometry.layers)]
            return adapter.geometry, [[adapter.config.alpha * update for update in layer] for layer in each]
    from transformers import AutoConfig, AutoModel

    name = model or read_config(folder).get("base_model_name_or_path")
    try:
        with torch.device("meta"):  # its shapes are all that is wanted
            backbone = AutoModel.from_config(AutoConfig.from_pretrained(name))
    except (OSError, ValueError, TypeError) as error:
        raise TensLoRAError(
            f"--model {name}: no configuration of a model there ({str(error).splitlines()[0]})"
        ) from error
    geometry, sites = find_projections(backbone, adapt)
    return geometry, read_updates(folder, geometry, sites)


def rank_for(shares: Tensor, energy: float) -> int:
    """The smallest rank that keeps this share of the energy."""
    return next((rank for rank, kept in enumerate(accumulate(shares.tolist()), start=1) if kept >= energy), len(shares))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; a mistake ends it with status 1 and one line."""
    parser = argparse.ArgumentParser(
        prog="python -m tenslora.harness.analyse",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="a finished run's, or one that PEFT saved a LoRA in")
    parser.add_argument("--model", help="a LoRA's backbone, a folder or a name on the hub, if not the one it names")
    parser.add_argument("--adapt", default="qkv", help="which of a LoRA's matrices: letters of qkvo, mlp, or all")
    parser.add_argument("--out", type=Path, help="where to write; the folder itself unless given")
    given = parser.parse_args(arguments)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    out = given.out or given.folder
    try:
        geometry, updates = updates_in(given.folder, given.model, given.adapt)
        if not any(update.any() for layer in updates for update in layer):
            raise TensLoRAError(f"{given.folder}: its updates are all zero")
        found = spectra(updates, geometry)
        plain = {axis: shares.tolist() for axis, shares in found.items()}
        write_json(out / "spectra.json", plain)
        figures = write_figure(energy_by_rank(plain), out, "spectra")
    except TensLoRAError as error:
        sys.exit(f"error: {error}")
    print(f"{'axis':<12}{'size':>6}{'90 %':>8}{'99 %':>8}")
    for axis, shares in found.items():
        print(f"{axis:<12}{len(shares):>6}{rank_for(shares, 0.9):>8}{rank_for(shares, 0.99):>8}")
    print(*figures, sep="\n")


if __name__ == "__main__":
    main()
