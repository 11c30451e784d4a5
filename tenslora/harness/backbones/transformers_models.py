"""Image and text models of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tenslora.errors import TensLoRAError
from tenslora.harness.backbones.head import Backbone
from tenslora.harness.backbones.hub import building, fetching, folder_or_repository, wrong_checkpoint
from tenslora.harness.config import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_transformers(config: ModelConfig, classes: int, tokenizer: PreTrainedTokenizerBase | None) -> Backbone:
    """Load a model of transformers, with the head that transformers initialises.

    See `tenslora.harness.backbones.load_backbone`.
    """
    model = _load_pretrained(config, classes) if config.pretrained else _build_random(config, classes, tokenizer)
    image_size = getattr(model.config, "image_size", None)
    if config.modality == "image" and image_size not in (None, config.image_size):
        raise TensLoRAError(
            f"model.image_size={config.image_size}: must be {image_size}, the size of the images that {config.name} "
            f"takes"
        )
    # The Transformer is one child of the model; the other children are the head.
    head = [child for name, child in model.named_children() if name != model.base_model_prefix]
    return Backbone(model, head, "pixel_values")


def _load_pretrained(config: ModelConfig, classes: int) -> PreTrainedModel:
    import transformers

    source = folder_or_repository(config)
    if config.checkpoint is not None:
        transformers.utils.logging.disable_progress_bar()  # a download should show one, reading a folder need not
    transformers.utils.logging.set_verbosity_error()  # transformers would warn that the head is new
    with fetching(config):
        model, info = _auto_class(config).from_pretrained(
            source,
            num_labels=classes,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=False,
        )
    # transformers 5 gives (name, shape in the checkpoint, shape in the model) for a mismatch, transformers 4 the name.
    mismatched = [entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]]
    for name in [*info["missing_keys"], *mismatched]:
        if name.startswith(f"{model.base_model_prefix}."):  # a head may be missing or have another shape
            raise wrong_checkpoint(config, source, f"it lacks {name}, or has it in another shape")
    return model


def _build_random(config: ModelConfig, classes: int, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedModel:
    from transformers import AutoConfig

    given = {"image_size": config.image_size} if tokenizer is None else {"pad_token_id": tokenizer.pad_token_id}
    with building(config):
        architecture = AutoConfig.for_model(**{**config.options, **given}, num_labels=classes)
        if tokenizer is not None and len(tokenizer) > architecture.vocab_size:
            raise ValueError(f"vocab_size must be at least {len(tokenizer)}, the number of the tokenizer's tokens")
        return _auto_class(config).from_config(architecture, trust_remote_code=False)


def _auto_class(config: ModelConfig) -> Any:
    from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if config.modality == "text" else AutoModelForImageClassification
