"""Image and text models of transformers."""

from __future__ import annotations

import logging
import math
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from tenslora.attachment import SUBMODULE, keep_gradients
from tenslora.errors import TensLoRAError, first_line
from tenslora.forms import shown
from tenslora.harness.backbones.head import Backbone
from tenslora.harness.backbones.hub import (
    building,
    fetching,
    folder_or_repository,
    require_readable,
    source_setting,
    wrong_checkpoint,
)
from tenslora.harness.backbones.image_input import (
    INTERPOLATIONS,
    ImageInput,
    require_whole_patches,
    resolve_image_input,
)
from tenslora.harness.backbones.quantisation import bitsandbytes_config, silent_torchao
from tenslora.harness.backbones.random_weights import OwnStream
from tenslora.harness.config import ModelConfig
from tenslora.harness.console import at_least, streams_that_are_open
from tenslora.projections import find_projections

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


_GENERIC = {"text": "hf_text", "image": "hf_image"}
"""The generic model of each modality."""


def load_transformers(config: ModelConfig, classes: int, tokenizer: PreTrainedTokenizerBase | None) -> Backbone:
    """Load a model of transformers, with the head that transformers initialises.

    See `tenslora.harness.backbones.load_backbone`.
    """
    with _quiet(config):
        build = _load_pretrained if config.pretrained else _build_random
        model, new = build(config, classes, tokenizer)
        if config.architecture is not None and config.pretrained:
            _warn_of_options_without_effect(config, model.config)
        keep_gradients(model)
        for module in model.modules():
            if getattr(getattr(module, "config", None), "return_dict", True) is False:  # a tuple has no logits
                module.config.return_dict = True
        if tokenizer is not None:
            # By this token a decoder finds where a text ends. A config.json may name another than the tokenizer pads
            # with.
            model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        head = [*_head_of(config, model).values(), *new]
        if config.modality == "image":
            return Backbone(model, head, "pixel_values", _image_input(config, model))
        return Backbone(
            model, head, "input_ids", max_tokens=_max_tokens(model), embedding_sizes=_embedding_sizes(model)
        )


@contextmanager
def _quiet(config: ModelConfig) -> Iterator[None]:
    """A context in which transformers shows its errors and the progress of a download; then it shows what it did."""
    # transformers imports torchao where it is installed, and asks whether its output is a terminal.
    with silent_torchao(), streams_that_are_open():
        import transformers

        shown = transformers.utils.logging
        downloads = config.pretrained and not (config.checkpoint and Path(config.checkpoint).is_dir())
        hides = shown.is_progress_bar_enabled() and not (downloads and sys.stderr.isatty())
        if hides:
            shown.disable_progress_bar()
        try:
            with at_least(logging.ERROR, "transformers"):  # it would warn that the head is new
                yield
        finally:
            if hides:
                shown.enable_progress_bar()


def _head_of(config: ModelConfig, model: PreTrainedModel) -> dict[str, nn.Module]:
    # The Transformer is one child of the model; the other children are the head.
    children = dict(model.named_children())
    transformer = {model.base_model_prefix}
    if not transformer & children.keys():  # the image half of CLIP, for one
        stages = find_projections(model)
        transformer = {target.path.partition(".")[0] for stage in stages for target in stage.targets}
    head = {name: child for name, child in children.items() if name not in transformer}
    if not any(True for child in head.values() for _ in child.parameters()):
        raise TensLoRAError(
            f"{source_setting(config)}: its head is inside its Transformer ({type(model).__name__}), and would stay "
            f"untrained"
        )
    return head


def _max_tokens(model: nn.Module) -> int | None:
    """The number of a model's learned positions; RoBERTa's begin after the number of the padding token, OPT's at 2."""
    for name, module in model.named_modules():
        if name.endswith(("position_embeddings", "wpe", "embed_positions")) and isinstance(module, nn.Embedding):
            first = getattr(module, "offset", 0 if module.padding_idx is None else module.padding_idx + 1)
            return module.num_embeddings - int(first)
    return None


def _embedding_sizes(model: PreTrainedModel) -> dict[str, int]:
    """The number of rows of the embeddings of tokens and of a pair's segments, by the input of the model."""
    found: dict[str, Any] = {}
    with suppress(NotImplementedError):  # CANINE hashes each character into several embeddings
        found["input_ids"] = model.get_input_embeddings()
    for name, module in model.named_modules():
        if name.endswith("token_type_embeddings"):
            found["token_type_ids"] = module
    return {name: one.num_embeddings for name, one in found.items() if isinstance(one, nn.Embedding)}


def _load_pretrained(
    config: ModelConfig, classes: int, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, list[nn.Module]]:
    """The model with its weights, and those of its modules that the checkpoint lacks and that belong to the head."""
    source = folder_or_repository(config)
    settings: dict[str, Any] = {"num_labels": classes}
    if config.architecture is None:
        settings = {"config": _own_settings(config, classes, tokenizer)}
    if Path(source).is_dir():
        require_readable(
            source, *(file for ending in ("safetensors", "bin", "json") for file in Path(source).glob(f"*.{ending}"))
        )
        if (Path(source) / "adapter_config.json").is_file():
            raise _with_adapter(config, source)
        _require_config_of_its_files(config, Path(source), settings.get("config"))
    if config.quantization is not None:
        with fetching(config):
            own = settings.get("config") or read_hub_config(source)
        _require_floats(config, hasattr(own, "quantization_config"))
        settings |= _quantised(config, own)
    with fetching(config):
        model, info = _auto_class(config).from_pretrained(
            source, ignore_mismatched_sizes=True, output_loading_info=True, trust_remote_code=False, **settings
        )
    _require_floats(config, config.quantization is None and getattr(model, "is_quantized", False))
    if getattr(model, "_hf_peft_config_loaded", False):
        raise _with_adapter(config, source)
    for name in sorted(info["unexpected_keys"]):  # transformers would only drop it
        if {SUBMODULE, "base_layer"} & set(name.split(".")) or ".lora_" in name:
            raise wrong_checkpoint(
                config,
                source,
                f"it holds an adapter ({name}); merge the adapter and detach it before you save the model",
            )
        if config.quantization is None and re.search(r"weight(_scale(_inv)?|_zero_point|\.absmax)$", name):
            raise wrong_checkpoint(
                config, source, f"its weights are quantised ({name}), and its config.json has no quantization_config"
            )
    _head_of(config, model)  # before its weights are taken for those of the Transformer
    # transformers 5 gives (name, shape in the checkpoint, shape in the model) for a mismatch, transformers 4 the name.
    mismatched = [entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]]
    new = set()
    for name in [*info["missing_keys"], *mismatched]:
        # A head may be missing or have another shape. So may the pooler, which pretraining without a task for whole
        # sentences leaves out; it is then trained with the head.
        before, pooler, _ = name.partition(".pooler.")
        if pooler and name in info["missing_keys"]:
            new.add(f"{before}.pooler")
        elif name.startswith(f"{model.base_model_prefix}."):
            raise wrong_checkpoint(config, source, f"it lacks {name}, or has it in another shape")
    own = model.state_dict().keys()
    for name in info["unexpected_keys"]:
        if (first := re.sub(r"\.\d+\.", ".0.", name, count=1)) != name and first in own:
            raise wrong_checkpoint(config, source, f"it has {name}, and its config.json declares fewer layers")
    return model, [model.get_submodule(path) for path in sorted(new)]


def _warn_of_options_without_effect(config: ModelConfig, own: PretrainedConfig) -> None:
    # The options of a named model are for random weights. A checkpoint of its kind may differ from them.
    for name, value in config.options.items():
        if name != "model_type" and (kept := getattr(own, name, None)) != value:
            log.warning(
                "model.options.%s=%s: has no effect, because the checkpoint's config.json says %s; "
                "model=%s replaces its settings",
                *(name, shown(value), shown(kept), _GENERIC[config.modality]),
            )


def _with_adapter(config: ModelConfig, source: str) -> TensLoRAError:
    return wrong_checkpoint(
        config, source, "it holds an adapter of PEFT too, adapter_config.json, which transformers puts on the model"
    )


def _require_floats(config: ModelConfig, are_quantised: bool) -> None:
    if are_quantised:
        raise TensLoRAError(
            f"{source_setting(config)}: its weights are quantised already; must be a checkpoint of floats, which "
            f"model.quantization quantises"
        )


def _build_random(
    config: ModelConfig, classes: int, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, list[nn.Module]]:
    import transformers

    with building(config):
        if config.architecture is None:
            settings = _own_settings(config, classes, tokenizer)
        else:
            given: dict[str, Any] = {"image_size": config.image_size}
            if tokenizer is not None:
                given = {"pad_token_id": tokenizer.pad_token_id}
            settings = transformers.AutoConfig.for_model(**{**config.options, **given}, num_labels=classes)
        if tokenizer is not None:
            known = getattr(settings, "vocab_size", None)  # CANINE reads any character
            if known is not None and len(tokenizer) > known:
                raise ValueError(f"vocab_size must be at least {len(tokenizer)}, the number of the tokenizer's tokens")
        model = _auto_class(config).from_config(settings, trust_remote_code=False)
        if config.quantization is not None:  # transformers quantises nothing but what it reads from a file
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                model = _auto_class(config).from_pretrained(
                    folder, trust_remote_code=False, **_quantised(config, settings)
                )
        return model, []


def _quantised(config: ModelConfig, own: PretrainedConfig) -> dict[str, Any]:
    """The arguments with which from_pretrained quantises a model, on the CPU.

    What is trained stays in float32: the head, and a pooler, which the checkpoint may lack.
    """
    with torch.device("meta"):
        model = _auto_class(config).from_config(own, trust_remote_code=False)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    skipped = [*_head_of(config, model), *(name for name in linears if ".pooler." in name)]
    return {"quantization_config": bitsandbytes_config(config, skipped), "device_map": "cpu", "dtype": torch.float32}


def _own_settings(config: ModelConfig, classes: int, tokenizer: PreTrainedTokenizerBase | None) -> PretrainedConfig:
    """The settings in the config.json of a generic model, with `config.options` in place of its own."""
    with fetching(config):
        own = read_hub_config(folder_or_repository(config), num_labels=classes)
    if own.model_type == "timm_wrapper":
        raise TensLoRAError(
            f"{source_setting(config)}: is a model of timm, whose head transformers does not tell from the rest; use "
            f"model=timm model.architecture={own.architecture}"
        )
    if tokenizer is not None and not hasattr(own, "pad_token_id"):
        raise TensLoRAError(
            f"{source_setting(config)}: is of type {own.model_type}, which is not a model of texts alone; if it has "
            f"one, save that to a folder of its own"
        )
    for name, value in config.options.items():
        if not hasattr(own, name):
            raise TensLoRAError(f"model.options.{name}: the model's config.json ({own.model_type}) has no such setting")
        with building(config):
            setattr(own, name, value)
    if config.options and config.pretrained:  # otherwise the checkpoint would be blamed for them
        with building(config), torch.device("meta"), OwnStream(seed=0):
            _auto_class(config).from_config(own, trust_remote_code=False)
    if tokenizer is not None and (own.pad_token_id is None or not config.pretrained):
        own.pad_token_id = tokenizer.pad_token_id
    return own


def read_hub_config(source: str, **changes: Any) -> PretrainedConfig:
    """Read the config.json of a model of transformers, and check its numbers.

    transformers checks the types. It takes any number, though, and would build a billion layers.

    Args:
        source: a folder or the name of a repository on the hub.
        **changes: settings that replace those of the file.

    Returns:
        The settings.

    Raises:
        TensLoRAError: for a number that is out of range.
        Exception: what transformers raises for a file that is missing or that it cannot read.
    """
    from transformers import AutoConfig

    own: PretrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=False, **changes)
    for name, value in _numbers(own.to_dict()):
        if not math.isfinite(value) and not (name.endswith("limit") and value > 0):  # of Mamba's steps, for one
            raise TensLoRAError(f"{source}: config.json: {name}={value}: must be a finite number")
        if re.search(r"drop(out|_path|$)|pdrop|_prob$", name) and not 0 <= value < 1:
            raise TensLoRAError(f"{source}: config.json: {name}={value}: must be at least 0 and below 1")
    for name, largest in _LARGEST_SIZES.items():
        size = getattr(own, name, None)  # under the name that all models have in common
        if isinstance(size, int) and not 1 <= size <= largest:
            raise TensLoRAError(f"{source}: config.json: {name}={size}: must be from 1 to {largest:,}")
    return own


_LARGEST_SIZES = {
    "num_hidden_layers": 1_000,
    "num_attention_heads": 10_000,
    "num_key_value_heads": 10_000,
    "hidden_size": 1_000_000,
    "intermediate_size": 1_000_000,
    "vocab_size": 100_000_000,
    "max_position_embeddings": 100_000_000,
    "image_size": 4096,
    "patch_size": 4096,
    "num_channels": 100,
}


def _numbers(settings: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in a config.json, with their names."""
    if isinstance(settings, dict):
        for key, value in settings.items():
            yield from _numbers(value, str(key))
    elif isinstance(settings, (list, tuple)):
        for value in settings:
            yield from _numbers(value, name)
    elif isinstance(settings, (int, float)) and not isinstance(settings, bool):
        yield name, settings


def _require_config_of_its_files(config: ModelConfig, folder: Path, settings: PretrainedConfig | None) -> None:
    """Refuse a config.json of another type than the named model's.

    Refuse one whose model is far larger than the weights beside it, too, before memory is taken for it.
    """
    with fetching(config):
        own = settings or read_hub_config(str(folder))
        declares = config.options.get("model_type", own.model_type)
        if config.architecture is not None and own.model_type != declares:
            raise wrong_checkpoint(
                config,
                folder,
                f"it is of type {own.model_type}, not {declares}; use model={_GENERIC[config.modality]} for it",
            )
        with torch.device("meta"):  # allocates nothing
            model = _auto_class(config).from_config(own, trust_remote_code=False)
        is_quantised = _reads_quantised(own)
    if not is_quantised:
        _require_float_weights(config, folder, model)
    declared = sum(parameter.numel() for parameter in model.parameters())
    stored = sum(file.stat().st_size for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern))
    if declared > 2 * stored + 20_000_000:  # four bits for each weight are the fewest; a new head takes some more
        raise wrong_checkpoint(
            config, folder, f"its config.json declares {declared:,} weights, and its files have {stored:,} bytes"
        )


def _reads_quantised(own: PretrainedConfig) -> bool:
    """Whether transformers reads the weights as quantised ones. It passes over a method that it does not know."""
    from transformers.quantizers import AutoHfQuantizer

    declared = getattr(own, "quantization_config", None)
    return declared is not None and bool(AutoHfQuantizer.supports_quant_method(declared))


def _require_float_weights(config: ModelConfig, folder: Path, model: PreTrainedModel) -> None:
    """Refuse whole and complex numbers in the place of weights, which transformers would cut off without a word."""
    before = f"{model.base_model_prefix}."
    weights = {name.removeprefix(before) for name, _ in model.named_parameters()}
    kinds: dict[str, str] = {}
    for path in folder.glob("*.safetensors"):
        with suppress(SafetensorError, OSError), safe_open(path, framework="pt") as file:  # transformers names those
            kinds |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    for name, kind in sorted(kinds.items()):
        if name.removeprefix(before) in weights and not kind.startswith(("F", "BF")):
            raise wrong_checkpoint(config, folder, f"it has {name} of type {kind}; must be of a floating-point type")


def _image_input(config: ModelConfig, model: PreTrainedModel) -> ImageInput:
    """The images that an image model takes."""
    takes = getattr(model.config, "image_size", None)
    own = ImageInput(0, 0, (), ())  # of which all is replaced where the settings declare the images
    if not config.declares_images:
        own = _own_input(config, takes if isinstance(takes, int) else None, getattr(model.config, "num_channels", 3))
    image_input = resolve_image_input(config, own)
    patch_size, stride = (getattr(model.config, name, None) for name in ("patch_size", "patch_stride"))
    require_whole_patches(config, image_input.size, patch_size, stride)
    if takes not in (None, image_input.size) and not _takes(model, image_input):
        raise TensLoRAError(
            f"model.image_size={image_input.size}: must be {takes}, the size of the images that {config.name} takes"
        )
    return image_input


def _takes(model: PreTrainedModel, image_input: ImageInput) -> bool:
    """Whether a model takes images of a size other than its own, as DINOv2 does."""
    try:
        with torch.no_grad():
            model(pixel_values=torch.zeros(1, image_input.channels, image_input.size, image_input.size))
    except (ValueError, RuntimeError):
        return False
    return True


def _own_input(config: ModelConfig, size: int | None, channels: int) -> ImageInput:
    """The images of a generic model, as its preprocessor_config.json describes them.

    Args:
        config: the model's settings.
        size: the size of the images in its config.json; None if that has no size.
        channels: the number of channels in its config.json.
    """
    from transformers import AutoImageProcessor

    try:
        with fetching(config):
            processor = AutoImageProcessor.from_pretrained(folder_or_repository(config), trust_remote_code=False)
    except TensLoRAError as error:
        if not config.pretrained and size is not None:  # random weights have no statistics to keep to
            return ImageInput(size, channels, (0.5,) * channels, (0.5,) * channels)
        raise TensLoRAError(
            f"{source_setting(config)}: has no preprocessor_config.json that transformers can read; set "
            f"model.image_size, model.channels, model.mean and model.std"
        ) from error
    try:
        return _input_of(processor, config, channels)
    except TensLoRAError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise TensLoRAError(
            f"{source_setting(config)}: its preprocessor_config.json cannot be used ({first_line(error)}); set "
            f"model.image_size, model.channels, model.mean and model.std"
        ) from error


def _input_of(processor: Any, config: ModelConfig, channels: int) -> ImageInput:
    """The images of a generic model, as its image processor makes them."""
    if getattr(processor, "do_flip_channel_order", False):
        raise TensLoRAError(
            f"{source_setting(config)}: takes its images in blue, green and red (preprocessor_config.json: "
            f"do_flip_channel_order), and only red, green and blue are known here"
        )
    for step in ("rescale_offset", "include_top"):  # of EfficientNet's processor
        if getattr(processor, step, False):
            raise TensLoRAError(
                f"{source_setting(config)}: its images are made with {step} (preprocessor_config.json), which is not "
                f"known here; set model.image_size, model.channels, model.mean and model.std"
            )
    mean, std = (0.0,) * channels, (1.0,) * channels
    # A processor multiplies pixels from 0 to 255 by a factor, usually 1 / 255, before it normalizes them.
    scale = 255 * (processor.rescale_factor if processor.do_rescale else 1)
    if processor.do_normalize:
        of_channels = (processor.image_mean, processor.image_std)
        # transformers takes one number for that of each channel.
        mean, std = (tuple([own] * channels if isinstance(own, (int, float)) else own) for own in of_channels)
    resize = dict(processor.size or {})
    crops = getattr(processor, "do_center_crop", False) and processor.crop_size
    cut = dict(processor.crop_size) if crops else resize
    resized, side = (edges.get("height", edges.get("shortest_edge")) for edges in (resize, cut))
    if side is None or cut.get("width", side) != side:
        raise TensLoRAError(
            f"{source_setting(config)}: its images have no height equal to the width (preprocessor_config.json: size "
            f"{resize})"
        )
    resized, squash = resized or side, "shortest_edge" not in resize
    ratio = None if squash else getattr(processor, "crop_pct", None)
    if ratio is not None and not crops and resized >= 384:  # from there on ConvNeXt's processor cuts nothing off
        squash = True
    elif ratio is not None:
        resized = int(resized / ratio)
    return ImageInput(
        size=side,
        channels=channels,
        mean=tuple(value / scale for value in mean),
        std=tuple(value / scale for value in std),
        crop_ratio=min(1.0, side / resized),
        squash=squash,
        interpolation=INTERPOLATIONS[int(processor.resample)],
    )


def _auto_class(config: ModelConfig) -> Any:
    from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if config.modality == "text" else AutoModelForImageClassification
