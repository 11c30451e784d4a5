from __future__ import annotations

import functools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from tenslora.errors import TensLoRAError
from tenslora.factorizations import FACTORIZATIONS
from tenslora.harness.data.encoding import Encoded, TokensOf
from tenslora.harness.training import processes
from tenslora.harness.training.loop import Diverged
from tenslora.harness.training.tasks import CLASSIFICATION
from tests.running import SHORT, configured, record, run
from tests.toy import LinearModel, examples, fit_toy, toy_data


@pytest.mark.parametrize(("core_ratio", "factor_decay"), [(1.0, 0.1), (8.0, 0.5)])
def test_the_loop_is_adamw_on_the_mean_loss(tmp_path: Path, core_ratio: float, factor_decay: float) -> None:
    # By hand: the same order of examples, torch's own loss, schedule and optimizer, and the update built densely.
    from tenslora.adapter import Adapter
    from tenslora.harness.backbones import load_backbone
    from tenslora.harness.data import load_dataset
    from tenslora.harness.data.batches import TrainBatches
    from tenslora.harness.data.encoding import encode

    overrides = [*SHORT, "tensor_mode=depth", "trainer.batch_size=20", "optimizer.weight_decay=0.1", "trainer.epochs=1"]
    overrides += [f"optimizer.core_lr_ratio={core_ratio}", f"optimizer.factor_weight_decay.d_in={factor_decay}"]
    [entry] = run(tmp_path, *overrides)["metrics"]["history"]

    settings = configured(*overrides)
    dataset = load_dataset(settings.dataset, 0)
    backbone = load_backbone(settings.model, 5, 0)
    model = backbone.model.requires_grad_(False).eval()
    assert settings.adapter is not None and settings.geometries is not None
    adapter = Adapter(settings.adapter, settings.geometries[0])
    head = list(backbone.head_parameters().values())
    for parameter in head:
        parameter.requires_grad_(True)
    named = dict(adapter.named_parameters())
    cores, input_factors = ([p for name, p in named.items() if name.endswith(end)] for end in (".core", ".d_in"))
    rest = [p for name, p in named.items() if not name.endswith((".core", ".d_in"))]
    groups: list[dict[str, Any]] = [
        {"params": [*rest, *head]},
        {"params": cores, "lr": core_ratio * 1e-3},
        {"params": input_factors, "weight_decay": factor_decay},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)
    floor = 1e-6 / 1e-3
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: floor + (1 - floor) * (1 + math.cos(math.pi * step / 3)) / 2
    )
    data = encode(dataset, settings.dataset, backbone, None)
    losses = []
    for batch in TrainBatches(data.train, data.collate, batch_size=20, seed=0).order(1):
        inputs, labels = data.collate([data.train[i] for i in batch])
        weights = {
            f"blocks.{layer}.attn.qkv.weight": model.get_parameter(f"blocks.{layer}.attn.qkv.weight")
            + 4.0 * torch.cat([update.T for update in adapter.dense(layer)])
            for layer in range(4)
        }
        loss = F.cross_entropy(torch.func.functional_call(model, weights, args=(), kwargs=inputs), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert len(losses) == entry["step"] == 3
    assert entry["train_loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    trained = load_file(tmp_path / "adapter.safetensors")
    for name, parameter in named.items():
        assert (trained[name] - parameter.detach()).norm() < 1e-4 * parameter.norm()


def test_accumulated_batches_are_one_batch(tmp_path: Path) -> None:
    at_once = fit_toy(tmp_path, "trainer.batch_size=32")
    accumulated = fit_toy(tmp_path, "trainer.batch_size=8", "trainer.accumulation=4")
    assert at_once.steps == accumulated.steps == 4
    for one, other in zip(at_once.history, accumulated.history, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_max_steps_ends_the_schedule_and_is_evaluated(tmp_path: Path) -> None:
    history = fit_toy(tmp_path, "trainer.epochs=9", "trainer.max_steps=3", "optimizer.min_lr=0").history
    assert [entry["step"] for entry in history] == [2, 3]
    assert history[-1]["lr"] == pytest.approx(1e-3 * (1 + math.cos(math.pi * 2 / 3)) / 2)


def test_clipping_bounds_the_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def noting_the_norm(self: torch.optim.AdamW) -> None:
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting_the_norm)
    fit_toy(tmp_path)
    unclipped, norms[:] = list(norms), []
    fit_toy(tmp_path, "trainer.clip_norm=0.1")
    assert min(unclipped) > 0.1
    assert norms == pytest.approx([0.1] * 4, rel=1e-4)


def test_a_training_loss_that_is_not_finite_stops_the_run_and_the_record_says_so(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"the training loss is (nan|inf) at step \d+, learning rate \d\S*e\+08"):
        run(tmp_path, *SHORT, "optimizer.lr=1e9", "adapter.alpha=1e6")
    left = record(tmp_path)
    assert left["status"] == "diverged"
    assert left["failure"]["step"] >= 2
    assert left["failure"]["lr"] > 1e8
    assert not (tmp_path / "adapter.safetensors").exists()


class HugeOutputs(LinearModel):
    """A model whose outputs overflow as soon as its weights are large."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1e30


def test_a_test_loss_that_is_not_finite_stops_the_run_too(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"the test loss is (nan|inf) at step 1") as caught:
        fit_toy(tmp_path, "optimizer.lr=1e9", "trainer.max_steps=1", model=HugeOutputs())
    assert (caught.value.state.epochs, caught.value.state.steps) == (0, 1)
    assert not (tmp_path / "checkpoint.safetensors").exists()


@pytest.mark.parametrize(("every", "scored"), [("2", [2, 4, 5]), ("9", [5]), ("last", [5])])
def test_epochs_that_are_not_scored_change_nothing(every: str, scored: list[int], tmp_path: Path) -> None:
    entries: list[dict[str, Any]] = []
    words = ["trainer.epochs=5", f"trainer.evaluate={every}"]
    history = fit_toy(tmp_path / "whole", "trainer.epochs=5").history
    some = fit_toy(tmp_path / "some", *words, on_epoch=entries.append)
    assert some.history == entries == [history[epoch - 1] for epoch in scored]
    assert some.epochs == 5


def test_a_run_killed_after_an_epoch_that_was_not_scored_goes_on_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["trainer.epochs=3", "trainer.evaluate=last"]
    whole = fit_toy(tmp_path / "whole", *words)
    step, steps = torch.optim.AdamW.step, 0

    def stopping_in_the_third_epoch(self: torch.optim.AdamW) -> None:
        nonlocal steps
        steps += 1
        if steps == 6:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(torch.optim.AdamW, "step", stopping_in_the_third_epoch)
        fit_toy(tmp_path / "broken", *words)
    resumed = fit_toy(tmp_path / "broken", *words, "resume=true")
    assert resumed.history == whole.history
    assert (resumed.epochs, resumed.steps) == (3, 6)


def test_a_resumed_run_reports_the_epochs_before_it(tmp_path: Path) -> None:
    entries: list[dict[str, Any]] = []
    fit_toy(tmp_path, "trainer.epochs=2", on_epoch=entries.append)
    fit_toy(tmp_path, "trainer.epochs=2", "resume=true", on_epoch=entries.append)
    assert [entry["epoch"] for entry in entries] == [1, 2, 1, 2]
    assert [list(entry.items()) for entry in entries[:2]] == [list(entry.items()) for entry in entries[2:]]


def test_a_run_is_not_resumed_on_examples_that_were_edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit_toy(tmp_path, "trainer.epochs=2")
    with monkeypatch.context() as edited:
        edited.setattr("tests.toy.examples", lambda split, *_: examples(split + 5))
        with pytest.raises(TensLoRAError, match="the dataset has been edited"):
            fit_toy(tmp_path, "trainer.epochs=2", "resume=true")
    data = toy_data(CLASSIFICATION, ("accuracy",), ())
    monkeypatch.setattr("tests.toy.toy_data", lambda *_: replace(data, classes=("b", "a")))
    with pytest.raises(TensLoRAError, match="the dataset has been edited"):
        fit_toy(tmp_path, "trainer.epochs=2", "resume=true")


def test_a_run_is_not_resumed_from_weights_that_were_replaced(tmp_path: Path) -> None:
    fit_toy(tmp_path, "trainer.epochs=2")
    replaced = LinearModel()
    replaced.linear.weight.data[0, 0] += 0.1
    with pytest.raises(TensLoRAError, match=r"from other weights: the files of .* or of warm_start"):
        fit_toy(tmp_path, "trainer.epochs=2", "resume=true", model=replaced)


def test_a_run_is_not_resumed_on_texts_that_were_edited() -> None:
    def digest(*texts: list[int]) -> str:
        of_texts = Encoded(range(2), [0, 1], TokensOf({"input_ids": list(texts)}))
        return replace(toy_data(CLASSIFICATION, ("accuracy",), ()), train=of_texts).digest()

    digests = {digest([2, 5], [7]), digest([2], [5, 7]), digest([2, 5], [8]), digest([7], [2, 5])}
    assert len(digests) == 4
    assert digest([2, 5], [7]) in digests


def test_one_digest_is_that_of_the_examples_in_every_division() -> None:
    def ids(letter: str) -> list[int]:
        return [ord(letter)]

    def of(train: str, scored: str) -> str:
        parts = [
            Encoded(range(len(texts)), [ord(each) % 2 for each in texts], TokensOf({"input_ids": [*map(ids, texts)]}))
            for texts in (train, scored)
        ]
        data = replace(toy_data(CLASSIFICATION, ("accuracy",), ()), train=parts[0], scored=parts[1])
        return data.digest_in_any_order()

    assert of("abc", "de") == of("ed", "cba")
    assert len({of("abc", "de"), of("abc", "d"), of("abd", "de"), of("ac", "de")}) == 4


def test_a_run_resumed_after_its_last_epoch_makes_its_predictions_again(tmp_path: Path) -> None:
    whole = fit_toy(tmp_path).predictions["test"]
    resumed = fit_toy(tmp_path, "resume=true").predictions["test"]
    assert np.array_equal(resumed.outputs, whole.outputs)
    assert np.array_equal(resumed.labels, whole.labels)


def test_bf16_autocast_trains_float32_parameters(tmp_path: Path) -> None:
    model = LinearModel()
    full, half = fit_toy(tmp_path).history[-1], fit_toy(tmp_path, "trainer.precision=bf16", model=model).history[-1]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert full["test_loss"] != half["test_loss"]
    assert full["test_loss"] == pytest.approx(half["test_loss"], rel=0.05)


def test_a_compiled_model_trains_the_same_and_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = [*SHORT, "trainer.epochs=1", "trainer.batch_size=20"]  # batches of 20, 20 and 10
    overrides += ["model.pretrained=false", "model.options.depth=2", "model.geometry.layers=2"]
    eager = run(tmp_path / "eager", *overrides)
    quick = functools.partial(torch.compile, backend="aot_eager", fullgraph=True)  # inductor would take a minute
    monkeypatch.setattr(torch, "compile", quick)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):  # monkeypatch would leave torch without this setting
        compiled = run(tmp_path / "compiled", *overrides, "trainer.compile=true")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert compiled["metrics"]["history"] == [pytest.approx(entry, rel=1e-4) for entry in eager["metrics"]["history"]]


def test_without_a_compiler_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(TensLoRAError, match=r"trainer\.compile=true: needs a C\+\+ compiler, but no-such-compiler"):
        fit_toy(tmp_path, "trainer.compile=true")


class Drawing(LinearModel):
    """Draws a random number in each training step, as dropout does, and notes it."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.drawn.append(torch.rand(()).item())
        return super().forward(x)


def test_every_epoch_and_every_seed_drops_other_entries_and_equal_runs_the_same(tmp_path: Path) -> None:
    def drawn(name: str, *words: str) -> list[float]:
        model = Drawing()
        fit_toy(tmp_path / name, "trainer.epochs=3", *words, model=model)
        return model.drawn

    first = drawn("first")
    assert len(first) == len(set(first)) == 6  # two steps in each epoch
    assert drawn("again") == first
    assert not set(drawn("other", "seed=1")) & set(first)


def test_equal_settings_give_equal_bytes_and_other_seeds_others(tmp_path: Path) -> None:
    one, again, other = (
        run(tmp_path / name, *SHORT, "trainer.epochs=1", f"seed={seed}", "adapter.dropout=0.1")
        for name, seed in (("one", 3), ("again", 3), ("other", 4))
    )
    assert one["metrics"] == again["metrics"] != other["metrics"]
    for file in ("adapter.safetensors", "head.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
        assert (tmp_path / "one" / file).read_bytes() != (tmp_path / "other" / file).read_bytes()


def test_workers_do_not_change_a_run_even_with_augmentation(tmp_path: Path) -> None:
    overrides = [*SHORT, "trainer.epochs=1"]
    augmentation = ["dataset.transform.color_jitter=0.4", "dataset.transform.flip=true"]
    alone = run(tmp_path / "alone", *overrides, *augmentation)
    with_workers = run(tmp_path / "workers", *overrides, *augmentation, "trainer.workers=2")
    plain = run(tmp_path / "plain", *overrides)
    assert alone["metrics"] == with_workers["metrics"] != plain["metrics"]
    assert alone["digest"] == with_workers["digest"] != plain["digest"]


def test_an_adapter_that_takes_no_part_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tenslora.adapted_linear import AdaptedLinear

    def without_update(linear: AdaptedLinear, x: Tensor) -> Tensor:
        linear.layer_update.call.called = True
        plain: Tensor = linear.plain_class.forward(linear, x)
        return plain

    monkeypatch.setattr(AdaptedLinear, "forward", without_update)
    with pytest.raises(TensLoRAError, match=r"tenslora\.tensors\.0\.core has no part in the loss"):
        run(tmp_path, *SHORT)


def test_a_weight_of_the_backbone_that_takes_no_part_is_no_error(tmp_path: Path) -> None:
    model = LinearModel()
    model.register_parameter("mask_token", nn.Parameter(torch.ones(2)))  # as in DINOv2
    assert fit_toy(tmp_path, model=model).epochs == 2


@pytest.mark.parametrize("factorization", FACTORIZATIONS)
def test_other_matrices_and_factorizations_are_trained_and_counted_as_planned(
    tmp_path: Path, factorization: str
) -> None:
    from tenslora.ranks import parameter_count

    overrides = [*SHORT, "trainer.max_steps=1", "tensor_mode=att_qkv_depth", f"factorization={factorization}"]
    overrides += ["adapter.adapt=all"]
    trained, settings = run(tmp_path, *overrides), configured(*overrides)
    assert (trained["status"], trained["factorization"]) == ("completed", factorization)
    assert settings.geometries is not None
    (geometry,) = settings.geometries
    assert trained["ranks"] == list(settings.rank_strategy.resolve("att_qkv_depth", geometry, factorization))
    planned = parameter_count("att_qkv_depth", geometry, trained["ranks"], factorization)
    saved = load_file(tmp_path / "adapter.safetensors").items()
    counted = sum(tensor.numel() for name, tensor in saved if not name.endswith(".noise"))
    assert trained["adapter_parameters"] == planned == counted


@pytest.mark.parametrize("metric", ["pearson", "f1"])  # for a regression, and for two classes
def test_a_metric_of_another_task_is_refused_before_the_first_step(metric: str, tmp_path: Path) -> None:
    model = LinearModel()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(TensLoRAError, match=rf"^dataset\.metrics={metric}: must be one of accuracy, matthews for a cl"):
        fit_toy(tmp_path, "trainer.epochs=1", "trainer.max_steps=1", model=model, metrics=("accuracy", metric))
    assert all(map(torch.equal, before, model.parameters()))


def test_an_evaluation_exchanges_nothing_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # DistributedDataParallel sends buffers in every forward pass, of which the processes need different numbers.
    class Exchanging(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **inputs: Tensor) -> Any:
            assert self.training
            return self.module(**inputs)

    monkeypatch.setattr(processes.Processes, "wrap", lambda _, model: Exchanging(model))
    assert len(fit_toy(tmp_path).predictions) == 1


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        (
            "DataLoader worker (pid 7) is killed by signal: Killed. ",
            r"trainer\.workers=0: a process that reads examples ",
        ),
        ("[gloo/pair.cc:545] Connection reset by peer", r"another process has ended, or does not answer \(.*by peer\)"),
    ],
)
def test_another_process_that_is_killed_in_a_step_is_one_line(
    reason: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def killed(_: Tensor) -> None:
        raise RuntimeError(reason)

    monkeypatch.setattr(torch.autograd, "backward", killed)
    monkeypatch.setattr(processes.Processes, "answered", lambda _: processes._answered())
    with pytest.raises(TensLoRAError, match=f"^{message}"):
        fit_toy(tmp_path)
