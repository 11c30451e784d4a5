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

from safetensors import SafetensorError

from tenslora.attachment import detach, merge
from tenslora.errors import TensLoRAError
from tenslora.harness.load_run import LoadedRun, load_run
from tenslora.peft.to_lora import to_peft


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
