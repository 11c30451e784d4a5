"""What every backbone has in common, whichever library builds it."""

from __future__ import annotations

import random
import threading
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

from tenslora.harness.backbones.timm_models import load_timm
from tenslora.harness.cache import forget_all
from tenslora.harness.training.tasks import outputs_of
from tenslora.random_streams import stream_seed
from tests.harness.backbones.tiny_models import (
    HEADS,
    RANDOM,
    SENTENCES,
    TEXT,
    VIT_DIGITS,
    equal,
    load_random,
    trained_tokenizer,
    weights_of,
)


@pytest.mark.parametrize("kind", RANDOM)
def test_random_weights_follow_the_seed_and_nothing_else(kind: str) -> None:
    trained_tokenizer()
    torch.manual_seed(1)
    weights = weights_of(load_random(kind, seed=7))
    torch.manual_seed(2)
    torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    assert equal(weights, weights_of(load_random(kind, seed=7)))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (random.getstate(), repr(np.random.get_state())) == (python_state, numpy_state)
    others = weights_of(load_random(kind, seed=8))
    matrices = [name for name, tensor in weights.items() if tensor.ndim > 1 and tensor.any()]
    assert all(not torch.equal(weights[name], others[name]) for name in matrices)


@pytest.mark.parametrize("kind", ["timm vit", "bert"])
def test_another_thread_that_draws_changes_no_weight(kind: str) -> None:
    expected, over = weights_of(load_random(kind, seed=9)), threading.Event()

    def draw() -> None:
        while not over.is_set():
            torch.rand(10)

    other = threading.Thread(target=draw)
    other.start()
    try:
        forget_all()
        assert equal(expected, weights_of(load_random(kind, seed=9)))
    finally:
        over.set()
        other.join()


def test_random_weights_are_those_of_torchs_own_generator() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed("backbone", 7))
        expected = timm.create_model("vit_tiny_patch16_224", num_classes=3, **VIT_DIGITS).state_dict()
    weights = weights_of(load_random("timm vit", seed=7))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in expected.items() if "head" not in name)


@pytest.mark.parametrize("kind", RANDOM)
def test_the_head_is_what_lies_outside_the_transformer(kind: str) -> None:
    backbone = load_random(kind, classes=3)
    head = backbone.head_parameters()
    assert head.keys() == HEADS[kind]
    own = dict(backbone.model.named_parameters())
    assert all(own[name] is parameter for name, parameter in head.items())
    assert sum(parameter.shape[0] == 3 for parameter in head.values()) == 2


@pytest.mark.parametrize("kind", RANDOM)
def test_a_random_model_runs_and_learns(kind: str) -> None:
    backbone = load_random(kind, classes=3)
    if kind in TEXT:
        inputs = dict(trained_tokenizer()([first for first, _ in SENTENCES], padding=True, return_tensors="pt"))
    else:
        inputs = {backbone.input_name: torch.randn(3, RANDOM[kind].channels or 0, 8, 8)}
    logits = outputs_of(backbone.model, inputs)
    assert logits.shape == (3, 3)
    torch.autograd.backward(F.cross_entropy(logits, torch.tensor([0, 1, 2])))
    for name, parameter in backbone.head_parameters().items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_a_model_may_be_loaded_while_its_thread_loads_another(monkeypatch: pytest.MonkeyPatch) -> None:
    # As a signal's handler does that loads a run anew.
    begun: list[int] = []

    def interrupted(*arguments: Any) -> Any:
        begun.append(1)
        if len(begun) == 1:
            assert weights_of(load_random("timm vit", seed=8))
        return load_timm(*arguments)

    monkeypatch.setattr("tenslora.harness.backbones.load_timm", interrupted)
    forget_all()
    load_random("timm vit", seed=7)
    assert len(begun) == 2
