"""The scripts in examples/ do what they say."""

from __future__ import annotations

from importlib import import_module

import pytest

from tests.conftest import ROOT


def test_a_plain_loop_learns_and_merging_keeps_the_accuracy() -> None:
    adapted, merged = import_module("examples.plain_loop").main(epochs=4)
    assert adapted > 0.6  # of five classes
    assert merged == pytest.approx(adapted, abs=0.005)


def test_a_model_trained_by_the_trainer_learns_and_can_be_loaded() -> None:
    trained, loaded = import_module("examples.trainer").main(steps=100)
    assert trained > 0.9
    assert loaded == trained


def test_the_loss_of_a_decoder_falls_on_a_text_file() -> None:
    losses = import_module("examples.causal_lm").main(ROOT / "README.md", steps=30)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
