"""Pretrained Transformers with a fresh classification head: from a hub, a local folder, or the package."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tenslora.errors import TensLoRAError
from tenslora.harness.cache import cache_latest
from tenslora.harness.config import ModelConfig
from tenslora.random_streams import stream_seed

log = logging.getLogger(__name__)

EMBEDDED = Path(__file__).parent / "vit_digits.safetensors"


@dataclass(frozen=True)
class Backbone:
    """A model that maps a batch to logits, with its classification head.

    model: the Transformer; call it with keyword inputs. head: the modules that are trained with the adapter.
    input_name: the keyword that images go by.
    """

    model: nn.Module
    head: list[nn.Module]
    input_name: str

    def head_parameters(self) -> dict[str, nn.Parameter]:
        """The head's parameters under their names in the model."""
        ours = {id(parameter) for module in self.head for parameter in module.parameters()}
        return {name: p for name, p in self.model.named_parameters() if id(p) in ours}


def logits_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The logits of a batch, whether the model returns them bare (timm) or in an output object (transformers)."""
    output = model(**inputs)
    logits = getattr(output, "logits", output)
    assert isinstance(logits, Tensor)
    return logits


def load_backbone(config: ModelConfig, classes: int, seed: int, tokenizer: Any = None) -> Backbone:
    """Load a model in float32 and give it a new head for `classes` classes, drawn from `seed`.

    The weights come from `config.checkpoint` (a local file or folder, or "embedded"), else from the hub under
    `config.architecture`; with `pretrained=false` they are random, from `seed`, and nothing is fetched.
    `tokenizer` is needed only for a text model with random weights, whose padding id it sets. The model is the
    caller's own, but a process reads the weights only once.

    Raises TensLoRAError if the weights are missing, damaged or another model's, or the hub cannot be reached.
    """
    backbone = copy.deepcopy(_load(config, classes, 0 if config.pretrained else seed, tokenizer))
    generator = torch.Generator().manual_seed(stream_seed("head", seed))
    for module in backbone.head:
        for part in module.modules():
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=0.02, generator=generator)
                nn.init.zeros_(part.bias)
    return backbone


@cache_latest(1)
def _load(config: ModelConfig, classes: int, seed: int, tokenizer: Any) -> Backbone:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stream_seed("backbone", seed))  # the CPU's alone
        if config.library == "timm":
            backbone = _load_timm(config, classes)
        else:
            backbone = _load_transformers(config, classes, tokenizer)
    backbone.model.float()
    return backbone


@cache_latest(1)
def load_tokenizer(config: ModelConfig, sentences: Iterable[tuple[str, ...]]) -> Any:
    """The tokenizer that a text model was pretrained with.

    With `pretrained=false` there is none to match: a byte-level BPE is trained on `sentences`, deterministically,
    so that a full-size architecture can be run without any hub.

    Raises TensLoRAError if it is missing or the hub cannot be reached.
    """
    if not config.pretrained:
        return _train_tokenizer(sentences)
    from transformers import AutoTokenizer

    source = _folder_or_repository(config)
    with _Fetching(config):
        tokenizer = AutoTokenizer.from_pretrained(source)
        if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers 5 makes of no tokenizer files
            raise OSError("no tokenizer there")
        return tokenizer


def _timm() -> Any:
    # timm's training scripts may log to wandb, and so it imports that; which takes longer than to build a model.
    hidden = "wandb" not in sys.modules
    if hidden:
        sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        import timm
    finally:
        if hidden:
            del sys.modules["wandb"]
    return timm


def _load_timm(config: ModelConfig, classes: int) -> Backbone:
    timm = _timm()
    if not timm.is_model(config.architecture):
        raise TensLoRAError(f"model.architecture={config.architecture}: timm {timm.__version__} has no such model")
    build = {"num_classes": classes, "in_chans": config.channels, **config.options}
    try:
        if config.pretrained and config.checkpoint is None:
            with _Fetching(config):
                model = timm.create_model(config.architecture, pretrained=True, **build)
        else:
            model = timm.create_model(config.architecture, pretrained=False, **build)
    except _UNBUILDABLE as error:
        raise _not_buildable(config, error) from error
    head = model.get_classifier()
    heads = list(head) if isinstance(head, tuple) else [head]
    if config.pretrained and config.checkpoint is not None:
        path = EMBEDDED if config.checkpoint == "embedded" else _weights_file(config)
        _load_timm_weights(model, config, path, heads)
    return Backbone(model, heads, "x")


def _load_timm_weights(model: nn.Module, config: ModelConfig, path: Path, heads: Sequence[nn.Module]) -> None:
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    # In float32 first: what is resampled below would be rounded to the file's precision.
    weights = {name: tensor.float() for name, tensor in _read_weights(path).items()}
    if isinstance(model, VisionTransformer):
        try:
            weights = checkpoint_filter_fn(weights, model)  # resamples the position grid to the image size
        except (KeyError, RuntimeError, AssertionError) as error:
            raise _other_model(config, path, str(error)) from error
    own = model.state_dict()
    of_head = {name for name, module in model.named_modules() if any(module is head for head in heads)}

    def is_head(name: str) -> bool:
        return name.rpartition(".")[0] in of_head

    problems = [f"lacks {name}" for name in own if name not in weights and not is_head(name)]
    problems += [f"has {name}" for name in weights if name not in own and not name.startswith(("head", "fc"))]
    problems += [
        f"has {name} of shape {tuple(weights[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in weights and not is_head(name) and weights[name].shape != own[name].shape
    ]
    if problems:
        raise _other_model(config, path, problems[0] + (f" and {len(problems) - 1} more" if problems[1:] else ""))
    model.load_state_dict({k: v for k, v in weights.items() if k in own and not is_head(k)}, strict=False)


def _load_transformers(config: ModelConfig, classes: int, tokenizer: Any) -> Backbone:
    import transformers
    from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification

    text = config.modality == "text"
    auto = AutoModelForSequenceClassification if text else AutoModelForImageClassification
    if config.pretrained:
        source = _folder_or_repository(config)
        if config.checkpoint is not None:
            transformers.utils.logging.disable_progress_bar()  # a download shows one, a local read need not
        transformers.utils.logging.set_verbosity_error()  # the new head and the dropped one are as intended
        with _Fetching(config):
            model, info = auto.from_pretrained(
                source, num_labels=classes, ignore_mismatched_sizes=True, output_loading_info=True
            )
        prefix = model.base_model_prefix + "."
        lacking = [name for name in info["missing_keys"] if name.startswith(prefix)]
        # (name, its shape, the model's shape) in transformers 5, the name alone in 4
        odd = [item if isinstance(item, str) else item[0] for item in info["mismatched_keys"]]
        odd = [name for name in odd if name.startswith(prefix)]
        if lacking or odd:
            raise _other_model(config, Path(source), f"it lacks or misshapes {(lacking + odd)[0]}")
    else:
        extra = {"pad_token_id": tokenizer.pad_token_id} if text else {"image_size": config.image_size}
        try:
            settings = AutoConfig.for_model(**{**config.options, **extra}, num_labels=classes)
            if text and len(tokenizer) > settings.vocab_size:
                raise ValueError(f"vocab_size must be at least {len(tokenizer)}, the size of the tokenizer's")
            model = auto.from_config(settings)
        except _UNBUILDABLE as error:
            raise _not_buildable(config, error) from error
    size = getattr(model.config, "image_size", None)
    if not text and size not in (None, config.image_size):
        raise TensLoRAError(f"model.image_size={config.image_size}: {config.name} takes images of {size}")
    head = [child for name, child in model.named_children() if name != model.base_model_prefix]
    return Backbone(model, head, "pixel_values")


def _folder_or_repository(config: ModelConfig) -> str:
    # Checked here, since a folder that is not there would be taken for a repository's name.
    if config.checkpoint is not None and not Path(config.checkpoint).is_dir():
        raise TensLoRAError(f"model.checkpoint={config.checkpoint}: no such folder")
    return config.checkpoint or config.architecture


class _Fetching:
    """Turns what can go wrong between a model's name and its files into one line that says what to do."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.client_log = logging.getLogger("huggingface_hub")

    def __enter__(self) -> None:
        # The client warns of each of its retries, over twenty lines in a minute.
        self.level = self.client_log.level
        self.client_log.setLevel(logging.ERROR)
        if self.config.checkpoint is None:
            log.info("%s: looking for %s", self.config.name, self.config.architecture)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.client_log.setLevel(self.level)
        # The hub clients raise OSError, ValueError, RuntimeError and their HTTP libraries' own types.
        if not isinstance(error, Exception) or isinstance(error, TensLoRAError):
            return
        if isinstance(error, TypeError) and self.config.library == "timm":  # options that it does not take
            return
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        config = self.config
        if config.checkpoint is not None:
            raise TensLoRAError(
                f"model.checkpoint={config.checkpoint}: is not a checkpoint of {config.name} ({reason})"
            ) from error
        repository = config.architecture if config.library == "transformers" else f"timm/{config.architecture}"
        raise TensLoRAError(
            f"model={config.name}: {repository} cannot be had from the Hugging Face hub ({reason}); download that "
            f"repository where there is a network and set model.checkpoint to the folder, or model.pretrained=false "
            f"for random weights"
        ) from error


# What the libraries raise for settings that make no model, some of it by assertion.
_UNBUILDABLE = (TypeError, ValueError, KeyError, AssertionError, RuntimeError)


def _not_buildable(config: ModelConfig, error: Exception) -> TensLoRAError:
    if isinstance(error, TensLoRAError):
        return error
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return TensLoRAError(f"model.options={config.options}: make no {config.architecture} ({reason})")


def _weights_file(config: ModelConfig) -> Path:
    path = Path(str(config.checkpoint))
    if path.is_file():
        return path
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path / name).is_file():
            return path / name
    raise TensLoRAError(f"model.checkpoint={path}: no such file, nor a folder with model.safetensors in it")


def _read_weights(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, ValueError, EOFError) as error:
        raise TensLoRAError(f"model.checkpoint={path}: damaged, or not a checkpoint ({error})") from error
    except Exception as error:  # pickle's refusal of anything but tensors has no stable type
        raise TensLoRAError(f"model.checkpoint={path}: not a plain dictionary of tensors") from error
    for key in ("model", "state_dict"):  # as some training scripts nest them
        weights = weights.get(key, weights) if isinstance(weights, dict) else weights
    if not isinstance(weights, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in weights.items()
    ):
        raise TensLoRAError(f"model.checkpoint={path}: not a plain dictionary of tensors")
    return weights


def _other_model(config: ModelConfig, path: Path, difference: str) -> TensLoRAError:
    return TensLoRAError(
        f"model.checkpoint={path}: is not a checkpoint of {config.name} ({config.architecture}): {difference}"
    )


def _train_tokenizer(sentences: Iterable[tuple[str, ...]]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>"]  # RoBERTa's, at RoBERTa's ids
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((sentence for row in sentences for sentence in row), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )
