"""Tiny Transformers with random weights, built the same way under every supported version of their libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import timm
import torch
import transformers as hf
from accelerate.utils import compile_regions
from torch import Tensor, nn

from tenslora import AdapterConfig, attach
from tenslora.adapted_linear import AdaptedLinear
from tenslora.adapter import Adapter, StagedAdapter
from tenslora.constructions import Geometry
from tenslora.tensor import FactorizedTensor
from tests.plain_transformer import PlainTransformer

AnyAdapter = TypeVar("AnyAdapter", bound=Adapter | StagedAdapter)

GEOMETRY = Geometry(d_in=24, heads=3, d_head=8, layers=2)
_SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
_IMAGE = {"image_size": 16, "patch_size": 8, "num_channels": 3}
_TEXT = {"vocab_size": 50, "max_position_embeddings": 20}


def _vit() -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(**_SIZES, **_IMAGE))


def _deit() -> nn.Module:
    return hf.DeiTForImageClassification(hf.DeiTConfig(**_SIZES, **_IMAGE))


def _dinov2() -> nn.Module:
    return hf.Dinov2ForImageClassification(hf.Dinov2Config(**_SIZES, **_IMAGE))


def _bert() -> nn.Module:
    return hf.BertForSequenceClassification(hf.BertConfig(**_SIZES, **_TEXT))


def _roberta() -> nn.Module:
    return hf.RobertaForSequenceClassification(hf.RobertaConfig(**_SIZES, **_TEXT))


def _distilbert() -> nn.Module:
    config = hf.DistilBertConfig(dim=24, n_layers=2, n_heads=3, hidden_dim=32, **_TEXT)
    return hf.DistilBertForSequenceClassification(config)


def _timm(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model: nn.Module = timm.create_model(
            name, img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=2
        )
        return model

    return build


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "hf_vit": _vit,
    "hf_deit": _deit,
    "hf_dinov2": _dinov2,
    "hf_bert": _bert,
    "hf_roberta": _roberta,
    "hf_distilbert": _distilbert,
    "timm_vit": _timm("vit_tiny_patch16_224"),
    "timm_deit": _timm("deit_tiny_distilled_patch16_224"),
}


def _decoder(kind: str, **sizes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        tokens = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        model: nn.Module = getattr(hf, f"{kind}ForCausalLM" if kind != "GPT2" else "GPT2LMHeadModel")(
            getattr(hf, f"{kind}Config")(**sizes, **tokens)
        )
        return model

    return build


_GROUPED = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 60}
DECODERS: dict[str, Callable[[], nn.Module]] = {
    "llama": _decoder("Llama", **_GROUPED, num_key_value_heads=2),
    "qwen2": _decoder("Qwen2", **_GROUPED, num_key_value_heads=2),
    "gemma": _decoder("Gemma", **{**_GROUPED, "intermediate_size": 56}, num_key_value_heads=1, head_dim=8),
    "gpt2": _decoder("GPT2", n_embd=24, n_layer=2, n_head=3, n_positions=20),
}
"""They have fewer key heads, gated feed-forward blocks, d_out other than d_in (Gemma), or Conv1D (GPT-2)."""


def _modernbert() -> nn.Module:
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2}
    return hf.ModernBertForSequenceClassification(hf.ModernBertConfig(**_SIZES, **_TEXT, **tokens))


def _mpnet() -> nn.Module:
    return hf.MPNetForSequenceClassification(hf.MPNetConfig(**_SIZES, **_TEXT))


def _deberta_v2() -> nn.Module:
    # The settings of DeBERTa v3.
    relative = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
    config = hf.DebertaV2Config(**_SIZES, **_TEXT, **relative, share_att_key=True, norm_rel_ebd="layer_norm")
    return hf.DebertaV2ForSequenceClassification(config)


def _t5() -> nn.Module:
    # d_out is not d_in. The three layers are an encoder's, a decoder's and that of the cross-attention between them.
    config = hf.T5Config(vocab_size=50, d_model=24, d_kv=6, d_ff=32, num_layers=1, num_heads=3)
    return hf.T5ForConditionalGeneration(config)


_FOUR_HEADS = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
FURTHER: dict[str, Callable[[], nn.Module]] = {
    "gpt_neox": _decoder("GPTNeoX", **_SIZES, max_position_embeddings=20),
    "bloom": _decoder("Bloom", hidden_size=24, n_layer=2, n_head=3),
    "falcon_7b": _decoder("Falcon", **_FOUR_HEADS),
    "falcon_40b": _decoder("Falcon", **_FOUR_HEADS, num_kv_heads=2, new_decoder_architecture=True),
    "falcon_rw": _decoder("Falcon", **_FOUR_HEADS, multi_query=False),
    "phi3": _decoder("Phi3", **_GROUPED, num_key_value_heads=2),
    "starcoder": _decoder("GPTBigCode", n_embd=24, n_layer=2, n_head=3, n_positions=20),
    "modernbert": _modernbert,
    "mpnet": _mpnet,
    "deberta_v2": _deberta_v2,
    "t5": _t5,
}
"""Query, key and value in one Linear for each head or with fewer key heads, and other names."""


_STAGES = {"embed_dim": 8, "depths": [2, 1], "num_heads": [2, 4], "window_size": 2}
_PVT = {"depths": [1, 2], "sr_ratios": [2, 1], "mlp_ratios": [2, 2]}


def _swin() -> nn.Module:
    return hf.SwinForImageClassification(hf.SwinConfig(**_STAGES, image_size=32))


def _swin_v2() -> nn.Module:
    return hf.Swinv2ForImageClassification(hf.Swinv2Config(**_STAGES, image_size=32))


def _timm_swin() -> nn.Module:
    model: nn.Module = timm.create_model("swin_tiny_patch4_window7_224", **_STAGES, img_size=32, num_classes=2)
    return model


def _pvt_v2() -> nn.Module:
    sizes = {"hidden_sizes": [8, 16], "num_attention_heads": [1, 2], "num_encoder_blocks": 2}
    strides = {"patch_sizes": [7, 3], "strides": [4, 2], "image_size": 32}
    return hf.PvtV2ForImageClassification(hf.PvtV2Config(**_PVT, **sizes, **strides))


def _timm_pvt_v2() -> nn.Module:
    model: nn.Module = timm.create_model("pvt_v2_b0", **_PVT, embed_dims=(8, 16), num_heads=(1, 2), num_classes=2)
    return model


def _twins() -> nn.Module:
    sizes = {"embed_dims": (8, 16), "num_heads": (2, 4), "depths": (2, 2), "sr_ratios": (4, 2), "wss": (4, 2)}
    model: nn.Module = timm.create_model("twins_svt_small", **sizes, mlp_ratios=(2, 2), num_classes=2, img_size=32)
    return model


def _maxvit() -> nn.Module:
    # Its convolutions would be most of the model's size: one block in each of two stages.
    sizes = {"embed_dim": (8, 16), "depths": (1, 1), "block_type": ("M", "M"), "stem_width": 4}
    transformer = {"transformer_dim_head": 4, "transformer_window_size": (4, 4), "transformer_grid_size": (4, 4)}
    model: nn.Module = timm.create_model("maxvit_tiny_tf_224", **sizes, **transformer, img_size=32, num_classes=2)
    return model


def _vit_mae() -> nn.Module:
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    config = hf.ViTMAEConfig(**_SIZES, **decoder, decoder_intermediate_size=32, image_size=32, patch_size=8)
    return hf.ViTMAEForPreTraining(config)


HIERARCHICAL: dict[str, Callable[[], nn.Module]] = {
    "hf_swin": _swin,
    "timm_swin": _timm_swin,
    "hf_swin_v2": _swin_v2,
    "hf_pvt_v2": _pvt_v2,
    "timm_pvt_v2": _timm_pvt_v2,
    "timm_twins": _twins,
    "timm_maxvit": _maxvit,
    "hf_vit_mae": _vit_mae,
}
"""Their layers come in two stages of different sizes."""


PLAIN: dict[str, Callable[[], nn.Module]] = {
    "separate": lambda: PlainTransformer(fused=False),
    "fused": lambda: PlainTransformer(fused=True),
}
"""With query, key and value in three Linear layers and in one."""


def build(name: str) -> nn.Module:
    """A model of one of the dictionaries above, in evaluation mode, in float64, with reproducible random weights."""
    torch.manual_seed(0)
    return {**BUILDERS, **DECODERS, **FURTHER, **PLAIN, **HIERARCHICAL}[name]().double().eval()


def inputs(name: str, seed: int = 0) -> dict[str, Tensor]:
    """A batch of two for the model of this name."""
    generator = torch.Generator().manual_seed(seed)
    if name in PLAIN:
        return {"x": torch.randn(2, 7, 24, dtype=torch.float64, generator=generator)}
    if name in ("hf_bert", "hf_roberta", "hf_distilbert", *DECODERS, *FURTHER):
        tokens = torch.randint(5, 50, (2, 7), generator=generator)
        return {"input_ids": tokens, "decoder_input_ids": tokens[:, :5]} if name == "t5" else {"input_ids": tokens}
    size = 32 if name in HIERARCHICAL else 16
    pixels = torch.randn(2, 3, size, size, dtype=torch.float64, generator=generator)
    if name == "hf_vit_mae":  # which patches are masked
        return {"pixel_values": pixels, "noise": torch.rand(2, 16, generator=generator)}
    return {"x" if name.startswith("timm") else "pixel_values": pixels}


def logits(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    output = model(**batch)
    result: Tensor = getattr(output, "logits", output)
    return result


def attached(model: nn.Module, mode: str, **settings: Any) -> Adapter:
    """Attach an adapter with random entries in all its parameters, in float64."""
    (adapter,) = randomised(attach(model, AdapterConfig(mode, **settings))).stages
    return adapter


def randomised(adapter: AnyAdapter) -> AnyAdapter:
    """Give an adapter random entries in all its parameters, in float64."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in adapter.double().parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapter


def compiled(model: nn.Module, part: str) -> nn.Module:
    """A model that is compiled: as a whole for "", by accelerate for "regions", otherwise the part at that path."""
    if part == "regions":
        regions: nn.Module = compile_regions(model, backend="eager")
        return regions
    wrapper: Any = torch.compile(model.get_submodule(part), backend="eager")
    if part:
        model.set_submodule(part, wrapper)
    return model if part else wrapper


def linear_at(model: nn.Module, path: str) -> AdaptedLinear:
    """The adapted Linear at a path."""
    linear = model.get_submodule(path)
    assert isinstance(linear, AdaptedLinear)
    return linear


def tensor_of(adapter: Adapter, index: int) -> FactorizedTensor:
    """One of the adapter's tensors."""
    tensor = adapter.tensors[index]
    assert isinstance(tensor, FactorizedTensor)
    return tensor


class TwoTowers(nn.Module):
    """Two towers of which one's paths, blocks.0 and so on, are the ends of the other's, visual.blocks.0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.visual, self.link = PlainTransformer(width=width, classes=24), nn.Linear(24, width)
        text = PlainTransformer()
        self.blocks, self.head = text.blocks, text.head

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes) of x (batch, tokens, 24)."""
        x = x + self.visual(self.link(x)).unsqueeze(1)
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.head(x.mean(1))
        return result


def two_towers(width: int = 24) -> nn.Module:
    """Two towers, in evaluation mode, in float64, with reproducible random weights."""
    torch.manual_seed(0)
    return TwoTowers(width).double().eval()
