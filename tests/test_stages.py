"""Models whose layers come in stages of different sizes, beside a model of one stage."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tensorly as tl
import torch
from torch import Tensor, nn

from tenslora import Adapter, AdapterConfig, RankStrategy, TensLoRAError, attach, detach, disabled, load, merge, unmerge
from tenslora.adapter import StagedAdapter, load_adapter, make_adapter
from tenslora.constructions import CONSTRUCTIONS, Geometry
from tenslora.decomposition import approximate
from tenslora.files import read_safetensors, write_safetensors
from tenslora.first_step import first_step, over_stages
from tenslora.peft.to_lora import to_peft
from tenslora.projections import Stage, find_projections
from tenslora.rank_pruning import prune
from tenslora.ranks import parameter_count
from tests.factorizations.test_factorizations import dense_updates
from tests.models import HIERARCHICAL, build, inputs, logits, randomised, tensor_of

SMALL = Geometry(d_in=8, heads=2, d_head=4, layers=2)
LARGE = Geometry(d_in=16, heads=4, d_head=4, layers=1)
CASES = [
    *((mode, "tucker") for mode in CONSTRUCTIONS),
    *((mode, other) for mode in CONSTRUCTIONS if mode != "lora" for other in ("cp", "tensor_train", "tensor_guide")),
]


@pytest.fixture(autouse=True)
def _torch_backend() -> None:
    tl.set_backend("pytorch")


def expected_updates(adapter: Adapter) -> Iterator[tuple[int, int, Tensor]]:
    """The updates dW (d_in, width) of query, key and value, with their layers and matrices, as TensorLy builds them."""
    mode, factorization = adapter.config.tensor_mode, adapter.config.factorization
    rows, columns = adapter.grid
    for layer in range(adapter.geometry.layers):
        for row in range(rows):
            tensor = tensor_of(adapter, row * columns + (layer if columns > 1 else 0))
            updates = dense_updates("tensor_train" if mode == "lora" else factorization, tensor, layer)
            for matrix, update in enumerate(updates):
                yield layer, matrix if rows == 1 else row, update


@functools.cache
def untouched(name: str) -> tuple[nn.Module, Tensor, list[Stage]]:
    """A backbone, its logits and its stages."""
    model = build(name)
    return model, logits(model, inputs(name)), find_projections(model)


@pytest.mark.parametrize("name", ["hf_deit", "hf_swin"])
@pytest.mark.parametrize(("mode", "factorization"), CASES)
def test_deit_and_swin_in_every_construction_and_factorization(
    name: str, mode: str, factorization: str, tmp_path: Path
) -> None:
    backbone, plain, stages = untouched(name)
    model, batch = copy.deepcopy(backbone), inputs(name)
    config = AdapterConfig(mode, RankStrategy("isorank", rank=2), factorization=factorization)
    adapter = attach(model, config)
    torch.testing.assert_close(logits(model, batch), plain, rtol=0, atol=1e-15)

    # counts that need no torch
    ranks = [config.rank_strategy.resolve(mode, geometry, factorization) for geometry, _ in stages]
    assert ranks == [of_stage.ranks for of_stage in adapter.stages]
    counts = [
        parameter_count(mode, geometry, of_stage, factorization)
        for (geometry, _), of_stage in zip(stages, ranks, strict=True)
    ]
    assert counts == [sum(p.numel() for p in of_stage.parameters()) for of_stage in adapter.stages]
    assert sum(counts) == sum(p.numel() for p in adapter.parameters())

    randomised(adapter)
    adapted = logits(model, batch)
    torch.autograd.backward(adapted.square().sum())
    for where, parameter in adapter.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, where

    # what merging adds to each weight is alpha times an update of its own stage
    merge(model)
    torch.testing.assert_close(logits(model, batch), adapted, rtol=0, atol=1e-10)
    for of_stage, (_, targets) in zip(adapter.stages, stages, strict=True):
        expected = {(layer, matrix): update for layer, matrix, update in expected_updates(of_stage)}
        for target in targets:
            merged = model.get_submodule(target.path).get_parameter("weight")
            added = merged - target.linear.get_parameter("weight")
            for columns in target.columns:
                update = expected.pop((target.layer, target.group[columns.matrix]))
                rows = columns.of(torch.arange(len(added))).flatten()
                torch.testing.assert_close(added[rows], 4.0 * update.T, rtol=0, atol=1e-12)
        assert not expected
    unmerge(model)
    with disabled(model):
        torch.testing.assert_close(logits(model, batch), plain, rtol=0, atol=1e-10)
    assert detach(model) is adapter

    loaded = load_adapter(adapter.save(tmp_path / "adapter.safetensors"))
    assert [stage.geometry for stage in loaded.stages] == [geometry for geometry, _ in stages]
    for ours, theirs in zip(loaded.parameters(), adapter.parameters(), strict=True):
        assert torch.equal(ours, theirs.float())


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width)


def test_layers_of_equal_sizes_form_a_stage_wherever_they_are() -> None:
    model = nn.Sequential(_Attention(8, 2), _Attention(16, 4), _Attention(8, 2), _Attention(8, 4))
    stages = find_projections(model)
    assert [geometry for geometry, _ in stages] == [
        SMALL,
        LARGE,
        Geometry(d_in=8, heads=4, d_head=2, layers=1),
    ]
    places = [[(target.path, target.layer, target.model_layer) for target in targets] for _, targets in stages]
    assert places == [[("0.qkv", 0, 0), ("2.qkv", 1, 2)], [("1.qkv", 0, 1)], [("3.qkv", 0, 3)]]


def test_chosen_layers_are_counted_through_all_stages() -> None:
    model = nn.Sequential(_Attention(8, 2), _Attention(16, 4), _Attention(8, 2), _Attention(16, 4))
    stages = find_projections(model, layers=[1, 2, 3])
    places = [[(target.path, target.layer, target.model_layer) for target in targets] for _, targets in stages]
    assert places == [[("1.qkv", 0, 1), ("3.qkv", 1, 3)], [("2.qkv", 0, 2)]]


SWIN_TINY = [Geometry(96 * 2**i, 3 * 2**i, 32, layers) for i, layers in enumerate((2, 2, 6, 2))]


@pytest.mark.parametrize("mode", CONSTRUCTIONS)
def test_every_stage_of_swin_has_about_as_many_parameters_as_its_lora(mode: str) -> None:
    for geometry in SWIN_TINY:
        budget = 4 * 2 * geometry.d_in * 3 * geometry.layers
        count = parameter_count(mode, geometry, RankStrategy("isoparameters").resolve(mode, geometry))
        assert abs(count / budget - 1) <= 0.03  # the ranks are whole numbers


def test_two_stages_do_not_start_alike_unless_equal_seeds_are_asked_for() -> None:
    narrow_heads = dataclasses.replace(SMALL, heads=4, d_head=2)  # the same shapes where heads are not stacked
    for seeds, equal in (("distinct", False), ("equal", True)):
        first, second = make_adapter(AdapterConfig("qkv_depth", tensor_seeds=seeds), [SMALL, narrow_heads]).stages
        starts = [stage.get_parameter("tensors.0.d_in") for stage in (first, second)]
        assert torch.equal(*starts) == equal
        alone = Adapter(AdapterConfig("qkv_depth", tensor_seeds=seeds), SMALL)
        assert all(map(torch.equal, first.parameters(), alone.parameters()))


@pytest.mark.parametrize("mode", ["lora", "qkv_depth", "att"])
def test_the_first_step_is_the_root_mean_square_over_all_matrices(mode: str) -> None:
    config = AdapterConfig(mode, RankStrategy("isorank", rank=2), alpha=1.0)
    adapter = make_adapter(config, [SMALL, LARGE])
    steps = [first_step(mode, stage.geometry, stage.ranks) for stage in adapter.stages]
    assert None not in steps
    expected = sum(
        3 * stage.geometry.layers * (step or 0) ** 2 for stage, step in zip(adapter.stages, steps, strict=True)
    )
    assert adapter.first_step == pytest.approx((expected / 9) ** 0.5)
    # measured: one step of AdamW with learning rate 1 on a random gradient of every update
    generator, squares = torch.Generator().manual_seed(0), 0.0
    for stage in adapter.stages:
        updates = [update for layer in range(stage.geometry.layers) for update in stage.dense(layer)]
        torch.autograd.backward(updates, [torch.randn(update.shape, generator=generator) for update in updates])
    torch.optim.AdamW(adapter.parameters(), lr=1.0, eps=1e-30, weight_decay=0.0).step()
    with torch.no_grad():
        if mode == "lora":  # whose A has moved too
            for stage, fresh in zip(adapter.stages, make_adapter(config, [SMALL, LARGE]).stages, strict=True):
                for name, parameter in stage.named_parameters():
                    if not name.endswith(stage.zero_parameter):
                        parameter.copy_(fresh.get_parameter(name))
        for stage in adapter.stages:
            for layer in range(stage.geometry.layers):
                squares += sum(update.square().sum().item() for update in stage.dense(layer))
    assert (squares / 9) ** 0.5 == pytest.approx(adapter.first_step, rel=0.25)


def test_every_stage_gets_the_first_step_of_its_own_lora() -> None:
    strategy = RankStrategy("isorank", rank=2)
    adapter = make_adapter(AdapterConfig("qkv_depth", strategy, scaling="first_step"), [SMALL, LARGE])
    lora = make_adapter(AdapterConfig("lora", strategy), [SMALL, LARGE])
    assert [stage.first_step for stage in adapter.stages] == pytest.approx([stage.first_step for stage in lora.stages])
    assert len({stage.scale for stage in adapter.stages}) == 2
    assert adapter.first_step == pytest.approx(lora.first_step)
    assert over_stages([3.0], [SMALL]) == 3.0


@pytest.mark.parametrize("name", HIERARCHICAL)
@pytest.mark.parametrize("mode", ["lora", "qkv_depth", "att_site"])
def test_hierarchical_models_are_saved_merged_and_detached(name: str, mode: str, tmp_path: Path) -> None:
    model, batch = build(name), inputs(name)
    plain = logits(model, batch)
    adapter = randomised(attach(model, AdapterConfig(mode, adapt="qkvo")))
    assert isinstance(adapter, StagedAdapter) and len(adapter.stages) == 2
    adapted = logits(model, batch)
    assert (adapted - plain).abs().max() > 1e-3
    loaded = build(name)
    load(loaded, adapter.save(tmp_path / "adapter.safetensors")).double()
    torch.testing.assert_close(logits(loaded, batch), adapted, rtol=0, atol=1e-4)  # a file holds float32
    merge(model)
    torch.testing.assert_close(logits(model, batch), adapted, rtol=0, atol=1e-9)
    detach(model)
    torch.testing.assert_close(logits(model, batch), adapted, rtol=0, atol=1e-9)


def test_an_adapter_of_other_stages_is_refused() -> None:
    one = Adapter(AdapterConfig("qkv"), SMALL)
    with pytest.raises(TensLoRAError, match=r"SwinFor\w+: the number of stages is 1 in the adapter and 2 in"):
        attach(build("hf_swin"), one)
    other = make_adapter(AdapterConfig("qkv"), [SMALL, dataclasses.replace(LARGE, layers=3)])
    message = r"does not fit \w+: layers of stage 1 is 3 in the adapter and 1 in the backbone$"
    with pytest.raises(TensLoRAError, match=message):
        attach(build("hf_swin"), other)


def test_a_saved_adapter_keeps_the_ranks_and_the_scale_of_every_stage(tmp_path: Path) -> None:
    config = AdapterConfig("depth", RankStrategy("isorank", rank=2), init="normal", scaling="first_step")
    adapter = make_adapter(config, [SMALL, LARGE], ranks=[(3, 2, 2), (4, 5, 1)])
    path = adapter.save(tmp_path / "a.safetensors")
    again = load_adapter(path)
    assert isinstance(again, StagedAdapter)
    for ours, theirs in zip(again.stages, adapter.stages, strict=True):
        assert (ours.geometry, ours.ranks, ours.scale) == (theirs.geometry, theirs.ranks, theirs.scale)
    assert all(map(torch.equal, again.parameters(), adapter.parameters()))
    assert again.save(tmp_path / "b.safetensors").read_bytes() == path.read_bytes()
    assert {name.rpartition(".tensors.")[0] for name in read_safetensors(path)[1]} == {"stage.0", "stage.1"}


@pytest.mark.parametrize(
    ("place", "value", "problem"),
    [
        (("stages",), [], "stages: must be two or more"),
        (("stages",), 3, "stages=3: must be a list"),
        (("stages", 1, "ranks"), [2, 2], r"stage\.1\.ranks=\[2, 2\]: must be 4 whole numbers"),
        (("stages", 1, "geometry", "heads"), 0, r"stages\[1\]\.geometry\.heads=0: must be at least 1"),
        (("stages", 0, "geometry", "layers"), 10**9, r"stage\.0\.tensors\.0\.depth has the shape"),
        (("ranks",), [2], "there is no such field"),
    ],
)
def test_a_damaged_header_is_refused_in_one_line(
    place: tuple[Any, ...], value: Any, problem: str, tmp_path: Path
) -> None:
    path = make_adapter(AdapterConfig("qkv_depth"), [SMALL, LARGE]).save(tmp_path / "a.safetensors")
    header, tensors = read_safetensors(path)
    entry: Any = header
    for key in place[:-1]:
        entry = entry[key]
    entry[place[-1]] = value
    with pytest.raises(TensLoRAError, match=rf"a\.safetensors: not a readable adapter: .*{problem}") as caught:
        load_adapter(write_safetensors(path, tensors, header))
    assert len(str(caught.value).splitlines()) == 1


class _Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_Attention(8, 2), _Attention(8, 4)])

    def forward(self, x: Tensor) -> list[Tensor]:
        return [block.get_submodule("qkv")(x) for block in self.blocks]


def test_products_of_stages_do_not_mix_in_one_forward_pass() -> None:
    # Both stages have the same shapes, so that nothing would notice a product of the other stage.
    model, x = _Blocks(), torch.randn(3, 8)
    adapter = attach(model, AdapterConfig("qkv"))
    assert len(adapter.stages) == 2
    randomised(adapter).float()
    outside = model.forward(x)  # no pass begins, so nothing is cached
    for ours, theirs in zip(model(x), outside, strict=True):
        torch.testing.assert_close(ours, theirs)


def _random_updates(geometry: Geometry, generator: torch.Generator) -> list[list[Tensor]]:
    return [
        [torch.randn(geometry.d_in, width, generator=generator) for width in geometry.widths]
        for _ in range(geometry.layers)
    ]


@pytest.mark.parametrize("factorization", ["tucker", "tensor_train"])
def test_every_stage_is_approximated_by_itself(factorization: str) -> None:
    config = AdapterConfig("qkv_depth", RankStrategy("isorank", rank=2, cap=True), factorization=factorization)
    generator = torch.Generator().manual_seed(0)
    given = [_random_updates(geometry, generator) for geometry in (SMALL, LARGE)]
    adapter = make_adapter(config, [SMALL, LARGE]).double()
    together = approximate(adapter, given)
    squares = [sum(update.square().sum().item() for layer in each for update in layer) for each in given]
    alone = [approximate(Adapter(config, g).double(), [each]) for g, each in zip((SMALL, LARGE), given, strict=True)]
    lost = sum(size * each.error**2 for size, each in zip(squares, alone, strict=True))
    assert together.error == pytest.approx((lost / sum(squares)) ** 0.5)
    for name, left in together.energy.items():
        expected = sum(size * each.energy[name] for size, each in zip(squares, alone, strict=True)) / sum(squares)
        assert left == pytest.approx(expected)
    # a stage without updates gets none, and is no reason to refuse the others
    given[0] = [[torch.zeros_like(update) for update in layer] for layer in given[0]]
    assert approximate(adapter, given).error == pytest.approx(alone[1].error)
    assert all(update.abs().max() == 0 for layer in range(2) for update in adapter.stages[0].dense(layer))


def test_stages_are_pruned_one_by_one_with_the_optimizer_of_all() -> None:
    config = AdapterConfig("qkv_depth", RankStrategy("isorank", rank=4, cap=True))
    adapter, twin = (make_adapter(config, [SMALL, LARGE]) for _ in range(2))
    optimizers = [torch.optim.AdamW(each.parameters()) for each in (adapter, twin)]

    def step(adapter: Adapter | StagedAdapter, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        updates = [u for stage in adapter.stages for layer in range(stage.geometry.layers) for u in stage.dense(layer)]
        torch.autograd.backward([(update.sin() + update).sum() for update in updates])
        optimizer.step()

    for each, optimizer in zip((adapter, twin), optimizers, strict=True):
        for _ in range(2):
            step(each, optimizer)
    budgets = [100, 150]
    for stage, budget in zip(adapter.stages, budgets, strict=True):
        prune(stage, budget, optimizers[0])
        assert sum(p.numel() for p in stage.parameters()) <= budget
    alone = Adapter(config, LARGE, stage=1)
    alone.load_state_dict(twin.stages[1].state_dict())
    assert prune(alone, budgets[1]) == adapter.stages[1].ranks != adapter.stages[0].ranks
    assert all(map(torch.equal, alone.parameters(), adapter.stages[1].parameters()))
    step(adapter, optimizers[0])  # the moments have the new shapes


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_hierarchical_models_become_loras_of_peft(name: str) -> None:
    model, batch = build(name), inputs(name)
    randomised(attach(model, AdapterConfig("qkv_depth")))
    adapted = logits(model, batch)
    torch.testing.assert_close(logits(to_peft(model).double(), batch), adapted, rtol=0, atol=1e-10)
