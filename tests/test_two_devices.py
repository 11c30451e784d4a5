"""A model whose layers lie on two devices, as accelerate's device_map leaves it, computes what it does on one."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tenslora import AdapterConfig, attach, merge, unmerge
from tests.commands import Command, Commands
from tests.conftest import ROOT
from tests.models import build, inputs, logits, randomised
from tests.other_device import NAME, register_device

MODES = ("att", "qkv_depth", "lora")


def divided(model: nn.Module) -> nn.Module:
    """The model with its last block on the device."""
    block: Any = model.get_submodule("blocks")[-1]  # type: ignore[index]
    block.to(NAME)
    block.register_forward_pre_hook(lambda _, given: (given[0].to(NAME),))
    block.register_forward_hook(lambda *called: called[-1].to("cpu"))
    return model


def gradients(model: nn.Module, parameters: list[nn.Parameter], batch: dict[str, Tensor]) -> list[Tensor]:
    return [each.cpu() for each in torch.autograd.grad(logits(model, batch).square().sum(), parameters)]


@sdpa_kernel(SDPBackend.MATH)  # as the device computes attention
def compare(mode: str, peft: bool) -> None:
    """Check one construction against the same adapter on a model that is whole."""
    batch, of_adapter = inputs("timm_vit"), []
    for model in (build("timm_vit"), divided(build("timm_vit"))):
        if peft:
            from peft import get_peft_model

            from tenslora.peft import TensLoraConfig

            model = get_peft_model(model, TensLoraConfig(tensor_mode=mode))
            adapter: Any = model.base_model.tenslora_adapters["default"]
        else:
            adapter = attach(model, AdapterConfig(mode)).double()
        randomised(adapter)
        of_adapter.append((model, list(adapter.parameters())))
    (whole, own), (parted, others) = of_adapter
    expected = logits(whole, batch)
    torch.testing.assert_close(logits(parted, batch), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(gradients(parted, others, batch), gradients(whole, own, batch), rtol=0, atol=1e-10)
    if peft:
        parted.merge_adapter()  # type: ignore[operator]
    else:
        merge(parted)
    torch.testing.assert_close(logits(parted, batch), expected, rtol=0, atol=1e-10)
    if peft:
        parted.unmerge_adapter()  # type: ignore[operator]
    else:
        unmerge(parted)
    torch.testing.assert_close(logits(parted, batch), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("peft", [False, True])
def test_a_model_on_two_devices_computes_and_learns_what_it_does_on_one(peft: bool, commands: Commands) -> None:
    ended = commands.run(Command("tests.test_two_devices", [*(["peft"] if peft else []), *MODES], ROOT))
    if ended.out.startswith("skipped"):
        pytest.skip(ended.out)
    assert ended.status == 0, ended.err
    assert ended.out.splitlines()[-1] == "equal"


if __name__ == "__main__":
    try:
        register_device()
    except ImportError as error:
        print(f"skipped: {error}")
        sys.exit()
    for construction in MODES:
        compare(construction, sys.argv[1] == "peft")
    print("equal")
