"""A run on a device beside the CPU: no tensor stays behind on the CPU, and the results are those of the CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from tenslora.attachment import merge, unmerge
from tenslora.harness.load_run import load_run
from tenslora.harness.training import loop, processes
from tenslora.harness.training.checkpoint import save_checkpoint
from tests.commands import Command, Commands
from tests.conftest import ROOT
from tests.other_device import NAME, register_device
from tests.running import record, run

WORDS = [
    "trainer.epochs=2", "trainer.batch_size=16", "trainer.accumulation=2", "trainer.eval_batch_size=100",
    "trainer.clip_norm=1", "dataset.train_size=40", "dataset.validation=0.25",
]  # fmt: skip

RUNS = {
    "fp32": ["tensor_mode=att_qkv_depth", "adapter.adapt=all"],
    "bf16": ["tensor_mode=lora", "trainer.precision=bf16"],
}


class Stopped(Exception):
    """What stops a run after its first epoch."""


def save_and_stop(*args: Any) -> None:
    save_checkpoint(*args)
    raise Stopped


@sdpa_kernel(SDPBackend.MATH)  # as the device computes attention
def compared(on_cpu: Path, on_device: Path, words: list[str]) -> str:
    """Train on the CPU and on the device: "equal", or what is not."""
    run(on_cpu, *WORDS, *words)
    patch = pytest.MonkeyPatch()
    patch.setattr(processes, "_device", lambda _: torch.device(NAME))  # trainer.device takes no such name
    patch.setattr(torch, "inference_mode", torch.no_grad)  # which is not for tensors of such a device
    with pytest.MonkeyPatch.context() as stopping, pytest.raises(Stopped):
        stopping.setattr(loop, "save_checkpoint", save_and_stop)
        run(on_device, *WORDS, *words)
    run(on_device, *WORDS, *words, "resume=true")  # its second epoch, from a checkpoint that is put on the device
    for name in ("adapter", "head") if "trainer.precision=bf16" not in words else ():  # bf16 is rounded elsewhere
        ours, theirs = (load_file(folder / f"{name}.safetensors") for folder in (on_device, on_cpu))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    losses = [
        [epoch["validation_loss"] for epoch in record(folder)["metrics"]["history"]] for folder in (on_device, on_cpu)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    loaded = load_run(on_device)
    scores = loaded.evaluate().scores
    if {weight.device.type for weight in loaded.backbone.model.state_dict().values()} != {NAME}:
        return "a weight is not on the device"
    merge(loaded.backbone.model)
    assert loaded.evaluate().scores == pytest.approx(scores, abs=0.11)
    unmerge(loaded.backbone.model)
    return "equal"


def test_a_run_on_another_device_is_the_run_on_the_cpu(commands: Commands, tmp_path: Path) -> None:
    # A process of its own, and no copy of this one: once autograd has run, it knows no further device.
    ended = commands.run(Command("tests.harness.test_other_device", [str(tmp_path)], ROOT))
    said = ended.out.splitlines()[-len(RUNS) :]
    if said and said[-1].startswith("skipped"):
        pytest.skip(said[-1])
    assert said == ["equal"] * len(RUNS), ended.out + ended.err


def main(folder: Path) -> None:
    """Print one line for each of the runs, or why there is none."""
    try:
        register_device()
    except ImportError as error:
        print(f"skipped: {error}")
        return
    ends = [compared(folder / name / "cpu", folder / name / "device", words) for name, words in RUNS.items()]
    print(*ends, sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
