"""The answer of a backbone to one fixed input, by which a run knows it again."""

from __future__ import annotations

import pytest
from torch import nn

from tenslora.errors import TensLoRAError
from tenslora.harness.backbones import Backbone, load_backbone
from tenslora.harness.backbones.answer import answer_of
from tests.running import configured


def _digits_model(*overrides: str) -> Backbone:
    return load_backbone(configured("model.pretrained=false", *overrides).model, 5, 0)


def test_the_answer_leaves_the_modes_as_they_were() -> None:
    backbone = _digits_model()
    backbone.model.train()
    backbone.model.get_submodule("blocks.0").eval()
    modes = [module.training for module in backbone.model.modules()]
    answer = answer_of(backbone, None)
    assert answer is not None
    assert len(answer) == 5
    assert [module.training for module in backbone.model.modules()] == modes


def test_a_backbone_that_cannot_compute_anything_is_refused_before_it_is_trained() -> None:
    line = r"^VisionTransformer: cannot compute its outputs for an image of 16 x 16 \(Input height \(16\) .*model \(8\)"
    with pytest.raises(TensLoRAError, match=line):
        answer_of(_digits_model("model.image_size=16"), None)


def test_outputs_of_another_form_are_named() -> None:
    backbone = _digits_model()
    backbone.model.register_forward_hook(lambda *_: (1,))
    with pytest.raises(
        TensLoRAError, match=r"\(its output is a tuple; must be a tensor, or have one as its logits\); ch"
    ):
        answer_of(backbone, None)


def test_a_sentence_that_a_model_cannot_compute_is_called_one() -> None:
    backbone = Backbone(nn.Linear(2, 2), [], "x", None)
    with pytest.raises(
        TensLoRAError, match=r"^Linear: cannot compute its outputs for a sentence \(.*\); check model\.ch"
    ):
        answer_of(backbone, lambda *_, **__: {"input_ids": 1})
