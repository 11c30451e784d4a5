from __future__ import annotations

import torch
from torch import Tensor

from tenslora.harness.backbones import load_backbone
from tests.harness.backbones.tiny_models import equal, timm_vit, vit_digits


def test_the_head_depends_on_the_seed_alone_and_not_on_the_checkpoint() -> None:
    def head(pretrained: bool, seed: int) -> dict[str, Tensor]:
        backbone = load_backbone(vit_digits() if pretrained else timm_vit(), 5, seed)
        return {name: parameter.data for name, parameter in backbone.head_parameters().items()}

    drawn = head(True, 3)
    assert equal(drawn, head(True, 3))
    assert equal(drawn, head(False, 3))
    assert not torch.equal(drawn["head.weight"], head(True, 4)["head.weight"])
    assert 0.015 < drawn["head.weight"].std() < 0.025
    assert not drawn["head.bias"].any()
