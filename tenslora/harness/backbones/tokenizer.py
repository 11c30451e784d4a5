"""The tokenizer of a text model."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tenslora.errors import TensLoRAError, first_line
from tenslora.forms import shown
from tenslora.harness.backbones.hub import fetching, folder_or_repository, source_setting
from tenslora.harness.cache import cache_latest
from tenslora.harness.config import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@cache_latest(1)
def load_tokenizer(config: ModelConfig, sentences: Iterable[tuple[str, ...]]) -> PreTrainedTokenizerBase:
    """The tokenizer that a text model was pretrained with.

    A named model with random weights has no tokenizer yet. For such a model, a byte-level BPE is trained on the given
    sentences, deterministically, so that an architecture of full size can be run without a hub. A generic model has the
    tokenizer of its checkpoint, even if its weights are random, unless the checkpoint has none. Its BPE dropout is
    off, so that a text has the same tokens each time.

    Args:
        config: the model's settings.
        sentences: the training examples, each of one or two sentences; read only if a tokenizer is trained on them.

    Returns:
        The tokenizer.

    Raises:
        TensLoRAError: if the tokenizer is missing or damaged, or if the hub cannot be reached.
    """
    if not config.pretrained and config.architecture is not None:
        return _train_tokenizer(sentences)
    try:
        tokenizer = _load_tokenizer(config)
    except TensLoRAError as error:
        if config.pretrained:
            raise
        log.info("%s: no tokenizer (%s); one is trained on the training sentences", config.name, error.__cause__)
        return _train_tokenizer(sentences)
    names = tokenizer.model_input_names
    is_list = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    if not is_list or [*names][:1] != ["input_ids"]:
        raise TensLoRAError(
            f"{source_setting(config)}: its tokenizer's model_input_names={shown(names)}: must be a list of texts, "
            f"input_ids first (tokenizer_config.json)"
        )
    model: Any = tokenizer.backend_tokenizer.model if tokenizer.is_fast else None
    if dropout := getattr(model, "dropout", None):  # its random numbers have no seed
        log.info("%s: its tokenizer draws tokens at random (dropout %g), which is switched off", config.name, dropout)
        model.dropout = None
    if tokenizer.pad_token is None:  # decoders have none; what is padded is masked, so any token does
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        if tokenizer.pad_token is None:
            raise TensLoRAError(
                f"{source_setting(config)}: its tokenizer has no token to pad texts with; give it a pad_token"
            )
    return tokenizer


def _load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    source = folder_or_repository(config)
    with fetching(config):
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except ValueError as error:
            if "backend tokenizer" in str(error):  # the message lists what may be installed
                raise OSError("it has no tokenizer that transformers can read") from error
            raise
        except TypeError as error:  # of a class that was given no file, because the folder has none
            kind = get_tokenizer_config(source).get("tokenizer_class")
            raise OSError(f"its tokenizer, a {kind}, cannot be loaded: {first_line(error)}") from error
        # In a folder without a tokenizer's files, transformers 5 makes one that knows the special tokens only.
        if len(tokenizer) <= len(tokenizer.all_special_tokens):
            raise OSError("it has no tokenizer")
    return tokenizer


def _train_tokenizer(sentences: Iterable[tuple[str, ...]]) -> PreTrainedTokenizerBase:
    """A byte-level BPE of 8,192 tokens with RoBERTa's special tokens, at RoBERTa's ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8192,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((sentence for example in sentences for sentence in example), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
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
