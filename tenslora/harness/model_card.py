"""The model card of an exported adapter: what it was trained from and on, what it scores, and how to load it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tenslora.harness.backbones.quantisation import bitsandbytes_arguments
from tenslora.harness.backbones.timm_models import create_arguments, weights_file
from tenslora.harness.load_run import LoadedRun
from tenslora.harness.stages import ranks_text, stages_in_file


def base_model(loaded: LoadedRun) -> str:
    """Where the backbone's weights are: the absolute path of a file or folder, or a name on the Hugging Face hub.

    Args:
        loaded: the finished run.
    """
    settings = loaded.run.model
    if settings.library == "timm":
        if settings.checkpoint is None or not settings.pretrained:
            return f"timm/{settings.architecture}"
        return os.path.abspath(weights_file(settings.checkpoint))
    name = str(settings.checkpoint or settings.architecture)
    return os.path.abspath(name) if Path(name).exists() else name


def model_card(loaded: LoadedRun, as_lora: bool = True) -> str:
    """A README.md in Markdown, with the metadata that the Hugging Face hub reads.

    Args:
        loaded: the finished run.
        as_lora: whether the adapter is written as a LoRA, and not as its own tensors.
    """
    run, record, base = loaded.run, loaded.record, base_model(loaded)
    metadata = {
        "base_model": base,
        "library_name": "peft",
        "pipeline_tag": "text-classification" if run.model.modality == "text" else "image-classification",
        "tags": ["tenslora", "lora"] if as_lora else ["tenslora"],
    }
    factorization = "" if record["factorization"] == "matrix" else f", {record['factorization']} factorization"
    rows = {
        "base model": base if run.model.pretrained else f"{base}, with random weights of seed {run.seed}",
        **({"quantization": run.model.quantization} if run.model.quantization else {}),
        "construction": f"{record['tensor_mode']}{factorization}",
        "ranks": f"{ranks_text(stages_in_file(record['ranks']))} ({record['rank_strategy']})",
        "parameters": f"{record['adapter_parameters']:,} in the adapter, {record['head_parameters']:,} in the head",
        "data": f"{record['dataset']}, {record['train_examples']:,} training examples",
        "classes": ", ".join(loaded.classes) or "none, the output is a value",
        "seed": str(run.seed),
    }
    scores = {record["metrics"]["name"]: record["metrics"]["last"], **record["metrics"]["others_last"]}
    for name, score in scores.items():
        rows[f"{name} ({record['scored_on']})"] = f"{score:.4f}"
    form = "written as a LoRA that adds the same update" if as_lora else "for PEFT with the package tenslora"
    registration = [] if as_lora else ["import tenslora.peft  # makes PEFT know the method", ""]
    lines = [
        "---",
        *(f"{name}: {_quoted(value)}" for name, value in metadata.items()),
        "---",
        "",
        f"# {record['tensor_mode']} adapter of {record['model']} for {record['dataset']}",
        "",
        f"A TensLoRA adapter ([arXiv 2509.19391](https://arxiv.org/abs/2509.19391)), {form}, and the trained head.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {_in_cell(value)} |" for name, value in rows.items()),
        "",
        "## How to load it",
        "",
    ]
    if run.model.pretrained:
        lines += [
            "```python",
            *registration,
            *(_timm_code if run.model.library == "timm" else _transformers_code)(loaded),
            "```",
        ]
    else:
        lines += ["The base model's weights are random and in no file; `--format merged` exports all weights."]
    return "\n".join([*lines, ""])


def _quoted(value: Any) -> str:
    # In YAML and Python as in JSON; but not with two escapes for one character, which both would take for two.
    return json.dumps(value, ensure_ascii=False)


def _in_cell(value: str) -> str:
    return " ".join(value.replace("|", "\\|").split())


def _transformers_code(loaded: LoadedRun) -> list[str]:
    is_text = loaded.run.model.modality == "text"
    auto_class = f"AutoModelFor{'Sequence' if is_text else 'Image'}Classification"
    reader = "AutoTokenizer" if is_text else "AutoImageProcessor"
    arguments = f'num_labels={max(1, len(loaded.classes))}, ignore_mismatched_sizes=True, dtype="float32"'
    sentences = ", ".join(['"A sentence."', '"Another."'][: len(loaded.text_columns) or 1])
    imported, quantised = [auto_class, reader], []
    if loaded.run.model.quantization is not None:
        kept = vars(loaded.backbone.model)["config"].quantization_config.llm_int8_skip_modules
        imported.append("BitsAndBytesConfig")
        quantised = [f"quantised = BitsAndBytesConfig(**{bitsandbytes_arguments(loaded.run.model, kept)!r})"]
        arguments += ', quantization_config=quantised, device_map="cpu"'
    return [
        "from peft import PeftModel",
        f"from transformers import {', '.join(imported)}",
        "",
        'folder = "."  # where this file is',
        f"base = {_quoted(base_model(loaded))}",
        *quantised,
        f"model = {auto_class}.from_pretrained(base, {arguments})",
        "model = PeftModel.from_pretrained(model, folder).eval()",
        f"{'tokenizer' if is_text else 'processor'} = {reader}.from_pretrained(folder)",
        f'logits = model(**tokenizer({sentences}, return_tensors="pt")).logits'
        if is_text
        else '# logits = model(**processor(images=image, return_tensors="pt")).logits',
    ]


def _timm_code(loaded: LoadedRun) -> list[str]:
    settings = loaded.run.model
    arguments: dict[str, Any] = {"num_classes": len(loaded.classes) or 1, **create_arguments(settings, loaded.backbone)}
    if settings.checkpoint is not None:
        arguments["pretrained_cfg_overlay"] = {"file": base_model(loaded)}
    assert loaded.image_input is not None
    imported, quantised = [], []
    if settings.quantization is not None:
        imported = ["from torch import nn", "from torchao.quantization import Int8WeightOnlyConfig, quantize_"]
        heads = "[*model.get_classifier()]" if len(loaded.backbone.head) > 1 else "[model.get_classifier()]"
        quantised = [
            f"heads = {heads}",
            "is_quantised = lambda module, _: isinstance(module, nn.Linear) and module not in heads",
            "quantize_(model, Int8WeightOnlyConfig(), filter_fn=is_quantised)",
        ]
    return [
        "import timm",
        "from peft import PeftModel",
        *imported,
        "",
        'folder = "."  # where this file is',
        f"arguments = {arguments!r}",
        f'model = timm.create_model("{settings.architecture}", pretrained=True, **arguments)',
        *quantised,
        "model = PeftModel.from_pretrained(model, folder).eval()",
        f"images = {loaded.image_input.as_timm_config()!r}",
        "transform = timm.data.create_transform(**images)",
        "# logits = model(transform(image)[None])",
    ]
