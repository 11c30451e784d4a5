from __future__ import annotations

import functools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from tenslora.errors import TensLoRAError
from tenslora.harness.backbones import EMBEDDED, Backbone, load_backbone, load_tokenizer, logits_of
from tenslora.harness.config import ModelConfig

SENTENCES = [
    ("The cat sat on the mat.", "A cat sat."),
    ("It rained all day.", "The streets were wet."),
    ("Yes.", "No."),
]
DIGITS = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 4}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IMAGE = {"model_type": "vit", **SMALL, "image_size": 8, "patch_size": 4, "num_channels": 3}
TEXT = {
    "bert": {"model_type": "bert", **SMALL},
    "roberta": {"model_type": "roberta", **SMALL, "max_position_embeddings": 514, "type_vocab_size": 1},
    "distilbert": {"model_type": "distilbert", "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
}


def config(library: str = "timm", modality: str = "image", **changes: Any) -> ModelConfig:
    settings: dict[str, Any] = {
        "name": "tiny",
        "architecture": "vit_tiny_patch16_224",
        "options": DIGITS,
        "checkpoint": None,
        "pretrained": False,
        "geometry": None,
        "image_size": 8,
        "channels": 1,
        **changes,
    }
    return ModelConfig(library=library, modality=modality, **settings)


def embedded(**changes: Any) -> ModelConfig:
    return config(**{"name": "vit_digits", "pretrained": True, "checkpoint": "embedded", **changes})


def hf_image(**changes: Any) -> ModelConfig:
    return config("transformers", **{"architecture": "none", "options": IMAGE, "channels": 3, **changes})


def hf_text(kind: str = "bert", **changes: Any) -> ModelConfig:
    return config("transformers", "text", **{"architecture": "none", "options": TEXT[kind], **changes})


@functools.cache
def bpe() -> Any:
    return load_tokenizer(hf_text(), SENTENCES)


RANDOM: dict[str, Callable[..., Backbone]] = {
    "timm": lambda classes, seed: load_backbone(config(), classes, seed),
    "hf vit": lambda classes, seed: load_backbone(hf_image(), classes, seed),
    "bert": lambda classes, seed: load_backbone(hf_text("bert"), classes, seed, bpe()),
    "roberta": lambda classes, seed: load_backbone(hf_text("roberta"), classes, seed, bpe()),
    "distilbert": lambda classes, seed: load_backbone(hf_text("distilbert"), classes, seed, bpe()),
}
HEADS = {
    "timm": {"head.weight", "head.bias"},
    "hf vit": {"classifier.weight", "classifier.bias"},
    "bert": {"classifier.weight", "classifier.bias"},
    "roberta": {f"classifier.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")},
    "distilbert": {f"{part}.{kind}" for part in ("pre_classifier", "classifier") for kind in ("weight", "bias")},
}


def state(backbone: Backbone) -> dict[str, Tensor]:
    return dict(backbone.model.state_dict())


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def numpy_state() -> str:
    return repr(np.random.get_state(legacy=False))


def test_vit_digits_is_the_embedded_checkpoint_in_float32() -> None:
    weights = load_file(EMBEDDED)
    own = state(load_backbone(embedded(), 5, 0))
    assert own.keys() == weights.keys() | HEADS["timm"]
    for name, tensor in weights.items():
        assert own[name].dtype == torch.float32
        assert torch.equal(own[name], tensor.float())


def test_vit_digits_computes_what_timm_does_with_the_file() -> None:
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=0, **DIGITS)
    plain.load_state_dict({name: tensor.float() for name, tensor in load_file(EMBEDDED).items()})
    images = torch.randn(3, 1, 8, 8)
    backbone = load_backbone(embedded(), 5, 0)
    with torch.no_grad():
        features = backbone.model.eval().forward_features(images)  # type: ignore[operator]
        torch.testing.assert_close(features, plain.eval().forward_features(images))
        assert logits_of(backbone.model, {backbone.input_name: images}).shape == (3, 5)


@pytest.mark.parametrize("kind", RANDOM)
def test_random_weights_follow_the_seed_and_nothing_else(kind: str) -> None:
    bpe()
    torch.manual_seed(1)
    first = state(RANDOM[kind](3, 7))
    torch.manual_seed(2)
    before = torch.get_rng_state(), random.getstate(), numpy_state()
    again = state(RANDOM[kind](3, 7))
    assert same(first, again)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), numpy_state()) == before[1:]
    other = state(RANDOM[kind](3, 8))
    matrices = [name for name, tensor in first.items() if tensor.ndim > 1 and tensor.any()]
    assert all(not torch.equal(first[name], other[name]) for name in matrices)


@pytest.mark.parametrize("kind", RANDOM)
def test_the_head_is_what_lies_outside_the_transformer(kind: str) -> None:
    backbone = RANDOM[kind](3, 0)
    head = backbone.head_parameters()
    assert head.keys() == HEADS[kind]
    own = dict(backbone.model.named_parameters())
    assert all(own[name] is parameter for name, parameter in head.items())
    assert sum(p.shape[0] == 3 for p in head.values()) == 2


@pytest.mark.parametrize("kind", RANDOM)
def test_a_random_model_runs_and_learns(kind: str) -> None:
    backbone = RANDOM[kind](3, 0)
    if kind in TEXT:
        inputs = dict(bpe()([pair[0] for pair in SENTENCES], padding=True, return_tensors="pt"))
    else:
        inputs = {backbone.input_name: torch.randn(3, 1 if kind == "timm" else 3, 8, 8)}
    logits = logits_of(backbone.model, inputs)
    assert logits.shape == (3, 3)
    F.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()  # type: ignore[no-untyped-call]
    for name, parameter in backbone.head_parameters().items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_the_head_depends_on_the_seed_alone_and_not_on_the_checkpoint() -> None:
    def head(backbone: Backbone) -> dict[str, Tensor]:
        return {name: parameter.data for name, parameter in backbone.head_parameters().items()}

    one = head(load_backbone(embedded(), 5, 3))
    assert same(one, head(load_backbone(embedded(), 5, 3)))
    assert same(one, head(load_backbone(config(), 5, 3)))
    other = head(load_backbone(embedded(), 5, 4))
    assert not torch.equal(one["head.weight"], other["head.weight"])
    assert 0.015 < one["head.weight"].std() < 0.025
    assert not one["head.bias"].any()


def save_hf(folder: Path, settings: ModelConfig, classes: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """A checkpoint as transformers writes it, with a head of its own."""
    backbone = load_backbone(settings, classes, seed, bpe() if settings.modality == "text" else None)
    for parameter in backbone.head_parameters().values():
        nn.init.constant_(parameter, 9.0)
    backbone.model.save_pretrained(folder)  # type: ignore[operator]
    return state(backbone)


@pytest.mark.parametrize("settings", [hf_image(), *map(hf_text, TEXT)], ids=["vit", *TEXT])
def test_a_checkpoints_own_head_is_replaced_and_the_rest_kept(settings: ModelConfig, tmp_path: Path) -> None:
    saved = save_hf(tmp_path, settings)
    for classes in (7, 3):
        again = hf_image if settings.modality == "image" else hf_text
        backbone = load_backbone(again(checkpoint=str(tmp_path), pretrained=True), classes, 5)
        own = state(backbone)
        assert own.keys() == saved.keys()
        head = backbone.head_parameters()
        assert all(torch.equal(own[name], saved[name]) for name in saved if name not in head)
        assert all(own[name].shape[0] != 7 or classes == 7 for name in head)
        assert not any((own[name] == 9).any() for name in head)


def test_a_half_precision_checkpoint_loads_in_float32(tmp_path: Path) -> None:
    saved = save_hf(tmp_path, hf_image())
    save_file({name: tensor.half() for name, tensor in saved.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    own = state(load_backbone(hf_image(checkpoint=str(tmp_path), pretrained=True), 3, 0))
    assert {tensor.dtype for tensor in own.values()} == {torch.float32}
    assert all(torch.equal(own[n], saved[n].half().float()) for n in saved if not n.startswith("classifier"))


def minilm(shared: Path) -> ModelConfig:
    return hf_text(name="minilm", pretrained=True, checkpoint=str(shared / "models" / "minilm_l6"))


def test_minilm_from_shared_is_transformers_own(shared: Path) -> None:
    settings = minilm(shared)
    plain = transformers.AutoModel.from_pretrained(settings.checkpoint).float().state_dict()
    backbone = load_backbone(settings, 2, 0)
    own = state(backbone)
    assert own.keys() == {f"bert.{name}" for name in plain} | HEADS["bert"]
    for name, tensor in plain.items():
        assert own[f"bert.{name}"].dtype == tensor.dtype
        assert torch.equal(own[f"bert.{name}"], tensor)
    weights = load_file(shared / "models" / "minilm_l6" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()} == {torch.float16}


def test_minilms_tokenizer_is_its_own(shared: Path) -> None:
    tokenizer = load_tokenizer(minilm(shared), [])
    ids = tokenizer("A cat.", "No!")
    assert tokenizer.convert_ids_to_tokens(ids["input_ids"]) == ["[CLS]", "a", "cat", ".", "[SEP]", "no", "!", "[SEP]"]
    assert ids["token_type_ids"] == [0, 0, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("form", ["folder", "file"])
def test_vit_small_from_shared_has_its_position_grid_resampled(form: str, shared: Path) -> None:
    folder = shared / "models" / "vit_small_patch14"
    settings = config(
        name="vit_small_timm",
        architecture="vit_small_patch14_dinov2",
        options={"img_size": 112},
        channels=3,
        image_size=112,
        pretrained=True,
        checkpoint=str(folder if form == "folder" else folder / "model.safetensors"),
    )
    own = state(load_backbone(settings, 10, 0))
    weights = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    assert own.keys() - weights.keys() == HEADS["timm"]
    for name in weights.keys() - {"pos_embed"}:
        assert torch.equal(own[name], weights[name]), name
    position = weights["pos_embed"]
    assert own["pos_embed"].shape == (1, 1 + 8 * 8, 384)
    assert torch.equal(own["pos_embed"][:, 0], position[:, 0])
    grid = position[:, 1:].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, (8, 8), mode="bicubic", antialias=True).flatten(2).mT
    # timm rounds the resampled grid to the file's own precision, float16
    torch.testing.assert_close(own["pos_embed"][:, 1:], expected, rtol=1e-3, atol=1e-6)


def test_a_timm_checkpoint_may_be_a_pickled_dictionary(tmp_path: Path) -> None:
    weights = {name: tensor.float() for name, tensor in load_file(EMBEDDED).items()}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    own = state(load_backbone(embedded(checkpoint=str(tmp_path)), 5, 0))
    assert all(torch.equal(own[name], tensor) for name, tensor in weights.items())


def test_a_timm_checkpoint_may_bring_a_head_of_another_size(tmp_path: Path) -> None:
    weights = {**load_file(EMBEDDED), "head.weight": torch.ones(9, 64), "head.bias": torch.ones(9)}
    save_file(weights, tmp_path / "model.safetensors")
    own = state(load_backbone(embedded(checkpoint=str(tmp_path)), 5, 0))
    assert same(own, state(load_backbone(embedded(), 5, 0)))


class NotATensor:
    pass


def refused(settings: ModelConfig, message: str, tokenizer: Any = None) -> None:
    with pytest.raises(TensLoRAError, match=message) as caught:
        load_backbone(settings, 5, 0, tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("another width", r"(lacks|has) \S+ of shape|lacks|shape"),
        ("a tensor too few", r"lacks blocks\.1\.attn\.qkv\.weight"),
        ("a tensor too many", r"has blocks\.4\.attn\.qkv\.weight"),
        ("a tensor misshapen", r"has norm\.weight of shape \(3,\), not \(64,\)"),
        ("another family", r"lacks \S+ and \d+ more"),
    ],
)
def test_another_models_timm_checkpoint_is_refused(change: str, difference: str, tmp_path: Path) -> None:
    weights = load_file(EMBEDDED)
    if change == "another width":
        options = {**DIGITS, "embed_dim": 32}
        weights = timm.create_model("vit_tiny_patch16_224", num_classes=2, **options).state_dict()
    elif change == "a tensor too few":
        del weights["blocks.1.attn.qkv.weight"]
    elif change == "a tensor too many":
        weights["blocks.4.attn.qkv.weight"] = torch.ones(192, 64)
    elif change == "a tensor misshapen":
        weights["norm.weight"] = torch.ones(3)
    else:
        weights = state(RANDOM["bert"](2, 0))
    path = tmp_path / "other.safetensors"
    save_file(weights, path)
    refused(
        embedded(checkpoint=str(path)),
        rf"model\.checkpoint=\S*other\.safetensors: is not a checkpoint of vit_digits .*{difference}",
    )


def test_the_embedded_checkpoint_fits_only_its_model() -> None:
    refused(embedded(options={**DIGITS, "depth": 5}), r"is not a checkpoint of vit_digits .*lacks blocks\.4\.")


def test_another_models_hf_checkpoint_is_refused(tmp_path: Path) -> None:
    saved = save_hf(tmp_path, hf_image())
    settings = hf_image(checkpoint=str(tmp_path), pretrained=True)
    name = next(name for name in saved if name.startswith("vit.") and name.endswith("weight") and saved[name].ndim == 2)
    for broken in ({k: v for k, v in saved.items() if k != name}, {**saved, name: torch.ones(3, 3)}):
        save_file(broken, tmp_path / "model.safetensors", {"format": "pt"})
        refused(settings, rf"model\.checkpoint=.*is not a checkpoint of tiny .*{name}")


def test_an_image_checkpoint_is_not_a_text_models(tmp_path: Path) -> None:
    save_hf(tmp_path, hf_image())
    refused(hf_text(checkpoint=str(tmp_path), pretrained=True), r"model\.checkpoint=.*is not a checkpoint of tiny")


def test_a_tensor_that_the_bare_model_lacks_is_seen_too(shared: Path, tmp_path: Path) -> None:
    folder = shared / "models" / "minilm_l6"
    shutil.copy(folder / "config.json", tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.3.attention.self.query.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    refused(hf_text(checkpoint=str(tmp_path), pretrained=True), r"encoder\.layer\.3\.attention\.self\.query\.weight")


@pytest.mark.parametrize("library", ["timm", "transformers"])
@pytest.mark.parametrize("content", ["empty", "text", "cut"])
def test_a_corrupt_safetensors_file_is_refused_in_one_line(library: str, content: str, tmp_path: Path) -> None:
    save_hf(tmp_path, hf_image())
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"version https://git-lfs\n" * 5, "cut": whole[: len(whole) // 2]}[content])
    make = embedded if library == "timm" else hf_image
    refused(make(checkpoint=str(tmp_path), pretrained=True), r"model\.checkpoint=\S*")


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_a_folder_without_weights_is_refused(library: str, tmp_path: Path) -> None:
    save_hf(tmp_path, hf_image())
    (tmp_path / "model.safetensors").unlink()
    make = embedded if library == "timm" else hf_image
    refused(make(checkpoint=str(tmp_path), pretrained=True), r"model\.checkpoint=\S*: .*model\.safetensors")


@pytest.mark.parametrize("make", [embedded, hf_image, hf_text])
def test_a_missing_checkpoint_is_refused(make: Callable[..., ModelConfig], tmp_path: Path) -> None:
    refused(make(checkpoint=str(tmp_path / "nowhere"), pretrained=True), r"model\.checkpoint=\S*nowhere: no such f")


@pytest.mark.parametrize("library", ["timm", "transformers"])
@pytest.mark.parametrize(
    "content",
    [NotATensor(), {"norm.weight": NotATensor()}, [1, 2], 3, {"norm.weight": "text"}, {"model": 3}, {1: torch.ones(1)}],
    ids=["object", "object inside", "list", "number", "text inside", "nested number", "numbered"],
)
def test_a_pickle_of_anything_but_tensors_is_refused(library: str, content: Any, tmp_path: Path) -> None:
    if library == "transformers":
        save_hf(tmp_path, hf_image())
        (tmp_path / "model.safetensors").unlink()
    torch.save(content, tmp_path / "pytorch_model.bin")
    make = embedded if library == "timm" else hf_image
    refused(make(checkpoint=str(tmp_path), pretrained=True), r"model\.checkpoint=\S*")


def test_a_pickle_runs_no_code(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "touched",))

    torch.save({"norm.weight": Malicious()}, tmp_path / "pytorch_model.bin")
    refused(embedded(checkpoint=str(tmp_path)), r"model\.checkpoint=\S*: not a plain dictionary of tensors")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (config(architecture="vit_gigantic"), r"model\.architecture=vit_gigantic: timm .* no such model"),
        (config(options={**DIGITS, "widths": 3}), r"model\.options=.*widths"),
        (config(options={**DIGITS, "num_heads": 5}), r"model\.options=.*'num_heads': 5.*divi"),
        (hf_image(options={}), r"model\.options=\{\}: .*model_type"),
        (hf_image(options={**IMAGE, "model_type": "nosuch"}), r"model\.options=.*nosuch"),
        (hf_image(options={**IMAGE, "model_type": "bert"}), r"model\.options=.*bert"),
        (hf_text(options={**TEXT["bert"], "num_attention_heads": 3}), r"model\.options=.*'num_attention_heads': 3"),
        (
            hf_text(options={**TEXT["bert"], "vocab_size": 100}),
            r"model\.options.*vocab_size.* must be at least \d{3}",
        ),
    ],
    ids=["unknown name", "unknown option", "heads", "no type", "unknown type", "text type", "hf heads", "vocabulary"],
)
def test_bad_options_are_refused_in_one_line(settings: ModelConfig, message: str) -> None:
    refused(settings, message, bpe() if settings.modality == "text" else None)


@pytest.mark.parametrize("content", [None, "config only", "tokenizer cut"])
def test_a_missing_or_broken_tokenizer_is_refused_in_one_line(content: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if content:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(TEXT["bert"]))
    if content == "tokenizer cut":
        bpe().save_pretrained(folder)
        (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:500])
    with pytest.raises(TensLoRAError, match=r"model\.checkpoint=\S*model: ") as caught:
        load_tokenizer(hf_text(pretrained=True, checkpoint=str(folder)), SENTENCES)
    assert "\n" not in str(caught.value)
    assert content or "no such folder" in str(caught.value)


def test_the_random_models_tokenizer_is_deterministic() -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 9))) for _ in range(400)]
    corpus = [(" ".join(rng.choices(words, k=12)), " ".join(rng.choices(words, k=5)) + " é") for _ in range(300)]
    one, two = (load_tokenizer(hf_text(), corpus) for _ in range(2))
    assert one.backend_tokenizer.to_str() == two.backend_tokenizer.to_str()
    assert len(one) > 400  # it learned merges


def test_the_random_models_tokenizer_encodes_pairs_as_roberta_does() -> None:
    tokenizer = bpe()
    for first, second in SENTENCES:
        a, b = (tokenizer(sentence)["input_ids"] for sentence in (first, second))
        assert (a[0], a[-1], b[0], b[-1]) == (0, 2, 0, 2)
        pair = tokenizer(first, second)
        assert pair["input_ids"] == [*a, 2, *b[1:]]
        assert set(pair) == {"input_ids", "attention_mask"}
        assert tokenizer.decode(a[1:-1]).strip() == first
    assert (tokenizer.pad_token_id, tokenizer.pad_token) == (1, "<pad>")


def test_the_random_models_tokenizer_knows_every_byte() -> None:
    tokenizer = bpe()
    odd = "Ωmega ☃ \U0001f600 \x07"
    ids = tokenizer(odd)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == odd.strip()


def test_padding_does_not_change_a_random_roberta() -> None:
    backbone = RANDOM["roberta"](2, 0)
    backbone.model.eval()
    alone = dict(bpe()(["Yes."], return_tensors="pt"))
    padded = dict(bpe()(["Yes."], padding="max_length", max_length=20, return_tensors="pt"))
    with torch.no_grad():
        torch.testing.assert_close(logits_of(backbone.model, padded), logits_of(backbone.model, alone))
