from __future__ import annotations

import math

import pytest
import torch

from tenslora.factorizations.tensor_train import TensorTrain
from tenslora.factorizations.tucker import Tucker
from tenslora.tensor import FactorizedTensor


@pytest.mark.parametrize(
    ("init", "deviation"), [("normal", 1 / math.sqrt(400)), ("kaiming_uniform", 1 / math.sqrt(1200))]
)
def test_random_factors_have_the_documented_spread(init: str, deviation: float) -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = FactorizedTensor(Tucker(), {"d_in": 400, "d_out": 400}, [50, 50], 1, generator, init=init)
    for factor in (tensor.d_in, tensor.d_out):
        assert abs(factor.std().item() / deviation - 1) < 0.02  # type: ignore[operator,union-attr]
        assert init == "normal" or factor.abs().max().item() <= 1 / math.sqrt(400)  # type: ignore[operator,union-attr]


def test_lora_starts_as_peft_starts_it() -> None:
    from torch import nn

    generator = torch.Generator().manual_seed(0)
    matrix = FactorizedTensor(TensorTrain(), {"d_in": 300, "d_out": 200}, [4], 1, generator, init="kaiming_uniform")
    oracle = nn.Linear(300, 4, bias=False)  # PEFT's lora_A
    nn.init.kaiming_uniform_(oracle.weight, a=math.sqrt(5))
    assert matrix.d_out.abs().max() == 0  # type: ignore[operator,union-attr]
    assert abs(matrix.d_in.std().item() / oracle.weight.std().item() - 1) < 0.1  # type: ignore[operator,union-attr]
    assert abs(matrix.d_in.abs().max().item() / oracle.weight.abs().max().item() - 1) < 0.05  # type: ignore[operator,union-attr]
