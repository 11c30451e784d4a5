"""The scripts in examples/ do what they say."""

from __future__ import annotations

from importlib import import_module

import pytest

from tests.conftest import ROOT


def test_the_plain_loop_learns_and_merging_changes_nothing() -> None:
    adapted, merged = import_module("examples.plain_loop").main(epochs=6)
    assert adapted > 0.6  # of five classes
    assert merged == pytest.approx(adapted, abs=0.005)


def test_under_the_trainer_it_learns_and_is_loaded_again() -> None:
    trained, loaded = import_module("examples.trainer").main(steps=200)
    assert trained > 0.9
    assert loaded == trained


def test_a_decoders_loss_falls_on_a_text_file() -> None:
    losses = import_module("examples.causal_lm").main(ROOT / "README.md", steps=60)
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])
