"""Any timm name, and any folder of transformers, as the backbone of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from tenslora import AdapterConfig, RankStrategy, attach
from tenslora.errors import TensLoRAError
from tenslora.harness.adapted_model import adapted_model
from tenslora.harness.backbones import Backbone, load_backbone, load_tokenizer
from tenslora.harness.backbones.tokenizer import _train_tokenizer
from tenslora.harness.data import Dataset, Examples
from tenslora.harness.data.encoding import encode
from tenslora.peft import TensLoraConfig
from tests.harness.backbones.tiny_models import SENTENCES, TEXT, trained_tokenizer
from tests.running import configured

SIZES = {key: value for key, value in TEXT["bert"].items() if key != "model_type"}


def load(*words: str) -> Backbone:
    """The backbone of a run, after its adapter was attached."""
    run = configured(*words, "tensor_mode=depth", "rank_strategy=isorank")
    tokenizer = load_tokenizer(run.model, SENTENCES) if run.model.modality == "text" else None
    backbone = load_backbone(run.model, 3, 0, tokenizer)
    adapted_model(run, backbone, torch.device("cpu"))
    return backbone


def save(folder: Path, kind: str, tokenizer: bool = True, **settings: Any) -> list[str]:
    """Leave a small text model with random weights, and return the words that choose it."""
    config = getattr(transformers, kind.partition("For")[0].removesuffix("Model") + "Config")
    torch.manual_seed(0)
    getattr(transformers, kind)(
        config(**{"vocab_size": len(trained_tokenizer()), **SIZES, **settings})
    ).save_pretrained(folder)
    if tokenizer:
        trained_tokenizer().save_pretrained(folder)
    return ["dataset=cola", "model=hf_text", f"model.checkpoint={folder}"]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("model=timm model.architecture=vit_tiny_patch16_224.augreg_in21k", "vit_tiny_patch16_224.augreg_in21k"),
        ("model=timm model.architecture=vit_tiny_patch16_224 model.checkpoint=weights/best.pth", "best.pth"),
        ("model=hf_image model.checkpoint=google/vit-base", "google--vit-base"),
        ("model=hf_image model.checkpoint=weights", "weights"),
        ("model=hf_image model.checkpoint=weights/vit/", "vit"),
        ("model=hf_image model.checkpoint=weights/vit/../vit", "vit"),
        ("model=hf_image model.checkpoint=weights/vit model.name=mine", "mine"),
    ],
)
def test_a_generic_model_is_named_after_its_checkpoint(
    words: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights" / "vit").mkdir(parents=True)
    (tmp_path / "weights" / "best.pth").touch()
    monkeypatch.chdir(tmp_path)
    run = configured("dataset=dtd", *words.split())
    assert run.model.name == name
    assert run.folder().startswith(f"dtd/{name}/")


@pytest.mark.parametrize(
    ("kind", "tokens", "head"),
    [
        ("BertForSequenceClassification", 512, {"classifier"}),
        ("BertForMaskedLM", 512, {"classifier", "bert.pooler.dense"}),  # pretraining on words alone leaves no pooler
        ("RobertaForMaskedLM", 510, {"classifier.dense", "classifier.out_proj"}),
        ("GPT2Model", 32, {"score"}),
        ("OPTModel", 32, {"score"}),
        ("LlamaForCausalLM", None, {"score"}),
    ],
)
def test_a_text_models_positions_and_head(kind: str, tokens: int | None, head: set[str], tmp_path: Path) -> None:
    opt = {"max_position_embeddings": 32, "word_embed_proj_dim": 16, "ffn_dim": 24}
    settings: dict[str, Any] = {"GPT2Model": {"n_positions": 32}, "OPTModel": opt}.get(kind, {})
    backbone = load(*save(tmp_path / "model", kind, **settings))
    assert backbone.max_tokens == tokens
    words = {name: module for name, module in backbone.model.named_modules() if isinstance(module, nn.Embedding)}
    known = {"input_ids": "word_embeddings embed_tokens wte", "token_type_ids": "token_type_embeddings"}
    assert backbone.embedding_sizes == {
        name: module.num_embeddings
        for name, names in known.items()
        for path, module in words.items()
        if path.rpartition(".")[2] in names.split()
    }
    assert {name.rpartition(".")[0] for name in backbone.head_parameters()} == head


@pytest.mark.parametrize("pretrained", ["true", "false"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("ASTModel", {"max_length": 16, "num_mel_bins": 16}),
        ("Gemma3Model", {"text_config": {**SIZES, "head_dim": 8}, "vision_config": {**SIZES, "image_size": 28}}),
    ],
)
def test_a_model_of_sounds_or_of_images_and_texts_is_no_text_model(
    kind: str, settings: dict[str, Any], pretrained: str, tmp_path: Path
) -> None:
    words = save(tmp_path / "model", kind, **settings)
    with pytest.raises(TensLoRAError, match=r"^model\.checkpoint=\S+: is of type \S+, which is not a model of texts "):
        load(*words, f"model.pretrained={pretrained}")


def test_a_model_without_an_embedding_for_each_token_can_be_adapted(tmp_path: Path) -> None:
    backbone = load(*save(tmp_path / "canine", "CanineModel", max_position_embeddings=64))
    assert backbone.embedding_sizes == {"token_type_ids": 16}


@pytest.mark.parametrize(
    ("kind", "settings", "side"),
    [
        ("LlamaModel", {"pad_token_id": 5}, "right"),  # not the token that the tokenizer pads with
        ("LlamaModel", {"pad_token_id": None}, "left"),
        ("GPT2Model", {"n_positions": 32}, "left"),
        ("BertModel", {}, "left"),
    ],
)
def test_a_texts_outputs_do_not_depend_on_the_padding(
    kind: str, settings: dict[str, Any], side: str, tmp_path: Path
) -> None:
    words = save(tmp_path, kind, initializer_range=0.5, **settings)
    file = tmp_path / "tokenizer_config.json"
    settings = {"padding_side": side, "model_input_names": ["input_ids"]}  # without a mask, which is for padding
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    run = configured(*words)
    tokenizer = load_tokenizer(run.model, SENTENCES)
    backbone = load_backbone(run.model, 2, 0, tokenizer)
    examples = Examples(SENTENCES, [0, 1, 0])
    data = encode(Dataset(examples, examples, ("a", "b")), run.dataset, backbone, tokenizer)
    items = [data.scored[number] for number in range(3)]
    with torch.no_grad():
        together = backbone.model.eval()(**data.collate(items)[0]).logits
        alone = torch.cat([backbone.model(**data.collate([item])[0]).logits for item in items])
    assert together.std() > 1e-3
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", [LoraConfig(target_modules=["query"]), TensLoraConfig()])
def test_a_model_with_an_adapter_of_peft_beside_it_is_refused(settings: Any, tmp_path: Path) -> None:
    words = save(tmp_path / "bert", "BertModel")
    plain = transformers.AutoModel.from_pretrained(tmp_path / "bert")
    get_peft_model(plain, settings).save_pretrained(str(tmp_path / "bert"))
    with pytest.raises(
        TensLoRAError, match=r"is not a checkpoint of bert: it holds an adapter of PEFT too, adapter_conf"
    ):
        load(*words)


def test_an_adapter_of_peft_alone_is_no_model(tmp_path: Path) -> None:
    words = save(tmp_path / "bert", "BertModel")
    (tmp_path / "bert" / "config.json").rename(tmp_path / "bert" / "adapter_config.json")
    with pytest.raises(TensLoRAError, match=r"model\.checkpoint=\S+: holds an adapter of PEFT and no model; must be"):
        load(*words)


def test_scales_of_quantised_weights_that_nothing_would_read_are_refused(tmp_path: Path) -> None:
    words, file = save(tmp_path / "bert", "BertModel"), tmp_path / "bert" / "model.safetensors"
    name = "encoder.layer.0.attention.self.query.weight"
    save_file({**load_file(file), f"{name}_scale_inv": torch.ones(1)}, file, metadata={"format": "pt"})
    with pytest.raises(
        TensLoRAError, match=rf"its weights are quantised \({name}_scale_inv\), and its config\.json has"
    ):
        load(*words)


@pytest.mark.parametrize("library", ["tenslora", "peft"])
def test_a_model_that_was_saved_under_an_adapter_is_refused(library: str, tmp_path: Path) -> None:
    words = save(tmp_path / "bert", "BertModel")
    model = transformers.AutoModel.from_pretrained(tmp_path / "bert")
    if library == "tenslora":
        attach(model, AdapterConfig(tensor_mode="depth", rank_strategy=RankStrategy("isorank", rank=2)))
    else:
        model = get_peft_model(model, LoraConfig(target_modules=["query"])).get_base_model()
    model.save_pretrained(tmp_path / "bert")
    with pytest.raises(
        TensLoRAError, match=r"is not a checkpoint of bert: it holds an adapter \(\S+\); merge the adap"
    ):
        load(*words)


def test_random_weights_come_from_the_config_with_its_options_replaced(tmp_path: Path) -> None:
    words = save(tmp_path / "bert", "BertModel")
    (tmp_path / "bert" / "model.safetensors").unlink()
    backbone = load(*words, "model.pretrained=false", "+model.options.num_hidden_layers=3")
    assert len(vars(backbone.model)["_modules"]["bert"].encoder.layer) == 3


@pytest.mark.parametrize("option", ["layer_norm_eps=x", "num_attention_heads=5", "hidden_act=nope", "hidden_size=-24"])
def test_an_option_that_makes_no_model_is_blamed_and_not_the_checkpoint(option: str, tmp_path: Path) -> None:
    words = save(tmp_path / "bert", "BertModel")
    with pytest.raises(TensLoRAError, match=r"^model\.options=\{.*\}: do not make a model of bert \("):
        load(*words, f"+model.options.{option}")


def test_a_folder_without_a_tokenizer_gets_one_only_with_random_weights(tmp_path: Path) -> None:
    words = save(tmp_path / "bert", "BertModel", tokenizer=False, vocab_size=8192)
    with pytest.raises(TensLoRAError, match=r"model\.checkpoint=\S*bert: is not a checkpoint of bert \(it has no tok"):
        load(*words)
    model = configured(*words, "model.pretrained=false").model
    tokenizer = load_tokenizer(model, SENTENCES)
    assert tokenizer.get_vocab() == _train_tokenizer(SENTENCES).get_vocab()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("model=timm model.architecture=resnet18", r"model\.architecture=resnet18: cannot be adapted: .*no attention"),
        (
            "model=timm model.architecture=vit_tinny_patch16_224",
            r"no such model; similar names are vit_tiny_patch16",
        ),
        (
            "model=timm model.architecture=vit_tiny_patch16_224.no",
            r"no such weights; it has vit_tiny_patch16_224\.",
        ),
        ("model=timm model.architecture=vit_tiny_patch16_224 rank_strategy.rank=500", r"rank_strategy\.rank=500: must"),
        (
            "model=timm model.architecture=hf_hub:timm/vit_tiny_patch16_224",
            r"^model\.architecture=hf_hub:timm/vit_",
        ),
        ("model=timm", r"model\.architecture: is missing"),
        ("model=hf_image", r"model\.checkpoint: is missing"),
        ("model=hf_image model.checkpoint=null", r"model\.checkpoint=null: must be a folder, or a repository"),
        ("model=hf_image model.checkpoint=./nowhere", r"model\.checkpoint=\./nowhere: no such folder"),
        ("model=hf_image model.checkpoint=a/b/c", r"model\.checkpoint=a/b/c: no such folder"),
    ],
)
def test_a_model_that_cannot_be_had_is_one_line(words: str, line: str) -> None:
    with pytest.raises(TensLoRAError, match=line) as caught:
        load("dataset=dtd", *words.split(), "model.pretrained=false")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pretrained", ["true", "false"])
def test_a_folders_own_code_is_not_run(pretrained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = save(tmp_path / "mine", "BertModel")
    config = tmp_path / "mine" / "config.json"
    classes = {"AutoConfig": "code.C", "AutoModelForSequenceClassification": "code.M"}
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "mine", "auto_map": classes}))
    (tmp_path / "mine" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    with pytest.raises(TensLoRAError, match=r"model\.checkpoint=\S*mine: .*custom code"):
        load(*words, f"model.pretrained={pretrained}")
    assert not (tmp_path / "ran").exists()
