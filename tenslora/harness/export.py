"""Write a finished run in a form that other libraries load.

    python -m tenslora.harness.export <run> --format peft      # a PEFT LoRA adapter, for PeftModel.from_pretrained
    python -m tenslora.harness.export <run> --format merged    # the backbone with the update in its weights

Both are lossless: every update is a product of two thin matrices, which is what a LoRA is.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tenslora.attachment import adapted_linears, detach, merge
from tenslora.errors import TensLoRAError
from tenslora.harness.load_run import LoadedRun, load_run


@torch.no_grad()
def lora_weights(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The update of each adapted Linear as a LoRA, alpha included: W <- W + B A.

    Returns, by the Linear's path in `model`, A (r, d_in) and B (d_out, r), PEFT's lora_A and lora_B weights at a
    scaling of 1. r is the tensors' d_in rank (or d_out rank, where that is what is multiplied with); where one Linear
    holds several projections that share no left factor, it is the sum of theirs, and B is block diagonal. Raises
    TensLoRAError if there is no adapter, or if it is merged.
    """
    thin = {path: linear.as_lora() for path, linear in adapted_linears(model).items()}
    return {path: (first.T.contiguous(), second.T.contiguous()) for path, (first, second) in thin.items()}


def to_peft(model: nn.Module, head: Sequence[str] = ()) -> Any:
    """Turn an adapted model into a `peft.PeftModel` with an equal LoRA on the same Linear layers.

    model: changed in place; its TensLoRA adapter is taken off. head: paths of modules that were trained as they are,
    which PEFT saves with the adapter (`modules_to_save`). Raises TensLoRAError if there is no adapter, if it is
    merged, or without PEFT.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise TensLoRAError("--format peft: needs the package peft (pip install peft)") from error
    weights = lora_weights(model)
    detach(model)
    ranks = {path: len(a) for path, (a, _) in weights.items()}
    rank = max(ranks.values())
    others = {path: r for path, r in ranks.items() if r != rank}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,  # PEFT scales by lora_alpha / r: by 1
        rank_pattern=others,
        alpha_pattern=others,
        target_modules=list(weights),
        modules_to_save=list(head) or None,
    )
    peft_model = get_peft_model(model, config)  # type: ignore[arg-type]
    modules = dict(peft_model.base_model.model.named_modules())
    with torch.no_grad():
        for path, (a, b) in weights.items():
            modules[path].lora_A["default"].weight.copy_(a)
            modules[path].lora_B["default"].weight.copy_(b)
    return peft_model


def export_peft(trained: LoadedRun, folder: Path) -> None:
    """Write a run's adapter and head as a PEFT adapter. Raises TensLoRAError for a run without one."""
    if not trained.run.has_adapter:
        raise TensLoRAError(f"tensor_mode={trained.run.mode}: has no adapter; --format merged writes its weights")
    model = trained.backbone.model
    trained_as_they_are = [module for module in trained.backbone.head if any(True for _ in module.parameters())]
    head = [name for name, module in model.named_modules() if any(module is one for one in trained_as_they_are)]
    peft_model = to_peft(model, head)
    config = peft_model.peft_config["default"]
    config.base_model_name_or_path = trained.run.model.checkpoint or trained.run.model.architecture
    config.task_type = "SEQ_CLS" if trained.run.model.modality == "text" else None
    peft_model.save_pretrained(str(folder), save_embedding_layers=False)  # else it looks for them on the hub


def export_merged(trained: LoadedRun, folder: Path) -> None:
    """Write the backbone with the update added to its weights, and the head, as its own library saves models.

    transformers: for from_pretrained, with the tokenizer. timm: model.safetensors and config.json, for
    timm.create_model("local-dir:<folder>", pretrained=True).
    """
    model, settings = trained.backbone.model, trained.run.model
    names = list(map(str, trained.record["classes"]))
    if trained.run.has_adapter:
        merge(model)
        detach(model)
    if settings.library == "transformers":
        labels = dict(enumerate(names))
        model.config.id2label, model.config.label2id = labels, {label: index for index, label in labels.items()}  # type: ignore[union-attr,assignment]
        model.save_pretrained(str(folder))  # type: ignore[operator]
        if trained.tokenizer is not None:
            trained.tokenizer.save_pretrained(str(folder))
        return
    from timm.models import save_for_hf

    save_for_hf(
        model,
        str(folder),
        model_config={"pretrained_cfg": {"mean": settings.mean, "std": settings.std}, "label_names": names},
        model_args={"in_chans": settings.channels, **settings.options},
        safe_serialization=True,
    )


FORMATS: Mapping[str, Callable[[LoadedRun, Path], None]] = {"peft": export_peft, "merged": export_merged}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; a mistake ends it with status 1 and one line."""
    parser = argparse.ArgumentParser(
        prog="python -m tenslora.harness.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="the folder of a finished run, with its result.json")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--out", type=Path, help="a folder that is not there yet; <run>/<format> unless given")
    parser.add_argument("--checkpoint", help="where the backbone lies now, if not where it lay when the run was made")
    given = parser.parse_args(arguments)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    out = given.out or given.run / given.format
    try:
        export(given.run, given.format, out, given.checkpoint)
    except TensLoRAError as error:
        sys.exit(f"error: {error}")
    print(out)


def export(run: Path, form: str, out: Path, checkpoint: str | None = None) -> None:
    """Write the run in `run` to the folder `out`, whole or not at all.

    Raises TensLoRAError if there is such a folder already, no completed run, or no room.
    """
    if out.exists():
        raise TensLoRAError(f"--out {out}: is there already")
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        FORMATS[form](load_run(run, checkpoint), temporary)
        temporary.rename(out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TensLoRAError(f"--out {out}: cannot be written ({reason})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    main()
