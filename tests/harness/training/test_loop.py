from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from safetensors.torch import load_file

from tenslora.errors import TensLoRAError
from tenslora.factorizations import FACTORIZATIONS
from tenslora.harness.backbones import logits_of
from tenslora.harness.config import ModelConfig
from tenslora.harness.training.loop import Diverged
from tests.running import SHORT, record, run


@pytest.mark.parametrize(("ratio", "decay"), [(1.0, 0.1), (8.0, 0.5)])
def test_the_loop_is_adamw_on_the_mean_loss(tmp_path: Path, ratio: float, decay: float) -> None:
    # By hand: the same order of examples, torch's own loss, schedule and optimizer, and the update built densely.
    from tenslora.adapter import Adapter, AdapterConfig
    from tenslora.harness.backbones import load_backbone
    from tenslora.harness.config import validate
    from tenslora.harness.data import load_dataset
    from tenslora.harness.data.batches import TrainBatches
    from tenslora.harness.data.encoding import encode
    from tests.running import composed

    overrides = [*SHORT, "tensor_mode=depth", "trainer.batch_size=20", "optimizer.weight_decay=0.1", "trainer.epochs=1"]
    overrides += [f"optimizer.core_lr_ratio={ratio}", f"optimizer.factor_weight_decay.d_in={decay}"]
    history = run(tmp_path, *overrides)["metrics"]["history"]

    settings = validate(composed(*overrides))
    dataset = load_dataset(settings.dataset, 0)
    backbone = load_backbone(settings.model, 5, 0)
    model = backbone.model.requires_grad_(False).eval()
    geometry = settings.geometry
    assert geometry is not None
    adapter = Adapter(AdapterConfig("depth", settings.strategy), geometry)
    head = list(backbone.head_parameters().values())
    for parameter in head:
        parameter.requires_grad_(True)
    named = dict(adapter.named_parameters())
    cores, firsts = ([p for name, p in named.items() if name.endswith(end)] for end in (".core", ".d_in"))
    rest = [p for name, p in named.items() if not name.endswith((".core", ".d_in"))]
    by_factor: list[dict[str, Any]] = [
        {"params": [*rest, *head]},
        {"params": cores, "lr": ratio * 1e-3},
        {"params": firsts, "weight_decay": decay},
    ]
    optimizer = torch.optim.AdamW(by_factor, lr=1e-3, weight_decay=0.1)
    low = 1e-6 / 1e-3
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: low + (1 - low) * (1 + math.cos(math.pi * step / 3)) / 2
    )
    data, _, collate = encode(dataset.train, dataset.test, settings.dataset, settings.model, "x", None)
    batches = TrainBatches(data, collate, batch_size=20, seed=0).order(1)
    losses = []
    for chosen in batches[:3]:
        batch, labels = collate([data[i] for i in chosen])
        weights = {
            f"blocks.{layer}.attn.qkv.weight": model.get_parameter(f"blocks.{layer}.attn.qkv.weight")
            + 4.0 * torch.cat([update.T for update in adapter.dense(layer)])
            for layer in range(4)
        }
        logits = torch.func.functional_call(model, weights, args=(), kwargs=batch)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert history[0]["train_loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    trained = load_file(tmp_path / "adapter.safetensors")
    for name, parameter in adapter.named_parameters():
        assert (trained[name] - parameter.detach()).norm() < 1e-4 * parameter.norm()


def test_accumulated_batches_are_one_batch(tmp_path: Path) -> None:
    whole = run(tmp_path / "a", *SHORT, "trainer.batch_size=32")
    parts = run(tmp_path / "b", *SHORT, "trainer.batch_size=8", "trainer.accumulation=4")
    assert whole["metrics"]["history"][-1]["step"] == parts["metrics"]["history"][-1]["step"] == 4
    for one, other in zip(whole["metrics"]["history"], parts["metrics"]["history"], strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-5)
        assert one["test_loss"] == pytest.approx(other["test_loss"], rel=1e-5)


def test_max_steps_ends_the_schedule_and_is_evaluated(tmp_path: Path) -> None:
    history = run(tmp_path, *SHORT, "trainer.epochs=9", "trainer.max_steps=3", "optimizer.min_lr=0")["metrics"][
        "history"
    ]
    assert [entry["step"] for entry in history] == [2, 3]
    assert history[-1]["lr"] == pytest.approx(1e-3 * (1 + math.cos(math.pi * 2 / 3)) / 2)


def test_clipping_bounds_the_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def measured(self: torch.optim.AdamW) -> None:
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", measured)
    run(tmp_path / "free", *SHORT)
    free, norms[:] = list(norms), []
    run(tmp_path / "clipped", *SHORT, "trainer.clip_norm=0.1")
    assert min(free) > 0.1
    assert max(norms) <= 0.1 * (1 + 1e-4)


def test_a_loss_that_is_not_finite_stops_the_run_and_the_record_says_so(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"the training loss is (nan|inf) at step \d+, learning rate \d\S*e\+29"):
        run(tmp_path, *SHORT, "optimizer.lr=1e30")
    left = record(tmp_path)
    assert left["status"] == "diverged"
    assert left["failure"]["step"] >= 2
    assert left["failure"]["lr"] > 1e29
    assert not (tmp_path / "adapter.safetensors").exists()


def test_bf16_autocast_trains_float32_parameters(tmp_path: Path) -> None:
    full = run(tmp_path / "a", *SHORT)
    half = run(tmp_path / "b", *SHORT, "trainer.precision=bf16")
    assert all(t.dtype == torch.float32 for t in load_file(tmp_path / "b" / "adapter.safetensors").values())
    one, other = (r["metrics"]["history"][-1]["test_loss"] for r in (full, half))
    assert one != other
    assert one == pytest.approx(other, rel=0.05)


def test_compiled_it_trains_the_same_and_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = run(tmp_path / "eager", *SHORT, "trainer.batch_size=20")
    quick = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)  # inductor would take a minute
    monkeypatch.setattr(torch, "compile", quick)
    monkeypatch.setattr("torch._dynamo.config.error_on_recompile", True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = run(tmp_path / "compiled", *SHORT, "trainer.batch_size=20", "trainer.compile=true")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert len(compiled["metrics"]["history"]) == 2 and compiled["train_examples"] % 20
    for one, other in zip(eager["metrics"]["history"], compiled["metrics"]["history"], strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_without_a_compiler_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(TensLoRAError, match=r"trainer\.compile=true: needs a C\+\+ compiler, and no-such-compiler"):
        run(tmp_path, *SHORT, "trainer.compile=true")


def test_equal_settings_give_equal_bytes_and_other_seeds_others(tmp_path: Path) -> None:
    first, again, other = (
        run(tmp_path / name, *SHORT, f"seed={seed}", "adapter.dropout=0.1")
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert first["metrics"] == again["metrics"] != other["metrics"]
    for file in ("adapter.safetensors", "head.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        assert (tmp_path / "a" / file).read_bytes() != (tmp_path / "c" / file).read_bytes()


def test_workers_do_not_change_a_run_even_with_augmentation(tmp_path: Path) -> None:
    overrides = [*SHORT, "trainer.epochs=1", "dataset.transform.color_jitter=0.4", "dataset.transform.flip=true"]
    alone = run(tmp_path / "a", *overrides)
    helped = run(tmp_path / "b", *overrides, "trainer.workers=2")
    plain = run(tmp_path / "c", *SHORT, "trainer.epochs=1")
    assert alone["metrics"] == helped["metrics"] != plain["metrics"]
    assert alone["digest"] == helped["digest"] != plain["digest"]


def test_a_blow_up_that_only_the_evaluation_sees_is_recorded_too(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"the test loss is nan at step 1"):
        run(tmp_path, *SHORT, "optimizer.lr=1e30", "trainer.max_steps=1")
    assert record(tmp_path)["status"] == "diverged"
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_an_adapter_that_takes_no_part_is_an_error_and_not_a_quiet_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tenslora.attachment import AdaptedLinear

    monkeypatch.setattr(AdaptedLinear, "forward", lambda self, x: self.base[0](x))
    with pytest.raises(TensLoRAError, match=r"tenslora\.tensors\.0\.core has no part in the loss"):
        run(tmp_path, *SHORT)


def test_a_weight_of_the_backbone_that_takes_no_part_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As DINOv2's mask token, which only its pretraining uses.
    import tenslora.harness.backbones as backbones

    load = backbones._load_timm

    def with_a_spare(config: ModelConfig, classes: int) -> backbones.Backbone:
        backbone = load(config, classes)
        backbone.model.register_parameter("spare", torch.nn.Parameter(torch.ones(2)))
        return backbone

    monkeypatch.setattr(backbones, "_load_timm", with_a_spare)
    assert run(tmp_path / "a", *SHORT, "tensor_mode=full")["status"] == "completed"
    assert run(tmp_path / "b", *SHORT)["status"] == "completed"


def test_an_evaluation_that_does_not_fit_goes_on_with_smaller_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tenslora.harness.training import loop

    whole = run(tmp_path / "a", *SHORT)
    sizes: list[int] = []

    def on_a_small_device(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        size = len(next(iter(inputs.values())))
        if not model.training:
            sizes.append(size)
            if size > 40:
                raise torch.OutOfMemoryError("out of memory")
        return logits_of(model, inputs)

    monkeypatch.setattr(loop, "logits_of", on_a_small_device)
    pieces = run(tmp_path / "b", *SHORT)
    assert sizes[:4] == [128, 64, 32, 32]
    assert pieces["digest"] == whole["digest"]
    assert [entry["accuracy"] for entry in pieces["metrics"]["history"]] == [
        entry["accuracy"] for entry in whole["metrics"]["history"]
    ]


def test_an_evaluation_for_which_no_batch_is_small_enough_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tenslora.harness.training import loop

    def full(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        if not model.training:
            raise torch.OutOfMemoryError("out of memory")
        return logits_of(model, inputs)

    monkeypatch.setattr(loop, "logits_of", full)
    with pytest.raises(TensLoRAError, match="does not fit into the memory"):
        run(tmp_path, *SHORT)


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_other_matrices_and_factorizations_are_trained_and_counted_as_planned(
    tmp_path: Path, factorization: str
) -> None:
    from tenslora.harness.config import validate
    from tenslora.ranks import parameter_count
    from tests.running import composed

    overrides = [*SHORT, "tensor_mode=att_qkv_depth", f"factorization={factorization}", "adapter.adapt=all"]
    done, settings = run(tmp_path, *overrides), validate(composed(*overrides))
    assert (done["status"], done["factorization"], done["geometry"]["adapt"]) == ("completed", factorization, "all")
    geometry = settings.geometry
    assert geometry is not None
    assert done["ranks"] == list(settings.strategy.resolve("att_qkv_depth", geometry, factorization))
    planned = parameter_count("att_qkv_depth", geometry, done["ranks"], factorization)
    assert (
        done["adapter_parameters"]
        == planned
        == sum(t.numel() for t in load_file(tmp_path / "adapter.safetensors").values())
    )
