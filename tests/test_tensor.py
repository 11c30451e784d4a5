from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tenslora.errors import TensLoRAError
from tenslora.factorizations.tensor_guide import TensorGuide
from tenslora.factorizations.tensor_train import TensorTrain
from tenslora.factorizations.tucker import Tucker
from tenslora.tensor import FactorizedTensor


@pytest.mark.parametrize(
    ("init", "deviation"), [("normal", 1 / math.sqrt(400)), ("kaiming_uniform", 1 / math.sqrt(1200))]
)
def test_random_factors_have_the_documented_spread(init: str, deviation: float) -> None:
    tensor = FactorizedTensor(Tucker(), {"d_in": 400, "d_out": 400}, [50, 50], 1, seed=0, init=init)
    for factor in map(tensor.get_parameter, ("d_in", "d_out")):
        assert abs(factor.std().item() / deviation - 1) < 0.02
        assert init == "normal" or factor.abs().max().item() <= 1 / math.sqrt(400)


@pytest.mark.parametrize("init", ["orthogonal", "normal"])
def test_a_tensor_that_leaves_the_device_meta_gets_the_numbers_that_it_would_have_had(init: str) -> None:
    def made() -> FactorizedTensor:
        return FactorizedTensor(TensorGuide(), {"d_in": 12, "d_out": 8}, [4, 2], 1, seed=3, init=init)

    expected = made()
    with torch.device("meta"):
        tensor = made()
    tensor.to_empty(device="cpu")
    for parameter in (*tensor.parameters(), *tensor.buffers()):
        parameter.detach().fill_(math.nan)
    tensor.reset_parameters()
    assert all(torch.equal(own, expected.state_dict()[name]) for name, own in tensor.state_dict().items())
    tensor.bfloat16().reset_parameters()
    assert all(own.dtype == torch.bfloat16 and own.isfinite().all() for own in tensor.parameters())


def test_a_tensor_is_drawn_where_initialisation_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(init: str) -> FactorizedTensor:
        return FactorizedTensor(Tucker(), {"d_in": 12, "d_out": 8}, [4, 2], 1, seed=3, init=init)

    expected = [made(init) for init in ("normal", "kaiming_uniform")]
    for name in ("normal_", "uniform_", "orthogonal_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *_, **__: tensor)
    for before, init in zip(expected, ("normal", "kaiming_uniform"), strict=True):
        assert all(map(torch.equal, before.parameters(), made(init).parameters()))
    with pytest.raises(TensLoRAError, match=r"^torch\.nn\.init does nothing here, as under no_init_weights"):
        made("orthogonal")


def test_lora_starts_as_peft_starts_it() -> None:
    matrix = FactorizedTensor(TensorTrain(), {"d_in": 300, "d_out": 200}, [4], 1, seed=0, init="kaiming_uniform")
    expected = nn.Linear(300, 4, bias=False).weight  # PEFT's lora_A
    nn.init.kaiming_uniform_(expected, a=math.sqrt(5))
    d_in = matrix.get_parameter("d_in")
    assert matrix.get_parameter("d_out").abs().max() == 0
    assert abs(d_in.std().item() / expected.std().item() - 1) < 0.1
    assert abs(d_in.abs().max().item() / expected.abs().max().item() - 1) < 0.05
