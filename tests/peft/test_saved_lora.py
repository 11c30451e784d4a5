"""A LoRA that PEFT saved, read back, against what PEFT itself adds to the weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tenslora import TensLoRAError
from tenslora.peft.saved_lora import read_config, read_others, read_updates
from tenslora.projections import find_projections
from tests.models import build, compiled
from tests.plain_transformer import PlainTransformer


def save_random_lora(model: nn.Module, folder: Path, **settings: Any) -> nn.Module:
    """Save a LoRA with random entries for `model`, and return a copy of `model` that PEFT has merged the LoRA into."""
    peft_model = with_lora(model, **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    peft_model.save_pretrained(str(folder), save_embedding_layers=False)
    merged: nn.Module = peft_model.merge_and_unload()
    return merged


def with_lora(model: nn.Module, **settings: Any) -> Any:
    """PEFT's model around a copy of `model`."""
    return get_peft_model(copy.deepcopy(model), LoraConfig(**settings))


def test_a_lora_of_a_compiled_model_is_read_under_the_models_own_names(tmp_path: Path) -> None:
    stages, plain = find_projections(build("hf_bert")), build("hf_bert")
    of_part, whole = compiled(build("hf_bert"), "bert.encoder.layer.1"), compiled(build("hf_bert"), "")
    read = []
    for model, layer in ((plain, "layer.1"), (of_part, "layer.1._orig_mod"), (whole, "layer.1")):
        ranks = {rf".*{layer}\..*": 3}
        config = LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"], rank_pattern=ranks)
        of_peft: Any = get_peft_model(model, config)
        for name, parameter in of_peft.named_parameters():
            if "lora_" in name:
                nn.init.constant_(parameter, 0.1)
        of_peft.save_pretrained(str(tmp_path))
        updates = [update for layers in read_updates(tmp_path, stages)[0] for update in layers]
        read.append((torch.stack(updates), sorted(read_others(tmp_path))))
    for updates_of_all, names in read[1:]:
        assert torch.equal(updates_of_all, read[0][0]) and names == read[0][1]


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")  # PEFT counts none of parameters
@pytest.mark.parametrize(
    ("name", "adapt", "settings"),
    [
        ("hf_bert", "qkv", {"r": 3, "lora_alpha": 6, "target_modules": ["query", "key", "value"]}),
        ("hf_bert", "qkv", {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["query", "value"]}),
        (
            "hf_bert",
            "all",
            {
                "r": 2,
                "lora_alpha": 5,
                "rank_pattern": {"layer.1.attention.self.query": 4},
                "alpha_pattern": {"key": 9},
                "target_modules": ["query", "key", "dense"],
                "exclude_modules": ["bert.pooler.dense"],
            },
        ),
        ("timm_vit", "qkv", {"r": 3, "lora_alpha": 6, "target_modules": ["qkv"]}),
        ("llama", "qkvo", {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
        ("gpt2", "qkv", {"r": 3, "lora_alpha": 6, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
        (
            "gpt2",
            "qkvo",
            {
                "r": 3,
                "lora_alpha": 6,
                "target_modules": [],
                "target_parameters": ["c_attn.weight", "attn.c_proj.weight"],
                "rank_pattern": {"h.1.attn.c_proj.weight": 2},
                "alpha_pattern": {"c_proj": 9, "c_attn.weight": 5},  # of which the first matches no parameter
            },
        ),
    ],
)
def test_the_updates_are_what_peft_adds_to_the_weights(
    name: str, adapt: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = build(name).float()
    merged = save_random_lora(model, tmp_path, **settings)
    stages = find_projections(model, adapt)
    [(_, targets)], [updates] = stages, read_updates(tmp_path, stages)
    changed = 0
    for target in targets:
        before, after = (m.get_parameter(f"{target.path}.weight") for m in (model, merged))
        difference = (after - before).detach()
        difference = difference.T if isinstance(target.linear, nn.Linear) else difference  # (inputs, outputs)
        changed += bool(difference.abs().max() > 1e-3)
        for columns in target.columns:
            ours = updates[target.layer][target.group[columns.matrix]]
            start = columns.start
            theirs = difference.T if target.writes_to_stream else difference[:, start : start + ours.shape[1]]
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert changed > 0


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 2 LoRA tensor")  # PEFT takes biases for damaged matrices
@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"target_modules": ["query"], "lora_bias": True}, "lora_bias=true"),
        ({"target_modules": ["query"], "init_lora_weights": "olora"}, "init_lora_weights=olora"),
        (
            {"target_modules": ["query", "word_embeddings"]},
            "adapts .*word_embeddings, which the choice of adapt=qkv leaves",
        ),
    ],
)
def test_a_lora_that_changes_more_than_the_adapted_matrices_is_refused(
    settings: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    model = build("hf_bert").float()
    save_random_lora(model, tmp_path, r=2, **settings)
    with pytest.raises(TensLoRAError, match=problem):
        read_updates(tmp_path, find_projections(model))


@pytest.mark.parametrize(
    ("name", "settings"),
    [("timm_vit", {"target_modules": ["qkv"]}), ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True})],
)
def test_an_adapted_part_of_a_fused_linear_that_the_geometry_leaves_out_is_named(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    model = build(name).float()
    save_random_lora(model, tmp_path, r=2, **settings)
    with pytest.raises(TensLoRAError, match=r"adapts .*(qkv|c_attn), which the choice of adapt=qv leaves out"):
        read_updates(tmp_path, find_projections(model, "qv"))


def test_a_lora_for_another_model_is_refused(tmp_path: Path) -> None:
    save_random_lora(build("hf_bert").float(), tmp_path, r=2, target_modules=["query"])
    with pytest.raises(TensLoRAError, match=r"this model has none of them; names of an older transformers may .* PEFT"):
        read_updates(tmp_path, find_projections(build("timm_vit")))


def test_a_lora_of_one_of_two_towers_is_put_on_the_one_that_it_fits(tmp_path: Path) -> None:
    def towers(width: int) -> nn.Module:
        return nn.ModuleDict({"text": PlainTransformer(), "vision": PlainTransformer(width=width)})

    save_random_lora(PlainTransformer(width=36), tmp_path, r=2, target_modules=["query", "key", "value"])
    [alone] = read_updates(tmp_path, find_projections(PlainTransformer(width=36)))
    text, vision = read_updates(tmp_path, find_projections(towers(36)))
    assert not any(update.any() for layer in text for update in layer)
    assert all(torch.equal(torch.stack(ours), torch.stack(own)) for ours, own in zip(vision, alone, strict=True))
    whole = towers(24)
    save_random_lora(PlainTransformer(), tmp_path, r=2, target_modules=["query", "key", "value"])
    with pytest.raises(TensLoRAError, match=r"may be .* text\.(blocks\.0\.\S+) or vision\.\1; choose one of the two"):
        read_updates(tmp_path, find_projections(whole))
    save_random_lora(whole, tmp_path, r=2, target_modules=["query", "key", "value"])
    with pytest.raises(TensLoRAError, match=r"adapts vision\.blocks\.0\.\S+; this model has no such layer"):
        read_updates(tmp_path, find_projections(whole.get_submodule("text")))


def test_an_untrained_lora_is_refused(tmp_path: Path) -> None:
    model = build("hf_bert").float()
    with_lora(model, target_modules=["query"]).save_pretrained(str(tmp_path))
    with pytest.raises(TensLoRAError, match="its updates are all zero"):
        read_updates(tmp_path, find_projections(model))


def test_a_lora_whose_matrices_have_other_names_is_not_called_untrained(tmp_path: Path) -> None:
    model = build("hf_bert").float()
    save_random_lora(model, tmp_path, r=2, target_modules=["query"])
    file = tmp_path / "adapter_model.safetensors"
    matrices = {name: tensor for name, tensor in load_file(file).items() if "lora_A" in name}
    for other in ("lora.down", "lora_linear_layer.down"):
        save_file({name.replace("lora_A", other): tensor for name, tensor in matrices.items()}, file)
        with pytest.raises(TensLoRAError, match=rf"has no lora_A and no lora_B; must hold them .*, not \S+{other}"):
            read_updates(tmp_path, find_projections(model))


def test_a_matrix_that_only_the_lora_adapts_is_named(tmp_path: Path) -> None:
    model = build("hf_bert").float()
    save_random_lora(model, tmp_path, r=2, target_modules=["query", "output.dense"])
    with pytest.raises(TensLoRAError, match=r"adapts bert\..*output\.dense, which the choice of adapt=qkv leaves out"):
        read_updates(tmp_path, find_projections(model), model=model)
    save_random_lora(model, tmp_path, r=2, target_modules=["output.dense"])
    backbone = model.get_submodule("bert")  # whose paths are shorter, and of whose chosen matrices the LoRA has none
    with pytest.raises(TensLoRAError, match=r"adapts bert\..*output\.dense, which the choice of adapt=qkv leaves out"):
        read_updates(tmp_path, find_projections(backbone), model=backbone)
    save_random_lora(model, tmp_path, r=2, target_modules=["query", "output.dense", "pooler.dense"])
    for adapt in ("q", "all"):
        with pytest.raises(
            TensLoRAError, match=r"pooler\.dense, which no choice of matrices can adapt; train the LoRA"
        ):
            read_updates(tmp_path, find_projections(model, adapt), model=model)


def test_a_layer_that_a_shallower_model_lacks_is_no_matter_of_choice(tmp_path: Path) -> None:
    save_random_lora(PlainTransformer(layers=3), tmp_path, r=2, target_modules=["query"])
    model = PlainTransformer()
    for adapt in ("q", "kv"):
        with pytest.raises(TensLoRAError, match=r"adapts blocks\.2\.attention\.query; this model has no such layer$"):
            read_updates(tmp_path, find_projections(model, adapt), model=model)


def test_an_update_that_was_lost_from_a_lora_is_told_of(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    model, file = PlainTransformer(layers=3), tmp_path / "adapter_model.safetensors"
    of_a_part: dict[str, Any] = {"layers_to_transform": 0, "layers_pattern": "blocks"}
    for settings in (of_a_part, {"exclude_modules": r"blocks\.1\..*"}, {}):
        save_random_lora(model, tmp_path, r=2, target_modules=["query"], **settings)
        read_updates(tmp_path, find_projections(model))
    assert not recwarn.list
    save_file({name: weight for name, weight in load_file(file).items() if ".1." not in name}, file)
    with pytest.warns(UserWarning, match=r"has no update of blocks\.1\.attention\.query, which its target_mod"):
        read_updates(tmp_path, find_projections(model))


def test_the_query_of_a_layer_without_a_key_of_its_own_is_no_matter_of_choice(tmp_path: Path) -> None:
    model = PlainTransformer()
    save_random_lora(model, tmp_path, r=2, target_modules=["query"])
    del model.get_submodule("blocks.1.attention").key
    with (
        pytest.warns(UserWarning, match="1 of the 2 layers of blocks have attention projections"),
        pytest.raises(
            TensLoRAError, match=r"adapts blocks\.1\.attention\.query, which no choice of matrices can adapt"
        ),
    ):
        read_updates(tmp_path, find_projections(model, "q"), model=model)


def test_other_sizes_and_other_kinds_of_adapter_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    save_random_lora(build("hf_bert").float(), folder, r=2, target_modules=["query"])
    wide = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
    other = transformers.BertForSequenceClassification(transformers.BertConfig(**wide, vocab_size=50))
    with pytest.raises(TensLoRAError, match=r"query.lora_A.weight has the shape \(2, 24\), not \(2, 36\)"):
        read_updates(folder, find_projections(other))
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"LORA"', '"IA3"'))
    with pytest.raises(TensLoRAError, match=r"must be a plain LoRA, .* not IA3"):
        read_updates(folder, find_projections(other))
    with pytest.raises(TensLoRAError, match=r"adapter_config\.json: no such file$"):
        read_updates(folder / "nowhere", find_projections(other))
    with pytest.raises(TensLoRAError, match=rf"adapter_config\.json: no such file; there is {config}$"):
        read_updates(tmp_path, find_projections(other))


def test_a_lora_that_was_not_saved_by_peft_as_it_is_today_says_so(tmp_path: Path) -> None:
    stages = find_projections(build("hf_bert"))
    save_random_lora(build("hf_bert").float(), tmp_path, r=2, target_modules=["query"])
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({name.replace(".weight", ".default.weight"): weight for name, weight in weights.items()}, path)
    with pytest.raises(TensLoRAError, match=r"query\.lora_A\.default\.weight has an adapter's name in it"):
        read_updates(tmp_path, stages)
    save_file({f"module.{name}": weight for name, weight in weights.items()}, path)
    with pytest.raises(TensLoRAError, match=r"lora_A\.weight begins with module\., as under Distrib"):
        read_updates(tmp_path, stages)
    path.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(TensLoRAError, match=r"adapter_model\.bin: is a pickle, which could run code; save the LoRA"):
        read_updates(tmp_path, stages)
    path.with_name("adapter_model.bin").rename(tmp_path / "adapter_model-00001-of-00002.safetensors")
    with pytest.raises(
        TensLoRAError, match=r"00001-of-00002\.safetensors: is one of 1 parts of the LoRA; save it again"
    ):
        read_updates(tmp_path, stages)


def edited(folder: Path, changes: dict[str, Any]) -> None:
    """Change settings of a saved LoRA; ... deletes one."""
    path = folder / "adapter_config.json"
    settings = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in settings.items() if value is not ...}))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"r": 0}, "r=0: must be at least 1"),
        ({"r": ...}, "r: is missing"),
        ({"r": "2"}, 'r="2": must be a whole number'),
        ({"lora_alpha": float("inf")}, "lora_alpha=Infinity: must be a finite number"),
        ({"lora_alpha": 1e300}, "the update of .*query holds a NaN or an infinity"),
        ({"peft_type": 3}, "must be a plain LoRA, .* not 3"),
        ({"peft_type": ...}, "peft_type: is missing"),
        ({"bias": "all"}, "bias=all: must be none"),
        ({"layer_replication": [[0, 2]]}, r"layer_replication=\[\[0, 2\]\]: must be off"),
        ({"use_rslora": 1}, "use_rslora=1: must be true or false"),
        ({"rank_pattern": {"query": 0}}, "r=0: must be at least 1"),
        ({"rank_pattern": {"query": 3}}, r"query.lora_A.weight has the shape \(2, 24\), not \(3, 24\)"),
        ({"rank_pattern": []}, r"rank_pattern=\[\]: must be an object or null"),
        ({"rank_pattern": {"(": 2}}, r'\["\("\]: not a regular expression'),
        ({"alpha_pattern": {"(": 2}}, r'\["\("\]: not a regular expression'),
        ({"alpha_pattern": {"a" * 1001: 2}}, r'"a+\.\.\.: must have at most 1,000 characters'),
    ],
)
def test_settings_of_another_form_are_refused_in_one_line(
    changes: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    model = build("hf_bert").float()
    save_random_lora(model, tmp_path, r=2, target_modules=["query"])
    edited(tmp_path, changes)
    with pytest.raises(TensLoRAError, match=rf"adapter_(config\.json|model\.safetensors): .*{problem}") as caught:
        read_updates(tmp_path, find_projections(model))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("content", ["[]", "5", "null", "", "{", "[" * 99999])
def test_settings_that_are_no_object_are_refused_in_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(TensLoRAError, match=r"adapter_config\.json: (must be an object|not a readable JSON)"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("end", "tensor", "problem"),
    [
        ("lora_B.weight", None, "lacks .*lora_B.weight"),
        ("lora_A.weight", torch.full((2, 24), float("nan")), "lora_A.weight holds a NaN or an infinity"),
        ("lora_A.weight", torch.full((2, 24), 3e38), "the update of .*query holds a NaN or an infinity"),
        ("lora_A.weight", torch.zeros(24), r"lora_A.weight has the shape \(24,\), not \(2, 24\)"),
        ("lora_A.weight", torch.zeros(2, 24, dtype=torch.int64), "lora_A.weight has the type int64"),
        ("lora_B.weight", torch.zeros(24, 10**6), r"lora_B.weight has the shape \(24, 1000000\), not \(24, 2\)"),
        ("lora_B.bias", torch.zeros(24), "lora_B.bias is a bias of lora_B, which a tensor of updates cannot hold"),
        ("lora_magnitude_vector", torch.zeros(24), "has .*lora_magnitude_vector, which does not belong there"),
    ],
)
def test_matrices_of_another_form_are_refused(end: str, tensor: Tensor | None, problem: str, tmp_path: Path) -> None:
    model = build("hf_bert").float()
    save_random_lora(model, tmp_path, r=2, target_modules=["query"])
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "lora_B" in name).replace("lora_B.weight", end)
    weights.pop(name, None)
    if tensor is not None:
        weights[name] = tensor
    save_file(weights, path)
    with pytest.raises(TensLoRAError, match=rf"adapter_model\.safetensors: .*{problem}"):
        read_updates(tmp_path, find_projections(model))
