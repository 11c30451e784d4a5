"""Runs with model.quantization, from the loaded backbone to the exported adapter, on tiny models and on a CPU."""

from __future__ import annotations

import importlib
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tenslora import TensLoRAError
from tenslora.harness.adapted_model import adapted_model
from tenslora.harness.backbones import Backbone, load_backbone, quantisation
from tenslora.harness.config import ModelConfig
from tenslora.harness.data import load_dataset
from tenslora.harness.evaluate import scores_of
from tenslora.harness.export import main as export
from tenslora.harness.load_run import load_run
from tenslora.harness.run_folder import RunFolder
from tenslora.harness.training.tasks import outputs_of
from tests.harness.backbones.tiny_models import RANDOM, trained_tokenizer, vit_digits
from tests.running import SHORT, accuracy_of, configured, record, run

_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
"""bitsandbytes is only exact for inputs that are whole blocks of 64."""

bnb: Any = importlib.import_module("bitsandbytes")  # its types are not declared

KINDS = ["timm int8", "text nf4", "text int8"]


@pytest.fixture(autouse=True)
def _same_on_every_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # With the instructions AVX512-BF16 bitsandbytes rounds what it computes in evaluation mode.
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: False)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The settings of a short run of each kind. The BERT has weights on disk, but no pooler and no head."""
    root = tmp_path_factory.mktemp("quantised")
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=300, **_SIZES)
    bert = transformers.BertModel(config, add_pooling_layer=False)
    for name, parameter in bert.named_parameters():
        if name.endswith("bias"):  # which are zero in a new model, and no precision rounds a zero
            nn.init.normal_(parameter, std=0.1)
    bert.save_pretrained(root / "bert")
    trained_tokenizer().save_pretrained(root / "bert")
    lines = [f"the {('cat', 'dog', 'bird')[number % 3]} sat {number} times,{number % 2}" for number in range(60)]
    (root / "texts.csv").write_text("\n".join(["text,label", *lines]))
    text = [*SHORT, "dataset=text", f"dataset.root={root}/texts.csv", "model=hf_text", f"model.checkpoint={root}/bert"]
    common = ["trainer.batch_size=16", "optimizer.lr=0.02", "adapter.dropout=0.2"]
    return {
        "timm int8": [*SHORT, *common, "model.quantization=int8"],
        "text nf4": [*text, *common, "model.quantization=nf4"],
        "text int8": [*text, *common, "model.quantization=int8"],
    }


@pytest.fixture(scope="module")
def finished(words: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of a finished run of each kind."""
    folders = {kind: tmp_path_factory.mktemp("run") for kind in KINDS}
    for kind, folder in folders.items():
        run(folder, *words[kind])
    return folders


def test_a_quantised_model_that_cannot_compute_is_refused_before_it_is_trained(
    words: dict[str, list[str]], tmp_path: Path
) -> None:
    sizes = {"d_model": 64, "d_kv": 32, "num_layers": 1, "num_heads": 2, "d_ff": 64, "vocab_size": 300}
    config = transformers.T5Config(**sizes, decoder_start_token_id=None, eos_token_id=2)
    transformers.T5Model(config).save_pretrained(tmp_path / "t5")
    trained_tokenizer().save_pretrained(tmp_path / "t5")
    with pytest.raises(TensLoRAError, match=r"^T5ForSequenceClassification: cannot compute its outputs for a sentence"):
        run(tmp_path / "run", *words["text nf4"], f"model.checkpoint={tmp_path}/t5")
    assert not (tmp_path / "run" / "result.json").exists()


def random_inputs(backbone: Backbone) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if image_input := backbone.image_input:
        shape = (3, image_input.channels, image_input.size, image_input.size)
        return {backbone.input_name: torch.randn(shape, generator=generator)}
    return {"input_ids": torch.randint(5, 50, (3, 7), generator=generator)}


def outputs(backbone: Backbone, model: nn.Module | None = None) -> Tensor:
    with torch.no_grad():
        return outputs_of((model or backbone.model).eval(), random_inputs(backbone))


CONFIGS = {
    "timm int8": vit_digits(quantization="int8"),
    **{
        f"{kind} {how}": replace(RANDOM[kind], quantization=how, options={**RANDOM[kind].options, **_SIZES})
        for kind, how in itertools.product(["vit", "roberta"], ["nf4", "int8"])
    },
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_all_linears_but_the_heads_are_rounded_as_the_format_allows(kind: str) -> None:
    config = CONFIGS[kind]
    tokenizer = trained_tokenizer() if config.modality == "text" else None
    plain, rounded = (load_backbone(each, 3, 5, tokenizer) for each in (replace(config, quantization=None), config))
    head = {id(module) for own in rounded.head for module in own.modules()}
    for path, linear in plain.model.named_modules():
        if not isinstance(linear, nn.Linear):
            continue
        own = rounded.model.get_submodule(path)
        if id(own) in head or ".pooler." in path:
            assert torch.equal(own.get_parameter("weight"), linear.weight)
            continue
        assert type(own) is not nn.Linear or type(own.weight) is not nn.Parameter
        with torch.no_grad():
            weight = own(torch.eye(linear.in_features)) - own(torch.zeros(1, linear.in_features))
        error, largest = (weight.T - linear.weight).abs(), linear.weight.abs().amax(dim=1, keepdim=True)
        # nf4's values are at most 0.31 of a block's largest weight apart; int8 has 127 steps to an output's largest.
        assert (error <= (0.16 * linear.weight.abs().max() if config.quantization == "nf4" else largest / 200)).all()
        assert error.max() > 0
    untouched = [name for name, p in plain.model.named_parameters() if "norm" in name.lower() or "embed" in name]
    assert untouched
    for name in untouched:
        assert torch.equal(rounded.model.get_parameter(name), plain.model.get_parameter(name))


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_leaves_the_start_unchanged_to_the_bit(kind: str, words: dict[str, list[str]]) -> None:
    settings = configured(*words[kind])
    tokenizer = trained_tokenizer() if settings.model.modality == "text" else None
    backbone = load_backbone(settings.model, 2, 0, tokenizer)
    expected = outputs(backbone)
    adapted = adapted_model(settings, backbone, torch.device("cpu"))
    assert torch.equal(outputs(backbone), expected)
    assert {name for name, p in adapted.model.named_parameters() if p.requires_grad} == {
        *(name for name, _ in adapted.model.named_parameters() if name.startswith("tenslora.")), *adapted.head
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_run_is_loaded_scored_and_asked(kind: str, finished: dict[str, Path]) -> None:
    folder = finished[kind]
    saved, loaded = record(folder), load_run(folder)
    assert saved["config"]["model"]["quantization"] == saved["identity"]["model"]["quantization"] == kind.split()[1]
    assert accuracy_of(loaded) == saved["metrics"]["last"]
    evaluation = loaded.evaluate()
    assert {"test_loss": evaluation.loss, **evaluation.scores} == scores_of(saved)
    inputs = load_dataset(loaded.run.dataset, loaded.run.seed).test.inputs
    expected = [loaded.classes[number] for number in RunFolder(folder).read_predictions()["test"].predicted]
    assert [each.answer for each in loaded.predict(inputs)] == expected


@pytest.mark.parametrize("form", ["peft", "tenslora"])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_its_adapter_with_the_code_of_the_model_card(
    kind: str, form: str, finished: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export([str(finished[kind]), "--format", form, "--out", str(tmp_path / "peft")])
    loaded = load_run(finished[kind])
    card = (tmp_path / "peft" / "README.md").read_text()
    assert f"| quantization | {kind.split()[1]} |" in card
    monkeypatch.chdir(tmp_path / "peft")
    names: dict[str, Any] = {}
    exec(card.partition("```python\n")[2].partition("```")[0], names)
    assert isinstance(names["model"], PeftModel)
    torch.testing.assert_close(outputs(loaded.backbone, names["model"]), outputs(loaded.backbone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["text nf4", "text int8"])
def test_transformers_loads_it_merged_up_to_the_rounding(kind: str, finished: dict[str, Path], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="rounded again"):
        export([str(finished[kind]), "--format", "merged", "--out", str(tmp_path / "merged")])
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", device_map="cpu")
    loaded = load_run(finished[kind])
    expected = outputs(loaded.backbone)
    assert (outputs(loaded.backbone, merged) - expected).abs().max() < 0.2 * expected.abs().max()
    checkpoint = replace(loaded.run.model, checkpoint=str(tmp_path / "merged"), quantization=None)
    for asked in (None, "int8", "nf4"):  # the checkpoint's own kind would stay, whatever is asked for
        with pytest.raises(TensLoRAError, match=r"^model\.checkpoint=.*: its weights are quantised already"):
            load_backbone(replace(checkpoint, quantization=asked), 2, 0)


def test_a_timm_model_cannot_be_merged_and_says_what_can_be_done(finished: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="leave the adapter unmerged") as caught:
        export([str(finished["timm int8"]), "--format", "merged", "--out", str(tmp_path / "merged")])
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(
    kind: str, words: dict[str, list[str]], finished: dict[str, Path], tmp_path: Path
) -> None:
    steps = itertools.count(1)

    def step(*_: Any, **__: Any) -> None:
        if next(steps) == 6:  # in the second epoch of two, which have four steps each
            raise KeyboardInterrupt

    hook = register_optimizer_step_pre_hook(step)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, *words[kind])
    hook.remove()
    assert not (tmp_path / "result.json").exists()
    run(tmp_path, *words[kind], "resume=true")
    whole, broken = record(finished[kind]), record(tmp_path)
    assert len(whole["metrics"]["history"]) == 2
    assert broken["metrics"] == whole["metrics"]
    for file in ("adapter.safetensors", "head.safetensors", "predictions.safetensors"):
        assert (tmp_path / file).read_bytes() == (finished[kind] / file).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_in_half_precision_too_and_is_scored_again_to_the_bit(
    kind: str, words: dict[str, list[str]], tmp_path: Path
) -> None:
    settings = [*words[kind], "adapter.dropout=0", "optimizer.lr=0.001", "trainer.max_steps=3"]
    losses = [
        run(tmp_path / precision, *settings, f"trainer.precision={precision}")["metrics"]["history"][-1]["train_loss"]
        for precision in ("bf16", "fp32")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    saved, loaded = record(tmp_path / "bf16"), load_run(tmp_path / "bf16")
    evaluation = loaded.evaluate()
    assert {"test_loss": evaluation.loss, **evaluation.scores} == scores_of(saved)
    assert outputs(loaded.backbone).dtype == torch.float32  # outside of autocast too


def test_the_setting_makes_another_run_and_its_default_none() -> None:
    plain, rounded = configured(), configured("model.quantization=int8")
    assert plain.digest() != rounded.digest()
    assert plain.digest() == configured("model.quantization=null").digest()
    assert "quantization" not in plain.identity()["model"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.quantization=int4"], "model.quantization=int4: must be one of nf4, int8"),
        (["model.quantization=nf4"], "model.quantization=nf4: must be int8 or null, because the model is one of timm"),
        (
            ["model.quantization=int8", "tensor_mode=full"],
            "model.quantization=int8: must be null with",
        ),
    ],
)
def test_what_cannot_be_is_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(TensLoRAError, match=message) as caught:
        configured(*overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "package"), [(CONFIGS["timm int8"], "torchao"), (CONFIGS["vit nf4"], "bitsandbytes")]
)
def test_a_missing_package_is_named(config: ModelConfig, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantisation, "find_spec", lambda name: None if name == package else name)
    with pytest.raises(TensLoRAError, match=rf"model\.quantization=.*: needs {package} .*pip install {package}"):
        load_backbone(config, 3, 0)
