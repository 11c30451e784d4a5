"""Models that cannot be loaded: each is refused in one line that names the setting."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch

from tenslora.errors import TensLoRAError
from tenslora.harness.backbones import load_tokenizer
from tenslora.harness.backbones.hub import fetching
from tenslora.harness.config import ModelConfig
from tests.harness.backbones.tiny_models import (
    TEXT,
    VIT,
    VIT_DIGITS,
    assert_refused,
    save_random,
    timm_vit,
    trained_tokenizer,
    transformers_text,
    transformers_vit,
    vit_digits,
)

LIBRARIES = {"timm": vit_digits, "transformers": transformers_vit}


class NotATensor:
    pass


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of transformers' ViT."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_random(folder)
    return folder


@pytest.mark.parametrize(
    ("config", "repository"),
    [
        (timm_vit(pretrained=True), "timm/vit_tiny_patch16_224"),
        (transformers_vit(pretrained=True, architecture="nobody/no-model"), "nobody/no-model"),
        (transformers_text(pretrained=True, architecture="nobody/no-model"), "nobody/no-model"),
    ],
    ids=["timm", "image", "text"],
)
def test_a_hub_that_cannot_be_reached(
    config: ModelConfig, repository: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert_refused(config, rf"model=tiny: {repository} cannot be downloaded .*model\.checkpoint.*model\.pretrained")


def test_a_download_that_breaks_off_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks_off(*_: Any, **__: Any) -> None:
        raise RuntimeError("peer closed connection")

    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", breaks_off)
    config = transformers_text(architecture=None, options={}, checkpoint="org/bert", pretrained=True)
    with pytest.raises(TensLoRAError, match=r"from the Hugging Face hub \(peer closed connection\)$"):
        load_tokenizer(config, [])


def test_a_hub_that_limits_its_requests_is_told_of_and_other_retries_are_not() -> None:
    said: list[str] = []
    client = logging.getLogger("huggingface_hub.utils._http")
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    client.addHandler(handler)
    try:
        with fetching(transformers_text(checkpoint="org/bert", pretrained=True)):
            client.warning("Retrying in 1s [Retry 1/5].")
            client.warning("Rate limited. Waiting 3601.0s before retry [Retry 1/5].")
        client.warning("Retrying in 2s [Retry 2/5].")
    finally:
        client.removeHandler(handler)
    assert [line[:20] for line in said] == ["Rate limited. Waitin", "Retrying in 2s [Retr"]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("content", ["empty", "text", "cut"])
def test_a_corrupt_safetensors_file(library: str, content: str, saved: Path, tmp_path: Path) -> None:
    shutil.copy(saved / "config.json", tmp_path)
    complete = (saved / "model.safetensors").read_bytes()
    corrupt = {"empty": b"", "text": b"version https://git-lfs\n" * 5, "cut": complete[: len(complete) // 2]}
    (tmp_path / "model.safetensors").write_bytes(corrupt[content])
    assert_refused(LIBRARIES[library](checkpoint=str(tmp_path), pretrained=True), r"model\.checkpoint=\S*")


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_folder_without_weights(library: str, saved: Path, tmp_path: Path) -> None:
    shutil.copy(saved / "config.json", tmp_path)
    config = LIBRARIES[library](checkpoint=str(tmp_path), pretrained=True)
    assert_refused(config, r"model\.checkpoint=\S*: .*model\.safetensors")


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("checkpoint-500/config.json", r"has no config\.json, .*; there is \S+/checkpoint-500/config\.json"),
        ("snapshots/a1b2/config.json", r"has no config\.json, .*; there is \S+/snapshots/a1b2/config\.json"),
        ("result.json", r"holds a run and no model; python -m tenslora\.harness\.export \S+ --format merged makes one"),
        ("model.safetensors", r"has no config\.json, and so no model of transformers$"),
    ],
)
def test_a_folder_without_a_model_is_said_to_be_what_it_is(file: str, line: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(TensLoRAError, match=rf"^model\.checkpoint=\S+: {line}"):
        load_tokenizer(transformers_text(checkpoint=str(tmp_path), pretrained=True), [])


def test_a_key_that_transformers_does_not_know_is_said_to_be_one(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "hidden_act": "swish_glu"}))
    config = transformers_vit(checkpoint=str(tmp_path), pretrained=True)
    assert_refused(config, r"^model\.checkpoint=\S+: is not a checkpoint of tiny \(KeyError: 'swish_glu'\)$")


@pytest.mark.parametrize("make_config", [vit_digits, transformers_vit, transformers_text])
def test_a_missing_checkpoint(make_config: Callable[..., ModelConfig], tmp_path: Path) -> None:
    config = make_config(checkpoint=str(tmp_path / "nowhere"), pretrained=True)
    assert_refused(config, r"model\.checkpoint=\S*nowhere: no such f")


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    "content",
    [NotATensor(), {"norm.weight": NotATensor()}, [1, 2], 3, {"norm.weight": "text"}, {"model": 3}, {1: torch.ones(1)}],
    ids=["object", "object inside", "list", "number", "text inside", "nested number", "numbered"],
)
def test_a_pickle_of_anything_but_tensors(library: str, content: Any, saved: Path, tmp_path: Path) -> None:
    shutil.copy(saved / "config.json", tmp_path)
    torch.save(content, tmp_path / "pytorch_model.bin")
    message = r"model\.checkpoint=\S*: [^\\]*$"  # without the codes by which a terminal writes in bold
    assert_refused(LIBRARIES[library](checkpoint=str(tmp_path), pretrained=True), message)


def test_a_pickle_runs_no_code(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "touched",))

    torch.save({"norm.weight": Malicious()}, tmp_path / "pytorch_model.bin")
    config = vit_digits(checkpoint=str(tmp_path))
    assert_refused(config, r"model\.checkpoint=\S*: not a plain dictionary of tensors; save the model's state_dict")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (timm_vit(architecture="vit_gigantic"), r"model\.architecture=vit_gigantic: timm .* no such model"),
        (timm_vit(architecture="vit_tiny_patch16_224_in21k", pretrained=True),
         r"^model\.architecture=vit_tiny_patch16_224_in21k: must be vit_tiny_patch16_224\.augreg_in21k, as timm calls"),
        (timm_vit(options={**VIT_DIGITS, "widths": 3}), r"model\.options=.*widths"),
        (timm_vit(options={**VIT_DIGITS, "num_heads": 5}), r"model\.options=.*'num_heads': 5.*divi"),
        (timm_vit(options={**VIT_DIGITS, "num_heads": 0}), r"model\.options=.*'num_heads': 0.*zero"),
        (transformers_vit(options={}), r"model\.options=\{\}: .*model_type"),
        (transformers_vit(options={**VIT, "model_type": "nosuch"}), r"model\.options=.*nosuch"),
        (transformers_vit(options={**VIT, "model_type": "bert"}), r"model\.options=.*bert"),
        (transformers_text(options={**TEXT["bert"], "num_attention_heads": 3}), r"model\.options=.*'num_attention_he"),
        (transformers_text(options={**TEXT["bert"], "vocab_size": 100}), r"model\.options.*must be at least \d{3}"),
    ],
    ids=[
        "unknown name",
        "deprecated name",
        "unknown option",
        "heads",
        "no heads",
        "no type",
        "unknown type",
        "text type",
        "hf heads",
        "vocabulary",
    ],
)  # fmt: skip
def test_options_that_do_not_make_a_model(config: ModelConfig, message: str) -> None:
    assert_refused(config, message, trained_tokenizer() if config.modality == "text" else None)
