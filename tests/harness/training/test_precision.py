from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tenslora.attachment import adapter_of
from tenslora.harness.training.precision import round_frozen_weights
from tenslora.projections import is_conv1d
from tests.models import BUILDERS, DECODERS, attached, build, inputs, logits


def adapted(name: str) -> nn.Module:
    """A model in float32 with an adapter; what is not in a Linear layer is trainable."""
    model = build(name)
    attached(model, "qkv_depth", adapt="all")
    for module in model.float().modules():
        if not (isinstance(module, nn.Linear) or is_conv1d(module)):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)
    return model


def step(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """The outputs under autocast, and all gradients."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = logits(model, batch)
    torch.autograd.backward(output.float().square().sum())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) > len(list(adapter_of(model).parameters()))
    return [output, *gradients]


@pytest.mark.parametrize("name", [*BUILDERS, *DECODERS])
def test_under_autocast_no_result_changes(name: str) -> None:
    batch = {key: t.float() if t.is_floating_point() else t for key, t in inputs(name).items()}
    expected = step(adapted(name), batch)
    model = adapted(name)
    round_frozen_weights(model)
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    for one, other in zip(step(model, batch), expected, strict=True):
        assert torch.equal(one, other)


def test_parameters_that_are_trained_or_shared_or_not_float32_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5), nn.Linear(5, 2), nn.LayerNorm(2))
    model.requires_grad_(False)
    model[2].weight = model[0].weight
    model[3].double()
    model[1].bias.requires_grad_(True)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    round_frozen_weights(model)
    after = dict(model.named_parameters())
    assert [name for name, p in after.items() if p.dtype == torch.bfloat16] == ["1.weight", "2.bias"]
    assert all(torch.equal(p, weights[name].to(p.dtype)) for name, p in after.items())
    assert model[2].weight is model[0].weight


def saved_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """The bytes that a step keeps for its backward pass, without the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step(model, batch)
    return sum(sizes)


def test_no_step_keeps_copies_of_the_weights() -> None:
    batch = {key: t.float() for key, t in inputs("timm_vit").items()}
    model = adapted("timm_vit")
    before = saved_bytes(model, batch)
    round_frozen_weights(model)
    weights = [p for p in model.parameters() if p.dtype == torch.bfloat16 and p.dim() == 2]
    assert len(weights) == 9  # four in each of two layers, and the head
    assert before - saved_bytes(model, batch) == sum(p.nbytes for p in weights)
