"""The scripts in examples/ do what they say."""

from __future__ import annotations

import os
import re
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tenslora.errors import TensLoRAError
from tests.conftest import ROOT

pytestmark = pytest.mark.slow


def test_a_plain_loop_learns_and_merging_keeps_the_accuracy() -> None:
    adapted, merged = import_module("examples.plain_loop").main(epochs=4)
    assert adapted > 0.6  # of five classes
    assert merged == pytest.approx(adapted, abs=0.005)


def test_a_model_trained_by_the_trainer_learns_and_can_be_loaded() -> None:
    trained, loaded = import_module("examples.trainer").main(steps=100)
    assert trained > 0.9
    assert loaded == trained


def test_the_trainer_takes_the_models_loss_in_several_processes_too(tmp_path: Path) -> None:
    example = import_module("examples.trainer")
    model = example.backbone().eval()
    trainer = example.trainer_of(model, str(tmp_path))
    trainer.accelerator = SimpleNamespace(num_processes=2, parallelism_config=None)
    batch = {name: each[None] for name, each in example.Majority(1, 0)[0].items()}
    assert trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(2)) == model(**batch).loss


def test_the_loss_of_a_decoder_falls_on_a_text_file() -> None:
    losses = import_module("examples.causal_lm").main(ROOT / "README.md", steps=30)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


@pytest.mark.parametrize("name", ["causal_lm", "peft_causal_lm"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "must have more than 64 bytes, and has 0"),
        ("a pipe", "must be a file, not a pipe or a device"),
    ],
)
def test_a_text_file_that_cannot_be_learned_is_one_line(
    name: str, content: bytes | str | None, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "text.txt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content:
        os.mkfifo(file)
    with pytest.raises(TensLoRAError, match=f"^{re.escape(f'{file}: {message}')}$"):
        import_module(f"examples.{name}").main(file)


def test_peft_trains_saves_and_loads_a_classifier() -> None:
    trained, loaded = import_module("examples.peft_trainer").main(steps=100)
    assert trained > 0.9
    assert loaded == trained


def test_peft_trains_a_decoder_on_a_text_file() -> None:
    losses = import_module("examples.peft_causal_lm").main(ROOT / "README.md", steps=30)
    assert losses[-1] < 0.8 * losses[0]


def test_peft_adapts_queries_and_values_inside_a_fused_linear() -> None:
    adapted, merged, keys = import_module("examples.peft_timm").main(epochs=4)
    assert adapted > 0.6  # of five classes
    assert merged == pytest.approx(adapted, abs=0.005)
    assert keys == 0


def test_a_kan_is_adapted_to_another_problem_by_tucker_updates() -> None:
    rows = import_module("examples.kan").main(steps=40, seeds=1)
    (full, _), *adapted = rows.values()
    assert full == 8 * (12 * 2 + 12 * 12 + 12)
    for count, _ in adapted:
        # Σ n_i r_i + Π r_i of (12, 2, 8), (12, 12, 8) and (1, 12, 8); no rank above 4 or above its mode's size
        assert count == (12 * 4 + 2 * 2 + 8 * 4 + 32) + (12 * 4 + 12 * 4 + 8 * 4 + 64) + (1 + 12 * 4 + 8 * 4 + 16)
    (slow,), (fast,) = (rows[f"Tucker, direct, core_lr_ratio {ratio}"][1] for ratio in ("0.25", "4"))
    assert fast < 0.7 < slow
