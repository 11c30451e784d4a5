"""Writes a finished run in a form that other libraries load.

    python -m tenslora.harness.export <run> --format peft      # a PEFT LoRA adapter, for PeftModel.from_pretrained
    python -m tenslora.harness.export <run> --format tenslora  # the same adapter in PEFT, which needs tenslora.peft
    python -m tenslora.harness.export <run> --format merged    # the backbone with the update in its weights

None of them loses anything: every update is a product of two thin matrices, and so is the update of a LoRA.
"""

from __future__ import annotations

if __name__ == "__main__":
    if not __package__:
        raise SystemExit("error: must be started as python -m tenslora.harness.export")
    import tenslora.harness.early  # catches Ctrl-C from here on

    tenslora.harness.early.start_command()

import copy
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import Tensor, nn

from tenslora.attachment import detach, merge
from tenslora.errors import TensLoRAError, os_reason, require_one_of, require_path, require_type
from tenslora.files import read_json, write_bytes, write_json
from tenslora.harness.backbones.timm_models import create_arguments
from tenslora.harness.commands import command_parser, is_text, mistakes_in_one_line, path_argument
from tenslora.harness.config import TextDatasetConfig
from tenslora.harness.data.encoding import longest_text
from tenslora.harness.load_run import LoadedRun, load_run
from tenslora.harness.model_card import base_model, model_card
from tenslora.pretrained import running_statistics


def export_adapter(loaded: LoadedRun, folder: str | Path, as_lora: bool) -> None:
    """Write a run's adapter and head as an adapter of PEFT, with a model card.

    Args:
        loaded: the finished run; its model is changed in place.
        folder: an empty folder, which is made if it is missing.
        as_lora: whether to write an equal LoRA, and not the adapter's own tensors.

    Raises:
        TensLoRAError: for a run without an adapter, and for a folder that cannot be written.
    """
    folder = _writable(loaded, folder)
    # Importing PEFT takes seconds.
    from tenslora.peft.to_lora import to_peft
    from tenslora.peft.to_tenslora import to_tenslora

    run, model = loaded.run, loaded.backbone.model
    if run.adapter is None:
        raise TensLoRAError(f"tensor_mode={run.tensor_mode}: has no adapter; --format merged writes its weights")
    with_parameters = [module for module in loaded.backbone.head if any(True for _ in module.parameters())]
    head = [path for path, module in model.named_modules() if any(module is own for own in with_parameters)]
    # PEFT saves a batch norm as a whole, with the running statistics that training has moved.
    norms = dict.fromkeys(name.rpartition(".")[0] for name in running_statistics(model))
    saved = [*head, *(path for path in norms if not any(path.startswith(f"{own}.") for own in head))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers for a setting with an old name
        peft_model = (to_peft if as_lora else to_tenslora)(model, saved)
    config = peft_model.peft_config["default"]
    config.base_model_name_or_path = base_model(loaded)
    config.task_type = "SEQ_CLS" if run.model.modality == "text" else None
    # Without this setting PEFT looks on the hub whether the embeddings have changed.
    peft_model.save_pretrained(str(folder), save_embedding_layers=False)
    _write_preprocessing(loaded, folder)
    write_bytes(folder / "README.md", model_card(loaded, as_lora).encode())  # in place of PEFT's template


def export_merged(loaded: LoadedRun, folder: str | Path) -> None:
    """Write the backbone with its head and with the update in its weights, in the form of the backbone's own library.

    A transformers model is written with its tokenizer or image processor and loaded by from_pretrained. A timm model is
    loaded by timm.create_model("local-dir:<folder>", pretrained=True), and by transformers too, and its data config is
    that of the run.

    Args:
        loaded: the finished run; its model is changed in place.
        folder: an empty folder, which is made if it is missing.

    Raises:
        TensLoRAError: for a folder that cannot be written.
    """
    folder = _writable(loaded, folder)
    model, settings = loaded.backbone.model, loaded.run.model
    classes = list(loaded.classes)
    if loaded.run.adapter:
        merge(model)
        detach(model)
    if settings.library == "transformers":
        from transformers import PreTrainedModel

        assert isinstance(model, PreTrainedModel)
        if model.config._attn_implementation != "eager":
            # Such an implementation returns no attentions, and transformers saves no config that asks for them.
            model.config.output_attentions = False
        if classes:
            model.config.id2label = dict(enumerate(classes))
            model.config.label2id = {name: index for index, name in enumerate(classes)}
        # Also over the checkpoint's own, by which pipelines choose what they make of the logits.
        model.config.problem_type = "single_label_classification" if classes else "regression"
        model.save_pretrained(str(folder))
        _write_preprocessing(loaded, folder)
        return
    from timm.models import save_for_hf

    image_input = loaded.image_input
    assert image_input is not None
    hook = model.register_state_dict_post_hook(_in_own_memory)  # type: ignore[no-untyped-call]
    try:
        save_for_hf(
            model,
            str(folder),
            model_config={"pretrained_cfg": image_input.as_timm_config(), "label_names": classes},
            model_args=create_arguments(settings, loaded.backbone),
            safe_serialization=True,
        )
    finally:
        hook.remove()
    # timm puts the number of classes there a second time, where transformers would pass it on twice.
    config = read_json(folder / "config.json")
    config.get("model_args", {}).pop("num_classes", None)
    write_json(folder / "config.json", config)


def _writable(loaded: LoadedRun, folder: str | Path) -> Path:
    """The folder of an export, after a check of what a program has given. Until then nothing has been changed."""
    require_type("loaded", loaded, LoadedRun)
    path = require_path("folder", folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TensLoRAError(f"folder={folder}: cannot be written ({os_reason(error)})") from error
    return path


def _in_own_memory(_model: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Copy tensors of a state dict that share memory, which safetensors refuses. Modules of CoaT share theirs."""
    seen: set[int] = set()
    for name, tensor in state.items():
        if type(tensor) is Tensor and not prefix:
            if (memory := tensor.untyped_storage().data_ptr()) in seen:
                state[name] = tensor.clone()
            seen.add(memory)


def _write_preprocessing(loaded: LoadedRun, folder: Path) -> None:
    """Write what turns an input into a batch: the tokenizer, or for an image model of transformers the processor."""
    if loaded.tokenizer is not None:
        assert isinstance(loaded.run.dataset, TextDatasetConfig)
        tokenizer = copy.deepcopy(loaded.tokenizer)  # other runs in this process may share it
        tokenizer.model_max_length = longest_text(loaded.run.dataset, tokenizer, loaded.backbone)
        tokenizer.save_pretrained(str(folder))
    elif loaded.run.model.library == "transformers":
        assert loaded.image_input is not None
        write_json(folder / "preprocessor_config.json", loaded.image_input.as_transformers_config())


FORMATS: Mapping[str, Callable[[LoadedRun, Path], None]] = {
    "peft": partial(export_adapter, as_lora=True),
    "tenslora": partial(export_adapter, as_lora=False),
    "merged": export_merged,
}


def export(run: str | Path, form: str, out: str | Path, checkpoint: str | Path | None = None) -> None:
    """Write a run to a folder, completely or not at all.

    Args:
        run: the folder of the run.
        form: a name in `FORMATS`.
        out: the folder to write, which must not exist.
        checkpoint: the backbone's weights, a file or folder, if they have moved since the run.

    Raises:
        TensLoRAError: for another form and for what is no path, if `out` exists already, if `run` holds no completed
            run, if `out` cannot be written, or if another process is writing it.
    """
    require_one_of("form", form, FORMATS)
    run, out = require_path("run", run), require_path("out", out)
    if not is_text(str(out)):
        raise TensLoRAError(f"--out {out}: must be text in UTF-8")
    if out.exists():
        raise TensLoRAError(f"--out {out}: exists already")
    if out.is_symlink():
        raise TensLoRAError(f"--out {out}: is a link to {out.readlink()}, which does not exist")
    temporary = out.with_name(f".{out.name}.tmp")
    lock = FileLock(temporary / ".lock")
    missing = [folder for folder in temporary.parents if not os.path.exists(folder)]
    try:
        if temporary.is_symlink():  # what it leads to is not ours to remove
            raise TensLoRAError(f"--out {out}: cannot be written ({temporary.name} beside it is a link)")
        if temporary.is_dir() and os.listdir(temporary) and not os.path.exists(lock.lock_file):
            raise TensLoRAError(f"--out {out}: cannot be written ({temporary.name} beside it is of no export)")
        temporary.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise TensLoRAError(f"--out {out}: another process is writing it") from None
        try:
            _empty(temporary)  # of what an export that was killed has left
            FORMATS[form](load_run(run, checkpoint), temporary)
            Path(lock.lock_file).unlink()
            mode = temporary.stat().st_mode & 0o666  # as the umask says; safetensors' own files are for the owner alone
            for file in temporary.iterdir():
                file.chmod(mode)
            temporary.rename(out)
        finally:
            lock.release()
            shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TensLoRAError(f"--out {out}: cannot be written ({reason})") from error
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()  # unless the export is in it


def _empty(folder: Path) -> None:
    for item in folder.iterdir():
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        elif item.name != ".lock":
            item.unlink()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line. A user's mistake ends the process with status 1 and one line."""
    parser = command_parser("tenslora.harness.export", __doc__)
    parser.add_argument("run", type=path_argument, help="the folder of a finished run, with its result.json")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument(
        "--out", type=path_argument, help="the folder to write, which must not exist; default: <run>/<format>"
    )
    parser.add_argument("--checkpoint", help="where the backbone's weights are now, if they have moved since the run")
    given = parser.parse_args(arguments)
    out = given.out or given.run / given.format
    with mistakes_in_one_line():
        export(given.run, given.format, out, given.checkpoint)
        print(out)


if __name__ == "__main__":
    with tenslora.harness.early.undone():
        main()
