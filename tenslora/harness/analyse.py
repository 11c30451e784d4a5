"""How far the updates of a trained adapter can be compressed along each of their axes.

    python -m tenslora.harness.analyse <run or PEFT folder>

For each of the axes d_in, d_out, d_head, head, projection and depth, the command prints the rank that keeps 90 and 99
per cent of the updates' energy when only that axis is compressed. It writes all spectra to spectra.json and draws them
in a figure, one for each stage of the backbone.
"""

from __future__ import annotations

if __name__ == "__main__":
    if not __package__:
        raise SystemExit("error: must be started as python -m tenslora.harness.analyse")
    import tenslora.harness.early  # catches Ctrl-C from here on

    tenslora.harness.early.start_command()

import os
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain, cycle
from pathlib import Path

import torch
from matplotlib.figure import Figure

from tenslora.adapter import load_adapter
from tenslora.constructions import Geometry, adapted_matrices
from tenslora.decomposition import Updates, spectra
from tenslora.errors import TensLoRAError, first_line, require_path, require_type
from tenslora.files import elsewhere, write_json
from tenslora.harness.backbones.transformers_models import read_hub_config
from tenslora.harness.commands import command_parser, mistakes_in_one_line, path_argument
from tenslora.harness.config.schema import REFERENCES
from tenslora.harness.results.figures.style import COLOURS, GREY, HEIGHT, INK, WIDTH, styled, write_figure
from tenslora.harness.run_folder import RunFolder
from tenslora.harness.stages import as_in_files
from tenslora.projections import find_projections


@torch.no_grad()
def updates_in(folder: Path | str, model: str | None = None, adapt: str = "qkv") -> list[tuple[Geometry, Updates]]:
    """The updates that a run's adapter, or a LoRA saved by PEFT, adds to its backbone.

    Args:
        folder: the folder of the run or of the LoRA.
        model: the LoRA's backbone, a local folder or a name on the hub; None for the backbone that the LoRA names. Only
            the sizes in the backbone's configuration are used.
        adapt: which matrices of the LoRA to analyse, see `constructions.adapted_matrices`.

    Returns:
        For each stage of the backbone, its dimensions and the updates of its layers, see `decomposition.Updates`.

    Raises:
        TensLoRAError: if there is no adapter in the folder, if a run's is not the one that the run wrote, or if the
            backbone cannot be found.
    """
    folder = require_path("folder", folder)
    require_type("model", model, str, type(None))
    adapted_matrices(adapt)  # refuses a wrong adapt also for a run, whose adapter says itself what it adapts
    from tenslora.peft.saved_lora import CONFIG, read_config, read_updates  # PEFT takes seconds, and says what it lacks

    if not (folder / CONFIG).is_file():
        _require_adapter(RunFolder(folder), folder / CONFIG)
        return [
            (
                stage.geometry,
                [[stage.scale * update for update in stage.dense(n)] for n in range(stage.geometry.layers)],
            )
            for stage in load_adapter(RunFolder(folder).adapter).stages
        ]
    from transformers import AutoModel

    name = model or read_config(folder).base_model_name_or_path
    if name is None:
        raise TensLoRAError(f"--model: is missing, and {folder / CONFIG} names no backbone")
    try:
        with torch.device("meta"):  # allocates nothing: only the shapes are used
            backbone = AutoModel.from_config(read_hub_config(name), trust_remote_code=False)
    except TensLoRAError:
        raise
    except Exception as error:  # transformers raises whatever its configs and models come upon
        source = f"--model {name}" if model else f"{folder / CONFIG}: base_model_name_or_path={name}"
        remedy = "" if model else "; give another with --model"
        raise TensLoRAError(
            f"{source}: must be a folder or hub name with a model's config ({first_line(error)}){remedy}"
        ) from error
    stages = find_projections(backbone, adapt)
    updates = read_updates(folder, stages, model=backbone)
    return list(zip([stage.geometry for stage in stages], updates, strict=True))


def _require_adapter(files: RunFolder, of_lora: Path) -> None:
    if not os.path.exists(files.path):
        raise TensLoRAError(f"{files.path}: no such folder")
    record = files.read_record() if os.path.exists(files.result) else None
    if os.path.exists(files.adapter):
        if record:  # without one it may be any adapter that the library saved
            files.require_written(files.adapter, record)
        return
    if record and (mode := record["tensor_mode"]) in REFERENCES:
        raise TensLoRAError(f"{files.path}: is a run of tensor_mode={mode}, which has no adapter")
    raise TensLoRAError(
        f"{files.path}: must hold a run's {files.adapter.name}, or the {of_lora.name} of a LoRA that PEFT saved"
        f"{elsewhere(files.adapter, of_lora)}"
    )


def rank_for(shares: Sequence[float], energy: float) -> int:
    """The smallest rank that keeps a given share of the energy.

    >>> rank_for([0.5, 0.3, 0.2], 0.7)
    2

    Args:
        shares: the share of each singular value in the energy, largest first.
        energy: the share to keep, from 0 to 1.
    """
    return next((rank for rank, kept in enumerate(accumulate(shares), start=1) if kept >= energy), len(shares))


def energy_by_rank(shares: Mapping[str, Sequence[float]]) -> Figure:
    """Draw how much energy the updates keep when only one axis is compressed to a rank. Each axis has a line.

    The rank is in per cent of the axis's size. An axis whose line is the dotted diagonal cannot be compressed.

    Args:
        shares: for each axis, the share of each singular value in the energy, largest first.
    """
    with styled():
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([0, 100], [0, 100], color=GREY, linewidth=0.8, linestyle=(0, (1, 2)))
        for (name, of_axis), colour in zip(shares.items(), cycle(COLOURS.values()), strict=False):
            size = len(of_axis)
            ranks = [100 * rank / size for rank in range(size + 1)]
            energy = [0.0, *accumulate(100 * share for share in of_axis)]
            marker = "o" if size <= 24 else None
            label = f"{name} ({size})"
            axes.plot(ranks, energy, color=colour, linewidth=1.4, marker=marker, markersize=3, label=label)
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 101)
        axes.set_xlabel("rank, % of the axis's size")
        axes.set_ylabel("energy of the updates that is left, %")
        axes.grid(color=INK, alpha=0.1, linewidth=0.6)
        axes.legend(loc="lower right", frameon=False)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. A user's mistake ends the process with status 1 and one line."""
    parser = command_parser("tenslora.harness.analyse", __doc__)
    parser.add_argument("folder", type=path_argument, help="the folder of a finished run, or of a LoRA that PEFT saved")
    parser.add_argument("--model", help="a LoRA's backbone, a folder or a name on the hub; default: as in the LoRA")
    parser.add_argument("--adapt", help="which of a LoRA's matrices: letters of qkvo, mlp, or all; default: qkv")
    parser.add_argument(
        "--out", type=path_argument, help="the folder to write to; default: the folder that is analysed"
    )
    given = parser.parse_args(arguments)
    out = given.out or given.folder
    with mistakes_in_one_line():
        from tenslora.peft.saved_lora import CONFIG

        for option, value in (("--model", given.model), ("--adapt", given.adapt)):
            if value is not None and not (given.folder / CONFIG).is_file():
                raise TensLoRAError(
                    f"{option} {value}: is only for a LoRA that PEFT saved, and {given.folder} has none"
                )
        stages = updates_in(given.folder, given.model, given.adapt or "qkv")
        for number, (_, updates) in enumerate(stages):
            if not any(update.any() for layer in updates for update in layer):
                place = f" in stage {number}" if len(stages) > 1 else ""
                raise TensLoRAError(f"{given.folder}: its updates are all zero{place}")
        shares = [
            {axis: of_axis.tolist() for axis, of_axis in spectra(updates, geometry).items()}
            for geometry, updates in stages
        ]
        write_json(out / "spectra.json", as_in_files(shares))
        names = ["spectra"] if len(stages) == 1 else [f"spectra_{number}" for number, _ in enumerate(stages)]
        files = [write_figure(energy_by_rank(each), out, name) for each, name in zip(shares, names, strict=True)]
        for number, of_stage in enumerate(shares):
            title = "axis" if len(stages) == 1 else f"stage {number}"
            print(f"{title:<12}{'size':>6}{'90 %':>8}{'99 %':>8}")
            for axis, of_axis in of_stage.items():
                print(f"{axis:<12}{len(of_axis):>6}{rank_for(of_axis, 0.9):>8}{rank_for(of_axis, 0.99):>8}")
        print(*chain(*files), sep="\n")


if __name__ == "__main__":
    with tenslora.harness.early.undone():
        main()
